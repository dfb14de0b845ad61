"""The package as a whole: its imports, its examples in docstrings, its names."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import casn_plugin

ROOT = Path(casn_plugin.__file__).parent
LAYERS = (
    "attention", "losses", "sampler", "encoding", "ranking", "evaluation", "model", "index",
    "visualization", "explanation", "report", "data", "engine",
)  # fmt: skip


def test_import_loads_neither_torchreid_nor_matplotlib():
    script = (
        "import sys, casn_plugin, casn_plugin.report, casn_plugin.data\n"
        "loaded = {'torchreid', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LAYERS)
def test_doctests(name):
    module = importlib.import_module(f"casn_plugin.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name in ("report", "engine")


def test_modules_import_downward_only():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *LAYERS}
    for level, name in enumerate(LAYERS):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            for imported in names:
                package, _, module = imported.partition(".")
                if package == "casn_plugin":
                    assert LAYERS.index(module) < level, f"{name} imports {module}"
                assert package != "torchreid" or name in ("report", "engine")


def test_public_names_are_there():
    for name in casn_plugin.__all__:
        assert getattr(casn_plugin, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        casn_plugin.no_such_name  # noqa: B018
    assert (ROOT / "py.typed").exists()
