"""Pictures: attention over images, query-gallery pairs, training curves and CMC curves.

matplotlib is imported when a picture is drawn; no display is needed. The figures belong to no
window: save them with ``figure.savefig(path)``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from casn_plugin.attention import align_profiles, attended_span, row_profiles, scale_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
COLOURS = {"features": "#0072B2", "attention": "#E69F00", "fused": "#CC79A7"}  # Okabe and Ito's
RIGHT, WRONG = "#009E73", "#D55E00"


def denormalize(
    imgs: Float[Tensor, "batch 3 rows columns"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[np.ndarray, "batch rows columns 3"]:
    """Returns normalised images as RGB pictures in [0, 1], channels last.

    Example:
        >>> denormalize(torch.zeros(1, 3, 2, 2))[0, 0, 0].round(3).tolist()
        [0.485, 0.456, 0.406]
    """
    rgb = imgs.detach().float().cpu() * torch.tensor(std)[:, None, None]
    rgb = (rgb + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    return np.asarray(rgb.permute(0, 2, 3, 1).numpy(), dtype=np.float64)


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
        maps: attention maps >= 0 of any resolution.
        opacity: of the colours where attention is highest, in [0, 1].

    Example:
        >>> overlay(np.full((1, 4, 4, 3), 0.5), torch.zeros(1, 2, 2))[0, 0, 0].tolist()
        [0.5, 0.5, 0.5]
    """
    from matplotlib import colormaps

    rows, columns = pictures.shape[1:3]
    resized = F.interpolate(
        maps.detach().float().cpu()[:, None], size=(rows, columns), mode="bilinear"
    )[:, 0]
    strength = scale_maps(resized).numpy()
    colours = colormaps["inferno"](strength)[..., :3]
    cover = opacity * strength[..., None]
    return np.asarray((1 - cover) * pictures + cover * colours, dtype=np.float64)


def plot_pairs(
    query_pictures: Float[np.ndarray, "pairs rows columns 3"],
    gallery_pictures: Float[np.ndarray, "pairs rows columns 3"],
    query_maps: Float[Tensor, "pairs height width"],
    gallery_maps: Float[Tensor, "pairs height width"],
    same: Sequence[bool],
    *,
    titles: Sequence[str] | None = None,
    threshold: float = 0.2,
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
        threshold: t, marked in the profiles.
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
            if panel is None:
                _plot_profiles(axis, row_profiles(query_maps[i]), row_profiles(gallery_maps[i]),
                               threshold, legend=i == 0)  # fmt: skip
                continue
            axis.imshow(panel[i])
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(j >= 3)
                spine.set_edgecolor(RIGHT if same[i] else WRONG)
                spine.set_linewidth(3)
        words = "same person" if same[i] else "different person"
        axes[i, 4].set_xlabel(words, fontsize=8, color=RIGHT if same[i] else WRONG)
        if titles is not None:
            axes[i, 0].set_xlabel(titles[i], fontsize=8)
    return figure


def _plot_profiles(
    axis: Any, query: Tensor, gallery: Tensor, threshold: float, *, legend: bool
) -> None:
    """Draws two profiles down the rows of their pictures; the aligned spans as bars beside."""
    axis.axvline(threshold, color="0.7", linewidth=0.8, linestyle=":")
    both = (("query", query, "#0072B2", 1.06), ("gallery", gallery, "#E69F00", 1.14))
    for name, profile, colour, at in both:
        profile = profile.detach().float().cpu()
        first, last = (int(row) for row in attended_span(profile, threshold))
        axis.plot(profile, np.arange(len(profile)) + 0.5, color=colour, marker="o", markersize=2,
                  linewidth=1.2, label=name)  # fmt: skip
        axis.plot([at, at], [first, last + 1], color=colour, linewidth=3, solid_capstyle="butt")
    distance = torch.linalg.vector_norm(
        align_profiles(query.detach().float().cpu(), threshold)
        - align_profiles(gallery.detach().float().cpu(), threshold)
    )
    axis.set_ylim(len(query), 0)
    axis.set_xlim(-0.03, 1.22)
    axis.set_xticks([0, threshold, 1], ["0", "t", "1"], fontsize=7)
    axis.set_yticks([])
    axis.set_xlabel(f"row maxima; distance {float(distance):.2f}", fontsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    if legend:
        axis.legend(
            fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2
        )


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
    for name, colour in COLOURS.items():
        cmc = results[name]["cmc"][:max_rank]
        label = f"{name}: mAP {results[name]['mAP']:.1%}"
        right.plot(range(1, len(cmc) + 1), [100 * share for share in cmc], color=colour,
                   marker="o", markersize=3, label=label)  # fmt: skip
    right.set_xlabel("rank")
    right.set_xticks([1, *range(5, max_rank + 1, 5)])
    right.set_ylabel("queries matched (%)")
    right.set_ylim(0, 102)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower right")
    return figure
