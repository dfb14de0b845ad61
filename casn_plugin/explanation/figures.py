"""Figures with words: one pair, and a ranked list, for readers who do not know the paper.

matplotlib is imported when a figure is drawn; no display is needed. The figures belong to no
window: save them with ``figure.savefig(path)``.
"""

import html
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from casn_plugin.evidence import Evidence
from casn_plugin.explanation.pictures import RIGHT, WRONG, AttendedImage, png_uri, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR_COLOURS = ("#0072B2", "#E69F00")
"""What is drawn of the first and of the second image of a pair."""


class Drawn:
    """What can be drawn, and so shows itself in a notebook."""

    def plot(self) -> "Figure":
        """Returns the figure."""
        raise NotImplementedError

    def describe(self) -> str:
        """Returns what the figure shows, in words."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Returns the picture for a notebook, with a text for those who do not see it."""
        words = html.escape(self.describe())
        return f'<img style="max-width:100%" alt="{words}" src="{png_uri(self.plot())}">'


def plot_pair(
    first: AttendedImage,
    second: AttendedImage,
    *,
    headline: str = "",
    details: str = "",
    names: tuple[str, str] = ("first picture", "second picture"),
    evidence: Evidence | None = None,
) -> "Figure":
    """Returns a figure that explains one pair to a reader who does not know the paper.

    From the outside in: both pictures, where the network looked in each, how strongly in each
    row, with the attended span marked, and in the middle both profiles as they are compared.

    Args:
        first: the first image.
        second: the second one, with the same t.
        headline: what the model says.
        details: a line below it.
        names: what to call the two pictures.
        evidence: what attention is evidence of.

    Example:
        >>> image = AttendedImage(np.zeros((8, 4, 3)), Tensor([[0.0, 1.0], [0.5, 0.0]]))
        >>> [axis.get_title() for axis in plot_pair(image, image).axes][::6]
        ['first picture', 'second picture']
    """
    from matplotlib.figure import Figure

    rows, columns = first.picture.shape[:2]
    tall = 3.4  # inches
    wide = tall * columns / rows
    widths = [wide, wide, 1.2, 2.0, 1.2, wide, wide]
    figure = Figure(figsize=(sum(widths) + 1.2, tall + 1.75), layout="constrained", dpi=120)
    figure.suptitle(headline, fontsize=13, fontweight="bold")
    axes: Any = figure.subplots(1, 7, width_ratios=widths)
    _plot_side(axes[:3], first, PAIR_COLOURS[0], names[0])
    _plot_side(axes[:3:-1], second, PAIR_COLOURS[1], names[1])
    axes[4].invert_xaxis()  # both profiles grow towards the middle
    _plot_aligned(axes[3], first, second, names)
    said = "" if evidence is None else f"\nEvidence: {evidence}."
    figure.supxlabel(
        f"{details}\nBright: {(evidence or Evidence.TRAINED).marks}; beside it, how strongly in "
        f"each row. t: rows that reach more than {first.row_threshold:.0%} of the strongest count."
        f" Grey: what differs.{said}".strip(),
        fontsize=8,
    )
    return figure


def plot_ranking(
    picture: Float[np.ndarray, "rows columns 3"],
    pairs: Sequence[tuple[AttendedImage, AttendedImage]],
    right: Sequence[bool | None],
    captions: Sequence[str],
    *,
    headline: str = "",
    apart: int = 0,
    evidence: Evidence | None = None,
) -> "Figure":
    """Returns a figure of a ranked list: the query, its matches, the attention of each pair.

    Above, the gallery pictures with frames in green (right) and red (wrong, and broken); below
    each, where the network looked in it, and where in the query when it compared the two.

    Args:
        picture: the query, RGB in [0, 1].
        pairs: the query and each of its matches, in their order.
        right: whether each match shows the query's identity; None where that is not known.
        captions: some lines below each match's picture.
        headline: above all.
        apart: so many matches at the end are set apart: they are no part of the list.
        evidence: what attention is evidence of.

    Example:
        >>> image = AttendedImage(np.zeros((8, 4, 3)), Tensor([[0.0, 1.0], [0.5, 0.0]]))
        >>> pairs = [(image, image), (image, image)]
        >>> len(plot_ranking(image.picture, pairs, [True, False], ["1", "2"]).axes)
        9
    """
    from matplotlib.figure import Figure

    rows, columns = picture.shape[:2]
    number = len(pairs)
    wide = 1.25  # inches
    tall = wide * rows / columns
    widths = [1.0] * (1 + number)
    if apart:
        widths.insert(1 + number - apart, 0.25)
    width = wide * sum(widths) + 0.4
    figure = Figure(figsize=(width, 3 * tall + 1.7), layout="constrained", dpi=110)
    title = textwrap.fill(headline, int(9 * width))  # 9 letters of its size fill an inch
    figure.suptitle(title, fontsize=12, fontweight="bold")
    words = (
        f"Frames: green and whole, the same person; red and broken, another. Bright: "
        f"{(evidence or Evidence.TRAINED).marks}. In brackets: the rank by features alone."
    )
    said = [words] if evidence is None else [words, f"Evidence: {evidence}."]
    filled = [textwrap.fill(each, int(15 * width)) for each in said]
    figure.supxlabel("\n".join(filled), fontsize=8)
    axes: Any = figure.subplots(3, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes[:, 1 + number - apart] if apart else ():
        axis.remove()
    _show(axes[0, 0], picture)
    axes[0, 0].set_title("query", fontsize=9)
    for axis, words in zip(
        axes[1:, 0],
        (
            "Where it looked\nin the\ngallery picture",
            "Where it looked\nin the query,\nfor each pair",
        ),
        strict=True,
    ):
        axis.axis("off")
        axis.text(1, 0.5, words, fontsize=9, ha="right", va="center", transform=axis.transAxes)
    for i, (query, match) in enumerate(pairs):
        column = axes[:, 1 + i + (i >= number - apart and apart > 0)]
        for axis, panel in zip(
            column, (match.picture, match.overlaid, query.overlaid), strict=True
        ):
            _show(axis, panel, right[i])
        colour = {True: RIGHT, False: WRONG, None: "0.3"}[right[i]]
        column[0].set_title(verdict(right[i]), fontsize=9, color=colour)
        column[0].set_xlabel(captions[i], fontsize=8)
    return figure


def _show(axis: Any, picture: np.ndarray, right: bool | None = None) -> None:
    """Draws a picture; in a frame where it is right (whole) or wrong (broken)."""
    axis.imshow(picture)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(right is not None)
        spine.set_edgecolor(RIGHT if right else WRONG)
        spine.set_linewidth(3)
        spine.set_linestyle("-" if right else (0, (3, 1.2)))
        spine.set_capstyle("butt")


def _plot_side(axes: Any, image: AttendedImage, colour: str, name: str) -> None:
    """Draws one image of a pair: the picture, where it was looked at, how strongly in each row."""
    shown, looked, strength = axes
    height = len(image.attention)
    rows, columns = image.picture.shape[:2]
    first, last = image.span
    extent = (0, height * columns / rows, height, 0)
    for axis, picture in ((shown, image.picture), (looked, image.overlaid)):
        axis.imshow(picture, extent=extent)
        axis.set_xticks([])
        axis.set_yticks([])
    shown.set_title(name, fontsize=9)
    looked.set_title("where it looked", fontsize=9)
    for edge in (first, last + 1):
        looked.axhline(edge, color="white", linewidth=2.4)
        looked.axhline(edge, color=colour, linewidth=1.4, linestyle="--")
    strength.axvline(image.row_threshold, color="0.6", linewidth=0.8, linestyle=":")
    _plot_rows(strength, image.profile, color=colour, linewidth=1.2)
    strength.set_xticks([0, image.row_threshold, 1], ["0", "t", "1"], fontsize=7)
    strength.axhspan(first, last + 1, color=colour, alpha=0.13, linewidth=0)
    strength.set_title("how strongly", fontsize=9)
    strength.set_xlabel(f"rows {first + 1} to {last + 1} of {height}\ncount", fontsize=8)


def _plot_aligned(
    axis: Any, first: AttendedImage, second: AttendedImage, names: Sequence[str]
) -> None:
    """Draws the aligned profiles M*_m of a pair over each other, and what differs between them."""
    aligned = [_numbers(image.aligned) for image in (first, second)]
    axis.fill_betweenx(np.arange(len(aligned[0])) + 0.5, *aligned, color="0.85", linewidth=0)
    for image, colour, name, style in zip(
        (first, second), PAIR_COLOURS, names, ("-", "--"), strict=True
    ):
        _plot_rows(axis, image.aligned, color=colour, linestyle=style, linewidth=1.4, label=name)
    axis.set_xticks([0, 1], ["0", "1"], fontsize=7)
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    axis.set_title("the rows that count,\nstretched to one length", fontsize=9)


def _plot_rows(axis: Any, profile: Tensor, **style: Any) -> None:
    """Draws a value a row, from 0 to 1, down the rows of a picture."""
    axis.plot(_numbers(profile), np.arange(len(profile)) + 0.5, marker="o", markersize=2.5, **style)
    axis.set_ylim(len(profile), 0)
    axis.set_xlim(-0.03, 1.06)
    axis.set_yticks([])
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _numbers(profile: Tensor) -> np.ndarray:
    """Returns what is drawn of a profile, wherever that is."""
    return np.asarray(profile.detach().float().cpu())
