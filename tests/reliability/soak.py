"""Training, ranking, explaining and searching for hours in one process: nothing may grow."""

import argparse
import contextlib
import gc
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from subjects import SIZE, engine_of, tiny_casn, write_market
from torch import nn
from tqdm import tqdm
from writer import RESULTS

from casn_plugin import (
    Encoding,
    GalleryIndex,
    PairSampler,
    SiameseAttentionLoss,
    explain_pair,
    explain_ranking,
)
from casn_plugin.checkpoint import Checkpoints, TrainingState, load_checkpoint
from casn_plugin.explanation import save_report
from casn_plugin.losses import IdentificationAttentionLoss
from casn_plugin.objective import loss_terms
from casn_plugin.ranking import rank_gallery

MIB = 2**20
PEOPLE, VIEWS, KEPT = 4, 4, 64
TOLERANCE = 0.02
COUNTED = ("files", "threads", "hooks", "figures", "left over")
"""What has to be, in every later sample, no more than at the end of the warm-up."""


def hooks_of(model: nn.Module) -> int:
    """Returns how many hooks there are on the layers and parameters of a model, and on all."""
    kinds = [name for name in vars(model) if name.endswith("hooks")]
    own = sum(len(vars(layer)[kind]) for layer in model.modules() for kind in kinds)
    tensors = sum(len(each._backward_hooks or ()) for each in model.parameters())
    every = vars(nn.modules.module)
    return own + tensors + sum(
        len(value) for name, value in every.items()
        if name.startswith("_global") and isinstance(value, dict)
    )  # fmt: skip


def measured(model: nn.Module, folder: Path) -> dict[str, float]:
    """Returns what this process holds now."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory, MiB": resident / MIB,
        "objects": len(gc.get_objects()),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "hooks": hooks_of(model),
        "figures": len(plt.get_fignums()),
        "left over": sum(1 for each in folder.rglob("*") if each.suffix in (".tmp", ".new")),
    }


class Life:
    """What a process does with the package all day; each method once a round.

    Args:
        folder: of all files.
        every: after so many rounds there is one with torchreid's engine.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.model = tiny_casn()
        self.gallery = tiny_casn()  # its weights stay, so that the index goes on
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.pids = [pid for pid in range(PEOPLE) for _ in range(VIEWS)]
        self.sampler = PairSampler(self.pids, list(range(VIEWS)) * PEOPLE, batch_size=4, seed=0)
        self.imgs = torch.rand(len(self.pids), 3, *SIZE)
        self.losses = IdentificationAttentionLoss(), SiameseAttentionLoss()
        self.checkpoints = Checkpoints(folder / "model")
        self.index = GalleryIndex.create(folder / "index", self.gallery)
        self.round = 0
        write_market(folder / "data")
        self.paths = sorted(map(str, folder.glob("data/**/*.jpg")))

    def train(self) -> None:
        """Trains an epoch, saves it and goes on from what was saved."""
        self.model.train()
        pids = torch.tensor(self.pids)
        rows = torch.tensor(list(self.sampler)).view(-1, 4)
        for some in rows:
            output = self.model(self.imgs[some], pids[some], *self.losses)
            loss_ide = nn.functional.cross_entropy(output.logits, pids[some])
            loss, _ = loss_terms(
                output, pids[some], loss_ide, lambda_ia=0.5, lambda_sa=0.05, siamese=self.losses[1]
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        training = TrainingState(self.model, self.optimizer, sampler=self.sampler)
        path = self.checkpoints.save(training.state(self.round), is_best=self.round % 3 == 0)
        training.restore(load_checkpoint(path), path)

    def rank(self) -> None:
        """Ranks the images by features and attention."""
        part = self.model.encode(self.imgs)
        rank_gallery(self.model, part[:5], part, topk=3)

    def explain(self) -> None:
        """Draws a pair, a list and a report, from tensors and from pictures."""
        people = [(img, pid, row % VIEWS) for row, (img, pid) in
                  enumerate(zip(self.imgs, self.pids, strict=True))]  # fmt: skip
        explained = explain_ranking(self.model, people[:2], people[2:], topk=2)
        path = self.folder / "report.html"
        save_report(path, explained, RESULTS, title="soak", number=1)
        pair = explain_pair(self.model, self.paths[0], self.paths[1], same=True)
        plt.close(pair.plot())
        plt.close(explained[0].plot())

    def search(self) -> None:
        """Adds to an index, removes what is old, and searches in it as it is and opened anew."""
        names = [f"{self.round}-{row}" for row in range(len(self.imgs))]
        part: Encoding = self.gallery.encode(self.imgs)
        self.index.add(part, names=names, pids=self.pids)
        if len(self.index) > KEPT:
            self.index.remove(range(len(self.index) - KEPT))
        for index in (self.index, GalleryIndex(self.index.folder)):
            assert len(index) == min(KEPT, self.round * len(self.imgs))
            found = index.search(self.gallery, self.imgs[:2], topk=3)
            assert np.isfinite(found.ranking.distances.numpy()).all()

    def engine(self) -> None:
        """Trains and evaluates with torchreid, now and then."""
        if self.round % self.every:
            return
        engine = engine_of(self.folder)
        save_dir = self.folder / "run"
        engine.run(save_dir=str(save_dir), max_epoch=1, eval_freq=1, print_freq=100)
        shutil.rmtree(save_dir)

    def live(self) -> None:
        """Does all of it once."""
        self.round += 1
        with contextlib.redirect_stdout(io.StringIO()):
            for part in (self.train, self.rank, self.explain, self.search, self.engine):
                part()


def judged(samples: list[dict[str, float]], warm: int, tolerance: float) -> list[str]:
    """Returns what has grown after so many samples of warm-up.

    Args:
        samples: in order of time.
        warm: so many are not looked at; what is counted may not exceed the last of them.
        tolerance: the share by which the median of the last third of memory, objects and mappings
            may lie above that of the first third.
    """
    findings, later = [], samples[warm:]
    for name in COUNTED:
        before, most = samples[warm - 1][name], max(each[name] for each in later)
        if most > before:
            findings.append(f"{name} grew from {before:g} to {most:g}")
    third = max(len(later) // 3, 1)
    for name in ("memory, MiB", "objects", "mappings"):
        first, last = (
            float(np.median([each[name] for each in part]))
            for part in (later[:third], later[-third:])
        )
        if last > first * (1 + tolerance):
            findings.append(f"{name} grew from {first:.1f} to {last:.1f}")
    return findings


def soak(
    going: Callable[[int], bool], tolerance: float, every: int = 5
) -> tuple[dict[str, float], list[str]]:
    """Returns figures of one long life, and what has grown in it; prints a table of samples.

    Args:
        going: whether to go on after so many rounds.
        tolerance: as in :func:`judged`.
        every: so many rounds are looked at once.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    samples: list[dict[str, float]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root, tqdm(desc="rounds", disable=None) as bar:
        life = Life(Path(root), every)
        while going(life.round):
            life.live()
            bar.update()
            if life.round % every == 0:
                minutes = (time.monotonic() - started) / 60
                now = measured(life.model, life.folder)
                samples.append({"minutes": minutes, "rounds": life.round, **now})
    warm = max(len(samples) // 10, 2)
    shown = sorted({0, *np.linspace(warm, len(samples) - 1, 10).astype(int)})
    print("| " + " | ".join(samples[0]) + " |")
    print("| " + " | ".join("---:" for _ in samples[0]) + " |")
    for row in shown:
        print("| " + " | ".join(f"{value:.5g}" for value in samples[row].values()) + " |")
    findings = judged(samples, warm, tolerance)
    later = samples[warm:]
    memory = [each["memory, MiB"] for each in later]
    figures = {
        "minutes": round(samples[-1]["minutes"], 1), "rounds": life.round,
        "grown": len(findings), "memory from MiB": round(min(memory)),
        "memory to MiB": round(max(memory)),
    }  # fmt: skip
    return figures, findings


def for_minutes(minutes: float) -> Callable[[int], bool]:
    """Returns what says for so many minutes that it goes on."""
    end = time.monotonic() + 60 * minutes
    return lambda rounds: time.monotonic() < end or rounds < 50


def main() -> int:
    """Returns 1 where anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long")
    parser.add_argument("--rounds", type=int, help="so many instead, memory loosely judged")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rounds:
        figures, findings = soak(lambda rounds: rounds < args.rounds, 0.2, every=2)
    else:
        figures, findings = soak(for_minutes(args.minutes), TOLERANCE)
    print(figures, *findings, sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
