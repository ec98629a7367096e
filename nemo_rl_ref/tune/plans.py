# SPDX-License-Identifier: Apache-2.0
r"""How to spend a budget: how many settings, how long each, how many finalists over how many seeds.

A search is planned in two stages. First `n` settings are trained with one seed, for a fraction `f`
of a run, and ranked by what validation says then. Then the best `k` of them are trained whole with
`s` fresh seeds each, and the one with the best mean is taken. Counted in whole runs this costs
:math:`n f + k s`.

What such a plan finds is simulated from three things that a pilot measures:

* what settings drawn from the space reach at the end of a run;
* the standard deviation over seeds of one setting, :math:`\sigma`;
* for each `f`, the rank correlation of a run's value then with its value at the end, :math:`r_f`.

Of the variance :math:`v` of the pilot's values, :math:`\sigma^2` is noise. So a setting's true value
is taken to be the pilot's value, drawn towards the mean by :math:`\rho = \sqrt{1 - \sigma^2/v}`, and
one run shows it with correlation :math:`\rho`. At a fraction `f` it is shown with :math:`r_f \rho`: a
Gaussian copula between the true ranks and the early ones. That the early value says nothing about the
true one beyond what it says about the end is an assumption; so is that the pilot's settings are a
sample of what will be searched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Plan:
    """One way to spend a budget.

    Attributes:
        expected: Expected true value of the setting that is taken, in the objective's unit.
        error: Standard error of the simulation of it.
        trials: Settings of the first stage, `n`.
        fraction: Of a whole run that each of them is trained, `f`.
        finalists: Settings of the second stage, `k`.
        seeds: Seeds for each of them, `s`; 0 where there is no second stage.
        cost: In whole runs.
    """

    expected: float
    error: float
    trials: int
    fraction: float
    finalists: int
    seeds: int
    cost: float


def make_plans(
    budget: float,
    *,
    pilot: Sequence[float],
    noise: float,
    correlations: Mapping[float, float],
    direction: str = "maximize",
    finalists: Sequence[int] = (1, 2, 3, 5, 8),
    seeds: Sequence[int] = (1, 2, 3, 5, 8),
    draws: int = 4000,
    seed: int = 0,
) -> list[Plan]:
    """Simulate the plans that a budget allows.

    Args:
        budget: In whole runs, all seeds counted.
        pilot: The objective at the end of runs with random settings, one run each, at least ten.
        noise: Standard deviation of the objective over the seeds of one setting.
        correlations: Rank correlation of the objective with that at the end, by fraction of a run.
        direction: ``maximize`` or ``minimize``.
        finalists: Numbers of finalists to try. With one, there is no second stage.
        seeds: Numbers of seeds to try.
        draws: Simulated searches for each plan.
        seed: Of the simulation.

    Returns:
        The plans that cost no more than the budget, best first.

    Raises:
        ValueError: If an argument is out of its range, or the budget allows no plan.
    """
    values = np.asarray(pilot, dtype=float)
    if values.ndim != 1 or len(values) < 10 or not np.isfinite(values).all():
        raise ValueError(f"pilot: got {len(values)} values, expected at least 10, all finite")
    variance = values.var(ddof=1)
    if not 0 <= noise**2 < variance:
        raise ValueError(
            f"noise: got {noise}, expected 0 or more and less than the pilot's standard deviation, "
            f"{math.sqrt(variance):.4g}; otherwise its settings do not differ"
        )
    for fraction, correlation in correlations.items():
        if not (0 < fraction <= 1 and -1 <= correlation <= 1):
            raise ValueError(
                f"correlations: got {fraction}: {correlation}, expected a fraction in (0, 1] and a "
                "correlation in [-1, 1]"
            )
    if direction not in ("maximize", "minimize"):
        raise ValueError(f"direction: got {direction!r}, expected maximize or minimize")
    for name, numbers in (("finalists", finalists), ("seeds", seeds), ("draws", (draws,))):
        if not numbers or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"{name}: got {numbers}, expected whole numbers from 1 on")

    sign = 1.0 if direction == "maximize" else -1.0
    reliability = math.sqrt(1 - noise**2 / variance)
    true = np.sort(sign * (values.mean() + reliability * (values - values.mean())))
    plans = []
    for fraction, correlation in sorted({**correlations, 1.0: 1.0}.items()):
        for k in sorted(set(finalists)):
            for s in sorted(set(seeds)) if k > 1 else [0]:
                n = math.floor((budget - k * s) / fraction + 1e-9)
                if n < max(k, 1):
                    continue
                found = sign * _simulate(
                    true, correlation * reliability, noise, n, k, s, draws, seed
                )
                error = found.std(ddof=1) / math.sqrt(draws) if draws > 1 else math.inf
                cost = n * fraction + k * s
                plans.append(Plan(float(found.mean()), float(error), n, fraction, k, s, cost))
    if not plans:
        raise ValueError(
            f"budget: got {budget} whole runs, which allows no plan; expected 1 or more"
        )
    return sorted(plans, key=lambda plan: (-sign * plan.expected, plan.cost))


def _simulate(
    true: np.ndarray,
    correlation: float,
    noise: float,
    trials: int,
    finalists: int,
    seeds: int,
    draws: int,
    seed: int,
) -> np.ndarray:
    """True values, larger is better, of what `draws` searches take; `true` is sorted."""
    random = np.random.default_rng(seed)
    trials = min(trials, 10_000)  # what more of them would find is not in any pilot
    taken = np.empty(draws)
    size = max(1, 2_000_000 // trials)  # searches at once: a bound on memory
    for low in range(0, draws, size):
        count = min(size, draws - low)
        latent = random.standard_normal((count, trials))
        early = correlation * latent
        early += math.sqrt(1 - correlation**2) * random.standard_normal((count, trials))
        best = np.argpartition(-early, finalists - 1, axis=1)[:, :finalists]
        value = _quantile(true, np.take_along_axis(latent, best, axis=1))
        if finalists > 1:
            shown = value + noise / math.sqrt(seeds) * random.standard_normal(value.shape)
            value = np.take_along_axis(value, shown.argmax(axis=1)[:, None], axis=1)
        taken[low : low + count] = value[:, 0]
    return taken


def _quantile(ordered: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """Values of a sample at the probabilities of standard normal numbers, between its ends."""
    from scipy.special import ndtr

    places = ndtr(latent) * len(ordered) - 0.5
    return np.interp(places, np.arange(len(ordered)), ordered)
