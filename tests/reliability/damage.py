"""Files cut, flipped, replaced or planted: refused by name, and nothing in them is run."""

import os
import pickle
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from subjects import tiny_casn
from tqdm import tqdm
from writer import encoding_of

from casn_plugin import GalleryIndex, Preprocessing
from casn_plugin.checkpoint import load_checkpoint, save_checkpoint


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def damaged(data: bytes, rng: random.Random, planted: bytes) -> bytes:
    """Returns what has become of a file."""
    how = rng.choice(("cut", "flip", "empty", "foreign", "planted", "zeros", "longer"))
    place = rng.randrange(len(data))
    return {
        "cut": data[:place],
        "flip": data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :],
        "empty": b"", "foreign": rng.choice((b"PK\3\4", b"{}", b"\x89PNG", b"GIF89a")) + b"x" * 99,
        "planted": planted, "zeros": data[:place] + bytes(len(data) - place),
        "longer": data + b"\0" * 9,
    }[how]  # fmt: skip


def damage(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns how many damaged files were read, and what was found."""
    rng, findings, refused, executed = random.Random(seed), [], 0, 0
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        folder, ran = Path(root), Path(root, "ran")
        planted = pickle.dumps({"state_dict": Planted(ran), "epoch": 1})
        torch.save({"state_dict": Planted(ran)}, folder / "planted")
        save_checkpoint({"epoch": 1, "state_dict": {"w": torch.rand(40)}}, folder / "model.pth")
        pixels = np.random.default_rng(0).integers(0, 255, (16, 8, 3)).astype(np.uint8)
        for name in ("picture.jpg", "picture.png", "picture.webp"):
            PIL.Image.fromarray(pixels).save(folder / name)
        GalleryIndex.create(folder / "index", tiny_casn())
        GalleryIndex(folder / "index").add(encoding_of(1))
        paths = [*folder.glob("picture.*"), folder / "model.pth", *(folder / "index").iterdir()]
        paths = [path for path in sorted(paths) if path.suffix != ".lock" and path.stat().st_size]
        wholes = {path: path.read_bytes() for path in paths}
        for turn in tqdm(range(number), desc="files", disable=None):
            path = paths[turn % len(paths)]
            evil = rng.choice((planted, (folder / "planted").read_bytes()))
            path.write_bytes(damaged(wholes[path], rng, evil))
            try:
                if path.parent.name == "index":
                    GalleryIndex(path.parent)
                elif path.suffix == ".pth":
                    load_checkpoint(path)
                else:
                    Preprocessing((16, 8)).load(path)
            except (ValueError, OSError) as error:
                refused += 1
                if not any(part in str(error) for part in (path.name, str(path.parent))):
                    findings.append(f"{path.name} is not named: {str(error)[:120]}")
            except Exception as error:
                findings.append(f"{path.name}: raw {type(error).__name__}: {str(error)[:120]}")
            if ran.exists():
                executed += 1
                ran.rmdir()
            path.write_bytes(wholes[path])
    return {"files": number, "refused": refused, "executed": executed}, findings


if __name__ == "__main__":
    print(*damage(int(sys.argv[1]), int(sys.argv[2])), sep="\n")
