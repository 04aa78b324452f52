"""Confidence in a mean difference that stays valid however often you look at it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SCALE", "Estimate", "estimate", "pairs_needed", "radius"]

SCALE = 2.0
"""The effect sizes at which the interval is tightest, in standard deviations of a difference: it is
finite from 4 pairs, and for 5 to 20 within a tenth of the narrowest that any scale gives."""
_MOST = 100_000  # largest number of pairs considered


@dataclass(frozen=True)
class Estimate:
    """A mean difference, and a confidence interval for the true one.

    Args:
        n: number of differences.
        mean: their mean.
        spread: their standard deviation; nan for fewer than two.
        low, high: ends of the interval; infinite for fewer than four.
    """

    n: int
    mean: float
    spread: float
    low: float
    high: float

    @property
    def is_different(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def estimate(differences: Sequence[float], confidence: float = 0.95) -> Estimate:
    """A mean difference with a confidence sequence: an interval for any number of looks.

    For normal differences of any variance, the chance that the interval ever misses the true mean
    difference is at most 1 - `confidence`. So you may look at any time and add pairs until you are
    sure; with a t-test you may not.

    Source: the martingale is the likelihood ratio of the t-statistic, mixed over effects mean /
    standard deviation ~ N(0, SCALE^2): the Bayes factor of Rouder et al. (2009), "Bayesian t tests
    for accepting and rejecting the null hypothesis", for one g. That it is one whatever the
    variance, and so holds at any time by Ville's inequality: Lai (1976), "On confidence sequences";
    Wang and Ramdas (2025), "Anytime-valid t-tests and confidence sequences for Gaussian means with
    unknown variance". The interval holds every mean that is not rejected.

    Args:
        differences: variant minus base, one for each pair, at least one.
        confidence: between 0 and 1.
    """
    n, mean = len(differences), statistics.fmean(differences)
    spread = statistics.stdev(differences) if n > 1 else math.nan
    around = radius(n, confidence) * spread if n > 1 and spread > 0 else 0.0
    if math.isinf(radius(n, confidence)):
        around = math.inf
    return Estimate(n, mean, spread, mean - around, mean + around)


def radius(n: int, confidence: float) -> float:
    """Half the width of the interval for `n` differences, in standard deviations of them.

    With t the t-statistic and x = 1 + n SCALE^2, the ratio is
    x^(-1/2) ((1 + t^2/(n-1)) / (1 + t^2/((n-1) x)))^(n/2); it is below 1 / (1 - confidence) where
    t^2/(n-1) < (k - 1) / (1 - k/x) with k = (x^(1/2) / (1 - confidence))^(2/n).
    """
    x = 1 + n * SCALE**2
    k = (math.sqrt(x) / (1 - confidence)) ** (2 / n)
    if n < 2 or k >= x:
        return math.inf
    return math.sqrt((n - 1) * (k - 1) / (1 - k / x) / n)


def pairs_needed(found: Estimate, confidence: float = 0.95) -> int | None:
    """Total number of pairs needed to tell the difference from zero.

    This assumes that mean and spread stay as they are now, so it is a forecast.

    Returns:
        The number of pairs; None if no practical number suffices.
    """
    if found.n < 2 or found.mean == 0:
        return None
    if found.spread == 0:
        return next(n for n in range(2, _MOST) if math.isfinite(radius(n, confidence)))
    wanted = abs(found.mean) / found.spread
    low, high = 2, _MOST
    if radius(high, confidence) >= wanted:
        return None
    while low < high:  # the radius shrinks with every pair
        middle = (low + high) // 2
        low, high = (middle + 1, high) if radius(middle, confidence) >= wanted else (low, middle)
    return low
