#!/usr/bin/env python
"""Explains the matches of a trained model on one HTML page that needs nothing else.

    python examples/explain_matches.py --checkpoint log/casn_pcb/model/model.pth.tar-10

The checkpoint is one of train_casn_pcb.py, which must lie beside this file: it says how data and
model are made. Which ones is read from the results.json that training left two folders above the
checkpoint; without it, give the options that it was trained with.
"""

import argparse
import json
import os
from pathlib import Path

from train_casn_pcb import build_engine, make_parser, parse_args

from casn_plugin.explanation import save_report

KEPT = ("preset", "root", "backbone")


def main(argv: list[str] | None = None) -> list[Path]:
    """Ranks with the checkpoint and saves a page for each data set; returns their paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s --checkpoint FILE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a trained model")
    add("--out", default="report.html", help="file to write; of several data sets, one each")
    add("--number", type=int, default=5, help="so many of the worst and of the best queries")
    add("--topk", type=int, default=5, help="matches to show for each, 1 to 10")
    own, others = parser.parse_known_args(argv)
    checkpoint, out = Path(own.checkpoint), Path(own.out)
    if not checkpoint.is_file():
        parser.error(f"--checkpoint: there is no file {checkpoint}")
    if own.number < 0 or not 1 <= own.topk <= 10:
        parser.error(
            f"--number must be >= 0 and --topk in 1 to 10, got {own.number} and {own.topk}"
        )
    if out.is_dir():
        parser.error(f"--out must name a file, but {out} is a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    given = []
    trained = checkpoint.parent.parent / "results.json"
    if trained.is_file():
        try:
            saved = json.loads(trained.read_text())["args"]
            given = [f"--{name}={saved[name]}" for name in KEPT if saved.get(name)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            parser.error(f"{trained} can't be read ({error!r}): move it away, and give the options")
    ranked = ["--test-only", "--weights", str(checkpoint)]
    args = parse_args(make_parser(), [*given, *others, *ranked])
    engine = build_engine(args)
    engine.run(test_only=True)
    paths = []
    for name, results in engine.results.items():
        path = out if len(engine.results) == 1 else out.with_stem(f"{out.stem}_{name}")
        facts = {
            "Data": name,
            "Queries": str(len(engine.ranked[name])),
            "Gallery images": str(len(engine.test_loader[name]["gallery"].dataset)),
            "Backbone": args.backbone,
            "Image size": f"{args.height} x {args.width}",
            "Checkpoint": os.fspath(checkpoint),
        }
        title = f"Why these matches? {name}"
        explained = engine.explain(name, topk=own.topk)
        options = {"title": title, "facts": facts, "number": own.number}
        paths.append(save_report(path, explained, results, progress=True, **options))
        print(f"Saved {path}: {path.stat().st_size / 2**20:.1f} MiB, open it in any browser")
    return paths


if __name__ == "__main__":
    main()
