"""What a data loader gives, encoded and joined to shards: all of it, or one process's share."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from casn_plugin.loaders import like
from casn_plugin.loading import encode_images, read_batch
from casn_plugin.model import CASN
from casn_plugin.processes import Processes
from casn_plugin.ranking.kept import Kept
from casn_plugin.ranking.manifest import Manifest
from casn_plugin.ranking.shards import taken_error

_Labels = Sequence[int | None] | None


class Images(NamedTuple):
    """Encoded images.

    Attributes:
        kept: as the index keeps them; None where there are none.
        names: their names; a number for one that has been given none.
        pids: their identities.
        camids: their cameras.
    """

    kept: Kept | None
    names: list[str | int]
    pids: _Labels
    camids: _Labels


def encoded(
    model: CASN,
    batches: Iterable[Any],
    first: Iterable[int] | None,
    *,
    manifest: Manifest,
    taken: set[str],
    skip: bool,
) -> Iterator[Images]:
    """Yields the images of batches, encoded.

    Args:
        model: that encodes them.
        batches: what a loader gives.
        first: for each batch, the row of its first image; by default where the one before ended.
        manifest: of the index: how it keeps images, and from which number on those without a name
            are numbered, in the order of rows.
        taken: names that are taken; those of the batches are added.
        skip: leave out images whose name is taken, before they are encoded.

    Raises:
        TypeError: batches that hold no images.
        ValueError: a name that is taken, without `skip`; or as :func:`encode_images`.
    """
    count, starts = manifest.added, None if first is None else iter(first)
    for data in batches:
        imgs, given, *labels = read_batch(data)
        start = count if starts is None else manifest.added + next(starts)
        count += len(imgs)
        if given is None:
            numbers: list[str | int] = [*range(start, start + len(imgs))]
            yield Images(Kept.of(encode_images(model, imgs), manifest), numbers, *labels)
            continue
        names, rows = given, []
        for row, name in enumerate(names):
            if name not in taken:
                taken.add(name)
                rows.append(row)
            elif not skip:
                raise taken_error(name)
        if len(rows) < len(names) == len(imgs):
            imgs, names = imgs[rows], [names[row] for row in rows]
            labels = [None if each is None else [each[row] for row in rows] for each in labels]
        kept = Kept.of(encode_images(model, imgs), manifest) if len(imgs) else None
        yield Images(kept, [*names], *labels)


def in_shards(batches: Iterable[Images], shard_size: int, per_shard: int) -> Iterator[Images]:
    """Yields batches joined to shards: per_shard of them, or shard_size images, to each."""
    held: list[Images] = []
    for batch in batches:
        held.append(batch)
        if len(held) == per_shard or sum(len(each.names) for each in held) >= shard_size:
            yield from _joined(held)
            held = []
    yield from _joined(held)


def _joined(batches: list[Images]) -> list[Images]:
    """Returns several batches as one, without pids or camids that are not there for all.

    Where there are no images, nothing.
    """
    kept = [each.kept for each in batches if each.kept is not None]
    if not kept:
        return []
    _, names, *labels = zip(*batches, strict=True)
    pids, camids = (None if None in each else list(chain(*each)) for each in labels)
    return [Images(Kept.cat(kept), list(chain(*names)), pids, camids)]


def share(
    loader: DataLoader[Any], per_shard: int, processes: Processes
) -> tuple[DataLoader[Any], list[int]]:
    """Returns one process's share of a loader, and the first row of each of its batches.

    Raises:
        ValueError: a loader that has no batch_size, or whose data set has no length.
    """
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "distributed encoding needs a loader with a batch_size, of a data set with a length"
        )
    rows = range(len(loader.dataset))  # type: ignore[arg-type]
    batches = list(BatchSampler(rows, loader.batch_size, loader.drop_last))
    shards = [batches[start : start + per_shard] for start in range(0, len(batches), per_shard)]
    own = list(chain(*processes.share(shards)))
    # read once, and the loader's own generator stays as it is
    part = like(loader, batch_sampler=own, generator=None, persistent_workers=False)
    return part, [batch[0] for batch in own]
