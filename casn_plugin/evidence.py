"""What says that two images show the same: a trained pair classifier, or their similarity.

Either takes the place of a CASN's `pair_classifier`; the attention of a pair is the Grad-CAM of
what it says. :func:`evidence_of` names which of them it was, for figures and results.
"""

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.attention import check_width
from casn_plugin.doors import check_count, check_seed, check_tensor
from casn_plugin.hooks import evaluating, place_of


class PairClassifier(nn.Sequential):
    """The BCE classifier of Section 3.2.1: two fully connected layers, f⁻ to z ∈ R².

    The ReLU between them is needed: no affine function of a signed difference in random order
    can tell same from different.

    Args:
        feature_dim: D, the dimension of the features.
        hidden_dim: width of the first layer.
        seed: of the initial weights; the caller's random state is left as found.

    Attributes:
        initial: a buffer of the last layer's initial weights. It goes wherever weights go: through
            state dictionaries, files, copies and casts.

    Example:
        >>> PairClassifier(8)(torch.rand(3, 8)).shape
        torch.Size([3, 2])
    """

    initial: Tensor

    def __init__(self, feature_dim: int, hidden_dim: int = 512, *, seed: int = 0) -> None:
        check_count("feature_dim", feature_dim, most=2**24)
        check_count("hidden_dim", hidden_dim, most=2**24)
        seed = check_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            first, last = nn.Linear(feature_dim, hidden_dim), nn.Linear(hidden_dim, 2)
        super().__init__(first, nn.ReLU(), last)
        self.register_buffer("initial", last.weight.detach().clone())

    def is_trained(self) -> bool:
        """Returns whether its last layer has moved from the weights that it was made with.

        What moved them is not known, nor how well it was trained; and steps so small that rounding
        to bfloat16 could have moved every weight as far do not count. Of a state dictionary of
        before `initial` was kept, the initial weights are taken to be those of this one's own seed.

        Example:
            >>> classifier = PairClassifier(8)
            >>> classifier.load_state_dict(PairClassifier(8, seed=5).half().state_dict())
            <All keys matched successfully>
            >>> before = classifier.is_trained()
            >>> _ = nn.init.normal_(classifier[2].weight)
            >>> before, classifier.is_trained()
            (False, True)
        """
        last = self[-1].weight
        assert isinstance(last, Tensor)  # for the type checker
        now, initial = last.detach().float(), self.initial.to(last.device).float()
        least = torch.finfo(torch.float16).smallest_normal
        return now.shape != initial.shape or not torch.allclose(
            now, initial, rtol=torch.finfo(torch.bfloat16).eps, atol=least / 2**10
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes a state of before `initial` was kept, too."""
        state_dict.setdefault(f"{prefix}initial", self.initial)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Similarity(nn.Module):
    """The cosine of both features, in the place of a pair classifier: nothing has to be trained.

    ``CASN(network, pair_classifier=Similarity())`` explains, ranks and searches with any network
    that gives features. The attention of a pair is the Grad-CAM of s = f1·f2 / (‖f1‖ ‖f2‖) in
    both images: what makes their features alike. It has no weights, so the Siamese loss can't be
    trained with it.

    Example:
        >>> Similarity()(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([0.9600])
    """

    def forward(
        self, first: Float[Tensor, "pairs dim"], second: Float[Tensor, "pairs dim"] | None = None
    ) -> Float[Tensor, " pairs"]:
        """Returns the cosine of both features of each pair, in [-1, 1].

        Args:
            first: the features of the first images.
            second: those of the second images.

        Raises:
            TypeError: differences of features alone, of which a pair classifier is trained.
            ValueError: features of other shapes.
        """
        if second is None:
            raise TypeError(
                "a Similarity compares two features and has no weights: the Siamese loss needs a "
                "PairClassifier, which CASN(backbone) has by default"
            )
        check_tensor("first", first, "pairs dim")
        check_tensor("second", second, "pairs dim")
        if first.shape != second.shape:
            raise ValueError(
                "expected as many first as second features of one size, got "
                f"{tuple(first.shape)} and {tuple(second.shape)}"
            )
        cosines: Tensor = (F.normalize(first, dim=1) * F.normalize(second, dim=1)).sum(1)
        return cosines


def check_pair_classifier(pair_classifier: nn.Module, dim: int) -> nn.Module:
    """Returns a module that can take the place of a pair classifier: it is tried out.

    It stays as found, in its own modes.

    Args:
        pair_classifier: gives (P, 2) scores of (P, D) differences, column 1 = same identity; or is
            a :class:`Similarity`.
        dim: D, the dimension of the features.

    Raises:
        TypeError: no module.
        ValueError: it takes no differences of this dimension, or gives other scores.

    Example:
        >>> check_pair_classifier(nn.Linear(8, 2), 8)
        Linear(in_features=8, out_features=2, bias=True)
    """
    if not isinstance(pair_classifier, nn.Module):
        is_class = isinstance(pair_classifier, type)
        came = f"the class {pair_classifier.__name__}" if is_class else type(pair_classifier)
        raise TypeError(f"pair_classifier must be a torch.nn.Module, got {came}")
    if isinstance(pair_classifier, Similarity):
        return pair_classifier
    check_width(pair_classifier, dim)
    place = place_of(pair_classifier)
    differences = torch.zeros(2, dim, device=place.device, dtype=place.dtype)
    with (
        evaluating(pair_classifier),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(place.device.type, enabled=False),
    ):
        try:
            scores = pair_classifier(differences)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the pair classifier does not take differences of shape (2, {dim}): {error}"
            ) from error
    if not isinstance(scores, Tensor) or scores.shape != (2, 2):
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            "the pair classifier must give two scores a pair, (P, 2), column 1 = same identity; "
            f"of 2 differences came {came}"
        )
    return pair_classifier


class Evidence(str, Enum):
    """What the attention of a pair is evidence of, in words that figures and results carry.

    Example:
        >>> print(Evidence.TRAINED)
        trained pair classifier
    """

    TRAINED = "trained pair classifier"
    UNTRAINED = "pair classifier with its initial weights (never trained)"
    OWN = "pair classifier of the caller's own"
    SIMILARITY = "similarity of both features (no pair classifier was trained)"

    @property
    def marks(self) -> str:
        """What attention marks."""
        if self is Evidence.SIMILARITY:
            return "what makes the features of both alike"
        return "what speaks for the same person"

    def __str__(self) -> str:
        """Returns the words."""
        return self.value


def evidence_of(pair_classifier: nn.Module) -> Evidence:
    """Returns what the attention of pairs is evidence of.

    Trained is said of a :class:`PairClassifier` whose weights have moved, as its `is_trained` knows
    it. Of another module nobody but the caller knows whether it is trained.

    Example:
        >>> evidence_of(PairClassifier(8)).value, evidence_of(Similarity()).name
        ('pair classifier with its initial weights (never trained)', 'SIMILARITY')
    """
    if isinstance(pair_classifier, Similarity):
        return Evidence.SIMILARITY
    if not isinstance(pair_classifier, PairClassifier):
        return Evidence.OWN
    return Evidence.TRAINED if pair_classifier.is_trained() else Evidence.UNTRAINED


def probabilities(
    pair_classifier: nn.Module, scores: Float[Tensor, " pairs"]
) -> list[float] | list[None]:
    """Returns the probability of "same identity" of pairs; None each where only similarity is had.

    Args:
        pair_classifier: what has given the scores.
        scores: z1 − z0 of each pair, or its cosine.

    Example:
        >>> probabilities(PairClassifier(8), torch.zeros(1))
        [0.5]
        >>> probabilities(Similarity(), torch.ones(1))
        [None]
    """
    if isinstance(pair_classifier, Similarity):
        return [None] * len(scores)
    given: list[float] = scores.sigmoid().tolist()
    return given
