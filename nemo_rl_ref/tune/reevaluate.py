# SPDX-License-Identifier: Apache-2.0
"""Is the best trial better than the default? Its configuration is run again over fresh seeds.

The value that a search reports for its best trial is the best of many noisy ones, so it is too good
on average, and the more trials there were, the more so: the winner's curse. Here the top candidates
and the configuration as it was before the search run on seeds that no trial of the search used.
What a seed decides (the order of the data, the sampled responses) is then partly the same for all
of them, so they are compared by their differences on the same seed.

What is computed, for a candidate with differences d_1, …, d_n to the default, turned so that
positive is better, with mean d̄ and standard deviation s (n − 1 in the denominator):

interval
    d̄ ± t s/√n with Student's t for n − 1 degrees of freedom: an interval that covers the true mean
    difference in 95 % of repetitions if differences are normal. It is for one candidate. The
    *simultaneous* one (Bonferroni: 1 − 0.05/k for k candidates) covers all of them at once, and is
    the one to read for a candidate that was picked because of these very runs.
probability that it beats the default
    The posterior probability that the true mean difference is positive, for normal differences with
    unknown mean μ and variance σ² and the flat prior p(μ, log σ) ∝ 1. Then (μ − d̄)/(s/√n) has
    Student's t distribution with n − 1 degrees of freedom (Gelman et al., Bayesian Data Analysis,
    3rd edition, section 3.2), and the probability is its distribution function at d̄ √n/s. It is one
    minus the one-sided p-value. It is about the mean over seeds, not about a single run; that
    fraction is reported beside it as ``wins``.

With fewer than two pairs, or if all differences are the same number, there is no such model, and
neither interval nor probability.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from nemo_rl_ref.tune._reading import Reading, values_of

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
        mean: Mean of the objective over the seeds of `pairs`; None without any.
        default_mean: That of the default over the same seeds.
        pairs: Number of seeds on which both have a value.
        failed: Number of the candidate's runs that failed.
        mean_difference: Mean of the paired differences, positive where the candidate is better.
        low: Lower end of its interval; None where there is none.
        high: Upper end.
        low_simultaneous: The same for all candidates at once.
        high_simultaneous: Upper end of it.
        probability: That the true mean difference is positive, see the module; None if undefined.
        wins: Fraction of the seeds on which the candidate is better; a tie is half a win.
        optimism: The search's value minus `mean`, turned so that positive is too good.
    """

    name: str
    values: Mapping[str, Any]
    search_value: float
    mean: float | None
    default_mean: float | None
    pairs: int
    failed: int
    mean_difference: float | None
    low: float | None
    high: float | None
    low_simultaneous: float | None
    high_simultaneous: float | None
    probability: float | None
    wins: float | None
    optimism: float | None


@dataclass(frozen=True)
class Reevaluation:
    """What `reevaluate` found.

    Attributes:
        metric: The objective.
        maximize: Whether more is better.
        level: Of the intervals.
        seeds: The seeds.
        comparisons: In the order of the search: the first is its best trial.
        runs: All runs.
    """

    metric: str
    maximize: bool
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
        """What was found, in words."""
        start = (
            f"{len(self.comparisons)} candidate{'s' * (len(self.comparisons) != 1)} and the "
            f"default, each on {len(self.seeds)} seed{'s' * (len(self.seeds) != 1)} that the "
            f"search did not use, compared by {self.metric} on the same seed."
        )
        found = [start]
        winner = self.winner
        if winner.mean is None or winner.mean_difference is None:
            return [*found, f"{winner.name} and the default have no seed on which both finished."]
        found.append(self._optimism(winner))
        if winner.low is None or winner.high is None:
            return [*found, _why_no_model(winner)]
        better = "better" if winner.mean_difference > 0 else "worse"
        by = f"{better} by {abs(winner.mean_difference):.4g}" if winner.mean_difference else "equal"
        verdict = (
            "The interval contains zero: these runs do not show that it differs from the default."
            if winner.low <= 0 <= winner.high
            else f"The interval does not contain zero: it is {better} than the default."
        )
        found.append(
            f"Against the default it is {by} on average, "
            f"{self.level:.0%} interval {winner.low:.4g} to {winner.high:.4g} "
            f"({winner.pairs} pairs, better on {winner.wins:.0%} of the seeds). The probability "
            f"that its mean over seeds beats the default's is {_percent(winner.probability)} "
            "(posterior under a normal model of the differences with a flat prior). " + verdict
        )
        if best := self._overtaken():
            found.append(
                f"On these seeds {best.name} has a higher mean improvement than {winner.name}. It "
                "was picked because of these runs, so read its simultaneous interval: "
                f"{best.low_simultaneous:.4g} to {best.high_simultaneous:.4g}."
            )
        return found

    def _optimism(self, winner: Comparison) -> str:
        optimism = winner.optimism or 0
        side = "better than" if optimism > 0 else "worse than"
        by = f"{abs(optimism):.4g} {side} that" if optimism else "the same"
        return (
            f"The search reported {winner.search_value:.4g} for its best, {winner.name}. Over fresh "
            f"seeds it has {winner.mean:.4g} on average: the search's value was "
            f"{by}. The best of many noisy values is "
            "too good on average, so the mean over fresh seeds is the one to quote."
        )

    def _overtaken(self) -> Comparison | None:
        usable = [c for c in self.comparisons if c.low_simultaneous is not None]
        best = max(usable, key=lambda c: c.mean_difference, default=None)
        return None if best is None or best is self.winner else best

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of text: a row for each candidate, the default last."""
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
        failed = sum(r.candidate == DEFAULT and r.failure is not None for r in self.runs)
        mean = statistics.fmean(default) if default else None
        rows.append([DEFAULT, "—", _or_dash(mean), str(len(default)), str(failed), *["—"] * 5])
        return columns, rows

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return asdict(self)


def _or_dash(value: float | None, how: str = ".4g") -> str:
    return "—" if value is None else format(value, how)


def _interval(low: float | None, high: float | None) -> str:
    return "—" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _percent(probability: float | None) -> str:
    if probability is None:
        return "—"
    if probability > 0.999:
        return "> 99.9%"
    if probability < 0.001:
        return "< 0.1%"
    return f"{probability:.1%}"


def _why_no_model(comparison: Comparison) -> str:
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
        The fields of `Comparison` from ``pairs`` to ``wins`` that follow from the values, and the
        means.

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a number between 0 and 1")
    seeds = sorted(candidate.keys() & default.keys())
    sign = 1 if maximize else -1
    differences = [sign * (candidate[seed] - default[seed]) for seed in seeds]
    n = len(differences)
    found: dict[str, Any] = dict.fromkeys(
        ("mean", "default_mean", "mean_difference", "low", "high", "low_simultaneous",
         "high_simultaneous", "probability", "wins")
    )  # fmt: skip
    found["pairs"] = n
    if n == 0:
        return found
    mean = statistics.fmean(differences)
    found.update(
        mean=statistics.fmean(candidate[seed] for seed in seeds),
        default_mean=statistics.fmean(default[seed] for seed in seeds),
        mean_difference=mean,
        wins=sum((d > 0) + 0.5 * (d == 0) for d in differences) / n,
    )
    if n > 1 and (error := statistics.stdev(differences) / math.sqrt(n)) > 0:
        from scipy.stats import t as student

        alone = student.ppf(0.5 + level / 2, n - 1) * error
        all_at_once = student.ppf(1 - (1 - level) / (2 * candidates), n - 1) * error
        found.update(
            low=float(mean - alone),
            high=float(mean + alone),
            low_simultaneous=float(mean - all_at_once),
            high_simultaneous=float(mean + all_at_once),
            probability=float(student.cdf(mean / error, n - 1)),
        )
    return found


def fresh_seeds(study: Study, count: int, also: Sequence[int] = ()) -> tuple[int, ...]:
    """Seeds that no trial of a study used.

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
    found, seed = [], FIRST_SEED
    while len(found) < count:
        if seed not in used:
            found.append(seed)
        seed += 1
    return tuple(found)


def default_values(space: Any) -> dict[str, Any]:
    """What a space sets in all trials alike: its fixed values without a condition."""
    return {
        key: entry.fixed
        for key, entry in space.entries.items()
        if entry.search is None and entry.tie is None and not entry.when
    }


def top_candidates(study: Study, count: int) -> list[tuple[int, dict[str, Any], float]]:
    """The best trials of a study, of equal configurations only the first.

    Args:
        study: A study with one objective.
        count: How many at most.

    Returns:
        Number, values and result of each, the best first.

    Raises:
        ValueError: If the study has several objectives, no finished trial, or count is below 1.
    """
    reading = Reading(study)
    if not reading.single:
        raise ValueError(
            f"study {reading.name!r} has {len(reading.directions)} objectives: choose trials of "
            "its front with nemo_rl_ref.tune.best, and give them as candidates"
        )
    if count < 1:
        raise ValueError(f"top: got {count}, expected 1 or more")
    found: dict[str, tuple[int, dict[str, Any], float]] = {}
    for trial in reading.ranked():
        values = values_of(trial)
        key = json.dumps(values, sort_keys=True, default=str)
        found.setdefault(key, (trial.number, values, trial.values[0]))
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"study {reading.name!r}: no trial is complete, nothing to re-evaluate")
    return list(found.values())


def reevaluate(
    study: Study,
    folder: str | Path,
    *,
    top: int = 3,
    seeds: int = 5,
    level: float = 0.95,
    run_trial: Callable[..., Mapping[str, float]] | None = None,
    spec: Any = None,
    show: Callable[[str], None] = print,
) -> Reevaluation:
    """Run the top candidates and the default again, on the same fresh seeds.

    Every run is a line of ``reevaluation.jsonl`` in the folder as soon as it ends. The same call
    again runs what is missing: after an interruption, or with more seeds or candidates. Failed runs
    are kept too, with their reasons, and are not run again; delete their lines to do so.

    Args:
        study: A study with one objective and its attribute ``spec``.
        folder: Where ``reevaluation.jsonl`` and the runs' folders are.
        top: Number of candidates, the search's best first.
        seeds: Number of seeds.
        level: Of the intervals.
        run_trial: What runs a trial, see `nemo_rl_ref.tune.runner.run_trial`, which is the default.
        spec: The search; read from the study if not given.
        show: Gets a line after each run.

    Returns:
        The comparison, with all runs.

    Raises:
        ValueError: As `top_candidates`, `fresh_seeds` and `compare`.
    """
    from nemo_rl_ref.tune.runner import TrialFailed
    from nemo_rl_ref.tune.runner import run_trial as in_this_process

    candidates = top_candidates(study, top)
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a number between 0 and 1")
    if spec is None:
        spec = _spec_of(study)
    reading = Reading(study)
    metric, maximize = reading.objectives[0], reading.sign(0) > 0
    chosen_seeds = fresh_seeds(study, seeds, also=(spec.seed,))
    wanted = {DEFAULT: default_values(spec.space)} | {
        f"trial {number}": values for number, values, _ in candidates
    }
    path = Path(folder, "reevaluation.jsonl")
    setting = _digest([spec.to_dict(), metric])
    runner = run_trial or in_this_process
    todo = [(name, seed) for seed in chosen_seeds for name in wanted]
    runs: dict[tuple[str, int], Run] = {}
    with _lines(path) as (known, append):
        by_key = {line["key"]: line for line in known}
        for name, seed in todo:
            key = _digest([setting, wanted[name], seed])
            if key not in by_key:
                place = Path(folder, f"{name.replace(' ', '-')}-seed-{seed}")
                run = _run(runner, spec, wanted[name], place, seed, name, metric, TrialFailed)
                by_key[key] = {"key": key, "values": wanted[name], "metric": metric} | asdict(run)
                append(by_key[key])
                what = f"failed: {run.failure}" if run.failure else f"{metric} {run.value:.4g}"
                show(f"{name}, seed {seed}: {what}  ({run.seconds:.1f} s, run "
                     f"{len(runs) + 1} of {len(todo)})")  # fmt: skip
            line = by_key[key]
            runs[name, seed] = Run(name, seed, line["value"], line["failure"], line["seconds"])
    return _result(candidates, runs, chosen_seeds, metric, maximize, level)


def _spec_of(study: Study) -> Any:
    from nemo_rl_ref.tune.spec import Spec

    if "spec" not in study.user_attrs:
        raise ValueError(
            f"study {study.study_name!r} has no attribute 'spec', so it is not known what its "
            "trials run; expected a study made by nemo_rl_ref.tune"
        )
    return Spec.from_dict(study.user_attrs["spec"])


def _run(
    runner: Callable[..., Mapping[str, float]],
    spec: Any,
    values: Mapping[str, Any],
    folder: Path,
    seed: int,
    name: str,
    metric: str,
    failed: type[Exception],
) -> Run:
    started, value, failure = time.perf_counter(), None, None
    try:
        metrics = runner(spec, values, folder, seed=seed)
        if metric not in metrics:
            failure = f"the run has no {metric}"
        elif not math.isfinite(metrics[metric]):
            failure = f"{metric} is {metrics[metric]}"
        else:
            value = float(metrics[metric])
    except failed as error:
        failure = error.reason  # type: ignore[attr-defined]
    return Run(name, seed, value, failure, round(time.perf_counter() - started, 3))


def _result(
    candidates: Sequence[tuple[int, dict[str, Any], float]],
    runs: Mapping[tuple[str, int], Run],
    seeds: tuple[int, ...],
    metric: str,
    maximize: bool,
    level: float,
) -> Reevaluation:
    def values(name: str) -> dict[int, float]:
        mine = (run for (who, _), run in runs.items() if who == name)
        return {run.seed: run.value for run in mine if run.value is not None}

    comparisons = []
    for number, chosen, in_search in candidates:
        name = f"trial {number}"
        found = compare(
            values(name), values(DEFAULT), maximize=maximize, level=level,
            candidates=len(candidates),
        )  # fmt: skip
        sign = 1 if maximize else -1
        optimism = None if found["mean"] is None else sign * (in_search - found["mean"])
        failed = sum(r.candidate == name and r.failure is not None for r in runs.values())
        comparisons.append(
            Comparison(name, chosen, in_search, failed=failed, optimism=optimism, **found)
        )
    return Reevaluation(metric, maximize, level, seeds, tuple(comparisons), tuple(runs.values()))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextmanager
def _lines(
    path: Path,
) -> Iterator[tuple[list[dict[str, Any]], Callable[[Mapping[str, Any]], None]]]:
    """The lines of a JSON Lines file, and a function that appends one; no one else may meanwhile.

    A line is written at once. What a crash cut off at the end is removed.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path}: another re-evaluation is writing to this file") from error
        file.seek(0)
        content = file.read() or b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.ftruncate(file.fileno(), len(whole))
        known = []
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                known.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error

        def append(line: Mapping[str, Any]) -> None:
            file.write((json.dumps(line, default=str) + "\n").encode())
            os.fsync(file.fileno())

        yield known, append
