"""Steps that stay finite, signals that wait, epochs that go on where they ended."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import PairSampler
from casn_plugin.randomness import set_random_state
from casn_plugin.training import (
    DivergedError,
    Epoch,
    FiniteSteps,
    Interrupted,
    Interruption,
    pictures_of,
)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def step(steps: FiniteSteps, imgs: torch.Tensor, factor: float = 1.0):
    with steps.watched():
        loss = factor * steps.model(imgs).square().mean()
        return steps.take(
            [(loss, {"loss": loss.detach(), "one": imgs.new_ones(())})], lambda: "here"
        )


def state_of(steps: FiniteSteps) -> dict[str, torch.Tensor]:
    momentum = [each["momentum_buffer"] for each in steps.optimizer.state.values()]
    state = {f"momentum {i}": each.clone() for i, each in enumerate(momentum)}
    return state | {name: each.clone() for name, each in steps.model.state_dict().items()}


def test_a_finite_step_is_that_of_the_plain_loop():
    torch.manual_seed(1)
    (net, optimizer), imgs = network(), torch.rand(8, 3)
    torch.manual_seed(1)
    other, plain = network()
    steps = FiniteSteps(net, optimizer)
    for _ in range(3):
        loss = other(imgs).square().mean()
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert step(steps, imgs) == {"loss": pytest.approx(loss.item(), abs=0), "one": 1.0}
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("bad", ["pixel", "loss", "gradient"])
def test_a_bad_step_leaves_everything_as_it_was(bad, capsys):
    steps, imgs = FiniteSteps(*network()), torch.rand(8, 3)
    step(steps, imgs)
    before, factor = state_of(steps), 1.0
    if bad == "pixel":
        imgs[3, 1] = torch.nan
    elif bad == "loss":
        factor = torch.inf
    else:
        steps.model[2].weight.register_hook(lambda gradient: gradient * torch.inf)
    assert step(steps, imgs, factor) is None
    after = state_of(steps)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert all(parameter.grad is None for parameter in steps.model.parameters())
    (said,) = steps.skipped
    assert said.startswith("here: ") and said in capsys.readouterr().out
    assert ("loss is" in said) == (bad != "gradient") and "gradient is" in said


def test_after_some_bad_steps_in_a_row_training_ends():
    steps, imgs = FiniteSteps(*network(), patience=3), torch.rand(8, 3)
    for _ in range(3):  # in a row, not in all
        step(steps, imgs, torch.nan)
        step(steps, imgs, torch.nan)
        assert step(steps, imgs) is not None
    step(steps, imgs, torch.nan)
    step(steps, imgs, torch.nan)
    with pytest.raises(DivergedError, match="3 steps in a row .* here: loss is nan"):
        step(steps, imgs, torch.nan)
    assert len(steps.skipped) == 9
    assert all(value.isfinite().all() for value in steps.model.state_dict().values())
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        FiniteSteps(*network(), patience=0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_the_second_does_not(signum):
    found = signal.getsignal(signum)
    interruption = Interruption()
    with pytest.raises(Interrupted) as ended, interruption, interruption.deferred():
        signal.raise_signal(signum)
        assert interruption.signum == signum
        signal.raise_signal(signum)
    assert ended.value.code == 128 + signum and signal.getsignal(signum) is found
    with pytest.raises(Interrupted), Interruption():
        signal.raise_signal(signum)
    assert signal.getsignal(signum) is found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_was_forked_leaves_signals_to_the_run(capfd):
    """A loader's processes get Ctrl-C too; who answers is the run."""
    with Interruption() as interruption, interruption.deferred():
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(interruption.own is not None)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert interruption.own is None and capfd.readouterr().out == ""


def test_other_threads_leave_signals_alone():
    found, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [found]


class Noisy(torch.utils.data.Dataset):
    """Draws from every generator of the main process, as augmentation does."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[int, float]:
        return row, random.random() + np.random.rand() + torch.rand(1).item()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_epoch_goes_on_with_the_batches_that_are_left(after, workers):
    def epochs(resumed=None, interruption=None, start=None):
        sampler = PairSampler(np.arange(24) // 4, batch_size=4, seed=5)
        loader = DataLoader(Noisy(), batch_size=4, sampler=sampler, num_workers=workers)
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if start is not None:
            start(sampler)
        return Epoch(loader, "Epoch 1", resumed=resumed, interruption=interruption)

    def train(epoch, stop=None):
        seen.clear()
        for rows, noise in epoch:
            seen.append((rows.tolist(), noise.tolist(), torch.rand(1).item()))  # as dropout does
            epoch.add({"loss": float(len(seen))})
            if stop is not None and len(seen) == after:
                stop()
        return [*seen]

    seen = []
    whole = epochs()
    expected = train(whole)
    with pytest.raises(Interrupted), Interruption() as interruption, interruption.deferred():
        part = epochs(interruption=interruption)
        train(part, lambda: signal.raise_signal(signal.SIGTERM))
    assert part.done == after and seen == expected[:after]
    state = part.interrupted_state()

    def start(sampler):
        set_random_state(state["random_state"])
        sampler.set_epoch(state["sampler_epoch"])

    rest = epochs(resumed=state["interrupted"], start=start)
    assert train(rest) == expected[after:] and rest.done == len(rest) == 6
    total = sum(range(1, after + 1)) + sum(range(1, 7 - after))
    assert rest.means() == {"loss": pytest.approx(total / 6)}


def test_within_an_epoch_batches_stay_as_they_are():
    def epoch(rows: int, shares: int, resumed=None) -> Epoch:
        sampler = PairSampler(np.arange(24) // 4, batch_size=rows, num_replicas=shares, rank=0)
        loader = DataLoader(Noisy(), batch_size=rows, sampler=sampler)
        return Epoch(loader, "Epoch 1", resumed=resumed)

    part = epoch(4, 2)
    part.add({"loss": 1.0})
    part.add(None)
    state = part.interrupted_state()["interrupted"]
    assert epoch(8, 1, state).means() == {"loss": 1.0, "skipped": 1}  # of as many over all
    with pytest.raises(ValueError, match="batches of 8 images over all its processes, got 4"):
        epoch(4, 1, state)


def test_the_line_of_an_epoch_fits_and_says_what_is_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("casn_plugin.training.time.monotonic", lambda: clock[0])
    epoch = Epoch(range(10), "Epoch 100/120", resumed={"batches": 5})
    terms = ("loss", "loss_ide", "loss_t", "loss_ia", "loss_sa", "loss_bce", "acc", "pair_acc")
    for value in (1.0, 3.0):
        epoch.add(dict.fromkeys(terms, value))
    for _ in epoch:
        clock[0] += 12.5  # of five batches
    line = epoch.line(3e-4, epochs_left=20)
    assert line == (
        "Epoch 100/120 L 2.000 L_ide 2.000 L_t 2.000 L_ia 2.000 L_sa 2.000 acc 2.000% lr 0.0003 "
        "left 0:41:40"
    )  # 5 batches in 62.5 s: 125 s an epoch
    epoch.add({name: 100.0 if name == "acc" else 12345.0 for name in terms})
    assert len(epoch.line(1.234e-5, epochs_left=2000)) <= 100
    few = Epoch(range(2), "Epoch 1/9")
    few.add(None)
    few.add({"loss": 4.175, "acc": 100.0})
    assert few.line(0.1, 0).startswith("Epoch 1/9  L 4.175  acc 100.0%  skipped 1  lr 0.1  left")


def test_pictures_are_named_by_what_is_wrong_with_them():
    imgs = torch.zeros(6, 3, 2, 2)
    names = [f"{i}.jpg" for i in range(6)]
    assert pictures_of(names, imgs) == "0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more"
    imgs[2, 0, 0, 0] = torch.inf
    assert pictures_of(names, imgs) == "2.jpg holds NaN or infinity"
    imgs[4] = torch.nan
    assert pictures_of(None, imgs) == "image 2, image 4 hold NaN or infinity"
