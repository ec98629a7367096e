# SPDX-License-Identifier: Apache-2.0
"""PPO: the surrogate, its clipping, and the loss of the value function."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy import evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossFn,
    MseValueLossConfig,
    MseValueLossFn,
)
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import (
    clip,
    indicator,
    maximum,
    mean,
    minimum,
    sum_over,
)
from nemo_rl_ref.equations._symbols import (
    MODERATE,
    POSITIVE,
    PROBABILITIES,
    PROBABILITY,
    RATIO,
    REAL,
    SMALL,
    Domain,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.notation import A, T, V, eps, rho, t, v

__all__ = ["EQUATIONS"]

CLIPPED = "nemo_rl_ref.algorithms.loss.ClippedPGLossFn"
VALUE = "nemo_rl_ref.algorithms.loss.MseValueLossFn"

pi_t = symbol(
    "pi_t",
    r"\pi_\theta(y_t \mid x, y_{<t})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    PROBABILITY,
)
old_t = symbol(
    "old_t",
    r"\pi_{\mathrm{old}}(y_t \mid x, y_{<t})",
    r"probability of token $t$ under the policy that the update began from",
    PROBABILITY,
)
#: Less far apart than RATIO, because sums of terms of both signs cancel.
SUMMED_RATIO = Domain(RATIO.draw, (1e-3, 0.5, 1.0, 2.0, 1e3))
token_ratio = indexed(
    "token_ratio", r"\rho_{#1}", "importance ratio of token $t$", SUMMED_RATIO, ("T",)
)
token_advantage = indexed(
    "token_advantage",
    r"A_{#1}",
    "advantage of token $t$, in units of reward",
    REAL,
    ("T",),
)
token_grad = indexed(
    "token_grad",
    r"\nabla_\theta \log \pi_\theta(y_{#1} \mid x, y_{<#1})",
    r"score of token $t$: gradient of its log-probability",
    MODERATE,
    ("T",),
)
grad_t = symbol(
    "grad_t",
    r"\nabla_\theta \log \pi_\theta(y_t \mid x, y_{<t})",
    "gradient of the token's log-probability",
    REAL,
)
eps_low = symbol(
    "eps_low",
    r"\varepsilon_{\mathrm{low}}",
    "how far below 1 the importance ratio counts",
    SMALL,
)
eps_high = symbol(
    "eps_high",
    r"\varepsilon_{\mathrm{high}}",
    "how far above 1 the importance ratio counts",
    SMALL,
)
token_loss = symbol("token_loss", r"\ell", "clipped loss of a token", REAL)
dual = symbol(
    "dual",
    "c",
    "bound of the dual clip, greater than 1",
    Domain(
        lambda rng, shape: 1.01 + 10.0 ** rng.uniform(-1, 1, size=shape),
        (1.01, 3.0, 100.0),
    ),
)
token_probability = indexed(
    "token_probability",
    r"\pi_{\mathrm{old}}(#1)",
    "probability of token $v$ under the policy that the update began from",
    PROBABILITIES,
    ("V",),
)
rate = symbol("rate", r"\eta", "step size of gradient descent", POSITIVE)
sampled = size("sampled", "y_t", r"token $t$ of the answer", (1, 2))
value_t = indexed(
    "value_t",
    r"V_\phi(s_{#1})",
    "value that the value model gives to the state before token $t$",
    MODERATE,
    ("T",),
)
return_t = indexed(
    "return_t",
    r"\hat R_{#1}",
    "return from token $t$ on, the target of the value",
    MODERATE,
    ("T",),
)
new_value = symbol(
    "new_value",
    r"V_\phi(s_t)",
    "value that the value model gives to the state",
    MODERATE,
)
old_value = symbol(
    "old_value",
    r"V_{\mathrm{old}}(s_t)",
    "value that it gave when the update began",
    MODERATE,
)
clipped_value = symbol(
    "clipped_value",
    r"V_{\mathrm{clip}}",
    "the value, within reach of the old one",
    MODERATE,
)
target = symbol("target", r"\hat R_t", "return, the target of the value", MODERATE)
value_scale = symbol("value_scale", "c_V", "weight of the value loss", POSITIVE)
value_eps = symbol(
    "value_eps",
    r"\varepsilon_V",
    "how far a value may move before it stops to count, in units of reward",
    SMALL,
)


def token_batch(
    prev: Tensor, advantages: Tensor, *, generation: Tensor | None = None
) -> dict[str, Any]:
    """Make NeMo RL's policy-gradient batch, in which every token counts.

    Args:
        prev: log π_old of the tokens, `(B, T)`, nats.
        advantages: theirs, `(B, T)`.
        generation: log μ of the tokens, `(B, T)`, nats; None where the engine agrees with π_old.

    Returns:
        The batch; column 0 is that of a prompt of one token.
    """

    def shifted(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)

    mask = torch.ones_like(prev)
    return {
        "input_ids": torch.zeros(len(prev), prev.shape[1] + 1, dtype=torch.long),
        "token_mask": shifted(mask),
        "sample_mask": torch.ones_like(prev[:, 0]),
        "advantages": shifted(advantages),
        "prev_logprobs": shifted(prev),
        "generation_logprobs": shifted(prev if generation is None else generation),
    }


def clipped(**settings: Any) -> ClippedPGLossFn:
    """Return NeMo RL's loss without a KL penalty, with settings as numbers or scalars."""
    numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in settings.items()}
    return ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **numbers))


def unclipped() -> ClippedPGLossFn:
    """Return the loss with a range that holds every ratio."""
    return clipped(ratio_clip_min=1.0, ratio_clip_max=float("inf"))


def _one_token(loss: ClippedPGLossFn, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Loss of a single token, given the logarithm of its ratio."""
    batch = token_batch(torch.zeros(1, 1, dtype=torch.float64), advantage.reshape(1, 1))
    return loss(log_ratio.reshape(1, 1), batch, count(1), count(1))[0]


def _one_token_gradient(loss: ClippedPGLossFn, inputs: Inputs) -> Tensor:
    """Its gradient in a parameter θ in which the log-probability is linear."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_ratio = inputs.rho.log() + inputs.grad_t * theta
    return torch.autograd.grad(_one_token(loss, log_ratio, inputs.A), theta)[0]


@each
def _ratio(inputs: Inputs) -> float:
    batch = token_batch(inputs.old_t.log().reshape(1, 1), torch.ones(1, 1, dtype=torch.float64))
    metrics = clipped()(inputs.pi_t.log().reshape(1, 1), batch, count(1), count(1))[1]
    return metrics["probs_ratio"]


@each
def _surrogate(inputs: Inputs) -> Tensor:
    batch = token_batch(torch.zeros(1, inputs.T).double(), inputs.token_advantage[None])
    tokens = count(inputs.T)
    return unclipped()(inputs.token_ratio.log()[None], batch, count(1), tokens)[0]


@each
def _surrogate_gradient(inputs: Inputs) -> Tensor:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logprobs = (inputs.token_ratio.log() + inputs.token_grad * theta)[None]
    batch = token_batch(torch.zeros(1, inputs.T).double(), inputs.token_advantage[None])
    loss = unclipped()(logprobs, batch, count(1), count(inputs.T))[0]
    return torch.autograd.grad(loss, theta)[0]


@each
def _clip(inputs: Inputs) -> Tensor:
    loss = clipped(ratio_clip_min=inputs.eps, ratio_clip_max=inputs.eps)
    return _one_token(loss, inputs.rho.log(), inputs.A)


@each
def _clip_higher(inputs: Inputs) -> Tensor:
    loss = clipped(ratio_clip_min=inputs.eps_low, ratio_clip_max=inputs.eps_high)
    return _one_token(loss, inputs.rho.log(), inputs.A)


@each
def _clip_gradient(inputs: Inputs) -> Tensor:
    loss = clipped(ratio_clip_min=inputs.eps_low, ratio_clip_max=inputs.eps_high)
    return _one_token_gradient(loss, inputs)


def _dual(inputs: Inputs) -> ClippedPGLossFn:
    return clipped(ratio_clip_min=inputs.eps, ratio_clip_max=inputs.eps, ratio_clip_c=inputs.dual)


@each
def _dual_clip(inputs: Inputs) -> Tensor:
    return _one_token(_dual(inputs), inputs.rho.log(), inputs.A)


@each
def _dual_clip_gradient(inputs: Inputs) -> Tensor:
    return _one_token_gradient(_dual(inputs), inputs)


def _short_steps(drawn: dict[str, Any]) -> dict[str, Any]:
    """Keep η A within what an exponential can hold."""
    return drawn | {"rate": drawn["rate"] / (1 + abs(drawn["A"]))}


@each
def _step_ratio(inputs: Inputs) -> float:
    """One step of gradient descent on the loss, then the ratio that the loss reports."""
    logits = inputs.token_probability.log().requires_grad_()
    token = inputs.sampled - 1
    logprob = torch.log_softmax(logits, -1)[token].reshape(1, 1)
    batch = token_batch(logprob.detach(), inputs.A.reshape(1, 1))
    loss = clipped()(logprob, batch, count(1), count(1))[0]
    after = logits - inputs.rate * torch.autograd.grad(loss, logits)[0]
    moved = torch.log_softmax(after, -1)[token].reshape(1, 1)
    return clipped()(moved, batch, count(1), count(1))[1]["probs_ratio"]


def _value_call(
    cliprange: float | None, scale: Tensor, values: Tensor, old: Tensor, returns: Tensor
) -> Tensor:
    loss = MseValueLossFn(MseValueLossConfig(scale=float(scale), cliprange=cliprange))
    ones = torch.ones_like(values)[None]
    data = {
        "token_mask": ones,
        "sample_mask": ones[:, 0],
        "returns": returns[None],
        "values": old[None],
    }
    return loss(values[None], data, None, count(len(values)))[0]


@each
def _value_loss(inputs: Inputs) -> Tensor:
    values, returns = inputs.value_t, inputs.return_t
    return _value_call(None, inputs.value_scale, values, values, returns)


@each
def _value_loss_clip(inputs: Inputs) -> Tensor:
    values = [inputs[name].reshape(1) for name in ("new_value", "old_value", "target")]
    return _value_call(float(inputs.value_eps), inputs.value_scale, *values)


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="importance-ratio",
            title="Importance ratio",
            left=r"\rho_t",
            right=(pi_t / old_t, exp(log(pi_t) - log(old_t))),
            implementation=CLIPPED,
            check=_ratio,
            source="schulman2017",
            note="The check reads the metric `probs_ratio` for one token.",
        ),
        Equation(
            label="ppo-surrogate",
            title="Surrogate loss",
            left=r"L(\theta)",
            right=-mean(token_ratio[t] * token_advantage[t], t, T, "t"),
            implementation=CLIPPED,
            check=_surrogate,
            source="schulman2017",
            at="Eq. 6",
            note="The clipping range is set so wide that nothing is clipped.",
        ),
        Equation(
            label="ppo-surrogate-gradient",
            title="Gradient of the surrogate loss",
            left=r"\nabla_\theta L",
            right=-mean(token_ratio[t] * token_advantage[t] * token_grad[t], t, T, "t"),
            implementation=CLIPPED,
            check=_surrogate_gradient,
            note="The gradient is autograd's.",
        ),
        Equation(
            label="ppo-clip",
            title="Clipped loss of a token",
            left=r"\ell(\rho, A)",
            right=(
                -minimum(rho * A, clip(rho, 1 - eps, 1 + eps) * A),
                sympy.Piecewise(
                    (-minimum(rho, 1 + eps) * A, sympy.Ge(A, 0)),
                    (-maximum(rho, 1 - eps) * A, sympy.Lt(A, 0)),
                ),
            ),
            implementation=CLIPPED,
            check=_clip,
            source="schulman2017",
            at="Eq. 7",
        ),
        Equation(
            label="clip-higher",
            title="Clipped loss with an asymmetric range",
            left=r"\ell(\rho, A)",
            right=-minimum(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A),
            implementation=CLIPPED,
            check=_clip_higher,
            source="yu2025",
        ),
        Equation(
            label="ppo-gradient",
            title="Gradient of the clipped loss",
            left=r"\nabla_\theta \ell",
            right=sympy.Piecewise(
                (0, sympy.And(sympy.Gt(A, 0), sympy.Gt(rho, 1 + eps_high))),
                (0, sympy.And(sympy.Lt(A, 0), sympy.Lt(rho, 1 - eps_low))),
                (-rho * A * grad_t, True),
            ),
            implementation=CLIPPED,
            check=_clip_gradient,
            note="The gradient is autograd's, for one token.",
        ),
        Equation(
            label="ppo-step-ratio",
            title="Importance ratio after one step of gradient descent",
            left=r"\rho'",
            right=exp(rate * A * (1 - token_probability[sampled]))
            / sum_over(
                token_probability[v]
                * exp(rate * A * (indicator(sympy.Eq(v, sampled)) - token_probability[v])),
                v,
                V,
            ),
            implementation=CLIPPED,
            check=_step_ratio,
            prepare=_short_steps,
            note="The step is made with autograd's gradient; the ratio is the metric "
            "`probs_ratio`.",
        ),
        Equation(
            label="dual-clip",
            title="Dual clip",
            left=r"\ell_{\mathrm{dual}}(\rho, A)",
            right=sympy.Piecewise(
                (minimum(token_loss, -dual * A), sympy.Lt(A, 0)), (token_loss, True)
            ),
            lets={token_loss: -minimum(rho * A, clip(rho, 1 - eps, 1 + eps) * A)},
            implementation=CLIPPED,
            check=_dual_clip,
            source="ye2020",
        ),
        Equation(
            label="dual-clip-gradient",
            title="Gradient with the dual clip, for a negative advantage",
            left=r"\nabla_\theta \ell_{\mathrm{dual}}",
            right=sympy.Piecewise(
                (0, sympy.Lt(rho, 1 - eps)),
                (0, sympy.Gt(rho, dual)),
                (-rho * A * grad_t, True),
            ),
            implementation=CLIPPED,
            check=_dual_clip_gradient,
            prepare=lambda drawn: drawn | {"A": -abs(drawn["A"])},
            note="The gradient is autograd's, for one token.",
        ),
        Equation(
            label="value-loss",
            title="Value loss",
            left=r"L(\phi)",
            right=value_scale / 2 * mean((value_t[t] - return_t[t]) ** 2, t, T, "t"),
            implementation=VALUE,
            check=_value_loss,
            source="schulman2017",
            at="Eq. 9",
        ),
        Equation(
            label="value-loss-clip",
            title="Clipped value loss of a token",
            left=r"\ell_V",
            right=value_scale
            / 2
            * maximum((new_value - target) ** 2, (clipped_value - target) ** 2),
            lets={clipped_value: clip(new_value, old_value - value_eps, old_value + value_eps)},
            implementation=VALUE,
            check=_value_loss_clip,
        ),
    ]
