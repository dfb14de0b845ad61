"""Which rows of a batch are compared: pairs chosen inside of any labelled batch."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from casn_plugin.doors import check_choice, check_count, check_seed, check_weight
from casn_plugin.identities import UNKNOWN, Ids, as_ids, pairs_by_identity


@dataclass(frozen=True)
class BatchPairs:
    """Chooses pairs inside of a batch, whatever its sampler: no image with itself, no pair twice.

    Pairs of one identity are taken of two cameras (or of a camera that is unknown) as long as
    there are such, then of one. Of pairs that are equally good, those come first whose images are
    in the fewest pairs yet, then chance decides. It follows from the seed and from pids and
    camids of the batch alone: nothing has to be saved, and the same batch gives the same pairs.

    Args:
        number: pairs of a batch, >= 1, or as many as there are; by default half as many as there
            are images, as rows of pairs would form; "all": every pair, whatever it shows.
        positive_fraction: share of the pairs that show one identity, in [0, 1]. Where there are
            too few of a kind, the other takes their place, unless the share is 0 or 1.
        seed: >= 0.

    Raises:
        TypeError: a number or seed that is no integer, a fraction that is no number.
        ValueError: one that lies outside; or a fraction of all pairs, which have their own.

    Example:
        >>> pids, camids = torch.tensor([7, 7, 7, 3, 3, -1]), torch.tensor([0, 0, 1, 0, 1, 1])
        >>> BatchPairs(number=4).draw(pids, camids).shape
        torch.Size([4, 2])
        >>> BatchPairs("all").draw(pids).shape
        torch.Size([10, 2])
    """

    number: int | Literal["all"] | None = None
    positive_fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        if check_weight("positive_fraction", self.positive_fraction) > 1:
            raise ValueError(f"positive_fraction must lie in [0, 1], got {self.positive_fraction}")
        if isinstance(self.number, str):
            check_choice("number", self.number, ("all",))
            if self.positive_fraction != 0.5:
                raise ValueError(
                    "number='all' takes every pair, so positive_fraction must be left as it is, "
                    f"got {self.positive_fraction}"
                )
        elif self.number is not None:
            check_count("number", self.number)
        check_seed(self.seed)

    def draw(self, pids: Ids, camids: Ids | None = None) -> Int[Tensor, "pairs 2"]:
        """Returns the two rows of each pair, on the CPU; where no pair is valid, none.

        Args:
            pids: identity of each row; one that is unknown (-1 or None) makes no pair.
            camids: its camera; without it, or where it is unknown, it is no reason.

        Raises:
            TypeError: pids or camids that are no integers.
            ValueError: unlike numbers of them.
        """
        own = as_ids("pids", pids)
        cameras = as_ids("camids", camids, len(own))
        rng = np.random.default_rng([self.seed, *np.concatenate([own, cameras]).view(np.uint32)])
        same, across = pairs_by_identity(own, own, cameras, cameras)
        _, known = pairs_by_identity(own, own, cross_camera=False)
        rows = np.stack(np.triu_indices(len(own), 1), axis=1)
        alike, across, known = (each.numpy()[tuple(rows.T)] for each in (same, across, known))
        crossing, within = rows[alike & across], rows[alike & ~across]
        unlike = rows[known & ~alike]
        positives, negatives = self._shares(len(own), int(alike.sum()), len(unlike))
        uses = np.zeros(len(own), dtype=np.int64)
        drawn = [_take(rng, crossing, min(positives, len(crossing)), uses)]
        drawn.append(_take(rng, within, positives - len(drawn[0]), uses))
        drawn.append(_take(rng, unlike, negatives, uses))
        return torch.from_numpy(rng.permuted(np.concatenate(drawn), axis=1))

    def _shares(self, images: int, positives: int, negatives: int) -> tuple[int, int]:
        """Returns how many pairs of one and of two identities are drawn of those there are."""
        if isinstance(self.number, str):
            return positives, negatives
        number = self.number or max(images // 2, 1)
        same = round(number * self.positive_fraction)
        if 0 < self.positive_fraction < 1:
            same = max(same, number - negatives)
        same = min(same, positives)
        different = number - same if self.positive_fraction < 1 else 0
        return same, min(different, negatives)


def check_rows(pids: Int[Tensor, " batch"]) -> None:
    """Finds out whether a batch whose rows 2i and 2i+1 are to be pair i was drawn for that.

    Identity-balanced (PK) samplers draw K images of each identity in a row. For K = 2 their rows
    are pairs, but all of one identity, of which a warning tells. Half of the pairs of a
    PairSampler are of two identities, so its batches of 8 and more images never look like that.

    Args:
        pids: identity of each row.

    Raises:
        ValueError: at least 8 rows, each identity K >= 3 times in a row.

    Example:
        >>> check_rows(torch.tensor([5, 5, 7, 8, 7, 7, 5, 8]))
    """
    array = as_ids("pids", pids)
    ends = np.flatnonzero(np.diff(array, append=UNKNOWN - 1)) + 1
    in_a_row = int(np.gcd.reduce(np.diff(ends, prepend=0))) if len(array) else 0
    advice = (
        "choose pairs inside of the batch, SiameseAttentionLoss(pairs=BatchPairs()), or draw rows "
        "of pairs with PairSampler"
    )
    if len(array) >= 8 and len(ends) > 1 and in_a_row >= 3:
        raise ValueError(
            f"expected a batch whose rows 2i and 2i+1 are pair i, half of them of one identity, "
            f"got an identity-balanced (PK) batch, {in_a_row} images of each in a row: {advice}"
        )
    first, second = array[: len(array) // 2 * 2].reshape(-1, 2).T
    if len(first) >= 2 and len(ends) > 1 and (first == second).all():
        warnings.warn(
            f"all {len(first)} pairs of a batch (rows 2i and 2i+1) show one identity, so "
            f"nothing is learned of different ones; if this is no intention, {advice}",
            stacklevel=2,
        )


def _take(
    rng: np.random.Generator,
    pairs: Int64[np.ndarray, "_ 2"],
    number: int,
    uses: Int64[np.ndarray, " images"],
) -> Int64[np.ndarray, "_ 2"]:
    """Returns so many of the pairs, those first whose images are in the fewest; counts them."""
    if number >= len(pairs):
        np.add.at(uses, pairs, 1)
        return pairs
    taken: list[Int64[np.ndarray, "_ 2"]] = []
    left = rng.permutation(pairs)
    while number:
        costs = uses[left].max(1) * (2 * len(pairs) + 1) + uses[left].sum(1)
        candidates = np.flatnonzero(costs == costs.min())
        free = set(left[candidates].ravel().tolist())
        chosen: list[int] = []
        for place, (one, other) in zip(candidates.tolist(), left[candidates].tolist(), strict=True):
            if one in free and other in free:
                free -= {one, other}
                chosen.append(place)
            if len(chosen) == number:
                break
        taken.append(left[chosen])
        np.add.at(uses, left[chosen], 1)
        left = np.delete(left, chosen, axis=0)
        number -= len(chosen)
    return np.concatenate(taken) if taken else pairs[:0]
