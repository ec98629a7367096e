# SPDX-License-Identifier: Apache-2.0
"""One HTML page that says what a study found; it works offline, in light and dark.

For example::

    write_report(study, "results/study/report.html")

The figures are Optuna's (``optuna.visualization.matplotlib``). What a study cannot say yet, such as
importances after three trials, the page says in words. Failed trials are listed with their reasons.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.tune.outcome.best import (
    NoBest,
    best_from,
    choose,
    differing_steps,
    objectives_of,
    ranked,
)
from nemo_rl_ref.tune.outcome.reevaluate import Reevaluation
from nemo_rl_ref.tune.search import quiet
from nemo_rl_ref.tune.spec import Objective
from nemo_rl_ref.tune.trial import cause_of

#: PED-ANOVA compares the best tenth with all, and a tenth of fewer trials is no distribution.
LEAST_FOR_IMPORTANCES = 20
#: A legend with more lines, one for each trial, covers the figure.
MOST_IN_LEGEND = 5

_WORDS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass
class Section:
    """A section of the page: captions and figures, or a sentence in their place."""

    title: str
    text: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, caption: str, plot: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Add a figure of Optuna's, which a function of its makes, and say what it shows."""
        self.pictures.append((caption, _draw(plot, *arguments, **options)))


def write_report(
    study: Study,
    path: str | Path,
    *,
    reevaluation: Reevaluation | None = None,
    rule: str | None = None,
) -> Path:
    """Write the report of a study, whole or not at all; returns the path.

    Args:
        study: A study of this package.
        path: The HTML file. Its folder is made.
        reevaluation: From `nemo_rl_ref.tune.outcome.reevaluate.reevaluate`, if that was done.
        rule: See `nemo_rl_ref.tune.outcome.best.choose`.

    Raises:
        ValueError: If the rule cannot be read, or the study is not one of this package.
    """
    write_text(path, render(study, reevaluation=reevaluation, rule=rule))
    return Path(path)


def render(
    study: Study, *, reevaluation: Reevaluation | None = None, rule: str | None = None
) -> str:
    """Make the report of a study as text, see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    best, problem, objectives = None, "", objectives_of(study)
    try:
        trial, how = choose(study, rule)
    except NoBest as error:
        trial, how, problem = None, "", f"{error}."
    if trial is not None:
        try:
            best = best_from(study, trial, how)
        except (ValueError, OSError) as error:  # the configuration is gone, or was changed
            problem = f"Trial {trial.number} is the best, but has no override line: {error}."
    environment = Environment(
        loader=PackageLoader("nemo_rl_ref.tune.outcome", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        name=study.study_name,
        spec=study.user_attrs["spec"],
        states=describe_states(study),
        seconds=sum(t.user_attrs.get("seconds", 0) for t in study.get_trials(deepcopy=False)),
        best=best,
        problem=problem,
        steps=differing_steps(study),
        reevaluation=reevaluation,
        failures=failures_of(study),
        sections=_figures(study, objectives),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        optuna=optuna.__version__,
    )


def describe_states(study: Study) -> str:
    """Say how many trials ended how: ``42 finished, 12 pruned, 6 failed``."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    counted = [(states.count(state), word) for state, word in _WORDS.items()]
    return ", ".join(f"{count} {word}" for count, word in counted if count) or "no trials"


def failures_of(study: Study) -> list[tuple[str, list[int]]]:
    """List why trials failed, and their numbers, the most frequent cause first.

    Reasons that differ by numbers only are one cause. A trial that was run again names the new one.
    """
    trials = study.get_trials(deepcopy=False)
    with quiet():
        again = {
            n: t.number
            for t in trials
            for n in RetryHeartbeatStaleTrialCallback.retry_history(t)[-1:]
        }
    found: dict[str, tuple[str, list[int]]] = {}
    for trial in trials:
        if trial.state is TrialState.FAIL:
            reason = trial.user_attrs.get("failure") or "its process died or was interrupted"
            if trial.number in again:
                reason += f"; run again as trial {again[trial.number]}"
            found.setdefault(cause_of(reason), (reason, []))[1].append(trial.number)
    return sorted(found.values(), key=lambda one: -len(one[1]))


# Figures


def _figures(study: Study, objectives: list[Objective]) -> list[Section]:
    """The sections that have figures."""
    from optuna.visualization import matplotlib as plots

    trials = ranked(study)
    if not trials:
        return [Section("Figures", text="No trial has finished with a value, so there are none.")]
    front, history, importances, slices, curves = map(Section, (
        "Pareto front", "History", "Which keys matter", "Value against each key",
        "Intermediate values",
    ))  # fmt: skip
    names = [objective.metric for objective in objectives]
    if 1 < len(names) <= 3:
        caption = f"{' against '.join(names)}; the front has {len(study.best_trials)} trials."
        front.add(caption, plots.plot_pareto_front, study, target_names=names)
    for i, objective in enumerate(objectives):
        metric = objective.metric
        target: dict[str, Any] = {"target_name": metric}
        if len(objectives) > 1:  # Optuna wants to be told which
            target["target"] = lambda trial, i=i: trial.values[i]
        caption = f"{metric}, to {objective.direction}, in the order of the trials."
        history.add(caption, plots.plot_optimization_history, study, **target)
        varied = _varied_keys(trials)
        importances.text = _why_no_importances(trials, varied, i, metric)
        if not importances.text:
            importances.add(
                f"How far each key's values in the best tenth by {metric} differ from those in all "
                f"{len(trials)} finished trials (PED-ANOVA). Shares add up to 1 also where nothing "
                "matters.",
                plots.plot_param_importances, study, PedAnovaImportanceEvaluator(), varied, **target
            )  # fmt: skip
        for key in dict.fromkeys(key for trial in trials for key in trial.params):
            caption = f"{metric} over {key}; all other keys vary too."
            slices.add(caption, plots.plot_slice, study, params=[key], **target)
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        caption = f"{names[0]} at each validation, a line for each trial."
        curves.add(caption, plots.plot_intermediate_values, study)
    else:
        curves.text = "No trial reported an intermediate value."
    return [*([front] if front.pictures else []), history, importances, slices, curves]


def _varied_keys(trials: list[FrozenTrial]) -> list[str]:
    """The keys that all trials have, and that have several values."""
    common = [key for key in trials[0].params if all(key in trial.params for trial in trials)]
    return [key for key in common if len({repr(trial.params[key]) for trial in trials}) > 1]


def _why_no_importances(
    trials: list[FrozenTrial], varied: list[str], objective: int, metric: str
) -> str:
    if len(trials) < LEAST_FOR_IMPORTANCES:
        least = f"Importances need at least {LEAST_FOR_IMPORTANCES} finished trials"
        return f"{least}; there are {len(trials)}."
    if len(varied) < 2:
        return "Importances compare keys, and fewer than two of them vary in all trials."
    if len({trial.values[objective] for trial in trials}) < 2:
        return f"All finished trials have the same {metric}, so no key can be important."
    return ""


def _draw(plot: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Have Optuna draw a figure; its SVG as a data URI."""
    import matplotlib
    import numpy as np
    from matplotlib import pyplot

    # Optuna's plots set a style for all figures to come, and are experimental since 2021.
    settings: Any = {"figure.figsize": (6.4, 4.0), "text.parse_math": False}  # a "$" is no formula
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = np.ravel(plot(*arguments, **options))[0]
        axes.set_title("")
        if len(axes.get_legend_handles_labels()[1]) > MOST_IN_LEGEND and axes.get_legend():
            axes.get_legend().remove()
        file = io.BytesIO()
        matplotlib.rcParams["svg.fonttype"] = "none"
        axes.figure.savefig(file, format="svg", bbox_inches="tight")
        pyplot.close(axes.figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
