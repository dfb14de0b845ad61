#!/usr/bin/env python
"""Trains and ranks the rows of the paper's Table 3 over several seeds.

On the embedded data set of rendered pedestrians, on the CPU:

    python examples/ablation.py

On pictures in the layout of Market-1501 below --root, with ImageNet's MobileNetV2:

    python examples/ablation.py --data ward --root ward --weights mobilenet_v2-b0353104.pth

Each run becomes one JSON file below --results, and is skipped where that file is there. With
--study choices, one choice that the paper leaves open is changed at a time.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import train_casn_pcb as train
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin import CASN, Encoding, ImageCASNEngine, attention_distmat, fuse_distmats
from casn_plugin.attention import attention_distance, evaluating, grad_cam, row_profiles
from casn_plugin.data import mask_path
from casn_plugin.evaluation import (
    attention_consistency,
    attention_quality,
    evaluate_rank,
    verification_auc,
)
from casn_plugin.losses import identity_scores
from casn_plugin.ranking import pair_attention, same_identity_distmat

LAMBDAS = {"": (0.0, 0.0), "+IA": (0.5, 0.0), "+SA": (0.0, 0.05), "CASN": (0.5, 0.05)}
FAMILIES = ("IDE", "PCB")
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
RANKS = (1, 5, 10, 20)
EMBEDDED = {"IDE": "resnet_slim", "PCB": "pcb_slim"}
PICTURES = {"IDE": "mobilenet_v2", "PCB": "mobilenet_pcb"}
PICTURES_OPTIONS = ["--sources", "market1501", "--height", "160", "--width", "64", "--optim", "sgd"]
PICTURES_OPTIONS += ["--lr", "0.03"]
CHOICES: dict[str, dict[str, list[str]]] = {
    "score of Eq. 2": {"logit": ["--score", "logit"]},
    "warm-up of L_ia": {f"{epochs} epochs": ["--ia-start-epoch", str(epochs)] for epochs in (2, 5)},
    "mask α": {value: ["--mask-scale", value] for value in ("5", "20")},
    "mask β": {value: ["--mask-threshold", value] for value in ("0.3", "0.7")},
    "λ1": {value: ["--lambda-ia", value] for value in ("0.1", "1.0")},
    "λ2": {value: ["--lambda-sa", value] for value in ("0.2", "0.5", "1.0")},
    "threshold t": {value: ["--threshold", value] for value in ("0.1", "0.4")},
    "pair classifier's width": {value: ["--hidden-dim", value] for value in ("128", "2048")},
    "pair classifier's learning rate": {
        f"× {value}": ["--pair-lr-mult", value] for value in ("5", "20")
    },
    "order of a pair": {"one": ["--one-order"]},
    "positive pairs": {"of any cameras": ["--any-camera"]},
}


def name_of(family: str, losses: str) -> str:
    """Returns what the paper's Table 3 calls a row.

    Example:
        >>> name_of("IDE", "+SA"), name_of("PCB", "CASN")
        ('IDE+SA', 'CASN(PCB)')
    """
    return f"CASN({family})" if losses == "CASN" else family + losses


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="embedded", help="name of the data set, the folder below --results")
    add("--root", default="", help="folder of pictures, as train_casn_pcb.py takes it")
    add("--weights", default="none", help="initial weights, as train_casn_pcb.py takes them")
    add("--study", choices=["table", "choices"], default="table")
    add("--only", nargs="+", help="rows of the table, or choices, e.g. IDE 'CASN(IDE)'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--family", choices=FAMILIES, default="IDE", help="what --study choices varies CASN of")
    add("--max-epoch", type=int, help="epochs to train, by default as train_casn_pcb.py")
    add("--results", type=Path, default=Path("docs/results"))
    add("--logs", type=Path, default=Path("log/ablation"), help="what the runs print")
    add("--device", choices=["cpu", "cuda"], help="by default CUDA where there is one")
    add(
        "--jobs",
        type=int,
        help="runs at a time: by default one a device, or one a core with one thread each",
    )
    add("options", nargs="*", metavar="-- OPTIONS", help="more options of train_casn_pcb.py")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count()
    args.jobs = args.jobs or devices or 1
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if (args.data == "embedded") != (not args.root):
        parser.error(f"--data {args.data}: expected 'embedded' without --root, another name with")
    args.settings = settings(args)
    unknown = set(args.only or ()) - {run["name"] for run in args.settings}
    if unknown:
        names = sorted({run["name"] for run in args.settings})
        parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    if args.only:
        args.settings = [run for run in args.settings if run["name"] in args.only]
    return args


def settings(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what tells the runs apart, all rows of a seed before the next seed."""
    common = ["--root", args.root, "--weights", args.weights, "--device", args.device]
    common += ["--workers", "0" if args.device == "cpu" else "4"]
    common += PICTURES_OPTIONS if args.root else []
    common += ["--max-epoch", str(args.max_epoch)] if args.max_epoch else []
    backbones = PICTURES if args.root else EMBEDDED
    rows: list[tuple[str, str, str, list[str]]] = []
    if args.study == "table":
        for family in FAMILIES:
            rows += [(name_of(family, losses), "", family, _lambdas(losses)) for losses in LAMBDAS]
    else:
        for choice, values in CHOICES.items():
            rows += [
                (choice, value, args.family, _lambdas("CASN") + options)
                for value, options in values.items()
            ]
    return [
        {
            "study": args.study,
            "data": args.data,
            "name": name,
            "value": value,
            "family": family,
            "seed": seed,
            "argv": [
                *common,
                *("--backbone", backbones[family]),
                *("--seed", str(seed)),
                *options,
                *args.options,
            ],
        }
        for seed in args.seeds
        for name, value, family, options in rows
    ]


def _lambdas(losses: str) -> list[str]:
    lambda_ia, lambda_sa = LAMBDAS[losses]
    return ["--lambda-ia", str(lambda_ia), "--lambda-sa", str(lambda_sa)]


def file_of(args: argparse.Namespace, run: dict[str, Any]) -> Path:
    """Returns where a run's results are kept."""
    folder = args.data if run["study"] == "table" else f"{args.data}-choices-{run['family']}"
    words = "-".join([run["name"], run["value"]]).lower()
    words = words.replace("λ", "lambda").replace("α", "alpha").replace("β", "beta")
    slug = "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())
    return Path(args.results, folder, f"{slug}-seed{run['seed']}.json")


class Trainer(ImageCASNEngine):
    """The engine without torchreid's test and checkpoint at the end: :func:`measure` does more."""

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Does nothing."""
        return 0.0

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def run_one(run: dict[str, Any], file: Path, log: Path) -> None:
    """Trains and measures one model, and writes its JSON file."""
    options = train.parse_args(run["argv"])
    for path in (file, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        open(log, "w") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        tempfile.TemporaryDirectory() as folder,
    ):
        engine = train.build_engine(options, Trainer)
        if options.device == "cpu" and "mobilenet" in options.backbone:
            engine.casn.features.to(memory_format=torch.channels_last)  # a third faster
        engine.run(save_dir=folder, max_epoch=options.max_epoch, print_freq=20)
        trained = time.perf_counter()
        (name,) = engine.test_loader
        results = measure(engine, name) if _finite(engine) else None
    done = {
        **{key: run[key] for key in ("study", "data", "name", "value", "family", "seed")},
        "settings": {
            key: value
            for key, value in vars(options).items()
            if key not in ("root", "save_dir", "resume", "test_only", "visrank", "rerank")
        },
        "results": results,
        "history": engine.history,
        "seconds": {"training": trained - started, "measuring": time.perf_counter() - trained},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchreid", "numpy")},
        },
    }
    done["settings"]["weights"] = Path(options.weights).name
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rounded(done), indent=1) + "\n")
    temporary.replace(file)


def _finite(engine: ImageCASNEngine) -> bool:
    return all(bool(value.isfinite().all()) for value in engine.casn.state_dict().values())


def rounded(value: Any) -> Any:
    """Returns a JSON value with its numbers rounded to six digits; NaN becomes None."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def measure(engine: ImageCASNEngine, name: str) -> dict[str, Any]:
    """Returns how well a trained model ranks a data set, and how good its attention is.

    "features", "attention" and "fused" are what ``engine.test()`` gives; "fusion" holds rank-1
    and mAP of other readings of "normalized" and other weights, of the same encodings.
    """
    model, siamese = engine.casn, engine.siamese
    loaders = engine.test_loader[name]
    query, *query_ids = train.encode(model, loaders["query"])
    gallery, *gallery_ids = train.encode(model, loaders["gallery"])
    ids = query_ids[0], gallery_ids[0], query_ids[1], gallery_ids[1]
    same = ids[0][:, None] == ids[1]
    counted = ~(same & (ids[2][:, None] == ids[3]))

    features = torch.cdist(query.features, gallery.features)
    normalized = [nn.functional.normalize(part.features) for part in (query, gallery)]
    raw, unit = (
        attention_distmat(model, query, gallery, threshold=siamese.threshold, unit=unit)
        for unit in (False, True)
    )
    pairs = {
        "unit": (torch.cdist(*normalized), unit),
        "query": (features, raw),
        "global": (features, raw),
    }
    fused = {
        reading: {
            weight: fuse_distmats(*both, normalization=reading, attention_weight=weight)
            for weight in WEIGHTS
        }
        for reading, both in pairs.items()
    }
    scores = same_identity_distmat(model, query, gallery)
    return {
        "features": ranking(features, ids),
        "attention": ranking(fused_attention(engine, raw, unit), ids),
        "fused": ranking(fused[engine.normalization][engine.attention_weight], ids),
        "auc": verification_auc(scores[counted][None], same[counted][None]),
        "feature_auc": verification_auc(-pairs["unit"][0][counted][None], same[counted][None]),
        "fusion": {
            reading: {
                str(weight): [ranking(distmat, ids)[key] for key in ("rank1", "mAP")]
                for weight, distmat in distmats.items()
            }
            for reading, distmats in fused.items()
        },
        "quality": {
            "identification": identification_quality(engine, loaders, same, counted),
            "siamese": siamese_quality(engine, loaders, query, gallery, same & counted)
            | vars(attention_consistency(raw[counted], same[counted])),
        },
    }


def fused_attention(engine: ImageCASNEngine, raw: Tensor, unit: Tensor) -> Tensor:
    """Returns the attention distances that the engine ranks by."""
    return unit if engine.normalization == "unit" else raw


def ranking(distmat: Tensor, ids: tuple[Tensor, ...]) -> dict[str, Any]:
    """Returns mAP, mINP and some ranks of the CMC, as shares."""
    found = evaluate_rank(distmat, *ids)
    cmc = {f"rank{rank}": float(found.cmc[rank - 1]) for rank in RANKS if rank <= len(found.cmc)}
    return {"mAP": found.mean_ap, "mINP": found.mean_inp, **cmc}


def masks_of(dataset: Any, size: tuple[int, int]) -> Tensor | None:
    """Returns the person masks of a torchreid data set in (0, 1), or None where there are none.

    Beside the folder that torchreid reads as "market1501", they are expected in
    masks/<folder of the picture>/<its name>.png.
    """
    masks = []
    for img_path, *_ in dataset.data:
        path = Path(img_path)
        beside = path.parents[3] / "masks" / path.parent.name / f"{path.stem}.png"
        own = beside if "market1501" in path.parts else Path(mask_path(img_path))
        mask = cv2.imread(str(own), cv2.IMREAD_GRAYSCALE) if own.is_file() else None
        if mask is None:
            return None
        masks.append(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(masks)) / 255


def identification_quality(
    engine: ImageCASNEngine, loaders: dict[str, DataLoader[Any]], same: Tensor, counted: Tensor
) -> dict[str, Any]:
    """Returns the quality of the Grad-CAM maps of each image's highest scoring identity.

    The people of the test set are none that the classifier knows: it is the one most alike.
    """
    maps = {part: class_maps(engine.casn, loaders[part]) for part in ("query", "gallery")}
    size = engine.datamanager.height, engine.datamanager.width
    masks = [masks_of(loaders[part].dataset, size) for part in maps]
    profiles = [row_profiles(each) for each in maps.values()]
    distances = attention_distance(
        profiles[0][:, None], profiles[1][None], threshold=engine.siamese.threshold
    )
    found = vars(attention_consistency(distances[counted], same[counted]))
    if masks[0] is None or masks[1] is None:
        return found
    return quality(torch.cat(list(maps.values())), torch.cat(masks), engine) | found


def class_maps(model: CASN, loader: DataLoader[Any]) -> Tensor:
    """Returns the Grad-CAM maps of the highest scoring identity, with BatchNorm in eval mode."""
    device, maps = next(model.parameters()).device, []
    with evaluating(model), torch.enable_grad():
        model.training = model.backbone.training = True  # so that logits are given
        for batch in loader:
            output = model(batch["img"].to(device))
            logits = output.logits if isinstance(output.logits, Tensor) else sum(output.logits)
            scores = identity_scores(output.logits, logits.argmax(1))
            maps.append(grad_cam(scores, output.activations, create_graph=False).detach().cpu())
    return torch.cat(maps)


def siamese_quality(
    engine: ImageCASNEngine,
    loaders: dict[str, DataLoader[Any]],
    query: Encoding,
    gallery: Encoding,
    positive: Tensor,
) -> dict[str, Any]:
    """Returns the quality of the maps of each query and one random match of another camera."""
    size = engine.datamanager.height, engine.datamanager.width
    masks = [masks_of(loaders[part].dataset, size) for part in ("query", "gallery")]
    if masks[0] is None or masks[1] is None:
        return {}
    rows = positive.any(1).nonzero()[:, 0]
    chance = torch.rand(positive.shape, generator=torch.Generator().manual_seed(0))
    matches = chance.masked_fill(~positive, -1).argmax(1)[rows]
    maps = pair_attention(engine.casn, query[rows], gallery[matches])
    return quality(torch.cat(maps).cpu(), torch.cat([masks[0][rows], masks[1][matches]]), engine)


def quality(maps: Tensor, masks: Tensor, engine: ImageCASNEngine) -> dict[str, float]:
    """Returns the means of attention_quality over images, and the share of blank maps."""
    found = attention_quality(maps, masks, row_threshold=engine.siamese.threshold)
    means = {name: float(values.nanmean()) for name, values in vars(found).items()}
    return means | {"blank": float((maps.amax((1, 2)) <= 0).float().mean())}


def start_worker(devices: Any) -> None:
    """Gives a worker process its device, or its one thread."""
    device = devices.get()
    if device is None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    else:
        torch.cuda.set_device(device)


def run_all(args: argparse.Namespace) -> None:
    """Runs what has no JSON file yet, `jobs` at a time, with a progress bar.

    Raises:
        SystemExit: a run failed; the others are done first.
    """
    todo = [run for run in args.settings if not file_of(args, run).is_file()]
    print(f"{len(todo)} of {len(args.settings)} runs to do, {args.jobs} at a time")
    # fresh processes; large tensors stay in the heap, which spares the CPU their page faults
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
    devices = context.Queue()
    for job in range(args.jobs):
        devices.put(job % torch.cuda.device_count() if args.device == "cuda" else None)
    failed = []
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, context, start_worker, (devices,)
    ) as pool:
        jobs = {}
        for run in todo:
            file = file_of(args, run)
            log = Path(args.logs, file.parent.name, f"{file.stem}.txt")
            jobs[pool.submit(run_one, run, file, log)] = (run, log)
        for job in tqdm(concurrent.futures.as_completed(jobs), total=len(jobs), unit="run"):
            run, log = jobs[job]
            if error := job.exception():
                failed.append(
                    f"{run['name']} {run['value']} seed {run['seed']}: {error}; see {log}"
                )
                tqdm.write(failed[-1])
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} runs failed:", *failed]))


def main(argv: list[str] | None = None) -> None:
    """Runs what the options name."""
    args = parse_args(argv)
    run_all(args)


if __name__ == "__main__":
    main()
