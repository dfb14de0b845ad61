"""Attention-fused ranking of every query-gallery pair, without a backward pass per pair.

The Siamese attention of a pair depends on the pair through the indicator α alone (Eq. 4), and
linearly: with P the image's pooled Jacobian GAP(∂f/∂A), its map is ReLU(Bᵀα), where the
attention basis B = PᵀA is computed once per image. Tensors in, tensors out.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin.attention import (
    PairScorer,
    align_profiles,
    attention_distance,
    evaluating,
    indicator,
    row_profiles,
)

Normalization = Literal["unit", "query", "global"]
"""How distances are "normalized" before they are summed: see :func:`fuse_distmats`."""


@dataclass(frozen=True)
class Encoding:
    """What ranking needs of N images: their features and what their attention maps are made of.

    Exactly one of `basis` and `activations` is there.

    Attributes:
        features: (N, D) eval features f of the backbone.
        basis: (N, D, H, W) attention basis B = PᵀA: the map of an image is ReLU(Σ_d α_d B_d).
        activations: (N, C, H, W) feature maps A, for features made of D / C normalised parts
            (PCB), whose basis would be larger than A.
    """

    features: Float[Tensor, "images dim"]
    basis: Float[Tensor, "images dim height width"] | None = None
    activations: Float[Tensor, "images channels height width"] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where not exactly one of basis and activations is given."""
        if (self.basis is None) == (self.activations is None):
            raise ValueError("an Encoding holds either a basis or activations")
        if len(self.maps) != len(self.features):
            raise ValueError(
                f"features and maps must be of one length, got {len(self.features)} and "
                f"{len(self.maps)}"
            )

    @property
    def maps(self) -> Tensor:
        """The 4-D tensor: the basis or the activations."""
        maps = self.basis if self.basis is not None else self.activations
        assert maps is not None  # for the type checker: __post_init__ saw to it
        return maps

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> "Encoding":
        """Returns the encoding of some of the images."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, *args: Any, **kwargs: Any) -> "Encoding":
        """Returns the encoding on another device or in another dtype, as ``Tensor.to`` does."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Encoding":
        return Encoding(
            function(self.features),
            None if self.basis is None else function(self.basis),
            None if self.activations is None else function(self.activations),
        )

    @staticmethod
    def cat(encodings: Sequence["Encoding"]) -> "Encoding":
        """Returns several encodings of one model as one.

        Raises:
            ValueError: no encoding, or encodings of unlike kinds.

        Example:
            >>> one = Encoding(torch.rand(2, 4), basis=torch.rand(2, 4, 6, 3))
            >>> len(Encoding.cat([one, one]))
            4
        """
        if len({encoding.basis is None for encoding in encodings}) != 1:
            raise ValueError(
                "expected at least one encoding, all with a basis or all with activations"
            )
        return Encoding(
            torch.cat([encoding.features for encoding in encodings]),
            None
            if encodings[0].basis is None
            else torch.cat([encoding.maps for encoding in encodings]),
            None
            if encodings[0].activations is None
            else torch.cat([encoding.maps for encoding in encodings]),
        )


def encode_head(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    pooled: Tensor | None = None,
    *,
    chunk: int = 32,
) -> Encoding:
    """Returns the encoding of images from their features and maps, still joined by a graph.

    Exact for any head in eval mode. One random vector-Jacobian product tells which of the closed
    forms, if any, the head of the network has: global average pooling (B = A / HW), normalised
    parts (PCB: A is kept), or neither (min(C, D) products with the head's Jacobian).

    Args:
        features: f, computed row by row from `activations` with gradients enabled.
        activations: the map A.
        pooled: (images, channels, 1, 1), where A goes into the head through its mean alone: the
            mean, a tensor of the same graph. The products then stop there, which is faster.
        chunk: products with the Jacobian at a time, where they are needed.

    Raises:
        ValueError: features that do not depend on the activations.

    Example:
        >>> a = torch.rand(2, 8, 6, 3, requires_grad=True)
        >>> encode_head(a.mean((2, 3)), a).basis.shape
        torch.Size([2, 8, 6, 3])
    """
    maps, values = activations.detach(), features.detach()
    generator = torch.Generator(features.device).manual_seed(0)
    probe = torch.randn(
        features.shape, generator=generator, device=features.device, dtype=features.dtype
    )
    gradients = None
    if features.requires_grad and activations.requires_grad:
        (gradients,) = torch.autograd.grad(
            features, activations, probe, retain_graph=True, allow_unused=True
        )
    if gradients is None:
        raise ValueError(
            "the features do not depend on the activations: expected features computed, with "
            "gradients enabled, from the very tensor that is given as activations"
        )
    channels, height, width = maps.shape[1:]
    means = maps.mean((2, 3))
    if _close(values, means) and _close(
        gradients, (probe / (height * width))[:, :, None, None].expand_as(gradients)
    ):
        return Encoding(values, basis=maps / (height * width))
    parts, remainder = divmod(values.shape[1], channels)
    if not remainder and _close(values, part_embedding(maps, parts)):
        weights = _part_weights(values, maps, probe[:, None])[:, 0]
        if _close(gradients.mean((2, 3)), weights):
            return Encoding(values, activations=maps)
    source = activations
    if pooled is not None and pooled.requires_grad and _close(pooled.flatten(1), means):
        (pulled,) = torch.autograd.grad(features, pooled, probe, retain_graph=True)
        if _close(gradients, (pulled / (height * width)).expand_as(gradients)):
            source, maps = pooled, maps / (height * width)
    if channels < values.shape[1]:
        with contextlib.suppress(RuntimeError):  # HACNN's grid_sample has no second derivative
            return Encoding(values, basis=_basis_by_channel(features, source, maps, chunk))
    basis = maps.new_empty(*values.shape, height, width)
    unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    for start in range(0, values.shape[1], chunk):
        rows = unit[start : start + chunk, None].expand(-1, len(values), -1)
        (jacobian,) = torch.autograd.grad(
            features, source, rows, retain_graph=True, is_grads_batched=True
        )
        basis[:, start : start + chunk] = torch.einsum(
            "dbc,bchw->bdhw", jacobian.mean((3, 4)), maps
        )
    return Encoding(values, basis=basis)


def _basis_by_channel(features: Tensor, source: Tensor, maps: Tensor, chunk: int) -> Tensor:
    """Returns the attention basis by C products P e_k instead of D products Pᵀ e_d.

    v ↦ GAP(Jᵀ v) is linear, so differentiating it once more gives the columns of P.
    """
    cotangent = torch.zeros_like(features, requires_grad=True)
    (pulled,) = torch.autograd.grad(features, source, cotangent, create_graph=True)
    pooled = pulled.mean((2, 3))
    unit = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
    basis = maps.new_zeros(*features.shape, *maps.shape[2:])
    for start in range(0, pooled.shape[1], chunk):
        columns = unit[start : start + chunk, None].expand(-1, len(features), -1)
        (jacobian,) = torch.autograd.grad(
            pooled, cotangent, columns, retain_graph=True, is_grads_batched=True
        )
        basis += torch.einsum("cbd,bchw->bdhw", jacobian, maps[:, start : start + chunk])
    return basis


def part_embedding(
    activations: Float[Tensor, "images channels height width"], parts: int
) -> Float[Tensor, "images dim"]:
    """Returns PCB's embedding: A pooled into horizontal parts, each of unit length, concatenated.

    Its D = C * parts values run over the parts of a channel first, as torchreid has them.

    Example:
        >>> part_embedding(torch.rand(2, 8, 12, 4), 6).norm(dim=1)
        tensor([2.4495, 2.4495])
    """
    return F.normalize(_parts(activations, parts), dim=1).flatten(1)


def attention_distmat(
    model: nn.Module,
    query: Encoding,
    gallery: Encoding,
    *,
    threshold: float = 0.2,
    unit: bool = False,
    max_memory: int = 256 * 2**20,
    progress: bool = False,
) -> Float[Tensor, "queries galleries"]:
    """Returns the attention distance ‖M*_m1 − M*_m2‖₂ of every pair (paper, Eq. 5 and Section 4).

    Exact for every pair, in the dtype of the encodings, and without a backward pass through the
    backbone. The query is the first image of a pair: f⁻ = f_query − f_gallery. Pairs are worked
    on in tiles; only their distances leave a tile.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs; tiles are computed where its
            parameters are.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery.
        threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: compare aligned profiles of unit length.
        max_memory: bytes that the tensors of a tile may take, beside the images in it.
        progress: show a progress bar on a terminal.

    Returns:
        Distances >= 0, on the device of the queries.

    Raises:
        TypeError: encodings of unlike kinds.
        ValueError: unlike feature or map sizes, no pair classifier, a threshold outside [0, 1).

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> attention_distmat(model, images[:1], images).shape
        torch.Size([1, 3])
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    pair_classifier, device = _pair_classifier(model, query, gallery)

    def profiles(alpha: Tensor, images: Encoding) -> Tensor:
        return row_profiles(_attention_maps(alpha, images))

    def distances(first: Encoding, second: Encoding, gradients: Tensor) -> Tensor:
        alpha = (gradients > 0).to(first.features.dtype)
        by_second = profiles(alpha.transpose(0, 1), second).transpose(0, 1)
        return attention_distance(profiles(alpha, first), by_second, threshold=threshold, unit=unit)

    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        evaluating(pair_classifier),
    ):
        if _is_affine(pair_classifier):  # one α for all pairs: O(Q + G)
            alpha = indicator(pair_classifier, query.features[:1].to(device))[None]

            def aligned(images: Encoding) -> Tensor:
                rows = []
                for start in range(0, len(images), 64):
                    part = images[start : start + 64].to(device)
                    each = align_profiles(
                        profiles(alpha.expand(len(part), -1, -1), part)[:, 0], threshold
                    )
                    rows.append(F.normalize(each, dim=-1) if unit else each)
                return torch.cat(rows)

            distmat = torch.cdist(
                aligned(query), aligned(gallery), compute_mode="donot_use_mm_for_euclid_dist"
            )
            return distmat.to(query.features.device)
        return _tiled(
            pair_classifier, device, query, gallery, distances, max_memory, progress, "gradient"
        )


def pair_attention(
    model: nn.Module, first: Encoding, second: Encoding
) -> tuple[Float[Tensor, "pairs height width"], Float[Tensor, "pairs height width"]]:
    """Returns the attention maps M1 and M2 of pairs: row i of both encodings (Section 3.2.2).

    The maps are >= 0 and unscaled.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        first: the first images (queries), as ``model.encode`` gives them.
        second: the second images, as many.

    Raises:
        TypeError: encodings of unlike kinds.
        ValueError: unlike numbers of images, feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> pair_attention(model, images, images)[0].shape
        torch.Size([3, 6, 2])
    """
    pair_classifier, device = _pair_classifier(model, first, second)
    if len(first) != len(second):
        raise ValueError(
            f"expected as many first as second images, got {len(first)}, {len(second)}"
        )
    with torch.no_grad(), evaluating(pair_classifier):
        first, second = first.to(device), second.to(device)
        alpha = indicator(pair_classifier, first.features - second.features)[:, None]
        return _attention_maps(alpha, first)[:, 0], _attention_maps(alpha, second)[:, 0]


def same_identity_distmat(
    model: nn.Module, query: Encoding, gallery: Encoding, *, max_memory: int = 256 * 2**20
) -> Float[Tensor, "queries galleries"]:
    """Returns z1 − z0 of every pair: above 0 where the pair classifier says "same identity".

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery.
        max_memory: bytes that the tensors of a tile may take.

    Raises:
        TypeError: encodings of unlike kinds.
        ValueError: unlike feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> same_identity_distmat(model, images, images).shape
        torch.Size([3, 3])
    """
    pair_classifier, device = _pair_classifier(model, query, gallery)
    with torch.no_grad(), evaluating(pair_classifier):
        return _tiled(
            pair_classifier,
            device,
            query,
            gallery,
            lambda _, __, scores: scores[..., 1] - scores[..., 0],
            max_memory,
            False,
            "scores",
        )


def fuse_distmats(
    feature_distmat: Float[Tensor, "queries galleries"],
    attention_distmat: Float[Tensor, "queries galleries"],
    *,
    normalization: Normalization = "unit",
    attention_weight: float = 0.1,
) -> Float[Tensor, "queries galleries"]:
    """Returns the two distances, "normalized and summed for final ranking" (paper, Section 4).

    Args:
        feature_distmat: l2 distances of the features.
        attention_distmat: attention distances of the same pairs.
        normalization: how the paper's "normalized" is read. "unit": the vectors were, so both
            matrices hold distances of unit-length vectors and are summed as they are; "query":
            each matrix is scaled to [0, 1] by the least and largest value of each row, so that a
            ranking depends on no other query; "global": by those of the whole matrix. A constant
            row or matrix becomes zero.
        attention_weight: weight of the attention distance; the features have weight 1.

    Raises:
        ValueError: unlike shapes or an unknown normalization.

    Example:
        >>> fuse_distmats(torch.tensor([[1.0, 3.0]]), torch.tensor([[8.0, 4.0]]),
        ...               normalization="query", attention_weight=0.5)
        tensor([[0.5000, 1.0000]])
    """
    if feature_distmat.shape != attention_distmat.shape:
        raise ValueError(
            "expected two matrices of one shape, got "
            f"{tuple(feature_distmat.shape)} and {tuple(attention_distmat.shape)}"
        )
    if normalization not in ("unit", "query", "global"):
        raise ValueError(
            f"normalization must be 'unit', 'query' or 'global', got {normalization!r}"
        )
    if normalization != "unit" and feature_distmat.numel():
        dims = (1,) if normalization == "query" else (0, 1)
        feature_distmat = _min_max(feature_distmat, dims)
        attention_distmat = _min_max(attention_distmat, dims)
    return feature_distmat + attention_weight * attention_distmat


def verification_auc(
    scores: Float[Tensor, "queries galleries"], same: Bool[Tensor, "queries galleries"]
) -> float:
    """Returns the ROC AUC of pair scores: 1 = all positives score higher, 0.5 = chance.

    It is NaN where positives or negatives are missing. Ties count half.

    Example:
        >>> verification_auc(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, False, False]]))
        1.0
    """
    labels = same.flatten().cpu().numpy()
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores.detach().flatten().cpu().numpy())
    above = np.sum(ranks[labels]) - positives * (positives + 1) / 2
    return float(above / positives / negatives)


def _pair_classifier(
    model: nn.Module, query: Encoding, gallery: Encoding
) -> tuple[nn.Module, torch.device]:
    """Returns the pair classifier of a model and its device, the arguments being sound."""
    if not isinstance(query, Encoding) or not isinstance(gallery, Encoding):
        raise TypeError(
            "query and gallery must be what model.encode gives, got "
            f"{type(query).__name__} and {type(gallery).__name__}"
        )
    if (query.basis is None) != (gallery.basis is None):
        raise TypeError("query and gallery must be encoded by one model, got unlike encodings")
    if query.maps.shape[1:] != gallery.maps.shape[1:] or (
        query.features.shape[1] != gallery.features.shape[1]
    ):
        raise ValueError(
            "query and gallery must be encoded by one model at one image size, got maps of "
            f"{tuple(query.maps.shape[1:])} and {tuple(gallery.maps.shape[1:])}"
        )
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrapped = model.module if isinstance(model, parallel) else model
    pair_classifier = getattr(wrapped, "pair_classifier", None)
    if not isinstance(pair_classifier, nn.Module):
        raise ValueError(f"{type(wrapped).__name__} has no pair_classifier; is it a CASN?")
    first = next(iter(pair_classifier.parameters()), query.features)
    return pair_classifier, first.device


def _layers(pair_classifier: PairScorer) -> list[nn.Module]:
    """Returns the layers of a plain sequence; none where anything else may happen in it."""
    if type(pair_classifier) is nn.Linear:
        layers: list[nn.Module] = [pair_classifier]
    elif (
        isinstance(pair_classifier, nn.Sequential)
        and type(pair_classifier).forward is nn.Sequential.forward
    ):
        layers = list(pair_classifier)
    else:
        return []
    every = [*layers, pair_classifier]
    return [] if any(each._forward_hooks or each._forward_pre_hooks for each in every) else layers


def _linear_layers(pair_classifier: PairScorer) -> tuple[nn.Linear, nn.Linear] | None:
    """Returns the two layers of a Linear, ReLU, Linear classifier; None for any other."""
    layers = _layers(pair_classifier)
    if [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear]:
        return layers[0], layers[2]  # type: ignore[return-value]
    return None


def _is_affine(pair_classifier: PairScorer) -> bool:
    layers = _layers(pair_classifier)
    return bool(layers) and all(type(layer) is nn.Linear for layer in layers)


def _tiled(
    pair_classifier: PairScorer,
    device: torch.device,
    query: Encoding,
    gallery: Encoding,
    function: Callable[[Encoding, Encoding, Tensor], Tensor],
    max_memory: int,
    progress: bool,
    wanted: Literal["gradient", "scores"],
) -> Tensor:
    """Returns a (Q, G) matrix computed in tiles of pairs.

    `function` takes the images of a tile, and the (q, g, D) gradients ∂z1/∂f⁻ of its pairs or
    their (q, g, 2) scores z; it returns (q, g) values.
    """
    dim = query.features.shape[1]
    layers = _linear_layers(pair_classifier)
    hidden = layers[0].out_features if layers else dim
    per_pair = 3 * dim + 2 * hidden + (8 * query.maps[0, 0].numel() if wanted == "gradient" else 8)
    if query.activations is not None:
        per_pair += 2 * dim + 2 * query.maps.shape[1]
    pairs = max(max_memory // (per_pair * query.features.element_size()), 1)
    rows = max(min(int(pairs**0.5), len(query)), 1)
    columns = max(min(pairs // rows, len(gallery)), 1)
    distmat = query.features.new_empty(len(query), len(gallery))
    bar = tqdm(
        total=distmat.numel(), unit="pair", unit_scale=True, leave=False,
        disable=None if progress else True, desc="Comparing attention",
    )  # fmt: skip
    with bar:
        for left in range(0, len(query), rows):
            first = query[left : left + rows].to(device)
            for top in range(0, len(gallery), columns):
                second = gallery[top : top + columns].to(device)
                values = (_gradients if wanted == "gradient" else _scores)(
                    pair_classifier, first.features, second.features
                )
                distmat[left : left + rows, top : top + columns] = function(first, second, values)
                bar.update(len(first) * len(second))
    return distmat


def _hidden(first_layer: nn.Linear, qf: Tensor, gf: Tensor) -> Tensor:
    """Returns W1 (f1 − f2) + b1 of all pairs, (q, g, hidden): W1 f once per image."""
    weight = first_layer.weight.to(qf.dtype)
    hidden = (qf @ weight.T)[:, None] - (gf @ weight.T)[None]
    return hidden if first_layer.bias is None else hidden + first_layer.bias.to(qf.dtype)


def _gradients(pair_classifier: PairScorer, qf: Tensor, gf: Tensor) -> Tensor:
    """Returns ∂z1/∂f⁻ of all pairs, (q, g, D)."""
    layers = _linear_layers(pair_classifier)
    if layers:
        towards_same = layers[1].weight[1].to(qf.dtype)[:, None] * layers[0].weight.to(qf.dtype)
        gate = _hidden(layers[0], qf, gf) > 0
        return gate.to(qf.dtype) @ towards_same
    with torch.enable_grad():
        differences = (qf[:, None] - gf[None]).flatten(0, 1).requires_grad_()
        scores = pair_classifier(differences)[:, 1].sum()
        (gradients,) = torch.autograd.grad(scores, differences)
    return gradients.view(len(qf), len(gf), -1)


def _scores(pair_classifier: PairScorer, qf: Tensor, gf: Tensor) -> Tensor:
    """Returns z of all pairs, (q, g, 2)."""
    layers = _linear_layers(pair_classifier)
    if layers:
        scores = _hidden(layers[0], qf, gf).relu() @ layers[1].weight.to(qf.dtype).T
        return scores if layers[1].bias is None else scores + layers[1].bias.to(qf.dtype)
    return pair_classifier((qf[:, None] - gf[None]).flatten(0, 1)).view(len(qf), len(gf), 2)


def _attention_maps(
    alpha: Float[Tensor, "images others dim"], images: Encoding
) -> Float[Tensor, "images others height width"]:
    """Returns the maps M = ReLU(Σ_k w_k A_k) of each image for each of its indicators α."""
    weights = (
        alpha if images.basis is not None else _part_weights(images.features, images.maps, alpha)
    )
    maps = torch.bmm(weights, images.maps.flatten(2)).relu_()
    return maps.view(*maps.shape[:2], *images.maps.shape[2:])


def _parts(activations: Tensor, parts: int) -> Tensor:
    """Returns A pooled into horizontal parts, (B, C, parts)."""
    return F.adaptive_avg_pool2d(activations, (parts, 1)).squeeze(3)


def _part_weights(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    alpha: Float[Tensor, "images others dim"],
) -> Float[Tensor, "images others channels"]:
    """Returns w = GAP(∂(α, f)/∂A) of normalised parts: Σ_p (α_p − f_p (f_p·α_p)) / (‖g_p‖ HW).

    g_p is the pooled part and f_p = g_p / ‖g_p‖, with ‖g_p‖ >= 1e-12 as in ``F.normalize``.
    """
    channels, height, width = activations.shape[1:]
    parts = features.shape[1] // channels
    norms = _parts(activations, parts).norm(dim=1).clamp(min=1e-12)
    scale = 1 / (norms * (height * width))
    unit = features.unflatten(1, (channels, parts))
    alpha = alpha.unflatten(2, (channels, parts))
    along = torch.einsum("nocp,ncp->nop", alpha, unit) * scale[:, None]
    return torch.einsum("nocp,np->noc", alpha, scale) - torch.einsum("nop,ncp->noc", along, unit)


def _close(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors agree up to rounding, relative to their largest value."""
    if first.shape != second.shape:
        return False
    tolerance = 100 * torch.finfo(first.dtype).eps
    return bool((first - second).abs().max() <= tolerance * second.abs().max())


def _min_max(distmat: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns distances scaled to [0, 1] over some dimensions; constant ones become zero."""
    least = distmat.amin(dims, keepdim=True)
    spread = distmat.amax(dims, keepdim=True) - least
    return (distmat - least) / torch.where(spread > 0, spread, 1.0)
