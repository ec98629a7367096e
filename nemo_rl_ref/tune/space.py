# SPDX-License-Identifier: Apache-2.0
"""Which keys of a configuration are searched, and over what: a small YAML file.

For example::

    policy.optimizer.kwargs.lr: {log_uniform: [1e-6, 1e-3]}
    dpo.reference_policy_kl_penalty: {uniform: [0.01, 0.5]}
    policy.train_global_batch_size: {choice: [16, 32, 64]}
    policy.train_micro_batch_size: {divides: policy.train_global_batch_size, at_most: 32}
    dpo.sft_loss_weight: {choice: [0, 0.1]}
    dpo.sft_average_log_probs: {choice: [true, false], when: {dpo.sft_loss_weight: 0.1}}
    dpo.max_num_steps: 60

A key is searched over one of

* ``uniform: [low, high]`` and ``log_uniform: [low, high]``, real numbers, both ends included;
* ``int: [low, high]`` and ``log_int: [low, high]``, whole numbers, both ends included;
  ``step: n`` beside ``int`` or ``uniform`` leaves out what lies between ``low + k n``;
* ``choice: [a, b, …]``, any values that the key may have.

Or it is tied to other keys, of this file or of the configuration:

* ``equals: KEY``;
* ``fraction_of: KEY`` with ``fraction: x``, or with a distribution of fractions in its place;
  rounded, but at least 1, where the key takes whole numbers;
* ``divides: KEY`` with ``at_most: n``, or with a distribution of limits in its place: the largest
  divisor that is not above the limit;
* ``product_of: [KEY, KEY or number, …]``.

A value alone fixes the key (``value: …`` where it could be taken for something else). ``when: {KEY:
value or [values]}`` makes a key part of a trial only where the other key has one of the values;
elsewhere the configuration's own value stands.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import OmegaConf
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from yaml import YAMLError

from nemo_rl_ref.config.keys import key_exists
from nemo_rl_ref.config.types import fits, key_types, problem_with_key, type_name

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGES = ("uniform", "log_uniform", "int", "log_int")
SEARCHED = (*RANGES, "choice")
TIES = ("equals", "fraction_of", "divides", "product_of")
#: What stands beside what.
OPTIONS = {"step": ("uniform", "int"), "fraction": ("fraction_of",), "at_most": ("divides",)}
_NOTHING = object()

Number = StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Listed = Annotated[
    list[Any], Field(min_length=1), BeforeValidator(lambda v: v if isinstance(v, list) else [v])
]
#: What is expected of an entry's part, in an error.
_EXPECTED = {
    **dict.fromkeys(("uniform", "log_uniform"), "two numbers [low, high]"),
    **dict.fromkeys(("int", "log_int"), "two whole numbers [low, high]"),
    **dict.fromkeys(("step", "fraction"), "a number above 0"),
    **dict.fromkeys(("equals", "fraction_of", "divides"), "a key"),
    "choice": "a list of values",
    "at_most": "a whole number from 1 on",
    "product_of": "a list of keys and numbers",
    "when": "{KEY: value or [values]}",
}


class SpaceError(ValueError):
    """A search space that cannot be used. The message names the key, what it has and should have."""


class Entry(BaseModel):
    """What one key is searched over, or how it is tied, as the file has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(exclude=True)
    uniform: tuple[Number, Number] | None = None
    log_uniform: tuple[Number, Number] | None = None
    int_: tuple[StrictInt, StrictInt] | None = Field(None, alias="int")
    log_int: tuple[StrictInt, StrictInt] | None = None
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    step: Positive | None = None
    equals: str | None = None
    fraction_of: str | None = None
    fraction: Positive | None = None
    divides: str | None = None
    at_most: Annotated[StrictInt, Field(gt=0)] | None = None
    product_of: Annotated[list[Number | str], Field(min_length=2)] | None = None
    value: Any = None
    when: dict[str, Listed] = Field({}, min_length=1)

    @classmethod
    def parse(cls, key: str, written: Any, own: str = "") -> Entry:
        """Read what the file has for a key; a value alone fixes it.

        Args:
            key: The key.
            written: What the file has.
            own: A section that may have keys which NeMo RL does not have, of a loss of one's own.

        Raises:
            SpaceError: If it cannot be used.
        """
        is_own = own and key.rpartition(".")[0] == own and not key_exists(key)
        if not is_own and (problem := problem_with_key(key)):
            raise SpaceError(f"{key}: got {key}, expected {problem}")
        fields = written if isinstance(written, Mapping) else {"value": written}
        try:
            return cls.model_validate({**fields, "key": key})
        except ValidationError as error:
            raise SpaceError(f"{key}: {_in_words(error, fields)}") from error

    @property
    def search(self) -> str:
        """``uniform``, ``log_uniform``, ``int``, ``log_int`` or ``choice``; "" if not searched."""
        return next((name for name in SEARCHED if self._of(name) is not None), "")

    @property
    def values(self) -> tuple[Any, ...]:
        """The two ends of a range, or the choices."""
        values = tuple(self._of(self.search)) if self.search else ()
        return tuple(map(float, values)) if "uniform" in self.search else values

    @property
    def tie(self) -> str:
        """``equals``, ``fraction_of``, ``divides`` or ``product_of``; "" if it is not tied."""
        return next((name for name in TIES if self._of(name) is not None), "")

    @property
    def to(self) -> tuple[Any, ...]:
        """The keys, or numbers, that it is tied to."""
        to = self._of(self.tie) if self.tie else ()
        return (to,) if isinstance(to, str) else tuple(to)

    @property
    def fixed(self) -> Any:
        """The value of a fixed key, the fraction or the limit of a tie."""
        option = {"fraction_of": self.fraction, "divides": self.at_most}
        return option.get(self.tie) if self.tie else self.value

    @property
    def needs(self) -> tuple[str, ...]:
        """The keys whose values it needs."""
        return (*(k for k in self.to if isinstance(k, str)), *self.when)

    def _of(self, name: str) -> Any:
        return getattr(self, "int_" if name == "int" else name)

    def distribution(self) -> Any:
        """Say what Optuna draws under the key's name; None if nothing is drawn."""
        from optuna import distributions

        if not self.search:
            return None
        if self.search == "choice":
            return distributions.CategoricalDistribution([_encode(v) for v in self.values])
        (low, high), log = self.values, self.search.startswith("log_")
        if "int" in self.search:
            return distributions.IntDistribution(low, high, log=log, step=int(self.step or 1))
        return distributions.FloatDistribution(low, high, log=log, step=self.step)

    def draw(self, trial: Any) -> Any:
        """Take the number or choice that a trial has for the key."""
        dist: Any = self.distribution()
        if self.search == "choice":
            drawn = trial.suggest_categorical(self.key, dist.choices)
            return next(value for value in self.values if _same(_encode(value), drawn))
        suggest = trial.suggest_int if "int" in self.search else trial.suggest_float
        return suggest(self.key, dist.low, dist.high, step=dist.step, log=dist.log)

    # Checks

    @model_validator(mode="after")
    def _check(self) -> Entry:
        names = [name for name in type(self).model_fields if name in self.model_fields_set]
        self._check_which([n.rstrip("_") for n in names if n not in ("key", "when")])
        if self.search == "choice":
            self._check_choices()
        elif self.search:
            self._check_range()
        if not self.tie and not self.search:
            self._check_type(self.value, "value")
        return self

    def _check_which(self, written: list[str]) -> None:
        """One search, one tie, and beside them what belongs there."""
        for names in (SEARCHED, TIES):
            if len(both := [name for name in names if name in written]) > 1:
                raise ValueError(f"got {' and '.join(both)}, expected one of them")
        search, tie = self.search, self.tie
        for option, beside in OPTIONS.items():
            if option in written and not {search, tie} & set(beside):
                raise ValueError(f"{option}: stands beside {' or '.join(beside)} only")
        if not tie and ("value" in written) == bool(search):
            got, expected = ", ".join(written) or "nothing", ", ".join((*SEARCHED, *TIES))
            raise ValueError(f"got {got}, expected one of {expected}, or value")
        option = {"fraction_of": "fraction", "divides": "at_most"}.get(tie)
        second = "value" if "value" in written else search
        if tie and second and (option is None or second == "value"):
            raise ValueError(f"got {tie} and {second}, expected one of them")
        if option and (option in written) == bool(search):
            got = f"{option} and {search}" if search else "neither"
            raise ValueError(f"{tie}: got {got}, expected {option} or a distribution of it")
        if tie == "product_of" and not any(isinstance(item, str) for item in self.to):
            raise ValueError(f"product_of: got {_short(list(self.to))}, expected a key among them")
        if tie == "divides" and not fits(1, key_types(self.key)):
            raise ValueError(
                f"divides: it takes {_words(key_types(self.key))}, expected whole numbers"
            )

    def _check_choices(self) -> None:
        for i, value in enumerate(self.values):
            if any(_same(value, other) for other in self.values[:i]):
                raise ValueError(f"choice: got {_short(value)} twice, expected it once")
            self._check_type(value, "choice")
            if self.tie and value <= 0:
                raise ValueError(f"choice: got {_short(value)}, expected numbers above 0")

    def _check_range(self) -> None:
        search, whole, (low, high) = self.search, "int" in self.search, self._of(self.search)
        if not low < high:
            raise ValueError(
                f"{search}: got low {low!r} and high {high!r}, expected low below high"
            )
        if (search.startswith("log_") or self.tie) and low <= 0:
            raise ValueError(f"{search}: got low {low!r}, expected above 0; a logarithm has no 0")
        if self._types and not {"int", "float"} & self._types:
            raise ValueError(
                f"{search}: got a range of numbers, but it takes {_words(self._types)}; expected "
                "choice"
            )
        if self._types and not whole and "float" not in self._types:
            raise ValueError(
                f"{search}: got a range of real numbers, but it takes {_words(self._types)}; "
                f"expected {search.replace('uniform', 'int') if '_' in search else 'int'}"
            )
        self._check_step(low, high)

    def _check_step(self, low: Any, high: Any) -> None:
        step = self.step
        if step is None:
            return
        if step > high - low or (self.search == "int" and not isinstance(step, int)):
            what = "a whole number" if self.search == "int" else "a number"
            raise ValueError(
                f"step: got {step!r}, expected {what} above 0 and at most {high - low}"
            )
        steps = (Fraction(str(high)) - Fraction(str(low))) / Fraction(str(step))
        if steps.denominator != 1:
            raise ValueError(
                f"step: got {step!r}, with which {high!r} is not reached from {low!r}; expected "
                f"one that divides their distance, or {low + int(steps) * step!r} as the high end"
            )

    def _check_type(self, value: Any, where: str) -> None:
        if not fits(value, self._types):
            raise ValueError(
                f"{where}: got {_short(value)}, a {type_name(value)}, but it takes "
                f"{_words(self._types)}"
            )

    @property
    def _types(self) -> frozenset[str]:
        """The types of what is drawn or fixed: the key's, or those of a tie's fraction or limit."""
        tied = {"fraction_of": frozenset({"float"}), "divides": frozenset({"int"})}
        return tied.get(self.tie, key_types(self.key))


def _in_words(error: ValidationError, written: Mapping[str, Any]) -> str:
    """The first mistake that pydantic found in an entry: where, what it got, what it should be."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "value_error":
        return str(first.get("ctx", {})["error"])
    if first["type"] == "extra_forbidden":
        return f"got {name}, expected one of {', '.join((*SEARCHED, *TIES, *OPTIONS))}, value, when"
    return f"{name}: got {_short(written[name])}, expected {_EXPECTED[name]}"


class Space:
    """The keys that are searched, tied or fixed.

    Args:
        entries: What each key is searched over.
        base: The values of a configuration by key, for ties to keys that the space does not have.

    Raises:
        SpaceError: If the entries do not fit together.
    """

    def __init__(self, entries: Mapping[str, Entry], base: Mapping[str, Any] | None = None):
        self.entries, self.base = dict(entries), dict(base or {})
        self._order = self._check()

    @classmethod
    def read(
        cls, path: str | Path, *, base: Mapping[str, Any] | None = None, own: str = ""
    ) -> Space:
        """Read a space from a YAML file, whose name is in an error's message."""
        try:
            return cls.from_dict(_read_yaml(Path(path)), base=base, own=own)
        except SpaceError as error:
            raise SpaceError(f"{path}: {error}") from error

    @classmethod
    def from_dict(
        cls, written: Any, *, base: Mapping[str, Any] | None = None, own: str = ""
    ) -> Space:
        """Make a space of what the file holds, or of what `to_dict` returned; see `Entry.parse`."""
        if not isinstance(written, Mapping) or not written:
            raise SpaceError(f"got {_short(written)}, expected keys with what to search each over")
        entries = {str(key): Entry.parse(str(key), value, own) for key, value in written.items()}
        return cls(entries, base)

    def to_dict(self) -> dict[str, Any]:
        """The entries as they are written, in JSON's types."""
        return {
            key: entry.model_dump(mode="json", by_alias=True, exclude_unset=True)
            for key, entry in self.entries.items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.to_dict() == other.to_dict()

    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna draws, by key: those keys about which something is searched."""
        found = {key: entry.distribution() for key, entry in self.entries.items()}
        return {key: dist for key, dist in found.items() if dist is not None}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draw the values that a trial sets, by key, ties resolved.

        Keys whose condition is not met are absent.

        Raises:
            SpaceError: If a tie has no whole-numbered result, or no number to start from.
        """
        values: dict[str, Any] = {}
        for key in self._order:
            entry = self.entries[key]
            if all(
                any(_same(self._value(other, values), value) for value in allowed)
                for other, allowed in entry.when.items()
            ):
                values[key] = self._resolve(entry, values, lambda e=entry: e.draw(trial))
        return {key: values[key] for key in self.entries if key in values}

    def _value(self, key: Any, values: Mapping[str, Any]) -> Any:
        """The value of a key in a trial; a number of a product is its own."""
        if not isinstance(key, str):
            return key
        return values[key] if key in values else self.base.get(key, _NOTHING)

    def _resolve(self, entry: Entry, values: Mapping[str, Any], draw: Callable[[], Any]) -> Any:
        own = draw() if entry.search else entry.fixed
        if not entry.tie:
            return own
        others = [self._value(key, values) for key in entry.to]
        if entry.tie == "equals" and others[0] is not _NOTHING:
            return others[0]
        for key, other in zip(entry.to, others, strict=True):
            if not _is_number(other):
                what = "no value in this trial" if other is _NOTHING else _short(other)
                raise SpaceError(
                    f"{entry.key}: {entry.tie} {key}: got {what} for that key, expected a number"
                )
        if entry.tie == "product_of":
            return math.prod(others)
        if entry.tie == "fraction_of":
            types, part = key_types(entry.key), own * others[0]
            return max(1, round(part)) if "int" in types and "float" not in types else part
        return _largest_divisor(entry, others[0], own)

    # Checks

    def _check(self) -> list[str]:
        """The keys in an order in which each comes after those it needs."""
        for key, entry in self.entries.items():
            for other in self.entries:
                if other.startswith(f"{key}."):
                    raise SpaceError(f"{other}: {key}, which it is in, is in the space too")
            for other in entry.needs:
                self._check_needed(entry, other)
        needs = {key: entry.needs for key, entry in self.entries.items()}
        try:
            return [key for key in TopologicalSorter(needs).static_order() if key in needs]
        except CycleError as error:
            circle = error.args[1][::-1]
            raise SpaceError(f"{circle[0]}: tied to itself: {' -> '.join(circle)}") from error

    def _check_needed(self, entry: Entry, other: str) -> None:
        kind, there = "when" if other in entry.when else entry.tie, self.entries.get(other)
        if other == entry.key:
            raise SpaceError(f"{entry.key}: {kind}: got {other}, expected another key than its own")
        if there is None and other not in self.base:
            problem = problem_with_key(other)
            known = "a key of the space" + (" or of the configuration" if self.base else "")
            raise SpaceError(f"{entry.key}: {kind}: got {other}, expected {problem or known}")
        if there is None or there.tie or there.search in RANGES:
            return
        possible = there.values if there.search else (there.fixed,)
        for value in entry.when.get(other, ()):
            if not any(_same(value, one) for one in possible):
                raise SpaceError(
                    f"{entry.key}: when: {other}: got {_short(value)}, which it never is; expected "
                    f"one of {', '.join(map(_short, possible))}"
                )


def override_line(values: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """Write values as overrides of a command line, in Hydra's grammar, quoted for a shell.

    Keys of ``config`` are written ``key=value``, others ``++key=value``, which may add a key.
    """
    return " ".join(shlex.quote(text) for text in overrides(values, config))


def overrides(values: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> list[str]:
    """As `override_line`, one override an item, not quoted for a shell."""
    return [
        f"{'' if config is not None and key in config else '++'}{key}={_hydra(value)}"
        for key, value in values.items()
    ]


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value) if not isinstance(value, float) else repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_hydra, value)) + "]"
    text = str(value)
    # Hydra reads a backslash as one, except those that stand before a quote.
    before_quotes = ""
    for part in text.split("'"):
        slashes = len(part) - len(part.rstrip("\\"))
        before_quotes += part + "\\" * slashes + "\\'"
    return f"'{before_quotes[:-2]}'"


# Small things


def _read_yaml(path: Path) -> Any:
    """A YAML file, in which a key that is written twice is an error and 1e-6 is a number."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"cannot be read as YAML: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _same(one: Any, other: Any) -> bool:
    """Equal, and not only as 1 and true are."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _encode(value: Any) -> Any:
    """A choice as Optuna stores it: lists and dictionaries as JSON."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _largest_divisor(entry: Entry, number: Any, limit: int) -> int:
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or number < 1:
        raise SpaceError(
            f"{entry.key}: divides {entry.to[0]}: got {number!r} for that key, expected a whole "
            "number from 1 on"
        )
    return next(n for n in range(min(limit, number), 0, -1) if number % n == 0)


def _words(types: frozenset[str]) -> str:
    names = {
        "int": "whole numbers", "float": "real numbers", "bool": "true or false", "str": "text",
        "list": "lists", "dict": "sections", "null": "null",
    }  # fmt: skip
    return ", ".join(name for kind, name in names.items() if kind in types)


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (type(None), bool)) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
