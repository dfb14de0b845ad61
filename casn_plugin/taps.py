"""Which layer's tensor is the map A of a network, found and proved by trying the network out.

A tap is proved if the features come from the map at its patches, at more than one row and column,
and if nothing goes round it. The last such map is taken.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from casn_plugin.layouts import (
    Layout,
    Reshape,
    by_reshape,
    layout_by_gradient,
    layouts_by_size,
    token_grid,
)
from casn_plugin.tryout import Tap, TryOut, gradient, noise_like

_MOST_TRIALS, _MOST_LISTED, _AT_A_TIME = 8, 8, 16
_TOKENS, _IN_PLACE = 12, 0.95  # how many are looked at, and their least correlation
_PLANES = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class _Map(NamedTuple):
    """A tensor that is a map, how it is one, and the gradient of the features at it."""

    value: Tensor
    layout: Layout
    gradients: Tensor


class Maps:
    """The maps among all the tensors of a try-out.

    Args:
        tried: the try-out.
        reshape: the user's function from a layer's tensor to (B, C, H, W).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> maps = Maps(TryOut(net, lambda imgs: (None, net(imgs)), torch.rand(2, 3, 32, 16)))
        >>> tap = maps.last()
        >>> tap.layer, tap.at, tap.layout.kind
        ('1', 'input', 'channels first')
        >>> maps.candidates()
        'candidates: 0 (8x4x2)'
    """

    def __init__(self, tried: TryOut, reshape: Reshape | None = None) -> None:
        self._tried, self._reshape = tried, reshape
        self._orders: dict[tuple[int, int], bool] = {}

    def last(self) -> Tap:
        """Returns the last map that all the features come from.

        Raises:
            ValueError: there is none; those that come next to it are listed.
        """
        trials = 0
        for found in self._find():
            for seen in self._tried.names_of(found.value):
                tap = Tap(seen.layer, seen.at, found.layout)
                if self._all_goes_through(tap, found):
                    return tap
                trials += 1
            if trials >= _MOST_TRIALS:
                break
        raise ValueError(
            f"no layer of {self._tried.kind} gives a map that its features come from alone, at "
            "several rows and columns: name one, target_layer=..., and say how it is read if it "
            f"gives tokens, reshape=function(tokens) -> (B, C, H, W); {self.candidates()}"
        )

    def tap_of(self, layer: str) -> Tap:
        """Returns how the output of a layer is a map.

        Raises:
            ValueError: it was not called, or can't be read as a map.
        """
        values = self._tried.passed(layer)
        if not values:
            raise ValueError(
                f"the tapped layer was not called in the forward pass: target_layer is {layer!r}; "
                f"{self.candidates()}"
            )
        value = values[-1]
        if self._reshape is not None:
            return Tap(layer, "output", by_reshape(self._reshape, value))
        layout = self._layout_of(value, self._tried.gradients([value])[0])
        if layout is None and value.ndim == 4:
            layout = Layout(self._kind_by_layers(value) or "channels first")
        if layout is None:
            raise ValueError(
                f"the tapped layer must give a map of shape (B, C, H, W), but {layer!r} gave "
                f"{tuple(value.shape)}: say how it is read, with "
                f"reshape=function(tokens) -> (B, C, H, W); {self.candidates()}"
            )
        return Tap(layer, "output", layout)

    def is_whole(self, tap: Tap) -> bool:
        """Returns whether one map passes a tap, and the features come from it alone."""
        values = self._tried.passed(tap.layer, tap.at)
        if not values or values[0].ndim != 4 or any(each is not values[0] for each in values):
            return False
        _, _, features, imgs = self._tried.tapped(tap)
        return gradient(features, imgs) is None

    def prove(self, tap: Tap) -> None:
        """Raises ValueError unless features and logits come from the map, at several positions."""
        maps, logits, features, _ = self._tried.tapped(tap)
        where = f"the map of {tap.layer!r}, {'x'.join(map(str, maps.shape[1:]))},"
        if maps[0, 0].numel() < 2:
            raise ValueError(f"{where} has one position only; {self.candidates()}")
        gradients = gradient(features, maps)
        if gradients is None or not gradients.isfinite().all() or not _positions(gradients, 1):
            raise ValueError(
                f"{where} is none that the features come from: they do not depend on its "
                f"patches; {self.candidates()}"
            )
        for each in logits if isinstance(logits, (list, tuple)) else [logits]:
            if isinstance(each, Tensor) and gradient(each, maps) is None:
                raise ValueError(
                    f"{where} is none that the logits come from, although the features do; "
                    f"{self.candidates()}"
                )

    def candidates(self) -> str:
        """Returns a sentence that lists the last layers that give maps, with their sizes."""
        listed: dict[str, str] = {}
        for found in self._find():
            names = [seen for seen in self._tried.names_of(found.value) if seen.at == "output"]
            if names:
                sizes = found.layout.map_of(found.value, self._tried.size).shape[1:]
                listed[f"{names[0].layer} ({'x'.join(map(str, sizes))})"] = ""
            if len(listed) == _MOST_LISTED:
                break
        if not listed:  # no map can be read: what there is, as it is
            for value in self._tried.values():
                names = [seen for seen in self._tried.names_of(value) if seen.at == "output"]
                listed.update({f"{seen.layer} {tuple(value.shape)}": "" for seen in names})
            listed = dict(list(reversed(listed.items()))[:_MOST_LISTED])
        return "candidates: " + (", ".join(reversed(listed)) or "none")

    def _find(self) -> Iterator[_Map]:
        """Yields all tensors that are maps the features come from, the last first."""
        rest = self._tried.values(3 if self._reshape is None else 2)[::-1]
        number = _AT_A_TIME
        while rest:
            some, rest = rest[:number], rest[number:]
            number = len(rest)  # most often the first few are enough
            for value, gradients in zip(some, self._tried.gradients(some), strict=True):
                if gradients is not None and gradients.isfinite().all():
                    layout = self._layout_of(value, gradients)
                    if layout and _positions(layout.map_of(gradients, self._tried.size), 2):
                        yield _Map(value, layout, gradients)

    def _layout_of(self, value: Tensor, gradients: Tensor | None) -> Layout | None:
        """Returns how a tensor is a map, as far as that is sure."""
        if self._reshape is not None:
            try:
                return by_reshape(self._reshape, value)
            except (ValueError, RuntimeError, IndexError, TypeError):
                return None
        if value.ndim == 3:
            number = value.shape[1]
            layout = token_grid(number, self._tried.size, self._tried.told_prefix)
            return layout if layout and self._in_reading_order(layout, number) else None
        if value.ndim != 4:
            return None
        pooled = None if gradients is None else layout_by_gradient(gradients)
        if pooled is not None:
            return pooled
        found = layouts_by_size(value.shape, self._tried.size)
        if len(found) == 1:
            return found[0]
        kind = self._kind_by_layers(value) if found else None
        return Layout(kind) if kind else None

    def _kind_by_layers(self, value: Tensor) -> Literal["channels first", "channels last"] | None:
        """Returns where channels are for the layers that a 4-D tensor passes through."""
        layers = self._tried.layers_of(value)
        if any(isinstance(layer, _PLANES) for layer in layers):
            return "channels first"
        if any(isinstance(layer, (nn.LayerNorm, nn.Linear)) for layer in layers):
            return "channels last"
        return None

    def _in_reading_order(self, layout: Layout, number: int) -> bool:
        """Returns whether the first such tokens are those of the image, row by row.

        Where the gradient of a token has its centre in the image is where the token is: over some
        tokens, rows and columns of the centres must go with those of the map. Later tokens keep
        the order of the first ones, or of the first ones without class token.
        """
        key = (layout.prefix, number)
        if key not in self._orders:
            self._orders[key] = any(
                self._first_reads(prefix, number - layout.prefix + prefix, layout)
                for prefix in {layout.prefix: None, 0: None}
            )
        return self._orders[key]

    def _first_reads(self, prefix: int, number: int, layout: Layout) -> bool:
        """Returns whether the first tensor of so many tokens is read so."""
        tokens = [
            value for value in self._tried.values() if value.ndim == 3 and value.shape[1] == number
        ]
        if not tokens:
            return False
        height, width = (
            round(side / step) for side, step in zip(self._tried.size, layout.stride, strict=True)
        )
        patches = height * width
        weights = noise_like(tokens[0][:, 0])
        places, centres = [], []
        for place in range(0, patches, 1 if patches <= _TOKENS else patches // _TOKENS | 1):
            centre = self._tried.centre((tokens[0][:, prefix + place] * weights).sum())
            if centre is None:
                return False
            places.append(divmod(place, width))
            centres.append(centre)
        both = torch.tensor([*zip(*places, strict=True), *zip(*centres, strict=True)])
        return bool((both.corrcoef()[:2, 2:].diagonal() > _IN_PLACE).all())

    def _all_goes_through(self, tap: Tap, found: _Map) -> bool:
        """Returns whether the features come from a map alone, with other tokens beside it."""
        maps, _, features, imgs = self._tried.tapped(tap)
        gradients = gradient(features, maps)
        if gradients is None:
            return False
        if maps[0].numel() == found.value[0].numel():
            return gradient(features, imgs) is None and _positions(gradients, 2)
        # class tokens go round it: but no layer that takes the map may be left out
        expected = found.layout.map_of(found.gradients, self._tried.size)
        if (gradients - expected).abs().max() > 1e-3 * expected.abs().max():
            return False
        others = found.value.shape[1] - maps[0, 0].numel() if found.value.ndim == 3 else 0
        return self._no_other_branch(found.value, others)

    def _no_other_branch(self, value: Tensor, others: int) -> bool:
        """Returns whether all that has more than other tokens leads to a map or comes from it."""
        values = [each for each in self._tried.values() if each is not value]
        branches = [
            each
            for each, gradients in zip(values, self._tried.gradients(values), strict=True)
            if gradients is not None and _rows(gradients) > others
        ]
        if not branches:
            return True
        ways = torch.autograd.grad(
            value, branches, noise_like(value), retain_graph=True, allow_unused=True
        )
        return all(
            way is not None or gradient(branch, value) is not None
            for way, branch in zip(ways, branches, strict=True)
        )


def _positions(gradients: Tensor, least: int) -> bool:
    """Returns whether a (B, C, H, W) gradient is something in so many rows and columns."""
    some = gradients.ne(0).flatten(0, 1).any(0)
    return bool(some.any(1).sum() >= least and some.any(0).sum() >= least)


def _rows(gradients: Tensor) -> int:
    """Returns how many of the tokens of a (B, N, ...) gradient have some."""
    return int(gradients.ne(0).flatten(2).any(2).any(0).sum())
