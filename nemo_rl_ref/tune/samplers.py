# SPDX-License-Identifier: Apache-2.0
"""Optuna's samplers and pruners by name, set up for studies that several processes share."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from nemo_rl_ref.tune.space import Space, SpaceError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

    from nemo_rl_ref.tune.spec import Spec

SAMPLERS = ("tpe", "cmaes", "gp", "random", "qmc", "grid")
PRUNERS = ("none", "median", "successive-halving", "hyperband")
#: Of the trials that reach a rung, one in so many goes on to the next.
REDUCTION = 3
#: A larger grid is refused; a random sample of it is what ``--sampler random`` draws.
MOST_POINTS = 100_000


class SearchError(ValueError):
    """A sampler or pruner that cannot be used for a search."""


def make_sampler(name: str, spec: Spec, seed: int) -> BaseSampler:
    """A sampler whose choice for a trial depends on seed, number and finished trials only.

    Not on which process asks, or how often a study was interrupted before.

    Args:
        name: One of `SAMPLERS`.
        spec: The search.
        seed: The seed.

    Returns:
        The sampler.

    Raises:
        SearchError: If the sampler cannot be used for this search.
    """
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: TPESampler(seed=seed),
        "cmaes": lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda seed: RandomSampler(seed=seed),
    }
    if name not in SAMPLERS:
        raise SearchError(f"sampler: got {name!r}, expected {', '.join(SAMPLERS)}")
    if name == "cmaes":
        if len(spec.objectives) > 1:
            raise SearchError("sampler: cmaes searches for one objective; expected tpe or gp")
        if not any(entry.search not in (None, "choice") for entry in spec.space.entries.values()):
            raise SearchError(
                "sampler: cmaes moves numbers; this space has choices only; expected tpe or grid"
            )
    if name == "grid":
        return GridSampler(grid_points(spec.space), seed)
    if name == "qmc":
        return NumberedQmcSampler(spec.space, seed)
    return SeededByTrial(makers[name], seed)


def make_pruner(name: str, spec: Spec) -> BasePruner:
    """A pruner, its steps taken from the configuration: the first rung is the first validation.

    Args:
        name: One of `PRUNERS`.
        spec: The search.

    Returns:
        The pruner.

    Raises:
        SearchError: If the pruner cannot be used for this search.
    """
    if name not in PRUNERS:
        raise SearchError(f"pruner: got {name!r}, expected {', '.join(PRUNERS)}")
    if name == "none":
        return NopPruner()
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
    if name == "median":
        return MedianPruner(n_startup_trials=5)
    first = spec.val_period
    if name == "successive-halving":
        return SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
    return HyperbandPruner(
        min_resource=first, max_resource=spec.max_steps or "auto", reduction_factor=REDUCTION
    )


class SeededByTrial(BaseSampler):
    """One of Optuna's samplers, made anew for every trial with a seed of the trial's number.

    With one seed for all, two processes would draw the same points; with a generator that runs
    on, a resumed study would draw others than an uninterrupted one.

    Args:
        make: Makes a sampler of a seed.
        seed: The study's seed.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self._make, self._seed = make, seed
        self._number, self._sampler = -1, make(seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number = trial.number
            self._sampler = self._make(mixed_seed(self._seed, trial.number))
        return self._sampler

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The inner sampler's."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The inner sampler's."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """The inner sampler's."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """The inner sampler's."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """The inner sampler's."""
        self._of(trial).after_trial(study, trial, state, values)


class NumberedQmcSampler(QMCSampler):
    """Optuna's quasi-random sampler, trial n at point n of the sequence.

    Optuna counts the points in the study, and two processes that ask at the same time get the same
    one. Conditional keys are drawn at random, as Optuna does.

    Args:
        space: The space.
        seed: Scrambles the sequence; all processes need the same.
    """

    def __init__(self, space: Space, seed: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental since 2021
            super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._space = {
            key: dist for key, dist in space.distributions().items() if not space.entries[key].when
        }
        self._at, self._study_seed = 0, seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All keys that every trial has, also for the first trial."""
        self._at = trial.number
        self._independent_sampler = RandomSampler(seed=mixed_seed(self._study_seed, trial.number))
        return self._space

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._at


class GridSampler(BaseSampler):
    """Every point of a grid once, in a random order: trial n at point n.

    Optuna's own grid samplers look at what others run and may give two processes the same point.

    Args:
        points: The points; a conditional key is absent where its condition is not met.
        seed: Shuffles them.
    """

    def __init__(self, points: Sequence[Mapping[str, Any]], seed: int):
        self.points = list(points)
        random.Random(seed).shuffle(self.points)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing; keys are drawn one by one."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing; keys are drawn one by one."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """The value at the trial's point."""
        return self.points[trial.number % len(self.points)][param_name]


def grid_points(space: Space) -> list[dict[str, Any]]:
    """All points of a space, as Optuna names and stores their values.

    Raises:
        SearchError: If a key has more than finitely many values, or there are too many points.
    """
    for key, dist in space.distributions().items():
        if getattr(dist, "step", 1) is None:
            search = space.entries[key].search
            raise SearchError(
                f"sampler: grid needs finitely many values, but {key} has {search}; expected "
                "choice, int, or uniform with a step"
            )
    points: list[dict[str, Any]] = []
    drawn: list[tuple[int, int]] = []  # which of how many, in the order of drawing
    while True:
        walk = _Walk(drawn)
        try:
            space.suggest(walk)
        except SpaceError as error:
            raise SearchError(f"sampler: grid: at {walk.params}: {error}") from error
        points.append(walk.params)
        if len(points) > MOST_POINTS:
            raise SearchError(f"sampler: the grid has more than {MOST_POINTS:,} points")
        drawn = walk.drawn
        while drawn and drawn[-1][0] + 1 == drawn[-1][1]:
            drawn.pop()
        if not drawn:
            return points
        drawn[-1] = (drawn[-1][0] + 1, drawn[-1][1])


class _Walk:
    """Stands in for a trial and walks through a space: the given choices, then the first ones."""

    def __init__(self, start: Sequence[tuple[int, int]]):
        self._start, self.drawn, self.params = list(start), [], {}

    def _take(self, name: str, values: Sequence[Any]) -> Any:
        at = len(self.drawn)
        number = self._start[at][0] if at < len(self._start) else 0
        self.drawn.append((number, len(values)))
        self.params[name] = values[number]
        return values[number]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return self._take(name, range(low, high + 1, step))

    def suggest_float(self, name: str, low: float, high: float, *, step: float, log: bool) -> float:
        count = round((high - low) / step)
        return self._take(name, [min(low + i * step, high) for i in range(count + 1)])


def mixed_seed(seed: int, number: int) -> int:
    """A seed for one trial, in [0, 2^32)."""
    return random.Random(f"{seed} {number}").getrandbits(32)
