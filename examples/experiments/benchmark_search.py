#!/usr/bin/env python
"""What a search in a folder takes, from pictures to page, and what candidates miss.

    python examples/experiments/benchmark_search.py --root ward --checkpoint model.pth.tar-10

The data set is in Market-1501's layout. Its gallery is copied to a folder of cameras under numbers,
so that no name tells who it is; its queries are searched for in the other cameras. Processor time,
as other programs may be running.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import markdown

sys.path.insert(0, str(Path(__file__).parents[1]))

from explain_any_network import load_model
from search_pictures import trained_model

from casn_plugin.explanation import save_search_page
from casn_plugin.folders import find_pictures, index_folder, load_pictures
from casn_plugin.loading import encode_images
from casn_plugin.picturenames import read_name
from casn_plugin.ranking import MilvusFeatures, feature_candidates, other_cameras
from casn_plugin.retrieval import LabelledEncodings, calibrate_gallery

CAMERAS = r"camera (?P<camid>\d+)/"


def without_labels(source: Path, folder: Path) -> dict[str, int]:
    """Copies pictures to a folder of cameras under numbers; returns who each one shows."""
    names, people = find_pictures(source), {}
    random.Random(0).shuffle(names)
    for number, name in enumerate(names):
        said = read_name(name)
        new = Path(f"camera {said.camid}", f"{number:05}{Path(name).suffix}")
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / new)
        people[new.as_posix()] = said.pid
    return people


def timed(what: str, rows: list[list[str]], work: Callable[[], Any]) -> Any:
    """Returns what some work returns, and notes what it took."""
    start = time.process_time()
    found = work()
    rows.append([what, f"{time.process_time() - start:.2f} s"])
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="has market1501/Market-1501-...")
    parser.add_argument("--checkpoint", type=Path, help="as search_pictures.py takes it")
    parser.add_argument("--network", help="instead, with --weights: as it is")
    parser.add_argument("--weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.root / "market1501" / "Market-1501-v15.09.15"
    named = load_model(args.network, args.weights) if args.network else None
    model = (named or trained_model(args.checkpoint)).eval()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        people = without_labels(data / "bounding_box_test", folder / "gallery")
        paths = [str(data / "query" / each) for each in find_pictures(data / "query")]
        said = [read_name(Path(path).name) for path in paths]

        def build() -> Any:
            return index_folder(folder / "index", model, folder / "gallery", pattern=CAMERAS)

        built = timed(f"encode {len(people):,} pictures", rows, build)
        again = timed("once more, nothing is new", rows, build)
        index = again.index
        print(f"encoded {len(built.encoded)}, then {len(again.encoded)}; kept {again.kept}")
        imgs = load_pictures(paths, model.preprocessing).imgs
        query = timed(f"encode {len(imgs)} queries", rows, lambda: encode_images(model, imgs))
        camids, pids = (np.array([each[i] for each in said]) for i in (1, 0))
        allowed = camids[:, None] != index.camids
        gallery = index.features_of(slice(0, len(index)))

        def by_features(number: int) -> Any:
            return feature_candidates(query.features, gallery, number, allowed=allowed)

        by_faiss = timed("100 candidates each, FAISS", rows, lambda: by_features(100))
        with MilvusFeatures(index, folder / "features.db") as milvus:
            timed("features to milvus-lite", rows, milvus.update)
            filters, sought = other_cameras(camids), query.features
            by_milvus = timed("100 candidates each, milvus-lite", rows,
                              lambda: milvus.candidates(sought, 100, filter=filters))  # fmt: skip
        pairs = zip(by_faiss.tolist(), by_milvus.tolist(), strict=True)
        alike = np.mean([len({*first} & {*second}) for first, second in pairs])
        print(f"of 100 candidates, FAISS and milvus-lite have {alike:.2f} in common")
        by_all = by_features(len(index))
        found = timed("compare attention, with maps", rows,
                      lambda: index.search(model, query, candidates=by_faiss))  # fmt: skip
        every = timed("compare all of other cameras", rows,
                      lambda: index.search(model, query, candidates=by_all))  # fmt: skip
        same = [len({*a} & {*b}) for a, b in zip(found.names, every.names, strict=True)]
        print(f"of the 10 nearest of all, {np.mean(same) / 10:.2%} are among 100 candidates")
        right = [[people[each] == pid for each in names]
                 for names, pid in zip(found.names, pids, strict=True)]  # fmt: skip
        print(f"rank-1 {np.mean([each[0] for each in right]):.1%}")

        others = index_folder(folder / "others", model, data / "bounding_box_train").index
        labelled = LabelledEncodings(others, others.pids, others.camids)
        for rate in (0.01, 0.001):
            calibrated = partial(calibrate_gallery, model, labelled, rate)
            limit = timed(f"calibrate {rate:.1%} on 1,000 pictures", rows, calibrated)
            leads = [each[: len(names)] for each, names in zip(
                right, found.matches(limit.threshold), strict=True)]  # fmt: skip
            print(f"at {rate:.1%} false alarms: {sum(map(bool, leads))} queries with leads, "
                  f"{sum(map(len, leads))} leads, {sum(map(sum, leads))} right; "
                  f"TAR {limit.true_accept_rate:.1%}")  # fmt: skip
        page = timed(f"write the page of {len(paths)} queries", rows, lambda: save_search_page(
            folder / "search.html", found, dict(zip(paths, paths, strict=True)),
            folder / "gallery", threshold=limit, searched=len(index),
        ))  # fmt: skip
        print(f"the page has {page.stat().st_size / 2**20:.1f} MiB")
    print(markdown(["What", "Processor time"], rows))


if __name__ == "__main__":
    main()
