"""Several processes train as one does on the same batches; parts of a batch as the whole."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import PROGRAMS
from starting import finish_two, start
from torch import nn

import casn_plugin
from casn_plugin.checkpoint import Checkpoints, load_checkpoint
from casn_plugin.parallel import WholeBatch, with_own_random_state, with_random_states
from casn_plugin.processes import Processes, launched
from casn_plugin.randomness import random_state

TOGETHER = (
    "with_norms", "own_norms", "balanced", "in_parts", "frozen", "bad_picture", "in_a_folder",
    "whole", "interrupted", "by_another_number", "two_epochs", "full_disk",
)  # fmt: skip


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """tests/programs/train_together.py, for what one process does."""
    spec = importlib.util.spec_from_file_location("train_together", PROGRAMS / "train_together.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("together")
    program.draw(path)
    return path


@pytest.fixture(scope="module")
def printed(program, folder) -> list[str]:
    """What two processes print that go through all scenarios, once one has trained two epochs."""
    torch.save(program.run(folder, "two_epochs"), folder / "two_epochs-1-0.pt")
    return finish_two("train_together", folder, ",".join(TOGETHER), timeout=400)


def of_two(folder: Path, scenario: str) -> list[dict]:
    return [torch.load(folder / f"{scenario}-2-{rank}.pt") for rank in range(2)]


def assert_equal(one: dict, other: dict, *, exactly: bool = False) -> None:
    """Weights, statistics, the means of all terms, and the figures of the ranking."""
    tolerance = {"rtol": 0, "atol": 0 if exactly else 2e-6}
    torch.testing.assert_close(one["weights"], other["weights"], **tolerance)
    assert len(one["history"]) == len(other["history"]) > 0
    for mine, others in zip(one["history"], other["history"], strict=True):
        assert mine == pytest.approx(others, abs=0 if exactly else 2e-5)
    figures = [
        [found["noise"][kind][name] for kind in ("features", "attention", "fused")
         for name in ("mAP", "mINP")] + [found["noise"]["auc"]]
        for found in (one["results"], other["results"])
    ]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], abs=0 if exactly else 1e-6)


@pytest.mark.parametrize("scenario", ["with_norms", "in_parts", "frozen", "bad_picture"])
def test_two_processes_train_as_one(program, folder, printed, scenario):
    """BatchNorm over both; parts in both; layers frozen for a while; a step that both skip."""
    first, second = of_two(folder, scenario)
    assert_equal(first, second, exactly=True)
    assert_equal(first, program.run(folder, scenario))


def test_both_rank_by_the_statistics_of_the_first(folder, printed):
    assert_equal(*of_two(folder, "own_norms"), exactly=True)


def test_batches_of_another_sampler_are_dealt_to_both(program, folder, printed):
    """With pairs chosen inside of them, and a metric loss whose own parameters are trained."""
    first, second = of_two(folder, "balanced")
    assert_equal(first, second, exactly=True)
    assert first["drawn"] == 2 and len(first["rows"]) == len(second["rows"]) == 4
    for batch in first["rows"] + second["rows"]:  # each is one that the sampler has drawn
        pids = [program.TRAIN[row][0] for row in batch]
        assert sorted(pids.count(pid) for pid in set(pids)) == [4, 4]
    assert first["rows"] != second["rows"]
    assert {"loss_t", "loss_ia", "loss_sa", "pair_acc"} <= set(first["history"][0])
    assert not torch.equal(first["weights"]["proxies"], program.Proxies().proxies)
    assert_equal(first, program.run(folder, "balanced"))


def test_parts_of_a_batch_are_the_batch(folder, printed):
    whole = torch.load(folder / "two_epochs-1-0.pt")
    assert_equal(of_two(folder, "in_parts")[0], whole)
    assert_equal(of_two(folder, "two_epochs")[1], whole)


def test_what_is_encoded_in_a_folder_is_shared_too(program, folder, printed):
    first, second = of_two(folder, "in_a_folder")
    assert_equal(first, second, exactly=True)
    assert_equal(first, program.run(folder, "in_a_folder"))
    assert not list((folder / "in_a_folder-2-gallery").iterdir())


def test_both_skip_the_step_that_is_bad_in_one(folder, printed):
    (one,), (other,) = (found["skipped"] for found in of_two(folder, "bad_picture"))
    assert one == other and re.match(
        r"process 1, epoch 1, step 2, \S+png holds NaN or infinity: loss is nan", one
    )


def test_a_signal_to_one_ends_both_after_one_step_and_both_go_on(folder, printed):
    """Bit for bit, with the random numbers of each."""
    for rank, found in enumerate(of_two(folder, "interrupted")):
        assert (found["steps"], found["start"], found["code"]) == ([0, 0, 0, 1], 1, 143)
        assert_equal(found, of_two(folder, "whole")[rank], exactly=True)


def test_a_run_goes_on_with_another_number_of_processes(program, folder, printed):
    expected = program.run(folder, "three_epochs")
    assert_equal(program.run(folder, "by_another_number"), expected)
    assert_equal(of_two(folder, "by_another_number")[0], expected)


def test_one_writes_and_speaks(folder, printed):
    log = folder / "with_norms-2"
    assert len(list(log.glob("events*"))) == 1
    assert sorted(path.name for path in (log / "model").glob("model*")) == [
        "model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-2"
    ]  # fmt: skip
    for said in ("=> Start training", "** Results **", "Checkpoint saved", "Done, encoded"):
        assert said in printed[0] and said not in printed[1]


def test_what_fails_in_the_writer_fails_in_all(folder, printed):
    first, second = (found["error"] for found in of_two(folder, "full_disk"))
    assert first.startswith("FileExistsError") and f"process 0 failed: {first[:15]}" in second


def torchrun(*arguments: object, timeout: float = 60) -> "subprocess.Popen[str]":
    """Starts two processes of the program."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(casn_plugin.__file__).parents[1])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "TEST_TIMEOUT": str(timeout)}
    return subprocess.Popen(
        [*command, str(PROGRAMS / "train_together.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **own},
    )  # fmt: skip


def test_a_killed_process_ends_the_job(folder):
    job = torchrun(folder, "dying")
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert f'The last checkpoint is "{folder}/dying/model/model.pth.tar-1"' in said


def test_a_process_that_hangs_ends_the_job_after_the_timeout(folder):
    """Without torchrun, which would end the one that hangs half a minute later."""
    for left in folder.glob("here-*"):
        left.unlink()
    (folder / "meet").unlink(missing_ok=True)
    processes = [start("train_together", folder, "hanging", rank) for rank in range(2)]
    try:
        _, said = processes[0].communicate(timeout=120)
        assert processes[0].returncode != 0 and "Timed out waiting 8000ms" in said
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_torchrun_hands_its_signal_on_and_all_stop_after_one_step(folder):
    job = torchrun(folder, "long")
    files = [folder / f"long-steps-{rank}" for rank in range(2)]
    for _ in range(600):
        if files[0].exists() and len(files[0].read_text().splitlines()) > 14:
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and files[0].read_text() == files[1].read_text(), said
    assert said.count("Stopping after this step") == 1
    epoch, step = map(int, files[0].read_text().splitlines()[-1].split())
    found = load_checkpoint(Checkpoints(folder / "long" / "model").newest())
    within = found.get("interrupted", {"batches": 0})["batches"]
    assert (found["epoch"], within) in ((epoch, step + 1), (epoch + 1, 0))


def test_parts_are_of_whole_pairs_and_of_a_size():
    seen = []

    def loss(model, imgs, pids, names, nothing, *, balance):
        seen.append(len(imgs))
        assert nothing is None and names == [f"{pid}" for pid in pids.tolist()]
        return imgs.mean(), {"rows": imgs.new_tensor(float(len(imgs)))}

    imgs, pids = torch.rand(14, 3, requires_grad=True), torch.arange(14) // 2
    whole = WholeBatch(nn.Identity(), loss, Processes(), accumulate=3)
    names = [f"{pid}" for pid in pids.tolist()]
    losses = list(whole.losses(imgs, pids, names, None))
    assert seen == [4, 4, 6]
    torch.testing.assert_close(sum(loss for loss, _ in losses), imgs.mean())
    with pytest.raises(ValueError, match=r"batch of 4 images has 2 pairs, .* accumulate=3 parts"):
        next(whole.losses(imgs[:4], pids[:4]))
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        WholeBatch(nn.Identity(), loss, Processes(), accumulate=0)


def test_a_process_that_was_not_there_keeps_its_random_state():
    saved = with_random_states(
        {"random_state": random_state(), "interrupted": {"random_state": random_state()}},
        Processes(),
    )
    torch.rand(1)
    later = Processes()
    later.rank, later.count = 1, 2
    first, second = (with_own_random_state(saved, each) for each in (Processes(), later))
    assert torch.equal(first["random_state"]["torch"], saved["random_state"]["torch"])
    now = torch.get_rng_state()
    assert torch.equal(second["random_state"]["torch"], now)
    assert torch.equal(second["interrupted"]["random_state"]["torch"], now)


def test_launching_needs_a_timeout_and_gpus_that_are_there(monkeypatch):
    with (
        pytest.raises(ValueError, match="timeout must be positive, got 0.0"),
        launched(timeout=0.0),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "a GPU for each process, got 1 for process 1"
    with pytest.raises(RuntimeError, match=message), launched(use_gpu=True):
        pass
