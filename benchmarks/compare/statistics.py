"""What the times of two sides say: the ratio, its spread, and whether it is more than noise.

The sides are paired by rounds, so whatever slows a whole round down cancels.  The interval is that of the sign test:
the median of the ratios lies between two of them with the confidence given, whatever their distribution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.measure import Quantiles, quantiles

CONFIDENCE = 0.99
"""Of a single interval; a comparison has many, and each that is wrong sends someone looking for a reason."""
SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "same", "?"


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The interval of the median by the sign test; None for too few values (fewer than 8 for 0.99).

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while 2 * tail <= 1 - confidence:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return None if below == 0 else (ordered[below - 1], ordered[n - below])


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Times of one side divided by those of another, round by round; less than 1 is faster."""

    quantiles: Quantiles
    interval: tuple[float, float] | None
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float]) -> Ratio:
        """Of two sides that took part in the same rounds.

        Raises:
            ValueError: of rounds there are none, or not as many on both sides, or a time is not positive.
        """
        if not values or len(values) != len(base):
            raise ValueError(f"rounds: expected as many on both sides, got {len(values)} and {len(base)}")
        if not min(*values, *base) > 0:
            raise ValueError(f"times: expected positive ones, got {min(*values, *base)}")
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        return cls(quantiles(ratios), median_interval(ratios), len(ratios))

    @property
    def reach(self) -> float:
        """How far from 1 the interval goes, as a factor of at least 1; without an interval, how far the spread does."""
        ends = self.interval or (self.quantiles.p20, self.quantiles.p80)
        return max(1.0, ends[1], 1 / ends[0])


def verdict(ratio: Ratio, control: Ratio | None) -> str:
    """slower or faster where the ratio is beyond the noise, same where it is not, ? where rounds are too few.

    Beyond the noise: 1 is not in the interval, and the median is further from 1 than the interval of the control goes,
    that of two processes that run the same code.
    """
    if ratio.interval is None:
        return UNKNOWN
    low, high = ratio.interval
    median, noise = ratio.quantiles.p50, 1.0 if control is None else control.reach
    if low > 1 and median > noise:
        return SLOWER
    if high < 1 and median < 1 / noise:
        return FASTER
    return SAME
