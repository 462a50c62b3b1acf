"""Means over seeds with 95 % intervals (Student's t), and differences that are paired by seed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, the half of its 95 % interval (None: one value says nothing of it) and the number of values.

    Example:
        >>> str(mean([1.0, 2.0, 3.0]))
        '2.000 ± 2.484 (3)'
        >>> str(mean([1.0]))
        '1.000 (1)'
    """

    value: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return self.text(3)

    def text(self, digits: int, factor: float = 1, sign: bool = False) -> str:
        """Write it with so many digits, times a factor; the count in brackets."""
        value = f"{self.value * factor:{'+' if sign else ''}.{digits}f}"
        spread = "" if self.half is None else f" ± {self.half * factor:.{digits}f}"
        return f"{value}{spread} ({self.count})"

    @property
    def low(self) -> float:
        """The interval's lower end; −∞ where there is none."""
        return -math.inf if self.half is None else self.value - self.half

    @property
    def high(self) -> float:
        """The interval's upper end; ∞ where there is none."""
        return math.inf if self.half is None else self.value + self.half


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of at least one value with its interval."""
    count = len(values)
    if count == 1:
        return Mean(values[0], None, 1)
    error = statistics.stdev(values) / math.sqrt(count)
    return Mean(statistics.fmean(values), float(t.ppf(0.975, count - 1)) * error, count)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Mean | None:
    """Return the mean of ours − theirs over the seeds that both have, or None where there are none.

    Example:
        >>> str(paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 3.0}))
        '-1.000 ± 0.000 (2)'
    """
    both = sorted(ours.keys() & theirs.keys())
    return mean([ours[seed] - theirs[seed] for seed in both]) if both else None
