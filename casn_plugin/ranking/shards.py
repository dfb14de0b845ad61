"""The shards of an index: files of encoded images, each named after its content.

A shard is one safetensors file. It is written aside and moved to its place before a manifest
names it: whatever interrupts a change, the folder holds either the old index or the new one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from casn_plugin.encoding import Encoding
from casn_plugin.files import move
from casn_plugin.identities import Ids, as_ids
from casn_plugin.ranking.kept import PARTS, Kept
from casn_plugin.ranking.manifest import MANIFEST, Entry, Manifest, check_no_link, same_images


class Shard:
    """The images of one file, memory-mapped; nothing is used before its checksum is compared.

    The head (names, labels and all other checksums) is compared by :meth:`read`, the features and
    the maps of an image when they are first asked for.

    Args:
        path: of the file.
        tensors: all that is in it.
        entry: what the manifest says of it.
        verify: compare features and maps with their checksums.

    Attributes:
        kept: the images, compared with nothing.
        names: their names.
        pids: their identities, -1 where none was given.
        camids: their cameras, -1 where none was given.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: it does not hold what the
            manifest says.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], entry: Entry, *, verify: bool
    ) -> None:
        images, self._path = entry.images, path
        some = (tensors.get(name) for name in ("maps", "scales"))
        self.kept = Kept(images["kind"], tensors["features"], *some)
        parts = [part for part in PARTS if part in tensors]
        known = {"names", "pids", "camids", *self.kept.tensors, *map(_digests, parts)}
        lengths = {len(each) for name, each in tensors.items() if name != "names"}
        if set(tensors) != known or lengths != {entry.rows} or self.kept.images != images:
            raise ValueError(f"it does not hold what {MANIFEST} says")
        eight_bits = self.kept.maps is not None and self.kept.maps.dtype == torch.int8
        expected = (torch.float32, (entry.rows, images["maps"][1])) if eight_bits else None
        scales = self.kept.scales
        if (scales if scales is None else (scales.dtype, scales.shape)) != expected:
            raise ValueError("its scales are not those of maps in 8 bits")
        text = tensors["names"].numpy()
        if text.dtype != np.uint8 or text.ndim != 1:
            raise ValueError(f"its names are {text.dtype}, of {text.ndim} dimensions")
        self.names = json.loads(text.tobytes())
        listed = isinstance(self.names, list) and len(self.names) == entry.rows
        if not listed or not all(isinstance(name, str) for name in self.names):
            raise ValueError("its names are no list of text")
        pids, camids = (tensors[name].numpy() for name in ("pids", "camids"))
        if pids.dtype != np.int64 or camids.dtype != np.int64:
            raise ValueError(f"its labels are {pids.dtype} and {camids.dtype}, not int64")
        self.pids, self.camids = as_ids("pids", pids), as_ids("camids", camids)
        self._expected = {part: tensors[_digests(part)].numpy() for part in parts}
        for digests in self._expected.values():
            if digests.dtype != np.uint8 or digests.shape != (entry.rows, 32):
                raise ValueError(f"its checksums are {digests.dtype}, {digests.shape}")
        self._unseen = {part: np.full(entry.rows, verify) for part in parts}

    @classmethod
    def read(cls, folder: Path, entry: Entry, *, verify: bool) -> "Shard":
        """Returns a shard whose head fits its checksum.

        Args:
            folder: of the index.
            entry: what the manifest says of it.
            verify: compare features and maps with their checksums when they are asked for.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: its head or its size is damaged, it is a link, or it does not hold what
                the manifest says.
        """
        path = folder / entry.file
        if not path.is_file():
            raise FileNotFoundError(f"the gallery index lacks its shard {path}")
        check_no_link(path)
        try:
            with safe_open(path, framework="pt") as file:  # of the size that its header says
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _head_sha256(path, tensors) != entry.sha256:
                raise ValueError("its checksum does not fit")
            return cls(path, tensors, entry, verify=verify)
        except FileNotFoundError:
            raise
        except (
            SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ValueError(f"{path} is damaged: {error}") from error

    def features(self, rows: slice | Tensor) -> Tensor:
        """Returns the features of some of the images.

        Raises:
            ValueError: they are damaged.
        """
        self._compare("features", rows)
        return self.kept.features[rows]

    def encoding(self, rows: slice | Tensor) -> Encoding:
        """Returns the encoding of some of the images, where maps are kept.

        Raises:
            ValueError: they are damaged.
        """
        for part in PARTS:
            self._compare(part, rows)
        return self.kept.encoding(rows)

    def verify(self, rows: slice | Tensor) -> None:
        """Compares some of the images with their checksums, also if they were before.

        Raises:
            ValueError: they are damaged.
        """
        for part, unseen in self._unseen.items():
            unseen[rows if isinstance(rows, slice) else rows.numpy()] = True
            self._compare(part, rows)

    def _compare(self, part: str, rows: slice | Tensor) -> None:
        """Raises ValueError for images that do not fit their checksums, if not seen before."""
        unseen = self._unseen[part]
        numbers = np.arange(len(unseen))[rows if isinstance(rows, slice) else rows.numpy()]
        new = np.unique(numbers[unseen[numbers]])
        damaged = (self.kept.checksums(part, new.tolist()) != self._expected[part][new]).any(1)
        if damaged.any():
            name = self.names[new[damaged][0]]
            raise ValueError(
                f"{self._path} is damaged: the {part} of the image named {name!r} do not fit "
                "their checksum"
            )
        unseen[new] = False


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
        >>> manifest = Manifest(model="0" * 64, dtype="float16")
        >>> images = Encoding(torch.rand(2, 4), basis=torch.rand(2, 4, 6, 3))
        >>> with TemporaryDirectory() as name:
        ...     writer = Writer(Path(name), manifest)
        ...     writer.write(Kept.of(images, manifest), names=["a", "b"])
        ...     entry = writer.written[0].entry
        ...     Shard.read(Path(name), entry, verify=True).encoding(slice(1)).maps.dtype
        torch.float16
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.written: list[Written] = []
        self._folder, self._manifest = folder, manifest

    def write(
        self,
        images: Kept,
        names: Sequence[str | int],
        pids: Ids | None = None,
        camids: Ids | None = None,
    ) -> None:
        """Writes images as one shard; none where there are none.

        Args:
            images: as the index keeps them.
            names: their names; a number for one that has been given none.
            pids: their identities.
            camids: their cameras.

        Raises:
            TypeError: pids or camids that are no integers.
            ValueError: lists of another length, images of another kind or size than those before.
        """
        rows = len(images)
        if len(names) != rows:
            raise ValueError(f"expected {rows} names, one an image, got {len(names)}")
        labels = {
            name: torch.from_numpy(as_ids(name, ids, rows))
            for name, ids in (("pids", pids), ("camids", camids))
        }
        if not rows:
            return
        common = self.written[0].entry.images if self.written else self._manifest.images
        same_images(common, images.images)
        listed = json.dumps([str(name) for name in names]).encode()
        tensors = {
            **images.tensors,
            **labels,
            "names": torch.frombuffer(bytearray(listed), dtype=torch.uint8),
        }
        for part in PARTS:
            if part in images.tensors:
                tensors[_digests(part)] = torch.from_numpy(images.checksums(part, range(rows)))
        path = self._folder / "new"
        path.touch()
        mode = path.stat().st_mode  # as the umask says; safetensors' own is 0600
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # so safetensors says that a disk is full
            raise OSError(f"{path} can't be written: {error}") from error
        path.chmod(mode)
        sha256 = _head_sha256(path, tensors)
        entry = Entry(f"{sha256[:24]}.safetensors", sha256, rows, images.images)
        move(path, self._folder / entry.file)
        self.written.append(Written(self._folder / entry.file, entry, list(names)))

    def renumbered(self, shards: Sequence[Written], shift: int) -> list[Written]:
        """Returns shards in which images without names have other numbers: higher by a shift.

        Those that have such images are written anew, if there is a shift.
        """
        others = []
        for shard in shards:
            if shift and any(isinstance(name, int) for name in shard.names):
                images = Shard.read(shard.path.parent, shard.entry, verify=True)
                images.verify(slice(None))
                names = [name + shift if isinstance(name, int) else name for name in shard.names]
                self.write(images.kept, names, images.pids, images.camids)
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


def _digests(part: str) -> str:
    """Returns what the checksums of a part are called in a shard."""
    return f"{part}_sha256"


def _head_sha256(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Returns the checksum of a shard's header and of all but its features and maps."""
    with path.open("rb") as file:
        start = file.read(8)  # the length of what follows
        digest = hashlib.sha256(start + file.read(int.from_bytes(start, "little")))
    for name in sorted(tensors):
        if not any(name in part for part in PARTS.values()):
            digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
