"""Listed pairs: each query's nearest gallery images by features, and the distances of a list."""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int, Int64, Integer
from torch import Tensor

from casn_plugin.attention import attention_distance
from casn_plugin.doors import check_count, check_finite, check_tensor
from casn_plugin.ranking.pairs import Pairs

Candidates = Integer[Tensor, "queries listed"] | Integer[np.ndarray, "queries listed"]
"""Rows of a gallery, some for each query, -1 where there are fewer: what an engine has found."""

Allowed = Bool[Tensor, "queries galleries"] | Bool[np.ndarray, "queries galleries"]
"""Which gallery images each query may find."""

_BLOCK = 2**24  # similarities held at a time


class Compared(NamedTuple):
    """Listed pairs and their distances.

    Attributes:
        rows: their queries.
        columns: their gallery images.
        features: distances of their features.
        attention: attention distances.
    """

    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    features: Float[Tensor, " pairs"]
    attention: Float[Tensor, " pairs"]

    @classmethod
    def cat(cls, *parts: "Compared") -> "Compared":
        """Returns several lists of pairs, at least one, as one."""
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


def compare(
    pairs: Pairs,
    rows: Int[Tensor, " pairs"],
    columns: Int[Tensor, " pairs"],
    *,
    row_threshold: float,
    unit: bool,
    desc: str | None = None,
) -> Compared:
    """Returns the distances of listed pairs: of those that are of this process's share.

    Args:
        pairs: where they are from.
        rows: their queries.
        columns: their gallery images.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: features and aligned profiles are of unit length.
        desc: what a progress bar says.

    Example:
        >>> from casn_plugin import Encoding
        >>> model = torch.nn.Module()
        >>> model.pair_classifier = torch.nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> rows, columns = torch.tensor([0, 2]), torch.tensor([0, 1])
        >>> compare(Pairs(model, images, images), rows, columns, row_threshold=0.2, unit=True)[2][0]
        tensor(0.)
    """
    nothing = torch.empty(0, device=rows.device)
    found = [Compared(rows[:0], columns[:0], nothing, nothing)]
    for some in pairs.listed(rows, columns, unit=unit, desc=desc):
        attention = attention_distance(
            some.first, some.second, row_threshold=row_threshold, unit=unit
        )
        check_finite("attention distances", attention)
        found.append(Compared(some.rows, some.columns, some.features, attention))
    return Compared.cat(*found)


def nearest(
    pairs: Pairs, topk: int, *, unit: bool
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Returns the pairs of each query with its topk nearest gallery images by features.

    Of images at one distance those that come first, unless FAISS has found them.

    Args:
        pairs: of which queries and which gallery.
        topk: how many, at most as many as the gallery has.
        unit: compare features of unit length.

    Returns:
        Queries, and as many gallery images; those of a query stand together.

    Example:
        >>> from casn_plugin import Encoding
        >>> model = torch.nn.Module()
        >>> model.pair_classifier = torch.nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> nearest(Pairs(model, images, images), 1, unit=False)
        (tensor([0, 1, 2]), tensor([0, 1, 2]))
    """
    queries, galleries = pairs.shape
    topk, device = min(topk, galleries), pairs.device
    rows = torch.arange(queries, device=device)[:, None].expand(-1, topk).flatten()
    features = pairs.features(unit=unit)
    found = None if features is None else _nearest_by_faiss(*features, topk)
    if found is not None:
        return rows, found.flatten()
    distances = torch.full((queries, topk), torch.inf, dtype=torch.float64, device=device)
    columns = torch.full((queries, topk), -1, device=device)
    for some, block, new in pairs.feature_distances(unit=unit):
        numbers = torch.arange(block.start, block.stop, device=device).expand(len(new), -1)
        distances[some], columns[some] = _least(
            torch.cat([distances[some], new], 1), torch.cat([columns[some], numbers], 1), topk
        )
    distances, columns = pairs.join(distances, columns, dim=1)
    return rows, _least(distances, columns, topk)[1].flatten()


def _least(distances: Tensor, columns: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Returns the topk least distances of each row and their columns; the first where they tie."""
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :topk], columns.gather(1, order[:, :topk])


def _nearest_by_faiss(qf: Tensor, gf: Tensor, topk: int) -> Tensor | None:
    """Returns the nearest rows of gf of each row of qf by FAISS; None where it cannot be used."""
    faiss = _faiss_for(qf)
    if faiss is None:
        return None
    _, nearest = faiss.knn(qf.contiguous().numpy(), gf.contiguous().numpy(), topk)
    return torch.from_numpy(nearest)


def _faiss_for(features: Tensor) -> Any:
    """Returns FAISS, where it is installed and takes such features; else None."""
    if features.device.type != "cpu" or features.dtype != torch.float32:
        return None
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def feature_candidates(
    qf: Float[Tensor, "queries dim"],
    gf: Float[Tensor, "galleries dim"],
    number: int,
    *,
    allowed: Allowed | None = None,
) -> Int64[Tensor, "queries listed"]:
    """Returns each query's nearest gallery images by the cosine of features, nearest first.

    By FAISS where it is installed and features are float32 on the CPU; exact in either case. For
    ``rank_gallery(candidates=)``.

    Args:
        qf: features of the queries.
        gf: those of the gallery, such as ``index.features_of(slice(0, len(index)))``.
        number: how many, at most as many as the gallery has.
        allowed: which gallery images each query may find, such as those of other cameras,
            ``q_camids[:, None] != g_camids``. By default all.

    Returns:
        Rows of the gallery, -1 where fewer are allowed.

    Raises:
        TypeError: features that are no float tensors, `allowed` that is none of bool.
        ValueError: features of unlike sizes or that are NaN, `number` below 1, `allowed` of
            another shape.

    Example:
        >>> qf, gf = torch.eye(2), torch.tensor([[1.0, 0.1], [0.0, 2.0], [1.0, 0.0]])
        >>> feature_candidates(qf, gf, 2).tolist()
        [[2, 0], [1, 0]]
        >>> allowed = torch.arange(3) < torch.tensor([[2], [1]])
        >>> feature_candidates(qf, gf, 2, allowed=allowed).tolist()
        [[0, 1], [0, -1]]
    """
    for name, features in (("qf", qf), ("gf", gf)):
        check_finite(name, check_tensor(name, features, "images dim"))
    if qf.shape[1] != gf.shape[1]:
        raise ValueError(f"qf and gf must be of one size, got {qf.shape[1]} and {gf.shape[1]}")
    number, shape = min(check_count("number", number), max(1, len(gf))), (len(qf), len(gf))
    if allowed is not None:
        allowed = torch.as_tensor(allowed)
        if allowed.dtype != torch.bool or allowed.shape != shape:
            raise (TypeError if allowed.dtype != torch.bool else ValueError)(
                f"allowed must be of bool and of shape {shape}, got {allowed.dtype} of "
                f"{tuple(allowed.shape)}"
            )
    qf, gf = (F.normalize(each.detach(), dim=1) for each in (qf, gf))
    faiss = _faiss_for(qf) if len(gf) else None
    if faiss is not None and gf.device.type == "cpu" and gf.dtype == qf.dtype:
        return _candidates_by_faiss(faiss, qf, gf, number, allowed)
    found = torch.full((len(qf), number), -1)
    for rows in torch.arange(len(qf)).split(max(1, _BLOCK // max(1, len(gf)))):
        similarities = qf[rows] @ gf.to(qf.device, qf.dtype).T
        if allowed is not None:
            similarities.masked_fill_(~allowed[rows].to(qf.device), -torch.inf)
        some = similarities.sort(dim=1, descending=True, stable=True)
        columns = some.indices[:, :number].masked_fill(some.values[:, :number].isneginf(), -1)
        found[rows, : columns.shape[1]] = columns.cpu()
    return found


def _candidates_by_faiss(
    faiss: ModuleType, qf: Tensor, gf: Tensor, number: int, allowed: Tensor | None
) -> Tensor:
    """Returns what :func:`feature_candidates` does, of features of unit length."""
    flat = faiss.IndexFlatIP(qf.shape[1])
    flat.add(gf.contiguous().numpy())
    if allowed is None:
        return torch.from_numpy(flat.search(qf.contiguous().numpy(), number)[1])
    found = torch.full((len(qf), number), -1)
    for row, mask in enumerate(allowed.cpu().numpy()):
        chosen = faiss.SearchParameters(
            sel=faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        )
        query = qf[row : row + 1].contiguous().numpy()
        found[row] = torch.from_numpy(flat.search(query, number, params=chosen)[1][0])
    return found


def check_candidates(
    candidates: Any, queries: int, galleries: int
) -> Int64[Tensor, "queries listed"]:
    """Returns candidates that an engine has found, on the CPU.

    Args:
        candidates: a tensor or an array of integers.
        queries: so many rows it must have.
        galleries: so many images the gallery has.

    Raises:
        TypeError: no tensor or array of integers.
        ValueError: another number of queries, no candidate, a row that there is not, or the same
            row twice for one query.

    Example:
        >>> check_candidates(np.array([[2, 0], [1, -1]]), queries=2, galleries=3).tolist()
        [[2, 0], [1, -1]]
    """
    if isinstance(candidates, np.ndarray) and candidates.dtype.kind in "iu":
        candidates = torch.from_numpy(candidates.astype(np.int64))
    check_tensor("candidates", candidates, "queries listed", floating=False)
    if len(candidates) != queries or not candidates.shape[1]:
        raise ValueError(
            f"candidates must be of shape ({queries}, K), some for each query, got "
            f"{tuple(candidates.shape)}"
        )
    listed: Tensor = candidates.detach().cpu().long()
    if listed.numel() and not -1 <= int(listed.min()) <= int(listed.max()) < galleries:
        raise ValueError(
            f"candidates must be rows of a gallery of {galleries}, or -1 where there are fewer, "
            f"got {int(listed.min())} to {int(listed.max())}"
        )
    ordered = listed.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        query, place = twice[0].tolist()
        raise ValueError(
            f"candidates must name a row once for a query, but row {int(ordered[query, place])} "
            f"stands twice among those of query {query}"
        )
    return listed


def listed_pairs(
    candidates: Int64[Tensor, "queries listed"], device: torch.device | str
) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
    """Returns the pairs of queries and candidates: queries, and as many gallery images.

    Example:
        >>> listed_pairs(torch.tensor([[7, 2], [2, -1]]), "cpu")
        (tensor([0, 0, 1]), tensor([7, 2, 2]))
    """
    rows, places = (candidates >= 0).nonzero(as_tuple=True)
    return rows.to(device), candidates[rows, places].to(device)
