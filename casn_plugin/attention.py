"""Attention: the tapped feature map, Grad-CAM, Siamese attention, the soft mask, row profiles.

Everything here is a pure function of tensors, except the context managers, which touch a model and
leave it as found: :func:`capture`, :func:`frozen_batchnorm`, :func:`constant_parameters` and
:func:`evaluating`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

PairScorer = Callable[[Tensor], Tensor]
"""Maps (P, D) differences of features to (P, 2) scores; column 1 is "same identity"."""

_HOOKS = threading.Lock()  # torch gives hooks their numbers without one


@dataclass
class Captured:
    """What :func:`capture` has seen of the tapped module's last call.

    Attributes:
        activations: the feature map A.
        pooled: what the module made of it, where the map is its input.
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
    module: nn.Module, *, at: Literal["input", "output"] = "output", head_only: bool = False
) -> Iterator[Captured]:
    """Yields a record of the feature map A that passes through a module.

    The original tensor is recorded and a clone goes on through the network, so in-place layers
    behind it neither change the record nor break its gradient. Only calls of the thread that
    opened the context are recorded (the replicas of ``nn.DataParallel`` share their hooks). A
    map that needs no gradient (a frozen backbone) becomes a leaf that does, and under autocast
    it is recorded in float32. The hook is gone when the context ends, also after an exception.

    Args:
        module: the layer to tap. Where its output is a tuple, the first tensor counts.
        at: whether the map is what the module takes (a pooling layer) or what it gives.
        head_only: gradients are recorded from the map on and not before it, also inside
            ``torch.no_grad()``: the backbone below the map then keeps no graph.

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
    owner = threading.get_ident()

    def tap(value: Any) -> Any:
        """Records the first tensor of a value; returns the value with a clone in its place."""
        if isinstance(value, (tuple, list)):
            return type(value)((tap(value[0]), *value[1:])) if value else value
        if not isinstance(value, Tensor):
            return value
        if value.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(
            value.device.type
        ):
            value = value.float()
        if head_only:
            torch.set_grad_enabled(True)  # the no_grad() around the forward pass restores it
            value = value.detach()
        if torch.is_grad_enabled() and not value.requires_grad:
            value = value.detach().requires_grad_()
        captured.activations = value
        return value.clone()

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return tap(args) if threading.get_ident() == owner else None

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        if at == "output":
            return tap(output)
        captured.pooled = output if isinstance(output, Tensor) else None
        return None

    with _HOOKS:
        handles = [module.register_forward_hook(on_output)]
        if at == "input":
            handles.append(module.register_forward_pre_hook(on_input))
    try:
        yield captured
    finally:
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


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns what nn.DataParallel or DistributedDataParallel wraps, or the module itself.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is unwrapped(net) is net
        True
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return module.module if isinstance(module, parallel) else module


def grad_cam(
    scores: Float[Tensor, " batch"],
    activations: Float[Tensor, "batch channels height width"],
    *,
    create_graph: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Returns the Grad-CAM maps ReLU(Σ_k w_k A_k), w = GAP(∂score/∂A) (paper, Section 3.1.2).

    The maps are >= 0, unscaled, in float32 or wider, and by default differentiable once more
    (`create_graph`). Only the part of the network between map and score is traversed.

    Args:
        scores: one score per image: y_c of its true identity, or s of Section 3.2.2.
        activations: the map A that the scores were computed from.
        create_graph: keep the graph, so that a loss of the maps can be trained.

    Raises:
        ValueError: the scores do not depend on the activations.

    Example:
        >>> a = torch.rand(2, 3, 4, 4, requires_grad=True)
        >>> grad_cam(a.mean((2, 3)).sum(1), a).shape
        torch.Size([2, 4, 4])
    """
    gradients = None
    if scores.requires_grad and activations.requires_grad:
        (gradients,) = torch.autograd.grad(
            scores.sum(), activations, create_graph=create_graph, retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
    if gradients is None:
        raise ValueError(
            "the scores do not depend on the activations: expected scores computed, with "
            "gradients enabled, from the very tensor that is given as activations"
        )
    with torch.autocast(activations.device.type, enabled=False):
        weights = _at_least_float32(gradients).mean((2, 3))
        maps = torch.einsum("bc,bchw->bhw", weights, _at_least_float32(activations))
        return maps.relu()


def indicator(
    pair_classifier: PairScorer, differences: Float[Tensor, "pairs dim"]
) -> Float[Tensor, "pairs dim"]:
    """Returns the indicator α (0 or 1): where ∂z1/∂f⁻ > 0 (paper, Eq. 4).

    It is piecewise constant, so no gradient flows through it; it is computed in float32 or wider.

    Args:
        pair_classifier: gives (P, 2) scores z, column 1 = same identity, row by row.
        differences: f⁻ = f1 − f2 of each pair.

    Example:
        >>> classifier = nn.Linear(2, 2)
        >>> _ = classifier.weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        >>> indicator(classifier, torch.rand(1, 2))
        tensor([[1., 0.]])
    """
    with torch.enable_grad(), torch.autocast(differences.device.type, enabled=False):
        inputs = _at_least_float32(differences.detach())
        if isinstance(pair_classifier, nn.Module):  # a model cast to half precision as a whole
            inputs = inputs.to(next(pair_classifier.parameters(), inputs).dtype)
        inputs.requires_grad_()
        (gradients,) = torch.autograd.grad(pair_classifier(inputs)[:, 1].sum(), inputs)
    return (gradients > 0).to(differences.dtype)


def siamese_attention(
    pair_classifier: PairScorer,
    features: Float[Tensor, "batch dim"],
    activations: Float[Tensor, "batch channels height width"],
    *,
    create_graph: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Returns the attention maps M of each image of each pair (paper, Section 3.2.2).

    s = (α, f), w = GAP(∂s/∂A), M = ReLU(Σ_k w_k A_k), with one α for both images of a pair.
    Rows 2i and 2i+1 are pair i. The maps are >= 0 and unscaled.

    Args:
        pair_classifier: gives (P, 2) scores, column 1 = same identity.
        features: f, computed from `activations` with gradients enabled.
        activations: the map A.
        create_graph: keep the graph, so that a loss of the maps can be trained.

    Raises:
        ValueError: an odd number of rows, or features that do not depend on the activations.

    Example:
        >>> a = torch.rand(4, 3, 6, 2, requires_grad=True)
        >>> siamese_attention(nn.Linear(3, 2), a.mean((2, 3)), a).shape
        torch.Size([4, 6, 2])
    """
    first, second = split_pairs(features)
    alpha = indicator(pair_classifier, first - second)
    scores = (alpha.repeat_interleave(2, dim=0) * features).sum(1)
    return grad_cam(scores, activations, create_graph=create_graph)


def split_pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first and the second images of all pairs: rows 2i and rows 2i+1.

    Raises:
        ValueError: an odd number of rows.

    Example:
        >>> split_pairs(torch.tensor([7, 7, 3, 5]))
        (tensor([7, 3]), tensor([7, 5]))
    """
    if len(rows) % 2:
        raise ValueError(
            "rows 2i and 2i+1 of a batch are pair i, so their number must be even, "
            f"but this batch (or this replica's share of it) has {len(rows)}"
        )
    return rows[0::2], rows[1::2]


def scale_maps(maps: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """Returns each map divided by its own maximum: in [0, 1], a blank map stays zero.

    Example:
        >>> scale_maps(torch.tensor([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        tensor([[[0.0000, 0.5000],
                 [1.0000, 0.2500]],
        <BLANKLINE>
                [[0.0000, 0.0000],
                 [0.0000, 0.0000]]])
    """
    maps = _at_least_float32(maps)
    peak = maps.amax((-2, -1), keepdim=True)
    blank = peak <= torch.finfo(maps.dtype).tiny ** 0.5
    return torch.where(blank, 0.0, maps / torch.where(blank, 1.0, peak))


def soft_mask(
    maps: Float[Tensor, "batch height width"],
    size: tuple[int, int],
    *,
    scale: float = 10.0,
    threshold: float = 0.5,
) -> Float[Tensor, "batch rows columns"]:
    """Returns Σ(M) = sigmoid(α(M − β)) at the size of the image (paper, Section 3.1.2).

    M is resized to the image (bilinear, half-pixel centres), then scaled to [0, 1] by its own
    maximum. The mask is in (0, 1): 1 hides a pixel.

    Args:
        maps: attention maps, >= 0.
        size: (rows, columns) of the image in pixels.
        scale: α, the steepness of the mask's edge.
        threshold: β, the share of the map's maximum above which a pixel is hidden.

    Example:
        >>> soft_mask(torch.eye(2)[None], (2, 2))
        tensor([[[0.9933, 0.0067],
                 [0.0067, 0.9933]]])
    """
    with torch.autocast(maps.device.type, enabled=False):
        resized = F.interpolate(
            _at_least_float32(maps)[:, None], size=size, mode="bilinear", align_corners=False
        )
        return torch.sigmoid(scale * (scale_maps(resized[:, 0]) - threshold))


def row_profiles(maps: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height"]:
    """Returns the row maxima M_m of each map scaled to [0, 1] (paper, Section 3.2.2).

    Example:
        >>> row_profiles(torch.tensor([[[0.0, 2.0], [4.0, 1.0]]]))
        tensor([[0.5000, 1.0000]])
    """
    return scale_maps(maps).amax(-1)


def attended_span(
    profiles: Float[Tensor, "*batch height"], threshold: float
) -> tuple[Tensor, Tensor]:
    """Returns the first and the last row whose value is above the threshold t (integers).

    A profile with no such row spans all its rows.

    Example:
        >>> attended_span(torch.tensor([[0.0, 0.5, 1.0, 0.1], [0.0, 0.0, 0.0, 0.0]]), 0.2)
        (tensor([1, 0]), tensor([2, 3]))
    """
    above = profiles > threshold
    above = above | ~above.any(-1, keepdim=True)
    first = above.to(torch.uint8).argmax(-1)
    last = profiles.shape[-1] - 1 - above.flip(-1).to(torch.uint8).argmax(-1)
    return first, last


def align_profiles(
    profiles: Float[Tensor, "*batch height"], threshold: float = 0.2
) -> Float[Tensor, "*batch height"]:
    """Returns M*_m: the attended rows of each profile, stretched to its whole height (Eq. 5).

    The rows from the first to the last value above t are resized to H values by linear
    interpolation with half-pixel centres, as ``interpolate(mode="linear", align_corners=False)``
    does, each profile by its own span.

    Args:
        profiles: row maxima of maps scaled to [0, 1].
        threshold: t.

    Example:
        >>> align_profiles(torch.tensor([0.0, 1.0, 0.5, 0.0]))
        tensor([1.0000, 0.8750, 0.6250, 0.5000])
    """
    height = profiles.shape[-1]
    first, last = (row.unsqueeze(-1) for row in attended_span(profiles, threshold))
    rows = torch.arange(height, device=profiles.device, dtype=profiles.dtype)
    length = (last - first + 1).to(profiles.dtype)
    source = ((rows + 0.5) * (length / height) - 0.5).clamp(min=0)
    lower = torch.minimum(source.long(), last - first)
    upper = torch.minimum(lower + 1, last - first)
    fraction = source - lower
    return torch.lerp(
        profiles.gather(-1, first + lower), profiles.gather(-1, first + upper), fraction
    )


def attention_distance(
    first: Float[Tensor, "*batch height"],
    second: Float[Tensor, "*batch height"],
    *,
    threshold: float = 0.2,
    unit: bool = False,
) -> Float[Tensor, "*batch"]:
    """Returns ‖M*_m1 − M*_m2‖₂ of each pair of profiles (paper, Eq. 5); >= 0, 0 for equal ones.

    Args:
        first: row profiles of the first images, in [0, 1].
        second: row profiles of the second images.
        threshold: t, the value above which a row counts as attended.
        unit: divide each aligned profile by its length first, one reading of "normalized".

    Example:
        >>> attention_distance(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.])
    """
    first, second = align_profiles(first, threshold), align_profiles(second, threshold)
    if unit:
        first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    distances: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
    return distances


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision tensors in float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
