"""BatchNorm over processes is BatchNorm of the whole batch, twice differentiated too."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import PROGRAMS
from starting import finish_two

from casn_plugin.processes import Processes


@pytest.fixture(scope="module")
def program() -> ModuleType:
    path = PROGRAMS / "normalise_together.py"
    spec = importlib.util.spec_from_file_location("normalise_together", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("normalised")
    finish_two("normalise_together", path)
    return path


@pytest.mark.parametrize("kind", ["maps", "flat", "plain", "half"])
def test_two_shares_are_normalised_as_the_whole(program, folder, kind):
    whole = program.normalised(Processes(), kind)
    first, second = (torch.load(folder / f"process{rank}.pt")[kind] for rank in range(2))
    assert first.keys() == whole.keys() and len(first) >= 4
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if kind == "half" else {"rtol": 1e-9, "atol": 1e-9}
    for name, expected in whole.items():
        if kind == "half" and name.startswith(("twice", "gradient", "sum ")):
            continue  # rounded to eight bits on the way
        if name.startswith(("state ", "sum ")):
            found = first[name]
            assert torch.equal(found, second[name]), name
        else:
            found = torch.cat([first[name], second[name]])
        assert found.dtype == expected.dtype, name
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda s, n=name: f"{n}: {s}")
