# SPDX-License-Identifier: Apache-2.0
"""The value of an expression on many inputs at once, in NumPy's float64.

It walks over what was typed, term by term. Nothing here knows of the code that an equation is
checked against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy

from nemo_rl_ref.equations import _functions as f

Values = Mapping[Any, Any]


def evaluate(expression: sympy.Basic, values: Values) -> np.ndarray:
    """Return the values of an expression.

    Args:
        expression: the expression.
        values: a value for every symbol and indexed base in it. A symbol has an array of shape
            `(n,)` (n inputs) or an int (a size or an index), an indexed base an array of shape
            `(n, …)`.

    Returns:
        Float64 array of shape `(n,)`, or a scalar where no symbol has an axis of inputs.

    Raises:
        KeyError: a symbol has no value.
        IndexError: an index is outside its axis.
        TypeError: a function has no known value.
    """
    with np.errstate(all="ignore"):
        return np.asarray(_value(sympy.sympify(expression), dict(values)), dtype=np.float64)


#: Functions of numbers: what they do to their arguments.
_ELEMENTWISE = {
    sympy.exp: np.exp,
    sympy.Abs: np.abs,
    f.sigma: lambda x: np.exp(-np.logaddexp(0.0, -np.asarray(x))),
    f.logsigma: lambda x: -np.logaddexp(0.0, -np.asarray(x)),
    f.bracket: lambda x: x,
    f.sg: lambda x: x,
    f.maximum: np.maximum,
    f.minimum: np.minimum,
    f.clip: lambda x, low, high: np.minimum(np.maximum(x, low), high),
    f.indicator: lambda holds: np.where(holds, 1.0, 0.0),
}


def _value(e: Any, v: dict[Any, Any]) -> Any:
    if function := _ELEMENTWISE.get(type(e)):
        return function(*(_value(a, v) for a in e.args))

    def of(number: int) -> Any:
        return _value(e.args[number], v)

    match e:
        case sympy.Number():
            return float(e)
        case sympy.Symbol():
            return v[e]
        case sympy.Indexed():
            return _entry(e, v)
        case sympy.Add():
            return sum((_value(a, v) for a in e.args[1:]), start=of(0))
        case sympy.Mul():
            product = of(0)
            for a in e.args[1:]:
                inverse = isinstance(a, sympy.Pow) and a.exp == -1
                product = product / _value(a.base, v) if inverse else product * _value(a, v)
            return product
        case sympy.Pow():
            return np.power(np.asarray(of(0), dtype=np.float64), of(1))
        case sympy.log():
            return _log(e.args[0], v)
        case sympy.And():
            return np.logical_and.reduce([_value(a, v) for a in e.args])
        case sympy.Piecewise():
            return _cases(e, v)
        case sympy.Sum() | sympy.Product():
            return _folded(e, v)
        case f.average():
            return _over(e.args[0], e, v) / of(2)
        case f.mean_over():
            return _over(e.args[0], e, v) / of(2)
        case f.sum_over():
            if len(e.args) == 3:
                return _over(e.args[0], e, v)
            return _over(f.indicator(e.args[3]), e, v, times=e.args[0])
        case f.expected():
            return _over(e.args[3], e, v, times=e.args[0])
        case f.variance_of():
            first = _over(e.args[3], e, v, times=e.args[0])
            centered = sympy.Symbol("_mean")
            square = (e.args[0] - centered) ** 2
            return _over(e.args[3], e, v | {centered: first}, times=square)
        case f.divergence():
            p, q, index, count = e.args[:4]
            return sum(
                _value(p, w) * (np.log(_value(p, w)) - np.log(_value(q, w)))
                for w in _each(index, count, v)
            )
    if isinstance(e, sympy.core.relational.Relational):
        return _relation(e, of(0), of(1))
    if e in (sympy.true, sympy.false):
        return bool(e)
    raise TypeError(f"no value is known for {type(e).__name__} in {e}")


def _folded(e: Any, v: dict[Any, Any]) -> Any:
    if len(e.args) > 2:
        raise TypeError(f"SymPy made one sum of nested ones, {e}; write sum_over outside")
    index, low, high = e.args[1]
    first, last = round(float(_value(low, v))), round(float(_value(high, v)))
    terms = [_value(e.args[0], v | {index: k}) for k in range(first, last + 1)]
    return sum(terms) if isinstance(e, sympy.Sum) else np.multiply.reduce(terms)


def _entry(e: sympy.Indexed, v: dict[Any, Any]) -> Any:
    array = v[e.base]
    places = []
    for axis, place in enumerate(e.indices, start=1):
        number = round(float(_value(place, v)))
        if not 1 <= number <= array.shape[axis]:
            raise IndexError(
                f"index {number} of {e.base} is outside its axis {axis} of {array.shape[axis]}"
            )
        places.append(number - 1)
    return array[(slice(None), *places)]


def _each(index: Any, count: Any, v: dict[Any, Any]) -> list[dict[Any, Any]]:
    return [v | {index: k} for k in range(1, int(_value(count, v)) + 1)]


def _over(body: Any, e: Any, v: dict[Any, Any], times: Any = None) -> Any:
    """Sum over the index `e.args[1]`, which takes `e.args[2]` values."""
    total: Any = 0.0
    for w in _each(e.args[1], e.args[2], v):
        term = _value(body, w)
        if times is not None:
            # A term of weight zero counts as zero, even where its other factor is not finite.
            term = np.where(term == 0, 0.0, term * _value(times, w))
        total = total + term
    return total


def _log(argument: Any, v: dict[Any, Any]) -> Any:
    """A logarithm; of a quotient, the difference, which does not overflow."""
    if isinstance(argument, sympy.Mul) and len(argument.args) == 2:
        above, below = argument.args
        if isinstance(below, sympy.Pow) and below.exp == -1:
            return np.log(_value(above, v)) - np.log(_value(below.base, v))
    return np.log(_value(argument, v))


def _cases(e: sympy.Piecewise, v: dict[Any, Any]) -> Any:
    conditions, choices = [], []
    for choice, condition in e.args:
        conditions.append(np.asarray(_value(condition, v)))
        choices.append(np.asarray(_value(choice, v), dtype=np.float64))
    shape = np.broadcast_shapes(*(c.shape for c in conditions), *(c.shape for c in choices))
    return np.select(
        [np.broadcast_to(c, shape) for c in conditions],
        [np.broadcast_to(c, shape) for c in choices],
        default=np.nan,
    )


def _relation(e: Any, left: Any, right: Any) -> Any:
    match type(e):
        case sympy.Lt:
            return np.less(left, right)
        case sympy.Le:
            return np.less_equal(left, right)
        case sympy.Gt:
            return np.greater(left, right)
        case sympy.Ge:
            return np.greater_equal(left, right)
        case sympy.Eq:
            return np.equal(left, right)
        case sympy.Ne:
            return np.not_equal(left, right)
    raise TypeError(f"no value is known for {type(e).__name__} in {e}")
