"""One protocol for the processes that do a piece of work: they share it, gather, fail together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class _OtherProcessError(RuntimeError):
    """Another process has failed, and told so."""


@dataclass(frozen=True)
class _Failure:
    """What a process that fails sends to the others."""

    message: str


class Processes:
    """The processes that do one piece of work: this one alone, or ``torch.distributed``'s group.

    All of them call :meth:`gather` and :meth:`join` in the same order, with numbers of any size;
    alone, these give back what this process has.

    Args:
        distributed: the processes of the default group; otherwise this one alone.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.

    Raises:
        ValueError: `distributed` without a process group.

    Example:
        >>> alone = Processes()
        >>> with alone.together():
        ...     alone.gather(sum(alone.share(range(5))))
        [10]
    """

    def __init__(self, distributed: bool = False) -> None:
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("distributed work needs torch.distributed.init_process_group()")
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's share: neighbours; all shares in order are the whole."""
        start, stop = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[start:stop]

    def gather(self, own: T) -> list[T]:
        """Returns what every process has, in their order.

        Raises:
            RuntimeError: another process has failed in :meth:`together`.
        """
        every = self._exchanged(own)
        for rank, each in enumerate(every):
            if isinstance(each, _Failure):
                raise _OtherProcessError(f"process {rank} failed: {each.message}")
        return every

    def join(self, *own: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Returns tensors joined with those of the other processes, on the devices they were on.

        Raises:
            RuntimeError: as :meth:`gather`.
        """
        if self.count == 1:
            return own
        every = self.gather([each.cpu() for each in own])
        return tuple(
            torch.cat(parts, dim).to(each.device)
            for each, parts in zip(own, zip(*every, strict=True), strict=True)
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all processes finish, or none: where one fails, all do.

        An exception goes out with what the others gather next, at the latest when they finish:
        each process takes part in as many gatherings as every other. Contexts are not nested.

        Raises:
            RuntimeError: "process k failed: ...", where another one has.
        """
        try:
            yield
        except _OtherProcessError:  # which all have heard of
            raise
        except Exception as error:
            self._exchanged(_Failure(repr(error)))
            raise
        self.gather(None)

    def _exchanged(self, own: Any) -> list[Any]:
        if self.count == 1:
            return [own]
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, own)
        return every
