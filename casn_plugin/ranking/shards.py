"""The shards of an index: files of encoded images, each named after its content.

A shard is one safetensors file. It is written aside and moved to its place before a manifest
names it: whatever interrupts a change, the folder holds either the old index or the new one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from casn_plugin.encoding import Encoding
from casn_plugin.files import move
from casn_plugin.identities import Ids, as_ids
from casn_plugin.ranking.manifest import (
    DTYPES,
    MANIFEST,
    Common,
    Entry,
    Manifest,
    check_no_link,
    dtype_name,
    same_images,
    size_of,
)


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
            ValueError: it is damaged, a link, or does not hold what the manifest says.
        """
        path = folder / entry.file
        if not path.is_file():
            raise FileNotFoundError(f"the gallery index lacks its shard {path}")
        check_no_link(path)
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
            sizes = [size_of(features), size_of(maps)]
            if lengths != {entry.rows} or sizes != [images["features"], images["maps"]]:
                raise ValueError(f"it does not hold what {MANIFEST} says")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("its names are no list of text")
            if pids.dtype != np.int64 or camids.dtype != np.int64:
                raise ValueError(f"its labels are {pids.dtype} and {camids.dtype}, not int64")
            pids, camids = as_ids("pids", pids), as_ids("camids", camids)
            encoding = Encoding(features, **{images["kind"]: maps})
        except FileNotFoundError:
            raise
        except (
            SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(encoding, names, pids, camids)


class Written(NamedTuple):
    """A shard that is written, but does not count yet.

    Attributes:
        path: where it lies.
        entry: what a manifest has to say of it.
        names: of its images; a number for one that has been given none.
    """

    path: Path
    entry: Entry
    names: list[str | int]

    def within(self, folder: Path) -> "Written":
        """Returns it as it is found in an index's folder, which another process may call else."""
        return self._replace(path=folder / self.path.parent.name / self.path.name)


class Writer:
    """Writes new shards into a folder, from where they are moved to the index's.

    Args:
        folder: where they are written.
        manifest: whose dtype and images they take.

    Attributes:
        written: the shards.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> images = Encoding(torch.rand(2, 4), basis=torch.rand(2, 4, 6, 3))
        >>> with TemporaryDirectory() as name:
        ...     writer = Writer(Path(name), Manifest(model="0" * 64, dtype="float16"))
        ...     writer.write(images, names=["a", "b"])
        ...     entry = writer.written[0].entry
        ...     Shard.read(Path(name), entry, verify=True).encoding.maps.dtype
        torch.float16
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.written: list[Written] = []
        self._folder, self._manifest = folder, manifest

    def write(
        self,
        encoding: Encoding,
        names: Sequence[str | int],
        pids: Ids | None = None,
        camids: Ids | None = None,
    ) -> None:
        """Writes images as one shard; none where there are none.

        Args:
            encoding: the images.
            names: their names; a number for one that has been given none.
            pids: their identities.
            camids: their cameras.

        Raises:
            TypeError: pids or camids that are no integers, an encoding of no float dtype.
            ValueError: lists of another length, images of another kind or size than those before,
                features or maps that are not finite, or too large for the index's dtype.
        """
        rows = len(encoding)
        if len(names) != rows:
            raise ValueError(f"expected {rows} names, one an image, got {len(names)}")
        labels = {
            name: torch.from_numpy(as_ids(name, ids, rows))
            for name, ids in (("pids", pids), ("camids", camids))
        }
        if not rows:
            return
        for name, values in (("features", encoding.features), ("maps", encoding.maps)):
            _check_kept(name, values)
        maps = encoding.maps
        if self._manifest.dtype is not None:
            maps = maps.to(getattr(torch, self._manifest.dtype))
            if not maps.isfinite().all():
                raise ValueError(
                    f"expected finite maps that {maps.dtype} can hold, got values up to "
                    f"{encoding.maps.abs().max():.3g}"
                )
        kind = "basis" if encoding.basis is not None else "activations"
        images = {"kind": kind, "features": size_of(encoding.features), "maps": size_of(maps)}
        same_images(self.written[0].entry.images if self.written else self._manifest.images, images)
        tensors = {
            "features": encoding.features.detach().cpu().contiguous(),
            "maps": maps.detach().permute(0, 2, 3, 1).cpu().contiguous(),
            **labels,
        }
        metadata = {"names": json.dumps([str(name) for name in names])}  # one: order is random
        path = self._folder / "new"
        path.touch()
        mode = path.stat().st_mode  # as the umask says; safetensors' own is 0600
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:  # so safetensors says that a disk is full
            raise OSError(f"{path} can't be written: {error}") from error
        path.chmod(mode)
        sha256 = _sha256(path)
        entry = Entry(f"{sha256[:24]}.safetensors", sha256, rows, images)
        move(path, self._folder / entry.file)
        self.written.append(Written(self._folder / entry.file, entry, list(names)))

    def renumbered(self, shards: Sequence[Written], shift: int) -> list[Written]:
        """Returns shards in which images without names have other numbers: higher by a shift.

        Those that have such images are written anew, if there is a shift.
        """
        others = []
        for shard in shards:
            if shift and any(isinstance(name, int) for name in shard.names):
                images = Shard.read(shard.path.parent, shard.entry, verify=False)
                names = [name + shift if isinstance(name, int) else name for name in shard.names]
                self.write(images.encoding, names, images.pids, images.camids)
                shard = self.written[-1]
            others.append(shard)
        return others


def without_taken(
    shards: Sequence[Written], taken: set[str], *, skip: bool
) -> list[tuple[Path, Entry]]:
    """Returns the paths of new shards and what a manifest has to say of them.

    Args:
        shards: the shards, in order.
        taken: names that an index has already.
        skip: leave out images whose name is taken, by an image of the shards before too.

    Raises:
        ValueError: a name that is taken: any without `skip`, a number with it.

    Example:
        >>> images = {"kind": "basis", "features": ["float32", 4], "maps": ["float32", 4, 6, 3]}
        >>> shard = Written(Path("aside"), Entry("file", "sha256", 3, images), ["a", "b", "a"])
        >>> [(_, entry)] = without_taken([shard], {"b"}, skip=True)
        >>> entry.removed
        [1, 2]
    """
    taken, kept = set(taken), []
    for (
        path,
        entry,
        names,
    ) in shards:
        gone = []
        for row, name in enumerate(names):
            if str(name) not in taken:
                taken.add(str(name))
            elif skip and isinstance(name, str):
                gone.append(row)
            else:
                raise taken_error(name)
        if len(gone) < len(names):
            kept.append((path, replace(entry, removed=gone)))
    return kept


def taken_error(name: str | int) -> ValueError:
    """Returns the error that a name is taken.

    Example:
        >>> print(taken_error("a.jpg"))
        an image named 'a.jpg' is there already: duplicates="skip" leaves out those that are
    """
    if isinstance(name, int):
        return ValueError(
            f"images without names are numbered, but one is named {str(name)!r} already: give names"
        )
    return ValueError(
        f'an image named {name!r} is there already: duplicates="skip" leaves out those that are'
    )


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


def _check_kept(name: str, values: Tensor) -> None:
    """Raises an error for values that an index does not keep."""
    if dtype_name(values.dtype) not in DTYPES:
        raise TypeError(f"{name} must be of one of the dtypes {DTYPES}, got {values.dtype}")
    finite = values.isfinite()
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int((~finite).sum())} of {values.numel()} values are not"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
