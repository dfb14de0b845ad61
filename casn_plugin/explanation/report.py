"""A ranking explained on one HTML page: figures, curves, the best and the worst queries.

What the page says and how it looks stands in its template, report.html.jinja.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from casn_plugin.calibration import FALSE_ALARM_RATES
from casn_plugin.doors import check_count
from casn_plugin.evidence import Evidence
from casn_plugin.explanation.curves import plot_cmc
from casn_plugin.explanation.lists import ExplainedRankings, RankingExplanation
from casn_plugin.explanation.pages import page_template, save_page
from casn_plugin.retrieval import RANKINGS, check_results

_CURVES = ("features", "fused")
_RANKS = (1, 5, 10, 20)
_RATES = tuple(f"TAR@{100 * rate:g}%" for rate in FALSE_ALARM_RATES)
_OTHERS = ("mAP", "mINP", *_RATES)


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
    check_count("number", number, least=0)
    check_results(results)
    valid = explained.ranked.worst()
    worst, best = valid[:number], explained.ranked.best(number)
    bar = tqdm(
        total=len(worst) + len(best), desc="Explaining", unit="query", leave=False,
        disable=None if progress else True,
    )  # fmt: skip

    def cards(queries: Iterable[int]) -> Iterator[RankingExplanation]:
        """Yields queries as the page comes to them, so that one at a time is held."""
        for query in queries:
            yield explained[query]
            bar.update()

    curves = {name: results[name] for name in _CURVES}
    with bar:
        return page_template("report").render(
            title=title,
            facts=facts or {},
            queries=len(valid),
            failures=len(explained.ranked.failures()),
            table=_table(results),
            rates=[name for name in _RATES if name in results["fused"]],
            auc=results.get("auc"),
            evidence=explained.evidence,
            by_similarity=explained.evidence is Evidence.SIMILARITY,
            curves=curves,
            cmc=list(zip(*(curves[name]["cmc"] for name in _CURVES), strict=True))[:20],
            cmc_picture=plot_cmc(curves),
            row_threshold=explained.row_threshold,
            worst=cards(worst),
            best=cards(best),
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
    return save_page(path, html_report(explained, results, **options))


def _table(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the figures of the three rankings: a row each, with a share in each column."""
    length = min(len(results[name]["cmc"]) for name in RANKINGS)
    return {
        name: {
            **{f"Rank-{rank}": results[name]["cmc"][rank - 1] for rank in _RANKS if rank <= length},
            **{each: results[name][each] for each in _OTHERS if each in results[name]},
        }
        for name in RANKINGS
    }
