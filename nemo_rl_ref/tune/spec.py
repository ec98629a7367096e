# SPDX-License-Identifier: Apache-2.0
"""What a study searches: an algorithm, a configuration, a space and what is to be best.

`make_spec` checks all of it before anything runs: that the configuration can be used, that the
trainer reads every key that is searched, and that nothing is set twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_rl_ref.config.keys import KeyReport, flatten_keys, nearest_key
from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.config.types import key_types, type_name
from nemo_rl_ref.tune.space import RANGES, Space, SpaceError, overrides
from nemo_rl_ref.tune.trainers import ALGORITHMS, runner_of
from nemo_rl_ref.utils.config import load_config

#: What runs a trial: this package's trainers, or NeMo RL itself.
LAUNCHERS = ("here", "nemo-rl")
#: Last words of a metric's name that say which way is better.
DIRECTIONS = {"loss": "minimize", "accuracy": "maximize", "reward": "maximize"}
#: Sections that the search itself sets.
_OURS = {
    "checkpointing": "a trial writes no checkpoints",
    "logger": "a trial has its own folder",
}


class SpecError(ValueError):
    """A search that cannot be run. The message names what is wrong, and what it should be."""


@dataclass(frozen=True)
class Objective:
    """What is to be best.

    Attributes:
        metric: Its name as in ``checkpointing.metric_name``: ``val:accuracy``, ``train:loss``.
        direction: ``maximize`` or ``minimize``.
    """

    metric: str
    direction: str

    def __post_init__(self) -> None:
        source, _, name = self.metric.partition(":")
        if source not in ("train", "val") or not name:
            raise SpecError(
                f"objective: got {self.metric!r}, expected train:NAME or val:NAME, as in "
                "checkpointing.metric_name"
            )
        if self.direction not in ("maximize", "minimize"):
            raise SpecError(
                f"objective {self.metric}: got direction {self.direction!r}, expected maximize or "
                "minimize"
            )

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read ``METRIC``, ``METRIC:maximize`` or ``METRIC:minimize``.

        Without a direction, a metric whose last word is ``loss`` is minimized, one that ends in
        ``accuracy`` or ``reward`` is maximized.

        Raises:
            SpecError: If the metric's name does not say which way is better.
        """
        metric, _, direction = text.rpartition(":")
        if direction in ("maximize", "minimize") and ":" in metric:
            return cls(metric, direction)
        word = re.split(r"[^a-z]+", text.lower())[-1]
        if text.partition(":")[0] in ("train", "val") and word not in DIRECTIONS:
            raise SpecError(
                f"objective: got {text}, whose name does not say which way is better; expected "
                f"{text}:maximize or {text}:minimize"
            )
        return cls(text, DIRECTIONS.get(word, "minimize"))

    def __str__(self) -> str:
        return f"{self.metric}:{self.direction}"


@dataclass(frozen=True)
class Spec:
    """A search. `make_spec` makes and checks one.

    Attributes:
        algorithm: ``sft``, ``dpo``, ``rm``, ``grpo`` or ``ppo``.
        config: A YAML file in NeMo RL's form.
        overrides: Overrides of it that all trials share, in Hydra's grammar.
        space: What is searched.
        objectives: What is to be best; several make a search for a Pareto front.
        launcher: ``here`` for this package's trainers, ``nemo-rl`` for NeMo RL itself, which reads
            more keys.
    """

    algorithm: str
    config: str
    overrides: tuple[str, ...]
    space: Space
    objectives: tuple[Objective, ...]
    launcher: str = "here"

    def to_dict(self) -> dict[str, Any]:
        """The search in JSON's types."""
        return {
            "algorithm": self.algorithm,
            "config": self.config,
            "overrides": list(self.overrides),
            "space": self.space.to_dict(),
            "objectives": [str(objective) for objective in self.objectives],
            "launcher": self.launcher,
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Spec:
        """The search that `to_dict` wrote, checked again; reads the configuration file."""
        return make_spec(
            written["algorithm"],
            written["config"],
            written["space"],
            written["objectives"],
            written["overrides"],
            written.get("launcher", "here"),
        )

    @cached_property
    def base(self) -> dict[str, Any]:
        """The configuration's values by key, the shared overrides applied."""
        return flatten_keys(_read(self, self.overrides)[0])

    @property
    def val_period(self) -> int:
        """Steps between two validations; 0 if there are none between, or trials differ in them."""
        return self._same_for_all("val_period") or 0

    @property
    def max_steps(self) -> int | None:
        """``max_num_steps``, if it is set and all trials have the same; a run may be shorter."""
        return self._same_for_all("max_num_steps")

    def _same_for_all(self, name: str) -> int | None:
        """A number of steps above 0 that the space fixes or the configuration has, or None."""
        key = f"{self.algorithm}.{name}"
        entry = self.space.entries.get(key)
        if entry is not None and (entry.search or entry.tie or entry.when):
            return None
        steps = self.base.get(key) if entry is None else entry.fixed
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def seed(self) -> int:
        """The seed of the configuration."""
        return self.base.get(f"{self.algorithm}.seed", 42)


def make_spec(
    algorithm: str,
    config: str | Path,
    space: Space | Mapping[str, Any] | str | Path,
    objectives: Sequence[Objective | str],
    overrides: Sequence[str] = (),
    launcher: str = "here",
) -> Spec:
    """Make a search and check it.

    Args:
        algorithm: ``sft``, ``dpo``, ``rm``, ``grpo`` or ``ppo``.
        config: A YAML file in NeMo RL's form.
        space: What is searched, or the YAML file or dictionary that says so.
        objectives: What is to be best, see `Objective.parse`.
        overrides: Overrides that all trials share, in Hydra's grammar.
        launcher: ``here``; or ``nemo-rl``, if trials run NeMo RL itself: then the space may have
            every key that NeMo RL has, also those that mean nothing to this package's trainers.

    Returns:
        The search.

    Raises:
        SpecError: If algorithm or objectives cannot be used.
        SpaceError: If the space cannot be used, or does not fit the configuration.
        ConfigKeyError: If the configuration cannot be used.
        OverridesError: If an override cannot be applied.
        OSError: If a file cannot be read.
    """
    if launcher not in LAUNCHERS:
        raise SpecError(f"launcher: got {launcher!r}, expected {' or '.join(LAUNCHERS)}")
    if algorithm not in ALGORITHMS:
        raise SpecError(f"algorithm: got {algorithm!r}, expected {', '.join(ALGORITHMS)}")
    found = tuple(Objective.parse(o) if isinstance(o, str) else o for o in objectives)
    metrics = [objective.metric for objective in found]
    if not found or len(set(metrics)) < len(metrics):
        raise SpecError(f"objective: got {metrics}, expected one or several different metrics")
    spec = Spec(algorithm, str(config), tuple(overrides), None, found, launcher)  # type: ignore[arg-type]
    sections = load_config(config)
    if algorithm not in sections:
        there = [name for name in ALGORITHMS if name in sections]
        raise SpecError(
            f"{config}: got a configuration of {', '.join(there) or 'something else'}, expected "
            f"the section {algorithm}"
        )
    tree, _ = _read(spec, overrides)
    base = flatten_keys(tree)
    if isinstance(space, (str, Path)):
        space = Space.read(space, base=base)
    else:
        written = space.to_dict() if isinstance(space, Space) else space
        space = Space.from_dict(written, base=base)
    _check_space(space, spec, base)
    spec = Spec(algorithm, str(config), tuple(overrides), space, found, launcher)
    spec.__dict__["base"] = base  # what the cached property would read again
    return spec


def _read(spec: Spec, lines: Sequence[str]) -> tuple[dict[str, Any], KeyReport]:
    """The configuration with overrides, its keys checked against what will read it."""
    if spec.launcher == "nemo-rl":  # no key is unknown to NeMo RL; what it reads, it decides
        return read_config(spec.config, lines, (), {}, {})
    runner = runner_of(spec.algorithm)
    return read_config(spec.config, lines, runner.used, not_here=runner.not_here)


def _check_space(space: Space, spec: Spec, base: Mapping[str, Any]) -> None:
    """Raise unless a trainer reads every key of the space, and nothing else sets one."""
    given = {text.lstrip("+~").partition("=")[0]: text for text in spec.overrides}
    for key, entry in space.entries.items():
        section = key.partition(".")[0]
        if section in _OURS:
            raise SpaceError(f"{key}: the search sets {section}: {_OURS[section]}")
        if key == f"{spec.algorithm}.seed":
            raise SpaceError(
                f"{key}: a seed that is searched finds a lucky run, not a good configuration; "
                "--vary-seed gives every trial its own"
            )
        for other, text in given.items():
            if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise SpaceError(f"{key}: set by the override {text} too, expected one of them")
        kind = type_name(base.get(key))
        if entry.search in RANGES and not key_types(key) and kind in ("str", "bool", "list"):
            raise SpaceError(
                f"{key}: {entry.search}: got a range of numbers, but the configuration has "
                f"{base[key]!r}; expected choice"
            )
    _check_read(space, spec)


def _check_read(space: Space, spec: Spec) -> None:
    """Raise if the trainer does not read a key of the space."""
    if spec.launcher == "nemo-rl":
        return
    probes = {key: _probe(entry) for key, entry in space.entries.items()}
    lines = [*spec.overrides, *overrides(probes)]
    _, report = _read(spec, lines)
    for key in space.entries:
        if any(used == key or used.startswith(f"{key}.") for used in report.used):
            continue
        raise SpaceError(
            f"{key}: got a key without effect here ({_why_not(key, report)}), expected one that "
            f"the {spec.algorithm} trainer reads{_nearest_read(key, report)}"
        )


def _why_not(key: str, report: KeyReport) -> str:
    for what, keys in report.ignored.items():
        if any(ignored == key or ignored.startswith(f"{key}.") for ignored in keys):
            return f"ignored: {what}"
    return "the trainer does not read it"


def _nearest_read(key: str, report: KeyReport) -> str:
    name = key.rpartition(".")[2]
    same = [used for used in report.used if used.rpartition(".")[2] == name]
    nearest = same[0] if same else nearest_key(key, report.used)
    return f"; did you mean {nearest}?" if nearest else ""


def _probe(entry: Any) -> Any:
    """Some value that a key of the space may have."""
    return entry.values[0] if entry.search else entry.fixed if entry.tie is None else 1
