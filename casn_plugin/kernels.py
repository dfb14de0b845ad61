"""How a network is computed where a loss of gradients is trained.

The maps of CASN are gradients, and its losses are functions of maps: what lies between the tapped
map and the features is differentiated twice, which not all that PyTorch computes can be.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Returns a function that ``torch.compile`` leaves as it is, with all that it calls.

    Compiled code can't be differentiated twice. Layers that were compiled by themselves stay so:
    those before the tapped map are differentiated once.

    Example:
        >>> @uncompiled
        ... def double(x):
        ...     return 2 * x
        >>> double(4)
        8
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # imports the compiler, which takes seconds
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class _MathKernel:
    """The state of the process's attention kernels: threads share it, so it is counted."""

    def __init__(self) -> None:
        self.lock, self.users, self.chosen = threading.Lock(), 0, ExitStack()


_MATH = _MathKernel()


class _Differentiable(TorchFunctionMode):
    """Computes by others the one function whose derivative PyTorch does not differentiate."""

    def __torch_function__(
        self, function: Any, _: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Returns what a function gives."""
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return function(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Lets attention and ``hardsigmoid`` be differentiated twice inside of this context.

    The fused kernels of ``scaled_dot_product_attention`` can't be, and the choice counts where the
    forward pass runs. The choice is the whole process's: the last thread to leave restores what the
    first one found.

    Example:
        >>> import torch
        >>> x = torch.rand(1, 1, 4, 8, requires_grad=True)
        >>> with twice_differentiable():
        ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        >>> torch.autograd.grad(g.sum(), x)[0].shape
        torch.Size([1, 1, 4, 8])
    """
    with _MATH.lock:
        if not _MATH.users:
            _MATH.chosen.enter_context(sdpa_kernel(SDPBackend.MATH))
        _MATH.users += 1
    try:
        with _Differentiable():
            yield
    finally:
        with _MATH.lock:
            _MATH.users -= 1
            if not _MATH.users:
                _MATH.chosen.close()
