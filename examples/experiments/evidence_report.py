"""The paragraphs on evidence: what is known of rankings, of changed queries and of attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from intervals import Interval, interval, seeds_needed
from plots import plot_faithfulness, plot_robustness, save_small
from results import Run
from robustness import LABELS
from rows import Row, markdown, names_in, of_row, protocol, results_of
from studies import FAMILIES, READINGS, TITLES, name_of

SCORES = {"evidence": "same-identity logit", "closeness": "closeness of the features"}
SIDES = {"one picture": ("query", "gallery"), "both": ("both",)}
KINDS = ("features", "fused")
NONE = ("none",)
WITH_PAIRS = {name_of(family, losses) for family in FAMILIES for losses in ("+SA", "CASN")}
"""The rows whose pair classifier is trained."""


def ap_of(row: Row, change: Sequence[str], kind: str) -> np.ndarray:
    """Returns the (seeds, queries) APs of changed queries; NaN where a query has no match.

    Args:
        row: its runs by their seeds, none of which diverged.
        change: ("none",), or the change and its strength.
        kind: "features" or "fused".
    """
    every = results_of(row, "robustness", *change, kind, "ap")
    return np.array(every, dtype=float)


def measured(row: Row) -> Row:
    """Returns the runs of a row that have APs, in the order of their seeds.

    Those that diverged have none, and the oldest.
    """
    return {seed: row[seed] for seed in sorted(row) if "robustness" in (row[seed]["results"] or {})}


def both_have(row: Row, base: Row) -> tuple[Row, Row]:
    """Returns the measured runs of two rows, of the seeds that both have."""
    row, base = measured(row), measured(base)
    seeds = [seed for seed in row if seed in base]
    return {seed: row[seed] for seed in seeds}, {seed: base[seed] for seed in seeds}


def difference(row: Row, base: Row, change: Sequence[str], kind: str) -> Interval | None:
    """Returns what a row's mAP is above its baseline's, paired by seed and query."""
    row, base = both_have(row, base)
    if not row:
        return None
    return interval(ap_of(row, change, kind) - ap_of(base, change, kind))


def evidence_report(data: str, runs: list[Run], images: Path) -> list[str]:
    """Returns the paragraphs on one data set, and draws its plots."""
    rows = {name: of_row(runs, name) for _, name in names_in(runs)}
    with_losses = {
        family: [name for of, name in names_in(runs) if of == family != name] for family in FAMILIES
    }
    base = {family: rows.get(family, {}) for family in FAMILIES}
    drawn = {  # of each family what has no attention losses, and all that were trained
        name: rows[name]
        for family, names in with_losses.items()
        for name in (family, *names[-1:])
        if name in rows and measured(rows[name])
    }
    return [
        f"## Evidence: {TITLES.get(data, data)}",
        protocol(runs) + " Intervals are 95 %, bootstrapped over seeds and over queries (pairs); "
        "with so few seeds they are rather too narrow than too wide.",
        "mAP with attention losses less mAP without, of the same seed and query, in points. The "
        "last columns say how many seeds a paired t-test needs to see one point of mAP (level "
        "5 %, power 80 %), by the spread of the differences of these seeds:",
        markdown(
            ["", "seeds", "features", "fused", "to see a point: features", "fused"],
            [
                _difference_cells(name, rows[name], base[family])
                for family, names in with_losses.items()
                for name in names
                if both_have(rows[name], base[family])[0]
            ],
        ),
        f"### Changed queries: {data}",
        "mAP of features of unit length (lines; bands are the range of the seeds), and of the "
        "fused ranking (dots), where queries are changed and the gallery is not.",
        _robustness_picture(data, rows, images),
        "mAP without attention losses, and what is gained with them, in points:",
        *(
            markdown(
                ["change", "strength", *_robustness_head(family, names)],
                [
                    _robustness_cells(at, base[family], [rows[name] for name in names])
                    for at in _changes(runs)
                ],
            )
            for family, names in with_losses.items()
            if names and measured(base[family])
        ),
        f"### Does attention mark what decides? {data}",
        "Pairs of one identity, one of each of some queries. Gap: area under the insertion curve "
        "less area under the deletion curve, in units of the score; chance is 0. Pixels are "
        "removed from one picture of a pair (the mean of query and gallery picture), or from both: "
        "what is left of both may then be alike because little is. “Siamese” is Grad-CAM of the "
        "pair classifier, which is untrained in rows without L_sa: they have no same-identity "
        "logit. “Cosine” is Grad-CAM of the features' cosine, “identification” that of each "
        "picture's highest scoring identity:",
        markdown(
            ["", "seeds", "score", "pixels of", *_maps(runs), "Siamese less centre"],
            [
                _faithfulness_cells(name, row, score, sides)
                for name, row in rows.items()
                for score in SCORES
                for sides in SIDES
                if measured(row) and (score == "closeness" or name in WITH_PAIRS)
            ],
        ),
        _faithfulness_picture(data, drawn, images),
        f"### What the losses ask of the tapped layer: {data}",
        "Norm of the gradient of λ1 L_ia and of λ2 L_sa at the tapped map, as a share of the sum "
        "of all norms, on a batch that stays; means over seeds:",
        markdown(_gradient_head(runs), _gradient_rows(rows)),
    ]


def readings_report(data: str, runs: list[Run], table: list[Run]) -> list[str]:
    """Returns the paragraphs on readings of Eq. 2.

    Args:
        data: what the results are called.
        runs: of the readings.
        table: of the evidence, of which the row of both losses is the baseline.
    """
    family = runs[0]["family"]
    base = of_row(table, name_of(family, "CASN"))
    lines = []
    for value in READINGS:
        row = of_row(runs, "score of Eq. 2", value)
        if row:
            lines.append(_reading_cells(value, row, base))
    today = [f"probability, attention trained, λ1 0.5 ({name_of(family, 'CASN')})"]
    return [
        f"## Readings of Eq. 2: {TITLES.get(data, data)}",
        f"{name_of(family, 'CASN')} with y_c read otherwise. Difference in mAP to the row with the "
        "probability, paired by seed and query, in points with 95 % intervals; L_ia as a share of "
        "the gradient at the tapped map, and its value, in the first, the middle and the last "
        "epoch. " + protocol(runs),
        markdown(
            ["score, what it trains, λ1", "seeds", "features", "fused", "share of L_ia", "L_ia"],
            [
                [*today, str(len(base)), "–", "–", _epochs(base, "share"), _epochs(base, "loss")],
                *lines,
            ],
        ),
    ]


def _difference_cells(name: str, row: Row, base: Row) -> list[str]:
    row, base = both_have(row, base)
    cells, needed = [name, str(len(row))], []
    for kind in KINDS:
        differences = ap_of(row, NONE, kind) - ap_of(base, NONE, kind)
        cells.append(interval(differences).points())
        by_seed = np.nanmean(differences, 1)
        needed.append(str(seeds_needed(by_seed)) if len(by_seed) > 1 else "–")
    return cells + needed


def _changes(runs: list[Run]) -> list[tuple[str, str]]:
    """Returns every change and strength of the first run that was measured."""
    found = next(run["results"]["robustness"] for run in runs if run["results"])
    return [
        (change, strength) for change in LABELS if change in found for strength in found[change]
    ]


def _robustness_head(family: str, names: list[str]) -> list[str]:
    return [head for kind in KINDS for head in (f"{family}, {kind}", *names)]


def _robustness_cells(at: tuple[str, str], base: Row, rows: list[Row]) -> list[str]:
    change, strength = at
    cells = [LABELS[change].replace("\n", " "), strength]
    for kind in KINDS:
        cells.append(f"{100 * np.nanmean(ap_of(measured(base), at, kind)):.1f}")
        found = [difference(row, base, at, kind) for row in rows]
        cells += ["–" if each is None else each.points() for each in found]
    return cells


def _robustness_picture(data: str, rows: Mapping[str, Row], images: Path) -> str:
    known = {name: measured(row) for name, row in rows.items() if measured(row)}
    changes = _changes([run for row in known.values() for run in row.values()])
    panels: dict[str, dict[str, dict[str, dict[float, list[float]]]]] = {}
    for change in dict(changes):
        points = {0.0: NONE} | {float(s): (c, s) for c, s in changes if c == change}
        panels[LABELS[change]] = {
            name: {
                kind: {
                    strength: (100 * np.nanmean(ap_of(row, at, kind), 1)).tolist()
                    for strength, at in points.items()
                }
                for kind in KINDS
            }
            for name, row in known.items()
        }
    name = f"robustness_{data}.png"
    save_small(plot_robustness(panels), images / name)
    return f"![mAP of changed queries, by strength]({images.name}/{name})"


def _maps(runs: list[Run]) -> list[str]:
    """Returns the kinds of map that were measured."""
    return list(next(run["results"]["faithfulness"] for run in runs if run["results"]))


def _gaps(row: Row, name: str, score: str, sides: str) -> np.ndarray:
    """Returns the (seeds, pairs) gaps of one kind of map, where pixels of some pictures go."""
    every = [results_of(row, "faithfulness", name, score, side, "gap") for side in SIDES[sides]]
    gaps: np.ndarray = np.array(every, dtype=float).mean(0)
    return gaps


def _faithfulness_cells(name: str, row: Row, score: str, sides: str) -> list[str]:
    row = measured(row)
    maps = _maps([*row.values()])
    gaps = {each: _gaps(row, each, score, sides) for each in maps}
    return [
        name, str(len(row)), SCORES[score], sides,
        *(interval(gaps[each]).number() for each in maps),
        interval(gaps[maps[0]] - gaps["centre"]).number(),
    ]  # fmt: skip


def _faithfulness_picture(data: str, rows: Mapping[str, Row], images: Path) -> str:
    panels = {}
    for name, row in rows.items():
        row = measured(row)
        panels[name] = {
            kind: {
                way: np.array(
                    results_of(row, "faithfulness", kind, "closeness", "query", way), dtype=float
                )
                .mean(0)
                .tolist()
                for way in ("deletion", "insertion")
            }
            for kind in _maps([*row.values()])
        }
    name = f"faithfulness_{data}.png"
    save_small(plot_faithfulness(panels), images / name)
    return f"![Closeness of pairs while pixels of the query go, and come]({images.name}/{name})"


def _shares(row: Row, term: str) -> np.ndarray:
    """Returns the (seeds, epochs) share of a loss in the gradients at the tapped map."""
    return np.array(
        [
            [norms.get(term, 0.0) / max(sum(norms.values()), 1e-30) for norms in run["gradients"]]
            for run in measured(row).values()
        ]
    )


def _gradient_head(runs: list[Run]) -> list[str]:
    epochs = len(next(run["gradients"] for run in runs if run["results"]))
    return ["", "loss", *(f"epoch {number}" for number in range(1, epochs + 1))]


def _gradient_rows(rows: Mapping[str, Row]) -> list[list[str]]:
    return [
        [name, label, *(f"{100 * share:.1f} %" for share in _shares(row, term).mean(0))]
        for name, row in rows.items()
        if name not in FAMILIES and measured(row)
        for term, label in (("ia", "λ1 L_ia"), ("sa", "λ2 L_sa"))
        if _shares(row, term).any()
    ]


def _epochs(row: Row, what: str) -> str:
    """Returns L_ia's share of the gradient, or its value, in three epochs."""
    known = measured(row)
    if not known:
        return "–"
    if what == "share":
        each, form = 100 * _shares(known, "ia").mean(0), "{:.1f} %"
    else:
        losses = [[epoch["loss_ia"] for epoch in run["history"]] for run in known.values()]
        each, form = np.mean(losses, axis=0), "{:.3f}"
    return " / ".join(form.format(each[at]) for at in (0, len(each) // 2, -1))


def _reading_cells(value: str, row: Row, base: Row) -> list[str]:
    diverged = sum(run["results"] is None for run in row.values())
    cells = [value, str(len(row)) + (f", {diverged} diverged" if diverged else "")]
    for kind in KINDS:
        found = difference(row, base, NONE, kind)
        cells.append("–" if found is None else found.points())
    return [*cells, _epochs(row, "share"), _epochs(row, "loss")]
