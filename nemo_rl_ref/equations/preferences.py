# SPDX-License-Identifier: Apache-2.0
"""Preferences: Bradley-Terry, reward models, DPO and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sympy import Rational, Sum, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn, PreferenceLossFn
from nemo_rl_ref.custom.pairwise import (
    ConservativeDPOLossFn,
    DPOPLossFn,
    IPOLossFn,
    PairLossFn,
    RobustDPOLossFn,
)
from nemo_rl_ref.equations._calls import count, pair_batch, pair_counts
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import (
    bracket,
    logsigma,
    maximum,
    mean,
    sigma,
    sum_over,
)
from nemo_rl_ref.equations._symbols import (
    FRACTION,
    PROBABILITY,
    REAL,
    UNIT,
    Domain,
    index,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.notation import (
    N,
    T,
    beta,
    h_l,
    h_w,
    m,
    n,
    pi_l,
    pi_w,
    ref_l,
    ref_w,
    t,
)

__all__ = ["EQUATIONS"]

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
reward_w = symbol("reward_w", "r(x, y_w)", "reward of the chosen answer", REAL)
reward_l = symbol("reward_l", "r(x, y_l)", "reward of the rejected answer", REAL)
model_w = indexed(
    "model_w",
    r"r_\phi(x, y_w)",
    "reward model's number for the chosen answer",
    REAL,
    ("N",),
)
model_l = indexed(
    "model_l",
    r"r_\phi(x, y_l)",
    "reward model's number for the rejected answer",
    REAL,
    ("N",),
)
token = indexed(
    "token",
    r"\pi_\theta(y_{#1} \mid x, y_{<#1})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    PROBABILITY,
    ("T",),
)
ref_token = indexed(
    "ref_token",
    r"\pi_{\mathrm{ref}}(y_{#1} \mid x, y_{<#1})",
    "probability of token $t$ of the answer under the reference policy",
    PROBABILITY,
    ("T",),
)
prefer = symbol(
    "prefer",
    r"p_{\succ}",
    r"probability that an annotator prefers $y_w$ to $y_l$",
    FRACTION,
)
flip = symbol(
    "flip",
    r"\nu",
    "share of the labels that are flipped, below one half",
    Domain(lambda rng, shape: rng.uniform(0.0, 0.45, size=shape), (0.0, 0.1, 0.45)),
)
penalty = symbol(
    "penalty",
    r"\lambda_+",
    "weight of what the chosen answer lost against the reference",
    Domain(lambda rng, shape: 10.0 ** rng.uniform(-1, 1, size=shape), (0.0, 5.0, 50.0)),
)
weight_p = symbol("weight_p", "w_p", "weight of the preference term", UNIT)
weight_s = symbol("weight_s", "w_s", "weight of the SFT term", UNIT)
Dim = size("Dim", "D", "number of parameters", (1, 3))
dim = index("dim", "a", r"a parameter")
slope_w = indexed(
    "slope_w",
    "g_{w,#1}",
    r"derivative of $\log \pi_\theta(y_w \mid x)$ by a parameter",
    REAL,
    ("Dim",),
)
slope_l = indexed(
    "slope_l",
    "g_{l,#1}",
    r"derivative of $\log \pi_\theta(y_l \mid x)$ by a parameter",
    REAL,
    ("Dim",),
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


def dpo(beta: Tensor, **settings: float) -> DPOLossFn:
    """Return NeMo RL's DPO loss with a strength of the penalty."""
    return DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=float(beta), **settings))


def log_ratio_loss(loss_fn: DPOLossFn, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the loss of pairs with the given log-ratios `(P,)`; the reference's are 0."""
    zero = torch.zeros_like(chosen)
    logprobs, data = pair_batch(chosen, rejected, zero, zero)
    return loss_fn(logprobs, data, **pair_counts(len(chosen)))[0]


def pair_loss(loss_fn: DPOLossFn, inputs: Inputs) -> Tensor:
    """Return the loss of the pairs whose four probabilities are given."""
    logprobs, data = pair_batch(
        inputs.chosen.log(),
        inputs.rejected.log(),
        inputs.ref_chosen.log(),
        inputs.ref_rejected.log(),
    )
    return loss_fn(logprobs, data, **pair_counts(len(logprobs) // 2))[0]


def reward_model_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return NeMo RL's loss of a reward model that gave the pairs these rewards, `(P,)`."""
    rewards = torch.stack([chosen, rejected], dim=1).reshape(-1, 1)
    data = {"sample_mask": torch.ones(len(rewards), dtype=torch.float64)}
    return PreferenceLossFn()(rewards, data, **pair_counts(len(chosen)))[0]


@each
def _bradley_terry(inputs: Inputs) -> Tensor:
    return torch.exp(-reward_model_loss(inputs.reward_w[None], inputs.reward_l[None]))


@each
def _reward_model_loss(inputs: Inputs) -> Tensor:
    return reward_model_loss(inputs.model_w, inputs.model_l)


@each
def _log_ratio(inputs: Inputs) -> float:
    """The metric of the DPO loss, with a prompt of two tokens and padding around the answer."""

    def row(values: Tensor, other: float) -> Tensor:
        around = torch.full((2,), other, dtype=torch.float64)
        return torch.cat([around, values, around])

    policy, reference = row(inputs.token.log(), -1.5), row(inputs.ref_token.log(), -0.5)
    rejected = torch.full_like(policy, -3.0)
    # Entry t of the log-probabilities is token t + 1; the mask has one entry for every token.
    mask = torch.zeros(len(policy) + 1, dtype=torch.float64)
    mask[3:-2] = 1.0
    data = {
        "input_ids": torch.zeros(2, len(mask), dtype=torch.long),
        "reference_policy_logprobs": torch.nn.functional.pad(
            torch.stack([reference, rejected]), (0, 1), value=7.0
        ),
        "token_mask": mask.expand(2, -1),
        "sample_mask": torch.ones(2, dtype=torch.float64),
    }
    logprobs = torch.stack([policy, rejected])
    _, metrics = DPOLossFn(DPOLossConfig())(logprobs, data, 2 * count(1), count(2 * inputs.T))
    return metrics["rewards_chosen_mean"]


def one_pair_loss(loss_fn: DPOLossFn, inputs: Inputs) -> Tensor:
    """Return the loss of the one pair whose four probabilities are given."""
    names = {
        "chosen": "pi_w",
        "rejected": "pi_l",
        "ref_chosen": "ref_w",
        "ref_rejected": "ref_l",
    }
    return pair_loss(loss_fn, Inputs({new: inputs[old][None] for new, old in names.items()}))


@each
def _dpo_probability(inputs: Inputs) -> Tensor:
    return torch.exp(-one_pair_loss(dpo(inputs.beta), inputs))


@each
def _dpo_loss(inputs: Inputs) -> Tensor:
    return pair_loss(dpo(inputs.beta), inputs)


@each
def _dpo_gradient(inputs: Inputs) -> Tensor:
    """One parameter θ, in which both log-probabilities are linear."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    policy_w = (inputs.h_w + inputs.grad_w * theta)[None]
    policy_l = (inputs.h_l + inputs.grad_l * theta)[None]
    loss = log_ratio_loss(dpo(inputs.beta), policy_w, policy_l)
    return torch.autograd.grad(loss, theta)[0]


def _one(value: Tensor) -> Tensor:
    """A leaf of shape `(1,)`, to differentiate by."""
    return value.detach().clone().reshape(1).requires_grad_()


@each
def _dpo_curvature(inputs: Inputs) -> Tensor:
    chosen = _one(inputs.m)
    loss = log_ratio_loss(dpo(1.0), chosen, torch.zeros_like(chosen))
    (slope,) = torch.autograd.grad(loss, chosen, create_graph=True)
    return torch.autograd.grad(slope, chosen)[0]


def population_loss(chosen: Tensor, inputs: Inputs) -> Tensor:
    """Return DPO's loss over both labels of one pair of answers, as often as each is given."""
    rejected = torch.zeros_like(chosen)
    preferred = log_ratio_loss(dpo(1.0), chosen, rejected)
    reversed_ = log_ratio_loss(dpo(1.0), rejected, chosen)
    return inputs.prefer * preferred + (1 - inputs.prefer) * reversed_


@each
def _dpo_population(inputs: Inputs) -> Tensor:
    return population_loss(inputs.m[None], inputs)


@each
def _dpo_population_slope(inputs: Inputs) -> Tensor:
    margin = _one(inputs.m)
    return torch.autograd.grad(population_loss(margin, inputs), margin)[0]


def newton(loss_of: Callable[[Tensor], Tensor], found: Tensor, steps: int) -> Tensor:
    """Return where a sum of losses, each of one entry of `found`, is least: Newton's method."""
    for _ in range(steps):
        found = found.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(found), found, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), found)
        found = found - slope / curvature
    return found


def _dpo_minimiser(inputs: Inputs) -> Tensor:
    """One batch has every input's pair and the pair in reverse, weighted by `sample_mask`."""
    # The loss multiplies by the mask twice.
    shares = torch.cat([inputs.prefer, 1 - inputs.prefer]).sqrt().repeat_interleave(2)

    def loss_of(margins: Tensor) -> Tensor:
        zero = torch.zeros_like(margins)
        both, reversed_ = torch.cat([margins, zero]), torch.cat([zero, margins])
        logprobs, data = pair_batch(both, reversed_, torch.zeros_like(both), torch.zeros_like(both))
        return dpo(1.0)(logprobs, data | {"sample_mask": shares}, **pair_counts(1))[0]

    return newton(loss_of, torch.zeros_like(inputs.prefer), steps=20)


def _ipo_minimiser(inputs: Inputs) -> Tensor:
    loss_fn = IPOLossFn(DPOLossConfig())

    def loss_of(gap: Tensor) -> Tensor:
        zero = torch.zeros_like(gap)
        preferred = loss_fn.pair_losses(gap, zero, inputs.beta)
        reversed_ = loss_fn.pair_losses(zero, gap, inputs.beta)
        return (inputs.prefer * preferred + (1 - inputs.prefer) * reversed_).sum()

    return inputs.beta * newton(loss_of, torch.zeros_like(inputs.prefer), steps=2)


@each
def _displacement(inputs: Inputs) -> Tensor:
    """Parameters θ in which both log-ratios are linear, and a step of gradient descent."""
    theta = torch.zeros(inputs.Dim, dtype=torch.float64, requires_grad=True)
    chosen = (inputs.h_w + inputs.slope_w @ theta)[None]
    rejected = (inputs.h_l + inputs.slope_l @ theta)[None]
    (slope,) = torch.autograd.grad(log_ratio_loss(dpo(inputs.beta), chosen, rejected), theta)
    length = torch.zeros((), dtype=torch.float64, requires_grad=True)
    after = inputs.h_w + inputs.slope_w @ (theta.detach() - length * slope)
    return torch.autograd.grad(after, length)[0]


@each
def _dpo_sft(inputs: Inputs) -> Tensor:
    weights = {
        "preference_loss_weight": float(inputs.weight_p),
        "sft_loss_weight": float(inputs.weight_s),
    }
    return one_pair_loss(dpo(inputs.beta, **weights), inputs)


@each
def _dpop(inputs: Inputs) -> Tensor:
    config = DPOLossConfig(
        reference_policy_kl_penalty=float(inputs.beta),
        dpop_penalty=float(inputs.penalty),
    )
    return log_ratio_loss(DPOPLossFn(config), inputs.h_w[None], inputs.h_l[None])


@each
def _ipo_loss(inputs: Inputs) -> Tensor:
    config = DPOLossConfig(reference_policy_kl_penalty=float(inputs.beta))
    return pair_loss(IPOLossFn(config), inputs)


def smoothed(loss_class: type[PairLossFn], inputs: Inputs, chosen: Tensor, rejected: Tensor) -> Any:
    """Return a loss with label smoothing for one pair, with β = 1."""
    config = DPOLossConfig(reference_policy_kl_penalty=1.0, label_smoothing=float(inputs.flip))
    return log_ratio_loss(loss_class(config), chosen[None], rejected[None])


@each
def _conservative(inputs: Inputs) -> Tensor:
    return smoothed(ConservativeDPOLossFn, inputs, inputs.m, torch.zeros_like(inputs.m))


@each
def _robust_on_average(inputs: Inputs) -> Tensor:
    zero = torch.zeros_like(inputs.m)
    right = smoothed(RobustDPOLossFn, inputs, inputs.m, zero)
    flipped = smoothed(RobustDPOLossFn, inputs, zero, inputs.m)
    return (1 - inputs.flip) * right + inputs.flip * flipped


@each
def _robust(inputs: Inputs) -> Tensor:
    return smoothed(RobustDPOLossFn, inputs, inputs.m, torch.zeros_like(inputs.m))


DPO = "nemo_rl_ref.algorithms.loss.DPOLossFn"
REWARD_MODEL = "nemo_rl_ref.algorithms.loss.PreferenceLossFn"
PAIRWISE = "nemo_rl_ref.custom.pairwise."
with evaluate(False):
    MARGIN = {m: beta * (h_w - h_l)}
    EQUATIONS = [
        Equation(
            label="bradley-terry",
            title="Bradley-Terry model",
            left=r"P(y_w \succ y_l \mid x)",
            right=(
                exp(reward_w) / (exp(reward_w) + exp(reward_l)),
                sigma(reward_w - reward_l),
            ),
            implementation=REWARD_MODEL,
            check=_bradley_terry,
            source="bradley1952",
            note="The probability is exp(-loss) of one pair.",
        ),
        Equation(
            label="reward-model-loss",
            title="Loss of a reward model",
            left=r"L_{\mathrm{RM}}(\phi)",
            right=-mean(logsigma(model_w[n] - model_l[n]), n, N, PAIRS),
            implementation=REWARD_MODEL,
            check=_reward_model_loss,
            source="rafailov2023",
            at="Eq. 2",
        ),
        Equation(
            label="log-ratio",
            title="Log-ratio of an answer",
            left=r"h_\theta(x, y)",
            right=Sum(log(token[t] / ref_token[t]), (t, 1, T)),
            implementation=DPO,
            check=_log_ratio,
            note="It is the metric `rewards_chosen_mean` of one pair, between a prompt and padding "
            "that do not count.",
        ),
        Equation(
            label="dpo-probability",
            title="Preference that a policy states",
            left=r"P_\theta(y_w \succ y_l \mid x)",
            right=sigma(beta * log(pi_w / ref_w) - beta * log(pi_l / ref_l)),
            implementation=DPO,
            check=_dpo_probability,
            source="rafailov2023",
            at="Eq. 6",
            note="The probability is exp(-loss) of one pair.",
        ),
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
            implementation=DPO,
            check=_dpo_loss,
            source="rafailov2023",
            at="Eq. 7",
        ),
        Equation(
            label="dpo-gradient",
            title="Gradient of the DPO loss",
            left=r"\nabla_\theta L_{\mathrm{DPO}}",
            right=-beta * sigma(-m) * (grad_w - grad_l),
            lets=MARGIN,
            implementation=DPO,
            check=_dpo_gradient,
            source="rafailov2023",
            at="Section 4",
            note="The gradient is autograd's, for one pair.",
        ),
        Equation(
            label="dpo-curvature",
            title="Curvature of the DPO loss in the margin",
            left=r"\frac{\partial^2 L_{\mathrm{DPO}}}{\partial m^2}",
            right=sigma(m) * sigma(-m),
            implementation=DPO,
            check=_dpo_curvature,
            note="Both derivatives are autograd's, for one pair.",
        ),
        Equation(
            label="dpo-population",
            title="DPO loss over both labels of two answers",
            left=r"\bar L_{\mathrm{DPO}}(m)",
            right=-prefer * logsigma(m) - (1 - prefer) * logsigma(-m),
            implementation=DPO,
            check=_dpo_population,
            note="A definition, written with σ. Compared with it is the loss of the pair and of "
            "the pair in reverse, each as often as it is labeled so.",
        ),
        Equation(
            label="dpo-population-slope",
            title="Slope of the DPO loss over both labels",
            left=r"\frac{\partial \bar L_{\mathrm{DPO}}}{\partial m}",
            right=sigma(m) - prefer,
            implementation=DPO,
            check=_dpo_population_slope,
            note="The derivative is autograd's.",
        ),
        Equation(
            label="dpo-minimizer",
            title="Margin at which the DPO loss is least",
            left=r"m^*_{\mathrm{DPO}}",
            right=log(prefer / (1 - prefer)),
            implementation=DPO,
            check=_dpo_minimiser,
            note="Found by Newton's method on the losses of the pair and of its reverse.",
        ),
        Equation(
            label="dpo-displacement",
            title="Chosen answer in a step of gradient descent",
            left=r"\left. \frac{\mathrm{d}}{\mathrm{d} \eta} \log \pi_{\theta - \eta \nabla L}"
            r"(y_w \mid x) \right|_{\eta = 0}",
            right=beta
            * sigma(-m)
            * sum_over(slope_w[dim] * (slope_w[dim] - slope_l[dim]), dim, Dim),
            lets=MARGIN,
            implementation=DPO,
            check=_displacement,
            note="Both gradients are autograd's, for one pair.",
        ),
        Equation(
            label="dpo-sft",
            title="DPO with an SFT term",
            left=r"L_{\mathrm{DPO+SFT}}",
            right=-weight_p * logsigma(m) - weight_s * log(pi_w),
            lets={m: beta * log(pi_w / ref_w) - beta * log(pi_l / ref_l)},
            implementation=DPO,
            check=_dpo_sft,
            source="pang2024",
        ),
        Equation(
            label="dpop",
            title="DPO-Positive",
            left=r"L_{\mathrm{DPOP}}",
            right=-logsigma(beta * bracket(h_w - h_l - penalty * maximum(0, -h_w))),
            implementation=PAIRWISE + "DPOPLossFn",
            check=_dpop,
            source="pal2024",
        ),
        Equation(
            label="ipo-loss",
            title="IPO loss",
            left=r"L_{\mathrm{IPO}}(\theta)",
            right=mean(
                (
                    log(chosen[n] / ref_chosen[n])
                    - log(rejected[n] / ref_rejected[n])
                    - 1 / (2 * beta)
                )
                ** 2,
                n,
                N,
                PAIRS,
            ),
            implementation=PAIRWISE + "IPOLossFn",
            check=_ipo_loss,
            source="azar2024",
            at="Eq. 17",
        ),
        Equation(
            label="ipo-minimizer",
            title="Margin at which the IPO loss is least",
            left=r"m^*_{\mathrm{IPO}}",
            right=prefer - Rational(1, 2),
            also=(beta,),
            implementation=PAIRWISE + "IPOLossFn",
            check=_ipo_minimiser,
            note="Found by Newton's method on the losses of the pair and of its reverse.",
        ),
        Equation(
            label="conservative-dpo",
            title="Conservative DPO",
            left=r"L_{\mathrm{cDPO}}",
            right=-(1 - flip) * logsigma(m) - flip * logsigma(-m),
            implementation=PAIRWISE + "ConservativeDPOLossFn",
            check=_conservative,
            source="mitchell2023",
        ),
        Equation(
            label="robust-dpo",
            title="Robust DPO",
            left=r"L_{\mathrm{rDPO}}(m)",
            right=(-(1 - flip) * logsigma(m) + flip * logsigma(-m)) / (1 - 2 * flip),
            implementation=PAIRWISE + "RobustDPOLossFn",
            check=_robust,
            source="chowdhury2024",
        ),
        Equation(
            label="robust-unbiased",
            title="Robust DPO over flipped labels",
            left=r"(1 - \nu)\, L_{\mathrm{rDPO}}(m) + \nu\, L_{\mathrm{rDPO}}(-m)",
            right=-logsigma(m),
            also=(flip,),
            implementation=PAIRWISE + "RobustDPOLossFn",
            check=_robust_on_average,
            source="chowdhury2024",
        ),
    ]
