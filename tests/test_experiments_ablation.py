"""The runner of the laboratory and its tables, from the command line to the documents."""

import json
import re
from pathlib import Path

import pytest
from conftest import cells, run_here

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
SMALL = ["--", "--height", "64", "--width", "32", "--batch-size", "8"]


@pytest.fixture
def ablation(lab):
    """The runner as a module."""
    return lab("ablation")


def report(lab) -> str:
    """Writes the report and returns it."""
    lab("tables").main(["--out", "results.md", "--results", "results"])
    return Path("results.md").read_text(encoding="utf-8")


def test_the_ablation_resumes_and_reports(ablation, lab, market_root, capsys):
    arguments = [
        *("--data", "market1501", "--name", "market", "--root", str(market_root)),
        *(
            "--backbone",
            "mobilenet_v2",
            "--only",
            "IDE",
            "CASN(PCB)",
            "--seeds",
            "0",
            "--max-epoch",
            "1",
        ),
        *("--jobs", "1", "--device", "cpu", "--results", "results", *SMALL),
    ]
    ablation.main(arguments)
    file = Path("results", "market.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    made, base = map(json.loads, lines)
    assert (made["name"], base["name"]) == ("CASN(PCB)", "IDE")
    assert made["settings"]["lambda_sa"] == 0.05 and len(made["history"]) == 1
    assert made["settings"]["backbone"] == "mobilenet_pcb" and made["settings"]["height"] == 64
    assert len(made["commit"]) == 40 or made["commit"] == "unknown"
    assert made["versions"]["torch"] and made["device"] == "cpu"
    assert len(lines[0]) < 10_000 and str(market_root) not in lines[0]
    assert 0 < made["results"]["quality"]["siamese"]["energy"] < 1

    file.write_text(lines[0], encoding="utf-8")
    ablation.main(arguments)
    assert "1 of 2 runs to do" in capsys.readouterr().out
    again = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[0] == lines[0]  # and the other gives the same figures again
    assert json.loads(again[1])["results"] == base["results"]
    with pytest.raises(SystemExit, match="was made with batch_size 8, not 4"):
        ablation.main([*arguments[:-1], "4"])
    with pytest.raises(SystemExit, match="was made with topk None, not 5"):
        ablation.main(["--topk", "5", *arguments])

    text = report(lab)
    share = f"{100 * made['results']['fused']['mAP']:.1f}"
    assert f" / {share} |" in text and Path("images", "ablation_market.png").exists()
    made["results"]["fused"]["mAP"] = 0.123
    file.write_text(json.dumps(made) + "\n" + again[1], encoding="utf-8")
    changed = report(lab)
    assert " / 12.3 |" in changed and " / 12.3 |" not in text


def test_any_data_set_of_torchreid_a_part_of_it_and_a_shortlist(lab, market_root):
    """What whoever has Market-1501 runs, but for its size, its weights and the epochs."""
    arguments = [
        *("--data", "market1501", "--root", str(market_root), "--identities", "3", "--topk", "4"),
        *("--only", "IDE+SA", "--seeds", "1", "--max-epoch", "1", "--jobs", "1"),
        *("--device", "cpu", "--results", "results", "--weights", "none", *SMALL),
        *("--backbone", "resnet_slim"),
    ]
    (made,) = run_here(lab, arguments).runs()
    assert Path("results", "market1501-3.jsonl").exists()
    settings = made["settings"]
    protocol = settings["preset"], settings["optim"], settings["lr"]
    assert protocol == ("market1501-ide", "sgd", 0.03)
    assert (settings["identities"], settings["topk"], settings["sources"]) == (
        3, 4, ["market1501"],
    )  # fmt: skip
    assert list(made["results"]["fusion"]) == ["unit"]
    text = report(lab)
    assert "the first 3 identities, attention of the 4 nearest by features" in text
    (row,) = (row for row in cells(text) if row[:2] == ["IDE+SA", "query"])
    assert set(row[2:]) == {"– / –"}


def test_the_protocols_by_default(ablation, market_root):
    given = ["--data", "market1501", "--root", str(market_root), "--device", "cpu"]
    runs = {run["name"]: run["argv"] for run in ablation.parse_args(given).runs}
    assert len(runs) == 8 and "market1501-pcb" in runs["CASN(PCB)"]
    runs = {run["name"]: run["argv"] for run in ablation.parse_args(["--device", "cpu"]).runs}
    assert "pcb_slim" in runs["PCB+IA"] and "casn_pedestrians" in runs["PCB+IA"]


def test_some_choices_or_some_of_their_values(ablation):
    options = ["--study", "choices", "--seeds", "3", "--only", "λ2: 0.5", "warm-up of L_ia"]
    found = [(run["name"], run["value"]) for run in ablation.parse_args(options).runs]
    assert found == [(options[-1], "2 epochs"), (options[-1], "5 epochs"), ("λ2", "0.5")]


def test_by_range_is_an_option_that_results_tell(lab, market_root):
    arguments = [
        *("--data", "market1501", "--name", "market", "--root", str(market_root)),
        *("--study", "choices", "--only", "scale of the profiles", "--backbone", "resnet_slim"),
        *("--seeds", "0", "--max-epoch", "1", "--jobs", "1", "--device", "cpu"),
        *("--results", "results", *SMALL),
    ]
    (made,) = run_here(lab, arguments).runs()
    assert Path("results", "market-choices-IDE.jsonl").exists()
    assert made["settings"]["map_scale"] == "range" and made["value"] == "by range"
    assert "replaced while it ran" not in report(lab)


def test_the_report_of_several_seeds(lab):
    protocols, results = lab("protocols"), lab("results")
    settings = protocols.settings_of(protocols.parse_args(["--device", "cpu"]))

    def write(study, file, name, value, seed, mean_ap, **changes):
        run = {
            "study": study, "data": "d", "name": name, "value": value, "family": "PCB",
            "seed": seed, "settings": settings, "seconds": {"training": 60}, "commit": "unknown",
            "history": [{"acc": 50.0}, {"acc": None}], "versions": {"torch": "2"},
            "results": {
                "features": {"mAP": mean_ap}, "fused": {"mAP": 0.4}, "attention": {"mAP": 0.1},
                "fusion": {"unit": {"0.0": [0.5, mean_ap]}, "query": {"0.0": [0.5, 0.4]}},
                "robustness": {"none": {"features": {"ap": [mean_ap, None, mean_ap]}}},
            },
        }  # fmt: skip
        results.Study(Path("results", f"{file}.jsonl")).add(run | changes)

    for seed, (base, ours) in enumerate([(0.5, 0.51), (0.6, 0.63)]):
        write("table", "d", "PCB", "", seed, base)
        write("table", "d", "CASN(PCB)", "", seed, ours)
        write("table", "d", "PCB+SA", "", seed, ours - 0.01)
        write("choices", "d-choices-PCB", "λ2", "0.5", seed, ours - 0.03)
        write("choices", "d-choices-PCB", "λ1", "0.1", seed, ours)  # of PCB+IA, which is not there
    write("choices", "d-choices-PCB", "λ2", "0.5", 2, 0, results=None)  # diverged
    text = report(lab)
    rows = cells(text)
    casn = next(row for row in rows if row[:2] == ["CASN(PCB)", "2"])
    assert casn[2] == "50.0 ± 0.0 / 57.0 ± 8.5" and casn[4] == "+2.0 [+1.0, +3.0]"
    means = next(row for row in rows if row[:2] == ["PCB", "2"])
    assert means[2] == "50.0 ± 0.0 / 55.0 ± 7.1" and means[4] == "–"
    paired = [row for row in rows if row[:2] == ["CASN(PCB)", "2"]][2]
    assert paired[3] == "+2.0 ± 1.4" and paired[-1] == "2 of 2"
    (choice,) = (row for row in rows if row[:2] == ["PCB+SA", "λ2"])
    assert choice[2:6] == ["0.5", "3", "–", "-2.0 ± 0.0"]
    assert choice[-3] == "0 of 2" and choice[-1] == "1"
    (choice,) = (row for row in rows if row[:2] == ["PCB+IA", "λ1"])
    assert choice[2:6] == ["0.1", "2", "–", "–"]
    assert "11 of 11 are older than that" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "ward"], "--data ward: expected 'embedded' without --root"),
        (
            ["--only", "IDE+XY"],
            r"--only: expected some of CASN\(IDE\), .*got IDE\+XY",
        ),
        (["--jobs", "-1"], "--jobs must be at least 1, got -1"),
        (["--data", "other", "--root", "x"], "torchreid knows no data set 'other'"),
        (["--data", "market1501", "--root", "x"], "market1501 is expected in x"),
        (["--identities", "1"], "--identities must be at least 2, got 1"),
    ],
)
def test_bad_options_of_the_ablation(ablation, lab, options, message, capsys):
    with pytest.raises(SystemExit):
        ablation.main(options)
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit, match="there are no results in nowhere"):
        lab("tables").main(["--out", "results.md", "--results", "nowhere"])


def test_a_run_that_fails_is_named_and_the_others_are_done(ablation, lab, market_root):
    arguments = [
        *("--data", "market1501", "--name", "market", "--root", str(market_root), "--only", "PCB"),
        *("--backbone", "resnet_slim", "--seeds", "0", "--max-epoch", "1", "--jobs", "1"),
        *("--device", "cpu", "--results", "results", *SMALL),
    ]
    with pytest.raises(SystemExit, match=r"1 runs failed:\nPCB  seed 0: .*see log"):
        ablation.main([*arguments, "--identities", "9"])  # of four
    ablation.main(arguments)
    assert len(lab("results").Study(Path("results", "market.jsonl")).runs()) == 1
