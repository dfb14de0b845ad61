#!/usr/bin/env python
r"""Trains and ranks the rows of the paper's Table 3 over several seeds.

On the embedded data set of rendered pedestrians, on the CPU:

    python examples/experiments/ablation.py

On any image data set of torchreid below --root, as the paper trains it:

    python examples/experiments/ablation.py --data market1501 --root reid-data

On pictures in Market-1501's layout, small and quick, with ImageNet's MobileNetV2:

    python examples/experiments/ablation.py --data market1501 --name ward --root ward \
        --backbone mobilenet_v2 --weights mobilenet_v2-b0353104.pth

Each run becomes a line of a file below --results, and is skipped where it is there. With
--study choices, one choice that the paper leaves open is changed at a time. The tables and plots
are made by tables.py of the files alone.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import protocols
import torch
from explained import faithfulness_of
from gradients import gradient_norms, probe
from measurements import measure
from results import ROOT, Run, Study, provenance, rounded
from robustness import robustness
from studies import FAMILIES, PROTOCOLS, STUDIES, file_of, names_of, runs_of
from tqdm import tqdm

from casn_plugin.engine import EMBEDDED_DATASET
from casn_plugin.training import DivergedError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, and as ``runs`` what they ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="embedded", help="'embedded', or a data set of torchreid below --root")
    add("--root", default="", help="folder of torchreid's data sets")
    add("--name", help="what the results are called, by default as the data")
    add("--backbone", choices=PROTOCOLS, help="of the rows IDE, and what goes with it for PCB: "
        "'resnet_slim' from scratch on a CPU (by default of the embedded data), 'mobilenet_v2' at "
        "160x64, or 'resnet50' as the paper trains (of all other data)")  # fmt: skip
    add("--weights", help="initial weights, as train_casn_pcb.py takes them")
    add("--identities", type=int, help="train on so many first identities only")
    add("--topk", type=int, help="compare the attention of so many nearest by features only")
    add("--max-epoch", type=int, help="epochs to train, by default as the protocol says")
    add("--study", choices=STUDIES, default="table", help="the rows of the paper; one open "
        "choice at a time; the rows, with how faithful attention is and what changed queries "
        "cost; or readings of Eq. 2")  # fmt: skip
    add("--family", choices=FAMILIES, default="IDE", help="whose rows --study choices varies")
    add("--only", nargs="+", help="rows of the table, or choices, e.g. 'CASN(IDE)', λ2, 'λ2: 0.5'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--results", type=Path, default=ROOT / "docs" / "results", help="folder of their files")
    add("--logs", type=Path, default=Path("log/ablation"), help="what the runs print")
    add("--device", choices=["cpu", "cuda"], help="by default CUDA where there is one")
    add("--jobs", type=int, help="runs at a time: by default one a device, or one a core with one "
        "thread each")  # fmt: skip
    add("options", nargs="*", metavar="-- OPTIONS", help="more options of protocols.py")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count()
    args.jobs = args.jobs or devices or 1
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if (args.data == "embedded") != (not args.root):
        parser.error(f"--data {args.data}: expected 'embedded' without --root, another with")
    of = args.data if args.identities is None else f"{args.data}-{args.identities}"
    args.name = args.name or of
    args.runs = _runs(args)
    only = set(args.only or ())
    unknown = only.difference(*map(names_of, args.runs))
    if unknown:
        names = sorted({run["name"] for run in args.runs})
        parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    if only:
        args.runs = [run for run in args.runs if only & names_of(run)]
    return args


def _runs(args: argparse.Namespace) -> list[Run]:
    """Returns what tells the runs apart, with the options of each."""
    embedded = args.data == "embedded"
    common = ["--device", args.device, "--workers", "0" if args.device == "cpu" else "4"]
    common += ["--sources", EMBEDDED_DATASET if embedded else args.data]
    for option in ("root", "weights", "identities", "topk", "max_epoch"):
        if value := getattr(args, option):
            common += [f"--{option.replace('_', '-')}", str(value)]
    backbone = args.backbone or ("resnet_slim" if embedded else "resnet50")
    common += args.options
    return runs_of(args.study, args.name, backbone, args.family, args.seeds, common)


class Trainer(protocols.LabEngine):
    """The engine without checkpoints, and without a test at the end: ``measure`` does more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, keep_checkpoints=0, **kwargs)
        self.gradients: list[dict[str, float]] = []

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Trains one epoch, and notes before it what each loss asks of the tapped layer."""
        if not self.gradients:
            self.batch = probe(self.train_loader.dataset.train, self.casn.preprocessing)
        self.gradients.append(gradient_norms(self, self.batch))
        super().train(*args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Does nothing."""
        return 0.0

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def run_one(run: Run, study: Study, log: Path) -> None:
    """Trains and measures one model, and adds its line to the study."""
    options = protocols.parse_args(run["argv"])
    made_with = provenance()
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        open(log, "w", buffering=1, encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        tempfile.TemporaryDirectory() as folder,
    ):
        engine = protocols.build_engine(options, Trainer)
        if options.device == "cpu" and "mobilenet" in options.backbone:
            engine.casn.features.to(memory_format=torch.channels_last)  # a third faster
        diverged = False
        try:
            engine.run(save_dir=folder, max_epoch=options.max_epoch, print_freq=20)
        except DivergedError as error:
            diverged = True
            print(error)
        trained = time.perf_counter()
        (name,) = engine.test_loader
        results = None if diverged else measure(engine, name)
        if results and run["study"] == "evidence":
            results["robustness"] |= robustness(engine, name)
            results["faithfulness"] = faithfulness_of(engine, name)
    done = {
        **{key: run[key] for key in ("study", "data", "name", "value", "family", "seed")},
        "settings": protocols.settings_of(options),
        **made_with,
        "device": options.device,
        "results": results,
        "history": engine.history,
        "gradients": engine.gradients,
        "seconds": {"training": trained - started, "measuring": time.perf_counter() - trained},
    }
    study.add(rounded(done))


def is_done(study: Study, run: Run) -> bool:
    """Returns whether a study has a run already.

    Raises:
        SystemExit: it was made with other settings.
    """
    wanted = protocols.settings_of(protocols.parse_args(run["argv"]))
    made = study.find(run)
    if made is None:
        return False
    # an option that came later had its default
    settings = protocols.settings_of(protocols.parse_args([])) | made["settings"]
    unlike = [
        f"{key} {settings[key]}, not {value}"
        for key, value in wanted.items()
        if settings[key] != value
    ]
    if unlike:
        raise SystemExit(
            f"{run['name']} {run['value']} seed {run['seed']} of {study.path} was made with "
            f"{'; '.join(unlike)}: move it away, or name other --results or another --name"
        )
    return True


def log_of(folder: Path, study: Study, run: Run) -> Path:
    """Returns where a run prints to.

    Example:
        >>> run = {"name": "mask α", "value": "5", "seed": 0}
        >>> log_of(Path("log"), Study(Path("ward.jsonl")), run).as_posix()
        'log/ward/mask-alpha-5-seed0.txt'
    """
    words = "-".join([run["name"], run["value"]]).lower()
    words = words.replace("λ", "lambda").replace("α", "alpha").replace("β", "beta")
    slug = "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())
    return folder / study.name / f"{slug}-seed{run['seed']}.txt"


def start_worker(devices: Any) -> None:
    """Gives a worker process its device, or its one thread."""
    device = devices.get()
    if device is None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    else:
        torch.cuda.set_device(device)


def main(argv: list[str] | None = None) -> None:
    """Runs what has no line yet, `jobs` at a time, with a progress bar.

    Raises:
        SystemExit: a run failed; the others are done first.
    """
    args = parse_args(argv)
    study = Study(args.results / file_of(args.study, args.name, args.family))
    todo = [run for run in args.runs if not is_done(study, run)]
    print(f"{len(todo)} of {len(args.runs)} runs to do, {args.jobs} at a time")
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for number in range(args.jobs):
        devices.put(number % torch.cuda.device_count() if args.device == "cuda" else None)
    failed = []
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, context, start_worker, (devices,)
    ) as pool:
        jobs = {}
        for run in todo:
            log = log_of(args.logs, study, run)
            jobs[pool.submit(run_one, run, study, log)] = (run, log)
        for job in tqdm(concurrent.futures.as_completed(jobs), total=len(jobs), unit="run"):
            run, log = jobs[job]
            if error := job.exception():
                what = f"{run['name']} {run['value']} seed {run['seed']}"
                failed.append(f"{what}: {error}; see {log}")
                tqdm.write(failed[-1])
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} runs failed:", *failed]))


if __name__ == "__main__":
    main()
