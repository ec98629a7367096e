# SPDX-License-Identifier: Apache-2.0
"""One HTML page that says what a study found; it works offline, in light and dark. ::

    write_report(study, "results/study/report.html")

The figures are Optuna's (``optuna.visualization.matplotlib``). What a study cannot say yet, such as
importances after three trials, the page says in words. A failed trial is listed with its reason and
is in no figure; the last value of a pruned one is not a result.
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
from nemo_rl_ref.tune.outcome.best import NoBest, best_from, choose, objectives_of, ranked
from nemo_rl_ref.tune.outcome.reevaluate import Reevaluation
from nemo_rl_ref.tune.search import quiet
from nemo_rl_ref.tune.spec import Objective
from nemo_rl_ref.tune.trial import cause_of

#: Below this number of complete trials importances are not shown: PED-ANOVA compares the best tenth
#: with all, and a tenth of fewer is not a distribution.
LEAST_FOR_IMPORTANCES = 20

_WORDS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Picture:
    """A figure: what it shows, in words, and its SVG as a data URI."""

    caption: str
    source: str


@dataclass
class Section:
    """A section of the page: figures, or a sentence in their place."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    text: str = ""


def write_report(
    study: Study,
    path: str | Path,
    *,
    reevaluation: Reevaluation | None = None,
    rule: str | None = None,
) -> Path:
    """Write the report of a study, whole or not at all.

    Args:
        study: A study of this package.
        path: The HTML file. Its folder is made.
        reevaluation: From `nemo_rl_ref.tune.outcome.reevaluate.reevaluate`, if that was done.
        rule: How to choose one trial of several objectives, see
            `nemo_rl_ref.tune.outcome.best.choose`.

    Returns:
        The path.

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

    Reasons that differ by numbers only are one cause, under the first one's words. A trial without
    a reason was interrupted, or its process died; where it was run again, its new number is named.
    """
    trials = study.get_trials(deepcopy=False)
    with quiet():
        again = {
            n: t.number for t in trials for n in RetryHeartbeatStaleTrialCallback.retry_history(t)[-1:]
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
    sections = [Section("History"), Section("Which keys matter"), Section("Value against each key")]
    if len(objectives) > 1:
        front = Section("Pareto front")
        if len(objectives) <= 3:
            names = [objective.metric for objective in objectives]
            caption = f"{' against '.join(names)}; the front has {len(study.best_trials)} trials."
            front.pictures.append(
                _draw(caption, lambda: plots.plot_pareto_front(study, target_names=names))
            )
        sections.insert(0, front)
    for i, objective in enumerate(objectives):
        target: dict[str, Any] = {"target_name": objective.metric}
        if len(objectives) > 1:  # Optuna wants to be told which
            target["target"] = lambda trial, i=i: trial.values[i]
        history, importances, slices = sections[-3:]
        history.pictures.append(
            _draw(
                f"{objective.metric}, to {objective.direction}, in the order of the trials.",
                lambda target=target: plots.plot_optimization_history(study, **target),
            )
        )
        _add_importances(importances, study, trials, i, objective.metric, target)
        keys = dict.fromkeys(key for trial in trials for key in trial.params)
        slices.pictures += [
            _draw(
                f"{objective.metric} over {key}; all other keys vary too.",
                lambda key=key, target=target: plots.plot_slice(study, params=[key], **target),
            )
            for key in keys
        ]
    curves = Section("Intermediate values")
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        caption = f"{objectives[0].metric} at each validation, a line for each trial."
        curves.pictures.append(
            _draw(caption, lambda: plots.plot_intermediate_values(study), legend=False)
        )
    else:
        curves.text = "No trial reported an intermediate value."
    return [*sections, curves]


def _add_importances(
    section: Section,
    study: Study,
    trials: list[FrozenTrial],
    objective: int,
    metric: str,
    target: dict[str, Any],
) -> None:
    from optuna.visualization import matplotlib as plots

    drawn = {key for key in trials[0].params if all(key in trial.params for trial in trials)}
    varied = [key for key in drawn if len({repr(trial.params[key]) for trial in trials}) > 1]
    if len(trials) < LEAST_FOR_IMPORTANCES:
        section.text = (
            f"Importances need at least {LEAST_FOR_IMPORTANCES} finished trials; there are "
            f"{len(trials)}."
        )
    elif len(varied) < 2:
        section.text = "Importances compare keys, and fewer than two of them vary in all trials."
    elif len({trial.values[objective] for trial in trials}) < 2:
        section.text = f"All finished trials have the same {metric}, so no key can be important."
    else:
        caption = (
            f"How far each key's values in the best tenth by {metric} differ from those in all "
            f"{len(trials)} finished trials (PED-ANOVA). Shares add up to 1 also where nothing "
            "matters."
        )
        section.pictures.append(
            _draw(
                caption,
                lambda: plots.plot_param_importances(
                    study, PedAnovaImportanceEvaluator(), varied, **target
                ),
            )
        )


def _draw(caption: str, plot: Callable[[], Any], *, legend: bool = True) -> Picture:
    """Have Optuna draw a figure, and keep it as SVG."""
    import matplotlib
    import numpy as np
    from matplotlib import pyplot

    # Optuna's plots set a style for all figures to come, are experimental since 2021, and its
    # importances warn that less is better.
    with matplotlib.rc_context({"figure.figsize": (6.4, 4.0)}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = np.ravel(plot())
        axes[0].set_title("")
        if not legend and axes[0].get_legend() is not None:
            axes[0].get_legend().remove()
        file = io.BytesIO()
        matplotlib.rcParams["svg.fonttype"] = "none"
        axes[0].figure.savefig(file, format="svg", bbox_inches="tight")
        pyplot.close(axes[0].figure)
    encoded = base64.b64encode(file.getvalue()).decode()
    return Picture(caption, f"data:image/svg+xml;base64,{encoded}")
