"""All pairs: attention distances, attention maps, scores of the pair classifier, flips of α."""

import copy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD, align_profiles
from casn_plugin.doors import check_count, check_finite, check_share
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evidence import Similarity
from casn_plugin.ranking.candidates import compare, nearest
from casn_plugin.ranking.closed_form import pair_form
from casn_plugin.ranking.compute import Arithmetic, Compute
from casn_plugin.ranking.pairs import (
    Pairs,
    Tile,
    check_alike,
    device_of,
    pair_classifier_of,
    undisturbed,
)
from casn_plugin.ranking.sides import Scratch, Side


def attention_distmat(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    row_threshold: float = ROW_THRESHOLD,
    unit: bool = False,
    shortlist: int | None = None,
    compute: Compute | None = None,
) -> Float[Tensor, "queries galleries"]:
    """Returns the attention distance ‖M*_m1 − M*_m2‖₂ of every pair (paper, Eq. 5 and Section 4).

    Exact for every pair, in the dtype of the features, and without a backward pass through the
    backbone, unless `shortlist` or `compute` asks for less, or
    ``torch.set_float32_matmul_precision`` lets products be coarser. The query is the first image of
    a pair: f⁻ = f_query − f_gallery. Pairs are worked on in tiles; only their distances leave a
    tile.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs; tiles are computed where its
            parameters are.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding, or a :class:`~casn_plugin.ranking.GalleryIndex`, which
            is read from disk block by block.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: compare aligned profiles of unit length.
        shortlist: compare only each query's so many nearest by features; all others get the
            greatest distance that there is, so they follow in the order of the features. An
            approximation.
        compute: with what the pairs are worked on.

    Returns:
        Distances >= 0, on the device of the queries.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, features in half precision.
        ValueError: unlike feature or map sizes, no pair classifier, t outside [0, 1), shortlist
            below 1, features, maps or a pair classifier that are not finite.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> attention_distmat(model, images[:1], images).shape
        torch.Size([1, 3])
    """
    check_share("row_threshold", row_threshold)
    pairs = Pairs(model, query, gallery, compute)
    if shortlist is not None:
        check_count("shortlist", shortlist)
    if not len(query) or not len(gallery):
        return query.features.new_empty(len(query), len(gallery))

    align = partial(align_profiles, row_threshold=row_threshold, unit=unit)

    def of_tile(tile: Tile) -> Tensor:
        return check_finite("attention distances", tile.distances(align))

    with pairs.working():
        if shortlist is not None:
            listed = nearest(pairs, shortlist, unit=unit)
            own = compare(
                pairs, *listed, row_threshold=row_threshold, unit=unit, desc="Comparing attention"
            )
            device = query.features.device
            rows, columns, _, attention = (each.to(device) for each in pairs.join(*own))
            greatest = 2**0.5 if unit else query.maps.shape[2] ** 0.5
            distmat = query.features.new_full(pairs.shape, greatest)
            distmat[rows, columns] = attention
            return distmat
        alpha = pairs.one_indicator()
        if alpha is None:
            return pairs.matrix(of_tile, "Comparing attention")
        mode = "donot_use_mm_for_euclid_dist"
        distmat = torch.cdist(*pairs.profiles(alpha, align), compute_mode=mode)
        distmat = distmat.to(query.features.device)
        return check_finite("attention distances", distmat)


def pair_attention(
    model: nn.Module, first: Encoding, second: Encoding
) -> tuple[Float[Tensor, "pairs height width"], Float[Tensor, "pairs height width"]]:
    """Returns the attention maps M1 and M2 of pairs: row i of both encodings (Section 3.2.2).

    The maps are >= 0 and unscaled. With a :class:`~casn_plugin.Similarity`, they are what
    :func:`~casn_plugin.attention.similarity_attention` gives.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        first: the first images (queries), as ``model.encode`` gives them.
        second: the second images, as many.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike numbers of images, feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> pair_attention(model, images, images)[0].shape
        torch.Size([3, 6, 2])
    """
    check_alike(first, second)
    pair_classifier = pair_classifier_of(model)
    if len(first) != len(second):
        raise ValueError(
            f"expected as many first as second images, got {len(first)}, {len(second)}"
        )
    device = device_of(model, first.features)
    with undisturbed(pair_classifier, device):
        first, second = first.to(device), second.to(device)
        arithmetic = Arithmetic(device, first.features.dtype)
        dim, size = first.features.shape[1], first.maps.shape[2:]
        form = pair_form(
            pair_classifier, arithmetic, dim=dim, parts=first.parts, differentiate=True
        )
        keys = form.keys(first.features, is_query=True), form.keys(second.features, is_query=False)
        directions = form.directions(*keys).of_listed(*keys)
        maps = []
        for images, key, each in zip((first, second), keys, directions, strict=True):
            side, scratch = Side.of(images, key, arithmetic), Scratch(arithmetic)
            found = side.attention(each.singly(), scratch)[..., 0].relu_()
            maps.append((found * form.steepness(images.features)[:, None]).unflatten(1, size))
        return maps[0], maps[1]


def same_identity_logits(
    model: nn.Module, query: Encoding, gallery: Encodings, *, compute: Compute | None = None
) -> Float[Tensor, "queries galleries"]:
    """Returns z1 − z0 of every pair: above 0 where the pair classifier says "same identity".

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, features in half precision, or a
            Similarity, of which :func:`pair_scores` are the cosines.
        ValueError: unlike feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> same_identity_logits(model, images, images).shape
        torch.Size([3, 3])
    """
    if isinstance(pair_classifier_of(model), Similarity):
        raise TypeError("a Similarity gives no logits: pair_scores are the cosines of all pairs")
    return pair_scores(model, query, gallery, compute=compute)


def pair_scores(
    model: nn.Module, query: Encoding, gallery: Encodings, *, compute: Compute | None = None
) -> Float[Tensor, "queries galleries"]:
    """Returns how much speaks for "same" in every pair: z1 − z0, or the cosine of a Similarity.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = Similarity()
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> pair_scores(model, images, images).diagonal()
        tensor([1.0000, 1.0000, 1.0000])
    """
    pairs = Pairs(model, query, gallery, compute)
    with pairs.working():
        return pairs.matrix(Tile.logits, "Classifying pairs")


def indicator_flips(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    compute: Compute | None = None,
) -> tuple[int, int]:
    """Returns how many values of α (Eq. 4) rounding has flipped, and how many there are.

    α is compared with that of the same features and pair classifier in float64, over all pairs.
    It flips where a gradient ∂z1/∂f⁻ or a hidden unit is within rounding of zero.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike feature or map sizes, no pair classifier, or a Similarity, which has
            no α.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> indicator_flips(model, images, images)
        (0, 36)
    """
    pairs = Pairs(model, query, gallery, compute)
    with pairs.working():
        exact = pair_form(
            copy.deepcopy(pair_classifier_of(model)).double(),
            Arithmetic(pairs.device, torch.float64),
            dim=query.features.shape[1],
            parts=query.parts,
            differentiate=True,
        )

        def flips(tile: Tile) -> Tensor:
            first, second = tile.first.features.double(), tile.second.features.double()
            truth = exact.indicators(first, second)
            counts = [  # query by query: a backward pass takes many times the bytes of α
                (alpha != truth(mine, second)).sum(1)
                for alpha, mine in zip(tile.alpha(), first[:, None], strict=True)
            ]
            return torch.stack(counts).to(first.dtype)

        counts = pairs.matrix(flips, "Counting flips")
    return int(counts.sum(dtype=torch.float64)), counts.numel() * query.features.shape[1]
