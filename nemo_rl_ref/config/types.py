# SPDX-License-Identifier: Apache-2.0
"""What is known about a configuration key before anything runs: whether it exists, and its type.

NeMo RL's configuration classes declare the types of most keys. What they leave open, the arguments
of an optimizer for example, is judged by the values in NeMo RL's own configuration files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from nemo_rl_ref.config.keys import key_exists, nearest_key, with_indices, without_indices
from nemo_rl_ref.upstream import load_keys, load_manifest

#: Likeness from which a key that NeMo RL accepts without naming it is taken for a misspelt one.
_MISSPELT = 0.85
_SCALARS = {"int": "int", "float": "float", "bool": "bool", "str": "str", "None": "null"}


def problem_with_key(key: str) -> str | None:
    """Why a key cannot be searched: NeMo RL does not have it, or it is a section.

    Args:
        key: The key with dots, an entry of a list by its index.

    Returns:
        What it should have been, with the nearest key that exists; None if nothing is wrong.
    """
    pattern = without_indices(key)
    named = load_keys()["keys"]
    if not key_exists(key):
        return f"a key of NeMo RL's{_did_you_mean(nearest_key(pattern, named), key)}"
    if below := [known for known in named if known.startswith(f"{pattern}.")]:
        inside = with_indices(below[0], key)
        return f"a key with a value; it is a section, with {inside} and others in it"
    if not _is_named(key):
        section = pattern.rpartition(".")[0]
        beside = [known for known in named if known.rpartition(".")[0] == section]
        if nearest := nearest_key(pattern, beside, _MISSPELT):
            return f"a key that NeMo RL names{_did_you_mean(nearest, key)}"
    return None


def key_types(key: str) -> frozenset[str]:
    """The types a key's value may have: ``int float bool str list dict null``; empty if unknown."""
    pattern = without_indices(key)
    declared = _declared_types().get(pattern)
    return declared if declared is not None else _seen_types().get(pattern, frozenset())


def type_name(value: Any) -> str:
    """The type of a value in the words of `key_types`."""
    return "null" if value is None else type(value).__name__


def fits(value: Any, types: frozenset[str]) -> bool:
    """Whether a value has one of the types. A whole number is a real number too."""
    name = type_name(value)
    return not types or name in types or (name == "int" and "float" in types)


def _did_you_mean(nearest: str | None, key: str) -> str:
    return f"; did you mean {with_indices(nearest, key)}?" if nearest else ""


@cache
def _names() -> re.Pattern[str]:
    """Matches every key that NeMo RL names; ``*`` in ``keys.json`` stands for any one part."""
    keys = (re.escape(key).replace(r"\*", r"[^.]+") for key in load_keys()["keys"])
    return re.compile("|".join(keys))


def _is_named(key: str) -> bool:
    return _names().fullmatch(without_indices(key)) is not None


def _declared_types() -> dict[str, frozenset[str]]:
    """Types by key, as the classes below every ``MasterConfig`` declare them."""
    return _declared()[0]


def declared_types(pattern: str) -> frozenset[str]:
    """The types that NeMo RL's classes declare for a key of ``keys.json``; empty if none."""
    return _declared_types().get(pattern, frozenset())


def declared_defaults() -> dict[str, str]:
    """Defaults by key, as the source of those classes has them."""
    return _declared()[1]


@cache
def _declared() -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    symbols = load_manifest()["symbols"]
    classes = {name.rpartition(".")[2]: symbol for name, symbol in symbols.items()}
    found: dict[str, set[str]] = {}
    defaults: dict[str, str] = {}

    def walk(fields: dict[str, Any], prefix: str, inside: tuple[str, ...]) -> None:
        for name, field in fields.items():
            annotation = field.get("type") or ""
            # Below dict[…] and list[…] are entries, not the value itself.
            outer = re.sub(
                r"(dict|list|Mapping|Sequence|tuple)\[.*?\](?=[\s|\]]|$)", r"\1", annotation
            )
            words = re.findall(r"\w+", outer)
            types = {_SCALARS[word] for word in words if word in _SCALARS}
            types |= {"null"} if "Optional" in words else set()
            types |= {"list"} if {"list", "Sequence", "tuple"} & set(words) else set()
            types |= {"dict"} if {"dict", "Mapping"} & set(words) else set()
            key = f"{prefix}{name}"
            if field.get("default") is not None:
                defaults.setdefault(key, field["default"])
            known = {*_SCALARS, "Optional", "NotRequired", "Required", "Annotated"}
            known |= {"list", "Sequence", "tuple", "dict", "Mapping"}
            if set(words) <= known:
                found.setdefault(key, set()).update(types)
            for word in words:
                if word in classes and word not in inside:
                    walk(classes[word].get("fields", {}), f"{key}.", (*inside, word))

    for name, symbol in symbols.items():
        if name.endswith(".MasterConfig"):
            walk(symbol["fields"], "", ())
    return {key: frozenset(types) for key, types in found.items()}, defaults


@cache
def _seen_types() -> dict[str, frozenset[str]]:
    """Types by key, as the values in NeMo RL's configuration files have them."""
    found: dict[str, set[str]] = {}
    for config in load_manifest()["configs"].values():
        for key, value in config.items():
            found.setdefault(without_indices(key), set()).update(_seen(value))
    return {key: frozenset(types) for key, types in found.items() if types}


def _seen(value: Any) -> Iterable[str]:
    """The types that one example speaks for; an interpolation says nothing."""
    if isinstance(value, str):
        if "${" in value:
            return ()
        try:  # YAML 1.1 reads 1e-8 as a string
            float(value)
        except ValueError:
            return ("str",)
        return ("float", "int")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ("float", "int")  # weight_decay: 0 does not say that 0.1 is wrong
    return () if value is None else (type_name(value),)
