"""The examples that users copy, from the command line to their files, on small data."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import EXAMPLES, MOBILENET, PROGRAMS, SCRIPT, build_backbone

from casn_plugin import CASN
from casn_plugin.pedestrians import render_pedestrian
from casn_plugin.pretrained import Network, save_pretrained

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def small(example, monkeypatch):
    """A preset for small pictures in Market-1501's layout."""
    settings = {"sources": ["market1501"], "height": 64, "width": 32, "batch_size": 8}
    monkeypatch.setitem(example.PRESETS, "small", example.PRESETS["embedded"] | settings)


def market(root: Path, *options: object) -> list[str]:
    common = ["--preset", "small", "--workers", 0, "--device", "cpu", "--root", root, *options]
    return [str(option) for option in common]


def said_to_a_terminal(command: list[str]) -> tuple[int, str]:
    """Runs a program in a terminal; returns its exit status and all that it showed."""
    import fcntl  # these three are not on Windows
    import pty
    import termios

    own, terminal = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        said = b""
        with contextlib.suppress(OSError):  # the end
            while part := os.read(own, 65536):
                said += part
    os.close(own)
    return process.returncode, said.decode()


@pytest.mark.parametrize("terminal", [False, True])
def test_train_from_the_command_line(market_root, terminal):
    options = [
        *("--preset", "market1501-pcb", "--backbone", "pcb_slim", "--weights", "none"),
        *("--workers", "0", "--device", "cpu", "--root", str(market_root), "--max-epoch", "2"),
    ]
    command = [sys.executable, str(SCRIPT), *options, "--save-dir", "log"]
    if terminal:
        status, said = said_to_a_terminal(command)
        assert "Epoch 1/2:   0%|" in said and "batch/s" in said and "query:" in said
    else:
        done = subprocess.run(command, capture_output=True, text=True)
        status, said = done.returncode, done.stdout
        assert done.stderr == "" and "%|" not in said and "batch/s" not in said
    assert status == 0 and "Warning" not in said, said
    epochs = re.findall(r"^.*Epoch \d/2  L .*$", said.replace("\r", "\n"), re.MULTILINE)
    assert len(epochs) == 2 and all(len(line) <= 100 for line in epochs), said
    terms = r"Epoch 2/2  L \S+  L_ide \S+  L_ia \S+  L_sa \S+  acc \S+%  lr 0.03  left 0:00:00"
    assert re.search(terms, epochs[1]) and "epoch: [" not in said
    assert "features  attention      fused" in said
    names = {path.name for path in Path("log").iterdir()}
    assert {"model", "results.json", "curves_market1501.png", "pairs_market1501.png"} <= names
    checkpoint = Path("log", "model", "model.pth.tar-2")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2


def test_an_interrupted_rendering_is_kept(tmp_path):
    done = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )  # fmt: skip
    while len(list(tmp_path.glob(".*.partial/*/*.jpg"))) < 3 and done.poll() is None:
        time.sleep(0.05)
    done.send_signal(signal.SIGINT)
    said, errors = done.communicate(timeout=60)
    assert done.returncode == 130 and errors == "", errors
    assert "of 2048 pictures are kept in" in said
    (folder,) = tmp_path.glob(".*.partial")
    kept = list(folder.glob("bounding_box_train/*.jpg"))
    assert len(kept) >= 3 and all(cv2.imread(str(path)).shape == (128, 64, 3) for path in kept)


def test_resume_and_test_only(example, small, market_root):
    log = Path("log")
    example.main(market(market_root, "--max-epoch", 1, "--save-dir", log))
    checkpoint = log / "model" / "model.pth.tar-1"
    example.main(market(market_root, "--max-epoch", 2, "--resume", checkpoint, "--save-dir", log))
    trained = json.loads((log / "results.json").read_text())
    assert [entry["epoch"] for entry in trained["history"]] == [1, 2]

    # testing the checkpoint gives the figures that training ended with
    last = log / "model" / "model.pth.tar-2"
    results = example.main(
        market(market_root, "--test-only", "--resume", last, "--save-dir", "test")
    )
    assert json.dumps(results) == json.dumps(trained["results"])  # NaN is NaN
    by_weights = example.main(
        market(market_root, "--test-only", "--weights", last, "--save-dir", "weights")
    )
    assert json.dumps(by_weights) == json.dumps(results)  # the pair classifier came along


def test_ctrl_c_loses_nothing_and_resume_goes_on(example, small, market_root):
    options = [
        *("--preset", "market1501-pcb", "--backbone", "pcb_slim", "--weights", "none"),
        *("--workers", "0", "--device", "cpu", "--root", str(market_root), "--max-epoch", "500"),
    ]
    done = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-u", str(SCRIPT), *options, "--save-dir", "log"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(Path("log").glob("model/model.pth.tar-*")) and done.poll() is None:
        time.sleep(0.1)
    done.send_signal(signal.SIGINT)
    said, errors = done.communicate(timeout=60)
    assert done.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors and 'The last checkpoint is "log/model/' in said
    assert "Here: with the same command and --resume" in said
    trained = len(list(Path("log").glob("model/model*")))
    assert trained >= 1
    options = ["--preset", "market1501-pcb", "--backbone", "pcb_slim", "--weights", "none"]
    options += ["--workers", "0", "--device", "cpu", "--root", str(market_root)]
    example.main([*options, "--save-dir", "log", "--max-epoch", "1", "--resume"])
    assert json.loads(Path("log", "results.json").read_text())["history"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "nothing"], "there is no checkpoint nothing"),
        (["--weights", "nothing"], "there is no checkpoint nothing"),
        (["--weights", "text"], "text can't be read as a checkpoint: "),
        (["--resume", "."], "there is no whole checkpoint in ."),
        (["--preset", "other"], "invalid choice"),
        (["--test-only"], "--test-only ranks with a model"),
        (["--backbone", "other"], "--backbone: expected pcb_slim, ide, resnet18"),
        (["--max-epoch", "-1"], "--max-epoch must be >= 0, got -1"),
        (["--max-epoch", "x"], "argument --max-epoch: invalid int value"),
        (["--batch-size", "7"], "--batch-size must be even, got 7 a process"),
        (["--accumulate", "17"], "--accumulate, of the pairs in a batch, must be at most 16"),
        (["--lambda-sa", "nan"], "--lambda-sa must be >= 0 and finite, got nan"),
        (["--workers", "-1"], "--workers must be >= 0"),
        (["--seed", "-1"], "--seed must be >= 0"),
        (["--save-dir", "text"], "a folder is expected for --save-dir and --gallery-dir, got text"),
        (["--root", "nowhere", "--preset", "paper"], "there is no such folder"),
    ],
)
def test_bad_options_are_refused_at_once_in_two_lines(
    example, options, message, capsys, monkeypatch
):
    Path("text").write_text("no checkpoint")
    monkeypatch.setattr(example, "build_engine", None)  # nothing is rendered or loaded
    with pytest.raises(SystemExit) as stopped:
        example.main(options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said
    assert len(said.splitlines()) == 2


def test_a_gpu_that_is_missing_is_explained(example, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        example.main(["--device", "cuda"])
    assert "was built without GPUs: https://pytorch.org/get-started" in capsys.readouterr().err


def test_weights_that_do_not_fit_or_cannot_be_had(
    example, small, market_root, tmp_path, monkeypatch, capsys
):
    torch.save({"stranger": torch.zeros(3)}, "weights.pth")
    with pytest.raises(SystemExit, match=r"does not fit pcb_slim: .* 0 of "):
        example.main(market(market_root, "--weights", "weights.pth"))

    # a checkpoint of torchreid's own engine: rank1 is a NumPy scalar, and names may have "module."
    model = example.SlimPCB(4)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "rank1": np.float32(0.5)}, "torchreid.pth")
    example.main(market(market_root, "--weights", "torchreid.pth", "--test-only"))
    assert "no pair classifier" in capsys.readouterr().out

    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(SystemExit, match=r"could not be downloaded, .*--weights FILE"):
        example.main(market(market_root, "--backbone", "resnet18", "--weights", "imagenet"))


def test_the_presets(example, market_root):
    parser = example.make_parser()
    paper = example.parse_args(parser, ["--preset", "paper", "--root", str(market_root)])
    assert (paper.backbone, paper.height, paper.width, paper.batch_size) == ("pcb_p6", 384, 128, 16)
    assert (paper.max_epoch, paper.stepsize, paper.optim, paper.lr) == (40, 30, "sgd", 0.03)
    assert (paper.lambda_ia, paper.lambda_sa) == (0.5, 0.05)
    embedded = example.parse_args(parser, [])
    assert (embedded.backbone, embedded.height, embedded.width) == ("pcb_slim", 128, 64)
    assert (embedded.max_epoch, embedded.optim, embedded.lr) == (10, "adam", 0.001)


def test_matches_of_a_checkpoint_are_explained_on_a_page(
    example, small, market_root, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES)
    explain = importlib.import_module("explain_matches")
    neighbour = importlib.import_module("train_casn_pcb")
    monkeypatch.setitem(neighbour.PRESETS, "small", example.PRESETS["small"])
    results = example.main(market(market_root, "--max-epoch", 1, "--save-dir", "log"))
    assert "tensorboard --logdir log" in capsys.readouterr().out
    checkpoint = "log/model/model.pth.tar-1"
    # data and backbone are those of training, by its results.json
    options = ["--checkpoint", checkpoint, "--workers", "0", "--device", "cpu", "--number", "1"]
    (path,) = explain.main([*options, "--out", "deep/report.html", "--topk", "2"])
    page = path.read_text(encoding="utf-8")
    assert "Why these matches? market1501" in page and page.count("<article") == 2
    assert f"{results['market1501']['fused']['mAP']:.1%}" in page
    assert "64 x 32" in page and "pcb_slim" in page

    Path("log/results.json").unlink()  # or those that are given
    explain.main([*options, *market(market_root), "--out", "given.html", "--topk", "2"])
    assert Path("given.html").read_text(encoding="utf-8") == page
    for bad, message in (
        (["--checkpoint", "nothing"], "there is no file nothing"),
        (["--checkpoint", checkpoint, "--topk", "11"], "--topk in 1 to 10, got 5 and 11"),
        (["--checkpoint", checkpoint, "--out", "log"], "--out must name a file, but log is a fol"),
    ):
        with pytest.raises(SystemExit):
            explain.main(bad)
        assert message in capsys.readouterr().err


def epochs_of(script: Path) -> list[dict[str, float]]:
    """The losses that a loop prints after each epoch."""
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [
        {name: float(value) for name, value in re.findall(r"(L_\w+) ([\d.]+)", line)}
        for line in done.stdout.splitlines()
    ]


def test_a_loop_of_ones_own_learns_by_all_three_losses():
    script = EXAMPLES / "own_loop.py"
    epochs = epochs_of(script)
    assert epochs[-1]["L_ide"] < 0.7 * epochs[0]["L_ide"]
    assert epochs[-1]["L_sa"] < epochs[0]["L_sa"] and epochs[-1]["L_ia"] < 1
    assert "torchreid" not in re.findall(r"^(?:import|from) (\w+)", script.read_text(), re.M)


def test_losses_and_miners_of_pytorch_metric_learning_learn_together_with_ours():
    epochs = epochs_of(EXAMPLES / "metric_loop.py")
    assert len(epochs) == 20
    for name, share in (("L_ide", 0.7), ("L_t", 0.9), ("L_sa", 0.95)):
        assert epochs[-1][name] < share * epochs[0][name], name


def test_animals_in_the_layout_of_wildlife_tools_are_told_apart_by_a_timm_network(
    tmp_path, monkeypatch, capsys
):
    """Generated animals: each has a colour of its own, on a grey ground."""
    rng, lines = np.random.default_rng(0), ["image_id,path,identity,split"]
    coats = [[255 * (animal >> bit & 1) for bit in range(3)] for animal in range(8)]
    for animal, coat in enumerate(coats):
        folder = tmp_path / "images" / f"animal {animal}"
        folder.mkdir(parents=True)
        for index in range(6):
            picture = np.full((64, 64, 3), rng.integers(90, 160), dtype=np.uint8)
            top, left = rng.integers(0, 32, 2)
            picture[top : top + 32, left : left + 32] = coat
            cv2.imwrite(str(folder / f"{index}.png"), picture)
            split = "train" if index < 4 else "test"
            path = (folder / f"{index}.png").relative_to(tmp_path)
            lines.append(f"{len(lines)},{path},animal {animal},{split}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(EXAMPLES)
    wildlife = importlib.import_module("wildlife_timm")
    options = {"root": tmp_path, "model": "test_resnet", "size": 64, "epochs": 12,
               "batch-size": 16, "lr": 0.003, "device": "cpu"}  # fmt: skip
    results = wildlife.main([str(each) for name, value in options.items()
                             for each in (f"--{name}", value)])  # fmt: skip
    assert "Epoch 12/12: loss " in capsys.readouterr().out
    assert results["features"] > 0.6 and results["fused"] > 0.6  # chance is about 0.34
    assert len(set(results.values())) > 1


def test_a_lightning_module_learns_by_all_three_losses(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("lightning_module").main
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    first, last = (main(max_epochs=epochs, **quiet).logged_metrics for epochs in (1, 10))
    assert last["loss_ide"] < 0.7 * first["loss_ide"] and last["loss_sa"] < first["loss_sa"]
    assert last["loss_ia"] < 1 and last["pair_acc"] > 60


def test_two_processes_of_lightning_train_on_shares_of_pairs(tmp_path):
    program = PROGRAMS / "lightning_together.py"
    command = [sys.executable, str(program), str(EXAMPLES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"process{rank}.pt") for rank in range(2))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert len(first["rows"]) == len(second["rows"]) == 32  # of 64
    assert set(first["rows"]) | set(second["rows"]) == set(range(64))


@pytest.mark.parametrize("network", ["osnet_x0_25", "mobilenet_v2"])
def test_a_network_that_never_saw_casn_explains_its_pairs(network, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    explain = importlib.import_module("explain_any_network")
    weights = MOBILENET
    if network != "mobilenet_v2":
        weights = Path("osnet.pth")
        torch.save({"state_dict": build_backbone(network).state_dict()}, weights)
    elif not MOBILENET.is_file():
        pytest.skip(f"needs {MOBILENET}, torchvision's MobileNetV2 trained on ImageNet")
    pictures = []
    for pid, camid in ((1, 0), (2, 1), (1, 1)):
        pictures.append(f"{pid}_{camid}.png")
        picture, _ = render_pedestrian(pid, camid, 0, height=128, width=64)
        PIL.Image.fromarray(picture).save(pictures[-1])
    explain.main(["--network", network, "--weights", str(weights), "--out", "seen", *pictures])
    said = capsys.readouterr().out
    evidence = "Evidence: similarity of both features (no pair classifier was trained)"
    assert said.count(evidence) == 2 and "Cosine similarity 0." in said
    assert "tensors taken from" in said and "The features are alike by 0." in said
    for name in ("pair.png", "ranking.png"):
        with PIL.Image.open(Path("seen", name)) as drawn:
            assert np.asarray(drawn).std() > 10


@pytest.fixture
def search(monkeypatch):
    """examples/search_pictures.py as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("search_pictures")


def tables(path: str) -> list[dict[str, object]]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_people_are_searched_in_a_folder_and_shown_on_a_page(
    example, search, small, market_root, capsys
):
    example.main(market(market_root, "--max-epoch", 1, "--save-dir", "log"))
    data = market_root / "market1501" / "Market-1501-v15.09.15"
    shutil.copytree(data / "bounding_box_test", "people/day 1")
    Path("people", "day 1", "cut.jpg").write_bytes(b"nothing")
    sought = [str(path) for path in sorted((data / "query").iterdir())[:2]]
    sought += ["people/day 1/0005_c1s1_000002_00.jpg"]
    options = ["--gallery", "people", "--index", "kept", "--device", "cpu", "--topk", "4"]
    options += ["--checkpoint", "log/model/model.pth.tar-1", "--query", *sought, "gone.jpg"]
    capsys.readouterr()
    search.main(
        [*options, "--json", "found.json", "--csv", "found.csv", "--out", "deep/found.html"]
    )
    said = capsys.readouterr().out
    assert "24 pictures: 24 encoded, 0 kept, 0 removed, 1 left out\n  day 1/cut.jpg: " in said
    found = tables("found.json")
    assert [row["query_name"] for row in found[::4]] == sought and len(found) == 12
    assert all(row["camid"] in (1, 2, 3) and 0 < row["probability"] < 1 for row in found)
    assert sought[2].removeprefix("people/") not in [row["name"] for row in found[8:]]  # itself
    rows = Path("found.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[1].split(",")[1] == sought[0] and "passes" not in rows[0]
    page = Path("deep/found.html").read_text(encoding="utf-8")
    assert page.count("<article") == 3 and page.count('<li class="match') == 12
    assert "gone.jpg" in page and "day 1/cut.jpg" in page and "no threshold was calibrated" in page

    # once more, among other cameras, with people to calibrate on: nothing is encoded but these
    extra = ["--other-cameras", "--calibrate", str(data / "bounding_box_train"),
             "--false-alarm-rate", "0.01", "--json", "others.json"]  # fmt: skip
    search.main([*options, *extra])
    said = capsys.readouterr().out
    assert "24 pictures: 0 encoded, 24 kept" in said and "36 pictures: 36 encoded" in said
    others = tables("others.json")
    cameras = [int(re.search(r"_c(\d)", name)[1]) for name in sought]
    assert all(row["camid"] != cameras[row["query"]] for row in others)
    assert any(row["camid"] == cameras[row["query"]] for row in found)
    threshold = json.loads(Path("kept/calibration.json").read_text())["threshold"]
    assert all(row["passes"] == (row["distance"] <= threshold) for row in others)
    page = Path("search.html").read_text(encoding="utf-8")
    assert f"up to a distance of {threshold:.4f}" in page and "486 labelled pairs" in page
    for number, name in enumerate(sought):
        names = [row["name"] for row in others if row["query"] == number and row["passes"]]
        assert f"{name}: {', '.join(names) or 'nobody'}\n" in said

    # the calibration is kept too; Milvus finds the same, and what a filter lets pass
    milvus = ["--milvus", "kept/features.db", "--other-cameras", "--json", "by_milvus.json"]
    search.main([*options, *milvus])
    assert tables("by_milvus.json") == others
    search.main([*options, *milvus, "--filter", "time == 2 and pid != 6"])
    filtered = tables("by_milvus.json")
    assert filtered and all(row["pid"] != 6 and "_000002_" in row["name"] for row in filtered)
    assert any(row["pid"] == 6 for row in others)
    search.main([*options, "--threshold", "0"])
    assert f"{sought[0]}: nobody" in capsys.readouterr().out
    assert "given without a calibration" in Path("search.html").read_text(encoding="utf-8")


def test_a_search_takes_saved_models_and_networks_that_never_saw_casn(search, market_root, capsys):
    gallery = market_root / "market1501" / "Market-1501-v15.09.15" / "query"
    sought = str(sorted(gallery.iterdir())[0])
    network = {"num_classes": 3, "loss": "softmax"}
    torch.manual_seed(0)
    model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32))
    save_pretrained(
        model, "saved", Network("torchreid", "osnet_x0_25", network | {"num_classes": 5})
    )
    torch.save({"state_dict": model.backbone.state_dict()}, "osnet.pth")
    options = ["--gallery", str(gallery), "--query", sought, "--device", "cpu", "--json", "a.json"]
    search.main([*options, "--checkpoint", "saved", "--index", "one"])
    assert all("probability" in row for row in tables("a.json"))
    search.main([*options, "--network", "osnet_x0_25", "--weights", "osnet.pth", "--index", "two"])
    assert all(-1 <= row["similarity"] <= 1 for row in tables("a.json"))
    assert "Cosine similarity" in Path("search.html").read_text(encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(ValueError, match="created for a model with other weights"):
        search.main([*options, "--checkpoint", "saved", "--index", "two"])
    for bad, message in (
        ([], "name a model: either --checkpoint or --network"),
        (["--checkpoint", "nothing"], "--checkpoint: there is no file nothing"),
        (["--checkpoint", "saved", "--filter", "camid != 1"], "it needs --milvus"),
        (
            ["--checkpoint", "saved", "--index", "one", "--query", "gone.jpg"],
            "--query: there is no file gone.jpg",
        ),
        (["--checkpoint", "saved", "--gallery", "gone"], "--gallery: there is no folder gone"),
        (["--checkpoint", "saved", "--calibrate", "gone"], "--calibrate: there is no folder gone"),
        (["--checkpoint", "saved", "--topk", "0"], "--topk must be at least 1, got 0"),
        (["--checkpoint", "saved", "--json", "a.txt"], "a table that ends in .json or .jsonl"),
        (["--checkpoint", "saved", "--pattern", "("], "missing ), unterminated subpattern"),
        (["--checkpoint", "saved", "--threshold", "nan"], "--threshold must be >= 0 and finite"),
        (["--checkpoint", "saved", "--device", "other"], "a device such as cpu or cuda, got other"),
        (["--network", "other"], "--network: expected one of resnet18"),
    ):
        with pytest.raises(SystemExit):
            search.main([*options, *bad])
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("explain_any_network", ["a.jpg"], "a query and at least one other picture"),
        ("explain_any_network", ["a.jpg", "b.jpg"], "there is no file b.jpg"),
        ("explain_any_network", ["--network", "other", "a.jpg", "a.jpg"], "--network: expected"),
        ("wildlife_timm", ["--root", "nowhere"], "--root: there is no file nowhere/metadata.csv"),
        ("wildlife_timm", ["--root", ".", "--model", "other"], "--model: timm has no other"),
        ("wildlife_timm", ["--root", ".", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        ("wildlife_timm", ["--root", ".", "--device", "x"], "a device such as cpu or cuda, got x"),
        ("explain_matches", ["--checkpoint", "a.jpg"], "a.jpg can't be read as a checkpoint"),
    ],
)
def test_wrong_options_are_told_in_two_lines(name, options, message, monkeypatch, capsys):
    for path in ("a.jpg", "metadata.csv"):
        Path(path).write_text("nothing")
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and len(said.splitlines()) == 2


def test_the_examples_are_short_and_the_main_one_stands_alone():
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines["train_casn_pcb.py"] <= 230 and lines["own_loop.py"] <= 50
    assert lines["metric_loop.py"] <= 60 and lines["wildlife_timm.py"] <= 135
    assert lines["lightning_module.py"] <= 75 and lines["explain_any_network.py"] <= 80
    assert lines["search_pictures.py"] <= 190
    neighbours = {path.stem for path in EXAMPLES.rglob("*.py")}
    for name in (
        "train_casn_pcb.py", "own_loop.py", "metric_loop.py", "wildlife_timm.py",
        "lightning_module.py", "explain_any_network.py",
    ):  # fmt: skip
        text = (EXAMPLES / name).read_text()
        assert not neighbours & set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
