# SPDX-License-Identifier: Apache-2.0
"""Every displayed equation against the code that it describes, and the machinery of the check."""

import importlib
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from equation_mutants import mutants
from still_true import STILL_TRUE

from nemo_rl_ref.equations import (
    SAMPLES,
    TOLERANCE,
    Equation,
    EquationError,
    all_equations,
    check,
    difference,
    draw_inputs,
    each,
    evaluate,
    not_checked,
    to_latex,
    verify,
)
from nemo_rl_ref.equations import _functions as f
from nemo_rl_ref.equations import notation as s
from nemo_rl_ref.equations._symbols import (
    PROBABILITIES,
    REAL,
    Domain,
    all_symbols,
    known,
    symbol,
)

EQUATIONS = all_equations()


# ---- the equations of the pages ---------------------------------------------------------------


@pytest.mark.parametrize("label", EQUATIONS)
def test_an_equation_is_what_the_code_computes(label):
    found = verify(EQUATIONS[label], seed=1)  # the site uses seed 0
    assert found.inputs >= 1000
    assert found.difference <= TOLERANCE


@pytest.mark.parametrize("label", EQUATIONS)
def test_a_wrong_version_of_an_equation_is_caught(label):
    still_true = {text for texts in STILL_TRUE.get(label, {}).values() for text in texts}
    missed = []
    for text, wrong in mutants(EQUATIONS[label]):
        try:
            found = check(wrong, samples=120)
        except IndexError:
            continue  # it could not even be evaluated
        if found.difference <= TOLERANCE:
            missed.append(text)
    assert set(missed) == still_true


@pytest.mark.parametrize("label", EQUATIONS)
def test_extremes_are_among_the_inputs(label):
    equation = EQUATIONS[label]
    for drawn in draw_inputs(replace(equation, prepare=None), SAMPLES):
        for each_symbol in equation.drawn():
            extremes = each_symbol.domain.extremes
            if extremes:
                assert np.isin(drawn[each_symbol.name], extremes).any(), each_symbol.name


@pytest.mark.parametrize("label", EQUATIONS)
def test_an_equation_names_what_exists(label):
    equation = EQUATIONS[label]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", label)
    assert equation.title[0].isupper() or equation.title[0] == "$"
    for name in equation.implementations:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute)), name


@pytest.mark.parametrize("label", EQUATIONS)
def test_no_trace_of_sympy_is_printed(label):
    latex = EQUATIONS[label].latex
    for trace in (
        r"\+ *-",
        r"- *-",
        r"\b1 \\cdot",
        r"operatorname\{(?!clip|std)",
        "Indexed",
        "#",
        "_{}",
    ):
        assert not re.search(trace, latex), (trace, latex)
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left") == latex.count(r"\right")


def test_one_letter_stands_for_one_thing():
    meanings: dict[str, set[str]] = {}
    for equation in EQUATIONS.values():
        for each_symbol in equation.symbols:
            meanings.setdefault(each_symbol.plain_latex, set()).add(each_symbol.meaning)
    assert {latex: found for latex, found in meanings.items() if len(found) > 1} == {}


def test_every_source_is_in_the_bibliography(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "references.bib").read_text(encoding="utf-8")
    keys = set(re.findall(r"^@\w+\{([^,]+),", text, flags=re.MULTILINE))
    assert {e.source for e in EQUATIONS.values()} - {""} <= keys


def test_what_is_not_checked_has_a_reason():
    for label, why in not_checked().items():
        assert label.startswith("eq-")
        assert len(why) > 10


# ---- the check --------------------------------------------------------------------------------


def square(**changes):
    """An equation that is true: a square."""
    given = {
        "label": "square",
        "title": "A square",
        "left": "s",
        "right": s.m * s.m,
        "implementation": "torch.square",
        "check": lambda inputs: inputs.m.square(),
    }
    return Equation(**(given | changes))


def test_a_true_equation_passes():
    found = verify(square())
    assert (found.inputs, found.difference) == (SAMPLES, 0.0)


def test_a_wrong_one_is_named_with_its_inputs():
    with pytest.raises(EquationError, match=r"equation 'square' \(A square\) is not what torch.sq"):
        verify(square(check=lambda inputs: inputs.m**3))
    with pytest.raises(EquationError, match=r"the equation gives .*, the code .*, at m = "):
        verify(square(check=lambda inputs: inputs.m**3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_a_difference(bad):
    with pytest.raises(EquationError, match="a difference of inf"):
        verify(square(check=lambda inputs: inputs.m.square() + bad))


def test_a_single_wrong_value_is_enough():
    def almost(inputs):
        values = inputs.m.square()
        values[7] += 1e-6
        return values

    with pytest.raises(EquationError):
        verify(square(check=almost))


def test_each_step_is_checked():
    verify(square(right=(s.m * s.m, s.m**2)))
    with pytest.raises(EquationError):
        verify(square(right=(s.m * s.m, s.m**3)))


def test_a_check_may_return_one_result_for_each_step():
    verify(square(right=(s.m, s.m * s.m), check=lambda inputs: [inputs.m, inputs.m.square()]))


def test_abbreviations_are_put_in():
    with sympy.evaluate(False):
        verify(
            square(
                right=s.m * s.beta,
                lets={s.m: s.h_w - s.h_l},
                check=lambda inputs: (inputs.h_w - inputs.h_l) * inputs.beta,
            )
        )


def test_a_check_that_returns_another_shape_is_refused():
    with pytest.raises(TypeError, match=r"'square': its check returned shape \(\) for 1200 inputs"):
        check(square(check=lambda inputs: inputs.m.sum()))


def test_each_gives_one_input_at_a_time():
    seen = []

    @each
    def one(inputs):
        seen.append(inputs.m.shape)
        return inputs.m**2

    verify(square(check=one), samples=10)
    assert seen == [torch.Size([])] * 10


def test_an_input_that_is_not_there_is_named():
    with pytest.raises(EquationError, match="'square' .*: no input is named 'q'; there are m"):
        check(square(check=lambda inputs: inputs.q))


def test_inputs_are_the_same_in_every_run_and_differ_with_the_seed():
    first, again, other = (next(draw_inputs(square(), 50, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first["m"], again["m"])
    assert not np.array_equal(first["m"], other["m"])


def test_every_size_is_tried():
    equation = square(right=f.average(s.rewards[s.i], s.i, s.G), check=None)
    shapes = [drawn["rewards"].shape for drawn in draw_inputs(equation, 1000)]
    assert shapes == [(334, 2), (334, 3), (334, 8)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.0, 1.5, 0.5 / 1.5), (0.0, 0.5, 0.5), (100.0, 101.0, 1 / 101), (math.inf, math.inf, 0.0)],
)
def test_the_difference_is_relative_above_one(a, b, expected):
    assert difference(np.array([a]), np.array([b])) == pytest.approx([expected])


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.nan, math.nan), (math.inf, -math.inf)])
def test_a_difference_from_what_is_no_number_is_infinite(values):
    a, b = values
    assert difference(np.array([a]), np.array([b])) == [math.inf]


# ---- symbols ----------------------------------------------------------------------------------


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="name 'beta' is a symbol already"):
        symbol("beta", r"\beta", "something else", REAL)


def test_an_unknown_symbol_is_refused():
    with pytest.raises(KeyError, match="q is no symbol of nemo_rl_ref.equations"):
        to_latex(sympy.Symbol("q"))


def test_symbols_say_what_they_mean():
    for each_symbol in all_symbols():
        assert len(each_symbol.meaning) > 3
        assert each_symbol.meaning[-1] != "."


def test_probabilities_add_up_to_one():
    drawn = PROBABILITIES.draw(np.random.default_rng(0), (100, 4, 5))
    assert np.allclose(drawn.sum(-1), 1, atol=1e-15)
    assert drawn.min() > 0


def test_a_domain_without_extremes_is_drawn_as_it_is():
    ones = Domain(lambda rng, shape: np.ones(shape))
    made = symbol("test_one", "o", "always one", ones)
    drawn = next(draw_inputs(square(right=made, check=None), 10))
    assert (drawn["test_one"] == 1).all()


# ---- printing ---------------------------------------------------------------------------------


def printed():
    """Expressions as typed, with the LaTeX that an author would write."""
    m, beta, A, rho, eps, G, i = s.m, s.beta, s.A, s.rho, s.eps, s.G, s.i
    r, pi, ref, R, y, Y = s.rewards, s.pi, s.ref, s.R, s.y, s.Y
    average = f.average(r[i], i, G)
    p, q = r"\pi_\theta(y \mid x)", r"\pi_{\mathrm{ref}}(y \mid x)"
    return [
        (m - beta, r"m - \beta"),
        (-m, "-m"),
        (-m * beta, r"-m \beta"),
        (-(m - beta), r"-(m - \beta)"),
        (m - (beta - A), r"m - (\beta - A)"),
        (m + (beta - A), r"m + \beta - A"),
        (beta * (m - A), r"\beta \, (m - A)"),
        ((m - A) * beta, r"(m - A) \beta"),
        (m / beta, r"\frac{m}{\beta}"),
        ((m - A) / beta, r"\frac{m - A}{\beta}"),
        (1 / beta, r"\frac{1}{\beta}"),
        (1 / beta * m, r"\frac{1}{\beta} m"),
        (m * sympy.Rational(1, 2), r"m \frac{1}{2}"),
        (sympy.Rational(1, 2) * m**2, r"\frac{1}{2} m^{2}"),
        (2 * m, "2 m"),
        (m * 2, r"m \cdot 2"),
        (m**2 / 2, r"\frac{m^{2}}{2}"),
        ((m - A) ** 2, "(m - A)^{2}"),
        (sympy.sqrt(m), r"\sqrt{m}"),
        (r[i] ** 2, "r_{i}^{2}"),
        (pi[y] ** 2, rf"{p}^{{2}}"),
        (sympy.log(pi[y] / ref[y]), rf"\log \frac{{{p}}}{{{q}}}"),
        (sympy.log(m + A), r"\log(m + A)"),
        (sympy.log(m) * beta, r"(\log m) \beta"),
        (beta * sympy.log(m), r"\beta \log m"),
        (sympy.exp(-m), "e^{-m}"),
        (sympy.exp(m / beta), r"\exp\left( \frac{m}{\beta} \right)"),
        (f.sigma(-m), r"\sigma(-m)"),
        (f.logsigma(m), r"\log \sigma(m)"),
        (f.minimum(rho * A, f.clip(rho, 1 - eps, 1 + eps) * A),
         r"\min(\rho A,\ \operatorname{clip}(\rho,\ 1 - \varepsilon,\ 1 + \varepsilon) A)"),
        (r[i] - average, r"r_{i} - \frac{1}{G} \sum_{i=1}^{G} r_{i}"),
        (average * m, r"\left( \frac{1}{G} \sum_{i=1}^{G} r_{i} \right) m"),
        (sympy.Sum(r[i], (i, 1, G)), r"\sum_{i=1}^{G} r_{i}"),
        (sympy.Sum(r[i], (i, 1, G)) ** 2, r"\left( \sum_{i=1}^{G} r_{i} \right)^{2}"),
        (f.sum_over(pi[y] * R[y], y, Y), rf"\sum_{{y}} {p} r(x, y)"),
        (f.sum_over(r[s.j], s.j, G, sympy.Ne(s.j, i)), r"\sum_{j \ne i} r_{j}"),
        (f.expectation(R[y], y, Y, pi[y], r"y \sim \pi_\theta"),
         r"\mathbb{E}_{y \sim \pi_\theta}[r(x, y)]"),
        (f.kl(pi[y], ref[y], y, Y, r"\pi_\theta", r"\pi_{\mathrm{ref}}"),
         r"\mathrm{KL}(\, \pi_\theta \,\|\, \pi_{\mathrm{ref}} \,)"),
        (sympy.Piecewise((m, sympy.Gt(A, 0)), (0, True)),
         r"\begin{cases} m & \text{if } A > 0 \\ 0 & \text{otherwise} \end{cases}"),
        (f.indicator(sympy.Le(m, 0)), r"\mathbf{1}[m \le 0]"),
        (sympy.Abs(m), "|m|"),
    ]  # fmt: skip


with sympy.evaluate(False):
    PRINTED = printed()


@pytest.mark.parametrize(("expression", "latex"), PRINTED, ids=[latex for _, latex in PRINTED])
def test_an_expression_is_printed_as_it_was_typed(expression, latex):
    assert to_latex(expression) == latex


def test_what_cannot_be_printed_is_refused():
    with pytest.raises(TypeError, match="no LaTeX is known for sin"):
        to_latex(sympy.sin(s.m))


# ---- values -----------------------------------------------------------------------------------


def value_of(expression, **values):
    """Evaluate on one input."""
    given = {}
    for name, value in values.items():
        if isinstance(value, int):
            given[sympy.Symbol(name, integer=True)] = value
        else:
            given[sympy.Symbol(name)] = given[sympy.IndexedBase(name)] = np.array([value])
    return evaluate(expression, given).item()


def test_values_are_what_they_should_be():
    rewards = [1.0, 2.0, 6.0]
    with sympy.evaluate(False):
        others = f.sum_over(s.rewards[s.j], s.j, s.G, sympy.Ne(s.j, s.i))
        cases = [
            (f.average(s.rewards[s.i], s.i, s.G), {"rewards": rewards, "G": 3}, 3.0),
            (others, {"rewards": rewards, "G": 3, "i": 2}, 7.0),
            (sympy.Sum(s.rewards[s.i], (s.i, 2, s.G)), {"rewards": rewards, "G": 3}, 8.0),
            (sympy.Product(s.rewards[s.i], (s.i, 1, 3)), {"rewards": rewards}, 12.0),
            (f.logsigma(s.m), {"m": -800.0}, -800.0),
            (f.sigma(s.m), {"m": 0.0}, 0.5),
            (f.clip(s.m, 0, 1), {"m": 3.0}, 1.0),
            (f.minimum(s.m, 2), {"m": 3.0}, 2.0),
            (f.indicator(sympy.Ge(s.m, 3)), {"m": 3.0}, 1.0),
            (sympy.log(s.m / s.A), {"m": 1e-200, "A": 1e-100}, -100 * math.log(10)),
            (sympy.Abs(s.m), {"m": -3.0}, 3.0),
            (sympy.sqrt(s.m), {"m": 9.0}, 3.0),
        ]
        for expression, values, expected in cases:
            assert value_of(expression, **values) == pytest.approx(expected, rel=1e-14)


def test_expectations_are_weighted_sums():
    with sympy.evaluate(False):
        under = f.expectation(s.R[s.y], s.y, s.Y, s.pi[s.y], "y")
        spread = f.variance(s.R[s.y], s.y, s.Y, s.pi[s.y], "y")
        divergence = f.kl(s.pi[s.y], s.ref[s.y], s.y, s.Y, "p", "q")
    given = {"R": [1.0, 3.0], "pi": [0.25, 0.75], "ref": [0.5, 0.5], "Y": 2}
    assert value_of(under, **given) == 2.5
    assert value_of(spread, **given) == pytest.approx(0.75)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert value_of(divergence, **given) == pytest.approx(expected)


def test_a_term_of_weight_zero_counts_as_zero():
    with sympy.evaluate(False):
        under = f.expectation(sympy.log(s.R[s.y]), s.y, s.Y, s.pi[s.y], "y")
    assert value_of(under, R=[0.0, math.e], pi=[0.0, 1.0], Y=2) == 1.0


def test_an_index_outside_its_axis_is_refused():
    with pytest.raises(IndexError, match="index 3 of rewards is outside its axis 1 of 2"):
        value_of(s.rewards[3], rewards=[1.0, 2.0])
    with pytest.raises(IndexError, match="index 0"):
        value_of(s.rewards[0], rewards=[1.0, 2.0])


def test_what_has_no_value_is_refused():
    with pytest.raises(TypeError, match="no value is known for sin"):
        value_of(sympy.sin(s.m), m=1.0)


def test_nested_sums_that_sympy_merged_are_refused():
    with sympy.evaluate(False):
        inner = sympy.Sum(s.rewards[s.i], (s.i, 1, s.j))
        nested = sympy.Sum(inner, (s.j, 1, s.G))
    with pytest.raises(TypeError, match="one sum of nested ones"):
        value_of(nested, rewards=[1.0, 2.0], G=2)


def test_known_symbols_are_found_by_their_sympy_name():
    assert known(s.beta).latex == r"\beta"
