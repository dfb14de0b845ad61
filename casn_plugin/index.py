"""A gallery on disk: encoded once, searched by image, read block by block while it is ranked.

A folder of shards (safetensors, memory-mapped) and a manifest, ``index.json``, which names the
shards that count. Every file is written beside its place and then moved there, the manifest last:
whatever interrupts a change, the folder holds either the old index or the new one. Files that a
killed process leaves behind are deleted by the next change.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from tqdm import tqdm

from casn_plugin.encoding import Encoding
from casn_plugin.files import TEMPORARY, move, replacing, temporary
from casn_plugin.hooks import unwrapped
from casn_plugin.loading import encode_images, read_batch
from casn_plugin.model import CASN
from casn_plugin.ranking import Ranking, pair_attention, rank_gallery

MANIFEST = "index.json"
FORMAT = "casn-plugin gallery index"
VERSION = 1

_Numbers = Sequence[int] | Int[np.ndarray, " images"] | Int[Tensor, " images"]
_Rows = (
    slice
    | Sequence[int]
    | Int[np.ndarray, " rows"]
    | Bool[np.ndarray, " rows"]
    | Int[Tensor, " rows"]
)
_Held = tuple[Encoding, list[str], list[int] | None, list[int] | None]
_OWN_FILE = re.compile(rf"[0-9a-f]{{24}}\.safetensors|{TEMPORARY}")


class _Shard(NamedTuple):
    encoding: Encoding
    names: list[str]
    pids: Int64[np.ndarray, " rows"]
    camids: Int64[np.ndarray, " rows"]


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

    Rows are numbered 0 ... ``len(index) - 1`` in the order of adding; removing closes the gaps.
    One process at a time may change an index. ``index[10:20]`` is the encoding of ten images,
    ``index[index.pids == 5]`` that of one person; an index goes wherever ranking takes a gallery.

    Args:
        folder: where :meth:`create` made it.
        verify: compare every byte with the checksums, which reads the whole index once.

    Attributes:
        names: name of each image.
        pids: identity of each image, -1 where none was given.
        camids: camera of each image, -1 where none was given.

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
        self._opened: dict[str, _Shard] = {}
        self._load(_read_manifest(self.folder), verify)

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
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": _fingerprint(model),
            "dtype": None if dtype is None else _name(dtype),
            "images": None,
            "added": 0,
            "shards": [],
        }
        _write_manifest(path.parent, manifest)
        return cls(folder)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._rows)

    def __getitem__(self, rows: _Rows) -> Encoding:
        """Returns the encoding of some of the images: a slice, a list of rows, or a mask.

        Neighbours in one shard are views of the file, others are copied together.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index to which nothing has been added yet: its maps have no size.
        """
        if self._manifest["images"] is None:
            raise ValueError(f"the index in {self.folder} is empty")
        parts = [self._shards[shard][local] for shard, local in self._pieces(rows)]
        if not parts:
            return _no_images(self._manifest["images"])
        return parts[0] if len(parts) == 1 else Encoding.cat(parts)

    def features_of(self, rows: _Rows) -> Float[Tensor, "images dim"]:
        """Returns the features of some of the images; nothing of their maps is read.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
        """
        parts = [self._shards[shard].features[local] for shard, local in self._pieces(rows)]
        return torch.cat(parts) if parts else self[:0].features

    def _pieces(self, rows: _Rows) -> Iterator[tuple[int, slice | Tensor]]:
        """Yields runs of rows that lie in one shard: the shard, and the rows in it."""
        physical = self._physical(rows)
        if not len(physical):
            return
        shards = np.searchsorted(self._starts, physical, "right") - 1
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(physical)]
        for start, stop in pairwise(edges):
            local = physical[start:stop] - self._starts[shards[start]]
            neighbours = np.all(np.diff(local) == 1)
            yield (
                int(shards[start]),
                slice(int(local[0]), int(local[-1]) + 1) if neighbours else torch.from_numpy(local),
            )

    def add(
        self,
        encoding: Encoding,
        *,
        names: Sequence[str] | None = None,
        pids: _Numbers | None = None,
        camids: _Numbers | None = None,
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
        start = self._manifest["added"]
        if names is None:
            names = [str(start + row) for row in range(len(encoding))]
        with self._writing() as new:
            self._write_shard(new, encoding, names, pids, camids)
            self._commit(self._entries, new)

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
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("distributed encoding needs torch.distributed.init_process_group()")
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        with self._writing() as new:

            def encode() -> tuple[list[dict[str, Any]], str]:
                self._check_model(model)
                self._check_unchanged()
                per_shard = -(-shard_size // (loader.batch_size or 1))
                share, starts = loader, None
                if distributed:
                    share, starts = _share(loader, per_shard, rank, world)
                batches = tqdm(
                    share, desc="Encoding", leave=False, disable=None if progress else True
                )
                self._encode(new, model, batches, starts, shard_size, per_shard)
                return new, self._manifest["checksum"]

            def commit() -> None:
                if len({checksum for _, checksum in every}) > 1:
                    raise ValueError(f"not all processes have opened the same {self.folder}")
                # shards were dealt to the processes in turn
                turns = zip_longest(*(entries for entries, _ in every))
                if rank == 0:
                    self._commit(self._entries, [each for turn in turns for each in turn if each])

            every = _together(encode, distributed)
            _together(commit, distributed)
        if rank:
            self._load(_read_manifest(self.folder), verify=False)

    def remove(self, rows: _Rows) -> None:
        """Removes images by their rows, or by a mask: ``index.remove(index.pids == -1)``.

        A shard of which nothing is left is deleted; the others keep their size.

        Raises:
            IndexError: no such row.
            TypeError: a single number, or anything else that is no list of rows.
            ValueError: an index that another process has changed.
        """
        physical = self._physical(rows)
        entries = []
        for entry, start in zip(self._entries, self._starts, strict=True):
            inside = physical[(physical >= start) & (physical < start + entry["rows"])] - start
            removed = sorted({*entry["removed"], *inside.tolist()})
            if len(removed) < entry["rows"]:
                entries.append({**entry, "removed": removed})
        self._commit(entries, [])

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
        if _fingerprint(model) != self._manifest["model"]:
            raise ValueError(
                f"the index in {self.folder} was created for a model with other weights: its maps "
                "mean nothing to this one"
            )

    def _check_unchanged(self) -> None:
        if _read_manifest(self.folder)["checksum"] != self._manifest["checksum"]:
            raise ValueError(
                f"the index in {self.folder} has been changed by another process: open it anew"
            )

    def _physical(self, rows: _Rows) -> Int64[np.ndarray, " found"]:
        """Returns the numbers of rows among all that are in the shards, removed ones too."""
        if not isinstance(rows, slice):
            given = rows.cpu() if isinstance(rows, Tensor) else rows
            rows = np.asarray(given)
            if rows.ndim != 1:
                raise TypeError(f"rows must be a slice, a list of numbers or a mask, got {given!r}")
            rows = rows if rows.size else rows.astype(np.int64)
        physical: np.ndarray = self._rows[rows]
        return physical

    def _load(self, manifest: dict[str, Any], verify: bool) -> None:
        """Takes over a manifest. Shards that are open already are not read again."""
        opened: dict[str, _Shard] = {}
        nothing = np.empty(0, dtype=np.int64)
        names, pids, camids, rows, starts, start = [], [nothing], [nothing], [nothing], [], 0
        for entry in manifest["shards"]:
            file = entry["file"]
            shard = opened.get(file) or self._opened.get(file)
            shard = shard or _read_shard(self.folder / file, entry, verify)
            kept = np.setdiff1d(np.arange(entry["rows"]), entry["removed"])
            opened[file] = shard
            names += [shard.names[row] for row in kept]
            pids.append(shard.pids[kept])
            camids.append(shard.camids[kept])
            rows.append(start + kept)
            starts.append(start)
            start += entry["rows"]
        self._manifest, self._entries, self._opened = manifest, manifest["shards"], opened
        self._shards = [opened[entry["file"]].encoding for entry in self._entries]
        self._starts, self._rows = np.array(starts, np.int64), np.concatenate(rows)
        self.names, self.pids, self.camids = names, np.concatenate(pids), np.concatenate(camids)

    def _commit(self, kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Writes a manifest of other shards, if no one else has done so, and takes it over.

        Then deletes the shards that it does not name, and what a killed process left.
        """
        self._check_unchanged()
        images, opened = self._manifest["images"], dict(self._opened)
        for entry in new:
            images = _same_images(images, entry["images"])
            file = entry["file"]
            opened[file] = _read_shard(self.folder / file, entry, verify=False)
        added = self._manifest["added"] + sum(entry["rows"] for entry in new)
        manifest = {**self._manifest, "images": images, "added": added, "shards": [*kept, *new]}
        manifest = _write_manifest(self.folder, manifest)
        self._opened = opened
        self._load(manifest, verify=False)
        for path in self.folder.iterdir():
            if _OWN_FILE.fullmatch(path.name) and path.name not in self._opened:
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[list[dict[str, Any]]]:
        """Yields a list for the entries of new shards; deletes their files after an exception."""
        new: list[dict[str, Any]] = []
        try:
            yield new
        except BaseException:
            with suppress(OSError, ValueError):  # of the manifest
                named = {entry["file"] for entry in _read_manifest(self.folder)["shards"]}
                for file in {entry["file"] for entry in new} - named:
                    (self.folder / file).unlink(missing_ok=True)
            raise

    def _encode(
        self,
        new: list[dict[str, Any]],
        model: CASN,
        batches: Iterable[Any],
        starts: list[int] | None,
        shard_size: int,
        per_shard: int,
    ) -> None:
        """Writes batches of images into shards, per_shard of them or shard_size images to each.

        Images without a name are numbered, those of batch i from starts[i].
        """
        held: list[_Held] = []
        images = count = 0

        def flush() -> None:
            encodings, *labels = zip(*held, strict=True)
            joined = [None if None in each else list(chain(*each)) for each in labels]
            held.clear()
            self._write_shard(new, Encoding.cat(encodings), joined[0] or [], joined[1], joined[2])

        for batch, data in enumerate(batches):
            imgs, names, pids, camids = read_batch(data)
            start = self._manifest["added"] + (starts[batch] if starts else count)
            names = names or [str(start + row) for row in range(len(imgs))]
            held.append((encode_images(model, imgs), names, pids, camids))
            count, images = count + len(imgs), images + len(imgs)
            if images >= shard_size or len(held) == per_shard:
                flush()
                images = 0
        if held:
            flush()

    def _write_shard(
        self,
        new: list[dict[str, Any]],
        encoding: Encoding,
        names: Sequence[str],
        pids: _Numbers | None,
        camids: _Numbers | None,
    ) -> None:
        """Writes a shard and appends the manifest's entry of it."""
        rows = len(encoding)
        if len(names) != rows:
            raise ValueError(f"expected {rows} names, one an image, got {len(names)}")
        labels = {"pids": _labels("pids", pids, rows), "camids": _labels("camids", camids, rows)}
        if not rows:
            return
        maps = encoding.maps
        if self._manifest["dtype"] is not None:
            maps = maps.to(getattr(torch, self._manifest["dtype"]))
            if not maps.isfinite().all():
                raise ValueError(
                    f"expected finite maps that {maps.dtype} can hold, got values up to "
                    f"{encoding.maps.abs().max():.3g}"
                )
        kind = "basis" if encoding.basis is not None else "activations"
        sizes = {"features": _size(encoding.features), "maps": _size(maps)}
        images = {"kind": kind, **sizes}
        _same_images(new[0]["images"] if new else self._manifest["images"], images)
        tensors = {
            "features": encoding.features.detach().cpu().contiguous(),
            "maps": maps.detach().permute(0, 2, 3, 1).cpu().contiguous(),
            **labels,
        }
        metadata = {"names": json.dumps([str(name) for name in names])}  # one: order is random
        with temporary(self.folder) as path:
            save_file(tensors, path, metadata)
            sha256 = _sha256(path)
            file = f"{sha256[:24]}.safetensors"
            entry = {"file": file, "sha256": sha256, "rows": rows, "images": images}
            new.append({**entry, "removed": []})
            move(path, self.folder / file)


def _share(
    loader: DataLoader[Any], per_shard: int, rank: int, world: int
) -> tuple[DataLoader[Any], list[int]]:
    """Returns one process's share of a loader, and the first row of each of its batches."""
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "distributed encoding needs a loader with a batch_size, of a data set with a length"
        )
    rows = range(len(loader.dataset))  # type: ignore[arg-type]
    batches = BatchSampler(rows, loader.batch_size, loader.drop_last)
    own = [batch for i, batch in enumerate(batches) if i // per_shard % world == rank]
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


def _together(function: Callable[[], Any], distributed: bool) -> list[Any]:
    """Returns what a function gives in every process; where it fails in one, all raise."""
    if not distributed:
        return [function()]
    result = failure = None
    try:
        result = function()
    except Exception as error:
        failure = error
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (result, None if failure is None else repr(failure)))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(every):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")
    return [each for each, _ in every]


def _labels(name: str, values: _Numbers | None, rows: int) -> Int64[Tensor, " images"]:
    """Returns pids or camids as a tensor, -1 where there are none."""
    numbers = np.full(rows, -1) if values is None else np.asarray(values)
    if len(numbers) != rows:
        raise ValueError(f"expected {rows} {name}, one an image, got {len(numbers)}")
    if rows and (numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer)):
        raise TypeError(f"{name} must be integers, got an array of {numbers.dtype}")
    return torch.from_numpy(numbers.astype(np.int64))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(tensor: Tensor) -> list[Any]:
    """Returns the dtype and the size of one image's part of a tensor."""
    return [_name(tensor.dtype), *tensor.shape[1:]]


def _same_images(expected: dict[str, Any] | None, got: dict[str, Any]) -> dict[str, Any]:
    """Returns a description of images, where it is the expected one."""
    if expected is not None and expected != got:
        first, second = (
            ", ".join(f"{key} {value}" for key, value in each.items()) for each in (expected, got)
        )
        raise ValueError(
            f"the index holds {first}, got {second}: expected images of one model and one size"
        )
    return got


def _no_images(images: dict[str, Any]) -> Encoding:
    """Returns the encoding of no images."""
    features, maps = (
        torch.empty(0, *size, dtype=getattr(torch, dtype))
        for dtype, *size in (images["features"], images["maps"])
    )
    return Encoding(features, **{images["kind"]: maps})


def _fingerprint(model: nn.Module) -> str:
    """Returns a checksum of all weights of a model."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model).state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder, once it is sound."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no gallery index in {folder}: it lacks {MANIFEST}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {manifest.get('version')}, but this casn_plugin reads {VERSION}"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    return manifest


def _read_shard(path: Path, entry: dict[str, Any], verify: bool) -> _Shard:
    """Returns a shard, its encoding memory-mapped."""
    rows, images = entry["rows"], entry["images"]
    if not path.is_file():
        raise FileNotFoundError(f"the gallery index lacks its shard {path}")
    if verify and _sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})["names"])
            features, maps = file.get_tensor("features"), file.get_tensor("maps")
            pids, camids = (file.get_tensor(name).numpy() for name in ("pids", "camids"))
        maps = maps.permute(0, 3, 1, 2)
        lengths = {len(each) for each in (names, features, maps, pids, camids)}
        if lengths != {rows} or [_size(features), _size(maps)] != [
            images["features"],
            images["maps"],
        ]:
            raise ValueError(f"it does not hold what {MANIFEST} says")
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return _Shard(Encoding(features, **{images["kind"]: maps}), names, pids, camids)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes a manifest, and returns it with its checksum."""
    manifest = {**manifest, "checksum": _checksum(manifest)}
    with replacing(folder / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=1))
    return manifest
