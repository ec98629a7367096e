# SPDX-License-Identifier: Apache-2.0
"""The budget planner against what is known in closed form, and against a simulation by hand."""

import math
import statistics

import numpy as np
import pytest
from scipy.special import ndtri

from nemo_rl_ref.tune.plans import make_plans

#: A thousand settings whose values are standard normal.
NORMAL = ndtri((np.arange(1000) + 0.5) / 1000)
#: Expected largest of n standard normal numbers (Harter, 1961).
LARGEST = {2: 0.56419, 5: 1.16296, 10: 1.53875, 20: 1.86748}


@pytest.mark.parametrize("n", LARGEST)
def test_one_stage_without_noise_finds_the_best_of_n(n):
    (plan,) = make_plans(n, pilot=NORMAL, noise=0.0, correlations={}, finalists=[1], draws=20_000)
    assert (plan.trials, plan.fraction, plan.seeds, plan.cost) == (n, 1.0, 0, n)
    assert abs(plan.expected - LARGEST[n]) < 4 * plan.error < 0.03


@pytest.mark.parametrize(("noise", "early"), [(0.6, 1.0), (0.6, 0.5), (0.0, 0.3)])
def test_one_stage_with_noise_finds_less_by_the_correlation(noise, early):
    """E[true value of the best of n as shown] = c s E[largest of n], c the correlation shown."""
    pilot = NORMAL * math.sqrt(1 + noise**2)  # a pilot shows the noise too
    plans = make_plans(
        5, pilot=pilot, noise=noise, correlations={0.5: early}, finalists=[1], draws=20_000
    )
    short = next(plan for plan in plans if plan.fraction == 0.5)
    reliability = 1 / math.sqrt(1 + noise**2)
    assert short.trials == 10
    assert abs(short.expected - early * reliability * LARGEST[10]) < 4 * short.error + 0.01


def test_a_second_stage_against_a_simulation_by_hand():
    noise, n, k, s = 1.0, 12, 3, 2
    pilot = NORMAL * math.sqrt(2)
    plans = make_plans(
        n + k * s, pilot=pilot, noise=noise, correlations={}, finalists=[k], seeds=[s], draws=20_000
    )
    random = np.random.default_rng(1)
    found = []
    for _ in range(20_000):
        true = random.standard_normal(n)
        shown = true + noise * random.standard_normal(n)
        best = np.argsort(-shown)[:k]
        means = [true[i] + noise * random.standard_normal(s).mean() for i in best]
        found.append(true[best[int(np.argmax(means))]])
    error = math.hypot(statistics.stdev(found) / math.sqrt(len(found)), plans[0].error)
    assert abs(plans[0].expected - statistics.mean(found)) < 4 * error


def test_what_is_to_be_minimized_is_the_mirror_image():
    options = {"noise": 0.3, "correlations": {0.25: 0.8}, "draws": 500}
    up = make_plans(20, pilot=NORMAL, **options)
    down = make_plans(20, pilot=-NORMAL, direction="minimize", **options)
    assert [(p.trials, p.finalists, p.seeds) for p in up] == [
        (p.trials, p.finalists, p.seeds) for p in down
    ]
    np.testing.assert_allclose([p.expected for p in up], [-p.expected for p in down], atol=1e-12)


def test_plans_keep_the_budget_and_short_runs_pay_only_if_they_tell_something():
    options = {"pilot": NORMAL, "noise": 0.5, "draws": 2000}
    good = make_plans(20, correlations={0.1: 0.95}, **options)
    bad = make_plans(20, correlations={0.1: 0.05}, **options)
    assert all(plan.cost <= 20 + 1e-9 and plan.finalists <= plan.trials for plan in good + bad)
    assert good[0].fraction == 0.1 and bad[0].fraction == 1.0
    assert good == sorted(good, key=lambda plan: -plan.expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pilot": [1.0, 2.0]}, "pilot: got 2 values, expected at least 10, all finite"),
        ({"pilot": [math.nan, *NORMAL]}, "all finite"),
        ({"noise": 2.0}, r"noise: got 2.0, .* less than the pilot's standard deviation, 0\.99"),
        ({"noise": -0.1, "pilot": np.ones(10)}, "noise: got -0.1"),
        ({"correlations": {1.5: 0.5}}, r"correlations: got 1.5: 0.5, expected a fraction in"),
        ({"correlations": {0.5: 1.5}}, r"correlation in \[-1, 1\]"),
        ({"direction": "up"}, "direction: got 'up', expected maximize or minimize"),
        ({"finalists": []}, "finalists: got"),
        ({"seeds": [0]}, r"seeds: got \[0\], expected whole numbers from 1 on"),
        ({"budget": 0.5}, "budget: got 0.5 whole runs, which allows no plan"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"budget": 20, "pilot": NORMAL, "noise": 0.5, "correlations": {}, **change}
    with pytest.raises(ValueError, match=message):
        make_plans(**arguments)
