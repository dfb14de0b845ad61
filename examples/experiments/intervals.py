"""What differences are known to be: 95 % intervals over seeds and queries, and seeds to see one."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean, and the 95 % interval that it lies in.

    Attributes:
        mean: of what was measured.
        low: 2.5 % quantile of the means of resampled measurements.
        high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float

    def points(self) -> str:
        """Returns shares as points.

        Example:
            >>> Interval(0.012, -0.004, 0.03).points()
            '+1.2 [-0.4, +3.0]'
        """
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def number(self) -> str:
        """Returns what is no share.

        Example:
            >>> Interval(0.012, -0.004, 0.03).number()
            '0.012 [-0.004, 0.030]'
        """
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Float[np.ndarray, "seeds queries"], *, seed: int = 0) -> Interval:
    """Returns the mean, and its 95 % interval, bootstrapped over seeds and over queries.

    Both are resampled with replacement, the queries alike for all seeds, as these share them; of a
    difference to a baseline, pairs stay together. Queries without a value (NaN) are left out: they
    are the same for all seeds. With one seed, the interval is one over queries alone.

    Args:
        values: of each query with each seed.
        seed: of what is drawn.

    Raises:
        ValueError: no value at all, or queries that have one with some seeds only.

    Example:
        >>> interval(np.array([[1.0, np.nan, 1.0], [3.0, np.nan, 3.0]]))
        Interval(mean=2.0, low=1.0, high=3.0)
    """
    known = np.isfinite(values)
    if values.size == 0 or not known.any():
        raise ValueError(f"expected values, got none in {values.shape}")
    if (known != known[0]).any():
        raise ValueError("queries must have a value with all seeds, or with none")
    values = values[:, known[0]]
    by_seed, by_query = _drawn(*values.shape, seed)
    means = ((by_seed @ values) * by_query).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


@lru_cache(maxsize=8)
def _drawn(seeds: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often each seed and each query is drawn, as shares: a row a resampling.

    Reports ask for the same again and again, and drawing is what takes most of the time.
    """
    generator = np.random.default_rng(seed)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    by_query = generator.multinomial(queries, np.full(queries, 1 / queries), RESAMPLES) / queries
    return by_seed, by_query


def seeds_needed(
    differences: Float[np.ndarray, " seeds"], *, effect: float = 0.01, power: float = 0.8
) -> int:
    """Returns how many seeds a paired t-test needs to see an effect at the level of 5 %.

    Args:
        differences: to the baseline, one a seed, of which the spread is taken.
        effect: the true difference, 0.01 = one point.
        power: the chance that it is seen.

    Raises:
        ValueError: fewer than two differences, or an effect that is not positive.

    Example:
        >>> seeds_needed(np.array([0.00, 0.02, 0.01]))
        10
    """
    if len(differences) < 2 or effect <= 0:
        raise ValueError(
            f"expected two differences or more and a positive effect, got {len(differences)} "
            f"and {effect}"
        )
    ratio = effect / max(np.std(differences, ddof=1), effect / 20)  # two seeds are enough then
    number = 2
    while True:
        limit = stats.t.ppf(0.975, number - 1)
        if stats.nct.sf(limit, number - 1, ratio * number**0.5) >= power:
            return number
        number += 1
