# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's YAML files: inheritance, interpolation, overrides on the command line.

For example::

    register_omegaconf_resolvers()
    config = parse_hydra_overrides(load_config("dpo.yaml"), ["dpo.sft_loss_weight=0.1"])

A file names its parents under ``defaults``, relative to its own folder. They are merged in order,
the file itself last. A section of the top level with ``_override_: true`` replaces its parent's
section instead of being merged into it. Interpolations such as ``${policy.precision}`` stay as
written and follow later changes; the resolvers are needed when they are read.

Needs omegaconf and hydra-core: ``pip install '.[train]'``.
"""

from __future__ import annotations

import getpass
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from omegaconf import DictConfig


#: The most values of a file. An alias of an alias of an alias soon stands for billions.
MAX_VALUES = 100_000


class OverridesError(Exception):
    """An override that Hydra's grammar does not have, or that does not fit the configuration.

    Attributes:
        line: The override.
    """

    def __init__(self, message: str, line: str = ""):
        super().__init__(message)
        self.line = line


def resolve_path(base_path: Path, path: str) -> Path:
    """A path of a ``defaults`` list: as it is if it begins with ``/``, else below `base_path`."""
    return Path(path) if path.startswith("/") else base_path / path


def merge_with_override(base_config: DictConfig, override_config: DictConfig) -> DictConfig:
    """Merges two configurations; the second wins.

    Args:
        base_config: The parent. Loses the sections that are replaced.
        override_config: The child. A section of its top level with ``_override_: true`` replaces
            the parent's; the marker is removed. Deeper markers have no effect, as in NeMo RL.

    Returns:
        The merged configuration. Interpolations and mandatory values (``???``) stay as they are.
    """
    from omegaconf import DictConfig, OmegaConf

    for key in list(override_config.keys()):
        if OmegaConf.is_missing(override_config, key):
            continue
        if OmegaConf.is_interpolation(override_config, key):  # pyright: ignore
            continue
        section = override_config[key]
        if isinstance(section, DictConfig) and section.get("_override_", False):
            del section["_override_"]
            base_config.pop(key, None)
    return cast("DictConfig", OmegaConf.merge(base_config, override_config))


def load_config(config_path: str | Path) -> DictConfig:
    """Reads a YAML file and the files it inherits from.

    Args:
        config_path: The file.

    Returns:
        The merged configuration, interpolations unresolved, without the key ``defaults``.

    Raises:
        FileNotFoundError: If the file or one of its parents does not exist.
        ValueError: If a file is not YAML in UTF-8, not a mapping, inherits from itself, or has
            more than `MAX_VALUES` values once its aliases are written out. The message names the
            file and what names it under ``defaults``.
    """
    return load_config_with_inheritance(config_path)


def load_config_with_inheritance(
    config_path: str | Path, base_dir: str | Path | None = None
) -> DictConfig:
    """`load_config`, with another folder for the relative paths in ``defaults``.

    Args:
        config_path: The file.
        base_dir: Folder of this file's parents; its own folder if not given. Parents look for
            theirs in their own folder in any case.

    Returns:
        The merged configuration.

    Raises:
        FileNotFoundError: As `load_config`.
        ValueError: As `load_config`.
    """
    path = Path(config_path)
    return _load(path, path.parent if base_dir is None else Path(base_dir), ())


def _load(path: Path, base_dir: Path, heirs: tuple[Path, ...]) -> DictConfig:
    """Loads `path`, which the last of `heirs` inherits from."""
    import yaml
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wanted_by = f", which {heirs[-1]} names under defaults" if heirs else ""
    if path.resolve() in (heir.resolve() for heir in heirs):
        chain = " -> ".join(str(p) for p in (*heirs, path))
        raise ValueError(f"defaults: {path} inherits from itself: {chain}")
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}{wanted_by}")
    where = f"{path}{wanted_by}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "*" in text and _count(yaml.compose(text, Loader=yaml.SafeLoader)) > MAX_VALUES:
            raise ValueError(f"{where}: its aliases stand for more than {MAX_VALUES} values")
        config = OmegaConf.load(io.StringIO(text))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deeply, or an alias contains itself") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{where}: cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{where}: got a list, expected a mapping of keys to values")
    if "defaults" not in config:
        return config
    parents = config.pop("defaults")
    if not isinstance(parents, ListConfig):
        parents = [parents]
    merged = OmegaConf.create({})
    for parent in parents:
        if not isinstance(parent, str):
            raise ValueError(f"{path}: defaults has {parent!r}, expected paths of YAML files")
        parent_path = resolve_path(base_dir, parent)
        merged = merge_with_override(merged, _load(parent_path, parent_path.parent, (*heirs, path)))
    return merge_with_override(merged, config)


def _count(node: Any, counted: dict[int, int] | None = None) -> int:
    """The number of values below a node of YAML's, those of an alias every time it is named."""
    counted = {} if counted is None else counted
    if id(node) not in counted:
        parts = node.value if isinstance(getattr(node, "value", None), list) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        counted[id(node)] = 1 + sum(_count(part, counted) for pair in pairs for part in pair)
    return counted[id(node)]


def parse_hydra_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Applies overrides in Hydra's grammar, parsed and applied by Hydra's own code.

    ``key=value`` changes a key that exists, ``+key=value`` adds one that does not, ``++key=value``
    does either, ``~key`` deletes.

    Args:
        cfg: The configuration. It is changed, and closed to new keys from then on.
        overrides: The overrides, in order.

    Returns:
        `cfg`.

    Raises:
        OverridesError: With the first override that does not parse, names a key that does not
            exist or lists several values. `nemo_rl_ref.config.read.apply_overrides` adds the
            nearest key that does.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    OmegaConf.set_struct(cfg, True)
    parser = OverridesParser.create()
    for line in overrides:
        try:
            (override,) = parser.parse_overrides([line])
            if override.is_sweep_override():
                raise ValueError("it lists several values, which is a sweep; a run takes one")
            ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
        except Exception as error:  # Hydra's and OmegaConf's classes have no common base
            message = f"Failed to parse Hydra overrides: {line!r}: {error}".rstrip()
            raise OverridesError(message, line) from error
    return cfg


def register_omegaconf_resolvers() -> None:
    """Registers what NeMo RL's files compute with: ``${mul:2,${policy.batch}}`` and the like.

    ``add``, ``mul``, ``div`` (true division) and ``max`` of two values, as in NeMo RL's function of
    this name, and ``user``, the login name that its Kubernetes launcher registers. A resolver that
    exists already stays. ``${oc.env:NAME}`` is OmegaConf's own.
    """
    from omegaconf import OmegaConf

    resolvers: dict[str, Any] = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "max": lambda a, b: max(a, b),
        "user": _user_name,
    }
    for name, function in resolvers.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, function)


def _user_name() -> str:
    """The login name with dashes for underscores and dots, as names of Kubernetes objects have."""
    name = os.environ.get("NRL_K8S_USER") or getpass.getuser()
    return name.lower().replace("_", "-").replace(".", "-")
