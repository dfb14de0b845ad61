"""How much memory ranking takes as the gallery grows."""

import argparse
import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_heads import Head, table
from plots import plot_memory, save_small
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin import CASN, Compute, GalleryIndex, attention_distmat, rank_gallery

BUDGET = 64 * 2**20


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


def small_head() -> Head:
    """Returns a head of few channels, whose gallery grows quickly."""
    return Head((512, 16, 8), 512, lambda maps: maps.mean((2, 3)))


def peak_of(folder: str, function: Callable[..., Any], device: str) -> dict[str, float]:
    """Returns the peak memory, in MiB, of ranking an index in this process."""
    head = small_head().to(device)
    index = GalleryIndex(folder, verify=False)
    query = index[:64]  # from the file too: no memory used before the measurement
    function(head, query[:2], query[:2])  # what libraries keep for themselves
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Peak() as watch:
        function(head, query, index, compute=Compute(max_memory=BUDGET))
    peaks = {"of the host": watch.peak / 2**20}
    if device == "cuda":
        peaks["of the device"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def memory(args: argparse.Namespace) -> str:
    """Returns the peak memory as the gallery grows, and saves a plot of it."""
    rows: list[list[str]] = []
    curves: dict[str, list[float]] = {}
    backbone = nn.Sequential(nn.Conv2d(3, 512, 3, stride=16, padding=1))
    model = CASN(backbone, forward=pooled_forward, input_size=(256, 128))
    torch.manual_seed(0)
    head, images = small_head(), []
    with tempfile.TemporaryDirectory() as folder:
        index = GalleryIndex.create(folder, model)
        for times in tqdm((1, 4, 16), desc="memory", leave=False, disable=None):
            while len(index) < 256 * times:
                index.add(head.encode(256))
            images.append(len(index))
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
    figure = plot_memory(images, curves, BUDGET / 2**20, args.device)
    save_small(figure, Path(args.save_dir) / f"ranking_memory_{args.device}.png")
    header = ["Gallery images", "On disk", "attention_distmat", "rank_gallery, top 10"]
    return table(
        f"Peak memory beside the model, max_memory {BUDGET >> 20} MiB ({args.device})", header, rows
    )
