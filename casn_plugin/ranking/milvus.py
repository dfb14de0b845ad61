"""An index's features in Milvus: candidates for what outgrows one process, by any filter.

The engine holds unit-length features and what is known of the images; an index holds their
attention. pymilvus is imported when a collection is opened (``pip install 'casn-plugin[milvus]'``).
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from casn_plugin.doors import check_count, check_finite, check_kind, check_lengths, check_tensor
from casn_plugin.identities import UNKNOWN, Ids, as_ids
from casn_plugin.ranking.connection import connect, disconnect, quiet
from casn_plugin.ranking.index import GalleryIndex
from casn_plugin.ranking.manifest import Manifest

_OWN = ("key", "features", "name", "pid", "camid")
_MOST = 16384  # of Milvus: rows of an answer
_LONGEST = 65535  # of Milvus: bytes of a text
_MESSAGE = 2**24  # bytes sent at a time


class Updated(NamedTuple):
    """What :meth:`MilvusFeatures.update` has done.

    Attributes:
        added: number of images that were new.
        removed: number of images that the index no longer has, or of which other is known.
    """

    added: int
    removed: int


class MilvusFeatures:
    """The features of a gallery index in a collection of Milvus, with which it finds candidates.

    A file of milvus-lite in this process by default; a server or a cluster by its address. The
    collection is the index's alone: its name ends in the checksum of the index's model, and each
    image's key is that of its shard and its place there, so an image that is encoded anew is
    another one. Before the first answer, and after every change of the index, all keys are
    compared: a collection that does not hold what the index holds is an error.

    Args:
        index: the gallery, not empty.
        uri: a path that ends in ".db", for milvus-lite; or an address such as
            "http://localhost:19530".
        token: of a server that asks for one.
        collection: how the name of the collection begins: letters, digits and "_".
        index_type: how Milvus searches, of a new collection: "AUTOINDEX" is its own choice, and
            approximate for many images; "FLAT" is exact.

    Attributes:
        collection: the name of the collection.
        client: ``pymilvus.MilvusClient``, for all else that Milvus does.

    Raises:
        ImportError: pymilvus or milvus-lite is not installed.
        OSError: a file or an address that can't be opened: of a file, one process at a time.
        TypeError: no index, or a `uri` or `collection` that is no text.
        ValueError: an empty index, another kind of path or of name.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from casn_plugin import CASN
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 8))
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> imgs = torch.rand(4, 3, 32, 16)
        >>> with TemporaryDirectory() as folder:
        ...     index = GalleryIndex.create(f"{folder}/index", model)
        ...     index.add(model.encode(imgs), camids=[0, 0, 1, 1])
        ...     with MilvusFeatures(index, f"{folder}/features.db") as features:
        ...         _ = features.update()
        ...         rows = features.candidates(index.features_of([0]), 3, filter="camid != 0")
        ...     found = index.search(model, imgs[:1], candidates=rows)
        >>> sorted(rows[0].tolist())
        [-1, 2, 3]
    """

    def __init__(
        self,
        index: GalleryIndex,
        uri: str | os.PathLike[str] = "casn_features.db",
        *,
        token: str = "",
        collection: str = "casn_features",
        index_type: str = "AUTOINDEX",
    ) -> None:
        self._index = check_kind("index", index, GalleryIndex)
        if not len(index):
            raise ValueError(f"the index in {index.folder} is empty")
        if not re.fullmatch(
            "[A-Za-z_][A-Za-z0-9_]{0,100}", check_kind("collection", collection, str)
        ):
            raise ValueError(f"collection must be letters, digits and '_', got {collection!r}")
        self.collection = f"{collection}_{index.manifest.model[:24]}"
        self._index_type = check_kind("index_type", index_type, str)
        self._uri = os.fspath(check_kind("uri", uri, str, os.PathLike))
        self.client = connect(self._uri, token)
        self._closed = False
        if self.client.has_collection(self.collection):
            self.client.load_collection(self.collection)  # as opening a file does not
        self._same: Manifest | None = None  # that of the index when all keys were compared

    def __enter__(self) -> "MilvusFeatures":
        """Returns itself."""
        return self

    def __exit__(self, *args: object) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Lets go of the connection, and of a file, which other processes may open then."""
        if self._closed:
            return
        self._closed = True
        disconnect(self.client, self._uri)

    def drop(self) -> None:
        """Deletes the collection."""
        self._same = None
        self.client.drop_collection(self.collection)

    def __len__(self) -> int:
        """Returns the number of images in the collection."""
        if not self.client.has_collection(self.collection):
            return 0
        (row,) = self.client.query(self.collection, filter="", output_fields=["count(*)"])
        return int(row["count(*)"])

    def update(
        self, fields: Mapping[str, Sequence[Any]] | None = None, *, progress: bool = False
    ) -> Updated:
        """Brings the collection up to date with the index: what is new, gone or known otherwise.

        Names, pids and camids are those of the index. All keys are held in memory.

        Args:
            fields: what else filters may ask for, by its name, one value an image of the index:
                numbers, text, bool, or None where it is not known. Fields of earlier updates that
                are not given are forgotten.
            progress: show a progress bar on a terminal.

        Raises:
            TypeError: a value of another kind.
            ValueError: values that are not one an image, NaN, a name that Milvus can't have.
        """
        about = _known(self._index, {} if fields is None else fields)
        keys = [
            f"{key}-{hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()[:8]}"
            for key, each in zip(_Keys(self._index.manifest).every(), about, strict=True)
        ]
        manifest = self._index.manifest
        self._create()
        there = set(self._stored())
        gone = sorted(there.difference(keys))
        for start in range(0, len(gone), _MOST):
            self.client.delete(self.collection, ids=gone[start : start + _MOST])
        new = np.array([row for row, key in enumerate(keys) if key not in there], np.int64)
        bar = tqdm(
            total=len(new), desc="Features to Milvus", unit="img", leave=False,
            disable=None if progress else True,
        )  # fmt: skip
        with bar:
            for rows in np.array_split(new, -(-len(new) // self._at_a_time)) if len(new) else ():
                features = _unit(self._index.features_of(rows))
                self.client.upsert(self.collection, [
                    {"key": keys[row], "features": vector, **about[row]}
                    for row, vector in zip(rows.tolist(), features, strict=True)
                ])  # fmt: skip
                bar.update(len(rows))
        self._same = manifest
        return Updated(len(new), len(gone))

    def candidates(
        self,
        query: Float[Tensor, "queries dim"],
        number: int,
        *,
        filter: str | Sequence[str] = "",
    ) -> Int64[np.ndarray, "queries listed"]:
        """Returns each query's nearest images by the cosine of features, nearest first.

        Args:
            query: features of the queries, such as ``model.encode(imgs).features``.
            number: how many, at most 16,384.
            filter: which images Milvus may find: an expression of its own (``"camid != 3 and time
                > 100"``) of name, pid, camid and the fields that :meth:`update` was given; or one
                for each query (:func:`other_cameras`). "" lets all pass.

        Returns:
            Rows of the index, -1 where fewer pass, as ``index.search(candidates=)`` takes them.

        Raises:
            TypeError: features that are no float tensor, a filter that is no text.
            ValueError: features of another size or NaN, another number of filters, one that
                Milvus refuses; a collection that does not hold what the index holds.
        """
        check_finite("query", check_tensor("query", query, f"queries {self._dim}"))
        check_count("number", number, most=_MOST)
        filters = [filter] * len(query) if isinstance(filter, str) else list(filter)
        if len(filters) != len(query):
            raise ValueError(f"expected {len(query)} filters, one a query, got {len(filters)}")
        for each in filters:
            check_kind("filter", each, str)
        self._compare()
        keys = _Keys(self._index.manifest)
        vectors, found = _unit(query), np.full((len(query), number), -1, np.int64)
        at_once = max(1, min(self._at_a_time, 2**18 // number))
        for one in dict.fromkeys(filters):
            rows = [row for row, each in enumerate(filters) if each == one]
            for start in range(0, len(rows), at_once):
                some = rows[start : start + at_once]
                for row, hits in zip(
                    some, self._search([vectors[i] for i in some], number, one), strict=True
                ):
                    found[row, : len(hits)] = keys.rows(hits)
        if bool((found < -1).any()):
            raise self._other("holds images that the index does not have")
        return found

    @property
    def _dim(self) -> int:
        images = self._index.manifest.images
        return 0 if images is None else int(images["features"][1])

    @property
    def _at_a_time(self) -> int:
        """So many vectors are sent at a time."""
        return max(1, _MESSAGE // (8 * self._dim))

    def _create(self) -> None:
        """Makes the collection, where there is none."""
        from pymilvus import DataType

        if self.client.has_collection(self.collection):
            return
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("key", DataType.VARCHAR, max_length=128, is_primary=True)
        schema.add_field("features", DataType.FLOAT_VECTOR, dim=self._dim)
        schema.add_field("name", DataType.VARCHAR, max_length=_LONGEST)
        schema.add_field("pid", DataType.INT64)
        schema.add_field("camid", DataType.INT64)
        by = self.client.prepare_index_params()
        by.add_index("features", index_type=self._index_type, metric_type="IP")
        self.client.create_collection(
            self.collection, schema=schema, index_params=by, consistency_level="Strong"
        )

    def _stored(self) -> Iterator[str]:
        """Yields the keys of the collection."""
        if not self.client.has_collection(self.collection):
            return
        with quiet():
            batches = self.client.query_iterator(
                self.collection, batch_size=_MOST, filter="", output_fields=["key"]
            )
            while batch := batches.next():
                yield from (each["key"] for each in batch)
            batches.close()

    def _compare(self) -> None:
        """Raises ValueError where the collection does not hold what the index holds."""
        manifest = self._index.manifest
        if self._same is manifest:
            return
        there = [key.rpartition("-")[0] for key in self._stored()]
        missing = len(set(_Keys(manifest).every()).difference(there))
        strangers = len(there) - (len(self._index) - missing)
        if missing or strangers:
            raise self._other(
                f"lacks {missing} of the index's {len(self._index)} images and holds {strangers} "
                "others"
            )
        self._same = manifest

    def _other(self, how: str) -> ValueError:
        return ValueError(
            f"the collection {self.collection} {how}: call update(), or open the index in "
            f"{self._index.folder} anew"
        )

    def _search(self, vectors: list[Any], number: int, one: str) -> list[list[str]]:
        """Returns the keys that are found for each query."""
        from pymilvus import MilvusException

        try:
            with quiet():
                found = self.client.search(
                    self.collection, data=vectors, limit=number, filter=one, output_fields=["key"]
                )
        except MilvusException as error:
            if not one:
                raise
            raise ValueError(f"Milvus can't search with filter {one!r}: {error.message}") from error
        return [[hit["entity"]["key"] for hit in hits] for hits in found]


def other_cameras(camids: Ids) -> list[str]:
    """Returns filters that leave out each query's own camera; none where that is unknown.

    Args:
        camids: of the queries.

    Raises:
        TypeError: camids that are no integers.
        ValueError: camids below -1.

    Example:
        >>> other_cameras([3, None])
        ['camid != 3', '']
    """
    known = as_ids("camids", camids).tolist()
    return ["" if camid == UNKNOWN else f"camid != {camid}" for camid in known]


class _Keys:
    """The keys of a manifest's images, which say where each is, and the rows that they have."""

    def __init__(self, manifest: Manifest) -> None:
        self._rows: dict[str, np.ndarray] = {}  # of each shard: the index's row of each image
        self._shards, start = [], 0
        for entry in manifest.shards:
            kept = entry.kept
            rows = self._rows.setdefault(entry.file, np.full(entry.rows, -2))
            rows[kept] = np.arange(start, start + len(kept))
            self._shards.append((entry.file, kept))
            start += len(kept)

    def every(self) -> Iterator[str]:
        """Yields the key of each image, in the order of rows."""
        for file, kept in self._shards:
            yield from (f"{file.partition('.')[0]}-{row}" for row in kept.tolist())

    def rows(self, keys: Iterable[str]) -> list[int]:
        """Returns the row of each key; -2 of an image that the index does not have."""
        return [self._row(*key.split("-")[:2]) for key in keys]

    def _row(self, shard: str, place: str) -> int:
        rows = self._rows.get(f"{shard}.safetensors")
        return -2 if rows is None or int(place) >= len(rows) else int(rows[int(place)])


def _known(index: GalleryIndex, fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns what is known of each image: its name, pid, camid and other fields.

    Raises:
        TypeError, ValueError: as :meth:`MilvusFeatures.update`.
    """
    for name, values in check_kind("fields", fields, Mapping).items():
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,254}", check_kind("a field", name, str)):
            raise ValueError(f"a field must be letters, digits and '_', got {name!r}")
        if name in _OWN:
            raise ValueError(f"{name!r} is the index's own: other fields have other names")
        check_lengths(**{"images of the index": index.names, name: values})
    names = [each.encode("utf-8", "backslashreplace").decode() for each in index.names]
    known: list[dict[str, Any]] = [
        {"name": name, "pid": pid, "camid": camid}
        for name, pid, camid in zip(names, index.pids.tolist(), index.camids.tolist(), strict=True)
    ]
    for name, values in fields.items():
        for image, value in zip(known, values, strict=True):
            value = value.item() if isinstance(value, np.generic | Tensor) else value
            if value is None:
                continue
            check_kind(f"{name} of {image['name']!r}", value, int, float, str, bool)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} of {image['name']!r} must be finite, got {value}")
            image[name] = value
    return known


def _unit(features: Float[Tensor, "images dim"]) -> Float[np.ndarray, "images dim"]:
    """Returns features of unit length, as Milvus takes them."""
    return np.asarray(F.normalize(features.detach().cpu().to(torch.float32), dim=1))
