# SPDX-License-Identifier: Apache-2.0
"""Is the best trial better than the default? Its configuration is run again over fresh seeds.

The value that a search reports for its best trial is the best of many noisy ones, so it is too good
on average: the winner's curse. Here the top candidates and the configuration as it was before the
search run on seeds that no trial used. What a seed decides (the order of the data, the sampled
responses) is then partly the same for all of them, so they are compared by their differences on the
same seed: ``scipy.stats.ttest_rel``.

interval
    Student's t interval of the mean difference: it covers the true one in 95 % of repetitions if
    differences are normal. It is for one candidate. The *simultaneous* one (Bonferroni: 1 − 0.05/k
    for k candidates) covers all at once, and is the one to read for a candidate that was picked
    because of these very runs.
probability that it beats the default
    One minus the one-sided p-value. For normal differences with the flat prior p(μ, log σ) ∝ 1 it
    is the posterior probability that the true mean difference is positive (Gelman et al., Bayesian
    Data Analysis, 3rd edition, section 3.2). It is about the mean over seeds, not about a single run;
    that fraction is reported beside it as ``wins``.

With fewer than two pairs, or if all differences are the same number, there is neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.tune.outcome.best import objectives_of, ranked, written_spec
from nemo_rl_ref.tune.spec import Objective, Spec
from nemo_rl_ref.tune.trial import Ages, Runner, TrialFailed
from nemo_rl_ref.tune.trial import run_trial as in_this_process

#: The first seed to try for a re-evaluation; seeds that the search used are left out.
FIRST_SEED = 10_000

#: The name of the configuration as it was before the search. What the space fixes for all trials,
#: the number of steps for example, holds for it too: then it differs by what was searched only.
DEFAULT = "default"


@dataclass(frozen=True)
class Run:
    """One training of the re-evaluation.

    ``candidate`` is ``default`` or ``trial 17``; ``value`` is the objective at the end, None where
    the run failed, for the reason ``failure``; ``step`` is the last one, None if it is not known.
    """

    candidate: str
    seed: int
    value: float | None
    failure: str | None
    seconds: float
    step: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A candidate against the default, on the seeds on which neither failed.

    Attributes:
        name: ``trial 17``.
        search_value: The value that the search reported for it.
        failed: Number of the candidate's runs that failed.
        pairs: Number of seeds on which both have a value; without any, what follows is None.
        mean: Mean of the objective over these seeds.
        default_mean: That of the default.
        optimism: The search's value minus ``mean``, turned so that positive is too good.
        mean_difference: Mean of the paired differences, positive where the candidate is better.
        wins: Fraction of the seeds on which the candidate is better; a tie is half a win.
        low: Lower end of the interval of the mean difference, as ``high``; None without one.
        low_simultaneous: The same for all candidates at once, as ``high_simultaneous``.
        probability: That the true mean difference is positive, see the module; None if undefined.
    """

    name: str
    search_value: float
    failed: int
    pairs: int
    mean: float | None = None
    default_mean: float | None = None
    optimism: float | None = None
    mean_difference: float | None = None
    wins: float | None = None
    low: float | None = None
    high: float | None = None
    low_simultaneous: float | None = None
    high_simultaneous: float | None = None
    probability: float | None = None


@dataclass(frozen=True)
class Reevaluation:
    """What `reevaluate` found, for an objective on some seeds; the search's best trial first."""

    metric: str
    level: float
    seeds: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    runs: tuple[Run, ...]

    @property
    def winner(self) -> Comparison:
        """The best trial of the search, which was chosen before these runs."""
        return self.comparisons[0]

    @property
    def failures(self) -> tuple[Run, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if run.failure is not None)

    def sentences(self) -> list[str]:
        """Say in words what was found."""
        winner, count, seeds = self.winner, len(self.comparisons), len(self.seeds)
        start = (
            f"{count} candidate{'s' * (count != 1)} and the default, each on {seeds} "
            f"seed{'s' * (seeds != 1)} that the search did not use, compared by {self.metric} on "
            "the same seed."
        )
        steps = sorted({run.step for run in self.runs if run.value is not None and run.step})
        if len(steps) > 1:
            start += (
                f" The runs ended at different steps, {steps[0]} to {steps[-1]}: a difference may "
                "be one of length."
            )
        if winner.mean is None:
            return [start, f"{winner.name} and the default have no seed on which both finished."]
        assert winner.optimism is not None  # there is a pair of runs
        side = "better than" if winner.optimism > 0 else "worse than"
        by = f"{abs(winner.optimism):.4g} {side} that" if winner.optimism else "the same"
        optimism = (
            f"The search reported {winner.search_value:.4g} for its best, {winner.name}. Over "
            f"fresh seeds it has {winner.mean:.4g} on average: the search's value was {by}. The best "
            "of many noisy values is too good on average, so the mean over fresh seeds is the one to "
            "quote."
        )
        if winner.low is None:
            return [start, optimism, _why_no_interval(winner)]
        assert winner.mean_difference is not None
        assert (
            winner.high is not None and winner.probability is not None and winner.wins is not None
        )
        better = "better" if winner.mean_difference > 0 else "worse"
        by = f"{better} by {abs(winner.mean_difference):.4g}" if winner.mean_difference else "equal"
        verdict = (
            "The interval contains zero: these runs do not show that it differs from the default."
            if winner.low <= 0 <= winner.high
            else f"The interval does not contain zero: it is {better} than the default."
        )
        difference = (
            f"Against the default it is {by} on average, {self.level:.0%} interval "
            f"{winner.low:.4g} to {winner.high:.4g} ({winner.pairs} pairs, better on "
            f"{winner.wins:.0%} of the seeds). The probability that its mean over seeds beats the "
            f"default's is {_percent(winner.probability)} (posterior under a normal model of the "
            f"differences with a flat prior). {verdict}"
        )
        return [start, optimism, difference]


def _percent(probability: float) -> str:
    if not 0.001 <= probability <= 0.999:
        return "> 99.9%" if probability > 0.5 else "< 0.1%"
    return f"{probability:.1%}"


def _why_no_interval(comparison: Comparison) -> str:
    if comparison.pairs < 2:
        return "One pair of runs has no spread, so there is no interval: run more seeds."
    same = f"{comparison.pairs} differences to the default are the same number"
    return f"All {same}, {comparison.mean_difference:.4g}: does the objective depend on the seed?"


def compare(
    candidate: Mapping[int, float],
    default: Mapping[int, float],
    *,
    maximize: bool,
    level: float = 0.95,
    candidates: int = 1,
) -> dict[str, Any]:
    """Compare two configurations, given as values by seed, on the seeds that both have.

    Args:
        candidate: The one.
        default: The other.
        maximize: Whether more is better.
        level: Of the intervals, between 0 and 1.
        candidates: Number of candidates that the simultaneous interval is for.

    Returns:
        The fields of `Comparison` that follow from the values, ``pairs`` and others.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a number between 0 and 1")
    seeds = sorted(candidate.keys() & default.keys())
    ours, theirs = [candidate[seed] for seed in seeds], [default[seed] for seed in seeds]
    better, worse = (ours, theirs) if maximize else (theirs, ours)
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    found: dict[str, Any] = {"pairs": len(seeds)}
    if seeds:
        found |= {"mean": statistics.fmean(ours), "default_mean": statistics.fmean(theirs)}
        found["mean_difference"] = statistics.fmean(differences)
        found["wins"] = statistics.fmean((d > 0) + 0.5 * (d == 0) for d in differences)
    if len(seeds) > 1 and statistics.stdev(differences) > 0:
        from scipy.stats import ttest_rel

        test = ttest_rel(better, worse, alternative="greater")
        found["probability"] = float(1 - test.pvalue)
        both = ttest_rel(better, worse)
        for name, one in (("", level), ("_simultaneous", 1 - (1 - level) / candidates)):
            low, high = both.confidence_interval(one)
            found |= {f"low{name}": float(low), f"high{name}": float(high)}
    return found


def fresh_seeds(study: Study, count: int, also: Sequence[int] = ()) -> tuple[int, ...]:
    """List seeds that neither a trial of a study used nor are in ``also``."""
    if count < 1:
        raise ValueError(f"seeds: got {count}, expected 1 or more")
    used = {trial.user_attrs.get("seed") for trial in study.get_trials(deepcopy=False)} | {*also}
    last = FIRST_SEED + count + len(used)
    return tuple(seed for seed in range(FIRST_SEED, last) if seed not in used)[:count]


def default_values(space: Any) -> dict[str, Any]:
    """Take what a space sets in all trials alike: its fixed values without a condition."""
    return {
        key: entry.fixed
        for key, entry in space.entries.items()
        if not (entry.search or entry.tie or entry.when)
    }


def top_candidates(study: Study, count: int) -> list[tuple[int, dict[str, Any], float]]:
    """List number, values and result of the best trials, of equal configurations only the first."""
    if (objectives := len(objectives_of(study))) > 1:
        raise ValueError(f"study {study.study_name!r} has {objectives} objectives, expected one")
    if count < 1:
        raise ValueError(f"top: got {count}, expected 1 or more")
    found: dict[str, tuple[int, dict[str, Any], float]] = {}
    for trial in ranked(study):
        values = trial.user_attrs["values"]
        found.setdefault(_digest(values), (trial.number, values, trial.values[0]))
    if not found:
        raise ValueError(
            f"study {study.study_name!r}: no trial is complete, nothing to re-evaluate"
        )
    return list(found.values())[:count]


def reevaluate(
    study: Study,
    folder: str | Path,
    *,
    top: int = 3,
    seeds: int = 5,
    level: float = 0.95,
    run_trial: Runner | None = None,
    spec: Spec | None = None,
    show: Callable[[str], None] = print,
) -> Reevaluation:
    """Run the top candidates and the default again, on the same fresh seeds.

    Every run leaves ``run.json`` in its folder when it ends, a failed one its reason. The same call
    again runs what is missing: after an interruption, or with more seeds or candidates.

    Args:
        study: A study with one objective.
        folder: Where the runs' folders are.
        top: Number of candidates, the search's best first.
        seeds: Number of seeds.
        level: Of the intervals.
        run_trial: What runs a trial, see `nemo_rl_ref.tune.trial.run_trial`, which is the default.
        spec: The search; read from the study if not given.
        show: Gets a line after each run.

    Raises:
        ValueError: If an argument is out of its range, the study has several objectives, or no
            trial is complete.
    """
    candidates = top_candidates(study, top)
    compare({}, {}, maximize=True, level=level)  # the level, before anything runs
    spec = spec or Spec.from_dict(written_spec(study))
    objective, chosen = spec.objectives[0], fresh_seeds(study, seeds, also=(spec.seed,))
    wanted = {DEFAULT: default_values(spec.space)} | {
        f"trial {number}": values for number, values, _ in candidates
    }
    sides = {name: (spec, values) for name, values in wanted.items()}
    runs = run_sides(sides, chosen, folder, run_trial=run_trial, show=show)
    comparisons = [_compare(one, runs, objective, level, len(candidates)) for one in candidates]
    return Reevaluation(objective.metric, level, chosen, tuple(comparisons), tuple(runs))


def run_sides(
    sides: Mapping[str, tuple[Spec, Mapping[str, Any]]],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    run_trial: Runner | None = None,
    show: Callable[[str], None] = print,
) -> list[Run]:
    """Train several configurations on the same seeds; what was trained before is read.

    Args:
        sides: The configurations by name: a search's, whose first objective counts, and the values
            of the keys that differ from it.
        seeds: The seeds.
        folder: Where the runs' folders are.
        run_trial: What runs a trial, see `nemo_rl_ref.tune.trial.run_trial`, which is the default.
        show: Gets a line after each run.

    Returns:
        The runs, seed by seed.
    """
    runs: list[Run] = []
    for seed in seeds:
        for name, (spec, values) in sides.items():
            place = Path(folder, f"{name.replace(' ', '-')}-seed-{seed}")
            path, key = place / "run.json", _digest([spec.to_dict(), values, seed])
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if known.pop("key", None) == key:
                runs.append(Run(**known))
                continue
            run = _run(run_trial or in_this_process, spec, values, place, seed, name)
            write_text(path, json.dumps({"key": key} | asdict(run)))
            runs.append(run)
            metric = spec.objectives[0].metric
            what = f"failed: {run.failure}" if run.failure else f"{metric} {run.value:.4g}"
            total = len(seeds) * len(sides)
            show(f"{name}, seed {seed}: {what}  ({run.seconds:.1f} s, run {len(runs)} of {total})")
    return runs


def _run(
    runner: Runner, spec: Spec, values: Mapping[str, Any], folder: Path, seed: int, name: str
) -> Run:
    metric = spec.objectives[0].metric
    started, value, failure, ages = time.perf_counter(), None, None, Ages()
    try:
        metrics = runner(spec, values, folder, seed=seed, observe=ages)
        if metric not in metrics:
            failure = f"the run has no {metric}"
        elif not math.isfinite(metrics[metric]):
            failure = f"{metric} is {metrics[metric]}"
        elif problem := ages.problem(metric):
            failure = problem
        else:
            value = float(metrics[metric])
    except TrialFailed as error:
        failure = error.reason
    seconds = round(time.perf_counter() - started, 3)
    return Run(name, seed, value, failure, seconds, ages.step or None)


def _compare(
    candidate: tuple[int, dict[str, Any], float],
    runs: Sequence[Run],
    objective: Objective,
    level: float,
    candidates: int,
) -> Comparison:
    number, _, in_search = candidate
    name, maximize = f"trial {number}", objective.direction == "maximize"
    ours, default = (
        {r.seed: r.value for r in runs if r.candidate == who and r.value is not None}
        for who in (name, DEFAULT)
    )
    found = compare(ours, default, maximize=maximize, level=level, candidates=candidates)
    if "mean" in found:
        found["optimism"] = (1 if maximize else -1) * (in_search - found["mean"])
    failed = sum(r.candidate == name and r.failure is not None for r in runs)
    return Comparison(name, in_search, failed, **found)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
