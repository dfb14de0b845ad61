"""BatchNorm over all processes: what a batch in shares is normalised by is what a whole one is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from casn_plugin.processes import Processes


@contextmanager
def shared_batchnorm(processes: Processes) -> Iterator[None]:
    """Inside, every BatchNorm in training mode normalises by the images of all processes.

    It is the BatchNorm of the whole batch, on the CPU and on GPUs, and can be differentiated
    twice, as attention in a loss needs it; ``torch.nn.SyncBatchNorm`` runs on GPUs only, and its
    backward pass has no derivative. No layer is changed. All processes run the same layers in the
    same order.

    Args:
        processes: that hold shares of the batch.

    Example:
        >>> with shared_batchnorm(Processes()):
        ...     torch.nn.BatchNorm1d(2)(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))[:, 0].tolist()
        [-0.9999949932098389, 0.9999949932098389]
    """
    if processes.count == 1:
        yield
        return
    with _Shared():
        yield


class _Shared(TorchFunctionMode):
    """Computes what BatchNorm layers of any library call."""

    def __torch_function__(
        self, function: Any, _: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Returns what a function gives, or the normalised images of all processes."""
        if function is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


# the arguments are those of torch.nn.functional.batch_norm
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Returns images normalised by mean and variance of each channel over all processes."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = [dim for dim in range(input.ndim) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
    values = input if input.itemsize >= 4 else input.float()  # as PyTorch does under autocast
    own = values.new_full((1,), values.numel() // values.shape[1])
    total: Tensor = _Sum.apply(torch.cat([values.sum(dims), own]))
    number = total[-1:]
    mean = total[:-1] / number
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims)) / number
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * number / (number - 1).clamp(min=1)
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
    scale = torch.rsqrt(variance + eps) if weight is None else weight * torch.rsqrt(variance + eps)
    normalised = centred * scale.view(shape)
    return (normalised if bias is None else normalised + bias.view(shape)).to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, and the gradient of that."""

    @staticmethod
    def forward(_: Any, own: Tensor) -> Tensor:
        """Returns the sum."""
        total = own.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        """Returns the sum of what comes back."""
        total: Tensor = _Sum.apply(gradients[0])
        return total
