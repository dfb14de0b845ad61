"""What says that two images show the same: a trained pair classifier, or their similarity.

Either takes the place of a CASN's `pair_classifier`; the attention of a pair is the Grad-CAM of
what it says. :func:`evidence_of` names which of them it was, for figures and results.
"""

from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.doors import check_count, check_seed, check_tensor


class PairClassifier(nn.Sequential):
    """The BCE classifier of Section 3.2.1: two fully connected layers, f⁻ to z ∈ R².

    The ReLU between them is needed: no affine function of a signed difference in random order
    can tell same from different.

    Args:
        feature_dim: D, the dimension of the features.
        hidden_dim: width of the first layer.
        seed: of the initial weights; the caller's random state is left as found.

    Example:
        >>> PairClassifier(8)(torch.rand(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, feature_dim: int, hidden_dim: int = 512, *, seed: int = 0) -> None:
        check_count("feature_dim", feature_dim, most=2**24)
        check_count("hidden_dim", hidden_dim, most=2**24)
        seed = check_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            first, last = nn.Linear(feature_dim, hidden_dim), nn.Linear(hidden_dim, 2)
        super().__init__(first, nn.ReLU(), last)
        self._initial = last.weight.detach().clone()

    def is_trained(self) -> bool:
        """Returns whether its weights are no longer those that it was made with.

        Example:
            >>> classifier = PairClassifier(8)
            >>> before = classifier.is_trained()
            >>> _ = nn.init.normal_(classifier[2].weight)
            >>> before, classifier.is_trained()
            (False, True)
        """
        last = self[-1].weight
        assert isinstance(last, Tensor)  # for the type checker
        initial = self._initial.to(last.device, last.dtype)
        return last.shape != initial.shape or not torch.equal(last.detach(), initial)


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

    Of a module that is no :class:`PairClassifier` nobody but the caller knows whether it is
    trained.

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
