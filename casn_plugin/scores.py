"""What a network says of identities: logits of one or several classifiers, and the score y_c."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from casn_plugin.doors import check_choice, check_lengths, check_tensor, within

Score = Literal["logit", "probability", "log-odds", "above-chance"]
"""What y_c may be: a class score itself, or how sure the softmax is of it."""

SCORES = get_args(Score)

Logits = Tensor | Sequence[Tensor]
"""(B, classes) scores y, or one such tensor for each part classifier (PCB) or branch (HACNN)."""


def identity_scores(
    logits: Logits,
    pids: Int[Tensor, " batch"],
    score: Score = "logit",
) -> Float[Tensor, " batch"]:
    """Returns y_c, the score of each image's true identity.

    Args:
        logits: scores y of all identities; of several part classifiers, logits are summed, and
            what else `score` says is averaged.
        pids: the true identities c, in [0, classes). They are read, so they are best on the CPU,
            wherever the logits are.
        score: "logit", the class score itself (the paper's y_c; unbounded); or what stays as it
            is where all logits of an image move together: "probability", p of the softmax, in
            [0, 1]; "log-odds", log p − log(1 − p), unbounded; "above-chance",
            max(0, log p + log C) of C classes, 0 where nothing but guessing is left.

    Raises:
        TypeError: logits that are no float tensors, identities that are no integers.
        ValueError: an unknown `score`, unlike numbers of logits and identities, identities
            outside of the classes, or log-odds of a single class.

    Example:
        >>> identity_scores(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor([5.])
        >>> identity_scores(torch.tensor([[1.0, 5.0]]), torch.tensor([1]), "log-odds")
        tensor([4.])
    """
    parts = parts_of(logits, pids)
    check_choice("score", score, SCORES)
    pids = pids.long()  # uint8 would be a mask
    classes = parts[0].shape[1]
    if not within(pids, classes):
        raise ValueError(
            f"pids must lie in [0, {classes}), the classes of the logits, but they go from "
            f"{int(pids.min())} to {int(pids.max())}"
        )
    pids = pids.to(parts[0].device)
    stacked = torch.stack([at_least_float32(part) for part in parts])
    rows = torch.arange(len(pids), device=pids.device)
    if score == "probability":
        stacked = stacked.softmax(-1)
    if score == "above-chance":
        stacked = (stacked.log_softmax(-1) + math.log(classes)).clamp(min=0)
    chosen = stacked[:, rows, pids]
    if score == "log-odds":
        if classes < 2:
            raise ValueError("log-odds need two classes or more, got logits of 1")
        own = torch.zeros_like(stacked, dtype=torch.bool)
        own[:, rows, pids] = True
        chosen = chosen - stacked.masked_fill(own, -torch.inf).logsumexp(-1)
    return chosen.sum(0) if score == "logit" else chosen.mean(0)


def parts_of(logits: Logits, pids: Tensor) -> Sequence[Tensor]:
    """Returns logits as a sequence of (B, classes) tensors, as many as there are identities.

    Raises:
        TypeError: logits that are no float tensors, identities that are no integers.
        ValueError: logits of another shape, or unlike numbers of them and of identities.

    Example:
        >>> len(parts_of([torch.zeros(2, 5)] * 6, torch.tensor([0, 1])))
        6
    """
    listed = logits if isinstance(logits, list | tuple) else [logits]
    parts = [check_tensor("logits", part, "*batch classes") for part in listed]
    if len({part.shape for part in parts}) != 1 or parts[0].ndim != 2:
        raise ValueError(
            "logits must be a (B, classes) tensor or a sequence of them, got shapes "
            f"{[tuple(part.shape) for part in parts]}"
        )
    check_tensor("pids", pids, "batch", floating=False)
    check_lengths(logits=parts[0], pids=pids)
    return parts


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision tensors in float32, others as they are.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16))
        tensor([1.])
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
