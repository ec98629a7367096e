# SPDX-License-Identifier: Apache-2.0
"""What a study searches: an algorithm, a configuration, a space and what is to be best.

`make_spec` checks all of it before anything runs: that the configuration can be used, that the
trainer reads every key that is searched, and that nothing is set twice.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_rl_ref.config.keys import KeyReport, flatten_keys, key_exists, nearest_key
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
_OURS = {"checkpointing": "a trial writes no checkpoints", "logger": "a trial has its own folder"}


class SpecError(ValueError):
    """A search that cannot be run. The message names what is wrong, and what it should be."""


@dataclass(frozen=True)
class Objective:
    """What is to be best: a metric, as ``checkpointing.metric_name`` has it, and a direction."""

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
        ``accuracy`` or ``reward`` is maximized, and others are a `SpecError`.
        """
        metric, _, direction = text.rpartition(":")
        if direction in ("maximize", "minimize") and ":" in metric:
            return cls(metric, direction)
        word = re.split(r"[^a-z]+", text.lower())[-1]
        if text.partition(":")[0] in ("train", "val") and word not in DIRECTIONS:
            if near := difflib.get_close_matches(word, DIRECTIONS, n=1):
                right = text[: len(text) - len(word)] + near[0]
                raise SpecError(f"objective: got {text}; did you mean {right}?")
            raise SpecError(
                f"objective: got {text}, whose name does not say which way is better; expected "
                f"{text}:maximize or {text}:minimize"
            )
        return cls(text, DIRECTIONS.get(word, "minimize"))

    def __str__(self) -> str:
        return f"{self.metric}:{self.direction}"


@dataclass(frozen=True)
class Spec:
    """A search. `make_spec`, which says what its parts are, makes and checks one."""

    algorithm: str
    config: str
    overrides: tuple[str, ...]
    space: Space
    objectives: tuple[Objective, ...]
    launcher: str = "here"
    loss: str | None = None
    env: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The search in JSON's types."""
        lists = {"overrides": [*self.overrides], "objectives": [*map(str, self.objectives)]}
        names = {"algorithm": self.algorithm, "config": self.config, "launcher": self.launcher}
        return {**names, **lists, "space": self.space.to_dict(), **self.code}

    @property
    def own_section(self) -> str:
        """The section in which a loss of one's own has its keys; empty without such a loss."""
        if not self.loss:
            return ""
        return "loss_fn" if self.algorithm in ("grpo", "ppo") else self.algorithm

    @property
    def options(self) -> dict[str, str]:
        """What a trainer gets besides the configuration: ``loss`` and ``env``, where given."""
        given = {"loss": self.loss, "env": self.env}
        return {name: text for name, text in given.items() if text}

    @property
    def code(self) -> dict[str, list[str]]:
        """Loss and reward, ``FILE.py:NAME`` and a sum over the file: another file, another search."""
        if not self.options:
            return {}
        from nemo_rl_ref.contract.user_code import find
        from nemo_rl_ref.training.identity import source_of

        return {
            name: [text, source_of(find(text, f"--{name}"))] for name, text in self.options.items()
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Spec:
        """The search that `to_dict` wrote, checked again; reads the configuration file."""
        names = ("algorithm", "config", "space", "objectives", "overrides", "launcher")
        code = {name: written[name][0] for name in ("loss", "env") if name in written}
        return make_spec(*(written[name] for name in names), **code)

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
    def validates_at_end(self) -> bool:
        """Whether trials validate after their last step: an objective is a ``val:`` metric."""
        return any(objective.metric.startswith("val:") for objective in self.objectives)

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
    *,
    loss: str | None = None,
    env: str | None = None,
) -> Spec:
    """Make a search and check it.

    Args:
        algorithm: ``sft``, ``dpo``, ``rm``, ``grpo`` or ``ppo``.
        config: A YAML file in NeMo RL's form.
        space: What is searched, or the YAML file or dictionary that says so.
        objectives: What is to be best, see `Objective.parse`; several make a search for a Pareto
            front.
        overrides: Overrides that all trials share, in Hydra's grammar.
        launcher: ``here``; or ``nemo-rl``, if trials run NeMo RL itself: then the space may have
            every key that NeMo RL has, also those that mean nothing to this package's trainers.
        loss: ``FILE.py:CLASS``, a loss to train with, whose own keys the space may have.
        env: ``FILE.py:FUNCTION``, a reward to train with, of GRPO and PPO.

    Raises:
        SpecError: If algorithm, objectives, loss or reward cannot be used.
        SpaceError: If the space cannot be used, or does not fit the configuration.
        ConfigKeyError: If the configuration cannot be used; an override is an ``OverridesError``.
    """
    if launcher not in LAUNCHERS:
        raise SpecError(f"launcher: got {launcher!r}, expected {' or '.join(LAUNCHERS)}")
    if algorithm not in ALGORITHMS:
        raise SpecError(f"algorithm: got {algorithm!r}, expected {', '.join(ALGORITHMS)}")
    found = tuple(Objective.parse(o) if isinstance(o, str) else o for o in objectives)
    metrics = [objective.metric for objective in found]
    if not found or len(set(metrics)) < len(metrics):
        raise SpecError(f"objective: got {metrics}, expected one or several different metrics")
    _check_code(algorithm, launcher, loss, env)
    options = {"launcher": launcher, "loss": loss, "env": env}
    spec = Spec(algorithm, str(config), tuple(overrides), Space({}), found, **options)
    sections = load_config(config)
    if algorithm not in sections:
        there = [name for name in ALGORITHMS if name in sections]
        raise SpecError(
            f"{config}: got a configuration of {', '.join(there) or 'something else'}, expected "
            f"the section {algorithm}"
        )
    tree, _ = _read(spec, overrides)
    base = flatten_keys(tree)
    if isinstance(space, Space):
        space = Space(space.entries, base)
    elif isinstance(space, (str, Path)):
        space = Space.read(space, base=base, own=spec.own_section)
    else:
        space = Space.from_dict(space, base=base, own=spec.own_section)
    _check_space(space, spec, base)
    spec = Spec(algorithm, str(config), tuple(overrides), space, found, **options)
    spec.__dict__["base"] = base  # what the cached property would read again
    return spec


def _check_code(algorithm: str, launcher: str, loss: str | None, env: str | None) -> None:
    """Raise unless the trainers take such a loss and such a reward, and both can be loaded."""
    if launcher == "nemo-rl" and (loss or env):
        raise SpecError("--loss and --env: not with NeMo RL itself, whose scripts take neither")
    if env and algorithm not in ("grpo", "ppo"):
        raise SpecError(f"--env: got {env} with {algorithm}, expected grpo or ppo")
    for option, text in (("--loss", loss), ("--env", env)):
        if text:
            from nemo_rl_ref.contract.user_code import find

            find(text, option)


def _check_own(spec: Spec, key: str, probe: Any) -> None:
    """Raise unless the loss reads a key that NeMo RL does not have."""
    from nemo_rl_ref.contract.build import build_loss
    from nemo_rl_ref.contract.user_code import UsageError, find

    kind = find(spec.loss or "", "--loss")
    try:
        if isinstance(kind, type):
            build_loss(kind, [f"{key.rpartition('.')[2]}={json.dumps(probe)}"])
    except UsageError as error:
        raise SpaceError(f"{key}: {error}") from error


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
        if key == f"{spec.algorithm}.val_at_end" and spec.validates_at_end:
            raise SpaceError(f"{key}: the search sets it: trials are compared by their last step")
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
    _, report = _read(spec, [*spec.overrides, *overrides(probes)])
    for key in space.entries:
        if _is_in(key, report.used):
            continue
        if key.rpartition(".")[0] == spec.own_section and not key_exists(key):
            _check_own(spec, key, probes[key])
            continue
        why = [f"ignored: {what}" for what, keys in report.ignored.items() if _is_in(key, keys)]
        same = [used for used in report.used if used.rpartition(".")[2] == key.rpartition(".")[2]]
        nearest = same[0] if same else nearest_key(key, report.used)
        raise SpaceError(
            f"{key}: got a key without effect here ({[*why, 'the trainer does not read it'][0]}), "
            f"expected one that the {spec.algorithm} trainer reads"
            + (f"; did you mean {nearest}?" if nearest else "")
        )


def _is_in(key: str, keys: Iterable[str]) -> bool:
    return any(other == key or other.startswith(f"{key}.") for other in keys)


def _probe(entry: Any) -> Any:
    """Some value that a key of the space may have."""
    return entry.values[0] if entry.search else 1 if entry.tie else entry.fixed
