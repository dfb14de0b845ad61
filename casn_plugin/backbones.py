"""How a network gives logits, features and its last feature map, known by names alone.

Models of torchreid's factory are known; for any other module a function says how it is run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from casn_plugin.encoding import part_embedding
from casn_plugin.hooks import Captured, capture, evaluating, place_of
from casn_plugin.scores import Logits

Forward = Callable[[nn.Module, Tensor], tuple[Logits, Tensor]]
"""Maps a backbone and its images to (logits, (B, D) features)."""

# torchreid's four models that pool their last map with a function, not a module
_LAST_MAP = {
    "HACNN": "inception3",
    "MuDeep": "block5",
    "NASNetAMobile": "relu",
    "ShuffleNet": "stage4",
}
_POOL_NAMES = ("global_avgpool", "parts_avgpool", "global_pool", "avgpool")
_INPUT_SIZE = {"HACNN": (160, 64)}


class Tapped(NamedTuple):
    """What a backbone gives in a training pass.

    Attributes:
        logits: (B, classes) scores y of all identities, or a sequence of such (PCB, HACNN).
        features: (B, D) f.
        activations: (B, C, H, W) A, the tapped map that both were computed from.
    """

    logits: Logits
    features: Tensor
    activations: Tensor


class Reader:
    """How one backbone is read: which function runs it, and at which layer its last map is tapped.

    The backbone itself is not kept: the replicas of nn.DataParallel are read by the same reader.

    Args:
        backbone: a model of torchreid's factory, or with `forward` any module.
        target_layer: the layer whose output is the map A, by name or as a module; by default the
            map that the backbone's global pooling takes is looked for.
        forward: how a backbone that is not of torchreid's factory gives logits and features.

    Attributes:
        target_layer: name of the layer that is tapped.
        at: whether the map is that layer's "input" (of a pooling layer) or its "output".

    Raises:
        TypeError: no torchreid model and no `forward`.
        ValueError: a target layer that does not exist, or a backbone without convolutions.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1))
        >>> reader = Reader(net, forward=lambda net, imgs: (None, net(imgs).flatten(1)))
        >>> reader.target_layer, reader.at
        ('1', 'input')
        >>> reader.tapped(net, torch.rand(2, 3, 64, 32)).activations.shape
        torch.Size([2, 8, 8, 4])
    """

    def __init__(
        self,
        backbone: nn.Module,
        target_layer: str | nn.Module | None = None,
        forward: Forward | None = None,
    ) -> None:
        if forward is None and getattr(backbone, "loss", None) not in ("softmax", "triplet"):
            raise TypeError(
                f"{type(backbone).__name__} is no model of torchreid's factory: say how it gives "
                "logits and features, with forward=function(backbone, imgs) -> (logits, features)"
            )
        self._forward = forward
        self.target_layer, self.at = _find_target(backbone, target_layer)

    def features(self, backbone: nn.Module, imgs: Tensor) -> Tensor:
        """Returns the features of images: what torchreid's models give in eval mode."""
        features: Tensor = (
            backbone(imgs) if self._forward is None else self._forward(backbone, imgs)[1]
        )
        return features

    def logits(self, backbone: nn.Module, imgs: Tensor) -> Logits:
        """Returns the logits of images; a model of torchreid's factory is in training mode."""
        return (self._forward or torchreid_forward)(backbone, imgs)[0]

    def capture(
        self, backbone: nn.Module, *, head_only: bool = False
    ) -> AbstractContextManager[Captured]:
        """Returns the context that records the map; see :func:`casn_plugin.hooks.capture`."""
        layer = backbone.get_submodule(self.target_layer)
        return capture(layer, at=self.at, head_only=head_only)

    def tapped(self, backbone: nn.Module, imgs: Tensor) -> Tapped:
        """Returns logits, features and the map that both were computed from.

        Raises:
            ValueError: the target layer was not called, gave no map, or ran without gradients.
        """
        pool = getattr(backbone, "parts_avgpool", None) if self._forward is None else None
        with (
            self.capture(backbone) as captured,
            nullcontext() if pool is None else capture(pool, at="input") as pooled,
        ):
            logits, features = (self._forward or torchreid_forward)(backbone, imgs)
        if pooled is not None:
            # PCB's features of a training pass have dropout: f is its eval embedding
            features = part_embedding(pooled.require(), backbone.parts)  # type: ignore[arg-type]
        activations = captured.require()
        if torch.is_grad_enabled() and not activations.requires_grad:
            raise ValueError(
                f"the tapped layer {self.target_layer!r} ran without gradients although they are "
                "enabled: inside of gradient checkpointing, use use_reentrant=False or tap a layer "
                "behind it"
            )
        return Tapped(logits, features, activations)

    def try_out(self, backbone: nn.Module, size: tuple[int, int]) -> Tensor:
        """Returns the features of one blank image; the backbone is left as found.

        Args:
            backbone: what is read.
            size: (rows, columns) of the image.

        Raises:
            ValueError: an image of this size does not go through, the target layer gives no map,
                or the features are no (B, D) tensor.
        """
        kind, place = type(backbone).__name__, place_of(backbone)
        imgs = torch.zeros(1, 3, *size, dtype=place.dtype, device=place.device)
        with evaluating(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                with self.capture(backbone) as captured:
                    features = self.features(backbone, imgs)
            except Exception as error:
                raise ValueError(
                    f"{kind} does not take an image of {size[0]}x{size[1]} or gives no logits and "
                    f"features of it: {error}; another size can be given as "
                    "input_size=(rows, columns)"
                ) from error
        try:
            captured.require()
        except ValueError as error:
            raise ValueError(
                f"{error}; target_layer is {self.target_layer!r}; {_candidates(backbone)}"
            ) from None
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(
                "the backbone must give (B, D) features in eval mode, got "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features)}"
            )
        return features


def torchreid_forward(backbone: nn.Module, imgs: Tensor) -> tuple[Logits, Tensor]:
    """Returns the logits and the features of a torchreid model in training mode.

    Built with loss="softmax" it would give logits only: it is asked as a "triplet" model.
    """
    loss: Any = backbone.loss
    backbone.loss = "triplet"  # type: ignore[assignment]
    try:
        logits, features = backbone(imgs)
    finally:
        backbone.loss = loss
    if isinstance(features, (tuple, list)):  # HACNN: its branches, each of unit length
        features = torch.cat([F.normalize(branch, dim=1) for branch in features], dim=1)
    return logits, features


def input_size_of(backbone: nn.Module) -> tuple[int, int]:
    """Returns (rows, columns) of the images that a backbone is made for: 256x128 for most.

    Example:
        >>> input_size_of(nn.Conv2d(3, 8, 3))
        (256, 128)
    """
    return _INPUT_SIZE.get(type(backbone).__name__, (256, 128))


def _find_target(
    backbone: nn.Module, target_layer: str | nn.Module | None
) -> tuple[str, Literal["input", "output"]]:
    """Returns the name of the layer to tap, and whether A is what it takes or gives."""
    layers = dict(backbone.named_modules())
    if isinstance(target_layer, nn.Module):
        for name, layer in layers.items():
            if layer is target_layer:
                return name, "output"
        raise ValueError(f"target_layer must be a layer of the backbone; {_candidates(backbone)}")
    if target_layer is not None:
        if target_layer not in layers or not target_layer:
            raise ValueError(f"the backbone has no layer {target_layer!r}; {_candidates(backbone)}")
        return target_layer, "output"
    kind = type(backbone).__name__
    if kind in _LAST_MAP:
        return _LAST_MAP[kind], "output"
    children = dict(backbone.named_children())
    pools = [name for name in _POOL_NAMES if name in children]
    pools += [name for name, layer in children.items() if isinstance(layer, nn.AdaptiveAvgPool2d)]
    if pools:
        return pools[0], "input"
    with_conv = [name for name, layer in children.items() if _has_convolution(layer)]
    if not with_conv:
        raise ValueError(f"no convolution found in {kind}: name its target_layer")
    return with_conv[-1], "output"


def _candidates(backbone: nn.Module) -> str:
    """Returns a sentence that lists the layers that can be tapped."""
    names = [
        name
        for name, layer in backbone.named_modules()
        if name and name.count(".") < 2 and _has_convolution(layer)
    ]
    return "candidates (layers with convolutions): " + ", ".join(names)


def _has_convolution(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in layer.modules())
