"""The files of an index: shards of encoded images, and the manifest that names those that count.

A shard is one safetensors file, named after its content. Every file is written beside its place
and then moved there, the manifest last: whatever interrupts a change, the folder holds either the
old index or the new one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from casn_plugin.encoding import Encoding
from casn_plugin.files import TEMPORARY, move, replacing, temporary

MANIFEST = "index.json"
FORMAT = "casn-plugin gallery index"
VERSION = 1

Numbers = Sequence[int] | Int[np.ndarray, " images"] | Int[Tensor, " images"]
"""Identities or cameras of images."""

Common = dict[str, Any]
"""What the images of an index have in common: their "kind", dtype and size of features and maps."""

_OWN_FILE = re.compile(rf"[0-9a-f]{{24}}\.safetensors|{TEMPORARY}")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a shard.

    Attributes:
        file: its name.
        sha256: the checksum of its content.
        rows: how many images it holds.
        images: what they have in common.
        removed: the rows that are removed.
    """

    file: str
    sha256: str
    rows: int
    images: Common
    removed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """What an index holds, as its folder keeps it.

    Attributes:
        model: checksum of the model that the index is for.
        dtype: name of the dtype that maps are kept in; None: that of the encodings.
        images: what all images have in common; None before the first.
        added: how many images have ever been added.
        shards: those that count, in order.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     Manifest(model="its checksum", dtype=None).write(Path(name))
        ...     Manifest.read(Path(name)).added
        0
    """

    model: str
    dtype: str | None
    images: Common | None = None
    added: int = 0
    shards: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Returns the manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another format or version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"no gallery index in {folder}: it lacks {MANIFEST}")
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is no manifest of a {FORMAT}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} is of version {content.get('version')}, but this casn_plugin reads "
                f"{VERSION}"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError(f"{path} is damaged: its checksum does not fit")
        del content["format"], content["version"]
        try:
            shards = tuple(Entry(**entry) for entry in content.pop("shards"))
            return cls(**content, shards=shards)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def write(self, folder: Path) -> None:
        """Puts the manifest into its place."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["shards"] = list(content["shards"])
        content["checksum"] = _checksum(content)
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps(content, indent=1))

    def of(self, kept: Iterable[Entry], new: Sequence[Entry] = ()) -> "Manifest":
        """Returns the manifest of other shards: some that are kept, and new ones.

        Raises:
            ValueError: new images that have not in common what the others have.
        """
        images = self.images
        for entry in new:
            images = same_images(images, entry.images)
        added = self.added + sum(entry.rows for entry in new)
        return replace(self, images=images, added=added, shards=(*kept, *new))


class Shard(NamedTuple):
    """The images of one file, memory-mapped, and what is known of them.

    Attributes:
        encoding: the images.
        names: their names.
        pids: their identities, -1 where none was given.
        camids: their cameras, -1 where none was given.
    """

    encoding: Encoding
    names: list[str]
    pids: Int64[np.ndarray, " rows"]
    camids: Int64[np.ndarray, " rows"]

    @classmethod
    def read(cls, folder: Path, entry: Entry, *, verify: bool) -> "Shard":
        """Returns a shard.

        Args:
            folder: of the index.
            entry: what the manifest says of it.
            verify: compare every byte with the checksum.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: it is damaged, or does not hold what the manifest says.
        """
        path = folder / entry.file
        if not path.is_file():
            raise FileNotFoundError(f"the gallery index lacks its shard {path}")
        if verify and _sha256(path) != entry.sha256:
            raise ValueError(f"{path} is damaged: its checksum does not fit")
        images = entry.images
        try:
            with safe_open(path, framework="pt") as file:
                names = json.loads((file.metadata() or {})["names"])
                features, maps = file.get_tensor("features"), file.get_tensor("maps")
                pids, camids = (file.get_tensor(name).numpy() for name in ("pids", "camids"))
            maps = maps.permute(0, 3, 1, 2)
            lengths = {len(each) for each in (names, features, maps, pids, camids)}
            if lengths != {entry.rows} or [_size(features), _size(maps)] != [
                images["features"],
                images["maps"],
            ]:
                raise ValueError(f"it does not hold what {MANIFEST} says")
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(Encoding(features, **{images["kind"]: maps}), names, pids, camids)


class Writer:
    """Writes new shards into a folder; after an exception in its context they are deleted again.

    Args:
        folder: of the index.
        manifest: whose dtype and images they take.

    Attributes:
        entries: what a manifest has to say of those that are written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> images = Encoding(torch.rand(2, 4), basis=torch.rand(2, 4, 6, 3))
        >>> manifest = Manifest(model="its checksum", dtype="float16")
        >>> with TemporaryDirectory() as name, Writer(Path(name), manifest) as writer:
        ...     writer.write(images, names=["a", "b"])
        ...     Shard.read(Path(name), writer.entries[0], verify=True).encoding.maps.dtype
        torch.float16
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.entries: list[Entry] = []
        self._folder, self._manifest = folder, manifest

    def __enter__(self) -> "Writer":
        """Begins to write."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Deletes what no manifest names, after an exception."""
        if error is None:
            return
        with suppress(OSError, ValueError):  # of the manifest
            named = {entry.file for entry in Manifest.read(self._folder).shards}
            for file in {entry.file for entry in self.entries} - named:
                (self._folder / file).unlink(missing_ok=True)

    def write(
        self,
        encoding: Encoding,
        names: Sequence[str],
        pids: Numbers | None = None,
        camids: Numbers | None = None,
    ) -> None:
        """Writes images as one shard; none where there are none.

        Args:
            encoding: the images.
            names: their names.
            pids: their identities.
            camids: their cameras.

        Raises:
            TypeError: pids or camids that are no integers.
            ValueError: lists of another length, images of another kind or size than those before,
                maps too large for the index's dtype.
        """
        rows = len(encoding)
        if len(names) != rows:
            raise ValueError(f"expected {rows} names, one an image, got {len(names)}")
        labels = {"pids": _labels("pids", pids, rows), "camids": _labels("camids", camids, rows)}
        if not rows:
            return
        maps = encoding.maps
        if self._manifest.dtype is not None:
            maps = maps.to(getattr(torch, self._manifest.dtype))
            if not maps.isfinite().all():
                raise ValueError(
                    f"expected finite maps that {maps.dtype} can hold, got values up to "
                    f"{encoding.maps.abs().max():.3g}"
                )
        kind = "basis" if encoding.basis is not None else "activations"
        images = {"kind": kind, "features": _size(encoding.features), "maps": _size(maps)}
        same_images(self.entries[0].images if self.entries else self._manifest.images, images)
        tensors = {
            "features": encoding.features.detach().cpu().contiguous(),
            "maps": maps.detach().permute(0, 2, 3, 1).cpu().contiguous(),
            **labels,
        }
        metadata = {"names": json.dumps([str(name) for name in names])}  # one: order is random
        with temporary(self._folder) as path:
            save_file(tensors, path, metadata)
            sha256 = _sha256(path)
            entry = Entry(f"{sha256[:24]}.safetensors", sha256, rows, images)
            self.entries.append(entry)
            move(path, self._folder / entry.file)


def no_images(images: Common) -> Encoding:
    """Returns the encoding of no images.

    Example:
        >>> common = {"kind": "basis", "features": ["float32", 4], "maps": ["float16", 4, 6, 3]}
        >>> no_images(common).maps.shape
        torch.Size([0, 4, 6, 3])
    """
    features, maps = (
        torch.empty(0, *size, dtype=getattr(torch, dtype))
        for dtype, *size in (images["features"], images["maps"])
    )
    return Encoding(features, **{images["kind"]: maps})


def same_images(expected: Common | None, got: Common) -> Common:
    """Returns what images have in common, where it is what is expected.

    Raises:
        ValueError: it is not.

    Example:
        >>> same_images(None, {"kind": "basis"})
        {'kind': 'basis'}
    """
    if expected is not None and expected != got:
        first, second = (
            ", ".join(f"{key} {value}" for key, value in each.items()) for each in (expected, got)
        )
        raise ValueError(
            f"the index holds {first}, got {second}: expected images of one model and one size"
        )
    return got


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as a manifest has it.

    Example:
        >>> dtype_name(torch.float16)
        'float16'
    """
    return str(dtype).removeprefix("torch.")


def tidy(folder: Path, manifest: Manifest) -> None:
    """Deletes shards that a manifest does not name, and what a killed process has left."""
    named = {entry.file for entry in manifest.shards}
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def _labels(name: str, values: Numbers | None, rows: int) -> Int64[Tensor, " images"]:
    """Returns pids or camids as a tensor, -1 where there are none."""
    numbers = np.full(rows, -1) if values is None else np.asarray(values)
    if len(numbers) != rows:
        raise ValueError(f"expected {rows} {name}, one an image, got {len(numbers)}")
    if rows and (numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer)):
        raise TypeError(f"{name} must be integers, got an array of {numbers.dtype}")
    return torch.from_numpy(numbers.astype(np.int64))


def _size(tensor: Tensor) -> list[Any]:
    """Returns the dtype and the size of one image's part of a tensor."""
    return [dtype_name(tensor.dtype), *tensor.shape[1:]]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
