"""With what pairs are worked on: a device, its memory, its numbers, and the processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from casn_plugin.doors import check_count
from casn_plugin.processes import Processes
from casn_plugin.ranking.tiles import portions


@dataclass(frozen=True)
class Compute:
    """With what the pairs are worked on: what a machine has, not what is computed.

    Attributes:
        max_memory: bytes that the tensors of a tile may take on the device, images brought there
            included; by default 256 MiB on the CPU and 4 GiB on CUDA. Where it is too small for
            anything, one pair is worked on at a time.
        precision: float16 or bfloat16 rounds the operands of both matrix products (weights of
            the pair classifier, maps), each scaled to a maximum of 1, and multiplies in it where
            the device can (CUDA). An approximation; by default nothing is rounded.
        distributed: every process of ``torch.distributed``'s group calls the function with the
            same arguments, takes a share of the gallery, and gets the whole result: the same, bit
            for bit, for any number of processes with as many threads each. Where one fails, all
            do.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: a `precision` that is no half precision.
        ValueError: `max_memory` below 1, or `distributed` without a process group.

    Example:
        >>> Compute(max_memory=2**20).precision is None
        True
    """

    max_memory: int | None = None
    precision: torch.dtype | None = None
    distributed: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        if self.max_memory is not None:
            check_count("max_memory", self.max_memory, most=2**63 - 1)
        if self.precision not in (None, torch.float16, torch.bfloat16):
            raise TypeError(
                f"precision must be torch.float16 or torch.bfloat16, got {self.precision}"
            )
        self.processes()

    def processes(self) -> Processes:
        """Returns the processes that share the work."""
        return Processes(self.distributed)

    def memory(self, device: torch.device) -> int:
        """Returns the bytes that a tile may take on a device."""
        if self.max_memory is None:
            return 2**32 if device.type == "cuda" else 2**28
        return self.max_memory

    def bar(self, total: int, desc: str | None) -> Any:
        """Returns a progress bar over pairs: hidden without a description."""
        return tqdm(
            total=total, unit="pair", unit_scale=True, leave=False, desc=desc,
            disable=None if self.progress and desc else True,
        )  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """On which device, and in which numbers, maps and distances are computed.

    Attributes:
        device: where.
        dtype: of features and distances.
        precision: to which operands of matrix products are rounded, if at all.
        scratch: bytes for what is made and used up at once: little, so that it stays in caches.

    Example:
        >>> half = Arithmetic(torch.device("cpu"), torch.float32, torch.float16)
        >>> half.operand(torch.tensor([0.1])), half.products
        (tensor([0.1000]), torch.float32)
    """

    device: torch.device
    dtype: torch.dtype
    precision: torch.dtype | None = None
    scratch: int = 2**23

    @property
    def products(self) -> torch.dtype:
        """In what matrices are multiplied: a half precision on CUDA only, few CPUs do so."""
        rounded = self.precision is not None and self.device.type == "cuda"
        return self.precision if rounded else self.dtype  # type: ignore[return-value]

    def operand(self, values: Tensor) -> Tensor:
        """Returns an operand of a matrix product: rounded to the precision where there is one."""
        return (values if self.precision is None else values.to(self.precision)).to(self.products)

    def buffer(self, dtype: torch.dtype | None = None) -> "Buffer":
        """Returns memory for what matrix products take and give, or for numbers of a dtype."""
        return Buffer(self.device, self.products if dtype is None else dtype, self.scratch)


class Buffer:
    """Memory that is used again: fresh memory costs time.

    Args:
        device: where.
        dtype: of the numbers.
        size: bytes that a portion may take.

    Example:
        >>> buffer = Buffer(torch.device("cpu"), torch.float32, 80)
        >>> buffer.take((2, 3)).data_ptr() == buffer.take((6,)).data_ptr()
        True
        >>> buffer.portions(5, each=10)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        self._memory = torch.empty(0, device=device, dtype=dtype)
        self._size = size

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor of a shape; its values last until the next one is taken."""
        numel = torch.Size(shape).numel()
        if self._memory.numel() < numel:
            self._memory = self._memory.new_empty(numel)
        return self._memory[:numel].view(shape)

    def portions(self, number: int, *, each: int) -> list[slice]:
        """Returns so many things, of so many numbers each, in portions that fit; one at least."""
        return portions(0, number, max(self._size // (max(each, 1) * self._memory.itemsize), 1))
