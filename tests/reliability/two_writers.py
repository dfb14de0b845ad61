"""Writers of one index at once, readers beside them, some killed in the lock; two trainings too."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from subjects import engine_of, tiny_casn
from tqdm import tqdm

from casn_plugin import Encoding, GalleryIndex
from casn_plugin.checkpoint import Checkpoints, load_checkpoint
from casn_plugin.ranking.manifest import Manifest

ROUNDS, ROWS, COMMON = 12, 3, 6
FORK: Any = multiprocessing.get_context("fork")
LIMIT = 120.0
"""So many seconds no process may take."""


def encoding_of(values: list[int]) -> Encoding:
    """Returns images whose values say who they are."""
    column = torch.tensor(values).float()
    return Encoding(column[:, None].repeat(1, 6), column[:, None, None, None].repeat(1, 6, 16, 8))


def value_of(rank: int, name: str) -> int:
    """Returns what the image of a name is filled with by a writer: "3-2" or "common-3"."""
    first, number = name.rsplit("-", 1)
    return 10_000 * (rank + 1) + 100 * (99 if first == "common" else int(first)) + int(number)


def check(index: GalleryIndex) -> None:
    """Raises AssertionError where a row is not what some writer has written under its name."""
    assert len(set(index.names)) == len(index.names), "a name is there twice"
    index.verify()
    if not len(index):
        return
    rows = index[:]
    for row, name in enumerate(index.names):
        rank, own = int(index.camids[row]), name.split(":")[-1]
        expected = value_of(rank, own)
        assert index.pids[row] == expected, f"{name} has another's label"
        found = rows.maps[row]
        assert bool((found == expected).all()), f"{name} has another's maps"
        assert bool((rows.features[row] == expected).all()), f"{name} has another's features"


def note(journal: Path, state: str, what: str, names: list[Any]) -> None:
    """Notes something, so that it is there even if this process is killed now."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps([state, what, names]) + "\n")


def write(folder: Path, rank: int, rounds: int, seed: int, journal: Path) -> None:
    """Adds images of its own and images that others add too, removes some, and notes what is done.

    The journal takes ["begun" or "done", "added" or "removed", names].
    """
    rng = random.Random(seed)
    index = GalleryIndex(folder)
    for turn in range(rounds):
        if rng.random() < 0.5:
            index = GalleryIndex(folder, verify=rng.random() < 0.5)
        numbers = [f"{turn}-{row}" for row in range(ROWS)]
        own = [f"{os.getpid()}:{each}" for each in numbers]
        common = [f"common-{each}" for each in rng.sample(range(COMMON), 2)]
        note(journal, "begun", "added", [*own, *common])
        values = [value_of(rank, each) for each in (*numbers, *common)]
        index.add(
            encoding_of(values), names=[*own, *common], pids=values, camids=[rank] * len(values),
            duplicates="skip",
        )  # fmt: skip
        note(journal, "done", "added", [*own, *common])
        if rng.random() < 0.4:
            note(journal, "begun", "removed", own[:1])
            remove(index, own[0])
            note(journal, "done", "removed", own[:1])


def remove(index: GalleryIndex, name: str) -> None:
    """Removes an image, opening the index anew as long as others change it."""
    while True:
        try:
            index.remove([index.names.index(name)])
            return
        except ValueError as error:
            if "open it anew" not in str(error):
                raise
            index = GalleryIndex(index.folder)


def die(folder: Path, rank: int, seed: int, journal: Path) -> None:
    """Writes, and kills itself at some change of the folder, while it holds the lock."""
    rng, left = random.Random(seed), 0
    left = rng.randint(1, 8 if rng.random() < 0.5 else 40)

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            before = rng.random() < 0.5
            result = None if before and left <= 0 else change(*args, **kwargs)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return changed

    for name in ("replace", "fsync", "unlink", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    write(folder, rank, ROUNDS, seed, journal)


def read(folder: Path, over: Any, journal: Path) -> None:
    """Opens the index again and again, and looks at every row."""
    reads = 0
    while not over.is_set():
        check(GalleryIndex(folder, verify=reads % 2 == 0))
        reads += 1
    note(journal, "done", "read", [reads])


def guarded(task: Callable[..., None], journal: Path, *args: Any) -> None:
    """Does a task in a process of its own; what it raises is journalled."""
    torch.set_num_threads(1)
    try:
        task(*args)
    except BaseException as error:
        note(journal, "done", "failed", [f"{task.__name__}: {type(error).__name__}: {error}"])


def together(folder: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Returns figures and findings of one run: two writers, a reader, and some who are killed."""
    rng = random.Random(seed)
    GalleryIndex.create(folder, tiny_casn())
    over, journal, everybody, findings = FORK.Event(), folder.with_suffix(".journal"), [], []

    def start(task: Callable[..., None], *args: Any) -> Any:
        own = journal.with_suffix(f".journal-{len(everybody)}")
        process = FORK.Process(target=guarded, args=(task, own, *args, own))
        process.start()
        everybody.append(process)
        return process

    writers = [start(write, folder, rank, ROUNDS, rng.getrandbits(32)) for rank in (0, 1)]
    began = time.monotonic()
    start(read, folder, over)
    killed = [start(die, folder, 2, rng.getrandbits(32))]
    while any(each.is_alive() for each in writers) and time.monotonic() - began < LIMIT:
        if not killed[-1].is_alive():
            killed.append(start(die, folder, 2, rng.getrandbits(32)))
        time.sleep(0.01)
    killed[-1].join(LIMIT)
    over.set()
    for each in everybody:
        each.join(LIMIT)
        if each.is_alive():
            findings.append("a process did not end")
            each.kill()
    figures, more = settled(folder, noted(folder.parent))
    figures["killed in the lock"] = sum(each.exitcode == -signal.SIGKILL for each in killed)
    return figures, findings + more


def noted(folder: Path) -> list[Any]:
    """Returns what the processes have noted in a folder."""
    files = sorted(folder.glob("*.journal*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def settled(folder: Path, notes: list[Any]) -> tuple[Counter[str], list[str]]:
    """Returns how many rows there have to be and are lost, and what was found."""
    done: dict[str, set[str]] = {"added": set(), "removed": set()}
    begun: dict[str, set[str]] = {"added": set(), "removed": set()}
    findings = [each for state, what, names in notes if what == "failed" for each in names]
    reads = sum(names[0] for state, what, names in notes if what == "read")
    for state, what, names in notes:
        if what in done:
            (done if state == "done" else begun)[what].update(names)
    must = done["added"] - begun["removed"]
    try:
        index = GalleryIndex(folder)
    except (ValueError, OSError) as error:
        return Counter(rows=len(must), lost=len(must), reads=reads), [*findings, str(error)]
    try:
        check(index)
    except AssertionError as error:
        findings.append(str(error))
    names = set(index.names)
    lost = must - names
    back = (names & done["removed"]) | (names - begun["added"])
    if lost or back:
        findings.append(f"lost {sorted(lost)[:3]}, there all the same {sorted(back)[:3]}")
    with contextlib.suppress(StopIteration):  # what the killed have left goes with the next change
        index.add(encoding_of([1]), names=["last"])
        named = {"index.json", "index.lock", *(each.file for each in Manifest.read(folder).shards)}
        left = next(path.name for path in folder.iterdir() if path.name not in named)
        findings.append(f"left over: {left}")
    return Counter(rows=len(must), lost=len(lost), reads=reads), findings


def waited(path: Path) -> None:
    """Waits for a file: an event of multiprocessing would wait for one that was killed, too."""
    began = time.monotonic()
    while not path.exists() and time.monotonic() - began < LIMIT:
        time.sleep(0.01)


def train(folder: Path, root: Path, journal: Path) -> None:
    """Trains two epochs; after its first step it waits until it may go on."""
    engine = engine_of(root)
    inner = engine.forward_backward

    def forward_backward(data: Any) -> Any:
        folder.with_suffix(".started").touch()
        waited(folder.with_suffix(".goes-on"))
        return inner(data)

    engine.forward_backward = forward_backward
    with contextlib.redirect_stdout(io.StringIO()):
        engine.run(save_dir=str(folder), max_epoch=2, print_freq=100)
    note(journal, "done", "trained", [len(engine.history)])


def two_trainings(folder: Path) -> list[str]:
    """Returns what was found where two trainings have one folder; then one that was killed."""
    engine_of(folder)  # makes the data
    findings = []
    for kill in (False, True):
        save_dir, journal = folder / f"run-{kill}", folder / f"{kill}.journal"
        first = FORK.Process(target=guarded, args=(train, journal, save_dir, folder, journal))
        first.start()
        waited(save_dir.with_suffix(".started"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                engine_of(folder).run(save_dir=str(save_dir), max_epoch=1)
            findings.append("the second training was not refused")
        except RuntimeError as error:
            if "another run" not in str(error) or str(save_dir) not in str(error):
                findings.append(f"the refusal is not clear: {error}")
        if kill:
            first.kill()
        save_dir.with_suffix(".goes-on").touch()
        first.join(LIMIT)
        if kill:
            with contextlib.redirect_stdout(io.StringIO()):
                engine_of(folder).run(save_dir=str(save_dir), max_epoch=2, print_freq=100)
        elif noted(folder) != [["done", "trained", [2]]]:
            findings.append(f"the first training did not go on: {noted(folder)}")
        state = load_checkpoint(Checkpoints(save_dir / "model").newest())
        if state["epoch"] != 2:
            findings.append(f"the newest checkpoint is of epoch {state['epoch']}")
    return findings


def two_writers(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns the figures of so many runs and of two trainings, and what was found."""
    warnings.simplefilter("ignore")
    figures: Counter[str] = Counter(rows=0, lost=0, reads=0)
    findings: list[str] = []
    for turn in tqdm(range(number), desc="two writers", disable=None):
        with tempfile.TemporaryDirectory() as root:
            own, found = together(Path(root, "index"), seed + turn)
            figures.update(own)
            findings += [f"run {turn}: {each}" for each in found]
    with tempfile.TemporaryDirectory() as root:
        found = two_trainings(Path(root))
    findings += [f"two trainings: {each}" for each in found]
    return {"runs": number, **figures, "second trainings refused": 2 - len(found)}, findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, every = two_writers(int(sys.argv[1]), int(sys.argv[2]))
    print(*every, totals, sep="\n")
    sys.exit(bool(every))
