"""How a network gives logits, features and its last feature map.

torchreid's models are known by names, other networks are read by their classifier or by a
function of the user; the map is found, and proved, by trying the network out.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from casn_plugin.doors import check_size
from casn_plugin.encoding import part_embedding
from casn_plugin.heads import (
    Forward,
    find_classifier,
    is_torchreid,
    otherwise_than_torchreid,
    torchreid_forward,
)
from casn_plugin.hooks import Captured, capture, evaluating, place_of
from casn_plugin.layouts import Reshape
from casn_plugin.preprocessing import Preprocessing
from casn_plugin.scores import Logits, at_least_float32, parts_of
from casn_plugin.taps import Maps
from casn_plugin.tryout import Tap, TryOut

# torchreid's four models that pool their last map with a function, not a module
_LAST_MAP = {
    "HACNN": "inception3",
    "MuDeep": "block5",
    "NASNetAMobile": "relu",
    "ShuffleNet": "stage4",
}
_POOL_NAMES = ("global_avgpool", "parts_avgpool")
# three add to their last map's features what goes round it
_FUSED = ("hacnn.HACNN", "mlfn.MLFN", "resnetmid.ResNetMid")
_INPUT_SIZE = {"HACNN": (160, 64)}
_USUAL_SIZE = (256, 128)


class Tapped(NamedTuple):
    """What a backbone gives in a training pass.

    Attributes:
        logits: (B, classes) scores y of all identities, or a sequence of such (PCB, HACNN); None
            of a network without classifier.
        features: (B, D) f.
        activations: (B, C, H, W) A, the tapped map that both were computed from.
    """

    logits: Logits | None
    features: Tensor
    activations: Tensor


class Joined(NamedTuple):
    """What a backbone gives in an evaluation pass, joined by the graph of its head.

    Attributes:
        features: (B, D) f, float32 or wider.
        activations: (B, C, H, W) A, which f was computed from; nothing below has a graph.
        pooled: what a tapped pooling layer made of A.
    """

    features: Tensor
    activations: Tensor
    pooled: Tensor | None


class Reader:
    """How one backbone is read: what runs it, and at which layer its last map is tapped.

    It is tried out once, in eval mode and left as found, and what is tapped is proved. The
    backbone itself is not kept: the replicas of nn.DataParallel are read by the same reader.

    Args:
        backbone: any module.
        target_layer: the layer whose output is the map A, by name or as a module; by default the
            last map that the features come from is looked for.
        forward: how a backbone gives logits and features. By default a model of torchreid's
            factory, or one that gives in both modes what these give, is asked as such, and of any
            other network the features are what its last linear layer, the classifier, takes.
        reshape: how what the layer gives is a map (B, C, H, W), where that is not found.
        input_size: (rows, columns) of the images it is tried out with; by default what the
            network says that it is made for, else 256x128.

    Attributes:
        tap: the layer that is tapped, and how its tensor is the map.
        target_layer: name of that layer.
        at: whether the map is that layer's "input" (of a pooling layer) or its "output".
        input_size: (rows, columns) of the images it was tried out with.
        feature_dim: D.

    Raises:
        TypeError: a network that does not end in a classifier, and no `forward`.
        ValueError: weights on the meta device or made in inference mode; an image of this size
            does not go through; a target layer that does not exist,
            or gives no map that features and logits come from; no such map at all.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                     nn.Linear(8, 5))
        >>> reader = Reader(net)
        >>> reader.target_layer, reader.at, reader.feature_dim
        ('1', 'input', 8)
        >>> reader.tapped(net, torch.rand(2, 3, 64, 32)).activations.shape
        torch.Size([2, 8, 8, 4])
    """

    def __init__(
        self,
        backbone: nn.Module,
        target_layer: str | nn.Module | None = None,
        forward: Forward | None = None,
        reshape: Reshape | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        _check_tensors(backbone)
        self._torchreid = forward is None and is_torchreid(backbone)
        sizes = _sizes_of(backbone)
        if input_size is not None:
            sizes = [check_size("input_size", input_size)]
        device = place_of(backbone).device
        devices = [device] if device.type == "cuda" else []
        with (
            evaluating(backbone),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
        ):
            self._forward, tried = self._try(backbone, forward, sizes)
            maps = Maps(tried, reshape)
            self.tap = _find_tap(backbone, target_layer, maps, known=self._torchreid)
            maps.prove(self.tap)
        self.input_size = tried.size
        self.feature_dim: int = tried.features.shape[1]
        self.target_layer, self.at = self.tap.layer, self.tap.at

    def features(self, backbone: nn.Module, imgs: Tensor) -> Tensor:
        """Returns the features of images; a model of torchreid's factory is in eval mode."""
        features: Tensor = backbone(imgs) if self._torchreid else self._forward(backbone, imgs)[1]
        return features

    def logits(self, backbone: nn.Module, imgs: Tensor) -> Logits:
        """Returns the logits of images; a model of torchreid's factory is in training mode.

        Raises:
            ValueError: a network without classifier.
        """
        logits = self._forward(backbone, imgs)[0]
        if logits is None:
            raise ValueError(f"{type(backbone).__name__} has no classifier, so it gives no logits")
        return logits

    def classes(self, backbone: nn.Module) -> int:
        """Returns how many classes the logits have; of several classifiers, each has them.

        The backbone, which may have changed since, gives them of blank images, and is left as
        found.

        Raises:
            ValueError: a network without classifier, or one whose logits are not (B, classes).
        """
        imgs = torch.zeros(2, 3, *self.input_size).to(*place_of(backbone))
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(backbone):
            backbone.training = self._torchreid  # which says alone whether there are logits
            logits = self.logits(backbone, imgs)
        return parts_of(logits, torch.zeros(2, dtype=torch.long))[0].shape[1]

    def capture(
        self,
        backbone: nn.Module,
        *,
        head_only: bool = False,
        size: tuple[int, int] | None = None,
    ) -> AbstractContextManager[Captured]:
        """Returns the context that records the map; see :func:`casn_plugin.hooks.capture`.

        Args:
            backbone: what is read.
            head_only: whether gradients are recorded from the map on alone.
            size: (rows, columns) of the images, by default those of the try-out.
        """
        return capture(
            backbone.get_submodule(self.tap.layer),
            at=self.tap.at,
            head_only=head_only,
            layout=self.tap.layout,
            size=size or self.input_size,
        )

    def tapped(self, backbone: nn.Module, imgs: Tensor) -> Tapped:
        """Returns logits, features and the map that both were computed from.

        Raises:
            ValueError: the target layer was not called, gave no map, or ran without gradients.
        """
        pool = getattr(backbone, "parts_avgpool", None) if self._torchreid else None
        with (
            self.capture(backbone, size=(imgs.shape[2], imgs.shape[3])) as captured,
            nullcontext() if pool is None else capture(pool, at="input") as pooled,
        ):
            logits, features = self._forward(backbone, imgs)
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

    def joined(self, backbone: nn.Module, imgs: Tensor) -> Joined:
        """Returns features and map, joined by the head's graph, also inside of ``no_grad()``.

        Args:
            backbone: in eval mode.
            imgs: (B, 3, rows, columns).

        Raises:
            TypeError: a backbone in half precision.
            ValueError: the target layer was not called, or gave no map.
        """
        size = (imgs.shape[2], imgs.shape[3])
        with torch.no_grad(), self.capture(backbone, head_only=True, size=size) as captured:
            features = self.features(backbone, imgs)
        activations = captured.require()
        if activations.itemsize < 4:
            raise TypeError(
                f"ranking needs float32 or wider, but the model is in {activations.dtype}: use "
                "model.float(), under torch.autocast if it is to be fast"
            )
        with torch.enable_grad():
            return Joined(at_least_float32(features), activations, captured.pooled)

    def _try(
        self, backbone: nn.Module, forward: Forward | None, sizes: list[tuple[int, int]]
    ) -> tuple[Forward, TryOut]:
        """Returns what runs the backbone, tried out with the first size that goes through."""
        kind, place = type(backbone).__name__, place_of(backbone)
        says_so, otherwise = self._torchreid, None
        problem: Exception | None = None
        for size in sizes:
            noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
            imgs = noise.to(*place)
            try:
                with torch.no_grad():
                    if says_so:
                        otherwise = otherwise_than_torchreid(backbone, imgs)
                        self._torchreid = otherwise is None
                    found = torchreid_forward if self._torchreid else forward
                    found = found or find_classifier(backbone, imgs)
                if found is None:
                    problem = None
                    break
                run = _evaluated if self._torchreid else found
                return found, TryOut(backbone, partial(run, backbone), imgs)
            except Exception as error:
                problem = problem or error  # the likeliest size's
        unknown = forward is None and not self._torchreid
        if problem is None or (unknown and isinstance(problem, NotImplementedError)):
            reason = otherwise or f"{kind} is no model of torchreid's factory"
            raise TypeError(
                f"{reason}, and it does not end in a classifier, one linear layer: say how it "
                "gives logits and features, with "
                "forward=function(backbone, imgs) -> (logits, features)"
            ) from problem
        listed = " or ".join(f"{rows}x{columns}" for rows, columns in sizes)
        raise ValueError(
            f"{kind} does not take an image of {listed} or gives no logits and features of it: "
            f"{problem}; another size can be given as input_size=(rows, columns), and how it gives "
            "them as forward=function(backbone, imgs) -> (logits, features)"
        ) from problem


def _check_tensors(backbone: nn.Module) -> None:
    """Raises ValueError for a network that can't be tried out, as its tensors are no numbers yet.

    Or as no gradient can be computed with them.
    """
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"the backbone must have its weights, but {name!r} is on the meta device: "
                "backbone.to_empty(device=...) and load_state_dict(...) before it is wrapped"
            )
    for name, parameter in backbone.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                "the backbone must be made outside of torch.inference_mode(), but "
                f"{name!r} is an inference tensor, through which no gradient is computed"
            )


def _evaluated(backbone: nn.Module, imgs: Tensor) -> tuple[None, Tensor]:
    """Returns the features of a torchreid model in eval mode, in which it gives no logits."""
    return None, backbone(imgs)


def _sizes_of(backbone: nn.Module) -> list[tuple[int, int]]:
    """Returns (rows, columns) of the images that a backbone may be made for, the likeliest first.

    ViT and Swin say for which size they were built; timm's networks are sure of one size.
    """
    name = type(backbone).__name__
    if name in _INPUT_SIZE:
        return [_INPUT_SIZE[name]]
    told = [getattr(backbone, "image_size", None)]
    told += [getattr(layer, "img_size", None) for _, layer in backbone.named_children()]
    sizes: list[Any] = [size for size in told if isinstance(size, (int, tuple))]
    config = getattr(backbone, "pretrained_cfg", None)
    usual = config.get("input_size") if isinstance(config, dict) else None
    if usual is not None:
        usual = usual[-2:]
    rest: list[Any] = [_USUAL_SIZE]
    if not is_torchreid(backbone):
        rest += [usual, 224, 256]
    if isinstance(config, dict) and config.get("fixed_input_size"):
        rest.insert(0, usual)
    for size in rest:
        sizes.append(size)
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size]
    return list(dict.fromkeys(pairs))


def preprocessing_of(backbone: nn.Module, size: tuple[int, int]) -> Preprocessing:
    """Returns how a backbone's pictures are prepared: timm's networks say with which colours.

    Args:
        backbone: any network; of one that does not say, the colours are ImageNet's.
        size: (rows, columns) that they are brought to.
    """
    config = getattr(backbone, "pretrained_cfg", None)
    told = config if isinstance(config, dict) else {}
    mean, std = (told.get(name) for name in ("mean", "std"))
    if mean is None or std is None or len(mean) != 3:
        return Preprocessing(size)
    return Preprocessing(size, mean, std)


def _find_tap(
    backbone: nn.Module, target_layer: str | nn.Module | None, maps: Maps, *, known: bool
) -> Tap:
    """Returns what to tap: what the user says, what is known of torchreid's, or what is found."""
    layers = dict(backbone.named_modules())
    if isinstance(target_layer, nn.Module):
        for name, layer in layers.items():
            if layer is target_layer:
                return maps.tap_of(name)
        raise ValueError(f"target_layer must be a layer of the backbone; {maps.candidates()}")
    if target_layer is not None:
        if target_layer not in layers or not target_layer:
            raise ValueError(f"the backbone has no layer {target_layer!r}; {maps.candidates()}")
        return maps.tap_of(target_layer)
    kind, children = type(backbone), dict(backbone.named_children())
    taps = [Tap(name, "input") for name in _POOL_NAMES if name in children]
    if kind.__name__ in _LAST_MAP:
        taps = [Tap(_LAST_MAP[kind.__name__])]
    fused = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" in _FUSED
    for tap in taps:
        if known and (fused or maps.is_whole(tap)):
            return tap
    return maps.last()
