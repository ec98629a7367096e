# SPDX-License-Identifier: Apache-2.0
"""The equation: what is printed, what it is checked against, and the check."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from nemo_rl_ref.equations._evaluate import evaluate
from nemo_rl_ref.equations._latex import to_latex
from nemo_rl_ref.equations._symbols import Symbol, known

#: How many random inputs an equation is checked on.
SAMPLES = 1200
#: The largest difference allowed, as \|a - b\| / max(1, \|a\|, \|b\|).
TOLERANCE = 1e-9


class EquationError(AssertionError):
    """An equation and the code that is to implement it disagree."""


class Inputs(dict[str, Any]):
    """The random inputs of a check: tensors by the names of their symbols, sizes as ints.

    `inputs.beta` is `inputs["beta"]`. In a check of all inputs at once a tensor has shape
    `(n, …)`; in one made with :func:`each`, `(…)`.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no input is named {name!r}; there are {', '.join(self)}")
        return self[name]


Check = Callable[[Inputs], Any]


def each(check: Callable[[Inputs], Any]) -> Check:
    """Make a check of all inputs at once from one that takes a single input.

    Args:
        check: returns a number (a tensor or a float) for one input, or several by part.

    Returns:
        The check that calls it for every input and stacks the results.
    """

    def check_all(inputs: Inputs) -> Any:
        count = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
        results = []
        for place in range(count):
            one = Inputs({k: v[place] if isinstance(v, Tensor) else v for k, v in inputs.items()})
            results.append(check(one))
        if isinstance(results[0], dict):
            return {part: _stack([r[part] for r in results]) for part in results[0]}
        return _stack(results)

    return check_all


def _stack(results: list[Any]) -> np.ndarray:
    return np.array([float(result) for result in results])


@dataclass(frozen=True)
class Result:
    r"""What a check found.

    Attributes:
        label: the equation's label.
        inputs: number of random inputs.
        difference: the largest difference, \|a - b\| / max(1, \|a\|, \|b\|).
        printed: the value of the printed expression where the difference is largest.
        implemented: the value of the implementation there.
        at: that input, numbers by name.
    """

    label: str
    inputs: int
    difference: float
    printed: float
    implemented: float
    at: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Equation:
    r"""A displayed equation and the check that it says what the code does.

    Attributes:
        label: its name: ``dpo-loss`` is cited as ``{eq}`eq-dpo-loss``` in a page.
        title: a few words, as in "Gradient of the DPO loss".
        left: LaTeX of the left-hand side.
        right: the right-hand side, made under ``sympy.evaluate(False)``; or several, the steps of
            a derivation, each of which is checked.
        implementation: dotted names of what implements it, in this package and public.
        check: what the implementation returns for given inputs: one number for each input, or,
            as a dict by label, one for each right-hand side.
        lets: abbreviations used on the right, printed below it and put in by the check.
        also: further symbols that the check needs values for.
        source: key of the paper in the bibliography; empty for what is derived on the page.
        at: where in the paper, as in "Eq. 7".
        note: a sentence about the check, where the implementation needs to be read.
        prepare: changes inputs that were drawn, for values that depend on each other.
        relation: what stands between the sides, as a rule "=".
    """

    label: str
    title: str
    left: str
    right: sympy.Expr | tuple[sympy.Expr, ...]
    implementation: str | tuple[str, ...]
    check: Check
    lets: Mapping[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    also: tuple[Any, ...] = ()
    source: str = ""
    at: str = ""
    note: str = ""
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    relation: str = "="

    @property
    def steps(self) -> tuple[sympy.Expr, ...]:
        """The right-hand sides."""
        return self.right if isinstance(self.right, tuple) else (self.right,)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The dotted names of what implements it."""
        one = isinstance(self.implementation, str)
        return (self.implementation,) if one else self.implementation  # type: ignore[return-value]

    @property
    def latex(self) -> str:
        """The whole equation in LaTeX."""
        lines = [rf"{self.left} &{self.relation} {to_latex(self.steps[0])}"]
        lines += [f"&= {to_latex(step)}" for step in self.steps[1:]]
        lines += [rf"{to_latex(name)} &= {to_latex(what)}" for name, what in self.lets.items()]
        if len(lines) == 1:
            return lines[0].replace(" &", " ", 1)
        body = " \\\\\n".join(lines)
        return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"

    @property
    def symbols(self) -> list[Symbol]:
        """The symbols that it prints, in the order in which they first appear."""
        found: dict[Symbol, None] = {}
        for expression in (*self.steps, *self.lets.values()):
            for part in sympy.preorder_traversal(expression):
                if isinstance(part, sympy.Indexed):
                    found.setdefault(known(part.base))
                elif isinstance(part, sympy.Symbol) and not _names_base(part, expression):
                    found.setdefault(known(part))
        return list(found)

    def drawn(self) -> list[Symbol]:
        """List the symbols that need random values."""
        lets = {known(name) for name in self.lets}
        extra = [known(key) for key in self.also]
        every = dict.fromkeys([*self.symbols, *extra])
        return [s for s in every if s.domain is not None and s not in lets]


def _names_base(part: sympy.Symbol, expression: sympy.Basic) -> bool:
    """Say whether a symbol is only the name inside an indexed base."""
    return any(base.label == part for base in expression.atoms(sympy.IndexedBase))


# ---- inputs -------------------------------------------------------------------------------


def _sizes_of(equation: Equation) -> list[Symbol]:
    names = {axis.removesuffix("+1") for s in equation.drawn() for axis in s.shape}
    sizes = {s.name: s for s in equation.symbols if s.sizes}
    for name in names - set(sizes):
        sizes[name] = known(sympy.Symbol(name, integer=True))
    return [sizes[name] for name in sorted(sizes)]


def draw_inputs(equation: Equation, samples: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Draw random inputs, a fifth of them made of extreme values.

    Args:
        equation: the equation.
        samples: at least so many inputs in all.
        seed: seed of the random numbers; the label enters, too.

    Yields:
        For each combination of sizes, float64 arrays of shape `(n, …)` by name, and the sizes.
    """
    rng = np.random.default_rng([seed, zlib.crc32(equation.label.encode())])
    sizes = _sizes_of(equation)
    combinations = list(itertools.product(*(size.sizes for size in sizes)))
    count = -(-samples // len(combinations))
    for values in combinations:
        size = {s.name: value for s, value in zip(sizes, values, strict=True)}
        drawn: dict[str, Any] = dict(size)
        for s in equation.drawn():
            lengths = [size[a.removesuffix("+1")] + a.endswith("+1") for a in s.shape]
            drawn[s.name] = _draw(s, rng, (count, *lengths))
        yield equation.prepare(drawn) if equation.prepare else drawn


def _draw(s: Symbol, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    assert s.domain is not None
    values = s.domain.draw(rng, shape)
    if s.domain.extremes:
        rows = -(-shape[0] // 5)
        values[:rows] = rng.choice(s.domain.extremes, size=(rows, *shape[1:]))
    return values


# ---- the check ----------------------------------------------------------------------------


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    r"""Return \|a - b\| / max(1, \|a\|, \|b\|); infinite where either is not a number.

    Equal infinities differ by zero.
    """
    with np.errstate(all="ignore"):
        scaled = np.abs(a - b) / np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    return np.where(a == b, 0.0, np.where(np.isfinite(scaled), scaled, np.inf))


def check(equation: Equation, samples: int = SAMPLES, seed: int = 0) -> Result:
    """Evaluate an equation and its implementation on random inputs.

    Args:
        equation: the equation.
        samples: at least so many inputs.
        seed: seed of the random numbers.

    Returns:
        The largest difference and where it was found. Nothing is raised for a large one; see
        :func:`verify`.

    Raises:
        EquationError: the implementation raised an error, for example because the equation has no
            symbol that it needs.
        TypeError: the implementation did not return one number for each input.
    """
    worst = Result(equation.label, 0, -1.0, 0.0, 0.0)
    total = 0
    for drawn in draw_inputs(equation, samples, seed):
        count = next(len(v) for v in drawn.values() if isinstance(v, np.ndarray))
        total += count
        given = Inputs(
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in drawn.items()}
        )
        try:
            implemented = equation.check(given)
        except Exception as error:
            raise EquationError(
                f"equation {equation.label!r} ({equation.title}) cannot be checked against "
                f"{', '.join(equation.implementations)}: {type(error).__name__}: {error}"
            ) from error
        printed = printed_values(equation, drawn)
        for step, values in enumerate(printed):
            wanted = implemented[step] if isinstance(implemented, list | tuple) else implemented
            theirs = _as_numbers(equation, wanted, count)
            ours = np.broadcast_to(values, (count,))
            found = difference(ours, theirs)
            place = int(np.argmax(found))
            if found[place] > worst.difference:
                at = {
                    k: v[place].tolist() if isinstance(v, np.ndarray) else v
                    for k, v in drawn.items()
                }
                worst = Result(
                    equation.label, 0, float(found[place]), ours[place], theirs[place], at
                )
    return Result(
        equation.label,
        total,
        worst.difference,
        float(worst.printed),
        float(worst.implemented),
        worst.at,
    )


def printed_values(equation: Equation, drawn: dict[str, Any]) -> list[np.ndarray]:
    """Evaluate what is printed on inputs that were drawn."""
    values: dict[Any, Any] = {}
    for name, value in drawn.items():
        values[sympy.Symbol(name)] = values[sympy.IndexedBase(name)] = value
        values[sympy.Symbol(name, integer=True)] = value
    for name, what in equation.lets.items():
        values[name] = evaluate(what, values)
    return [evaluate(step, values) for step in equation.steps]


def _as_numbers(equation: Equation, values: Any, count: int) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (count,):
        raise TypeError(
            f"equation {equation.label!r}: its check returned shape {values.shape} for {count} "
            f"inputs, expected ({count},)"
        )
    return values


def verify(equation: Equation, samples: int = SAMPLES, seed: int = 0) -> Result:
    """Check an equation and raise where it and its implementation disagree.

    Args:
        equation: the equation.
        samples: at least so many inputs.
        seed: seed of the random numbers.

    Returns:
        What :func:`check` found.

    Raises:
        EquationError: the largest difference is above :data:`TOLERANCE`.
    """
    found = check(equation, samples, seed)
    if found.difference <= TOLERANCE:
        return found
    shown = "; ".join(f"{name} = {_short(value)}" for name, value in found.at.items())
    raise EquationError(
        f"equation {equation.label!r} ({equation.title}) is not what "
        f"{', '.join(equation.implementations)} computes: the equation gives "
        f"{found.printed:.12g}, the code {found.implemented:.12g}, a difference of "
        f"{found.difference:.3g} where {TOLERANCE:g} is allowed, at {shown}"
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.6g}"
