#!/usr/bin/env python
"""Trains and ranks the rows of the paper's Table 3 over several seeds.

On the embedded data set of rendered pedestrians, on the CPU:

    python examples/ablation.py

On pictures in the layout of Market-1501 below --root, with ImageNet's MobileNetV2:

    python examples/ablation.py --data ward --root ward --weights mobilenet_v2-b0353104.pth

Each run becomes one JSON file below --results, and is skipped where that file is there. With
--study choices, one choice that the paper leaves open is changed at a time. The tables and plots
are made of the files alone:

    python examples/ablation.py --report docs/results.md
"""

import argparse
import concurrent.futures
import contextlib
import copy
import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
import train_casn_pcb as train
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin import CASN, Encoding, ImageCASNEngine, attention_distmat, fuse_distmats
from casn_plugin.attention import align_profiles, grad_cam, row_profiles, scale_maps
from casn_plugin.evaluation import (
    attention_consistency,
    attention_quality,
    evaluate_rank,
    verification_auc,
)
from casn_plugin.explanation import COLOURS
from casn_plugin.losses import identity_scores
from casn_plugin.model import encode_batches
from casn_plugin.pedestrians import mask_path
from casn_plugin.ranking import pair_attention, same_identity_distmat

LAMBDAS = {"": (0.0, 0.0), "+IA": (0.5, 0.0), "+SA": (0.0, 0.05), "CASN": (0.5, 0.05)}
FAMILIES = ("IDE", "PCB")
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
RANKS = (1, 5, 10, 20)
EMBEDDED = {"IDE": "resnet_slim", "PCB": "pcb_slim"}
PICTURES = {"IDE": "mobilenet_v2", "PCB": "mobilenet_pcb"}
PICTURES_OPTIONS = ["--sources", "market1501", "--height", "160", "--width", "64", "--optim", "sgd"]
PICTURES_OPTIONS += ["--lr", "0.03"]
TITLES = {
    "embedded": "Embedded set of rendered pedestrians",
    "ward": "WARD (Martinel and Micheloni, 2012): real pictures of 70 people, three cameras",
}
# by the row of the table that is varied, the smallest that has the choice
CHOICES: dict[str, dict[str, dict[str, list[str]]]] = {
    "+IA": {
        "what L_ia trains": {"network": ["--ia-trains", "network"]},
        "score of Eq. 2": {"logit": ["--score", "logit"]},
        "warm-up of L_ia": {f"{n} epochs": ["--ia-start-epoch", str(n)] for n in (2, 5)},
        "BatchNorm of the masked pass": {"running": ["--masked-statistics", "running"]},
        "mask α": {value: ["--mask-scale", value] for value in ("5", "20")},
        "mask β": {value: ["--mask-threshold", value] for value in ("0.3", "0.7")},
        "scale of the mask's map": {"by range": []},
        "λ1": {value: ["--lambda-ia", value] for value in ("0.1", "1.0")},
    },
    "+SA": {
        "λ2": {value: ["--lambda-sa", value] for value in ("0.2", "0.5", "1.0")},
        "α of Eq. 5": {value: ["--consistency-weight", value] for value in ("0", "2")},
        "threshold t": {value: ["--threshold", value] for value in ("0.1", "0.4")},
        "scale of the profiles": {"by range": []},
        "aligned profiles": {"of unit length": ["--unit-profiles"]},
        "pair classifier": {
            "of the absolute difference": ["--pair-classifier", "absolute"],
            "affine": ["--pair-classifier", "affine"],
        },
        "pair classifier's width": {value: ["--hidden-dim", value] for value in ("128", "2048")},
        "pair classifier's learning rate": {"× 20": ["--pair-lr-mult", "20"]},
        "order of a pair": {"one": ["--one-order"]},
        "positive pairs": {"of any cameras": ["--any-camera"]},
    },
    "CASN": {
        "what L_ia trains, with L_sa": {"network": ["--ia-trains", "network"]},
        "λ2, with L_ia": {"0.5": ["--lambda-sa", "0.5"]},
        "pair classifier's learning rate, with L_ia": {"× 20": ["--pair-lr-mult", "20"]},
    },
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
    add("--only", nargs="+", help="rows of the table, or choices, e.g. 'CASN(IDE)', λ2, 'λ2: 0.5'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--family", choices=FAMILIES, default="IDE", help="whose rows --study choices varies")
    add("--max-epoch", type=int, help="epochs to train, by default as train_casn_pcb.py")
    add(
        "--report", type=Path, metavar="FILE.md", help="write what --results holds, and run nothing"
    )
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
    only = set(args.only or ())
    unknown = only.difference(*map(names_of, args.settings))
    if unknown:
        names = sorted({run["name"] for run in args.settings})
        parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    if only:
        args.settings = [run for run in args.settings if only & names_of(run)]
    return args


def names_of(run: dict[str, Any]) -> set[str]:
    """Returns what --only may call a run.

    Example:
        >>> sorted(names_of({"name": "λ2", "value": "0.5"}))
        ['λ2', 'λ2: 0.5']
    """
    return {run["name"], f"{run['name']}: {run['value']}"}


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
        rows += [
            (choice, value, args.family, _lambdas(losses) + options)
            for losses, choice, value, options in all_choices()
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


def all_choices() -> Iterator[tuple[str, str, str, list[str]]]:
    """Yields the losses of the row that is varied, the choice, its value and their options."""
    for losses, choices in CHOICES.items():
        for choice, values in choices.items():
            for value, options in values.items():
                yield losses, choice, value, options


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


@contextlib.contextmanager
def scaled_by_range() -> Iterator[None]:
    """Scales maps to [0, 1] by their least and greatest value, not by the greatest alone.

    The map that becomes a mask is so scaled, and the profile of greatest values of the rows, in
    training and ranking. It is no option of the package: it is measured here alone.
    """

    def by_range(maps: Tensor) -> Tensor:
        return scale_maps(maps - maps.amin((-2, -1), keepdim=True))

    def profiles(maps: Tensor) -> Tensor:
        return by_range(maps.float().amax(-1, keepdim=True))[..., 0]

    with (
        patch("casn_plugin.attention.scale_maps", by_range),
        patch("casn_plugin.losses.row_profiles", profiles),
        patch("casn_plugin.ranking.scale_maps", by_range),
    ):
        yield


def run_one(run: dict[str, Any], file: Path, log: Path) -> None:
    """Trains and measures one model, and writes its JSON file."""
    options = train.parse_args(run["argv"])
    for path in (file, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        open(log, "w", buffering=1) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        tempfile.TemporaryDirectory() as folder,
        scaled_by_range() if run["value"] == "by range" else contextlib.nullcontext(),
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
        "settings": training_settings(options),
        "results": results,
        "history": engine.history,
        "seconds": {"training": trained - started, "measuring": time.perf_counter() - trained},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchreid", "numpy")},
        },
    }
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rounded(done), indent=1) + "\n")
    temporary.replace(file)


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of train_casn_pcb.py that a model depends on."""
    other = ("root", "save_dir", "resume", "test_only", "visrank", "rerank", "device", "workers")
    other += ("gallery_dir",)
    kept = {key: value for key, value in vars(options).items() if key not in other}
    return kept | {"weights": Path(options.weights).name}


def is_done(file: Path, run: dict[str, Any]) -> bool:
    """Returns whether a run has its JSON file.

    Raises:
        SystemExit: it was made with other settings.
    """
    if not file.is_file():
        return False
    made = json.loads(file.read_text())["settings"]
    wanted = training_settings(train.parse_args(run["argv"]))
    unlike = [
        f"{key} {made[key]}, not {wanted[key]}"
        for key in wanted
        if key in made and made[key] != wanted[key]  # an option that came later has its default
    ]
    if unlike:
        raise SystemExit(
            f"{file} was made with {'; '.join(unlike)}: move it away, or name another folder with "
            "--results"
        )
    return True


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
    query, *query_ids = encode(model, loaders["query"])
    gallery, *gallery_ids = encode(model, loaders["gallery"])
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
    fusion = {
        reading: {
            weight: ranking(
                fuse_distmats(*both, normalization=reading, attention_weight=weight), ids
            )
            for weight in WEIGHTS
        }
        for reading, both in pairs.items()
    }
    scores = same_identity_distmat(model, query, gallery)
    size = engine.datamanager.height, engine.datamanager.width
    masks = [masks_of(loaders[part].dataset, size) for part in ("query", "gallery")]
    return {
        "features": ranking(features, ids),
        "attention": ranking(pairs[engine.normalization][1], ids),
        "fused": fusion[engine.normalization][engine.attention_weight],
        "auc": verification_auc(scores[counted][None], same[counted][None]),
        "feature_auc": verification_auc(-pairs["unit"][0][counted][None], same[counted][None]),
        "fusion": {
            reading: {str(weight): [of["rank1"], of["mAP"]] for weight, of in by_weight.items()}
            for reading, by_weight in fusion.items()
        },
        "quality": {
            "identification": identification_quality(engine, loaders, masks, same, counted),
            "siamese": siamese_quality(engine, masks, query, gallery, same & counted)
            | vars(attention_consistency(raw[counted], same[counted])),
        },
    }


def encode(model: CASN, loader: DataLoader[Any]) -> tuple[Encoding, Tensor, Tensor]:
    """Returns the encodings of a loader's images, their pids and camids."""
    batches = ((batch["img"], batch["pid"], batch["camid"]) for batch in loader)
    encoding, pids, camids = encode_batches(model, batches)
    return encoding, torch.from_numpy(pids), torch.from_numpy(camids)


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
    engine: ImageCASNEngine,
    loaders: dict[str, DataLoader[Any]],
    masks: list[Tensor | None],
    same: Tensor,
    counted: Tensor,
) -> dict[str, Any]:
    """Returns the quality of the Grad-CAM maps of each image's highest scoring identity.

    The people of the test set are none that the classifier knows: it is the one most alike.
    """
    maps = {part: class_maps(engine.casn, loaders[part]) for part in ("query", "gallery")}
    threshold = engine.siamese.threshold
    profiles = [align_profiles(row_profiles(each), threshold) for each in maps.values()]
    distances = torch.cdist(*profiles)
    found = vars(attention_consistency(distances[counted], same[counted]))
    if masks[0] is None or masks[1] is None:
        return found
    return quality(torch.cat(list(maps.values())), torch.cat(masks), engine) | found


def class_maps(model: CASN, loader: DataLoader[Any]) -> Tensor:
    """Returns the Grad-CAM maps of the highest scoring identity, with BatchNorm in eval mode."""
    model, maps = copy.deepcopy(model).requires_grad_(False).eval(), []
    model.training = model.backbone.training = True  # so that logits are given
    device = next(model.parameters()).device
    for batch in loader:
        output = model(batch["img"].to(device))
        logits = output.logits if isinstance(output.logits, Tensor) else sum(output.logits)
        scores = identity_scores(output.logits, logits.argmax(1))
        maps.append(grad_cam(scores, output.activations, create_graph=False).detach().cpu())
    return torch.cat(maps)


def siamese_quality(
    engine: ImageCASNEngine,
    masks: list[Tensor | None],
    query: Encoding,
    gallery: Encoding,
    positive: Tensor,
) -> dict[str, Any]:
    """Returns the quality of the maps of each query and one random match of another camera."""
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
    todo = [run for run in args.settings if not is_done(file_of(args, run), run)]
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


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs of each folder of results.

    Raises:
        SystemExit: there are none.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        runs.setdefault(file.parent.name, []).append(json.loads(file.read_text()))
    if not runs:
        raise SystemExit(f"there are no results in {folder}: expected <data set>/<run>.json")
    return runs


def spread(values: list[float | None], sign: bool = False, scale: float = 100) -> str:
    """Returns mean ± sample standard deviation of what is known, in percent.

    Example:
        >>> spread([0.5, 0.6]), spread([0.5], sign=True), spread([None])
        ('55.0 ± 7.1', '+50.0', '–')
    """
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    digits = 1 if scale == 100 else 2
    mean = f"{np.mean(known):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else mean


def higher(found: list[float]) -> str:
    """Returns how many differences are above zero, of how many.

    Example:
        >>> higher([0.1, -0.1, 0.0])
        '1 of 3'
    """
    return f"{sum(each > 0 for each in found)} of {len(found)}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_row(runs: list[dict[str, Any]], name: str, value: str = "") -> dict[int, dict[str, Any]]:
    """Returns the runs of one row by their seeds; those that diverged have no results."""
    return {run["seed"]: run for run in runs if (run["name"], run["value"]) == (name, value)}


def results_of(row: dict[int, dict[str, Any]], *keys: str | int) -> list[float | None]:
    """Returns one number of each run of a row, None where it diverged or there is none."""
    found = []
    for seed in sorted(row):
        value = row[seed]["results"]
        for key in keys:
            try:
                value = None if value is None else value[key]
            except (KeyError, IndexError):
                value = None
        found.append(value)
    return found


def rank1_and_map(row: dict[int, dict[str, Any]], kind: str) -> str:
    """Returns a cell of rank-1 / mAP; "unit" is the features of unit length."""
    keys = [("fusion", "unit", "0.0", at) for at in (0, 1)]
    if kind != "unit":
        keys = [(kind, key) for key in ("rank1", "mAP")]
    return " / ".join(spread(results_of(row, *key)) for key in keys)


def differences(
    row: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], *keys: str
) -> list[float]:
    """Returns a row's difference to the baseline of each seed that both have."""
    seeds = [seed for seed in row if seed in baseline]
    pairs = [
        results_of({seed: row[seed]}, *keys) + results_of({seed: baseline[seed]}, *keys)
        for seed in seeds
    ]
    return [one - other for one, other in pairs if one is not None and other is not None]


def names_in(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns (family, row of the table) of all there are, in the order of the table."""
    there = {run["name"] for run in runs}
    named = [(family, name_of(family, losses)) for family in FAMILIES for losses in LAMBDAS]
    return [(family, name) for family, name in named if name in there]


def protocol(runs: list[dict[str, Any]]) -> str:
    """Returns a sentence on how the runs were trained, from their settings."""
    s = runs[0]["settings"]
    backbones = sorted({run["settings"]["backbone"] for run in runs})
    versions = sorted({f"PyTorch {run['versions']['torch']}" for run in runs})
    initial = "from scratch" if s["weights"] == "none" else f"from {s['weights']}"
    minutes = [sum(run["seconds"].values()) / 60 for run in runs]
    return (
        f"{', '.join(backbones)} {initial}, {s['height']}x{s['width']}, {s['optim'].upper()} with "
        f"learning rate {s['lr']}, divided by 10 after {s['stepsize']} of {s['max_epoch']} epochs, "
        f"batches of {s['batch_size'] // 2} pairs; runs: {len(runs)}, of {np.mean(minutes):.0f} "
        f"minutes on average; {', '.join(versions)}."
    )


def table_report(data: str, runs: list[dict[str, Any]], images: Path) -> list[str]:
    """Returns the paragraphs on one data set, and draws its plot."""
    rows = {name: of_row(runs, name) for _, name in names_in(runs)}
    base = {name: rows.get(family, {}) for family, name in names_in(runs)}
    rankings = ("features", "unit", "attention", "fused")
    results, paired, attention, fusion = [], [], [], []
    for name, row in rows.items():
        cells = [rank1_and_map(row, kind) for kind in rankings]
        inp = spread(results_of(row, "features", "mINP"))
        auc = spread(results_of(row, "auc"), scale=1)
        pairs = zip(
            results_of(row, "fused", "mAP"),
            results_of(row, "fusion", "unit", "0.0", 1),
            strict=True,
        )
        gain = [one - other for one, other in pairs if one is not None and other is not None]
        results.append([name, str(len(row)), *cells, spread(gain, sign=True), inp, auc])
        if row is not base[name]:
            found = [
                differences(row, base[name], kind, key)
                for kind in ("features", "fused")
                for key in ("rank1", "mAP")
            ]
            paired.append(
                [
                    name,
                    str(len(found[1])),
                    *(spread(values, sign=True) for values in found),
                    higher(found[1]),
                ]
            )
        for kind in ("identification", "siamese"):
            measures = ("energy", "iou", "pointing", "coverage", "blank")
            distances = ("same", "different", "auc")
            attention.append(
                [name, kind]
                + [spread(results_of(row, "quality", kind, key)) for key in measures]
                + [spread(results_of(row, "quality", kind, key), scale=1) for key in distances]
            )
        for reading in ("unit", "query", "global"):
            cells = []
            for weight in WEIGHTS:
                shares = [
                    run["results"]["fusion"][reading][str(weight)]
                    for run in row.values()
                    if run["results"]
                ]
                means = np.mean(shares, axis=0) * 100 if shares else (np.nan, np.nan)
                cells.append(f"{means[0]:.1f} / {means[1]:.1f}")
            fusion.append([name, reading, *cells])
    picture, curves = images / f"ablation_{data}.png", images / f"training_{data}.png"
    plot_table(rows, picture)
    plot_training(runs, curves)
    return [
        f"## {TITLES.get(data, data)}",
        protocol(runs),
        "Rank-1 / mAP in percent, mean ± sample standard deviation over n seeds. “Unit” is the "
        "features of unit length, which are what is fused; “gain” is what fusion adds to their "
        "mAP:",
        markdown(["", "n", *rankings, "gain", "mINP, features", "pair AUC"], results),
        f"![Rank-1 and mAP of every run]({images.name}/{picture.name})",
        "Difference to the same seed of the row without attention losses, in points; the last "
        "column counts the seeds whose mAP of the features is higher:",
        markdown(
            ["", "n", "features, rank-1", "features, mAP", "fused, rank-1", "fused, mAP", "higher"],
            paired,
        ),
        "Training, epoch by epoch, means over seeds; L_bce of chance is ln 2 = 0.69:",
        f"![Accuracy and loss terms over the epochs]({images.name}/{curves.name})",
        "### Attention on the person masks of the test set",
        "“identification” is Grad-CAM of each image's highest scoring training identity, "
        "“siamese” the attention of each query and a random match of another camera. Energy on "
        "the person, intersection over union, peaks on the person, rows of the body attended, and "
        "blank maps in percent; attention distance of same and of different identities over all "
        "query-gallery pairs, and its ROC AUC:",
        markdown(
            ["", "attention", "energy", "IoU", "peak", "rows", "blank", "same", "different", "AUC"],
            attention,
        ),
        "### Readings of “normalized and summed”",
        "Rank-1 / mAP of the fused ranking by the weight of the attention distance, means over "
        "seeds. Weight 0 is the features alone: of unit length with “unit”, as they are with the "
        "others.",
        markdown(["", "reading", *map(str, WEIGHTS)], fusion),
    ]


def summary(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Returns one table of all data sets: features, fused, and what the losses change."""
    named = names_in([run for group in tables.values() for run in group])
    head, rows = [""], [[name] for _, name in named]
    for data, group in tables.items():
        head += [f"{data}: n", "features", "fused", "mAP of features, difference"]
        for (family, name), cells in zip(named, rows, strict=True):
            row = of_row(group, name)
            found = differences(row, of_row(group, family), "features", "mAP")
            better = f" ({higher(found)} higher)"
            cells += [str(len(row)), rank1_and_map(row, "features"), rank1_and_map(row, "fused")]
            cells += [spread(found, sign=True) + better if found and name != family else "–"]
    return markdown(head, rows)


def choices_report(
    data: str, runs: list[dict[str, Any]], table: list[dict[str, Any]], images: Path
) -> list[str]:
    """Returns the paragraphs on the open choices, and draws their plot."""
    family = runs[0]["family"]
    rows, points = [], {}
    for losses, choice, value, _ in all_choices():
        row, name = of_row(runs, choice, value), name_of(family, losses)
        if not row:
            continue
        base = of_row(table, name)
        found = [
            differences(row, base, kind, key)
            for kind, key in (
                ("features", "rank1"),
                ("features", "mAP"),
                ("attention", "mAP"),
                ("fused", "mAP"),
            )
        ]
        diverged = sum(run["results"] is None for run in row.values())
        points[f"{name}, {choice}: {value}"] = found[1]
        rows.append(
            [
                name,
                choice,
                value,
                str(len(row)),
                *(spread(each, sign=True) for each in found),
                higher(found[1]),
                spread(differences(row, base, "auc"), sign=True, scale=1),
                str(diverged),
            ]
        )
    picture = images / f"choices_{data}.png"
    plot_choices(points, picture)
    head = ["row", "choice", "value", "n"]
    head += ["features, rank-1", "features, mAP", "attention, mAP", "fused, mAP", "higher"]
    return [
        f"## Open choices, rows of {family}: {TITLES.get(runs[0]['data'], runs[0]['data'])}",
        "One choice changed at a time; difference to the same row of the table, with the defaults "
        "and the same seed, in points (the pair classifier's AUC: as a share), mean ± sample "
        "standard deviation; “higher” counts the seeds whose mAP of the features is. "
        + protocol(runs),
        markdown([*head, "pair AUC", "diverged"], rows),
        f"![Difference in mAP of each choice]({images.name}/{picture.name})",
    ]


def plot_table(rows: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draws rank-1 and mAP of every run, with mean and standard deviation of each row."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    for axis, key, label in zip(
        figure.subplots(1, 2), ("rank1", "mAP"), ("rank-1 (%)", "mAP (%)"), strict=True
    ):
        for shift, kind in ((-0.15, "features"), (0.25, "fused")):
            for at, row in enumerate(rows.values()):
                values = [100 * share for share in results_of(row, kind, key) if share is not None]
                if not values:
                    continue
                axis.plot([at + shift - 0.1] * len(values), values, "o", color=COLOURS[kind],
                          alpha=0.6, markersize=4, markeredgewidth=0)  # fmt: skip
                deviation = np.std(values, ddof=1) if len(values) > 1 else 0
                axis.errorbar(at + shift, np.mean(values), deviation, fmt="_", capsize=3,
                              color=COLOURS[kind], label=kind if at == 0 else None)  # fmt: skip
        axis.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def plot_training(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws accuracy and loss terms over the epochs, the mean and the range of each row's runs."""
    terms = {
        "acc": "training accuracy (%)",
        "loss_ia": "L_ia",
        "loss_bce": "L_bce",
        "attention_distance": "attention distance",
    }
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=100)
    axes, lines = figure.subplots(1, len(terms)), {}
    for family, line in zip(FAMILIES, ("-", "--"), strict=True):
        for number, losses in enumerate(LAMBDAS):
            name = name_of(family, losses)
            histories = [run["history"] for run in of_row(runs, name).values()]
            for axis, term in zip(axes, terms, strict=True):
                if not any(term in entry for history in histories for entry in history):
                    continue
                values = np.array(
                    [[entry.get(term) for entry in history] for history in histories], dtype=float
                )
                epochs = np.arange(1, values.shape[1] + 1)
                (lines[name],) = axis.plot(epochs, values.mean(0), line, color=f"C{number}")
                least, greatest = values.min(0), values.max(0)
                axis.fill_between(epochs, least, greatest, color=f"C{number}", alpha=0.12)
    for axis, label in zip(axes, terms.values(), strict=True):
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def plot_choices(points: dict[str, list[float]], path: Path) -> None:
    """Draws the paired difference in mAP of the features of each choice."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(points)), layout="constrained", dpi=100)
    axis = figure.subplots()
    for at, values in enumerate(points.values()):
        shares = [100 * value for value in values]
        if not shares:
            continue
        axis.plot(shares, [at - 0.2] * len(shares), "o", color=COLOURS["features"], alpha=0.6,
                  markersize=4, markeredgewidth=0)  # fmt: skip
        deviation = np.std(shares, ddof=1) if len(shares) > 1 else 0
        axis.errorbar(np.mean(shares), at, xerr=deviation, fmt="|", capsize=3,
                      color=COLOURS["features"])  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(points)), list(points))
    axis.invert_yaxis()
    axis.set_xlabel("difference in mAP of the features (points)")
    axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})


def write_report(document: Path, folder: Path) -> None:
    """Writes the document and its plots from the JSON files alone."""
    images, runs = document.parent / "images", load(folder)
    images.mkdir(parents=True, exist_ok=True)
    paragraphs = [
        "# Results",
        "Made by `python examples/ablation.py --report` from the JSON files in "
        f"`{folder.name}/`, one a run; nothing here is typed. All rows of a family have the same "
        "budget, the same initial weights and the same pairs for a seed. λ1 is 0.5 and λ2 0.05, as "
        "in the paper, where a loss is on. What is fused is normalised and weighted as the engine "
        "does by default; pair AUC is that of the pair classifier on people it has not seen, 0.5 = "
        "chance, and untrained where λ2 is 0: then its attention is random.",
    ]
    tables = {data: group for data, group in runs.items() if group[0]["study"] == "table"}
    if tables:
        paragraphs += ["## All rows", "Rank-1 / mAP in percent:", summary(tables)]
    for data, group in runs.items():
        if data in tables:
            paragraphs += table_report(data, group, images)
        else:
            paragraphs += choices_report(data, group, runs.get(group[0]["data"], []), images)
    document.write_text("\n\n".join(paragraphs) + "\n")
    print(f"Wrote {document}, from {sum(map(len, runs.values()))} runs")


def main(argv: list[str] | None = None) -> None:
    """Runs what the options name, or writes the report."""
    args = parse_args(argv)
    if args.report:
        write_report(args.report, args.results)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
