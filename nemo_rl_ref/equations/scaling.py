# SPDX-License-Identifier: Apache-2.0
"""Facts that decide about scale: variance against group size, groups without a signal, ESS."""

from __future__ import annotations

from typing import Any

import torch
from sympy import Gt, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.algorithms.advantage_estimator import (
    AdvEstimatorConfig,
    GRPOAdvantageEstimator,
)
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import bracket, expectation, sum_over, variance
from nemo_rl_ref.equations._symbols import (
    MODERATE,
    PROBABILITIES,
    RATIO,
    REAL,
    UNIT,
    index,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.notation import G, N, Y, i, j, n, old, pi, rewards, y
from nemo_rl_ref.equations.world import expect, groups
from nemo_rl_ref.equations.world import variance as exact_variance

__all__ = ["EQUATIONS"]

few = size("Y_few", r"|\mathcal{Y}|", "number of answers that are possible", (2, 3))
a = index("sc_a", "y", "an answer")
prob = indexed(
    "sc_prob",
    r"\pi_\theta(#1 \mid x)",
    "probability of answer $y$ under the policy",
    PROBABILITIES,
    ("Y_few",),
)
reward = indexed("sc_reward", r"r(x, #1)", "reward of answer $y$", MODERATE, ("Y_few",))
score = indexed(
    "sc_score",
    r"s(#1)",
    r"score of answer $y$: gradient of $\log \pi_\theta(y \mid x)$, of mean 0 under the policy",
    MODERATE,
    ("Y_few",),
)
sample_score = indexed(
    "sc_sample_score", r"s(y_{#1})", "score of answer $i$ of a group", REAL, ("G",)
)
mu = symbol("sc_mu", "J", r"expected reward", REAL)
slope = symbol("sc_slope", r"\nabla_\theta J", r"gradient of the expected reward", REAL)
success = symbol("sc_p", "p", "probability that an answer to the prompt is right", UNIT)
rho = indexed(
    "sc_rho",
    r"\rho_{#1}",
    "importance ratio of sample $n$: its probability under the policy over that under the one "
    "that generated it",
    RATIO,
    ("N",),
)
D = symbol("sc_d2", r"D_2", "Rényi divergence of order 2 of the policy from the sampler", REAL)

UNDER_POLICY = r"y \sim \pi_\theta"
UNDER_OLD = r"y \sim \pi_{\mathrm{old}}"
ESTIMATOR = "nemo_rl_ref.algorithms.advantage_estimator.GRPOAdvantageEstimator"
ENUMERATION = "nemo_rl_ref.equations.world.variance"


def advantages(rewards: Tensor, *, normalize: bool = False) -> Tensor:
    """Return NeMo RL's advantages with the leave-one-out baseline, of groups `(groups, G)`."""
    number, group = rewards.shape
    cfg = AdvEstimatorConfig(normalize_rewards=normalize, use_leave_one_out_baseline=True)
    prompts = torch.arange(number).repeat_interleave(group)[:, None]
    mask = torch.ones(number * group, 1)
    found = GRPOAdvantageEstimator(cfg, ClippedPGLossConfig()).compute_advantage(
        prompts, rewards.reshape(-1), mask
    )
    return found[:, 0].reshape(number, group)


def centered(drawn: dict[str, Any]) -> dict[str, Any]:
    """Give the scores mean 0 under the policy, as every score has."""
    mean = (drawn["sc_prob"] * drawn["sc_score"]).sum(-1, keepdims=True)
    return drawn | {"sc_score": drawn["sc_score"] - mean}


def _pair_form(inputs: Inputs) -> Tensor:
    return (advantages(inputs.rewards) * inputs.sc_sample_score).mean(-1)


def _group_variance(inputs: Inputs) -> Tensor:
    """Variance over all groups; undivided advantages are linear in the rewards of a group."""
    members, _ = groups(torch.zeros(inputs.Y_few), inputs.G)
    of_one_reward = advantages(torch.eye(inputs.G, dtype=torch.float64)).T
    found = []
    for prob, of_answer, scores in zip(
        inputs.sc_prob, inputs.sc_reward, inputs.sc_score, strict=True
    ):
        estimate = ((of_answer[members] @ of_one_reward.T) * scores[members]).mean(-1)
        found.append(exact_variance(prob.log()[members].sum(-1), estimate))
    return torch.stack(found)


def _no_signal(inputs: Inputs) -> Tensor:
    """Sum the probabilities of the groups whose advantages are all zero."""
    right, _ = groups(torch.zeros(2), inputs.G)
    silent = (advantages(right.double(), normalize=True) == 0).all(-1).double()
    probabilities = torch.stack([1 - inputs.sc_p, inputs.sc_p], dim=-1)
    found = [expect(p.log()[right].sum(-1), silent) for p in probabilities]
    return torch.stack(found)


@each
def _ess(inputs: Inputs) -> Tensor:
    """One over the variance of a weighted mean, over all signs that the N samples can have."""
    signs, log_group = groups(torch.tensor([0.5, 0.5], dtype=torch.float64).log(), inputs.N)
    weighted = ((2 * signs - 1) * inputs.sc_rho).sum(-1) / inputs.sc_rho.sum()
    return 1 / exact_variance(log_group, weighted)


def share_of_samples(log_under: Tensor, weights: Tensor, number: int = 2) -> Tensor:
    """Return how many samples of variance 1 a weighted one is worth, over all groups of samples.

    Each sample is an answer and a sign, which does not depend on the answer and has mean 0.

    Args:
        log_under: log-probabilities of the answers where samples come from, `(Y,)`, nats.
        weights: the weights of the answers, `(Y,)`.
        number: samples in a group.
    """
    log_signed = torch.cat([log_under, log_under]) - torch.tensor(2.0).double().log()
    members, log_group = groups(log_signed, number)
    mean = torch.cat([weights, -weights])[members].mean(-1)
    return 1 / (number * exact_variance(log_group, mean))


@each
def _ess_renyi(inputs: Inputs) -> Tensor:
    log_old = inputs.old.log()
    return share_of_samples(log_old, (inputs.pi.log() - log_old).exp())


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="pair-form",
            title="A group's gradient estimate by pairs",
            left=r"\frac{1}{G} \sum_{i} (r_i - b_{-i})\, s(y_i)",
            right=sum_over(
                sum_over(
                    (rewards[i] - rewards[j]) * (sample_score[i] - sample_score[j]), j, G, Gt(j, i)
                ),
                i,
                G,
            )
            / (G * (G - 1)),
            implementation=ESTIMATOR,
            check=_pair_form,
            source="kool2019",
            note="With the leave-one-out baseline $b_{-i}$ and `normalize_rewards` off.",
        ),
        Equation(
            label="group-variance",
            title="Variance of a group's gradient estimate",
            left=r"\mathrm{Var}\left[ \frac{1}{G} \sum_{i} (r_i - b_{-i})\, s(y_i) \right]",
            right=1 / G * variance(score[a] * (reward[a] - mu), a, few, prob[a], UNDER_POLICY)
            + (
                variance(reward[a], a, few, prob[a], UNDER_POLICY)
                * variance(score[a], a, few, prob[a], UNDER_POLICY)
                + bracket(slope) ** 2
            )
            / (G * (G - 1)),
            lets={
                mu: expectation(reward[a], a, few, prob[a], UNDER_POLICY),
                slope: expectation(score[a] * reward[a], a, few, prob[a], UNDER_POLICY),
            },
            implementation=(ESTIMATOR, ENUMERATION),
            check=_group_variance,
            prepare=centered,
            note="Over all groups, with the leave-one-out baseline $b_{-i}$ and "
            "`normalize_rewards` off; $s$ is one component of the gradient.",
        ),
        Equation(
            label="no-signal",
            title="Probability that a group carries no signal",
            left=r"P(\, A_1 = \dots = A_G = 0 \,)",
            right=success**G + (1 - success) ** G,
            implementation=ESTIMATOR,
            check=_no_signal,
            note="Over all groups of rewards 0 and 1.",
        ),
        Equation(
            label="ess",
            title="Effective sample size",
            left=r"\mathrm{ESS}",
            right=bracket(sum_over(rho[n], n, N)) ** 2 / sum_over(rho[n] ** 2, n, N),
            implementation=("nemo_rl_ref.equations.world.groups", ENUMERATION),
            check=_ess,
            source="kong1992",
            note="One over the variance of the weighted mean of $N$ independent signs. No code of "
            "NeMo RL computes it.",
        ),
        Equation(
            label="ess-renyi",
            title="Effective share of the samples and Rényi divergence",
            left=r"\frac{\mathrm{ESS}}{N}",
            right=(
                1 / expectation(pi[y] ** 2 / old[y] ** 2, y, Y, old[y], UNDER_OLD),
                exp(-D),
            ),
            lets={D: log(sum_over(pi[y] ** 2 / old[y], y, Y))},
            implementation=("nemo_rl_ref.equations.world.groups", ENUMERATION),
            check=_ess_renyi,
            source="metelli2018",
            note="The variance of the mean of two independent signs, over that of their mean "
            "weighted with the ratios, over all pairs of samples.",
        ),
    ]
