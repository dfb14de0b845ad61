"""The example from the command line to its files, on small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MOBILENET, WARD

SCRIPT = Path(__file__).parents[1] / "examples" / "train_casn_pcb.py"
SMALL = [
    "--height",
    "64",
    "--width",
    "32",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--device",
    "cpu",
]


def run(*options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, options)], cwd=cwd,
        capture_output=True, text=True,
        env={**os.environ, "CASN_PLUGIN_CACHE": str(cwd), "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip


def test_train_resume_and_test_only(market_root, tmp_path):
    common = [*SMALL, "--root", market_root, "--sources", "market1501"]
    done = run(*common, "--max-epoch", 1, "--save-dir", "log", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "features  attention      fused" in done.stdout
    log = tmp_path / "log"
    names = {path.name for path in log.iterdir()}
    assert {"model", "results.json", "curves_market1501.png", "pairs_market1501.png"} <= names
    checkpoint = log / "model" / "model.pth.tar-1"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1

    again = run(
        *common, "--max-epoch", 2, "--resume", checkpoint, "--save-dir", "log", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert (log / "model" / "model.pth.tar-2").exists()
    trained = json.loads((log / "results.json").read_text())
    assert [entry["epoch"] for entry in trained["history"]] == [1, 2]

    tested = run(
        *common, "--test-only", "--resume", log / "model" / "model.pth.tar-2", "--save-dir",
        "test", "--visrank", "--rerank", cwd=tmp_path,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    assert (tmp_path / "test" / "visrank_market1501").is_dir()
    # without re-ranking, testing the checkpoint gives the figures that training ended with
    run(
        *common, "--test-only", "--resume", log / "model" / "model.pth.tar-2", "--save-dir",
        "plain", cwd=tmp_path,
    )  # fmt: skip
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["results"] == trained["results"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 7], "--batch-size must be even, got 7"),
        (["--resume", "nothing"], "there is no file nothing"),
        (["--weights", "nothing"], "there is no file nothing"),
        (["--preset", "other"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_at_once(options, message, tmp_path):
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_weights_that_do_not_fit_or_cannot_be_had(market_root, tmp_path):
    torch.save({"stranger": torch.zeros(3)}, tmp_path / "weights.pth")
    common = [*SMALL, "--root", market_root, "--sources", "market1501", "--max-epoch", 1]
    done = run(*common, "--weights", "weights.pth", cwd=tmp_path)
    assert done.returncode == 1 and "does not fit pcb_slim: 0 of its" in done.stderr
    script = (
        "import sys, urllib.request, torch.hub; sys.argv = sys.argv[1:]\n"
        "def fail(*a, **k): raise urllib.request.URLError('no network')\n"
        "torch.hub.download_url_to_file = fail\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(SCRIPT), *map(str, common),
         "--backbone", "resnet18", "--weights", "imagenet"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "TORCH_HOME": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert done.returncode == 1 and "could not be downloaded" in done.stderr
    assert "--weights FILE" in done.stderr


@pytest.mark.skipif(not WARD.exists(), reason=f"WARD is not at {WARD}")
@pytest.mark.skipif(not MOBILENET.exists(), reason=f"no weights at {MOBILENET}")
def test_real_pictures_with_a_plain_module(tmp_path):
    """WARD with ImageNet's MobileNetV2: a few steps are enough to beat chance (mAP 3%)."""
    done = run(
        "--root", WARD, "--sources", "market1501", "--backbone", "mobilenet_v2", "--weights",
        MOBILENET, "--height", 96, "--width", 48, "--max-epoch", 1, "--optim", "sgd", "--lr", 0.01,
        "--workers", 0, "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "log" / "casn_pcb" / "results.json").read_text())["results"]
    assert results["market1501"]["features"]["mAP"] > 0.12
