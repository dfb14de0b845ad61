"""The whole loss of a step: L of Eq. 6, and a metric loss of the features beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from casn_plugin.doors import check_lengths, check_tensor, check_weight
from casn_plugin.identities import same_identity
from casn_plugin.losses import (
    casn_loss,
    consistency,
    identification_attention_loss,
    pair_loss,
    siamese_attention_loss,
)
from casn_plugin.model import CASNOutput
from casn_plugin.scores import at_least_float32
from casn_plugin.siamese import SiameseAttentionLoss

MetricLoss = Callable[..., Tensor]
"""Gives a scalar of (B, D) features, (B,) pids and, where there is a miner, what that gives."""

Miner = Callable[[Tensor, Tensor], Any]
"""Gives of (B, D) features and (B,) pids what a metric loss takes after them."""


@dataclass(frozen=True)
class MetricOptions:
    """A metric loss of the features beside the losses of the paper: weight_x L_ide + weight_t L_t.

    Args:
        weight_t: weight of the metric loss, as in torchreid's ``ImageTripletEngine``.
        weight_x: weight of L_ide, likewise; 0: it is left out.
        margin: of torchreid's triplet loss with the hardest of each batch.
        metric_loss: another loss, called as metric_loss(features, pids), such as those of
            pytorch-metric-learning. By default the engine takes torchreid's triplet loss.
        miner: of pairs or triplets, as those of pytorch-metric-learning: what miner(features,
            pids) gives is the metric loss's third argument.

    Raises:
        TypeError: weights that are no numbers, a metric loss or miner that can't be called.
        ValueError: weights that are negative, not finite or both 0; a negative margin; or a
            margin or a miner of another loss than it is for.

    Example:
        >>> def spread(features, pids):
        ...     return features.var(0).sum()
        >>> options = MetricOptions(weight_t=0.5, metric_loss=spread)
        >>> options.loss(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]))
        tensor(0.)
    """

    weight_t: float = 1.0
    weight_x: float = 1.0
    margin: float = 0.3
    metric_loss: MetricLoss | None = None
    miner: Miner | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        check_weight("margin", self.margin)
        if check_weight("weight_t", self.weight_t) + check_weight("weight_x", self.weight_x) == 0:
            raise ValueError("one of weight_t and weight_x must be positive, got 0 and 0")
        for name, each in (("metric_loss", self.metric_loss), ("miner", self.miner)):
            if each is not None and not callable(each):
                raise TypeError(f"{name} must be called as {name}(features, pids), got {each!r}")
        if self.metric_loss is not None and self.margin != 0.3:
            raise ValueError(
                "margin is that of torchreid's triplet loss; a metric_loss of one's own has its "
                f"own, got margin={self.margin} with {type(self.metric_loss).__name__}"
            )
        if self.miner is not None and self.metric_loss is None:
            raise ValueError(
                "torchreid's triplet loss takes the hardest of each batch and no miner: expected "
                "a metric_loss beside it"
            )

    def with_triplets(self, triplet_loss: Callable[[float], MetricLoss]) -> "MetricOptions":
        """Returns options that have a metric loss where they need one.

        Args:
            triplet_loss: makes the default one of a margin.
        """
        if self.metric_loss is not None or not self.weight_t:
            return self
        return MetricOptions(
            self.weight_t, self.weight_x, metric_loss=triplet_loss(self.margin), miner=self.miner
        )

    @property
    def modules(self) -> nn.ModuleDict:
        """The metric loss and the miner, as far as they are modules."""
        both = {"metric_loss": self.metric_loss, "miner": self.miner}
        return nn.ModuleDict(
            {name: each for name, each in both.items() if isinstance(each, nn.Module)}
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what :attr:`modules` had in a checkpoint.

        Raises:
            ValueError: it was of another metric loss.
        """
        try:
            self.modules.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another metric loss: {error}") from error

    def loss(
        self, features: Float[Tensor, "batch dim"], pids: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Returns L_t, in float32 or wider whatever autocast says.

        Raises:
            TypeError: features, identities or what the metric loss gives are no such tensors.
            ValueError: there is no metric loss, or it gives no scalar; features or identities of
                another shape, or unlike numbers of them.
        """
        if self.metric_loss is None:
            raise ValueError("expected a metric_loss, got None: only the engine has a default")
        check_tensor("features", features, "batch dim")
        check_tensor("pids", pids, "batch", floating=False)
        check_lengths(features=features, pids=pids)
        with torch.autocast(features.device.type, enabled=False):
            given: tuple[Any, ...] = (at_least_float32(features), pids.to(features.device))
            if self.miner is not None:
                given += (self.miner(*given),)
            return check_tensor("what metric_loss gives", self.metric_loss(*given), "")


def loss_terms(
    output: CASNOutput,
    pids: Int[Tensor, " batch"],
    loss_ide: Float[Tensor, ""] | None,
    *,
    lambda_ia: float = 0.5,
    lambda_sa: float = 0.05,
    siamese: SiameseAttentionLoss | None = None,
    metric: MetricOptions | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Returns L = L_ide + λ1 L_ia + λ2 L_sa (paper, Eq. 6), and all its terms without a graph.

    With a metric loss, weight_x L_ide + weight_t L_t stands for L_ide. The terms are "loss", and
    as far as they were computed "loss_ide", "loss_t" and "loss_ia"; "loss_sa", "loss_bce",
    "attention_distance" and "pair_acc", the accuracy of the pair classifier in percent, which are
    0 where there is no pair.

    Args:
        output: of the model in training mode.
        pids: identities of its images.
        loss_ide: L_ide (Eq. 1) of its logits; not needed where its weight is 0.
        lambda_ia: λ1.
        lambda_sa: λ2.
        siamese: the settings of L_sa that the output was computed with, by default the loss's own.
        metric: the metric loss beside them.

    Raises:
        TypeError: as :meth:`MetricOptions.loss`.
        ValueError: likewise; no L_ide although it has a weight; or weights that are negative or
            not finite.

    Example:
        >>> output = CASNOutput(torch.zeros(2, 5), torch.rand(2, 4), torch.rand(2, 3, 6, 2))
        >>> loss, terms = loss_terms(output, torch.tensor([0, 1]), torch.tensor(1.5))
        >>> loss, list(terms)
        (tensor(1.5000), ['loss', 'loss_ide'])
    """
    options = metric or MetricOptions(weight_t=0.0)
    base = loss_ia = loss_sa = output.features.new_zeros(())
    terms: dict[str, Tensor] = {}
    if options.weight_x:
        if loss_ide is None:
            raise ValueError(f"expected loss_ide, as weight_x is {options.weight_x}, got None")
        terms["loss_ide"] = loss_ide
        base = options.weight_x * loss_ide
    if options.weight_t:
        terms["loss_t"] = options.loss(output.features, pids)
        base = base + options.weight_t * terms["loss_t"]
    if output.masked_scores is not None:
        loss_ia = terms["loss_ia"] = identification_attention_loss(output.masked_scores)
    if output.pair_scores is not None and output.distances is not None:
        consistency_weight = (siamese or SiameseAttentionLoss()).consistency_weight
        same = output.same
        if same is None:
            same = same_identity(pids).to(output.distances.device)
        loss_sa = terms["loss_sa"] = siamese_attention_loss(
            output.pair_scores, output.distances, same, consistency_weight=consistency_weight
        )
        rows = same.repeat_interleave(len(output.pair_scores) // max(len(same), 1))
        with torch.no_grad():
            terms["loss_bce"] = pair_loss(output.pair_scores, rows)
            terms["attention_distance"] = consistency(output.distances, same)
            hits = output.pair_scores.argmax(1).bool() == rows
            terms["pair_acc"] = 100 * hits.float().sum() / max(len(hits), 1)
    loss = casn_loss(base, loss_ia, loss_sa, lambda_ia=lambda_ia, lambda_sa=lambda_sa)
    return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
