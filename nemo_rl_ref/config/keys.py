# SPDX-License-Identifier: Apache-2.0
"""Which keys of a configuration are used here, which are ignored, and which do not exist.

NeMo RL has no module of this kind: most of its configuration classes accept any further key, so
that a misspelt one is silently without effect. Here every key is accounted for before a run starts.

A key is written with dots, an entry of a list by its index: ``policy.scheduler.0.kwargs.factor``.
A pattern covers a key and everything below it; ``*`` in it stands for one part of a key:
``policy.optimizer`` and ``policy.scheduler.*.name``. Where several patterns cover a key, the
longest decides.

`nemo_rl_ref.config.read.read_config` reads a file and accounts for its keys in one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import TYPE_CHECKING, Any

from nemo_rl_ref.config.lists import CAUTIONS, IGNORED, NOT_HERE
from nemo_rl_ref.upstream import load_keys

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: How alike a key must be to a known one beside it for a warning, where any key is legal.
_MISSPELT = 0.92


class ConfigKeyError(ValueError):
    """A configuration has keys that do not exist, or turns on what is not implemented here."""


@dataclass(frozen=True)
class KeyReport:
    """What became of each key. ``str(report)`` is the summary to print.

    Attributes:
        used: Keys that the run reads, by name or because another key that it reads refers to them.
        ignored: Keys that are knowingly ignored, by what they configure.
        unread: Keys that NeMo RL has and this run neither reads nor lists as ignored; the section
            in their place where the run reads nothing in it.
        new: Keys that NeMo RL does not have, added with ``+`` or ``++`` on the command line.
        warnings: Whole sentences: overrides without effect, and keys that look misspelt.
    """

    used: tuple[str, ...]
    ignored: Mapping[str, tuple[str, ...]]
    unread: tuple[str, ...]
    new: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"configuration: {len(self.used)} keys used"]
        if self.ignored:
            groups = ", ".join(f"{what} {len(keys)}" for what, keys in self.ignored.items())
            lines.append(f"  ignored: {sum(map(len, self.ignored.values()))} ({groups})")
        if self.unread:
            lines.append(f"  in NeMo RL, not read by this run: {', '.join(self.unread)}")
        if self.new:
            lines.append(f"  new, not in NeMo RL: {', '.join(self.new)}")
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def check_keys(
    config: DictConfig | Mapping[str, Any],
    used: Iterable[str],
    ignored: Mapping[str, str] = IGNORED,
    overrides: Sequence[str] = (),
    not_here: Mapping[str, str] = NOT_HERE,
) -> KeyReport:
    """Accounts for every key of a configuration.

    A key exists if NeMo RL has it (see `nemo_rl_ref.upstream.load_keys`), if it lies below a
    section in which NeMo RL takes any key, if `used` or `ignored` has it, or if the command line
    added it with ``+`` or ``++``.

    Args:
        config: The configuration, overrides applied.
        used: Patterns of the keys that the run reads.
        ignored: Patterns of the keys that it knowingly ignores, with what they configure.
        overrides: The overrides that were applied. Where one has no effect, a warning says so.
        not_here: Patterns of the switches that must be off, with what they turn on.

    Returns:
        What became of each key.

    Raises:
        ConfigKeyError: If a key does not exist, with the nearest one that does, or if a switch of
            `not_here` is on. One error names all of them.
    """
    flat, used = flatten_keys(config), tuple(used)
    given = {line.lstrip("+~").partition("=")[0]: line for line in overrides}
    added = [key for key, line in given.items() if line.startswith("+")]
    kinds = {key: _kind(key, used, ignored, added) for key in flat}
    kinds |= dict.fromkeys(_read_through_others(flat, kinds), _USED)
    problems = [
        *_describe_switched_on(config, flat, not_here),
        *_describe_unknown([key for key, kind in kinds.items() if kind is None], flat),
    ]
    if problems:
        raise ConfigKeyError("\n  ".join(["keys that cannot be used:", *problems]))
    groups: dict[str | None, list[str]] = {}
    for key, kind in kinds.items():
        groups.setdefault(kind, []).append(key)
    return KeyReport(
        used=tuple(groups.pop(_USED, ())),
        new=tuple(groups.pop(_NEW, ())),
        unread=_collapse(groups.pop(_UNREAD, ()), [k for k in kinds if kinds[k] in (_USED, _NEW)]),
        ignored={str(what): tuple(keys) for what, keys in groups.items()},
        warnings=(*_no_effect(kinds, given), *_misspelt(flat), *_cautions(config, flat)),
    )


def key_exists(key: str) -> bool:
    """Whether NeMo RL has a key, by name or because any key is legal in its section."""
    parts = key.split(".")
    return _locate(parts)[0] == len(parts)


def flatten_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration by their dotted keys.

    Args:
        config: A DictConfig, or a mapping. Interpolations are not resolved.
        prefix: Put before each key.

    Returns:
        Key to value, in order. An empty section is a leaf, as is a list without sections in it.
    """
    if not isinstance(config, (dict, list)):
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(config, resolve=False)
    entries = config.items() if isinstance(config, Mapping) else enumerate(config)
    found: dict[str, Any] = {}
    for name, value in entries:
        key = f"{prefix}{name}"
        deeper = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
        )
        found.update(flatten_keys(value, f"{key}.") if deeper and value else {key: value})
    return found


def nearest_key(key: str, known: Iterable[str], at_least: float = 0.6) -> str | None:
    """The known key most like `key`: two thirds by its last part, one by what stands before.

    Args:
        key: A key that is not known.
        known: Keys to choose from; the first of equally good ones is taken.
        at_least: Similarity in [0, 1] below which nothing is near.

    Returns:
        The nearest key, or None.
    """
    section, _, name = key.rpartition(".")
    best, best_score = None, at_least
    names, sections = SequenceMatcher(b=name), SequenceMatcher(b=section)
    for candidate in known:
        candidate_section, _, candidate_name = candidate.rpartition(".")
        names.set_seq1(candidate_name)
        sections.set_seq1(candidate_section)
        score = (2 * names.ratio() + sections.ratio()) / 3
        if score > best_score:
            best, best_score = candidate, score
    return best


_USED, _UNREAD, _NEW = "used", "unread", "new"
_ANY = ""  # in the tree of known keys: anything may follow
_REFERENCE = re.compile(r"\$\{([^{}:$]+)\}")  # ${policy.precision} or ${.seed}, not ${mul:…}


@cache
def _known_tree() -> dict[str, Any]:
    """The keys of NeMo RL as nested dictionaries, `_ANY` where any key is legal."""
    tree: dict[str, Any] = {}
    keys = load_keys()
    for key in (*keys["keys"], *(f"{key}.{_ANY}" for key in keys["open"])):
        node = tree
        for part in key.split("."):
            node = node.setdefault(part, {})
    return tree


def _locate(parts: Sequence[str], node: dict[str, Any] | None = None) -> tuple[int, bool]:
    """How many of the parts exist, one after the other, and whether all are named, none free."""
    node = _known_tree() if node is None else node
    if not parts:
        return 0, True
    best = (len(parts), False) if _ANY in node else (0, True)
    for name in (parts[0], "#" if parts[0].isdecimal() else "*"):
        if name in node:
            count, named = _locate(parts[1:], node[name])
            best = max(best, (count + 1, named))
    return best


def _kind(
    key: str, used: Sequence[str], ignored: Mapping[str, str], added: Sequence[str]
) -> str | None:
    """What becomes of a key: used, unread, new, what it configures if ignored, None if unknown."""
    parts = key.split(".")
    if not (key_exists(key) or key in used or key in ignored or parts[-1] == "_override_"):
        return _NEW if any(_covers(added_key, key) for added_key in added) else None
    by_used = max((_covers(pattern, key) for pattern in used), default=0)
    by_ignored, what = max(((_covers(p, key), w) for p, w in ignored.items()), default=(0, ""))
    if by_used == by_ignored == 0:
        return _UNREAD
    return _USED if by_used >= by_ignored else what


def _read_through_others(flat: Mapping[str, Any], kinds: Mapping[str, str | None]) -> set[str]:
    """The keys that used keys refer to: with ``a: ${b}``, whoever reads a reads b."""
    todo = [key for key, kind in kinds.items() if kind == _USED]
    found: set[str] = set()
    while todo:
        key = todo.pop()
        for reference in _REFERENCE.findall(str(flat[key])):
            name = reference.strip().replace("[", ".").replace("]", "")
            dots = len(name) - len(name.lstrip("."))
            section = key.split(".")[:-dots] if dots else []
            start = ".".join([*section, name.lstrip(".")])
            fresh = {k for k in flat if _covers(start, k) and kinds[k] not in (None, _USED, _NEW)}
            todo += fresh - found
            found |= fresh
    return found


def _covers(pattern: str, key: str) -> int:
    """The number of parts of `pattern` if it covers `key`, else 0."""
    wanted, parts = pattern.split("."), key.split(".")
    fits = len(wanted) <= len(parts) and all(
        one in ("*", other) for one, other in zip(wanted, parts, strict=False)
    )
    return len(wanted) if fits else 0


def _describe_unknown(unknown: Sequence[str], flat: Mapping[str, Any]) -> list[str]:
    """A line for each unknown key or section, with the nearest that exists."""
    starts = dict.fromkeys(
        ".".join(parts[: _locate(parts)[0] + 1]) for parts in (key.split(".") for key in unknown)
    )
    here = [without_indices(key) for key in flat if key not in unknown]
    lines = []
    for key in starts:
        nearest = nearest_key(without_indices(key), (*here, *load_keys()["keys"]))
        hint = f"; the nearest key is {with_indices(nearest, key)}" if nearest else ""
        lines.append(f"{key}: NeMo RL has no such key{hint}")
    if lines:
        lines.append("(a key of your own is added on the command line, as ++key=value)")
    return lines


def without_indices(key: str) -> str:
    """Return a key as ``keys.json`` has it, ``#`` for every index."""
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))


def with_indices(pattern: str, key: str) -> str:
    """Return a key of ``keys.json`` with the indices of `key` where it has ``#``."""
    parts = key.split(".")
    return ".".join(
        parts[i] if part == "#" and i < len(parts) else part
        for i, part in enumerate(pattern.split("."))
    )


def _describe_switched_on(
    config: Any, flat: Mapping[str, Any], not_here: Mapping[str, str]
) -> list[str]:
    """A line for each switch of `not_here` that is on."""
    found = {}
    for pattern, what in not_here.items():
        for key in flat:
            if _covers(pattern, key) and (value := _value(config, key, flat)):
                problem = f"{key}: got {value!r}; this package has no {what}"
                found.setdefault(pattern, problem)
    return list(found.values())


def _value(config: Any, key: str, flat: Mapping[str, Any]) -> Any:
    """The value of a leaf, interpolations resolved where `config` can."""
    value = flat[key]
    if isinstance(value, str) and "${" in value:
        from omegaconf import OmegaConf

        return OmegaConf.select(config, key) if OmegaConf.is_config(config) else value
    return None if value == "???" else value


def _collapse(keys: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Names a section in place of its keys where none of `others` is in it."""
    found = {}
    for key in keys:
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        whole = next(p for p in prefixes if not any(_covers(p, other) for other in others))
        found[whole] = None
    return tuple(found)


def _no_effect(kinds: Mapping[str, str | None], given: Mapping[str, str]) -> list[str]:
    """A warning for each override of keys that are all ignored or not read."""
    warnings = []
    for start, line in given.items():
        hit = [kind for key, kind in kinds.items() if _covers(start, key)]
        if hit and not {_USED, _NEW} & set(hit):
            why = "this run does not read it" if hit[0] == _UNREAD else f"ignored: {hit[0]}"
            warnings.append(f"{line} on the command line has no effect here ({why})")
    return warnings


def _misspelt(flat: Mapping[str, Any]) -> list[str]:
    """A warning for each key that is legal, but nearly one that NeMo RL names."""
    warnings = []
    for key in flat:
        parts = key.split(".")
        if _locate(parts) == (len(parts), True) or parts[-1].isdecimal():
            continue
        key_there = without_indices(key)
        section = key_there.rpartition(".")[0]
        beside = [known for known in load_keys()["keys"] if known.rpartition(".")[0] == section]
        if nearest := nearest_key(key_there, beside, _MISSPELT):
            nearest = with_indices(nearest, key)
            warnings.append(f"NeMo RL does not name {key}; did you mean {nearest}?")
    return warnings


def _cautions(config: Any, flat: Mapping[str, Any]) -> list[str]:
    """A warning for each switch that is ignored and on, where that can change results."""
    return [
        f"{key} is on: {sentence}"
        for key, sentence in CAUTIONS.items()
        if key in flat and _value(config, key, flat)
    ]
