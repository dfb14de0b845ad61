"""Pictures: attention over images, pairs, ranked lists, training curves and CMC curves.

matplotlib is imported when a picture is drawn; no display is needed. The figures belong to no
window: save them with ``figure.savefig(path)``.
"""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from casn_plugin.attention import (
    align_profiles,
    attended_span,
    attention_distance,
    row_profiles,
    scale_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"features": "#0072B2", "attention": "#E69F00", "fused": "#CC79A7"}  # Okabe and Ito's
PAIR_COLOURS = ("#0072B2", "#E69F00")  # of the first and the second image of a pair
# the field's green and red, of unlike lightness; never the only sign: words and broken lines too
RIGHT, WRONG = "#00875A", "#D7301F"


def overlay(
    pictures: Float[np.ndarray, "batch rows columns 3"],
    maps: Float[Tensor, "batch height width"],
    opacity: float = 0.6,
) -> Float[np.ndarray, "batch rows columns 3"]:
    """Returns pictures with their attention maps laid over them, RGB in [0, 1].

    Each map is scaled to its own maximum. Where it is low the picture shows as it is, and where
    it is high the colours of the perceptually uniform "inferno" cover it up to `opacity`.

    Args:
        pictures: RGB in [0, 1].
        maps: attention maps >= 0 of any resolution; what is not finite counts as none.
        opacity: of the colours where attention is highest, in [0, 1].

    Example:
        >>> overlay(np.full((1, 4, 4, 3), 0.5), torch.zeros(1, 2, 2))[0, 0, 0].tolist()
        [0.5, 0.5, 0.5]
    """
    from matplotlib import colormaps

    rows, columns = pictures.shape[1:3]
    finite = maps.detach().float().cpu().nan_to_num(0, posinf=0)
    resized = F.interpolate(finite[:, None], size=(rows, columns), mode="bilinear")[:, 0]
    strength = scale_maps(resized).numpy()
    colours = colormaps["inferno"](strength)[..., :3]
    cover = opacity * strength[..., None]
    return np.asarray((1 - cover) * pictures + cover * colours, dtype=np.float64)


def pair_mosaic(
    first_pictures: Float[np.ndarray, "pairs rows columns 3"],
    second_pictures: Float[np.ndarray, "pairs rows columns 3"],
    first_maps: Float[Tensor, "pairs height width"],
    second_maps: Float[Tensor, "pairs height width"],
    same: Sequence[bool],
) -> Float[np.ndarray, "all_rows all_columns 3"]:
    """Returns one RGB picture in [0, 1] of pairs and their attention, a pair a row.

    Without text and without matplotlib's layout, so it is quick: for TensorBoard. From left to
    right: first picture, its attention, the second picture's attention, second picture. The
    frame of the last two is green where both show one identity, else red and broken.

    Args:
        first_pictures: RGB in [0, 1].
        second_pictures: the same for the second images.
        first_maps: attention of the first images in their pairs, >= 0.
        second_maps: that of the second images.
        same: whether each pair shows one identity.

    Example:
        >>> pictures, maps = np.full((2, 16, 8, 3), 0.5), torch.rand(2, 4, 2)
        >>> pair_mosaic(pictures, pictures, maps, maps, [True, False]).shape
        (44, 52, 3)
    """
    _, rows, columns = first_pictures.shape[:3]
    edge = max(2, rows // 48)  # of the frames, and between pictures
    panels = (
        first_pictures,
        overlay(first_pictures, first_maps),
        overlay(second_pictures, second_maps),
        second_pictures,
    )
    height, width = rows + 2 * edge, columns + 2 * edge
    gap = 2 * edge  # between the two persons
    mosaic = np.ones((len(same) * (height + edge), 4 * width + gap, 3))
    for i, right in enumerate(same):
        for j, panel in enumerate(panels):
            top, left = i * (height + edge), j * width + (gap if j > 1 else 0)
            tile = mosaic[top : top + height, left : left + width]
            if j > 1:
                tile[:] = _rgb(RIGHT if right else WRONG)
                if not right:  # broken lines: told apart without seeing colours
                    tile[np.arange(height) // (4 * edge) % 2 == 1] = 1
            tile[edge:-edge, edge:-edge] = panel[i]
    return mosaic


def plot_pair(
    first_picture: Float[np.ndarray, "rows columns 3"],
    second_picture: Float[np.ndarray, "rows columns 3"],
    first_map: Float[Tensor, "height width"],
    second_map: Float[Tensor, "height width"],
    *,
    headline: str = "",
    details: str = "",
    names: tuple[str, str] = ("first picture", "second picture"),
    row_threshold: float = 0.2,
) -> "Figure":
    """Returns a figure that explains one pair to a reader who does not know the paper.

    From the outside in: both pictures, where the network looked in each, how strongly in each
    row, with the attended span marked, and in the middle both profiles as they are compared.

    Args:
        first_picture: RGB in [0, 1].
        second_picture: the same for the second image.
        first_map: Siamese attention of the first image, >= 0.
        second_map: that of the second one.
        headline: what the model says.
        details: a line below it.
        names: what to call the two pictures.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.

    Example:
        >>> figure = plot_pair(np.zeros((8, 4, 3)), np.zeros((8, 4, 3)), torch.eye(4), torch.eye(4))
        >>> [axis.get_title() for axis in figure.axes][0]
        'first picture'
    """
    from matplotlib.figure import Figure

    rows, columns = first_picture.shape[:2]
    tall = 3.4  # inches
    wide = tall * columns / rows
    widths = [wide, wide, 1.2, 2.0, 1.2, wide, wide]
    figure = Figure(figsize=(sum(widths) + 1.2, tall + 1.75), layout="constrained", dpi=120)
    figure.suptitle(headline, fontsize=13, fontweight="bold")
    axes: Any = figure.subplots(1, 7, width_ratios=widths)
    profiles = [row_profiles(each.detach().float().cpu()) for each in (first_map, second_map)]
    pictures, maps = (first_picture, second_picture), (first_map, second_map)
    for side, (colour, name) in enumerate(zip(PAIR_COLOURS, names, strict=True)):
        shown, looked, strength = [axes[i] for i in ((0, 1, 2), (6, 5, 4))[side]]
        height = len(profiles[side])
        first, last = (int(row) for row in attended_span(profiles[side], row_threshold))
        extent = (0, height * columns / rows, height, 0)
        covered = overlay(pictures[side][None], maps[side][None])[0]
        for axis, picture in ((shown, pictures[side]), (looked, covered)):
            axis.imshow(picture, extent=extent)
            axis.set_xticks([])
            axis.set_yticks([])
        shown.set_title(name, fontsize=9)
        looked.set_title("where it looked", fontsize=9)
        for edge in (first, last + 1):
            looked.axhline(edge, color="white", linewidth=2.4)
            looked.axhline(edge, color=colour, linewidth=1.4, linestyle="--")
        _plot_profile(strength, profiles[side], colour, row_threshold)
        strength.axhspan(first, last + 1, color=colour, alpha=0.13, linewidth=0)
        strength.set_title("how strongly", fontsize=9)
        strength.set_xlabel(f"rows {first + 1} to {last + 1} of {height}\ncount", fontsize=8)
        if side:
            strength.invert_xaxis()  # both grow towards the middle
    _plot_aligned(axes[3], profiles, row_threshold, names)
    axes[3].set_title("the rows that count,\nstretched to one length", fontsize=9)
    figure.supxlabel(
        f"{details}\nBright: what speaks for the same person. t: rows that reach more than "
        f"{row_threshold:.0%} of the strongest count. Grey: what differs.".strip(),
        fontsize=8,
    )
    return figure


def plot_pairs(
    query_pictures: Float[np.ndarray, "pairs rows columns 3"],
    gallery_pictures: Float[np.ndarray, "pairs rows columns 3"],
    query_maps: Float[Tensor, "pairs height width"],
    gallery_maps: Float[Tensor, "pairs height width"],
    same: Sequence[bool],
    *,
    titles: Sequence[str] | None = None,
    row_threshold: float = 0.2,
) -> "Figure":
    """Returns a figure of pairs: pictures, attention, and row profiles before alignment.

    A pair takes a row: the query and its attention, the row profiles of both with the spans that
    are aligned, the gallery picture's attention and the picture. Right and wrong are told by
    the frame's colour and by words.

    Args:
        query_pictures: RGB in [0, 1].
        gallery_pictures: the same for the second images.
        query_maps: Siamese attention of the queries in their pairs.
        gallery_maps: that of the second images.
        same: whether each pair shows one identity.
        titles: a line above each pair.
        row_threshold: t, marked in the profiles.
    """
    from matplotlib.figure import Figure

    num_pairs, rows, columns = query_pictures.shape[:3]
    height = 1.9 * rows / columns / 2
    figure = Figure(figsize=(7.6, num_pairs * (height + 0.35)), layout="constrained", dpi=120)
    axes: Any = figure.subplots(num_pairs, 5, squeeze=False, width_ratios=[1, 1, 1.5, 1, 1])
    panels = (
        query_pictures,
        overlay(query_pictures, query_maps),
        None,
        overlay(gallery_pictures, gallery_maps),
        gallery_pictures,
    )
    headings = ("query", "its attention", "", "its attention", "gallery")
    for i in range(num_pairs):
        for j, panel in enumerate(panels):
            axis = axes[i, j]
            if i == 0:
                axis.set_title(headings[j], fontsize=9)
            if panel is not None:
                _show(axis, panel[i], same[i] if j >= 3 else None)
                continue
            profiles = [row_profiles(maps[i].detach().float().cpu())
                        for maps in (query_maps, gallery_maps)]  # fmt: skip
            for name, profile, colour, at in zip(
                ("query", "gallery"), profiles, PAIR_COLOURS, (1.06, 1.14), strict=True
            ):
                first, last = (int(row) for row in attended_span(profile, row_threshold))
                _plot_profile(axis, profile, colour, row_threshold, label=name)
                axis.plot([at, at], [first, last + 1], color=colour, linewidth=3,
                          solid_capstyle="butt")  # fmt: skip
            axis.set_xlim(-0.03, 1.22)
            distance = float(attention_distance(*profiles, row_threshold=row_threshold))
            axis.set_xlabel(f"row maxima; distance {distance:.2f}", fontsize=8)
            if i == 0:
                axis.legend(fontsize=7, frameon=False, loc="lower center",
                            bbox_to_anchor=(0.5, 1.0), ncols=2)  # fmt: skip
        axes[i, 4].set_xlabel(verdict(same[i]), fontsize=8, color=RIGHT if same[i] else WRONG)
        if titles is not None:
            axes[i, 0].set_xlabel(titles[i], fontsize=8)
    return figure


def plot_ranking(
    query_picture: Float[np.ndarray, "rows columns 3"],
    gallery_pictures: Float[np.ndarray, "matches rows columns 3"],
    query_maps: Float[Tensor, "matches height width"],
    gallery_maps: Float[Tensor, "matches height width"],
    right: Sequence[bool],
    captions: Sequence[str],
    *,
    headline: str = "",
    apart: int = 0,
) -> "Figure":
    """Returns a figure of a ranked list: the query, its matches, the attention of each pair.

    Above, the gallery pictures with frames in green (right) and red (wrong, and broken); below
    each, where the network looked in it, and where in the query when it compared the two.

    Args:
        query_picture: RGB in [0, 1].
        gallery_pictures: the matches, in their order.
        query_maps: Siamese attention of the query in its pair with each match.
        gallery_maps: that of the matches.
        right: whether each match shows the query's identity.
        captions: some lines below each match's picture.
        headline: above all.
        apart: so many matches at the end are set apart: they are no part of the list.

    Example:
        >>> picture, maps = np.zeros((8, 4, 3)), torch.rand(2, 4, 2)
        >>> matches = np.stack([picture, picture])
        >>> figure = plot_ranking(picture, matches, maps, maps, [True, False], ["1", "2"])
        >>> len(figure.axes)
        9
    """
    from matplotlib.figure import Figure

    rows, columns = query_picture.shape[:2]
    number = len(right)
    wide = 1.25  # inches
    tall = wide * rows / columns
    widths = [1.0] * (1 + number)
    if apart:
        widths.insert(1 + number - apart, 0.25)
    width = wide * sum(widths) + 0.4
    figure = Figure(figsize=(width, 3 * tall + 1.5), layout="constrained", dpi=110)
    title = textwrap.fill(headline, int(9 * width))  # 9 letters of its size fill an inch
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes: Any = figure.subplots(3, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes[:, 1 + number - apart] if apart else ():
        axis.remove()
    _show(axes[0, 0], query_picture)
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
    covered = overlay(gallery_pictures, gallery_maps)
    of_query = overlay(np.broadcast_to(query_picture, gallery_pictures.shape), query_maps)
    for i in range(number):
        column = axes[:, 1 + i + (i >= number - apart and apart > 0)]
        for axis, panel in zip(column, (gallery_pictures, covered, of_query), strict=True):
            _show(axis, panel[i], right[i])
        column[0].set_title(verdict(right[i]), fontsize=9, color=RIGHT if right[i] else WRONG)
        column[0].set_xlabel(captions[i], fontsize=8)
    return figure


def png_uri(figure: "Figure", **options: Any) -> str:
    """Returns a figure as a data URI of a PNG; `options` are those of ``savefig``."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **options)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def verdict(same: bool) -> str:
    """Returns the words, with a tick or a cross, for whether two pictures show one identity."""
    return "\N{CHECK MARK} same person" if same else "\N{BALLOT X} other person"


def _rgb(colour: str) -> Float[np.ndarray, "3"]:
    from matplotlib.colors import to_rgb

    return np.asarray(to_rgb(colour))


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


def _plot_profile(
    axis: Any, profile: Tensor, colour: str, row_threshold: float, *, label: str = ""
) -> None:
    """Draws a row profile down the rows of its picture, with the row_threshold t."""
    axis.axvline(row_threshold, color="0.6", linewidth=0.8, linestyle=":")
    axis.plot(profile, np.arange(len(profile)) + 0.5, color=colour, marker="o", markersize=2.5,
              linewidth=1.2, label=label)  # fmt: skip
    axis.set_ylim(len(profile), 0)
    axis.set_xlim(-0.03, 1.06)
    axis.set_xticks([0, row_threshold, 1], ["0", "t", "1"], fontsize=7)
    axis.set_yticks([])
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _plot_aligned(
    axis: Any, profiles: Sequence[Tensor], row_threshold: float, names: Sequence[str]
) -> None:
    """Draws two aligned profiles M*_m over each other, and what differs between them."""
    aligned = [align_profiles(profile, row_threshold).numpy() for profile in profiles]
    at = np.arange(len(aligned[0])) + 0.5
    axis.fill_betweenx(at, *aligned, color="0.85", linewidth=0)
    for profile, colour, name, style in zip(aligned, PAIR_COLOURS, names, ("-", "--"), strict=True):
        axis.plot(profile, at, style, color=colour, marker="o", markersize=2.5, linewidth=1.4,
                  label=name)  # fmt: skip
    axis.set_ylim(len(at), 0)
    axis.set_xlim(-0.03, 1.06)
    axis.set_xticks([0, 1], ["0", "1"], fontsize=7)
    axis.set_yticks([])
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def plot_curves(
    history: Sequence[Mapping[str, float | int]], results: Mapping[str, Any], *, max_rank: int = 20
) -> "Figure":
    """Returns a figure of the loss terms over the epochs and of the three CMC curves.

    Args:
        history: ``engine.history``, one dictionary of mean loss terms an epoch.
        results: of one data set in ``engine.results``.
        max_rank: last rank of the CMC curves.

    Example:
        >>> ranking = {"mAP": 0.5, "cmc": [0.4, 0.8, 1.0]}
        >>> results = {"features": ranking, "attention": ranking, "fused": ranking}
        >>> len(plot_curves([{"epoch": 1, "loss": 2.0}], results).axes)
        2
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    terms = {
        "loss": "L (Eq. 6)",
        "loss_ide": "L_ide",
        "loss_ia": "L_ia",
        "loss_bce": "L_bce",
        "attention_distance": "attention distance",
    }
    for term, label in terms.items():
        if any(term in entry for entry in history):
            values = [entry.get(term, float("nan")) for entry in history]
            left.plot(epochs, values, marker="o", markersize=3, label=label)
    left.set_xlabel("epoch")
    left.set_ylabel("mean over the epoch")
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=8)
    _plot_cmc(right, {name: results[name] for name in COLOURS}, max_rank)
    return figure


def plot_cmc(results: Mapping[str, Any], *, max_rank: int = 20) -> "Figure":
    """Returns a figure of CMC curves.

    Args:
        results: "features", "attention" or "fused", each with "mAP" and "cmc".
        max_rank: last rank of the curves.

    Example:
        >>> plot_cmc({"fused": {"mAP": 0.5, "cmc": [0.4, 0.8]}}).axes[0].get_xlabel()
        'rank'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained", dpi=120)
    _plot_cmc(figure.subplots(), results, max_rank)
    return figure


def _plot_cmc(axis: Any, results: Mapping[str, Any], max_rank: int) -> None:
    for name, ranking in results.items():
        cmc = ranking["cmc"][:max_rank]
        label = f"{name}: mAP {ranking['mAP']:.1%}"
        axis.plot(range(1, len(cmc) + 1), [100 * share for share in cmc], color=COLOURS[name],
                  marker="o", markersize=3, label=label)  # fmt: skip
    axis.set_xlabel("rank")
    axis.set_xticks([1, *range(5, max_rank + 1, 5)])
    axis.set_ylabel("queries matched (%)")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
