"""The HTML report: whole, self-contained, and usable in a browser by everybody."""

import base64
import html.parser
import io
import os
import re
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from browsing import as_wide_as, broken_pictures, broken_rules, opened, press, reach_toggle
from conftest import TinyBackbone, tiny_forward

from casn_plugin import CASN, explain_ranking
from casn_plugin.explanation import ExplainedRankings, html_report, overlay, save_report

RANKING = {"mAP": 0.4321, "mINP": 0.25, "cmc": [0.5, 0.625, 1.0, 1.0, 1.0]}
RESULTS = {
    "features": {"mAP": 0.1234, "mINP": 0.2, "cmc": [0.25, 0.375, 0.5, 0.75, 0.875]},
    "attention": {"mAP": 0.3, "mINP": 0.1, "cmc": [0.125, 0.25, 0.25, 0.25, 0.75]},
    "fused": RANKING,
    "auc": 0.876,
}


def explain(topk: int) -> ExplainedRankings:
    """Ranked lists of noisy people, of which some are wrong at rank 1."""
    torch.manual_seed(0)
    options = {"input_size": (64, 32), "target_layer": "features", "hidden_dim": 16}
    model = CASN(TinyBackbone(), forward=tiny_forward, **options)
    looks = torch.randn(4, 3, 1, 1)
    people = [
        (looks[pid] + torch.randn(3, 1, 1) + torch.randn(3, 64, 32), pid, camid)
        for pid in range(4)
        for camid in range(3)
    ]
    return explain_ranking(model, people[::2], people, topk=topk)


@pytest.fixture(scope="module")
def explained():
    return explain(topk=2)


@pytest.fixture(scope="module")
def page(explained):
    return html_report(
        explained, RESULTS, number=2, title="<b>Who</b> & why", facts={"<Data>": "a & b"}
    )


class Structure(html.parser.HTMLParser):
    """Collects what a page holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_loads_nothing_and_names_everything(page, explained):
    found = Structure(page)
    links = [attributes[key] for _, attributes in found.tags for key in ("src", "href")
             if key in attributes]  # fmt: skip
    ids = Counter(attributes["id"] for _, attributes in found.tags if "id" in attributes)
    assert all(link.startswith("data:") or link[0] == "#" for link in links)
    assert all(link[1:] in ids for link in links if link[0] == "#")
    assert set(ids.values()) == {1}
    assert not found.of("iframe") and "@import" not in page and "url(" not in page
    images = found.of("img")
    assert len(images) > 20 and all("alt" in image for image in images)
    assert sum(not image["alt"] for image in images) == 1  # the colour key, described beside it
    assert len(found.of("h1")) == 1 and found.of("html") == [{"lang": "en"}]
    assert len(found.of("article")) == 4
    for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page):
        PIL.Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_words_and_figures_are_there_and_escaped(page, explained):
    assert "<title>&lt;b&gt;Who&lt;/b&gt; &amp; why</title>" in page and "<b>Who" not in page
    assert "&lt;Data&gt;" in page and "a &amp; b" in page
    assert "12.3%" in page and "62.5%" in page and "AUC 0.876" in page and "25.0%" in page
    wrong = len(explained.ranked.failures())
    assert 0 < wrong < 6 and f"{6 - wrong} of 6 queries" in page and f"other {wrong} found" in page
    worst = next(explained.worst(1))
    assert worst.headline() in page and worst.truth is not None  # so it is shown too
    assert f"<strong>Rank {worst.truth.rank}</strong>" in page
    assert page.index('<h2 id="worst">') < page.index(worst.headline())


def test_tables_hold_the_figures(page, explained):
    rows = [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.split(r"(?<=</t[hd]>)", row)[:-1]]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]
    for expected in (
        ["Ranked by", "Rank-1", "Rank-5", "mAP", "mINP"],
        ["features", "25.0%", "87.5%", "12.3%", "20.0%"],
        ["attention", "12.5%", "75.0%", "30.0%", "10.0%"],
        ["fused", "50.0%", "100.0%", "43.2%", "25.0%"],
        ["Rank", "features", "fused"],
        ["1", "25.0%", "50.0%"],
        ["5", "87.5%", "100.0%"],
    ):
        assert expected in rows
    assert "features: rank 1 25.0%, mAP 12.3%; fused: rank 1 50.0%, mAP 43.2%" in page
    assert f"those that reach {explained.row_threshold:.0%} of" in " ".join(page.split())


def test_true_accept_rates_are_shown_where_an_evaluation_has_them(explained, page):
    rates = {"TAR@1%": 0.755, "TAR@0.1%": float("nan")}
    results = {name: {**RESULTS[name], **rates} for name in ("features", "attention", "fused")}
    shown = " ".join(html_report(explained, {**results, "auc": 0.9}, number=0).split())
    header = re.sub(r"<[^>]+>", " ", shown[shown.index("<thead>") : shown.index("</thead>")])
    assert " ".join(header.split()) == "Ranked by Rank-1 Rank-5 mAP mINP TAR@1% TAR@0.1%"
    assert shown.count("<td>75.5%</td><td>\N{EN DASH}</td></tr>") == 3
    assert "<strong>TAR</strong> at a rate is the share" in shown and "nan" not in shown
    assert "TAR@" not in page  # pictures have any letters


def pictures_of(page: str) -> list[np.ndarray]:
    """All its photographs, RGB in [0, 1]."""
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(u)))) / 255 for u in uris]


@pytest.mark.parametrize("section", ["worst", "best"])
def test_each_match_is_shown_with_and_without_attention(page, explained, section):
    (found,) = getattr(explained, section)(1)
    card = page[page.index(f'<h2 id="{section}">') :]
    card = card[: card.index("</article>")]
    assert f'<h3 id="{section}-{found.query}">{found.headline()}</h3>' in card
    shown = [*found.matches, *filter(None, [found.truth])]
    assert re.findall(r'<li class="match ([^"]+)"', card) == [
        f"{'right' if match.right else 'wrong'}{' apart' if match is found.truth else ''}"
        for match in shown
    ]
    query, *pictures = pictures_of(card)
    np.testing.assert_allclose(query, found.picture, atol=0.2)
    assert len(pictures) == 4 * len(shown)
    for i, match in enumerate(shown):
        pair = match.pair
        photos = np.stack([pair.first.picture, pair.second.picture])
        maps = torch.stack([pair.first.attention, pair.second.attention])
        candidates = np.concatenate([photos, overlay(photos, maps), overlay(photos, maps.flip(0))])
        nearest = [
            np.abs(candidates - picture).mean((1, 2, 3)).argmin()
            for picture in pictures[4 * i : 4 * i + 4]
        ]
        assert nearest == [2, 0, 3, 1]  # query with attention, without, then the match


def test_the_key_of_colours_goes_from_none_to_the_strongest(page):
    (key,) = pictures_of(page[page.index('class="key"') :])[:1]
    np.testing.assert_allclose(key[:, 0], 0.55, atol=0.03)
    assert np.abs(key[:, -1] - 0.55).max() > 0.2


@pytest.mark.parametrize(("topk", "apart"), [(1, True), (11, False)])
def test_rank_1_is_compared_with_the_right_one_wherever_that_stands(topk, apart):
    longer = explain(topk)
    (failure,) = longer.failures(1)
    page = html_report(longer, RESULTS, number=1)
    card = page[page.index("<article") : page.index("</article>")]
    assert "Why rank 1 and not the right one?" in card and (failure.truth is not None) == apart
    assert f"rank {failure.found.rank}, compared" in card and "rank 1, compared" in card


def test_nothing_to_show_is_no_error(explained):
    page = html_report(explained, {**RESULTS, "auc": float("nan")}, number=0)
    assert "<article" not in page and "Worst queries" in page
    assert "ROC AUC –, as no pair shows two people" in page


def test_bad_arguments_are_refused(explained, tmp_path):
    with pytest.raises(ValueError, match="number must be >= 0, got -1"):
        html_report(explained, RESULTS, number=-1)
    with pytest.raises(ValueError, match=r"lack \['attention', 'features', 'fused'\]"):
        html_report(explained, {"market1501": RESULTS})
    lacks = {**RESULTS, "attention": {"mAP": 0.5}}
    with pytest.raises(ValueError, match=r"results\['attention'\] lack \['cmc'"):
        html_report(explained, lacks)


def test_a_report_is_saved_whole_or_not_at_all(explained, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    assert save_report(path, explained, RESULTS, number=1) == path
    first = path.read_text(encoding="utf-8")
    assert first.endswith("</html>\n") and "✓" in first
    odd = {"Checkpoint": os.fsdecode(b"\xff<&'\".pth")}  # a file name that is no UTF-8
    save_report(path.with_name("odd.html"), explained, RESULTS, number=0, facts=odd)
    odd_page = path.with_name("odd.html").read_text(encoding="utf-8")
    assert "?&lt;&amp;&#39;&#34;.pth" in odd_page
    path.with_name("odd.html").unlink()
    # what a link beside it points to is nobody's business
    victim = tmp_path / "victim"
    victim.write_text("kept")
    path.with_name("report.html.part").symlink_to(victim)
    save_report(path, explained, RESULTS, number=1)
    assert victim.read_text() == "kept" and path.read_text(encoding="utf-8") == first
    path.with_name("report.html.part").unlink()

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        save_report(path, explained, RESULTS, number=2)
    assert path.read_text(encoding="utf-8") == first
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    """Headless Chromium that has opened the report from disk."""
    with opened(page, tmp_path_factory.mktemp("report") / "report.html") as driver:
        yield driver


def test_a_browser_shows_it_without_errors(browser):
    assert browser.get_log("browser") == []
    assert broken_pictures(browser) == 0
    assert browser.title == "<b>Who</b> & why"


def test_it_is_used_by_keyboard_alone(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.refresh()
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the content"
    press(browser, Keys.ENTER)
    assert browser.execute_script("return location.hash") == "#main"

    button, seen, plain = reach_toggle(browser)
    assert browser.switch_to.active_element == button
    assert seen.is_displayed() and not plain.is_displayed()
    press(browser, Keys.SPACE)
    assert plain.is_displayed() and not seen.is_displayed()
    assert button.get_attribute("aria-pressed") == "false"
    press(browser, Keys.ENTER)
    assert seen.is_displayed() and button.get_attribute("aria-pressed") == "true"

    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.text.startswith("Why rank 1")
    figure = browser.find_element(By.CSS_SELECTOR, ".why img")
    assert not figure.is_displayed()
    press(browser, Keys.ENTER)
    assert figure.is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_rule_of_accessibility_is_broken(browser, scheme):
    assert broken_rules(browser, scheme) == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_the_width_of_a_phone(browser, width):
    with as_wide_as(browser, width):
        wide = "return document.documentElement.scrollWidth"
        assert browser.execute_script(wide) <= width
        matches = "return document.querySelector('.match').getBoundingClientRect().width"
        assert 120 < browser.execute_script(matches) < 320
