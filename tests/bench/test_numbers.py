"""Percentiles and fitted lines."""

import math

import pytest

from core.bench.numbers import fit, median, quantile


def test_a_percentile_lies_between_two_values():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([0, 10], 0.99) == pytest.approx(9.9)
    assert quantile([7], 0.99) == 7


def test_of_nothing_there_is_no_median_and_no_percentile():
    assert math.isnan(median([]))
    assert math.isnan(quantile([], 0.5))


def test_a_line_through_points_of_a_line_is_that_line():
    line = fit([1, 2, 4, 8], [5, 7, 11, 19])
    assert (line.slope, line.intercept, line.worst) == (pytest.approx(2), pytest.approx(3), pytest.approx(0))
    assert line.at(100) == pytest.approx(203)


def test_a_step_in_the_points_shows_in_how_far_they_are_from_the_line():
    assert fit([1, 2, 3, 4], [1, 1, 2, 2]).worst > 0.2


def test_one_point_has_no_line():
    assert fit([1, 1], [2, 3]) is None
