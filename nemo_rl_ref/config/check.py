# SPDX-License-Identifier: Apache-2.0
"""Somebody's NeMo RL configuration, key by key: does it exist, fit, and is it read?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_rl_ref.config.clashes import find_clashes
from nemo_rl_ref.config.keys import flatten_keys, key_exists, nearest_key, without_indices
from nemo_rl_ref.config.read import apply_overrides
from nemo_rl_ref.config.types import declared_defaults, declared_types, fits, key_types
from nemo_rl_ref.upstream import load_keys
from nemo_rl_ref.upstream.readers import load_readers
from nemo_rl_ref.utils.config import load_config, register_omegaconf_resolvers


@dataclass(frozen=True)
class KeyFact:
    """What is known about a key of a configuration.

    Attributes:
        key: With dots.
        value: In this configuration.
        types: What NeMo RL takes, as words; empty if it does not say.
        default: Of NeMo RL's class, as its source has it; None if there is none.
        read: The line of NeMo RL that reads it, or how else it is read.
        problem: ``unknown``, ``wrong type``, ``dead`` or ``clash``; empty if there is none.
        says: The problem in words.
    """

    key: str
    value: Any
    types: str
    default: str | None
    read: str
    problem: str = ""
    says: str = ""


def check_config(path: str | Path, overrides: Sequence[str] = ()) -> list[KeyFact]:
    """Look up every key of a configuration, with nothing but what is recorded about NeMo RL.

    Args:
        path: A YAML file, in NeMo RL's form; ``defaults`` in it is followed.
        overrides: In Hydra's grammar.

    Returns:
        One entry a key, in order.

    Raises:
        FileNotFoundError: As `nemo_rl_ref.utils.config.load_config`.
        OverridesError: As `nemo_rl_ref.config.read.apply_overrides`.
        ValueError: As `nemo_rl_ref.utils.config.load_config`, or if a reference cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_omegaconf_resolvers()
    config = apply_overrides(load_config(path), overrides)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    clashes: dict[str, str] = {}
    for clash in find_clashes(plain):
        said = f"does not go with {', '.join(clash.keys[1:])}: {clash.says}"
        clashes.setdefault(clash.keys[0], f"{said} ({clash.file}:{clash.line})")
    return [_fact(key, value, clashes.get(key)) for key, value in flatten_keys(plain).items()]


def _fact(key: str, value: Any, clash: str | None) -> KeyFact:
    pattern = _pattern(key)
    read = "passed on" if ".env_vars." in key else load_readers().get(pattern, "passed on")
    where = {"passed on": "with its section", "name": "by name", None: "nothing"}
    known = f"{read[0][0]}:{read[0][1]}" if isinstance(read, list) else where[read]
    types = key_types(key)
    fact = KeyFact(key, value, " or ".join(sorted(types)), declared_defaults().get(pattern), known)
    problem, says = "", ""
    if not key_exists(key):
        nearest = nearest_key(without_indices(key), load_keys()["keys"])
        problem, says = (
            "unknown",
            f"NeMo RL has no such key{f'; nearest: {nearest}' if nearest else ''}",
        )
        fact = KeyFact(key, value, "", None, "nothing")
    elif value not in ("???", None) and not fits(value, declared_types(pattern)):
        problem, says = "wrong type", f"got {value!r}, expected {fact.types}"
    elif clash:
        problem, says = "clash", clash
    elif read is None:
        problem, says = "dead", "no line of NeMo RL was found that reads it"
    return KeyFact(**{**asdict(fact), "problem": problem, "says": says})


@cache
def _wild() -> dict[str, re.Pattern[str]]:
    keys = [key for key in load_keys()["keys"] if "*" in key.split(".")]
    return {key: re.compile(re.escape(key).replace(r"\*", r"[^.]+")) for key in keys}


def _pattern(key: str) -> str:
    """The key as ``keys.json`` has it, with ``*`` for any name."""
    plain = without_indices(key)
    if plain in load_readers():
        return plain
    return next((key for key, shape in _wild().items() if shape.fullmatch(plain)), plain)


def failed(facts: Sequence[KeyFact] | Sequence[Mapping[str, Any]]) -> bool:
    """Whether NeMo RL would refuse the configuration, or do something else than it says."""
    problems = {fact["problem"] if isinstance(fact, Mapping) else fact.problem for fact in facts}
    return bool(problems & {"unknown", "wrong type", "clash"})
