"""Every block of code in the documents runs as it stands, on small data."""

import importlib
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from documents import DOCS, PAGES, README, World, blocks, command_lines, name_of, run, sections

import casn_plugin.engine

OPTIONAL = {"qdrant_client", "lancedb"}  # other engines, in recipes
WITH_PYTHON = [page for page in PAGES if any(each.language == "python" for each in blocks(page))]


@pytest.fixture(scope="module")
def world(tmp_path_factory, market_root):
    """A folder and a model, data and pictures for what the documents run."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CASN_PLUGIN_CACHE", str(folder))
        yield World(folder, market_root)


@pytest.fixture
def offline(monkeypatch):
    """One process that torchrun may have started, and new weights in place of downloads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    torchreid = importlib.import_module("torchreid")
    build = torchreid.models.build_model

    def build_anew(name: str, num_classes: int, *args: Any, **kwargs: Any) -> Any:
        return build(name, num_classes, *args, **{**kwargs, "pretrained": False, "use_gpu": False})

    monkeypatch.setattr(torchreid.models, "build_model", build_anew)
    few = {"num_train_pids": 2, "num_test_pids": 2, "progress": False}
    monkeypatch.setattr(casn_plugin.engine.EmbeddedPedestrians, "options", few)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if "tutorials" not in str(page)],
                         ids=name_of)  # fmt: skip
def test_the_code_of_a_page_runs_as_it_stands(page, world, offline, capsys):
    for section in sections(page):
        names = world.names(name_of(page), section[0].section)
        for block in section:
            try:
                run(page, block, names)
            except ModuleNotFoundError as error:
                assert error.name in OPTIONAL
        if name_of(page) == "explanation/attention-basis.md":
            assert capsys.readouterr().out == "tensor(True)\n"
        world.model.flip = False


def test_the_tutorial_of_the_search_runs(world, example, monkeypatch, capsys):
    page = DOCS / "tutorials" / "search.md"
    monkeypatch.chdir(world.folder / "data")
    settings = {"sources": ["market1501"], "height": 64, "width": 32, "batch_size": 8}
    monkeypatch.syspath_prepend(EXAMPLES)
    script = importlib.import_module("search_pictures")
    trained = importlib.import_module("train_casn_pcb")
    monkeypatch.setitem(trained.PRESETS, "embedded", trained.PRESETS["embedded"] | settings)
    options = ["--root", str(world.market), "--max-epoch", "1", "--workers", "0", "--device", "cpu"]
    names: dict[str, Any] = {}
    (blocks_of_it,) = sections(page)
    for block in blocks_of_it:
        if block.language == "python":
            run(page, block, names)
            continue
        ((_, command, *given),) = command_lines(block.text)
        if command == "examples/train_casn_pcb.py":  # one epoch on few people is the tenth
            trained.main([*given, *options])
            folder = Path("log", "casn_pcb", "model")
            shutil.copy(folder / "model.pth.tar-1", folder / "model.pth.tar-10")
            continue
        capsys.readouterr()
        script.main(given)
    said = capsys.readouterr().out
    assert "0 encoded, 60 kept" in said and "150 pictures: 150 encoded" in said
    found = Path("search.html").read_text(encoding="utf-8")
    assert found.count("<article") == 2 and "pairs" in found


def sides(diff: str) -> tuple[str, str]:
    """Returns what a difference takes and what it gives."""
    old, new = (
        "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in (" ", sign))
        for sign in "-+"
    )
    return old, new


def test_three_lines_make_torchreids_quick_start_casn(offline, market_root, tmp_path, monkeypatch):
    (block,) = (each for each in blocks(README) if each.language == "diff")
    changed = [line for line in block.text.splitlines() if line.startswith("+")]
    assert len(changed) == 3
    torchreid = importlib.import_module("torchreid")
    small = {"height": 64, "width": 32, "batch_size_train": 8, "workers": 0, "use_gpu": False}
    small["root"] = str(market_root)
    manager = torchreid.data.ImageDataManager
    monkeypatch.setattr(torchreid.data, "ImageDataManager",
                        lambda **given: manager(**given | small))  # fmt: skip
    light = torchreid.models.build_model
    monkeypatch.setattr(torchreid.models, "build_model",
                        lambda name, classes: light("osnet_x0_25", classes))  # fmt: skip
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.chdir(tmp_path)
    for code, kind in zip(
        sides(block.text), ("ImageSoftmaxEngine", "ImageCASNEngine"), strict=True
    ):
        code = code.replace("max_epoch=60", "max_epoch=1")
        names = {
            "torchreid": torchreid,
            **{n: getattr(casn_plugin, n) for n in casn_plugin.__all__},
        }
        exec(code, names)
        assert type(names["engine"]).__name__ == kind
    assert names["engine"].history[0]["loss_sa"] > 0
    (start,) = (each for each in blocks(DOCS / "index.md") if each.language == "diff")
    for line in changed[:2]:
        assert line in start.text


def test_the_losses_of_the_readme_run_when_pasted():
    (block,) = (each for each in blocks(README) if each.language == "python")
    names: dict[str, Any] = {}
    run(README, block, names)
    assert all(each.grad is not None for each in names["network"].parameters())
