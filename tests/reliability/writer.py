"""A process that writes one kind of file in a loop, and says what is written: killed by kill.py."""

import itertools
import sys
from pathlib import Path

import torch
from subjects import tiny_casn

from casn_plugin import Encoding, GalleryIndex, explain_ranking
from casn_plugin.checkpoint import Checkpoints
from casn_plugin.explanation import save_report

ROWS = 8
CURVE = {"mAP": 0.5, "mINP": 0.25, "cmc": [0.5, 1.0]}
RESULTS = {**dict.fromkeys(("features", "attention", "fused"), CURVE), "auc": 0.5}


def encoding_of(step: int) -> Encoding:
    """Returns images whose values say by which step they were added."""
    return Encoding(torch.full((ROWS, 6), float(step)), torch.full((ROWS, 6, 16, 8), float(step)))


def checkpoints(folder: Path, step: int) -> None:
    """Saves a checkpoint of some 2 MB."""
    weights = torch.full((512, 1024), float(step))
    Checkpoints(folder).save({"epoch": step, "state_dict": {"weight": weights}})


def index(folder: Path, step: int) -> None:
    """Adds images; of every third step those of the step before are removed at once."""
    opened = GalleryIndex(folder)
    if step % 3 == 0:
        opened.remove(opened.pids == step - 1)
    opened.add(encoding_of(step), names=[f"{step}-{i}" for i in range(ROWS)], pids=[step] * ROWS)


def report(folder: Path, step: int) -> None:
    """Saves a report whose title says of which step it is."""
    model = tiny_casn()
    imgs = torch.rand(3, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    people = [(img, 1, camid) for camid, img in enumerate(imgs)]
    explained = explain_ranking(model, people[:1], people[1:], topk=2)
    save_report(folder / "report.html", explained, RESULTS, title=f"step {step}.", number=1)


WRITERS = {"checkpoint": checkpoints, "index": index, "report": report}

if __name__ == "__main__":
    kind, where, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    for number in itertools.count(first):
        print("begin", number, flush=True)
        WRITERS[kind](where, number)
        print("done", number, flush=True)
