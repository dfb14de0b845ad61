"""What would fail after hours is found before the first step."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from torch.utils.data import DataLoader, Dataset

from casn_plugin import CASN, PairSampler
from casn_plugin.checks import (
    check_datamanager,
    check_optimizer,
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
