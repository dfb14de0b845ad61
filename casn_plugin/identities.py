"""Who is whom: identities and cameras, known and unknown, and which pairs show one identity."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Integer
from torch import Tensor

from casn_plugin.doors import check_tensor, within

Ids = Sequence[int | None] | Integer[np.ndarray, "_"] | Integer[Tensor, "_"]
"""Identities or cameras, one an image, >= 0; -1 or None where it is unknown."""

UNKNOWN = -1
"""The identity of nobody in particular, the camera that is not known: equal to no other."""


def as_ids(name: str, ids: Ids | None, length: int | None = None) -> Int64[np.ndarray, "_"]:
    """Returns identities or cameras as an array, :data:`UNKNOWN` where they are.

    Args:
        name: what they are called in errors.
        ids: one an image; None: all unknown, where `length` says how many.
        length: so many are expected.

    Raises:
        TypeError: ids that are no integers, such as 1.5, "7" or True.
        ValueError: another number of them, more than one dimension, or ids below -1.

    Example:
        >>> as_ids("pids", [7, None, 3])
        array([ 7, -1,  3])
        >>> as_ids("camids", None, 2)
        array([-1, -1])
    """
    if ids is None and length is not None:
        return np.full(length, UNKNOWN)
    if isinstance(ids, Tensor):
        if ids.dtype == torch.bfloat16 or ids.layout != torch.strided:  # unknown to NumPy
            raise TypeError(f"{name} must be integers, got {ids.dtype} of layout {ids.layout}")
        array = ids.detach().cpu().numpy()
    elif isinstance(ids, np.ndarray):
        array = ids
    else:
        if ids is not None and (isinstance(ids, str | bytes) or not isinstance(ids, Iterable)):
            raise TypeError(f"{name} must be integers, one an image, got {type(ids).__name__}")
        listed = [UNKNOWN if each is None else each for each in ids or ()]
        try:
            array = np.asarray(listed, dtype=None if listed else np.int64)
        except (ValueError, RuntimeError) as error:  # lists of unlike lengths, sparse tensors
            raise TypeError(f"{name} must be integers, one an image: {error}") from error
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1 or length not in (None, len(array)):
        expected = "of one dimension" if length is None else f"of shape ({length},)"
        raise ValueError(f"{name} must be {expected}, one an image, got shape {array.shape}")
    if array.min(initial=0) < UNKNOWN:
        raise ValueError(f"{name} must be >= 0, or -1 where unknown, got {array.min()}")
    if array.dtype == np.uint64 and array.max(initial=0) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {array.max()}")
    return array.astype(np.int64)


def check_labels(name: str, pids: Ids, classes: int | None = None) -> Int64[np.ndarray, "_"]:
    """Returns the identities that a classifier is trained on: 0 ... C - 1, each of them.

    Args:
        name: what they are called in errors.
        pids: one an image.
        classes: C, the classes of the classifier; by default as many as there are identities.

    Raises:
        TypeError: as :func:`as_ids`.
        ValueError: as :func:`as_ids`; or an identity that is unknown, is no class, or is missing.

    Example:
        >>> check_labels("pids", [0, 2, 1, 1])
        array([0, 2, 1, 1])
    """
    array = as_ids(name, pids)
    there = np.unique(array)
    classes = len(there) if classes is None else classes
    wrong = [*np.setdiff1d(there, np.arange(classes)), *np.setdiff1d(np.arange(classes), there)]
    if wrong:
        raise ValueError(
            f"{name} must be the classes 0 ... {classes - 1} of the classifier, each of them, got "
            f"{len(there)}{f' from {there[0]} to {there[-1]}' if len(there) else ''}; "
            f"{wrong[0]} is {'no class' if wrong[0] in there else 'missing'}"
        )
    return array


def same_person(first: int, second: int) -> bool | None:
    """Returns whether two images show one identity; None where one of them is unknown.

    Raises:
        TypeError: as :func:`as_ids`.
        ValueError: likewise.

    Example:
        >>> same_person(7, 7), same_person(7, 8), same_person(-1, -1)
        (True, False, None)
    """
    one, other = (int(each) for each in as_ids("identities", [first, second]))
    return None if UNKNOWN in (one, other) else one == other


def split_pairs(rows: Tensor, pairs: Int[Tensor, "pairs 2"] | None = None) -> tuple[Tensor, Tensor]:
    """Returns the first and the second images of all pairs: rows 2i and rows 2i+1.

    Args:
        rows: one an image.
        pairs: the two rows of each pair, where they are others. They are read, so they are best
            on the CPU, wherever the rows are.

    Raises:
        TypeError: no tensor, or one without rows; pairs that are no integers.
        ValueError: an odd number of rows; pairs of another shape, or of rows that there are not.

    Example:
        >>> split_pairs(torch.tensor([7, 7, 3, 5]))
        (tensor([7, 3]), tensor([7, 5]))
        >>> split_pairs(torch.tensor([7, 7, 3, 5]), torch.tensor([[0, 3], [1, 0], [2, 3]]))
        (tensor([7, 7, 3]), tensor([5, 7, 5]))
    """
    if not isinstance(rows, Tensor) or not rows.ndim or rows.layout != torch.strided:
        came = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a dense tensor with a row an image, got {came}")
    if pairs is not None:
        check_tensor("pairs", pairs, "pairs 2", floating=False)
        if not within(pairs.long(), len(rows)):
            raise ValueError(
                f"pairs must name rows of a batch of {len(rows)}, got {int(pairs.min())} to "
                f"{int(pairs.max())}"
            )
        first, second = pairs.to(rows.device, torch.int64).unbind(1)
        return rows[first], rows[second]
    if len(rows) % 2:
        raise ValueError(
            "rows 2i and 2i+1 of a batch are pair i, so their number must be even, "
            f"but this batch (or this replica's share of it) has {len(rows)}"
        )
    return rows[0::2], rows[1::2]


def same_identity(
    pids: Int[Tensor, " batch"], pairs: Int[Tensor, "pairs 2"] | None = None
) -> Bool[Tensor, " pairs"]:
    """Returns whether each pair shows one identity; the arguments as in :func:`split_pairs`.

    Raises:
        TypeError: as :func:`split_pairs`.
        ValueError: likewise; or an identity that is unknown.

    Example:
        >>> same_identity(torch.tensor([4, 4, 1, 2]))
        tensor([ True, False])
    """
    first, second = split_pairs(pids, pairs)
    unknown = (torch.minimum(first, second) < 0).sum().item()
    if unknown:
        raise ValueError(
            f"the images of a pair must have identities, >= 0, but in {unknown} of {len(first)} "
            "pairs one is unknown: leave them out, or choose pairs with BatchPairs, which does"
        )
    return first == second


def pairs_by_identity(
    q_pids: Ids,
    g_pids: Ids,
    q_camids: Ids | None = None,
    g_camids: Ids | None = None,
    *,
    cross_camera: bool = True,
    junk_pids: Sequence[int] = (),
) -> tuple[Bool[Tensor, "queries galleries"], Bool[Tensor, "queries galleries"]]:
    """Returns which pairs show one identity, and which pairs count.

    The others are junk, or it is unknown whether they show one identity. The arguments are those
    of :func:`evaluate_rank`.

    Example:
        >>> same, counted = pairs_by_identity([7, -1], [7, 8], [0, 0], [0, 1])
        >>> same.tolist(), counted.tolist()
        ([[True, False], [False, False]], [[False, True], [False, False]])
    """
    q_pids, g_pids = as_ids("q_pids", q_pids), as_ids("g_pids", g_pids)
    q_camids = as_ids("q_camids", q_camids, len(q_pids))
    g_camids = as_ids("g_camids", g_camids, len(g_pids))
    known = (q_pids != UNKNOWN)[:, None] & (g_pids != UNKNOWN)
    same = known & (q_pids[:, None] == g_pids)
    own = (q_camids[:, None] == g_camids) & (g_camids != UNKNOWN) & bool(cross_camera)
    counted = known & ~np.isin(g_pids, as_ids("junk_pids", junk_pids)) & ~(same & own)
    return torch.from_numpy(same), torch.from_numpy(counted)


def have_match(
    q_pids: Ids,
    g_pids: Ids,
    q_camids: Ids | None = None,
    g_camids: Ids | None = None,
    *,
    cross_camera: bool = True,
    junk_pids: Sequence[int] = (),
) -> Bool[np.ndarray, "_"]:
    """Returns which queries have a match in the gallery; arguments as in ``evaluate_rank``.

    Example:
        >>> have_match([7, 8, -1], [7, 8, -1], [0, 0, 0], [1, 0, 1])
        array([ True, False, False])
    """
    q_pids, g_pids = as_ids("q_pids", q_pids), as_ids("g_pids", g_pids)
    q_camids = as_ids("q_camids", q_camids, len(q_pids))
    g_camids = as_ids("g_camids", g_camids, len(g_pids))
    cameras: dict[int, set[int]] = {}
    for pid, camid in zip(g_pids.tolist(), g_camids.tolist(), strict=True):
        if pid != UNKNOWN and pid not in junk_pids:
            cameras.setdefault(pid, set()).add(camid)
    return np.array(
        [
            bool(cameras.get(pid, set()) - ({camid} - {UNKNOWN} if cross_camera else set()))
            for pid, camid in zip(q_pids.tolist(), q_camids.tolist(), strict=True)
        ],
        dtype=bool,
    )
