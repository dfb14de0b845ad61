#!/usr/bin/env python
"""Trains CASN on a PCB backbone and ranks with attention fused in.

Without arguments: on the embedded data set of rendered pedestrians, on the CPU, in minutes.

    python examples/train_casn_pcb.py

The paper's protocol, on a data set that torchreid reads from --root (see docs/protocols.md):

    python examples/train_casn_pcb.py --preset market1501-pcb --root reid-data
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import torch
import torchreid
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    PairClassifier,
    PairSampler,
    SiameseAttentionLoss,
)
from casn_plugin.engine import EMBEDDED_DATASET
from casn_plugin.explanation import pair_mosaic, plot_curves

# Section 4 and Eq. 1 of the paper; docs/protocols.md says what it leaves open
PAPER: dict[str, Any] = {
    "cuhk03_labeled": False,
    "batch_size": 16,
    "max_epoch": 40,
    "stepsize": 30,
    "optim": "sgd",
    "lr": 0.03,
    "base_lr_mult": 1.0,
    "label_smooth": False,
    "weights": "imagenet",
    "eval_freq": 10,
}
DATASETS: dict[str, dict[str, Any]] = {
    "market1501": {"sources": ["market1501"]},
    "cuhk03-detected": {"sources": ["cuhk03"]},
    "cuhk03-labeled": {"sources": ["cuhk03"], "cuhk03_labeled": True},
    "dukemtmcreid": {"sources": ["dukemtmcreid"]},
    "msmt17": {"sources": ["msmt17"]},
}
BACKBONES: dict[str, dict[str, Any]] = {
    "ide": {"backbone": "ide", "height": 288, "width": 144},
    "pcb": {"backbone": "pcb_p6", "height": 384, "width": 128},
}
PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {
        "sources": [EMBEDDED_DATASET],
        "cuhk03_labeled": False,
        "backbone": "pcb_slim",
        "height": 128,
        "width": 64,
        "batch_size": 32,
        "max_epoch": 10,
        "stepsize": 8,
        "optim": "adam",
        "lr": 0.001,
        "base_lr_mult": 1.0,
        "label_smooth": True,
        "weights": "none",
        "eval_freq": -1,
    },
    **{
        f"{data}-{net}": {**PAPER, **DATASETS[data], **BACKBONES[net]}
        for data in DATASETS
        for net in BACKBONES
    },
}
PRESETS["paper"] = PRESETS["market1501-pcb"]
# where torchreid looks for them; a folder that is missing, it would make and try to download
FOLDERS = {
    "market1501": "market1501",
    "cuhk03": "cuhk03",
    "dukemtmcreid": "dukemtmc-reid",
    "msmt17": "msmt17",
}


def parse_args(
    argv: list[str] | None = None, defaults: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Returns the options; those not given are of `defaults`, then of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="embedded", help="defaults of all options below")
    add("--root", default="", help="folder of torchreid's data sets")
    add("--sources", nargs="+", help=f"data sets to train on, e.g. market1501, {EMBEDDED_DATASET}")
    add("--targets", nargs="+", help="data sets to rank; by default the sources")
    add(
        "--cuhk03-labeled",
        action=argparse.BooleanOptionalAction,
        help="cuhk03: labeled boxes, not detected ones",
    )
    add(
        "--backbone",
        help="pcb_slim or resnet_slim (for the CPU), mobilenet_v2 (torchvision's), mobilenet_pcb, "
        "ide (the paper's: resnet50 with a classifier of two layers), or a name of torchreid's "
        "model factory",
    )
    add("--height", type=int, help="rows of the images")
    add("--width", type=int, help="columns of the images")
    add("--batch-size", type=int, help="images in a batch, even")
    add("--max-epoch", type=int, help="epochs to train")
    add("--stepsize", type=int, help="epochs until the learning rate is divided by 10")
    add("--optim", choices=["sgd", "adam"], help="optimizer")
    add("--lr", type=float, help="learning rate")
    add(
        "--base-lr-mult",
        type=float,
        help="learning rate of the layers below the classifiers, as a multiple of --lr",
    )
    add("--lambda-ia", type=float, default=0.5, help="weight of identification attention (Eq. 6)")
    add("--lambda-sa", type=float, default=0.05, help="weight of Siamese attention (Eq. 6)")
    add(
        "--label-smooth",
        action=argparse.BooleanOptionalAction,
        help="smooth the labels of the identification loss (Eq. 1 does not)",
    )
    add(
        "--attention-weight",
        type=float,
        default=0.1,
        help="weight of the attention distance in the fused ranking",
    )
    add("--gallery-dir", help="keep the gallery's encodings on disk there while ranking")
    add("--score", choices=["probability", "logit"], default="probability", help="y_c of Eq. 2")
    add("--mask-scale", type=float, default=10.0, help="alpha of the soft mask")
    add("--mask-threshold", type=float, default=0.5, help="beta of the soft mask")
    add(
        "--ia-trains",
        choices=["attention", "network"],
        default="attention",
        help="what L_ia trains: only where to look, or also what is made of the masked image",
    )
    add(
        "--masked-statistics",
        choices=["batch", "running"],
        default="batch",
        help="what BatchNorm normalises the masked images by",
    )
    add("--ia-start-epoch", type=int, default=0, help="epochs before identification attention")
    add("--threshold", type=float, default=0.2, help="t, above which a row counts as attended")
    add("--consistency-weight", type=float, default=0.2, help="alpha of Eq. 5")
    add("--unit-profiles", action="store_true", help="Eq. 5 in training: profiles of unit length")
    add(
        "--pair-classifier",
        choices=["signed", "absolute", "affine"],
        default="signed",
        help="two layers of f1 - f2, two layers of |f1 - f2|, or one layer of f1 - f2",
    )
    add("--hidden-dim", type=int, default=512, help="width of the pair classifier")
    add(
        "--pair-lr-mult",
        type=float,
        default=1.0,
        help="learning rate of the pair classifier, with SGD",
    )
    add("--one-order", action="store_true", help="show the pair classifier one order of each pair")
    add("--any-camera", action="store_true", help="positive pairs of one camera too")
    add("--eval-freq", type=int, help="epochs between checkpoints with evaluation; -1: at the end")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], help="by default CUDA where there is one")
    add("--workers", type=int, default=0 if sys.platform == "win32" else 2)
    add(
        "--weights",
        help="file with the backbone's initial weights (ImageNet's, or a torchreid checkpoint), "
        "'imagenet' to download them, or 'none'",
    )
    add("--resume", metavar="CHECKPOINT", help="go on from a checkpoint of this script")
    add("--test-only", action="store_true", help="rank with --resume or --weights, do not train")
    add("--save-dir", default="log/casn_pcb", help="folder for checkpoints, curves and pictures")
    add("--visrank", action="store_true", help="with --test-only: save torchreid's ranked lists")
    add("--rerank", action="store_true", help="with --test-only: re-rank (Zhong et al.)")
    parser.set_defaults(**(defaults or {}))
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here")
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error(f"--batch-size must be even, got {args.batch_size}")
    for option in ("resume", "weights"):
        file = getattr(args, option)
        if file and file not in ("imagenet", "none") and not os.path.isfile(file):
            parser.error(f"--{option}: there is no file {file}")
    if args.test_only and not args.resume and args.weights in ("imagenet", "none"):
        parser.error("--test-only ranks with a model: name it with --resume or --weights FILE")
    for name in {*args.sources, *(args.targets or [])} & set(FOLDERS):
        folder = Path(args.root).expanduser() / FOLDERS[name]
        if not folder.is_dir():
            parser.error(
                f"--root: {name} is expected in {folder}, and there is no such folder; data sets "
                "are not downloaded here, docs/protocols.md has their layouts"
            )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


class SlimPCB(torchreid.models.pcb.PCB):  # type: ignore[misc]
    """torchreid's PCB on a ResNet-10 of half the width, with four parts: for the CPU."""

    def __init__(self, num_classes: int) -> None:
        pcb = torchreid.models.pcb
        super().__init__(
            num_classes, "softmax", pcb.BasicBlock, [1, 1, 1, 1], parts=4, reduced_dim=128
        )
        self.conv5 = pcb.DimReduceLayer(256, 128, "relu")

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1
    ) -> nn.Module:
        layer: nn.Module = super()._make_layer(block, planes // 2, blocks, stride)
        return layer


class SlimResNet(torchreid.models.resnet.ResNet):  # type: ignore[misc]
    """The body of :class:`SlimPCB` with torchreid's ResNet head: global pooling, one classifier."""

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
        scores: Tensor = super().forward(differences.abs())
        return scores


def strided_mobilenet() -> nn.Module:
    """Returns torchvision's MobileNetV2 without its last stride: a map of twice the rows."""
    net: nn.Module = mobilenet_v2()
    net.features[14].conv[1][0].stride = (1, 1)
    return net


def mobilenet_forward(net: nn.Module, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and features of torchvision's MobileNetV2, a plain module."""
    features = net.features(imgs).mean((2, 3))
    return net.classifier(features), features


def build_model(args: argparse.Namespace, num_classes: int) -> CASN:
    """Returns the wrapped backbone with its initial weights.

    Raises:
        SystemExit: ImageNet weights that can't be downloaded, or a file that doesn't fit.
    """
    forward = None
    own = {"pcb_slim": SlimPCB, "resnet_slim": SlimResNet, "mobilenet_pcb": MobilePCB}
    if args.backbone in own:
        backbone: nn.Module = own[args.backbone](num_classes)
    elif args.backbone == "mobilenet_v2":
        backbone, forward = strided_mobilenet(), mobilenet_forward
        backbone.classifier[1] = nn.Linear(1280, num_classes)
    else:
        try:
            backbone = torchreid.models.build_model(
                "resnet50" if args.backbone == "ide" else args.backbone,
                num_classes,
                pretrained=args.weights == "imagenet" and not args.resume,
                use_gpu=args.device == "cuda",
            )
        except KeyError as error:
            raise SystemExit(f"--backbone: {error.args[0]}") from None
        except Exception as error:  # each model downloads in its own way, and fails in its own
            if args.weights != "imagenet":
                raise
            raise SystemExit(
                f"The ImageNet weights of {args.backbone} could not be downloaded ({error}). Get "
                "the file by other means and name it with --weights FILE (pcb_p6 takes "
                "https://download.pytorch.org/models/resnet50-19c8e357.pth), or train from "
                "scratch with --weights none."
            ) from error
    if args.backbone == "ide":  # Section 3.1.1: two fully connected layers
        backbone.classifier = nn.Sequential(
            nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, num_classes)
        )
    size = (args.height, args.width)
    model = CASN(
        backbone, forward=forward, input_size=size, hidden_dim=args.hidden_dim, seed=args.seed
    )
    feature_dim = model.pair_classifier[0].in_features  # type: ignore[index]
    if args.pair_classifier == "absolute":
        model.pair_classifier = AbsolutePairClassifier(feature_dim, args.hidden_dim, seed=args.seed)
    elif args.pair_classifier == "affine":
        with torch.random.fork_rng(devices=[]):  # all else as with the others
            model.pair_classifier = nn.Linear(feature_dim, 2)
    if args.weights not in ("imagenet", "none"):
        load_weights(model, args)
    return model.to(args.device)


def load_weights(model: CASN, args: argparse.Namespace) -> None:
    """Takes what fits from a file: of a backbone, or of a CASN with its pair classifier.

    Raises:
        SystemExit: a file that doesn't fit or can't be read safely.
    """
    # torchreid's own checkpoints hold rank1 as a NumPy scalar
    scalar = type(np.float32(0)).__reduce__(np.float32(0))[0]
    numbers = [type(np.dtype("float32")), type(np.dtype("float64"))]
    try:
        with torch.serialization.safe_globals([scalar, np.dtype, *numbers]):
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{args.weights} can't be read as a checkpoint: {error}") from error
    own = model.state_dict()
    fitting = {
        name.removeprefix("module."): value
        for name, value in state.get("state_dict", state).items()
        if isinstance(value, Tensor)
        and own.get(name.removeprefix("module."), torch.empty(0)).shape == value.shape
    }
    if len(fitting) < len(own) / 2:
        raise SystemExit(
            f"{args.weights} does not fit {args.backbone}: {len(fitting)} of its "
            f"{len(own)} tensors are in the file with the same name and shape"
        )
    model.load_state_dict(fitting, strict=False)
    print(f"{len(fitting)} of {len(own)} tensors taken from {args.weights}")
    if args.test_only and not any(name.startswith("pair_classifier.") for name in fitting):
        print("It holds no pair classifier: what attention and the fused ranking say is random.")


def save_pairs(engine: ImageCASNEngine, name: str, path: Path, number: int = 5) -> None:
    """Saves a picture of random people with their best match and the attention of each pair."""
    explained = engine.explain(name, topk=1)
    queries = engine.test_loader[name]["query"].dataset.data
    one_each = {row[1]: i for i, row in enumerate(queries)}
    rows = np.random.default_rng(1).permutation(list(one_each.values()))[:number].tolist()
    pairs = [each.matches[0].pair for each in map(explained.__getitem__, rows) if each.matches]
    mosaic = pair_mosaic(
        np.stack([pair.first.picture for pair in pairs]),
        np.stack([pair.second.picture for pair in pairs]),
        torch.stack([pair.first.attention for pair in pairs]),
        torch.stack([pair.second.attention for pair in pairs]),
        [bool(pair.same) for pair in pairs],
    )
    matplotlib.image.imsave(path, mosaic)


def build_engine(
    args: argparse.Namespace, engine_class: type[ImageCASNEngine] = ImageCASNEngine
) -> ImageCASNEngine:
    """Returns the engine, with data and model, that the options ask for, all seeded."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)
    use_gpu = args.device == "cuda"
    datamanager = torchreid.data.ImageDataManager(
        root=args.root,
        sources=args.sources,
        targets=args.targets,
        height=args.height,
        width=args.width,
        batch_size_train=args.batch_size,
        batch_size_test=64,
        workers=args.workers,
        use_gpu=use_gpu,
        cuhk03_labeled=args.cuhk03_labeled,
    )
    model = build_model(args, datamanager.num_train_pids)
    datamanager = PairSampler.install(datamanager, cross_camera=not args.any_camera, seed=args.seed)
    optimizer = torchreid.optim.build_optimizer(
        model,
        optim=args.optim,
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,
        staged_lr=True,
        new_layers=["classifier", "conv5", "pair_classifier"],
        base_lr_mult=args.base_lr_mult,
    )
    scheduler = torchreid.optim.build_lr_scheduler(
        optimizer, lr_scheduler="single_step", stepsize=args.stepsize
    )
    return engine_class(
        datamanager,
        model,
        optimizer,
        scheduler,
        use_gpu=use_gpu,
        label_smooth=args.label_smooth,
        lambda_ia=args.lambda_ia,
        lambda_sa=args.lambda_sa,
        attention_weight=args.attention_weight,
        gallery_dir=args.gallery_dir,
        identification=IdentificationAttentionLoss(
            args.score,
            args.mask_scale,
            args.mask_threshold,
            trains=args.ia_trains,
            statistics=args.masked_statistics,
        ),
        siamese=SiameseAttentionLoss(
            args.consistency_weight,
            args.threshold,
            unit=args.unit_profiles,
            both_orders=not args.one_order,
        ),
        ia_start_epoch=args.ia_start_epoch,
        pair_lr_mult=args.pair_lr_mult,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, ranks and saves; returns the results of each target data set."""
    args = parse_args(argv)
    save_dir = Path(args.save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    engine = build_engine(args)
    start_epoch = engine.resume(args.resume) if args.resume else 0
    engine.run(
        save_dir=str(save_dir),
        start_epoch=start_epoch,
        max_epoch=args.max_epoch,
        eval_freq=args.eval_freq,
        test_only=args.test_only,
        visrank=args.visrank,
        rerank=args.rerank,
    )
    (save_dir / "results.json").write_text(
        json.dumps({"args": vars(args), "results": engine.results, "history": engine.history})
    )
    for name, results in engine.results.items():
        plot_curves(engine.history, results).savefig(save_dir / f"curves_{name}.png")
        save_pairs(engine, name, save_dir / f"pairs_{name}.png")
        print(f"Saved curves and pairs of {name} to {save_dir}")
    if not args.test_only:
        print(f"The attention of fixed pairs, epoch by epoch: tensorboard --logdir {save_dir}")
    return engine.results


if __name__ == "__main__":
    main()
