"""Checkpoints: whole, read without running anything, with every generator's state."""

import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from casn_plugin.checkpoint import (
    load_checkpoint,
    load_weights,
    preserved_random_state,
    random_state,
    save_checkpoint,
    set_random_state,
)


def draw() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3)


def test_checkpoints_have_torchreids_names_and_the_best_is_kept(tmp_path):
    for epoch, best in ((1, True), (2, False)):
        save_checkpoint({"epoch": epoch}, tmp_path / "model", is_best=best)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-2",
    ]  # fmt: skip
    assert load_checkpoint(tmp_path / "model" / "model-best.pth.tar") == {"epoch": 1}


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint({"epoch": 1, "weights": torch.ones(3)}, tmp_path)
    before = path.read_bytes()

    def torn(state, file):
        file.write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"epoch": 1, "weights": torch.zeros(3)}, tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_checkpoints_of_torchreid_are_read(tmp_path):
    """They hold their rank-1 as a NumPy scalar."""
    for scalar in (np.float32(0.5), np.float64(0.25)):
        torch.save({"state_dict": {}, "rank1": scalar}, tmp_path / "file")
        assert load_checkpoint(tmp_path / "file")["rank1"] == scalar


class Bomb:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return print, ("exploded",)


@pytest.mark.parametrize("forced", [False, True])
def test_files_that_are_no_checkpoints_are_named_and_nothing_of_them_is_run(
    tmp_path, capsys, monkeypatch, forced
):
    if forced:  # the variable turns safe loading off for whoever does not ask for it
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    whole = save_checkpoint({"epoch": 1, "weights": torch.ones(99)}, tmp_path).read_bytes()
    files = {
        "empty": b"",
        "page": b"<html>not found</html>",
        "torn": whole[: len(whole) // 2],
        "pickle": pickle.dumps(Bomb()),
        "latin": pickle.dumps({"name": "caf\xe9"}, protocol=0),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} can't be read as a checkpoint"):
            load_checkpoint(tmp_path / name)
    torch.save({"epoch": Bomb()}, tmp_path / "bomb")
    with pytest.raises(ValueError, match="bomb can't be read as a checkpoint"):
        load_checkpoint(tmp_path / "bomb")
    assert "exploded" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="list is no checkpoint: it holds list"):
        load_checkpoint(tmp_path / "list")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*nothing"):
        load_checkpoint(tmp_path / "nothing")


def test_weights_are_taken_as_far_as_they_fit(tmp_path):
    source, target = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, n)) for n in (2, 5))
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "plain")
    save_checkpoint({"epoch": 1, "state_dict": source.state_dict()}, tmp_path)
    for name in ("plain", "model.pth.tar-1"):
        nn.init.zeros_(target[0].weight)
        own = target[1].weight.clone()
        assert load_weights(target, tmp_path / name) == ["0.weight", "0.bias"]
        assert torch.equal(target[0].weight, source[0].weight)
        assert torch.equal(target[1].weight, own)
    with pytest.raises(ValueError, match="of another network: 0 of 2 tensors"):
        load_weights(nn.Linear(7, 7), tmp_path / "plain")


def test_the_random_state_comes_back(tmp_path):
    state = random_state()
    first = draw()
    save_checkpoint({"epoch": 1, "random_state": state}, tmp_path)
    draw()
    set_random_state(load_checkpoint(tmp_path / "model.pth.tar-1")["random_state"])
    assert draw() == first
    set_random_state(state)
    with pytest.raises(RuntimeError), preserved_random_state():
        draw()
        raise RuntimeError
    assert draw() == first
