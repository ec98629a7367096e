# SPDX-License-Identifier: Apache-2.0
"""Typed settings: how a configuration becomes pydantic models, and what is said of a wrong value.

`read_settings` reads a whole configuration into a class such as
`nemo_rl_ref.config.sections.DPOSettings`, once, before anything else is done with it::

    settings = read_settings(config, DPOSettings)
    settings.policy.max_grad_norm

Values mean what they mean in NeMo RL, whose configuration classes are pydantic's too: ``"false"``
in quotes is False, and ``${oc.env:STEPS}``, which is always text, is a number where one is wanted.
Unlike there, true and false are not taken for 1 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


class Section(BaseModel):
    """A section of a configuration. Further keys are kept: a loss of the user's may read them."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    def given(self) -> dict[str, Any]:
        """Return what the configuration says, read as its type, without the defaults."""
        return self.model_dump(exclude_unset=True)


class OpenSection(Section):
    """A section of which every key is used, whatever its name."""


def read_settings(config: Mapping[str, Any], *kinds: type[Settings]) -> Settings:
    """Read a configuration into typed settings.

    Args:
        config: The whole configuration, a plain mapping with all interpolations resolved.
        *kinds: The classes it may be: the first whose ``algorithm`` is a section, or the last.

    Returns:
        The settings. `config` is not changed.

    Raises:
        ValueError: If a value is missing, of a wrong type or out of range. The message has a line
            for each of them, with the key, what it got and what it should be.
    """
    algorithms = [str(kind.algorithm) for kind in kinds if hasattr(kind, "algorithm")]  # pyright: ignore
    if algorithms and not any(name in config for name in algorithms):
        raise ValueError(
            f"{' or '.join(algorithms)}: not set, expected a mapping; the configuration has "
            f"{', '.join(map(str, config)) or 'nothing'}"
        )
    named = (kind for kind in kinds[:-1] if getattr(kind, "algorithm", None) in config)
    kind, settings = next(named, kinds[-1]), None
    problems = dict(_switches_for_numbers(kind, config))
    try:
        settings = kind.model_validate(config)
    except ValidationError as error:
        problems = dict(_problems(kind, config, error)) | problems
    problems = dict(_not_numbers(config)) | problems
    if settings is None or problems:
        raise ValueError("\n".join(f"{key}: {text}" for key, text in problems.items()))
    return settings


def used_keys(*kinds: type[BaseModel]) -> tuple[str, ...]:
    """The patterns of the keys that runs with these settings use.

    Args:
        *kinds: Classes for `read_settings`.

    Returns:
        Their fields with dots, as `nemo_rl_ref.config.keys.check_keys` takes them.
    """

    def walk(kind: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in kind.model_fields.items():
            inner = _section_in(field.annotation)
            if inner is None or issubclass(inner, OpenSection):
                yield f"{prefix}{name}"
            else:
                yield from walk(inner, f"{prefix}{name}.")

    return tuple(dict.fromkeys(key for kind in kinds for key in walk(kind, "")))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds; None for a list of models, or if there is none."""
    is_union = get_origin(annotation) in (Union, UnionType)
    choices = get_args(annotation) if is_union else (annotation,)
    found = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if found and len(found) == len(set(choices) - {type(None)}) else None


def _switches_for_numbers(
    kind: type[BaseModel], tree: Any, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Key and problem of every number that is given as true or false, which pydantic accepts."""
    for name, field in kind.model_fields.items():
        value = tree.get(name) if isinstance(tree, Mapping) else None
        inner = _section_in(field.annotation)
        if inner:
            yield from _switches_for_numbers(inner, value, f"{prefix}{name}.")
        expected = _expected(field.annotation, field.metadata)
        if isinstance(value, bool) and ("integer" in expected or "number" in expected):
            yield f"{prefix}{name}", f"got {value!r}, expected {expected}"


def _not_numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and problem of every NaN, which no setting means, and no bound excludes."""
    if isinstance(tree, float) and math.isnan(tree):
        yield prefix, f"got {tree!r}, expected a number"
    entries = tree.items() if isinstance(tree, Mapping) else ()
    entries = enumerate(tree) if isinstance(tree, (list, tuple)) else entries
    for name, value in entries:
        yield from _not_numbers(value, f"{prefix}.{name}" if prefix else str(name))


def _problems(
    kind: type[BaseModel], config: Mapping[str, Any], error: ValidationError
) -> Iterator[tuple[str, str]]:
    """Key and problem of each entry of a pydantic error."""
    for entry in error.errors():
        key, annotation, metadata = [], kind, ()
        node: Any = config
        for part in entry["loc"]:
            inside = _is_in(part, node)
            if not inside and (entry["type"] != "missing" or part != entry["loc"][-1]):
                continue  # not a key: pydantic's name for one of several types
            key.append(str(part))
            node = node[part] if inside else None
            annotation, metadata = _field(annotation, part)
        if entry["type"] == "value_error":
            text = str(entry.get("ctx", {}).get("error"))
        elif entry["type"] == "extra_forbidden":
            text = f"got {entry['input']!r}, expected no such key"
        elif entry["type"] == "missing":
            text = f"not set, expected {_expected(annotation, metadata)}"
        else:
            text = f"got {entry['input']!r}, expected {_expected(annotation, metadata)}"
            if entry["type"] == "less_than" and "below" not in text:
                text += f" and below {entry.get('ctx', {}).get('lt')}"
        yield ".".join(key) or "configuration", text


def _is_in(part: str | int, node: Any) -> bool:
    """Whether a part of a pydantic location is a key of a section or an index of a list."""
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, (list, tuple)) and isinstance(part, int)


def _field(annotation: Any, part: str | int) -> tuple[Any, Any]:
    """What is declared for a key of a section or an entry of a list: its type and its bounds."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (list, tuple) and isinstance(part, int):
        return arguments[0], ()
    if get_origin(annotation) is dict:
        return arguments[1], ()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return (field.annotation, field.metadata) if field else (Any, ())
    for argument in arguments:  # Annotated, and unions
        if (found := _field(argument, part))[0] is not Any:
            return found
    return Any, ()


_NAMES = {bool: "true or false", str: "text", Path: "a path", type(None): "null"}


def _expected(annotation: Any, metadata: Any = ()) -> str:
    """What a value should be, in words: ``null or a number above 0``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in getattr(item, "metadata", [item])]
        return _expected(arguments[0], (*inner, *metadata))
    if said := [item for item in metadata if isinstance(item, str)]:
        return said[0]
    if origin in (Union, UnionType):
        kinds = sorted(arguments, key=lambda kind: kind is not type(None))
        return " or ".join(dict.fromkeys(_expected(kind, metadata) for kind in kinds))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if annotation in (int, float):
        bounds = {
            name: getattr(item, name)
            for item in metadata
            for name in ("gt", "ge", "lt", "le")
            if hasattr(item, name)
        }
        return _range("an integer" if annotation is int else "a number", **bounds)
    if origin is list:
        return f"a list, each {_expected(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        needed = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return "a mapping" + (f" with {', '.join(needed)}" if needed else "")
    return _NAMES.get(annotation, "a mapping" if origin is dict else "a value")


def _range(what: str, gt: Any = None, ge: Any = None, lt: Any = None, le: Any = None) -> str:
    if lt == 2**63:  # the end of the machine's integers, of which nobody needs to be told
        lt = None
    if lt is not None or le is not None:
        low = f"from {ge}" if ge is not None else f"above {gt}"
        return f"{what} {low} {f'to {le}' if le is not None else f'and below {lt}'}"
    if gt is not None:
        return f"{what} above {gt}"
    return f"{what} from {ge} on" if ge is not None else what
