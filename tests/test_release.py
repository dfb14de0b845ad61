"""What is released: the sdist with all that its tests need, the wheel with no more than its own."""

import ast
import configparser
import contextlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import casn_plugin
from casn_plugin.__main__ import examples, main

ROOT = Path(__file__).parents[1]
PARTS = (".ci", ".github", "casn_plugin", "docs", "examples", "tests")
PACKAGES = {"cv2": "opencv-python", "PIL": "pillow"}
# what torchreid imports, and does not declare
TORCHREIDS = {"gdown", "h5py", "imageio", "six", "tensorboard"}


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def files_of_the_project() -> set[str]:
    """All that belongs to the project, as far as it lies in folders."""
    junk = {"__pycache__", "_build", "log", "jupyter_execute"}
    return {
        path.relative_to(ROOT).as_posix()
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and not junk & set(path.relative_to(ROOT).parts)
        and path.suffix not in {".lock", ".tmp", ".pyc"}
    }  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The sdist, and the wheel that is built of it, without a network."""
    work = tmp_path_factory.mktemp("released")
    source = work / "source"
    for name in files_of_the_project():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, source / path.name)

    def build(kind: str, folder: Path) -> None:
        program = f"from setuptools import build_meta; build_meta.build_{kind}({str(work)!r})"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    build("sdist", source)
    (sdist,) = work.glob("*.tar.gz")
    shutil.unpack_archive(sdist, work)
    unpacked = work / sdist.name.removesuffix(".tar.gz")
    build("wheel", unpacked)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return unpacked, archive.namelist()


def test_the_sdist_has_all_that_its_tests_need(released):
    unpacked, _ = released
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    needed = files_of_the_project()
    assert len(needed) > 250 and needed <= held, needed - held
    top = {path.name for path in ROOT.iterdir() if path.is_file()} - {
        ".git",
        ".gitignore",
        ".coverage",
    }
    assert top <= held, top - held
    own = {"PKG-INFO", "setup.cfg"}
    extra = {name for name in held - needed - top - own if "egg-info" not in name}
    assert not {name for name in extra if not name.startswith(("build/", "casn_plugin/"))}, extra


def test_the_wheel_has_the_package_and_the_examples_and_no_more(released):
    _, names = released
    package = {name for name in files_of_the_project() if name.startswith("casn_plugin/")}
    assert "casn_plugin/py.typed" in package and any(name.endswith(".jinja") for name in package)
    assert {name for name in names if name.startswith("casn_plugin/")} == package
    others = {name for name in names if not name.startswith("casn_plugin/")}
    shared = {name for name in others if ".data/data/share/casn-plugin/examples/" in name}
    assert {Path(name).name for name in shared} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }
    assert all(".dist-info/" in name for name in others - shared)


def test_versions_and_addresses_agree(config):
    with contextlib.suppress(PackageNotFoundError):  # used without having been installed
        assert version("casn-plugin") == casn_plugin.__version__
    assert config["metadata"]["version"] == "attr: casn_plugin.__version__"
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", log, re.MULTILINE)
    assert released[0] == casn_plugin.__version__ and "## [Unreleased]" in log
    urls = config["metadata"]["project_urls"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"url: (\S+)", cited)[1] in urls
    least = config["options"]["python_requires"].removeprefix(">=")
    named = re.findall(r":: (3\.\d+)$", config["metadata"]["classifiers"], re.MULTILINE)
    assert named[0] == least and named == [f"3.{10 + i}" for i in range(len(named))]


def test_all_that_is_imported_is_declared_with_its_lowest_version(config):
    declared = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups()
        for each in config["options"]["install_requires"].split()
    )
    extras = config["options.extras_require"]
    optional = {
        re.split(r"[<>=;]", each)[0].strip()
        for name in extras
        if name not in ("test", "release", "docs", "mutants")
        for each in extras[name].strip().splitlines()
    }
    imported = set()
    for path in (ROOT / "casn_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "casn_plugin"}
    wanted = {PACKAGES.get(name, name) for name in imported}
    # those that another engine may stand for, and what is looked at for its types
    optional |= {"faiss", "pytorch_metric_learning"}
    missing = {name for name in wanted - set(declared) if name.replace("_", "-") not in optional}
    assert missing <= optional
    assert set(declared) <= wanted | TORCHREIDS


def test_the_examples_are_copied_and_nothing_is_replaced(tmp_path, capsys):
    folder = tmp_path / "new" / "examples"
    main([str(folder)])
    assert f"Begin with: python {folder / 'train_casn_pcb.py'}" in capsys.readouterr().out
    for path in examples():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in examples()} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }
    (folder / "own_loop.py").write_text("mine")
    for bad, said in ((folder, "already, and no file is replaced"), (folder / "own_loop.py", "")):
        with pytest.raises(SystemExit) as stopped:
            main([str(bad)])
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and said in told and len(told.splitlines()) == 2
    assert (folder / "own_loop.py").read_text() == "mine"


def test_the_scripts_of_ci_are_programs():
    for path in (ROOT / ".ci").iterdir():
        assert path.stat().st_mode & 0o111, path.name
        subprocess.run(["bash", "-n", path], check=True)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
