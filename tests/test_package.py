"""The package as a whole: its rooms and their imports, its examples in docstrings, its names."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS

import casn_plugin

ROOT = Path(casn_plugin.__file__).parent
# from the bottom; a wing's own files likewise, its face above them
ROOMS = (
    "packages", "files", "picturefiles", "doors", "preprocessing", "loaders", "randomness", "heap",
    "processes", "identities", "scores", "kernels", "layouts", "hooks", "twins", "attention",
    "batch_pairs", "losses", "siamese",
    "sampler", "shares", "encoding", "basis", "evidence", "positions", "evaluation",
    "ranked", "calibration", "quality", "heads", "tryout", "taps", "backbones", "model",
    "objective", "loading", "imputation", "faithfulness", "export", "pretrained",
    *(f"ranking.{name}" for name in (
        "neighbourhoods", "reranking", "tiles", "compute", "closed_form", "sides", "pairs",
        "candidates", "distances", "fused", "mutual", "search", "company", "manifest", "kept",
        "shards", "filling", "contents", "store", "fingerprint", "index", "connection", "milvus",
        "again",
    )),
    "ranking", "picturenames", "folders", "tables", "retrieval",
    *(f"explanation.{name}" for name in (
        "pictures", "figures", "curves", "pair", "lists", "fixed_pairs", "board", "pages", "report",
        "search_page",
    )),
    "explanation", "batchnorm", "checkpoint", "checks", "training", "parallel",
    *(f"pedestrians.{name}" for name in (
        "colours", "looks", "cameras", "surfaces", "solids", "body", "street", "picture",
        "dataset",
    )),
    "pedestrians", "engine", "__main__",
)  # fmt: skip
WITHOUT_EXAMPLES = {
    "engine",
    "ranking",
    "explanation",
    "pedestrians",
    "explanation.report",
    "explanation.board",
    "explanation.search_page",
    "ranking.filling",
}


def file_of(room: str) -> Path:
    path = ROOT.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def test_only_the_engine_needs_torchreid_and_the_import_is_light():
    program = PROGRAMS / "without_torchreid.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ROOMS)
def test_doctests(name):
    module = importlib.import_module(f"casn_plugin.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name in WITHOUT_EXAMPLES or name.startswith("pedestrians.")


def test_rooms_import_downward_only():
    files = {path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}
    assert files == {file_of(room) for room in ROOMS}
    for level, room in enumerate(ROOMS):
        for name in imported(file_of(room)):
            package, _, target = name.partition(".")
            assert package != "torchreid" or room == "engine", f"{room} imports {name}"
            if package == "casn_plugin" and target in ROOMS:
                assert ROOMS.index(target) < level, f"{room} imports {target}"
            assert name != "casn_plugin", f"{room} imports the whole package"


def test_pedestrians_know_nothing_of_ours():
    for path in (ROOT / "pedestrians").glob("*.py"):
        ours = [name for name in imported(path) if name.startswith("casn_plugin")]
        assert all(name.startswith("casn_plugin.pedestrians") for name in ours), path.name


def test_rooms_and_classes_are_of_a_size():
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 480, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                assert len(methods) <= 18, f"{path.name}: {node.name}"


def test_public_names_are_there():
    for name in casn_plugin.__all__:
        assert getattr(casn_plugin, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        casn_plugin.no_such_name  # noqa: B018
    assert (ROOT / "py.typed").exists()
