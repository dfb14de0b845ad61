"""One forward pass of a network, in which every tensor that layers take and give is looked at.

What the features come from is then asked of the graph of this pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from casn_plugin.hooks import capture
from casn_plugin.layouts import Layout

Run = Callable[[Tensor], tuple[Any, Tensor]]
"""Runs the network that is tried out: images to (logits or None, features)."""


@dataclass(frozen=True)
class Tap:
    """Where the map A is.

    Attributes:
        layer: name of the layer that is tapped.
        at: whether the map is what the layer takes ("input", of a pooling layer) or gives.
        layout: how the tensor there is a map.
    """

    layer: str
    at: Literal["input", "output"] = "output"
    layout: Layout = field(default_factory=Layout)


class Seen(NamedTuple):
    """A tensor that passed through a layer, as its first input or its first output."""

    layer: str
    at: Literal["input", "output"]
    value: Tensor


class TryOut:
    """A network that was run once, and can be run again with a map tapped.

    Args:
        backbone: in eval mode.
        run: how it gives logits and features.
        imgs: more than one image, of noise: what is no tensor of images is told by their number.

    Attributes:
        features: (B, D) of the images.
        size: (rows, columns) of the images.
        kind: what the network is called in errors.
        told_prefix: how many tokens the network says are no patches, None where it does not.

    Raises:
        ValueError: features of another shape.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> tried = TryOut(net, lambda imgs: (None, net(imgs)), torch.rand(2, 3, 32, 16))
        >>> [(value.shape, [name[:2] for name in tried.names_of(value)])
        ...  for value in tried.values() if value.shape[2] > 1]
        [(torch.Size([2, 8, 4, 2]), [('1', 'input'), ('0', 'output')])]
    """

    def __init__(self, backbone: nn.Module, run: Run, imgs: Tensor) -> None:
        self._run = run
        self._layers = dict(backbone.named_modules())
        self._imgs = imgs.detach().requires_grad_()
        self.size = (imgs.shape[2], imgs.shape[3])
        self.kind = type(backbone).__name__
        told = getattr(backbone, "num_prefix_tokens", None)
        self.told_prefix = told if isinstance(told, int) else None
        with torch.enable_grad():
            self._seen, self.features = self._look()
        self._probe = noise_like(self.features)
        self._tapped: tuple[Tap, tuple[Tensor, Any, Tensor, Tensor]] | None = None

    def _look(self) -> tuple[list[Seen], Tensor]:
        """Returns all tensors that layers take and give, in their order, and the features."""
        seen: list[Seen] = []
        on = True

        def note(layer: str, at: Literal["input", "output"], value: Any) -> None:
            while isinstance(value, (tuple, list)) and value:
                value = value[0]
            if on and isinstance(value, Tensor) and value.is_floating_point():
                seen.append(Seen(layer, at, value))

        handles = []
        for name, layer in self._layers.items():
            if name:
                handles += [
                    layer.register_forward_pre_hook(
                        lambda _, args, name=name: note(name, "input", args)
                    ),
                    layer.register_forward_hook(
                        lambda _, __, given, name=name: note(name, "output", given)
                    ),
                ]
        try:
            _, features = self._run(self._imgs.clone())
        finally:
            on = False  # checkpointing calls layers again in the backward pass
            for handle in handles:
                handle.remove()
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(
                "the backbone must give (B, D) features in eval mode, got "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features)}"
            )
        return seen, features

    def values(self, least_rank: int = 3) -> list[Tensor]:
        """Returns all tensors of at least so many dimensions that were made of images, each once.

        They are in the order of the last layers that took or gave them; pictures are left out.
        """
        values: dict[int, Tensor] = {}
        for _, _, value in self._seen:
            made = value.requires_grad and value.shape != self._imgs.shape
            if made and value.ndim >= least_rank and len(value) == len(self._imgs):
                values.pop(id(value), None)
                values[id(value)] = value
        return list(values.values())

    def gradients(self, values: list[Tensor]) -> Sequence[Tensor | None]:
        """Returns the gradients of one random sum of the features with respect to tensors."""
        if not self.features.requires_grad or not values:
            return [None] * len(values)
        try:
            return torch.autograd.grad(
                self.features, values, self._probe, retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # reentrant checkpointing before some of them
            if len(values) == 1:
                return [None]
            return [self.gradients([value])[0] for value in values]

    def passed(self, layer: str, at: Literal["input", "output"] = "output") -> list[Tensor]:
        """Returns what a layer took or gave, call by call."""
        return [seen.value for seen in self._seen if seen[:2] == (layer, at)]

    def layers_of(self, value: Tensor) -> list[nn.Module]:
        """Returns the layers that took or gave a tensor."""
        return [self._layers[seen.layer] for seen in self._seen if seen.value is value]

    def names_of(self, value: Tensor) -> list[Seen]:
        """Returns the places at which a tensor can be tapped, the best first.

        A pooling layer that takes it, so that what it makes of it is seen too; the last layer
        that gives it; the last one that takes it. A layer that is called for several tensors, and
        a linear layer's part of an attention, are none.
        """
        places = [
            seen
            for seen in reversed(self._seen)
            if seen.value is value
            and all(each.value is value for each in self._seen if each[:2] == seen[:2])
        ]
        taken = [seen for seen in places if seen.at == "input"]
        given = [
            seen
            for seen in places
            if seen.at == "output" and not isinstance(self._layers[seen.layer], nn.Linear)
        ]
        best = [seen for seen in taken if self._pools(seen)][:1] + given[:1] + taken[:1]
        return list({seen[:2]: seen for seen in best}.values())

    def _pools(self, seen: Seen) -> bool:
        """Returns whether a layer without parameters makes one position of a tensor."""
        given = self.passed(seen.layer)
        if any(True for _ in self._layers[seen.layer].parameters()) or not given:
            return False
        return seen.value.ndim == 4 and all(side == 1 for side in given[-1].shape[2:])

    def centre(self, result: Tensor) -> tuple[float, float] | None:
        """Returns the row and column of the images that a number comes from, None if from none."""
        gradients = gradient(result, self._imgs)
        if gradients is None or not gradients.any():
            return None
        weights = gradients.double().square().sum((0, 1))
        weights = weights / weights.sum()
        rows, columns = (torch.arange(side, device=weights.device) for side in weights.shape)
        return float((weights.sum(1) * rows).sum()), float((weights.sum(0) * columns).sum())

    def tapped(self, tap: Tap) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Returns map, logits, features and images of another pass, in which the map is a leaf.

        So the features have no way to the images but round the map. The last such pass is kept.
        """
        if self._tapped is None or self._tapped[0] != tap:
            self._tapped = tap, self._pass(tap)
        return self._tapped[1]

    def _pass(self, tap: Tap) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Returns what :meth:`tapped` keeps."""
        imgs = self._imgs.detach().requires_grad_()
        with torch.enable_grad():
            with capture(
                self._layers[tap.layer],
                at=tap.at,
                head_only=True,
                layout=tap.layout,
                size=self.size,
            ) as captured:
                logits, features = self._run(imgs.clone())
            return captured.require(), logits, features, imgs


def gradient(result: Tensor, source: Tensor) -> Tensor | None:
    """Returns the gradient of one random sum of a result, None where it does not come from there.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient((2 * x).sum(), x) is None, gradient(torch.ones(2), x) is None
        (False, True)
    """
    if not result.requires_grad:
        return None
    (found,) = torch.autograd.grad(
        result, source, noise_like(result), retain_graph=True, allow_unused=True
    )
    return found


def noise_like(tensor: Tensor) -> Tensor:
    """Returns noise of a tensor's shape, the same at each call.

    Example:
        >>> torch.equal(noise_like(torch.ones(3)), noise_like(torch.zeros(3)))
        True
    """
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return noise.to(tensor.device, tensor.dtype)
