"""How a network gives logits and features: torchreid's models, and whatever ends in a classifier.

Known by names and by what happens in a try-out; neither torchreid nor timm nor torchvision is
imported.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from casn_plugin.hooks import watch
from casn_plugin.scores import Logits
from casn_plugin.twins import twin

Forward = Callable[[nn.Module, Tensor], tuple[Logits | None, Tensor]]
"""Maps a backbone and its images to (logits, (B, D) features); without classifier, to (None, f)."""

_CLASSIFIERS = (nn.Linear, nn.Conv2d)  # a convolution of 1x1 on the pooled map


def is_torchreid(backbone: nn.Module) -> bool:
    """Returns whether a module says it is built as torchreid's factory builds them.

    Example:
        >>> is_torchreid(nn.Linear(2, 2))
        False
    """
    return getattr(backbone, "loss", None) in ("softmax", "triplet")


def torchreid_forward(backbone: nn.Module, imgs: Tensor) -> tuple[Logits, Tensor]:
    """Returns the logits and the features of a torchreid model in training mode.

    Built with loss="softmax" it would give logits only: it is asked as a "triplet" model.

    Raises:
        ValueError: it gives something else.
    """
    loss: Any = backbone.loss
    backbone.loss = "triplet"  # type: ignore[assignment]
    try:
        given = backbone(imgs)
    finally:
        backbone.loss = loss
    if isinstance(given, (tuple, list)) and len(given) == 2:
        logits, features = given
        if isinstance(features, (tuple, list)):  # HACNN: its branches, each of unit length
            features = torch.cat([F.normalize(branch, dim=1) for branch in features], dim=1)
        if isinstance(features, Tensor) and features.ndim == 2:
            return logits, features
    raise _OtherwiseError(
        f"{type(backbone).__name__} has loss={loss!r}, as torchreid's networks have, so in "
        'training mode it must give (logits, (B, D) features) where loss is "triplet", but it '
        f"gave {_said(given)}"
    )


class _OtherwiseError(ValueError):
    """What a network gives is not what a torchreid model gives."""


def otherwise_than_torchreid(backbone: nn.Module, imgs: Tensor) -> str | None:
    """Returns what a network gives otherwise than torchreid's, or None where it gives as these do.

    It is asked in training mode too, by a twin with buffers of its own.

    Args:
        backbone: in eval mode, which :func:`is_torchreid`.
        imgs: with which it is tried out.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
        >>> net.loss = "softmax"
        >>> otherwise_than_torchreid(net, torch.rand(2, 3, 2, 2))[-30:]
        'but it gave a Tensor of (2, 5)'
    """
    evaluated = backbone(imgs)
    with suppress(Exception), twin(backbone) as other:  # fails otherwise: nothing can be told
        for layer in other.train().modules():
            layer._buffers = {
                name: value if value is None else value.clone()
                for name, value in layer._buffers.items()
            }
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                layer.eval()  # SyncBatchNorm would wait for other processes
        try:
            _, features = torchreid_forward(other, imgs)
        except _OtherwiseError as error:
            return str(error)
        if isinstance(evaluated, Tensor) and evaluated.shape != features.shape:
            return (
                f"{type(backbone).__name__} has loss={backbone.loss!r}, as torchreid's networks "
                "have, so it must give the same features in both modes, but it gave "
                f"{_said(features)} in training mode and {_said(evaluated)} in eval mode"
            )
    return None


def _said(given: Any) -> str:
    """Returns in words what a network gave."""
    if isinstance(given, Tensor):
        return f"a Tensor of {tuple(given.shape)}"
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {len(given)}"
    return f"a {type(given).__name__}"


@dataclass(frozen=True)
class ByClassifier:
    """Runs a network whose last layer is a classifier: the features are what that layer takes.

    Attributes:
        names: of the classifier; of a distilled ViT the two, whose features and logits are
            averaged, as the network averages them. None in a network that ends in its features.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                     nn.Linear(8, 5))
        >>> logits, features = ByClassifier(("3",))(net, torch.rand(2, 3, 8, 8))
        >>> logits.shape, features.shape
        (torch.Size([2, 5]), torch.Size([2, 8]))
    """

    names: tuple[str, ...]

    def __call__(self, backbone: nn.Module, imgs: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns (B, classes) logits, None where there is no classifier, and (B, D) features.

        Raises:
            ValueError: a classifier that the network did not call.
        """
        with ExitStack() as stack:
            seen = [stack.enter_context(watch(backbone.get_submodule(each))) for each in self.names]
            output = backbone(imgs)
        if not seen:
            return None, next(iter(_tensors_of(output))).flatten(1)
        return self.read([(each.taken, each.given) for each in seen])

    def read(self, calls: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """Returns logits and features of what each classifier took and gave.

        Raises:
            ValueError: one of them took and gave nothing.
        """
        if any(taken is None or given is None for taken, given in calls):
            raise ValueError(f"the classifier {' and '.join(self.names)} was not called")
        taken, logits = zip(*calls, strict=True)
        if len({each.shape for each in taken}) > 1:  # branches of unlike widths
            features = torch.cat([each.flatten(1) for each in taken], 1)
        else:
            features = sum(taken).flatten(1) / len(taken)
        return sum(logits).flatten(1) / len(logits), features


def find_classifier(backbone: nn.Module, imgs: Tensor) -> ByClassifier | None:
    """Returns how a network in eval mode is read by its classifier, or None where it has none.

    timm's models name their classifier; of others it is the last layer called that is linear. It
    is proved: what it gives is what the network gives.

    Args:
        backbone: in eval mode.
        imgs: with which it is tried out.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5))
        >>> find_classifier(net, torch.rand(2, 3, 2, 2))
        ByClassifier(names=('3',))
        >>> find_classifier(net[:3], torch.rand(2, 3, 2, 2)) is None
        True
    """
    layers, told = dict(backbone.named_modules()), _told_classifiers(backbone)
    called: dict[str, tuple[Any, Any]] = {}  # each by its last call, in their order

    def note(name: str, args: tuple[Any, ...], given: Any) -> None:
        called.pop(name, None)
        called[name] = (args[0] if args else None), given

    handles = [
        layer.register_forward_hook(lambda _, args, given, name=name: note(name, args, given))
        for name, layer in layers.items()
        if name
        and (isinstance(layer, (*_CLASSIFIERS, nn.Identity)) or any(layer is x for x in told or ()))
    ]
    try:
        output = backbone(imgs)
    finally:
        for handle in handles:
            handle.remove()
    if told is None:
        ends = [
            name
            for name, (_, given) in called.items()
            if any(_equal(given, each) for each in _tensors_of(output))
        ]
        told = [layers[ends[-1]]] if ends else []
    names = tuple(name for name, layer in layers.items() if any(layer is each for each in told))
    if not names:
        return None
    if all(isinstance(layer, nn.Identity) for layer in told):  # num_classes=0
        return ByClassifier(())
    found = ByClassifier(names)
    logits, features = found.read([called.get(name, (None, None)) for name in names])
    right = any(_equal(logits, each, 1e-3) for each in _tensors_of(output))
    return found if right and features.ndim == 2 else None


def _told_classifiers(backbone: nn.Module) -> list[nn.Module] | None:
    """Returns the classifiers that a network of timm names, or None where it names none."""
    get = getattr(backbone, "get_classifier", None)
    told = get() if callable(get) else None
    if isinstance(told, nn.Module):
        told = list(told) if isinstance(told, nn.ModuleList) else [told]
    if not isinstance(told, (list, tuple)) or not all(isinstance(each, nn.Module) for each in told):
        return None
    return list(told)


def _tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors that a network gives, of a tensor, a tuple or a mapping."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [each for each in values if isinstance(each, Tensor)]


def _equal(one: Any, other: Tensor, tolerance: float = 0.0) -> bool:
    """Returns whether two tensors hold the same values, in one pass or in two."""
    if not isinstance(one, Tensor) or one.shape[0] != other.shape[0]:
        return False
    one, other = one.flatten(1), other.flatten(1)
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)
