"""The code of the documents, and a world in which each section of a page can be run."""

import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchreid
from conftest import EXAMPLES, build_backbone
from filelock import FileLock
from torch import nn

import casn_plugin
from casn_plugin import CASN, GalleryIndex, ImageCASNEngine, PairSampler
from casn_plugin.folders import index_folder
from casn_plugin.loading import encode_loader

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
RUNS_AS_A_WHOLE = {"tutorials/search.md"}
SIZE = {"height": 64, "width": 32}


@pytest.fixture(scope="session", name="html")
def built_pages(tmp_path_factory):
    """The documents as pages, built once for all processes that test."""
    pytest.importorskip("myst_nb")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "documents"
    with FileLock(base / "documents.lock"):
        if not folder.exists():
            folder.mkdir()
            ignored = shutil.ignore_patterns("_build", "log", "__pycache__")
            shutil.copytree(DOCS, folder / "docs", ignore=ignored)
            tutorial = folder / "docs" / "tutorials" / "train.ipynb"
            code = tutorial.read_text(encoding="utf-8")
            assert "max_epoch=8" in code
            tutorial.write_text(code.replace("max_epoch=8", "max_epoch=2"), encoding="utf-8")
            (folder / "examples").mkdir()
            shutil.copy(EXAMPLES / "own_loop.py", folder / "examples")
            command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going"]
            environment = {**os.environ, "CASN_PLUGIN_CACHE": str(folder / "cache"),
                           "OMP_NUM_THREADS": "1"}  # fmt: skip
            environment.pop("PYTEST_XDIST_WORKER", None)
            done = subprocess.run([*command, "docs", "html"], cwd=folder, capture_output=True,
                                  text=True, env=environment)  # fmt: skip
            (folder / "said").write_text(done.stderr if done.returncode else "")
    said = (folder / "said").read_text()
    assert not said, said
    return folder / "html"


def written_pages(html: Path) -> list[Path]:
    """The pages that somebody wrote, not those of source code and indices."""
    written = [name_of(page).removesuffix(".md") for page in PAGES] + ["tutorials/train"]
    return [html / f"{name}.html" for name in written]


class Block(NamedTuple):
    """A piece of code in a document: where it begins, its language, and its text."""

    section: str
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(DOCS if DOCS in page.parents else ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page, with the heading of the section that they stand in."""
    section, fence, start, lines = "", None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opened = re.match(r"(`{3,})(.*)", line)
        if fence is None and opened:
            fence, language, start, lines = opened[1], opened[2].strip(), number, []
        elif fence is not None and line.strip() == fence:
            yield Block(section, start, language, "\n".join(lines) + "\n")
            fence = None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("## "):
            section = line[3:]
    assert fence is None, f"{page}: the block of line {start} is not closed"


def prose(text: str) -> str:
    """Returns Markdown without its blocks of code."""
    return re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def sections(page: Path) -> list[list[Block]]:
    """Returns the blocks to run that share their names: of a section, or of a whole page."""
    found = [each for each in blocks(page) if each.language == "python"]
    if name_of(page) in RUNS_AS_A_WHOLE:
        return [[each for each in blocks(page) if each.language in ("python", "bash")]]
    return [list(group) for _, group in itertools.groupby(found, lambda each: each.section)]


def run(page: Path, block: Block, names: dict[str, Any]) -> None:
    """Runs a block as it stands, errors named by its place in the document."""
    code = "\n" * block.line + block.text
    exec(compile(code, name_of(page), "exec"), names)


def small_datamanager(root: Path) -> Any:
    """The small data set in Market-1501's layout, before anything is installed."""
    return torchreid.data.ImageDataManager(
        root=str(root), sources="market1501", batch_size_train=8, batch_size_test=8, workers=0,
        use_gpu=False, **SIZE,
    )  # fmt: skip


def torchreid_knows() -> dict[str, Any]:
    """Returns torchreid's own list of image data sets by name."""
    module = sys.modules[torchreid.data.register_image_dataset.__module__]
    return vars(module)["__image_datasets"]


class BriefEngine(ImageCASNEngine):
    """The engine, which trains for one epoch however many are asked for."""

    def run(self, **options: Any) -> None:
        super().run(**options | {"max_epoch": min(1, options.get("max_epoch", 1))})


class Embedding(nn.Module):
    """A network that is read by a function, as own-network.md reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer3 = nn.Conv2d(3, 8, 16, 16)
        self.classifier = nn.Linear(8, 5)

    def embed(self, imgs: torch.Tensor) -> torch.Tensor:
        return self.layer3(imgs).relu().mean((2, 3))


class Transformer(nn.Module):
    """A vision transformer of 16 x 8 patches and a class token, as nobody else names its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 129, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(imgs).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(imgs), -1, -1), tokens], 1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


class World:
    """What the documents take for granted: a model, data, pictures and an index of them.

    Args:
        folder: an empty one, in which the documents run.
        market: the small data set.
    """

    def __init__(self, folder: Path, market: Path) -> None:
        self.folder, self.market = folder, market
        data = market / "market1501" / "Market-1501-v15.09.15"
        mine = folder / "data" / "my_people"
        parts = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
        for own, part in parts.items():
            shutil.copytree(data / part, mine / own)
        for picture in (data / "bounding_box_test").iterdir():  # eight identities make a PK batch
            shutil.copy(picture, mine / "train")
        shutil.copytree(data / "bounding_box_test", folder / "pictures")
        shutil.copytree(data / "bounding_box_train", folder / "labelled_pictures")
        first, second, *_ = sorted((data / "query").iterdir())
        for name in ("query.jpg", "first.jpg", "person.jpg"):
            shutil.copy(first, folder / name)
        for name in ("gallery.jpg", "second.jpg"):
            shutil.copy(second, folder / name)
        self.model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32)).eval()
        self.datamanager = small_datamanager(market)
        loaders = self.datamanager.test_loader["market1501"]
        self.loader = loaders["gallery"]
        self.query, self.gallery = (
            encode_loader(self.model, loaders[part]) for part in ("query", "gallery")
        )
        index_folder("kept", self.model, "pictures")
        index_folder("others kept", self.model, "labelled_pictures")

    def names(self, page: str, section: str) -> dict[str, Any]:
        """Returns what a section of a page finds, anew for each."""
        self.section = section
        torch.manual_seed(0)
        query, gallery = self.query, self.gallery
        names: dict[str, Any] = {
            **{name: getattr(casn_plugin, name) for name in casn_plugin.__all__},
            "np": np, "torch": torch, "F": F, "Path": Path, "torchreid": torchreid,
            "model": self.model, "backbone": build_backbone("osnet_x0_25"),
            "network": build_backbone("osnet_x0_25"), "net": Embedding(),
            "imgs": torch.rand(8, 3, 64, 32), "pids": torch.tensor([0, 0, 1, 1, 2, 2, 3, 4]),
            "camids": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
            "query": query.encoding, "gallery": gallery.encoding, "loader": self.loader,
            "q_pids": query.pids, "q_camids": query.camids,
            "g_pids": gallery.pids, "g_camids": gallery.camids,
            "index": GalleryIndex("kept"), "others": GalleryIndex("others kept"),
            "first": torch.rand(2, 3, 64, 32), "second": torch.rand(2, 3, 64, 32),
            "index_folder": index_folder,
        }  # fmt: skip
        names |= getattr(self, re.sub(r"\W", "_", page.removesuffix(".md")), dict)()
        return names

    def engine(self) -> dict[str, Any]:
        """An engine that is ready to train, and all that it is made of."""
        model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32))
        optimizer = torchreid.optim.build_optimizer(model, optim="adam", lr=0.0003)
        scheduler = torchreid.optim.build_lr_scheduler(optimizer)
        datamanager = small_datamanager(self.market)
        options = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        return options | {"datamanager": datamanager, "ImageCASNEngine": BriefEngine}

    def guides_batches(self) -> dict[str, Any]:
        learning = importlib.import_module("pytorch_metric_learning")
        importlib.import_module("pytorch_metric_learning.losses")
        importlib.import_module("pytorch_metric_learning.miners")
        made = self.engine()
        PairSampler.install(made["datamanager"])
        activations = torch.rand(8, 4, 8, 4, requires_grad=True)

        torchreid_knows().pop("my_people", None)
        (block,) = (each for each in blocks(DOCS / "guides" / "own-data.md"))
        run(DOCS / "guides" / "own-data.md", block, {})
        return made | {
            "TripletMarginLoss": learning.losses.TripletMarginLoss,
            "BatchHardMiner": learning.miners.BatchHardMiner,
            "pair_classifier": casn_plugin.PairClassifier(4), "activations": activations,
            "features": activations.mean((2, 3)), "model": made["model"].train(),
            "siamese": casn_plugin.SiameseAttentionLoss(pairs=casn_plugin.BatchPairs()),
            "identification": casn_plugin.IdentificationAttentionLoss(),
        }  # fmt: skip

    def guides_processes(self) -> dict[str, Any]:
        return self.engine()

    def guides_explain(self) -> dict[str, Any]:
        made = self.engine()
        PairSampler.install(made["datamanager"])
        engine = ImageCASNEngine(
            made["datamanager"], self.model, torch.optim.SGD(self.model.parameters(), 0.1)
        )
        engine.run(test_only=True, save_dir="tested")
        self.model.eval()
        data = self.datamanager.test_loader["market1501"]
        return {part: data[part].dataset.data for part in ("query", "gallery")} | {"engine": engine}

    def explanation_reading_attention(self) -> dict[str, Any]:
        data = self.datamanager.test_loader["market1501"]
        return {part: data[part].dataset.data for part in ("query", "gallery")}

    def guides_export(self) -> dict[str, Any]:
        names: dict[str, Any] = {"found": SimpleNamespace(threshold=1.0)}
        if self.section == "A trained model in a folder":
            large = torchreid.models.build_model("osnet_x1_0", 751)
            names["model"] = CASN(large, input_size=(64, 32))
        if self.section == "A server without autograd":
            pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
            network = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), *pooled)
            names["model"] = CASN(network, input_size=(64, 32)).eval()
        return names

    def guides_own_data(self) -> dict[str, Any]:
        torchreid_knows().pop("my_people", None)
        return {}

    def guides_own_network(self) -> dict[str, Any]:
        timm, torchvision = map(importlib.import_module, ("timm", "torchvision"))

        def forward(net: Any, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = net.embed(imgs)
            return net.classifier(features), features

        names = {"timm": timm, "torchvision": torchvision, "forward": forward}
        return names | ({"net": Transformer()} if "Tokens" in self.section else {})

    def guides_re_ranking(self) -> dict[str, Any]:
        features = torch.cat([self.query.encoding.features, self.gallery.encoding.features])
        every, queries = torch.cdist(features, features), len(self.query.encoding)
        distances, indices = every.sort(1)
        return {
            "query_gallery": every[:queries, queries:], "query_query": every[:queries, :queries],
            "gallery_gallery": every[queries:, queries:], "Q": queries,
            "distances": distances[:, :30], "indices": indices[:, :30],
        }  # fmt: skip

    def guides_search(self) -> dict[str, Any]:
        return {"rows": torch.arange(12).expand(len(self.query.encoding), -1)}


def command_lines(text: str) -> Iterator[list[str]]:
    """Yields the commands of a block of shell code, each as a list of words."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r"\s&&\s", line):
            if command.strip():
                yield shlex.split(command)


def known_options(script: Path) -> set[str]:
    """Returns the options that a script declares, or one that it imports and takes further."""
    waiting, seen, found = [script], set[Path](), set[str]()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"[\"'](--[\w-]+)", text))
        for name in re.findall(r"[\w]+", " ".join(re.findall(r"^(?:import|from) .*", text, re.M))):
            waiting += [folder / f"{name}.py" for folder in (EXAMPLES, EXAMPLES / "experiments")]
    return found
