"""L_sa as a drop-in module: which pairs of a batch are compared, and how."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from casn_plugin.attention import (
    ROW_THRESHOLD,
    PairScorer,
    attention_distance,
    row_profiles,
    siamese_attention,
)
from casn_plugin.batch_pairs import BatchPairs, check_rows
from casn_plugin.doors import check_share, check_weight
from casn_plugin.identities import same_identity, split_pairs
from casn_plugin.losses import siamese_attention_loss


class SiameseAttentionLoss(nn.Module):
    """L_sa (paper, Section 3.2 and Eq. 5): pairs told apart, positive ones by the same rows.

    Args:
        consistency_weight: α of Eq. 5, the weight of the attention distance.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: compare aligned profiles of unit length.
        both_orders: show the pair classifier f1 − f2 and f2 − f1 of each pair.
        pairs: "rows": rows 2i and 2i+1 of a batch are pair i, as
            :class:`casn_plugin.PairSampler` draws them; or a :class:`casn_plugin.BatchPairs`,
            which chooses them inside of any labelled batch.

    Raises:
        TypeError: pairs that are neither.
        ValueError: t outside [0, 1), or a weight that is negative or not finite.

    Example:
        >>> activations = torch.rand(4, 8, 6, 3, requires_grad=True)
        >>> classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> loss = SiameseAttentionLoss()
        >>> pids = torch.tensor([5, 5, 2, 7])
        >>> loss(classifier, activations.mean((2, 3)), pids, activations).shape
        torch.Size([])
    """

    # how maps are compared, and which
    def __init__(
        self,
        consistency_weight: float = 0.2,
        row_threshold: float = ROW_THRESHOLD,
        unit: bool = False,
        both_orders: bool = True,
        pairs: Literal["rows"] | BatchPairs = "rows",
    ) -> None:
        super().__init__()
        self.consistency_weight = check_weight("consistency_weight", consistency_weight)
        self.row_threshold = check_share("row_threshold", row_threshold)
        self.unit = unit
        self.both_orders = both_orders
        if pairs != "rows" and not isinstance(pairs, BatchPairs):
            raise TypeError(f"pairs must be 'rows' or a BatchPairs, got {pairs!r}")
        self.pairs: Literal["rows"] | BatchPairs = pairs
        self._looked_at = False

    def choose(
        self, pids: Int[Tensor, " batch"], camids: Int[Tensor, " batch"] | None = None
    ) -> Int[Tensor, "pairs 2"] | None:
        """Returns the two rows of each pair of a batch, on the CPU; None: rows 2i and 2i+1.

        Of the first batch that is to be rows of pairs, the identities are looked at.

        Args:
            pids: identities.
            camids: cameras, of which pairs that are chosen take two where there are two.

        Raises:
            TypeError: identities or cameras that are no integers.
            ValueError: an identity-balanced batch that is taken for rows of pairs.
        """
        if isinstance(self.pairs, BatchPairs):
            return self.pairs.draw(pids, camids)
        if not self._looked_at:
            check_rows(pids)
            self._looked_at = True
        return None

    def profiles(self, maps: Float[Tensor, "rows height width"]) -> Float[Tensor, "rows height"]:
        """Returns what of the maps is aligned and compared: their :func:`row_profiles`."""
        return row_profiles(maps)

    def compare(
        self,
        pair_classifier: PairScorer,
        features: Float[Tensor, "batch dim"],
        activations: Float[Tensor, "batch maps height width"],
        pairs: Int[Tensor, "pairs 2"] | None = None,
    ) -> tuple[Float[Tensor, "rows 2"], Float[Tensor, " pairs"]]:
        """Returns the scores z of each pair (two rows for both orders) and its distance."""
        first, second = split_pairs(features, pairs)
        differences = first - second
        if self.both_orders:
            differences = torch.stack([differences, -differences], dim=1).flatten(0, 1)
        maps = siamese_attention(pair_classifier, features, activations, pairs)
        distances = attention_distance(
            *split_pairs(self.profiles(maps)), row_threshold=self.row_threshold, unit=self.unit
        )
        return pair_classifier(differences), distances

    def forward(
        self,
        pair_classifier: PairScorer,
        features: Float[Tensor, "batch dim"],
        pids: Int[Tensor, " batch"],
        activations: Float[Tensor, "batch maps height width"],
        camids: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Returns L_sa, a scalar; where no pair is valid, a zero attached to the graph.

        Args:
            pair_classifier: gives (P, 2) scores of (P, D) differences, column 1 = same identity;
                its parameters belong into the optimizer.
            features: f, computed from `activations`.
            pids: identities.
            activations: the last feature map A.
            camids: cameras, where pairs are chosen inside of the batch.

        Raises:
            ValueError: an odd batch or an identity-balanced one where rows are pairs, or features
                that do not depend on the activations.
        """
        pairs = self.choose(pids, camids)
        pair_scores, distances = self.compare(pair_classifier, features, activations, pairs)
        same = same_identity(pids, pairs).to(distances.device)
        return siamese_attention_loss(
            pair_scores, distances, same, consistency_weight=self.consistency_weight
        )
