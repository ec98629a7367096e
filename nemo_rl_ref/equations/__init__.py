# SPDX-License-Identifier: Apache-2.0
"""The one source of every displayed equation.

An :class:`Equation` holds a SymPy right-hand side, the meaning of its symbols, the paper that it
comes from, the function that computes it, and the check: both are evaluated in float64 on at
least 1,000 random inputs, as a rule extremes among them. A page shows one with the directive
``{equation} label``. `python -m nemo_rl_ref.equations` checks them all.
"""

from types import ModuleType

from nemo_rl_ref.equations._equation import (
    SAMPLES,
    TOLERANCE,
    Equation,
    EquationError,
    Inputs,
    Result,
    check,
    difference,
    draw_inputs,
    each,
    verify,
)
from nemo_rl_ref.equations._evaluate import evaluate
from nemo_rl_ref.equations._javascript import RUNTIME, sliders, to_javascript
from nemo_rl_ref.equations._latex import to_latex
from nemo_rl_ref.equations._symbols import Domain, Symbol

__all__ = [
    "RUNTIME",
    "SAMPLES",
    "TOLERANCE",
    "Domain",
    "Equation",
    "EquationError",
    "Inputs",
    "Result",
    "Symbol",
    "all_equations",
    "check",
    "difference",
    "draw_inputs",
    "each",
    "evaluate",
    "not_checked",
    "sliders",
    "to_javascript",
    "to_latex",
    "verify",
]


def _modules() -> tuple[ModuleType, ...]:
    """The modules that hold equations, in the order of the page."""
    from nemo_rl_ref.equations import (
        distillation,
        gae,
        grpo,
        kl_estimators,
        kl_regularized,
        likelihood,
        off_policy,
        online_softmax,
        policy_gradient,
        ppo,
        preferences,
        reductions,
        scaling,
    )

    return (
        likelihood,
        policy_gradient,
        kl_regularized,
        preferences,
        ppo,
        gae,
        off_policy,
        grpo,
        reductions,
        kl_estimators,
        distillation,
        scaling,
        online_softmax,
    )


def all_equations() -> dict[str, Equation]:
    """Return every equation by its label, module by module.

    Raises:
        ValueError: two equations have the same label.
    """
    found: dict[str, Equation] = {}
    for module in _modules():
        for equation in module.EQUATIONS:
            if equation.label in found:
                raise ValueError(f"label {equation.label!r} is given to two equations")
            found[equation.label] = equation
    return found


def not_checked() -> dict[str, str]:
    """Return why a displayed equation is not checked, by its label on the page."""
    found: dict[str, str] = {}
    for module in _modules():
        found |= getattr(module, "UNCHECKED", {})
    return found
