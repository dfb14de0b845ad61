#!/usr/bin/env python
r"""Measures attention-fused ranking: speed, exactness, memory, processes, evaluation, more.

Everything is compared within one run on one machine, interleaved, as medians. Prints tables in
Markdown, and saves them with a plot of the memory to --save-dir.

    python examples/experiments/benchmark_ranking.py             # all but "quality": a quarter hour
    python examples/experiments/benchmark_ranking.py --only speed memory
    python examples/experiments/benchmark_ranking.py --only quality \
        --checkpoint log/casn_pcb/model/model.pth.tar-10
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import protocols
import torch
from benchmark_heads import table
from benchmark_memory import memory
from benchmark_processes import processes
from benchmark_reranking import of_a_trained_model, reranking
from benchmark_speed import evaluation, exactness, half, speed
from torch import Tensor

from casn_plugin import RankingOptions, rank_gallery
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.loading import encode_loader
from casn_plugin.ranking import Distmats, fused_distmats


def quality(args: argparse.Namespace) -> str:
    """Returns what shortlists and reduced precision cost a trained model on the embedded set."""
    model, loaders = protocols.trained(args.checkpoint, args.device)
    query, q_pids, q_camids = encode_loader(model, loaders["query"])
    gallery, g_pids, g_camids = encode_loader(model, loaders["gallery"])
    rows: list[list[str]] = []

    def row(name: str, distmat: Tensor, share: float, seconds: float) -> None:
        found = evaluate_rank(distmat, q_pids, g_pids, q_camids, g_camids)
        rows.append([
            name, f"{share:.1%}", f"{seconds:.2f} s", f"{found.cmc[0]:.2%}",
            f"{found.mean_ap:.2%}",
        ])  # fmt: skip

    def fuse(options: RankingOptions) -> tuple[Distmats, float]:
        start = time.perf_counter()
        found = fused_distmats(model, query, gallery, options=options)
        return found, time.perf_counter() - start

    exact, seconds = fuse(RankingOptions())
    row("features alone", exact.features, 0, 0)
    row("all pairs, float32", exact.fused, 1, seconds)
    for precision in (torch.float16, torch.bfloat16):
        found, seconds = fuse(RankingOptions(compute=half(precision)))
        row(f"all pairs, {str(precision)[6:]}", found.fused, 1, seconds)
    for shortlist in (50, 100, 500):
        found, seconds = fuse(RankingOptions(shortlist=shortlist))
        row(f"shortlist of {shortlist}", found.fused, shortlist / len(gallery), seconds)
    for name, final, seconds in of_a_trained_model(model, query, gallery):
        row(name, final, 1, seconds)
        rows[-1][1] = ""
    model.flip = True
    start = time.perf_counter()
    query_flipped, gallery_flipped = (
        encode_loader(model, loaders[part]).encoding for part in ("query", "gallery")
    )
    found = fused_distmats(model, query_flipped, gallery_flipped)
    seconds = time.perf_counter() - start
    row("features alone, with flip", found.features, 0, 0)
    row("all pairs, with flip, encoding included", found.fused, 1, seconds)
    model.flip = False
    for topk in (1, 10, 50):
        start = time.perf_counter()
        ranked = rank_gallery(model, query, gallery, topk=topk)
        seconds = time.perf_counter() - start
        nearest = exact.fused.topk(ranked.distances.shape[1], largest=False).values
        off = (ranked.distances - nearest).abs().max()
        rows.append([
            f"exact top {topk}, pruned (off by {off:.0e})",
            f"{ranked.scored / exact.fused.numel():.1%}", f"{seconds:.2f} s", "", "",
        ])  # fmt: skip
    header = ["Fused ranking", "Pairs compared", "Time", "Rank-1", "mAP"]
    title = f"A trained slim PCB on the embedded set, {len(query)} × {len(gallery)} pairs"
    return table(title, header, rows)


SECTIONS: dict[str, Callable[[argparse.Namespace], str]] = {
    "speed": speed,
    "exactness": exactness,
    "memory": memory,
    "processes": processes,
    "evaluation": evaluation,
    "reranking": reranking,
    "quality": quality,
}


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
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS)[:-1], help="what to measure")
    add("--heads", nargs="+", choices=("GAP", "PCB", "OSNet"), default=["GAP", "PCB", "OSNet"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, default=5, help="measurements whose median is taken")
    add("--scale", type=float, default=1, help="factor on the numbers of images, for a quick look")
    add("--checkpoint", help="of examples/train_casn_pcb.py's default run, for quality")
    add("--save-dir", default="log/benchmark_ranking", help="where tables and plot go")
    args = parser.parse_args(argv)
    if "quality" in args.only and not (args.checkpoint and Path(args.checkpoint).is_file()):
        parser.error("--only quality needs --checkpoint FILE, of examples/train_casn_pcb.py")
    return args


def main(argv: list[str] | None = None) -> list[str]:
    """Measures, prints and saves; returns the tables."""
    warnings.filterwarnings("ignore", message="Cython evaluation")
    args = parse_args(argv)
    save_dir = Path(args.save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    tables = []
    for section in args.only:
        tables.append(SECTIONS[section](args))
        print(tables[-1], flush=True)
        (save_dir / f"{args.device}.md").write_text("\n".join(tables), encoding="utf-8")
    return tables


if __name__ == "__main__":
    main()
