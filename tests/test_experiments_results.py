"""The files of results: nothing lost, whoever writes them and whatever interrupts that."""

import doctest
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES, PROGRAMS

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
DOCS = EXAMPLES.parent / "docs"


@pytest.fixture
def results(lab):
    """The module of the files."""
    return lab("results")


@pytest.mark.parametrize(
    "name", ["ablation", "intervals", "results", "robustness", "rows", "scaling", "studies"]
)
def test_doctests(lab, name):
    found = doctest.testmod(lab(name))
    assert found.failed == 0 and found.attempted > 0


def run(name: str = "IDE", seed: int = 0, **more: object) -> dict[str, object]:
    return {"name": name, "value": "", "seed": seed, **more}


def adding(path: Path, name: str, first: int, number: int) -> subprocess.Popen:
    words = [path, name, first, number, EXAMPLES / "experiments"]
    command = [sys.executable, str(PROGRAMS / "add_results.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_runs_are_kept_in_order_one_a_line(results):
    study = results.Study(Path("deep", "ward.jsonl"))
    assert study.runs() == [] and study.find(run()) is None and study.name == "ward"
    later, earlier = run("PCB", 2, note="λ2"), run("IDE", 10)
    for each in (later, earlier, run("PCB", 10)):
        study.add(each)
    assert study.runs() == [earlier, later, run("PCB", 10)]
    assert study.find(run("PCB", 2)) == later
    lines = study.path.read_text(encoding="utf-8").splitlines()
    assert lines[1] == '{"name":"PCB","value":"","seed":2,"note":"λ2"}'
    before = study.path.read_bytes()
    with pytest.raises(SystemExit, match=r"has a run \('PCB', '', 2\) already"):
        study.add(run("PCB", 2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        study.add(run("new", results=float("nan")))
    assert study.path.read_bytes() == before
    assert list(results.studies(study.path.parent)) == ["ward"]


def test_a_damaged_line_is_named(results):
    path = Path("ward.jsonl")
    for damaged in ('{"name":"IDE","va', "[]", '{"name":"IDE"}'):
        path.write_text(results.line_of(run()) + damaged + "\n")
        with pytest.raises(SystemExit, match=r"ward.jsonl, line 2 is no run"):
            results.Study(path).runs()
        with pytest.raises(SystemExit, match=r"ward.jsonl, line 2 is no run"):
            results.Study(path).add(run(seed=1))  # and nothing of it is overwritten
        assert path.read_text().endswith(damaged + "\n")


def test_several_processes_add_at_once(results):
    path = Path("ward.jsonl")
    processes = [adding(path, name, 0, 15) for name in ("IDE", "PCB", "CASN(PCB)")]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = [(each["name"], each["seed"]) for each in results.Study(path).runs()]
    assert found == [(name, seed) for name in ("CASN(PCB)", "IDE", "PCB") for seed in range(15)]


def test_a_killed_process_loses_no_run_that_was_added(results):
    path, rng, kept = Path("ward.jsonl"), random.Random(0), set()
    for attempt in range(4):
        process = adding(path, "IDE", 1000 * attempt, 1000)
        assert process.stdout.readline() == f"added {1000 * attempt}\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        said = process.stdout.read().split("\n")[:-1]  # what was still being said does not count
        process.wait()
        kept |= {1000 * attempt} | {int(line.split()[1]) for line in said}
        there = {each["seed"] for each in results.Study(path).runs()}
        assert kept <= there and len(there - kept) <= 1
        kept = there


def test_numbers_are_rounded_to_six_digits(results):
    assert results.rounded({"a": [0.12345678, float("inf"), 3, True, "x"], "b": (1e-9,)}) == {
        "a": [0.123457, None, 3, True, "x"], "b": [1e-9],
    }  # fmt: skip


def test_the_code_that_ran_is_recorded(results, monkeypatch, tmp_path):
    found = results.provenance()
    assert {"python", "casn_plugin", "torch", "torchreid"} <= set(found["versions"])
    repository = tmp_path / "checkout"
    package = repository / "casn_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(results, "ROOT", repository)
    monkeypatch.setattr(results.casn_plugin, "__file__", str(package / "__init__.py"))
    assert results.provenance()["commit"] == "unknown"  # no repository
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    clean = results.provenance()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (repository / "results.jsonl").touch()  # results are no code
    assert results.provenance() == clean
    (package / "new.py").touch()
    assert results.provenance() == clean | {"dirty": True}
    (package / "new.py").unlink()
    monkeypatch.setattr(results.casn_plugin, "__file__", str(tmp_path / "other" / "__init__.py"))
    assert results.provenance() == clean | {"dirty": True}
    monkeypatch.setattr(results, "ROOT", package)  # a folder of somebody else's repository
    assert results.provenance()["commit"] == "unknown"


def test_the_documented_results_are_those_of_the_files(results, lab):
    tables = lab("tables")
    tables.main(["--out", "results.md", "--results", str(DOCS / "results")])
    text = Path("results.md").read_text(encoding="utf-8")
    assert text == (DOCS / "results.md").read_text(encoding="utf-8")
    summary = next(part for part in text.split("\n\n") if part.startswith("|"))
    assert summary in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for study in (DOCS / "results").glob("*.jsonl"):  # as the laboratory writes them
        runs = results.Study(study).runs()
        assert "".join(map(results.line_of, runs)) == study.read_text(encoding="utf-8")
        fields = {"commit", "dirty", "versions", "device", "settings"}
        assert all(fields <= set(each) for each in runs)


def test_the_documented_results_are_those_of_the_laboratorys_settings(lab):
    """No documented run would be refused, or be run again."""
    results, studies, protocols = lab("results"), lab("studies"), lab("protocols")
    defaults = protocols.settings_of(protocols.parse_args(["--device", "cpu"]))
    for name, runs in results.studies(DOCS / "results").items():
        embedded = runs[0]["data"] == "embedded"
        backbone = "resnet_slim" if embedded else "mobilenet_v2"
        common = [] if embedded else ["--sources", "market1501"]
        seeds = sorted({run["seed"] for run in runs})
        study, data, family = (runs[0][key] for key in ("study", "data", "family"))
        assert studies.file_of(study, data, family) == f"{name}.jsonl"
        wanted = studies.runs_of(study, data, backbone, family, seeds, common)
        by_key = {(each["name"], each["value"], each["seed"]): each for each in wanted}
        parser = protocols.make_parser()
        for made in runs:
            argv = by_key[made["name"], made["value"], made["seed"]]["argv"]
            given = {
                key: value
                for key, value in vars(parser.parse_args(argv)).items()
                if value is not None and key in defaults and key != "weights"
            }
            assert given == {key: (defaults | made["settings"])[key] for key in given}
            assert json.dumps(made["settings"])
