"""How attention is computed where a loss of gradients is trained.

The maps of CASN are gradients, and its losses are functions of maps: what lies between the tapped
map and the features is differentiated twice, which fused attention can't be.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


class _MathKernel:
    """The state of the process's attention kernels: threads share it, so it is counted."""

    def __init__(self) -> None:
        self.lock, self.users, self.chosen = threading.Lock(), 0, ExitStack()


_MATH = _MathKernel()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Lets ``scaled_dot_product_attention`` be differentiated twice inside of this context.

    Its fused kernels can't be, and the choice counts where the forward pass runs. The choice is
    the whole process's: the last thread to leave restores what the first one found.

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
        yield
    finally:
        with _MATH.lock:
            _MATH.users -= 1
            if not _MATH.users:
                _MATH.chosen.close()
