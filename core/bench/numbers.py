"""Medians, percentiles, straight lines. Plain Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of all lie, between two by interpolation; NaN of none."""
    if not values:
        return math.nan
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    """NaN of none."""
    return statistics.median(values) if values else math.nan


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, by least squares."""

    slope: float
    intercept: float
    worst: float  # largest |y - line| over y: how far the points are from a straight line

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line | None:
    """Fit a line; None if there are less than two different x."""
    if len(set(xs)) < 2:
        return None
    slope, intercept = statistics.linear_regression(xs, ys)
    worst = max(abs(y - intercept - slope * x) / abs(y) if y else 0.0 for x, y in zip(xs, ys, strict=True))
    return Line(slope, intercept, worst)
