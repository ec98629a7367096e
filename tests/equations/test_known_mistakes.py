# SPDX-License-Identifier: Apache-2.0
"""Mistakes that published pages made, put into the equations and into the code.

The check of the equations has to name the equation that no longer agrees with the code.
"""

from dataclasses import replace

import pytest
import sympy
import torch
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import PreferenceLossFn, _nll, _preference
from nemo_rl_ref.algorithms.loss import _policy_gradient as pg
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.equations import EquationError, all_equations, kl_estimators, verify
from nemo_rl_ref.equations import grpo as g
from nemo_rl_ref.equations import kl_estimators as k
from nemo_rl_ref.equations import ppo as p
from nemo_rl_ref.equations import preferences as dpo
from nemo_rl_ref.equations import reductions as r
from nemo_rl_ref.equations.world import expect

EQUATIONS = all_equations()


def right_sides(label):
    """The right-hand sides of an equation as they are printed."""
    return EQUATIONS[label].steps


# A mistake's name: the equation, and the wrong right-hand side.
with sympy.evaluate(False):
    _per_answer = g.sum_over(g.mask[g.i, g.t] * g._surrogate, g.t, g.T)
    _tokens = g.sum_over(g.mask[g.i, g.t], g.t, g.T)
    _losses = r.sum_over(r.counted[r.b, r.t] * r.token_losses[r.b, r.t], r.t, r.T)
    _counts = r.sum_over(r.counted[r.b, r.t], r.t, r.T)
    IN_EQUATIONS = {
        "1: the DPO gradient weighted by the wrong side of the sigmoid": (
            "dpo-gradient",
            -dpo.beta * dpo.sigma(dpo.m) * (dpo.grad_w - dpo.grad_l),
        ),
        "2: a DPO loss with the logarithm around the difference": (
            "dpo-loss",
            -dpo.mean(
                dpo.logsigma(
                    dpo.beta
                    * sympy.log(
                        dpo.chosen[dpo.n] / dpo.ref_chosen[dpo.n]
                        - dpo.rejected[dpo.n] / dpo.ref_rejected[dpo.n]
                    )
                ),
                dpo.n,
                dpo.N,
                dpo.PAIRS,
            ),
        ),
        "3: GRPO as DPO with groups": (
            "grpo-objective",
            sympy.log(1 + sympy.exp(-g.beta * (g.advantages[1] - g.advantages[2]))),
        ),
        "3: GRPO with a value loss": (
            "grpo-published",
            -g.average((_per_answer - g.advantages[g.i] ** 2 / 2) / _tokens, g.i, g.G),
        ),
        "4: the ratio after a step is said to be inside the clipping range": (
            "ppo-step-ratio",
            p.clip(1 + p.rate * p.A, 1 - p.eps, 1 + p.eps) + 0 * right_sides("ppo-step-ratio")[0],
        ),
        "5: KL of the policy as an expectation under the other policy": (
            "kl-definition",
            k.expectation(k.log_ratio, k.y, k.Y, k.ref[k.y], k.UNDER_POLICY),
        ),
        "5: k3 called unbiased for samples from the other policy": (
            "k3-mean",
            (
                k.expectation(k.k3_of_answer, k.y, k.Y, k.ref[k.y], k.UNDER_POLICY),
                *right_sides("k3-mean")[1:],
            ),
        ),
        "6: the mean of the micro-batches' means": (
            "global-mean",
            (right_sides("global-mean")[0], r.average(_losses / _counts, r.b, r.B)),
        ),
    }


#: Symbols of the right equation that the wrong one does not print, but its check needs.
ALSO = {"grpo-objective": (g.ratios, g.mask, g.eps)}


@pytest.mark.parametrize(("label", "wrong"), IN_EQUATIONS.values(), ids=IN_EQUATIONS)
def test_a_mistake_in_an_equation_is_named(label, wrong):
    equation = EQUATIONS[label]
    verify(equation)

    mistaken = replace(equation, right=wrong, also=(*equation.also, *ALSO.get(label, ())))
    with pytest.raises(EquationError, match=rf"equation '{label}' \(.*is not what nemo_rl_ref\."):
        verify(mistaken)


def log_around_the_difference(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
    """`PreferenceLossFn._preference_loss` with the logarithm in the wrong place."""
    chosen, rejected = self.split_output_tensor(rewards)
    loss = -(beta * (chosen.exp() - rejected.exp()).log()).sigmoid().log()
    parts = (loss, chosen > rejected, chosen, rejected)
    pairs = global_valid_seqs / 2
    return tuple(masked_mean(x, sample_mask[::2], global_normalization_factor=pairs) for x in parts)


def with_a_value_loss(advantages, ratios, clipped_ratios):
    """The clipped surrogate, and half the square of the advantage."""
    surrogate = torch.maximum(-advantages * ratios, -advantages * clipped_ratios)
    return surrogate + advantages.square() / 2


# A mistake's name: the equation, where the function stands, and what takes its place.
IN_CODE = {
    "1": ("dpo-gradient", _preference, "logsigmoid", lambda x: logsigmoid(-x)),
    "2": ("dpo-loss", PreferenceLossFn, "_preference_loss", log_around_the_difference),
    "3: as DPO with groups": (
        "grpo-objective",
        pg,
        "clipped_surrogate",
        lambda advantages, ratios, clipped: -logsigmoid(advantages * ratios.log()) + 0 * clipped,
    ),
    "3: with a value loss": ("grpo-objective", pg, "clipped_surrogate", with_a_value_loss),
    "4: the ratio is forced into the range": (
        "ppo-gradient",
        pg,
        "clipped_surrogate",
        lambda advantages, ratios, clipped_ratios: -advantages * clipped_ratios,
    ),
    "5: the divergence averaged under its second argument": (
        "kl-definition",
        kl_estimators,
        "exact_kl",
        lambda log_p, log_q: expect(log_q, log_p - log_q),
    ),
    "6: every micro-batch divides by its own count": (
        "global-mean",
        _nll,
        "masked_mean",
        lambda values, mask, global_normalization_factor=None: masked_mean(values, mask),
    ),
}


@pytest.mark.parametrize(("label", "where", "name", "wrong"), IN_CODE.values(), ids=IN_CODE)
def test_a_mistake_in_the_code_is_named(label, where, name, wrong, monkeypatch):
    verify(EQUATIONS[label])
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(EquationError, match=rf"equation '{label}' \(.*is not what nemo_rl_ref\."):
        verify(EQUATIONS[label])
