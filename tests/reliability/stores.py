"""What is attacked: right calls of what keeps files, and of the engine, each in a new folder."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchreid
from subjects import SIZE, Case, Tiny, tiny_casn, tiny_forward, write_market
from torch.utils.data import DataLoader

import casn_plugin
from casn_plugin import CASN, Encoding, GalleryIndex, PairSampler, explanation, ranking
from casn_plugin.checkpoint import Checkpoints, load_checkpoint, load_weights, save_checkpoint
from casn_plugin.explanation import lists
from casn_plugin.ranking.fingerprint import fingerprint


def in_a_folder(act: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is given a new folder, which is deleted after it."""

    @functools.wraps(act)
    def call(**given: Any) -> Any:
        folder = Path(tempfile.mkdtemp(prefix="casn-fuzz-"))
        try:
            return act(folder, **given)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return call


def stores() -> dict[str, Case]:
    """Returns a right call of each function that keeps files, by its name."""
    model = tiny_casn()
    imgs = torch.rand(5, 3, *SIZE)
    part = model.encode(imgs)
    people = {"pids": [1, 1, 2, 2, -1], "camids": [0, 1, 0, 1, 0]}
    items = [(img, pid, camid) for img, pid, camid in zip(imgs, *people.values(), strict=True)]

    def opened(folder: Path) -> GalleryIndex:
        index = GalleryIndex.create(folder / "index", model)
        index.add(part, names=list("abcde"), **people)
        return index

    @in_a_folder
    def create(folder: Path, **given: Any) -> int:
        return len(GalleryIndex.create(folder / "index", **given))

    @in_a_folder
    def open_(folder: Path, **given: Any) -> int:
        return len(GalleryIndex(opened(folder).folder, **given))

    @in_a_folder
    def add(folder: Path, **given: Any) -> list[str]:
        index = opened(folder)
        try:
            index.add(**given)
        except Exception:
            assert len(GalleryIndex(index.folder)) == 5, "rows were lost"
            raise
        return [*index.names, *GalleryIndex(index.folder).names]

    @in_a_folder
    def extend(folder: Path, **given: Any) -> int:
        index = opened(folder)
        try:
            index.extend(**given)
        except Exception:
            assert len(GalleryIndex(index.folder)) == 5, "rows were lost"
            raise
        return len(GalleryIndex(index.folder))

    @in_a_folder
    def remove(folder: Path, **given: Any) -> int:
        index = opened(folder)
        index.remove(**given)
        return len(GalleryIndex(index.folder))

    @in_a_folder
    def take(folder: Path, rows: Any) -> Encoding:
        taken = opened(folder)[rows]
        return Encoding(taken.features.clone(), taken.maps.clone())

    @in_a_folder
    def features_of(folder: Path, rows: Any) -> Any:
        return opened(folder).features_of(rows).clone()

    @in_a_folder
    def search(folder: Path, **given: Any) -> Any:
        return opened(folder).search(**given)

    @in_a_folder
    def search_again(folder: Path, **given: Any) -> Any:
        index = GalleryIndex.create(folder / "index", model, maps=False)
        index.add(part, names=list("abcde"), **people)
        again = casn_plugin.EncodedAgain(model, index, [*imgs])
        return index.search(maps=again, **given)

    @in_a_folder
    def checkpoints(folder: Path, **given: Any) -> Any:
        kept = Checkpoints(folder, given.pop("keep"))
        return load_checkpoint(kept.save(**given))

    @in_a_folder
    def weights(folder: Path, state: Any, model: Any) -> Any:
        return load_weights(model, save_checkpoint({"state_dict": state}, folder / "a.pth"))

    @in_a_folder
    def report(folder: Path, **given: Any) -> Any:
        explained = explanation.explain_ranking(model, items[:2], items, topk=2)
        explanation.save_report(folder / "report.html", explained, **given)

    figures = {"mAP": 0.5, "mINP": 0.25, "cmc": [0.5, 1.0]}
    results = {**dict.fromkeys(("features", "attention", "fused"), figures), "auc": 0.5}
    every: dict[str, Case] = {
        "GalleryIndex.create": (
            create, {"model": model, "dtype": torch.float16, "maps": True},
        ),
        "GalleryIndex": (open_, {"verify": True, "timeout": 1.0}),
        "GalleryIndex.add": (
            add, {"encoding": part, "names": list("fghij"), **people, "duplicates": "refuse"},
        ),
        "GalleryIndex.extend": (
            extend,
            {"model": model, "loader": DataLoader(_Dicts(items), batch_size=2), "shard_size": 2,
             "duplicates": "skip", "distributed": False, "progress": False},
        ),
        "GalleryIndex.remove": (remove, {"rows": [0, 2]}),
        "GalleryIndex[rows]": (take, {"rows": [0, 2]}),
        "GalleryIndex.features_of": (features_of, {"rows": [0, 2]}),
        "GalleryIndex.search": (
            search,
            {"model": model, "query": imgs[:2], "topk": 2, "row_threshold": 0.2,
             "attention_weight": 0.1},
        ),
        "GalleryIndex.search, again": (
            search_again, {"model": model, "query": imgs[:2], "topk": 2},
        ),
        "EncodedAgain": (
            lambda **given: len(casn_plugin.EncodedAgain(**given)),
            {"model": model, "gallery": part.features, "pictures": [*imgs],
             "batch_size": 2, "tolerance": 0.01,
             "max_memory": 2**20},
        ),
        "EncodedAgain[rows]": (
            lambda rows, **given: casn_plugin.EncodedAgain(model, **given)[rows],
            {"rows": [0, 2], "gallery": part.features, "pictures": [*imgs]},
        ),
        "fingerprint": (fingerprint, {"model": model}),
        "Checkpoints.save": (
            checkpoints,
            {"state": {"epoch": 3, "state_dict": {"weight": torch.rand(2)}}, "is_best": True,
             "keep": 2},
        ),
        "load_weights": (weights, {"state": dict(model.state_dict()), "model": tiny_casn()}),
        "save_report": (
            report, {"results": results, "title": "Report", "number": 0},
        ),
        "html_report": (
            lambda **given: list(explanation.html_report(
                explanation.explain_ranking(model, items[:2], items, topk=2), **given)),
            {"results": results, "title": "Report", "number": 0},
        ),
        "ranks of queries": (
            lambda row, **given: (
                lambda found: [found[row], *found.worst(**given)]
            )(lists.explain_ranking(model, items[:2], items, topk=2)),
            {"row": 1, "number": 1},
        ),
        "plot_cmc": (_closed(explanation.plot_cmc), {"results": {"fused": figures}, "max_rank": 2}),
        "plot_curves": (
            _closed(explanation.plot_curves),
            {"history": [{"epoch": 1, "loss": 1.0}], "results": results, "max_rank": 2},
        ),
        "Compute": (
            ranking.Compute,
            {"max_memory": 2**20, "precision": torch.bfloat16, "distributed": False,
             "progress": False},
        ),
        "RankingOptions": (
            ranking.RankingOptions,
            {"normalization": "unit", "attention_weight": 0.1, "shortlist": 10,
             "gallery_dir": "folder", "cross_camera": True, "junk_pids": (-1,),
             "compute": ranking.Compute()},
        ),
        "PairClassifier": (
            casn_plugin.PairClassifier, {"feature_dim": 6, "hidden_dim": 4, "seed": 0},
        ),
        "fused_distmats": (
            ranking.fused_distmats,
            {"model": model, "query": part[:2], "gallery": part,
             "feature_distances": torch.cdist, "options": ranking.RankingOptions(),
             "row_threshold": 0.2},
        ),
    }  # fmt: skip
    return every


def engines(root: Path) -> dict[str, Case]:
    """Returns a right call of the engine on generated people, and of what it is given."""
    write_market(root)
    with contextlib.redirect_stdout(None):  # torchreid's own
        torchreid_data = torchreid.data.ImageDataManager(
            root=str(root), sources="market1501", height=SIZE[0], width=SIZE[1],
            batch_size_train=8, workers=0, use_gpu=False,
        )  # fmt: skip
    datamanager = PairSampler.install(torchreid_data)
    model = CASN(_Torchreid(datamanager.num_train_pids), forward=tiny_forward, input_size=SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {
        "lambda_ia": 0.5, "lambda_sa": 0.05, "logged_pairs": 0, "keep_checkpoints": 2,
        "autocast": None, "use_gpu": False, "label_smooth": True,
        "identification": casn_plugin.IdentificationAttentionLoss(),
        "siamese": casn_plugin.SiameseAttentionLoss(),
        "ranking": ranking.RankingOptions(),
    }  # fmt: skip
    engine = casn_plugin.ImageCASNEngine
    given = {"datamanager": datamanager, "model": model, "optimizer": optimizer, **options}
    return {
        "ImageCASNEngine": (engine, given),
        "PairSampler.install": (
            lambda **given: PairSampler.install(datamanager, **given),
            {"positive_fraction": 0.5, "seed": 0},
        ),
    }


class _Torchreid(Tiny):
    """A backbone for as many people."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = torch.nn.Linear(6, classes)


class _Dicts(torch.utils.data.Dataset[dict[str, Any]]):
    """Images as torchreid's data sets give them."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        img, pid, camid = self.items[row]
        return {"img": img, "pid": pid, "camid": camid, "impath": f"image {row}"}


def _closed(plot: Callable[..., Any]) -> Callable[..., None]:
    """Returns a function that plots, and closes the figure."""

    @functools.wraps(plot)
    def call(**given: Any) -> None:
        plot(**given).clear()

    return call
