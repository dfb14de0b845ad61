"""How fast attention-fused ranking is, how exact, and how fast rankings are evaluated."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchreid
from benchmark_heads import MARKET, autograd_distances, make_head, table
from tqdm import tqdm

from casn_plugin import Compute, attention_distmat
from casn_plugin.basis import encode_head
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.ranked import ranked_lists
from casn_plugin.ranking import indicator_flips


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


def half(dtype: torch.dtype) -> Compute:
    """Returns what rounds to a half precision, and to nothing for others."""
    return Compute(precision=dtype if dtype.itemsize == 2 else None)


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
    sizes = {"GAP": (256, 1024), "PCB": (256, 192), "OSNet": (512, 512)}[name]
    query, gallery = (head.encode(int(scale * size), device) for size in sizes)
    first, second = head.activations(16, device), head.activations(16, device)
    pairs = {"autograd, one pair at a time": 4, "autograd, batches of 16 pairs": 16}

    def one_at_a_time() -> None:
        for i in range(4):
            autograd_distances(head, first[i : i + 1], second[i : i + 1])

    def ours(dtype: torch.dtype) -> None:
        attention_distmat(head, query, gallery, compute=half(dtype))

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
            found = attention_distmat(head, images[:8], images[8:], compute=half(what))
            flips, number = indicator_flips(head, images[:8], images[8:], compute=half(what))
            off = (found.double() - expected).abs()
            rows.append([
                name, str(what)[6:], f"{flips:,} of {number:,}",
                f"{off.median():.1e}", f"{off.max():.1e}",
            ])  # fmt: skip
            head.cpu().double()
    header = ["Head", "Arithmetic", "Indicators flipped", "Distance off, median", "largest"]
    return table(f"Exactness, 128 pairs against autograd in float64 ({args.device})", header, rows)


def evaluation(args: argparse.Namespace) -> str:
    """Returns the time of CMC and mAP, and of lists, at Market-1501's size, beside torchreid's."""
    rng = np.random.default_rng(0)
    sizes = [int(args.scale * number) for number in MARKET]
    ids = [rng.integers(0, high, n) for high in (750, 6) for n in sizes]
    features = torch.rand(*sizes)
    distmat = features + 0.1 * torch.rand(*sizes)
    there = [each.to(args.device) for each in (features, distmat)]
    functions: dict[str, Callable[[], Any]] = {
        "ours, with mINP": partial(evaluate_rank, there[1], *ids),
        "ranked_lists": partial(ranked_lists, *there, *ids),
    }
    start = time.perf_counter()
    cmc, mean_ap = torchreid.metrics.evaluate_rank(distmat.numpy(), *ids)
    theirs = time.perf_counter() - start
    seconds = interleaved(functions, args.repeats, args.device, "evaluation")
    found = functions["ours, with mINP"]()
    equal = "equal" if np.array_equal(found.cmc, cmc) else "NOT EQUAL"
    off = abs(found.mean_ap - mean_ap)
    rows = [["torchreid", f"{theirs:.1f} s", "1", ""]]
    rows += [
        [name, f"{each:.2f} s", f"{theirs / each:.0f}", f"{each / seconds['ours, with mINP']:.2f}"]
        for name, each in seconds.items()
    ]
    title = (
        f"Evaluation of {sizes[0]:,} × {sizes[1]:,} distances ({args.device}): CMC {equal}, "
        f"mAP off by {off:.0e}"
    )
    return table(title, ["What", "Time", "× torchreid", "Of ours"], rows)
