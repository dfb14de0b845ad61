"""Pictures, folders and loaders in, encodings out: the one place where batches are read."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from casn_plugin.doors import check_images, check_size, check_tensor, check_weight
from casn_plugin.encoding import Encoding
from casn_plugin.hooks import place_of
from casn_plugin.identities import as_ids
from casn_plugin.model import CASN, as_casn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_IDS = ("pids", "camids")
_ORIENTATION = 0x0112
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # what torchreid's reader makes white

Image = Tensor | PIL.Image.Image | str | os.PathLike[str]
"""A normalised (3, rows, columns) tensor as the model takes it, a picture, or its path."""


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become what the model takes, and how that becomes a picture again.

    Attributes:
        size: (rows, columns) that pictures and paths are brought to; None: the model's
            `input_size`. Tensors are taken as they are.
        mean: what pictures are normalised with, and tensors were: by default ImageNet's.
        std: likewise, positive.

    Raises:
        TypeError: a size that is no two integers, mean or std of something else than numbers.
        ValueError: mean or std that are not three finite numbers, a std that is not positive.

    Example:
        >>> Preprocessing((4, 2)).load(PIL.Image.new("RGB", (8, 8))).shape
        torch.Size([3, 4, 2])
    """

    size: tuple[int, int] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Raises ValueError for a mean or std that can't be."""
        if self.size is not None:
            check_size("size", self.size)
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if not hasattr(numbers, "__len__") or isinstance(numbers, str | bytes | dict):
                raise TypeError(f"{name} must be three numbers, got {numbers!r}")
            for number in numbers:
                check_weight(name, abs(number) if isinstance(number, int | float) else number)
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"mean and std must be three numbers, std positive, got {self.mean} and {self.std}"
            )

    @classmethod
    def of(cls, datamanager: Any) -> "Preprocessing":
        """Returns how a torchreid data manager prepares test images.

        The colours are ImageNet's where it does not say.
        """
        prepared = getattr(datamanager, "transform_te", None)
        size = datamanager.height, datamanager.width
        for transform in reversed(getattr(prepared, "transforms", [prepared])):
            if hasattr(transform, "mean") and hasattr(transform, "std"):
                return cls(size, transform.mean, transform.std)
        return cls(size)

    def for_model(self, model: CASN) -> "Preprocessing":
        """Returns the same, with the model's `input_size` where no size is given."""
        return Preprocessing(self.size or model.input_size, self.mean, self.std)

    def load(self, image: Image) -> Float[Tensor, "3 rows columns"]:
        """Returns a normalised image, upright, and otherwise as torchreid prepares test images.

        Raises:
            TypeError: an image of none of the kinds.
            ValueError: a tensor of another shape, a picture where no size is known, or one of
                float values, whose range is not known.
            OSError: a path that is no picture, or a damaged one.
        """
        from torchvision.transforms import functional as transforms

        if isinstance(image, Tensor):
            return check_tensor("an image", image, "3 rows columns")
        if isinstance(image, str | os.PathLike):
            try:
                with PIL.Image.open(image) as opened:
                    return self.load(opened)
            except FileNotFoundError:
                raise
            except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                raise OSError(f"{os.fspath(image)} can't be read as a picture: {error}") from error
        if not isinstance(image, PIL.Image.Image):
            raise TypeError(
                f"an image must be a tensor, a PIL image or a path, got {type(image).__name__}"
            )
        if self.size is None:
            raise ValueError("pictures need a size (rows, columns) that they are brought to")
        upright = _in_rgb(PIL.ImageOps.exif_transpose(image))
        resized = transforms.to_tensor(transforms.resize(upright, list(self.size)))
        normalised: Tensor = transforms.normalize(resized, list(self.mean), list(self.std))
        return normalised

    def pictures(
        self, imgs: Float[Tensor, "images 3 rows columns"]
    ) -> Float[np.ndarray, "images rows columns 3"]:
        """Returns normalised images as RGB pictures in [0, 1], channels last.

        Example:
            >>> Preprocessing().pictures(torch.zeros(1, 3, 2, 2))[0, 0, 0].round(3).tolist()
            [0.485, 0.456, 0.406]
        """
        rgb = imgs.detach().float().cpu() * torch.tensor(self.std)[:, None, None]
        rgb = (rgb + torch.tensor(self.mean)[:, None, None]).clamp(0, 1)
        return np.asarray(rgb.permute(0, 2, 3, 1).numpy(), dtype=np.float64)


def _in_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Returns a picture of any mode and depth in 8-bit RGB; transparency is left out."""
    if picture.mode == "F":
        raise ValueError(
            "a picture of float values has no known range: expected 8 or 16 bits a channel, got "
            "mode 'F'"
        )
    if picture.mode in _DEEP:
        values = np.asarray(picture, dtype=np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(
                f"expected a picture of 8 or 16 bits, got values from {values.min()} to "
                f"{values.max()}"
            )
        picture = PIL.Image.fromarray((values / 257).round().astype(np.uint8))
    return picture.convert("RGB")


def check_pictures(paths: Iterable[str], *, progress: bool = False) -> None:
    """Reads every picture once, so that a damaged one is found before hours are spent.

    What torchreid's own reader would read wrongly in silence is found too: 16 bits a channel, and
    pictures that EXIF says are to be turned.

    Args:
        paths: of the pictures.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: pictures that are missing or can't be read; the first ones are named.

    Example:
        >>> check_pictures([])
    """

    def damage(path: str) -> str | None:
        try:
            with PIL.Image.open(path) as picture:
                if picture.mode in (*_DEEP, "F"):
                    return f"{path} (mode {picture.mode}, which torchreid's reader turns white)"
                if picture.getexif().get(_ORIENTATION, 1) != 1:
                    return (
                        f"{path} (to be turned upright by EXIF, which torchreid's reader does not)"
                    )
                picture.load()
        except Exception as error:  # every format fails in its own way
            return f"{path} ({error})"
        return None

    listed = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        found = tqdm(
            pool.map(damage, listed), "Checking pictures", len(listed), unit="img", leave=False,
            disable=None if progress else True,
        )  # fmt: skip
        damaged = [each for each in found if each is not None]
    if damaged:
        shown = "; ".join(damaged[:5]) + (" ..." if len(damaged) > 5 else "")
        raise ValueError(f"{len(damaged)} of {len(listed)} pictures can't be read: {shown}")


class Batch(NamedTuple):
    """A batch of images and what is known of them; None where a loader does not say.

    Attributes:
        imgs: (B, 3, rows, columns), normalised.
        names: their names, such as torchreid's image paths.
        pids: their identities.
        camids: their cameras.
    """

    imgs: Tensor
    names: list[str] | None = None
    pids: list[int] | None = None
    camids: list[int] | None = None


def read_batch(data: Any) -> Batch:
    """Returns what a loader has given.

    Args:
        data: images (B, 3, rows, columns); a tuple or list of them and, where there are, pids and
            camids; or torchreid's dictionary of "img" and, where there are, "impath", "pid" and
            "camid".

    Raises:
        TypeError: anything else, pids or camids that are no integers.
        ValueError: pids or camids that are not one an image, or below -1.

    Example:
        >>> read_batch((torch.rand(2, 3, 8, 4), torch.tensor([7, 9]))).pids
        [7, 9]
    """
    if isinstance(data, Mapping):
        imgs, *labels = (data.get(key) for key in ("img", "impath", "pid", "camid"))
    else:
        imgs, pids, camids, *more = (
            (*data, None, None, None)[: max(len(data), 3)]
            if isinstance(data, (tuple, list)) and data
            else (data, None, None)
        )
        if more:
            raise TypeError(
                "a batch must be images, images and pids, or images, pids and camids, got a "
                f"{type(data).__name__} of {len(data)}"
            )
        labels = [None, pids, camids]
    if not isinstance(imgs, Tensor) or imgs.ndim != 4:
        raise TypeError(
            "the loader must give batches of images (B, 3, H, W), or dictionaries with them as "
            f"'img', got {type(data).__name__}"
        )
    names, *numbers = labels
    pids, camids = (
        None if each is None else as_ids(name, each, len(imgs)).tolist()
        for name, each in zip(_IDS, numbers, strict=True)
    )
    return Batch(imgs, names, pids, camids)


class Encoded(NamedTuple):
    """The encodings of all images of a loader, on the CPU, and whom they show.

    Attributes:
        encoding: what ranking needs of the images.
        pids: their identities.
        camids: their cameras.
    """

    encoding: Encoding
    pids: Int64[np.ndarray, " images"]
    camids: Int64[np.ndarray, " images"]


def encode_images(model: nn.Module, imgs: Float[Tensor, "images 3 rows columns"]) -> Encoding:
    """Returns the encoding of images on the CPU; they are encoded where the model is.

    Args:
        model: a CASN, or one in any of PyTorch's wrappers.
        imgs: normalised images; they are brought to the model's device and dtype.

    Raises:
        TypeError: another model; otherwise as :meth:`CASN.encode`.
        ValueError: as :meth:`CASN.encode`.
    """
    casn = as_casn(model)
    return casn.encode(check_images(imgs).to(*place_of(casn))).to("cpu")


def encode_loader(model: nn.Module, batches: Iterable[Any]) -> Encoded:
    """Returns the encodings of all batches, and whom the images show: -1 where it is not said.

    Raises:
        TypeError: batches that :func:`read_batch` does not know, pids or camids that are no
            integers.
        ValueError: no batch at all; otherwise as :meth:`CASN.encode`.
    """
    encodings: list[Encoding] = []
    every_pid: list[Int64[np.ndarray, _]] = []
    every_camid: list[Int64[np.ndarray, _]] = []
    for data in batches:
        imgs, _, pids, camids = read_batch(data)
        encodings.append(encode_images(model, imgs))
        every_pid.append(as_ids("pids", pids, len(imgs)))
        every_camid.append(as_ids("camids", camids, len(imgs)))
    encoding = Encoding.cat(encodings)
    return Encoded(encoding, np.concatenate(every_pid), np.concatenate(every_camid))


class Item(NamedTuple):
    """One image of a data set, and whom it shows; -1 where that is not said.

    Attributes:
        img: (3, rows, columns), normalised.
        pid: its identity.
        camid: its camera.
    """

    img: Tensor
    pid: int
    camid: int


def read_item(data: Any) -> Item:
    """Returns what a data set has given: one image of what :func:`read_batch` reads many of.

    Raises:
        TypeError: anything else, pids or camids that are no integers.

    Example:
        >>> read_item((torch.rand(3, 8, 4), 7))[1:]
        (7, -1)
    """
    if isinstance(data, Mapping):
        img, pid, camid = (data.get(key) for key in ("img", "pid", "camid"))
    else:
        listed = data if isinstance(data, (tuple, list)) and len(data) else [data]
        img, pid, camid = (*listed, None, None)[:3]
    if not isinstance(img, Tensor) or img.ndim != 3:
        raise TypeError(
            "the data set must give an image (3, rows, columns), or a dictionary with one as "
            f"'img', got {type(data).__name__}"
        )
    numbers: list[Any] = [
        each.item() if isinstance(each, Tensor | np.generic) else each for each in (pid, camid)
    ]
    pids, camids = (as_ids(name, [each]) for name, each in zip(_IDS, numbers, strict=True))
    return Item(img, int(pids[0]), int(camids[0]))


class _Labelled(Dataset[dict[str, Any]]):
    """A sequence of (image, pid, camid) as a data set of dictionaries, as torchreid's are."""

    def __init__(self, data: Sequence[Any], preprocessing: Preprocessing) -> None:
        self.data = data
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image, pid, camid, *_ = self.data[row]
        pids, camids = as_ids("pids", [pid]), as_ids("camids", [camid])
        img = self.preprocessing.load(image)
        return {"img": img, "pid": int(pids[0]), "camid": int(camids[0])}


def image_loader(name: str, data: Any, preprocessing: Preprocessing) -> DataLoader[Any]:
    """Returns a loader of dictionaries with "img", "pid" and "camid", in the order of the data.

    Args:
        name: what the data are called in errors.
        data: a loader, whose data set is gone through in its own order; or a sequence of
            (image, pid, camid), where images may be all that :meth:`Preprocessing.load` takes.
        preprocessing: with a size.

    Raises:
        TypeError: data of another form.
        ValueError: no data, or images of unlike sizes.

    Example:
        >>> loader = image_loader("query", [(torch.rand(3, 8, 4), 7, 0)], Preprocessing((8, 4)))
        >>> [batch["pid"].tolist() for batch in loader]
        [[7]]
    """
    if isinstance(data, DataLoader):
        loader = DataLoader[Any](  # in the order of the data set, whatever its own sampler draws
            data.dataset,
            batch_size=data.batch_size or 32,
            num_workers=data.num_workers,
            collate_fn=data.collate_fn,
        )
    else:
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise TypeError(
                f"{name} must be a DataLoader or a sequence of (image, pid, camid), got "
                f"{type(data).__name__}"
            )
        for entry in data:
            if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) < 3:
                raise TypeError(f"{name} must hold (image, pid, camid), got {entry!r:.80}")
        given = preprocessing.size
        sizes = {tuple(e[0].shape[1:]) if isinstance(e[0], Tensor) else given for e in data}
        if len(sizes) > 1:
            raise ValueError(f"images of {name} must be of one size, got {sorted(map(str, sizes))}")
        loader = DataLoader(_Labelled(data, preprocessing), batch_size=32)
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise ValueError(f"{name} is empty")
    return loader
