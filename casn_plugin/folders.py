"""A folder of pictures as a gallery: found, read, and an index that is kept up to date.

The pictures need no labels. Beside the index lies ``pictures.json``, which says in which state each
picture was encoded, so that only what is new or has changed is encoded again.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from casn_plugin.doors import check_count
from casn_plugin.files import replacing
from casn_plugin.model import CASN, as_casn
from casn_plugin.picturefiles import FORMATS
from casn_plugin.picturenames import MARKET1501, Said, read_name
from casn_plugin.preprocessing import Preprocessing
from casn_plugin.ranking import GalleryIndex
from casn_plugin.ranking.manifest import MANIFEST

_RECORD = "pictures.json"
_FORMAT = "casn-plugin pictures"
_CHUNK = 4096  # so many pictures are encoded between two changes of the index


@dataclass(frozen=True)
class IndexedFolder:
    """An index that is up to date with a folder, as :func:`index_folder` brings it there.

    Attributes:
        index: of the pictures that can be read.
        encoded: names of those that were encoded.
        kept: number of those that were in the index already.
        removed: names of those that are no longer in the folder.
        damaged: names of those that can't be read, and why; they are not in the index. What the
            system did not let be read, such as a forbidden file or a FIFO, is tried again each
            time, what was read and is damaged when it has changed.
    """

    index: GalleryIndex
    encoded: list[str]
    kept: int
    removed: list[str]
    damaged: dict[str, str]

    def describe(self) -> str:
        """Returns in words what was done, and in a line each what was left out."""
        words = (
            f"{len(self.index):,} pictures: {len(self.encoded):,} encoded, {self.kept:,} kept, "
            f"{len(self.removed):,} removed, {len(self.damaged):,} left out"
        )
        return "\n".join([words, *(f"  {name}: {why}" for name, why in self.damaged.items())])


def find_pictures(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of all pictures in a folder, at any depth: paths in it, sorted.

    A picture is what has the ending of a format that is read and is no folder (what is no regular
    file either, such as a FIFO, is refused when it is read); files and folders whose names begin
    with a dot are left out, and links to folders are not followed.

    Args:
        folder: where they are.

    Raises:
        FileNotFoundError: no such folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "deep").mkdir()
        ...     for name in ("b.txt", "a.PNG", "deep/c.jpg"):
        ...         Path(folder, name).touch()
        ...     find_pictures(folder)
        ['a.PNG', 'deep/c.jpg']
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)}")
    names, endings = [], _endings()
    for place, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        inside = Path(place).relative_to(folder)
        names += [
            (inside / file).as_posix()
            for file in files
            if not file.startswith(".") and Path(file).suffix.lower() in endings
        ]
    return sorted(names)


def name_in(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> str:
    """Returns the name that a picture has in a folder, as :func:`find_pictures` gives it.

    Args:
        folder: the folder.
        path: of the picture, which may lie elsewhere: then it is no picture's name in the folder.

    Example:
        >>> name_in("gallery", "gallery/deep/a.jpg")
        'deep/a.jpg'
    """
    try:
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(path).as_posix()


class Loaded(NamedTuple):
    """Pictures, as :func:`load_pictures` reads them.

    Attributes:
        paths: of those that can be read.
        imgs: these, normalised.
        damaged: paths of the others, and why.
    """

    paths: list[str]
    imgs: Float[Tensor, "images 3 rows columns"]
    damaged: dict[str, str]


def load_pictures(paths: Iterable[str], preprocessing: Preprocessing) -> Loaded:
    """Returns the pictures that can be read, each once, and why the others can't.

    Args:
        paths: of the pictures.
        preprocessing: such as ``model.preprocessing``.

    Example:
        >>> found = load_pictures(["nowhere.jpg"], Preprocessing((4, 2)))
        >>> found.imgs.shape, list(found.damaged)
        (torch.Size([0, 3, 4, 2]), ['nowhere.jpg'])
    """
    read = {path: _read(path, preprocessing) for path in dict.fromkeys(paths)}
    imgs = {path: img for path, img in read.items() if isinstance(img, Tensor)}
    unread = {path: each.why for path, each in read.items() if isinstance(each, _Unread)}
    nothing = torch.empty(0, 3, *preprocessing.size)
    return Loaded(
        list(imgs),
        torch.stack([*imgs.values()]) if imgs else nothing,
        unread,
    )


class _Unread(NamedTuple):
    """Why a picture can't be read; and whether it lasts: its content is why, not the system."""

    why: str
    lasting: bool


def _read(path: str, preprocessing: Preprocessing) -> Tensor | _Unread:
    """Returns a picture, or why it can't be read."""
    try:
        return preprocessing.load(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            return _Unread(str(error.strerror), lasting=False)
        return _Unread(str(error).removeprefix(f"{path} "), lasting=True)


def index_folder(
    place: str | os.PathLike[str],
    model: CASN,
    folder: str | os.PathLike[str],
    *,
    pattern: str = MARKET1501,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> IndexedFolder:
    """Returns an index that is up to date with a folder of pictures: only what is new is encoded.

    A picture is named after its path in the folder; that it has changed is told by its size and
    time of modification. Where the model's `preprocessing` has changed, all are encoded again.
    Pictures that are no longer in the folder are removed from the index, unless none is left at
    all. Damaged ones are left out and listed, each time. What was encoded before an interruption
    is kept. Where nothing has changed, nothing is written: the index may be read-only.

    Args:
        place: folder of the index, this folder of pictures' alone; it is made where there is none
            (``GalleryIndex.create`` before, for options of its own).
        model: the model that the index is for; pictures are prepared by its `preprocessing`.
        folder: searched as :func:`find_pictures` does.
        pattern: how names say pids and camids, as :func:`read_name` takes it.
        batch_size: pictures in a batch.
        workers: processes that read pictures; 0: this one.
        progress: show a progress bar on a terminal.

    Raises:
        FileNotFoundError: no such folder.
        TimeoutError: another process is changing the index, and does not finish.
        TypeError: no CASN.
        ValueError: no picture in the folder; an index of other pictures, another model, or pids
            and camids that were read by another pattern; names as :func:`read_name` refuses.
    """
    check_count("batch_size", batch_size)
    check_count("workers", workers, least=0)
    prepared = as_casn(model).preprocessing
    names = find_pictures(folder)
    if not names:
        raise ValueError(f"there is no picture in {os.fspath(folder)}")
    said = {name: read_name(name, pattern) for name in names}
    there = (Path(place) / MANIFEST).exists()
    index = GalleryIndex(place) if there else GalleryIndex.create(place, model)
    index.check_model(model)
    how = [[*each] for each in (prepared.size, prepared.mean, prepared.std)]
    record = _Record.read(index.folder, how)
    stamps = {name: _stamp(Path(folder, name)) for name in names}

    wanted, here = set(names), set(index.names)
    if here and not here & wanted:
        raise ValueError(
            f"none of the {len(here)} pictures in the index in {index.folder} is in "
            f"{os.fspath(folder)}: expected an index of this folder, or a new one"
        )
    kept = {name for name in here & wanted if record.pictures.get(name) == stamps[name]}
    for name, pid, camid in zip(index.names, index.pids, index.camids, strict=True):
        if name in kept and (pid, camid) != said[name][:2]:
            raise ValueError(
                f"in the index {name} has pid {pid} and camid {camid}, but by the pattern "
                f"{said[name].pid} and {said[name].camid}: expected an index made by this pattern"
            )
    if len(kept) < len(here):
        index.remove([row for row, name in enumerate(index.names) if name not in kept])
    known = {name: why for name, why in record.damaged.items() if why[0] == stamps.get(name)}
    new = [name for name in names if name not in kept and name not in known]
    why = {name: damage for name, (_, damage) in known.items()}
    before, record = record, _Record(stamps, known, how)
    if record != before:  # now: a picture that changes while it is encoded is encoded again
        record.write(index.folder)
    with tqdm(
        total=len(new), desc="Encoding", unit="img", leave=False, disable=None if progress else True
    ) as bar:
        for start in range(0, len(new), _CHUNK):
            pictures = _Pictures(Path(folder), new[start : start + _CHUNK], said, prepared)
            left_out = pictures.unread_first()
            if len(left_out) < len(pictures):  # else the index is not touched
                loader = _Reading(pictures, batch_size, num_workers=workers, collate_fn=list)
                loader.bar, loader.left_out = bar, left_out
                index.extend(model, loader)
            why |= {name: each.why for name, each in left_out.items()}
            lasting = [name for name, each in left_out.items() if each.lasting]
            if lasting:
                known |= {name: (stamps[name], why[name]) for name in lasting}
                record.write(index.folder)
    damaged = {name: why[name] for name in sorted(why)}
    encoded = [name for name in new if name not in damaged]
    return IndexedFolder(index, encoded, len(kept), sorted(here - wanted), damaged)


class _Pictures(Dataset[Any]):
    """Pictures as torchreid's dictionaries; of one that can't be read, its name and why."""

    def __init__(
        self, folder: Path, names: list[str], said: dict[str, Said], prepared: Preprocessing
    ) -> None:
        self.folder, self.names, self.said, self.prepared = folder, names, said, prepared

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> dict[str, Any] | tuple[str, _Unread]:
        name = self.names[row]
        img, (pid, camid, _) = _read(str(self.folder / name), self.prepared), self.said[name]
        if isinstance(img, _Unread):
            return name, img
        return {"img": img, "impath": name, "pid": pid, "camid": camid}

    def unread_first(self) -> dict[str, _Unread]:
        """Returns what can't be read of those before the first that can: perhaps all."""
        items = (self[row] for row in range(len(self)))
        return dict(takewhile(lambda item: isinstance(item, tuple), items))  # type: ignore[arg-type]


class _Reading(DataLoader[Any]):
    """Batches of pictures that can be read; the others are put into `left_out`."""

    bar: Any
    left_out: dict[str, _Unread]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.left_out.clear()
        for items in super().__iter__():
            self.left_out |= dict(each for each in items if isinstance(each, tuple))
            whole = [each for each in items if isinstance(each, dict)]
            if whole:
                yield default_collate(whole)
            self.bar.update(len(items))


Stamp = list[int]
"""Size and time of modification of a file."""


class _Record(NamedTuple):
    """In which state pictures were encoded, or found to be damaged, as it lies beside an index."""

    pictures: dict[str, Stamp]
    damaged: dict[str, tuple[Stamp, str]]
    how: list[Any]  # they were prepared: size, mean, std

    @classmethod
    def read(cls, folder: Path, how: list[Any]) -> "_Record":
        """Returns what a folder says of pictures that were prepared so.

        Nothing where there is no record, or none that we wrote: then all is encoded again.
        """
        try:
            content = json.loads((folder / _RECORD).read_bytes())
            if (content["format"], content["version"], content["how"]) != (_FORMAT, 1, how):
                return cls({}, {}, how)
            damaged = {name: (stamp, str(why)) for name, (stamp, why) in content["damaged"].items()}
            return cls(dict(content["pictures"]), damaged, how)
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return cls({}, {}, how)

    def write(self, folder: Path) -> None:
        """Puts the record into its place."""
        with replacing(folder / _RECORD) as path:
            path.write_text(json.dumps({"format": _FORMAT, "version": 1, **self._asdict()}))


def _stamp(path: Path) -> Stamp:
    """Returns size and time of modification of a file; nothing of one that is gone meanwhile."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


@cache
def _endings() -> frozenset[str]:
    """Returns the endings of the formats that are read."""
    return frozenset(
        ending for ending, kind in PIL.Image.registered_extensions().items() if kind in FORMATS
    )
