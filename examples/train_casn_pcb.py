#!/usr/bin/env python
"""Trains CASN on a PCB backbone and ranks with attention fused in.

Without arguments: on the embedded data set of rendered pedestrians, on the CPU, in minutes.

    python examples/train_casn_pcb.py

The paper's protocol, on a data set that torchreid reads from --root:

    python examples/train_casn_pcb.py --preset paper --root reid-data --sources market1501
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchreid
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v2

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    PairSampler,
    SiameseAttentionLoss,
    attention_distmat,
    fuse_distmats,
)
from casn_plugin.encoding import Encoding
from casn_plugin.engine import EMBEDDED_DATASET
from casn_plugin.ranking import pair_attention
from casn_plugin.visualization import denormalize, plot_curves, plot_pairs

PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {
        "sources": [EMBEDDED_DATASET],
        "backbone": "pcb_slim",
        "height": 128,
        "width": 64,
        "batch_size": 32,
        "max_epoch": 10,
        "stepsize": 8,
        "optim": "adam",
        "lr": 0.001,
        "base_lr_mult": 1.0,
        "weights": "none",
        "eval_freq": -1,
    },
    "paper": {
        "sources": ["market1501"],
        "backbone": "pcb_p6",
        "height": 384,
        "width": 128,
        "batch_size": 16,
        "max_epoch": 40,
        "stepsize": 30,
        "optim": "sgd",
        "lr": 0.03,
        "base_lr_mult": 1.0,
        "weights": "imagenet",
        "eval_freq": 10,
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options; those not given come from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="embedded", help="defaults of all options below")
    add("--root", default="", help="folder of torchreid's data sets")
    add("--sources", nargs="+", help=f"data sets to train on, e.g. market1501, {EMBEDDED_DATASET}")
    add("--targets", nargs="+", help="data sets to rank; by default the sources")
    add("--cuhk03-labeled", action="store_true", help="cuhk03: labeled boxes, not detected ones")
    add(
        "--backbone",
        help="pcb_slim or resnet_slim (for the CPU), mobilenet_v2 (torchvision's), mobilenet_pcb, "
        "or a name of torchreid's model factory",
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
    add("--score", choices=["probability", "logit"], default="probability", help="y_c of Eq. 2")
    add("--mask-scale", type=float, default=10.0, help="alpha of the soft mask")
    add("--mask-threshold", type=float, default=0.5, help="beta of the soft mask")
    add("--ia-start-epoch", type=int, default=0, help="epochs before identification attention")
    add("--threshold", type=float, default=0.2, help="t, above which a row counts as attended")
    add("--consistency-weight", type=float, default=0.2, help="alpha of Eq. 5")
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
                args.backbone,
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
    size = (args.height, args.width)
    model = CASN(
        backbone, forward=forward, input_size=size, hidden_dim=args.hidden_dim, seed=args.seed
    )
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


def encode(model: CASN, loader: DataLoader[Any]) -> tuple[Encoding, Tensor, Tensor]:
    """Returns the encodings of a loader's images on the CPU, their pids and camids."""
    device = next(model.parameters()).device
    encodings, pids, camids = [], [], []
    for batch in loader:
        encodings.append(model.encode(batch["img"].to(device)).to("cpu"))
        pids.append(batch["pid"])
        camids.append(batch["camid"])
    return Encoding.cat(encodings), torch.cat(pids), torch.cat(camids)


def save_pairs(engine: ImageCASNEngine, name: str, path: Path, number: int = 5) -> None:
    """Saves a picture of random people with their best match and the attention of each pair."""
    datasets = [engine.test_loader[name][part].dataset for part in ("query", "gallery")]
    one_each = {row[1]: i for i, row in enumerate(datasets[0].data)}
    rows = np.random.default_rng(1).permutation(list(one_each.values()))[:number].tolist()
    queries = [datasets[0][row] for row in rows]
    imgs = torch.stack([item["img"] for item in queries])
    device = next(engine.casn.parameters()).device
    query = engine.casn.encode(imgs.to(device)).to("cpu")
    gallery, pids, camids = encode(engine.casn, engine.test_loader[name]["gallery"])
    unit = [nn.functional.normalize(part.features) for part in (query, gallery)]
    distmat = fuse_distmats(
        torch.cdist(*unit), attention_distmat(engine.casn, query, gallery, unit=True),
        normalization="unit", attention_weight=engine.attention_weight,
    )  # fmt: skip
    matches = []
    for i, item in enumerate(queries):
        junk = (pids == item["pid"]) & (camids == item["camid"])
        matches.append(int(distmat[i].masked_fill(junk, float("inf")).argmin()))
    maps = pair_attention(engine.casn, query, gallery[torch.tensor(matches)])
    matched = torch.stack([datasets[1][match]["img"] for match in matches])
    figure = plot_pairs(
        denormalize(imgs),
        denormalize(matched),
        *maps,
        [int(pids[match]) == item["pid"] for match, item in zip(matches, queries, strict=True)],
        titles=[f"person {item['pid']}" for item in queries],
        threshold=engine.siamese.threshold,
    )
    figure.savefig(path)


def build_engine(
    args: argparse.Namespace, engine_class: type[ImageCASNEngine] = ImageCASNEngine
) -> ImageCASNEngine:
    """Returns an engine with data, model and optimizer, all random state set by the seed."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)
    datamanager = torchreid.data.ImageDataManager(
        root=args.root,
        sources=args.sources,
        targets=args.targets,
        height=args.height,
        width=args.width,
        batch_size_train=args.batch_size,
        batch_size_test=64,
        workers=args.workers,
        use_gpu=args.device == "cuda",
        cuhk03_labeled=args.cuhk03_labeled,
    )
    model = build_model(args, datamanager.num_train_pids)
    datamanager = PairSampler.install(datamanager, seed=args.seed)
    if args.any_camera:
        loader = datamanager.train_loader
        pids = [row[1] for row in loader.dataset.train]
        datamanager.train_loader = DataLoader(
            loader.dataset,
            batch_size=args.batch_size,
            sampler=PairSampler(pids, batch_size=args.batch_size, seed=args.seed),
            num_workers=args.workers,
            pin_memory=loader.pin_memory,
            drop_last=True,
        )
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
        use_gpu=args.device == "cuda",
        lambda_ia=args.lambda_ia,
        lambda_sa=args.lambda_sa,
        identification=IdentificationAttentionLoss(
            args.score, args.mask_scale, args.mask_threshold
        ),
        siamese=SiameseAttentionLoss(
            args.consistency_weight, args.threshold, both_orders=not args.one_order
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
    return engine.results


if __name__ == "__main__":
    main()
