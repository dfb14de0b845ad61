"""The set on disk: rendered once, moved into its place in one step, checked at every use."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from filelock import FileLock
from tqdm import tqdm

from casn_plugin.pedestrians.cameras import CAMERAS
from casn_plugin.pedestrians.picture import check_integer, render_pedestrian

FORMAT_VERSION = 1
FIRST_TEST_PID = 5001
"""Test identities are numbered from here, so that neither half depends on the other's size."""

Record = tuple[str, int, int]


class PedestrianSet(NamedTuple):
    """The three lists of a re-identification data set, each of (image path, pid, camid).

    Attributes:
        train: Pictures to learn from; pids are relabelled 0..n-1.
        query: One picture per test identity and camera; pids are those of the file names.
        gallery: All other pictures of the test identities.
    """

    train: list[Record]
    query: list[Record]
    gallery: list[Record]


_TRAIN, _QUERY, _GALLERY, _MASKS = "bounding_box_train", "query", "bounding_box_test", "masks"


class _Item(NamedTuple):
    folder: str
    name: str
    pid: int
    camid: int
    number: int


class _Plan(NamedTuple):
    """What a set is made of; its folder, its manifest and its items follow from these numbers."""

    num_train_pids: int
    num_test_pids: int
    num_cameras: int
    images_per_camera: int
    height: int
    width: int
    seed: int

    @property
    def folder(self) -> str:
        return (
            f"pedestrians-v{FORMAT_VERSION}-s{self.seed}"
            f"-{self.num_train_pids}+{self.num_test_pids}ids-{self.num_cameras}cams"
            f"-{self.images_per_camera}imgs-{self.height}x{self.width}"
        )

    def items(self) -> list[_Item]:
        """Returns every image of the set, sorted by identity, camera and index."""
        pids = [*range(1, 1 + self.num_train_pids)]
        pids += range(FIRST_TEST_PID, FIRST_TEST_PID + self.num_test_pids)
        items = []
        for pid in pids:
            for camid in range(self.num_cameras):
                for index in range(self.images_per_camera):
                    test = _QUERY if index == 0 else _GALLERY
                    folder = _TRAIN if pid < FIRST_TEST_PID else test
                    name = f"{pid:04d}_c{camid + 1}s1_{index + 1:06d}_00"
                    items.append(_Item(folder, name, pid, camid, index))
        return items

    def manifest(self) -> dict[str, Any]:
        return {
            "format": "casn-plugin pedestrians",
            "version": FORMAT_VERSION,
            "parameters": self._asdict(),
            "images": len(self.items()),
        }


def mask_path(img_path: str) -> str:
    """Returns the path of the person mask that belongs to an image of the set.

    Args:
        img_path: Path of an image, as the lists of `load_pedestrians` hold it.

    Returns:
        Path of a grey PNG of the image's size, 255 where the person is seen, 0 elsewhere.

    Raises:
        ValueError: If the path is not that of an image in one of the set's folders.

    Example:
        >>> mask_path("set/query/5001_c1s1_000001_00.jpg")
        'set/masks/5001_c1s1_000001_00.png'
    """
    path = Path(img_path)
    if path.suffix != ".jpg" or path.parent.name not in {_TRAIN, _QUERY, _GALLERY}:
        raise ValueError(
            f"img_path must be a .jpg in {_TRAIN}, {_QUERY} or {_GALLERY}, got {img_path!r}"
        )
    return str(path.parent.parent / _MASKS / f"{path.stem}.png")


def _write(path: Path, image: np.ndarray, *options: int) -> None:
    """Writes a picture, whole or not at all."""
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise RuntimeError(f"cv2 cannot encode {path.name}")
    partial = path.with_suffix(".tmp")
    partial.write_bytes(data.tobytes())
    partial.replace(path)


def _render_all(folder: Path, plan: _Plan, progress: bool) -> None:
    """Renders the set beside `folder` and moves it there in one step when it is complete.

    What an interrupted run has rendered is kept, and the next one goes on from there; of several
    at once, one renders and the others wait for it.
    """
    partial = folder.parent / f".{folder.name}.partial"
    for name in (_TRAIN, _QUERY, _GALLERY, _MASKS):
        (partial / name).mkdir(parents=True, exist_ok=True)
    hidden = None if progress else True  # None: shown on a terminal
    done = 0
    items = plan.items()
    try:
        for item in tqdm(items, desc="Rendering pedestrians", unit="img", disable=hidden):
            path, mask_at = partial / item.folder / f"{item.name}.jpg", partial / _MASKS
            if not path.exists():  # it is written after its mask
                image, mask = render_pedestrian(
                    item.pid, item.camid, item.number,
                    seed=plan.seed, height=plan.height, width=plan.width,
                )  # fmt: skip
                _write(mask_at / f"{item.name}.png", mask)
                _write(path, image[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 95)
            done += 1
    except BaseException:
        kept = f"{done} of {len(items)} pictures are kept in {partial}"
        tqdm.write(f"{kept}: the next time, it goes on from there")
        raise
    (partial / "manifest.json").write_text(json.dumps(plan.manifest(), indent=2) + "\n")
    partial.rename(folder)


def _verify(folder: Path, plan: _Plan) -> None:
    """Raises RuntimeError unless the folder holds exactly the set of this plan."""
    remedy = f"delete the folder {folder} to have it rendered anew, or pass another root"
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"no readable manifest.json in {folder} ({error}); {remedy}") from error
    expected = plan.manifest()
    if found != expected:
        raise RuntimeError(f"{folder} holds another set: {found}, expected {expected}; {remedy}")
    present = {
        name: {entry.name for entry in os.scandir(folder / name)}
        if (folder / name).is_dir()
        else set()
        for name in (_TRAIN, _QUERY, _GALLERY, _MASKS)
    }
    items = plan.items()
    wanted = [(item.folder, f"{item.name}.jpg") for item in items]
    wanted += [(_MASKS, f"{item.name}.png") for item in items]
    missing = [f"{where}/{name}" for where, name in wanted if name not in present[where]]
    if missing:
        raise RuntimeError(
            f"{len(missing)} files missing in {folder}, first {missing[0]}; {remedy}"
        )


def _cache_folder() -> Path:
    if own := os.environ.get("CASN_PLUGIN_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "casn-plugin"


# nine arguments: every number of a set is a choice of its own
def load_pedestrians(
    root: str | os.PathLike[str] | None = None,
    *,
    num_train_pids: int = 64,
    num_test_pids: int = 64,
    num_cameras: int = 4,
    images_per_camera: int = 4,
    height: int = 128,
    width: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> PedestrianSet:
    """Returns the train, query and gallery lists, rendering the images to disk the first time.

    The images lie in a folder of `root` named after the parameters, in Market-1501's layout, with
    the person masks (see `mask_path`) beside them. An image depends on `seed`, its identity, camera
    and index and on the size only, so a larger set holds the files of a smaller one.

    Args:
        root: Folder to keep sets in; None takes `$CASN_PLUGIN_CACHE`, else
            `$XDG_CACHE_HOME/casn-plugin`, else `~/.cache/casn-plugin`.
        num_train_pids: Identities to train on, from 1 to 5000.
        num_test_pids: Identities to test on, from 1 to 4999; none is in the training set.
        num_cameras: Cameras, from 2 to 6; every identity is seen by all of them.
        images_per_camera: Pictures of an identity from each camera, from 2 to 999999; of a test
            identity the first is a query and the others are in the gallery.
        height: Height of the images in pixels, at least 32.
        width: Width of the images in pixels, at least 16.
        seed: Chooses the people and the scenes, from 0.
        progress: Whether to show a progress bar while rendering.

    Returns:
        Lists of (image path, pid, camid), camid from 0. In train the pids run from 0, in query and
        gallery they are those of the file names, from 5001.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of its range.
        RuntimeError: If the set's folder is there but is not what it should be.
        OSError: If the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     data = load_pedestrians(
        ...         root, num_train_pids=2, num_test_pids=1, num_cameras=2, images_per_camera=3,
        ...         height=32, width=16, progress=False)
        >>> len(data.train), len(data.query), len(data.gallery)
        (12, 2, 4)
        >>> os.path.basename(data.query[1][0]), data.query[1][1:]
        ('5001_c2s1_000001_00.jpg', (5001, 1))
    """
    check_integer("num_train_pids", num_train_pids, 1, FIRST_TEST_PID - 1)
    check_integer("num_test_pids", num_test_pids, 1, 10_000 - FIRST_TEST_PID)
    check_integer("num_cameras", num_cameras, 2, len(CAMERAS))
    check_integer("images_per_camera", images_per_camera, 2, 999_999)
    check_integer("height", height, 32)
    check_integer("width", width, 16)
    check_integer("seed", seed, 0)
    numbers = (
        num_train_pids, num_test_pids, num_cameras, images_per_camera, height, width, seed
    )  # fmt: skip
    plan = _Plan(*map(int, numbers))
    parent = _cache_folder() if root is None else Path(root)
    folder = parent.expanduser().absolute() / plan.folder
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.parent / f".{folder.name}.lock"
        with FileLock(lock):
            if not folder.exists():
                _render_all(folder, plan, progress)
            with contextlib.suppress(OSError):  # Windows: another process waits for it
                lock.unlink(missing_ok=True)
    _verify(folder, plan)

    lists: dict[str, list[Record]] = {_TRAIN: [], _QUERY: [], _GALLERY: []}
    for item in plan.items():
        pid = item.pid - 1 if item.folder == _TRAIN else item.pid
        lists[item.folder].append((str(folder / item.folder / f"{item.name}.jpg"), pid, item.camid))
    return PedestrianSet(lists[_TRAIN], lists[_QUERY], lists[_GALLERY])
