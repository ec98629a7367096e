# SPDX-License-Identifier: Apache-2.0
"""Preferences: from reward under a KL penalty to DPO and its relatives."""

from __future__ import annotations

import torch
from sympy import evaluate, log
from torch import Tensor

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.equations._calls import pair_batch, pair_counts
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import logsigma, mean, sigma
from nemo_rl_ref.equations._symbols import PROBABILITY, REAL, indexed, symbol
from nemo_rl_ref.equations.notation import N, beta, h_l, h_w, m, n

PAIRS = r"(x, y_w, y_l) \sim \mathcal{D}"

chosen = indexed(
    "chosen",
    r"\pi_\theta(y_w \mid x)",
    "probability of the chosen answer under the policy",
    PROBABILITY,
    ("N",),
)
rejected = indexed(
    "rejected",
    r"\pi_\theta(y_l \mid x)",
    "probability of the rejected answer under the policy",
    PROBABILITY,
    ("N",),
)
ref_chosen = indexed(
    "ref_chosen",
    r"\pi_{\mathrm{ref}}(y_w \mid x)",
    "probability of the chosen answer under the reference policy",
    PROBABILITY,
    ("N",),
)
ref_rejected = indexed(
    "ref_rejected",
    r"\pi_{\mathrm{ref}}(y_l \mid x)",
    "probability of the rejected answer under the reference policy",
    PROBABILITY,
    ("N",),
)
grad_w = symbol(
    "grad_w",
    r"\nabla_\theta \log \pi_\theta(y_w \mid x)",
    "gradient of the chosen answer's log-probability",
    REAL,
)
grad_l = symbol(
    "grad_l",
    r"\nabla_\theta \log \pi_\theta(y_l \mid x)",
    "gradient of the rejected answer's log-probability",
    REAL,
)


def dpo(beta: Tensor) -> DPOLossFn:
    """Return NeMo RL's DPO loss with a strength of the penalty."""
    return DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=float(beta)))


@each
def _dpo_loss(inputs: Inputs) -> Tensor:
    logprobs, data = pair_batch(
        inputs.chosen.log(),
        inputs.rejected.log(),
        inputs.ref_chosen.log(),
        inputs.ref_rejected.log(),
    )
    return dpo(inputs.beta)(logprobs, data, **pair_counts(inputs.N))[0]


@each
def _dpo_gradient(inputs: Inputs) -> Tensor:
    """One parameter θ, in which both log-probabilities are linear."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    policy_w = (inputs.h_w + inputs.grad_w * theta)[None]
    policy_l = (inputs.h_l + inputs.grad_l * theta)[None]
    zero = torch.zeros(1, dtype=torch.float64)
    logprobs, data = pair_batch(policy_w, policy_l, zero, zero)
    loss = dpo(inputs.beta)(logprobs, data, **pair_counts(1))[0]
    return torch.autograd.grad(loss, theta)[0]


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="dpo-loss",
            title="DPO loss",
            left=r"L_{\mathrm{DPO}}(\theta)",
            right=-mean(
                logsigma(
                    beta * log(chosen[n] / ref_chosen[n])
                    - beta * log(rejected[n] / ref_rejected[n])
                ),
                n,
                N,
                PAIRS,
            ),
            implementation="nemo_rl_ref.algorithms.loss.DPOLossFn",
            check=_dpo_loss,
            source="rafailov2023",
            at="Eq. 7",
        ),
        Equation(
            label="dpo-gradient",
            title="Gradient of the DPO loss",
            left=r"\nabla_\theta L_{\mathrm{DPO}}",
            right=-beta * sigma(-m) * (grad_w - grad_l),
            lets={m: beta * (h_w - h_l)},
            implementation="nemo_rl_ref.algorithms.loss.DPOLossFn",
            check=_dpo_gradient,
            source="rafailov2023",
            at="Section 4",
            note="The gradient is autograd's, for one pair.",
        ),
    ]
