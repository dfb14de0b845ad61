#!/usr/bin/env python
"""Finds people in a folder of pictures, without labels, and shows them on a page for any browser.

    python examples/search_pictures.py --gallery pictures --query person.jpg \
        --checkpoint log/casn_pcb/model/model.pth.tar-10

The folder is encoded once; another run encodes only what is new. The checkpoint is one of
train_casn_pcb.py, which must lie beside this file, or a folder of save_pretrained; --network takes
one that never saw CASN instead, as explain_any_network.py does. From which distance on nobody is
found is calibrated on labelled pictures of other people, once: --calibrate FOLDER.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from explain_any_network import load_model, networks
from train_casn_pcb import PRESETS, build_backbone, make_parser

from casn_plugin import CASN, GalleryIndex, folders, ranking_table
from casn_plugin.calibration import load_calibration, save_calibration
from casn_plugin.checkpoint import load_checkpoint, load_weights
from casn_plugin.doors import check_count, check_fraction, check_weight
from casn_plugin.explanation import save_search_page
from casn_plugin.loading import encode_images
from casn_plugin.packages import check_device
from casn_plugin.picturenames import MARKET1501, fields_of, read_name
from casn_plugin.pretrained import from_pretrained
from casn_plugin.ranking import MilvusFeatures, feature_candidates
from casn_plugin.retrieval import LabelledEncodings, calibrate_gallery
from casn_plugin.tables import Labels


def trained_model(path: Path) -> CASN:
    """Returns the model of a checkpoint of train_casn_pcb.py, or of a folder."""
    if path.is_dir():
        return from_pretrained(path)
    told = path.parent.parent / "results.json"  # says with which options it was trained
    said = json.loads(told.read_text())["args"] if told.is_file() else PRESETS["embedded"]
    options = {**vars(make_parser().parse_args([])), **said, "weights": "none", "device": "cpu"}
    args, state = argparse.Namespace(**options), load_checkpoint(path)["state_dict"]
    heads = [each for name, each in state.items() if name.startswith("classifier.")]
    backbone = build_backbone(args, num_classes=len(heads[-1]))  # of the last layer's bias
    model = CASN(backbone, input_size=(args.height, args.width))
    load_weights(model, path)
    return model


def candidates(args: argparse.Namespace, index: GalleryIndex, features: torch.Tensor) -> Any:
    """Returns rows of the index for each query: not itself and, if asked for, other cameras'."""
    own = [folders.name_in(args.gallery, path) for path in args.query]
    camids = [read_name(name, args.pattern).camid for name in own]
    camids = camids if args.other_cameras else [-1] * len(own)
    if args.milvus:
        there, filters = set(index.names), []
        for name, camid in zip(own, camids, strict=True):
            asked = [f"({args.filter})"] if args.filter else []
            asked += [f"camid != {camid}"] if camid >= 0 else []
            asked += [f"name != {json.dumps(name, ensure_ascii=False)}"] if name in there else []
            filters.append(" and ".join(asked))
        with MilvusFeatures(index, args.milvus) as milvus:
            milvus.update(fields_of(index.names, args.pattern), progress=True)
            return milvus.candidates(features, args.candidates, filter=filters)
    allowed = np.array(index.names) != np.array(own)[:, None]
    allowed &= (index.camids != np.array(camids)[:, None]) | (np.array(camids)[:, None] < 0)
    gallery = index.features_of(slice(0, len(index)))
    return feature_candidates(features, gallery, args.candidates, allowed=allowed)


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for what can't be, before anything is loaded or encoded."""
    for option in ("gallery", "calibrate"):
        folder = getattr(args, option)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"--{option}: there is no folder {folder}")
    if args.query and not any(Path(path).is_file() for path in args.query):
        raise ValueError(f"--query: there is no file {args.query[0]}")
    if args.weights and not Path(args.weights).is_file():
        raise ValueError(f"--weights: there is no file {args.weights}")
    if args.network and args.network not in networks():
        raise ValueError(f"--network: expected one of {', '.join(networks())}, got {args.network}")
    check_count("--topk", args.topk)
    check_count("--candidates", args.candidates)
    check_count("--workers", args.workers, least=0)
    check_fraction("--false-alarm-rate", args.false_alarm_rate)
    check_weight("--threshold", args.threshold or 0)
    for table, endings in ((args.json, (".json", ".jsonl")), (args.csv, (".csv",))):
        if table and Path(table).suffix not in endings:
            raise ValueError(f"expected a table that ends in {' or '.join(endings)}, got {table}")
    re.compile(args.pattern)
    check_device(args.device)


def main(argv: list[str] | None = None) -> None:
    """Searches, writes the page and the tables, and prints who was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s --gallery FOLDER --checkpoint FILE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--gallery", required=True, help="folder of pictures, at any depth")
    add("--query", nargs="+", default=[], metavar="FILE", help="whom to search for")
    add("--checkpoint", type=Path, help="of train_casn_pcb.py, or a folder of save_pretrained")
    add("--network", help="instead: a name of torchreid's or torchvision's, as it is")
    add("--weights", help="of --network")
    add("--index", type=Path, default=Path("log/search"), help="folder where encodings are kept")
    add("--out", default="search.html", help="page to write")
    add("--json", help="table to write, .json or .jsonl")
    add("--csv", help="table to write, .csv")
    add("--topk", type=int, default=10, help="matches to show for each query")
    add("--candidates", type=int, default=100, help="so many nearest by features are compared")
    add("--other-cameras", action="store_true", help="leave out the query's own camera")
    add("--pattern", default=MARKET1501, help="what names say: groups pid, camid, time, ...")
    add("--milvus", help="let Milvus find candidates: a path that ends in .db, or an address")
    add("--filter", help="whom Milvus may find, such as 'camid != 3 and time > 100'")
    add("--calibrate", metavar="FOLDER", help="labelled pictures of people in no training set")
    add("--false-alarm-rate", type=float, default=0.001, help="to calibrate for")
    add("--threshold", type=float, help="distance from which on nobody is found, uncalibrated")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="processes that read pictures")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.network):
        parser.error("name a model: either --checkpoint or --network")
    if args.checkpoint and not args.checkpoint.exists():
        parser.error(f"--checkpoint: there is no file {args.checkpoint}")
    if args.filter and not args.milvus:
        parser.error("--filter is an expression of Milvus: it needs --milvus")
    try:
        check_options(args)
    except (ValueError, re.error) as error:
        parser.error(str(error))
    named = load_model(args.network, args.weights) if args.network else None
    model = (named or trained_model(args.checkpoint)).to(args.device).eval()
    index_folder = partial(folders.index_folder, model=model, pattern=args.pattern,
                           workers=args.workers, progress=True)  # fmt: skip
    gallery = index_folder(args.index / "gallery", folder=args.gallery)
    index, calibration, threshold = gallery.index, args.index / "calibration.json", args.threshold
    print(gallery.describe())
    if args.calibrate:
        others = index_folder(args.index / "others", folder=args.calibrate)
        print(others.describe())
        labelled = LabelledEncodings(others.index, others.index.pids, others.index.camids)
        found = calibrate_gallery(model, labelled, args.false_alarm_rate)
        print(f"Saved {save_calibration(calibration, found, of=index.manifest.model)}: {found}")
    if threshold is None and calibration.is_file():
        threshold = load_calibration(calibration, of=index.manifest.model)
    if not args.query:
        return
    args.query, imgs, damaged = folders.load_pictures(args.query, model.preprocessing)
    if not args.query:
        parser.error(f"--query: {damaged}")
    start = time.time()
    query = encode_images(model, imgs)
    rows = candidates(args, index, query.features)
    result = index.search(model, query, topk=args.topk, candidates=rows)
    print(f"Searched for {len(args.query)} in {time.time() - start:.2f} s")
    limit = getattr(threshold, "threshold", threshold)
    leads = result.names if limit is None else result.matches(limit)
    for path, names in zip(args.query, leads, strict=True):
        print(f"{path}: {', '.join(names) or 'nobody'}")
    for table in filter(None, (args.json, args.csv)):
        ranking_table(result, queries=Labels(args.query), threshold=limit).write(table)
    facts = {"Model": str(args.checkpoint or args.network), "Gallery": args.gallery,
             "Compared for each query": f"{args.candidates} nearest by features"}  # fmt: skip
    page = save_search_page(args.out, result, {path: path for path in args.query}, args.gallery,
                            threshold=threshold, searched=len(index), facts=facts, progress=True,
                            damaged=gallery.damaged | damaged)  # fmt: skip
    print(f"Saved {page}: {page.stat().st_size / 2**20:.1f} MiB, open it in any browser")


if __name__ == "__main__":
    main()
