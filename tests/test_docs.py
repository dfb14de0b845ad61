"""The documents: they build, say what is so, run, and can be read on any screen."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import re
import types
import zlib
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from documents import (
    DOCS,
    PAGES,
    README,
    ROOT,
    blocks,
    built_pages,
    command_lines,
    known_options,
    name_of,
    prose,
    written_pages,
)
from test_package import ROOMS

import casn_plugin

html = built_pages


class Read(HTMLParser):
    """What a page has: links, pictures, anchors and text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links, self.anchors, self.words = list[str](), set[str](), list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_documents_build_and_the_tutorial_runs(html):
    page = (html / "tutorials" / "train.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4  # pairs and ranked lists show themselves
    assert "PairExplanation(probability=" in page and "AUC" not in page.split("<h1")[0]
    assert "queries are wrong at rank 1" in page and "report.html" in page
    report = html.parent / "docs" / "tutorials" / "log" / "tutorial" / "report.html"
    assert report.read_text(encoding="utf-8").endswith("</html>\n")


def test_the_tutorial_is_kept_without_outputs():
    for cell in json.loads((DOCS / "tutorials" / "train.ipynb").read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_no_two_headings_are_alike():
    found = Counter(
        heading.strip("# ").lower()
        for page in PAGES
        for heading in re.findall(r"^#+ .*$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    )
    assert len(found) > 100 and not [heading for heading, number in found.items() if number > 1]
    headings = re.findall(r"^#+ .*$", prose(README.read_text(encoding="utf-8")), re.MULTILINE)
    assert headings and len(set(headings)) == len(headings)


def test_no_two_paragraphs_are_alike():
    found = Counter(
        " ".join(paragraph.split())
        for page in PAGES
        if page.name != "results.md"  # written by a program, a legend to each study
        for paragraph in prose(page.read_text(encoding="utf-8")).split("\n\n")
        if len(paragraph) > 80
    )
    assert len(found) > 200 and not [words for words, number in found.items() if number > 1]


def test_every_page_is_in_the_contents():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [
        line
        for block in re.findall(r"^```{toctree}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    written = [name_of(page).removesuffix(".md") for page in PAGES if page.stem != "index"]
    assert sorted(listed) == sorted([*written, "tutorials/train"])
    assert re.findall(r":caption: (\w+)", text) == [
        "Tutorials", "Guides", "Explanation", "Reference",
    ]  # fmt: skip


def test_every_link_and_anchor_of_the_pages_resolves(html):
    read = functools.cache(Read)
    checked = 0
    for page in written_pages(html):
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "http", "data"), f"{page.name}: {link}"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in read(target).anchors, f"{page.name}: {link}"
                checked += 1
    assert checked > 1000


def slug(heading: str) -> str:
    """The anchor that a heading of Markdown has on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip("# ").lower()).replace(" ", "-")


def test_links_and_pictures_of_the_readme_exist_here_and_on_an_index():
    text = README.read_text(encoding="utf-8")
    ours = [each for each in re.findall(r"\]\(([^)]+)\)", text) if "://" not in each]
    assert len(ours) > 15
    for link in ours:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ .*$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link
    spec = importlib.util.spec_from_file_location("packaging", ROOT / "setup.py")
    packaging = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packaging)
    public = packaging.readme_for_an_index(text, "https://example.org/casn")
    links = re.findall(r"\]\(([^)]+)\)", public)
    assert len(links) == len(re.findall(r"\]\(", text)) and all("://" in each for each in links)
    assert "](https://example.org/casn/raw/main/docs/images/explained_pair.webp)" in public
    assert "](https://example.org/casn/blob/main/docs/guides/own-network.md)" in public
    nowhere = packaging.readme_for_an_index(text, "")
    assert "](docs" not in nowhere and "responsible use before this is used" in nowhere


def test_measured_differences_in_the_pages_are_those_of_the_results():
    """Each "a ± b" and "a [b, c]" that is said of the paper's losses stands in the tables."""
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    number = r"[+-]?\d+\.\d+"
    for page, least in ((DOCS / "paper.md", 40), (README, 10)):
        text = " ".join(page.read_text(encoding="utf-8").split())
        said = re.findall(rf"{number} ± \d+\.\d+|{number} \[{number}, {number}\]", text)
        assert len(said) >= least
        assert [each for each in said if each not in results] == [], page


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def public_names() -> set[str]:
    """All names that users may import, and the methods of classes."""
    found = {f"casn_plugin.{name}": getattr(casn_plugin, name) for name in casn_plugin.__all__}
    known = set(map(id, found.values()))
    for room in ROOMS:
        module = importlib.import_module(f"casn_plugin.{room}")
        if "." in room or room == "__main__":
            continue  # inside of a wing, whose face is its __all__; a command
        for name in getattr(module, "__all__", [each for each in vars(module) if each[0] != "_"]):
            value = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(value, "__module__", "") == module.__name__
            if own and isinstance(value, type | types.FunctionType) and id(value) not in known:
                found[f"casn_plugin.{room}.{name}"] = value
    for name, value in list(found.items()):
        if isinstance(value, type):
            for method, function in vars(value).items():
                public = method[0] != "_" and isinstance(function, types.FunctionType | property)
                if public and function.__doc__:
                    found[f"{name}.{method}"] = function
    return found


def test_every_public_name_is_in_the_reference_with_its_signature_and_its_example(html):
    packed = (html / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    listed = {name: uri.split("#")[0] for name, role, _, uri, *_ in lines if role[:3] == "py:"}
    names = public_names()
    assert len(names) > 400 and not set(names) - set(listed)
    text = {}
    for page in (html / "reference").glob("*.html"):
        words = unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
        text[page] = "".join(words.split())
    for name in casn_plugin.__all__:
        value, page = getattr(casn_plugin, name), text[html / listed[f"casn_plugin.{name}"]]
        if not (isinstance(value, type) and issubclass(value, tuple | str)):
            signature = page.split(f"casn_plugin.{name}(", 1)[1][:3000]
            assert all(each in signature for each in inspect.signature(value).parameters), name
        for line in re.findall(r">>> (.*)", value.__doc__ or ""):
            assert "".join(line.split()) in page, f"{name}: {line}"
    for page, words in text.items():
        for markup in (":class:", ":func:", ":meth:", ":data:", "..py:", "..auto"):
            assert markup not in words, f"{page.name}: {markup}"
    overview = (DOCS / "reference" / "names.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^   (\w+)$", overview, re.M)) == sorted(casn_plugin.__all__)


def test_our_names_in_the_glossary_are_names():
    known = {part for name in public_names() for part in name.split(".")}
    for value in public_names().values():
        with contextlib.suppress(TypeError, ValueError):  # a property, an exception
            known |= set(inspect.signature(value).parameters)
    glossary = (DOCS / "reference" / "glossary.md").read_text(encoding="utf-8")
    names = {
        name for each in re.findall(r"`([\w(=)]+)`", glossary) for name in re.findall(r"\w+", each)
    }
    assert len(names) > 20 and not names - known


def test_blocks_are_of_languages_that_are_tested():
    for page in [README, *PAGES]:
        for block in blocks(page):
            language = block.language.split("}")[0] + "}" * block.language.startswith("{")
            assert language in {
                "python", "bash", "diff", "text", "{toctree}", "{container}", "{glossary}",
                "{eval-rst}", "{image}", "{literalinclude}",
            }, f"{page.name}, line {block.line}: {language!r}"  # fmt: skip


def test_commands_name_scripts_and_options_that_there_are():
    checked = 0
    for page in [README, *PAGES]:
        for block in blocks(page):
            for words in command_lines(block.text) if block.language == "bash" else ():
                while "=" in words[0]:  # a variable of the environment
                    words = words[1:]
                assert words[0] in ("python", "pip", "pytest", "torchrun", "tensorboard",
                                    "sphinx-build"), f"{page.name}: {words}"  # fmt: skip
                scripts = [Path(word) for word in words if word.endswith(".py")]
                for script in scripts:
                    given = {word for word in words[words.index(str(script)) :] if word[:2] == "--"}
                    unknown = given - known_options(ROOT / script)
                    assert not unknown, f"{page.name}, line {block.line}: {script} {unknown}"
                    checked += 1
    assert checked > 30
