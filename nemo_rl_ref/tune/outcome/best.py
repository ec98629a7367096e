# SPDX-License-Identifier: Apache-2.0
"""The best configuration of a study, as a YAML file and as overrides, both checked again.

For example::

    best = best_of(study)
    print(best.override_line)
    write_yaml(best, "results/best.yaml")

With several objectives there is a front of best trials, and one is chosen by a rule that is stated:

``knee``
    The trial nearest to the ideal point, after each objective is scaled to [0, 1] over the front.
    The default.
``METRIC``
    The best of the front in this objective.
``METRIC where OTHER <= NUMBER`` (or ``>=``, and several joined by ``and``)
    The same among those that keep the bounds: ``val:accuracy where train:kl_penalty <= 0.05``.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.config.keys import flatten_keys
from nemo_rl_ref.config.read import apply_overrides
from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.tune.space import override_line
from nemo_rl_ref.tune.spec import Objective
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils.config import load_config, register_omegaconf_resolvers

#: The file that NeMo RL's script of an algorithm takes where none is given.
NEMO_RL_CONFIGS = {
    "sft": "sft.yaml",
    "dpo": "dpo.yaml",
    "rm": "rm.yaml",
    "grpo": "grpo_math_1B.yaml",
    "ppo": "ppo_math_1B.yaml",
}


class NoBest(ValueError):
    """A study has no trial to choose."""


@dataclass(frozen=True)
class Best:
    """A chosen trial and its configuration.

    Attributes:
        trial: Its number.
        scores: Its values by objective.
        step: The step at which they were measured, the trial's last; None if it is not known.
        values: Every value that it sets, by key.
        override_line: The same in Hydra's grammar, quoted for a shell.
        config: The whole configuration, resolved, a plain dict.
        yaml: The same as text.
        rule: How it was chosen, in words.
        command: What trains with it from the configuration that was searched.
    """

    trial: int
    scores: dict[str, float]
    step: int | None
    values: dict[str, Any]
    override_line: str
    config: dict[str, Any]
    yaml: str
    rule: str
    command: str


def written_spec(study: Study) -> dict[str, Any]:
    """Read what a study of this package searches, as it wrote it."""
    if "spec" not in study.user_attrs:
        raise ValueError(
            f"study {study.study_name!r} has no attribute 'spec', so its configuration is not "
            "known; expected a study made by nemo_rl_ref.tune"
        )
    return study.user_attrs["spec"]


def objectives_of(study: Study) -> list[Objective]:
    """Read the objectives of a study."""
    return [Objective.parse(text) for text in written_spec(study)["objectives"]]


def ranked(study: Study) -> list[FrozenTrial]:
    """List the complete trials whose values are finite, the best in the first objective first."""
    sign = -1 if objectives_of(study)[0].direction == "maximize" else 1
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    usable = [trial for trial in trials if all(map(math.isfinite, trial.values))]
    return sorted(usable, key=lambda trial: (sign * trial.values[0], trial.number))


def differing_steps(study: Study) -> str:
    """Say that complete trials were measured at different steps; empty if they were not."""
    steps = sorted({trial.user_attrs.get("steps", 0) for trial in ranked(study)})
    if len(steps) < 2:
        return ""
    return (
        f"The trials ended at different steps, {steps[0]} to {steps[-1]}, and each value is of its "
        "trial's last step: a difference may be one of length"
    )


def choose(study: Study, rule: str | None = None) -> tuple[FrozenTrial, str]:
    """Choose the best trial of a study by a rule, see above; of equal ones the earlier.

    Returns:
        The trial, and how it was chosen, in words.

    Raises:
        NoBest: If no trial is complete with finite values, or none keeps the bounds.
        ValueError: As `parse_rule`.
    """
    objectives, trials = objectives_of(study), ranked(study)
    metrics = [objective.metric for objective in objectives]
    if not trials:
        raise NoBest(f"study {study.study_name!r}: no trial is complete, so there is no best one")
    if len(objectives) == 1:
        if rule not in (None, "knee", *metrics):
            raise ValueError(
                f"rule: got {rule!r}; the study has one objective, {metrics[0]}, and its best "
                "value is the rule"
            )
        extreme = "highest" if objectives[0].direction == "maximize" else "lowest"
        same = sum(trial.values == trials[0].values for trial in trials) - 1
        ties = f", which {same} other trial{'s have' if same > 1 else ' has'} too, the earliest"
        return trials[0], f"the {extreme} {metrics[0]}{ties if same else ''}"
    signs = [1 if objective.direction == "maximize" else -1 for objective in objectives]
    numbers = {trial.number for trial in study.best_trials}
    front = [trial for trial in trials if trial.number in numbers]
    parsed = parse_rule(rule, metrics)
    if parsed is None:
        return _knee(front, signs), (
            "the trial of the Pareto front nearest to the ideal point, each objective scaled to "
            "[0, 1] over the front"
        )
    at, bounds = parsed
    keeps = {"<=": float.__le__, ">=": float.__ge__}
    kept = [t for t in front if all(keeps[op](t.values[i], bound) for i, op, bound in bounds)]
    where = (rule or "").partition(" where ")[2].strip()
    if not kept:
        raise NoBest(f"rule: no trial of the front keeps {where!r}")
    best = max(kept, key=lambda trial: (signs[at] * trial.values[at], -trial.number))
    among = f" among those with {where}" if bounds else ""
    return best, f"the best {metrics[at]} on the Pareto front{among}"


def _knee(front: Sequence[FrozenTrial], signs: Sequence[int]) -> FrozenTrial:
    columns = []
    for i, sign in enumerate(signs):
        scores = [sign * trial.values[i] for trial in front]
        best, width = max(scores), max(scores) - min(scores)
        columns.append([(best - score) / width if width else 0.0 for score in scores])
    distances = [math.hypot(*row) for row in zip(*columns, strict=True)]
    return front[distances.index(min(distances))]


def parse_rule(
    rule: str | None, metrics: Sequence[str]
) -> tuple[int, list[tuple[int, str, float]]] | None:
    """Read a rule, so that a wrong one is refused before any trial runs.

    Returns:
        The index of the objective among the metrics, and the bounds: index, ``<=`` or ``>=``,
        number; None for the knee.

    Raises:
        ValueError: If it cannot be read, with what was expected.
    """
    if rule in (None, "knee"):
        return None

    def index(name: str) -> int:
        if name not in metrics:
            raise ValueError(
                f"rule: got {name!r} in {rule!r}, expected knee, or one of the objectives "
                f"{', '.join(metrics)}"
            )
        return metrics.index(name)

    metric, _, conditions = rule.partition(" where ")
    bounds = []
    for condition in filter(None, re.split(r"\s+and\s+", conditions.strip())):
        match = re.fullmatch(r"(\S+?)\s*(<=|>=)\s*([-+.\deE]+)", condition)
        if match is None:
            raise ValueError(
                f"rule: got {condition!r} in {rule!r}, expected OBJECTIVE <= NUMBER or "
                f"OBJECTIVE >= NUMBER with an objective of {', '.join(metrics)}"
            )
        bounds.append((index(match[1]), match[2], float(match[3])))
    return index(metric.strip()), bounds


def best_of(study: Study, rule: str | None = None) -> Best:
    """Take the best trial of a study, see `choose`, with its configuration.

    Raises:
        ValueError: As `choose`, or if the study has no ``spec``, the configuration has changed
            since, or the YAML does not load as the trial's configuration.
    """
    return best_from(study, *choose(study, rule))


def best_from(study: Study, trial: FrozenTrial, how: str = "chosen by hand") -> Best:
    """Take a given trial as `best_of` takes the best one."""
    spec = written_spec(study)
    algorithm, path, given = spec["algorithm"], spec["config"], list(spec["overrides"])
    _check_unchanged(study, path, given)
    values = trial.user_attrs["values"]
    line = override_line(values, _keys_of_both(path, given, algorithm))
    config = resolved_config(path, [*given, *shlex.split(line)])
    metrics = [objective.metric for objective in objectives_of(study)]
    scores: dict[str, float] = dict(zip(metrics, trial.values or (), strict=False))
    step = trial.user_attrs.get("steps")
    shown = describe_scores(scores, step)
    module = f"nemo_rl_ref.run_{'grpo' if algorithm == 'ppo' else algorithm}"
    words = ["python", "-m", module, "--config", str(path), *given]
    command = f"{shlex.join(words)} {line}".rstrip()
    comment = (
        f"# Trial {trial.number} of the study {study.study_name!r}: {shown}.\n"
        f"# Chosen as {how}.\n# Made from {path}" + (f" with {' '.join(given)}" if given else "")
        + ("\n# and " + line if line else "")
    )  # fmt: skip
    lines = [text if text.startswith("# ") else f"# {text}" for text in comment.splitlines()]
    text = "\n".join([*lines, _dump(config)])  # a value may hold the end of a line
    with tempfile.TemporaryDirectory() as folder:
        write_text(copy := Path(folder, "best.yaml"), text)
        if resolved_config(copy, []) != config:
            raise ValueError("the YAML of the best trial does not load as its configuration")
    return Best(trial.number, scores, step, values, line, config, text, how, command)


def describe_scores(scores: Mapping[str, float], step: int | None) -> str:
    """Write values with their step: ``val:accuracy 0.91 at step 60``."""
    at = f" at step {step}" if step else ""
    return ", ".join(f"{name} {value:.6g}" for name, value in scores.items()) + at


def _check_unchanged(study: Study, path: str, given: Sequence[str]) -> None:
    """Raise if the configuration is no longer what the study searched."""
    now, then = flatten_keys(resolved_config(path, given)), study.user_attrs.get("base") or {}
    different = [
        f"{key}: {value!r} then, {now.get(key, 'absent')!r} now"
        for key, value in then.items()
        if now.get(key, "absent") != value
    ]
    if different:
        raise ValueError(
            f"{path} has changed since the study began: {'; '.join(different[:5])}; expected the "
            "configuration that was searched"
        )


def _keys_of_both(path: str, given: Sequence[str], algorithm: str) -> dict[str, Any]:
    """The keys that the searched configuration and NeMo RL's own file have; others need ``++``."""
    ours = flatten_keys(apply_overrides(load_config(path), given))
    theirs = load_manifest()["configs"][NEMO_RL_CONFIGS[algorithm]]
    return {key: value for key, value in ours.items() if key in theirs}


def resolved_config(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Load a YAML file of NeMo RL's form with overrides, resolved, as a plain dict."""
    register_omegaconf_resolvers()
    config = apply_overrides(load_config(path), overrides)
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _dump(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)


def write_yaml(best: Best, path: str | Path) -> Path:
    """Write the configuration of a chosen trial, whole or not at all; returns the path."""
    write_text(path, best.yaml)
    return Path(path)
