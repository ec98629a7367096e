# SPDX-License-Identifier: Apache-2.0
"""A loss built from its class and its settings: what the checker and the runners share."""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from nemo_rl_ref.contract.limits import file_of, raised_at, written_at
from nemo_rl_ref.contract.user_code import UsageError, one_line


def build_loss(kind: Any, pairs: Sequence[str]) -> Any:
    """Builds a loss from ``key=value`` pairs.

    A key is a field of the loss's config or another argument of its ``__init__``. If the config
    takes any field, a key that is none of its fields must be read by ``__init__``. The config is
    the pydantic model (or TypedDict) that an argument of ``__init__`` is annotated with, or, where
    the first argument has no annotation, the one class of the loss's module whose name fits
    ``LossName`` + ``Config``. Values become the type of their field: ``0.1``, ``true``, ``null``,
    text, or JSON for lists and mappings.

    Args:
        kind: the class of the loss.
        pairs: the pairs.

    Raises:
        UsageError: if a key is unknown, a value does not fit, or the class refuses them.
    """
    if not isinstance(kind, type):
        name = getattr(kind, "__name__", kind)
        raise UsageError(f"{name!r}{written_at(kind)} is no class, expected a loss class")
    argument, config, others = signature_of(kind)
    fields = fields_of(config)
    known = {**fields, **others}
    texts: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"got {pair!r}, expected key=value")
        if key in texts:
            raise UsageError(f"{key} is given twice")
        texts[key] = text
    values = {key: convert(key, text, known[key]) for key, text in texts.items() if key in known}
    extra = {key: _guess(text) for key, text in texts.items() if key not in known}
    given = {key: value for key, value in values.items() if key not in fields}
    settings = {key: value for key, value in values.items() if key in fields}
    if extra:
        read = _keys_read(kind, argument, config, given, {**settings, **extra})
        for key in extra.keys() - read:
            near = _nearest(key, sorted({*known, *read}))
            raise UsageError(f"{kind.__name__} has no setting {key!r}{near}")
    return call_loss_class(kind, argument, config, given, {**settings, **extra})


def _keys_read(
    kind: type, argument: str, config: Any, given: dict[str, Any], settings: dict[str, Any]
) -> set[str]:
    """Which fields of a config that takes any field the class reads when it is built."""
    if not takes_any_field(config):
        return set()
    read: set[str] = set()

    class Recording(config):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith(("_", "model_")):
                read.add(name)
            return super().__getattribute__(name)

    call_loss_class(kind, argument, Recording, given, settings)
    return read


def call_loss_class(
    kind: type, argument: str, config: Any, given: dict[str, Any], settings: dict[str, Any]
) -> Any:
    """Builds the loss, with its config if it has one."""
    try:
        if config is not None:
            is_model = issubclass(config, BaseModel)
            given = {**given, argument: config(**settings) if is_model else settings}
        return kind(**given)
    except (Exception, SystemExit) as error:  # a loss refuses settings with what it likes
        at = raised_at(error, file_of(kind))
        raise UsageError(f"{kind.__name__}: {one_line(error)}{at}") from error


def _guess(text: str) -> Any:
    """The value of a field without a type: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def takes_any_field(config: Any) -> bool:
    """Whether a config class accepts fields that it does not name."""
    return (
        config is not None
        and issubclass(config, BaseModel)
        and config.model_config.get("extra") == "allow"
    )


def convert(key: str, text: str, kind: Any) -> Any:
    """Turns the text of a value into the type of its field.

    Raises:
        UsageError: if it does not fit.
    """
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the type brings its own config, as models do
        adapter = TypeAdapter(kind)
    attempts = [adapter.validate_strings, adapter.validate_json]
    if text.lower() in ("null", "none"):
        attempts.insert(0, lambda _: adapter.validate_python(None))
    reason = ""
    for attempt in attempts:
        try:
            return attempt(text)
        except ValidationError as error:
            reason = reason or error.errors()[0]["msg"]
    shown = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
    raise UsageError(f"{key} is {text!r}, expected {shown}: {reason}")


def signature_of(kind: type) -> tuple[str, Any, dict[str, Any]]:
    """The config's argument and class (or "" and None), and the types of the other arguments."""
    if kind.__init__ is object.__init__:
        return "", None, {}
    try:
        hints = typing.get_type_hints(kind.__init__)
    except NameError:  # an annotation that only a type checker can see
        hints = {}
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if _is_config(hints.get(parameter.name)):
            break
    else:
        parameter = named[0] if named and named[0].name not in hints else None
    config = None
    if parameter is not None:
        config = hints.get(parameter.name) or _config_by_name(kind) or _config_of_base(kind)
    name = parameter.name if parameter is not None and config is not None else ""
    others = {p.name: hints.get(p.name, str) for p in named if p.name != name}
    return name, config, others


def _config_by_name(kind: type) -> Any:
    """The class of the loss's module called like the loss plus Config, or the only one."""
    module = vars(sys.modules[kind.__module__])
    configs = {n: c for n, c in module.items() if n.endswith("Config") and _is_config(c)}
    stem = kind.__name__.removesuffix("Fn")
    fitting = [configs[n] for n in (f"{stem}Config", f"{kind.__name__}Config") if n in configs]
    if fitting:
        return fitting[0]
    return next(iter(configs.values())) if len(configs) == 1 else None


def _config_of_base(kind: type) -> Any:
    """The config class of the next class that has an ``__init__``: ``cfg`` is often not annotated."""
    bases = (base for base in kind.__mro__[1:-1] if "__init__" in vars(base))
    return signature_of(base)[1] if (base := next(bases, None)) else None


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or typing.is_typeddict(kind))


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a config class, with their types."""
    if config is None:
        return {}
    if issubclass(config, BaseModel):
        return {
            name: typing.Annotated[field.annotation, *field.metadata]
            if field.metadata
            else field.annotation
            for name, field in config.model_fields.items()
        }
    return typing.get_type_hints(config)


def _nearest(name: str, known: list[str]) -> str:
    """The nearest known name, or all of them, as the end of a message."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it has {', '.join(sorted(known)) or 'none'}"
