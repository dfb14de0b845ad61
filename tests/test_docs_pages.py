"""The documents in headless Chromium, on a desk and on a phone, by day and by night."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from browsing import as_wide_as, broken_pictures, browser_without_network, in_scheme
from documents import built_pages, written_pages

html = built_pages
WIDER_THAN_ITS_FRAME = """
return [...document.querySelectorAll('article *')].filter(each => {
  const box = each.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1) return false;
  const scrolls = up => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX);
  let frame = each.parentElement;
  while (frame.tagName != 'ARTICLE' && !scrolls(frame)) frame = frame.parentElement;
  return frame.tagName == 'ARTICLE' || frame.getBoundingClientRect().right > innerWidth + 1;
}).map(each => each.outerHTML.slice(0, 200))
"""
# colours follow from elements and their classes: of each chain of such, the first stands for all
OF_A_NEW_KIND = """
const seen = new Set(arguments[0]), fresh = [];
for (const each of document.querySelectorAll('[data-fresh]')) delete each.dataset.fresh;
for (const each of document.querySelectorAll('body *')) {
  const own = [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim());
  if (!own || !each.checkVisibility()) continue;
  let kind = '';
  for (let up = each; up; up = up.parentElement) kind += up.tagName + '.' + up.className + ' ';
  if (seen.has(kind)) continue;
  seen.add(kind);
  fresh.push(kind);
  each.dataset.fresh = '';
}
return fresh
"""
FEW_OF_A_KIND = """
for (const parent of document.querySelectorAll('article, article *')) {
  const seen = {};
  for (const each of [...parent.children]) {
    const kind = each.tagName + each.className;
    seen[kind] = (seen[kind] || 0) + 1;
    if (seen[kind] > 2 && !['TD', 'TH'].includes(each.tagName)) each.style.display = 'none';
  }
}
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(html):
    """Where the pages are served, as searching in them needs a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=html)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with browser_without_network() as driver:
        driver.set_script_timeout(120)
        yield driver


def broken(browser: Any, where: str, **options: Any) -> list[tuple[str, str]]:
    """The rules of accessibility that elements of a page break."""
    axe = pytest.importorskip("axe_core_python.selenium").Axe()
    browser.execute_script(f"if (!window.axe) {{ {axe.axe_script} }}")
    script = "axe.run([[arguments[0]]], arguments[1]).then(arguments[2])"
    options = {"resultTypes": ["violations"], **options}
    result = browser.execute_async_script(script, where, options)
    return [(each["id"], each["nodes"][0]["html"]) for each in result["violations"]]


def test_pages_can_be_read_on_a_desk_and_on_a_phone_in_light_and_dark(html, address, browser):
    problems, kinds = list[tuple[str, object]](), {"light": list[str](), "dark": list[str]()}
    for page in written_pages(html):
        browser.get(f"{address}/{page.relative_to(html).as_posix()}")
        for width in (1280, 375):
            with as_wide_as(browser, width):
                where = f"{page.relative_to(html)}, {width}"
                script = "return document.documentElement.scrollWidth"
                problems += [(where, "scrolls sideways")] * (browser.execute_script(script) > width)
                problems += [(where, cut) for cut in browser.execute_script(WIDER_THAN_ITS_FRAME)]
                problems += [(where, "a picture is missing")] * (broken_pictures(browser) > 0)
                for scheme, seen in kinds.items():
                    in_scheme(browser, scheme)
                    fresh = browser.execute_script(OF_A_NEW_KIND, seen)
                    seen += fresh
                    rules = ["color-contrast"]
                    found = broken(browser, "[data-fresh]", runOnly=rules) if fresh else []
                    problems += [(f"{where}, {scheme}", rule) for rule in found]
                found = broken(browser, "body", runOnly=["scrollable-region-focusable"])
                problems += [(where, rule) for rule in found]
        browser.execute_script(FEW_OF_A_KIND)
        found = broken(browser, "body", rules={"color-contrast": {"enabled": False}})
        problems += [(where, rule) for rule in found]
        problems += [(page.name, each["message"]) for each in browser.get_log("browser")]
    assert not problems, "\n".join(map(str, problems))
    assert all(len(seen) > 100 for seen in kinds.values()), "few kinds of text were looked at"


def test_the_start_page_is_one_screen(address, browser):
    with as_wide_as(browser, 1280):
        browser.get(f"{address}/index.html")
        script = "return document.querySelector('{}').getBoundingClientRect().bottom"
        bottoms = [
            browser.execute_script(script.format(each))
            for each in ("article img", ".highlight-diff", ".where")
        ]
        assert bottoms == sorted(bottoms) and bottoms[0] > 0 and bottoms[-1] < 800


def test_the_search_of_the_pages_finds_our_names(address, browser):
    browser.get(f"{address}/search.html?q=attention_distmat")
    script = "return [...document.querySelectorAll('#search-results a')].map(each => each.href)"
    for _ in range(50):
        found = browser.execute_script(script)
        if found:
            break
        browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert any("reference/ranking.html" in each for each in found)
