"""The pair sampler: which images form the pairs of an epoch. Indices only, no torchreid import."""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Sampler

from casn_plugin.doors import check_count, check_seed, check_weight
from casn_plugin.identities import UNKNOWN, Ids, as_ids, check_labels
from casn_plugin.loaders import like
from casn_plugin.processes import Processes

Manager = TypeVar("Manager")


class PairSampler(Sampler[int]):
    """Draws image indices so that rows 2i and 2i+1 of each batch are pair i.

    A share of the pairs shows one identity, seen by two cameras wherever it was; the others show
    two identities. Every image is drawn at least once an epoch, and most are drawn exactly once,
    so an epoch is about as long as one of the plain engine. The length is exact and a multiple
    of the batch size. Each epoch has another order; all follow from the seed.

    In several processes each draws its own share, of whole pairs: together they draw, batch by
    batch, what one process would with the batches of all.

    Args:
        pids: identity of each image.
        camids: camera of each image; without it, or where it is unknown, all count as one.
        batch_size: images in a batch of one process, even.
        positive_fraction: share of the pairs that show one identity, in [0, 1].
        seed: of the sampler's own generator, >= 0; the same in all processes.
        num_replicas: processes that train together; by default those of ``torch.distributed``'s
            group where there is one, else 1.
        rank: the number of this one, from 0; by default its rank in that group.

    Raises:
        TypeError: pids or camids that are no integers.
        ValueError: an odd batch size, no image, an unknown identity, pids and camids of unequal
            length, a fraction outside [0, 1], a negative seed, a single identity where different
            pairs are wanted, no identity with two images where same pairs are wanted,
            identities with one image where all pairs must be positive, `num_replicas` below 1, or
            a rank that is none of theirs.

    Example:
        >>> sampler = PairSampler([0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, batch_size=4)
        >>> len(sampler), len(list(sampler))
        (8, 8)
    """

    def __init__(
        self,
        pids: Ids,
        camids: Ids | None = None,
        *,
        batch_size: int,
        positive_fraction: float = 0.5,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.pids = as_ids("pids", pids)
        self.camids = as_ids("camids", camids, len(self.pids))
        if check_count("batch_size", batch_size, least=0) % 2 or not batch_size:
            raise ValueError(
                f"rows 2i and 2i+1 of a batch are pair i, so batch_size must be even, "
                f"got {batch_size}"
            )
        if not 0 <= check_weight("positive_fraction", positive_fraction) <= 1:
            raise ValueError(f"positive_fraction must lie in [0, 1], got {positive_fraction}")
        if not len(self.pids):
            raise ValueError("pids must be a non-empty list, got none")
        if (self.pids == UNKNOWN).any():
            raise ValueError(
                f"pairs need known identities, but {int((self.pids == UNKNOWN).sum())} of "
                f"{len(self.pids)} are unknown (-1 or None)"
            )
        self.seed = check_seed(seed)
        found = Processes.found()
        num_replicas = found.count if num_replicas is None else num_replicas
        self.num_replicas = check_count("num_replicas", num_replicas)
        self.rank = check_count("rank", found.rank if rank is None else rank, least=0)
        if self.rank >= num_replicas:
            raise ValueError(f"rank must lie in [0, {num_replicas}), got {self.rank}")
        self.batch_size = batch_size
        self._rows = batch_size * num_replicas  # in a batch of all processes
        self.positive_fraction = positive_fraction
        self.epoch = 0
        self._images = {int(pid): np.flatnonzero(self.pids == pid) for pid in set(self.pids)}
        single = sum(len(images) == 1 for images in self._images.values())
        if positive_fraction < 1 and len(self._images) < 2:
            raise ValueError(
                "pairs of different identities need at least two identities, got one; "
                "positive_fraction=1 draws same-identity pairs only"
            )
        if positive_fraction > 0 and single == len(self._images):
            raise ValueError(
                "same-identity pairs need an identity with two images, but each has one; "
                "positive_fraction=0 draws different-identity pairs only"
            )
        if positive_fraction == 1 and single:
            raise ValueError(
                f"{single} identities have one image and can be drawn in different-identity "
                "pairs only: positive_fraction must be below 1"
            )
        self._num_batches = self._count_batches()

    @classmethod
    def install(
        cls,
        datamanager: Manager,
        *,
        batch_size: int | None = None,
        positive_fraction: float = 0.5,
        cross_camera: bool = True,
        seed: int = 0,
    ) -> Manager:
        """Returns the torchreid data manager with a train loader that draws pairs.

        The loader is replaced in place, keeping its data set, workers and other settings. Engines
        copy the loader when they are built, so call this first.

        Args:
            datamanager: a ``torchreid.data.ImageDataManager``.
            batch_size: images in a batch of one process; by default that of the data manager's
                loader.
            positive_fraction: see the class.
            cross_camera: prefer positive pairs of two cameras, as the class does with camids.
            seed: see the class.

        Raises:
            TypeError: not a data manager with a train loader of images; or see the class.
            ValueError: identities that are not 0 ... C - 1, the classes of a classifier; or see
                the class.
        """
        loader: Any = getattr(datamanager, "train_loader", None)
        rows = getattr(getattr(loader, "dataset", None), "train", None)
        if not isinstance(loader, DataLoader) or rows is None:
            raise TypeError(
                "expected a torchreid data manager, whose train_loader.dataset.train lists the "
                f"training images, got {type(datamanager).__name__}"
            )
        sampler = cls(
            check_labels("pids of the training images", [row[1] for row in rows]),
            [row[2] for row in rows] if cross_camera else None,
            batch_size=loader.batch_size if batch_size is None else batch_size,  # type: ignore[arg-type]
            positive_fraction=positive_fraction,
            seed=seed,
        )
        datamanager.train_loader = like(  # type: ignore[attr-defined]
            loader, batch_size=sampler.batch_size, sampler=sampler, drop_last=True
        )
        return datamanager

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration draw the pairs of this epoch, for an exact resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of images that this process draws in an epoch, in whole batches."""
        return self._num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yields the image indices of the next epoch, of this process's share."""
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        counts = self._positives_per_batch(self._num_batches)
        positives = self._draw_positives(rng, int(counts.sum()))
        drawn = np.zeros(len(self.pids), dtype=bool)
        drawn[positives.ravel()] = True
        num_pairs = self._num_batches * self._rows // 2
        negatives = self._draw_negatives(rng, num_pairs - len(positives), np.flatnonzero(~drawn))
        start = np.concatenate([[0], counts.cumsum()])
        for batch in range(self._num_batches):
            same = positives[start[batch] : start[batch + 1]]
            first = batch * self._rows // 2 - start[batch]
            different = negatives[first : first + self._rows // 2 - len(same)]
            pairs = rng.permuted(np.concatenate([same, different]), axis=1)
            own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            yield from rng.permutation(pairs).ravel()[own].tolist()

    def _positives_per_batch(self, num_batches: int) -> np.ndarray:
        """Returns how many pairs of each batch show one identity: exact over the epoch."""
        per_batch = self.positive_fraction * (self._rows // 2)
        return np.diff(np.round(np.arange(num_batches + 1) * per_batch, 6).astype(np.int64))

    def _count_batches(self) -> int:
        """Returns the fewest batches whose pairs can hold every image."""
        disjoint, leftover = 0, 0
        for images in self._images.values():
            if len(images) > 1:
                _, per_camera = np.unique(self.camids[images], return_counts=True)
                pairs = len(images) // 2
                if len(per_camera) > 1:
                    pairs = min(pairs, len(images) - int(per_camera.max()))
                disjoint += pairs
                leftover += len(images) - 2 * pairs
        most = max(len(images) for images in self._images.values())
        num_batches = -(-len(self.pids) // self._rows)
        while True:
            same = int(self._positives_per_batch(num_batches).sum())
            different = num_batches * self._rows // 2 - same
            held = 2 * min(same, disjoint) + min(max(same - disjoint, 0), leftover)
            # a negative pair holds one image of an identity, and pairs are drawn blindly
            missing = len(self.pids) - held
            if missing <= 0 or (missing <= 2 * different and min(most, missing) <= different):
                return num_batches
            num_batches += 1

    def _partner(self, rng: np.random.Generator, image: int) -> int:
        """Returns another image of the same identity, of another camera where there is one."""
        others = self._images[int(self.pids[image])]
        others = others[others != image]
        elsewhere = others[self.camids[others] != self.camids[image]]
        return int(rng.choice(elsewhere if len(elsewhere) else others))

    def _draw_positives(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Returns (number, 2) same-identity pairs, disjoint as far as there are such."""
        pairs: list[tuple[int, int]] = []
        leftover: list[int] = []
        for images in self._images.values():
            if len(images) > 1:
                matched, rest = self._match(rng, images)
                pairs += matched
                leftover += rest
        pairs = [pairs[i] for i in rng.permutation(len(pairs))[:number]]
        anchors = [leftover[i] for i in rng.permutation(len(leftover))]
        several = [image for images in self._images.values() if len(images) > 1 for image in images]
        for i in range(number - len(pairs)):
            image = anchors[i] if i < len(anchors) else int(rng.choice(several))
            pairs.append((image, self._partner(rng, image)))
        drawn = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return rng.permutation(drawn)

    def _match(
        self, rng: np.random.Generator, images: np.ndarray
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Returns disjoint cross-camera pairs of one identity's images, and what is left over.

        Sorted by camera, image i is paired with image i + n/2: no camera with at most half of the
        images meets itself. Of a larger camera, a random part is left over.
        """
        images = rng.permutation(images)
        cameras, camera, per_camera = np.unique(
            self.camids[images], return_inverse=True, return_counts=True
        )
        left = np.zeros(len(images), dtype=bool)
        if len(cameras) > 1:
            surplus = max(2 * int(per_camera.max()) - len(images), 0)
            left[np.flatnonzero(camera == per_camera.argmax())[:surplus]] = True
        if (len(images) - left.sum()) % 2:
            left[0] = True
        kept = images[~left]
        kept = kept[np.argsort(rng.permutation(len(cameras))[camera[~left]], kind="stable")]
        half = len(kept) // 2
        pairs = list(zip(kept[:half].tolist(), kept[half:].tolist(), strict=True))
        return pairs, images[left].tolist()

    def _draw_negatives(
        self, rng: np.random.Generator, number: int, undrawn: np.ndarray
    ) -> np.ndarray:
        """Returns (number, 2) pairs of different identities that hold all undrawn images."""
        if not number:
            return np.empty((0, 2), dtype=np.int64)
        fill = rng.choice(len(self.pids), size=2 * number - len(undrawn))
        pids, counts = np.unique(self.pids[np.concatenate([undrawn, fill])], return_counts=True)
        if counts.max() > number:  # one identity would have to meet itself: draw others instead
            frequent = pids[counts.argmax()]
            surplus = np.flatnonzero(self.pids[fill] == frequent)[: counts.max() - number]
            fill[surplus] = rng.choice(np.flatnonzero(self.pids != frequent), size=len(surplus))
        pairs = rng.permutation(np.concatenate([undrawn, fill])).reshape(number, 2)
        for i in np.flatnonzero(self.pids[pairs[:, 0]] == self.pids[pairs[:, 1]]):
            pid = self.pids[pairs[i, 0]]
            if self.pids[pairs[i, 1]] == pid:  # swap with a pair without this identity
                j = rng.choice(np.flatnonzero((self.pids[pairs] != pid).all(axis=1)))
                pairs[i, 1], pairs[j, 1] = pairs[j, 1], pairs[i, 1]
        return pairs
