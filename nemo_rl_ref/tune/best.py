# SPDX-License-Identifier: Apache-2.0
"""The best configuration of a study, as a YAML file and as overrides, both checked again. ::

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
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from nemo_rl_ref.tune._reading import Reading, values_of

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
        values: Every value that it sets, by dotted path.
        override_line: The same as one line of overrides in Hydra's grammar, quoted for a shell.
        config: The whole configuration, resolved, a plain dict.
        yaml: The same as text.
        rule: How it was chosen, in words.
        command: What trains with it from the configuration that was searched.
    """

    trial: int
    scores: dict[str, float]
    values: dict[str, Any]
    override_line: str
    config: dict[str, Any]
    yaml: str
    rule: str
    command: str


def choose(study: Study, rule: str | None = None) -> tuple[FrozenTrial, str]:
    """Choose the best trial of a study.

    Args:
        study: The study.
        rule: How to choose from a front of several objectives, see above. With one objective the
            trial with the best value is chosen, the earlier of equals, and bounds do not exist.

    Returns:
        The trial, and how it was chosen, in words.

    Raises:
        NoBest: If no trial is complete, or none keeps the bounds.
        ValueError: If the rule cannot be read, or names what is no objective.
    """
    return _choose(Reading(study), rule)


def _choose(reading: Reading, rule: str | None) -> tuple[FrozenTrial, str]:
    if not reading.finished:
        raise NoBest(f"study {reading.name!r}: no trial is complete, so there is no best one")
    if reading.single:
        if rule not in (None, "knee", reading.objectives[0]):
            raise ValueError(
                f"rule: got {rule!r}; the study has one objective, {reading.objectives[0]}, "
                "and its best value is the rule"
            )
        ranked = reading.ranked()
        if not ranked:
            raise NoBest(f"study {reading.name!r}: no complete trial has a finite value")
        extreme = "highest" if reading.sign(0) > 0 else "lowest"
        return ranked[0], f"the {extreme} {reading.objectives[0]}"
    if rule in (None, "knee"):
        return _knee(reading), (
            "the trial of the Pareto front nearest to the ideal point, each objective scaled to "
            "[0, 1] over the front"
        )
    return _bounded(reading, rule)


def _knee(reading: Reading) -> FrozenTrial:
    front = [t for t in reading.front if all(map(math.isfinite, t.values))]
    if not front:
        raise NoBest(f"study {reading.name!r}: no complete trial has finite values")
    columns = []
    for i in range(len(reading.directions)):
        scores = [reading.sign(i) * trial.values[i] for trial in front]
        best, width = max(scores), max(scores) - min(scores)
        columns.append([(best - score) / width if width else 0.0 for score in scores])
    distances = [math.hypot(*row) for row in zip(*columns, strict=True)]
    return front[distances.index(min(distances))]


def check_rule(rule: str | None, objectives: Sequence[str]) -> None:
    """Raise unless a rule can be read, before any trial runs.

    Args:
        rule: See the module.
        objectives: Names of the objectives.

    Raises:
        ValueError: If it cannot, with what was expected.
    """
    if rule not in (None, "knee"):
        _parse_rule(rule, objectives)


def _parse_rule(rule: str, names: Sequence[str]) -> tuple[int, list[tuple[int, str, float]]]:
    """The index of the objective, and the bounds: index, ``<=`` or ``>=``, number."""

    def index(name: str) -> int:
        if name not in names:
            raise ValueError(
                f"rule: got {name!r} in {rule!r}, expected knee, or one of the objectives "
                f"{', '.join(names)}"
            )
        return names.index(name)

    metric, _, conditions = rule.partition(" where ")
    bounds = []
    for condition in filter(None, re.split(r"\s+and\s+", conditions.strip())):
        match = re.fullmatch(r"(\S+?)\s*(<=|>=)\s*([-+.\deE]+)", condition)
        if match is None:
            raise ValueError(
                f"rule: got {condition!r} in {rule!r}, expected OBJECTIVE <= NUMBER or "
                f"OBJECTIVE >= NUMBER with an objective of {', '.join(names)}"
            )
        bounds.append((index(match[1]), match[2], float(match[3])))
    return index(metric.strip()), bounds


def _bounded(reading: Reading, rule: str) -> tuple[FrozenTrial, str]:
    objective, bounds = _parse_rule(rule, reading.objectives)
    kept = [
        trial
        for trial in reading.front
        if all((trial.values[i] <= b) if op == "<=" else (trial.values[i] >= b)
               for i, op, b in bounds)
    ]  # fmt: skip
    if not kept:
        raise NoBest(f"rule: no trial of the front keeps {rule.partition(' where ')[2]!r}")
    sign = reading.sign(objective)
    best = max(kept, key=lambda trial: (sign * trial.values[objective], -trial.number))
    where = f" among those with {rule.partition(' where ')[2].strip()}" if bounds else ""
    return best, f"the best {reading.objectives[objective]} on the Pareto front{where}"


def best_of(study: Study, rule: str | None = None) -> Best:
    """The best trial of a study with its configuration, checked.

    The YAML is loaded again and equals the configuration that was searched with the overrides of
    the trial; the override line is split as a shell does, parsed with Hydra's parser, and gives the
    same.

    Args:
        study: A study of this package.
        rule: How to choose from a front, see `choose`.

    Returns:
        What was chosen.

    Raises:
        NoBest: As `choose`.
        ValueError: If the study has no ``spec``, or YAML or override line do not give back the
            trial's configuration.
    """
    reading = Reading(study)
    return _best(reading, *_choose(reading, rule))


def best_from(study: Study, trial: FrozenTrial, how: str = "chosen by hand") -> Best:
    """As `best_of`, for a given trial."""
    return _best(Reading(study), trial, how)


def _best(reading: Reading, trial: FrozenTrial, how: str) -> Best:
    from nemo_rl_ref.tune.space import override_line

    if not reading.spec:
        raise ValueError(
            f"study {reading.name!r} has no attribute 'spec', so its configuration is not known; "
            "expected a study made by nemo_rl_ref.tune"
        )
    algorithm, path = reading.spec["algorithm"], reading.spec["config"]
    given = list(reading.spec["overrides"])
    _check_unchanged(reading, path, given)
    values = values_of(trial)
    line = override_line(values, _keys_of_both(path, given, algorithm))
    config = resolved_config(path, [*given, *shlex.split(line)])
    scores = dict(zip(reading.objectives, trial.values or (), strict=False))
    shown = ", ".join(f"{name} {value:.6g}" for name, value in scores.items())
    module = f"nemo_rl_ref.run_{'grpo' if algorithm == 'ppo' else algorithm}"
    words = ["python", "-m", module, "--config", str(path), *given]
    command = f"{shlex.join(words)} {line}".rstrip()
    comment = (
        f"# Trial {trial.number} of the study {reading.name!r}: {shown}.\n# Chosen as {how}.\n"
        f"# Made from {path}" + (f" with {' '.join(given)}" if given else "")
        + ("\n# and " + line if line else "") + "\n"
    )  # fmt: skip
    yaml = comment + _dump(config)
    _check_loads(yaml, config)
    return Best(trial.number, scores, values, line, config, yaml, how, command)


def _check_unchanged(reading: Reading, path: str, given: Sequence[str]) -> None:
    """Raise if the configuration is no longer what the study searched."""
    from nemo_rl_ref.config.keys import flatten_keys

    now = flatten_keys(resolved_config(path, given))
    then = reading.attributes.get("base") or {}
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
    from nemo_rl_ref.config.keys import flatten_keys
    from nemo_rl_ref.config.read import apply_overrides
    from nemo_rl_ref.upstream import load_manifest
    from nemo_rl_ref.utils.config import load_config

    ours = flatten_keys(apply_overrides(load_config(path), given))
    theirs = load_manifest()["configs"][NEMO_RL_CONFIGS[algorithm]]
    return {key: value for key, value in ours.items() if key in theirs}


def resolved_config(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration with overrides, resolved, as a plain dict.

    Args:
        path: A YAML file of NeMo RL's form.
        overrides: In Hydra's grammar.

    Raises:
        OverridesError: As `nemo_rl_ref.utils.config.parse_hydra_overrides`.
        FileNotFoundError: As `nemo_rl_ref.utils.config.load_config`.
    """
    from omegaconf import OmegaConf

    from nemo_rl_ref.config.read import apply_overrides
    from nemo_rl_ref.utils.config import load_config, register_omegaconf_resolvers

    register_omegaconf_resolvers()
    config = apply_overrides(load_config(path), overrides)
    return OmegaConf.to_container(config, resolve=True)


def _dump(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)


def _check_loads(text: str, config: Mapping[str, Any]) -> None:
    """The text, read as NeMo RL reads a file, is the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "best.yaml")
        path.write_text(text, encoding="utf-8")
        again = resolved_config(path, [])
    if again != config:
        different = sorted(k for k in {*again, *config} if again.get(k) != config.get(k))
        raise ValueError(
            f"the YAML of the best trial does not load as its configuration: {different} differ"
        )


def write_yaml(best: Best, path: str | Path) -> Path:
    """Write the configuration of a chosen trial, at once or not at all.

    Args:
        best: From `best_of`.
        path: The file. Its folder is made.

    Returns:
        The path.
    """
    path = Path(path)
    write_atomically(path, best.yaml)
    if resolved_config(path, []) != best.config:
        raise ValueError(f"{path} does not load as the configuration that was written to it")
    return path


def check_with_nemo_rl(
    line: str, algorithm: str, checkout: str | Path | None = None
) -> dict[str, Any]:
    """Load NeMo RL's own configuration of an algorithm with an override line.

    The line is split as a shell does, parsed by Hydra's own parser and applied as NeMo RL's
    ``parse_hydra_overrides`` does.

    Args:
        line: Overrides in Hydra's grammar, quoted for a shell.
        algorithm: ``sft``, ``dpo``, ``rm``, ``grpo`` or ``ppo``.
        checkout: A checkout of NeMo RL, whose file and loader are taken; else
            ``NEMO_RL_CHECKOUT``; else the keys and values of the file as they are in the manifest.

    Returns:
        The configuration, interpolations resolved.

    Raises:
        ValueError: If the algorithm is not one of these.
        OverridesError: If an override does not parse, or names a key that the file does not have.
    """
    from omegaconf import OmegaConf

    from nemo_rl_ref.config.read import apply_overrides
    from nemo_rl_ref.upstream import load_manifest
    from nemo_rl_ref.utils.config import register_omegaconf_resolvers

    if algorithm not in NEMO_RL_CONFIGS:
        raise ValueError(f"algorithm: got {algorithm!r}, expected one of {[*NEMO_RL_CONFIGS]}")
    overrides = shlex.split(line)
    checkout = checkout or os.environ.get("NEMO_RL_CHECKOUT")
    name = NEMO_RL_CONFIGS[algorithm]
    if checkout:
        return resolved_config(Path(checkout, "examples/configs", name), overrides)
    register_omegaconf_resolvers()
    config = OmegaConf.create({})
    for key, value in load_manifest()["configs"][name].items():
        OmegaConf.update(config, key, value, force_add=True)
    apply_overrides(config, overrides)
    return OmegaConf.to_container(config, resolve=True)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file whole: a reader sees the old one or the new one, also after a crash.

    Args:
        path: The file. Its folder is made.
        text: Its content, written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
