"""The page of a search: who was found, who was not, and what it says of both."""

import re
from html import unescape
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch
from browsing import as_wide_as, broken_pictures, broken_rules, opened, press, reach_toggle
from planted import detect, detecting_casn, patched
from test_report import Structure, pictures_of

from casn_plugin import CASN, GalleryIndex, Similarity, calibrate
from casn_plugin.explanation import html_search_page, overlay, save_search_page
from casn_plugin.folders import index_folder, load_pictures
from casn_plugin.loading import encode_images
from casn_plugin.ranking import pair_attention, pair_scores

NAMES = ["north & south/0007_c1s1_000010_00.png", "north & south/0008_c2s1_000020_00.png",
         "<b>tall.png", "wide.png"]  # fmt: skip


def with_patches(cells: int) -> PIL.Image.Image:
    """A picture with so many red patches, all over it."""
    pictures = [np.asarray(patched(cell % 8, cell // 8)) for cell in range(cells)]
    red = np.any([picture[..., 0] == 255 for picture in pictures], axis=0)[..., None]
    return PIL.Image.fromarray(np.where(red, np.uint8([255, 0, 0]), np.uint8(128)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures that can be read, one that can't, and two queries."""
    place = tmp_path_factory.mktemp("pictures")
    (place / "gallery" / "north & south").mkdir(parents=True)
    for name, cells, size in zip(
        NAMES, (1, 3, 6, 10), (None, None, (100, 600), (400, 200)), strict=True
    ):
        picture = with_patches(cells)
        picture.resize(size or picture.size).save(place / "gallery" / name)
    (place / "gallery" / "<cut>.jpg").write_bytes(b"\xff\xd8\xff")
    for number, cells in enumerate((2, 20)):
        with_patches(cells).save(place / f"query{number}.png")
    return place


MODEL = detecting_casn()


@pytest.fixture(scope="module")
def gallery(folder):
    return index_folder(folder / "index", MODEL, folder / "gallery")


@pytest.fixture(scope="module")
def queries(folder):
    return [str(folder / f"query{number}.png") for number in range(2)]


def search(index: GalleryIndex, queries, model: CASN = MODEL, **options):
    imgs = load_pictures(queries, model.preprocessing).imgs
    return index.search(model, encode_images(model, imgs), topk=3, **options)


@pytest.fixture(scope="module")
def found(gallery, queries):
    """The first query has three of four candidates, the second one of one."""
    rows = np.array([[0, 1, 2, 3], [2, -1, -1, -1]])
    return search(gallery.index, queries, candidates=rows)


@pytest.fixture(scope="module")
def calibration(found):
    """Up to the second match of the first query; of 1,000 negatives one passes, of 20, 15."""
    distances = found.ranking.distances
    limit, beyond = float(distances[0, 1]), float(distances.masked_fill(distances.isinf(), 0).max())
    values = torch.cat([torch.tensor([limit]), torch.linspace(beyond + 1, beyond + 2, 999),
                        torch.full((15,), limit / 2), torch.full((5,), beyond + 3)])  # fmt: skip
    return calibrate(values, torch.arange(1020) >= 1000, 0.001)


@pytest.fixture(scope="module")
def page(found, folder, queries, gallery, calibration):
    return html_search_page(
        found,
        dict(zip(["<i>first</i>", f"second{'_' * 200}"], queries, strict=True)),
        folder / "gallery",
        threshold=calibration,
        searched=4000,
        damaged=gallery.damaged,
        facts={"Model": "a & b"},
        title="Who & where?",
    )


def words(page: str) -> str:
    """What a reader sees of a page, without its pictures."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", body)).split())


def cards(page: str) -> list[str]:
    return re.findall(r"<article.*?</article>", page, re.DOTALL)


def test_the_page_loads_nothing_and_names_everything(page):
    structure = Structure(page)
    links = [attributes[key] for _, attributes in structure.tags for key in ("src", "href")
             if key in attributes]  # fmt: skip
    ids = [attributes["id"] for _, attributes in structure.tags if "id" in attributes]
    assert all(link.startswith("data:") or link[0] == "#" for link in links)
    assert all(link[1:] in ids for link in links if link[0] == "#") and len(set(ids)) == len(ids)
    images = structure.of("img")
    assert [image["alt"] for image in images].count("") == 1  # the key of colours
    assert len(structure.of("h1")) == 1 and structure.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in structure.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert "<b>tall" not in page and "<i>first" not in page and "<cut>" not in page
    assert page.endswith("</html>\n")


def test_it_says_that_a_match_is_a_lead_and_how_often_that_is_wrong(page, calibration):
    said = words(page)
    assert "A match is a lead, not an identification." in said
    assert (
        "Of 1,000 labelled pairs of two different people, 0.1\N{NO-BREAK SPACE}% are as near"
        in (page_text := unescape(re.sub(r"\s*\n\s*", " ", page)))
    )
    low, high = (f"{100 * each:.3g}" for each in calibration.false_alarm_interval)
    assert f"interval {low}\N{NO-BREAK SPACE}% to {high}\N{NO-BREAK SPACE}%" in page_text
    assert "Of 20 pairs of one person, 75 % are" in said
    wrong, most = 4000 * 0.001, 4000 * calibration.false_alarm_interval.high
    assert f"Among 4,000 pictures of other people {wrong:.1f} wrong leads" in said
    assert f"up to {most:.1f} by the interval" in said
    assert f"up to a distance of {calibration.threshold:.4f}" in said
    assert "Same person is the pair classifier's probability" in said


def test_each_match_stands_with_its_figures_and_both_maps(page, found, gallery, folder, queries):
    card = cards(page)[0]
    assert "first</i>" not in card.replace("&lt;i&gt;first&lt;/i&gt;", "")
    shown = re.findall(r'<li class="match ([^"]+)">(.*?)</li>', card, re.DOTALL)
    assert [kind for kind, _ in shown] == ["right", "right", "wrong"]  # two within, one beyond
    assert card.index("<details") > card.index("Rank 2") and card.index("<details") < card.index(
        "Rank 3"
    )
    query, *pictures = pictures_of(card)
    assert query.shape == (64, 32, 3) and len(pictures) == 12
    imgs = load_pictures(queries, MODEL.preprocessing).imgs
    encoded = encode_images(MODEL, imgs)[:1]
    for place, (_, match) in enumerate(shown):
        name, row = found.names[0][place], int(found.ranking.indices[0, place])
        said = words(match)
        assert name == gallery.index.names[row] and f"Rank {place + 1}: {name}" in said
        for word, values in (("Distance", "distances"), ("features differ by", "feature_distances"),
                             ("attention by", "attention_distances")):  # fmt: skip
            assert f"{word} {float(getattr(found.ranking, values)[0, place]):.3f}" in said
        images = gallery.index[row : row + 1]
        chance = pair_scores(MODEL, encoded, images)[0, 0].sigmoid()
        assert f"Same person: {chance:.0%}" in said
        own = re.search(r"(\d+)_c(\d+)", name)
        label = f"By its name: person {int(own[1])}, camera {own[2]}." if own else None
        flat = said.replace("\N{NO-BREAK SPACE}", " ")
        assert label in flat if label else "By its name" not in flat
        # the query with its map, without, and the match likewise
        maps = [each[0] for each in pair_attention(MODEL, encoded, images)]
        second = PIL.Image.open(folder / "gallery" / name)
        second.thumbnail((256, 256))
        plain = [query, np.asarray(second) / 255]
        for i in range(2):
            attended, bare = pictures[4 * place + 2 * i : 4 * place + 2 * i + 2]
            assert bare.shape == plain[i].shape and max(bare.shape[:2]) <= 256
            np.testing.assert_allclose(bare, plain[i], atol=0.25)
            expected = overlay(plain[i][None], maps[i][None])[0]
            other = overlay(plain[i][None], maps[1 - i][None])[0]
            assert np.abs(attended - expected).mean() < 0.02
            if not torch.allclose(maps[0], maps[1]):
                assert np.abs(attended - expected).mean() < np.abs(attended - other).mean()


def test_nobody_is_found_where_no_picture_is_near_enough(page, found, folder, queries):
    second = cards(page)[1]
    assert "_: nobody" in words(second) and "Nobody. No picture is as near" in words(second)
    assert "1 further picture, beyond the threshold" in words(second)
    assert "2 queries in 4,000 pictures: 1 query has leads, for 1 nobody is found." in words(page)
    named = dict(zip("ab", queries, strict=True))
    nothing = words(html_search_page(found, named, folder / "gallery", threshold=0.0))
    assert "2 queries: 0 queries have leads, for 2 nobody is found." in nothing
    assert "How often such a match is wrong is not known: this threshold was given" in nothing
    assert "labelled pairs" not in nothing


def test_without_a_threshold_all_are_shown_and_it_says_so(found, folder, queries):
    page = html_search_page(found, dict(zip("ab", queries, strict=True)), folder / "gallery")
    said = words(page)
    assert "How often a match on this page is wrong is not known: no threshold" in said
    assert "a: the 3 nearest pictures" in said and "b: the 1 nearest picture" in said
    assert re.findall(r'<li class="match ([^"]+)">', page) == ["unknown"] * 4
    assert (
        "lead</span>" not in page
        and "<details class" not in page
        and "Pictures left out" not in said
    )


def test_what_could_not_be_searched_is_listed(page, gallery):
    said = words(page[page.index('<h2 id="damaged">') :])
    assert said.startswith("Pictures left out 1 picture could not be read, and was not searched.")
    assert f"<cut>.jpg{gallery.damaged['<cut>.jpg']}" in said.replace("jpg ", "jpg")


def test_a_search_that_compared_nothing_has_a_page(gallery, folder, queries):
    found = search(gallery.index, queries, candidates=np.full((2, 2), -1))
    said = words(
        html_search_page(found, dict(zip("ab", queries, strict=True)), folder, threshold=1.0)
    )
    assert said.count("No picture was searched.") == 2 and "for 2 nobody is found" in said


def test_a_picture_that_is_gone_is_said_to_be_gone(found, folder, queries):
    def take(name):
        return folder / "gallery" / (name if name == NAMES[3] else "gone.png")

    page = html_search_page(found, dict(zip("ab", queries, strict=True)), take)
    gone = sum(name != NAMES[3] for names in found.names for name in names)
    assert words(page).count("The picture can't be read any more.") == gone > 0
    assert len(pictures_of(page)) == 1 + 2 + 4 * (4 - gone)


def test_of_a_similarity_the_cosine_is_shown(folder, queries):
    model = CASN(detecting_casn().backbone, forward=detect, pair_classifier=Similarity())
    model.preprocessing = MODEL.preprocessing
    index = index_folder(folder / "by similarity", model, folder / "gallery").index
    found = search(index, queries, model)
    said = words(html_search_page(found, dict(zip("ab", queries, strict=True)), folder / "gallery"))
    for row in range(2):
        for place in range(3):
            assert f"Cosine similarity: {float(found.scores[row, place]):.2f}." in said
    assert "Same person" not in said and "it is no probability" in said
    assert "Evidence: similarity of both features" in said


def test_bad_arguments_are_refused(found, folder, queries, unchecked):
    two = dict(zip("ab", queries, strict=True))
    with pytest.raises(TypeError, match="found must be a SearchResult, got Ranking"):
        html_search_page(found.ranking, two, folder)
    with pytest.raises(ValueError, match="found and queries must be of one length, got 2 and 1"):
        html_search_page(found, {"a": queries[0]}, folder)
    with pytest.raises(TypeError, match="queries must be a Mapping, got list"):
        html_search_page(found, queries, folder)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be >= 0 and finite"):
            html_search_page(found, two, folder, threshold=wrong)
    with pytest.raises(TypeError, match="threshold must be a number, got str"):
        html_search_page(found, two, folder, threshold="far")
    with pytest.raises(ValueError, match="searched must be >= 0, got -1"):
        html_search_page(found, two, folder, searched=-1)
    with pytest.raises(OSError, match="nowhere"):
        html_search_page(found, {**two, "b": "nowhere.png"}, folder)


def test_it_is_saved_whole(found, folder, queries, tmp_path):
    two, path = dict(zip("ab", queries, strict=True)), tmp_path / "deep" / "search.html"
    assert save_search_page(path, found, two, folder / "gallery") == path
    assert path.read_text(encoding="utf-8") == html_search_page(found, two, folder / "gallery")
    with pytest.raises(OSError, match="nowhere"):
        save_search_page(path, found, {**two, "b": "nowhere.png"}, folder)
    assert [each.name for each in path.parent.iterdir()] == ["search.html"]


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    """Headless Chromium that has opened the page from disk."""
    with opened(page, tmp_path_factory.mktemp("search") / "search.html") as driver:
        yield driver


def test_a_browser_shows_it_without_errors(browser):
    assert browser.get_log("browser") == []
    assert broken_pictures(browser) == 0
    assert browser.title == "Who & where?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_rule_of_accessibility_is_broken(browser, scheme):
    assert broken_rules(browser, scheme) == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 26)"}[scheme]


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_it_fits_the_width_of_a_phone(browser, width):
    with as_wide_as(browser, width):
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        matches = "return [...document.querySelectorAll('.match')].map(m => m.offsetWidth)"
        assert all(150 < each < 400 for each in browser.execute_script(matches))


def test_it_is_used_by_keyboard_alone(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.refresh()
    press(browser, Keys.TAB, Keys.ENTER)
    assert browser.execute_script("return location.hash") == "#main"
    _, seen, plain = reach_toggle(browser)
    assert seen.is_displayed() and not plain.is_displayed()
    press(browser, Keys.SPACE)
    assert plain.is_displayed() and not seen.is_displayed()
    beyond = browser.find_element(By.CSS_SELECTOR, ".others .match")
    assert not beyond.is_displayed()
    press(browser, Keys.TAB, Keys.ENTER)
    assert beyond.is_displayed()
