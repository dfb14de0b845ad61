"""The plots of the laboratory, and pictures as small as they can be without visible loss."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from studies import FAMILIES, LAMBDAS, name_of

from casn_plugin.explanation import COLOURS
from casn_plugin.faithfulness import SHARES

PALETTE = (*COLOURS.values(), "#009E73", "#555555")
"""The package's colours, and more of Okabe and Ito's."""


def save_small(picture: Figure | np.ndarray | Image.Image, path: Path) -> None:
    """Saves a figure or an RGB picture: drawings as .png of 256 colours, photographs as .webp.

    Raises:
        ValueError: another ending.
    """
    if isinstance(picture, Figure):
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png")
        picture = Image.open(drawn)
    elif isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    if path.suffix == ".png":
        picture.quantize(256).save(path, optimize=True)
    elif path.suffix == ".webp":
        picture.save(path, quality=85, method=6)
    else:
        raise ValueError(f"expected a .png or .webp, got {path}")


def plot_table(rows: Mapping[str, Mapping[str, list[list[float]]]]) -> Figure:
    """Returns rank-1 and mAP of every run, with mean and standard deviation of each row.

    Args:
        rows: by the name of a row "features" and "fused": of rank-1 and of mAP the values in
            percent.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    for number, (axis, label) in enumerate(
        zip(figure.subplots(1, 2), ("rank-1 (%)", "mAP (%)"), strict=True)
    ):
        for shift, kind in ((-0.15, "features"), (0.25, "fused")):
            for at, row in enumerate(rows.values()):
                values = row[kind][number]
                if not values:
                    continue
                axis.plot([at + shift - 0.1] * len(values), values, "o", color=COLOURS[kind],
                          alpha=0.6, markersize=4, markeredgewidth=0)  # fmt: skip
                axis.errorbar(at + shift, np.mean(values), _deviation(values), fmt="_", capsize=3,
                              color=COLOURS[kind])  # fmt: skip
            axis.plot([], "o-", color=COLOURS[kind], markersize=4, label=kind)
        axis.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def plot_training(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Returns accuracy and loss terms over the epochs, mean and range of each row's runs.

    Args:
        histories: by the name of a row, the epochs of each of its runs.
    """
    terms = {
        "acc": "training accuracy (%)",
        "loss_ia": "L_ia",
        "loss_bce": "L_bce",
        "attention_distance": "attention distance",
    }
    styles = {
        name_of(family, losses): (line, f"C{number}")
        for family, line in zip(FAMILIES, ("-", "--"), strict=True)
        for number, losses in enumerate(LAMBDAS)
    }
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=100)
    axes, lines = figure.subplots(1, len(terms)), {}
    for name, runs in histories.items():
        line, colour = styles[name]
        for axis, term in zip(axes, terms, strict=True):
            if not any(term in epoch for run in runs for epoch in run):
                continue
            values = np.array([[epoch.get(term) for epoch in run] for run in runs], dtype=float)
            epochs = np.arange(1, values.shape[1] + 1)
            (lines[name],) = axis.plot(epochs, values.mean(0), line, color=colour)
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.12)
    for axis, label in zip(axes, terms.values(), strict=True):
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def plot_choices(points: Mapping[str, Sequence[float]]) -> Figure:
    """Returns the paired difference in mAP of the features of each choice.

    Args:
        points: by the name of a choice, the differences of its runs in points.
    """
    figure = Figure(figsize=(8, 1 + 0.3 * len(points)), layout="constrained", dpi=100)
    axis = figure.subplots()
    for at, values in enumerate(points.values()):
        if not values:
            continue
        axis.plot(values, [at - 0.2] * len(values), "o", color=COLOURS["features"], alpha=0.6,
                  markersize=4, markeredgewidth=0)  # fmt: skip
        axis.errorbar(np.mean(values), at, xerr=_deviation(values), fmt="|", capsize=3,
                      color=COLOURS["features"])  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(points)), list(points))
    axis.invert_yaxis()
    axis.set_xlabel("difference in mAP of the features (points)")
    axis.grid(alpha=0.3)
    return figure


def plot_memory(
    images: Sequence[int], curves: Mapping[str, Sequence[float]], budget: float, device: str
) -> Figure:
    """Returns the peak memory of ranking as the gallery grows.

    Args:
        images: of the gallery.
        curves: by what is measured, MiB at each number of images.
        budget: the `max_memory` of the ranking, in MiB.
        device: that it was measured on.
    """
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    axes = figure.subplots()
    for (name, values), marker in zip(curves.items(), "osd^v", strict=False):
        axes.plot(images, values, marker=marker, label=name)
    axes.axhline(budget, color="black", linestyle=":", label="max_memory")
    axes.set(xscale="log", yscale="log", xlabel="gallery images", ylabel="peak memory (MiB)")
    axes.set_xticks(images, [f"{number:,}" for number in images])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize="small")
    axes.set_title(f"Peak memory of ranking an index on disk, 64 queries ({device})")
    return figure


def plot_robustness(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]],
) -> Figure:
    """Returns mAP over the strength of each change: of the features a line, of both fused dots.

    Bands are the range of the seeds of the features.

    Args:
        panels: by the label of a change, the name of a row and "features" or "fused", the mAPs of
            the seeds at each strength, in percent.
    """
    names = {name for rows in panels.values() for name in rows}
    families = [each for each in FAMILIES if names & {name_of(each, losses) for losses in LAMBDAS}]
    size = (2.6 * len(panels), 3 * len(families))
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    every = figure.subplots(len(families), len(panels), sharey="row", squeeze=False)
    for at, family in enumerate(families):
        for axes, (label, rows) in zip(every[at], panels.items(), strict=True):
            for losses, colour in zip(LAMBDAS, PALETTE, strict=False):
                name = name_of(family, losses)
                if name not in rows:
                    continue
                strengths = list(rows[name]["features"])
                features, fused = (
                    np.array(list(rows[name][kind].values())) for kind in ("features", "fused")
                )
                axes.plot(strengths, features.mean(1), color=colour, label=name)
                axes.plot(strengths, fused.mean(1), "o", markersize=3, color=colour)
                axes.fill_between(
                    strengths, features.min(1), features.max(1), color=colour, alpha=0.12
                )
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if at == len(families) - 1:
                axes.set_xlabel(label)
        every[at][0].set_ylabel("mAP (%)")
        every[at][-1].legend(fontsize=8)
    return figure


def plot_faithfulness(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    score: str = "closeness of the features",
) -> Figure:
    """Returns mean scores while the most attended pixels go (left of each pair), and come (right).

    Args:
        panels: by the name of a row and the kind of map, its "deletion" and "insertion" at
            :data:`casn_plugin.faithfulness.SHARES`.
        score: what the curves are of.
    """
    figure = Figure(figsize=(9, 0.6 + 3 * len(panels)), layout="constrained", dpi=100)
    every = figure.subplots(len(panels), 2, sharex=True, sharey="row", squeeze=False)
    lines = {}
    for row, (name, maps) in enumerate(panels.items()):
        for axes, way, text in zip(
            every[row], ("deletion", "insertion"), ("removed", "shown"), strict=True
        ):
            for number, (kind, curves) in enumerate(maps.items()):
                style = ("-", "--", ":", "-.", (0, (1, 4)))[number]
                (lines[kind],) = axes.plot(
                    [100 * share for share in SHARES], curves[way], linestyle=style,
                    color=PALETTE[number], linewidth=2.2 if number == 0 else 1.4,
                )  # fmt: skip
            axes.spines[["top", "right"]].set_visible(False)
            if row == len(panels) - 1:
                axes.set_xlabel(f"% of the pixels {text}, the most attended first")
        every[row][0].set_ylabel(f"{name}\n{score}".strip())
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    return figure


def _deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation, 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
