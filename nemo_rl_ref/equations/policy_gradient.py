# SPDX-License-Identifier: Apache-2.0
"""The policy gradient: scores, baselines, rewards-to-go, importance sampling, REINFORCE's loss.

Gradients are along one parameter θ, in which a policy's logits are linear. What holds along every
direction holds for the gradient.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from sympy import Integer, Product, Sum, evaluate, log
from torch import Tensor

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import bracket, expectation, sum_over
from nemo_rl_ref.equations._symbols import MODERATE, REAL, UNIT, indexed, symbol
from nemo_rl_ref.equations.likelihood import data_prob, mask
from nemo_rl_ref.equations.notation import N, R, T, Y, n, old, pi, t, u, y
from nemo_rl_ref.equations.world import World, expect, variance

__all__ = ["EQUATIONS"]

SAMPLED = r"y \sim \pi_\theta"
STALE = r"y \sim \pi_{\mathrm{old}}"

b = symbol("b", "b", "baseline, in units of reward: any number that does not depend on $y$", REAL)
score = indexed(
    "score",
    r"\nabla_\theta \log \pi_\theta(#1 \mid x)",
    "score of answer $y$: gradient of its log-probability",
    MODERATE,
    ("Y",),
)
grad_pi = indexed(
    "grad_pi",
    r"\nabla_\theta \pi_\theta(#1 \mid x)",
    "gradient of the probability of answer $y$",
    MODERATE,
    ("Y",),
)
s = indexed(
    "s",
    "s(#1)",
    r"score of answer $y$: gradient of $\log \pi_\theta(y \mid x)$, of mean 0 under the policy",
    MODERATE,
    ("Y",),
)
grad_J = symbol("grad_J", r"\nabla_\theta J", r"gradient of the expected reward", REAL)
token_score = indexed(
    "token_score",
    r"\nabla_\theta \log \pi_\theta(y_{#2} \mid x, y_{<#2})",
    r"score of token $t$: gradient of its log-probability",
    MODERATE,
    ("Y", "T"),
)
reward_at = indexed(
    "reward_at",
    "r_{#2}",
    r"reward given at token $t$",
    MODERATE,
    ("Y", "T"),
)
answer_advantage = indexed("answer_advantage", "A_{#1}", "advantage of answer $n$", REAL, ("N",))
ratio_variance = indexed(
    "ratio_variance",
    r"c_{#1}",
    "variance of the importance ratio of token $t$, the same after every prefix",
    UNIT,
    ("T",),
)


@cache
def _world(vocab: int, horizon: int) -> World:
    return World(vocab, horizon)


# ---- one decision: an answer is drawn as a whole --------------------------------------------


def _with_scores(drawn: dict[str, Any]) -> dict[str, Any]:
    """Take the scores drawn as the direction of θ and put the policy's scores in their place."""
    name = "score" if "score" in drawn else "s"
    log_pi, direction = torch.from_numpy(drawn["pi"]).log(), torch.from_numpy(drawn[name])
    world = _world(drawn["Y"], 1)
    jacobians = torch.vmap(torch.func.jacrev(world.logprob))(log_pi[:, None])
    scores = torch.einsum("nysv,nsv->ny", jacobians, direction[:, None])
    gradients = scores * log_pi.exp()
    prepared = drawn | {"direction": drawn[name], name: scores.numpy()}
    return prepared | ({"grad_pi": gradients.numpy()} if "grad_pi" in drawn else {})


def _steady(drawn: dict[str, Any]) -> dict[str, Any]:
    """Keep the score from being 0 everywhere: then every baseline is as good as any other."""
    count_y = drawn["Y"]
    pi = 0.999 * drawn["pi"] + 1e-3 / count_y
    return _with_scores(drawn | {"pi": pi, "s": drawn["s"] + np.arange(count_y)})


def _log_pi(inputs: Inputs, theta: Tensor) -> Tensor:
    """Log-probabilities of the answers, `(n, Y)`, as functions of a θ for each input, `(n, 1)`."""
    logits = inputs.pi.log() + theta * inputs.direction
    return torch.vmap(_world(inputs.Y, 1).logprob)(logits[:, None])


def _zeros(inputs: Inputs) -> Tensor:
    return torch.zeros(len(inputs.pi), 1, dtype=torch.float64, requires_grad=True)


def _slope(inputs: Inputs, values: Tensor) -> Tensor:
    """Autograd's derivative of the exact expectation of fixed values."""
    theta = _zeros(inputs)
    means = torch.vmap(expect)(_log_pi(inputs, theta), values)
    return torch.autograd.grad(means.sum(), theta)[0].flatten()


def _policy_gradient(inputs: Inputs) -> Tensor:
    return _slope(inputs, inputs.R)


def _constant_gradient(inputs: Inputs) -> Tensor:
    return _slope(inputs, torch.ones_like(inputs.pi))


def _expected_reward(inputs: Inputs) -> Tensor:
    return torch.vmap(expect)(inputs.pi.log(), inputs.R)


def _baseline_variance(inputs: Inputs) -> Tensor:
    return torch.vmap(variance)(inputs.pi.log(), (inputs.R - inputs.b[:, None]) * inputs.s)


def _optimal_baseline(inputs: Inputs) -> Tensor:
    """One Newton step from 0, exact because the variance is quadratic in the baseline."""
    baseline = _zeros(inputs)
    spread = torch.vmap(variance)(inputs.pi.log(), (inputs.R - baseline) * inputs.s)
    (slope,) = torch.autograd.grad(spread.sum(), baseline, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), baseline)
    return -(slope.detach() / curvature).flatten()


def _with_gradient(drawn: dict[str, Any]) -> dict[str, Any]:
    drawn = _with_scores(drawn)
    given = Inputs(
        {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in drawn.items()}
    )
    return drawn | {"grad_J": _policy_gradient(given).numpy()}


# ---- token by token -------------------------------------------------------------------------


def _trajectories(drawn: dict[str, Any]) -> dict[str, Any]:
    """Make policies, directions and rewards of a world of up to 3 tokens of what was drawn.

    Prefix k and token v have the logit log π of answer k + v. Directions are the scores drawn,
    rewards the rewards, each taken in turn.
    """
    world = _world(2 if drawn["Y"] == 2 else 3, min(drawn["T"], 3))
    samples, shape = len(drawn["pi"]), (world.states, world.vocab)
    turn = np.arange(world.states * world.vocab).reshape(shape)

    def table(name: str, places: np.ndarray) -> Tensor:
        values = drawn[name].reshape(samples, -1)
        return torch.from_numpy(values[:, places % values.shape[1]])

    logits = table("pi", np.add.outer(*map(np.arange, shape))).log()
    direction, rewards = table("token_score", turn), table("reward_at", turn)
    jacobians = torch.vmap(torch.func.jacrev(world.token_logprobs))(logits)
    scores = torch.einsum("nytsv,nsv->nyt", jacobians, direction)
    return {
        "Y": len(world),
        "T": world.answers.shape[1],
        "V": world.vocab,
        "pi": torch.vmap(world.logprob)(logits).exp().numpy(),
        "token_score": scores.numpy(),
        "reward_at": rewards[:, world.prefixes, world.answers].numpy(),
        "logits": logits.numpy(),
        "direction": direction.numpy(),
    }


def _return_gradient(inputs: Inputs) -> Tensor:
    theta = torch.zeros(len(inputs.pi), 1, 1, dtype=torch.float64, requires_grad=True)
    world = _world(inputs.V, inputs.T)
    log_p = torch.vmap(world.logprob)(inputs.logits + theta * inputs.direction)
    returns = torch.vmap(expect)(log_p, inputs.reward_at.sum(-1))
    return torch.autograd.grad(returns.sum(), theta)[0].flatten()


# ---- samples of another policy --------------------------------------------------------------


def _variance_of_ratio(log_pi: Tensor, log_old: Tensor) -> Tensor:
    return torch.vmap(variance)(log_old, (log_pi - log_old).exp())


def _ratio_variance(inputs: Inputs) -> Tensor:
    return _variance_of_ratio(inputs.pi.log(), inputs.old.log())


def _sequence_ratio_variance(inputs: Inputs) -> Tensor:
    """Two tokens, equally probable before: then p has the ratio's variance (2p - 1)^2."""
    world = _world(2, inputs.T)
    p = (1 + inputs.ratio_variance.sqrt()) / 2
    by_position = torch.stack([p, 1 - p], dim=-1).log()
    # The position of a prefix is the column of `prefixes` in which it stands.
    position = torch.zeros(world.states, dtype=torch.long)
    position[world.prefixes] = torch.arange(inputs.T).expand(len(world), -1)
    log_pi = torch.vmap(world.logprob)(by_position[:, position])
    log_old = world.logprob(torch.zeros(world.states, 2, dtype=torch.float64))
    return _variance_of_ratio(log_pi, log_old.expand_as(log_pi))


# ---- NeMo RL's loss -------------------------------------------------------------------------


REINFORCE = ClippedPGLossFn(
    ClippedPGLossConfig(disable_ppo_ratio=True, reference_policy_kl_penalty=0.0)
)
UNCLIPPED = ClippedPGLossFn(
    ClippedPGLossConfig(
        ratio_clip_min=1.0, ratio_clip_max=math.inf, reference_policy_kl_penalty=0.0
    )
)


def _pg_loss(
    loss_fn: ClippedPGLossFn,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    tokens: float,
) -> Tensor:
    """Call a policy-gradient loss with `(B, T)` tensors."""
    before = torch.zeros_like(token_mask[:, :1])  # the prompt's column, which nothing predicts
    stored = torch.cat([before, old_logprobs], dim=1)
    batch = {
        "token_mask": torch.cat([before, token_mask], dim=1),
        "sample_mask": sample_mask,
        "advantages": torch.cat([before, advantages], dim=1),
        "prev_logprobs": stored,
        "generation_logprobs": stored,
    }
    return loss_fn(logprobs, batch, count(len(logprobs)), count(tokens))[0]


@each
def _reinforce_loss(inputs: Inputs) -> Tensor:
    """Four answers come in micro-batches of three and one, divided by the count of all."""
    logprobs = inputs.data_prob.log()
    every = torch.ones(inputs.N, dtype=torch.float64)
    advantages = inputs.answer_advantage[:, None].expand_as(logprobs)
    # Without a ratio, what the old policy thought of the tokens does not matter.
    rows = (logprobs, torch.zeros_like(logprobs), advantages, inputs.sft_mask, every)
    parts = zip(*(x.split(3) for x in rows), strict=True)
    return sum(_pg_loss(REINFORCE, *part, inputs.sft_mask.sum()) for part in parts)


def _off_policy_loss(inputs: Inputs, log_pi: Tensor) -> Tensor:
    """The loss with the ratio unclipped, answers weighted by π_old; all inputs are one batch."""
    return _pg_loss(
        UNCLIPPED,
        log_pi.reshape(-1, 1),
        inputs.old.log().reshape(-1, 1),
        inputs.R.reshape(-1, 1),
        torch.ones(inputs.R.numel(), 1, dtype=torch.float64),
        inputs.old.flatten(),
        1,
    )


@each
def _importance_sampling(inputs: Inputs) -> Tensor:
    return -_off_policy_loss(inputs, inputs.pi.log())


def _off_policy_gradient(inputs: Inputs) -> Tensor:
    """Minus the gradient of the loss; each input has a θ of its own."""
    theta = _zeros(inputs)
    loss = _off_policy_loss(inputs, _log_pi(inputs, theta))
    return -torch.autograd.grad(loss, theta)[0].flatten()


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="expected-reward",
            title="Expected reward",
            left=r"J(\theta)",
            right=(expectation(R[y], y, Y, pi[y], SAMPLED), sum_over(pi[y] * R[y], y, Y)),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_expected_reward,
            note="The first expression is a definition.",
        ),
        Equation(
            label="policy-gradient",
            title="Policy gradient",
            left=r"\nabla_\theta J(\theta)",
            right=(
                sum_over(R[y] * grad_pi[y], y, Y),
                sum_over(pi[y] * R[y] * score[y], y, Y),
                expectation(R[y] * score[y], y, Y, pi[y], SAMPLED),
            ),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_policy_gradient,
            prepare=_with_scores,
            source="williams1992",
            note="Autograd's gradient of the exact expectation.",
        ),
        Equation(
            label="score-mean",
            title="The score has mean zero",
            left=r"\nabla_\theta \sum_{y} \pi_\theta(y \mid x)",
            right=(
                sum_over(grad_pi[y], y, Y),
                expectation(score[y], y, Y, pi[y], SAMPLED),
                Integer(0),
            ),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_constant_gradient,
            prepare=_with_scores,
        ),
        Equation(
            label="baseline-gradient",
            title="Policy gradient with a baseline",
            left=r"\nabla_\theta J(\theta)",
            right=expectation((R[y] - b) * score[y], y, Y, pi[y], SAMPLED),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_policy_gradient,
            prepare=_with_scores,
            source="williams1992",
        ),
        Equation(
            label="baseline-variance",
            title="Variance with a baseline",
            left=rf"\mathrm{{Var}}_{{{SAMPLED}}}\big[ (r(x, y) - b)\, s(y) \big]",
            right=expectation((R[y] - b) ** 2 * s[y] ** 2, y, Y, pi[y], SAMPLED)
            - bracket(grad_J) ** 2,
            implementation="nemo_rl_ref.equations.world.variance",
            check=_baseline_variance,
            prepare=_with_gradient,
        ),
        Equation(
            label="optimal-baseline",
            title="The baseline of least variance",
            left="b^*",
            right=expectation(R[y] * s[y] ** 2, y, Y, pi[y], SAMPLED)
            / expectation(s[y] ** 2, y, Y, pi[y], SAMPLED),
            implementation="nemo_rl_ref.equations.world.variance",
            check=_optimal_baseline,
            prepare=_steady,
            source="greensmith2004",
            note="The minimum of the exact variance, found by differentiating it twice.",
        ),
        Equation(
            label="reward-to-go",
            title="Policy gradient with rewards-to-go",
            left=r"\nabla_\theta J(\theta)",
            right=(
                expectation(
                    Sum(token_score[y, t], (t, 1, T)) * Sum(reward_at[y, u], (u, 1, T)),
                    y,
                    Y,
                    pi[y],
                    SAMPLED,
                ),
                expectation(
                    Sum(token_score[y, t] * Sum(reward_at[y, u], (u, t, T)), (t, 1, T)),
                    y,
                    Y,
                    pi[y],
                    SAMPLED,
                ),
            ),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_return_gradient,
            prepare=_trajectories,
            source="sutton2000",
        ),
        Equation(
            label="importance-sampling",
            title="Importance sampling",
            left=r"J(\theta)",
            right=expectation(pi[y] / old[y] * R[y], y, Y, old[y], STALE),
            implementation="nemo_rl_ref.algorithms.loss.ClippedPGLossFn",
            check=_importance_sampling,
            source="precup2000",
            note="Minus the loss of answers weighted by $\\pi_{\\mathrm{old}}$, with a clipping "
            "range that never binds.",
        ),
        Equation(
            label="off-policy-gradient",
            title="Policy gradient from another policy's samples",
            left=r"\nabla_\theta J(\theta)",
            right=expectation(pi[y] / old[y] * R[y] * score[y], y, Y, old[y], STALE),
            implementation="nemo_rl_ref.algorithms.loss.ClippedPGLossFn",
            check=_off_policy_gradient,
            prepare=_with_scores,
            note="Minus autograd's gradient of the loss, with a clipping range that never binds.",
        ),
        Equation(
            label="importance-variance",
            title="Variance of the importance ratio",
            left=r"\mathrm{Var}_{y \sim \pi_{\mathrm{old}}}"
            r"\left[ \frac{\pi_\theta(y \mid x)}{\pi_{\mathrm{old}}(y \mid x)} \right]",
            right=expectation(pi[y] / old[y], y, Y, pi[y], SAMPLED) - Integer(1),
            implementation="nemo_rl_ref.equations.world.variance",
            check=_ratio_variance,
        ),
        Equation(
            label="importance-variance-length",
            title="Variance of an answer's ratio",
            left=r"\mathrm{Var}_{y \sim \pi_{\mathrm{old}}}"
            r"\left[ \frac{\pi_\theta(y \mid x)}{\pi_{\mathrm{old}}(y \mid x)} \right]",
            right=Product(Integer(1) + ratio_variance[t], (t, 1, T)) - Integer(1),
            implementation="nemo_rl_ref.equations.world.variance",
            check=_sequence_ratio_variance,
        ),
        Equation(
            label="reinforce-loss",
            title="Loss of REINFORCE",
            left=r"L(\theta)",
            right=-(
                sum_over(
                    sum_over(mask[n, t] * answer_advantage[n] * log(data_prob[n, t]), t, T), n, N
                )
                / sum_over(sum_over(mask[n, t], t, T), n, N)
            ),
            implementation="nemo_rl_ref.algorithms.loss.ClippedPGLossFn",
            check=_reinforce_loss,
            source="williams1992",
            note="With `disable_ppo_ratio` and without a KL penalty.",
        ),
    ]
