"""Files cut, flipped, replaced or planted: refused by name, or the same; nothing in them is run."""

import os
import pickle
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from subjects import tiny_casn
from torch import nn
from tqdm import tqdm
from writer import encoding_of

from casn_plugin import GalleryIndex, Preprocessing
from casn_plugin.checkpoint import load_checkpoint, load_weights, save_checkpoint


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def damaged(data: bytes, rng: random.Random, planted: bytes) -> tuple[str, bytes]:
    """Returns what was done to a file, and what has become of it."""
    how = rng.choice(("cut", "flip", "flip", "empty", "foreign", "planted", "zeros", "longer"))
    place = rng.randrange(len(data))
    block = data[:place] + rng.randbytes(16) + data[place + 16 :]
    return how, {
        "cut": data[:place],
        "flip": rng.choice((flipped(data, place, rng), block)),
        "empty": b"", "foreign": rng.choice((b"PK\3\4", b"{}", b"\x89PNG", b"GIF89a")) + b"x" * 99,
        "planted": planted, "zeros": data[:place] + bytes(len(data) - place),
        "longer": data + b"\0" * 9,
    }[how]  # fmt: skip


def flipped(data: bytes, place: int, rng: random.Random) -> bytes:
    """Returns a file with one bit changed."""
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def whole_index(path: Path) -> Any:
    """Returns all that is in an index."""
    index = GalleryIndex(path.parent)
    maps = index[:].maps.tolist() if "alone" not in path.parent.name else None
    features = index.features_of(slice(None)).tolist()
    return index.names, index.pids.tolist(), index.camids.tolist(), features, maps


def whole_checkpoint(path: Path) -> Any:
    """Returns all that is in a checkpoint, comparable."""
    state = load_checkpoint(path)
    weights = {key: value.tolist() for key, value in state.pop("state_dict").items()}
    return state, weights


def whole_weights(path: Path) -> Any:
    """Returns all that a network takes over."""
    network = nn.Linear(4, 4)
    load_weights(network, path)
    return {name: value.tolist() for name, value in network.state_dict().items()}


def planted_files(folder: Path, ran: Path) -> list[bytes]:
    """Returns files that make a folder where they are read carelessly."""
    torch.save({"state_dict": Planted(ran), "epoch": 1}, folder / "planted")
    evil = (folder / "planted").read_bytes()
    (folder / "planted").unlink()
    return [pickle.dumps({"state_dict": Planted(ran), "epoch": 1}), evil]


def subjects_in(folder: Path) -> dict[Path, Callable[[Path], Any]]:
    """Returns the files that are damaged, and what reads one wholly; pictures can't be compared."""
    save_checkpoint({"epoch": 1, "state_dict": {"w": torch.rand(40)}}, folder / "model.pth.tar-1")
    torch.save(nn.Linear(4, 4).state_dict(), folder / "weights.pth")
    keeping = {"index": {}, "in 8 bits": {"dtype": torch.int8}, "alone": {"maps": False}}
    for name, options in keeping.items():
        index = GalleryIndex.create(folder / name, tiny_casn(), **options)  # type: ignore[arg-type]
        index.add(encoding_of(1), names=list("abcdefgh"), pids=range(8))
    kept = [path for name in keeping for path in sorted((folder / name).iterdir())]
    pixels = np.random.default_rng(0).integers(0, 255, (16, 8, 3)).astype(np.uint8)
    readers: dict[Path, Callable[[Path], Any]] = {
        folder / "model.pth.tar-1": whole_checkpoint, folder / "weights.pth": whole_weights,
        **{path: whole_index for path in kept if path.suffix != ".lock"},
    }  # fmt: skip
    for name in ("picture.jpg", "picture.png", "picture.webp"):
        PIL.Image.fromarray(pixels).save(folder / name)
        readers[folder / name] = lambda path: Preprocessing((16, 8)).load(path).shape
    return readers


def outcome(path: Path, read: Callable[[Path], Any], expected: Any) -> tuple[str, str | None]:
    """Returns what has become of a file, and what is wrong with that, if anything."""
    try:
        same = read(path) == expected
    except (ValueError, OSError) as error:
        named = any(part in str(error) for part in (path.name, str(path.parent)))
        return "refused", None if named else f"not named: {str(error)[:120]}"
    except Exception as error:
        return "raw", f"raw {type(error).__name__}: {str(error)[:120]}"
    return ("the same", None) if same else ("other", "read as something else")


def damage(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns how many damaged files were read, and what was found."""
    rng, findings = random.Random(seed), []
    counted: Counter[str] = Counter({"refused": 0, "the same": 0, "other": 0, "executed": 0})
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        folder, ran = Path(root), Path(root, "ran")
        readers = subjects_in(folder)
        planted = planted_files(folder, ran)
        wholes = {path: (path.read_bytes(), read(path)) for path, read in readers.items()}
        for turn in tqdm(range(number), desc="files", disable=None):
            path = list(readers)[turn % len(readers)]
            how, data = damaged(wholes[path][0], rng, rng.choice(planted))
            path.write_bytes(data)
            said, wrong = outcome(path, readers[path], wholes[path][1])
            if ran.exists():
                counted["executed"] += 1
                findings.append(f"{path.name}, {how}: executed")
                ran.rmdir()
            counted[said] += 1
            if wrong is not None:
                findings.append(f"{path.name}, {how}: {wrong}")
            path.write_bytes(wholes[path][0])
    return {"files": number, **counted}, findings


def every_byte(seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns what becomes of a checkpoint that is cut, or has a bit flipped, at each byte."""
    rng, findings = random.Random(seed), []
    counted: Counter[str] = Counter({"refused": 0, "the same": 0, "other": 0})
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "model.pth.tar-1")
        save_checkpoint({"epoch": 1, "state_dict": {"w": torch.rand(40)}}, path)
        data, expected = path.read_bytes(), whole_checkpoint(path)
        for place in tqdm(range(len(data)), desc="every byte", disable=None):
            for how, changed in (("flip", flipped(data, place, rng)), ("cut", data[:place])):
                path.write_bytes(changed)
                said, wrong = outcome(path, whole_checkpoint, expected)
                counted[said] += 1
                if wrong is not None:
                    findings.append(f"{how} at byte {place}: {wrong}")
    return {"bytes": len(data), **counted}, findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, found = damage(int(sys.argv[1]), int(sys.argv[2]))
    print(*found, totals, sep="\n")
    sys.exit(bool(found))
