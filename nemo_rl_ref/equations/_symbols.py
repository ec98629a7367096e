# SPDX-License-Identifier: Apache-2.0
"""Symbols: their LaTeX, their meaning, and how random values for them are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Domain:
    """Where the values of a symbol lie.

    Attributes:
        draw: makes random float64 values of a given shape.
        extremes: values that a fifth of the inputs consists of; empty for values that belong
            together, such as probabilities.
    """

    draw: Draw
    extremes: tuple[float, ...] = ()


def _spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers whose scale differs from sample to sample, from 1e-2 to 1e1."""
    scale = 10.0 ** rng.uniform(-2, 1, size=(shape[0],) + (1,) * (len(shape) - 1))
    return scale * rng.normal(size=shape)


def _probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Distributions along the last axis, from nearly uniform to nearly deterministic."""
    scale = 10.0 ** rng.uniform(-2, 1.3, size=(shape[0],) + (1,) * (len(shape) - 1))
    logits = scale * rng.normal(size=shape)
    logits -= logits.max(axis=-1, keepdims=True)
    weights = np.exp(np.maximum(logits, -200.0))
    return weights / weights.sum(axis=-1, keepdims=True)


def _mask(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros and ones along the last axis, never all zero."""
    mask = (rng.uniform(size=shape) < rng.uniform(0.2, 1, size=(*shape[:-1], 1))).astype(float)
    first = rng.integers(shape[-1], size=shape[:-1])
    np.put_along_axis(mask, first[..., None], 1.0, axis=-1)
    return mask


#: Any real number.
REAL = Domain(_spread, (0.0, 1e-9, -1e-9, 40.0, -40.0))
#: A real number of moderate size, for what is exponentiated.
MODERATE = Domain(lambda rng, shape: rng.normal(size=shape), (0.0, 1e-9, 3.0, -3.0))
#: A positive number.
POSITIVE = Domain(lambda rng, shape: 10.0 ** rng.uniform(-2, 1, size=shape), (1e-3, 1.0, 30.0))
#: A probability, as a rule a small one: that of one answer.
PROBABILITY = Domain(
    lambda rng, shape: np.exp(-(10.0 ** rng.uniform(-2, 1.5, size=shape))), (1e-100, 1e-12, 1.0)
)
#: Probabilities that add up to 1 along the last axis.
PROBABILITIES = Domain(_probabilities)
#: An importance ratio.
RATIO = Domain(lambda rng, shape: np.exp(0.5 * rng.normal(size=shape)), (1e-6, 0.5, 1.0, 2.0, 1e6))
#: A number strictly between 0 and 1.
FRACTION = Domain(lambda rng, shape: rng.uniform(0.01, 0.99, size=shape), (1e-3, 0.5, 0.999))
#: A number from 0 to 1, the ends included: γ, λ.
UNIT = Domain(lambda rng, shape: rng.uniform(size=shape), (0.0, 1.0, 0.99))
#: A clipping range, such as ε.
SMALL = Domain(lambda rng, shape: rng.uniform(0.01, 0.5, size=shape), (1e-3, 0.2, 0.9))
#: 0 or 1, at least one 1 along the last axis.
MASK = Domain(_mask)
#: A reward of 0 or 1.
BINARY = Domain(lambda rng, shape: rng.integers(2, size=shape).astype(float))


@dataclass(frozen=True)
class Symbol:
    """What is known of a symbol.

    Attributes:
        name: its name in Python, under which a check receives its values.
        latex: how it is printed; ``#1``, ``#2`` stand for the indices of an indexed one.
        meaning: what it means, with its unit, as a phrase in MyST Markdown.
        domain: how values are drawn; None for an index or a size.
        shape: names of the sizes of an indexed symbol's axes.
        sizes: the values that a size takes in a check.
    """

    name: str
    latex: str
    meaning: str
    domain: Domain | None = None
    shape: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def plain_latex(self) -> str:
        """LaTeX with the usual indices: what a table of symbols shows."""
        letters = {"G": "i", "T": "t", "Y": "y", "N": "n", "S": "s", "K": "k", "M": "m", "B": "d"}
        latex = self.latex
        for number, size in enumerate(self.shape, start=1):
            latex = latex.replace(f"#{number}", letters.get(size[0], size[0].lower()))
        return latex


_known: dict[sympy.Basic, Symbol] = {}


def _remember(key: sympy.Basic, symbol: Symbol) -> None:
    if _known.setdefault(key, symbol) != symbol:
        raise ValueError(f"name {symbol.name!r} is a symbol already, {_known[key].latex}")


def known(key: sympy.Basic) -> Symbol:
    """Return what is known of a SymPy symbol or indexed base.

    Raises:
        KeyError: it was not made by this module.
    """
    if key not in _known:
        raise KeyError(f"{key} is no symbol of nemo_rl_ref.equations; make it with symbol()")
    return _known[key]


def all_symbols() -> list[Symbol]:
    """List every symbol, in the order in which they were made."""
    return list(_known.values())


def symbol(name: str, latex: str, meaning: str, domain: Domain) -> sympy.Symbol:
    """Make a symbol that stands for a number.

    Args:
        name: its name in Python.
        latex: how it is printed.
        meaning: what it means, with its unit.
        domain: how values are drawn.

    Returns:
        The SymPy symbol.

    Raises:
        ValueError: the name is taken by another symbol.
    """
    made = sympy.Symbol(name)
    _remember(made, Symbol(name, latex, meaning, domain))
    return made


def indexed(
    name: str, latex: str, meaning: str, domain: Domain, shape: tuple[str, ...]
) -> sympy.IndexedBase:
    """Make a symbol with indices, which count from 1.

    Args:
        name: its name in Python.
        latex: how it is printed, ``#1`` for the first index, ``#2`` for the second.
        meaning: what it means, with its unit.
        domain: how values are drawn.
        shape: names of its axes' sizes, made by :func:`size`. ``"T+1"`` is one more.

    Returns:
        The SymPy indexed base.

    Raises:
        ValueError: the name is taken by another symbol.
    """
    made = sympy.IndexedBase(name)
    _remember(made, Symbol(name, latex, meaning, domain, shape))
    return made


def size(name: str, latex: str, meaning: str, values: tuple[int, ...]) -> sympy.Symbol:
    """Make a symbol that stands for a number of things; a check tries all of `values`."""
    made = sympy.Symbol(name, integer=True)
    _remember(made, Symbol(name, latex, meaning, sizes=values))
    return made


def index(name: str, latex: str, meaning: str) -> sympy.Symbol:
    """Make a symbol that an expectation or a sum runs over."""
    made = sympy.Symbol(name, integer=True)
    _remember(made, Symbol(name, latex, meaning))
    return made
