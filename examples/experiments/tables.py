#!/usr/bin/env python
"""Writes the tables and plots of the documents from the files of results alone.

python examples/experiments/tables.py
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evidence_report import NONE, difference, evidence_report, readings_report
from plots import plot_choices, plot_table, plot_training, save_small
from results import ROOT, Run, studies
from rows import (
    Row,
    differences,
    higher,
    known,
    markdown,
    names_in,
    of_row,
    protocol,
    rank1_and_map,
    results_of,
    spread,
)
from studies import TITLES, all_choices, name_of


def table_report(data: str, runs: list[Run], images: Path) -> list[str]:
    """Returns the paragraphs on one data set, and draws its plots."""
    rows = {name: of_row(runs, name) for _, name in names_in(runs)}
    base = {name: rows.get(family, {}) for family, name in names_in(runs)}
    rankings = ("features", "unit", "attention", "fused")
    return [
        f"## {TITLES.get(data, data)}",
        protocol(runs),
        "Rank-1 / mAP in percent, mean ± sample standard deviation over n seeds. “Unit” is the "
        "features of unit length, which are what is fused; “gain” is what fusion adds to their "
        "mAP:",
        markdown(
            ["", "n", *rankings, "gain", "mINP, features", "pair AUC"],
            [_results_cells(name, row, rankings) for name, row in rows.items()],
        ),
        _picture("Rank-1 and mAP of every run", draw_table(rows), images, f"ablation_{data}"),
        "Difference to the same seed of the row without attention losses, in points; the last "
        "column counts the seeds whose mAP of the features is higher:",
        markdown(
            ["", "n", "features, rank-1", "features, mAP", "fused, rank-1", "fused, mAP", "higher"],
            [
                _paired_cells(name, row, base[name])
                for name, row in rows.items()
                if row is not base[name]
            ],
        ),
        "Training, epoch by epoch, means over seeds; L_bce of chance is ln 2 = 0.69:",
        _picture(
            "Accuracy and loss terms over the epochs",
            draw_training(rows),
            images,
            f"training_{data}",
        ),
        f"### Attention on the person masks of the test set: {data}",
        "“identification” is Grad-CAM of each image's highest scoring training identity, "
        "“siamese” the attention of each query and a random match of another camera. Energy on "
        "the person, intersection over union, peaks on the person, rows of the body attended, and "
        "blank maps in percent; attention distance of same and of different identities over all "
        "query-gallery pairs, and its ROC AUC:",
        markdown(
            ["", "attention", "energy", "IoU", "peak", "rows", "blank", "same", "different", "AUC"],
            [
                _attention_cells(name, row, kind)
                for name, row in rows.items()
                for kind in ("identification", "siamese")
            ],
        ),
        f"### Readings of “normalized and summed”: {data}",
        "Rank-1 / mAP of the fused ranking by the weight of the attention distance, means over "
        "seeds. Weight 0 is the features alone: of unit length with “unit”, as they are with the "
        "others.",
        _fusion_table(rows),
    ]


def _results_cells(name: str, row: Row, rankings: tuple[str, ...]) -> list[str]:
    fused, unit = results_of(row, "fused", "mAP"), results_of(row, "fusion", "unit", "0.0", 1)
    gain: list[float | None] = [
        one - other
        for one, other in zip(fused, unit, strict=True)
        if one is not None and other is not None
    ]
    return [
        name,
        str(len(row)),
        *(rank1_and_map(row, kind) for kind in rankings),
        spread(gain, sign=True),
        spread(results_of(row, "features", "mINP")),
        spread(results_of(row, "auc"), scale=1),
    ]


def _paired_cells(name: str, row: Row, base: Row) -> list[str]:
    found = [
        differences(row, base, kind, key)
        for kind in ("features", "fused")
        for key in ("rank1", "mAP")
    ]
    cells = [spread([*values], sign=True) for values in found]
    return [name, str(len(found[1])), *cells, higher(found[1])]


def _attention_cells(name: str, row: Row, kind: str) -> list[str]:
    def cell(key: str, scale: float = 100) -> str:
        return spread(results_of(row, "quality", kind, key), scale=scale)

    shares = [cell(key) for key in ("energy", "iou", "pointing", "coverage", "blank")]
    return [name, kind, *shares, *(cell(key, 1) for key in ("same", "different", "auc"))]


def _fusion_table(rows: Mapping[str, Row]) -> str:
    fusions = [run["results"]["fusion"] for row in rows.values() for run in row.values()
               if run["results"]]  # fmt: skip
    weights = sorted({weight for fusion in fusions for weight in fusion["unit"]}, key=float)
    lines = []
    for name, row in rows.items():
        for reading in ("unit", "query", "global"):
            cells = []
            for weight in weights:
                found = [known(row, "fusion", reading, weight, at) for at in (0, 1)]
                means = [f"{np.mean(each):.1f}" if each else "–" for each in found]
                cells.append(" / ".join(means))
            lines.append([name, reading, *cells])
    return markdown(["", "reading", *weights], lines)


def _picture(text: str, figure: Any, images: Path, name: str) -> str:
    """Returns the line that shows a figure, which is saved."""
    save_small(figure, images / f"{name}.png")
    return f"![{text}]({images.name}/{name}.png)"


def draw_table(rows: Mapping[str, Row]) -> Any:
    """Returns a figure of the rank-1 and mAP of every run."""
    return plot_table(
        {
            name: {
                kind: [known(row, kind, key) for key in ("rank1", "mAP")]
                for kind in ("features", "fused")
            }
            for name, row in rows.items()
        }
    )


def draw_training(rows: Mapping[str, Row]) -> Any:
    """Returns a figure of all rows over the epochs."""
    return plot_training(
        {name: [run["history"] for run in row.values()] for name, row in rows.items()}
    )


def summary(groups: Mapping[str, list[Run]]) -> str:
    """Returns one table of all data sets: features, fused, and what the losses change."""
    named = names_in([run for group in groups.values() for run in group])
    head, rows = [""], [[name] for _, name in named]
    for data, group in groups.items():
        head += [f"{data}: n", "features", "fused", "difference, 95 %"]
        for (family, name), cells in zip(named, rows, strict=True):
            row, base = of_row(group, name), of_row(group, family)
            found = None if name == family else difference(row, base, NONE, "features")
            rankings = [rank1_and_map(row, kind) if row else "–" for kind in ("unit", "fused")]
            cells += [str(len(row)), *rankings, "–" if found is None else found.points()]
    return markdown(head, rows)


def choices_report(study: str, runs: list[Run], table: list[Run], images: Path) -> list[str]:
    """Returns the paragraphs on the open choices, and draws their plot."""
    family = runs[0]["family"]
    rows, points = [], {}
    kinds = (("features", "rank1"), ("features", "mAP"), ("attention", "mAP"), ("fused", "mAP"))
    for losses, choice, value, _ in all_choices():
        row, name = of_row(runs, choice, value), name_of(family, losses)
        if not row:
            continue
        base = of_row(table, name)
        found = [differences(row, base, kind, key) for kind, key in kinds]
        diverged = sum(run["results"] is None for run in row.values())
        points[f"{name}, {choice}: {value}"] = [100 * each for each in found[1]]
        cells = [name, choice, value, str(len(row))]
        cells += [spread([*each], sign=True) for each in found]
        auc = spread([*differences(row, base, "auc")], sign=True, scale=1)
        rows.append([*cells, higher(found[1]), auc, str(diverged)])
    head = ["row", "choice", "value", "n"]
    head += ["features, rank-1", "features, mAP", "attention, mAP", "fused, mAP", "higher"]
    patched = any(
        run["value"] == "by range" and "casn_plugin" not in run["versions"] for run in runs
    )
    note = " “By range” was measured with the package's scaling replaced while it ran, before the "
    note += "laboratory had `--map-scale range`."
    return [
        f"## Open choices, rows of {family}: {TITLES.get(runs[0]['data'], runs[0]['data'])}",
        "One choice changed at a time; difference to the same row of the table, with the defaults "
        "and the same seed, in points (the pair classifier's AUC: as a share), mean ± sample "
        "standard deviation; “higher” counts the seeds whose mAP of the features is. "
        + protocol(runs)
        + (note if patched else ""),
        markdown([*head, "pair AUC", "diverged"], rows),
        _picture(
            "Difference in mAP of each choice", plot_choices(points), images, f"choices_{study}"
        ),
    ]


def write_report(document: Path, folder: Path) -> None:
    """Writes the document and its plots from the files of results alone.

    Raises:
        SystemExit: there are no results.
    """
    runs, images = studies(folder), document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    every = [run for group in runs.values() for run in group]
    unknown = sum(run["commit"] == "unknown" for run in every)
    paragraphs = [
        "# Results",
        "Made by `python examples/experiments/tables.py` from the files in "
        f"`{folder.name}/`, one a study, one run a line; nothing here is typed. All rows of a "
        "family have the same budget, the same initial weights and the same pairs for a seed. λ1 "
        "is 0.5 and λ2 0.05, as in the paper, where a loss is on. What is fused is normalised and "
        "weighted as the engine does by default; pair AUC is that of the pair classifier on people "
        "it has not seen, 0.5 = chance, and untrained where λ2 is 0: then its attention is random. "
        f"Each run names the commit it was made with; {unknown} of {len(every)} are older than "
        "that, and say “unknown”.",
    ]
    tables = {name: group for name, group in runs.items() if _study(group) == "table"}
    evidence = {group[0]["data"]: group for group in runs.values() if _study(group) == "evidence"}
    if groups := tables | evidence:
        paragraphs += [
            "## All rows",
            "Rank-1 / mAP in percent, of features of unit length and fused, mean ± sample standard "
            "deviation over n seeds; difference of these features' mAP to the same seed of the row "
            "without attention losses, in points, with the 95 % interval over seeds and queries:",
            summary(groups),
        ]
    for data, group in evidence.items():
        paragraphs += evidence_report(data, group, images)
    for group in runs.values():
        if _study(group) == "readings":
            data = group[0]["data"]
            paragraphs += readings_report(data, group, evidence.get(data, []))
    for name, group in runs.items():
        if name in tables:
            paragraphs += table_report(name, group, images)
        elif _study(group) == "choices":
            paragraphs += choices_report(name, group, runs.get(group[0]["data"], []), images)
    document.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    print(f"Wrote {document}, from {len(every)} runs")


def _study(runs: list[Run]) -> str:
    """Returns what the runs of one file are of."""
    study: str = runs[0]["study"]
    return study


def main(argv: list[str] | None = None) -> None:
    """Writes what the options name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the files")
    add("--out", type=Path, default=ROOT / "docs" / "results.md", help="document to write")
    args = parser.parse_args(argv)
    write_report(args.out, args.results)


if __name__ == "__main__":
    main()
