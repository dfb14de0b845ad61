"""The example from the command line to its files, on small data."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, MOBILENET, SCRIPT, WARD

from casn_plugin import attention, losses

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


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASN_PLUGIN_CACHE", str(tmp_path))


def market(root: Path, *options: object) -> list[str]:
    common = [*SMALL, "--root", root, "--sources", "market1501", *options]
    return [str(option) for option in common]


def test_train_from_the_command_line_resume_and_test_only(example, market_root, capsys):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT),
         *market(market_root, "--max-epoch", 1, "--save-dir", "log")],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "features  attention      fused" in done.stdout
    log = Path("log")
    names = {path.name for path in log.iterdir()}
    assert {"model", "results.json", "curves_market1501.png", "pairs_market1501.png"} <= names
    checkpoint = log / "model" / "model.pth.tar-1"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1

    example.main(market(market_root, "--max-epoch", 2, "--resume", checkpoint, "--save-dir", log))
    trained = json.loads((log / "results.json").read_text())
    assert [entry["epoch"] for entry in trained["history"]] == [1, 2]

    # testing the checkpoint gives the figures that training ended with
    last = log / "model" / "model.pth.tar-2"
    results = example.main(
        market(market_root, "--test-only", "--resume", last, "--save-dir", "test", "--visrank")
    )
    assert results == trained["results"]
    assert Path("test", "visrank_market1501").is_dir()
    by_weights = example.main(
        market(market_root, "--test-only", "--weights", last, "--save-dir", "weights")
    )
    assert by_weights == results  # the pair classifier came along
    reranked = example.main(
        market(market_root, "--test-only", "--resume", last, "--save-dir", "re", "--rerank")
    )
    assert reranked != results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "7"], "--batch-size must be even, got 7"),
        (["--resume", "nothing"], "there is no file nothing"),
        (["--weights", "nothing"], "there is no file nothing"),
        (["--preset", "other"], "invalid choice"),
        (["--test-only"], "--test-only ranks with a model"),
    ],
)
def test_bad_options_are_refused_at_once(example, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_weights_that_do_not_fit_or_cannot_be_had(
    example, market_root, tmp_path, monkeypatch, capsys
):
    torch.save({"stranger": torch.zeros(3)}, "weights.pth")
    with pytest.raises(SystemExit, match="does not fit pcb_slim: 0 of its"):
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
    with pytest.raises(SystemExit, match=r"could not be downloaded .*--weights FILE"):
        example.main(market(market_root, "--backbone", "resnet18", "--weights", "imagenet"))


def test_the_presets(example, market_root):
    paper = example.parse_args(["--preset", "paper", "--lr", "0.1", "--root", str(market_root)])
    assert (paper.backbone, paper.height, paper.width, paper.batch_size) == ("pcb_p6", 384, 128, 16)
    assert (paper.max_epoch, paper.stepsize, paper.optim, paper.lr) == (40, 30, "sgd", 0.1)
    assert (paper.lambda_ia, paper.lambda_sa) == (0.5, 0.05)


def test_the_options_reach_the_engine(example, market_root):
    options = {
        "--score": "logit", "--mask-scale": 5.0, "--mask-threshold": 0.7, "--ia-start-epoch": 3,
        "--threshold": 0.4, "--consistency-weight": 2.0, "--hidden-dim": 7, "--pair-lr-mult": 20.0,
    }  # fmt: skip
    given = [word for option in options.items() for word in option]
    arguments = market(market_root, *given, "--one-order", "--any-camera", "--unit-profiles")
    engine = example.build_engine(example.parse_args(arguments))
    ia, siamese = engine.identification, engine.siamese
    found = (
        ia.score, ia.mask_scale, ia.mask_threshold, engine.ia_start_epoch, siamese.threshold,
        siamese.attention_weight, engine.casn.pair_classifier[0].out_features, engine.pair_lr_mult,
    )  # fmt: skip
    assert found == tuple(options.values())
    assert siamese.unit and not siamese.both_orders
    assert not engine.train_loader.sampler.camids.any()
    default = example.build_engine(example.parse_args(market(market_root)))
    assert default.siamese.both_orders and not default.siamese.unit
    assert default.train_loader.sampler.camids.any()
    assert len(engine.train_loader) == len(default.train_loader)


def test_the_forms_of_the_pair_classifier(example, market_root):
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 1024)
    even, curved, states = {}, {}, []
    for form in ("signed", "absolute", "affine"):
        options = example.parse_args(market(market_root, "--pair-classifier", form))
        torch.manual_seed(7)
        classifier = example.build_model(options, 3).pair_classifier.eval()
        states.append(torch.get_rng_state())
        assert (form == "affine") == isinstance(classifier, torch.nn.Linear)
        forth, back = classifier(first - second), classifier(second - first)
        even[form] = torch.allclose(forth, back)
        curved[form] = not torch.allclose(forth + back, 2 * classifier(first * 0), atol=1e-5)
    assert even == {"signed": False, "absolute": True, "affine": False}
    assert curved == {"signed": True, "absolute": True, "affine": False}
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.skipif(not WARD.exists(), reason=f"WARD is not at {WARD}")
@pytest.mark.skipif(not MOBILENET.exists(), reason=f"no weights at {MOBILENET}")
def test_real_pictures_with_a_plain_module(example):
    """WARD with ImageNet's MobileNetV2: a few steps are enough to beat chance (mAP 3%)."""
    options = (
        "--root", WARD, "--sources", "market1501", "--backbone", "mobilenet_v2", "--weights",
        MOBILENET, "--height", 96, "--width", 48, "--max-epoch", 1, "--optim", "sgd", "--lr", 0.01,
        "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    results = example.main([str(option) for option in options])
    assert results["market1501"]["features"]["mAP"] > 0.12


def test_matches_of_a_checkpoint_are_explained_on_a_page(example, market_root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    explain = importlib.import_module("explain_matches")
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


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark of ranking as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("benchmark_ranking")


def cells(table: str) -> list[list[str]]:
    """Returns the rows of a table in Markdown below its header."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_the_benchmark_measures_speed_and_exactness(benchmark, tmp_path):
    arguments = [
        "--only",
        "speed",
        "exactness",
        "--heads",
        "OSNet",
        "--repeats",
        "1",
        "--scale",
        "0.1",
    ]
    speed, exactness = benchmark.main([*arguments, "--device", "cpu", "--save-dir", str(tmp_path)])
    assert (tmp_path / "cpu.md").read_text() == f"{speed}\n{exactness}"
    rates = {row[1]: float(row[2].replace(",", "")) for row in cells(speed)}
    assert rates["ours, float32"] > rates["autograd, one pair at a time"]
    kinds = {row[1]: row[2:] for row in cells(exactness)}
    assert kinds["float64"][0] == "0 of 65,536" and float(kinds["float64"][2]) < 1e-12
    assert float(kinds["float32"][2]) < 1e-4 < float(kinds["bfloat16"][2])


def test_the_benchmark_measures_what_shortlists_cost(benchmark, example, monkeypatch, tmp_path):
    from casn_plugin.engine import EmbeddedPedestrians

    sizes = {"num_train_pids": 2, "num_test_pids": 4, "images_per_camera": 2, "progress": False}
    monkeypatch.setattr(EmbeddedPedestrians, "options", sizes)
    checkpoint = tmp_path / "model.pth"
    torch.save({}, checkpoint)
    options = example.parse_args(["--resume", str(checkpoint), "--device", "cpu"])
    model = example.build_model(options, 2)
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "quality"])
    arguments = ["--only", "quality", "--checkpoint", str(checkpoint), "--device", "cpu"]
    (table,) = benchmark.main([*arguments, "--save-dir", str(tmp_path)])
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["all pairs, float32"][2:] == rows["shortlist of 500"][2:]
    assert sum("exact top" in name for name in rows) == 3


def test_the_benchmark_compares_processes_and_memory(benchmark, monkeypatch, tmp_path):
    peaks = benchmark.Peak()
    with peaks:
        held = torch.ones(2**24)
        time.sleep(0.05)
    assert 60 < peaks.peak / 2**20 < 100 and len(held)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    rows = cells(benchmark.processes(benchmark.parse_args(["--scale", "0.1"])))
    assert rows[0][-1] == rows[2][-1] == "yes"  # with two threads, sums may round otherwise


@pytest.fixture
def ablation(monkeypatch):
    """The ablation as a module, whose worker processes find the package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    return importlib.import_module("ablation")


def test_the_ablation_resumes_and_reports(ablation, market_root, capsys):
    arguments = [
        *("--data", "market", "--root", str(market_root), "--only", "IDE", "CASN(PCB)"),
        *("--seeds", "0", "--max-epoch", "1", "--jobs", "1", "--device", "cpu"),
        *("--results", "results", "--", "--height", "64", "--width", "32", "--batch-size", "8"),
    ]
    ablation.main(arguments)
    files = sorted(Path("results", "market").iterdir())
    assert [file.name for file in files] == ["casn-pcb-seed0.json", "ide-seed0.json"]
    made = json.loads(files[0].read_text())
    assert made["settings"]["lambda_sa"] == 0.05 and len(made["history"]) == 1
    assert files[0].stat().st_size < 20_000 and str(market_root) not in files[0].read_text()
    assert 0 < made["results"]["quality"]["siamese"]["energy"] < 1

    files[1].unlink()
    kept = files[0].read_bytes(), files[0].stat().st_mtime_ns
    ablation.main(arguments)
    assert "1 of 2 runs to do" in capsys.readouterr().out
    assert (files[0].read_bytes(), files[0].stat().st_mtime_ns) == kept and files[1].exists()
    with pytest.raises(SystemExit, match="was made with batch_size 8, not 4"):
        ablation.main([*arguments[:-1], "4"])

    ablation.main(["--report", "results.md", "--results", "results"])
    text = Path("results.md").read_text()
    share = f"{100 * made['results']['fused']['mAP']:.1f}"
    assert f" / {share} |" in text and Path("images", "ablation_market.png").exists()
    made["results"]["fused"]["mAP"] = 0.123
    files[0].write_text(json.dumps(made))
    ablation.main(["--report", "results.md", "--results", "results"])
    changed = Path("results.md").read_text()
    assert " / 12.3 |" in changed and " / 12.3 |" not in text


def test_some_choices_or_some_of_their_values(ablation):
    options = ["--study", "choices", "--seeds", "3", "--only", "λ2: 0.5", "warm-up of L_ia"]
    found = [(run["name"], run["value"]) for run in ablation.parse_args(options).settings]
    assert found == [(options[-1], "2 epochs"), (options[-1], "5 epochs"), ("λ2", "0.5")]


def test_maps_scaled_by_range_in_training_and_ranking_alike(ablation):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.pair_classifier = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    )
    activations = torch.rand(4, 8, 6, 3, requires_grad=True)
    features = activations.mean((2, 3))
    images = ablation.Encoding(features.detach(), basis=activations.detach() / 18)

    def both() -> torch.Tensor:
        siamese = ablation.train.SiameseAttentionLoss(threshold=0.4)
        _, trained = siamese.pairs(model.pair_classifier, features, activations)
        ranked = ablation.attention_distmat(model, images[::2], images[1::2], threshold=0.4)
        return torch.stack([trained.detach(), ranked.diagonal()])

    before, maps = both(), torch.tensor([[[1.0, 2.0], [3.0, 1.0]]])
    with ablation.scaled_by_range():
        trained, ranked = both()
        torch.testing.assert_close(trained, ranked)
        assert not torch.allclose(trained, before[0])
        assert losses.row_profiles(maps).tolist() == [[0, 1]]
        hidden = attention.soft_mask(maps, (2, 2), scale=1.0, threshold=0.0)
    torch.testing.assert_close(hidden.logit(), (maps - 1) / 2)
    torch.testing.assert_close(both(), before, rtol=0, atol=0)


def test_the_report_of_several_seeds(ablation, example, market_root):
    options = ["--backbone", "resnet_slim", "--seed", "0"]
    engine = example.build_engine(example.parse_args(market(market_root, *options)))
    engine.test()
    (theirs,) = engine.results.values()
    results = ablation.rounded(ablation.measure(engine, "market1501"))
    for kind in ("features", "attention", "fused"):  # the engine's own figures
        assert results[kind]["mAP"] == pytest.approx(theirs[kind]["mAP"], abs=1e-5)
        assert results[kind]["rank5"] == pytest.approx(theirs[kind]["cmc"][4], abs=1e-5)
    assert results["auc"] == pytest.approx(theirs["auc"], abs=1e-5)
    assert results["fusion"]["query"]["0.0"][1] == results["features"]["mAP"]

    def write(study, folder, name, value, seed, mean_ap, **changes):
        run = {
            "study": study, "data": "d", "name": name, "value": value, "family": "PCB",
            "seed": seed, "settings": vars(engine_args), "seconds": {"training": 60},
            "history": [{"acc": 50.0}, {"acc": None}], "versions": {"torch": "2"},
            "results": {**results, "features": {"mAP": mean_ap}},
        }  # fmt: skip
        file = Path("results", folder, f"{name}-{value}-{seed}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run | changes))

    engine_args = example.parse_args(market(market_root, *options))
    for seed, (base, ours) in enumerate([(0.5, 0.51), (0.6, 0.63)]):
        write("table", "d", "PCB", "", seed, base)
        write("table", "d", "CASN(PCB)", "", seed, ours)
        write("table", "d", "PCB+SA", "", seed, ours - 0.01)
        write("choices", "d-choices-PCB", "λ2", "0.5", seed, ours - 0.03)
        write("choices", "d-choices-PCB", "λ1", "0.1", seed, ours)  # of PCB+IA, which is not there
    write("choices", "d-choices-PCB", "λ2", "0.5", 2, 0, results=None)  # diverged
    ablation.main(["--report", "results.md", "--results", "results"])
    rows = cells(Path("results.md").read_text())
    casn = next(row for row in rows if row[:2] == ["CASN(PCB)", "2"])
    assert casn[2] == "– / 57.0 ± 8.5" and casn[4] == "+2.0 ± 1.4 (2 of 2 higher)"
    means = next(row for row in rows if row[:2] == ["PCB", "2"])
    assert means[2] == "– / 55.0 ± 7.1"
    paired = [row for row in rows if row[:2] == ["CASN(PCB)", "2"]][2]
    assert paired[3] == "+2.0 ± 1.4" and paired[-1] == "2 of 2"
    (choice,) = (row for row in rows if row[:2] == ["PCB+SA", "λ2"])
    assert choice[2:6] == ["0.5", "3", "–", "-2.0 ± 0.0"]
    assert choice[-3] == "0 of 2" and choice[-1] == "1"
    (choice,) = (row for row in rows if row[:2] == ["PCB+IA", "λ1"])
    assert choice[2:6] == ["0.1", "2", "–", "–"]


def test_the_documented_results_are_those_of_the_files(ablation):
    docs = EXAMPLES.parent / "docs"
    ablation.main(["--report", "results.md", "--results", str(docs / "results")])
    text = Path("results.md").read_text()
    assert text == (docs / "results.md").read_text()
    summary = next(part for part in text.split("\n\n") if part.startswith("|"))
    assert summary in (EXAMPLES.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "ward"], "--data ward: expected 'embedded' without --root"),
        (
            ["--only", "IDE+XY"],
            r"--only: expected some of CASN\(IDE\), .*got IDE\+XY",
        ),
        (["--jobs", "-1"], "--jobs must be at least 1, got -1"),
    ],
)
def test_bad_options_of_the_ablation(ablation, options, message, capsys):
    with pytest.raises(SystemExit):
        ablation.main(options)
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit, match="there are no results in nowhere"):
        ablation.main(["--report", "results.md", "--results", "nowhere"])
