"""Whether attention marks what decides: scores while the most attended pixels go, or come."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin.doors import check_count, check_images, check_lengths, check_seed, check_tensor
from casn_plugin.evidence import Similarity
from casn_plugin.hooks import evaluating, place_of
from casn_plugin.imputation import Fill, without_pixels
from casn_plugin.model import CASN, as_casn

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of the pixels that are removed, or shown; symmetric, so that the gap of chance is 0."""

Side = Literal["query", "gallery", "both"]
"""In which picture of a pair pixels are removed."""


@dataclass(frozen=True)
class FaithfulnessCurves:
    """How scores follow the pixels, the most attended first.

    Attributes:
        shares: of the pixels, from 0 to 1.
        deletion: scores where so many of the most attended pixels are removed: a faithful map
            lets them fall early.
        insertion: scores where only so many of the most attended pixels are shown: a faithful map
            lets them rise early.
    """

    shares: Float[Tensor, " shares"]
    deletion: Float[Tensor, "images shares"]
    insertion: Float[Tensor, "images shares"]

    @property
    def deletion_area(self) -> Float[Tensor, " images"]:
        """Area under the deletion curve, in units of the score; small is faithful."""
        return torch.trapezoid(self.deletion, self.shares)

    @property
    def insertion_area(self) -> Float[Tensor, " images"]:
        """Area under the insertion curve, in units of the score; large is faithful."""
        return torch.trapezoid(self.insertion, self.shares)

    @property
    def gap(self) -> Float[Tensor, " images"]:
        """Insertion less deletion area: 0 is expected of chance, and below 0 the map misleads.

        Of shares that are symmetric about a half: deletion read backwards is then chance's
        insertion, point by point.
        """
        return self.insertion_area - self.deletion_area


class PairFaithfulness(NamedTuple):
    """Curves of pairs, as :func:`pair_faithfulness` finds them: "query", "gallery" and "both".

    Attributes:
        evidence: of z1 − z0 of the pair classifier, or of the cosine of a similarity.
        closeness: of −‖f1 − f2‖₂ of unit-length features, in [−2, 0].
    """

    evidence: dict[Side, FaithfulnessCurves]
    closeness: dict[Side, FaithfulnessCurves]


def pixel_ranks(
    maps: Float[Tensor, "images height width"], size: tuple[int, int], *, seed: int = 0
) -> Int64[Tensor, "images rows columns"]:
    """Returns the place of every pixel in the order of attention, the most attended 0.

    Maps are resized to the image (bilinear, half-pixel centres); which of equally attended pixels
    comes first is drawn at random, so that a blank map is chance.

    Args:
        maps: of any resolution; only the order of their values counts.
        size: (rows, columns) of the images.
        seed: of what is drawn.

    Raises:
        TypeError: maps that are no float tensor, a seed that is no integer.
        ValueError: maps of another shape, or a negative seed.

    Example:
        >>> pixel_ranks(torch.tensor([[[0.1, 0.9]]]), (1, 2))
        tensor([[[1, 0]]])
    """
    check_tensor("maps", maps, "images height width")
    resized = F.interpolate(maps.detach().float()[:, None], size=size, mode="bilinear").flatten(1)
    generator = torch.Generator().manual_seed(check_seed(seed))
    drawn = torch.rand(resized.shape, generator=generator).argsort(1).to(resized.device)
    order = resized.gather(1, drawn).argsort(dim=1, descending=True, stable=True)
    return drawn.gather(1, order).argsort(1).view(-1, *size)


def faithfulness(
    score: Callable[[Tensor], Tensor],
    imgs: Float[Tensor, "images 3 rows columns"],
    maps: Float[Tensor, "images height width"],
    *,
    shares: Sequence[float] = SHARES,
    fill: Fill | Float[Tensor, " 3"] = "neighbours",
    seed: int = 0,
) -> FaithfulnessCurves:
    """Returns how the scores of single images follow the pixels that their maps mark.

    Deletion and insertion (Petsiuk et al., BMVC 2018), by default with the imputation of ROAD,
    which needs no retraining; see :func:`casn_plugin.imputation.without_pixels`.

    Args:
        score: gives of (B, 3, rows, columns) images the (B,) scores that the maps explain.
        imgs: normalised images.
        maps: an attention map of each.
        shares: of the pixels, ascending from 0 to 1.
        fill: what stands where pixels were.
        seed: of the order of equally attended pixels, and of the noise.

    Raises:
        TypeError: images or maps that are no float tensors.
        ValueError: unlike numbers of them, shares that do not ascend from 0 to 1, or scores that
            are not one an image, or not finite.

    Example:
        >>> imgs = torch.zeros(1, 3, 4, 2)
        >>> imgs[:, :, 0] = 1  # the upper row decides
        >>> found = faithfulness(lambda imgs: imgs[:, 0, 0].mean(1), imgs, imgs[:, 0],
        ...                      shares=(0.0, 0.25, 1.0), fill="mean")
        >>> found.deletion, found.insertion, found.gap
        (tensor([[1.0000, 0.2500, 0.2500]]), tensor([[0.2500, 1.0000, 1.0000]]), tensor([0.5625]))
    """
    check_lengths(imgs=check_images(imgs), maps=maps)
    ascending = _ascending(shares)
    variants = _variants(imgs, maps, ascending, fill, seed)
    return _curves(ascending, [_checked(score(each), len(imgs)) for each in variants])


def pair_faithfulness(
    model: nn.Module,
    query: Float[Tensor, "pairs 3 rows columns"],
    gallery: Float[Tensor, "pairs 3 rows columns"],
    query_maps: Float[Tensor, "pairs height width"],
    gallery_maps: Float[Tensor, "pairs height width"],
    *,
    shares: Sequence[float] = SHARES,
    fill: Fill | Float[Tensor, " 3"] = "neighbours",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> PairFaithfulness:
    """Returns how what a model says of pairs follows the pixels that their attention marks.

    As :func:`faithfulness`, with pixels removed from the query, from the gallery picture, and from
    both. Each variant of a picture goes through the network once for all of these.

    Args:
        model: a CASN, or one in nn.DataParallel; it runs in eval mode and is left as found.
        query: normalised images, the first of each pair.
        gallery: the second of each.
        query_maps: attention of the first images, as :func:`casn_plugin.ranking.pair_attention`
            gives it, or what it is to be compared with.
        gallery_maps: attention of the second ones.
        shares: of the pixels, ascending from 0 to 1.
        fill: what stands where pixels were; black is `model.preprocessing.black`.
        seed: of the order of equally attended pixels, and of the noise.
        batch_size: images that go through the network at a time.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: a model that is no CASN; images or maps that are no float tensors.
        ValueError: unlike numbers of them, shares that do not ascend from 0 to 1, a batch_size
            below 1, or scores that are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8))
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> imgs, maps = torch.rand(2, 4, 3, 64, 32), torch.rand(2, 4, 8, 4)
        >>> found = pair_faithfulness(model, *imgs, *maps, shares=(0.0, 0.5, 1.0))
        >>> found.evidence["both"].deletion.shape, found.closeness["query"].gap.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    casn = as_casn(model)
    check_lengths(
        query=check_images(query), gallery=check_images(gallery),
        query_maps=query_maps, gallery_maps=gallery_maps,
    )  # fmt: skip
    check_count("batch_size", batch_size)
    seed = check_seed(seed)
    ascending = _ascending(shares)
    with tqdm(
        total=4 * (len(ascending) - 1), desc="Removing pixels", disable=None if progress else True
    ) as bar:
        features: list[list[Tensor]] = [[], []]
        for number, (imgs, maps) in enumerate(((query, query_maps), (gallery, gallery_maps))):
            for variant in _variants(imgs, maps, ascending, fill, seed + number):
                features[number].append(_features(casn, variant, batch_size))
                bar.update()
    evidence: dict[Side, FaithfulnessCurves] = {}
    closeness: dict[Side, FaithfulnessCurves] = {}
    whole = [0] * len(features[0])  # the first variant is the image as it is
    every = [*range(len(whole))]
    sides: tuple[tuple[Side, list[int], list[int]], ...] = (
        ("query", every, whole), ("gallery", whole, every), ("both", every, every),
    )  # fmt: skip
    for side, firsts, seconds in sides:
        pairs = [(features[0][i], features[1][j]) for i, j in zip(firsts, seconds, strict=True)]
        scores = [_checked(_evidence(casn.pair_classifier, *pair), len(query)) for pair in pairs]
        evidence[side] = _curves(ascending, scores)
        closeness[side] = _curves(ascending, [_checked(_closeness(*p), len(query)) for p in pairs])
    return PairFaithfulness(evidence, closeness)


def centre_prior(number: int, size: tuple[int, int]) -> Float[Tensor, "images height width"]:
    """Returns maps that are highest in the middle, as people stand there: what to compare with.

    A Gaussian whose standard deviation is a quarter of the height, and of the width.

    Example:
        >>> centre_prior(1, (3, 1))[0, :, 0] > 0.5
        tensor([False,  True, False])
    """
    rows, columns = ((torch.arange(n) + 0.5 - n / 2) / (n / 4) for n in size)
    return torch.exp(-(rows[:, None] ** 2 + columns**2) / 2).expand(number, *size).clone()


def _ascending(shares: Sequence[float]) -> Float[Tensor, " shares"]:
    """Returns shares as a tensor; raises ValueError for ones that can't be."""
    found = torch.tensor([float(share) for share in shares])
    if len(found) < 2 or found[0] != 0 or found[-1] != 1 or not bool((found.diff() > 0).all()):
        raise ValueError(f"shares must ascend from 0 to 1, got {tuple(shares)}")
    return found


def _variants(
    imgs: Tensor, maps: Tensor, shares: Tensor, fill: Fill | Tensor, seed: int
) -> Iterator[Tensor]:
    """Yields images with ever fewer of the most attended pixels, then with ever more of them.

    Of these not the first and the last, which have none and all: they are among the others.
    """
    ranks = pixel_ranks(maps, (imgs.shape[2], imgs.shape[3]), seed=seed).to(imgs.device)
    counts = (shares * ranks[0].numel()).round().tolist()
    for count in counts:
        yield without_pixels(imgs, ranks < count, fill=fill, seed=seed)
    for count in counts[1:-1]:
        yield without_pixels(imgs, ranks >= count, fill=fill, seed=seed)


def _curves(shares: Tensor, scores: Sequence[Tensor]) -> FaithfulnessCurves:
    """Returns the curves of what the variants of images score."""
    fewer, more = scores[: len(shares)], scores[len(shares) :]
    insertion = torch.stack([fewer[-1], *more, fewer[0]], 1)
    return FaithfulnessCurves(shares, torch.stack([*fewer], 1), insertion)


def _checked(scores: Tensor, images: int) -> Tensor:
    """Returns scores on the CPU; raises ValueError for ones that can't be."""
    if scores.shape != (images,):
        raise ValueError(f"score must give one number an image, got {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite")
    return scores.detach().float().cpu()


def _features(model: CASN, imgs: Tensor, batch_size: int) -> Tensor:
    """Returns the features of images."""
    with evaluating(model), torch.no_grad():
        batches = (each.to(*place_of(model)) for each in imgs.split(batch_size))
        found = [model.encode(each).features if model.flip else model(each) for each in batches]
    return torch.cat(found)


def _evidence(pair_classifier: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Returns z1 − z0 of pairs, or the cosine of a similarity."""
    with torch.no_grad():
        if isinstance(pair_classifier, Similarity):
            cosines: Tensor = pair_classifier(first, second)
            return cosines
        scores: Tensor = pair_classifier(first - second)
        logits: Tensor = scores[:, 1] - scores[:, 0]
    return logits


def _closeness(first: Tensor, second: Tensor) -> Tensor:
    """Returns minus the distances of unit-length features."""
    distances: Tensor = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).norm(dim=1)
    return -distances
