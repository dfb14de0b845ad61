"""Which layer's tensor is the map A of a network, found and proved by trying the network out.

A tap is proved if the features come from the map at its patches, at more than one row and column,
and if nothing goes round it. The last such map is taken.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from casn_plugin.hooks import capture
from casn_plugin.layouts import (
    Layout,
    Reshape,
    by_reshape,
    layout_by_gradient,
    layouts_by_size,
    token_grid,
)

Run = Callable[[Tensor], tuple[Any, Tensor]]
"""Runs the network that is tried out: images to (logits or None, features)."""

_MOST_TRIALS, _MOST_LISTED, _AT_A_TIME = 12, 8, 16
_TOKENS, _IN_PLACE = 12, 0.95  # how many are looked at, and their least correlation
_PLANES = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


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
    layout: Layout = Layout()


class _Seen(NamedTuple):
    """A tensor that passed through a layer: `layer` by name, `at` its input or its output."""

    layer: str
    at: Literal["input", "output"]
    value: Tensor


class _Map(NamedTuple):
    """A tensor that is a map, how it is one, and the gradient of the features at it."""

    value: Tensor
    layout: Layout
    gradients: Tensor


class TryOut:
    """One forward pass of a network in eval mode, in which all tensors are looked at.

    Args:
        backbone: in eval mode.
        run: how it gives logits and features.
        imgs: more than one image, of noise.
        reshape: the user's function from a layer's tensor to (B, C, H, W).

    Attributes:
        features: of the images.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> tried = TryOut(net, lambda imgs: (None, net(imgs)), torch.rand(2, 3, 32, 16))
        >>> tried.last_map()
        Tap(layer='1', at='input', layout=Layout(kind='channels first', prefix=0, stride=(1.0, 1.0), reshape=None))
        >>> tried.candidates()
        'candidates: 0 (8x4x2)'
    """  # noqa: E501

    def __init__(
        self, backbone: nn.Module, run: Run, imgs: Tensor, reshape: Reshape | None = None
    ) -> None:
        self._backbone, self._run, self._reshape = backbone, run, reshape
        self._layers = dict(backbone.named_modules())
        self._orders: dict[tuple[int, int], bool] = {}
        self._size = (imgs.shape[2], imgs.shape[3])
        self._imgs = imgs.detach().requires_grad_()
        with torch.enable_grad():
            self._seen, self.logits, self.features = self._look()
            self._probe = _noise_like(self.features)
        self._found: list[_Map] = []
        self._rest = self._find_maps()

    def last_map(self) -> Tap:
        """Returns the last map that all the features come from.

        Raises:
            ValueError: there is none; those that come next to it are listed.
        """
        trials = 0
        for found in self._maps():
            for seen in self._names_of(found.value):
                tap = Tap(seen.layer, seen.at, found.layout)
                if self._all_goes_through(tap, found):
                    return tap
                trials += 1
            if trials >= _MOST_TRIALS:
                break
        raise ValueError(
            f"no layer of {type(self._backbone).__name__} gives a map that its features come from "
            "alone, at several rows and columns: name one, target_layer=..., and say how it is "
            f"read if it gives tokens, reshape=function(tokens) -> (B, C, H, W); {self.candidates()}"
        )

    def tap_of(self, layer: str) -> Tap:
        """Returns how the output of a layer is a map.

        Raises:
            ValueError: it was not called, or can't be read as a map.
        """
        values = [seen.value for seen in self._seen if (seen.layer, seen.at) == (layer, "output")]
        if not values:
            raise ValueError(f"the tapped layer was not called in the forward pass: {layer!r}")
        gradients = self._gradients([values[-1]])[0]
        layout = self._layout_of(values[-1], gradients)
        if layout is None and values[-1].ndim == 4:
            layout = Layout(self._kind_by_layers(values[-1]) or "channels first")
        if layout is None:
            raise ValueError(
                f"the tapped layer must give a map of shape (B, C, H, W), but {layer!r} gave "
                f"{tuple(values[-1].shape)}: say how it is read, with "
                "reshape=function(tokens) -> (B, C, H, W)"
            )
        return Tap(layer, "output", layout)

    def prove(self, tap: Tap) -> None:
        """Raises ValueError unless features and logits come from the map, at several positions."""
        maps, logits, features, _ = self._tapped(tap)
        height, width = maps.shape[2:]
        where = f"the map of {tap.layer!r}, {maps.shape[1]}x{height}x{width},"
        if height * width < 2:
            raise ValueError(f"{where} has one position only; {self.candidates()}")
        gradients = _gradient(features, maps, _noise_like(features))
        if gradients is None or not gradients.isfinite().all() or not _positions(gradients, 1):
            raise ValueError(
                f"{where} is none that the features come from: they do not depend on its "
                f"patches; {self.candidates()}"
            )
        for each in logits if isinstance(logits, (list, tuple)) else [logits]:
            if isinstance(each, Tensor) and _gradient(each, maps, _noise_like(each)) is None:
                raise ValueError(
                    f"{where} is none that the logits come from, although the features do; "
                    f"{self.candidates()}"
                )

    def candidates(self) -> str:
        """Returns a sentence that lists the last layers that give maps, with their sizes."""
        listed = []
        for found in self._maps():
            names = [seen for seen in self._names_of(found.value) if seen.at == "output"]
            if names and len(listed) < _MOST_LISTED:
                sizes = found.layout.map_of(found.value, self._size).shape[1:]
                listed.append(f"{names[0].layer} ({'x'.join(map(str, sizes))})")
        if not listed:  # no map can be read: what there is, as it is
            listed = [
                f"{seen.layer} {tuple(seen.value.shape)}"
                for seen in reversed(self._seen)
                if seen.at == "output" and seen.value.ndim in (3, 4)
            ][:_MOST_LISTED]
        return "candidates: " + (", ".join(reversed(listed)) or "none")

    def _look(self) -> tuple[list[_Seen], Any, Tensor]:
        """Returns all tensors that layers take and give, in their order, and what comes out."""
        seen: list[_Seen] = []
        on = True

        def note(layer: str, at: Literal["input", "output"], value: Any) -> None:
            while isinstance(value, (tuple, list)) and value:
                value = value[0]
            if on and isinstance(value, Tensor) and value.is_floating_point():
                seen.append(_Seen(layer, at, value))

        handles = []
        for name, layer in self._layers.items():
            if name:
                handles += [
                    layer.register_forward_pre_hook(
                        lambda _, args, name=name: note(name, "input", args)  # type: ignore[misc]
                    ),
                    layer.register_forward_hook(
                        lambda _, __, given, name=name: note(name, "output", given)  # type: ignore[misc]
                    ),
                ]
        try:
            logits, features = self._run(self._imgs.clone())
        finally:
            on = False  # checkpointing calls layers again in the backward pass
            for handle in handles:
                handle.remove()
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(
                "the backbone must give (B, D) features in eval mode, got "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features)}"
            )
        return seen, logits, features

    def _maps(self) -> Iterator[_Map]:
        """Yields all tensors that are maps the features come from, the last first, found once."""
        place = 0
        while True:
            if place == len(self._found):
                found = next(self._rest, None)
                if found is None:
                    return
                self._found.append(found)
            yield self._found[place]
            place += 1

    def _find_maps(self) -> Iterator[_Map]:
        """Yields what :meth:`_maps` keeps."""
        values = {}
        for seen in self._seen:
            images = len(seen.value) == len(self._imgs) and seen.value.requires_grad
            if images and (seen.value.ndim in (3, 4) or self._reshape is not None):
                values.pop(id(seen.value), None)  # the order is that of the last layer
                values[id(seen.value)] = seen.value
        rest, number = list(reversed(values.values())), _AT_A_TIME
        while rest:
            some, rest = rest[:number], rest[number:]
            number = len(rest)  # most often the first few are enough
            for value, gradients in zip(some, self._gradients(some), strict=True):
                if gradients is not None and gradients.isfinite().all():
                    layout = self._layout_of(value, gradients)
                    if layout and _positions(layout.map_of(gradients, self._size), 2):
                        yield _Map(value, layout, gradients)

    def _gradients(self, values: list[Tensor]) -> Sequence[Tensor | None]:
        """Returns the gradients of a random sum of the features with respect to tensors."""
        if not self.features.requires_grad or not values:
            return [None] * len(values)
        try:
            return torch.autograd.grad(
                self.features, values, self._probe, retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # reentrant checkpointing before some of them
            if len(values) == 1:
                return [None]
            return [self._gradients([value])[0] for value in values]

    def _layout_of(self, value: Tensor, gradients: Tensor | None) -> Layout | None:
        """Returns how a tensor is a map, as far as that is sure."""
        if self._reshape is not None:
            try:
                return by_reshape(self._reshape, value)
            except (ValueError, RuntimeError, IndexError, TypeError):
                return None
        if value.ndim == 3:
            hint = getattr(self._backbone, "num_prefix_tokens", None)
            layout = token_grid(value.shape[1], self._size, hint if isinstance(hint, int) else None)
            return layout if layout and self._in_reading_order(layout, value.shape[1]) else None
        if value.ndim != 4:
            return None
        pooled = None if gradients is None else layout_by_gradient(gradients)
        if pooled is not None:
            return pooled
        found = layouts_by_size(value.shape, self._size)
        if len(found) == 1:
            return found[0]
        kind = self._kind_by_layers(value) if found else None
        return Layout(kind) if kind else None

    def _kind_by_layers(self, value: Tensor) -> Literal["channels first", "channels last"] | None:
        """Returns where channels are for the layers that a 4-D tensor passes through."""
        layers = [self._layers[seen.layer] for seen in self._seen if seen.value is value]
        if any(isinstance(layer, _PLANES) for layer in layers):
            return "channels first"
        if any(isinstance(layer, (nn.LayerNorm, nn.Linear)) for layer in layers):
            return "channels last"
        return None

    def _in_reading_order(self, layout: Layout, number: int) -> bool:
        """Returns whether the first such tokens are those of the image, row by row.

        Where the gradient of a token has its centre in the image is where the token is: over some
        tokens, rows and columns of the centres must go with those of the map.
        """
        key = (layout.prefix, number)
        if key not in self._orders:
            self._orders[key] = any(
                self._first_reads(prefix, number - layout.prefix + prefix, layout)
                for prefix in {layout.prefix: 0, 0: 0}
            )
        return self._orders[key]

    def _first_reads(self, prefix: int, number: int, layout: Layout) -> bool:
        """Returns whether the first tensor of so many tokens is read so."""
        for seen in self._seen:
            value = seen.value
            tokens = value.ndim == 3 and value.shape[:2] == (len(self._imgs), number)
            if tokens and value.requires_grad:
                return self._reads(value, prefix, layout)
        return False

    def _reads(self, tokens: Tensor, prefix: int, layout: Layout) -> bool:
        """Returns whether tokens lie in the image as in a map, as far as some of them tell."""
        height, width = (
            round(side / step) for side, step in zip(self._size, layout.stride, strict=True)
        )
        number = height * width
        weights = _noise_like(tokens[:, 0])
        chosen = range(number) if number <= _TOKENS else range(0, number, number // _TOKENS | 1)
        rows, found = [], []
        for place in chosen:
            centre = self._centre((tokens[:, prefix + place] * weights).sum())
            if centre is None:
                return False
            rows.append(divmod(place, width))
            found.append(centre)
        both = torch.tensor([*zip(*rows, strict=True), *zip(*found, strict=True)])
        alike = both.corrcoef()[:2, 2:]
        return bool((alike.diagonal() > _IN_PLACE).all())

    def _centre(self, total: Tensor) -> tuple[float, float] | None:
        """Returns the row and column of the image that a number comes from, None if from none."""
        (gradients,) = torch.autograd.grad(
            total, self._imgs, retain_graph=True, allow_unused=True
        )
        if gradients is None or not gradients.any():
            return None
        weights = gradients.double().square().sum((0, 1))
        rows, columns = (
            torch.arange(side, device=weights.device) + 0.5 for side in weights.shape
        )
        total = weights.sum()
        return (
            float((weights.sum(1) * rows).sum() / total),
            float((weights.sum(0) * columns).sum() / total),
        )

    def _names_of(self, value: Tensor) -> list[_Seen]:
        """Returns the layers at which a tensor can be tapped, the best first."""
        every = [seen for seen in self._seen if seen.value is value]
        usable = [seen for seen in reversed(every) if self._is_alone(seen)]
        given = [seen for seen in usable if seen.at == "output"]
        taken = [seen for seen in usable if seen.at == "input"]
        pools = [seen for seen in taken if self._pools(seen)]
        projected = [seen for seen in given if self._projects(seen)]
        return pools[:1] + [seen for seen in given if seen not in projected][:1] + taken[:1]

    def _is_alone(self, seen: _Seen) -> bool:
        """Returns whether a layer is called for one tensor only."""
        values = [each.value for each in self._seen if each[:2] == seen[:2]]
        return all(value is seen.value for value in values)

    def _projects(self, seen: _Seen) -> bool:
        """Returns whether a tensor is what a linear layer makes of tokens: a part of attention."""
        return isinstance(self._layers[seen.layer], nn.Linear)

    def _pools(self, seen: _Seen) -> bool:
        """Returns whether a layer without parameters makes one position of a tensor."""
        layer = self._layers[seen.layer]
        if any(True for _ in layer.parameters()):
            return False
        given = [each.value for each in self._seen if each[:2] == (seen.layer, "output")]
        rest = given[-1].shape[2:] if given else ()
        return bool(given) and seen.value.ndim == 4 and all(side == 1 for side in rest)

    def _tapped(self, tap: Tap) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Returns map, logits, features and images of a pass in which the map is a leaf."""
        imgs = self._imgs.detach().requires_grad_()
        layer = self._layers[tap.layer]
        with torch.enable_grad():
            with capture(
                layer, at=tap.at, head_only=True, layout=tap.layout, size=self._size
            ) as captured:
                logits, features = self._run(imgs.clone())
            return captured.require(), logits, features, imgs

    def _all_goes_through(self, tap: Tap, at: _Map) -> bool:
        """Returns whether the features come from a map alone, with other tokens beside it."""
        maps, _, features, imgs = self._tapped(tap)
        if not features.requires_grad:
            return False
        whole = maps[0].numel() == at.value[0].numel()
        found, bypass = torch.autograd.grad(
            features, [maps, imgs], self._probe, retain_graph=True, allow_unused=True
        )
        if found is None or (whole and bypass is not None):
            return False
        if whole:
            return _positions(found, 2)
        expected = tap.layout.map_of(at.gradients, self._size)
        alike = (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        return bool(alike) and self._no_other_branch(at.value)

    def _no_other_branch(self, value: Tensor) -> bool:
        """Returns whether every other map leads to this one, or comes from it."""
        others = [each.value for each in self._maps() if each.value is not value]
        if not others:
            return True
        ways = torch.autograd.grad(
            (value * _noise_like(value)).sum(), others, retain_graph=True, allow_unused=True
        )
        return all(
            way is not None or _gradient(other, value, _noise_like(other)) is not None
            for way, other in zip(ways, others, strict=True)
        )


def _gradient(result: Tensor, maps: Tensor, probe: Tensor) -> Tensor | None:
    """Returns the gradient of a random sum of a result with respect to maps, None without one."""
    if not result.requires_grad:
        return None
    (gradients,) = torch.autograd.grad(result, maps, probe, retain_graph=True, allow_unused=True)
    return gradients


def _positions(gradients: Tensor, least: int) -> bool:
    """Returns whether a (B, C, H, W) gradient is something in so many rows and columns."""
    some = gradients.ne(0).flatten(0, 1).any(0)
    return bool(some.any(1).sum() >= least and some.any(0).sum() >= least)


def _noise_like(tensor: Tensor) -> Tensor:
    """Returns noise of a tensor's shape, the same at each call."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return noise.to(tensor.device, tensor.dtype)
