"""A ranking explained on one HTML page: figures, curves, the best and the worst queries."""

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from casn_plugin.explanation import (
    ExplainedRankings,
    Match,
    RankingExplanation,
)
from casn_plugin.visualization import RIGHT, WRONG, overlay, plot_cmc, png_uri, verdict

_RANKS = (1, 5, 10, 20)
_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1a1a1a; --soft: #595959; --card: #f4f4f2;
  --line: #d0d0cc; --link: #0050a0 }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --ink: #ececec; --soft: #b4b4b4;
  --card: #222529; --line: #4a4d50; --link: #8ec5ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
a { color: var(--link) }
h1 { line-height: 1.2; margin: 1.5rem 0 0.5rem }
h2 { margin: 2.5rem 0 0.5rem; scroll-margin-top: 4rem }
h3 { margin: 0 0 0.5rem; font-size: 1.05rem }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; list-style: none; padding: 0 }
.skip { position: absolute; left: -99rem }
.skip:focus { position: static }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.bar { position: sticky; top: 0; z-index: 1; background: var(--back); padding: 0.5rem 0 }
button { font: inherit; padding: 0.35rem 0.9rem; border: 1px solid var(--soft);
  border-radius: 0.4rem; background: var(--card); color: var(--ink); cursor: pointer }
button[aria-pressed=true] { background: var(--link); color: var(--back) }
.scroll { overflow-x: auto; max-width: 100% }
caption { text-align: left }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid var(--line) }
th[scope=row], thead th:first-child { text-align: left }
.cmc { max-width: 100%; height: auto; background: #fff }
.query { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 0.8rem; margin: 0.8rem 0 }
.row { display: grid; grid-template-columns: 6.5rem 1fr; gap: 0.8rem }
.row > ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr));
  gap: 0.8rem; list-style: none; margin: 0; padding: 0; align-items: start }
figure { margin: 0 }
figcaption { font-size: 0.85rem; line-height: 1.35; padding-top: 0.2rem }
.sought img { width: 100% }
.pictures { display: flex; gap: 0.2rem; padding: 4px; border: 4px solid; border-radius: 0.3rem }
.pictures img { width: 100% }
.pictures span { flex: 1 }
.right .pictures { border-color: RIGHT }
.wrong .pictures { border-color: WRONG; border-style: dashed }
.apart { border-left: 2px solid var(--soft); padding-left: 0.8rem }
.chip { color: #fff; border-radius: 0.3rem; padding: 0 0.4rem; font-weight: 600 }
.right .chip { background: RIGHT }
.wrong .chip { background: WRONG }
img { display: block }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr } .sought { width: 6.5rem } }
.plain, .off .seen { display: none }
.off .plain { display: block }
.key { display: inline-block; width: 9rem; height: 0.9rem; vertical-align: middle;
  border: 1px solid var(--soft) }
.why img { height: 24rem; max-width: none; background: #fff }
summary { cursor: pointer }
.soft { color: var(--soft) }
@media print { .bar { display: none } .query { break-inside: avoid } }
"""

_SCRIPT = """
const toggle = document.getElementById('toggle');
toggle.hidden = false;
toggle.addEventListener('click', () => {
  const on = !document.body.classList.toggle('off');
  toggle.setAttribute('aria-pressed', String(on));
});
"""


def html_report(
    explained: ExplainedRankings,
    results: Mapping[str, Any],
    *,
    title: str = "Why these matches?",
    facts: Mapping[str, str] | None = None,
    number: int = 5,
    progress: bool = False,
) -> str:
    """Returns a self-contained HTML page: it loads nothing, works offline and on a phone.

    It holds the rank-1, mAP and CMC of features, attention and both fused; the queries that went
    worst and best with their ranked lists and the attention of each pair; and how to read all
    that. Right and wrong are told by words and lines as well as by colour.

    Args:
        explained: the ranked lists, of :meth:`casn_plugin.ImageCASNEngine.explain` or
            :func:`casn_plugin.explain_ranking`.
        results: of the same data set in ``engine.results``.
        title: the page's.
        facts: what the reader should know of the model and the data, a name and a value each.
        number: so many of the worst and of the best queries.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: a negative `number`, or results without a ranking.
    """
    if number < 0:
        raise ValueError(f"number must be >= 0, got {number}")
    missing = sorted({"features", "attention", "fused"} - set(results))
    if missing:
        raise ValueError(f"results must be of one data set in engine.results, lack {missing}")
    failures = explained.ranked.failures()
    valid = explained.ranked.worst()
    worst, best = valid[:number], explained.ranked.best(number)
    bar = tqdm(
        total=len(worst) + len(best), desc="Explaining", unit="query", leave=False,
        disable=None if progress else True,
    )  # fmt: skip

    def cards(queries: Iterable[int], name: str) -> str:
        shown = []
        for query in queries:
            shown.append(_card(explained[query], f"{name}-{query}"))
            bar.update()
        return "".join(shown)

    summary = (
        f"{len(valid) - len(failures)} of {len(valid)} queries found their person at rank 1; the "
        f"other {len(failures)} found somebody else first."
    )
    with bar:
        return _PAGE.format(
            title=html.escape(title),
            csp=_CSP,
            style=_STYLE.replace("RIGHT", RIGHT).replace("WRONG", WRONG),
            script=_SCRIPT,
            summary=summary,
            facts=_facts(facts or {}),
            table=_table(results),
            cmc=_cmc(results),
            key=_colour_key(),
            row_threshold=f"{explained.row_threshold:.0%}",
            worst=cards(worst, "worst"),
            best=cards(best, "best"),
            tick=html.escape(verdict(True)),
            cross=html.escape(verdict(False)),
        )


def save_report(
    path: str | os.PathLike[str],
    explained: ExplainedRankings,
    results: Mapping[str, Any],
    **options: Any,
) -> Path:
    """Returns the path of the saved :func:`html_report`; the file is whole or not there.

    Args:
        path: of the file, an existing one is replaced.
        explained: as there.
        results: as there.
        **options: as there.

    Raises:
        ValueError: as there.
        OSError: a folder that can't be made or written.
    """
    path = Path(path)
    page = html_report(explained, results, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _card(found: RankingExplanation, name: str) -> str:
    """Returns a query and its ranked list."""
    matches = "".join(_match(match) for match in found.matches)
    if found.truth is not None:
        matches += _match(found.truth, apart=True)
    right = [found.found] if found.failed and found.found is not None else []
    compared = [*found.matches[:1], *right]
    figures = "".join(
        f"<p>{html.escape(match.pair.describe())}</p>"
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{name}: query and rank {match.rank}, compared">'
        f"{_image(png_uri(match.pair.plot()), match.pair.describe())}</div>"
        for match in compared
    )
    sought = _image(_jpeg(found.picture), f"Query: person {found.pid}, camera {found.camid}")
    why = "Why rank 1 and not the right one?" if right else "Why rank 1?"
    return f"""
<article class="query" aria-labelledby="{name}">
<h3 id="{name}">{html.escape(found.headline())}</h3>
<div class="row">
<figure class="sought">{sought}
<figcaption>Query {found.query}: person {found.pid}, camera&nbsp;{found.camid}.
Average precision&nbsp;{found.ap:.0%}.</figcaption></figure>
<ol>{matches}</ol>
</div>
<details class="why"><summary>{why}</summary>{figures}</details>
</article>"""


def _match(match: Match, *, apart: bool = False) -> str:
    """Returns one gallery image of a ranked list, beside the query, with and without attention."""
    pair = match.pair
    sides = (
        ("query", pair.first_picture, pair.first_attention),
        (f"rank {match.rank}", pair.second_picture, pair.second_attention),
    )
    pictures = ""
    for name, picture, attention in sides:
        seen = overlay(picture[None], attention[None])[0]
        pictures += (
            f'<span><span class="seen">{_image(_jpeg(seen), f"Attention on the {name} picture")}'
            f'</span><span class="plain">{_image(_jpeg(picture), f"The {name} picture")}</span>'
            "</span>"
        )
    classes = f"match {'right' if match.right else 'wrong'}{' apart' if apart else ''}"
    return f"""
<li class="{classes}"><figure><div class="pictures">{pictures}</div>
<figcaption><span class="chip">{html.escape(verdict(match.right))}</span><br>
<strong>Rank {match.rank}</strong>, by features {match.feature_rank}; person {match.pid},
camera&nbsp;{match.camid}.<br>Same person: {pair.probability:.0%}. Features differ by
{pair.feature_distance:.2f}, attention by {pair.attention_distance:.2f}.</figcaption></figure>
</li>"""


def _table(results: Mapping[str, Any]) -> str:
    """Returns the figures of the three rankings."""
    names = ("features", "attention", "fused")
    length = min(len(results[name]["cmc"]) for name in names)
    shares = {
        name: {
            **{f"Rank-{rank}": results[name]["cmc"][rank - 1] for rank in _RANKS if rank <= length},
            **{mean: results[name][mean] for mean in ("mAP", "mINP") if mean in results[name]},
        }
        for name in names
    }
    head = "".join(f'<th scope="col">{column}</th>' for column in shares["fused"])
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{share:.1%}</td>" for share in of_ranking.values())
        + "</tr>"
        for name, of_ranking in shares.items()
    )
    auc = (
        f"<p>Pair classifier: ROC AUC {results['auc']:.3f} on these people; 0.5 is chance, and "
        "near it the attention means nothing.</p>"
        if "auc" in results
        else ""
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Figures"><table><caption '
        f'class="soft">Share of queries matched within a rank, mean average precision</caption>'
        f'<thead><tr><th scope="col">Ranked by</th>{head}</tr></thead><tbody>{rows}</tbody>'
        f"</table></div>{auc}"
    )


def _cmc(results: Mapping[str, Any]) -> str:
    """Returns the CMC curves of features and fused, as a picture and as numbers."""
    names = ("features", "fused")
    curves = png_uri(plot_cmc({name: results[name] for name in names}), dpi=160)
    words = "; ".join(
        f"{name}: rank 1 {results[name]['cmc'][0]:.1%}, mAP {results[name]['mAP']:.1%}"
        for name in names
    )
    numbers = "".join(
        f'<tr><th scope="row">{rank + 1}</th>'
        + "".join(f"<td>{share:.1%}</td>" for share in shares)
        + "</tr>"
        for rank, shares in enumerate(
            list(zip(*(results[name]["cmc"] for name in names), strict=True))[:20]
        )
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<img class="cmc" alt="CMC curves. {words}" src="{curves}">'
        f'<details><summary>The curves as numbers</summary><table><thead><tr><th scope="col">Rank'
        f"</th>{heads}</tr></thead><tbody>{numbers}</tbody></table></details>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    """Returns names and values as a list."""
    if not facts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return (
        f"<details><summary>Model and data</summary><table><tbody>{rows}</tbody></table></details>"
    )


def _colour_key() -> str:
    """Returns a strip with the colours of attention, from none to the strongest."""
    strip = np.broadcast_to(np.float64(0.55), (8, 96, 3))
    ramp = torch.linspace(0, 1, 96).expand(8, 96)
    return _image(_jpeg(overlay(strip[None], ramp[None])[0]), "", 'class="key"')


def _image(uri: str, alt: str, attributes: str = "") -> str:
    return f'<img {attributes} alt="{html.escape(alt)}" src="{uri}">'


def _jpeg(picture: np.ndarray) -> str:
    """Returns an RGB picture in [0, 1] as a data URI."""
    stream = io.BytesIO()
    image = PIL.Image.fromarray((255 * picture).round().astype(np.uint8))
    image.save(stream, format="jpeg", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{csp}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{title}</h1>
<p>{summary}</p>
<nav aria-label="Sections"><ul>
<li><a href="#figures">Figures</a></li>
<li><a href="#read">How to read the pictures</a></li>
<li><a href="#worst">Worst queries</a></li>
<li><a href="#best">Best queries</a></li>
<li><a href="#use">Responsible use</a></li>
</ul></nav>
</header>
<main id="main">
<h2 id="figures">Figures</h2>
{table}
{cmc}
{facts}
<h2 id="read">How to read the pictures</h2>
<p>Each query is a person in one camera, searched for among the pictures of the others. Beside it
stand the pictures that the model finds nearest. A match shows two pictures: left the query, right
the picture found, both with the model's <strong>attention</strong> for just this pair over them:
{key} from none to the strongest. It marks what speaks for the same person.</p>
<ul>
<li><strong>{tick}</strong> with a whole green frame is right, <strong>{cross}</strong> with a
broken red frame is wrong. A match behind a line is the right one, standing further down.</li>
<li><strong>Rank</strong> counts features and attention together; "by features" is the rank without
attention.</li>
<li><strong>Same person</strong> is the pair classifier's probability. <strong>Features
differ</strong> by at most 2. <strong>Attention differs</strong> by 0 where the model looked at the
same rows of both, once the rows above and below those that reach {row_threshold} of the strongest
are cut off.</li>
</ul>
<div class="bar"><button type="button" id="toggle" aria-pressed="true" hidden>Show
attention</button></div>
<h2 id="worst">Worst queries</h2>
{worst}
<h2 id="best">Best queries</h2>
{best}
<h2 id="use">Responsible use</h2>
<p>Re-identification finds people again who did not ask for it. A rank is not an identification, and
attention shows what a model looked at, not that it is right. This page holds pictures of people:
share it as you would share the pictures.</p>
</main>
<script>{script}</script>
</body>
</html>
"""
