"""What an evaluation has found, and whether it is that."""

import numpy as np
import pytest

from casn_plugin.retrieval import check_results

FIGURES = {"mAP": 0.5, "cmc": [0.4, 0.8], "mINP": 0.25}


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ([], TypeError, "results must be a Mapping, got list"),
        ({"features": FIGURES}, ValueError, r"lack \['fused'\]"),
        ({"fused": 0.5}, TypeError, r"results\['fused'\] must be a Mapping, got float"),
        ({"fused": {"mAP": 0.5}}, ValueError, r"results\['fused'\] lack \['cmc'\]"),
        ({"fused": FIGURES | {"cmc": []}}, ValueError, "must be one share or more, got"),
        ({"fused": FIGURES | {"cmc": "ab"}}, ValueError, "must be one share or more, got 'ab'"),
        ({"fused": FIGURES | {"mAP": "high"}}, TypeError, "must be shares, got 'high'"),
        ({"fused": FIGURES | {"cmc": [None]}}, TypeError, "must be shares, got None"),
    ],
)
def test_results_that_lack_figures_are_refused(unchecked, results, error, message):
    with pytest.raises(error, match=message):
        check_results(results, ["fused"])


def test_rankings_have_the_same_figures():
    check_results({"features": FIGURES, "attention": FIGURES, "fused": FIGURES})
    less = {"mAP": 0.5, "cmc": np.array([0.4])}
    with pytest.raises(ValueError, match=r"results\['attention'\] lack \['mINP'\]"):
        check_results({"features": FIGURES, "attention": less, "fused": FIGURES})
