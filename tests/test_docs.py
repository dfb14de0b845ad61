"""The documents build without a warning, and the tutorial runs from its first cell to its last."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_documents_build_and_the_tutorial_runs(tmp_path):
    pytest.importorskip("myst_nb")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "log"))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", "html"]
    environment = {
        **os.environ,
        "CASN_PLUGIN_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "tutorial.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4  # pairs and ranked lists show themselves
    assert "PairExplanation(probability=" in page and "AUC" not in page.split("<h1")[0]
    assert "queries are wrong at rank 1" in page and "report.html" in page
    report = tmp_path / "docs" / "log" / "tutorial" / "report.html"
    assert report.read_text(encoding="utf-8").endswith("</html>\n")
    reference = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert 'id="casn_plugin.explanation.explain_ranking"' in reference and ".. py:" not in reference


def test_the_tutorial_is_kept_without_outputs():
    for cell in json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_headings_of_a_document_are_unique():
    for document in [ROOT / "README.md", *DOCS.glob("*.md")]:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        headings = re.findall(r"^#+ .*$", text, re.MULTILINE)
        assert headings and len(set(headings)) == len(headings), document.name


def test_links_and_pictures_of_the_documents_exist():
    for document in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
