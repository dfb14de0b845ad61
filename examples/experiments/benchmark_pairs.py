#!/usr/bin/env python
r"""Measures what pairs chosen inside of a batch cost beside rows of pairs.

Steps of one network take turns within one run; times are medians: on the CPU of processor time,
which other programs disturb less. Prints a table in Markdown.

    python examples/experiments/benchmark_pairs.py
    python examples/experiments/benchmark_pairs.py --backbones resnet50 --size 256 128 --device cuda
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import torchreid
from benchmark_heads import table
from benchmark_speed import clock

from casn_plugin import CASN, BatchPairs, SiameseAttentionLoss
from casn_plugin.objective import loss_terms

CHOICES: dict[str, SiameseAttentionLoss | None] = {
    "L_ide alone": None,
    "rows of pairs": SiameseAttentionLoss(),
    "chosen, as many as rows": SiameseAttentionLoss(pairs=BatchPairs()),
    "chosen, 64": SiameseAttentionLoss(pairs=BatchPairs(number=64)),
    "all": SiameseAttentionLoss(pairs=BatchPairs("all")),
}


def steps(
    name: str, args: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Returns a training step of each choice, and its number of pairs."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    net = torchreid.models.build_model(name, 751, pretrained=False, use_gpu=args.device == "cuda")
    model = CASN(net, input_size=tuple(args.size)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    imgs = torch.rand(args.batch_size, 3, *args.size, device=device)
    number = torch.arange(args.batch_size)
    balanced, camids = number // 4, number % 4
    rows = torch.where(number % 4 == 3, number, number // 2)  # every other pair of two identities
    counts = {}

    def step(choice: str) -> None:
        siamese = CHOICES[choice]
        pids = (rows if siamese is not None and siamese.pairs == "rows" else balanced).to(device)
        output = model(imgs, pids, None, siamese, camids)
        counts[choice] = 0 if output.same is None else len(output.same)
        loss_ide = F.cross_entropy(output.logits, pids)
        loss, _ = loss_terms(output, pids, loss_ide, siamese=siamese)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {choice: partial(step, choice) for choice in CHOICES}, counts


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, float]:
    """Returns the median seconds of each function; they take turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            seconds = clock(function, device)
            seconds = seconds if device == "cuda" else time.process_time() - start
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(some) for name, some in times.items()}


def choosing(batch_size: int, pairs: BatchPairs, repeats: int = 50) -> float:
    """Returns the seconds in which the pairs of an identity-balanced batch are chosen."""
    number = torch.arange(batch_size)
    start = time.process_time()
    for _ in range(repeats):
        pairs.draw(number // 4, number % 4)
    return (time.process_time() - start) / repeats


def main(argv: list[str] | None = None) -> str:
    """Measures what the options ask for; returns the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["osnet_x0_25", "resnet18"])
    parser.add_argument("--size", nargs=2, type=int, default=[128, 64], help="rows and columns")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    rows = []
    for name in args.backbones:
        functions, counts = steps(name, args)
        memory = {}
        if args.device == "cuda":
            for choice, function in functions.items():
                torch.cuda.reset_peak_memory_stats()
                function()
                memory[choice] = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
        seconds = interleaved(functions, args.repeats, args.device)
        for choice, each in seconds.items():
            siamese, drawn = CHOICES[choice], "0.0 ms"
            if siamese is not None and isinstance(siamese.pairs, BatchPairs):
                drawn = f"{1000 * choosing(args.batch_size, siamese.pairs):.1f} ms"
            rows.append([
                name, choice, str(counts[choice]), f"{1000 * each:,.0f} ms",
                f"{each / seconds['L_ide alone']:.2f}", f"{each / seconds['rows of pairs']:.2f}",
                drawn, *([memory[choice]] if memory else []),
            ])  # fmt: skip
    header = ["Network", "Pairs", "Number", "Step", "× L_ide", "× rows", "of it to choose"]
    size = "x".join(map(str, args.size))
    title = f"Pairs of a batch of {args.batch_size} images of {size} ({args.device})"
    found = table(title, [*header, *(["Peak memory"] if args.device == "cuda" else [])], rows)
    print(found)
    return found


if __name__ == "__main__":
    main()
