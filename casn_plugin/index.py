"""A gallery on disk: encoded once, searched by image, read block by block while it is ranked.

A folder of shards (safetensors, memory-mapped) and a manifest, ``index.json``, which names the
shards that count. Every file is written beside its place and then moved there, the manifest last:
whatever interrupts a change, the folder holds either the old index or the new one.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin.encoding import Encoding
from casn_plugin.model import CASN
from casn_plugin.ranking import Ranking, pair_attention, rank_gallery

MANIFEST = "index.json"
FORMAT = "casn-plugin gallery index"
VERSION = 1


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
    so an index goes wherever ranking takes a gallery.

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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = GalleryIndex.create(folder, model)
        ...     index.add(model.encode(torch.rand(5, 3, 32, 16)), names=list("abcde"))
        ...     index.remove([1])
        ...     found = index.search(model, torch.rand(2, 3, 32, 16), topk=3)
        >>> len(index), found.ranking.indices.shape, found.query_attention.shape
        (4, torch.Size([2, 3]), torch.Size([2, 3, 8, 4]))
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder)
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
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "shards": [],
        }
        _write_manifest(path, manifest)
        return cls(folder)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._rows)

    def __getitem__(self, rows: slice | Sequence[int] | Int64[np.ndarray, "rows"]) -> Encoding:
        """Returns the encoding of some of the images.

        Neighbours in one shard are views of the file, others are copied together.

        Raises:
            ValueError: an empty index, which has no encodings yet.
        """
        if not self._shards:
            raise ValueError(f"the index in {self.folder} is empty")
        rows = self._rows[rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)]
        shards = np.searchsorted(self._starts, rows, "right") - 1
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(rows)]
        parts = []
        for start, stop in pairwise(edges):
            shard = shards[start] if len(rows) else 0
            local = rows[start:stop] - self._starts[shard]
            if len(local) and np.all(np.diff(local) == 1):
                parts.append(self._shards[shard][local[0] : local[-1] + 1])
            else:
                parts.append(self._shards[shard][torch.from_numpy(local)])
        return parts[0] if len(parts) == 1 else Encoding.cat(parts)

    def add(
        self,
        encoding: Encoding,
        *,
        names: Sequence[str] | None = None,
        pids: Sequence[int] | None = None,
        camids: Sequence[int] | None = None,
    ) -> None:
        """Adds encoded images as one shard; best some thousands at a time.

        Args:
            encoding: the images, as ``model.encode`` gives them.
            names: their names; by default their numbers.
            pids: their identities.
            camids: their cameras.

        Raises:
            ValueError: lists of another length, an encoding of another kind or size, or an
                index that another process has changed.
        """
        if not len(encoding):
            return
        self._change([*self._entries, self._write_shard(encoding, names, pids, camids)])

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
                Batches are then taken in the order of the data set.
            progress: show a progress bar on a terminal.

        Raises:
            TypeError: batches that hold no images.
            ValueError: another model, shard_size below 1, `distributed` without a process group.
        """
        self._check_model(model)
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("distributed encoding needs torch.distributed.init_process_group()")
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        per_shard = max(shard_size // (loader.batch_size or 1), 1)
        if distributed:
            batches = list(
                torch.utils.data.BatchSampler(
                    range(len(loader.dataset)),  # type: ignore[arg-type]
                    loader.batch_size or 1,
                    drop_last=False,
                )
            )
            own = [b for i, b in enumerate(batches) if i // per_shard % world == rank]
            loader = DataLoader(
                loader.dataset,
                batch_sampler=own,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
            )
        device = next(iter(model.parameters())).device
        entries: list[dict[str, Any]] = []
        held: list[tuple[Encoding, list[str], list[int] | None, list[int] | None]] = []

        def flush() -> None:
            encodings, *labels = zip(*held, strict=True)
            joined = [None if None in some else list(chain(*some)) for some in labels]
            entries.append(self._write_shard(Encoding.cat(encodings), *joined))
            held.clear()

        position = sum(entry["rows"] for entry in self._entries)
        for batch, data in enumerate(
            tqdm(loader, desc="Encoding", leave=False, disable=None if progress else True)
        ):
            imgs, names, pids, camids = _parse(data)
            start = position + (own[batch][0] if distributed else 0)
            names = names or [str(start + row) for row in range(len(imgs))]
            held.append((model.encode(imgs.to(device)).to("cpu"), names, pids, camids))
            position += 0 if distributed else len(imgs)
            if len(held) == per_shard:
                flush()
        if held:
            flush()
        every = [entries]
        if distributed:
            every = [[] for _ in range(world)]
            dist.all_gather_object(every, entries)
        longest = max(map(len, every))
        new = [some[i] for i in range(longest) for some in every if i < len(some)]
        if new:
            self._change([*self._entries, *new], write=rank == 0)
            if distributed:
                dist.barrier()

    def remove(self, rows: Sequence[int]) -> None:
        """Removes images by their rows. A shard of which nothing is left is deleted.

        Raises:
            IndexError: no such row.
            ValueError: an index that another process has changed.
        """
        physical = self._rows[np.asarray(list(rows), dtype=np.int64)]
        entries, dead = [], []
        for entry, start in zip(self._entries, self._starts, strict=True):
            inside = physical[(physical >= start) & (physical < start + entry["rows"])] - start
            removed = sorted({*entry["removed"], *inside.tolist()})
            if len(removed) < entry["rows"]:
                entries.append({**entry, "removed": removed})
            else:
                dead.append(entry["file"])
        self._change(entries)
        for name in {*dead} - {entry["file"] for entry in entries}:
            (self.folder / name).unlink(missing_ok=True)

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
            query = model.encode(query.to(next(iter(model.parameters())).device)).to("cpu")
        ranking = rank_gallery(model, query, self, topk=topk, **options)
        rows = ranking.indices.cpu().numpy()
        maps = [
            pair_attention(model, query[torch.full((len(some),), i)], self[some])
            for i, some in enumerate(rows)
        ]
        first, second = (torch.stack(each).cpu() for each in zip(*maps, strict=True))
        return SearchResult(
            ranking,
            [[self.names[row] for row in some] for some in rows],
            self.pids[rows],
            self.camids[rows],
            first,
            second,
        )

    def _check_model(self, model: CASN) -> None:
        if _fingerprint(model) != self._manifest["model"]:
            raise ValueError(
                f"the index in {self.folder} was created for a model with other weights: its maps "
                "mean nothing to this one"
            )

    def _load(self, manifest: dict[str, Any], verify: bool) -> None:
        shards, names, pids, camids, rows, starts, start = [], [], [], [], [], [], 0
        for entry in manifest["shards"]:
            encoding, labels = _read_shard(self.folder / entry["file"], entry, verify)
            kept = np.setdiff1d(np.arange(entry["rows"]), entry["removed"])
            shards.append(encoding)
            names += [labels["names"][row] for row in kept]
            pids.append(labels["pids"][kept])
            camids.append(labels["camids"][kept])
            rows.append(start + kept)
            starts.append(start)
            start += entry["rows"]
        nothing = np.empty(0, dtype=np.int64)
        self._manifest, self._entries, self._shards = manifest, manifest["shards"], shards
        self._starts, self._rows = np.array(starts, np.int64), np.concatenate([nothing, *rows])
        self.names = names
        self.pids, self.camids = (
            np.concatenate([nothing, *pids]),
            np.concatenate([nothing, *camids]),
        )

    def _change(self, entries: list[dict[str, Any]], *, write: bool = True) -> None:
        """Writes a manifest of other shards, if no one else has done so, and takes it over."""
        manifest = {**self._manifest, "shards": entries}
        if write:
            if _read_manifest(self.folder)["checksum"] != self._manifest["checksum"]:
                raise ValueError(
                    f"the index in {self.folder} has been changed by another process: open it anew"
                )
            _write_manifest(self.folder / MANIFEST, manifest)
        self._load({**manifest, "checksum": _checksum(manifest)}, verify=False)

    def _write_shard(
        self,
        encoding: Encoding,
        names: Sequence[str] | None,
        pids: Sequence[int] | None,
        camids: Sequence[int] | None,
    ) -> dict[str, Any]:
        """Returns the manifest's entry of a new shard."""
        rows = len(encoding)
        for name, values in (("names", names), ("pids", pids), ("camids", camids)):
            if values is not None and len(values) != rows:
                raise ValueError(f"expected {rows} {name}, one an image, got {len(values)}")
        kind = "basis" if encoding.basis is not None else "activations"
        if self._shards:
            own = self._shards[0]
            shape = encoding.maps.shape[1:], encoding.features.shape[1:]
            if (kind == "basis") != (own.basis is not None) or shape != (
                own.maps.shape[1:],
                own.features.shape[1:],
            ):
                raise ValueError(
                    f"the index holds maps of {tuple(own.maps.shape[1:])}, got a {kind} of "
                    f"{tuple(encoding.maps.shape[1:])}: expected images of one model and one size"
                )
        dtype = self._manifest["dtype"]
        maps = encoding.maps if dtype is None else encoding.maps.to(getattr(torch, dtype))
        unknown = [-1] * rows
        tensors = {
            "features": encoding.features.cpu().contiguous(),
            "maps": maps.permute(0, 2, 3, 1).cpu().contiguous(),
            "pids": torch.tensor(unknown if pids is None else list(pids)),
            "camids": torch.tensor(unknown if camids is None else list(camids)),
        }
        start = sum(entry["rows"] for entry in self._entries)
        names = [str(start + row) for row in range(rows)] if names is None else list(names)
        metadata = {"format": FORMAT, "kind": kind, "names": json.dumps(names)}
        with _temporary(self.folder) as path:
            save_file(tensors, path, metadata)
            sha256 = _sha256(path)
            name = f"{sha256[:24]}.safetensors"
            _move(path, self.folder / name)
        size = (self.folder / name).stat().st_size
        return {"file": name, "rows": rows, "bytes": size, "sha256": sha256, "removed": []}


def _parse(data: Any) -> tuple[Tensor, list[str] | None, list[int] | None, list[int] | None]:
    """Returns the images of a batch, and their names, pids and camids where there are."""
    if isinstance(data, Mapping):
        values = [data.get(key) for key in ("impath", "pid", "camid")]
        listed = [each.tolist() if isinstance(each, Tensor) else each for each in values]
        imgs, (names, pids, camids) = data.get("img"), listed
    else:
        imgs = data[0] if isinstance(data, (tuple, list)) and data else data
        names = pids = camids = None
    if not isinstance(imgs, Tensor) or imgs.ndim != 4:
        raise TypeError(
            "the loader must give batches of images (B, 3, H, W), or dictionaries with them as "
            f"'img', got {type(data).__name__}"
        )
    return imgs, names, pids, camids


def _fingerprint(model: nn.Module) -> str:
    """Returns a checksum of all weights of a model."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    model = model.module if isinstance(model, parallel) else model
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
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


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with _temporary(path.parent) as temporary:
        temporary.write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1))
        _move(temporary, path)


def _read_shard(path: Path, entry: dict[str, Any], verify: bool) -> tuple[Encoding, dict[str, Any]]:
    """Returns the encoding of a shard, memory-mapped, and its names, pids and camids."""
    if not path.is_file():
        raise FileNotFoundError(f"the gallery index lacks its shard {path}")
    if path.stat().st_size != entry["bytes"] or (verify and _sha256(path) != entry["sha256"]):
        raise ValueError(f"{path} is damaged: its size or its checksum does not fit")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            features, maps = file.get_tensor("features"), file.get_tensor("maps")
            labels = {name: file.get_tensor(name).numpy() for name in ("pids", "camids")}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    encoding = Encoding(features, **{metadata["kind"]: maps.permute(0, 3, 1, 2)})
    return encoding, {"names": json.loads(metadata["names"]), **labels}


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Yields a path in a folder; what is still there at the end is deleted."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    """Moves a file to its place at once, its content safely on disk first."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.chmod(0o666 & ~_umask())
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
