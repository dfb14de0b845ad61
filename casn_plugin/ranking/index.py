"""A gallery on disk: encoded once, searched by image, read block by block while it is ranked."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin.doors import check_choice, check_count, check_flag, check_kind, check_names
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evidence import evidence_of
from casn_plugin.identities import Ids
from casn_plugin.loading import encode_images
from casn_plugin.model import CASN
from casn_plugin.processes import Processes
from casn_plugin.ranking.company import aside, locked
from casn_plugin.ranking.contents import Rows
from casn_plugin.ranking.distances import pair_attention, pair_scores
from casn_plugin.ranking.filling import encoded, in_shards, share
from casn_plugin.ranking.fingerprint import fingerprint
from casn_plugin.ranking.kept import Kept
from casn_plugin.ranking.manifest import DTYPES, EIGHT_BITS, MANIFEST, Manifest, dtype_name
from casn_plugin.ranking.pairs import pair_classifier_of
from casn_plugin.ranking.search import SearchResult, rank_gallery
from casn_plugin.ranking.shards import Writer
from casn_plugin.ranking.store import Store

Duplicates = Literal["refuse", "skip"]
"""What becomes of images whose name is taken."""


class GalleryIndex:
    """A gallery of encoded images in a folder, memory-mapped: what is not looked at is not read.

    A folder of shards (safetensors) and a manifest, ``index.json``, which names those that count.
    Whatever interrupts a change, the folder holds either the old index or the new one. Files that
    a killed process leaves behind are deleted by the next change.

    Rows are numbered 0 ... ``len(index) - 1`` in the order of adding; removing closes the gaps.
    ``index[10:20]`` is the encoding of ten images, ``index[index.pids == 5]`` that of one person;
    an index goes wherever ranking takes a gallery.

    Nothing is used before its checksum has been compared: names and labels, and the sizes of all
    files, when the index is opened; the features and the maps of an image when they are first asked
    for. So opening reads some hundred bytes an image, and :meth:`verify` all of them.

    Several processes may change an index: one at a time, behind a lock. What one has opened stays
    as it is while others change the folder; adding takes their changes in, and adds to them.
    Removing is refused then, as rows may have other numbers. Reading needs no lock.

    Args:
        folder: where :meth:`create` made it.
        verify: compare features and maps with their checksums. False: trust the files, where
            another process has compared them just before.
        timeout: a change waits so many seconds for that of another process, >= 0.

    Attributes:
        folder: where it is.

    Raises:
        FileNotFoundError: no index in that folder, or one of its shards is missing.
        ValueError: a damaged file, or one that something else has written; a negative timeout. All
            that reads images raises it too, where theirs are damaged.

    Example:
        >>> from torch import nn
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

    def __init__(
        self, folder: str | os.PathLike[str], *, verify: bool = True, timeout: float = 60.0
    ) -> None:
        self.folder = Path(folder)
        self._store = Store(self.folder, verify=verify, timeout=timeout)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        model: CASN,
        *,
        dtype: torch.dtype | None = None,
        maps: bool = True,
    ) -> "GalleryIndex":
        """Returns a new, empty index for the images of one model.

        Args:
            folder: made if need be.
            model: the index is bound to its weights, and to its evidence, pair classifier or
                similarity: maps of another model mean nothing here.
            dtype: maps are kept in it, rounded: torch.float16 halves the size of float32, and
                torch.int8, with a scale for each channel of each image, quarters it. By default
                that of the encodings. An image whose maps would lose their digits is refused.
            maps: False: only features are kept, 8 KB for 2,048 of them in place of a megabyte. An
                :class:`EncodedAgain` encodes pictures again where their maps are needed.

        Raises:
            FileExistsError: there is an index in that folder already.
            TimeoutError: another process is making one.
            TypeError: a dtype that is neither a float of 16 bits or more nor torch.int8.
            ValueError: a dtype of maps that are not kept.
        """
        maps = check_flag("maps", maps)
        name = None if dtype is None else dtype_name(dtype)
        if name not in (None, *DTYPES, EIGHT_BITS):
            raise TypeError(f"dtype must be a float dtype or torch.int8, got {dtype}")
        if name is not None and not maps:
            raise ValueError(f"dtype is that of maps, and maps=False keeps none, got {dtype}")
        path, manifest = Path(folder) / MANIFEST, Manifest(fingerprint(model), name, maps)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent, timeout=60.0):
            if path.exists():
                raise FileExistsError(f"{path} exists: open it with GalleryIndex({str(folder)!r})")
            manifest.write(path.parent)
        return cls(folder)

    @property
    def manifest(self) -> Manifest:
        """What it holds, as its folder keeps it; a change puts another one in its place."""
        return self._store.contents.manifest

    @property
    def names(self) -> list[str]:
        """Name of each image."""
        return self._store.contents.names

    @property
    def pids(self) -> Int64[np.ndarray, " images"]:
        """Identity of each image, -1 where none was given."""
        return self._store.contents.pids

    @property
    def camids(self) -> Int64[np.ndarray, " images"]:
        """Camera of each image, -1 where none was given."""
        return self._store.contents.camids

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._store.contents)

    def __getitem__(self, rows: Rows) -> Encoding:
        """Returns the encoding of some of the images: a slice, a list of rows, or a mask.

        Neighbours in one shard are views of the file, others are copied together.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index to which nothing has been added yet: its maps have no size; one of
                features alone; or damaged images.
        """
        return self._store.contents.encoding(rows)

    def features_of(self, rows: Rows) -> Float[Tensor, "images dim"]:
        """Returns the features of some of the images; nothing of their maps is read.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index to which nothing has been added yet, or damaged images.
        """
        return self._store.contents.features(rows)

    def verify(self) -> None:
        """Reads all images and compares them with their checksums; opening reads but a part.

        Raises:
            ValueError: damaged images; it names the file and the first of them.
        """
        self._store.contents.verify()

    def add(
        self,
        encoding: Encoding,
        *,
        names: Sequence[str] | None = None,
        pids: Ids | None = None,
        camids: Ids | None = None,
        duplicates: Duplicates = "refuse",
    ) -> None:
        """Adds encoded images as one shard; best some thousands at a time.

        Args:
            encoding: the images, as ``model.encode`` gives them.
            names: their names; by default numbers in the order of adding, none used twice.
            pids: their identities, None or -1 where unknown.
            camids: their cameras, likewise.
            duplicates: what becomes of images whose name another image has: "refuse" adds none,
                "skip" adds all others.

        Raises:
            TimeoutError: another process is changing the index, and does not finish.
            TypeError: no encoding, names that are no list of text or paths, pids or camids that are
                no integers.
            ValueError: a name that is taken, lists of another length, an encoding of another kind,
                size or dtype than those before, one that is not finite, too large for the index's
                dtype or too small for its digits, or an index that another process has made anew.
        """
        check_kind("encoding", encoding, Encoding)
        check_choice("duplicates", duplicates, ("refuse", "skip"))
        given = None if names is None else check_names("names", names)
        with self._store.locked() as store, aside(self.folder) as place:
            store.refresh()
            added = self._store.contents.manifest.added
            writer = Writer(place, self._store.contents.manifest)
            kept = Kept.of(encoding, self._store.contents.manifest)
            numbers = range(added, added + len(encoding))
            writer.write(kept, numbers if given is None else given, pids, camids)
            store.take(writer.written, skip=duplicates == "skip")

    def extend(
        self,
        model: CASN,
        loader: DataLoader[Any],
        *,
        shard_size: int = 1024,
        duplicates: Duplicates = "refuse",
        distributed: bool = False,
        progress: bool = False,
    ) -> None:
        """Encodes the images of a data loader and adds them; all or, after an exception, none.

        Args:
            model: the model that the index was created for.
            loader: gives batches of images, or torchreid's dictionaries of "img" and, where
                there are, "impath", "pid" and "camid".
            shard_size: images to a shard, about. One shard is held in memory.
            duplicates: as in :meth:`add`; images that are skipped are not encoded.
            distributed: every process of ``torch.distributed``'s group calls this on one folder
                and encodes a share of the shards; the index is the same as one process makes.
                Batches are then taken in the order of the data set. An exception in one process
                is raised in all.
            progress: show a progress bar on a terminal.

        Raises:
            RuntimeError: another process of the group failed.
            TimeoutError: as :meth:`add`.
            TypeError: another loader, or batches that hold no images.
            ValueError: another model, shard_size below 1, `distributed` without a process group
                or with a loader that has no batch_size; as :meth:`add`.
        """
        check_kind("loader", loader, DataLoader)
        check_count("shard_size", shard_size)
        check_choice("duplicates", duplicates, ("refuse", "skip"))
        processes, skip = Processes(distributed), duplicates == "skip"
        with ExitStack() as stack, processes.together():
            self.check_model(model)
            with self._store.locked() as store:  # not while images are encoded
                if not distributed:  # else all have to have opened the same
                    store.refresh()
                place = stack.enter_context(aside(self.folder))
            before, taken = self._store.contents.manifest, set(self._store.contents.names)
            per_shard = -(-shard_size // (loader.batch_size or 1))
            part, first = share(loader, per_shard, processes) if distributed else (loader, None)
            batches = tqdm(part, desc="Encoding", leave=False, disable=None if progress else True)
            images = encoded(model, batches, first, manifest=before, taken=taken, skip=skip)
            writer = Writer(place, before)
            for shard in in_shards(images, shard_size, per_shard):
                assert shard.kept is not None  # for the type checker: in_shards saw to it
                writer.write(shard.kept, *shard[1:])
            every = processes.gather((before, writer.written))
            if any(other != before for other, _ in every):
                raise ValueError(f"not all processes have opened the same {self.folder}")
            if processes.rank == 0:
                with store.locked():
                    store.refresh()
                    written = [shard.within(self.folder) for _, own in every for shard in own]
                    shift = self._store.contents.manifest.added - before.added
                    store.take(writer.renumbered(written, shift), skip=skip)
            after = processes.gather(self._store.contents.manifest)[0]
            if processes.rank:
                store.open(after)

    def remove(self, rows: Rows) -> None:
        """Removes images by their rows, or by a mask: ``index.remove(index.pids == -1)``.

        A shard of which nothing is left is deleted; the others keep their size.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            TimeoutError: as :meth:`add`.
            ValueError: an index that another process has changed: rows may have other numbers.
        """
        with self._store.locked() as store:
            store.check_unchanged()
            store.commit(store.contents.manifest.of(store.contents.without(rows)))

    def search(
        self,
        model: CASN,
        query: Float[Tensor, "queries 3 rows columns"] | Encoding,
        *,
        topk: int = 10,
        maps: Encodings | None = None,
        **options: Any,
    ) -> SearchResult:
        """Returns the topk nearest images of each query by fused distance, with attention maps.

        Args:
            model: the model that the index was created for.
            query: normalised images, or their encoding.
            topk: images to find for each query.
            maps: where the maps of this index's images come from, row by row: an
                :class:`EncodedAgain` of it. By default the index itself.
            **options: those of :func:`~casn_plugin.ranking.rank_gallery`.

        Raises:
            TypeError: maps of no gallery.
            ValueError: another model, an empty index, one of features alone without `maps`, `maps`
                of another number of images, or what ``rank_gallery`` rejects.
        """
        self.check_model(model)
        gallery = self if maps is None else check_kind("maps", maps, Encodings)
        if len(gallery) != len(self):
            raise ValueError(f"maps must be of the index's {len(self)} images, got {len(gallery)}")
        if isinstance(query, Tensor):
            query = encode_images(model, query)
        ranking = rank_gallery(model, query, gallery, topk=topk, **options)
        rows = ranking.indices.cpu().numpy()
        seen = torch.zeros(2, *rows.shape, *query.maps.shape[2:], dtype=query.features.dtype)
        scores = torch.full(rows.shape, torch.nan, dtype=query.features.dtype)
        for i, some in enumerate(rows):
            some = some[some >= 0]
            if len(some):
                found, same = gallery[torch.from_numpy(some)], query[i : i + 1].expand(len(some))
                seen[:, i, : len(some)] = torch.stack(pair_attention(model, same, found))
                scores[i, : len(some)] = pair_scores(model, query[i : i + 1], found)[0]
        names = [[self.names[row] for row in some if row >= 0] for some in rows]
        pids, camids = (np.where(rows < 0, -1, ids[rows]) for ids in (self.pids, self.camids))
        return SearchResult(ranking, names, pids, camids, seen[0], seen[1], scores)

    def check_model(self, model: CASN) -> str:
        """Returns the fingerprint of the model that the index was created for.

        Weights are hashed once, and again where they may have changed:
        :func:`casn_plugin.ranking.fingerprint.fingerprint` says what goes unnoticed.

        Raises:
            TypeError: no module.
            ValueError: another model.
        """
        found = fingerprint(model)
        if found != self._store.contents.manifest.model:
            raise ValueError(
                f"the index in {self.folder} was created for a model with other weights, other "
                "evidence or another `flip`: its maps mean nothing to this one, whose evidence is "
                f"the {evidence_of(pair_classifier_of(model))}"
            )
        return found
