"""What an evaluation has found, and whether it is that."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from casn_plugin import Encoding, PairClassifier, RankingOptions, calibrate, fuse_distmats
from casn_plugin.explanation import log_results
from casn_plugin.ranking import attention_distmat
from casn_plugin.retrieval import (
    LabelledEncodings,
    calibrate_gallery,
    check_results,
    retrieve,
    side_by_side,
)

NAN = float("nan")
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
        ({"fused": FIGURES | {"mAP": "high"}}, TypeError, "'mAP'. must be a number, got str"),
        ({"fused": FIGURES | {"cmc": [None]}}, TypeError, "'cmc'. must be a number, got NoneType"),
        ({"fused": FIGURES | {"mAP": NAN}}, ValueError, r"'mAP'\] must lie in \[0, 1\], got nan"),
        ({"fused": FIGURES | {"cmc": [0.4, NAN]}}, ValueError, "'cmc'. must lie in .* got nan"),
        ({"fused": FIGURES | {"TAR@1%": 1.5}}, ValueError, "'TAR@1%'. must lie in .* got 1.5"),
        ({"fused": FIGURES, "auc": -1}, ValueError, "'auc'. must lie in .* got -1"),
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


@pytest.fixture
def people():
    """A model, and 24 images of six people in two cameras, one person and one camera unknown."""
    model = nn.Module()
    model.pair_classifier = PairClassifier(8, 16)
    images = Encoding(torch.randn(24, 8), basis=torch.rand(24, 8, 6, 3))
    pids = [-1 if row // 4 == 5 else row // 4 for row in range(24)]
    camids = [-1 if row == 7 else row % 2 for row in range(24)]
    return model, LabelledEncodings(images, pids, camids)


def test_what_a_test_set_has_no_value_for_is_shown_as_a_dash(people):
    model, (images, pids, camids) = people
    one = LabelledEncodings(images[:4], pids[:4], camids[:4])
    results = retrieve(model, one, one).results
    assert np.isnan([results["auc"], results["fused"]["TAR@1%"]]).all()
    shown = side_by_side(results).splitlines()
    assert shown[-1].endswith("AUC -") and shown[-2] == "-: no pair shows two people"
    assert shown[-3].split() == ["TAR@0.1%", "-", "-", "-"]
    logged = []
    log_results(SimpleNamespace(add_scalar=lambda *each: logged.append(each)), "one", results, 0)
    assert len(logged) == 6 and not any(np.isnan(value) for _, value, _ in logged)
    with pytest.raises(TypeError, match="'auc'. must be a float .* got NoneType"):
        side_by_side(dict(results, auc=None))


def test_a_gallery_is_calibrated_on_each_pair_once(people):
    model, (images, pids, camids) = people
    found = calibrate_gallery(model, people[1], 0.1, confidence=0.8)
    qf = nn.functional.normalize(images.features)
    fused = fuse_distmats(
        torch.cdist(qf.double(), qf.double()).float(),
        attention_distmat(model, images, images, unit=True),
    )
    distances, same = [], []
    for i in range(24):
        for j in range(i + 1, 24):
            one = pids[i] == pids[j]
            if -1 in (pids[i], pids[j]) or (one and camids[i] == camids[j] != -1):
                continue
            distances.append(float(fused[i, j]))
            same.append(one)
    expected = calibrate(torch.tensor(distances), torch.tensor(same), 0.1, confidence=0.8)
    assert (found.positives, found.negatives) == (expected.positives, expected.negatives)
    assert found.negatives == 160 and found.positives == 5 * 4 + 1  # row 7's camera is unknown
    assert abs(found.threshold - expected.threshold) < 1e-5
    assert found.false_alarm_interval == expected.false_alarm_interval


def test_of_a_large_gallery_some_are_drawn(people, unchecked):
    model, labelled = people
    some = calibrate_gallery(model, labelled, 0.2, images=12)
    assert some.positives + some.negatives <= 66 and some.negatives > 20
    assert some == calibrate_gallery(model, labelled, 0.2, images=12)
    assert some != calibrate_gallery(model, labelled, 0.2, images=12, seed=1)
    every = calibrate_gallery(model, labelled, 0.2)
    assert every == calibrate_gallery(model, labelled, 0.2, images=24, seed=5)
    with pytest.raises(TypeError, match="gallery must be LabelledEncodings"):
        calibrate_gallery(model, labelled.encoding)
    with pytest.raises(ValueError, match="normalization must be 'unit', got 'query'"):
        calibrate_gallery(model, labelled, options=RankingOptions(normalization="query"))
    with pytest.raises(ValueError, match="images must be at least 2"):
        calibrate_gallery(model, labelled, images=1)
    with pytest.raises(ValueError, match="needs at least 1000 pairs of two people, got 160"):
        calibrate_gallery(model, labelled)
