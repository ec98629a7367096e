# SPDX-License-Identifier: Apache-2.0
"""Probabilities of tokens and answers, rewards along them, and maximum likelihood."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from sympy import Eq, Product, Sum, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, NLLLossFn
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import expectation, indicator, kl, sum_over
from nemo_rl_ref.equations._symbols import (
    MASK,
    MODERATE,
    POSITIVE,
    PROBABILITIES,
    PROBABILITY,
    REAL,
    Domain,
    index,
    indexed,
    symbol,
)
from nemo_rl_ref.equations.notation import N, T, V, Y, gamma, n, pi, t, u, v, y
from nemo_rl_ref.equations.world import World, expect
from nemo_rl_ref.logprobs import token_logprobs

__all__ = ["EQUATIONS"]

STATE = r"x, y_{<t}"
NEXT = rf"v \sim \pi_\theta(\cdot \mid {STATE})"
DATA = r"y \sim p_{\mathcal{D}}"

#: A token's probability, and not so small that the product of seven is no float64.
_TOKEN_PROBABILITY = Domain(
    lambda rng, shape: np.exp(-(10.0 ** rng.uniform(-2, 1.5, size=shape))), (1e-40, 1e-12, 1.0)
)
_LENGTH = Domain(lambda rng, shape: rng.integers(1, 8, size=shape).astype(float), (1.0, 7.0))

logits = indexed("logits", "z_{#1}", "the model's logit of token $v$", REAL, ("V",))
logit_y = symbol("logit_y", "z_{y_t}", "logit of the token that stands at $t$", REAL)
token_y = index("token_y", "y_t", r"token $t$ of the answer")
token_policy = indexed(
    "token_policy",
    rf"\pi_\theta(#1 \mid {STATE})",
    "probability that token $v$ comes next",
    PROBABILITIES,
    ("V",),
)
token_prob = indexed(
    "token_prob",
    r"\pi_\theta(y_{#1} \mid x, y_{<#1})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    _TOKEN_PROBABILITY,
    ("T",),
)
token_reward = indexed("token_reward", "r_{#1}", r"reward given at token $t$", MODERATE, ("T",))
reward_v = indexed(
    "reward_v", rf"r_t({STATE}, #1)", "reward given at $t$ for token $v$", MODERATE, ("V",)
)
value_v = indexed(
    "value_v", rf"V_\pi({STATE}, #1)", "value of the prefix that ends in $v$", REAL, ("V",)
)
data = indexed(
    "data",
    r"p_{\mathcal{D}}(#1 \mid x)",
    "probability of answer $y$ in the data",
    PROBABILITIES,
    ("Y",),
)
data_prob = indexed(
    "data_prob",
    r"\pi_\theta(y_{#1,#2} \mid x_{#1}, y_{#1,<#2})",
    "probability of token $t$ of answer $n$, given what is before it",
    PROBABILITY,
    ("N", "T"),
)
mask = indexed(
    "sft_mask", r"M_{#1,#2}", "1 where token $t$ of answer $n$ counts, else 0", MASK, ("N", "T")
)
length = indexed("length", "T_{#1}", "tokens of answer $n$ that count", _LENGTH, ("N",))
answer_nll = indexed(
    "answer_nll",
    r"\ell_{#1}",
    "mean of $-\\log \\pi_\\theta$ over the tokens of answer $n$, in nats",
    POSITIVE,
    ("N",),
)
k = index("k", "n'", r"another answer of the batch")


@cache
def _world(vocab: int, horizon: int) -> World:
    return World(vocab, horizon)


# ---- tokens -------------------------------------------------------------------------------


def _one_token(drawn: dict[str, Any]) -> dict[str, Any]:
    """Let every token be the one that stands at t, one input after the other."""
    values = next(drawn[name] for name in ("logits", "token_policy") if name in drawn)
    places = np.arange(len(values)) % values.shape[1]
    drawn |= {"token_y": places + 1, "v": values.shape[1] // 2 + 1}
    if "logit_y" in drawn:
        drawn["logit_y"] = np.take_along_axis(values, places[:, None], axis=1)[:, 0]
    return drawn


def _token_logprob(inputs: Inputs) -> Tensor:
    return token_logprobs(inputs.logits, inputs.token_y - 1)


def _entropy(inputs: Inputs) -> Tensor:
    """Of the softmax of log-probabilities, whatever token is asked for."""
    targets = torch.zeros(len(inputs.token_policy), dtype=torch.long)
    return token_logprobs(inputs.token_policy.log(), targets, return_entropy=True)[1]


def _sequence_logprob(inputs: Inputs) -> Tensor:
    """Answer 0 of a world with two tokens has token 0 at each place."""
    world = _world(2, inputs.T)
    probs = inputs.token_prob
    tables = torch.zeros(len(probs), world.states, 2, dtype=torch.float64)
    tables[:, world.prefixes[0]] = torch.stack([probs.log(), torch.log1p(-probs)], dim=-1)
    return torch.vmap(world.logprob)(tables)[:, 0]


@each
def _return_to_go(inputs: Inputs) -> Tensor:
    """The last token's reward is the answer's; the others come from the KL penalty."""
    config = {
        "gae_gamma": float(inputs.gamma),
        "gae_lambda": 1.0,
        "gae_lambda_value": None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": 0.0,
        "normalize_advantages": False,
    }
    penalty = ClippedPGLossConfig(
        use_kl_in_reward=True, reference_policy_kl_penalty=1.0, reference_policy_kl_type="k1"
    )
    rewards = inputs.token_reward[None]
    zeros = torch.zeros_like(rewards)
    returns = GeneralizedAdvantageEstimator(config, penalty).compute_advantage(
        None,
        rewards[:, -1],
        torch.ones_like(rewards),
        zeros,
        reference_logprobs=torch.cat([rewards[:, :-1], zeros[:, -1:]], dim=1),
        logprobs=zeros,
    )[1]
    return returns[0, inputs.t - 1]


def _middle(drawn: dict[str, Any]) -> dict[str, Any]:
    """Look at a position in the middle of the answer."""
    return drawn | {"t": drawn["T"] // 2 + 1}


def _last_rewards(drawn: dict[str, Any]) -> dict[str, Any]:
    """Two tokens remain: the next values are means of the rewards of the second.

    After token v the second token w has the probability that was drawn for token v + w, and as its
    reward what was drawn as value for w, times v.
    """
    vocab = drawn["V"]
    places = np.add.outer(np.arange(vocab), np.arange(vocab)) % vocab
    second_policy = drawn["token_policy"][:, places]
    second_reward = drawn["value_v"][:, None] * np.arange(1.0, vocab + 1)[:, None]
    means = torch.vmap(torch.vmap(expect))(
        torch.from_numpy(second_policy).log(), torch.from_numpy(second_reward)
    )
    return drawn | {
        "second_policy": second_policy,
        "second_reward": second_reward,
        "value_v": means.numpy(),
    }


def _value_recursion(inputs: Inputs) -> Tensor:
    """The mean of the discounted returns of all answers of two tokens."""
    world = _world(inputs.V, 2)
    first, second = world.answers.T
    tables = torch.zeros(len(inputs.gamma), world.states, inputs.V, dtype=torch.float64)
    tables[:, world.prefixes[0, 0]] = inputs.token_policy.log()
    tables[:, world.prefixes[:, 1]] = inputs.second_policy.log()[:, first]
    later = inputs.second_reward[:, first, second]
    returns = inputs.reward_v[:, first] + inputs.gamma[:, None] * later
    return torch.vmap(expect)(torch.vmap(world.logprob)(tables), returns)


# ---- maximum likelihood -------------------------------------------------------------------


def _nll(logprobs: Tensor, token_mask: Tensor, sample_mask: Tensor, tokens: float) -> Tensor:
    batch = {
        # Column 0 is the first token of the prompt, which nothing predicts.
        "token_mask": torch.cat([torch.zeros_like(token_mask[:, :1]), token_mask], dim=1),
        "sample_mask": sample_mask,
    }
    return NLLLossFn()(logprobs, batch, None, count(tokens))[0]


@each
def _sft_loss(inputs: Inputs) -> Tensor:
    """Four answers come in micro-batches of three and one, divided by the count of all."""
    every = torch.ones(inputs.N, dtype=torch.float64)
    parts = zip(
        *(x.split(3) for x in (inputs.data_prob.log(), inputs.sft_mask, every)), strict=True
    )
    return sum(_nll(*part, inputs.sft_mask.sum()) for part in parts)


@each
def _length_weights(inputs: Inputs) -> Tensor:
    """Tokens of one answer differ: k of T has 2 k / (T + 1) times the answer's mean."""
    places = torch.arange(1, 8, dtype=torch.float64)
    lengths = inputs.length[:, None]
    logprobs = -inputs.answer_nll[:, None] * 2 * places / (lengths + 1)
    every = torch.ones(inputs.N, dtype=torch.float64)
    return _nll(logprobs, (places <= lengths).double(), every, inputs.length.sum())


@each
def _cross_entropy(inputs: Inputs) -> Tensor:
    """Each answer is in the batch once, weighted by its share of the data."""
    every = torch.ones(inputs.Y, 1, dtype=torch.float64)
    return _nll(inputs.pi.log()[:, None], every, inputs.data, 1)


@each
def _sft_gradient(inputs: Inputs) -> Tensor:
    scores = inputs.token_policy.log().requires_grad_()
    logprobs = token_logprobs(scores[None, None], (inputs.token_y - 1)[None, None])
    every = torch.ones(1, dtype=torch.float64)
    loss = _nll(logprobs, every[None], every, 1)
    return torch.autograd.grad(loss, scores)[0][inputs.v - 1]


with evaluate(False):
    EQUATIONS = [
        Equation(
            label="token-logprob",
            title="Log-probability of a token",
            left=rf"\log \pi_\theta(y_t \mid {STATE})",
            right=logit_y - log(sum_over(exp(logits[v]), v, V)),
            implementation="nemo_rl_ref.logprobs.token_logprobs",
            check=_token_logprob,
            prepare=_one_token,
        ),
        Equation(
            label="sequence-logprob",
            title="Log-probability of an answer",
            left=r"\log \pi_\theta(y \mid x)",
            right=(
                log(Product(token_prob[t], (t, 1, T))),
                Sum(log(token_prob[t]), (t, 1, T)),
            ),
            implementation="nemo_rl_ref.equations.world.World",
            check=_sequence_logprob,
        ),
        Equation(
            label="entropy",
            title="Entropy of the next token",
            left=rf"\mathcal{{H}}\big(\pi_\theta(\cdot \mid {STATE})\big)",
            right=-sum_over(token_policy[v] * log(token_policy[v]), v, V),
            implementation="nemo_rl_ref.logprobs.token_logprobs",
            check=_entropy,
        ),
        Equation(
            label="return-to-go",
            title="Return-to-go",
            left="R_t",
            right=Sum(gamma ** (u - t) * token_reward[u], (u, t, T)),
            implementation=(
                "nemo_rl_ref.algorithms.advantage_estimator.GeneralizedAdvantageEstimator"
            ),
            check=_return_to_go,
            prepare=_middle,
            note="The returns of GAE with $\\lambda = 1$ and a value of 0 everywhere.",
        ),
        Equation(
            label="value-recursion",
            title="Value of a prefix",
            left=rf"V_\pi({STATE})",
            right=expectation(reward_v[v] + gamma * value_v[v], v, V, token_policy[v], NEXT),
            implementation="nemo_rl_ref.equations.world.expect",
            check=_value_recursion,
            prepare=_last_rewards,
            note="The mean return over all ways in which two tokens can follow, each with rewards "
            "of its own. The next values are means over the second token.",
        ),
        Equation(
            label="sft-loss",
            title="Loss of supervised fine-tuning",
            left=r"L_{\mathrm{SFT}}(\theta)",
            right=-(
                sum_over(sum_over(mask[n, t] * log(data_prob[n, t]), t, T), n, N)
                / sum_over(sum_over(mask[n, t], t, T), n, N)
            ),
            implementation="nemo_rl_ref.algorithms.loss.NLLLossFn",
            check=_sft_loss,
        ),
        Equation(
            label="sft-length-weights",
            title="What an answer weighs in the SFT loss",
            left=r"L_{\mathrm{SFT}}(\theta)",
            right=Sum(length[n] / sum_over(length[k], k, N) * answer_nll[n], (n, 1, N)),
            implementation="nemo_rl_ref.algorithms.loss.NLLLossFn",
            check=_length_weights,
        ),
        Equation(
            label="sft-forward-kl",
            title="Cross-entropy as entropy and forward divergence",
            left=r"L(\theta)",
            right=(
                -expectation(log(pi[y]), y, Y, data[y], DATA),
                -expectation(log(data[y]), y, Y, data[y], DATA)
                + kl(
                    data[y],
                    pi[y],
                    y,
                    Y,
                    r"p_{\mathcal{D}}(\cdot \mid x)",
                    r"\pi_\theta(\cdot \mid x)",
                ),
            ),
            implementation="nemo_rl_ref.algorithms.loss.NLLLossFn",
            check=_cross_entropy,
            note="A batch with every answer, weighted by `sample_mask`.",
        ),
        Equation(
            label="sft-gradient",
            title="Gradient of a token's loss",
            left=r"\frac{\partial}{\partial z_v} "
            rf"\big[ -\log \pi_\theta(y_t \mid {STATE}) \big]",
            right=token_policy[v] - indicator(Eq(v, token_y)),
            implementation=(
                "nemo_rl_ref.algorithms.loss.NLLLossFn",
                "nemo_rl_ref.logprobs.token_logprobs",
            ),
            check=_sft_gradient,
            prepare=_one_token,
            note="The gradient is autograd's, through both.",
        ),
    ]
