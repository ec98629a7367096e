# SPDX-License-Identifier: Apache-2.0
"""Is the best trial better than the default? Its configuration is run again over fresh seeds.

The value that a search reports for its best trial is the best of many noisy ones, so it is too good
on average, and the more trials there were, the more so: the winner's curse. Here the top candidates
and the configuration as it was before the search run on seeds that no trial of the search used.
What a seed decides (the order of the data, the sampled responses) is then partly the same for all
of them, so they are compared by their differences on the same seed: ``scipy.stats.ttest_rel``.

interval
    Student's t interval of the mean difference: it covers the true one in 95 % of repetitions if
    differences are normal. It is for one candidate. The *simultaneous* one (Bonferroni: 1 − 0.05/k
    for k candidates) covers all at once, and is the one to read for a candidate that was picked
    because of these very runs.
probability that it beats the default
    One minus the one-sided p-value. For normal differences with the flat prior p(μ, log σ) ∝ 1 it is
    the posterior probability that the true mean difference is positive (Gelman et al., Bayesian Data
    Analysis, 3rd edition, section 3.2). It is about the mean over seeds, not about a single run;
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
from nemo_rl_ref.tune.trial import Runner, TrialFailed
from nemo_rl_ref.tune.trial import run_trial as in_this_process

#: The first seed to try for a re-evaluation; seeds that the search used are left out.
FIRST_SEED = 10_000

#: The name of the configuration as it was before the search. What the space fixes for all trials,
#: the number of steps for example, holds for it too: then it differs by what was searched only.
DEFAULT = "default"


@dataclass(frozen=True)
class Run:
    """One training of the re-evaluation.

    Attributes:
        candidate: ``default`` or ``trial 17``.
        seed: Its seed.
        value: The objective at the end; None if the run failed.
        failure: Why it failed; None if it did not.
        seconds: How long it took.
    """

    candidate: str
    seed: int
    value: float | None
    failure: str | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A candidate against the default, on the seeds on which neither failed.

    Attributes:
        name: ``trial 17``.
        values: What the candidate sets, by key.
        search_value: The value that the search reported for it.
        failed: Number of the candidate's runs that failed.
        optimism: The search's value minus `mean`, turned so that positive is too good.
        pairs: Number of seeds on which both have a value.
        mean: Mean of the objective over the seeds of `pairs`; None without any.
        default_mean: That of the default over the same seeds.
        mean_difference: Mean of the paired differences, positive where the candidate is better.
        low: Lower end of its interval; None where there is none.
        high: Upper end.
        low_simultaneous: The same for all candidates at once.
        high_simultaneous: Upper end of it.
        probability: That the true mean difference is positive, see the module; None if undefined.
        wins: Fraction of the seeds on which the candidate is better; a tie is half a win.
    """

    name: str
    values: Mapping[str, Any]
    search_value: float
    failed: int
    optimism: float | None
    pairs: int
    mean: float | None = None
    default_mean: float | None = None
    mean_difference: float | None = None
    low: float | None = None
    high: float | None = None
    low_simultaneous: float | None = None
    high_simultaneous: float | None = None
    probability: float | None = None
    wins: float | None = None


@dataclass(frozen=True)
class Reevaluation:
    """What `reevaluate` found.

    Attributes:
        metric: The objective.
        level: Of the intervals.
        seeds: The seeds.
        comparisons: In the order of the search: the first is its best trial.
        runs: All runs.
    """

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
        found = [
            f"{count} candidate{'s' * (count != 1)} and the default, each on {seeds} "
            f"seed{'s' * (seeds != 1)} that the search did not use, compared by {self.metric} on "
            "the same seed."
        ]
        if winner.mean is None or winner.mean_difference is None:
            return [*found, f"{winner.name} and the default have no seed on which both finished."]
        optimism = winner.optimism or 0
        side = "better than" if optimism > 0 else "worse than"
        by = f"{abs(optimism):.4g} {side} that" if optimism else "the same"
        found.append(
            f"The search reported {winner.search_value:.4g} for its best, {winner.name}. Over fresh "
            f"seeds it has {winner.mean:.4g} on average: the search's value was {by}. The best of "
            "many noisy values is too good on average, so the mean over fresh seeds is the one to "
            "quote."
        )
        if winner.low is None or winner.high is None:
            return [*found, _why_no_interval(winner)]
        better = "better" if winner.mean_difference > 0 else "worse"
        by = f"{better} by {abs(winner.mean_difference):.4g}" if winner.mean_difference else "equal"
        verdict = (
            "The interval contains zero: these runs do not show that it differs from the default."
            if winner.low <= 0 <= winner.high
            else f"The interval does not contain zero: it is {better} than the default."
        )
        found.append(
            f"Against the default it is {by} on average, {self.level:.0%} interval {winner.low:.4g} "
            f"to {winner.high:.4g} ({winner.pairs} pairs, better on {winner.wins:.0%} of the seeds). "
            "The probability that its mean over seeds beats the default's is "
            f"{_percent(winner.probability)} (posterior under a normal model of the differences "
            f"with a flat prior). {verdict}"
        )
        usable = [c for c in self.comparisons if c.low_simultaneous is not None]
        best = max(usable, key=lambda c: c.mean_difference)
        if best is not winner:
            found.append(
                f"On these seeds {best.name} has a higher mean improvement than {winner.name}. It "
                "was picked because of these runs, so read its simultaneous interval: "
                f"{best.low_simultaneous:.4g} to {best.high_simultaneous:.4g}."
            )
        return found

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Write columns and rows of text: a row for each candidate, the default last."""
        columns = [
            "configuration", "in the search", "mean", "pairs", "failed", "difference",
            f"{self.level:.0%} interval", "simultaneous", "P(better)", "wins",
        ]  # fmt: skip
        rows = [
            [
                c.name, f"{c.search_value:.4g}", _or_dash(c.mean), str(c.pairs), str(c.failed),
                _or_dash(c.mean_difference, "+.4g"), _interval(c.low, c.high),
                _interval(c.low_simultaneous, c.high_simultaneous), _percent(c.probability),
                _or_dash(c.wins, ".0%"),
            ]
            for c in self.comparisons
        ]  # fmt: skip
        default = [r.value for r in self.runs if r.candidate == DEFAULT and r.value is not None]
        failed = sum(r.candidate == DEFAULT for r in self.failures)
        mean = statistics.fmean(default) if default else None
        rows.append([DEFAULT, "—", _or_dash(mean), str(len(default)), str(failed), *["—"] * 5])
        return columns, rows


def _or_dash(value: float | None, how: str = ".4g") -> str:
    return "—" if value is None else format(value, how)


def _interval(low: float | None, high: float | None) -> str:
    return "—" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _percent(probability: float | None) -> str:
    if probability is None:
        return "—"
    if not 0.001 <= probability <= 0.999:
        return "> 99.9%" if probability > 0.5 else "< 0.1%"
    return f"{probability:.1%}"


def _why_no_interval(comparison: Comparison) -> str:
    if comparison.pairs < 2:
        return "One pair of runs has no spread, so there is no interval: run more seeds."
    return (
        f"All {comparison.pairs} differences to the default are the same number, "
        f"{comparison.mean_difference:.4g}, so their spread is zero and there is no interval. Does "
        "the objective depend on the seed?"
    )


def compare(
    candidate: Mapping[int, float],
    default: Mapping[int, float],
    *,
    maximize: bool,
    level: float = 0.95,
    candidates: int = 1,
) -> dict[str, Any]:
    """Compare two configurations on the seeds that both have.

    Args:
        candidate: Value by seed.
        default: Value by seed.
        maximize: Whether more is better.
        level: Of the intervals, between 0 and 1.
        candidates: Number of candidates that the simultaneous interval is for.

    Returns:
        The fields of `Comparison` that follow from the values: ``pairs`` and, where there is one,
        those after it.

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a number between 0 and 1")
    seeds = sorted(candidate.keys() & default.keys())
    ours, theirs = [candidate[seed] for seed in seeds], [default[seed] for seed in seeds]
    better, worse = (ours, theirs) if maximize else (theirs, ours)
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    found: dict[str, Any] = {"pairs": len(seeds)}
    if seeds:
        found |= {
            "mean": statistics.fmean(ours),
            "default_mean": statistics.fmean(theirs),
            "mean_difference": statistics.fmean(differences),
            "wins": sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(seeds),
        }
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
    """List seeds that no trial of a study used.

    Args:
        study: Its trials' attributes ``seed`` are left out.
        count: How many.
        also: More seeds to leave out, for example that of the configuration.

    Raises:
        ValueError: If the count is not positive.
    """
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
        if entry.search is None and entry.tie is None and not entry.when
    }


def top_candidates(study: Study, count: int) -> list[tuple[int, dict[str, Any], float]]:
    """List the best trials of a study, of equal configurations only the first.

    Args:
        study: A study with one objective.
        count: How many at most.

    Returns:
        Number, values and result of each, the best first.

    Raises:
        ValueError: If the study has several objectives, no finished trial, or count is below 1.
    """
    if (objectives := len(objectives_of(study))) > 1:
        raise ValueError(f"study {study.study_name!r} has {objectives} objectives, expected one")
    if count < 1:
        raise ValueError(f"top: got {count}, expected 1 or more")
    found: dict[str, tuple[int, dict[str, Any], float]] = {}
    for trial in ranked(study):
        values = trial.user_attrs["values"]
        found.setdefault(_digest(values), (trial.number, values, trial.values[0]))
    if not found:
        raise ValueError(f"study {study.study_name!r}: no trial is complete, nothing to re-evaluate")
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

    Every run leaves ``run.json`` in its folder when it ends. The same call again runs what is
    missing: after an interruption, or with more seeds or candidates. Failed runs are kept too, with
    their reasons, and are not run again; remove their folders to do so.

    Args:
        study: A study with one objective and its attribute ``spec``.
        folder: Where the runs' folders are.
        top: Number of candidates, the search's best first.
        seeds: Number of seeds.
        level: Of the intervals.
        run_trial: What runs a trial, see `nemo_rl_ref.tune.trial.run_trial`, which is the default.
        spec: The search; read from the study if not given.
        show: Gets a line after each run.

    Returns:
        The comparison, with all runs.

    Raises:
        ValueError: As `top_candidates`, `fresh_seeds` and `compare`.
    """
    candidates = top_candidates(study, top)
    compare({}, {}, maximize=True, level=level)  # the level, before anything runs
    spec = spec or Spec.from_dict(written_spec(study))
    objective, chosen = spec.objectives[0], fresh_seeds(study, seeds, also=(spec.seed,))
    wanted = {DEFAULT: default_values(spec.space)} | {
        f"trial {number}": values for number, values, _ in candidates
    }
    runs: list[Run] = []
    for seed in chosen:
        for name, values in wanted.items():
            place = Path(folder, f"{name.replace(' ', '-')}-seed-{seed}")
            path, key = place / "run.json", _digest([spec.to_dict(), values, seed])
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if known.pop("key", None) == key:
                runs.append(Run(**known))
                continue
            run = _run(run_trial or in_this_process, spec, values, place, seed, name)
            write_text(path, json.dumps({"key": key} | asdict(run)))
            runs.append(run)
            metric = objective.metric
            what = f"failed: {run.failure}" if run.failure else f"{metric} {run.value:.4g}"
            total = len(chosen) * len(wanted)
            show(f"{name}, seed {seed}: {what}  ({run.seconds:.1f} s, run {len(runs)} of {total})")
    comparisons = [_compare(one, runs, objective, level, len(candidates)) for one in candidates]
    return Reevaluation(objective.metric, level, chosen, tuple(comparisons), tuple(runs))


def _run(
    runner: Runner, spec: Spec, values: Mapping[str, Any], folder: Path, seed: int, name: str
) -> Run:
    metric = spec.objectives[0].metric
    started, value, failure = time.perf_counter(), None, None
    try:
        metrics = runner(spec, values, folder, seed=seed)
        if metric not in metrics:
            failure = f"the run has no {metric}"
        elif not math.isfinite(metrics[metric]):
            failure = f"{metric} is {metrics[metric]}"
        else:
            value = float(metrics[metric])
    except TrialFailed as error:
        failure = error.reason
    return Run(name, seed, value, failure, round(time.perf_counter() - started, 3))


def _compare(
    candidate: tuple[int, dict[str, Any], float],
    runs: Sequence[Run],
    objective: Objective,
    level: float,
    candidates: int,
) -> Comparison:
    number, values, in_search = candidate
    name, maximize = f"trial {number}", objective.direction == "maximize"
    ours, default = (
        {r.seed: r.value for r in runs if r.candidate == who and r.value is not None}
        for who in (name, DEFAULT)
    )
    found = compare(ours, default, maximize=maximize, level=level, candidates=candidates)
    optimism = None
    if "mean" in found:
        optimism = (1 if maximize else -1) * (in_search - found["mean"])
    failed = sum(r.candidate == name and r.failure is not None for r in runs)
    return Comparison(name, values, in_search, failed=failed, optimism=optimism, **found)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
