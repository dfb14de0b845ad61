"""Some pairs that are looked at again and again while a model is trained, for TensorBoard."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from casn_plugin.explanation.pictures import pair_mosaic
from casn_plugin.identities import same_person
from casn_plugin.loading import encode_images
from casn_plugin.model import CASN
from casn_plugin.ranking import pair_attention


class FixedPairs:
    """Some pairs of a query and a gallery image, the same ones whenever they are looked at.

    They are chosen as `choose_pairs` says.

    Args:
        query: the queries: a data set of dictionaries with "img" and "pid", as torchreid's are,
            that lists (path, pid, camid, ...) of all its images as `data`.
        gallery: the gallery, likewise.
        number: pairs to look at, at least one; queries repeat where there are fewer.

    Attributes:
        first: (pairs, 3, rows, columns) the queries, normalised.
        second: the gallery images, likewise.
        same: whether each pair shows one identity.
    """

    def __init__(self, query: Any, gallery: Any, number: int) -> None:
        pairs = choose_pairs(query.data, gallery.data, number)
        items = [(query[i], gallery[j]) for i, j in pairs]
        self.first = torch.stack([first["img"] for first, _ in items])
        self.second = torch.stack([second["img"] for _, second in items])
        self.same = [same_person(first["pid"], second["pid"]) for first, second in items]

    def mosaic(self, model: CASN) -> Float[np.ndarray, "all_rows all_columns 3"]:
        """Returns one RGB picture of all pairs and their attention, as the model is now.

        Args:
            model: the CASN, which is left as found.
        """
        maps = pair_attention(
            model, encode_images(model, self.first), encode_images(model, self.second)
        )
        first, second = map(model.preprocessing.pictures, (self.first, self.second))
        return pair_mosaic(first, second, *maps, self.same)


def choose_pairs(
    query: Sequence[Any], gallery: Sequence[Any], number: int
) -> list[tuple[int, int]]:
    """Returns rows of query and gallery, the same at every call.

    In turn a pair of one identity, seen by two cameras, and a pair of two identities; of the
    other kind where there is none.

    Args:
        query: tuples of (path, pid, camid, ...).
        gallery: likewise.
        number: pairs to return; queries repeat where there are fewer.

    Example:
        >>> choose_pairs([("a.png", 7, 0)], [("b.png", 7, 1), ("c.png", 8, 1)], 2)
        [(0, 0), (0, 1)]
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
