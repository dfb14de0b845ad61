"""A network of the same tensors whose layers stay as they are, whatever the original's do."""

import copy
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from casn_plugin.hooks import before_calls

_LEAVES = {bool, int, float, str, type(None), Tensor, nn.Parameter}  # most of what layers have
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")


class OriginalCalledError(ValueError):
    """A layer of the original was called where its :func:`twin` ran."""


@contextmanager
def twin(network: nn.Module) -> Iterator[nn.Module]:
    """Yields a network of the same tensors whose layers stay as these are now.

    Modes, flags and hooks of the twin's layers are its own: what is changed in the original later
    does not reach them, and the other way round. So what a backward pass computes again (gradient
    checkpointing) is computed as in the forward pass, after any context has ended.

    The twin finds its own layers also in lists, tuples, sets, dicts, methods and functions that
    layers have as attributes and hooks; what ``torch.compile`` made of these runs uncompiled.

    Raises:
        OriginalCalledError: inside of the context, and this thread, a layer of the original was
            called: the network reaches it by something else, such as an object of the user's.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with twin(net) as other:
        ...     net.training, other.eval().training, other[0].weight is net[0].weight
        (True, False, True)
    """
    names, kind = {layer: name for name, layer in network.named_modules()}, type(network).__name__

    def refuse(layer: nn.Module) -> None:
        raise OriginalCalledError(
            f"to run in another mode than its own {kind} must reach its layers by attributes, or "
            "by lists, dicts and functions that are attributes, but it called "
            f"{names[layer] or kind!r} by something else: put the model into eval mode first, "
            "model.eval()"
        )

    other: nn.Module = _Twins(network).of(network)
    with before_calls(network, refuse):
        yield other


@contextmanager
def evaluated(network: nn.Module) -> Iterator[nn.Module]:
    """Yields a network in eval mode: itself, or its :func:`twin` where a layer is in another mode.

    So other threads may go on with the network in its mode.

    Raises:
        OriginalCalledError: as :func:`twin`.

    Example:
        >>> net = nn.Dropout()
        >>> with evaluated(net) as other:
        ...     net.training, other.training
        (True, False)
    """
    if not any(layer.training for layer in network.modules()):
        yield network
        return
    with twin(network) as other:
        yield other.eval()


class _Twins:
    """What stands in for a network's layers, and for all that leads to them.

    Args:
        network: whose layers are meant.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = {layer: layer.__new__(type(layer)) for layer in network.modules()}
        # each with what it stands in for, whose number is then given to nothing else
        self._found: dict[int, tuple[Any, Any]] = {
            id(layer): (layer, other) for layer, other in layers.items()
        }
        for layer, other in layers.items():
            state = vars(other)
            state.update(vars(layer))
            state.pop("_compiled_call_impl", None)  # it would run the original
            for name, value in list(state.items()):
                if name == "_modules":
                    state[name] = {key: self.of(child) for key, child in value.items()}
                elif type(value) not in _LEAVES and name not in _TENSORS:
                    own = "_hooks" in name and isinstance(value, dict)
                    state[name] = self.of(value.copy() if own else value)

    def of(self, value: Any) -> Any:
        """Returns what stands in for a value: itself, where it leads to no layer."""
        if type(value) in _LEAVES or (isinstance(value, dict) and not value):
            return value
        if id(value) not in self._found:
            self._found[id(value)] = value, value  # where it leads to itself
            parts, build = _taken_apart(value)
            others = [self.of(part) for part in parts]
            if not all(map(is_, parts, others)):
                self._found[id(value)] = value, build(others)
        return self._found[id(value)][1]


def _taken_apart(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns what a value has in it that may lead to layers, and how it is made of other such."""
    kind = type(value)
    if issubclass(kind, dict):
        items = list(value.items())
        return [part for item in items for part in item], lambda parts: _filled(
            value, zip(parts[::2], parts[1::2], strict=True)
        )
    if issubclass(kind, (list, deque, set)):
        return list(value), lambda parts: _filled(value, parts)
    if issubclass(kind, (tuple, frozenset)):
        return list(value), getattr(kind, "_make", kind)
    if issubclass(kind, MethodType):
        return [value.__func__, value.__self__], lambda parts: MethodType(*parts)
    if issubclass(kind, functools.partial):
        return [value.func, value.args, value.keywords], lambda parts: kind(
            parts[0], *parts[1], **parts[2]
        )
    if issubclass(kind, weakref.ref):
        return [value()], lambda parts: weakref.ref(*parts)
    if issubclass(kind, nn.Module):  # one that is not registered, but may have layers that are
        return [vars(value)], lambda parts: _with(kind.__new__(kind), parts[0])
    if issubclass(kind, FunctionType):
        if getattr(value, "_torchdynamo_wrapper_id", id(value)) == id(value):
            compiled = getattr(value, "_torchdynamo_orig_callable", None)
            if compiled is not None:
                return [compiled], lambda parts: parts[0]
        return _function_taken_apart(value)
    return [], lambda _: value


def _function_taken_apart(
    function: FunctionType,
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns what a function has in it, its defaults included, and how it is made of other such.

    What it shares with other functions it goes on sharing, except what leads to layers.
    """
    cells = function.__closure__ or ()
    parts = [function.__defaults__, function.__kwdefaults__, vars(function)]
    full = [cell for cell in cells if cell != CellType()]

    def build(others: list[Any]) -> Any:
        made = {
            id(cell): cell if cell.cell_contents is other else CellType(other)
            for cell, other in zip(full, others[3:], strict=True)
        }
        closure = tuple(made.get(id(cell), cell) for cell in cells)
        twin = FunctionType(
            function.__code__, function.__globals__, function.__name__, others[0], closure
        )
        twin.__kwdefaults__ = others[1]
        return _with(twin, others[2])

    return parts + [cell.cell_contents for cell in full], build


def _filled(container: Any, values: Any) -> Any:
    """Returns a container of its kind with other values in it."""
    other = copy.copy(container)
    other.clear()
    (other.extend if isinstance(other, (list, deque)) else other.update)(values)
    return other


def _with(thing: Any, attributes: dict[str, Any]) -> Any:
    """Returns a thing that has got attributes."""
    vars(thing).update(attributes)
    return thing
