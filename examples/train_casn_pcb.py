#!/usr/bin/env python
"""Trains CASN on a PCB backbone and ranks with attention fused in.

Without options on the embedded data set of rendered pedestrians, on the CPU, in minutes; by the
paper's protocol on one that torchreid reads from --root (docs/guides/protocols.md); on several GPUs
or cores with torchrun (docs/guides/processes.md):

    python examples/train_casn_pcb.py
    python examples/train_casn_pcb.py --preset market1501-pcb --root reid-data
    torchrun --nproc-per-node 2 examples/train_casn_pcb.py
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casn_plugin import CASN, ImageCASNEngine, PairSampler, RankingOptions
from casn_plugin.checkpoint import checkpoint_in, load_weights
from casn_plugin.doors import check_count, check_weight
from casn_plugin.explanation import plot_curves
from casn_plugin.files import replacing
from casn_plugin.packages import needed, without_gpu
from casn_plugin.processes import Processes, launched, started
from casn_plugin.training import Interrupted

with needed(quiet="Cython evaluation"):  # which is not used here
    import torchreid

# Section 4 and Eq. 1 of the paper; docs/guides/protocols.md says what it leaves open
PAPER = dict(batch_size=16, max_epoch=40, stepsize=30, optim="sgd", lr=0.03, label_smooth=False,
             weights="imagenet", eval_freq=10)  # fmt: skip
NETS = {"ide": dict(backbone="ide", height=288, width=144),
        "pcb": dict(backbone="pcb_p6", height=384, width=128)}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    f"{data}-{net}": {"sources": [data.split("-")[0]], **PAPER, **NETS[net]}
    for data in ("market1501", "cuhk03-detected", "cuhk03-labeled", "dukemtmcreid", "msmt17")
    for net in NETS
}
PRESETS["paper"] = PRESETS["market1501-pcb"]
PRESETS["embedded"] = dict(
    sources=["casn_pedestrians"], backbone="pcb_slim", height=128, width=64, batch_size=32, lr=1e-3,
    max_epoch=10, stepsize=8, optim="adam", label_smooth=True, weights="none", eval_freq=-1,
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, usage="%(prog)s [options]")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="embedded", help="data, network and training")
    add("--root", default="", help="folder of torchreid's data sets")
    add("--backbone", help="pcb_slim (for the CPU), ide (the paper's) or a name of torchreid's")
    add("--weights", help="file with initial weights, 'imagenet' to download them, or 'none'")
    add("--max-epoch", type=int, help="epochs to train")
    add("--lambda-ia", type=float, default=0.5, help="weight of identification attention (Eq. 6)")
    add("--lambda-sa", type=float, default=0.05, help="weight of Siamese attention (Eq. 6)")
    add("--gallery-dir", help="keep the gallery's encodings on disk there while ranking")
    add("--one-camera", action="store_true", help="matches of the query's own camera count too")
    add("--batch-size", type=int, help="images in a batch of all processes together")
    add("--accumulate", type=int, default=1, help="parts in which a batch goes through the network")
    add("--sync-batchnorm", action="store_true", help="BatchNorm over all processes")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], help="by default CUDA where there is one")
    add("--workers", type=int, default=0 if sys.platform == "win32" else 2)
    add("--resume", nargs="?", const="newest", help="checkpoint, by default the last of --save-dir")
    add("--test-only", action="store_true", help="rank with --resume or --weights, do not train")
    add("--save-dir", default="log/casn_pcb", help="folder for checkpoints, curves and pictures")
    return parser


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None, more_backbones: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Returns the options, and the preset's where none are given."""
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.device == "cuda" and without_gpu():
        parser.error(f"--device cuda: {without_gpu()}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.resume = args.save_dir if args.resume == "newest" else args.resume
    if args.test_only and not args.resume and args.weights in ("imagenet", "none"):
        parser.error("--test-only ranks with a model: name it with --resume or --weights FILE")
    try:
        check_numbers(args)
        for file in {args.resume, args.weights} - {None, "imagenet", "none"}:
            with redirect_stdout(None):
                checkpoint_in(file)
    except (OSError, ValueError) as error:
        parser.error(str(error).partition("\n")[0])
    for folder in filter(None, (args.save_dir, args.gallery_dir)):
        if Path(folder).is_file():
            parser.error(f"a folder is expected for --save-dir and --gallery-dir, got {folder}")
    known = "pcb_slim", "ide", *more_backbones, *vars(torchreid.models)["__model_factory"]
    if args.backbone not in known:
        parser.error(f"--backbone: expected {', '.join(known)}, got {args.backbone}")
    for name in {*args.sources} & {"market1501", "cuhk03", "dukemtmcreid", "msmt17"}:
        folder = Path(args.root).expanduser() / name.replace("mcreid", "mc-reid")
        if not folder.is_dir():  # torchreid would make it, and try to download
            parser.error(f"--root: {name} is expected in {folder}, and there is no such folder; "
                         "none is downloaded. docs/guides/protocols.md has layouts")  # fmt: skip
    return args


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers that can't be."""
    check_count("--max-epoch", args.max_epoch, least=0)
    check_count("--workers", args.workers, least=0)
    check_count("--seed", args.seed, least=0)
    check_weight("--lambda-ia", args.lambda_ia)
    check_weight("--lambda-sa", args.lambda_sa)
    if check_count("--batch-size", args.batch_size) % (2 * started()):
        each = f"{args.batch_size / started():g} a process"
        raise ValueError(f"--batch-size must be even, got {each}")
    most = args.batch_size // (2 * started())
    check_count("--accumulate, of the pairs in a batch,", args.accumulate, most=most)


class SlimPCB(torchreid.models.pcb.PCB):  # type: ignore[misc]
    """torchreid's PCB on a ResNet-10 of half the width, with four parts: for the CPU."""

    def __init__(self, num_classes: int) -> None:
        pcb = torchreid.models.pcb
        super().__init__(num_classes, "softmax", pcb.BasicBlock, [1] * 4, parts=4, reduced_dim=128)
        self.conv5 = pcb.DimReduceLayer(256, 128, "relu")

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 2, *args, **kwargs)


def build_backbone(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Returns the network that is to be wrapped."""
    if args.backbone == "pcb_slim":
        return SlimPCB(num_classes)
    name = "resnet50" if args.backbone == "ide" else args.backbone
    download, gpu = args.weights == "imagenet" and not args.resume, args.device == "cuda"
    try:
        backbone = torchreid.models.build_model(name, num_classes, "softmax", download, gpu)
    except Exception as error:  # each model fails to download in its own way
        raise SystemExit(f"--backbone {name}: {error}. If weights could not be downloaded, name "
                         "them, --weights FILE (of https://download.pytorch.org/models/resnet50-19c"
                         "8e357.pth for pcb_p6), or use --weights none.") from error  # fmt: skip
    if args.backbone == "ide":  # Section 3.1.1: two fully connected layers
        layers = nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, num_classes)
        backbone.classifier = nn.Sequential(*layers)
    return backbone  # type: ignore[no-any-return]


def start_from(args: argparse.Namespace, model: CASN) -> None:
    """Moves the model to its device, with the weights of a file where one is named."""
    if args.weights not in ("imagenet", "none"):
        try:
            taken = load_weights(model, args.weights)
        except ValueError as error:
            raise SystemExit(f"--weights does not fit {args.backbone}: {error}") from error
        print(f"{len(taken)} of {len(model.state_dict())} tensors taken from {args.weights}")
        if args.test_only and not any(name.startswith("pair_classifier.") for name in taken):
            print("There is no pair classifier among them: what its attention says is random.")
    model.to(args.device)


def build_engine(args: argparse.Namespace) -> ImageCASNEngine:
    """Returns the engine, with data and model, that the options ask for, all seeded."""
    torchreid.utils.set_random_seed(args.seed + Processes.found().rank)
    datamanager = torchreid.data.ImageDataManager(
        root=args.root, sources=args.sources, height=args.height, width=args.width,
        batch_size_train=args.batch_size // started(), batch_size_test=64, workers=args.workers,
        use_gpu=args.device == "cuda", cuhk03_labeled="cuhk03-labeled" in args.preset,
    )  # fmt: skip
    backbone = build_backbone(args, datamanager.num_train_pids)
    model = CASN(backbone, input_size=(args.height, args.width), seed=args.seed)
    start_from(args, model)
    optimizer = torchreid.optim.build_optimizer(model, optim=args.optim, lr=args.lr)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, "single_step", args.stepsize)
    return ImageCASNEngine(
        PairSampler.install(datamanager, seed=args.seed), model, optimizer, scheduler,
        args.device == "cuda", args.label_smooth, lambda_ia=args.lambda_ia,
        lambda_sa=args.lambda_sa, accumulate=args.accumulate, sync_batchnorm=args.sync_batchnorm,
        ranking=RankingOptions(gallery_dir=args.gallery_dir, cross_camera=not args.one_camera),
    )  # fmt: skip


def run(engine: ImageCASNEngine, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Trains, ranks and saves; returns the results of each data set."""
    try:
        start_epoch = engine.resume(args.resume) if args.resume else 0
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--resume: {error}") from error
    try:
        engine.run(save_dir=args.save_dir, start_epoch=start_epoch, max_epoch=args.max_epoch,
                   eval_freq=args.eval_freq, test_only=args.test_only, **options)  # fmt: skip
    except Interrupted:
        print("Here: with the same command and --resume")
        raise
    if not engine.processes.leads:
        return engine.results
    saved = {"args": vars(args), "results": engine.results, "history": engine.history}
    with replacing(f"{args.save_dir}/results.json") as file:
        file.write_text(json.dumps(saved))
    for name, results in engine.results.items():
        plot_curves(engine.history, results).savefig(f"{args.save_dir}/curves_{name}.png")
        engine.explain(name)[0].plot().savefig(f"{args.save_dir}/pairs_{name}.png")
    print(f"Saved results, curves, pairs; attention by epoch: tensorboard --logdir {args.save_dir}")
    return engine.results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, ranks and saves what the options ask for; returns the results."""
    args = parse_args(make_parser(), argv)
    with launched(args.device == "cuda") as processes:
        with processes.one_first():  # that renders or downloads what is not there
            engine = build_engine(args)
        return run(engine, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while pictures are rendered or read: the engine has its own
        sys.exit(130)
