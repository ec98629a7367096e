# SPDX-License-Identifier: Apache-2.0
"""Off-policy correction: answers that another engine sampled."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy import evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import (
    clip,
    expectation,
    indicator,
    maximum,
    mean,
    minimum,
)
from nemo_rl_ref.equations._functions import variance as variance_under
from nemo_rl_ref.equations._symbols import (
    PROBABILITIES,
    PROBABILITY,
    RATIO,
    SMALL,
    Domain,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.notation import R, T, Y, eps, old, t, u, y
from nemo_rl_ref.equations.ppo import (
    CLIPPED,
    clipped,
    old_t,
    token_advantage,
    token_batch,
    token_ratio,
)
from nemo_rl_ref.equations.scaling import share_of_samples
from nemo_rl_ref.equations.world import expect, variance

__all__ = ["EQUATIONS"]

UNDER_MU = r"y \sim \mu"
UNDER_OLD = r"y \sim \pi_{\mathrm{old}}"

mu = indexed(
    "mu",
    r"\mu(#1 \mid x)",
    "probability of answer $y$ under the policy of the generation engine",
    PROBABILITIES,
    ("Y",),
)
mu_t = symbol(
    "mu_t",
    r"\mu(y_t \mid x, y_{<t})",
    "probability of a token under the policy of the generation engine",
    PROBABILITY,
)
weight = symbol(
    "weight",
    "w",
    "importance weight: probability under the policy that the update began from, over that under "
    "the generation engine's",
    RATIO,
)
token_weight = indexed("token_weight", "w_{#1}", "importance weight of token $t$", RATIO, ("T",))
span = size("T_span", "T", "number of tokens of an answer", (2, 5))
place = size("place", "t", "position of a token in an answer, from 1", (1, 2))
span_weight = indexed(
    "span_weight",
    "w_{#1}",
    "importance weight of token $t$",
    Domain(lambda rng, shape: RATIO.draw(rng, shape) ** 0.5, (0.5, 1.0, 1.1)),
    ("T_span",),
)
geometric = symbol(
    "geometric", r"\bar w", "geometric mean of the weights of an answer's tokens", RATIO
)
answer_weight = indexed(
    "answer_weight",
    "w(#1)",
    r"importance weight of the answer, $\pi_{\mathrm{old}}(y \mid x) / \mu(y \mid x)$",
    RATIO,
    ("Y",),
)
w_max = symbol(
    "w_max",
    r"w_{\max}",
    "largest weight that counts as it is",
    Domain(lambda rng, shape: 1 + 10.0 ** rng.uniform(-2, 1, size=shape), (1.002, 2.0, 5.0)),
)
w_min = symbol("w_min", r"w_{\min}", "smallest weight that counts as it is", SMALL)


def corrected(kind: str | None = None, **settings: Any) -> Any:
    """Return NeMo RL's loss with importance weights, truncated in the way `kind` names."""
    return clipped(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        **settings,
    )


def bounds(inputs: Inputs) -> dict[str, Any]:
    """Return the settings of both bounds."""
    return {
        "truncated_importance_sampling_ratio": inputs.w_max,
        "truncated_importance_sampling_ratio_min": inputs.w_min,
    }


def weights_of(loss: Any, log_weights: Tensor) -> Tensor:
    """Return the weights that a loss gives to tokens.

    At π_θ = π_old and with the sum over tokens in the place of the mean, the loss is the sum of
    -w A, so that the derivative in the advantages is -w.

    Args:
        loss: NeMo RL's policy-gradient loss.
        log_weights: log π_old - log μ of each token, `(B, T)`, nats.
    """
    zero = torch.zeros_like(log_weights)
    advantages = torch.ones_like(log_weights).requires_grad_()
    batch = token_batch(zero, advantages, generation=-log_weights)
    value = loss(zero, batch, count(1), count(1))[0]
    return -torch.autograd.grad(value, advantages)[0]


def weight_of(loss: Any, log_weight: Tensor) -> Tensor:
    """Return the weight that a loss gives to a token whose loss is 1 without a weight."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    batch = token_batch(zero, zero - 1, generation=-log_weight.reshape(1, 1))
    return loss(zero, batch, count(1), count(1))[0]


def _weigh(drawn: dict[str, Any]) -> dict[str, Any]:
    """Make the weights those of the two policies."""
    return drawn | {"answer_weight": drawn["old"] / drawn["mu"]}


@each
def _weight(inputs: Inputs) -> Tensor:
    return weight_of(corrected(), inputs.old_t.log() - inputs.mu_t.log())


@each
def _loss(inputs: Inputs) -> Tensor:
    zero = torch.zeros(1, inputs.T, dtype=torch.float64)
    batch = token_batch(
        zero, inputs.token_advantage[None], generation=-inputs.token_weight.log()[None]
    )
    loss = corrected(ratio_clip_min=inputs.eps, ratio_clip_max=inputs.eps)
    return loss(inputs.token_ratio.log()[None], batch, count(1), count(inputs.T))[0]


@each
def _tis(inputs: Inputs) -> Tensor:
    return weight_of(corrected("tis", **bounds(inputs)), inputs.weight.log())


@each
def _icepop(inputs: Inputs) -> Tensor:
    return weight_of(corrected("icepop", **bounds(inputs)), inputs.weight.log())


@each
def _sequence_mask(inputs: Inputs) -> Tensor:
    loss = corrected("seq-mask-tis", **bounds(inputs))
    return weights_of(loss, inputs.span_weight.log()[None])[0, inputs.place - 1]


@each
def _sequence_weight(inputs: Inputs) -> float:
    zero = torch.zeros(1, inputs.T, dtype=torch.float64)
    batch = token_batch(zero, zero, generation=-inputs.token_weight.log()[None])
    loss = corrected(sequence_level_importance_ratios=True, token_level_loss=False)
    return loss(zero, batch, count(1), count(inputs.T))[1]["sampling_importance_ratio"]


def _answer_weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Truncated weights of all answers, one token each, and log μ."""
    log_mu = inputs.mu.log()
    loss = corrected("tis", truncated_importance_sampling_ratio=inputs.w_max)
    return weights_of(loss, (inputs.old.log() - log_mu)[:, None])[:, 0], log_mu


@each
def _bias(inputs: Inputs) -> Tensor:
    weights, log_mu = _answer_weights(inputs)
    return expect(log_mu, weights * inputs.R) - expect(inputs.old.log(), inputs.R)


@each
def _variance(inputs: Inputs) -> Tensor:
    weights, log_mu = _answer_weights(inputs)
    return variance(log_mu, weights * inputs.R)


@each
def _share(inputs: Inputs) -> Tensor:
    log_mu = inputs.mu.log()
    weights = weights_of(corrected(), (inputs.old.log() - log_mu)[:, None])[:, 0]
    return share_of_samples(log_mu, weights)


with evaluate(False):
    truncated = minimum(answer_weight[y], w_max) * R[y]
    policies = {"also": (old, mu), "prepare": _weigh}
    EQUATIONS = [
        Equation(
            label="off-policy-weight",
            title="Importance weight between the engines",
            left="w_t",
            right=(old_t / mu_t, exp(log(old_t) - log(mu_t))),
            implementation=CLIPPED,
            check=_weight,
        ),
        Equation(
            label="off-policy-loss",
            title="Corrected loss",
            left=r"L(\theta)",
            right=-mean(
                token_weight[t]
                * minimum(
                    token_ratio[t] * token_advantage[t],
                    clip(token_ratio[t], 1 - eps, 1 + eps) * token_advantage[t],
                ),
                t,
                T,
                "t",
            ),
            implementation=CLIPPED,
            check=_loss,
        ),
        Equation(
            label="tis",
            title="Truncated importance sampling",
            left=r"w^{\mathrm{TIS}}",
            right=clip(weight, w_min, w_max),
            implementation=CLIPPED,
            check=_tis,
            source="yao2025",
        ),
        Equation(
            label="icepop",
            title="IcePop",
            left=r"w^{\mathrm{IcePop}}",
            right=sympy.Piecewise(
                (0, sympy.Lt(weight, w_min)),
                (0, sympy.Gt(weight, w_max)),
                (weight, True),
            ),
            implementation=CLIPPED,
            check=_icepop,
            source="ling2025",
        ),
        Equation(
            label="sequence-mask",
            title="Sequence mask",
            left=r"w^{\mathrm{mask}}_t",
            right=span_weight[place]
            * indicator(sympy.Le(w_min, geometric))
            * indicator(sympy.Le(geometric, w_max)),
            lets={geometric: sympy.Product(span_weight[u], (u, 1, span)) ** (1 / span)},
            implementation=CLIPPED,
            check=_sequence_mask,
            source="liu2025speed",
        ),
        Equation(
            label="sequence-weight",
            title="Weight of a whole answer",
            left="w(y)",
            right=sympy.Product(token_weight[t], (t, 1, T)),
            implementation=CLIPPED,
            check=_sequence_weight,
            note="The check reads the metric `sampling_importance_ratio` of one answer.",
        ),
        Equation(
            label="truncation-bias",
            title="Bias of truncation",
            left=r"\mathrm{Bias}",
            right=(
                expectation(truncated, y, Y, mu[y], UNDER_MU)
                - expectation(R[y], y, Y, old[y], UNDER_OLD),
                -expectation(maximum(answer_weight[y] - w_max, 0) * R[y], y, Y, mu[y], UNDER_MU),
            ),
            implementation=(CLIPPED, "nemo_rl_ref.equations.world.expect"),
            check=_bias,
            **policies,
            source="ionides2008",
        ),
        Equation(
            label="truncation-variance",
            title="Variance after truncation",
            left=r"\mathrm{Var}",
            right=(
                variance_under(truncated, y, Y, mu[y], UNDER_MU),
                expectation(truncated**2, y, Y, mu[y], UNDER_MU)
                - expectation(truncated, y, Y, mu[y], UNDER_MU) ** 2,
            ),
            implementation=(CLIPPED, "nemo_rl_ref.equations.world.variance"),
            check=_variance,
            **policies,
        ),
        Equation(
            label="effective-sample-size",
            title="Effective sample size",
            left=r"\frac{n_{\mathrm{eff}}}{n}",
            right=(
                1 / expectation(answer_weight[y] ** 2, y, Y, mu[y], UNDER_MU),
                1 / (1 + variance_under(answer_weight[y], y, Y, mu[y], UNDER_MU)),
            ),
            implementation=(CLIPPED, "nemo_rl_ref.equations.world.groups"),
            check=_share,
            **policies,
            source="kong1992",
            note="The variance of the mean of two independent signs, over that of their mean with "
            "NeMo RL's weights, over all pairs of samples.",
        ),
    ]
