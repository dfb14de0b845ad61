"""A search as a page: who was found, who was not, and how often such matches are wrong.

What the page says and how it looks stands in its template, search.html.jinja.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from casn_plugin.calibration import Calibration, Interval
from casn_plugin.doors import check_count, check_kind, check_lengths, check_weight
from casn_plugin.evidence import Evidence
from casn_plugin.explanation.pages import page_template, save_page
from casn_plugin.explanation.pictures import AttendedImage
from casn_plugin.identities import UNKNOWN
from casn_plugin.picturefiles import read_picture
from casn_plugin.ranking import SearchResult

Picture = PIL.Image.Image | str | os.PathLike[str]
"""A picture or the path of one."""

_SIZE = (256, 256)  # columns and rows that a picture is shown in at most


@dataclass(frozen=True)
class _Match:
    """A picture that was found, with what the page says of it."""

    rank: int
    name: str
    said: str
    passes: bool | None
    first: AttendedImage | None
    second: AttendedImage | None
    probability: float | None
    similarity: float
    distance: float
    feature_distance: float
    attention_distance: float


@dataclass(frozen=True)
class _Query:
    """A query and what was found for it: up to the threshold, and beyond."""

    number: int
    name: str
    outcome: str
    picture: Float[np.ndarray, "rows columns 3"]
    passing: list[_Match]
    others: list[_Match]


# what is shown, and what is said of it
def html_search_page(
    found: SearchResult,
    queries: Mapping[str, Picture],
    gallery: str | os.PathLike[str] | Callable[[str], Picture],
    *,
    threshold: Calibration | float | None = None,
    searched: int | None = None,
    damaged: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str = "Who is where?",
    progress: bool = False,
) -> str:
    """Returns a self-contained HTML page: it loads nothing, works offline and on a phone.

    For each query the pictures that were found, with the attention of both in each pair, their
    distances, and the pair classifier's probability or the cosine of a similarity. It says that a
    match is a lead, how often such leads are wrong as far as that is known, and that nobody is
    found where no picture is near enough.

    Args:
        found: as ``GalleryIndex.search`` finds it.
        queries: the name and the picture of each query, in the order of the search.
        gallery: the folder that the names of the pictures found are paths in; or a function that
            gives the picture of a name. One that can't be read any more is said to be so.
        threshold: the distance up to which a picture is a lead, best a calibration: then the page
            says how often such a lead is wrong. None: all that was found is shown.
        searched: so many pictures were searched.
        damaged: pictures that could not be searched, and why.
        facts: what the reader should know of the model and the data, a name and a value each.
        title: the page's.
        progress: show a progress bar on a terminal.

    Raises:
        OSError: a query that is no picture.
        TypeError: no result of a search, a threshold that is no number.
        ValueError: another number of queries, a negative number of pictures, a threshold that is
            negative or not finite.
    """
    check_kind("found", found, SearchResult)
    check_lengths(found=found.names, queries=check_kind("queries", queries, Mapping))
    calibration = threshold if isinstance(threshold, Calibration) else None
    limit: float | None = threshold if calibration is None else calibration.threshold  # type: ignore[assignment]
    if limit is not None:
        check_weight("threshold", limit)
    if searched is not None:
        check_count("searched", searched, least=0, most=2**63 - 1)
    leads = 0 if limit is None else int(found.ranking.passing(limit).any(1).sum())
    bar = tqdm(
        queries.items(), "Writing the page", unit="query", leave=False,
        disable=None if progress else True,
    )  # fmt: skip
    take = gallery if callable(gallery) else Path(gallery).joinpath
    return page_template("search").render(
        title=title,
        queries=len(queries),
        searched=searched,
        threshold=limit,
        calibration=calibration,
        found_somebody=leads,
        evidence=found.ranking.evidence,
        by_similarity=found.ranking.evidence is Evidence.SIMILARITY,
        facts=facts or {},
        damaged=dict(damaged or {}),
        counted=_counted,
        percent=_percent,
        interval=lambda bounds: _interval(bounds, calibration),
        cards_of_queries=_cards(found, bar, take, limit),
    )


def save_search_page(
    path: str | os.PathLike[str],
    found: SearchResult,
    queries: Mapping[str, Picture],
    gallery: str | os.PathLike[str] | Callable[[str], Picture],
    **options: Any,
) -> Path:
    """Returns the path of the saved :func:`html_search_page`; the file is whole or not there.

    Args:
        path: of the file, an existing one is replaced.
        found: as there.
        queries: as there.
        gallery: as there.
        **options: as there.

    Raises:
        TypeError, ValueError: as there.
        OSError: as there, or a folder that can't be made or written.
    """
    return save_page(path, html_search_page(found, queries, gallery, **options))


def _cards(
    found: SearchResult, queries: Any, take: Callable[[str], Picture], limit: float | None
) -> Iterator[_Query]:
    """Yields queries as the page comes to them, so that one at a time is held."""
    said = found.probabilities
    passes = None if limit is None else found.ranking.passing(limit)
    for row, (name, picture) in enumerate(queries):
        shown = _shown(picture)
        matches = [
            _match(found, row, place, shown, take, said, passes)
            for place in range(len(found.names[row]))
        ]
        passing = [match for match in matches if match.passes is not False]
        outcome = (
            "nobody" if not passing
            else f"the {_counted(len(passing), 'nearest picture', 'nearest pictures')}"
            if limit is None else _counted(len(passing), "lead", "leads")
        )  # fmt: skip
        yield _Query(row + 1, str(name), outcome, shown, passing, matches[len(passing) :])


def _match(
    found: SearchResult,
    row: int,
    place: int,
    query: Float[np.ndarray, "rows columns 3"],
    take: Callable[[str], Picture],
    said: Tensor | None,
    passes: Tensor | None,
) -> _Match:
    """Returns what the page says of one match: its probability of all, and whether it passes."""
    ranking, name = found.ranking, found.names[row][place]
    distance, by_features, by_attention = (
        float(each[row, place])
        for each in (ranking.distances, ranking.feature_distances, ranking.attention_distances)
    )
    try:
        second = AttendedImage(_shown(take(name)), found.gallery_attention[row, place])
    except (OSError, ValueError):
        second = None
    return _Match(
        rank=place + 1,
        name=name,
        said=_said(int(found.pids[row, place]), int(found.camids[row, place])),
        passes=None if passes is None else bool(passes[row, place]),
        first=AttendedImage(query, found.query_attention[row, place]),
        second=second,
        probability=None if said is None else float(said[row, place]),
        similarity=float(found.scores[row, place]),
        distance=distance,
        feature_distance=by_features,
        attention_distance=by_attention,
    )


def _said(pid: int, camid: int) -> str:
    """Returns what is known of a picture; nothing where nothing is."""
    known = (("person", pid), ("camera", camid))
    return ", ".join(f"{word} {number}" for word, number in known if number != UNKNOWN)


def _shown(picture: Picture) -> Float[np.ndarray, "rows columns 3"]:
    """Returns a picture upright in RGB in [0, 1], no larger than a page needs."""
    image = read_picture(picture)
    image.thumbnail(_SIZE)
    return np.asarray(image, dtype=np.float64) / 255


def _counted(number: int, one: str, several: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {one if number == 1 else several}"


def _percent(share: float) -> str:
    """Returns a share in percent, of three digits."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def _interval(bounds: Interval, calibration: Calibration | None) -> str:
    """Returns between which bounds a share lies, in words."""
    confidence = 0.95 if calibration is None else calibration.confidence
    return f"{_percent(confidence)} interval {_percent(bounds.low)} to {_percent(bounds.high)}"
