# SPDX-License-Identifier: Apache-2.0
"""The functions that SymPy lacks, or that it would reorder or overflow in.

Each is only a name with arguments here. How it is printed stands in `_latex.py`, what its value
is in `_evaluate.py`.
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.symbol import Str


class sigma(sympy.Function):
    """The logistic function, 1 / (1 + exp(-x))."""

    nargs = 1


class logsigma(sympy.Function):
    """The logarithm of the logistic function."""

    nargs = 1


class clip(sympy.Function):
    """clip(x, low, high): x, but at least `low` and at most `high`."""

    nargs = 3


class maximum(sympy.Function):
    """The larger of two, printed in the order given."""

    nargs = 2


class minimum(sympy.Function):
    """The smaller of two, printed in the order given."""

    nargs = 2


class sg(sympy.Function):
    """Stop-gradient: the value is the argument's, the gradient is zero."""

    nargs = 1


class bracket(sympy.Function):
    """The argument in square brackets, for a group that is to be seen as one."""

    nargs = 1


class indicator(sympy.Function):
    """1 where a relation holds, else 0: ``indicator(sympy.Lt(a, b))``."""

    nargs = 1


class sum_over(sympy.Function):
    """sum_over(body, index, size): a sum over all values of an index, printed without limits.

    A fourth argument is a relation that a term has to fulfill, like ``sympy.Ne(j, i)``.
    """

    nargs = (3, 4)


class mean_over(sympy.Function):
    r"""mean_over(body, index, size, under): the mean over an index, as an expectation.

    Printed as ``\mathbb{E}_{under}[body]``; see :func:`mean`.
    """

    nargs = 4


class expected(sympy.Function):
    r"""expected(body, index, size, weight, under): a weighted sum over an index.

    Printed as ``\mathbb{E}_{under}[body]``; see :func:`expectation`.
    """

    nargs = 5


class variance_of(sympy.Function):
    r"""variance_of(body, index, size, weight, under), printed as ``\mathrm{Var}_{under}[body]``."""

    nargs = 5


class divergence(sympy.Function):
    r"""divergence(p, q, index, size, left, right): KL(p || q) in nats, an exact sum.

    Printed as ``\mathrm{KL}(left \,\|\, right)``.
    """

    nargs = 6


class average(sympy.Function):
    """average(body, index, size): 1/size times the sum over the index, printed as that."""

    nargs = 3


def expectation(body: Any, index: Any, size: Any, weight: Any, under: str) -> sympy.Expr:
    r"""Return an expectation under probabilities that are listed.

    Args:
        body: what is averaged, an expression in `index`.
        index: the index that runs over the outcomes.
        size: how many outcomes there are.
        weight: the probability of outcome `index`.
        under: what stands below the 𝔼, like ``r"y \sim \pi_\theta"``.
    """
    return expected(body, index, size, weight, Str(under))


def variance(body: Any, index: Any, size: Any, weight: Any, under: str) -> sympy.Expr:
    """Return a variance under probabilities that are listed, see :func:`expectation`."""
    return variance_of(body, index, size, weight, Str(under))


def mean(body: Any, index: Any, size: Any, under: str) -> sympy.Expr:
    r"""Return the mean over samples, printed as an expectation over the data.

    Args:
        body: what is averaged, an expression in `index`.
        index: the index that runs over the samples.
        size: how many samples there are.
        under: what stands below the 𝔼, like ``r"(x, y_w, y_l) \sim \mathcal{D}"``.
    """
    return mean_over(body, index, size, Str(under))


def kl(p: Any, q: Any, index: Any, size: Any, left: str, right: str) -> sympy.Expr:
    """Return KL(p || q) in nats over listed outcomes.

    Args:
        p: probability of outcome `index` under the distribution that is averaged over.
        q: its probability under the other one.
        index: the index that runs over the outcomes.
        size: how many outcomes there are.
        left: LaTeX of the first distribution.
        right: LaTeX of the second.
    """
    return divergence(p, q, index, size, Str(left), Str(right))
