# SPDX-License-Identifier: Apache-2.0
"""SymPy expressions as LaTeX, as an author would write it.

Expressions are made under ``sympy.evaluate(False)``, so they still are what was typed. This
prints exactly that: the same order of terms and factors, ``1/G * S`` as a fraction before a sum,
``S/G`` as a fraction with the sum on top.
"""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from nemo_rl_ref.equations import _functions as f
from nemo_rl_ref.equations._symbols import known

# How tightly a printed piece holds together.
SUM, PRODUCT, OPEN, ATOM = range(4)  # OPEN: a product or function that runs on to its right
RELATIONS = {
    sympy.Lt: "<",
    sympy.Gt: ">",
    sympy.Le: r"\le",
    sympy.Ge: r"\ge",
    sympy.Eq: "=",
    sympy.Ne: r"\ne",
}
NAMED = {
    f.maximum: r"\max",
    f.minimum: r"\min",
    f.clip: r"\operatorname{clip}",
    f.sg: r"\mathrm{sg}",
}


def to_latex(expression: sympy.Basic) -> str:
    """Print an expression."""
    return _print(sympy.sympify(expression))[0]


def _fence(text: str, left: str = "(", right: str = ")") -> str:
    """Put brackets around a piece, tall ones around tall pieces."""
    tall = any(mark in text for mark in (r"\frac", r"\sum", r"\prod", r"\big"))
    return rf"\left{left} {text} \right{right}" if tall else f"{left}{text}{right}"


def _held(expression: sympy.Basic, at_least: int) -> str:
    text, strength = _print(expression)
    return text if strength >= at_least else _fence(text)


def _print(e: sympy.Basic) -> tuple[str, int]:
    """Return a piece's LaTeX and how tightly it holds together."""
    match e:
        case sympy.Integer() | sympy.Float():
            return str(e), ATOM if e >= 0 else SUM
        case sympy.Rational():
            sign = "-" if e < 0 else ""
            return rf"{sign}\frac{{{abs(e.p)}}}{{{e.q}}}", SUM if sign else ATOM
        case sympy.Symbol():
            return known(e).latex, ATOM
        case sympy.Indexed():
            latex = known(e.base).latex
            for number, place in enumerate(e.indices, start=1):
                latex = latex.replace(f"#{number}", to_latex(place))
            return latex, ATOM
        case sympy.Add():
            return _print_add(e), SUM
        case sympy.Mul():
            return _print_mul(e)
        case sympy.Pow():
            return _print_pow(e)
        case sympy.exp():
            return _print_exp(e.args[0]), ATOM
        case sympy.log():
            return _applied(r"\log", e.args[0])
        case f.logsigma():
            return _applied(r"\log \sigma", e.args[0], always=True)
        case f.sigma():
            return rf"\sigma{_fence(to_latex(e.args[0]))}", ATOM
        case f.bracket():
            return _fence(to_latex(e.args[0]), "[", "]"), ATOM
        case f.indicator():
            return rf"\mathbf{{1}}{_fence(to_latex(e.args[0]), '[', ']')}", ATOM
        case sympy.Abs():
            return _fence(to_latex(e.args[0]), "|", "|"), ATOM
        case f.maximum() | f.minimum() | f.clip() | f.sg():
            inner = r",\ ".join(to_latex(a) for a in e.args)
            return NAMED[type(e)] + _fence(inner), ATOM
        case sympy.Sum() | sympy.Product():
            return _print_sum(e)
        case sympy.Piecewise():
            return _print_cases(e), ATOM
        case sympy.And():
            return r"\ \text{and}\ ".join(to_latex(a) for a in e.args), SUM
        case AppliedUndef():
            raise TypeError(
                f"{e.func} is an undefined function; give it a value and a way to print it"
            )
        case _ if type(e) in RELATIONS:
            return f"{to_latex(e.lhs)} {RELATIONS[type(e)]} {to_latex(e.rhs)}", SUM
    return _print_mean(e)


def _print_mean(e: sympy.Basic) -> tuple[str, int]:
    """Return the LaTeX of means, expectations and sums over what has a name."""
    match e:
        case f.mean_over():
            return rf"\mathbb{{E}}_{{{e.args[3]}}}{_fence(to_latex(e.args[0]), '[', ']')}", ATOM
        case f.expected() | f.variance_of():
            mark = r"\mathbb{E}" if isinstance(e, f.expected) else r"\mathrm{Var}"
            return rf"{mark}_{{{e.args[4]}}}{_fence(to_latex(e.args[0]), '[', ']')}", ATOM
        case f.divergence():
            return rf"\mathrm{{KL}}(\, {e.args[4]} \,\|\, {e.args[5]} \,)", ATOM
        case f.sum_over():
            below = to_latex(e.args[3]) if len(e.args) == 4 else to_latex(e.args[1])
            return rf"\sum_{{{below}}} {_held(e.args[0], PRODUCT)}", OPEN
        case f.average():
            index, size = to_latex(e.args[1]), to_latex(e.args[2])
            body = _held(e.args[0], PRODUCT)
            return rf"\frac{{1}}{{{size}}} \sum_{{{index}=1}}^{{{size}}} {body}", OPEN
    raise TypeError(f"no LaTeX is known for {type(e).__name__} in {e}")


def _print_sum(e: sympy.Basic) -> tuple[str, int]:
    mark = r"\sum" if isinstance(e, sympy.Sum) else r"\prod"
    body, (index, low, high) = _without_one(e.args[0]), e.args[1]
    limits = rf"_{{{to_latex(index)}={to_latex(low)}}}^{{{to_latex(high)}}}"
    return f"{mark}{limits} {_held(body, PRODUCT)}", OPEN


def _without_one(e: sympy.Basic) -> sympy.Basic:
    """Take away the factor 1 that SymPy puts into an unevaluated sum."""
    if isinstance(e, sympy.Mul) and len(e.args) == 2 and e.args[0] == 1:
        return e.args[1]
    return e


def _terms(e: sympy.Basic) -> list[sympy.Basic]:
    if isinstance(e, sympy.Add):
        return [term for arg in e.args for term in (_terms(arg) if arg is e.args[0] else [arg])]
    return [e]


def _print_add(e: sympy.Add) -> str:
    text = ""
    for term in _terms(e):
        sign, rest = _sign(term)
        printed, strength = _print(rest)
        if strength == SUM and (sign == "-" or not isinstance(rest, sympy.Add)):
            printed = _fence(printed)
        if not text:
            text = f"-{printed}" if sign == "-" else printed
        else:
            text += f" {sign or '+'} {printed}"
    return text


def _sign(e: sympy.Basic) -> tuple[str, sympy.Basic]:
    """Take a leading minus off a product or a number."""
    if isinstance(e, sympy.Mul):
        sign, first = _sign(e.args[0])
        if sign:
            rest = e.args[1:]
            if first == 1 and len(rest) == 1 and not _is_inverse(rest[0]):
                return sign, rest[0]
            return sign, sympy.Mul(first, *rest, evaluate=False)
    elif isinstance(e, sympy.Rational) and e < 0:
        return "-", -e
    return "", e


def _is_inverse(e: sympy.Basic) -> bool:
    return isinstance(e, sympy.Pow) and isinstance(e.exp, sympy.Rational) and e.exp < 0


def _print_mul(e: sympy.Mul) -> tuple[str, int]:
    sign, rest = _sign(e)
    if sign:
        return "-" + _held(rest, PRODUCT), SUM
    left, *others = e.args
    text, strength = _print(left)
    for other in others:
        if _is_inverse(other):
            below = (
                sympy.Pow(other.base, -other.exp, evaluate=False) if other.exp != -1 else other.base
            )
            text, strength = rf"\frac{{{text}}}{{{to_latex(below)}}}", ATOM
            continue
        if text == "1":
            text, strength = _print(other)
            continue
        if strength in (SUM, OPEN):
            text = _fence(text)
        right, right_strength = _print(other)
        if right_strength == SUM:
            right = _fence(right)
        thin = r"\, " if right[0] in "([" or right.startswith(r"\left") else ""
        between = r"\cdot " if right[0].isdigit() else thin
        text = f"{text} {between}{right}"
        strength = OPEN if right_strength == OPEN else PRODUCT
    return text, strength


def _print_pow(e: sympy.Pow) -> tuple[str, int]:
    base, exponent = e.args
    if exponent == sympy.Rational(1, 2):
        return rf"\sqrt{{{to_latex(base)}}}", ATOM
    if _is_inverse(e):
        below = base if exponent == -1 else sympy.Pow(base, -exponent, evaluate=False)
        return rf"\frac{{1}}{{{to_latex(below)}}}", ATOM
    held, strength = _print(base)
    if strength < ATOM or "^" in held or (isinstance(base, sympy.Symbol) and " " in held):
        held = _fence(held)
    return f"{held}^{{{to_latex(exponent)}}}", ATOM


def _print_exp(argument: sympy.Basic) -> str:
    inner = to_latex(argument)
    tall = any(mark in inner for mark in (r"\sum", r"\frac", r"\log", r"\left"))
    return rf"\exp{_fence(inner)}" if tall else f"e^{{{inner}}}"


def _applied(name: str, argument: sympy.Basic, *, always: bool = False) -> tuple[str, int]:
    inner, strength = _print(argument)
    if always or strength < ATOM:
        return f"{name}{_fence(inner)}", ATOM
    return f"{name} {inner}", OPEN


def _print_cases(e: sympy.Piecewise) -> str:
    lines = []
    for value, condition in e.args:
        always = condition == True  # noqa: E712, SymPy's own
        when = r"\text{otherwise}" if always else rf"\text{{if }} {to_latex(condition)}"
        lines.append(rf"{to_latex(value)} & {when}")
    return r"\begin{cases} " + r" \\ ".join(lines) + r" \end{cases}"
