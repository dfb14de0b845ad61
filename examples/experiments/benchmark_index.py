#!/usr/bin/env python
r"""Measures what an index costs by how it keeps maps: bytes, time, and what rounding changes.

Sizes and times are of a ResNet-50 (its weights do not matter) at 288 x 144, with maps of 18 x 9;
ranks of a trained model. Both look at the pictures of the embedded set. Measurements of one column
take turns; medians of processor time, which other programs change little and which no waiting for
the disk is part of.

    python examples/train_casn_pcb.py
    python examples/experiments/benchmark_index.py \
        --checkpoint log/casn_pcb/model/model.pth.tar-10
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import protocols
import torch
import torchvision
from benchmark_heads import table
from benchmark_ranking import cpu_name
from tqdm import tqdm

from casn_plugin import CASN, EncodedAgain, Encoding, GalleryIndex
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.loading import encode_images, encode_loader
from casn_plugin.ranking import fused_distmats
from casn_plugin.ranking.fingerprint import fingerprint

KEEPING: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "8 bits": {"dtype": torch.int8},
    "features alone, encoded again": {"maps": False},
}
SHORTLIST = 100


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long the processor works for a function, and what it returns."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


class Costs:
    """Indexes of one gallery, each keeping its maps in another way, and the times they took.

    Args:
        folder: where they are made.
        model: that has encoded the gallery.
        gallery: its encoding.
        pictures: paths of its pictures.
    """

    def __init__(self, folder: Path, model: CASN, gallery: Encoding, pictures: list[str]) -> None:
        self.folder, self.model, self.gallery, self.pictures = folder, model, gallery, pictures
        self.times: dict[tuple[str, str], list[float]] = {}

    def timed(self, name: str, what: str, function: Callable[[], Any]) -> Any:
        """Returns what a function returns, and notes how long it took."""
        taken, result = seconds(function)
        self.times.setdefault((name, what), []).append(taken)
        return result

    def build(self, name: str) -> None:
        """Makes an index of what is encoded already, in the place of one of before."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        index = GalleryIndex.create(self.folder / name, self.model, **KEEPING[name])
        step = 256
        for start in range(0, len(self.gallery), step):
            part = slice(start, start + step)
            index.add(self.gallery[part], names=self.pictures[part])

    def run(self, name: str, queries: Encoding) -> None:
        """Makes and opens an index, and searches it for one query after the other."""
        self.timed(name, "write", partial(self.build, name))
        index = self.timed(name, "open", partial(GalleryIndex, self.folder / name))
        options: dict[str, Any] = {"topk": SHORTLIST, "exact": False}
        memory = SHORTLIST * self.gallery.maps[0].nbytes
        for i in range(len(queries)):
            if not KEEPING[name].get("maps", True):  # holds nothing of the search before
                options["maps"] = EncodedAgain(self.model, index, max_memory=memory)
            search = partial(index.search, self.model, queries[i : i + 1], **options)
            self.timed(name, "later" if i else "first", search)
        self.timed(name, "verify", index.verify)

    def cells(self, name: str) -> list[str]:
        """Returns the columns of an index."""
        files = (self.folder / name).glob("*.safetensors")
        size = sum(path.stat().st_size for path in files) / len(self.gallery)
        write, opened, first, later, verify = (
            1000 * statistics.median(self.times[name, what])
            for what in ("write", "open", "first", "later", "verify")
        )
        return [
            name, f"{size / 1000:,.1f} KB", f"{write / len(self.gallery):.2f} ms",
            f"{opened:.1f} ms", f"{first:,.0f} ms", f"{later:,.0f} ms", f"{verify:,.0f} ms",
        ]  # fmt: skip


def costs(args: argparse.Namespace, pictures: list[str]) -> list[list[str]]:
    """Returns bytes and times of each way to keep maps, and of hashing the weights."""
    torch.manual_seed(0)
    stride = [False, False, True]  # none in the last block
    backbone = torchvision.models.resnet50(replace_stride_with_dilation=stride).eval()
    model = CASN(backbone, input_size=tuple(args.size))
    parts = []
    for start in tqdm(range(0, len(pictures), 16), "encoding", leave=False, disable=None):
        imgs = torch.stack(
            [model.preprocessing.load(path) for path in pictures[start : start + 16]]
        )
        taken, part = seconds(partial(encode_images, model, imgs))
        parts.append((taken / len(imgs), part))
    queries = parts[0][1][: args.searches]
    encoded = statistics.median(taken for taken, _ in parts)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        gallery = Encoding.cat([part for _, part in parts])
        del parts
        measured = Costs(Path(folder), model, gallery, pictures)
        for _ in tqdm(range(args.repeats), "searching", leave=False, disable=None):
            for name in KEEPING:
                measured.run(name, queries)
        rows = [measured.cells(name) for name in KEEPING]
    again = statistics.median(seconds(lambda: fingerprint(model))[0] for _ in range(9))
    first = statistics.median(seconds(lambda: fingerprint(fresh(model)))[0] for _ in range(3))
    size = sum(each.nbytes for each in model.state_dict().values()) / 1e6
    print(
        f"{len(gallery)} images, maps of {tuple(gallery.maps.shape[1:])}; encoding took "
        f"{1000 * encoded:.0f} ms an image. Hashing {size:.0f} MB of weights took "
        f"{1000 * first:.0f} ms, finding them unchanged {1000 * again:.1f} ms.\n"
    )
    return rows


def fresh(model: CASN) -> CASN:
    """Returns the model as one whose weights have not been hashed: its first are written anew."""
    with torch.no_grad():
        next(model.parameters()).mul_(1)
    return model


def ranks(args: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """Returns rank-1, mAP and what has moved, on a trained model; and the gallery's pictures."""
    model, loaders = protocols.trained(args.checkpoint)
    query, q_pids, q_camids = encode_loader(model, loaders["query"])
    gallery, g_pids, g_camids = encode_loader(model, loaders["gallery"])
    pictures = [path for path, *_ in loaders["gallery"].dataset.data]
    exact, rows = fused_distmats(model, query, gallery), []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, keeping in KEEPING.items():
            index = GalleryIndex.create(Path(folder, name), model, **keeping)
            index.add(gallery, names=pictures)
            kept = EncodedAgain(model, index) if not keeping.get("maps", True) else index
            found = fused_distmats(model, query, kept)
            evaluated = evaluate_rank(found.fused, q_pids, g_pids, q_camids, g_camids)
            off = (found.attention - exact.attention).abs().flatten().sort().values
            rows.append([
                f"{evaluated.cmc[0]:.2%}", f"{evaluated.mean_ap:.3%}",
                *(f"{off[int(share * (len(off) - 1))]:.0e}" for share in (0.5, 0.999, 1)),
            ])  # fmt: skip
    return rows, pictures


def main(argv: list[str] | None = None) -> str:
    """Measures and prints; returns the table."""
    warnings.filterwarnings("ignore", message="Cython evaluation")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="of examples/train_casn_pcb.py's default run")
    add("--images", type=int, default=384, help="of the gallery, for sizes and times")
    add("--size", type=int, nargs=2, default=[288, 144], help="rows and columns of the pictures")
    add("--searches", type=int, default=3, help="of each opened index, one query each")
    add("--repeats", type=int, default=3, help="how often each index is made and opened")
    add("--folder", help="where indexes are made, by default the system's temporary one")
    args = parser.parse_args(argv)
    if not Path(args.checkpoint).is_file():
        parser.error(f"--checkpoint: there is no file {args.checkpoint}")
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    quality, pictures = ranks(args)
    measured = costs(args, pictures[: args.images])
    header = [
        "Maps kept in", "An image", "To write it", "Open", "First search", "Later", "Verify all",
        "Rank-1", "mAP", "Attention distance off, median", "99.9 %", "largest",
    ]  # fmt: skip
    rows = [one + other for one, other in zip(measured, quality, strict=True)]
    found = table("An index by how it keeps maps", header, rows)
    print(found)
    return found


if __name__ == "__main__":
    main()
