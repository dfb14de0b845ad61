"""Attention as pure functions of tensors: maps, soft mask, row profiles, distance.

Grad-CAM (Section 3.1.2), the indicator of Eq. 4, Siamese
attention (Section 3.2.2), the soft mask, row profiles, alignment, and the distance of Eq. 5.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn

from casn_plugin.doors import (
    check_lengths,
    check_share,
    check_size,
    check_tensor,
    check_weight,
)
from casn_plugin.hooks import place_of
from casn_plugin.identities import split_pairs
from casn_plugin.scores import at_least_float32

PairScorer = Callable[[Tensor], Tensor]
"""Maps (P, D) differences of features to (P, 2) scores; column 1 is "same identity"."""

ROW_THRESHOLD = 0.2
"""t of Section 3.2.2: the share of a map's maximum above which a row counts as attended."""


def grad_cam(
    scores: Float[Tensor, " batch"],
    activations: Float[Tensor, "batch channels height width"],
    *,
    create_graph: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Returns the Grad-CAM maps ReLU(Σ_k w_k A_k), w = GAP(∂score/∂A) (paper, Section 3.1.2).

    The maps are >= 0, unscaled, in float32 or wider, and by default differentiable once more
    (`create_graph`). Only the part of the network between map and score is traversed.

    Args:
        scores: one score per image: y_c of its true identity, or s of Section 3.2.2.
        activations: the map A that the scores were computed from.
        create_graph: keep the graph, so that a loss of the maps can be trained.

    Raises:
        TypeError: scores or activations that are no float tensors.
        ValueError: unlike numbers of them, other shapes, or scores that do not depend on the
            activations.

    Example:
        >>> a = torch.rand(2, 3, 4, 4, requires_grad=True)
        >>> grad_cam(a.mean((2, 3)).sum(1), a).shape
        torch.Size([2, 4, 4])
    """
    check_tensor("scores", scores, "batch")
    check_tensor("activations", activations, "batch channels height width")
    check_lengths(scores=scores, activations=activations)
    gradients = None
    if scores.requires_grad and activations.requires_grad:
        (gradients,) = torch.autograd.grad(
            scores.sum(), activations, create_graph=bool(create_graph), retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
    if gradients is None:
        raise ValueError(
            "the scores do not depend on the activations: expected scores computed, with "
            "gradients enabled, from the very tensor that is given as activations"
        )
    with torch.autocast(activations.device.type, enabled=False):
        weights = at_least_float32(gradients).mean((2, 3))
        maps = torch.einsum("bc,bchw->bhw", weights, at_least_float32(activations))
        return maps.relu()


def indicator(
    pair_classifier: PairScorer, differences: Float[Tensor, "pairs dim"]
) -> Float[Tensor, "pairs dim"]:
    """Returns the indicator α (0 or 1): where ∂z1/∂f⁻ > 0 (paper, Eq. 4).

    It is piecewise constant, so no gradient flows through it; it is computed in float32 or wider.

    Args:
        pair_classifier: gives (P, 2) scores z, column 1 = same identity, row by row.
        differences: f⁻ = f1 − f2 of each pair.

    Raises:
        TypeError: differences that are no float tensor.
        ValueError: differences or scores of another shape, or scores that do not depend on them.

    Example:
        >>> classifier = nn.Linear(2, 2)
        >>> _ = classifier.weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        >>> indicator(classifier, torch.rand(1, 2))
        tensor([[1., 0.]])
    """
    check_tensor("differences", differences, "pairs dim")
    with torch.enable_grad(), torch.autocast(differences.device.type, enabled=False):
        inputs = at_least_float32(differences.detach())
        if isinstance(pair_classifier, nn.Module):  # a model cast to half precision as a whole
            inputs = inputs.to(place_of(pair_classifier, inputs).dtype)
            check_width(pair_classifier, inputs.shape[1])
        inputs.requires_grad_()
        given = pair_classifier(inputs.view_as(inputs))  # tools that watch modules take no leaf
        scores = check_tensor("scores of the pair classifier", given, "pairs 2")
        gradients = None
        if scores.requires_grad:
            (gradients,) = torch.autograd.grad(scores[:, 1].sum(), inputs, allow_unused=True)
    if gradients is None:
        raise ValueError("the scores of the pair classifier must depend on the differences")
    return (gradients > 0).to(differences.dtype)


def check_width(pair_classifier: nn.Module, dim: int) -> None:
    """Raises ValueError for a pair classifier that takes no differences of this dimension.

    Example:
        >>> check_width(nn.Linear(8, 2), 8)
    """
    layers = (layer for layer in pair_classifier.modules() if isinstance(layer, nn.Linear))
    width = next((layer.in_features for layer in layers), dim)
    if width != dim:
        raise ValueError(
            f"the pair classifier takes differences of dimension {width}, got features of {dim}"
        )


def siamese_attention(
    pair_classifier: PairScorer,
    features: Float[Tensor, "batch dim"],
    activations: Float[Tensor, "batch channels height width"],
    pairs: Int[Tensor, "pairs 2"] | None = None,
    *,
    create_graph: bool = True,
) -> Float[Tensor, "rows height width"]:
    """Returns the attention maps M of both images of each pair (paper, Section 3.2.2).

    s = (α, f), w = GAP(∂s/∂A), M = ReLU(Σ_k w_k A_k), with one α for both images of a pair.
    Rows 2i and 2i+1 of the result are pair i. The maps are >= 0 and unscaled. An image that is in
    several pairs has a map in each: what lies between map and features is differentiated as often
    as the most frequent image occurs.

    Args:
        pair_classifier: gives (P, 2) scores, column 1 = same identity.
        features: f, computed from `activations` with gradients enabled.
        activations: the map A.
        pairs: the two rows of each pair; by default rows 2i and 2i+1 are pair i. They are read,
            so they are best on the CPU.
        create_graph: keep the graph, so that a loss of the maps can be trained.

    Raises:
        TypeError: as :func:`grad_cam`.
        ValueError: an odd number of rows, other shapes, features that do not depend on the
            activations, or pairs of rows that there are not.

    Example:
        >>> a = torch.rand(4, 3, 6, 2, requires_grad=True)
        >>> siamese_attention(nn.Linear(3, 2), a.mean((2, 3)), a).shape
        torch.Size([4, 6, 2])
        >>> pairs = torch.tensor([[0, 1], [0, 2], [3, 0]])
        >>> siamese_attention(nn.Linear(3, 2), a.mean((2, 3)), a, pairs).shape
        torch.Size([6, 6, 2])
    """
    check_tensor("features", features, "batch dim")
    first, second = split_pairs(features, pairs)
    alpha = indicator(pair_classifier, first - second).repeat_interleave(2, dim=0)
    if pairs is None:
        return grad_cam((alpha * features).sum(1), activations, create_graph=create_graph)
    rows = pairs.flatten().tolist()
    turns, counts = [], [0] * len(features)
    for row in rows:
        turns.append(counts[row])
        counts[row] += 1
    maps = []
    for turn in range(max(counts, default=0) or 1):  # without a pair, for the graph
        now = [place for place, other in enumerate(turns) if other == turn]
        images = torch.tensor([rows[place] for place in now], device=features.device).long()
        places = torch.tensor(now, device=features.device).long()
        own = torch.zeros_like(features).index_copy(0, images, alpha[places])
        maps.append(grad_cam((own * features).sum(1), activations, create_graph=create_graph))
    where = [turn * len(features) + row for turn, row in zip(turns, rows, strict=True)]
    return torch.cat(maps)[torch.tensor(where, device=features.device).long()]


def similarity_attention(
    features: Float[Tensor, "batch dim"],
    activations: Float[Tensor, "batch channels height width"],
    *,
    create_graph: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Returns the Grad-CAM maps of the cosine of both features, for each image of each pair.

    s = f1·f2 / (‖f1‖ ‖f2‖), w = GAP(∂s/∂A), M = ReLU(Σ_k w_k A_k): no pair classifier is needed.
    Rows 2i and 2i+1 are pair i. The maps are >= 0 and unscaled.

    Args:
        features: f, computed from `activations` with gradients enabled.
        activations: the map A.
        create_graph: keep the graph, so that a loss of the maps can be trained.

    Raises:
        TypeError: as :func:`grad_cam`.
        ValueError: an odd number of rows, other shapes, or features that do not depend on the
            activations.

    Example:
        >>> a = torch.rand(4, 3, 6, 2, requires_grad=True)
        >>> similarity_attention(a.mean((2, 3)), a).shape
        torch.Size([4, 6, 2])
    """
    unit = F.normalize(check_tensor("features", features, "batch dim"), dim=1)
    first, second = split_pairs(unit)
    others = torch.stack([second, first], 1).flatten(0, 1).detach()
    return grad_cam((unit * others).sum(1), activations, create_graph=create_graph)


def scale_maps(maps: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """Returns each map divided by its own maximum: in [0, 1], a blank map stays zero.

    Raises:
        TypeError: maps that are no float tensor.
        ValueError: fewer than two dimensions.

    Example:
        >>> scale_maps(torch.tensor([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        tensor([[[0.0000, 0.5000],
                 [1.0000, 0.2500]],
        <BLANKLINE>
                [[0.0000, 0.0000],
                 [0.0000, 0.0000]]])
    """
    maps = at_least_float32(check_tensor("maps", maps, "*batch height width"))
    peak = maps.amax((-2, -1), keepdim=True)
    blank = peak <= torch.finfo(maps.dtype).tiny ** 0.5
    return maps / peak.masked_fill(blank, torch.inf)


def soft_mask(
    maps: Float[Tensor, "batch height width"],
    size: tuple[int, int],
    *,
    mask_scale: float = 10.0,
    mask_threshold: float = 0.5,
) -> Float[Tensor, "batch rows columns"]:
    """Returns Σ(M) = sigmoid(α(M − β)) at the size of the image (paper, Section 3.1.2).

    M is resized to the image (bilinear, half-pixel centres), then scaled to [0, 1] by its own
    maximum. The mask is in (0, 1): 1 hides a pixel.

    Args:
        maps: attention maps, >= 0.
        size: (rows, columns) of the image in pixels.
        mask_scale: α, the steepness of the mask's edge.
        mask_threshold: β, the share of the map's maximum above which a pixel is hidden.

    Raises:
        TypeError: maps that are no float tensor.
        ValueError: maps of another shape, a size without pixels, a scale that is not positive and
            finite, or β outside [0, 1).

    Example:
        >>> soft_mask(torch.eye(2)[None], (2, 2))
        tensor([[[0.9933, 0.0067],
                 [0.0067, 0.9933]]])
    """
    check_tensor("maps", maps, "batch height width")
    check_share("mask_threshold", mask_threshold)
    size = check_size("size", size)
    if check_weight("mask_scale", mask_scale) == 0:
        raise ValueError(f"mask_scale must be positive, got {mask_scale}")
    with torch.autocast(maps.device.type, enabled=False):
        resized = F.interpolate(
            at_least_float32(maps)[:, None], size=size, mode="bilinear", align_corners=False
        )
        return torch.sigmoid(mask_scale * (scale_maps(resized[:, 0]) - mask_threshold))


def row_profiles(maps: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height"]:
    """Returns the row maxima M_m of each map scaled to [0, 1] (paper, Section 3.2.2).

    Example:
        >>> row_profiles(torch.tensor([[[0.0, 2.0], [4.0, 1.0]]]))
        tensor([[0.5000, 1.0000]])
    """
    return scale_maps(maps).amax(-1)


def attended_span(
    profiles: Float[Tensor, "*batch height"], row_threshold: float
) -> tuple[Tensor, Tensor]:
    """Returns the first and the last row whose value is above t (integers).

    A profile with no such row spans all its rows.

    Raises:
        TypeError: profiles that are no float tensor.
        ValueError: t outside [0, 1).

    Example:
        >>> attended_span(torch.tensor([[0.0, 0.5, 1.0, 0.1], [0.0, 0.0, 0.0, 0.0]]), 0.2)
        (tensor([1, 0]), tensor([2, 3]))
    """
    check_tensor("profiles", profiles, "*batch height")
    profiles, height = at_least_float32(profiles.detach()), profiles.shape[-1]
    # 1, 0 or -1 times the number of the row: the greatest is that of the last row above t
    side = (profiles - check_share("row_threshold", row_threshold)).sign_()
    numbers = torch.arange(1, height + 1, device=side.device, dtype=side.dtype)
    last, first = ((side * rows).amax(-1) for rows in (numbers, numbers.flip(0)))
    none = ~(last > 0)
    first, last = (height - first).masked_fill(none, 0), (last - 1).masked_fill(none, height - 1)
    return first.long(), last.long()


def align_profiles(
    profiles: Float[Tensor, "*batch height"],
    row_threshold: float = ROW_THRESHOLD,
    *,
    unit: bool = False,
) -> Float[Tensor, "*batch height"]:
    """Returns M*_m: the attended rows of each profile, stretched to its whole height (Eq. 5).

    The rows from the first to the last value above t are resized to H values by linear
    interpolation with half-pixel centres, as ``interpolate(mode="linear", align_corners=False)``
    does, each profile by its own span.

    Args:
        profiles: row maxima of maps scaled to [0, 1].
        row_threshold: t.
        unit: divide each aligned profile by its length, one reading of "normalized".

    Raises:
        TypeError: profiles that are no float tensor.
        ValueError: t outside [0, 1).

    Example:
        >>> align_profiles(torch.tensor([0.0, 1.0, 0.5, 0.0]))
        tensor([1.0000, 0.8750, 0.6250, 0.5000])
    """
    check_tensor("profiles", profiles, "*batch height")
    height = profiles.shape[-1]
    first, last = (row.flatten() for row in attended_span(profiles, row_threshold))
    # by the length of the span, less 1: between which of its rows each value lies, and how far
    rows = torch.arange(height, device=profiles.device, dtype=profiles.dtype)
    source = (rows + 0.5) * ((rows[:, None] + 1) / height) - 0.5
    source = torch.minimum(source.clamp(min=0), rows[:, None])
    lower, fraction = source.long(), source.frac()
    # one value more in each profile, so that there is a next one: it counts nothing
    values = F.pad(profiles, (0, 1)).flatten()
    starts = torch.arange(len(first), device=first.device) * (height + 1) + first
    at = (lower.index_select(0, last - first) + starts[:, None]).flatten()
    aligned = torch.lerp(
        values[:-1].index_select(0, at),
        values[1:].index_select(0, at),
        fraction.index_select(0, last - first).flatten(),
    ).view(profiles.shape)
    return F.normalize(aligned, dim=-1) if unit else aligned


def attention_distance(
    first: Float[Tensor, "*batch height"],
    second: Float[Tensor, "*batch height"],
    *,
    row_threshold: float = ROW_THRESHOLD,
    unit: bool = False,
) -> Float[Tensor, "*batch"]:
    """Returns ‖M*_m1 − M*_m2‖₂ of each pair of profiles (paper, Eq. 5); >= 0, 0 for equal ones.

    Args:
        first: row profiles of the first images, in [0, 1].
        second: row profiles of the second images.
        row_threshold: t, the value above which a row counts as attended.
        unit: compare aligned profiles of unit length, see :func:`align_profiles`.

    Raises:
        TypeError: profiles that are no float tensors.
        ValueError: profiles of unlike heights or numbers, or t outside [0, 1).

    Example:
        >>> attention_distance(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.])
    """
    check_tensor("first", first, "*batch height")
    check_tensor("second", second, "*batch height")
    if first.shape != second.shape:
        raise ValueError(
            f"expected as many first as second profiles of one height, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}"
        )
    first, second = (align_profiles(each, row_threshold, unit=unit) for each in (first, second))
    distances: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
    return distances
