"""Whatever touches a network and leaves it as found.

:func:`capture` taps a feature map, :func:`watch` looks at what a layer takes and gives,
:func:`frozen_batchnorm` and :func:`constant_parameters` keep from a network what it must not learn,
and :func:`evaluating` puts it into eval mode for a while.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from casn_plugin.kernels import twice_differentiable, uncompiled
from casn_plugin.layouts import Layout

_HOOKS = threading.Lock()  # torch gives hooks their numbers without one
_thread = uncompiled(threading.get_ident)  # so are hooks: what they note is of one call alone


@dataclass
class Captured:
    """What :func:`capture` has seen of the tapped module's last call.

    Attributes:
        activations: the feature map A.
        pooled: what the module made of it, where the map is its input: (B, C, 1, 1) of a pooling
            layer.
    """

    activations: Tensor | None = None
    pooled: Tensor | None = None

    def require(self) -> Tensor:
        """Returns the captured (B, C, H, W) map.

        Raises:
            ValueError: the tapped module was not called, or gave no 4-D map.
        """
        if self.activations is None:
            raise ValueError("the tapped layer was not called in the forward pass")
        if self.activations.ndim != 4:
            raise ValueError(
                "the tapped layer must give a map of shape (B, C, H, W), "
                f"but gave {tuple(self.activations.shape)}"
            )
        return self.activations


@contextmanager
def capture(
    module: nn.Module,
    *,
    at: Literal["input", "output"] = "output",
    head_only: bool = False,
    layout: Layout | None = None,
    size: tuple[int, int] = (1, 1),
) -> Iterator[Captured]:
    """Yields a record of the feature map A that passes through a module.

    The original tensor is recorded and a clone goes on through the network, so in-place layers
    behind it neither change the record nor break its gradient. Only calls of the thread that
    opened the context are recorded (the replicas of ``nn.DataParallel`` share their hooks). A
    map that needs no gradient (a frozen backbone) becomes a leaf that does, and under autocast
    it is recorded in float32. From the map on, attention is computed so that it can be
    differentiated twice, until the context ends. The hook is gone when the context ends, also
    after an exception.

    Args:
        module: the layer to tap. Where its output is a tuple, the first tensor counts.
        at: whether the map is what the module takes (a pooling layer) or what it gives.
        head_only: gradients are recorded from the map on and not before it, also inside
            ``torch.no_grad()``: the backbone below the map then keeps no graph.
        layout: how the tensor is a map; by default it is (B, C, H, W) as it is.
        size: (rows, columns) of the images, by which tokens are a map.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        >>> with capture(net[0]) as captured:
        ...     _ = net(torch.rand(2, 3, 8, 8))
        >>> captured.require().shape
        torch.Size([2, 4, 6, 6])
    """
    if at not in ("input", "output"):
        raise ValueError(f"at must be 'input' or 'output', got {at!r}")
    captured = Captured()
    owner = _thread()
    stack, seen = ExitStack(), list[Tensor]()

    def tap(value: Any) -> Any:
        """Records the first tensor of a value; returns the value with a clone in its place."""
        if isinstance(value, (tuple, list)):
            return type(value)((tap(value[0]), *value[1:])) if value else value
        if not isinstance(value, Tensor):
            return value
        if not seen or seen[0] is not value:  # else a second call with one tensor: one map
            seen[:] = [value]
            captured.activations = record(value)
        passed = captured.activations.clone()  # type: ignore[union-attr]
        return passed if layout is None else layout.put_back(value, passed)

    def record(value: Tensor) -> Tensor:
        """Returns the map that a tensor is, with a gradient if gradients are recorded."""
        if value.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(
            value.device.type
        ):
            value = value.float()
        maps = value if layout is None else layout.map_of(value, size)
        if head_only:
            torch.set_grad_enabled(True)  # the no_grad() around the forward pass restores it
            maps = maps.detach()
        if torch.is_grad_enabled():
            if not maps.requires_grad:
                maps = maps.detach().requires_grad_()
            if captured.activations is None:
                stack.enter_context(twice_differentiable())
        return maps

    @uncompiled
    def on_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return tap(args) if _thread() == owner else None

    @uncompiled
    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if _thread() != owner:
            return None
        if at == "output":
            return tap(output)
        if isinstance(output, Tensor) and output.ndim == 2:  # a pooling layer that flattens
            captured.pooled = output[:, :, None, None]
            return captured.pooled.flatten(1)
        captured.pooled = output if isinstance(output, Tensor) else None
        return None

    with _HOOKS:
        handles = [module.register_forward_hook(on_output)]
        if at == "input":
            handles.append(module.register_forward_pre_hook(on_input))
    try:
        with stack:
            yield captured
    finally:
        with _HOOKS:
            for handle in handles:
                handle.remove()


@dataclass
class Watched:
    """What :func:`watch` has seen of a module's last call.

    Attributes:
        taken: the first tensor that it took.
        given: the tensor that it gave.
    """

    taken: Tensor | None = None
    given: Tensor | None = None


@contextmanager
def watch(module: nn.Module) -> Iterator[Watched]:
    """Yields a record of what a module takes and gives, and changes nothing of it.

    As with :func:`capture`, only calls of the thread that opened the context are recorded.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> with watch(net[1]) as watched:
        ...     _ = net(torch.rand(2, 1, 2, 2))
        >>> watched.taken.shape, watched.given.shape
        (torch.Size([2, 4]), torch.Size([2, 3]))
    """
    watched, owner = Watched(), _thread()

    @uncompiled
    def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _thread() == owner:
            watched.taken, watched.given = args[0] if args else None, output

    with _HOOKS:
        handle = module.register_forward_hook(look)
    try:
        yield watched
    finally:
        with _HOOKS:
            handle.remove()


@contextmanager
def before_calls(network: nn.Module, look: Callable[[nn.Module], None]) -> Iterator[None]:
    """Shows each layer of a network to a function before this thread calls it.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> with before_calls(net, lambda layer: print(type(layer).__name__)):
        ...     _ = net(torch.rand(1, 2))
        Sequential
        Flatten
        ReLU
    """
    owner = [_thread()]

    @uncompiled
    def show(layer: nn.Module, _: tuple[Any, ...]) -> None:
        if _thread() in owner:
            look(layer)

    with _HOOKS:
        handles = [layer.register_forward_pre_hook(show) for layer in network.modules()]
    try:
        yield
    finally:
        owner.clear()  # a copy of the hooks may be left
        with _HOOKS:
            for handle in handles:
                handle.remove()


@contextmanager
def frozen_batchnorm(
    module: nn.Module, statistics: Literal["batch", "running"] = "batch"
) -> Iterator[None]:
    """Keeps the running statistics of every BatchNorm layer of a module as they are.

    CASN runs the masked images of Eq. 2 inside this context: they are no data to be learned.

    Args:
        module: its layers in training mode are meant; those in eval mode stay as they are.
        statistics: what these normalise by: those of the batch, or the running ones.

    Raises:
        ValueError: other statistics.

    Example:
        >>> norm = nn.BatchNorm1d(2).train()
        >>> with frozen_batchnorm(norm):
        ...     _ = norm(torch.rand(8, 2) + 3)
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    if statistics not in ("batch", "running"):
        raise ValueError(f"statistics must be 'batch' or 'running', got {statistics!r}")
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        and layer.training
        and layer.track_running_stats
    ]
    for layer in layers:
        if statistics == "batch":
            layer.track_running_stats = False
        else:
            layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = layer.training = True


@contextmanager
def constant_parameters(module: nn.Module) -> Iterator[None]:
    """Lets gradients pass through a module, but not reach its parameters.

    The parameters themselves are not touched: detached views of them stand in for them.

    Example:
        >>> net, imgs = nn.Linear(2, 1), torch.rand(3, 2, requires_grad=True)
        >>> with constant_parameters(net):
        ...     net(imgs).sum().backward()
        >>> imgs.grad is None, net.weight.grad is None
        (False, True)
    """
    # an instance attribute is found before the parameter of its name. The replicas of
    # nn.DataParallel have no parameters any more, but such attributes
    own = [
        (layer, name, value)
        for layer in module.modules()
        for name, value in (layer._parameters or vars(layer).get("_former_parameters", {})).items()
        if value is not None
    ]
    before = [vars(layer).get(name) for layer, name, _ in own]
    for layer, name, value in own:
        vars(layer)[name] = value.detach()
    try:
        yield
    finally:
        for (layer, name, _), value in zip(own, before, strict=True):
            if value is None:
                del vars(layer)[name]
            else:
                vars(layer)[name] = value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and each of its layers back into its own mode at the end.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
        ...     print(net.training)
        False
        >>> [layer.training for layer in net]
        [True, False]
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def never_computed_again(network: nn.Module) -> Iterator[None]:
    """Refuses gradient checkpointing of a network's layers inside of this context.

    What checkpointing computes again in the backward pass would not find the contexts of the
    forward pass: where these keep something from the network, it has to be a
    :func:`casn_plugin.twins.twin`.

    Raises:
        ValueError: a layer whose results are to be computed again.
    """
    message = (
        "gradient checkpointing computes the masked pass again when its BatchNorm statistics and "
        "parameters are no longer kept from it: give the network itself as classify, not a "
        "function, let it reach its layers by attributes, or use no checkpointing"
    )

    def refuse(_: nn.Module) -> None:
        if not torch.is_grad_enabled():  # as reentrant checkpointing runs its layers
            raise ValueError(message)

    with ExitStack() as stack:
        with suppress(RuntimeError):  # somebody else's hooks around us: nothing can be told then
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(message))
        if torch.is_grad_enabled():
            stack.enter_context(before_calls(network, refuse))
        try:
            yield
        except RuntimeError as error:
            if message in str(error):
                raise ValueError(message) from None
            raise


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns what PyTorch's wrappers have in them, or the module itself.

    Seen through are nn.DataParallel, DistributedDataParallel, ``torch.compile`` and
    ``torch.optim.swa_utils.AveragedModel``, in any order.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is unwrapped(net) is net
        True
    """
    averaged = torch.optim.swa_utils.AveragedModel
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, averaged)):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":  # its class needs torch._dynamo
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


class Place(NamedTuple):
    """Where a network's tensors are, as ``Tensor.to(*place)`` takes it.

    Attributes:
        device: of its first parameter.
        dtype: of its first parameter.
    """

    device: torch.device
    dtype: torch.dtype


def place_of(module: nn.Module, default: Tensor | None = None) -> Place:
    """Returns the device and the dtype of a module: those of its first parameter.

    Args:
        module: any network.
        default: a tensor whose place counts where there is no parameter; else that of new tensors.

    Example:
        >>> place_of(nn.Linear(2, 2).double())
        Place(device=device(type='cpu'), dtype=torch.float64)
    """
    for parameter in module.parameters():  # torch 2.5 can't export next() with a default
        return Place(parameter.device, parameter.dtype)
    first = torch.empty(0) if default is None else default
    return Place(first.device, first.dtype)
