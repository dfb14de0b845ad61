"""The rows of an index: its shards, memory-mapped, without the images that have been removed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from casn_plugin.encoding import Encoding
from casn_plugin.ranking.kept import Kept
from casn_plugin.ranking.manifest import Entry, Manifest
from casn_plugin.ranking.shards import Shard

Rows = (
    slice
    | Sequence[int]
    | Int[np.ndarray, " rows"]
    | Bool[np.ndarray, " rows"]
    | Int[Tensor, " rows"]
)
"""Some of the rows: a slice, a list of numbers, or a mask."""


class Contents:
    """What a manifest names, opened; it does not change.

    Args:
        folder: of the index.
        manifest: which shards, and which of their rows.
        verify: compare features and maps with their checksums when they are first asked for.
        opened: contents whose shards are open already: they are not read again.

    Attributes:
        manifest: the manifest.
        names: name of each image.
        pids: identity of each image, -1 where none was given.
        camids: camera of each image, -1 where none was given.

    Raises:
        FileNotFoundError, ValueError: as :meth:`Shard.read`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from casn_plugin.ranking.shards import Writer
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> before = Manifest(model="0" * 64, dtype=None)
        >>> with TemporaryDirectory() as name:
        ...     writer = Writer(Path(name), before)
        ...     writer.write(Kept.of(images, before), names=["a", "b", "c"])
        ...     after = before.of([], [shard.entry for shard in writer.written])
        ...     contents = Contents(Path(name), after, verify=True)
        ...     contents.names, contents.encoding([2, 0]).features.shape
        (['a', 'b', 'c'], torch.Size([2, 4]))
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, verify: bool, opened: "Contents | None" = None
    ) -> None:
        self.manifest, self._folder = manifest, folder
        self._opened: dict[str, Shard] = {}
        known = {} if opened is None else opened._opened
        nothing = np.empty(0, dtype=np.int64)
        names, pids, camids, rows, starts, start = [], [nothing], [nothing], [nothing], [], 0
        for entry in manifest.shards:
            shard = self._opened.get(entry.file) or known.get(entry.file)
            shard = shard or Shard.read(folder, entry, verify=verify)
            kept = entry.kept
            self._opened[entry.file] = shard
            names += [shard.names[row] for row in kept]
            pids.append(shard.pids[kept])
            camids.append(shard.camids[kept])
            rows.append(start + kept)
            starts.append(start)
            start += entry.rows
        self.names, self.pids, self.camids = names, np.concatenate(pids), np.concatenate(camids)
        self._starts, self._rows = np.array(starts, np.int64), np.concatenate(rows)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._rows)

    def encoding(self, rows: Rows) -> Encoding:
        """Returns the encoding of some of the images.

        Raises:
            IndexError: no such row.
            TypeError: no list of rows.
            ValueError: nothing has been added yet: maps have no size; only features are kept; or
                images are damaged.
        """
        if not self.manifest.maps:
            raise ValueError(
                f"the index in {self._folder} keeps no maps, its features alone (features_of): "
                "EncodedAgain(model, index, pictures) encodes its pictures again where maps are "
                "needed"
            )
        parts = [shard.encoding(local) for shard, local in self._runs(rows)]
        if not parts:
            return self._nothing().encoding(slice(None))
        return parts[0] if len(parts) == 1 else Encoding.cat(parts)

    def features(self, rows: Rows) -> Tensor:
        """Returns the features of some of the images; nothing of their maps is read.

        Raises:
            IndexError, TypeError, ValueError: as :meth:`encoding`.
        """
        parts = [shard.features(local) for shard, local in self._runs(rows)]
        if not parts:
            return self._nothing().features
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def verify(self) -> None:
        """Compares all images with their checksums, also those that were before.

        Raises:
            ValueError: they are damaged.
        """
        for shard, local in self._runs(slice(None)):
            shard.verify(local)

    def without(self, rows: Rows) -> list[Entry]:
        """Returns what a manifest says of the shards when some of the images are removed.

        Raises:
            IndexError, TypeError: as :meth:`encoding`.
        """
        physical, entries = self._physical(rows), []
        for entry, start in zip(self.manifest.shards, self._starts, strict=True):
            inside = physical[(physical >= start) & (physical < start + entry.rows)] - start
            removed = sorted({*entry.removed, *inside.tolist()})
            if len(removed) < entry.rows:
                entries.append(replace(entry, removed=removed))
        return entries

    def _nothing(self) -> Kept:
        """Returns no images."""
        if self.manifest.images is None:
            raise ValueError(f"the index in {self._folder} is empty")
        return Kept.none(self.manifest.images)

    def _runs(self, rows: Rows) -> Iterator[tuple[Shard, slice | Tensor]]:
        """Yields runs of rows that lie in one shard: the shard, and the rows in it."""
        physical = self._physical(rows)
        if not len(physical):
            return
        shards = np.searchsorted(self._starts, physical, "right") - 1
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(physical)]
        for start, stop in pairwise(edges):
            number = shards[start]
            local = physical[start:stop] - self._starts[number]
            neighbours = np.all(np.diff(local) == 1)
            yield (
                self._opened[self.manifest.shards[number].file],
                slice(int(local[0]), int(local[-1]) + 1) if neighbours else torch.from_numpy(local),
            )

    def _physical(self, rows: Rows) -> Int64[np.ndarray, " found"]:
        """Returns the numbers of rows among all that are in the shards, removed ones too."""
        return picked(self._rows, rows)


def picked(numbers: Int64[np.ndarray, " all"], rows: Rows) -> Int64[np.ndarray, " found"]:
    """Returns some of the numbers.

    Raises:
        IndexError: no such row.
        TypeError: no list of rows.

    Example:
        >>> picked(np.arange(4), [True, False, False, True])
        array([0, 3])
    """
    if not isinstance(rows, slice):
        given = rows.cpu() if isinstance(rows, Tensor) else rows
        rows = np.asarray(given)
        if rows.ndim != 1:
            raise TypeError(f"rows must be a slice, a list of numbers or a mask, got {given!r}")
        rows = rows if rows.size else rows.astype(np.int64)
    found: np.ndarray = np.ascontiguousarray(numbers[rows])
    return found
