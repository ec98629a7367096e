# SPDX-License-Identifier: Apache-2.0
"""Wrong versions of an equation: each differs from it in one place."""

from collections.abc import Iterator
from dataclasses import replace

import sympy

from nemo_rl_ref.equations import Equation, to_latex
from nemo_rl_ref.equations import _functions as f


def wrong_nodes(node: sympy.Basic) -> Iterator[sympy.Basic]:
    """List what could have been typed instead of a node."""
    match node:
        case sympy.Mul() if node.args[0] == -1:
            yield sympy.Mul(*node.args[1:])
        case sympy.Add():
            for place in range(len(node.args)):
                yield sympy.Add(*node.args[:place], *node.args[place + 1 :])
        case sympy.Pow() if node.exp == -1:
            yield node.base
        case sympy.Rational() if node not in (0, 1, -1):
            yield node + 1
        case f.sigma() | f.logsigma():
            yield node.func(-node.args[0])
        case f.maximum():
            yield f.minimum(*node.args)
        case f.minimum():
            yield f.maximum(*node.args)
        case f.clip():
            yield node.args[0]
        case f.average():
            yield f.sum_over(*node.args)
        case sympy.log():
            yield node.args[0]
        case sympy.Indexed() | sympy.Symbol() if not node.is_integer:
            yield sympy.Rational(3, 2) * node


def wrong_expressions(node: sympy.Basic) -> Iterator[sympy.Basic]:
    """List the expressions that differ from `node` in one place."""
    if isinstance(node, sympy.Symbol) and not _has_value(node):
        return
    yield from wrong_nodes(node)
    if isinstance(node, sympy.Indexed | sympy.Symbol):
        return
    for place, part in enumerate(node.args):
        if isinstance(part, sympy.Tuple | sympy.core.symbol.Str):
            continue
        for wrong in wrong_expressions(part):
            yield node.func(*node.args[:place], wrong, *node.args[place + 1 :])


def _has_value(symbol: sympy.Symbol) -> bool:
    from nemo_rl_ref.equations._symbols import known

    return known(symbol).domain is not None


def mutants(equation: Equation) -> Iterator[tuple[str, Equation]]:
    """List wrong versions of an equation, each with the LaTeX of what was changed."""
    parts = [*equation.steps, *equation.lets.values()]
    bases = {base for part in parts for base in part.atoms(sympy.IndexedBase)}
    names = {base.label for base in bases}
    symbols = {n for part in parts for n in part.free_symbols if isinstance(n, sympy.Symbol)}
    # The check needs values for all that the right version has.
    equation = replace(equation, also=(*equation.also, *bases, *(symbols - names)))
    with sympy.evaluate(False):
        for number, step in enumerate(equation.steps):
            for wrong in wrong_expressions(step):
                steps = (*equation.steps[:number], wrong, *equation.steps[number + 1 :])
                yield to_latex(wrong), replace(equation, right=steps)
        for name, what in equation.lets.items():
            for wrong in wrong_expressions(what):
                lets = {**equation.lets, name: wrong}
                yield f"{to_latex(name)} = {to_latex(wrong)}", replace(equation, lets=lets)
