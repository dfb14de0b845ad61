"""What says "same" in closed form: directions of attention, and scores, of any pairs of images.

Of a two-layer ReLU classifier, z = W2 ReLU(W1 (f1 − f2) + b1) + b2, an image is W1 f (+ b1 for
queries), its *key*: a hidden unit is open where the key of the query is greater. Any other
classifier is differentiated, and a key is the features themselves. Of the similarity, a key is the
features at unit length. Tensors in, tensors out.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor, nn

from casn_plugin.attention import indicator
from casn_plugin.evidence import Similarity, check_pair_classifier
from casn_plugin.hooks import place_of
from casn_plugin.ranking.compute import Arithmetic

Indicators = Callable[[Tensor, Tensor], Tensor]
"""Maps keys of queries and of gallery images, (..., K) each, to α of their pairs, (..., D).

α is False or True, a byte each, so that many pairs fit; the channels of a part stand together. It
lies in memory that the next call reuses.
"""


class Direction(NamedTuple):
    """Where evidence grows in the features of one image of each pair: `along` − `less` · its key.

    The map of the image is linear in it. Only a :class:`Similarity` takes away or knows no way.

    Attributes:
        along: (images, others, D), or (pairs, D) of listed pairs; (1, others, D) where it is the
            same for all images. Numbers, or α, which is False or True.
        less: (images, others), or (pairs,); None takes nothing away.
        nowhere: of the same shape, where there is no such direction: maps are blank. None: none.
    """

    along: Tensor
    less: Tensor | None = None
    nowhere: Tensor | None = None

    def pick(self, rows: Tensor) -> "Direction":
        """Returns those of some of the images or pairs."""
        return self._map(lambda values: values.index_select(0, rows))

    def portion(self, rows: slice) -> "Direction":
        """Returns those of some of the images, which may have the same one."""
        return self._map(lambda values: values if len(values) == 1 else values[rows])

    def singly(self) -> "Direction":
        """Returns those of listed pairs as those of images, each with one other."""
        return self._map(lambda values: values[:, None])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Direction":
        less, nowhere = (
            None if each is None else function(each) for each in (self.less, self.nowhere)
        )
        return Direction(function(self.along), less, nowhere)


@runtime_checkable
class Directions(Protocol):
    """The directions of pairs of some queries and gallery images, for the one and for the other.

    They lie in memory that the next call reuses.
    """

    def of_all(
        self, first: Float[Tensor, "queries keys"], second: Float[Tensor, "galleries keys"]
    ) -> tuple[Direction, Direction]:
        """Returns those of all pairs, (queries, galleries, ...) and (galleries, queries, ...)."""

    def of_listed(
        self, first: Float[Tensor, "pairs keys"], second: Float[Tensor, "pairs keys"]
    ) -> tuple[Direction, Direction]:
        """Returns those of listed pairs, (pairs, ...) each."""


class _ByIndicator:
    """Of a pair classifier: α, one for both images of a pair."""

    def __init__(self, indicators: Indicators) -> None:
        self._indicators = indicators

    def of_all(self, first: Tensor, second: Tensor) -> tuple[Direction, Direction]:
        alpha = self._indicators(first[:, None], second[None])
        return Direction(alpha), Direction(alpha.transpose(0, 1))

    def of_listed(self, first: Tensor, second: Tensor) -> tuple[Direction, Direction]:
        alpha = Direction(self._indicators(first, second))
        return alpha, alpha


class _ByCosine:
    """Of the similarity s of unit-length u1 and u2: ∂s/∂f1 = (u2 − s u1) / ‖f1‖, so u2 less s u1.

    u2 is the same whatever it is paired with: no α of each pair is made. Where s is within
    rounding of 1 or −1, as of a picture and itself, the gradient is zero, and what is left of it
    is noise.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._operand = arithmetic.operand

    def of_all(self, first: Tensor, second: Tensor) -> tuple[Direction, Direction]:
        less, nowhere = self._less(first @ second.T)
        one, two = self._operand(first)[None], self._operand(second)[None]
        return (
            Direction(two, less, nowhere),
            Direction(one, less.T, None if nowhere is None else nowhere.T),
        )

    def of_listed(self, first: Tensor, second: Tensor) -> tuple[Direction, Direction]:
        taken = self._less((first * second).sum(1))
        return Direction(self._operand(second), *taken), Direction(self._operand(first), *taken)

    def _less(self, cosines: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns s, and where the gradient is zero, if anywhere."""
        nowhere = 1 - cosines.square() <= 16 * torch.finfo(cosines.dtype).eps
        return self._operand(cosines), nowhere if nowhere.any() else None


def pair_form(
    pair_classifier: nn.Module,
    arithmetic: Arithmetic,
    *,
    dim: int,
    parts: int = 0,
    differentiate: bool = False,
) -> "PairForm":
    """Returns a pair classifier in closed form; Linear, ReLU, Linear without a backward pass.

    Args:
        pair_classifier: gives (P, 2) scores, column 1 = same identity; or is a
            :class:`~casn_plugin.Similarity`.
        arithmetic: where and in which numbers.
        dim: D, the number of features.
        parts: the number of normalised parts they are made of; 0 with a basis.
        differentiate: take a backward pass through any pair classifier.

    Raises:
        TypeError, ValueError: as :func:`~casn_plugin.evidence.check_pair_classifier`.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> form = pair_form(classifier, Arithmetic(torch.device("cpu"), torch.float32), dim=4)
        >>> form.keys(torch.rand(3, 4), is_query=True).shape
        torch.Size([3, 8])
    """
    check_pair_classifier(pair_classifier, dim)
    layers = [type(layer) for layer in _layers(pair_classifier)]
    kind = PairForm
    if isinstance(pair_classifier, Similarity):
        kind = _Cosine
    elif layers == [nn.Linear, nn.ReLU, nn.Linear] and not differentiate:
        kind = _TwoLayers
    return kind(pair_classifier, arithmetic, dim=dim, parts=parts)


class PairForm:
    """A pair classifier as ranking looks at it: here by a backward pass through any of them.

    Args:
        pair_classifier: gives (P, 2) scores, column 1 = same identity.
        arithmetic: where and in which numbers.
        dim: D, the number of features.
        parts: the number of normalised parts they are made of; 0 with a basis.
    """

    def __init__(
        self, pair_classifier: nn.Module, arithmetic: Arithmetic, *, dim: int, parts: int = 0
    ) -> None:
        self._pair_classifier, self._arithmetic = pair_classifier, arithmetic
        self._dim, self._parts = dim, parts

    def pair_bytes(self) -> int:
        """Returns the bytes that α of one pair takes, and what it is made of if it is kept."""
        return (2 + 5 * self._arithmetic.dtype.itemsize) * self._dim

    def listed_bytes(self) -> int:
        """Returns the bytes that α of a listed pair takes, with a copy of what it is made of."""
        return 3 * self.pair_bytes()

    def keys(
        self, features: Float[Tensor, "images dim"], *, is_query: bool
    ) -> Float[Tensor, "images keys"]:
        """Returns what the pair classifier needs of images, once for all their pairs."""
        return features

    def indicators(
        self, first: Float[Tensor, "queries keys"], second: Float[Tensor, "galleries keys"]
    ) -> Indicators:
        """Returns the function that gives α (Eq. 4) of pairs of these queries and images."""

        def alpha(first: Tensor, second: Tensor) -> Tensor:
            differences = first - second
            values = indicator(self._pair_classifier, differences.flatten(0, -2))
            values = _by_part(values, self._parts).bool()
            return values.view(differences.shape)

        return alpha

    def directions(
        self, first: Float[Tensor, "queries keys"], second: Float[Tensor, "galleries keys"]
    ) -> Directions:
        """Returns what gives the directions of attention of pairs of these queries and images."""
        return _ByIndicator(self.indicators(first, second))

    def steepness(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, " images"]:
        """Returns what the maps of images are times, once their directions are followed."""
        return features.new_ones(len(features))

    def one_indicator(self) -> Bool[Tensor, "1 dim"] | None:
        """Returns the α of all pairs, where they have but one: an affine pair classifier."""
        layers = _layers(self._pair_classifier)
        if not layers or any(type(layer) is not nn.Linear for layer in layers):
            return None
        somewhere = torch.zeros(
            1, self._dim, device=self._arithmetic.device, dtype=self._arithmetic.dtype
        )
        return self.indicators(somewhere, somewhere)(somewhere, somewhere)

    def logits(
        self, first: Float[Tensor, "queries keys"], second: Float[Tensor, "galleries keys"]
    ) -> Float[Tensor, "queries galleries"]:
        """Returns z1 − z0 of every pair, above 0 where they are the same identity; or s."""
        differences = first[:, None] - second[None]
        dtype = place_of(self._pair_classifier, differences).dtype
        scores: Tensor = self._pair_classifier(differences.flatten(0, 1).to(dtype))
        scores = scores.to(differences.dtype)
        return (scores[:, 1] - scores[:, 0]).view(differences.shape[:-1])


_CHANNELS = 256
"""Of products that are narrower than this, too little is computed at a time."""


class _TwoLayers(PairForm):
    """Linear, ReLU, Linear: α = [gate · (w2[1] W1) > 0], gate = [W1 f1 + b1 > W1 f2]."""

    def __init__(
        self, pair_classifier: nn.Module, arithmetic: Arithmetic, *, dim: int, parts: int = 0
    ) -> None:
        super().__init__(pair_classifier, arithmetic, dim=dim, parts=parts)
        first, _, last = _layers(pair_classifier)
        assert isinstance(first, nn.Linear) and isinstance(
            last, nn.Linear
        )  # pair_form has seen to it
        self._first, self._last = first, last
        w1, w2 = (layer.weight.detach().to(arithmetic.dtype) for layer in (first, last))
        weights = _by_part(w2[1, :, None] * w1, parts)
        if arithmetic.precision is not None:
            weights = weights / weights.abs().max().clamp(min=1e-30)
        self._towards_same = arithmetic.operand(weights)
        self._gates, self._sums = arithmetic.buffer(), arithmetic.buffer()
        self._alpha = arithmetic.buffer(torch.bool)

    def pair_bytes(self) -> int:
        return self._dim

    def listed_bytes(self) -> int:
        hidden = len(self._towards_same) * self._arithmetic.dtype.itemsize
        return 4 * hidden + (2 + 3 * self._arithmetic.products.itemsize) * self._dim

    def keys(self, features: Tensor, *, is_query: bool) -> Tensor:
        bias = self._first.bias if is_query else None
        keys = F.linear(features, self._first.weight.to(features.dtype))
        return keys if bias is None else keys + bias.to(keys.dtype)

    def indicators(self, first: Tensor, second: Tensor) -> Indicators:
        """Returns the function that gives α of pairs of these images.

        Hidden units whose gate is the same for all these pairs go into a constant: a trained
        classifier has many.
        """
        always = first.amin(0) > second.amax(0)
        if self._arithmetic.precision is not None:
            always = torch.zeros_like(always)  # a sum of rounded weights would be rounded again
        never = first.amax(0) <= second.amin(0)
        varying = (~(always | never)).nonzero()[:, 0]
        weights = self._towards_same[varying]
        # with what the open units that do not change add, the others must exceed this
        least = -(always.to(weights.dtype) @ self._towards_same)

        def alpha(mine: Tensor, its: Tensor) -> Tensor:
            mine, its = torch.broadcast_tensors(
                mine.index_select(-1, varying), its.index_select(-1, varying)
            )
            values = self._alpha.take((*mine.shape[:-1], weights.shape[1]))
            # as many pairs at a time as leave room for the sums of that many channels
            each = mine.shape[1:-1].numel() * max(len(varying), _CHANNELS)
            for rows in self._gates.portions(len(mine), each=each):
                gates = self._gates.take(mine[rows].shape)
                torch.gt(mine[rows], its[rows], out=gates)
                gates, into = gates.flatten(0, -2), values[rows].flatten(0, -2)
                for some in self._sums.portions(weights.shape[1], each=len(gates)):
                    sums = self._sums.take((len(gates), some.stop - some.start))
                    torch.mm(gates, weights[:, some], out=sums)
                    # faster than to compare into bytes
                    into[:, some] = torch.gt(sums, least[some], out=sums)
            return values

        return alpha

    def logits(self, first: Tensor, second: Tensor) -> Tensor:
        weights, bias = self._last.weight[1] - self._last.weight[0], self._last.bias
        scores = first.new_empty(len(first), len(second))
        for rows in self._gates.portions(len(first), each=second.numel()):
            hidden = (first[rows, None] - second[None]).relu_()
            scores[rows] = hidden @ weights.to(hidden.dtype)
        return scores if bias is None else scores + (bias[1] - bias[0])


class _Cosine(PairForm):
    """The similarity s of both features; the channels of a part stand together in its keys."""

    def pair_bytes(self) -> int:
        return 2 * self._arithmetic.products.itemsize  # no α, but s

    def listed_bytes(self) -> int:
        return 8 * (self._dim + 1) * self._arithmetic.products.itemsize

    def keys(self, features: Tensor, *, is_query: bool) -> Tensor:
        return _by_part(F.normalize(features, dim=1), self._parts)

    def indicators(self, first: Tensor, second: Tensor) -> Indicators:
        raise ValueError("a Similarity has no indicator α: expected a pair classifier")

    def directions(self, first: Tensor, second: Tensor) -> Directions:
        return _ByCosine(self._arithmetic)

    def steepness(self, features: Tensor) -> Tensor:
        lengths: Tensor = features.norm(dim=1).clamp(min=1e-12)
        return 1 / lengths

    def one_indicator(self) -> None:
        return None

    def logits(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second.T


def _layers(pair_classifier: nn.Module) -> list[nn.Module]:
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
    changed = any(
        each._forward_hooks
        or each._forward_pre_hooks
        or each._backward_hooks
        or each._backward_pre_hooks
        or "forward" in vars(each)
        for each in [*layers, pair_classifier]
    )
    return [] if changed else layers


def _by_part(values: Tensor, parts: int) -> Tensor:
    """Returns (..., D) values of features with the channels of a part together, if any."""
    return values.unflatten(-1, (-1, parts)).transpose(-2, -1).flatten(-2) if parts else values
