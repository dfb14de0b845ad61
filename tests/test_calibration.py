"""Thresholds for a rate of false alarms: by counting, ties and too few pairs included."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from casn_plugin import calibrate
from casn_plugin.calibration import load_calibration, save_calibration, true_accept_rates


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pairs=st.integers(1, 400),
    rate=st.sampled_from([0.5, 0.1, 0.01]),
    levels=st.sampled_from([0, 3, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_the_threshold_is_the_greatest_that_lets_so_few_pass(seed, pairs, rate, levels, dtype):
    rng = np.random.default_rng(seed)
    values = rng.random(pairs)
    values = np.floor(values * levels) / levels if levels else values
    distances, same = torch.from_numpy(values).to(dtype), torch.from_numpy(rng.random(pairs) < 0.2)
    negatives = sorted(distances[~same].tolist())
    allowed = [t for t in negatives if sum(n <= t for n in negatives) <= rate * len(negatives)]
    if len(negatives) * rate < 1:
        with pytest.raises(ValueError, match=rf"needs at least {round(1 / rate)} pairs of two"):
            calibrate(distances, same, rate)
        return
    if not allowed:
        with pytest.raises(ValueError, match="have the least distance"):
            calibrate(distances, same, rate)
        return
    found = calibrate(distances, same, rate)
    assert found.threshold == max(allowed)
    assert found.false_alarm_rate == sum(n <= max(allowed) for n in negatives) / len(negatives)
    positives = distances[same].tolist()
    if positives:
        accepted = sum(p <= max(allowed) for p in positives) / len(positives)
        assert found.true_accept_rate == accepted
    else:
        assert math.isnan(found.true_accept_rate)
    assert (found.negatives, found.positives) == (len(negatives), len(positives))


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_are_exact_binomial_ones(confidence):
    torch.manual_seed(0)
    distances, same = torch.rand(30, 40), torch.rand(30, 40) < 0.1
    distances[same] /= 3
    found = calibrate(distances, same, 0.02, confidence=confidence)
    for rate, total, interval in (
        (found.false_alarm_rate, found.negatives, found.false_alarm_interval),
        (found.true_accept_rate, found.positives, found.true_accept_interval),
    ):
        k, tail = round(rate * total), (1 - confidence) / 2
        # the rates at which so many, or so few, have the probability of one tail
        assert stats.binom.sf(k - 1, total, interval.low) == pytest.approx(tail)
        assert stats.binom.cdf(k, total, interval.high) == pytest.approx(tail)
        assert interval.low < rate < interval.high
    assert found.confidence == confidence
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threshold = 0.0


def test_the_interval_covers_the_truth():
    """Of many calibrations, the false-alarm rate on endless new pairs lies in the interval."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        negatives = torch.from_numpy(rng.random(500))
        found = calibrate(negatives, torch.zeros(500, dtype=torch.bool), 0.05)
        inside += found.false_alarm_interval.low <= found.threshold <= found.false_alarm_interval[1]
    assert inside >= 0.95 * 200  # of uniform distances the threshold is the rate


def test_rates_of_an_evaluation():
    negatives = torch.arange(1.0, 1001)
    positives = torch.tensor([0.5, 1.0, 5.0, 10.0, 10.5, 900.0])
    distances = torch.cat([positives, negatives])
    same = torch.arange(1006) < 6
    rates = true_accept_rates(distances, same)
    assert rates == {"TAR@1%": 4 / 6, "TAR@0.1%": 2 / 6}
    for rate, name in ((0.01, "TAR@1%"), (0.001, "TAR@0.1%")):
        assert calibrate(distances, same, rate).true_accept_rate == rates[name]
    few = true_accept_rates(distances[:-1], same[:-1])  # 999
    assert few["TAR@1%"] == 3 / 6 and math.isnan(few["TAR@0.1%"])
    assert all(map(math.isnan, true_accept_rates(negatives, same[6:]).values()))
    assert all(map(math.isnan, true_accept_rates(torch.zeros(1006), same).values()))


def test_bad_input_says_what_was_expected(unchecked):
    distances, same = torch.rand(200), torch.arange(200) < 50
    with pytest.raises(TypeError, match="distances must be a float tensor"):
        calibrate([0.5], same)
    with pytest.raises(TypeError, match="same must be a bool tensor"):
        calibrate(distances, same.long())
    with pytest.raises(ValueError, match="one shape"):
        calibrate(distances, same[:-1])
    with pytest.raises(ValueError, match="distances must not be NaN"):
        calibrate(distances * torch.nan, same)
    with pytest.raises(ValueError, match="needs at least 200 pairs of two people, got 150"):
        calibrate(distances, same, 0.005)
    for wrong in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="false_alarm_rate must lie"):
            calibrate(distances, same, wrong)
        with pytest.raises(ValueError, match="confidence must lie"):
            calibrate(distances, same, confidence=wrong)


def test_a_threshold_that_nothing_accepts_is_refused():
    same = torch.arange(9) > 6
    for distances, came in (
        (-torch.arange(9.0), "-6"),
        (torch.arange(9.0).log(), "-inf"),
    ):
        with pytest.raises(ValueError, match=f"distances is {came}, but must be >= 0 and finite"):
            calibrate(distances, same, 0.2)
    found = calibrate(torch.arange(9.0) - 1, same, 0.3)
    assert found.threshold == 0  # some distances may be negative
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="threshold must be >= 0 and finite, got"):
            save_calibration("c.json", dataclasses.replace(found, threshold=wrong), of="m")


@pytest.mark.parametrize("positives", [0, 3])
def test_a_calibration_is_kept_for_what_it_was_made_of(positives, tmp_path):
    distances = torch.rand(50 + positives, generator=torch.Generator().manual_seed(1))
    found = calibrate(distances, torch.arange(50 + positives) >= 50, 0.1, confidence=0.9)
    path = save_calibration(tmp_path / "deep" / "c.json", found, of="model a")
    assert repr(load_calibration(path, of="model a")) == repr(found)  # NaN is NaN
    with pytest.raises(ValueError, match="on distances of 'model a', not of 'model b'"):
        load_calibration(path, of="model b")
    with pytest.raises(FileNotFoundError):
        load_calibration(tmp_path / "none.json", of="model a")


def test_a_file_that_is_no_calibration_is_refused(tmp_path, unchecked):
    found = calibrate(torch.arange(20.0), torch.arange(20) < 4, 0.1)
    path = save_calibration(tmp_path / "c.json", found, of="m")
    whole = json.loads(path.read_text())
    for change in (
        {"format": "else"}, {"version": 2}, {"threshold": -1}, {"threshold": "1"},
        {"threshold": None}, {"threshold": True}, {"false_alarm_rate": 1.5}, {"negatives": 1.5},
        {"false_alarm_interval": [0.1]}, {"true_accept_interval": "ab"}, {"confidence": []},
        {"positives": -1},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"c.json is no calibration that was saved here: "):
            load_calibration(path, of="m")
    for name in whole:
        path.write_text(json.dumps({key: each for key, each in whole.items() if key != name}))
        with pytest.raises(ValueError, match="c.json"):
            load_calibration(path, of="m")
    for text in ("", "[]", "3", "[" * 99999, "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match="is no calibration that was saved here"):
            load_calibration(path, of="m")
    with pytest.raises(TypeError, match="found must be a Calibration, got float"):
        save_calibration(path, 0.5, of="m")
    with pytest.raises(TypeError, match="of must be a str, got int"):
        save_calibration(path, found, of=5)
