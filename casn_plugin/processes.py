"""One protocol for the processes that do a piece of work: they share it, gather, fail together."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from casn_plugin.doors import check_weight

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

    @classmethod
    def found(cls) -> "Processes":
        """Returns the processes of the default group where there is one, else this one alone."""
        return cls(dist.is_available() and dist.is_initialized())

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes, logs and prints: process 0."""
        return self.rank == 0

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

    def first(self, make: Callable[[], T]) -> T:
        """Returns to all of them what process 0 makes.

        Raises:
            RuntimeError: process 0 has failed; there, it is the error itself.
        """
        if self.count == 1:
            return make()
        with self.together():
            made: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[no-any-return]

    def add(self, own: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes, all of one shape; without a gradient."""
        if self.count == 1:
            return own
        total = own.detach().clone()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors of all processes the values that they have in process 0."""
        if self.count > 1:
            for tensor in tensors:
                values = tensor.contiguous()
                dist.broadcast(values, src=0)
                tensor.copy_(values)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Lets process 0 go ahead, alone and aloud; the others follow in silence.

        What is rendered, downloaded or built inside is there when they come.
        """
        if not self.leads:
            self.gather(None)
        with self.one_voice():
            yield
        if self.leads:
            self.gather(None)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Lets process 0 alone print: what the others say inside is not shown."""
        if self.leads:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield

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


@contextmanager
def launched(use_gpu: bool = False, *, timeout: float | None = None) -> Iterator[Processes]:
    """Yields the processes that ``torchrun`` has started, joined until the end, or this one alone.

    They speak over gloo on the CPU and over NCCL on GPUs, of which each process takes the one of
    its own number on its machine. A group that is there already is used and left.

    Args:
        use_gpu: each process works on a GPU.
        timeout: so many seconds are waited for a process that is alive and does not answer, by
            default as long as PyTorch waits: half an hour on the CPU, ten minutes on GPUs. A
            process that is dead is found at once.

    Raises:
        ValueError: a timeout that is not positive and finite.
        RuntimeError: more processes on a machine than it has GPUs.

    Example:
        >>> with launched() as processes:
        ...     processes.count
        1
    """
    if timeout is not None and check_weight("timeout", timeout) == 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    if started() == 1 or dist.is_initialized():
        yield Processes.found()
        return
    if use_gpu:
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise RuntimeError(
                f"expected a GPU for each process, got {gpus} for process {place} of this machine, "
                "from 0: start fewer with torchrun --nproc-per-node"
            )
        torch.cuda.set_device(place)
    waited = None if timeout is None else timedelta(seconds=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=waited)
    try:
        yield Processes.found()
        dist.barrier()  # not after an error: the others may be gone
    finally:
        dist.destroy_process_group()


def started() -> int:
    """Returns how many processes ``torchrun`` has started for this work; 1 without it.

    Example:
        >>> started()
        1
    """
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
