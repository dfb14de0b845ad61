"""Processes killed while they write: what was reported as written is there, whole."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from subjects import tiny_casn
from tqdm import tqdm
from writer import ROWS, WRITERS, encoding_of

from casn_plugin import GalleryIndex
from casn_plugin.checkpoint import Checkpoints, load_checkpoint

WRITER = Path(__file__).with_name("writer.py")


def newest_step(kind: str, folder: Path) -> int:
    """Returns of which step the newest whole file is, having looked at all of it."""
    if kind == "checkpoint":
        state = load_checkpoint(Checkpoints(folder).newest())
        weight = state["state_dict"]["weight"]
        assert bool((weight == state["epoch"]).all()), "a checkpoint of two steps"
        return int(state["epoch"])
    if kind == "report":
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>"), "a torn report"
        found = re.search(r"step (\d+)\.", page)
        assert found, "a report without its title"
        return int(found[1])
    opened = GalleryIndex(folder)
    opened.verify()
    steps = sorted({int(pid) for pid in opened.pids})
    for step in steps:
        rows = opened[opened.pids == step]
        assert len(rows) == ROWS and bool((rows.maps == step).all()), f"rows of step {step}"
    missing = {s for s in range(steps[0], steps[-1] + 1) if s % 3 != 2} - set(steps)
    assert not missing, f"lost: {sorted(missing)}"
    return steps[-1]


def start(kind: str, folder: Path, step: int) -> "subprocess.Popen[str]":
    """Returns a writer that goes on from a step."""
    return subprocess.Popen(
        [sys.executable, str(WRITER), kind, str(folder), str(step)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kill_once(kind: str, folder: Path, step: int, rng: random.Random) -> int:
    """Returns the last step that a writer reported as done before it was killed in the next."""
    process = start(kind, folder, step)
    assert process.stdout is not None
    wanted, took, done, began = step + rng.randint(1, 3), 0.01, step - 1, 0.0
    for line in process.stdout:
        word, number = line.split()
        if word == "done":
            done, took = int(number), time.monotonic() - began
        else:
            began = time.monotonic()
            if int(number) >= wanted:  # aimed at the write: somewhere in the time it takes
                time.sleep(rng.random() * took)
                os.killpg(process.pid, signal.SIGKILL)
                break
    rest = process.stdout.read()
    process.wait()
    for number in re.findall(r"done (\d+)", rest):
        done = int(number)
    return done


def kill(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns how many kills there were and what was lost, and what was found."""
    rng, findings, lost, left = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as root:
        folders = {kind: Path(root, kind) for kind in WRITERS}
        steps = dict.fromkeys(WRITERS, 1)
        GalleryIndex.create(folders["index"], tiny_casn())
        GalleryIndex(folders["index"]).add(encoding_of(0), names=list("abcdefgh"), pids=[0] * ROWS)
        for turn in tqdm(range(number), desc="kills", disable=None):
            kind = list(WRITERS)[turn % len(WRITERS)]
            done = kill_once(kind, folders[kind], steps[kind], rng)
            try:
                newest = newest_step(kind, folders[kind])
                removed = kind == "index" and (done + 1) % 3 == 0  # by the step that was killed
                if newest < done - removed:
                    raise AssertionError(f"step {done} was written, the newest is {newest}")
                steps[kind] = newest + 1
            except Exception as error:
                lost += 1
                findings.append(f"{kind}, kill {turn}: {type(error).__name__}: {error}")
                break
            here = [each.name for each in folders[kind].iterdir() if ".tmp" in each.name]
            left = max(left, len(here))
            if len(here) > 1:
                findings.append(f"{kind}, kill {turn}: what was left before is still there: {here}")
        for kind, folder in folders.items():
            if folder.is_dir() and not findings:
                WRITERS[kind](folder, steps[kind])
                after = [path.name for path in folder.iterdir() if ".tmp" in path.name]
                if after:
                    findings.append(f"{kind}: {len(after)} temporary files are left: {after[:2]}")
    figures = {"kills": number, "lost": lost, "temporary files at once": left}
    return figures, findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, found = kill(int(sys.argv[1]), int(sys.argv[2]))
    print(*found, totals, sep="\n")
    sys.exit(bool(found))
