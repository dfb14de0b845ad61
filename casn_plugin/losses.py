"""The losses of the paper: one pure function an equation, and the two drop-in loss modules."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from casn_plugin.attention import (
    grad_cam,
    soft_mask,
)
from casn_plugin.doors import (
    check_choice,
    check_same,
    check_share,
    check_tensor,
    check_weight,
)
from casn_plugin.hooks import (
    constant_parameters,
    frozen_batchnorm,
    never_computed_again,
)
from casn_plugin.scores import SCORES, Logits, Score, identity_scores, parts_of
from casn_plugin.twins import OriginalCalledError, twin


def identification_loss(
    logits: Logits, pids: Int[Tensor, " batch"], *, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Returns L_ide, the cross-entropy over identities, mean over images (paper, Eq. 1).

    Several part classifiers are averaged, as torchreid's ``DeepSupervision`` does. The engine
    uses torchreid's own criterion; this is for training loops without torchreid.

    Raises:
        TypeError: logits that are no float tensors, identities that are no integers.
        ValueError: unlike numbers of logits and identities, identities outside of the classes, or
            label smoothing outside of [0, 1].

    Example:
        >>> identification_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    parts = parts_of(logits, pids)
    if check_weight("label_smoothing", label_smoothing) > 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    known = pids.long().clamp(min=-1)  # -1 is no class, where PyTorch would leave -100 out
    try:
        losses = [
            F.cross_entropy(part, known.to(part.device), label_smoothing=label_smoothing)
            for part in parts
        ]
    except IndexError as error:  # found by PyTorch, so that nothing is read here
        raise ValueError(
            f"pids must lie in [0, {parts[0].shape[1]}), the classes of the logits, but they go "
            f"from {int(pids.min())} to {int(pids.max())}"
        ) from error
    return torch.stack(losses).mean()


def identification_attention_loss(masked_scores: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Returns L_ia = y_c of the masked images, mean over images (paper, Eq. 2).

    An empty batch gives a zero that is attached to the graph.

    Example:
        >>> identification_attention_loss(torch.tensor([1.0, 3.0]))
        tensor(2.)
    """
    check_tensor("masked_scores", masked_scores, "batch")
    return masked_scores.mean() if len(masked_scores) else masked_scores.sum()


def pair_loss(
    pair_scores: Float[Tensor, "pairs 2"], same: Bool[Tensor, " pairs"]
) -> Float[Tensor, ""]:
    """Returns L_bce, the cross-entropy of same and different, mean over pairs (paper, Eq. 3).

    No pair gives a zero that is attached to the graph.

    Args:
        pair_scores: z; column 1 = same identity, column 0 = different.
        same: whether each pair shows one identity.

    Example:
        >>> pair_loss(torch.zeros(3, 2), torch.tensor([True, False, True]))
        tensor(0.6931)
    """
    check_tensor("pair_scores", pair_scores, "pairs 2")
    check_same("same", same, pair_scores.shape[:1])
    if not len(pair_scores):
        return pair_scores.sum()
    return F.cross_entropy(pair_scores, same.long())


def siamese_attention_loss(
    pair_scores: Float[Tensor, "rows 2"],
    distances: Float[Tensor, " pairs"],
    same: Bool[Tensor, " pairs"],
    *,
    consistency_weight: float = 0.2,
) -> Float[Tensor, ""]:
    """Returns L_sa = L_bce + α‖M*_m1 − M*_m2‖₂ (paper, Eq. 5).

    The distance is averaged over the positive pairs; where there is none, its term is a zero
    attached to the graph.

    Args:
        pair_scores: z, one row a pair; or two, in sequence, where both orders of a pair are
            shown (f1 − f2 and f2 − f1).
        distances: attention distance of each pair.
        same: whether each pair shows one identity.
        consistency_weight: α, 0.2 in the paper.

    Example:
        >>> same = torch.tensor([True, False])
        >>> siamese_attention_loss(torch.zeros(2, 2), torch.tensor([1.0, 9.0]), same)
        tensor(0.8931)
    """
    check_weight("consistency_weight", consistency_weight)
    check_tensor("pair_scores", pair_scores, "rows 2" if len(pair_scores) else "pairs 2")
    check_same("same", same, check_tensor("distances", distances, "pairs").shape)
    orders = len(pair_scores) // max(len(same), 1)
    loss_bce = pair_loss(pair_scores, same.repeat_interleave(orders))
    return loss_bce + consistency_weight * consistency(distances, same)


def consistency(
    distances: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"]
) -> Float[Tensor, ""]:
    """Returns the mean attention distance of the positive pairs: Eq. 5's second term, without α.

    Example:
        >>> consistency(torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
        tensor(1.)
    """
    check_tensor("distances", distances, "pairs")
    check_same("same", same, distances.shape)
    positives = torch.where(same, distances, torch.zeros_like(distances))
    return positives.sum() / same.sum().clamp(min=1)


def casn_loss(
    loss_ide: Tensor,
    loss_ia: Tensor,
    loss_sa: Tensor,
    *,
    lambda_ia: float = 0.5,
    lambda_sa: float = 0.05,
) -> Tensor:
    """Returns L = L_ide + λ1 L_ia + λ2 L_sa (paper, Eq. 6).

    Example:
        >>> casn_loss(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0))
        tensor(2.2000)
    """
    check_weight("lambda_ia", lambda_ia)
    check_weight("lambda_sa", lambda_sa)
    for name, term in (("loss_ide", loss_ide), ("loss_ia", loss_ia), ("loss_sa", loss_sa)):
        check_tensor(name, term, "")
    return loss_ide + lambda_ia * loss_ia + lambda_sa * loss_sa


class IdentificationAttentionLoss(nn.Module):
    """L_ia (paper, Section 3.1.2 and Eq. 2): the image without its attended pixels must score low.

    The Grad-CAM map of the true identity is turned into a soft mask, the image is masked, and
    what the classifier still finds of the identity in it is the loss. The map stays
    differentiable, so the loss trains where the network looks.

    Args:
        score: what Eq. 2 calls y_c, as :func:`casn_plugin.scores.identity_scores` has it: "logit"
            as in the paper (unbounded below), "probability" (in [0, 1]), "log-odds" or
            "above-chance".
        mask_scale: α of the soft mask, its steepness.
        mask_threshold: β of the soft mask, a share of the map's maximum.
        fill: the value that a hidden pixel takes: a number or a tensor that broadcasts to
            (B, 3, H, W). 0 is the mean colour where images are normalised.
        trains: what L_ia trains: "attention", where the network looks, through the mask alone;
            or "network", through the masked pass also what it makes of the masked image: it
            then learns not to know people by what the mask leaves of them.
        statistics: what BatchNorm normalises the masked images by: those of the "batch", or the
            "running" ones; it learns from neither.

    Raises:
        ValueError: an unknown `score`, `trains` or `statistics`, a mask scale that is not positive
            and finite, β outside [0, 1), or a fill that is not finite.

    Example:
        >>> net = nn.Conv2d(3, 4, 3)
        >>> def classify(imgs):
        ...     return net(imgs).mean((2, 3))
        >>> imgs, pids = torch.rand(2, 3, 16, 8), torch.tensor([0, 3])
        >>> activations = net(imgs)
        >>> loss = IdentificationAttentionLoss(score="probability")
        >>> loss(classify, imgs, pids, activations.mean((2, 3)), activations, net).shape
        torch.Size([])
    """

    def __init__(
        self,
        score: Score = "probability",
        mask_scale: float = 10.0,
        mask_threshold: float = 0.5,
        fill: float | Tensor = 0.0,
        trains: Literal["attention", "network"] = "attention",
        statistics: Literal["batch", "running"] = "batch",
    ) -> None:
        super().__init__()
        check_choice("score", score, SCORES)
        check_choice("trains", trains, ("network", "attention"))
        check_choice("statistics", statistics, ("batch", "running"))
        if check_weight("mask_scale", mask_scale) == 0:
            raise ValueError(f"mask_scale must be positive, got {mask_scale}")
        if not isinstance(fill, Tensor) and not math.isfinite(fill):
            raise ValueError(f"fill must be finite, got {fill}")
        self.score = score
        self.mask_scale = mask_scale
        self.mask_threshold = check_share("mask_threshold", mask_threshold)
        self.trains = trains
        self.statistics = statistics
        self.fill: float | Tensor
        if isinstance(fill, Tensor):
            self.register_buffer("fill", fill, persistent=False)
        else:
            self.fill = fill

    def mask(
        self,
        imgs: Float[Tensor, "batch channels rows columns"],
        pids: Int[Tensor, " batch"],
        logits: Logits,
        activations: Float[Tensor, "batch maps height width"],
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Returns the masked images I·(1 − Σ(M)) (paper, Section 3.1.2)."""
        maps = grad_cam(identity_scores(logits, pids), activations)
        rows, columns = imgs.shape[-2:]
        mask = soft_mask(
            maps, (rows, columns), mask_scale=self.mask_scale, mask_threshold=self.mask_threshold
        )
        mask = mask[:, None].to(imgs.dtype)
        fill = self.fill.to(mask) if isinstance(self.fill, Tensor) else self.fill
        return imgs * (1 - mask) + fill * mask

    def scores(
        self,
        classify: Callable[[Tensor], Logits],
        imgs: Float[Tensor, "batch channels rows columns"],
        pids: Int[Tensor, " batch"],
        logits: Logits,
        activations: Float[Tensor, "batch maps height width"],
        network: nn.Module | None = None,
    ) -> Float[Tensor, " batch"]:
        """Returns y_c of each masked image; the arguments are those of the loss."""
        pids = check_tensor("pids", pids, "batch", floating=False).cpu()  # read once
        if isinstance(classify, nn.Module) and network in (None, classify):
            return self.scores_of(
                lambda net, masked: net(masked), classify, imgs, pids, logits, activations
            )
        if network is None and self.trains == "attention":
            raise TypeError(
                "training attention alone needs the module that classify runs: name it, "
                f"network=..., as classify is none but a {type(classify).__name__}; or use "
                "trains='network'"
            )
        masked = self.mask(imgs, pids, logits, activations)
        if network is None:
            return identity_scores(classify(masked), pids, self.score)
        with self._kept_from(network), never_computed_again(network):
            return identity_scores(classify(masked), pids, self.score)

    def scores_of(
        self,
        run: Callable[[nn.Module, Tensor], Logits],
        network: nn.Module,
        imgs: Float[Tensor, "batch channels rows columns"],
        pids: Int[Tensor, " batch"],
        logits: Logits,
        activations: Float[Tensor, "batch maps height width"],
    ) -> Float[Tensor, " batch"]:
        """Returns y_c of each masked image, where `run` gives the logits of a network and images.

        What is run is a twin of the network, which stays as the masked pass needs it: so gradient
        checkpointing computes the same again. It is the network itself where that has no twin.
        """
        masked = self.mask(imgs, pids, logits, activations)
        with self._kept_from(network):
            try:
                with twin(network) as other:
                    return identity_scores(run(other, masked), pids, self.score)
            except OriginalCalledError:
                with never_computed_again(network):
                    return identity_scores(run(network, masked), pids, self.score)

    @contextmanager
    def _kept_from(self, network: nn.Module) -> Iterator[None]:
        """Keeps from a network what it must not learn of masked images, as the settings say."""
        constant = constant_parameters if self.trains == "attention" else nullcontext
        with frozen_batchnorm(network, self.statistics), constant(network):
            yield

    def forward(
        self,
        classify: Callable[[Tensor], Logits],
        imgs: Float[Tensor, "batch channels rows columns"],
        pids: Int[Tensor, " batch"],
        logits: Logits,
        activations: Float[Tensor, "batch maps height width"],
        network: nn.Module | None = None,
    ) -> Float[Tensor, ""]:
        """Returns L_ia, a scalar.

        Args:
            classify: maps images to logits: the network whose attention is trained.
            imgs: the images as the network takes them (normalised).
            pids: true identities.
            logits: of `imgs`, computed from `activations`.
            activations: the last feature map A of `imgs`.
            network: the module that `classify` runs, where `classify` itself is none. Its
                BatchNorm statistics are kept from the masked images, and its parameters from
                what L_ia is not to train.

        Raises:
            TypeError: no module in either, where attention alone is trained.
            ValueError: logits that do not depend on the activations, identities outside of the
                classes, or gradient checkpointing in what a function runs.
        """
        return identification_attention_loss(
            self.scores(classify, imgs, pids, logits, activations, network)
        )
