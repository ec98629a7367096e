# SPDX-License-Identifier: Apache-2.0
"""Two sides of a comparison, trained on the same seeds, and what their differences settle."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.show.figures import LINES, panels
from nemo_rl_ref.tune.outcome.reevaluate import Run, compare, run_sides
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.trial import Runner

#: The most seeds that `seeds_needed` tries.
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Result:
    """What a comparison found.

    Attributes:
        mine: Name of the one side.
        other: Name of the side that it is compared with.
        metric: What is compared, at the last step of each run.
        maximize: Whether more of it is better.
        level: Of the interval.
        runs: All runs; one that failed has the reason and no value.
        found: As `nemo_rl_ref.tune.outcome.reevaluate.compare` returns it, over the seeds on which
            both sides have a value; ``mean_difference`` is positive where ``mine`` is better.
    """

    mine: str
    other: str
    metric: str
    maximize: bool
    level: float
    runs: tuple[Run, ...]
    found: Mapping[str, Any]

    def values(self, side: str) -> dict[int, float]:
        """Return the values of a side by seed."""
        return {r.seed: r.value for r in self.runs if r.candidate == side and r.value is not None}

    @property
    def differences(self) -> list[float]:
        """The differences by seed, positive where ``mine`` is better."""
        mine, other = self.values(self.mine), self.values(self.other)
        sign = 1 if self.maximize else -1
        return [sign * (mine[seed] - other[seed]) for seed in sorted(mine.keys() & other.keys())]

    def sentences(self) -> list[str]:
        """Say in words what was found."""
        found, pairs = self.found, self.found["pairs"]
        start = (
            f"{self.mine} against {self.other}, {self.metric}, {pairs} seeds that both finished."
        )
        failed = [f"{r.candidate}, seed {r.seed}: {r.failure}" for r in self.runs if r.failure]
        lines = [start, *(f"failed: {line}" for line in failed)]
        if not pairs:
            return [*lines, "There is nothing to compare."]
        lines.append(
            f"Mean {found['mean']:.4g} against {found['default_mean']:.4g}: "
            f"{_better(found['mean_difference'])}, better on {found['wins']:.0%} of the seeds."
        )
        if "low" not in found:
            why = "one seed has no spread" if pairs < 2 else "all differences are the same number"
            return [*lines, f"There is no interval, because {why}: it is not settled."]
        interval = f"{self.level:.0%} interval of the difference: {found['low']:.4g} to "
        lines.append(f"{interval}{found['high']:.4g}.")
        if not found["low"] <= 0 <= found["high"]:
            which = "better" if found["low"] > 0 else "worse"
            return [*lines, f"It does not contain 0: {self.mine} is {which} on this data."]
        needed = seeds_needed(self.differences, self.level)
        more = f"about {needed} seeds" if needed else f"more than {MOST_SEEDS} seeds"
        return [
            *lines,
            "It contains 0: these runs do not settle which is better. If the difference is what it "
            f"seems, it takes {more} to settle it.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        return asdict(self) | {"sentences": self.sentences()}


def _better(difference: float) -> str:
    if not difference:
        return "equal"
    return f"{'better' if difference > 0 else 'worse'} by {abs(difference):.4g}"


def seeds_needed(differences: Sequence[float], level: float = 0.95) -> int | None:
    """Estimate how many seeds an interval without 0 takes, from the differences on a few.

    Student's t interval of ``n`` differences is as wide as their standard deviation says; the least
    ``n`` is returned for which it ends short of 0, if mean and standard deviation stay as they are.

    Args:
        differences: One for each seed, at least two that are not equal.
        level: Of the interval.

    Returns:
        The number of seeds, or None if it is more than `MOST_SEEDS`.

    Example:
        >>> seeds_needed([0.02, 0.05, -0.01])
        11
    """
    from scipy.stats import t

    mean, deviation = abs(statistics.fmean(differences)), statistics.stdev(differences)
    for count in range(2, MOST_SEEDS + 1):
        if t.ppf((1 + level) / 2, count - 1) * deviation / math.sqrt(count) < mean:
            return count
    return None


def compare_sides(
    mine: tuple[str, Spec],
    other: tuple[str, Spec],
    seeds: int,
    folder: str | Path,
    *,
    level: float = 0.95,
    run_trial: Runner | None = None,
    show: Callable[[str], None] = print,
) -> Result:
    """Train two configurations on the same seeds and compare them.

    Args:
        mine: Name and configuration of the one side.
        other: Those of the side that it is compared with.
        seeds: Number of seeds, from the configuration's own on.
        folder: Where the runs, ``result.json`` and ``difference.svg`` go.
        level: Of the interval, between 0 and 1.
        run_trial: What trains, see `nemo_rl_ref.tune.trial.run_trial`, which is the default.
        show: Gets a line after each run.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no seed, both sides are the same, or the level is out of its range.
    """
    if seeds < 1:
        raise ValueError(f"--seeds: got {seeds}, expected 1 or more")
    if mine[1].to_dict() == other[1].to_dict():
        raise ValueError(
            "both sides are the same training: give one a --loss, an --env or a --change"
        )
    compare({}, {}, maximize=True, level=level)  # the level, before anything runs
    name, spec = mine
    chosen = range(spec.seed, spec.seed + seeds)
    sides = {name: (spec, {}), other[0]: (other[1], {})}
    runs = run_sides(sides, chosen, folder, run_trial=run_trial, show=show)
    from matplotlib import pyplot

    objective = spec.objectives[0]
    maximize = objective.direction == "maximize"
    result = Result(name, other[0], objective.metric, maximize, level, tuple(runs), {})
    found = compare(result.values(name), result.values(other[0]), maximize=maximize, level=level)
    result = replace(result, found=found)
    write_text(Path(folder, "result.json"), json.dumps(result.to_dict(), indent=1) + "\n")
    figure = draw(result)
    figure.savefig(Path(folder, "difference.svg"))
    pyplot.close(figure)
    return result


def draw(result: Result) -> Any:
    """Draw both sides seed by seed, and the mean difference with its interval.

    Returns:
        A Matplotlib figure.
    """
    figure, (above, below) = panels(2, height=1.9)
    metric = result.metric.replace("$", r"\$")  # not the start of a formula
    sides = [result.values(result.mine), result.values(result.other)]
    for seed in sorted(sides[0].keys() & sides[1].keys()):
        above.plot([s[seed] for s in sides], [0, 1], color="#999999", linewidth=1, zorder=1)
    for row, (values, line) in enumerate(zip(sides, LINES, strict=False)):
        style = {"color": line["color"], "marker": line["marker"]}
        above.scatter([*values.values()], [row] * len(values), zorder=2, **style)
    above.set_yticks([0, 1], [result.mine, result.other])
    above.set_ylim(1.6, -0.6)
    above.set_title(f"{metric}, a line for each seed")
    below.scatter(result.differences, [0] * len(result.differences), color="#999999", s=18)
    if "low" in result.found:
        mean, low, high = (result.found[key] for key in ("mean_difference", "low", "high"))
        below.errorbar(
            mean, 0.5, xerr=[[mean - low], [high - mean]], capsize=4, **LINES[2] | {"linestyle": ""}
        )
    below.axvline(0, color="#777777", linewidth=1)
    below.set_yticks([0, 0.5], ["seeds", f"mean, {result.level:.0%}"])
    below.set_ylim(1, -0.5)
    below.set_title(f"Difference; right of 0 {result.mine} is better")
    return figure
