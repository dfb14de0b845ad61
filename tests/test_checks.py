"""What would fail after hours is found before the first step."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from torch.utils.data import DataLoader, Dataset

from casn_plugin import CASN, PairSampler
from casn_plugin.checks import (
    CheckedData,
    check_datamanager,
    check_optimizer,
    check_options,
    check_processes,
    check_test_set,
)
from casn_plugin.processes import Processes


class Rows(Dataset):
    k_tfm = 1

    def __init__(self, rows) -> None:
        self.train = self.data = rows

    def __len__(self) -> int:
        return len(self.train)


def manager(pids=(0, 0, 1, 1), **attributes):
    rows = Rows([(f"{i}.jpg", pid, i % 2, 0) for i, pid in enumerate(pids)])
    loader = DataLoader(rows, batch_size=2)
    found = SimpleNamespace(train_loader=loader, data_type="image", num_train_pids=len(set(pids)))
    for name, value in attributes.items():
        setattr(rows if hasattr(rows, name) else found, name, value)
    return found


def test_a_sound_data_manager_passes():
    check_datamanager(manager(), pairs=False)
    check_datamanager(PairSampler.install(manager()), pairs=True)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (manager(data_type="video"), TypeError, "expected an ImageDataManager, .* 'video'"),
        (manager(k_tfm=2), ValueError, "k_tfm must be 1, got 2"),
        (manager(pids=(1, 1, 2, 2)), ValueError, r"classes 0 \.\.\. 1 .*2 is no class"),
        (manager(pids=(0, 0, -1, -1)), ValueError, "-1 is no class"),
        (manager(pids=("a", "a", "b", "b")), TypeError, "must be integers, got <U1"),
        (manager(num_train_pids=3), ValueError, "2 is missing"),
        (manager(test_loader={}), ValueError, "with one test set or more, got none"),
        (manager(), ValueError, r"draws no pairs: datamanager = PairSampler\.install"),
    ],
)
def test_data_that_casn_can_not_be_trained_on_are_refused(unchecked, bad, error, message):
    with pytest.raises(error, match=message):
        check_datamanager(bad, pairs="pairs" in message)


def test_something_else_than_a_data_manager_or_an_optimizer_is_named(unchecked):
    with pytest.raises(TypeError, match="an ImageDataManager with a train_loader, got dict"):
        check_datamanager({}, pairs=False)
    for optimizer in ([], None, "sgd"):
        with pytest.raises(TypeError, match="optimizer must be a Optimizer, got"):
            check_optimizer(None, optimizer, pairs=False)


def test_an_optimizer_has_all_that_is_to_be_learned():
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4)
    only = torch.optim.SGD(model.backbone.parameters(), 0.1)
    check_optimizer(model, only, pairs=False)
    with pytest.raises(ValueError, match=r"lacks 4 of .*pair_classifier\.0\.weight"):
        check_optimizer(model, only, pairs=True)
    head = torch.optim.SGD(model.classifier.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"lacks \d+ .*features\.0\.weight"):
        check_optimizer(model, head, pairs=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    check_optimizer(model, head, pairs=True)  # what is frozen need not be there


class Stepless:
    state_dict = step = None


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("dist_metric", "l3", ValueError, "must be 'euclidean' or 'cosine', got 'l3'"),
        ("ranks", [1.5], TypeError, r" \[1.5\] must be an integer, got float"),
        ("ranks", ["1"], TypeError, "must be an integer, got str"),
        ("ranks", "15", TypeError, r"must be several, such as \[1, 5, 10\], got '15'"),
        ("ranks", [], ValueError, r"must be one or more, such as .*, got \[\]"),
        ("ranks", [0, 1], ValueError, "must be at least 1, got 0"),
        ("rerank", "no", ValueError, "must be True or False, got 'no'"),
        ("label_smooth", 0.1, ValueError, "must be True or False, got 0.1"),
        ("print_freq", 0, ValueError, "must be at least 1, got 0"),
        ("eval_freq", "1", TypeError, "must be an integer, got str"),
        ("max_epoch", 3.0, TypeError, "must be an integer, got float"),
        ("save_dir", 5, TypeError, "must be a str or PathLike, got int"),
        ("open_layers", "nope", ValueError, "must be 'features', .* or 'pair_classifier', got"),
        ("open_layers", ["training"], ValueError, "must be .* got 'training'"),
        ("open_layers", 5, TypeError, "must be a str or list or tuple, got int"),
        ("scheduler", "cosine", TypeError, "must have a step.* got str"),
        ("scheduler", Stepless(), TypeError, "must have a step.* got Stepless"),
        ("scheduler", torch.optim.lr_scheduler.StepLR, TypeError, "got .*StepLR.* 'self'"),
    ],
)
def test_options_that_can_not_be_are_named(name, bad, error, message):
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4)
    with pytest.raises(error, match=f"{name}.*{message}"):
        check_options(model, fixbase_epoch=1, **{name: bad})


def test_options_that_can_be_pass():
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match=r"called after each epoch, got ReduceLROnPlateau.*metrics"):
        check_options(model, scheduler=plateau)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    check_options(model, scheduler=scheduler, open_layers="nope", eval_freq=-1, ranks=range(1, 3))
    check_options(model, fixbase_epoch=2, open_layers=["classifier"], rerank=1, save_dir=Path())


def test_paths_are_text_and_their_pictures_are_looked_at(tmp_path):
    train = Rows([(tmp_path / "no.png", 7, 0)])
    query, gallery = Rows([(tmp_path / "a.png", 7, 0)]), Rows([(str(tmp_path / "b.png"), 7, 1)])
    with pytest.raises(ValueError, match=r"3 of 3 pictures can't be read: .*a\.png .*b\.png"):
        CheckedData().check(train, {"set": (query, gallery)}, {})
    assert query.data == [(str(tmp_path / "a.png"), 7, 0)] and isinstance(train.train[0][0], str)


def test_pictures_in_memory_have_no_path_to_look_at(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    CheckedData().check(Rows([(picture, 7, 0), (torch.rand(3, 4, 4), 8, 0)]), {}, {})
    with pytest.raises(ValueError, match=r"1 of 1 pictures can't be read: .*no\.png"):
        CheckedData().check(Rows([(picture, 7, 0), (tmp_path / "no.png", 7, 0)]), {}, {})


def test_queries_have_a_match_in_the_gallery():
    query, gallery = Rows([("q.jpg", 7, 0)]), Rows([("g.jpg", 7, 1), ("h.jpg", 8, 0)])
    check_test_set("set", query, gallery)
    for rows in ([("g.jpg", 7, 0)], [("g.jpg", 8, 1)], [("g.jpg", -1, 1)]):
        with pytest.raises(ValueError, match="none of the 1 queries of set has a match"):
            check_test_set("set", query, Rows(rows))
    check_test_set("set", SimpleNamespace(), gallery)


class Two(Processes):
    """Process 1 of two, of which the other tells what it is given."""

    def __init__(self, other) -> None:
        super().__init__()
        self.rank, self.count, self.other = 1, 2, other

    def gather(self, own):
        return [self.other(own), own]


def test_each_process_draws_its_share_of_the_same_data(monkeypatch):
    check_processes(Processes(), manager())
    share = PairSampler.install(manager())
    check_processes(Processes(), share)
    with pytest.raises(RuntimeError, match=r"each of 2 processes, got PairSampler, .* for 1, as"):
        check_processes(Two(lambda own: own), share)
    with pytest.raises(RuntimeError, match=r"each of 2 processes, got SequentialSampler"):
        check_processes(Two(lambda own: own), manager())
    share.train_loader.sampler.num_replicas, share.train_loader.sampler.rank = 2, 1
    check_processes(Two(lambda own: own), share)
    with pytest.raises(RuntimeError, match=r"each of 1 processes, .* for 2, as process 1"):
        check_processes(Processes(), share)
    for changed in (1, 2, 3):  # data, seed, batches
        with pytest.raises(RuntimeError, match="same data, seed and batches in all processes"):
            check_processes(
                Two(lambda own, at=changed: (*own[:at], "other", *own[at + 1 :])), share
            )
    with pytest.raises(RuntimeError, match="a share for each of 2"):  # of which the other says so
        check_processes(Two(lambda own: (True, *own[1:])), share)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        RuntimeError, match=r"started 4 processes, .*casn_plugin\.processes\.launched\(\)"
    ):
        check_processes(Processes(), manager())
