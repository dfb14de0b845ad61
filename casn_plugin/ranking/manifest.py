"""The manifest of an index: which shards count; read as data, of which nothing is believed."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from casn_plugin.files import replacing
from casn_plugin.ranking.company import SHARD

MANIFEST = "index.json"
FORMAT = "casn-plugin gallery index"
VERSION = 3
DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that features and maps are kept in."""

EIGHT_BITS = "int8"
"""What else maps are kept in: 8 bits, times a scale for each channel of each image."""

Common = dict[str, Any]
"""What the images of an index have in common: their "kind", dtype and size of features and maps.

The latter are None where only features are kept.
"""

_MOST = 2**40  # rows, or values of an image: more is nonsense, and overflows somewhere


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a shard.

    Attributes:
        file: its name.
        sha256: the checksum of its head, in which the checksums of all else are.
        rows: how many images it holds.
        images: what they have in common.
        removed: the rows that are removed.
    """

    file: str
    sha256: str
    rows: int
    images: Common
    removed: list[int] = field(default_factory=list)

    @property
    def kept(self) -> Int64[np.ndarray, " kept"]:
        """The rows that are not removed, ascending."""
        return np.setdiff1d(np.arange(self.rows), self.removed)

    def check(self) -> None:
        """Raises ValueError where something is not what a writer would have written."""
        _expect(_is_text(self.file, SHARD), "file", self.file, "the plain name of a shard")
        _expect(_is_text(self.sha256, "[0-9a-f]{64}"), "sha256", self.sha256, "a checksum")
        _expect(_is_count(self.rows), "rows", self.rows, "a number >= 0")
        check_images(self.images)
        removed = self.removed
        fits = isinstance(removed, list) and all(map(_is_count, removed))
        fits = fits and len(set(removed)) == len(removed) and max(removed, default=-1) < self.rows
        _expect(fits, "removed", removed, f"rows below {self.rows}, none twice")


@dataclass(frozen=True)
class Manifest:
    """What an index holds, as its folder keeps it.

    Attributes:
        model: checksum of the model that the index is for.
        dtype: name of the dtype that maps are kept in; None: that of the encodings.
        maps: whether maps are kept, or features alone.
        images: what all images have in common; None before the first.
        added: how many images have ever been added.
        shards: those that count, in order.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     Manifest(model="0" * 64, dtype=None).write(Path(name))
        ...     Manifest.read(Path(name)).added
        0
    """

    model: str
    dtype: str | None
    maps: bool = True
    images: Common | None = None
    added: int = 0
    shards: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Returns the manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, a link, of another format or version, or says what can't be.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"no gallery index in {folder}: it lacks {MANIFEST}")
        check_no_link(path)
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise _OtherError(f"{path} is no manifest of a {FORMAT}")
            version = content.get("version")
            if type(version) is not int or version != VERSION:
                raise _OtherError(
                    f"{path} is of version {version!r}, but this casn_plugin reads {VERSION}: "
                    "make the index anew"
                )
            if content.pop("checksum", None) != _checksum(content):
                raise ValueError("its checksum does not fit")
            del content["format"], content["version"]
            shards = content.pop("shards")
            _expect(isinstance(shards, list), "shards", shards, "a list")
            manifest = cls(**content, shards=tuple(Entry(**entry) for entry in shards))
            manifest.check()
        except _OtherError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return manifest

    def check(self) -> None:
        """Raises ValueError where something is not what a writer would have written."""
        _expect(_is_text(self.model, "[0-9a-f]{64}"), "model", self.model, "a checksum")
        _expect(type(self.maps) is bool, "maps", self.maps, "true or false")
        allowed = (None, *DTYPES, EIGHT_BITS) if self.maps else (None,)
        _expect(self.dtype in allowed, "dtype", self.dtype, "that of maps")
        if self.images is not None:
            check_images(self.images)
            maps = self.images["maps"]
            _expect((maps is not None) == self.maps, "maps", self.maps, f"as these are: {maps}")
            fits = maps is None or self.dtype == maps[0] or (not self.dtype and maps[0] in DTYPES)
            _expect(fits, "dtype", self.dtype, f"as its maps are: {maps}")
        seen: dict[str, tuple[Any, ...]] = {}
        gone: dict[str, set[int]] = {}
        for entry in self.shards:
            entry.check()
            _expect(entry.images == self.images, "images", self.images, "those of every shard")
            about = (entry.sha256, entry.rows)
            _expect(seen.setdefault(entry.file, about) == about, "file", entry.file, "one file")
            removed = set(entry.removed)
            if entry.file in gone:  # removed, and added again: no row counts twice
                both = len(gone[entry.file] | removed) == entry.rows
                _expect(both, "removed", entry.removed, f"all rows that {entry.file} has above")
                removed &= gone[entry.file]
            gone[entry.file] = removed
        rows = sum(entry.rows for entry in self.shards)
        fits = _is_count(self.added) and self.added >= rows
        _expect(fits, "added", self.added, f"a number >= {rows}, the rows of all shards")

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

    @property
    def made(self) -> tuple[Any, ...]:
        """As what the index was made, which no change of it touches."""
        return self.model, self.dtype, self.maps

    @property
    def files(self) -> set[str]:
        """Names of the shards."""
        return {entry.file for entry in self.shards}


class _OtherError(ValueError):
    """Not a damaged manifest, but none, or one of another version."""


def check_no_link(path: Path) -> None:
    """Raises ValueError for a file that lies elsewhere: an index is read from its folder alone.

    Example:
        >>> check_no_link(Path("index.json"))
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link: expected the file itself (cp -L copies it)")


def check_images(images: Any) -> None:
    """Raises ValueError where it can't be what images have in common.

    Example:
        >>> check_images({"kind": "basis", "features": ["float32", 4], "maps": ["float16", 4, 6]})
        Traceback (most recent call last):
        ValueError: maps is ['float16', 4, 6], but must be a dtype and 3 sizes
    """
    fits = isinstance(images, dict) and set(images) == {"kind", "features", "maps"}
    _expect(fits, "images", images, "a kind, features and maps")
    for name, dims, dtypes in (("features", 1, DTYPES), ("maps", 3, (*DTYPES, EIGHT_BITS))):
        size = images[name]
        if name == "maps" and size is None:
            continue
        fits = isinstance(size, list) and len(size) == 1 + dims and size[0] in dtypes
        fits = fits and all(_is_count(each) and each for each in size[1:])
        fits = fits and math.prod(size[1:]) < _MOST
        _expect(fits, name, size, f"a dtype and {dims} size{'s' * (dims > 1)}")
    kind, dim = images["kind"], images["features"][1]
    channels = dim if images["maps"] is None else images["maps"][1]
    fits = dim == channels if kind == "basis" else kind == "activations" and dim % channels == 0
    _expect(fits, "images", images, "a basis of as many channels as features, or activations")


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


def size_of(tensor: Tensor) -> list[Any]:
    """Returns the dtype and the size of one image's part of a tensor.

    Example:
        >>> size_of(torch.rand(2, 4, 6, 3))
        ['float32', 4, 6, 3]
    """
    return [dtype_name(tensor.dtype), *tensor.shape[1:]]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as a manifest has it.

    Example:
        >>> dtype_name(torch.float16)
        'float16'
    """
    return str(dtype).removeprefix("torch.")


def _expect(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value!r:.80}, but must be {expected}")


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
