"""The networks of the laboratory, beside those of the example that users copy.

That example, ../train_casn_pcb.py, is the one source of its network, its presets and its checks:
the laboratory takes them from there, and the example knows nothing of the laboratory.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchreid
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from casn_plugin import CASN, PairClassifier

sys.path.append(str(Path(__file__).parents[1]))

import train_casn_pcb as train_casn_pcb


class SlimResNet(torchreid.models.resnet.ResNet):  # type: ignore[misc]
    """The body of the example's ``SlimPCB`` with torchreid's ResNet head: one classifier."""

    def __init__(self, num_classes: int) -> None:
        block = torchreid.models.resnet.BasicBlock
        super().__init__(num_classes, "softmax", block, [1, 1, 1, 1], last_stride=1)
        self.feature_dim = 256
        self.classifier = nn.Linear(256, num_classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def _make_layer(
        self, block: type[nn.Module], planes: int, *args: Any, **kwargs: Any
    ) -> nn.Module:
        layer: nn.Module = super()._make_layer(block, planes // 2, *args, **kwargs)
        return layer


class MobilePCB(torchreid.models.pcb.PCB):  # type: ignore[misc]
    """torchreid's PCB head with five parts on torchvision's MobileNetV2."""

    def __init__(self, num_classes: int) -> None:
        pcb = torchreid.models.pcb
        super().__init__(num_classes, "softmax", pcb.BasicBlock, [1, 1, 1, 1], parts=5)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            delattr(self, name)
        self.features = strided_mobilenet().features
        self.conv5 = pcb.DimReduceLayer(1280, 256, "relu")

    def featuremaps(self, x: Tensor) -> Tensor:
        """Returns the last feature map, as PCB's ResNet gives it."""
        maps: Tensor = self.features(x)
        return maps.contiguous()  # PCB.forward calls view()


class AbsolutePairClassifier(PairClassifier):
    """Two layers of |f1 − f2|: both orders of a pair get the same scores."""

    def forward(self, differences: Tensor) -> Tensor:
        """Returns (P, 2) scores of (P, D) differences."""
        scores: Tensor = super().forward(differences.abs())  # type: ignore[no-untyped-call]
        return scores


def strided_mobilenet() -> Any:
    """Returns torchvision's MobileNetV2 without its last stride: a map of twice the rows."""
    net = mobilenet_v2()
    net.features[14].conv[1][0].stride = (1, 1)
    return net


def mobilenet_forward(net: Any, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and features of torchvision's MobileNetV2, a plain module."""
    features = net.features(imgs).mean((2, 3))
    return net.classifier(features), features


def plain_mobilenet(num_classes: int) -> nn.Module:
    """Returns torchvision's MobileNetV2 with a classifier of the identities."""
    net = strided_mobilenet()
    net.classifier[1] = nn.Linear(1280, num_classes)
    return net  # type: ignore[no-any-return]


OWN: dict[str, Callable[[int], nn.Module]] = {
    "resnet_slim": SlimResNet,
    "mobilenet_pcb": MobilePCB,
    "mobilenet_v2": plain_mobilenet,
}
"""Backbones that the example does not know: a function of the number of identities makes each."""


def build_model(args: argparse.Namespace, num_classes: int) -> CASN:
    """Returns the wrapped backbone with its initial weights.

    Raises:
        SystemExit: ImageNet weights that can't be downloaded, or a file that doesn't fit.
    """
    if args.backbone in OWN:
        backbone = OWN[args.backbone](num_classes)
    else:
        backbone = train_casn_pcb.build_backbone(args, num_classes)
    model = CASN(
        backbone,
        forward=mobilenet_forward if args.backbone == "mobilenet_v2" else None,
        input_size=(args.height, args.width),
        hidden_dim=args.hidden_dim,
        seed=args.seed,
    )
    first = next(model.pair_classifier.children())
    assert isinstance(first, nn.Linear)
    if args.pair_classifier == "absolute":
        model.pair_classifier = AbsolutePairClassifier(
            first.in_features, args.hidden_dim, seed=args.seed
        )
    elif args.pair_classifier == "affine":
        with torch.random.fork_rng(devices=[]):  # all else as with the others
            model.pair_classifier = nn.Linear(first.in_features, 2)
    train_casn_pcb.start_from(args, model)
    return model
