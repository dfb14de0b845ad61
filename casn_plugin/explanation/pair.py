"""One pair explained: what the model says of two images, and where it looked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD, attention_distance, scale_maps
from casn_plugin.doors import check_share
from casn_plugin.evidence import Evidence, evidence_of, probabilities
from casn_plugin.explanation.figures import Drawn, plot_pair
from casn_plugin.explanation.pictures import AttendedImage
from casn_plugin.loading import encode_images
from casn_plugin.model import CASN, as_casn
from casn_plugin.preprocessing import Image
from casn_plugin.ranking import pair_attention, pair_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

"""Pictures of the model's own size, normalised as ImageNet's are."""


@dataclass(frozen=True, eq=False, repr=False)
class PairExplanation(Drawn):
    """Why a pair counts as same, different or similar, as :func:`explain_pair` finds it.

    Attributes:
        first: the first image, and where the model looked in it: Siamese attention M1, scaled to
            [0, 1], and all that Eq. 5 makes of it.
        second: the second image and M2, likewise.
        evidence: what attention is evidence of, a pair classifier or the similarity.
        probability: softmax probability of z1, "same identity", in [0, 1]; None of a similarity.
        feature_distance: l2 distance of the unit-length features, in [0, 2].
        same: whether both show one identity; None where that is not known.
    """

    first: AttendedImage
    second: AttendedImage
    evidence: Evidence
    probability: float | None
    feature_distance: float
    same: bool | None = None

    @property
    def row_threshold(self) -> float:
        """t, the share of a map's maximum above which a row of either image counts as attended."""
        return self.first.row_threshold

    @property
    def attention_distance(self) -> float:
        """‖M*_m1 − M*_m2‖₂ (paper, Eq. 5), 0 where both were looked at alike, at most √H."""
        profiles = self.first.profile, self.second.profile
        return float(attention_distance(*profiles, row_threshold=self.row_threshold))

    @property
    def similarity(self) -> float:
        """The cosine of both features, in [-1, 1]."""
        return 1 - self.feature_distance**2 / 2

    @property
    def in_short(self) -> str:
        """The probability of "same", or the similarity, in two words."""
        if self.probability is None:
            return f"similarity: {self.similarity:.2f}"
        return f"same: {self.probability:.0%}"

    def headline(self) -> str:
        """Returns what the model says of the pair, and whether that is right where it is known."""
        truth = {True: "it is one person", False: "it is two persons", None: ""}[self.same]
        if self.probability is None:
            headline = f"The features are alike by {self.similarity:.2f} of at most 1"
            return f"{headline} — {truth}" if truth else headline
        says = "the same person" if self.probability >= 0.5 else "different persons"
        chance = max(self.probability, 1 - self.probability)
        headline = f"The model says: {says} ({chance:.0%})"
        right = self.same == (self.probability >= 0.5)
        return f"{headline} — {'right' if right else 'wrong'}, {truth}" if truth else headline

    def plot(self) -> "Figure":
        """Returns a figure that a reader understands without the paper."""
        return plot_pair(
            self.first,
            self.second,
            headline=self.headline(),
            details=f"Features differ by {self.feature_distance:.2f} of at most 2, attention by "
            f"{self.attention_distance:.2f} (0: the same rows in both).",
            evidence=self.evidence,
        )

    def describe(self) -> str:
        """Returns what the model says of the pair and where it looked, in words."""
        chance = (
            f"Cosine similarity {self.similarity:.2f}"
            if self.probability is None
            else f"Same identity with probability {self.probability:.2f}"
        )
        return (
            f"{self.headline()}. {chance}. Evidence: {self.evidence}. Attention "
            f"on {self.first.describe()} in the first picture and {self.second.describe()} in the "
            f"second picture. Feature distance {self.feature_distance:.2f}, attention distance "
            f"{self.attention_distance:.2f}."
        )

    def __repr__(self) -> str:
        """Returns the figures of the pair on a line."""
        says = "None" if self.probability is None else f"{self.probability:.3f}"
        return (
            f"PairExplanation(probability={says}, evidence={self.evidence.name}, "
            f"feature_distance={self.feature_distance:.3f}, "
            f"attention_distance={self.attention_distance:.3f}, same={self.same})"
        )


def explain_pair(
    model: nn.Module,
    first: Image,
    second: Image,
    *,
    same: bool | None = None,
    row_threshold: float = ROW_THRESHOLD,
) -> PairExplanation:
    """Returns why the model takes two images for the same or for different persons.

    The model runs in eval mode and is left as found. The first image is the query: f⁻ = f1 − f2.
    A CASN with a :class:`~casn_plugin.Similarity` is asked why it finds them alike.

    Args:
        model: a CASN, or one in nn.DataParallel.
        first: a normalised (3, rows, columns) tensor as the model takes it, a PIL image, or the
            path of a picture; the model's `preprocessing` prepares the latter two.
        second: likewise.
        same: whether both show one identity, where it is known.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.

    Raises:
        TypeError: a model that is no CASN or in half precision, an image of none of these kinds.
        ValueError: a tensor of another shape, images of unlike sizes, t outside [0, 1), features
            that are not finite.
        OSError: a path that is no picture.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8))
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> found = explain_pair(model, *torch.rand(2, 3, 64, 32))
        >>> found.first.attention.shape, 0 <= found.probability <= 1
        (torch.Size([8, 4]), True)
    """
    casn = as_casn(model)
    check_share("row_threshold", row_threshold)
    imgs = [casn.preprocessing.load(image) for image in (first, second)]
    if imgs[0].shape != imgs[1].shape:
        raise ValueError(
            f"both images must be of one size, got {tuple(imgs[0].shape)} and "
            f"{tuple(imgs[1].shape)}: bring them to one, or give pictures and a size"
        )
    return explain_pairs(casn, imgs[0], imgs[1:], [same], row_threshold)[0]


def explain_pairs(
    model: CASN,
    query: Tensor,
    gallery: Sequence[Tensor],
    same: Sequence[bool | None],
    row_threshold: float,
) -> list[PairExplanation]:
    """Returns the pairs of one query with some gallery images, explained.

    Args:
        model: the CASN.
        query: a normalised (3, rows, columns) image.
        gallery: such images of its size, or none.
        same: whether each of them shows the query's identity; None where that is not known.
        row_threshold: t.

    Raises:
        TypeError: a model in half precision.
        ValueError: features that are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8))
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> query, *gallery = torch.rand(3, 3, 64, 32)
        >>> pairs = explain_pairs(model, query, gallery, [True, None], 0.2)
        >>> [pair.same for pair in pairs]
        [True, None]
    """
    if not gallery:
        return []
    imgs = torch.stack([each.detach().cpu() for each in (query, *gallery)])
    pictures = model.preprocessing.pictures(imgs)
    encoding = encode_images(model, imgs)
    second = encoding[1:]
    repeated = encoding[torch.zeros(len(second), dtype=torch.long)]
    first_maps, second_maps = (scale_maps(m.cpu()) for m in pair_attention(model, repeated, second))
    scores = pair_scores(model, encoding[:1], second)[0].cpu()
    chances = probabilities(model.pair_classifier, scores)
    evidence = evidence_of(model.pair_classifier)
    unit = F.normalize(encoding.features)
    distances = (unit[:1] - unit[1:]).norm(dim=1)
    return [
        PairExplanation(
            AttendedImage(pictures[0], first_maps[i], row_threshold),
            AttendedImage(pictures[1 + i], second_maps[i], row_threshold),
            evidence=evidence,
            probability=chances[i],
            feature_distance=float(distances[i]),
            same=same[i],
        )
        for i in range(len(second))
    ]
