"""A device that nothing can be read from, and how often somebody tries."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_ASKING = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_MIXING = ("to", "copy_", "__getitem__")  # may be given tensors of the CPU and the device


class Reads(TorchFunctionMode):
    """Counts what is read of tensors on the device "meta", which have shapes and no values.

    What Python asks for is noted in `calls` and answered with ones; what reads deeper within
    PyTorch (`nonzero`, `equal`, a copy to the CPU) fails. On a GPU, each of them waits until all
    that was begun has ended. What mixes tensors of the CPU and the device is an error, as there.
    `Tensor.cuda` goes to "meta" too, and autocast is left out there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        autocast = torch.autocast
        self._patch = mock.patch.object(
            torch, "autocast",
            lambda kind, *args, **kwargs: (
                nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)
            ),
        )  # fmt: skip

    def __enter__(self) -> "Reads":
        """Starts to count."""
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends it."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.stop()

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Returns what a function gives, or ones for what can't be read."""
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0].to(META)
        if name in _ASKING and isinstance(args[0], Tensor) and args[0].is_meta:
            self.calls.append(name)
            return getattr(torch.ones(args[0].shape, dtype=args[0].dtype), name)()
        kinds = {
            each.device.type
            for value in (*args, *(kwargs or {}).values())
            for each in (value if isinstance(value, list | tuple) else [value])
            if isinstance(each, Tensor) and each.ndim
        }
        if len(kinds) > 1 and name not in _MIXING:
            raise RuntimeError(f"{name} got tensors of {' and '.join(sorted(kinds))}")
        return function(*args, **(kwargs or {}))
