# SPDX-License-Identifier: Apache-2.0
"""Optuna's samplers and pruners by name, and the points of a grid."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import optuna
from optuna import pruners, samplers
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning

from nemo_rl_ref.tune.space import Space, SpaceError
from nemo_rl_ref.tune.spec import Spec

SAMPLERS = ("tpe", "cmaes", "gp", "random", "qmc", "grid")
PRUNERS = ("none", "median", "successive-halving", "hyperband")
#: Of the trials that reach a rung, one in so many goes on to the next.
REDUCTION = 3
#: A larger grid is refused; a random sample of it is what ``--sampler random`` draws.
MOST_POINTS = 2_000


class SearchError(ValueError):
    """A sampler or pruner that cannot be used for a search."""


def make_sampler(name: str, spec: Spec, seed: int | None = None) -> samplers.BaseSampler:
    """Make one of Optuna's samplers; a grid is queued point by point, so its sampler draws nothing.

    Args:
        name: One of `SAMPLERS`.
        spec: The search.
        seed: None for another one in each process, as several processes need. The quasi-random
            sequence, which they share, has seed 0 then.

    Raises:
        SearchError: If the sampler cannot be used for this search.
    """
    if name not in SAMPLERS:
        raise SearchError(f"sampler: got {name!r}, expected {', '.join(SAMPLERS)}")
    if name == "cmaes":
        if len(spec.objectives) > 1:
            raise SearchError("sampler: cmaes searches for one objective; expected tpe or gp")
        if not any(entry.search not in (None, "choice") for entry in spec.space.entries.values()):
            raise SearchError(
                "sampler: cmaes moves numbers; this space has choices only; expected tpe or grid"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if name == "gp":
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if name == "qmc":
            return samplers.QMCSampler(
                scramble=True, seed=seed or 0, warn_independent_sampling=False
            )
        return (
            samplers.TPESampler(seed=seed) if name == "tpe" else samplers.RandomSampler(seed=seed)
        )


def make_pruner(name: str, spec: Spec) -> pruners.BasePruner:
    """Make one of Optuna's pruners; the first rung is the configuration's first validation.

    Raises:
        SearchError: If the pruner cannot be used for the search.
    """
    if name not in PRUNERS:
        raise SearchError(f"pruner: got {name!r}, expected {', '.join(PRUNERS)}")
    if name == "none":
        return pruners.NopPruner()
    if len(spec.objectives) > 1:
        raise SearchError(
            f"pruner: got {name} with {len(spec.objectives)} objectives; a trial that is behind in "
            "one may lead in another, so there is nothing to prune by; expected none"
        )
    period_key = f"{spec.algorithm}.val_period"
    entry = spec.space.entries.get(period_key)
    if entry is not None and (entry.search or entry.tie or entry.when):
        raise SearchError(
            f"pruner: got {name} with {period_key} searched, tied or conditional in the space; "
            "trials are compared at equal steps; expected one value for all"
        )
    if not spec.val_period:
        raise SearchError(
            f"pruner: got {name}, but {period_key} is not set, so there is nothing to judge a "
            f"trial by before its end; expected {period_key} above 0"
        )
    first = spec.val_period
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5)
    if name == "successive-halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
    return pruners.HyperbandPruner(
        min_resource=first, max_resource=spec.max_steps or "auto", reduction_factor=REDUCTION
    )


def grid_points(space: Space) -> list[dict[str, Any]]:
    """List the points of a space: drawn values by key, absent where a condition is not met.

    Raises:
        SearchError: If a key has more than finitely many values, there are too many points, or a
            tie has no result at one of them.
    """
    values = {key: _values(key, dist, space) for key, dist in space.distributions().items()}
    if (count := math.prod(map(len, values.values()))) > MOST_POINTS:
        raise SearchError(
            f"sampler: got a grid of {count:,} points, expected at most {MOST_POINTS:,}"
        )
    points = {}
    for point in itertools.product(*values.values()):
        trial = optuna.trial.FixedTrial(dict(zip(values, point, strict=True)))
        try:
            space.suggest(trial)
        except SpaceError as error:
            raise SearchError(f"sampler: grid: at {trial.params}: {error}") from error
        points[repr(sorted(trial.params.items()))] = trial.params
    return list(points.values())


def _values(key: str, dist: Any, space: Space) -> list[Any]:
    """The values of a distribution."""
    if isinstance(dist, CategoricalDistribution):
        return list(dist.choices)
    if dist.step is None:
        raise SearchError(
            f"sampler: grid needs finitely many values, but {key} has {space.entries[key].search}; "
            "expected choice, int, or uniform with a step"
        )
    count = round((dist.high - dist.low) / dist.step)
    return [min(dist.low + i * dist.step, dist.high) for i in range(count + 1)]
