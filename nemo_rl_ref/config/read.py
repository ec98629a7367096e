# SPDX-License-Identifier: Apache-2.0
"""A run's configuration: read from YAML with overrides, every key accounted for.

For example::

    config, report = read_config(path, overrides, used=["policy.model_name", "policy.optimizer"])
    print(report)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_rl_ref.config.keys import (
    ConfigKeyError,
    KeyReport,
    check_keys,
    flatten_keys,
    key_exists,
    nearest_key,
)
from nemo_rl_ref.config.lists import IGNORED, NOT_HERE
from nemo_rl_ref.upstream import load_keys
from nemo_rl_ref.utils.config import (
    OverridesError,
    load_config,
    parse_hydra_overrides,
    register_omegaconf_resolvers,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig


def read_config(
    path: str | Path,
    overrides: Sequence[str],
    used: Iterable[str],
    ignored: Mapping[str, str] = IGNORED,
    not_here: Mapping[str, str] = NOT_HERE,
) -> tuple[dict[str, Any], KeyReport]:
    """Load a YAML file, apply overrides, account for every key, resolve interpolations.

    Args:
        path: The file, in NeMo RL's form.
        overrides: Overrides of the command line, in Hydra's grammar.
        used: Patterns of the keys that the caller reads.
        ignored: Patterns of the keys that it knowingly ignores, with what they configure.
        not_here: Patterns of the switches that must be off, with what they turn on.

    Returns:
        The configuration in plain dictionaries and lists, and the report on its keys.

    Raises:
        ConfigKeyError: As `nemo_rl_ref.config.keys.check_keys`, or if a key is written with dots
            instead of nested, a used key has no value (``???``), or an interpolation cannot be
            resolved.
        OverridesError: As `apply_overrides`.
        FileNotFoundError: As `nemo_rl_ref.utils.config.load_config`.
        ValueError: As `nemo_rl_ref.utils.config.load_config`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_omegaconf_resolvers()
    config = load_config(path)
    if dotted := _dotted_keys(OmegaConf.to_container(config, resolve=False)):
        raise ConfigKeyError(
            "\n  ".join([f"{path}: keys with dots, which nothing reads:", *dotted])
        )
    config = apply_overrides(config, overrides)
    try:
        report = check_keys(config, used, ignored, overrides, not_here)
        resolved = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except ConfigKeyError as error:
        raise ConfigKeyError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        text, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ConfigKeyError(f"{path}: {f'{key}: ' if key else ''}{text}") from error
    empty = [key for key, value in flatten_keys(config).items() if value == "???"]
    if needed := [key for key in empty if key in report.used]:
        names = ", ".join(needed)
        raise ConfigKeyError(f"{path}: no value for {names}; give it as {needed[0]}=…")
    return resolved, report


def _dotted_keys(tree: Any, section: str = "") -> list[str]:
    """A line for each key of NeMo RL's that is written in one piece: as is, and as it should be."""
    lines = []
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        key, parts = f"{section}{name}", str(name).split(".")
        if len(parts) > 1 and (not section or key in load_keys()["keys"]):
            nested = ": {".join(parts) + ": …" + "}" * (len(parts) - 1)
            lines.append(f"{key}: got the key {name!r}, expected {nested}")
        lines += _dotted_keys(value, f"{key}.")
    return lines


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Apply overrides in Hydra's grammar; an error names the nearest key.

    Args:
        config: The configuration. It is changed, and closed to new keys from then on.
        overrides: The overrides, in order.

    Returns:
        `config`.

    Raises:
        OverridesError: As `nemo_rl_ref.utils.config.parse_hydra_overrides`, and with the key that
            was probably meant.
    """
    try:
        return parse_hydra_overrides(config, list(overrides))
    except OverridesError as error:
        raise OverridesError(f"{error}{_hint(config, error.line)}", error.line) from error


def _hint(config: DictConfig, line: str) -> str:
    """What to write instead of an override whose key `config` does not have, or nothing."""
    key = line.lstrip("~").partition("=")[0]
    keys = flatten_keys(config)
    if line.startswith("+") or any(known == key or known.startswith(f"{key}.") for known in keys):
        return ""
    if key_exists(key) and not line.startswith("~"):
        return f"\nNeMo RL has this key, this configuration does not: ++{line} adds it."
    nearest = nearest_key(key, keys)
    return f"\nThe nearest key is {nearest!r}." if nearest else ""
