"""A gallery on disk: encoded once, searched by image, read block by block while it is ranked."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from tqdm import tqdm

from casn_plugin.doors import check_count
from casn_plugin.encoding import Encoding
from casn_plugin.hooks import unwrapped
from casn_plugin.loading import encode_images, read_batch
from casn_plugin.model import CASN
from casn_plugin.ranking.contents import Contents, Rows
from casn_plugin.ranking.distances import pair_attention
from casn_plugin.ranking.processes import Processes
from casn_plugin.ranking.search import Ranking, rank_gallery
from casn_plugin.ranking.shards import MANIFEST, Entry, Manifest, Numbers, Writer, dtype_name, tidy

_Labels = list[int] | None
_Batch = tuple[Encoding, list[str], _Labels, _Labels]
"""Encoded images, their names, pids and camids."""


@dataclass(frozen=True)
class SearchResult:
    """What :meth:`GalleryIndex.search` finds, for each query nearest first.

    Attributes:
        ranking: rows of the index and the distances.
        names: names of the images found.
        pids: their identities, -1 where none was given.
        camids: their cameras, -1 where none was given.
        query_attention: attention maps of the query in each pair, >= 0, unscaled.
        gallery_attention: attention maps of the image found in each pair.
    """

    ranking: Ranking
    names: list[list[str]]
    pids: Int64[np.ndarray, "queries topk"]
    camids: Int64[np.ndarray, "queries topk"]
    query_attention: Float[Tensor, "queries topk height width"]
    gallery_attention: Float[Tensor, "queries topk height width"]


class GalleryIndex:
    """A gallery of encoded images in a folder, memory-mapped: what is not looked at is not read.

    A folder of shards (safetensors) and a manifest, ``index.json``, which names those that count.
    Whatever interrupts a change, the folder holds either the old index or the new one. Files that
    a killed process leaves behind are deleted by the next change.

    Rows are numbered 0 ... ``len(index) - 1`` in the order of adding; removing closes the gaps.
    One process at a time may change an index. ``index[10:20]`` is the encoding of ten images,
    ``index[index.pids == 5]`` that of one person; an index goes wherever ranking takes a gallery.

    Args:
        folder: where :meth:`create` made it.
        verify: compare every byte with the checksums, which reads the whole index once.

    Attributes:
        folder: where it is.

    Raises:
        FileNotFoundError: no index in that folder, or one of its shards is missing.
        ValueError: a damaged file, or one that something else has written.

    Example:
        >>> model = CASN(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4)), input_size=(32, 16),
        ...              forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     index = GalleryIndex.create(folder, model)
        ...     index.add(model.encode(torch.rand(5, 3, 32, 16)), names=list("abcde"))
        ...     index.remove([1])
        ...     found = index.search(model, torch.rand(2, 3, 32, 16), topk=3)
        >>> len(index), found.ranking.indices.shape, found.query_attention.shape
        (4, torch.Size([2, 3]), torch.Size([2, 3, 8, 4]))
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self._contents = Contents(self.folder, Manifest.read(self.folder), verify=verify)

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], model: CASN, *, dtype: torch.dtype | None = None
    ) -> "GalleryIndex":
        """Returns a new, empty index for the images of one model.

        Args:
            folder: made if need be.
            model: the index is bound to its weights: maps of another model mean nothing here.
            dtype: maps are kept in it: torch.float16 halves the size, and rounds. By default
                that of the encodings.

        Raises:
            FileExistsError: there is an index in that folder already.
            TypeError: a dtype that is no float.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a float dtype, got {dtype}")
        path = Path(folder) / MANIFEST
        if path.exists():
            raise FileExistsError(f"{path} exists: open it with GalleryIndex({str(folder)!r})")
        path.parent.mkdir(parents=True, exist_ok=True)
        name = None if dtype is None else dtype_name(dtype)
        Manifest(_fingerprint(model), name).write(path.parent)
        return cls(folder)

    @property
    def names(self) -> list[str]:
        """Name of each image."""
        return self._contents.names

    @property
    def pids(self) -> Int64[np.ndarray, " images"]:
        """Identity of each image, -1 where none was given."""
        return self._contents.pids

    @property
    def camids(self) -> Int64[np.ndarray, " images"]:
        """Camera of each image, -1 where none was given."""
        return self._contents.camids

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._contents)

    def __getitem__(self, rows: Rows) -> Encoding:
        """Returns the encoding of some of the images: a slice, a list of rows, or a mask.

        Neighbours in one shard are views of the file, others are copied together.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index to which nothing has been added yet: its maps have no size.
        """
        return self._contents.encoding(rows)

    def features_of(self, rows: Rows) -> Float[Tensor, "images dim"]:
        """Returns the features of some of the images; nothing of their maps is read.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: as for ``index[rows]``.
        """
        return self._contents.features(rows)

    def add(
        self,
        encoding: Encoding,
        *,
        names: Sequence[str] | None = None,
        pids: Numbers | None = None,
        camids: Numbers | None = None,
    ) -> None:
        """Adds encoded images as one shard; best some thousands at a time.

        Args:
            encoding: the images, as ``model.encode`` gives them.
            names: their names; by default numbers in the order of adding, none used twice.
            pids: their identities.
            camids: their cameras.

        Raises:
            TypeError: pids or camids that are no integers.
            ValueError: lists of another length, an encoding of another kind, size or dtype than
                those before, maps too large for the index's dtype, or an index that another
                process has changed.
        """
        if names is None:
            start = self._contents.manifest.added
            names = [str(start + row) for row in range(len(encoding))]
        with Writer(self.folder, self._contents.manifest) as writer:
            writer.write(encoding, names, pids, camids)
            self._commit(self._contents.manifest.shards, writer.entries)

    def extend(
        self,
        model: CASN,
        loader: DataLoader[Any],
        *,
        shard_size: int = 1024,
        distributed: bool = False,
        progress: bool = False,
    ) -> None:
        """Encodes the images of a data loader and adds them; all or, after an exception, none.

        Args:
            model: the model that the index was created for.
            loader: gives batches of images, or torchreid's dictionaries of "img" and, where
                there are, "impath", "pid" and "camid".
            shard_size: images to a shard, about. One shard is held in memory.
            distributed: every process of ``torch.distributed``'s group calls this on one folder
                and encodes a share of the shards; the index is the same as one process makes.
                Batches are then taken in the order of the data set. An exception in one process
                is raised in all.
            progress: show a progress bar on a terminal.

        Raises:
            RuntimeError: another process of the group failed.
            TypeError: batches that hold no images.
            ValueError: another model, shard_size below 1, an index that another process has
                changed, `distributed` without a process group or with a loader that has no
                batch_size; as :meth:`add`.
        """
        check_count("shard_size", shard_size)
        processes, manifest = Processes(distributed), self._contents.manifest
        with Writer(self.folder, manifest) as writer, processes.together():
            self._check_model(model)
            self._check_unchanged()
            per_shard = -(-shard_size // (loader.batch_size or 1))
            share, starts = _share(loader, per_shard, processes) if distributed else (loader, None)
            batches = tqdm(share, desc="Encoding", leave=False, disable=None if progress else True)
            encoded = _encoded(model, batches, starts, manifest.added)
            for shard in _in_shards(encoded, shard_size, per_shard):
                writer.write(*shard)
            every = processes.gather((manifest, writer.entries))
            if any(other != manifest for other, _ in every):
                raise ValueError(f"not all processes have opened the same {self.folder}")
            if processes.rank == 0:
                self._commit(manifest.shards, [entry for _, new in every for entry in new])
        if processes.rank:
            self._contents = self._open(Manifest.read(self.folder))

    def remove(self, rows: Rows) -> None:
        """Removes images by their rows, or by a mask: ``index.remove(index.pids == -1)``.

        A shard of which nothing is left is deleted; the others keep their size.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index that another process has changed.
        """
        self._commit(self._contents.without(rows))

    def search(
        self,
        model: CASN,
        query: Float[Tensor, "queries 3 rows columns"] | Encoding,
        *,
        topk: int = 10,
        **options: Any,
    ) -> SearchResult:
        """Returns the topk nearest images of each query by fused distance, with attention maps.

        Args:
            model: the model that the index was created for.
            query: normalised images, or their encoding.
            topk: images to find for each query.
            **options: those of :func:`~casn_plugin.ranking.rank_gallery`.

        Raises:
            ValueError: another model, an empty index, or what ``rank_gallery`` rejects.
        """
        self._check_model(model)
        if isinstance(query, Tensor):
            query = encode_images(model, query)
        ranking = rank_gallery(model, query, self, topk=topk, **options)
        rows = ranking.indices.cpu().numpy()
        maps = torch.empty(2, *rows.shape, *query.maps.shape[2:], dtype=query.features.dtype)
        for i, some in enumerate(rows):
            same = query[torch.full((len(some),), i)]
            maps[:, i] = torch.stack(pair_attention(model, same, self[some]))
        names = [[self.names[row] for row in some] for some in rows]
        return SearchResult(ranking, names, self.pids[rows], self.camids[rows], maps[0], maps[1])

    def _check_model(self, model: CASN) -> None:
        if _fingerprint(model) != self._contents.manifest.model:
            raise ValueError(
                f"the index in {self.folder} was created for a model with other weights: its maps "
                "mean nothing to this one"
            )

    def _check_unchanged(self) -> None:
        if Manifest.read(self.folder) != self._contents.manifest:
            raise ValueError(
                f"the index in {self.folder} has been changed by another process: open it anew"
            )

    def _open(self, manifest: Manifest) -> Contents:
        """Returns other contents; shards that are open already are not read again."""
        return Contents(self.folder, manifest, verify=False, opened=self._contents)

    def _commit(self, kept: Sequence[Entry], new: Sequence[Entry] = ()) -> None:
        """Writes a manifest of other shards, if no one else has done so, and takes it over.

        Then deletes the shards that it does not name, and what a killed process left.
        """
        self._check_unchanged()
        manifest = self._contents.manifest.of(kept, new)
        contents = self._open(manifest)
        manifest.write(self.folder)
        self._contents = contents
        tidy(self.folder, manifest)


def _encoded(
    model: CASN, batches: Iterable[Any], starts: list[int] | None, added: int
) -> Iterator[_Batch]:
    """Yields the encodings of batches; images without a name are numbered in the order of adding.

    Those of batch i from added + starts[i], or, without starts, from where the one before ended.
    """
    count = 0
    for i, data in enumerate(batches):
        imgs, names, pids, camids = read_batch(data)
        start = added + (count if starts is None else starts[i])
        names = names or [str(start + row) for row in range(len(imgs))]
        yield encode_images(model, imgs), names, pids, camids
        count += len(imgs)


def _in_shards(batches: Iterable[_Batch], shard_size: int, per_shard: int) -> Iterator[_Batch]:
    """Yields batches joined to shards: per_shard of them, or shard_size images, to each."""
    held: list[_Batch] = []
    for batch in batches:
        held.append(batch)
        if len(held) == per_shard or sum(len(names) for _, names, *_ in held) >= shard_size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(batches: list[_Batch]) -> _Batch:
    """Returns several batches as one, without pids or camids that are not there for all."""
    encodings, names, *labels = zip(*batches, strict=True)
    pids, camids = (None if None in each else list(chain(*each)) for each in labels)
    return Encoding.cat(encodings), list(chain(*names)), pids, camids


def _share(
    loader: DataLoader[Any], per_shard: int, processes: Processes
) -> tuple[DataLoader[Any], list[int]]:
    """Returns one process's share of a loader, and the first row of each of its batches."""
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "distributed encoding needs a loader with a batch_size, of a data set with a length"
        )
    rows = range(len(loader.dataset))  # type: ignore[arg-type]
    batches = list(BatchSampler(rows, loader.batch_size, loader.drop_last))
    shards = [batches[start : start + per_shard] for start in range(0, len(batches), per_shard)]
    own = list(chain(*processes.share(shards)))
    share: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=own,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
    return share, [batch[0] for batch in own]


def _fingerprint(model: nn.Module) -> str:
    """Returns a checksum of all weights of a model."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model).state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()
