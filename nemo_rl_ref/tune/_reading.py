# SPDX-License-Identifier: Apache-2.0
"""What a report says about a study, computed once from the study's trials."""

from __future__ import annotations

import math
import random
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.tune._figures import Axis
from nemo_rl_ref.tune.runner import cause_of

#: Below this number of complete trials importances are not shown: PED-ANOVA compares the best tenth
#: with all, and a tenth of fewer is not a distribution.
LEAST_FOR_IMPORTANCES = 20

#: At least this number of trials in the best tenth is what Optuna's documentation asks for.
LEAST_IN_BEST_TENTH = 5

#: How often the values are shuffled to see what importance chance alone gives.
SHUFFLES = 20


@dataclass(frozen=True)
class Importances:
    """Which parameters the best tenth of the trials depends on, by PED-ANOVA.

    Attributes:
        shares: By parameter, its share of the sum, the largest first.
        chance: By parameter, the most that it reached in twenty shuffles of the values among the
            trials, on the same scale: what is not above it cannot be told from no influence.
        trials: Number of complete trials.
        best: Number of trials in the best tenth.
    """

    shares: dict[str, float]
    chance: dict[str, float]
    trials: int
    best: int


class Reading:
    """A study's trials, read once from its storage.

    Args:
        study: Any Optuna study. What this package keeps in its attributes is used where it is.
    """

    def __init__(self, study: Study):
        self.name = study.study_name
        self.directions = study.directions
        self.attributes: dict[str, Any] = study.user_attrs
        self.spec: dict[str, Any] = self.attributes.get("spec") or {}
        self.trials: list[FrozenTrial] = study.get_trials(deepcopy=False)
        self.objectives = self._objective_names(study)
        self._study = study

    def _objective_names(self, study: Study) -> list[str]:
        names = [_metric(o) for o in self.spec.get("objectives", [])] or study.metric_names
        if names and len(names) == len(self.directions):
            return list(names)
        count = len(self.directions)
        return ["value"] if count == 1 else [f"value {i + 1}" for i in range(count)]

    def of(self, state: TrialState) -> list[FrozenTrial]:
        """The trials in a state."""
        return [trial for trial in self.trials if trial.state == state]

    @cached_property
    def finished(self) -> list[FrozenTrial]:
        """The complete trials, in the order of their numbers."""
        return self.of(TrialState.COMPLETE)

    @property
    def single(self) -> bool:
        """Whether there is one objective."""
        return len(self.directions) == 1

    def sign(self, objective: int) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.directions[objective] == StudyDirection.MAXIMIZE else -1

    def ranked(self, objective: int = 0) -> list[FrozenTrial]:
        """The complete trials whose value is a finite number, the best first."""
        sign = self.sign(objective)
        usable = [trial for trial in self.finished if math.isfinite(trial.values[objective])]
        return sorted(usable, key=lambda trial: (-sign * trial.values[objective], trial.number))

    @cached_property
    def front(self) -> list[FrozenTrial]:
        """The complete trials that no other beats in all objectives, by their numbers."""
        return sorted(self._study.best_trials, key=lambda trial: trial.number)

    def best_tenth(self, objective: int = 0) -> list[FrozenTrial]:
        """The best tenth of the complete trials, rounded up."""
        ranked = self.ranked(objective)
        return ranked[: math.ceil(len(ranked) / 10)]

    @cached_property
    def parameters(self) -> dict[str, Axis]:
        """Every parameter that a trial has, in the order of their first use."""
        distributions: dict[str, Any] = {}
        for trial in self.trials:
            for name, distribution in trial.distributions.items():
                distributions.setdefault(name, []).append(distribution)
        return {name: _axis(name, found) for name, found in distributions.items()}

    def value_axis(self, objective: int) -> Axis:
        """The scale of an objective: logarithmic where its values span more than two decades."""
        values = [t.values[objective] for t in self.finished if math.isfinite(t.values[objective])]
        log = bool(values) and min(values) > 0 and max(values) / min(values) > 100
        return Axis(self.objectives[objective], log=log)

    def running_best(self, objective: int) -> list[tuple[int, float]]:
        """Number of each complete trial and the best value up to it."""
        sign, best, found = self.sign(objective), -math.inf, []
        for trial in self.finished:
            if math.isfinite(value := trial.values[objective]):
                best = max(best, sign * value)
                found.append((trial.number, sign * best))
        return found

    @cached_property
    def failures(self) -> dict[str, list[FrozenTrial]]:
        """The failed trials by cause, the most frequent first; the key is the first's reason."""
        by_cause: dict[str, list[FrozenTrial]] = {}
        for trial in self.of(TrialState.FAIL):
            by_cause.setdefault(cause_of(reason(trial)), []).append(trial)
        found = sorted(by_cause.values(), key=len, reverse=True)
        return {reason(trials[0]): trials for trials in found}

    @property
    def seconds(self) -> float | None:
        """Seconds of training in all trials together; None if no trial says."""
        known = [t.user_attrs["seconds"] for t in self.trials if "seconds" in t.user_attrs]
        return float(sum(known)) if known else None

    @property
    def steps(self) -> int | None:
        """Training steps of all trials together; None if no trial says."""
        known = [t.user_attrs["steps"] for t in self.trials if "steps" in t.user_attrs]
        return int(sum(known)) if known else None

    def importances(self, objective: int) -> Importances | str:
        """PED-ANOVA for an objective, or a sentence that says why there is none."""
        ranked = self.ranked(objective)
        varying = [name for name in self.parameters if _varies(name, ranked)]
        if len(ranked) < LEAST_FOR_IMPORTANCES:
            return (
                f"Importances need at least {LEAST_FOR_IMPORTANCES} finished trials; "
                f"there {'is' if len(ranked) == 1 else 'are'} {len(ranked)}."
            )
        if len(varying) < 2:
            return "Importances compare parameters, and fewer than two of them vary."
        if ranked[0].values[objective] == ranked[-1].values[objective]:
            return "All finished trials have the same value, so no parameter can be important."
        return _ped_anova(ranked, objective, self.sign(objective), varying)

    def table_of_steps(self) -> list[tuple[int, int, float, float]]:
        """By step: trials that reported a finite value there, the median, the best."""
        at: dict[int, list[float]] = {}
        for trial in self.trials:
            for step, value in trial.intermediate_values.items():
                if math.isfinite(value):
                    at.setdefault(step, []).append(value)
        pick = max if self.sign(0) > 0 else min
        return [(s, len(v), statistics.median(v), pick(v)) for s, v in sorted(at.items())]

    def counts(self) -> Counter[TrialState]:
        """Number of trials by state."""
        return Counter(trial.state for trial in self.trials)


def _metric(objective: str) -> str:
    """``val:accuracy`` of ``val:accuracy:maximize``."""
    return re.sub(":(maximize|minimize)$", "", objective)


def reason(trial: FrozenTrial) -> str:
    """Why a trial failed, one line."""
    return str(trial.user_attrs.get("failure") or trial.system_attrs.get("fail_reason") or
               "no reason was recorded")  # fmt: skip


def values_of(trial: FrozenTrial) -> dict[str, Any]:
    """All values that a trial set, ties and fixed values included."""
    return dict(trial.user_attrs.get("values") or trial.params)


def _axis(name: str, distributions: Sequence[Any]) -> Axis:
    """One scale for a parameter, wide enough for all distributions that it had."""
    first = distributions[0]
    if isinstance(first, CategoricalDistribution):
        return Axis(name, choices=tuple(dict.fromkeys(c for d in distributions for c in d.choices)))
    return Axis(
        name,
        log=all(d.log for d in distributions),
        low=min(d.low for d in distributions),
        high=max(d.high for d in distributions),
    )


def _varies(name: str, trials: Sequence[FrozenTrial]) -> bool:
    values = {repr(trial.params[name]) for trial in trials if name in trial.params}
    return len(values) > 1


def _ped_anova(
    trials: Sequence[FrozenTrial], objective: int, sign: int, parameters: list[str]
) -> Importances:
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with _only_our_words():
        copy = optuna.create_study()  # in memory: the evaluator reads it many times
        for trial in trials:
            copy.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=trial.distributions, value=0.0
                )
            )
        losses = [-sign * trial.values[objective] for trial in trials]

        def raw(values: Sequence[float]) -> dict[str, float]:
            return evaluator.evaluate(copy, parameters, target=lambda t: values[t.number])

        actual = raw(losses)
        generator = random.Random(0)
        shuffled = [raw(generator.sample(losses, len(losses))) for _ in range(SHUFFLES)]
    total = sum(actual.values()) or 1.0
    ordered = sorted(actual, key=lambda name: -actual[name])
    return Importances(
        {name: actual[name] / total for name in ordered},
        {name: max(one[name] for one in shuffled) / total for name in ordered},
        len(trials),
        math.ceil(len(trials) / 10),
    )


@contextmanager
def _only_our_words() -> Iterator[None]:
    """Without Optuna's log lines, and its warning that targets are minimized, which they are."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*computes the importances of params.*")
            warnings.filterwarnings("ignore", message="Some regimes for parameter.*")
            yield
    finally:
        optuna.logging.set_verbosity(level)
