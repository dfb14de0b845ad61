"""Shape checking of the whole package, small models, and the data that the tests run on."""

import copy
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings
from jaxtyping import config, install_import_hook

# every shape annotation of the package is checked at run time, in tests only
install_import_hook("casn_plugin", "beartype.beartype")

import torch  # noqa: E402
import torchreid  # noqa: E402
from market import write_market  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# whether a mutant is found is asked, not by which shortest example
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# they run everything, so that what they cover says little, and being measured makes them slower
NOT_MEASURED = ("test_backbones", "test_docs", "test_examples", "test_experiments", "test_step")
PROGRAMS = Path(__file__).parent / "programs"
EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "train_casn_pcb.py"
SHARED = Path(__file__).parents[2] / "shared"
WARD = SHARED / "data" / "ward"
MOBILENET = SHARED / "weights" / "mobilenet_v2-b0353104.pth"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves whole trainings and documents out of the coverage of the package.

    And has the documents built first: no process waits for the pages that another one builds.
    """
    items.sort(key=lambda item: item.name != "test_the_documents_build_and_the_tutorial_runs")
    for item in items:
        if item.path.name.startswith(NOT_MEASURED):
            item.add_marker("no_cover")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns shape checking off, so that bad input meets the package's own errors."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts each test from one random state."""
    torch.manual_seed(0)


class TinyBackbone(nn.Module):
    """A plain module with convolution, BatchNorm, an in-place ReLU and two-layer head."""

    def __init__(self, num_classes: int = 5, dim: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
        )  # fmt: skip
        self.relu = nn.ReLU(inplace=True)
        self.embed = nn.Sequential(nn.Linear(8, dim), nn.Tanh())
        self.classifier = nn.Linear(dim, num_classes)


def tiny_forward(backbone: TinyBackbone, imgs: Tensor) -> tuple[Tensor, Tensor]:
    features = backbone.embed(backbone.relu(backbone.features(imgs)).mean((2, 3)))
    return backbone.classifier(features), features


PIDS = torch.tensor([0, 0, 3, 4])


def build_backbone(name: str, **kwargs: Any) -> nn.Module:
    """A backbone of torchreid's factory, untrained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchreid.models.build_model(name, 5, pretrained=False, use_gpu=False, **kwargs)


def state_of(module: nn.Module) -> Any:
    """Modes and hooks of every layer, which must be left as found."""
    modes = {name: layer.training for name, layer in module.named_modules()}
    hooks = {
        name: (len(layer._forward_hooks), len(layer._forward_pre_hooks), len(layer._backward_hooks))
        for name, layer in module.named_modules()
    }
    return modes, hooks, copy.deepcopy(module.__dict__.get("loss"))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/train_casn_pcb.py as a module, so that torch is imported once."""
    spec = importlib.util.spec_from_file_location("train_casn_pcb", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Gives a module of examples/experiments, which import one another as scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES / "experiments")
    return importlib.import_module


def run_here(lab: Callable[[str], ModuleType], arguments: list[str]) -> Any:
    """Returns a study, whose runs are done in this process: `main` starts some of its own."""
    ablation = lab("ablation")
    args = ablation.parse_args(arguments)
    file = lab("studies").file_of(args.study, args.name, args.family)
    study = lab("results").Study(args.results / file)
    for run in args.runs:
        ablation.run_one(run, study, Path("log.txt"))
    return study


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs a test in a folder of its own, with a cache of its own for rendered pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASN_PLUGIN_CACHE", str(tmp_path))
    return tmp_path


def cells(text: str) -> list[list[str]]:
    """Returns the rows of all tables in Markdown, their headers among them."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| ---" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture(scope="session")
def market_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in Market-1501's layout, of rendered pedestrians, with person masks."""
    root = tmp_path_factory.mktemp("reid-data")
    write_market(root)
    return root
