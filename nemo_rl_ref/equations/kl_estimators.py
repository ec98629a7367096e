# SPDX-License-Identifier: Apache-2.0
"""Estimators of the KL divergence: their values, their means and the gradients of their means."""

from __future__ import annotations

from typing import Any

import torch
from sympy import Integer, Rational, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.utils import calculate_kl
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import (
    clip,
    expectation,
    kl,
    minimum,
    sum_over,
    variance,
)
from nemo_rl_ref.equations._symbols import POSITIVE, PROBABILITY, REAL, indexed, symbol
from nemo_rl_ref.equations.notation import R, Y, beta, old, pi, ref, y
from nemo_rl_ref.equations.world import expect
from nemo_rl_ref.equations.world import kl as exact_kl

__all__ = ["EQUATIONS"]

token_pi = symbol(
    "kl_token_pi",
    r"\pi_\theta(y_t \mid x, y_{<t})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    PROBABILITY,
)
token_ref = symbol(
    "kl_token_ref",
    r"\pi_{\mathrm{ref}}(y_t \mid x, y_{<t})",
    "probability of token $t$ under the reference policy, given what is before it",
    PROBABILITY,
)
h = symbol(
    "kl_h",
    r"\hat h",
    "clamped log-ratio of the sampled token to the reference, in nats",
    REAL,
)
c_in = symbol("kl_c_in", r"c_{\mathrm{in}}", "clamp of the log-ratio, in nats", POSITIVE)
c_out = symbol("kl_c_out", r"c_{\mathrm{out}}", "clamp of the estimate, in nats", POSITIVE)
score = indexed(
    "kl_score",
    r"s(#1)",
    r"score of answer $y$: gradient of $\log \pi_\theta(y \mid x)$, of mean 0 under the policy",
    REAL,
    ("Y",),
)
f = indexed("kl_f", r"f_\theta(#1)", "any function of the answer and the parameters", REAL, ("Y",))
grad_f = indexed(
    "kl_grad_f",
    r"\nabla_\theta f_\theta(#1)",
    r"gradient of $f_\theta$, answer held fixed",
    REAL,
    ("Y",),
)

POLICY = r"\pi_\theta"
REFERENCE = r"\pi_{\mathrm{ref}}"
OLD = r"\pi_{\mathrm{old}}"
UNDER_POLICY = r"y \sim \pi_\theta"
UNDER_REFERENCE = r"y \sim \pi_{\mathrm{ref}}"
UNDER_OLD = r"y \sim \pi_{\mathrm{old}}"
CALCULATE_KL = "nemo_rl_ref.algorithms.utils.calculate_kl"
KL = "nemo_rl_ref.equations.world.kl"


# ---- values ---------------------------------------------------------------------------------


def estimate(kind: str, policy: Tensor, reference: Tensor, weights: Any = None) -> Tensor:
    """Return NeMo RL's estimate without clamps, from log-probabilities of the same shape."""
    return calculate_kl(policy, reference, kind, None, None, weights)


def _value(kind: str) -> Any:
    def check(inputs: Inputs) -> Tensor:
        return estimate(kind, inputs.kl_token_pi.log(), inputs.kl_token_ref.log())

    return check


@each
def _clamped(inputs: Inputs) -> Tensor:
    return calculate_kl(
        inputs.kl_token_pi.log(),
        inputs.kl_token_ref.log(),
        "k3",
        input_clamp_value=float(inputs.kl_c_in),
        output_clamp_value=float(inputs.kl_c_out),
    )


# ---- means ----------------------------------------------------------------------------------


@each
def _kl(inputs: Inputs) -> Tensor:
    return exact_kl(inputs.pi.log(), inputs.ref.log())


def _mean(kind: str, under: str, *, weighted: bool = False) -> Any:
    @each
    def check(inputs: Inputs) -> Tensor:
        log_pi, log_under = inputs.pi.log(), inputs[under].log()
        weights = (log_pi - log_under).exp() if weighted else None
        return expect(log_under, estimate(kind, log_pi, inputs.ref.log(), weights))

    return check


# ---- gradients ------------------------------------------------------------------------------


def centered(drawn: dict[str, Any]) -> dict[str, Any]:
    """Give the scores mean 0 under the policy, as every score has."""
    mean = (drawn["pi"] * drawn["kl_score"]).sum(-1, keepdims=True)
    return drawn | {"kl_score": drawn["kl_score"] - mean}


def moved(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return θ = 0, one for each input, and log π_θ `(n, Y)`, whose score at 0 is `kl_score`."""
    theta = torch.zeros(len(inputs.pi), dtype=torch.float64, requires_grad=True)
    logits = inputs.pi.log() + inputs.kl_score * theta[:, None]
    return theta, torch.log_softmax(logits, dim=-1)


def slope(value: Tensor, theta: Tensor) -> Tensor:
    """Return the derivative of a sum over inputs with respect to each input's θ."""
    return torch.autograd.grad(value, theta)[0]


def kl_slope(inputs: Inputs, *, reverse: bool = False) -> Tensor:
    """Return the derivative of KL(π_θ‖π_ref), or with `reverse` of KL(π_ref‖π_θ)."""
    theta, log_pi = moved(inputs)
    pairs = zip(log_pi, inputs.ref.log(), strict=True)
    return slope(sum(exact_kl(q, p) if reverse else exact_kl(p, q) for p, q in pairs), theta)


def sampled_batch(log_pi: Tensor, weights: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Make a batch for `ClippedPGLossFn` in which a sum over tokens is an exact expectation.

    Each row lists all answers, of one token each, and the mask holds their probabilities.

    Args:
        log_pi: log-probabilities of the answers, `(n, Y)`.
        weights: the probabilities of sampling them, `(n, Y)`.
        **more: further tensors of the batch, `(n, Y)`.
    """

    def column(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values[:, :1]), values.detach()], dim=1)

    names = {
        "token_mask": weights,
        "prev_logprobs": log_pi,
        "generation_logprobs": log_pi,
    }
    batch = {name: column(values) for name, values in {**names, **more}.items()}
    batch["sample_mask"] = torch.ones(len(log_pi), dtype=torch.float64)
    batch["input_ids"] = torch.zeros(batch["token_mask"].shape, dtype=torch.long)
    return batch


def _product_rule(inputs: Inputs) -> Tensor:
    """A function that is linear in θ, averaged over a policy that depends on θ as well."""
    theta, log_pi = moved(inputs)
    values = inputs.kl_f + inputs.kl_grad_f * theta[:, None]
    return slope(sum(map(expect, log_pi, values)), theta)


def _average_slope(kind: str) -> Any:
    """The gradient of the average of an estimate over samples: the samples stay as they are."""

    def check(inputs: Inputs) -> Tensor:
        theta, log_pi = moved(inputs)
        return slope((inputs.pi * estimate(kind, log_pi, inputs.ref.log())).sum(), theta)

    return check


def _k3_gradient(inputs: Inputs) -> list[Tensor]:
    return [_average_slope("k3")(inputs), kl_slope(inputs, reverse=True)]


def _weighted_gradient(inputs: Inputs) -> Tensor:
    """NeMo RL's loss with the KL term alone: advantages of zero and β = 1."""
    theta, log_pi = moved(inputs)
    loss_fn = ClippedPGLossFn(
        ClippedPGLossConfig(
            reference_policy_kl_penalty=1.0,
            kl_input_clamp_value=None,
            kl_output_clamp_value=None,
        )
    )
    batch = sampled_batch(
        log_pi,
        inputs.pi,
        reference_policy_logprobs=inputs.ref.log(),
        advantages=torch.zeros_like(log_pi),
    )
    loss = loss_fn(log_pi, batch, global_valid_seqs=count(1), global_valid_toks=count(1))[0]
    return slope(loss, theta)


def _kl_in_reward(inputs: Inputs) -> Tensor:
    theta, log_pi = moved(inputs)
    objective = torch.zeros((), dtype=torch.float64)
    for place, log_p in enumerate(log_pi):
        penalty = inputs.beta[place] * exact_kl(log_p, inputs.ref[place].log())
        objective = objective + expect(log_p, inputs.R[place]) - penalty
    return slope(objective, theta)


def _k3_in_reward(inputs: Inputs) -> Tensor:
    """The policy gradient with a fixed k3 as the reward."""
    theta, log_pi = moved(inputs)
    reward = estimate("k3", log_pi, inputs.ref.log()).detach()
    return slope(sum(map(expect, log_pi, reward)), theta)


with evaluate(False):
    log_ratio = log(pi[y] / ref[y])
    token_ratio = log(token_pi / token_ref)
    k3_of_answer = ref[y] / pi[y] - 1 - log(ref[y] / pi[y])

    EQUATIONS = [
        Equation(
            label="kl-definition",
            title="KL divergence from the reference",
            left=rf"\mathrm{{KL}}(\, {POLICY} \,\|\, {REFERENCE} \,)",
            right=expectation(log_ratio, y, Y, pi[y], UNDER_POLICY),
            implementation=KL,
            check=_kl,
            source="kullback1951",
            note="The samples come from the first argument, the policy.",
        ),
        Equation(
            label="k1",
            title="Estimator k1",
            left="k_1",
            right=token_ratio,
            implementation=CALCULATE_KL,
            check=_value("k1"),
            source="schulman2020kl",
        ),
        Equation(
            label="k2",
            title="Estimator k2",
            left="k_2",
            right=Rational(1, 2) * token_ratio**2,
            implementation=CALCULATE_KL,
            check=_value("k2"),
            source="schulman2020kl",
        ),
        Equation(
            label="k3",
            title="Estimator k3",
            left="k_3",
            right=token_ref / token_pi - 1 - log(token_ref / token_pi),
            implementation=CALCULATE_KL,
            check=_value("k3"),
            source="schulman2020kl",
        ),
        Equation(
            label="k3-clamped",
            title="Clamped k3",
            left="k_3",
            right=minimum(exp(-h) - 1 + h, c_out),
            lets={h: clip(token_ratio, -c_in, c_in)},
            implementation=CALCULATE_KL,
            check=_clamped,
        ),
        Equation(
            label="k3-mean",
            title="Mean of k3 under the policy",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[k_3]",
            right=(
                expectation(k3_of_answer, y, Y, pi[y], UNDER_POLICY),
                sum_over(ref[y], y, Y) - 1 + kl(pi[y], ref[y], y, Y, POLICY, REFERENCE),
                kl(pi[y], ref[y], y, Y, POLICY, REFERENCE),
            ),
            implementation=CALCULATE_KL,
            check=_mean("k3", "pi"),
            source="schulman2020kl",
        ),
        Equation(
            label="k2-mean",
            title="Mean of k2 under the policy",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[k_2]",
            right=Rational(1, 2) * variance(log_ratio, y, Y, pi[y], UNDER_POLICY)
            + Rational(1, 2) * kl(pi[y], ref[y], y, Y, POLICY, REFERENCE) ** 2,
            implementation=CALCULATE_KL,
            check=_mean("k2", "pi"),
        ),
        Equation(
            label="k1-off-policy",
            title="Mean of k1 under an older policy",
            left=rf"\mathbb{{E}}_{{{UNDER_OLD}}}[k_1]",
            right=kl(old[y], ref[y], y, Y, OLD, REFERENCE) - kl(old[y], pi[y], y, Y, OLD, POLICY),
            implementation=CALCULATE_KL,
            check=_mean("k1", "old"),
        ),
        Equation(
            label="k3-off-policy",
            title="Mean of k3 under an older policy",
            left=rf"\mathbb{{E}}_{{{UNDER_OLD}}}[k_3 - k_1]",
            right=expectation(ref[y] / pi[y], y, Y, old[y], UNDER_OLD) - 1,
            implementation=CALCULATE_KL,
            check=each(
                lambda inputs: expect(
                    inputs.old.log(),
                    estimate("k3", inputs.pi.log(), inputs.ref.log())
                    - estimate("k1", inputs.pi.log(), inputs.ref.log()),
                )
            ),
        ),
        Equation(
            label="kl-importance",
            title="Importance weights make k3 unbiased again",
            left=rf"\mathbb{{E}}_{{{UNDER_OLD}}}\left[ "
            r"\frac{\pi_\theta(y \mid x)}{\pi_{\mathrm{old}}(y \mid x)}\, k_3 \right]",
            right=kl(pi[y], ref[y], y, Y, POLICY, REFERENCE),
            implementation=CALCULATE_KL,
            check=_mean("k3", "old", weighted=True),
            also=(old,),
        ),
        Equation(
            label="product-rule",
            title="Gradient of an expectation",
            left=rf"\nabla_\theta \mathbb{{E}}_{{{UNDER_POLICY}}}[f_\theta(y)]",
            right=expectation(score[y] * f[y], y, Y, pi[y], UNDER_POLICY)
            + expectation(grad_f[y], y, Y, pi[y], UNDER_POLICY),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_product_rule,
            prepare=centered,
        ),
        Equation(
            label="kl-gradient",
            title="Gradient of the KL divergence",
            left=rf"\nabla_\theta \mathrm{{KL}}(\, {POLICY} \,\|\, {REFERENCE} \,)",
            right=expectation(score[y] * log_ratio, y, Y, pi[y], UNDER_POLICY),
            implementation=KL,
            check=kl_slope,
            prepare=centered,
            note="The gradient is autograd's, through the exact sum.",
        ),
        Equation(
            label="k1-gradient",
            title="Gradient of the average of k1",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[\nabla_\theta k_1]",
            right=(expectation(score[y], y, Y, pi[y], UNDER_POLICY), Integer(0)),
            implementation=CALCULATE_KL,
            check=_average_slope("k1"),
            also=(ref,),
            prepare=centered,
            source="tang2025kl",
        ),
        Equation(
            label="k2-gradient",
            title="Gradient of the average of k2",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[\nabla_\theta k_2]",
            right=expectation(score[y] * log_ratio, y, Y, pi[y], UNDER_POLICY),
            implementation=CALCULATE_KL,
            check=_average_slope("k2"),
            prepare=centered,
            source="tang2025kl",
        ),
        Equation(
            label="k3-gradient",
            title="Gradient of the average of k3",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[\nabla_\theta k_3]",
            right=(
                expectation(score[y] * (1 - ref[y] / pi[y]), y, Y, pi[y], UNDER_POLICY),
                -expectation(score[y], y, Y, ref[y], UNDER_REFERENCE),
            ),
            implementation=(CALCULATE_KL, KL),
            check=_k3_gradient,
            prepare=centered,
            source="tang2025kl",
            note=r"The second line is also $\nabla_\theta \mathrm{KL}(\pi_{\mathrm{ref}} \| "
            r"\pi_\theta)$, and is compared with autograd's.",
        ),
        Equation(
            label="kl-weighted-gradient",
            title="Gradient of the average of weighted k3",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}\left[ \nabla_\theta \left( "
            r"\frac{\pi_\theta(y \mid x)}{\mathrm{sg}(\pi_\theta(y \mid x))}\, k_3 "
            r"\right) \right]",
            right=expectation(score[y] * log_ratio, y, Y, pi[y], UNDER_POLICY),
            implementation="nemo_rl_ref.algorithms.loss.ClippedPGLossFn",
            check=_weighted_gradient,
            prepare=centered,
            source="tang2025kl",
            note="The gradient of the loss with advantages of zero and without clamps.",
        ),
        Equation(
            label="kl-in-reward",
            title="KL in the reward",
            left=r"\nabla_\theta J",
            right=expectation(score[y] * (R[y] - beta * log_ratio), y, Y, pi[y], UNDER_POLICY),
            implementation=("nemo_rl_ref.equations.world.expect", KL),
            check=_kl_in_reward,
            prepare=centered,
            note=r"Compared with autograd through $J = \mathbb{E}[r] - \beta\, \mathrm{KL}$.",
        ),
        Equation(
            label="k3-in-reward",
            title="Policy gradient with k3 as the reward",
            left=rf"\mathbb{{E}}_{{{UNDER_POLICY}}}[s(y)\, k_3]",
            right=expectation(score[y] * log_ratio, y, Y, pi[y], UNDER_POLICY)
            + expectation(score[y], y, Y, ref[y], UNDER_REFERENCE),
            implementation=CALCULATE_KL,
            check=_k3_in_reward,
            prepare=centered,
            note="The policy gradient for a fixed k3 as the reward.",
        ),
    ]
