"""Pictures, folders and loaders in, encodings out: the one place where batches are read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from casn_plugin.doors import check_images, check_names
from casn_plugin.encoding import Encoding
from casn_plugin.hooks import place_of
from casn_plugin.identities import as_ids
from casn_plugin.model import as_casn
from casn_plugin.preprocessing import Preprocessing

_IDS = ("pids", "camids")


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
        TypeError: anything else, names that are no list of text or paths, pids or camids that are
            no integers.
        ValueError: names, pids or camids that are not one an image, pids or camids below -1.

    Example:
        >>> import torch
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
    given, *numbers = labels
    names = None if given is None else check_names("names ('impath')", given, len(imgs))
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
        >>> import torch
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
        TypeError: data of another form, such as a loader of an IterableDataset.
        ValueError: no data, or images of unlike sizes.

    Example:
        >>> import torch
        >>> loader = image_loader("query", [(torch.rand(3, 8, 4), 7, 0)], Preprocessing((8, 4)))
        >>> [batch["pid"].tolist() for batch in loader]
        [[7]]
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or not hasattr(data.dataset, "__len__"):
            raise TypeError(
                f"{name} must be a loader of a data set of numbered images, of which each can be "
                f"read again, got one of {type(data.dataset).__name__}, which has no length"
            )
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
