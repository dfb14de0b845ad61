"""CASN: a backbone, its tapped feature map and the pair classifier, as one module."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from casn_plugin.attention import same_identity
from casn_plugin.backbones import Forward, Reader, input_size_of
from casn_plugin.basis import encode_head
from casn_plugin.doors import check_count, check_images, check_lengths, check_size
from casn_plugin.encoding import Encoding
from casn_plugin.hooks import place_of, twin, unwrapped
from casn_plugin.losses import (
    IdentificationAttentionLoss,
    SiameseAttentionLoss,
    casn_loss,
    consistency,
    identification_attention_loss,
    pair_loss,
    siamese_attention_loss,
)
from casn_plugin.scores import Logits, at_least_float32


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
        check_count("feature_dim", feature_dim, most=2**24)
        check_count("hidden_dim", hidden_dim, most=2**24)
        check_count("seed", seed, least=0, most=2**63 - 1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(
                nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2)
            )


_OWN = ("backbone", "pair_classifier", "reader", "input_size", "training")


class _Layers(dict[str, nn.Module | None]):
    """The layers of a CASN: what is written to one of the backbone's becomes the backbone's."""

    def __setitem__(self, name: str, layer: nn.Module | None) -> None:
        """Sets a layer where it is."""
        backbone = self.get("backbone")
        if name not in _OWN and backbone is not None and name in backbone._modules:
            backbone._modules[name] = layer
        else:
            super().__setitem__(name, layer)


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
        reader: which layer is tapped, and how the backbone is run.

    Raises:
        TypeError: no module, or no torchreid model and no `forward`.
        ValueError: a target layer that does not exist or gives no map (the message lists those
            that do), or a forward function that gives no logits and features.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.Linear(8, 10))
        >>> def forward(backbone, imgs):
        ...     features = backbone[0](imgs).mean((2, 3))
        ...     return backbone[1](features), features
        >>> model = CASN(backbone, forward=forward)
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
        self.__dict__["_modules"] = _Layers()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        if unwrapped(backbone) is not backbone:
            raise TypeError(
                "backbone must be the network itself, got it inside of "
                f"{type(backbone).__name__}: wrap CASN(network) in it instead"
            )
        if hasattr(backbone, "pair_classifier"):
            raise ValueError("the backbone has a layer named pair_classifier already")
        self.backbone = backbone
        self.reader = Reader(backbone, target_layer, forward)
        self.input_size = check_size("input_size", input_size or input_size_of(backbone))
        features = self.reader.try_out(backbone, self.input_size)
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
            TypeError: images that are no float tensor, or of another dtype than the model without
                autocast.
            ValueError: images of another shape or on another device, an identification loss
                without identities, an odd number of rows with a Siamese loss, or a target layer
                that was not called.
        """
        self._check_place(imgs)
        if not self.training:
            return self.reader.features(self.backbone, imgs)
        if identification is not None:
            if pids is None:
                raise ValueError("the identification attention loss needs pids")
            check_lengths(imgs=imgs, pids=pids)
        logits, features, activations = self.reader.tapped(self.backbone, imgs)
        masked_scores = pair_scores = distances = None
        if identification is not None and pids is not None:
            masked_scores = identification.scores_of(
                self.reader.logits, self.backbone, imgs, pids, logits, activations
            )
        if siamese is not None:
            pair_scores, distances = siamese.pairs(self.pair_classifier, features, activations)
        return CASNOutput(logits, features, activations, masked_scores, pair_scores, distances)

    def _check_place(self, imgs: Tensor) -> None:
        """Raises TypeError or ValueError for images that the model can't take."""
        place = place_of(self, check_images(imgs))
        if imgs.device != place.device:
            raise ValueError(
                f"images and model must be on one device, got {imgs.device} and {place.device}"
            )
        if imgs.dtype != place.dtype and not torch.is_autocast_enabled(imgs.device.type):
            raise TypeError(
                f"images and model must be of one dtype, got {imgs.dtype} and {place.dtype}"
            )

    def encode(self, imgs: Float[Tensor, "batch 3 rows columns"]) -> Encoding:
        """Returns what ranking needs of each image, whatever mode the model is in.

        The backbone runs in eval mode and keeps no graph below the tapped map; modes and
        gradient settings are left as found.

        Raises:
            TypeError: images that are no float tensor, or of another dtype than the model without
                autocast; a model cast to half precision as a whole.
            ValueError: no image, images of another shape or on another device than the model;
                features that do not depend on the tapped map.
        """
        self._check_place(imgs)
        backbone = self.backbone
        if any(layer.training for layer in backbone.modules()):
            backbone = twin(backbone).eval()  # so that other threads may use the model
        with torch.inference_mode(False), torch.no_grad():
            if imgs.is_inference():
                imgs = imgs.clone()
            with self.reader.capture(backbone, head_only=True) as captured:
                features = self.reader.features(backbone, imgs)
            activations = captured.require()
            if activations.itemsize < 4:
                raise TypeError(
                    f"ranking needs float32 or wider, but the model is in {activations.dtype}: use "
                    "model.float(), under torch.autocast if it is to be fast"
                )
            with torch.autocast(imgs.device.type, enabled=False):
                return encode_head(at_least_float32(features), activations, captured.pooled)

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yields every layer by the name that it has in `state_dict`, the backbone as the root."""
        memo = set() if memo is None else memo
        if self in memo and remove_duplicate:
            return
        memo.add(self)
        yield prefix, self
        yield from self.backbone.named_modules(memo, prefix, remove_duplicate)
        own = f"{prefix}.pair_classifier" if prefix else "pair_classifier"
        yield from self.pair_classifier.named_modules(memo, own, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the backbone's layers and the pair classifier, as torchreid looks for them."""
        if torch.jit._trace._trace_module_map is not None:  # tracing asks for the true structure
            yield from super().named_children()
            return
        yield from self.backbone.named_children()
        yield "pair_classifier", self.pair_classifier

    def children(self) -> Iterator[nn.Module]:
        """Yields the backbone and the pair classifier."""
        yield from (module for module in self._modules.values() if module is not None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Sets a layer where :meth:`named_children` finds it: SyncBatchNorm is converted so."""
        if self._is_the_backbones(name):
            self.backbone.add_module(name, module)
        else:
            super().add_module(name, module)

    def _is_the_backbones(self, name: str) -> bool:
        """Returns whether an attribute is the backbone's, and no other of the wrapper's own."""
        backbone = self.__dict__.get("_modules", {}).get("backbone")
        own = name in _OWN or name in self.__dict__ or hasattr(type(self), name)
        return backbone is not None and not own and hasattr(backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, a layer, parameter or buffer where it was found."""
        if self._is_the_backbones(name):
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute, a layer, parameter or buffer where it was found."""
        if self._is_the_backbones(name):
            delattr(self.backbone, name)
        else:
            super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the backbone that the wrapper does not have itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None or not hasattr(backbone, name):
                raise
            return getattr(backbone, name)


def loss_terms(
    output: CASNOutput,
    pids: Int[Tensor, " batch"],
    loss_ide: Float[Tensor, ""],
    *,
    lambda_ia: float = 0.5,
    lambda_sa: float = 0.05,
    siamese: SiameseAttentionLoss | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Returns L = L_ide + λ1 L_ia + λ2 L_sa (paper, Eq. 6), and all its terms without a graph.

    The terms are "loss" and "loss_ide", and as far as they were computed "loss_ia"; "loss_sa",
    "loss_bce", "attention_distance" and "pair_acc", the accuracy of the pair classifier in
    percent.

    Args:
        output: of the model in training mode.
        pids: identities of its images.
        loss_ide: L_ide (Eq. 1) of its logits.
        lambda_ia: λ1.
        lambda_sa: λ2.
        siamese: the settings of L_sa that the output was computed with, by default the loss's own.

    Example:
        >>> output = CASNOutput(torch.zeros(2, 5), torch.rand(2, 4), torch.rand(2, 3, 6, 2))
        >>> loss, terms = loss_terms(output, torch.tensor([0, 1]), torch.tensor(1.5))
        >>> loss, list(terms)
        (tensor(1.5000), ['loss', 'loss_ide'])
    """
    loss_ia = loss_sa = loss_ide.new_zeros(())
    terms: dict[str, Tensor] = {}
    if output.masked_scores is not None:
        loss_ia = terms["loss_ia"] = identification_attention_loss(output.masked_scores)
    if output.pair_scores is not None and output.distances is not None:
        consistency_weight = (siamese or SiameseAttentionLoss()).consistency_weight
        same = same_identity(pids)
        loss_sa = terms["loss_sa"] = siamese_attention_loss(
            output.pair_scores, output.distances, same, consistency_weight=consistency_weight
        )
        rows = same.repeat_interleave(len(output.pair_scores) // len(same))
        with torch.no_grad():
            terms["loss_bce"] = pair_loss(output.pair_scores, rows)
            terms["attention_distance"] = consistency(output.distances, same)
            hits = output.pair_scores.argmax(1).bool() == rows
            terms["pair_acc"] = 100 * hits.float().mean()
    loss = casn_loss(loss_ide, loss_ia, loss_sa, lambda_ia=lambda_ia, lambda_sa=lambda_sa)
    every = {"loss": loss, "loss_ide": loss_ide, **terms}
    return loss, {name: term.detach() for name, term in every.items()}


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
