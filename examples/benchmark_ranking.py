#!/usr/bin/env python
r"""Measures attention-fused ranking: speed, exactness, memory, processes, evaluation.

Everything is compared within one run on one machine, interleaved, as medians. Prints tables in
Markdown, and saves them with a plot of the memory to --save-dir.

    python examples/benchmark_ranking.py                       # all but "quality": a quarter hour
    python examples/benchmark_ranking.py --only speed memory
    python examples/benchmark_ranking.py --only quality \
        --checkpoint log/casn_pcb/model/model.pth.tar-10
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin import CASN, PairClassifier, attention_distmat, fuse_distmats, rank_gallery
from casn_plugin.attention import attention_distance, row_profiles, siamese_attention, split_pairs
from casn_plugin.encoding import Encoding, encode_head, part_embedding
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.index import GalleryIndex
from casn_plugin.ranking import indicator_flips

SECTIONS = ("speed", "exactness", "memory", "processes", "evaluation", "quality")
HIDDEN = 512
BUDGET = 64 * 2**20
MARKET = 3368, 19732  # queries, gallery images of Market-1501


class Head(nn.Module):
    """A head of a backbone and the size of its maps, with a pair classifier: all ranking needs."""

    def __init__(
        self, size: tuple[int, int, int], dim: int, function: Any, channels: int | None = None
    ) -> None:
        super().__init__()
        self.size, self.dim, self.function = size, dim, function
        self.channels = channels or size[0]  # that a map is a sum of: OSNet's basis has more
        self.pair_classifier = PairClassifier(dim, HIDDEN)

    def activations(self, images: int, device: str = "cpu") -> Tensor:
        """Returns random maps that are zero at half of their places."""
        maps = torch.randn(images, *self.size, device=device).relu()
        return maps * torch.rand(images, self.size[0], 1, 1, device=device)

    def encode(self, images: int, device: str = "cpu") -> Encoding:
        """Returns the encoding of random maps, made in portions."""
        parts = []
        for start in range(0, images, 64):
            maps = self.activations(min(64, images - start), device).requires_grad_()
            parts.append(encode_head(self.function(maps), maps))
        return Encoding.cat(parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of a pair: α by one product, and two maps."""
        return 2 * HIDDEN * self.dim + 2 * 2 * self.channels * self.size[1] * self.size[2]


def make_head(name: str) -> Head:
    """Returns the head of a benchmark: global average pooling, PCB's parts, OSNet's two layers."""
    torch.manual_seed(0)
    if name == "GAP":
        return Head((2048, 18, 9), 2048, lambda maps: maps.mean((2, 3)))
    if name == "PCB":
        return Head((2048, 24, 8), 12288, lambda maps: part_embedding(maps, 6))
    layers = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU()).eval()
    return Head((128, 16, 8), 512, lambda maps: layers.to(maps)(maps.mean((2, 3))), 512)


def autograd_distances(head: Head, first: Tensor, second: Tensor) -> Tensor:
    """Returns attention distances of pairs of maps by differentiating every pair."""
    maps = torch.stack([first, second], 1).flatten(0, 1).requires_grad_()
    attention = siamese_attention(
        head.pair_classifier, head.function(maps), maps, create_graph=False
    )
    return attention_distance(*split_pairs(row_profiles(attention.detach())))


def clock(function: Callable[[], Any], device: str) -> float:
    """Returns the seconds that a function takes, its work on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: str, desc: str
) -> dict[str, float]:
    """Returns the median seconds of each function; they take turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(repeats + 1), desc=desc, leave=False, disable=None):
        for name, function in functions.items():
            seconds = clock(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(some) for name, some in times.items()}


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def speed(args: argparse.Namespace) -> str:
    """Returns pairs/s of autograd and of ranking beside what the machine's GEMM rate allows."""
    header = ["Head", "What", "Pairs/s", "Of allowed", "× batched autograd", "Market-1501"]
    rows = [row for name in args.heads for row in speed_of(name, args)]
    return table(f"Speed ({args.device})", header, rows)


def speed_of(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Returns the rows of one head."""
    device, cuda = args.device, args.device == "cuda"
    side, scale = (8192, 8 * args.scale) if cuda else (2048, args.scale)
    head = make_head(name).to(device)
    sizes = {"GAP": (256, 256), "PCB": (256, 192), "OSNet": (512, 512)}[name]
    query, gallery = (head.encode(int(scale * size), device) for size in sizes)
    first, second = head.activations(16, device), head.activations(16, device)
    pairs = {"autograd, one pair at a time": 4, "autograd, batches of 16 pairs": 16}

    def one_at_a_time() -> None:
        for i in range(4):
            autograd_distances(head, first[i : i + 1], second[i : i + 1])

    def ours(dtype: torch.dtype) -> None:
        precision = dtype if dtype.itemsize == 2 else None
        attention_distmat(head, query, gallery, precision=precision)

    functions: dict[str, Callable[[], Any]] = dict(
        zip(pairs, (one_at_a_time, lambda: autograd_distances(head, first, second)), strict=True)
    )
    halves = [torch.float16, torch.bfloat16] if cuda else [torch.float16]
    for dtype in [torch.float32, *halves]:
        if cuda or dtype == torch.float32:
            square = torch.randn(side, side, device=device, dtype=dtype)
            functions[f"GEMM, {str(dtype)[6:]}"] = partial(torch.mm, square, square)
        functions[f"ours, {str(dtype)[6:]}"] = partial(ours, dtype)
        pairs[f"ours, {str(dtype)[6:]}"] = len(query) * len(gallery)
    seconds = interleaved(functions, args.repeats, device, name)
    rows = []
    batched = 16 / seconds["autograd, batches of 16 pairs"]
    allowed = 0.0
    for key, each in seconds.items():
        if key.startswith("GEMM"):
            rate = 2 * side**3 / each
            allowed = rate / head.flops
            key = f"{key}: {rate / 1e9:,.0f} GFLOP/s allow"
        speed = pairs[key] / each if key in pairs else allowed
        whole = MARKET[0] * MARKET[1] / speed
        rows.append([
            name, key, f"{speed:,.0f}",
            f"{speed / allowed:.2f}" if key.startswith("ours") else "",
            f"{speed / batched:,.1f}",
            f"{whole:,.1f} s" if whole < 3600 else f"{whole / 3600:,.1f} h",
        ])  # fmt: skip
    return rows


def exactness(args: argparse.Namespace) -> str:
    """Returns how far float32 and less are from float64 autograd and from float64 ranking."""
    rows = []
    for name in args.heads:
        head = make_head(name)
        maps = head.activations(24).double()
        head.double()
        expected = torch.stack(
            [autograd_distances(head, each.expand(16, -1, -1, -1), maps[8:]) for each in maps[:8]]
        )  # fmt: skip
        leaf = maps.clone().requires_grad_()
        encoding = encode_head(head.function(leaf), leaf)
        for what in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            images = encoding if what == torch.float64 else encoding.to(torch.float32)
            head.to(images.features.dtype).to(args.device)
            precision = what if what.itemsize == 2 else None
            found = attention_distmat(head, images[:8], images[8:], precision=precision)
            flips, number = indicator_flips(head, images[:8], images[8:], precision=precision)
            off = (found.double() - expected).abs()
            rows.append([
                name, str(what)[6:], f"{flips:,} of {number:,}",
                f"{off.median():.1e}", f"{off.max():.1e}",
            ])  # fmt: skip
            head.cpu().double()
    header = ["Head", "Arithmetic", "Indicators flipped", "Distance off, median", "largest"]
    return table(f"Exactness, 128 pairs against autograd in float64 ({args.device})", header, rows)


class Peak:
    """Watches the memory of this process that is not a mapped file: what can't be dropped."""

    def __enter__(self) -> "Peak":
        """Starts to watch."""
        self.start, self.peak, self.done = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Looks again and again, in a thread."""
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now() - self.start)

    def __exit__(self, *_: object) -> None:
        """Stops to watch."""
        self.done.set()
        self.thread.join()

    @staticmethod
    def now() -> int:
        """Returns bytes of anonymous memory (Linux)."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def pooled_forward(net: nn.Module, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features that are also taken for logits."""
    features = net(imgs).mean((2, 3))
    return features, features


def peak_of(folder: str, function: Callable[..., Any], device: str) -> dict[str, float]:
    """Returns the peak memory, in MiB, of ranking an index in this process."""
    head = Head((512, 16, 8), 512, lambda maps: maps.mean((2, 3))).to(device)
    index = GalleryIndex(folder, verify=False)
    query = index[:64]  # from the file too: no memory used before the measurement
    function(head, query[:2], query[:2])  # what libraries keep for themselves
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Peak() as watch:
        function(head, query, index, max_memory=BUDGET)
    peaks = {"of the host": watch.peak / 2**20}
    if device == "cuda":
        peaks["of the device"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def memory(args: argparse.Namespace) -> str:
    """Returns the peak memory as the gallery grows, and saves a plot of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, curves = [], {}
    backbone = nn.Sequential(nn.Conv2d(3, 512, 3, stride=16, padding=1))
    model = CASN(backbone, forward=pooled_forward, input_size=(256, 128))
    torch.manual_seed(0)
    head = Head((512, 16, 8), 512, lambda maps: maps.mean((2, 3)))
    with tempfile.TemporaryDirectory() as folder:
        index = GalleryIndex.create(folder, model)
        for times in tqdm((1, 4, 16), desc="memory", leave=False, disable=None):
            while len(index) < 256 * times:
                index.add(head.encode(256))
            size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
            curves.setdefault("the gallery itself, on disk", []).append(size)
            row = [f"{len(index):,}", f"{size:,.0f} MiB"]
            for function in (attention_distmat, rank_gallery):
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory as new
                    peaks = pool.apply(peak_of, (folder, function, args.device))
                for where, peak in peaks.items():
                    curves.setdefault(f"{function.__name__}, {where}", []).append(peak)
                row.append(", ".join(f"{peak:,.0f} MiB {where}" for where, peak in peaks.items()))
            rows.append(row)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), marker in zip(curves.items(), "osd^v", strict=False):
        axes.plot([256, 1024, 4096], values, marker=marker, label=name)
    axes.axhline(BUDGET / 2**20, color="black", linestyle=":", label="max_memory")
    axes.set(xscale="log", yscale="log", xlabel="gallery images", ylabel="peak memory (MiB)")
    axes.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize="small")
    axes.set_title(f"Peak memory of ranking an index on disk, 64 queries ({args.device})")
    figure.savefig(Path(args.save_dir) / f"ranking_memory_{args.device}.png", dpi=110)
    header = ["Gallery images", "On disk", "attention_distmat", "rank_gallery, top 10"]
    return table(
        f"Peak memory beside the model, max_memory {BUDGET >> 20} MiB ({args.device})", header, rows
    )


def ranked(distributed: bool, scale: float) -> tuple[Tensor, Any, float, float]:
    """Returns the distances, the ranking and the seconds of both, alone or as one of several."""
    head = make_head("GAP")
    query, gallery = head.encode(int(64 * scale)), head.encode(int(1024 * scale))
    attention_distmat(head, query[:4], gallery[:32])
    options: dict[str, Any] = {"distributed": distributed, "max_memory": 2**27}
    if distributed:
        dist.barrier()
    start = time.perf_counter()
    distmat = attention_distmat(head, query, gallery, **options)
    middle = time.perf_counter()
    found = rank_gallery(head, query, gallery, **options)
    return distmat, found, middle - start, time.perf_counter() - middle


def processes(args: argparse.Namespace) -> str:
    """Returns the speed of one process and of two, and whether they agree bit for bit."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world, threads in ((1, 1), (1, 2), (2, 1)):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            path = Path(folder) / f"{world}-{threads}.pt"
            subprocess.run(
                [
                    sys.executable,
                    *launch,
                    __file__,
                    "--worker",
                    str(path),
                    "--scale",
                    str(args.scale),
                ],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                check=True,
            )
            results[world, threads] = torch.load(path, weights_only=False)
    rows, alone = [], results[1, 1]
    for (world, threads), (distmat, found, first, second) in results.items():
        same = torch.equal(distmat, alone[0]) and all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(vars(found).values(), vars(alone[1]).values(), strict=True)
        )
        rows.append([
            str(world), str(threads), f"{distmat.numel() / first:,.0f}", f"{alone[2] / first:.2f}",
            f"{second:.2f} s", f"{alone[3] / second:.2f}", "yes" if same else "no",
        ])  # fmt: skip
    header = [
        "Processes",
        "Threads each",
        "Pairs/s, all pairs",
        "×",
        "Top 10",
        "×",
        "Equal bit for bit",
    ]
    queries, galleries = alone[0].shape
    return table(f"Processes (gloo, GAP, {queries} × {galleries:,} pairs)", header, rows)


def worker(path: str, scale: float) -> None:
    """Ranks as one of the processes of :func:`processes`."""
    dist.init_process_group("gloo")
    result = ranked(dist.get_world_size() > 1, scale)
    if dist.get_rank() == 0:
        torch.save(result, path)
    dist.destroy_process_group()


def evaluation(args: argparse.Namespace) -> str:
    """Returns the time of CMC and mAP of a matrix of Market-1501's size beside torchreid's."""
    import torchreid

    rng = np.random.default_rng(0)
    ids = [rng.integers(0, high, n) for high in (750, 6) for n in MARKET]
    distmat = torch.rand(*MARKET)
    there = distmat.to(args.device)
    ours = [clock(lambda: evaluate_rank(there, *ids), args.device) for _ in range(args.repeats)]
    start = time.perf_counter()
    cmc, mean_ap = torchreid.metrics.evaluate_rank(distmat.numpy(), *ids)
    theirs = time.perf_counter() - start
    ours += [clock(lambda: evaluate_rank(there, *ids), args.device) for _ in range(args.repeats)]
    seconds, found = statistics.median(ours), evaluate_rank(there, *ids)
    equal = "equal" if np.array_equal(found.cmc, cmc) else "NOT EQUAL"
    off = abs(found.mean_ap - mean_ap)
    rows = [
        ["torchreid", f"{theirs:.1f} s", "1"],
        ["ours, with mINP", f"{seconds:.2f} s", f"{theirs / seconds:.0f}"],
    ]
    title = (
        f"Evaluation of 3,368 × 19,732 distances ({args.device}): CMC {equal}, mAP off by {off:.0e}"
    )
    return table(title, ["What", "Time", "× torchreid"], rows)


def quality(args: argparse.Namespace) -> str:
    """Returns what shortlists and reduced precision cost a trained model on the embedded set."""
    import torchreid
    import train_casn_pcb as example

    options = example.parse_args(["--resume", args.checkpoint, "--device", args.device])
    with contextlib.redirect_stdout(io.StringIO()):
        manager = torchreid.data.ImageDataManager(
            sources=options.sources, height=options.height, width=options.width,
            batch_size_test=64, workers=0, use_gpu=False,
        )  # fmt: skip
    model = example.build_model(options, manager.num_train_pids)
    model.load_state_dict(torch.load(args.checkpoint, weights_only=True)["state_dict"])
    sides = []
    for loader in manager.test_loader[options.sources[0]].values():
        batches = list(loader)
        encoding = Encoding.cat(
            [model.encode(each["img"].to(args.device)).to("cpu") for each in batches]
        )
        sides.append(
            (encoding, *(torch.cat([each[key] for each in batches]) for key in ("pid", "camid")))
        )
    (query, q_pids, q_camids), (gallery, g_pids, g_camids) = sides
    features = torch.cdist(*(nn.functional.normalize(each.features) for each in (query, gallery)))

    rows: list[list[str]] = []

    def row(name: str, fused: Tensor, share: float, seconds: float) -> None:
        found = evaluate_rank(fused, q_pids, g_pids, q_camids, g_camids)
        rows.append([
            name, f"{share:.1%}", f"{seconds:.2f} s", f"{found.cmc[0]:.2%}", f"{found.mean_ap:.2%}",
        ])  # fmt: skip

    def fuse(**kwargs: Any) -> tuple[Tensor, float]:
        start = time.perf_counter()
        attention = attention_distmat(model, query, gallery, unit=True, **kwargs)
        return fuse_distmats(features, attention), time.perf_counter() - start

    row("features alone", features, 0, 0)
    exact, seconds = fuse()
    row("all pairs, float32", exact, 1, seconds)
    for precision in (torch.float16, torch.bfloat16):
        fused, seconds = fuse(precision=precision)
        row(f"all pairs, {str(precision)[6:]}", fused, 1, seconds)
    for topk in (50, 100, 500):
        fused, seconds = fuse(topk=topk)
        row(f"shortlist of {topk}", fused, topk / len(gallery), seconds)
    for topk in (1, 10, 50):
        start = time.perf_counter()
        found = rank_gallery(model, query, gallery, topk=topk)
        seconds = time.perf_counter() - start
        nearest = exact.topk(found.distances.shape[1], largest=False).values
        off = (found.distances - nearest).abs().max()
        rows.append([
            f"exact top {topk}, pruned (off by {off:.0e})",
            f"{found.scored / exact.numel():.1%}", f"{seconds:.2f} s", "", "",
        ])  # fmt: skip
    header = ["Fused ranking", "Pairs compared", "Time", "Rank-1", "mAP"]
    title = f"A trained slim PCB on the embedded set, {len(query)} × {len(gallery)} pairs"
    return table(title, header, rows)


def cpu_name() -> str:
    """Returns what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS[:-1]), help="what to measure")
    add("--heads", nargs="+", choices=("GAP", "PCB", "OSNet"), default=["GAP", "PCB", "OSNet"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, default=5, help="measurements whose median is taken")
    add("--scale", type=float, default=1, help="factor on the numbers of images, for a quick look")
    add("--checkpoint", help="of examples/train_casn_pcb.py's default run, for quality")
    add("--save-dir", default="log/benchmark_ranking", help="where tables and plot go")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if "quality" in args.only and not (args.checkpoint and Path(args.checkpoint).is_file()):
        parser.error("--only quality needs --checkpoint FILE, of examples/train_casn_pcb.py")
    return args


def main(argv: list[str] | None = None) -> list[str]:
    """Measures, prints and saves; returns the tables."""
    warnings.filterwarnings("ignore", message="Cython evaluation")
    args = parse_args(argv)
    if args.worker:
        worker(args.worker, args.scale)
        return []
    save_dir = Path(args.save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    tables = []
    for section in args.only:
        tables.append(globals()[section](args))
        print(tables[-1], flush=True)
        (save_dir / f"{args.device}.md").write_text("\n".join(tables))
    return tables


if __name__ == "__main__":
    main()
