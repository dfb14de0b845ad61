"""CASN: a backbone, its tapped feature map and the pair classifier, as one module."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from casn_plugin.attention import capture, evaluating, unwrapped
from casn_plugin.encoding import Encoding, encode_head, part_embedding
from casn_plugin.losses import (
    IdentificationAttentionLoss,
    Logits,
    SiameseAttentionLoss,
)

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


class CASNOutput(NamedTuple):
    """What a CASN gives in training mode; all fields join along their first dimension.

    Attributes:
        logits: (B, classes) scores y of all identities, or a sequence of such (PCB, HACNN).
        features: (B, D) f.
        activations: (B, C, H, W) A, the tapped map that both were computed from.
        masked_scores: (B,) y_c of the masked images, where an identification loss was given.
        pair_scores: (P, 2) z of the pairs, or (2P, 2) where both orders of each are shown, the
            rows of a pair in sequence; where a Siamese loss was given.
        distances: (P,) attention distances of the pairs, where a Siamese loss was given.
    """

    logits: Logits
    features: Tensor
    activations: Tensor
    masked_scores: Tensor | None = None
    pair_scores: Tensor | None = None
    distances: Tensor | None = None


class PairClassifier(nn.Sequential):
    """The BCE classifier of Section 3.2.1: two fully connected layers, f⁻ to z ∈ R².

    The ReLU between them is needed: no affine function of a signed difference in random order
    can tell same from different.

    Args:
        feature_dim: D, the dimension of the features.
        hidden_dim: width of the first layer.
        seed: of the initial weights; the caller's random state is left as found.

    Example:
        >>> PairClassifier(8)(torch.rand(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, feature_dim: int, hidden_dim: int = 512, *, seed: int = 0) -> None:
        if feature_dim < 1 or hidden_dim < 1:
            raise ValueError(
                f"feature_dim and hidden_dim must be >= 1, got {feature_dim} and {hidden_dim}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(
                nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2)
            )


class CASN(nn.Module):
    """A backbone with its last feature map tapped and a pair classifier beside it (Section 3).

    In eval mode it gives exactly what the backbone gives, so it drops into whatever torchreid
    does with a model. In training mode it gives a :class:`CASNOutput`.

    torchreid sees the backbone's layers as the model's own: ``open_layers`` and ``staged_lr``
    find `classifier`, checkpoints of the plain backbone load into the wrapped model, and
    checkpoints of the wrapped model into the plain backbone. So `state_dict` has the backbone's
    own names and `pair_classifier.*` beside them, and `named_children` lists the same.

    Args:
        backbone: a model of torchreid's factory, built with loss="softmax" or "triplet"; or,
            with `forward`, any module. It is left as found: no hook, no changed layer.
        target_layer: the layer whose output is the map A, by name or as a module. By default the
            map that the backbone's global pooling takes.
        forward: for a backbone that is not of torchreid's factory: a function of the backbone
            and a batch of images that returns (logits, features). It must be a function that can
            be pickled (not a lambda) where the model is to be pickled.
        pair_classifier: maps (P, D) differences to (P, 2) scores, column 1 = same identity. By
            default a new :class:`PairClassifier`.
        hidden_dim: width of the default pair classifier.
        input_size: (rows, columns) of the image with which the layers are tried out once; by
            default 256x128, and 160x64 for HACNN.
        seed: of the default pair classifier's weights.

    Attributes:
        input_size: (rows, columns) that pictures are brought to where a size is not given.

    Raises:
        TypeError: no module, or no torchreid model and no `forward`.
        ValueError: a target layer that does not exist or gives no map (the message lists those
            that do), or a forward function that gives no logits and features.

    Example:
        >>> class Backbone(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.features, self.fc = nn.Conv2d(3, 8, 3, 8), nn.Linear(8, 10)
        >>> def forward(backbone, imgs):
        ...     features = backbone.features(imgs).mean((2, 3))
        ...     return backbone.fc(features), features
        >>> model = CASN(Backbone(), forward=forward)
        >>> model(torch.rand(2, 3, 64, 32)).activations.shape
        torch.Size([2, 8, 8, 4])
        >>> model.eval()(torch.rand(2, 3, 64, 32)).shape
        torch.Size([2, 8])
    """

    backbone: nn.Module
    pair_classifier: nn.Module

    def __init__(
        self,
        backbone: nn.Module,
        *,
        target_layer: str | nn.Module | None = None,
        forward: Forward | None = None,
        pair_classifier: nn.Module | None = None,
        hidden_dim: int = 512,
        input_size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        if forward is None and getattr(backbone, "loss", None) not in ("softmax", "triplet"):
            raise TypeError(
                f"{type(backbone).__name__} is no model of torchreid's factory: say how it gives "
                "logits and features, with forward=function(backbone, imgs) -> (logits, features)"
            )
        if hasattr(backbone, "pair_classifier"):
            raise ValueError("the backbone has a layer named pair_classifier already")
        self.backbone = backbone
        self._forward: Forward = forward if forward is not None else _torchreid_forward
        self._target, self._at = self._find_target(target_layer)
        self.input_size = input_size or _INPUT_SIZE.get(_kind(backbone), (256, 128))
        features = self._try_out(self.input_size)
        if pair_classifier is None:
            pair_classifier = PairClassifier(features.shape[1], hidden_dim, seed=seed)
            pair_classifier.to(features.device, features.dtype)
        self.pair_classifier = pair_classifier.train(backbone.training)
        self.training = backbone.training  # and its layers' modes are left as found
        self.register_state_dict_post_hook(_flatten_keys)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_nest_keys)  # type: ignore[no-untyped-call]

    def forward(
        self,
        imgs: Float[Tensor, "batch 3 rows columns"],
        pids: Int[Tensor, " batch"] | None = None,
        identification: IdentificationAttentionLoss | None = None,
        siamese: SiameseAttentionLoss | None = None,
    ) -> CASNOutput | Tensor:
        """Returns a :class:`CASNOutput` in training mode, the backbone's features in eval mode.

        Where losses are given, the masked pass and the comparison of pairs run in here, so that
        nn.DataParallel and DistributedDataParallel see one forward call. Their terms are then
        reduced by the pure functions of :mod:`casn_plugin.losses`.

        Args:
            imgs: a batch of images, normalised.
            pids: their identities, which the identification loss needs.
            identification: the settings of L_ia; None skips the masked pass.
            siamese: the settings of L_sa; None skips the pairs. Rows 2i and 2i+1 are pair i.

        Raises:
            ValueError: an identification loss without identities, an odd number of rows with a
                Siamese loss, or a target layer that was not called.
        """
        if not self.training:
            features: Tensor = (
                self.backbone(imgs)
                if self._forward is _torchreid_forward
                else self._forward(self.backbone, imgs)[1]
            )
            return features
        if identification is not None and pids is None:
            raise ValueError("the identification attention loss needs pids")
        logits, features, activations = self._tapped(imgs)
        masked_scores = pair_scores = distances = None
        if identification is not None and pids is not None:
            masked_scores = identification.scores(
                lambda masked: self._forward(self.backbone, masked)[0],
                *(imgs, pids, logits, activations),
                network=self.backbone,
            )
        if siamese is not None:
            pair_scores, distances = siamese.pairs(self.pair_classifier, features, activations)
        return CASNOutput(logits, features, activations, masked_scores, pair_scores, distances)

    def encode(self, imgs: Float[Tensor, "batch 3 rows columns"]) -> Encoding:
        """Returns what ranking needs of each image, whatever mode the model is in.

        The backbone runs in eval mode and keeps no graph below the tapped map; modes and
        gradient settings are left as found.

        Raises:
            TypeError: a model cast to half precision as a whole; autocast is fine.
            ValueError: features that do not depend on the tapped map.
        """
        with evaluating(self), torch.inference_mode(False), torch.no_grad():
            if imgs.is_inference():
                imgs = imgs.clone()
            with capture(self._target_module(), at=self._at, head_only=True) as captured:
                features = self.forward(imgs)
            activations = captured.require()
            assert isinstance(features, Tensor)  # for the type checker: eval mode
            if activations.itemsize < 4:
                raise TypeError(
                    f"ranking needs float32 or wider, but the model is in {activations.dtype}: use "
                    "model.float(), under torch.autocast if it is to be fast"
                )
            with torch.autocast(imgs.device.type, enabled=False):
                return encode_head(_full_precision(features), activations, captured.pooled)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the backbone's layers and the pair classifier, as torchreid looks for them."""
        yield from self.backbone.named_children()
        yield "pair_classifier", self.pair_classifier

    def children(self) -> Iterator[nn.Module]:
        """Yields the backbone and the pair classifier."""
        yield from (module for module in self._modules.values() if module is not None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Sets a layer where :meth:`named_children` found it: SyncBatchNorm is converted so."""
        if name not in self._modules and name in self.backbone._modules:
            self.backbone.add_module(name, module)
        else:
            super().add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the backbone that the wrapper does not have itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None or not hasattr(backbone, name):
                raise
            return getattr(backbone, name)

    def _tapped(self, imgs: Tensor) -> tuple[Logits, Tensor, Tensor]:
        """Returns logits, features and the map that both were computed from."""
        pool = getattr(self.backbone, "parts_avgpool", None)
        if self._forward is not _torchreid_forward:
            pool = None
        with (
            capture(self._target_module(), at=self._at) as captured,
            nullcontext() if pool is None else capture(pool, at="input") as pooled,
        ):
            logits, features = self._forward(self.backbone, imgs)
        if pooled is not None:
            # PCB's features of a training pass have dropout: f is its eval embedding
            features = part_embedding(pooled.require(), self.backbone.parts)  # type: ignore[arg-type]
        return logits, features, captured.require()

    def _target_module(self) -> nn.Module:
        """Returns the tapped layer; by name, since the replicas of nn.DataParallel have copies."""
        return self.backbone.get_submodule(self._target)

    def _find_target(
        self, target_layer: str | nn.Module | None
    ) -> tuple[str, Literal["input", "output"]]:
        """Returns the name of the layer to tap, and whether A is what it takes or gives."""
        layers = dict(self.backbone.named_modules())
        if isinstance(target_layer, nn.Module):
            for name, layer in layers.items():
                if layer is target_layer:
                    return name, "output"
            raise ValueError(f"target_layer must be a layer of the backbone; {self._candidates()}")
        if target_layer is not None:
            if target_layer not in layers or not target_layer:
                raise ValueError(
                    f"the backbone has no layer {target_layer!r}; {self._candidates()}"
                )
            return target_layer, "output"
        if _kind(self.backbone) in _LAST_MAP:
            return _LAST_MAP[_kind(self.backbone)], "output"
        children = dict(self.backbone.named_children())
        pools = [name for name in _POOL_NAMES if name in children]
        pools += [
            name for name, layer in children.items() if isinstance(layer, nn.AdaptiveAvgPool2d)
        ]
        if pools:
            return pools[0], "input"
        with_conv = [
            name
            for name, layer in children.items()
            if any(isinstance(part, nn.Conv2d) for part in layer.modules())
        ]
        if not with_conv:
            raise ValueError(
                f"no convolution found in {type(self.backbone).__name__}: name its target_layer"
            )
        return with_conv[-1], "output"

    def _candidates(self) -> str:
        """Returns a sentence that lists the layers that can be tapped."""
        names = [
            name
            for name, layer in self.backbone.named_modules()
            if name
            and name.count(".") < 2
            and any(isinstance(part, nn.Conv2d) for part in layer.modules())
        ]
        return "candidates (layers with convolutions): " + ", ".join(names)

    def _try_out(self, size: tuple[int, int]) -> Tensor:
        """Returns the features of one blank image; raises where the tapped layer gives no map."""
        first = next(self.backbone.parameters(), torch.zeros(()))
        imgs = torch.zeros(1, 3, *size, dtype=first.dtype, device=first.device)
        with evaluating(self), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                with capture(self._target_module(), at=self._at) as captured:
                    features = self.forward(imgs)
            except Exception as error:
                raise ValueError(
                    f"{type(self.backbone).__name__} does not take an image of {size[0]}x{size[1]} "
                    f"or gives no logits and features of it: {error}; another size can be given "
                    "as input_size=(rows, columns)"
                ) from error
        try:
            captured.require()
        except ValueError as error:
            raise ValueError(
                f"{error}; target_layer is {self._target!r}; {self._candidates()}"
            ) from None
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(
                "the backbone must give (B, D) features in eval mode, got "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features)}"
            )
        return features


def as_casn(model: nn.Module) -> CASN:
    """Returns the CASN that a model is, or that nn.DataParallel has in it.

    Raises:
        TypeError: another model.
    """
    casn = unwrapped(model)
    if not isinstance(casn, CASN):
        raise TypeError(
            f"model must be a CASN, or a CASN in nn.DataParallel, got {type(casn).__name__}: "
            "wrap the backbone first, model = CASN(backbone)"
        )
    return casn


def encode_batches(
    model: CASN, batches: Iterable[tuple[Tensor, Any, Any]]
) -> tuple[Encoding, Int64[np.ndarray, " images"], Int64[np.ndarray, " images"]]:
    """Returns the encodings of batches of (imgs, pids, camids) on the CPU, their pids and camids.

    Images are encoded where the model is, in its dtype.

    Raises:
        ValueError: no batch at all; otherwise as :meth:`CASN.encode`.
    """
    first = next(iter(model.parameters()))
    encodings: list[Encoding] = []
    pids: list[int] = []
    camids: list[int] = []
    for imgs, batch_pids, batch_camids in batches:
        encodings.append(model.encode(imgs.to(first.device, first.dtype)).to("cpu"))
        pids.extend(int(pid) for pid in batch_pids)
        camids.extend(int(camid) for camid in batch_camids)
    return Encoding.cat(encodings), np.asarray(pids), np.asarray(camids)


def _torchreid_forward(backbone: nn.Module, imgs: Tensor) -> tuple[Logits, Tensor]:
    """Returns the logits and the features of a torchreid model in training mode.

    Built with loss="softmax" it would give logits only: it is asked as a "triplet" model.
    """
    loss = backbone.loss
    backbone.loss = "triplet"  # type: ignore[assignment]
    try:
        logits, features = backbone(imgs)
    finally:
        backbone.loss = loss
    if isinstance(features, (tuple, list)):  # HACNN: its branches, each of unit length
        features = torch.cat([F.normalize(branch, dim=1) for branch in features], dim=1)
    return logits, features


def _kind(backbone: nn.Module) -> str:
    return type(backbone).__name__


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor


def _flatten_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    """Names the backbone's entries as the plain backbone does, in their order."""
    entries = list(state_dict.items())
    state_dict.clear()
    for name, value in entries:
        nested = name.startswith(f"{prefix}backbone.")
        state_dict[prefix + name.removeprefix(f"{prefix}backbone.") if nested else name] = value


def _nest_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undoes :func:`_flatten_keys`; a plain backbone's checkpoint is named like that already."""
    entries = list(state_dict.items())
    state_dict.clear()
    for name, value in entries:
        own = name.startswith(prefix) and not name.startswith(f"{prefix}pair_classifier.")
        state_dict[f"{prefix}backbone.{name.removeprefix(prefix)}" if own else name] = value
