"""From which distance on nobody is found: a threshold for a rate of false alarms."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from casn_plugin.doors import check_finite, check_fraction, check_kind, check_same, check_tensor
from casn_plugin.files import replacing

_FORMAT = "casn-plugin calibration"

FALSE_ALARM_RATES = (0.01, 0.001)
"""At these rates of false alarms an evaluation says how many matches are accepted."""


class Interval(NamedTuple):
    """Between which bounds a rate lies, with the confidence that was asked for.

    Attributes:
        low: in [0, 1].
        high: likewise.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """The threshold for a rate of false alarms, as :func:`calibrate` finds it.

    A pair passes where its distance is <= `threshold`.

    Attributes:
        threshold: the distance.
        false_alarm_rate: share of the pairs of two people that pass, at most the rate asked for.
        false_alarm_interval: exact binomial (Clopper-Pearson) interval of that rate.
        true_accept_rate: share of the pairs of one person that pass; NaN where there are none.
        true_accept_interval: its interval, likewise.
        negatives: number of pairs of two people.
        positives: number of pairs of one person.
        confidence: of both intervals.
    """

    threshold: float
    false_alarm_rate: float
    false_alarm_interval: Interval
    true_accept_rate: float
    true_accept_interval: Interval
    negatives: int
    positives: int
    confidence: float


def calibrate(
    distances: Float[Tensor, "*pairs"],
    same: Bool[Tensor, "*pairs"],
    false_alarm_rate: float = 0.01,
    *,
    confidence: float = 0.95,
) -> Calibration:
    """Returns the greatest distance at which at most so many pairs of two people pass.

    The threshold is the distance of a pair of two people, of the last that may pass. Intervals
    are exact binomial ones (Clopper-Pearson) and take pairs to be independent: where pairs share
    pictures or people, the truth is less certain than they say.

    Args:
        distances: of labelled pairs, of people who are in no training set: fused distances as
            :func:`casn_plugin.rank_gallery` gives them, or any others whose threshold is >= 0, such
            as 1 - cosine.
        same: whether each pair shows one person.
        false_alarm_rate: share of the pairs of two people that may pass, in (0, 1).
        confidence: of the intervals, in (0, 1).

    Raises:
        TypeError: distances that are no float tensor, `same` that is none of bool.
        ValueError: unlike shapes, NaN, a rate or confidence outside (0, 1); fewer pairs of two
            people than 1 / `false_alarm_rate`; so many of them at the least distance that no
            threshold lets so few pass; or a threshold that is negative or infinite, which nothing
            that takes one would accept.

    Example:
        >>> import torch
        >>> distances = torch.tensor([0.1, 0.2, 0.35, 0.3, 0.4, 0.5, 0.6])
        >>> same = torch.tensor([True, True, True, False, False, False, False])
        >>> found = calibrate(distances, same, false_alarm_rate=0.25)
        >>> round(found.threshold, 3), found.false_alarm_rate, round(found.true_accept_rate, 3)
        (0.3, 0.25, 0.667)
    """
    for name, value in (("false_alarm_rate", false_alarm_rate), ("confidence", confidence)):
        if check_fraction(name, value) in (0, 1):
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    positives, negatives = _split(distances, same)
    if len(negatives) * false_alarm_rate < 1 - 1e-9:
        raise ValueError(
            f"a false-alarm rate of {false_alarm_rate} needs at least "
            f"{math.ceil(1 / false_alarm_rate - 1e-9)} pairs of two people, got {len(negatives)}"
        )
    threshold = _threshold(negatives, false_alarm_rate)
    if threshold is None:
        raise ValueError(
            f"more than {false_alarm_rate:.1%} of the pairs of two people have the least distance, "
            f"{float(negatives.min())}: no threshold lets so few pass"
        )
    if not 0 <= threshold < math.inf:
        raise ValueError(
            f"the threshold of these distances is {threshold:g}, but must be >= 0 and finite: "
            "expected distances, not similarities (1 - cosine, say, not -cosine)"
        )
    alarms, accepted = int((negatives <= threshold).sum()), int((positives <= threshold).sum())
    return Calibration(
        threshold=threshold,
        false_alarm_rate=alarms / len(negatives),
        false_alarm_interval=_interval(alarms, len(negatives), confidence),
        true_accept_rate=accepted / len(positives) if len(positives) else math.nan,
        true_accept_interval=_interval(accepted, len(positives), confidence),
        negatives=len(negatives),
        positives=len(positives),
        confidence=float(confidence),
    )


def save_calibration(path: str | os.PathLike[str], found: Calibration, *, of: str) -> Path:
    """Returns the path of a calibration saved as JSON; the file is whole or not there.

    Args:
        path: of the file, an existing one is replaced.
        found: the calibration.
        of: what gave the distances, such as the model's checksum, ``index.manifest.model``: for
            other distances the threshold means nothing.

    Raises:
        OSError: a folder that can't be made or written.
        TypeError: no calibration, or an `of` that is no text.
        ValueError: a calibration that :func:`calibrate` would not give.
    """
    about = _no_nan(asdict(check_kind("found", found, Calibration)))
    _calibration(about)  # else it could not be loaded
    content = {"format": _FORMAT, "version": 1, "of": check_kind("of", of, str), **about}
    with replacing(path) as place:
        place.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


def load_calibration(path: str | os.PathLike[str], *, of: str) -> Calibration:
    """Returns the calibration that :func:`save_calibration` saved.

    Args:
        path: of the file.
        of: what gives the distances that are compared with its threshold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else than a calibration, or one of other distances.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> found = calibrate(torch.arange(9.0), torch.arange(9) < 4, 0.2)
        >>> with TemporaryDirectory() as folder:
        ...     path = save_calibration(f"{folder}/calibration.json", found, of="my model")
        ...     load_calibration(path, of="my model") == found
        True
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        sound = isinstance(content, dict) and content.get("format") == _FORMAT
        if not sound or content.get("version") != 1:
            raise ValueError("it is none, or of a later version")
        found = _calibration({each.name: content[each.name] for each in fields(Calibration)})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no calibration that was saved here: {error}") from error
    if content.get("of") != of:
        raise ValueError(
            f"{path} was calibrated on distances of {content.get('of')!r:.80}, not of {of!r:.80}: "
            "its threshold means nothing here"
        )
    return found


def _calibration(content: dict[str, Any]) -> Calibration:
    """Returns a calibration of what a file says, of which nothing is believed."""

    def share(value: Any) -> float:
        return math.nan if value is None else float(check_fraction("a share", value))

    negatives, positives = content["negatives"], content["positives"]
    threshold = content["threshold"]
    for count in (negatives, positives):
        if type(count) is not int or count < 0:
            raise ValueError(f"a number of pairs must be >= 0, got {count!r:.80}")
    if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be >= 0 and finite, got {threshold!r:.80}")
    return Calibration(
        threshold=float(threshold),
        false_alarm_rate=share(content["false_alarm_rate"]),
        false_alarm_interval=Interval(*map(share, content["false_alarm_interval"])),
        true_accept_rate=share(content["true_accept_rate"]),
        true_accept_interval=Interval(*map(share, content["true_accept_interval"])),
        negatives=negatives,
        positives=positives,
        confidence=share(content["confidence"]),
    )


def _no_nan(value: Any) -> Any:
    """Returns plain values with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _no_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def true_accept_rates(
    distances: Float[Tensor, "*pairs"], same: Bool[Tensor, "*pairs"]
) -> dict[str, float]:
    """Returns TAR at FAR 1 % and 0.1 %: the share of matches that pass these thresholds.

    It is NaN where :func:`calibrate` would refuse, or where there is no pair of one person.

    Raises:
        TypeError, ValueError: distances and `same` as :func:`calibrate`.

    Example:
        >>> import torch
        >>> same = torch.arange(200) < 50
        >>> true_accept_rates(torch.arange(200.0), same)
        {'TAR@1%': 1.0, 'TAR@0.1%': nan}
    """
    positives, negatives = _split(distances, same)
    rates = {}
    for rate in FALSE_ALARM_RATES:
        enough = len(positives) and len(negatives) * rate >= 1 - 1e-9
        threshold = _threshold(negatives, rate) if enough else None
        rates[f"TAR@{100 * rate:g}%"] = (
            math.nan if threshold is None else float((positives <= threshold).double().mean())
        )
    return rates


def _split(distances: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distances of pairs of one person, and of pairs of two."""
    check_finite("distances", check_tensor("distances", distances, "*pairs"))
    check_same("same", same, distances.shape)
    values = distances.detach()
    return values[same], values[~same]


def _threshold(negatives: Float[Tensor, " negatives"], rate: float) -> float | None:
    """Returns the greatest distance of a negative at or below which no more than that share lies.

    None where there is none: too many of them tie at the least distance.
    """
    passing = int(len(negatives) * rate + 1e-9)
    threshold = negatives.kthvalue(passing).values
    if int((negatives <= threshold).sum()) > passing:  # it ties with others that may not pass
        below = negatives[negatives < threshold]
        if not len(below):
            return None
        threshold = below.max()
    return float(threshold)


def _interval(count: int, total: int, confidence: float) -> Interval:
    """Returns the Clopper-Pearson interval of a share."""
    if not total:
        return Interval(math.nan, math.nan)
    from scipy.stats import binomtest  # takes a second to import

    found = binomtest(count, total).proportion_ci(confidence, method="exact")
    return Interval(float(found.low), float(found.high))
