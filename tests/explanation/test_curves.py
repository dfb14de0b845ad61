"""Curves: every loss term and every ranking is drawn."""

import pytest

from casn_plugin.explanation import plot_cmc, plot_curves


def test_curves_show_every_term_and_ranking():
    ranking = {"mAP": 0.25, "cmc": [0.4, 0.8, 1.0]}
    results = {"features": ranking, "attention": ranking, "fused": ranking}
    history = [
        {"epoch": 1, "loss": 2.0, "loss_ide": 1.0},
        {"epoch": 2, "loss": 1.0, "loss_ia": 0.1},
    ]
    left, right = plot_curves(history, results).axes
    assert [line.get_label() for line in left.lines] == ["L (Eq. 6)", "L_ide", "L_ia"]
    assert [line.get_label() for line in right.lines] == [
        f"{name}: mAP 25.0%" for name in ("features", "attention", "fused")
    ]
    assert plot_curves([], results).axes
    (axis,) = plot_cmc({"fused": ranking}, max_rank=2).axes
    assert axis.lines[0].get_ydata() == pytest.approx([40, 80])
    assert list(axis.lines[0].get_xdata()) == [1, 2]


def test_what_can_not_be_drawn_is_refused(unchecked):
    ranking = {"mAP": 0.25, "cmc": [0.4, 0.8, 1.0]}
    results = {"features": ranking, "attention": ranking, "fused": ranking}
    with pytest.raises(ValueError, match="history must be dictionaries with an 'epoch', got"):
        plot_curves([{"loss": 2.0}], results)
    with pytest.raises(ValueError, match=r"lack \['fused'\]"):
        plot_curves([], {"features": ranking, "attention": ranking})
    for draw in (plot_cmc, lambda *given, **options: plot_curves([], *given, **options)):
        with pytest.raises(TypeError, match="results must be a Mapping, got list"):
            draw([])
        with pytest.raises(ValueError, match="max_rank must be at most 2147483647"):
            draw(results, max_rank=10**30)
