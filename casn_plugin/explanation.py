"""Why a match: what made the model say same or different, for a pair and for ranked lists."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin.attention import (
    ROW_THRESHOLD,
    align_profiles,
    attended_span,
    attention_distance,
    check_share,
    row_profiles,
    scale_maps,
)
from casn_plugin.evaluation import RankedLists, ranked_lists
from casn_plugin.loading import (
    Encoded,
    Image,
    Preprocessing,
    encode_images,
    encode_loader,
    image_loader,
)
from casn_plugin.model import CASN, as_casn
from casn_plugin.ranking import (
    RankingOptions,
    fused_distmats,
    pair_attention,
    same_identity_logits,
)
from casn_plugin.visualization import (
    pair_mosaic,
    plot_pair,
    plot_ranking,
    png_uri,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


IMAGENET = Preprocessing()
"""Pictures of the model's own size, normalised as ImageNet's are."""


class _Drawn:
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


@dataclass(frozen=True, eq=False, repr=False)
class PairExplanation(_Drawn):
    """Why a pair counts as same or different, as :func:`explain_pair` finds it.

    H and W are the rows and columns of the attention maps.

    Attributes:
        first_picture: the first image as RGB in [0, 1], (rows, columns, 3).
        second_picture: the second image.
        first_attention: (H, W) Siamese attention M1 of the first image, scaled to [0, 1].
        second_attention: (H, W) M2 of the second one.
        probability: softmax probability of z1, "same identity", in [0, 1].
        feature_distance: l2 distance of the unit-length features, in [0, 2].
        row_threshold: t, the value above which a row counts as attended.
        same: whether both show one identity; None where that is not known.
    """

    first_picture: Float[np.ndarray, "rows columns 3"]
    second_picture: Float[np.ndarray, "rows columns 3"]
    first_attention: Float[Tensor, "height width"]
    second_attention: Float[Tensor, "height width"]
    probability: float
    feature_distance: float
    row_threshold: float = ROW_THRESHOLD
    same: bool | None = None

    @property
    def first_profile(self) -> Float[Tensor, " height"]:
        """The row maxima M_m1 of the first image's map."""
        return row_profiles(self.first_attention)

    @property
    def second_profile(self) -> Float[Tensor, " height"]:
        """The row maxima M_m2 of the second image's map."""
        return row_profiles(self.second_attention)

    @property
    def first_span(self) -> tuple[int, int]:
        """The first and the last attended row of the first map."""
        first, last = attended_span(self.first_profile, self.row_threshold)
        return int(first), int(last)

    @property
    def second_span(self) -> tuple[int, int]:
        """The first and the last attended row of the second map."""
        first, last = attended_span(self.second_profile, self.row_threshold)
        return int(first), int(last)

    @property
    def first_aligned(self) -> Float[Tensor, " height"]:
        """M*_m1: the attended rows of the first image, stretched to the map's height."""
        return align_profiles(self.first_profile, self.row_threshold)

    @property
    def second_aligned(self) -> Float[Tensor, " height"]:
        """M*_m2: the attended rows of the second image, stretched to the map's height."""
        return align_profiles(self.second_profile, self.row_threshold)

    @property
    def attention_distance(self) -> float:
        """‖M*_m1 − M*_m2‖₂ (paper, Eq. 5): 0 where both were looked at alike, at most √H."""
        profiles = self.first_profile, self.second_profile
        return float(attention_distance(*profiles, row_threshold=self.row_threshold))

    def headline(self) -> str:
        """Returns what the model says of the pair, and whether that is right where it is known."""
        says = "the same person" if self.probability >= 0.5 else "different persons"
        chance = max(self.probability, 1 - self.probability)
        headline = f"The model says: {says} ({chance:.0%})"
        if self.same is not None:
            right = self.same == (self.probability >= 0.5)
            truth = "one person" if self.same else "two persons"
            headline += f" — {'right' if right else 'wrong'}, it is {truth}"
        return headline

    def plot(self) -> "Figure":
        """Returns a figure that a reader understands without the paper."""
        return plot_pair(
            self.first_picture,
            self.second_picture,
            self.first_attention,
            self.second_attention,
            headline=self.headline(),
            details=f"Features differ by {self.feature_distance:.2f} of at most 2, attention by "
            f"{self.attention_distance:.2f} (0: the same rows in both).",
            row_threshold=self.row_threshold,
        )

    def describe(self) -> str:
        """Returns what the model says of the pair and where it looked, in words."""
        rows = [
            f"{f'rows {first + 1} to {last + 1}' if attention.any() else 'none'} of "
            f"{len(attention)} in the {name} picture"
            for name, attention, (first, last) in (
                ("first", self.first_attention, self.first_span),
                ("second", self.second_attention, self.second_span),
            )
        ]
        return (
            f"{self.headline()}. Same identity with probability {self.probability:.2f}. Attention "
            f"on {rows[0]} and {rows[1]}. Feature distance {self.feature_distance:.2f}, attention "
            f"distance {self.attention_distance:.2f}."
        )

    def __repr__(self) -> str:
        """Returns the figures of the pair on a line."""
        return (
            f"PairExplanation(probability={self.probability:.3f}, "
            f"feature_distance={self.feature_distance:.3f}, "
            f"attention_distance={self.attention_distance:.3f}, same={self.same})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Match:
    """One gallery image in a ranked list.

    Attributes:
        pair: the query and this image, explained.
        row: the image's row in the gallery.
        pid: its identity.
        camid: its camera.
        rank: where it stands in the fused ranking, from 1.
        feature_rank: where it stands by features alone, from 1.
    """

    pair: PairExplanation
    row: int
    pid: int
    camid: int
    rank: int
    feature_rank: int

    @property
    def right(self) -> bool:
        """Whether it shows the query's identity."""
        return bool(self.pair.same)

    def __repr__(self) -> str:
        """Returns identity and ranks on a line."""
        return (
            f"Match(pid={self.pid}, camid={self.camid}, right={self.right}, rank={self.rank}, "
            f"feature_rank={self.feature_rank})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class RankingExplanation(_Drawn):
    """A query and its ranked list, as :func:`explain_ranking` finds it.

    Attributes:
        query: the query's row.
        picture: its picture as RGB in [0, 1].
        pid: its identity.
        camid: its camera.
        ap: average precision of its fused ranking in (0, 1]; NaN without a match.
        matches: the nearest gallery images, in order.
        truth: the right image that stands first, where it is none of `matches`; else None.
    """

    query: int
    picture: Float[np.ndarray, "rows columns 3"]
    pid: int
    camid: int
    ap: float
    matches: tuple[Match, ...]
    truth: Match | None

    @property
    def found(self) -> Match | None:
        """The right image that stands first; None where there is none."""
        return next((match for match in self._shown() if match.right), None)

    @property
    def failed(self) -> bool:
        """Whether another identity stands at rank 1, although there is a right image."""
        return self.found is not None and self.found.rank > 1

    def headline(self) -> str:
        """Returns who was searched for and how it went, in a sentence."""
        found = self.found
        outcome = (
            "nobody to be found" if found is None else f"found at rank {found.rank}"
            if found.rank == 1 else f"wrong at rank 1, found at rank {found.rank}"
        )  # fmt: skip
        return f"Person {self.pid} of camera {self.camid}: {outcome}"

    def plot(self) -> "Figure":
        """Returns a figure of the query, its matches and the attention of each pair."""
        shown = self._shown()
        captions = [
            f"rank {match.rank}\n(features: {match.feature_rank})\n"
            f"same: {match.pair.probability:.0%}"
            for match in shown
        ]
        none = [torch.zeros(0, 1, 1)]  # all of the gallery is junk
        return plot_ranking(
            self.picture,
            np.array([m.pair.second_picture for m in shown]).reshape(-1, *self.picture.shape),
            torch.cat([m.pair.first_attention[None] for m in shown] or none),
            torch.cat([m.pair.second_attention[None] for m in shown] or none),
            [match.right for match in shown],
            captions,
            headline=self.headline(),
            apart=0 if self.truth is None else 1,
        )

    def describe(self) -> str:
        """Returns the ranked list in words."""
        words = [
            f"rank {match.rank} (by features {match.feature_rank}): {verdict(match.right)[2:]}"
            for match in self._shown()
        ]
        return f"{self.headline()}. {'; '.join(words) or 'Nothing to compare with'}."

    def _shown(self) -> list[Match]:
        """Returns the matches and the truth that stands apart."""
        return [*self.matches, *([] if self.truth is None else [self.truth])]

    def __repr__(self) -> str:
        """Returns who was searched for and how it went."""
        return f"RankingExplanation({self.headline()!r}, ap={self.ap:.3f})"


class ExplainedRankings(Sequence[RankingExplanation]):
    """All queries of a data set, ranked; each explained when it is asked for.

    ``explained[i]`` encodes query i and its nearest images anew, so it takes milliseconds, and
    nothing but the lists is kept.

    Args:
        model: the CASN.
        query: the queries: a data set whose items are dictionaries with "img" (normalised),
            "pid" and "camid".
        gallery: the gallery, likewise.
        ranked: their ranked lists.
        topk: matches to explain for each query.
        preprocessing: how the images were normalised.
        row_threshold: t.

    Raises:
        TypeError: a model that is no CASN.
        ValueError: topk below 1, or lists of another number of queries or a longer gallery.

    Attributes:
        ranked: :class:`~casn_plugin.evaluation.RankedLists`; `failures`, `best` and `worst` of
            it pick queries.
        row_threshold: t.
    """

    def __init__(
        self,
        model: nn.Module,
        query: Any,
        gallery: Any,
        ranked: RankedLists,
        *,
        topk: int = 5,
        preprocessing: Preprocessing = IMAGENET,
        row_threshold: float = ROW_THRESHOLD,
    ) -> None:
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        if len(ranked) != len(query):
            raise ValueError(f"got ranked lists of {len(ranked)} queries for {len(query)} queries")
        if ranked.nearest.max(initial=-1) >= len(gallery):
            raise ValueError(f"got ranked lists of a gallery longer than {len(gallery)} images")
        self.model = as_casn(model)
        self.ranked = ranked
        self.topk = topk
        self._data = query, gallery
        self._preprocessing = preprocessing
        self.row_threshold = row_threshold

    def __len__(self) -> int:
        """Returns the number of queries."""
        return len(self.ranked)

    def __getitem__(self, query: Any) -> Any:
        """Returns the :class:`RankingExplanation` of a query (or several, of a slice)."""
        if isinstance(query, slice):
            return [self[row] for row in range(*query.indices(len(self)))]
        row = range(len(self))[query]
        ranked = self.ranked
        columns = np.flatnonzero(ranked.nearest[row, : self.topk] >= 0).tolist()
        shown = [
            (int(ranked.nearest[row, i]), i + 1, int(ranked.feature_ranks[row, i])) for i in columns
        ]
        truth = int(ranked.truth[row])
        if truth >= 0 and not ranked.right[row, columns].any():
            shown.append((truth, int(ranked.truth_rank[row]), int(ranked.truth_feature_rank[row])))
        item = self._data[0][row]
        items = [self._data[1][match] for match, _, _ in shown]
        pid = int(item["pid"])
        same = [int(each["pid"]) == pid for each in items]
        pairs = _explain(
            self.model,
            item["img"],
            [each["img"] for each in items],
            same,
            self._preprocessing,
            self.row_threshold,
        )
        matches = [
            Match(pair, match, int(each["pid"]), int(each["camid"]), *ranks)
            for pair, each, (match, *ranks) in zip(pairs, items, shown, strict=True)
        ]
        return RankingExplanation(
            query=row,
            picture=self._preprocessing.pictures(item["img"][None])[0],
            pid=pid,
            camid=int(item["camid"]),
            ap=float(ranked.ap[row]),
            matches=tuple(matches[: len(columns)]),
            truth=matches[-1] if len(matches) > len(columns) else None,
        )

    def failures(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries that are wrong at rank 1, the worst first."""
        return (self[row] for row in self.ranked.failures(number))

    def worst(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries with the lowest average precision, the lowest first."""
        return (self[row] for row in self.ranked.worst(number))

    def best(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries with the highest average precision, the highest first."""
        return (self[row] for row in self.ranked.best(number))


def explain_pair(
    model: nn.Module,
    first: Image,
    second: Image,
    *,
    same: bool | None = None,
    preprocessing: Preprocessing = IMAGENET,
    row_threshold: float = ROW_THRESHOLD,
) -> PairExplanation:
    """Returns why the model takes two images for the same or for different persons.

    The model runs in eval mode and is left as found. The first image is the query: f⁻ = f1 − f2.

    Args:
        model: a CASN, or one in nn.DataParallel.
        first: a normalised (3, rows, columns) tensor as the model takes it, a PIL image, or the
            path of a picture.
        second: likewise.
        same: whether both show one identity, where it is known.
        preprocessing: size that pictures and paths are brought to, by default the model's
            `input_size`; and what they are normalised with, and tensors were.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.

    Raises:
        TypeError: a model that is no CASN or in half precision, an image of none of these kinds.
        ValueError: a tensor of another shape, images of unlike sizes, t outside [0, 1), features
            that are not finite.
        OSError: a path that is no picture.

    Example:
        >>> class Backbone(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.features, self.fc = nn.Conv2d(3, 8, 3, 8), nn.Linear(8, 10)
        >>> def forward(backbone, imgs):
        ...     features = backbone.features(imgs).mean((2, 3))
        ...     return backbone.fc(features), features
        >>> model = CASN(Backbone(), forward=forward)
        >>> found = explain_pair(model, torch.rand(3, 64, 32), torch.rand(3, 64, 32))
        >>> found.first_attention.shape, 0 <= found.probability <= 1
        (torch.Size([8, 4]), True)
    """
    casn = as_casn(model)
    check_share("row_threshold", row_threshold)
    preprocessing = preprocessing.for_model(casn)
    imgs = [preprocessing.load(image) for image in (first, second)]
    if imgs[0].shape != imgs[1].shape:
        raise ValueError(
            f"both images must be of one size, got {tuple(imgs[0].shape)} and "
            f"{tuple(imgs[1].shape)}: bring them to one, or give pictures and a size"
        )
    return _explain(casn, imgs[0], imgs[1:], [same], preprocessing, row_threshold)[0]


def explain_ranking(
    model: nn.Module,
    query: Any,
    gallery: Any,
    *,
    topk: int = 5,
    preprocessing: Preprocessing = IMAGENET,
    row_threshold: float = ROW_THRESHOLD,
    ranking: RankingOptions | None = None,
) -> ExplainedRankings:
    """Returns the ranked lists of all queries, each explained when it is asked for.

    Ranked by the fused distance of :func:`casn_plugin.ranking.fused_distmats`. Junk (gallery
    images of the query's own identity and camera) is left out.

    Args:
        model: a CASN, or one in nn.DataParallel.
        query: the queries: one of torchreid's test loaders, whose data set is gone through in its
            own order; or a sequence of (image, pid, camid), as a torchreid data set's `query` and
            `gallery` lists have them. Images may be all that :func:`explain_pair` takes.
        gallery: the gallery, likewise.
        topk: matches to explain for each query.
        preprocessing: as in :func:`explain_pair`.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        ranking: how distances of features and of attention become one ranking; its `gallery_dir`
            is not used.

    Raises:
        TypeError: a model that is no CASN or in half precision, or data of another form.
        ValueError: no queries, an empty gallery, no query with a match, topk below 1; and as
            :func:`explain_pair`.

    Example:
        >>> class Backbone(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.features, self.fc = nn.Conv2d(3, 8, 3, 8), nn.Linear(8, 10)
        >>> def forward(backbone, imgs):
        ...     features = backbone.features(imgs).mean((2, 3))
        ...     return backbone.fc(features), features
        >>> model = CASN(Backbone(), forward=forward)
        >>> imgs = torch.rand(3, 3, 64, 32)
        >>> explained = explain_ranking(
        ...     model, [(imgs[0], 7, 0)], [(imgs[1], 8, 1), (imgs[2], 7, 1)], topk=2)
        >>> sorted(match.pid for match in explained[0].matches)
        [7, 8]
    """
    casn = as_casn(model)
    check_share("row_threshold", row_threshold)
    ranking = RankingOptions() if ranking is None else ranking
    preprocessing = preprocessing.for_model(casn)
    query = image_loader("query", query, preprocessing)
    gallery = image_loader("gallery", gallery, preprocessing)

    def encoded(loader: Any, name: str) -> Encoded:
        hidden = None if ranking.compute.progress else True
        return encode_loader(casn, tqdm(loader, name, leave=False, disable=hidden))

    first, second = encoded(query, "Encoding query"), encoded(gallery, "Encoding gallery")
    features, _, fused = fused_distmats(
        casn,
        first.encoding,
        second.encoding,
        row_threshold=row_threshold,
        options=ranking,
        feature_distances=_exact_distances,
    )
    ids = first.pids, second.pids, first.camids, second.camids
    ranked = ranked_lists(features, fused, *ids, topk=topk)
    return ExplainedRankings(
        casn,
        query.dataset,
        gallery.dataset,
        ranked,
        topk=topk,
        preprocessing=preprocessing,
        row_threshold=row_threshold,
    )


class FixedPairs:
    """Some pairs of a query and a gallery image, the same ones whenever they are looked at.

    In turn a pair of one identity, seen by two cameras, and a pair of two identities; of the
    other kind where there is none.

    Args:
        query: the queries: a data set of dictionaries with "img" and "pid", as torchreid's are,
            that lists (path, pid, camid, ...) of all its images as `data`.
        gallery: the gallery, likewise.
        number: pairs to look at; queries repeat where there are fewer.
    """

    def __init__(self, query: Any, gallery: Any, number: int) -> None:
        pairs = _fixed_pairs(query.data, gallery.data, number)
        items = [(query[i], gallery[j]) for i, j in pairs]
        self.first = torch.stack([first["img"] for first, _ in items])
        self.second = torch.stack([second["img"] for _, second in items])
        self.same = [bool(first["pid"] == second["pid"]) for first, second in items]

    def mosaic(self, model: CASN, preprocessing: Preprocessing) -> np.ndarray:
        """Returns one RGB picture of all pairs and their attention, as the model is now."""
        maps = pair_attention(
            model, encode_images(model, self.first), encode_images(model, self.second)
        )
        pictures = preprocessing.pictures(self.first), preprocessing.pictures(self.second)
        return pair_mosaic(*pictures, *maps, self.same)


def _fixed_pairs(
    query: Sequence[Any], gallery: Sequence[Any], number: int
) -> list[tuple[int, int]]:
    """Returns rows of query and gallery, the same at every call.

    In turn a pair of one identity, seen by two cameras, and a pair of two identities; of the
    other kind where there is none.

    Args:
        query: tuples of (path, pid, camid, ...).
        gallery: likewise.
        number: pairs to return; queries repeat where there are fewer.
    """
    rng = np.random.default_rng(0)
    pids = np.array([row[1] for row in gallery])
    camids = np.array([row[2] for row in gallery])
    one_each = {row[1]: i for i, row in enumerate(query)}
    queries = rng.permutation(list(one_each.values())).tolist()
    pairs = []
    for i in range(number):
        row = queries[i % len(queries)]
        pid, camid = query[row][1:3]
        same = np.flatnonzero((pids == pid) & (camids != camid))
        different = np.flatnonzero(pids != pid)
        wanted, other = (different, same) if i % 2 else (same, different)
        rows = wanted if len(wanted) else other if len(other) else np.arange(len(pids))
        pairs.append((row, int(rng.choice(rows))))
    return pairs


def _exact_distances(qf: Tensor, gf: Tensor) -> Tensor:
    """Returns l2 distances of features, computed in float64."""
    return torch.cdist(qf.double(), gf.double()).to(qf.dtype)


def _explain(
    model: CASN,
    query: Tensor,
    gallery: Sequence[Tensor],
    same: Sequence[bool | None],
    preprocessing: Preprocessing,
    row_threshold: float,
) -> list[PairExplanation]:
    """Returns the pairs of one query with some gallery images, explained."""
    if not gallery:
        return []
    imgs = torch.stack([each.detach().cpu() for each in (query, *gallery)])
    pictures = preprocessing.pictures(imgs)
    encoding = encode_images(model, imgs)
    second = encoding[1:]
    repeated = encoding[torch.zeros(len(second), dtype=torch.long)]
    first_maps, second_maps = (scale_maps(m.cpu()) for m in pair_attention(model, repeated, second))
    scores = same_identity_logits(model, encoding[:1], second)[0].cpu()
    unit = F.normalize(encoding.features)
    distances = (unit[:1] - unit[1:]).norm(dim=1)
    return [
        PairExplanation(
            pictures[0],
            pictures[1 + i],
            first_maps[i],
            second_maps[i],
            probability=float(scores[i].sigmoid()),
            feature_distance=float(distances[i]),
            row_threshold=row_threshold,
            same=same[i],
        )
        for i in range(len(second))
    ]
