"""CASN: a backbone, its tapped feature map and the pair classifier, as one module."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from casn_plugin.backbones import Reader, preprocessing_of
from casn_plugin.basis import encode_head
from casn_plugin.doors import check_flag, check_images, check_kind, check_lengths, check_tensor
from casn_plugin.encoding import Encoding, with_mirrored
from casn_plugin.evidence import PairClassifier, check_pair_classifier
from casn_plugin.heads import Forward
from casn_plugin.hooks import place_of, unwrapped
from casn_plugin.identities import same_identity
from casn_plugin.kernels import uncompiled
from casn_plugin.layouts import Reshape
from casn_plugin.losses import IdentificationAttentionLoss
from casn_plugin.preprocessing import Preprocessing
from casn_plugin.scores import Logits
from casn_plugin.siamese import SiameseAttentionLoss
from casn_plugin.twins import evaluated


class CASNOutput(NamedTuple):
    """What a CASN gives in training mode; all fields join along their first dimension.

    Attributes:
        logits: (B, classes) scores y of all identities, or a sequence of such (PCB, HACNN); None
            of a network without classifier.
        features: (B, D) f.
        activations: (B, C, H, W) A, the tapped map that both were computed from.
        masked_scores: (B,) y_c of the masked images, where an identification loss was given.
        pair_scores: (P, 2) z of the pairs, or (2P, 2) where both orders of each are shown, the
            rows of a pair in sequence; where a Siamese loss was given.
        distances: (P,) attention distances of the pairs, where a Siamese loss was given.
        same: (P,) whether each pair shows one identity, where a Siamese loss and pids were given.
    """

    logits: Logits | None
    features: Tensor
    activations: Tensor
    masked_scores: Tensor | None = None
    pair_scores: Tensor | None = None
    distances: Tensor | None = None
    same: Tensor | None = None


_OWN = ("backbone", "pair_classifier", "reader", "training")


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
        backbone: any network: a model of torchreid's factory, built with loss="softmax" or
            "triplet"; one of timm, torchvision or your own that ends in a classifier, whose
            features are then what the classifier takes; or, with `forward`, any module. It is left
            as found: no hook, no changed layer.
        target_layer: the layer whose output is the map A, by name or as a module. By default the
            last map that all features come from, which is found and proved by trying it out.
        forward: for a backbone that ends otherwise: a function of the backbone and a batch of
            images that returns (logits, features), logits None where there are none. It must be a
            function that can be pickled (not a lambda) where the model is to be pickled.
        reshape: for a layer of tokens that are not read as a map by themselves: a function of what
            the layer gives that returns (B, C, H, W), as pytorch-grad-cam's reshape_transform.
        pair_classifier: maps (P, D) differences to (P, 2) scores, column 1 = same identity. By
            default a new :class:`PairClassifier`. A :class:`Similarity` for a network that never
            saw CASN: nothing is trained, and identity logits are not needed.
        hidden_dim: width of the default pair classifier.
        input_size: (rows, columns) of its images, with one of which the layers are tried out; by
            default what the backbone says that it is made for, else 256x128.
        seed: of the default pair classifier's weights.

    Attributes:
        preprocessing: how its pictures are prepared, wherever one is explained, searched or
            exported: `input_size`, and the colours that a network of timm says, else ImageNet's.
            Set it where training prepares them otherwise; an engine sets what its data manager
            does.
        flip: average every image with its mirror image in :meth:`encode`, and so wherever images
            are ranked, searched and explained (test-time flip). By default False; set it any time.
        reader: which layer is tapped, and how the backbone is run.

    Raises:
        TypeError: no module, or one that does not end in a classifier and no `forward`.
        ValueError: a target layer that does not exist or gives no map that features and logits
            come from, or no such layer (the message lists the layers that come next to it); a
            forward function that gives no logits and features; a pair classifier that does not
            give (P, 2) scores of (P, D) differences, or that is elsewhere or in other numbers than
            the backbone.

    Example:
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        ... )
        >>> model = CASN(backbone)
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
        reshape: Reshape | None = None,
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
        self.reader = Reader(backbone, target_layer, forward, reshape, input_size)
        self.preprocessing = preprocessing_of(backbone, self.reader.input_size)
        dim, place = self.reader.feature_dim, place_of(backbone)
        if pair_classifier is None:
            with torch.inference_mode(False):
                pair_classifier = PairClassifier(dim, hidden_dim, seed=seed).to(*place)
        own = place_of(check_pair_classifier(pair_classifier, dim), torch.empty(0).to(*place))
        if own != place:
            raise ValueError(
                "backbone and pair classifier must be on one device and of one dtype, got "
                f"{place.device}, {place.dtype} and {own.device}, {own.dtype}"
            )
        self.pair_classifier = pair_classifier.train(backbone.training)
        self.training = backbone.training  # and its layers' modes are left as found
        self.register_state_dict_post_hook(_flatten_keys)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_nest_keys)  # type: ignore[no-untyped-call]

    @property
    def preprocessing(self) -> Preprocessing:
        """How its pictures are prepared."""
        prepared: Preprocessing = self.__dict__["_preprocessing"]
        return prepared

    @preprocessing.setter
    def preprocessing(self, prepared: Preprocessing) -> None:
        """Raises TypeError for anything else than a :class:`Preprocessing`."""
        self.__dict__["_preprocessing"] = check_kind("preprocessing", prepared, Preprocessing)

    @property
    def flip(self) -> bool:
        """Whether every image is averaged with its mirror image."""
        flip: bool = self.__dict__.get("flip", False)
        return flip

    @flip.setter
    def flip(self, flip: bool) -> None:
        """Raises TypeError for anything else than True or False."""
        self.__dict__["flip"] = check_flag("flip", flip)

    def forward(
        self,
        imgs: Float[Tensor, "batch 3 rows columns"],
        pids: Int[Tensor, " batch"] | None = None,
        identification: IdentificationAttentionLoss | None = None,
        siamese: SiameseAttentionLoss | None = None,
        camids: Int[Tensor, " batch"] | None = None,
    ) -> CASNOutput | Tensor:
        """Returns a :class:`CASNOutput` in training mode, the backbone's features in eval mode.

        Where losses are given, the masked pass and the comparison of pairs run in here, so that
        nn.DataParallel and DistributedDataParallel see one forward call. Their terms are then
        reduced by :func:`casn_plugin.objective.loss_terms`. Each image goes through the network
        once, in however many pairs it is.

        Args:
            imgs: a batch of images, normalised.
            pids: their identities, which the identification loss needs, and pairs that are chosen
                inside of the batch. They are read, as cameras are, so they are best on the CPU,
                wherever the images are.
            identification: the settings of L_ia; None skips the masked pass.
            siamese: the settings of L_sa, which say what pairs are; None skips the pairs.
            camids: their cameras, where pairs are chosen inside of the batch.

        Raises:
            TypeError: images that are no float tensor, or of another dtype than the model without
                autocast.
            ValueError: images of another shape or on another device, losses that lack identities,
                an odd number of rows or an identity-balanced batch where rows are pairs, or a
                target layer that was not called.
        """
        self._check_place(imgs)
        if not self.training:
            return self.reader.features(self.backbone, imgs)
        return self._train_pass(imgs, pids, identification, siamese, camids)

    @uncompiled
    def _train_pass(
        self,
        imgs: Tensor,
        pids: Tensor | None,
        identification: IdentificationAttentionLoss | None,
        siamese: SiameseAttentionLoss | None,
        camids: Tensor | None,
    ) -> CASNOutput:
        """Returns what :meth:`forward` gives in training mode."""
        check_lengths(imgs=imgs, pids=pids, camids=camids)
        imgs = imgs.clone() if imgs.is_inference() else imgs
        if pids is not None:  # read once for all that looks at them
            pids = check_tensor("pids", pids, "batch", floating=False).cpu()
            pids = pids.clone() if pids.is_inference() else pids
        if identification is not None and pids is None:
            raise ValueError("the identification attention loss needs pids")
        if siamese is not None and siamese.pairs != "rows" and pids is None:
            raise ValueError("pairs that are chosen inside of a batch need pids")
        pairs = siamese.choose(pids, camids) if siamese is not None and pids is not None else None
        logits, features, activations = self.reader.tapped(self.backbone, imgs)
        masked_scores = pair_scores = distances = same = None
        if identification is not None and pids is not None:
            if logits is None:
                raise ValueError(
                    "the identification attention loss needs a classifier of identities"
                )
            masked_scores = identification.scores_of(
                self.reader.logits, self.backbone, imgs, pids, logits, activations
            )
        if siamese is not None:
            pair_scores, distances = siamese.compare(
                self.pair_classifier, features, activations, pairs
            )
            same = None if pids is None else same_identity(pids, pairs).to(imgs.device)
        return CASNOutput(
            logits, features, activations, masked_scores, pair_scores, distances, same
        )

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
        gradient settings are left as found. With `flip` it runs twice, and features and attention
        are those of :func:`casn_plugin.encoding.with_mirrored`.

        Raises:
            TypeError: images that are no float tensor, or of another dtype than the model without
                autocast; a model cast to half precision as a whole.
            ValueError: no image, images of another shape or on another device than the model;
                features that do not depend on the tapped map.
        """
        self._check_place(imgs)
        if self.flip:
            return with_mirrored(self._encode(imgs), self._encode(imgs.flip(3)))
        return self._encode(imgs)

    def _encode(self, imgs: Tensor) -> Encoding:
        """Returns the encoding of images as they are."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluated(self.backbone) as backbone,
        ):
            if imgs.is_inference():
                imgs = imgs.clone()
            joined = self.reader.joined(backbone, imgs)
            with torch.autocast(imgs.device.type, enabled=False):
                return encode_head(*joined)

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
