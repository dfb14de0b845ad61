#!/usr/bin/env python
"""From options to data, model and engine: all that the tables vary.

The options of ../train_casn_pcb.py, which users copy, and those that only a table needs. It trains
one model as that example does:

    python examples/experiments/protocols.py --preset market1501-pcb --root reid-data --lr 0.1
"""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchreid
from backbones import OWN, build_model, train_casn_pcb
from scaling import IdentificationByRange, SiameseByRange
from torch import nn

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    PairSampler,
    RankingOptions,
    SiameseAttentionLoss,
)
from casn_plugin.processes import Processes, launched, started
from casn_plugin.scores import SCORES

# what a result does not depend on
_PLACES = {"root", "save_dir", "resume", "test_only", "visrank", "rerank", "device", "workers"}
_PLACES |= {"gallery_dir"}


def make_parser() -> argparse.ArgumentParser:
    """Returns the example's parser with the options of the laboratory added."""
    parser = train_casn_pcb.make_parser()
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--sources", nargs="+", help="data sets of torchreid to train on, in place of the preset's")
    add("--targets", nargs="+", help="data sets to rank; by default the sources")
    add("--cuhk03-labeled", action=yes_no, help="cuhk03: labeled boxes, not detected ones")
    add("--identities", type=int, help="train on so many first identities only")
    add("--height", type=int, help="rows of the images")
    add("--width", type=int, help="columns of the images")
    add("--any-camera", action="store_true", help="positive pairs of one camera too")
    add = parser.add_argument_group("training").add_argument
    add("--stepsize", type=int, help="epochs until the learning rate is divided by 10")
    add("--optim", choices=["sgd", "adam"], help="optimizer")
    add("--lr", type=float, help="learning rate")
    add("--base-lr-mult", type=float, default=1.0, help="learning rate of the layers below the "
        "classifiers, as a multiple of --lr")  # fmt: skip
    add("--pair-lr-mult", type=float, default=1.0, help="factor on the gradients of the pair "
        "classifier: its learning rate with SGD, and nothing with Adam")  # fmt: skip
    add("--label-smooth", action=yes_no, help="smooth the labels of L_ide (Eq. 1 does not)")
    add("--eval-freq", type=int, help="epochs between checkpoints with evaluation; -1: at the end")
    add = parser.add_argument_group("identification attention").add_argument
    add("--score", choices=SCORES, default="probability", help="y_c of Eq. 2")
    add("--mask-scale", type=float, default=10.0, help="alpha of the soft mask")
    add("--mask-threshold", type=float, default=0.5, help="beta of the soft mask")
    add("--ia-trains", choices=["attention", "network"], default="attention", help="what L_ia "
        "trains: where to look alone, or also what is made of the masked image")  # fmt: skip
    add("--masked-statistics", choices=["batch", "running"], default="batch",
        help="what BatchNorm normalises the masked images by")  # fmt: skip
    add("--ia-start-epoch", type=int, default=0, help="epochs before identification attention")
    add = parser.add_argument_group("Siamese attention").add_argument
    add("--consistency-weight", type=float, default=0.2, help="alpha of Eq. 5")
    add("--row-threshold", type=float, default=0.2, help="t, above which a row is attended")
    add("--unit-profiles", action="store_true", help="Eq. 5 in training: profiles of unit length")
    add("--one-order", action="store_true", help="show the pair classifier one order of a pair")
    add("--pair-classifier", choices=["signed", "absolute", "affine"], default="signed",
        help="two layers of f1 - f2, two layers of |f1 - f2|, or one layer of f1 - f2")  # fmt: skip
    add("--hidden-dim", type=int, default=512, help="width of the pair classifier")
    add("--map-scale", choices=["maximum", "range"], default="maximum", help="maps become masks "
        "and profiles divided by their maximum, or scaled by their range")  # fmt: skip
    add = parser.add_argument_group("ranking").add_argument
    add("--attention-weight", type=float, default=0.1, help="weight of the attention distance")
    add("--topk", type=int, help="compare the attention of so many nearest by features only")
    add("--visrank", action="store_true", help="with --test-only: save torchreid's ranked lists")
    add("--rerank", action="store_true", help="with --test-only: re-rank (Zhong et al.)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options; those not given are of the preset."""
    parser = make_parser()
    args: argparse.Namespace = train_casn_pcb.parse_args(parser, argv, tuple(OWN))
    if args.cuhk03_labeled is None:
        args.cuhk03_labeled = args.preset.startswith("cuhk03-labeled")
    if args.identities is not None and args.identities < 2:
        parser.error(f"--identities must be at least 2, got {args.identities}")
    if args.topk is not None and args.topk < 1:
        parser.error(f"--topk must be at least 1, got {args.topk}")
    if args.topk is not None and args.map_scale == "range":
        parser.error("--topk: --map-scale range compares all pairs")
    if args.backbone in OWN and args.weights == "imagenet":
        parser.error(f"--weights imagenet: {args.backbone} takes a FILE, or none")
    # the registry is private in both distributions of torchreid; asking it openly loads the data
    known = vars(torchreid.data.datasets)["__image_datasets"]
    for name in [*args.sources, *(args.targets or [])]:
        if name not in known:
            parser.error(f"torchreid knows no data set {name!r}, but {', '.join(known)}")
        folder = Path(args.root).expanduser() / getattr(known[name], "dataset_dir", "")
        if hasattr(known[name], "dataset_dir") and not folder.is_dir():
            parser.error(f"--root: {name} is expected in {folder}, and there is no such folder; "
                         "none is downloaded here")  # fmt: skip
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that a result depends on, the weights by the name of their file."""
    kept = {name: value for name, value in vars(args).items() if name not in _PLACES}
    return kept | {"weights": Path(args.weights).name}


class FirstIdentities(torchreid.data.ImageDataManager):  # type: ignore[misc]
    """torchreid's data manager, that trains on the first identities only, in torchreid's order.

    Args:
        identities: how many.
        **kwargs: torchreid's own.

    Raises:
        SystemExit: there are fewer.
    """

    def __init__(self, identities: int, **kwargs: Any) -> None:
        self.identities = identities
        super().__init__(**kwargs)
        if identities > super().num_train_pids:
            raise SystemExit(
                f"--identities: {', '.join(self.sources)} has {super().num_train_pids} to train "
                f"on, got {identities}"
            )
        images = self.train_loader.dataset
        images.train = images.data = [row for row in images.train if row[1] < identities]
        print(f"Trains on {len(images.train)} images of the first {identities} identities")

    @property
    def num_train_pids(self) -> int:
        """The number of identities to train on."""
        return self.identities


class LabEngine(ImageCASNEngine):
    """The engine with a warm-up: L_ia counts from an epoch on.

    Args:
        *args: the engine's own.
        ia_start_epoch: epochs before L_ia.
        **kwargs: the engine's own.
    """

    def __init__(self, *args: Any, ia_start_epoch: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ia_start_epoch = ia_start_epoch

    def train(
        self,
        print_freq: int = 10,
        fixbase_epoch: int = 0,
        open_layers: str | Sequence[str] | None = None,
    ) -> None:
        """Trains one epoch."""
        lambda_ia = self.lambda_ia
        if self.epoch < self.ia_start_epoch:
            self.lambda_ia = 0.0
        try:
            super().train(print_freq, fixbase_epoch, open_layers)
        finally:
            self.lambda_ia = lambda_ia


def build_engine(
    args: argparse.Namespace, engine_class: type[LabEngine] = LabEngine
) -> ImageCASNEngine:
    """Returns the engine, with data and model, that the options ask for, all seeded."""
    torchreid.utils.set_random_seed(args.seed + Processes.found().rank)
    use_gpu = args.device == "cuda"
    kwargs: dict[str, Any] = dict(
        root=args.root, sources=args.sources, targets=args.targets, height=args.height,
        width=args.width, batch_size_train=args.batch_size // started(), batch_size_test=64,
        workers=args.workers, use_gpu=use_gpu, cuhk03_labeled=args.cuhk03_labeled,
    )  # fmt: skip
    datamanager = (
        torchreid.data.ImageDataManager(**kwargs)
        if args.identities is None
        else FirstIdentities(args.identities, **kwargs)
    )
    model = build_model(args, datamanager.num_train_pids)
    if args.pair_lr_mult != 1:
        _multiply_gradients(model.pair_classifier, args.pair_lr_mult)
    datamanager = PairSampler.install(datamanager, cross_camera=not args.any_camera, seed=args.seed)
    optimizer = torchreid.optim.build_optimizer(
        model, optim=args.optim, lr=args.lr, staged_lr=args.base_lr_mult != 1,
        base_lr_mult=args.base_lr_mult, new_layers=["classifier", "conv5", "pair_classifier"],
    )  # fmt: skip
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, "single_step", args.stepsize)
    by_range = args.map_scale == "range"
    identification = IdentificationByRange if by_range else IdentificationAttentionLoss
    siamese = SiameseByRange if by_range else SiameseAttentionLoss
    return engine_class(
        datamanager, model, optimizer, scheduler, use_gpu, args.label_smooth,
        lambda_ia=args.lambda_ia, lambda_sa=args.lambda_sa, ia_start_epoch=args.ia_start_epoch,
        accumulate=args.accumulate, sync_batchnorm=args.sync_batchnorm,
        identification=identification(
            args.score, args.mask_scale, args.mask_threshold, trains=args.ia_trains,
            statistics=args.masked_statistics,
        ),
        siamese=siamese(
            args.consistency_weight, args.row_threshold, unit=args.unit_profiles,
            both_orders=not args.one_order,
        ),
        ranking=RankingOptions(
            attention_weight=args.attention_weight, shortlist=args.topk,
            gallery_dir=args.gallery_dir,
            cross_camera=not args.one_camera,
        ),
    )  # fmt: skip


def trained(checkpoint: str, device: str = "cpu") -> tuple[CASN, dict[str, Any]]:
    """Returns the model of the example's default run, and loaders of the embedded test set.

    Args:
        checkpoint: of examples/train_casn_pcb.py's default run.
        device: where the model is.

    Returns:
        The model in eval mode, and the loaders of "query" and "gallery".
    """
    options = parse_args(["--weights", checkpoint, "--device", device])
    with contextlib.redirect_stdout(io.StringIO()):
        manager = torchreid.data.ImageDataManager(
            sources=options.sources, height=options.height, width=options.width,
            batch_size_test=64, workers=0, use_gpu=False,
        )  # fmt: skip
        model = build_model(options, manager.num_train_pids)
    return model.eval(), manager.test_loader[options.sources[0]]


def _multiply_gradients(module: nn.Module, factor: float) -> None:
    """Multiplies all gradients that reach a module's parameters, before the optimizer sees them."""
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: factor * gradient)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, ranks and saves what the options ask for; returns the results."""
    args = parse_args(argv)
    if args.map_scale == "range":
        raise SystemExit("--map-scale range is for ablation.py: the engine does not rank by range")
    with launched(args.device == "cuda") as processes:
        with processes.one_first():
            engine = build_engine(args)
        options = {"visrank": args.visrank, "rerank": args.rerank}
        found: dict[str, Any] = train_casn_pcb.run(engine, args, **options)
    return found


if __name__ == "__main__":
    main()
