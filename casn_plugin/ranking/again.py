"""A gallery that keeps no maps: its pictures are encoded again where their attention is needed."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from casn_plugin.doors import check_count, check_kind, check_tensor, check_weight
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.loading import encode_images
from casn_plugin.model import CASN, as_casn
from casn_plugin.preprocessing import Image
from casn_plugin.ranking.contents import Rows, picked
from casn_plugin.ranking.fingerprint import changes, fingerprint
from casn_plugin.ranking.index import GalleryIndex


class EncodedAgain:
    """A gallery of features, whose pictures are encoded again where maps are asked for.

    It goes wherever ranking takes a gallery, and pays where few maps are needed: with a shortlist,
    or for the topk nearest. Features are those that are kept. What comes out again has to be the
    same up to rounding: a changed picture, model or `preprocessing` is an error, not another map.

    Args:
        model: the model that has encoded the gallery; its `preprocessing` prepares pictures.
        gallery: the features: an index (made with ``maps=False``), an encoding, or a tensor.
        pictures: one an image: paths, or whatever `model.preprocessing.load` takes. By default the
            names of the index, which are paths where a loader of torchreid has filled it.
        batch_size: pictures that are encoded at a time.
        tolerance: how far features may be off, as a share of their length.
        max_memory: bytes of maps that are held: of the images encoded last, which a search looks
            at twice. A batch is held in any case.

    Raises:
        TypeError: another model or gallery, or no pictures for one that has no names.
        ValueError: an index of another model, a batch_size or max_memory below 1, a tolerance that
            is negative or not finite. All that reads images raises it too, where there are not as
            many pictures as images, or where features are not those that are kept.

    Example:
        >>> model = CASN(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4)),
        ...              forward=lambda net, imgs: (None, net(imgs).mean((2, 3))),
        ...              input_size=(32, 16))
        >>> imgs = torch.rand(5, 3, 32, 16)
        >>> images = model.encode(imgs)
        >>> torch.allclose(EncodedAgain(model, images.features, imgs)[1:3].maps, images[1:3].maps)
        True
        >>> try:
        ...     EncodedAgain(model, images.features, imgs.flip(0))[1:2]
        ... except ValueError as error:
        ...     print(str(error).partition(",")[0])
        picture 1 gives other features than those that are kept
    """

    def __init__(
        self,
        model: CASN,
        gallery: Encodings | Float[Tensor, "images dim"],
        pictures: Sequence[Image] | Float[Tensor, "images 3 rows columns"] | None = None,
        *,
        batch_size: int = 32,
        tolerance: float = 0.005,
        max_memory: int = 2**28,
    ) -> None:
        self._model = as_casn(model)
        self._gallery = check_kind("gallery", gallery, Encodings, Tensor)
        if isinstance(gallery, Tensor):
            check_tensor("gallery", gallery, "images dim")
        if pictures is None and not isinstance(gallery, GalleryIndex):
            raise TypeError(
                "pictures must be given for a gallery that is no index: it has no names"
            )
        self._pictures = pictures
        self._batch_size = int(check_count("batch_size", batch_size))
        self._tolerance = float(check_weight("tolerance", tolerance))
        self._max_memory = check_count("max_memory", max_memory, most=2**63 - 1)
        self._held: OrderedDict[int, Encoding] = OrderedDict()  # by row, the oldest first
        self._expected: dict[int, None] = {}  # rows, in their order
        self._lock = threading.Lock()  # of both
        self._fingerprint, self._changes = "", changes(self._model)
        self._check_model()

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._gallery)

    def features_of(self, rows: Rows) -> Float[Tensor, "images dim"]:
        """Returns the features of some of the images, as they are kept.

        Raises:
            IndexError: no such row.
            TypeError: no list of rows.
        """
        numbers = torch.from_numpy(picked(np.arange(len(self)), rows))
        if isinstance(self._gallery, Tensor):
            return self._gallery[numbers]
        features: Tensor = self._gallery.features_of(numbers)
        return features

    def expect(self, rows: Int[Tensor, " images"]) -> None:
        """Says which images will be asked for next, in their order: they are encoded in batches."""
        with self._lock:
            self._check_model()
            self._expected = dict.fromkeys(rows.tolist())

    def __getitem__(self, rows: Rows) -> Encoding:
        """Returns the encoding of some of the images: features as they are kept, and maps.

        Raises:
            IndexError: no such row.
            OSError: a picture that is missing or can't be read.
            TypeError: no list of rows, or something that is no picture.
            ValueError: features that are not those that are kept, pictures of another number or of
                several sizes, an index of another model, or a gallery without images.
        """
        if not len(self):
            raise ValueError("the gallery is empty")
        numbers = picked(np.arange(len(self)), rows).tolist()
        with self._lock:
            if changes(self._model) != self._changes:
                self._check_model()
            if not numbers:  # of the size of any other
                return self._taken([next(iter(self._held), 0)])[:0]
            return self._taken(numbers)

    def _taken(self, numbers: list[int]) -> Encoding:
        """Returns the encoding of some images, at least one: held ones, and others encoded now."""
        wanted, images = [*dict.fromkeys(numbers)], {}
        for row, features in zip(wanted, self.features_of(wanted).cpu(), strict=True):
            held = self._held.pop(row, None)
            if held is not None and torch.equal(held.features[0], features):  # rows may have moved
                images[row] = held
        missing = [row for row in wanted if row not in images]
        there = {*self._held, *wanted}
        ahead = [row for row in self._expected if row < len(self) and row not in there]
        missing += ahead[: -len(missing) % self._batch_size]
        for row in (*wanted, *missing):  # once only, whatever comes of it
            self._expected.pop(row, None)
        for start in range(0, len(missing), self._batch_size):
            images |= self._encoded(missing[start : start + self._batch_size])
        self._hold(images)
        return Encoding.cat([images[row] for row in numbers])

    def _encoded(self, rows: list[int]) -> dict[int, Encoding]:
        """Returns the encodings of some images, each one by its row."""
        pictures = self._gallery.names if self._pictures is None else self._pictures
        if len(pictures) != len(self):
            raise ValueError(f"expected {len(self)} pictures, one an image, got {len(pictures)}")
        imgs = [self._model.preprocessing.load(pictures[row]) for row in rows]
        sizes = {tuple(img.shape[1:]) for img in imgs}
        if len(sizes) > 1:
            raise ValueError(f"pictures must be of one size, got {sorted(sizes)}")
        images, kept = encode_images(self._model, torch.stack(imgs)), self.features_of(rows).cpu()
        if images.features.shape != kept.shape:
            raise ValueError(
                f"the gallery has {kept.shape[1]} features, but the model gives "
                f"{images.features.shape[1]}"
            )
        found = {}
        for i, (row, off) in enumerate(zip(rows, _off(images.features, kept), strict=True)):
            if not off <= self._tolerance:
                name = pictures[row] if isinstance(pictures[row], str | os.PathLike) else row
                raise ValueError(
                    f"picture {name} gives other features than those that are kept, off by "
                    f"{off:.2g} of their length: it, the model or the preprocessing has changed"
                )
            kind = "basis" if images.basis is not None else "activations"
            found[row] = Encoding(kept[i : i + 1], **{kind: images.maps[i : i + 1].clone()})
        return found

    def _hold(self, images: dict[int, Encoding]) -> None:
        """Keeps images, and as many of those before as there is memory for."""
        self._held |= images
        size = next(iter(images.values())).maps.nbytes
        while len(self._held) > max(self._batch_size, self._max_memory // size):
            self._held.popitem(last=False)

    def _check_model(self) -> None:
        """Raises ValueError for another model than the index's; forgets what another one gave."""
        of_index = isinstance(self._gallery, GalleryIndex)
        found = self._gallery.check_model(self._model) if of_index else fingerprint(self._model)
        if found != self._fingerprint:
            self._held.clear()
        self._fingerprint, self._changes = found, changes(self._model)


def _off(features: Tensor, expected: Tensor) -> list[float]:
    """Returns how far features are off, as a share of their length."""
    lengths = expected.double().norm(dim=1).clamp(min=1e-30)
    found: list[float] = ((features.double() - expected).norm(dim=1) / lengths).tolist()
    return found
