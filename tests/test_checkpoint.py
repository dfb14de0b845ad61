"""Checkpoints: whole, read without running anything, with every generator's state."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as metric_losses
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from casn_plugin.checkpoint import (
    Checkpoints,
    TrainingState,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from casn_plugin.objective import MetricOptions
from casn_plugin.randomness import random_state


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "model", keep=2)
    assert checkpoints.last is None
    for epoch, best in ((1, True), (2, False), (3, False)):
        checkpoints.save({"epoch": epoch}, is_best=best)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model-best.pth.tar", "model.pth.tar-2", "model.pth.tar-3",
    ]  # fmt: skip
    assert checkpoints.last == checkpoints.newest() == tmp_path / "model" / "model.pth.tar-3"
    assert load_checkpoint(tmp_path / "model" / "model-best.pth.tar") == {"epoch": 1}


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint({"epoch": 1, "weights": torch.ones(3)}, tmp_path / "model")
    before = path.read_bytes()

    def torn(state, file):
        file.write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"epoch": 1, "weights": torch.zeros(3)}, path)
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
    state = {"epoch": 1, "weights": torch.ones(99)}
    whole = save_checkpoint(state, tmp_path / "whole").read_bytes()
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


def test_weights_are_taken_as_far_as_they_fit(tmp_path, unchecked):
    source, target = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, n)) for n in (2, 5))
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "plain")
    save_checkpoint({"epoch": 1, "state_dict": source.state_dict()}, tmp_path / "own")
    for name in ("plain", "own"):
        nn.init.zeros_(target[0].weight)
        own = target[1].weight.clone()
        assert load_weights(target, tmp_path / name) == ["0.weight", "0.bias"]
        assert torch.equal(target[0].weight, source[0].weight)
        assert torch.equal(target[1].weight, own)
    with pytest.raises(ValueError, match="of another network: 0 of 2 tensors"):
        load_weights(nn.Linear(7, 7), tmp_path / "plain")
    save_checkpoint({"state_dict": [1, 2]}, tmp_path / "list")
    with pytest.raises(ValueError, match="of another network: 0 of 2 tensors"):
        load_weights(nn.Linear(7, 7), tmp_path / "list")
    sparse = {name: value.to_sparse() for name, value in source.state_dict().items()}
    save_checkpoint({"state_dict": sparse}, tmp_path / "sparse")
    with pytest.raises(ValueError, match="of another network: 0 of 4 tensors"):
        load_weights(target, tmp_path / "sparse")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state must be a dict, got list"),
        ({}, TypeError, "epoch of the state must be an integer, got NoneType"),
        ({"epoch": -1}, ValueError, "epoch of the state must be >= 0, got -1"),
    ],
)
def test_states_without_an_epoch_are_refused(tmp_path, unchecked, state, error, message):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path).save(state)
    with pytest.raises(TypeError, match="model must be a Module, got str"):
        load_weights("model", tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_what_another_run_left_is_not_deleted_and_the_newest_whole_one_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        Checkpoints(tmp_path).newest()
    for epoch in range(1, 9):  # a run of before, which got further
        save_checkpoint({"epoch": epoch}, tmp_path / f"model.pth.tar-{epoch}")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"epoch": 3})
    assert len(list(tmp_path.glob("model.pth.tar-*"))) == 8
    assert checkpoints.newest().name == "model.pth.tar-3"  # by when it was written
    interrupted = checkpoints.save_interrupted({"epoch": 3, "interrupted": {"batches": 7}})
    assert checkpoints.newest() == interrupted
    interrupted.write_bytes(interrupted.read_bytes()[:50])  # torn by a disk
    assert checkpoints.newest().name == "model.pth.tar-3"
    checkpoints.save({"epoch": 4})
    assert not interrupted.exists()
    assert not (tmp_path / "model.pth.tar-3").exists()  # its own, of before the last


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with (
        Checkpoints(tmp_path).locked(),
        pytest.raises(RuntimeError, match="another run writes .* another save_dir"),
        Checkpoints(tmp_path).locked(),
    ):
        pass
    with Checkpoints(tmp_path).locked():
        pass
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, monkeypatch):
    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"model can't be written: .*PytorchStreamWriter"):
        save_checkpoint({"epoch": 1}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_no_damage_of_one_bit_gives_other_numbers(tmp_path):
    """torch compares no checksum by itself: a flipped bit would be another weight."""
    whole = {"epoch": 1, "state_dict": {"weight": torch.arange(6.0)}}
    path = save_checkpoint(whole, tmp_path / "model")
    data, chance, refused = path.read_bytes(), random.Random(0), 0
    weight = data.index(torch.arange(6.0).numpy().tobytes())
    for place in [*range(weight, weight + 24), *(chance.randrange(len(data)) for _ in range(300))]:
        bit = 1 << chance.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert not weight <= place < weight + 24 and loaded["epoch"] == 1
            assert torch.equal(loaded["state_dict"]["weight"], torch.arange(6.0))
    assert refused > 24


@pytest.mark.parametrize("kind", ["without checksums", "of before zip"])
def test_checkpoints_without_checksums_are_read(tmp_path, monkeypatch, kind):
    if kind == "of before zip":
        torch.save({"epoch": 4}, tmp_path / "model", _use_new_zipfile_serialization=False)
    elif not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes them")
    else:
        torch.serialization.set_crc32_options(False)
        try:
            save_checkpoint({"epoch": 4}, tmp_path / "model")
        finally:
            torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "model") == {"epoch": 4}


def training_of(classes=5, proxies=5, schedule=MultiStepLR, milestones=(2,)):
    """A model with all that goes on beside it, after a step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))
    metric = MetricOptions(metric_loss=metric_losses.ProxyAnchorLoss(proxies, 4))
    parameters = [*model.parameters(), *metric.modules.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    scheduler, scaler = schedule(optimizer, milestones), torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(model(torch.rand(6, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(torch.rand(()).item())
    scheduler.step()
    return TrainingState(model, optimizer, scheduler, scaler, None, metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, "size mismatch for 2.weight"),
        ({"proxies": 4}, "of another metric loss"),
        ({"schedule": CosineAnnealingLR, "milestones": 2}, r"scheduler lacks \['gamma', 'mile"),
        ({"optimizer": {}}, "'param_groups'"),
        ({"scaler": {}}, "state dict is empty"),
        ({"epoch": "last"}, "invalid literal"),
        ({"random_state": {**random_state(), "numpy": None}}, "unpack"),
    ],
)
def test_what_can_not_be_taken_over_changes_nothing(change, message):
    saved = {"optimizer", "scaler", "epoch", "random_state"} & set(change)
    one, other = training_of(), training_of(**({} if saved else change))
    state = other.state(1) | (change if saved else {})
    random.random()
    before = copy.deepcopy(one.state(0))
    with pytest.raises(ValueError, match=f"file is of another model(?s:.*){message}"):
        one.restore(state, "file")
    torch.testing.assert_close(one.state(0), before, rtol=0, atol=0)
    assert one.restore(training_of().state(3)) == 3
