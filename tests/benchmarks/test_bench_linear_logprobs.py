# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the linear log-probabilities fails for a real loss of time, not for noise."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bench_linear_logprobs import failures, interval


def ratios(middle, seed, rounds=12, noise=0.04):
    rng = random.Random(seed)
    return [middle * (1 + rng.uniform(-noise, noise)) for _ in range(rounds)]


@pytest.mark.parametrize(
    ("middle", "fewest", "most"), [(1.05, 0, 0), (1.0, 0, 25), (0.98, 100, 900), (0.9, 1000, 1000)]
)
def test_time_fails_only_where_the_whole_interval_is_below_1(middle, fewest, most):
    found = [failures(15, middle, *interval(ratios(middle, seed)), 0) for seed in range(1000)]
    assert fewest <= sum(map(len, found)) <= most
    assert all("time: gather over ours is" in text for texts in found for text in texts)


def test_the_interval_holds_the_median_and_shrinks_with_rounds():
    held = [low < 1 < high for low, high in (interval(ratios(1.0, s)) for s in range(1000))]
    assert 950 <= sum(held) <= 975  # 96.1 % with 12 rounds
    assert interval([5, 3, 1, 2, 6, 4]) == (1, 6)
    few, many = interval(ratios(1.0, 3, 8)), interval(ratios(1.0, 3, 200))
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    with pytest.raises(ValueError, match="got 5, expected 6"):
        interval([1] * 5)


def test_memory_and_difference():
    memory, difference = failures(7.9, 1.0, 0.9, 1.1, 2e-3)
    assert "7.9 times less" in memory and "2.0e-03" in difference
    assert failures(8, 1.0, 0.9, 1.1, 1e-3) == []
