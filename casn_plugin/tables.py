"""Rankings and features as tables, for pandas, CSV, JSON and Parquet; columns keep their names."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from casn_plugin.doors import check_lengths, check_names, check_weight
from casn_plugin.encoding import Encodings
from casn_plugin.files import replacing
from casn_plugin.identities import as_ids
from casn_plugin.packages import needed
from casn_plugin.ranked import RankedLists
from casn_plugin.ranking import GalleryIndex, Ranking, Reranked, SearchResult

RANKING_COLUMNS = (
    "query", "query_name", "query_pid", "query_camid", "rank", "gallery", "name", "pid", "camid",
    "distance", "feature_distance", "attention_distance", "probability", "similarity", "passes",
    "right", "feature_rank",
)  # fmt: skip
"""The columns of rankings in their order; those of which nothing is known are left out."""

FEATURE_COLUMNS = ("image", "name", "pid", "camid", "features")
"""The columns of features in their order; those of which nothing is known are left out."""


class Labels(NamedTuple):
    """What is known of images; None where nothing is.

    Attributes:
        names: their names.
        pids: their identities, -1 or None where unknown.
        camids: their cameras, likewise.
    """

    names: Sequence[str] | None = None
    pids: Any = None
    camids: Any = None


@dataclass(frozen=True)
class Table:
    """A table: columns of one length, by name.

    Attributes:
        columns: arrays of one dimension, or of two where a cell is a vector.

    Example:
        >>> list(Table({"image": np.arange(2), "name": np.array(["a", "b"])}).rows())
        [{'image': 0, 'name': 'a'}, {'image': 1, 'name': 'b'}]
    """

    columns: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        """Raises ValueError for columns of unlike lengths."""
        check_lengths(**self.columns)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return check_lengths(**self.columns)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields each row by column, of Python's own kinds: integers, floats, strings, lists."""
        for row in range(len(self)):
            yield {name: values[row].tolist() for name, values in self.columns.items()}

    def pandas(self) -> Any:
        """Returns a ``pandas.DataFrame``; vectors are NumPy arrays in its cells.

        Of a file name that is no UTF-8, the bytes are written with backslashes.

        Raises:
            ImportError: pandas is not installed.
        """
        with needed("tables"):
            import pandas
        return pandas.DataFrame({
            name: values if values.ndim == 1 else [*values]
            for name, values in self._in_utf8().items()
        })  # fmt: skip

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, whole or not at all; one that is there is replaced.

        Args:
            path: ends in ".jsonl" (JSON lines: an object a row), ".json" (an array of them),
                ".csv" (with a header) or ".parquet" (vectors are lists of a fixed size). Text is
                UTF-8; of a file name that is none, the bytes are written with backslashes.

        Raises:
            ImportError: a Parquet file, and pyarrow is not installed.
            OSError: a file that can't be written.
            ValueError: another ending, or vectors in CSV.
        """
        suffix = Path(path).suffix
        if suffix in _TEXT:
            if suffix == ".csv" and any(values.ndim > 1 for values in self.columns.values()):
                raise ValueError("CSV has no vectors: write them as .jsonl or .parquet")
            how: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
            with replacing(path) as place, place.open("w", **how) as file:
                _TEXT[suffix](file, self)
        elif suffix == ".parquet":
            with needed("tables"):
                import pyarrow
                from pyarrow import parquet
            table = pyarrow.table({
                name: values if values.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(
                    values.ravel(), values.shape[1]
                )
                for name, values in self._in_utf8().items()
            })  # fmt: skip
            with replacing(path) as place:
                parquet.write_table(table, place)
        else:
            endings = f"{', '.join(_TEXT)} or .parquet"
            raise ValueError(f"path must end in {endings}, got {os.fspath(path)!r}")

    def _in_utf8(self) -> dict[str, np.ndarray]:
        """Returns the columns, text as it is written."""
        columns = dict(self.columns)
        for name, values in columns.items():
            if values.dtype.kind == "U":
                texts = [str(each).encode("utf-8", "backslashreplace").decode() for each in values]
                columns[name] = np.array(texts, dtype=str)
        return columns


def _write_jsonl(file: TextIO, table: Table) -> None:
    """Writes an object a row."""
    for row in table.rows():
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _write_json(file: TextIO, table: Table) -> None:
    """Writes an array of objects, one a line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in table.rows())
    file.write("[" + ",\n".join(lines) + "]\n")


def _write_csv(file: TextIO, table: Table) -> None:
    """Writes a header and the rows."""
    writer = csv.DictWriter(file, list(table.columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows())


_TEXT: dict[str, Callable[[TextIO, Table], None]] = {
    ".jsonl": _write_jsonl, ".json": _write_json, ".csv": _write_csv,
}  # fmt: skip


def ranking_table(
    found: Ranking | SearchResult | Reranked | RankedLists,
    *,
    queries: Labels | GalleryIndex | None = None,
    gallery: Labels | GalleryIndex | None = None,
    threshold: float | None = None,
) -> Table:
    """Returns a ranking as a table: a row for each query and each of its matches, in their order.

    Columns are those of :data:`RANKING_COLUMNS` of which something is known: `query` and `gallery`
    are row numbers from 0, `rank` counts from 1, unknown pids and camids are -1.

    Args:
        found: what :func:`casn_plugin.rank_gallery`, ``GalleryIndex.search``,
            :func:`casn_plugin.rerank_neighbours` or an evaluation (``engine.ranked``) has found.
        queries: names, pids and camids of the queries.
        gallery: those of the gallery, or the index that was searched; a search knows its own.
        threshold: distances up to it pass (:func:`casn_plugin.calibrate`): column `passes`.

    Raises:
        TypeError: something else than a ranking, names that are no list of text or paths, pids or
            camids that are no integers.
        ValueError: labels of another number of images, a threshold that is negative or not finite,
            or one for an evaluation's lists, which hold no distances.

    Example:
        >>> found = Reranked(torch.tensor([[2, 0]]), torch.tensor([[0.25, 0.5]]))
        >>> for row in ranking_table(found, gallery=Labels(names=["a", "b", "c"])).rows():
        ...     print(row)
        {'query': 0, 'rank': 1, 'gallery': 2, 'name': 'c', 'distance': 0.25}
        {'query': 0, 'rank': 2, 'gallery': 0, 'name': 'a', 'distance': 0.5}
    """
    cells: dict[str, Any] = {}  # of (query, rank)
    if isinstance(found, SearchResult):
        topk, said = found.pids.shape[1], found.probabilities
        names = [[*some, *[""] * (topk - len(some))] for some in found.names]
        cells |= {
            "name": np.array(names, dtype=str).reshape(found.pids.shape),
            "pid": found.pids,
            "camid": found.camids,
            "similarity" if said is None else "probability": _array(
                found.scores if said is None else said
            ),
        }
        found = found.ranking
    if isinstance(found, RankedLists):
        if threshold is not None:
            raise ValueError("a threshold needs distances, and an evaluation's lists hold none")
        cells |= {"right": found.right, "feature_rank": found.feature_ranks}
        indices = found.nearest
    elif isinstance(found, Ranking | Reranked):
        indices = _array(found.indices)
        cells["distance"] = _array(found.distances)
        if threshold is not None:
            cells["passes"] = cells["distance"] <= check_weight("threshold", threshold)
        if isinstance(found, Ranking):
            cells["feature_distance"] = _array(found.feature_distances)
            cells["attention_distance"] = _array(found.attention_distances)
    else:
        raise TypeError(
            "found must be a Ranking, a SearchResult, a Reranked or RankedLists, got "
            f"{type(found).__name__}"
        )
    query, place = (indices >= 0).nonzero()  # -1: no more
    columns: dict[str, Any] = {name: values[query, place] for name, values in cells.items()}
    columns |= {"query": query, "rank": place + 1, "gallery": indices[query, place]}
    of_queries = _labels("queries", queries, len(indices))
    columns |= {f"query_{name}": values[query] for name, values in of_queries.items()}
    least = int(columns["gallery"].max(initial=-1)) + 1
    for name, values in _labels("gallery", gallery, None, least).items():
        columns.setdefault(name, values[columns["gallery"]])
    return Table({name: columns[name] for name in RANKING_COLUMNS if name in columns})


def feature_table(images: Encodings, labels: Labels | GalleryIndex | None = None) -> Table:
    """Returns the features of images as a table, a row an image.

    Columns are those of :data:`FEATURE_COLUMNS` of which something is known: `image` is the row
    number from 0, `features` a vector.

    Args:
        images: an encoding or an index, of which only the features are read.
        labels: names, pids and camids of the images; an index knows its own.

    Raises:
        TypeError: images that are neither, names that are no list of text or paths, pids or
            camids that are no integers.
        ValueError: labels of another number of images, or features that are not finite.

    Example:
        >>> from casn_plugin import Encoding
        >>> images = Encoding(torch.ones(1, 2), basis=torch.rand(1, 2, 6, 3))
        >>> list(feature_table(images, Labels(pids=[7])).rows())
        [{'image': 0, 'pid': 7, 'features': [1.0, 1.0]}]
    """
    if not isinstance(images, Encodings):
        raise TypeError(f"images must be an Encoding or an index, got {type(images).__name__}")
    features = images.features_of(slice(0, len(images)))
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, and some are not")
    own = images if isinstance(images, GalleryIndex) else None
    columns = {"image": np.arange(len(images)), "features": _array(features)}
    columns |= _labels("labels", labels or own, len(images))
    return Table({name: columns[name] for name in FEATURE_COLUMNS if name in columns})


def _array(values: Tensor) -> np.ndarray:
    """Returns values as an array, in float32 where NumPy lacks their dtype."""
    values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values.detach().cpu())


def _labels(
    what: str, labels: Labels | GalleryIndex | None, length: int | None, least: int = 0
) -> dict[str, np.ndarray]:
    """Returns what labels know, by column: of so many images, or at least of so many."""
    if labels is None:
        return {}
    found: dict[str, np.ndarray] = {}
    if labels.names is not None:
        found["name"] = np.array(check_names(f"names of {what}", labels.names), dtype=str)
    for column, ids in (("pid", labels.pids), ("camid", labels.camids)):
        if ids is not None:
            found[column] = as_ids(f"{column}s of {what}", ids)
    for column, values in found.items():
        if len(values) < least or length not in (None, len(values)):
            raise ValueError(
                f"{column}s of {what} must be {'at least ' if length is None else ''}"
                f"{least if length is None else length}, one an image, got {len(values)}"
            )
    return found
