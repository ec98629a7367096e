# SPDX-License-Identifier: Apache-2.0
"""Generalized advantage estimation."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy import evaluate
from torch import Tensor

from nemo_rl_ref.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import maximum
from nemo_rl_ref.equations._symbols import MODERATE, Domain, indexed, size, symbol
from nemo_rl_ref.equations.notation import T, gamma, lam, u

__all__ = ["EQUATIONS"]

ESTIMATOR = "nemo_rl_ref.algorithms.advantage_estimator.GeneralizedAdvantageEstimator"

#: β of the penalty that brings rewards to every token. So large that no clamp of k1 binds.
PENALTY = 100.0

at = size("at", "t", "position of a token in an answer, from 1", (1, 2))
reward_t = symbol("reward_t", "r_t", "reward at token $t$", MODERATE)
state_value = symbol("state_value", "V(s_t)", "value of the state before token $t$", MODERATE)
next_value = symbol("next_value", "V(s_{t+1})", "value of the state after token $t$", MODERATE)
delta_t = symbol("delta_t", r"\delta_t", "TD residual of token $t$, in units of reward", MODERATE)
next_advantage = symbol(
    "next_advantage",
    r"\hat A_{t+1}",
    "advantage estimate of the token after $t$",
    MODERATE,
)
advantage_t = symbol(
    "advantage_t",
    r"\hat A_t",
    "advantage estimate of token $t$, in units of reward",
    MODERATE,
)
step_reward = indexed("step_reward", "r_{#1}", r"reward given at token $t$", MODERATE, ("T",))
residual = indexed(
    "residual",
    r"\delta_{#1}",
    "TD residual of token $t$, in units of reward",
    MODERATE,
    ("T",),
)
values = indexed(
    "values",
    "V(s_{#1})",
    "value of the state before token $t$; after the last token it is 0",
    MODERATE,
    ("T+1",),
)
value_error = indexed(
    "value_error",
    "e(s_{#1})",
    "error of the value function in the state before token $t$; after the last token it is 0",
    MODERATE,
    ("T+1",),
)
#: Drawn, not a size, and only where no sum runs up to it.
length = symbol(
    "length",
    "T",
    "number of tokens of an answer",
    Domain(lambda rng, shape: 2.0 ** rng.integers(1, 5, size=shape)),
)
adaptive = symbol(
    "adaptive",
    r"\alpha",
    "how fast $\\lambda$ goes to 1 with the length of an answer",
    # Powers of 2: NeMo RL computes this λ in float32, which holds them exactly.
    Domain(lambda rng, shape: 2.0 ** rng.integers(-5, 3, size=shape)),
)


def estimate(
    rewards: Tensor, state_values: Tensor, gamma: Any, lam: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Run NeMo RL's estimator on one answer with a reward at every token.

    The estimator itself knows only a reward for the answer. Rewards at tokens come to it as its KL
    penalty, -β k1, with log-probabilities made to fit. Before the answer stands a prompt token,
    between its first two tokens one of a tool, and after it padding; they count as nothing.

    Args:
        rewards: one for each token, `(T,)`.
        state_values: at least T of them; what follows is not used.
        gamma: discount factor.
        lam: decay λ.
        **settings: further keys of the estimator's configuration.

    Returns:
        Advantages and returns, each `(T,)`.
    """
    config = {
        "gae_gamma": float(gamma),
        "gae_lambda": float(lam),
        "gae_lambda_value": None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": 0.0,
        "normalize_advantages": False,
    }
    loss = ClippedPGLossConfig(
        use_kl_in_reward=True,
        reference_policy_kl_penalty=PENALTY,
        reference_policy_kl_type="k1",
    )
    places = torch.tensor([1, *range(3, len(rewards) + 2)])
    row = torch.full((1, len(rewards) + 3), 7.0, dtype=torch.float64)

    def placed(entries: Tensor | float) -> Tensor:
        filled = row.clone()
        filled[0, places] = entries
        return filled

    mask = torch.zeros_like(row)
    mask[0, places] = 1.0
    advantages, returns = GeneralizedAdvantageEstimator(config | settings, loss).compute_advantage(
        None,
        row.new_zeros(1),
        mask,
        placed(state_values[: len(rewards)]),
        reference_logprobs=torch.zeros_like(row),
        logprobs=placed(-rewards / PENALTY),
    )
    return advantages[0, places], returns[0, places]


def _ends(drawn: dict[str, Any]) -> dict[str, Any]:
    """Nothing is to come after the last token."""
    for name in ("values", "value_error"):
        if name in drawn:
            drawn[name][:, -1] = 0.0
    return drawn


def _entry(entries: Tensor, place: int) -> Tensor:
    """Return the entry of token `place`; after the last token, 0."""
    return torch.cat([entries, entries.new_zeros(1)])[place - 1]


def _from_residuals(inputs: Inputs, **settings: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the answer whose TD residuals are those given."""
    v = inputs["values"]
    rewards = inputs.residual + v[:-1] - inputs.gamma * v[1:]
    return estimate(rewards, v, inputs.gamma, inputs.lam, **settings)


@each
def _residual(inputs: Inputs) -> Tensor:
    rewards = torch.stack([inputs.reward_t, torch.ones_like(inputs.reward_t)])
    v = torch.stack([inputs.state_value, inputs.next_value])
    return estimate(rewards, v, inputs.gamma, 0.0)[0][0]


@each
def _sum(inputs: Inputs) -> Tensor:
    return _entry(_from_residuals(inputs)[0], inputs.at)


@each
def _recursion(inputs: Inputs) -> Tensor:
    """Two tokens: the second one's reward makes its advantage the one given."""
    v = torch.stack([inputs.state_value, inputs.next_value])
    first = inputs.delta_t + v[0] - inputs.gamma * v[1]
    second = inputs.next_advantage + v[1]
    return estimate(torch.stack([first, second]), v, inputs.gamma, inputs.lam)[0][0]


@each
def _lambda_0(inputs: Inputs) -> Tensor:
    rewards = torch.stack([inputs.reward_t, torch.ones_like(inputs.reward_t)])
    v = torch.stack([inputs.state_value, inputs.next_value])
    return estimate(rewards, v, inputs.gamma, 1e-12)[0][0]


@each
def _lambda_1(inputs: Inputs) -> Tensor:
    advantages = estimate(inputs.step_reward, inputs["values"], inputs.gamma, 1.0)[0]
    return _entry(advantages, inputs.at)


@each
def _returns(inputs: Inputs) -> Tensor:
    """λ of the returns is `gae_lambda_value` where that is given, whatever the policy's is."""
    lam = float(inputs.lam)
    settings = {"gae_lambda_value": lam, "gae_lambda_policy": lam / 2}
    _, returns = estimate(inputs.step_reward, inputs["values"], inputs.gamma, lam / 3, **settings)
    return _entry(returns, inputs.at)


@each
def _bias(inputs: Inputs) -> Tensor:
    v, e = inputs["values"], inputs.value_error
    wrong, _ = estimate(inputs.step_reward, v + e, inputs.gamma, inputs.lam)
    right, _ = estimate(inputs.step_reward, v, inputs.gamma, inputs.lam)
    return _entry(wrong - right, inputs.at)


@each
def _adaptive(inputs: Inputs) -> Tensor:
    """One residual of 1, at the second token: the first one's advantage is λ."""
    rewards = torch.zeros(int(inputs.length), dtype=torch.float64)
    rewards[1] = 1.0
    zero = torch.zeros_like(rewards)
    return estimate(rewards, zero, 1.0, 0.5, length_adaptive_alpha=float(inputs.adaptive))[0][0]


def _discounted(entry: sympy.Expr, decay: sympy.Expr) -> sympy.Expr:
    return sympy.Sum(decay ** (u - at) * entry, (u, at, T))


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="td-residual",
            title="TD residual",
            left=r"\delta_t",
            right=reward_t + gamma * next_value - state_value,
            implementation=ESTIMATOR,
            check=_residual,
            source="schulman2016",
            note="The estimator with λ = 0, on two tokens with a masked one between them.",
        ),
        Equation(
            label="gae-sum",
            title="Generalized advantage estimate",
            left=r"\hat A_t",
            right=_discounted(residual[u], gamma * lam),
            also=(values,),
            implementation=ESTIMATOR,
            check=_sum,
            prepare=_ends,
            source="schulman2016",
            at="Eq. 16",
            note="The rewards are made such that the residuals are those given.",
        ),
        Equation(
            label="gae-recursion",
            title="The estimate from the next one",
            left=r"\hat A_t",
            right=delta_t + gamma * lam * next_advantage,
            also=(state_value, next_value),
            implementation=ESTIMATOR,
            check=_recursion,
        ),
        Equation(
            label="gae-lambda-0",
            title="The limit of a small λ",
            left=r"\lim_{\lambda \to 0} \hat A_t",
            right=reward_t + gamma * next_value - state_value,
            implementation=ESTIMATOR,
            check=_lambda_0,
            source="schulman2016",
            note="The estimator with λ = 1e-12.",
        ),
        Equation(
            label="gae-lambda-1",
            title="The limit of λ = 1",
            left=r"\lim_{\lambda \to 1} \hat A_t",
            right=_discounted(step_reward[u], gamma) - values[at],
            implementation=ESTIMATOR,
            check=_lambda_1,
            prepare=_ends,
            source="schulman2016",
        ),
        Equation(
            label="gae-returns",
            title="Return, the target of the value",
            left=r"\hat R_t",
            right=(
                advantage_t + values[at],
                sympy.Sum(
                    (gamma * lam) ** (u - at)
                    * (step_reward[u] + gamma * (1 - lam) * values[u + 1]),
                    (u, at, T),
                ),
            ),
            lets={
                advantage_t: sympy.Sum(
                    (gamma * lam) ** (u - at)
                    * (step_reward[u] + gamma * values[u + 1] - values[u]),
                    (u, at, T),
                )
            },
            implementation=ESTIMATOR,
            check=_returns,
            prepare=_ends,
        ),
        Equation(
            label="gae-bias",
            title="What an error of the value function does",
            left=r"\hat A_t[V + e] - \hat A_t[V]",
            right=-value_error[at]
            + (1 - lam)
            * gamma
            * sympy.Sum((gamma * lam) ** (u - at) * value_error[u + 1], (u, at, T)),
            also=(values, step_reward),
            implementation=ESTIMATOR,
            check=_bias,
            prepare=_ends,
        ),
        Equation(
            label="gae-length-adaptive",
            title="Decay that depends on the length",
            left=r"\lambda_{\mathrm{policy}}",
            right=1 - 1 / maximum(adaptive * length, 1),
            implementation=ESTIMATOR,
            check=_adaptive,
            source="yue2025",
            note="α is a power of 2, because this λ is computed in float32.",
        ),
    ]
