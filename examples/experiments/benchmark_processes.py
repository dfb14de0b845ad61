"""How fast several processes rank, and whether they agree bit for bit.

Run by torchrun, this file is one of the processes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_heads import make_head, table
from torch import Tensor

from casn_plugin import Compute, attention_distmat, rank_gallery


def ranked(distributed: bool, scale: float) -> tuple[Tensor, dict[str, Any], float, float]:
    """Returns the distances, the ranking and the seconds of both, alone or as one of several."""
    head = make_head("GAP")
    query, gallery = head.encode(int(64 * scale)), head.encode(int(1024 * scale))
    attention_distmat(head, query[:4], gallery[:32])
    compute = Compute(max_memory=2**27, distributed=distributed)
    if distributed:
        dist.barrier()
    start = time.perf_counter()
    distmat = attention_distmat(head, query, gallery, compute=compute)
    middle = time.perf_counter()
    found = rank_gallery(head, query, gallery, compute=compute)
    numbers = {name: each for name, each in vars(found).items() if isinstance(each, Tensor | int)}
    return distmat, numbers, middle - start, time.perf_counter() - middle


def processes(args: argparse.Namespace) -> str:
    """Returns the speed of one process and of two, and whether they agree bit for bit."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world, threads in ((1, 1), (1, 2), (2, 1)):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            path = Path(folder) / f"{world}-{threads}.pt"
            command = [sys.executable, *launch, __file__, str(path), str(args.scale)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, env=environment, check=True)
            results[world, threads] = torch.load(path, weights_only=True)
    rows, alone = [], results[1, 1]
    for (world, threads), (distmat, found, first, second) in results.items():
        same = torch.equal(distmat, alone[0]) and all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(found.values(), alone[1].values(), strict=True)
        )
        rows.append([
            str(world), str(threads), f"{distmat.numel() / first:,.0f}", f"{alone[2] / first:.2f}",
            f"{second:.2f} s", f"{alone[3] / second:.2f}", "yes" if same else "no",
        ])  # fmt: skip
    header = ["Processes", "Threads each", "Pairs/s, all pairs", "×", "Top 10", "×",
              "Equal bit for bit"]  # fmt: skip
    queries, galleries = alone[0].shape
    return table(f"Processes (gloo, GAP, {queries} × {galleries:,} pairs)", header, rows)


def worker(path: str, scale: float) -> None:
    """Ranks as one of the processes, the first of which saves what was found."""
    dist.init_process_group("gloo")
    result = ranked(dist.get_world_size() > 1, scale)
    if dist.get_rank() == 0:
        torch.save(result, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1], float(sys.argv[2]))
