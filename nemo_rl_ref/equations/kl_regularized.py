# SPDX-License-Identifier: Apache-2.0
"""Reward under a KL penalty: the objective, its optimum, and what the penalty's strength does."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from sympy import Integer, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import expectation, kl, sum_over, variance
from nemo_rl_ref.equations._symbols import POSITIVE, PROBABILITIES, indexed, symbol
from nemo_rl_ref.equations.notation import R, Y, beta, pi, ref, y, y_other
from nemo_rl_ref.equations.world import World, expect
from nemo_rl_ref.equations.world import kl as kl_of

__all__ = ["EQUATIONS"]

Z = symbol("Z", "Z(x)", "normalizer of the best policy under the KL penalty", POSITIVE)
best = indexed(
    "best",
    r"\pi^*(#1 \mid x)",
    "probability of answer $y$ under the best policy",
    PROBABILITIES,
    ("Y",),
)

POLICY = r"y \sim \pi_\theta"
BEST = r"y \sim \pi^*"
PI, REF, STAR = r"\pi_\theta", r"\pi_{\mathrm{ref}}", r"\pi^*"


@lru_cache
def _world(answers: int) -> World:
    """A world whose answers have one token, so that a policy is a distribution over `answers`."""
    return World(vocab=answers, horizon=1)


def objective(log_p: Tensor, inputs: Inputs) -> Tensor:
    """Return the reward less the penalty, with the sums of the enumerable world."""
    return expect(log_p, inputs.R) - inputs.beta * kl_of(log_p, inputs.ref.log())


def best_logprob(inputs: Inputs) -> Tensor:
    """Return log π* as one natural-gradient step of length 1/β finds it.

    From the uniform policy the natural gradient is Y times the gradient by the logits. The
    objective is such that one step of this length arrives: `kl-optimum` asserts that the gradient
    is zero there. Autograd goes through the step.
    """
    world = _world(inputs.Y)
    logits = torch.zeros(1, inputs.Y, dtype=torch.float64, requires_grad=True)
    value = objective(world.logprob(logits), inputs)
    slope = torch.autograd.grad(value, logits, create_graph=True)[0]
    return world.logprob(inputs.Y * slope / inputs.beta)


def _moderate_beta(drawn: dict[str, Any]) -> dict[str, Any]:
    """Keep exp(r / β) within float64, and look at the last answer."""
    return drawn | {"beta": drawn["beta"].clip(min=0.03), "y": drawn["Y"]}


@each
def _objective(inputs: Inputs) -> Tensor:
    return objective(inputs.pi.log(), inputs)


@each
def _best(inputs: Inputs) -> Tensor:
    logits = best_logprob(inputs).detach()[None].requires_grad_()
    log_p = _world(inputs.Y).logprob(logits)
    slope = torch.autograd.grad(objective(log_p, inputs), logits)[0]
    if not slope.abs().max() < 1e-9:
        raise ValueError(f"the step does not end at an optimum, the gradient there is {slope}")
    return log_p[inputs.Y - 1].exp().detach()


@each
def _value(inputs: Inputs) -> Tensor:
    return objective(best_logprob(inputs), inputs).detach()


def _reward(inputs: Inputs) -> Tensor:
    """The reward itself; the equation states it by the policy that the optimizer found."""
    return inputs.R[:, inputs.Y - 1]


def _along_frontier(inputs: Inputs, quantity: Any) -> Tensor:
    """The derivative of a quantity of π* by the strength β, times -β²: by 1/β."""
    strength = inputs.beta.clone().requires_grad_()
    given = Inputs(inputs | {"beta": strength})
    found = quantity(best_logprob(given), inputs)
    return -(strength.detach() ** 2) * torch.autograd.grad(found, strength)[0]


@each
def _reward_slope(inputs: Inputs) -> Tensor:
    return _along_frontier(inputs, lambda log_p, given: expect(log_p, given.R))


@each
def _divergence_slope(inputs: Inputs) -> Tensor:
    return _along_frontier(inputs, lambda log_p, given: kl_of(log_p, given.ref.log()))


@each
def _value_slope(inputs: Inputs) -> Tensor:
    strength = inputs.beta.clone().requires_grad_()
    given = Inputs(inputs | {"beta": strength})
    value = objective(best_logprob(given), given)
    return torch.autograd.grad(value, strength)[0]


def _with_best(drawn: dict[str, Any]) -> dict[str, Any]:
    """Give the equation the policy that `best_logprob` finds, and Z by the value of that policy."""
    drawn = _moderate_beta(drawn)
    tensors = {name: torch.from_numpy(drawn[name]) for name in ("R", "ref", "beta")}
    policies, normalizers = [], []
    for place in range(len(drawn["R"])):
        inputs = Inputs({"Y": drawn["Y"], **{name: v[place] for name, v in tensors.items()}})
        log_best = best_logprob(inputs).detach()
        policies.append(log_best.exp())
        normalizers.append(torch.exp(objective(log_best, inputs) / inputs.beta))
    return drawn | {"best": torch.stack(policies).numpy(), "Z": torch.stack(normalizers).numpy()}


with evaluate(False):
    # The sum that makes π* a distribution; y' because y is taken outside of it.
    NORMALISER = sum_over(ref[y_other] * exp(R[y_other] / beta), y_other, Y)
    EQUATIONS = [
        Equation(
            label="kl-objective",
            title="Reward under a KL penalty",
            left=r"J_\beta(\pi_\theta)",
            right=(
                expectation(R[y], y, Y, pi[y], POLICY) - beta * kl(pi[y], ref[y], y, Y, PI, REF),
                expectation(R[y] - beta * log(pi[y] / ref[y]), y, Y, pi[y], POLICY),
            ),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_objective,
            source="rafailov2023",
            at="Eq. 3",
            note="The first line is a definition.",
        ),
        Equation(
            label="kl-optimum",
            title="Best policy under a KL penalty",
            left=r"\pi^*(y \mid x)",
            right=Integer(1) / Z * ref[y] * exp(R[y] / beta),
            lets={Z: NORMALISER},
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_best,
            prepare=_moderate_beta,
            source="rafailov2023",
            at="Eq. 4",
            note="One natural-gradient step of length 1/β on the objective, from the uniform "
            "policy, arrives at this policy. The check asserts that the objective's gradient is "
            "zero there.",
        ),
        Equation(
            label="kl-value",
            title="Value of the best policy",
            left=r"J_\beta(\pi^*)",
            right=beta * log(NORMALISER),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_value,
            prepare=_moderate_beta,
        ),
        Equation(
            label="kl-gap",
            title="What any other policy misses",
            left=r"J_\beta(\pi_\theta)",
            right=(
                beta * log(Z) - beta * expectation(log(pi[y] / best[y]), y, Y, pi[y], POLICY),
                beta * log(Z) - beta * kl(pi[y], best[y], y, Y, PI, STAR),
            ),
            also=(R, ref),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_objective,
            prepare=_with_best,
            note="The best policy is found by a natural-gradient step on the objective, and its "
            "value there stands for $\\beta \\log Z(x)$.",
        ),
        Equation(
            label="kl-envelope",
            title="Value of the best policy as the penalty grows",
            left=r"\frac{\mathrm{d}}{\mathrm{d} \beta} J_\beta(\pi^*)",
            right=-kl(best[y], ref[y], y, Y, STAR, REF),
            also=(R, beta),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_value_slope,
            prepare=_with_best,
            note="The derivative is autograd's, through the natural-gradient step.",
        ),
        Equation(
            label="kl-reward-slope",
            title="Reward along the frontier",
            left=r"\frac{\mathrm{d}}{\mathrm{d} (1 / \beta)} \mathbb{E}_{y \sim \pi^*}[r(x, y)]",
            right=variance(R[y], y, Y, best[y], BEST),
            also=(ref, beta),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_reward_slope,
            prepare=_with_best,
            note="The derivative is autograd's, through the natural-gradient step.",
        ),
        Equation(
            label="kl-divergence-slope",
            title="Divergence along the frontier",
            left=r"\frac{\mathrm{d}}{\mathrm{d} (1 / \beta)} "
            r"\mathrm{KL}(\, \pi^* \,\|\, \pi_{\mathrm{ref}} \,)",
            right=Integer(1) / beta * variance(R[y], y, Y, best[y], BEST),
            also=(ref,),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_divergence_slope,
            prepare=_with_best,
            note="The derivative is autograd's, through the natural-gradient step.",
        ),
        Equation(
            label="implicit-reward",
            title="The reward that a policy states",
            left="r(x, y)",
            right=beta * log(best[y] / ref[y]) + beta * log(Z),
            also=(R, ref),
            implementation=(
                "nemo_rl_ref.equations.world.expect",
                "nemo_rl_ref.equations.world.kl",
            ),
            check=_reward,
            prepare=_with_best,
            source="rafailov2023",
            at="Eq. 5",
            note="The best policy is found by a natural-gradient step on the objective. What it "
            "states, its value standing for $\\beta \\log Z(x)$, is compared with the reward that "
            "the objective had.",
        ),
    ]
