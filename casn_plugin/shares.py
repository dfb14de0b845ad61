"""Any sampler for several processes: what one draws is dealt to all, batch by batch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from casn_plugin.doors import check_count
from casn_plugin.loaders import like
from casn_plugin.processes import Processes


class SharedSampler(Sampler[int]):
    """Deals what a sampler draws in process 0 to all processes of ``torch.distributed``'s group.

    For samplers that know of no other process, such as torchreid's ``RandomIdentitySampler``:
    each batch of a process is one that the sampler has drawn. What fills no batch of each is left
    out. :class:`casn_plugin.PairSampler` draws shares by itself.

    Args:
        sampler: of one process, made for batches of `batch_size`; it is asked in process 0 alone.
        batch_size: images in a batch of one process.

    Attributes:
        num_replicas: processes that train together.
        rank: the number of this one, from 0.

    Raises:
        ValueError: `batch_size` below 1.

    Example:
        >>> list(SharedSampler([3, 1, 2, 0, 4], batch_size=2))
        [3, 1, 2, 0]
    """

    def __init__(self, sampler: Any, *, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = check_count("batch_size", batch_size)
        self.processes = Processes.found()
        self.num_replicas, self.rank = self.processes.count, self.processes.rank

    @classmethod
    def install(cls, datamanager: Any) -> Any:
        """Returns a torchreid data manager whose train loader deals what its sampler draws.

        All processes call it, once they are joined; `batch_size_train` is that of one process.

        Raises:
            TypeError: not a data manager with a train loader.
            ValueError: a train loader without batch_size.
        """
        loader = getattr(datamanager, "train_loader", None)
        if not isinstance(loader, DataLoader):
            raise TypeError(f"expected a torchreid data manager, got {type(datamanager).__name__}")
        if loader.batch_size is None:
            raise ValueError("expected a train loader with a batch_size, got None")
        sampler = cls(loader.sampler, batch_size=loader.batch_size)
        datamanager.train_loader = like(
            loader, batch_size=loader.batch_size, sampler=sampler, drop_last=True
        )
        return datamanager

    def __len__(self) -> int:
        """Returns the number of images of this process in an epoch, as the sampler tells it."""
        rows: int = len(self.sampler) // (self.batch_size * self.num_replicas) * self.batch_size
        return rows

    def __iter__(self) -> Iterator[int]:
        """Yields the image indices of this process; all processes ask for theirs together."""
        drawn = self.processes.first(lambda: list(self.sampler))
        rows = self.batch_size * self.num_replicas
        for start in range(0, len(drawn) // rows * rows, rows):
            own = start + self.rank * self.batch_size
            yield from drawn[own : own + self.batch_size]
