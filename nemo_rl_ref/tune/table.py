# SPDX-License-Identifier: Apache-2.0
"""Shows a study while it runs: in a terminal a table, elsewhere a line for each finished trial."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from nemo_rl_ref.tune.space import override_line
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.study import Search

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
#: Seconds between two drawings of the table.
_PERIOD = 0.5


class Display:
    """Shows the trials of a search; the listener of one.

    Args:
        console: Where; standard output if not given.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stdout)  # this one, whatever it is later
        self.live: Live | None = None
        self._shown: set[int] = set()
        self._drawn = 0.0
        self._began = time.monotonic()
        self._before: int | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live = Live(
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, search: Search) -> None:
        """Show what has changed."""
        trials = search.trials()
        finished = [trial for trial in trials if trial.state.is_finished()]
        if self._before is None:
            self._before = len(finished)
            if not self.live:
                self._shown = {trial.number for trial in finished}
        if self.live is None:
            for trial in finished:
                if trial.number not in self._shown:
                    self._shown.add(trial.number)
                    self._print_line(trial, search, len(finished))
        elif time.monotonic() - self._drawn > _PERIOD or len(finished) == search.budget:
            self._drawn = time.monotonic()
            rows = max(4, self.console.height - 6)
            table = make_table(search.spec, search.study, trials, rows)
            table.caption = self._summary(search, trials, len(finished))
            self.live.update(table, refresh=True)

    def _print_line(self, trial: FrozenTrial, search: Search, finished: int) -> None:
        names = short_names(search.spec.space.entries)
        parts = [f"trial {trial.number:>4}  {STATES[trial.state]:8}"]
        if trial.state is TrialState.FAIL:
            parts.append(reason(trial))
        elif trial.values:
            metrics = (objective.metric for objective in search.spec.objectives)
            parts += [f"{m} {v:.5g}" for m, v in zip(metrics, trial.values, strict=False)]
        values = trial.user_attrs.get("values", {})
        searched = (key for key in values if search.spec.space.entries[key].search)
        parts += [f"{names[key]} {show(values[key])}" for key in searched]
        parts.append(f"{trial.user_attrs.get('seconds', 0):.1f} s")
        # One line, however narrow: a log is read with grep.
        print("  ".join([*parts, f"({finished}/{search.budget})"]), file=self.console.file)
        self.console.file.flush()

    def _summary(self, search: Search, trials: Sequence[FrozenTrial], finished: int) -> str:
        counts = Counter(STATES[trial.state] for trial in trials)
        parts = [f"{finished}/{search.budget} finished"]
        parts += [f"{n} {state}" for state, n in counts.items() if state not in ("complete",)]
        done = finished - (self._before or 0)
        if 0 < done and finished < search.budget:
            left = (time.monotonic() - self._began) / done * (search.budget - finished)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


def make_table(spec: Spec, study: Study, trials: Sequence[FrozenTrial], rows: int) -> Table:
    """A table of trials: the best, and of the others the last that fit.

    Args:
        spec: What is searched.
        study: Says which are best.
        trials: The trials.
        rows: Rows to show at most.

    Returns:
        The table.
    """
    names = short_names(spec.space.entries)
    searched = [key for key, entry in spec.space.entries.items() if entry.search]
    best = {trial.number for trial in best_trials(study)}
    table = Table(title=f"{study.study_name}: {spec.algorithm}", title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("state")
    for objective in spec.objectives:
        table.add_column(f"{objective.metric}\n{objective.direction}", justify="right")
    for key in searched:
        table.add_column(names[key], justify="right")
    table.add_column("step", justify="right")
    table.add_column("seconds", justify="right")
    for trial in _chosen(trials, best, rows):
        values = trial.user_attrs.get("values", {})
        state = STATES[trial.state]
        results = [f"{value:.5g}" for value in trial.values or ()]
        if trial.state is TrialState.RUNNING and trial.intermediate_values:
            results = [f"{trial.intermediate_values[trial.last_step]:.5g}"]
        if trial.state is TrialState.FAIL:
            state = f"failed: {reason(trial)}"
        results += [""] * (len(spec.objectives) - len(results))
        number, bold = str(trial.number), trial.number in best
        table.add_row(
            f"best {number}" if bold else number,
            state,
            *results,
            *(show(values[key]) if key in values else "" for key in searched),
            str(trial.user_attrs.get("steps", trial.last_step or "")),
            f"{trial.user_attrs['seconds']:.1f}" if "seconds" in trial.user_attrs else "",
            style="bold" if bold else None,
        )
    return table


def _chosen(trials: Sequence[FrozenTrial], best: set[int], rows: int) -> Iterable[FrozenTrial]:
    started = [trial for trial in trials if trial.state is not TrialState.WAITING]
    first = [trial for trial in started if trial.number in best][: rows // 2]
    others = [trial for trial in started if trial not in first]
    return [*first, *others[-(rows - len(first)) :]]


def best_trials(study: Study) -> list[FrozenTrial]:
    """The best trial, or the Pareto front; empty if no trial is complete."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return []
    return study.best_trials if len(study.directions) > 1 else [study.best_trial]


def describe_result(search: Search) -> str:
    """The end of a search in words: how its trials ended, the best values, the overrides.

    Args:
        search: The search.

    Returns:
        Several lines.
    """
    trials, spec = search.trials(), search.spec
    counts = Counter(STATES[trial.state] for trial in trials)
    lines = [f"{len(trials)} trials: " + ", ".join(f"{n} {state}" for state, n in counts.items())]
    failures = Counter(reason(t) for t in trials if t.state is TrialState.FAIL)
    lines += [f"  failed {n} times: {why}" for why, n in failures.most_common(5)]
    best = best_trials(search.study)
    if not best:
        return "\n".join([*lines, "no trial is complete, so there is no best one"])
    for trial in best:
        what = "on the Pareto front" if len(spec.objectives) > 1 else "best"
        results = ", ".join(
            f"{objective.metric} {value:.6g}"
            for objective, value in zip(spec.objectives, trial.values, strict=True)
        )
        lines.append(f"{what}: trial {trial.number}, {results}")
        values = trial.user_attrs["values"]
        if len(best) == 1:
            width = max(map(len, values))
            lines += [f"  {key:{width}}  {show(value)}" for key, value in values.items()]
        lines += ["as overrides:", f"  {override_line(values, spec.base)}"]
    return "\n".join(lines)


def reason(trial: FrozenTrial) -> str:
    """Why a trial failed."""
    return trial.user_attrs.get("failure") or "no reason was recorded"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last parts of keys, as many as tell each from all others."""
    keys, names = list(keys), {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names


def show(value: Any) -> str:
    """A value for a table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
