# SPDX-License-Identifier: Apache-2.0
"""One HTML file that says what a study found, and how sure that is. ::

    write_report(study, "results/study/report.html")

The file asks nothing of the network, follows the reader's light or dark theme, and has a sentence
or a table for every figure. What a study cannot say yet (importances after three trials, a front of
one objective) it says in words.

Failed trials are listed with their reasons and appear in no statistic. Pruned ones have a last
intermediate value, which is not a result, and is drawn as such.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.tune import _figures
from nemo_rl_ref.tune._figures import NOT_SET, Axis, short
from nemo_rl_ref.tune._reading import (
    LEAST_IN_BEST_TENTH,
    SHUFFLES,
    Importances,
    Reading,
    reason,
    values_of,
)
from nemo_rl_ref.tune.best import Best, NoBest, _best, _choose, write_atomically

#: More parameters than this are not drawn as parallel coordinates.
MOST_SCALES = 16

Part = tuple[str, Any]


@dataclass(frozen=True)
class Table:
    """A table: its columns, which of them are numbers, and which rows stand out."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows, in words."""

    svg: str
    caption: str


@dataclass
class Section:
    """A section of the page."""

    id: str
    title: str
    parts: list[Part] = field(default_factory=list)


def write_report(
    study: Study, path: str | Path, *, reevaluation: Any = None, rule: str | None = None
) -> Path:
    """Write the report of a study, at once or not at all.

    Args:
        study: Any Optuna study; one made by this package has more to say.
        path: The HTML file. Its folder is made.
        reevaluation: From `nemo_rl_ref.tune.reevaluate.reevaluate`, if that was done.
        rule: How to choose one trial of several objectives, see `nemo_rl_ref.tune.best.choose`.

    Returns:
        The path.

    Raises:
        ValueError: If the rule cannot be read.
    """
    write_atomically(path, render(study, reevaluation=reevaluation, rule=rule))
    return Path(path)


def render(study: Study, *, reevaluation: Any = None, rule: str | None = None) -> str:
    """The report of a study as text, see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    reading = Reading(study)
    chosen, how, why_not = None, "", ""
    try:
        chosen, how = _choose(reading, rule)
    except NoBest as error:
        why_not = str(error)
    sections = [
        _best_section(reading, chosen, how, why_not),
        *([_reevaluated(reevaluation)] if reevaluation else []),
        _searched(reading),
        _history(reading),
        *([] if reading.single else [_pareto(reading, chosen)]),
        _failed(reading),
        _pruned_and_curves(reading, chosen),
        _importances(reading),
        _slices(reading, chosen),
        _parallel(reading, chosen),
        _all_trials(reading, chosen),
    ]
    environment = Environment(
        loader=PackageLoader("nemo_rl_ref.tune", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("report.html.jinja").render(
        title=f"Hyperparameter search: {reading.name}",
        lead=_lead(reading, chosen),
        cards=_cards(reading, chosen),
        sections=sections,
        footer=f"Written {now} by nemo_rl_ref.tune with {_versions_here()}.",
    )


# Words and numbers


def _n(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _direction(reading: Reading, objective: int) -> str:
    up = reading.directions[objective] == StudyDirection.MAXIMIZE
    return "more is better" if up else "less is better"


def _breakable(text: Any) -> Any:
    """Text in which a line may end within a dotted key."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._:/])(?=[A-Za-z])", r"\1<wbr>", str(escape(text))))


def _versions_here() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("nemo-rl-ref", "optuna", "torch", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue  # not installed, so not used
    return ", ".join(found)


def _states(reading: Reading, noun: bool = False) -> str:
    """How many trials ended how."""
    names = {
        TrialState.COMPLETE: "finished",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
    }
    counts = reading.counts()
    there = [(counts[state], name) for state, name in names.items() if counts[state]]
    return ", ".join(
        f"{_count(n, 'trial') if noun and not i else f'{n:,}'} {name}"
        for i, (n, name) in enumerate(there)
    )


def _lead(reading: Reading, chosen: FrozenTrial | None) -> str:
    words = _states(reading, noun=True)
    state = f"{words}." if words else "The study has no trials yet."
    if chosen is None:
        return state
    found = ", ".join(
        f"{name} {_n(value)}" for name, value in zip(reading.objectives, chosen.values, strict=True)
    )
    return f"{state} Best: trial {chosen.number} with {found}."


def _cards(reading: Reading, chosen: FrozenTrial | None) -> list[tuple[str, str]]:
    counts = reading.counts()
    cards = [
        (f"best {name}", _n(value))
        for name, value in zip(reading.objectives, chosen.values if chosen else (), strict=False)
    ]
    cards += [
        ("finished", f"{counts[TrialState.COMPLETE]:,}"),
        ("pruned", f"{counts[TrialState.PRUNED]:,}"),
        ("failed", f"{counts[TrialState.FAIL]:,}"),
    ]
    if reading.seconds is not None:
        cards.append(("training, all trials", _time(reading.seconds)))
    return cards


# Sections


def _best_section(reading: Reading, chosen: FrozenTrial | None, how: str, why_not: str) -> Section:
    section = Section("best", "Best configuration")
    if chosen is None:
        section.parts.append(("missing", f"{why_not[0].upper()}{why_not[1:]}."))
        return section
    section.parts.append(("text", f"Trial {chosen.number}, chosen as {how}."))
    ranked = reading.ranked() if reading.single else []
    if len(ranked) > 1:
        second = ranked[1]
        section.parts.append(("note", (
            f"The second best is trial {second.number} with {_n(second.values[0])}. "
            "The best of many noisy values is too good on average: it was chosen because it is "
            "the highest or lowest. What it is worth is known after a re-evaluation over fresh "
            "seeds, and a difference smaller than the one between two seeds means nothing."
        )))  # fmt: skip
    best: Best | None = None
    try:
        best = _best(reading, chosen, how)
    except (ValueError, OSError, KeyError, ImportError) as error:
        values = values_of(chosen)
        section.parts.append(("missing", f"No YAML and no override line: {error}."))
        section.parts.append(("table", Table(
            "Values of the best trial", ("key", "value"),
            [(name, _value(value)) for name, value in values.items()], frozenset({1}))))  # fmt: skip
    if best:
        rows = [(name, _value(value)) for name, value in best.values.items()]
        section.parts += [
            ("table", Table("Values of the best trial", ("key", "value"), rows, frozenset({1}))),
            ("text", "As overrides, for one machine or NeMo RL's own script:"),
            ("line", best.override_line),
            ("text", "The run, from the configuration that was searched:"),
            ("line", best.command),
            ("code", ("The whole configuration as YAML, interpolations resolved", best.yaml)),
        ]
    return section


def _reevaluated(result: Any) -> Section:
    section = Section("reevaluation", "Re-evaluation over fresh seeds")
    section.parts += [("text", sentence) for sentence in result.sentences()]
    columns, rows = result.table()
    section.parts.append(("table", Table(
        "Re-evaluated mean, difference to the default, paired by seed", columns, rows,
        frozenset(range(1, len(columns))))))  # fmt: skip
    shown = [
        (c.name, c.low, c.mean_difference, c.high) for c in result.comparisons if c.low is not None
    ]
    if shown:
        caption = (
            "Mean difference to the default, turned so that right of zero is better, with its "
            f"{result.level:.0%} interval. The numbers are in the table above."
        )
        svg = _figures.intervals(shown, f"improvement of {result.metric}")
        section.parts.append(("figure", Picture(svg, caption)))
    if result.failures:
        section.parts.append(("table", Table(
            "Runs that failed; they are in no mean", ("configuration", "seed", "reason"),
            [(r.candidate, str(r.seed), str(r.failure)) for r in result.failures],
            frozenset({1}))))  # fmt: skip
    return section


def _searched(reading: Reading) -> Section:
    section, spec = Section("searched", "What was searched"), reading.spec
    facts: list[tuple[str, str]] = []
    if spec:
        facts += [
            ("algorithm", str(spec.get("algorithm", "not recorded"))),
            ("configuration", str(spec.get("config", "not recorded"))),
            ("overrides", " ".join(spec.get("overrides", ())) or "none"),
        ]
    facts += [
        ("objective" if reading.single else f"objective {i + 1}",
         f"{name}, {_direction(reading, i)}")
        for i, name in enumerate(reading.objectives)
    ]  # fmt: skip
    for key in ("sampler", "pruner", "engine", "launcher", "seed"):
        if reading.attributes.get(key) is not None:
            facts.append((key, str(reading.attributes[key])))
    facts.append(("trials", _states(reading) or "none"))
    if reading.steps is not None:
        facts.append(("training steps", f"{reading.steps:,}"))
    if reading.seconds is not None:
        facts.append(("training time, all trials", _time(reading.seconds)))
    if recorded := reading.attributes.get("versions"):
        items = recorded.items() if isinstance(recorded, Mapping) else [("", recorded)]
        facts.append(("versions", ", ".join(f"{n} {v}".strip() for n, v in items)))
    section.parts.append(("table", Table("The search", ("", ""), facts)))
    if not reading.parameters:
        section.parts.append(("missing", "No trial has a parameter yet."))
        return section
    rows = []
    for name, axis in reading.parameters.items():
        have = sum(name in trial.params for trial in reading.trials)
        rows.append((
            name, _domain(axis), "yes" if axis.log else "no",
            "all trials" if have == len(reading.trials) else _count(have, "trial"),
        ))  # fmt: skip
    section.parts.append(("table", Table(
        "Parameters", ("key", "from", "log scale", "set in"), rows)))  # fmt: skip
    tied = sorted({n for t in reading.trials for n in values_of(t)} - set(reading.parameters))
    if tied:
        section.parts.append(("note", "Set with them, by ties or as fixed values: " +
                              ", ".join(tied) + "."))  # fmt: skip
    if space := spec.get("space"):
        import yaml

        text = yaml.safe_dump(space, sort_keys=False, allow_unicode=True)
        section.parts.append(("code", ("The search space as it was given", text)))
    return section


def _domain(axis: Axis) -> str:
    if axis.choices is not None:
        return ", ".join(map(str, axis.choices))
    return f"{_value(axis.low)} to {_value(axis.high)}"


def _history(reading: Reading) -> Section:
    section = Section("history", "Values in the order of the trials")
    failed = [trial.number for trial in reading.of(TrialState.FAIL)]
    pruned = [
        (t.number, t.intermediate_values[t.last_step])
        for t in reading.of(TrialState.PRUNED)
        if reading.single
        and t.last_step is not None
        and math.isfinite(t.intermediate_values[t.last_step])
    ]
    for i, name in enumerate(reading.objectives):
        ranked = reading.ranked(i)
        if not ranked:
            section.parts.append(("missing", f"{name}: no trial has finished with a value."))
            continue
        values = [t.values[i] for t in ranked]
        best = ranked[0]
        caption = (
            f"{name} ({_direction(reading, i)}): {_count(len(ranked), 'finished trial')}, "
            f"median {_n(statistics.median(values))}, best {_n(best.values[i])} in trial "
            f"{best.number}. The line is the best so far. "
            + (f"{_count(len(failed), 'failed trial')} marked at the bottom, without a value. "
               if failed else "")
            + "All numbers are in the table at the end."
        )  # fmt: skip
        svg = _figures.history(
            sorted((t.number, t.values[i]) for t in ranked), reading.running_best(i), pruned,
            failed, reading.value_axis(i),
        )  # fmt: skip
        section.parts.append(("figure", Picture(svg, caption)))
    return section


def _pareto(reading: Reading, chosen: FrozenTrial | None) -> Section:
    section = Section("pareto", "Pareto front")
    front = reading.front
    if not front:
        section.parts.append(("missing", "No trial has finished, so there is no front."))
        return section
    section.parts.append(("text", (
        f"{_count(len(front), 'trial')} of {_count(len(reading.finished), 'finished one')} "
        f"{'is' if len(front) == 1 else 'are'} beaten by no other in all objectives at once."
    )))  # fmt: skip
    pairs = [(i, j) for j in range(len(reading.directions)) for i in range(j + 1, len(reading.directions))]  # fmt: skip
    pictures = []
    for i, j in pairs[:6]:
        x, y = reading.value_axis(i), reading.value_axis(j)
        svg = _figures.front(
            [(t.values[i], t.values[j]) for t in reading.finished],
            [(t.values[i], t.values[j]) for t in front],
            (chosen.values[i], chosen.values[j]) if chosen else None,
            x,
            y,
        )
        caption = (
            f"{y.name} ({_direction(reading, j)}) against {x.name} ({_direction(reading, i)}). "
            "Squares are the front; the table below has its numbers."
        )
        pictures.append(Picture(svg, caption))
    section.parts.append(("figure", pictures[0]) if len(pictures) == 1 else ("grid", pictures))
    section.parts.append(("table", _trial_table(
        reading, front, "The Pareto front", chosen, with_state=False)))  # fmt: skip
    return section


def _failed(reading: Reading) -> Section:
    section, failures = Section("failures", "Failed trials"), reading.failures
    if not failures:
        section.parts.append(("text", "No trial failed."))
        return section
    total = sum(map(len, failures.values()))
    section.parts.append(("text", (
        f"{_count(total, 'trial')} failed. A failed trial has no value: it is in no statistic, and "
        "the sampler did not learn from it as from a bad one."
    )))  # fmt: skip
    rows = [
        (why, str(len(trials)), ", ".join(str(t.number) for t in trials[:12])
         + (" …" if len(trials) > 12 else ""))
        for why, trials in failures.items()
    ]  # fmt: skip
    section.parts.append(("table", Table(
        "Causes; where only numbers differ, the first reason stands for all",
        ("reason", "trials", "numbers"), rows, frozenset({1}))))  # fmt: skip
    return section


def _pruned_and_curves(reading: Reading, chosen: FrozenTrial | None) -> Section:
    section = Section("curves", "Intermediate values and pruned trials")
    if not reading.single:
        section.parts.append(("missing", (
            "A search for several objectives reports no intermediate values and prunes nothing."
        )))  # fmt: skip
        return section
    pruned = reading.of(TrialState.PRUNED)
    lines = {t.number: _finite(t) for t in (*reading.finished, *pruned)}
    if not any(lines.values()):
        section.parts.append(("missing", (
            "No trial reported an intermediate value, so there are no curves"
            + (". No trial was pruned." if not pruned else ", and none could be pruned by them.")
        )))  # fmt: skip
    else:
        steps = reading.table_of_steps()
        svg = _figures.curves(
            [line for t in reading.finished if (line := lines[t.number])],
            [line for t in pruned if (line := lines[t.number])],
            lines.get(chosen.number, []) if chosen else [],
            reading.value_axis(0) if reading.finished else Axis(reading.objectives[0]),
        )
        last = steps[-1]
        caption = (
            f"{reading.objectives[0]} at each validation, a line for each trial; dashed lines are "
            f"pruned trials. At step {last[0]}, {_count(last[1], 'trial')} reported, median "
            f"{_n(last[2])}, best {_n(last[3])}."
        )
        section.parts.append(("figure", Picture(svg, caption)))
        section.parts.append(("folded", Table(
            "Intermediate values by step", ("step", "trials", "median", "best"),
            [(str(s), str(n), _n(m), _n(b)) for s, n, m, b in steps],
            frozenset({0, 1, 2, 3}))))  # fmt: skip
    if pruned:
        section.parts.append(("text", (
            f"{_count(len(pruned), 'trial was', 'trials were')} pruned: ended early because of "
            "an intermediate value. The last one is not a result, and is not compared with results."
        )))  # fmt: skip
        rows = [
            (str(t.number), "—" if t.last_step is None else str(t.last_step),
             "—" if t.last_step is None else _n(t.intermediate_values[t.last_step]))
            for t in pruned
        ]  # fmt: skip
        section.parts.append(("folded", Table(
            "Pruned trials", ("trial", "last step", "value there"), rows,
            frozenset({0, 1, 2}))))  # fmt: skip
    elif any(lines.values()):
        section.parts.append(("text", "No trial was pruned."))
    return section


def _finite(trial: FrozenTrial) -> list[tuple[int, float]]:
    return [(s, v) for s, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)]


def _importances(reading: Reading) -> Section:
    section = Section("importances", "Which parameters matter")
    shown = False
    for i, name in enumerate(reading.objectives):
        found = reading.importances(i)
        if not reading.single:
            section.parts.append(("heading", name))
        if isinstance(found, str):
            section.parts.append(("missing", found))
            continue
        shown = True
        svg = _figures.bars(found.shares, found.chance, name, color=i % 4)
        section.parts.append(("figure", Picture(svg, _importance_caption(found))))
        rows = [(key, f"{share:.1%}", f"{found.chance[key]:.1%}",
                 "yes" if share > found.chance[key] else "no")
                for key, share in found.shares.items()]  # fmt: skip
        section.parts.append(("table", Table(
            f"Importances for {name}" if not reading.single else "Importances",
            ("parameter", "share", "by chance", "above chance"), rows,
            frozenset({1, 2}))))  # fmt: skip
        if found.best < LEAST_IN_BEST_TENTH:
            section.parts.append(("note", (
                f"Only {_count(found.best, 'trial')} in the best tenth: with fewer than "
                f"{LEAST_IN_BEST_TENTH} (50 finished trials), the shares change with every further "
                "trial."
            )))  # fmt: skip
    if shown:
        section.parts += [("note", _WHAT_IT_MEANS), ("note", _WHEN_NOT_TO_RELY_ON_IT)]
    return section


_WHAT_IT_MEANS = (
    "PED-ANOVA (Watanabe et al. 2023) asks how far the distribution of a parameter in the best tenth "
    "of the finished trials differs from its distribution in all of them. A large share says: to be "
    "among the best, this parameter has to lie in a part of its range. It does not say how much the "
    "value changes, nor in which direction; the slices below show that."
)
_WHEN_NOT_TO_RELY_ON_IT = (
    "It looks at one parameter at a time, so two that matter only together can both look "
    "unimportant. A sampler that learns has already drawn most trials from the good part, which "
    "makes an important parameter look less so than in a random search. A range that is too narrow "
    "makes any parameter unimportant. Shares add up to 100 % whether or not anything matters, so "
    "compare them with what chance gives."
)


def _importance_caption(found: Importances) -> str:
    above = [name for name, share in found.shares.items() if share > found.chance[name]]
    what = f"Above it: {', '.join(above)}." if above else "None is above it."
    return (
        f"Share of each parameter, from {_count(found.trials, 'finished trial')}, of which "
        f"{found.best} are the best tenth. The upright mark is the most that chance gave in "
        f"{SHUFFLES} shuffles of the values; a bar that does not pass it is hollow. {what}"
    )


def _slices(reading: Reading, chosen: FrozenTrial | None) -> Section:
    section = Section("slices", "Value against each parameter")
    if not reading.finished or not reading.parameters:
        section.parts.append(("missing", "No trial has finished, so there is nothing to plot."))
        return section
    section.parts.append(("text", (
        "A point for each finished trial. The diamond is the best trial. All other parameters vary "
        "too, so a cloud without shape can still hide an effect."
    )))  # fmt: skip
    for i, name in enumerate(reading.objectives):
        if not reading.single:
            section.parts.append(("heading", name))
        pictures = []
        for axis in reading.parameters.values():
            points = [
                (t.params[axis.name], t.values[i])
                for t in reading.ranked(i)
                if axis.name in t.params
            ]
            if not points:
                section.parts.append(("missing", f"{axis.name}: no finished trial has it."))
                continue
            best = chosen if chosen and axis.name in chosen.params else None
            svg = _figures.slices(
                points, (best.params[axis.name], best.values[i]) if best else None, axis,
                reading.value_axis(i),
            )  # fmt: skip
            pictures.append(Picture(svg, _slice_caption(reading, axis, i)))
        section.parts.append(("grid", pictures))
    return section


def _slice_caption(reading: Reading, axis: Axis, objective: int) -> str:
    have = [t for t in reading.ranked(objective) if axis.name in t.params]
    name = short(axis.name, 200)
    if axis.choices is not None:
        parts = []
        for choice in axis.choices:
            values = [t.values[objective] for t in have if t.params[axis.name] == choice]
            if values:
                best = max(values) if reading.sign(objective) > 0 else min(values)
                parts.append(f"{choice}: {_count(len(values), 'trial')}, median "
                             f"{_n(statistics.median(values), 3)}, best {_n(best, 3)}")  # fmt: skip
        return f"{name}. " + "; ".join(parts) + "."
    tenth = [t.params[axis.name] for t in reading.best_tenth(objective) if axis.name in t.params]
    text = f"{name}, {_count(len(have), 'trial')}."
    if len(tenth) > 1:
        text += (
            f" The best tenth ({len(tenth)}) lies from {_n(min(tenth), 3)} to {_n(max(tenth), 3)}."
        )
    elif have:
        text += f" The best has {_n(have[0].params[axis.name], 3)}."
    return text


def _parallel(reading: Reading, chosen: FrozenTrial | None) -> Section:
    section = Section("parallel", "Parallel coordinates")
    axes = list(reading.parameters.values())
    finished = reading.ranked()
    if len(finished) < 2 or not axes:
        section.parts.append(("missing", "Parallel coordinates need two finished trials."))
        return section
    if len(axes) > MOST_SCALES:
        found = reading.importances(0)
        if isinstance(found, Importances):
            axes = [reading.parameters[name] for name in list(found.shares)[:MOST_SCALES]]
        else:
            axes = axes[:MOST_SCALES]
        section.parts.append(("note", (
            f"The {len(axes)} most important of {len(reading.parameters)} parameters."
        )))  # fmt: skip
    scales = [*axes, *(reading.value_axis(i) for i in range(len(reading.objectives)))]
    ordered = finished[::-1]
    rows = [[*(t.params.get(a.name, NOT_SET) for a in axes), *t.values] for t in ordered]
    tenth = {t.number for t in reading.best_tenth()}
    strong = [r for r, t in enumerate(ordered) if t.number in tenth]
    best = next((r for r, t in enumerate(ordered) if chosen and t.number == chosen.number), None)
    caption = (
        f"Every line is one of {len(rows)} finished trials, through its parameters and, at the "
        f"bottom, {' and '.join(reading.objectives)}. Coloured: the best tenth by "
        f"{reading.objectives[0]} ({len(strong)}). Thick: the best. "
        "The table at the end has the same numbers."
    )
    section.parts.append(
        ("figure", Picture(_figures.parallel(rows, scales, strong, best), caption))
    )
    return section


def _all_trials(reading: Reading, chosen: FrozenTrial | None) -> Section:
    section = Section("trials", "All trials")
    if not reading.trials:
        section.parts.append(("missing", "There are none yet."))
        return section
    section.parts.append(("folded", _trial_table(
        reading, reading.trials, _count(len(reading.trials), "trial"), chosen)))  # fmt: skip
    return section


def _trial_table(
    reading: Reading,
    trials: Sequence[FrozenTrial],
    caption: str,
    chosen: FrozenTrial | None,
    with_state: bool = True,
) -> Table:
    columns = ["trial", *reading.objectives, *map(short, reading.parameters)]
    numbers = set(range(1 + len(reading.objectives)))
    if with_state:
        columns += ["state", "seconds", "steps", "reason of a failure"]
        numbers |= {len(columns) - 3, len(columns) - 2}
    missing: Callable[[Mapping[str, Any], str], str] = lambda values, name: (
        _value(values[name]) if name in values else "—"
    )
    rows = []
    for t in trials:
        # Optuna keeps the last intermediate value of a pruned trial as its value.
        done = t.state == TrialState.COMPLETE
        values = t.values if done else [None] * len(reading.objectives)
        row = [str(t.number), *("—" if v is None else _n(v) for v in values)]
        row += [missing(t.params, name) for name in reading.parameters]
        if with_state:
            row += [
                t.state.name.lower(),
                f"{t.user_attrs['seconds']:.1f}" if "seconds" in t.user_attrs else "—",
                missing(t.user_attrs, "steps"),
                reason(t) if t.state == TrialState.FAIL else "",
            ]
        rows.append(row)
    strong = {r for r, t in enumerate(trials) if chosen and t.number == chosen.number}
    return Table(caption, columns, rows, frozenset(numbers), frozenset(strong))
