# SPDX-License-Identifier: Apache-2.0
"""An equation in JavaScript, and the sliders with which a page lets a reader move it.

What is translated is the SymPy object that is printed and checked, term by term and in the order of
`_evaluate`. `RUNTIME` is what the translation calls; pages and the test load the same text.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import sympy

from nemo_rl_ref.equations import _functions as f
from nemo_rl_ref.equations._equation import Equation, draw_inputs, printed_values
from nemo_rl_ref.equations._symbols import PROBABILITIES, Symbol

#: Sliders of an equation and of an array, at most; other entries stay as they were drawn.
MOST, OF_ARRAY = 8, 2

RUNTIME = """const equationRuntime = {
  logsigma: x => x > 0 ? -Math.log1p(Math.exp(-x)) : x - Math.log1p(Math.exp(x)),
  clip: (x, low, high) => Math.min(Math.max(x, low), high),
  at: (a, ...places) => places.reduce((part, place) => part[Math.round(place) - 1], a),
  sum: (low, high, term) => { let s = 0; for (let k = low; k <= high; k++) s += term(k); return s },
  product: (low, high, term) => { let p = 1; for (let k = low; k <= high; k++) p *= term(k); return p },
  weigh: (weight, x) => weight === 0 ? 0 : weight * x(),
};
"""

_CALLS = {
    sympy.exp: "Math.exp({})",
    sympy.Abs: "Math.abs({})",
    f.sigma: "Math.exp(f.logsigma({}))",
    f.logsigma: "f.logsigma({})",
    f.bracket: "({})",
    f.sg: "({})",
    f.maximum: "Math.max({}, {})",
    f.minimum: "Math.min({}, {})",
    f.clip: "f.clip({}, {}, {})",
    f.indicator: "({} ? 1 : 0)",
    sympy.Lt: "({} < {})",
    sympy.Le: "({} <= {})",
    sympy.Gt: "({} > {})",
    sympy.Ge: "({} >= {})",
    sympy.Eq: "({} === {})",
    sympy.Ne: "({} !== {})",
}


def to_javascript(equation: Equation, step: int = 0) -> str:
    """Write a right-hand side as the body of a JavaScript function.

    Args:
        equation: The equation.
        step: Which of its right-hand sides.

    Returns:
        Statements that read the inputs from ``v``, by name, arrays nested, call `RUNTIME`, and return
        the value.

    Raises:
        TypeError: If a function of it has no translation.
    """
    lets = [f"v.{name} = {_js(what)};" for name, what in equation.lets.items()]
    return " ".join(["v = {...v};", *lets, f"return {_js(equation.steps[step])};"])


def _js(e: Any) -> str:
    if call := _CALLS.get(type(e)):
        return call.format(*map(_js, e.args))
    match e:
        case sympy.Number():
            return f"({float(e)!r})"
        case sympy.Symbol():
            return f"v.{e.name}"
        case sympy.Indexed():
            return f"f.at(v.{e.base.label}, {', '.join(map(_js, e.indices))})"
        case sympy.Add():
            return f"({' + '.join(map(_js, e.args))})"
        case sympy.Mul():
            return f"({_js(e.args[0])}{''.join(map(_factor, e.args[1:]))})"
        case sympy.Pow():
            return f"Math.pow({_js(e.args[0])}, {_js(e.args[1])})"
        case sympy.log():
            return _log(e.args[0])
        case sympy.And():
            return f"({' && '.join(map(_js, e.args))})"
        case sympy.Piecewise():
            cases = "".join(f"{_js(when)} ? {_js(value)} : " for value, when in e.args)
            return f"({cases}NaN)"
        case sympy.Sum() | sympy.Product():
            index, low, high = e.args[1]
            name = "sum" if isinstance(e, sympy.Sum) else "product"
            return _over(index, _js(low), _js(high), _js(e.args[0]), name)
        case f.average() | f.mean_over():
            return f"({_sum(e, _js(e.args[0]))} / {_js(e.args[2])})"
        case f.sum_over():
            body = _js(e.args[0])
            return _sum(e, body if len(e.args) == 3 else _weigh(f"+{_js(e.args[3])}", body))
        case f.expected():
            return _sum(e, _weigh(_js(e.args[3]), _js(e.args[0])))
        case f.variance_of():
            weight, body = _js(e.args[3]), _js(e.args[0])
            mean = _sum(e, _weigh(weight, body))
            return f"(mean => {_sum(e, _weigh(weight, f'Math.pow({body} - mean, 2)'))})({mean})"
        case f.divergence():
            p, q, index, count = e.args[:4]
            body = f"{_js(p)} * (Math.log({_js(p)}) - Math.log({_js(q)}))"
            return _over(index, "1", _js(count), body)
    if e in (sympy.true, sympy.false):
        return "true" if e else "false"
    raise TypeError(f"no JavaScript is known for {type(e).__name__} in {e}")


def _factor(e: Any) -> str:
    inverse = isinstance(e, sympy.Pow) and e.exp == -1
    return f" / {_js(e.base)}" if inverse else f" * {_js(e)}"


def _log(argument: Any) -> str:
    """A logarithm; of a quotient, the difference, which does not overflow."""
    if isinstance(argument, sympy.Mul) and len(argument.args) == 2:
        above, below = argument.args
        if isinstance(below, sympy.Pow) and below.exp == -1:
            return f"(Math.log({_js(above)}) - Math.log({_js(below.base)}))"
    return f"Math.log({_js(argument)})"


def _weigh(weight: str, body: str) -> str:
    """A term of weight zero counts as zero, even where its other factor is not finite."""
    return f"f.weigh({weight}, () => {body})"


def _sum(e: Any, body: str) -> str:
    return _over(e.args[1], "1", _js(e.args[2]), body)


def _over(index: Any, low: str, high: str, body: str, name: str = "sum") -> str:
    """A sum over an index, whose value the body finds in ``v``, too."""
    return f"f.{name}({low}, {high}, k => ((v) => {body})({{...v, {index.name}: k}}))"


# ---- sliders ------------------------------------------------------------------------------


def sliders(equation: Equation) -> dict[str, Any]:
    """Choose inputs for a page: the function, values to begin with, and what can be moved.

    Returns:
        ``body``, see `to_javascript`; ``values``, all inputs by name; ``sliders``, each with ``name``,
        ``places`` (from 0; empty for a number), ``latex``, ``meaning``, ``low``, ``high``, ``step``
        and ``sums_to_one``. Values that depend on others, see `Equation.prepare`, have none.
    """
    batches = list(draw_inputs(equation, 400))
    drawn = batches[min(1, len(batches) - 1)]
    (numbers,) = printed_values(equation, drawn)[:1]
    count = next(len(value) for value in drawn.values() if isinstance(value, np.ndarray))
    usual = np.arange(-(-count // 5), count)  # the rows before are made of extreme values
    size = np.abs(np.broadcast_to(numbers, (count,))[usual])
    row = usual[np.argsort(size)[np.isfinite(size).sum() // 2]]
    values: dict[str, Any] = {}
    for name, value in drawn.items():
        values[name] = _rounded(value[row]) if isinstance(value, np.ndarray) else value
    found: list[dict[str, Any]] = []
    free = _free(equation)
    for symbol in sorted(equation.drawn(), key=lambda symbol: bool(symbol.shape)):  # numbers first
        if symbol.name in free:
            found += _of_symbol(symbol, drawn[symbol.name][usual], values[symbol.name])
    return {"body": to_javascript(equation), "values": values, "sliders": found[:MOST]}


def _free(equation: Equation) -> set[str]:
    """The names of inputs that no other is computed from, and that are not computed themselves."""
    raw = next(draw_inputs(replace(equation, prepare=None), 400))
    arrays = {name for name, value in raw.items() if isinstance(value, np.ndarray)}
    if equation.prepare is None:
        return arrays
    before, free = equation.prepare(dict(raw)), set()
    for name in arrays:
        after = equation.prepare({**raw, name: np.roll(raw[name], 1, axis=0)})
        kept = all(np.array_equal(after[other], before[other]) for other in before if other != name)
        if kept and np.array_equal(before[name], raw[name]):
            free.add(name)
    return free


def _rounded(value: np.ndarray) -> Any:
    return np.vectorize(lambda x: float(f"{x:.4g}"))(value).tolist()


def _of_symbol(symbol: Symbol, drawn: np.ndarray, value: Any) -> list[dict[str, Any]]:
    """One slider a number; from the 5th to the 95th percentile of what the check draws."""
    low, high = np.quantile(drawn, (0.05, 0.95))
    whole = bool((drawn == np.round(drawn)).all())
    if whole:
        low, high = drawn.min(), drawn.max()
    if high <= low:
        return []
    made = []
    for places in itertools.islice(np.ndindex(np.shape(value)), OF_ARRAY):
        latex = symbol.latex
        for number, place in enumerate(places, start=1):
            latex = latex.replace(f"#{number}", str(place + 1))
        here = float(np.asarray(value)[places])
        made.append(
            {
                "name": symbol.name,
                "places": list(places),
                "latex": latex
                if "#" in symbol.latex or not places
                else rf"{latex},\ {places[0] + 1}",
                "meaning": symbol.meaning,
                "low": float(f"{min(low, here):.3g}"),
                "high": float(f"{max(high, here):.3g}"),
                "step": 1 if whole else float(f"{(high - low) / 200:.1g}"),
                "sums_to_one": symbol.domain is PROBABILITIES,
            }
        )
    return made
