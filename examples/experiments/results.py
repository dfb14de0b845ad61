"""The results of the laboratory: one file a study, one run a line.

A line is a JSON object: what was run (``study``, ``data``, ``name``, ``value``, ``family``,
``seed``), all its ``settings``, the ``commit`` of the code and whether the code was ``dirty``, the
``versions`` and the ``device`` that it was made with, its ``results`` (null where the training
diverged), the ``history`` of its epochs and its ``seconds``. Runs made before a commit was recorded
say "unknown".
"""

import importlib.metadata
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock

import casn_plugin
from casn_plugin.files import replacing

Run = dict[str, Any]
ROOT = Path(__file__).parents[2]


class Study:
    """The runs of one study in one file, in the order of their names, values and seeds.

    Args:
        path: the file, which :meth:`add` makes where there is none.

    Example:
        >>> Study(Path("nowhere.jsonl")).runs()
        []
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """What the study is called: the name of its file."""
        return self.path.name.removesuffix(".jsonl")

    def runs(self) -> list[Run]:
        """Returns all runs.

        Raises:
            SystemExit: a line that is no run.
        """
        if not self.path.is_file():
            return []
        runs = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                run = json.loads(line)
                _key(run)
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{self.path}, line {number} is no run: {error!r}") from None
            runs.append(run)
        return runs

    def find(self, run: Run) -> Run | None:
        """Returns the run of the same name, value and seed, or None."""
        return next((made for made in self.runs() if _key(made) == _key(run)), None)

    def add(self, run: Run) -> None:
        """Writes a run into the file.

        The file is replaced as a whole, under a lock: killed at any moment it holds all runs but
        this one or all with it, and several processes may add at once.

        Raises:
            SystemExit: there is a run of this name, value and seed already.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if self.find(run) is not None:
                raise SystemExit(f"{self.path} has a run {_key(run)} already")
            runs = sorted([*self.runs(), run], key=_key)
            with replacing(self.path) as file:
                Path(file).write_text("".join(map(line_of, runs)), encoding="utf-8")


def _key(run: Run) -> tuple[str, str, int]:
    return run["name"], run["value"], run["seed"]


def line_of(run: Run) -> str:
    r"""Returns a run as a line of a file.

    Example:
        >>> line_of({"name": "λ2", "seed": 0})
        '{"name":"λ2","seed":0}\n'
    """
    return json.dumps(run, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def studies(folder: Path) -> dict[str, list[Run]]:
    """Returns the runs of each study in a folder, in the order of their names.

    Raises:
        SystemExit: there are none.
    """
    found = sorted((Study(path) for path in folder.glob("*.jsonl")), key=lambda each: each.name)
    runs = {study.name: study.runs() for study in found}
    if not any(runs.values()):
        raise SystemExit(f"there are no results in {folder}: expected <study>.jsonl")
    return {name: each for name, each in runs.items() if each}


def rounded(value: Any) -> Any:
    """Returns a JSON value with its numbers rounded to six digits; NaN becomes None.

    Example:
        >>> rounded({"mAP": [0.12345678, float("nan")]})
        {'mAP': [0.123457, None]}
    """
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def provenance() -> dict[str, Any]:
    """Returns what code is running: commit, whether it differs from the commit, and versions.

    It differs ("dirty") where ``casn_plugin/`` or ``examples/`` have changes, or where the package
    that runs is another one than the checkout's. Outside of a checkout the commit is "unknown".
    """
    packages = ("torch", "torchvision", "torchreid", "numpy")
    versions = {
        "python": platform.python_version(),
        "casn_plugin": casn_plugin.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }
    commit, top = _git("rev-parse", "HEAD"), _git("rev-parse", "--show-toplevel")
    if commit is None or top is None or not ROOT.samefile(top):
        return {"commit": "unknown", "dirty": None, "versions": versions}
    changes = _git("status", "--porcelain", "--", "casn_plugin", "examples")
    own = Path(casn_plugin.__file__).parent == ROOT / "casn_plugin"
    return {"commit": commit, "dirty": bool(changes) or not own, "versions": versions}


def _git(*words: str) -> str | None:
    """Returns what git says of the checkout, None where it can't say anything."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
