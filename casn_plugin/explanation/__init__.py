"""Why a match: what made the model say same or different, drawn and in words.

The public face of the wing. From the bottom: pictures (arrays), figures and curves (matplotlib),
pair, lists, fixed_pairs, and the HTML pages, of an evaluation and of a search. matplotlib and
Jinja2 are imported when something is drawn.
"""

from casn_plugin.explanation.board import AttentionBoard, log_results
from casn_plugin.explanation.curves import COLOURS, plot_cmc, plot_curves
from casn_plugin.explanation.figures import plot_pair, plot_ranking
from casn_plugin.explanation.fixed_pairs import FixedPairs
from casn_plugin.explanation.lists import (
    ExplainedRankings,
    Match,
    RankingExplanation,
    explain_ranking,
)
from casn_plugin.explanation.pair import PairExplanation, explain_pair
from casn_plugin.explanation.pictures import AttendedImage, overlay, pair_mosaic
from casn_plugin.explanation.report import html_report, save_report
from casn_plugin.explanation.search_page import html_search_page, save_search_page

__all__ = [
    "COLOURS",
    "AttendedImage",
    "AttentionBoard",
    "ExplainedRankings",
    "FixedPairs",
    "Match",
    "PairExplanation",
    "RankingExplanation",
    "explain_pair",
    "explain_ranking",
    "html_report",
    "html_search_page",
    "log_results",
    "overlay",
    "pair_mosaic",
    "plot_cmc",
    "plot_curves",
    "plot_pair",
    "plot_ranking",
    "save_report",
    "save_search_page",
]
