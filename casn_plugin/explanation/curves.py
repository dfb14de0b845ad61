"""Curves: loss terms over the epochs, and CMC curves of the three rankings.

As all figures of this wing they belong to no window: save them with ``figure.savefig(path)``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from casn_plugin.doors import check_count, check_kind
from casn_plugin.retrieval import check_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"features": "#0072B2", "attention": "#E69F00", "fused": "#CC79A7"}
"""What each ranking is drawn in: colours of Okabe and Ito, told apart with any colour vision."""


def plot_curves(
    history: Sequence[Mapping[str, float | int]], results: Mapping[str, Any], *, max_rank: int = 20
) -> "Figure":
    """Returns a figure of the loss terms over the epochs and of the three CMC curves.

    Args:
        history: ``engine.history``, one dictionary of mean loss terms an epoch.
        results: of one data set in ``engine.results``.
        max_rank: last rank of the CMC curves.

    Raises:
        TypeError: results that are no dictionary of dictionaries.
        ValueError: figures that are missing, an epoch without its number, max_rank below 1.

    Example:
        >>> ranking = {"mAP": 0.5, "cmc": [0.4, 0.8, 1.0]}
        >>> results = {"features": ranking, "attention": ranking, "fused": ranking}
        >>> len(plot_curves([{"epoch": 1, "loss": 2.0}], results).axes)
        2
    """
    from matplotlib.figure import Figure

    check_results(results)
    check_count("max_rank", max_rank)
    if not all(isinstance(entry, Mapping) and "epoch" in entry for entry in history):
        raise ValueError(f"history must be dictionaries with an 'epoch', got {history!r:.80}")
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    terms = {
        "loss": "L (Eq. 6)",
        "loss_ide": "L_ide",
        "loss_ia": "L_ia",
        "loss_bce": "L_bce",
        "attention_distance": "attention distance",
    }
    for term, label in terms.items():
        if any(term in entry for entry in history):
            values = [entry.get(term, float("nan")) for entry in history]
            left.plot(epochs, values, marker="o", markersize=3, label=label)
    left.set_xlabel("epoch")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("mean over the epoch")
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=8)
    _plot_cmc(right, {name: results[name] for name in COLOURS}, max_rank)
    figure.supxlabel("\n".join(_said_of(history)), fontsize=8)
    return figure


def _said_of(history: Sequence[Mapping[str, float | int]]) -> Iterator[str]:
    """Yields what is said under the curves, as far as these terms are among them."""
    terms = {term for entry in history for term in entry}
    if "loss_ia" in terms:
        yield (
            "L_ia is the score that a person's own identity keeps once what was attended is "
            "masked: it rises as identities are learnt,\nand stays low where attention covers "
            "all that tells them."
        )
    if "attention_distance" in terms:
        yield (
            "Attention distance: how unlike two pictures of one person are attended, row by row. "
            "L_bce: same person or not."
        )
    yield "On the right: the share of queries whose person is found up to a rank."


def plot_cmc(results: Mapping[str, Any], *, max_rank: int = 20) -> "Figure":
    """Returns a figure of CMC curves.

    Args:
        results: "features", "attention" or "fused", each with "mAP" and "cmc".
        max_rank: last rank of the curves.

    Raises:
        TypeError: results that are no dictionary of dictionaries.
        ValueError: figures that are missing, or max_rank below 1.

    Example:
        >>> plot_cmc({"fused": {"mAP": 0.5, "cmc": [0.4, 0.8]}}).axes[0].get_xlabel()
        'rank'
    """
    from matplotlib.figure import Figure

    check_results(results, list(check_kind("results", results, Mapping)))
    check_count("max_rank", max_rank)
    figure = Figure(figsize=(5.6, 3.6), layout="constrained", dpi=120)
    _plot_cmc(figure.subplots(), results, max_rank)
    return figure


def _plot_cmc(axis: Any, results: Mapping[str, Any], max_rank: int) -> None:
    for name, ranking in results.items():
        cmc = ranking["cmc"][:max_rank]
        label = f"{name}: mAP {ranking['mAP']:.1%}"
        axis.plot(range(1, len(cmc) + 1), [100 * share for share in cmc], color=COLOURS[name],
                  marker="o", markersize=3, label=label)  # fmt: skip
    axis.set_xlabel("rank")
    axis.set_xticks([1, *range(5, max_rank + 1, 5)])
    axis.set_ylabel("queries matched (%)")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
