# SPDX-License-Identifier: Apache-2.0
"""Sums that micro-batches share: what a loss is divided by, and what a token then weighs."""

from __future__ import annotations

from typing import Any

import torch
from sympy import evaluate
from torch import Tensor

from nemo_rl_ref.algorithms.loss import ClippedPGLossFn, NLLLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossFunction
from nemo_rl_ref.custom.policy_gradient import DrGRPOLossFn
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import average, sum_over
from nemo_rl_ref.equations._group_calls import HEAVY, choose_answer, loss_of, settings
from nemo_rl_ref.equations._symbols import MASK, REAL, index, indexed, size, symbol
from nemo_rl_ref.equations.grpo import lengths, longest
from nemo_rl_ref.equations.notation import G, T, i, j, t

__all__ = ["EQUATIONS"]

B = size("B", "B", "number of micro-batches", (1, 2, 5))
b = index("b", "d", "a micro-batch")
token_losses = indexed(
    "token_losses",
    r"\ell_{#1,#2}",
    "loss of a token of micro-batch $d$",
    REAL,
    ("B", "T"),
)
counted = indexed(
    "counted",
    "M_{#1,#2}",
    "1 for a token that counts, 0 for the others",
    MASK,
    ("B", "T"),
)
own_count = symbol("own_count", "n_d", "number of tokens of micro-batch $d$ that count", REAL)


def _last(drawn: dict[str, Any]) -> dict[str, Any]:
    """Let the index b stand for the last micro-batch."""
    return drawn | {"b": drawn["B"]}


def _share(inputs: Inputs, batch: slice, tokens: Tensor) -> Tensor:
    """What micro-batches add to the loss, divided by a count of tokens."""
    losses, mask = inputs.token_losses[batch], inputs.counted[batch]
    data = {
        "token_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1),
        "sample_mask": torch.ones(len(mask), dtype=torch.float64),
    }
    return NLLLossFn()(-losses, data, count(len(mask)), count(float(tokens)))[0]


@each
def _whole(inputs: Inputs) -> Tensor:
    return _share(inputs, slice(None), inputs.counted.sum())


@each
def _shares(inputs: Inputs) -> Tensor:
    every = inputs.counted.sum()
    return sum(_share(inputs, slice(k, k + 1), every) for k in range(inputs.B))


@each
def _mean_of_means(inputs: Inputs) -> Tensor:
    own = inputs.counted.sum(1)
    return sum(_share(inputs, slice(k, k + 1), own[k]) for k in range(inputs.B)) / inputs.B


@each
def _micro_weight(inputs: Inputs) -> Tensor:
    """The gradient of the mean of means by a token of the last micro-batch."""
    losses = inputs.token_losses.clone().requires_grad_()
    one = Inputs(inputs | {"token_losses": losses})
    own = inputs.counted.sum(1)
    total = sum(_share(one, slice(k, k + 1), own[k]) for k in range(inputs.B)) / inputs.B
    gradient = torch.autograd.grad(total, losses)[0]
    return gradient[-1][inputs.counted[-1] > 0][0]


def _weight(loss_fn: LossFunction, inputs: Inputs, scale: float = 1.0) -> Tensor:
    """Minus the gradient by the first token of answer i, where A = 1 and the ratio is 1."""
    mask = (torch.arange(4) < inputs.lengths[:, None]).double()
    logprobs = torch.zeros_like(mask, requires_grad=True)
    ones = torch.ones(inputs.G, dtype=torch.float64)
    times = getattr(loss_fn, "max_response_length", 1.0)
    loss = loss_of(loss_fn, logprobs, torch.zeros_like(mask), ones, mask=mask * scale, times=times)
    return -torch.autograd.grad(loss, logprobs)[0][inputs.i - 1, 0]


@each
def _token_weight(inputs: Inputs) -> Tensor:
    return _weight(ClippedPGLossFn(settings()), inputs)


@each
def _answer_weight(inputs: Inputs) -> Tensor:
    return _weight(ClippedPGLossFn(settings(token_level_loss=False)), inputs, HEAVY)


@each
def _constant_weight(inputs: Inputs) -> Tensor:
    return _weight(DrGRPOLossFn(settings(max_response_length=inputs.longest)), inputs)


CLIPPED = "nemo_rl_ref.algorithms.loss.ClippedPGLossFn"
NLL = "nemo_rl_ref.algorithms.loss.NLLLossFn"

with evaluate(False):
    _all = sum_over(sum_over(counted[b, t], t, T), b, B)
    EQUATIONS = [
        Equation(
            label="global-mean",
            title="Mean over the tokens of the global batch",
            left="L",
            right=(
                sum_over(sum_over(counted[b, t] * token_losses[b, t], t, T), b, B) / _all,
                sum_over(sum_over(counted[b, t] * token_losses[b, t], t, T) / _all, b, B),
            ),
            implementation=(NLL, "nemo_rl_ref.algorithms.utils.masked_mean"),
            check=lambda inputs: [_whole(inputs), _shares(inputs)],
            note="First the whole batch in one call, then one call for each micro-batch, added.",
        ),
        Equation(
            label="mean-of-means",
            title="Mean of the micro-batches' means",
            left=r"\tilde{L}",
            right=average(
                sum_over(counted[b, t] * token_losses[b, t], t, T) / sum_over(counted[b, t], t, T),
                b,
                B,
            ),
            implementation=NLL,
            check=_mean_of_means,
            note="Each micro-batch is given its own count: what NeMo RL's trainer does not do.",
        ),
        Equation(
            label="micro-weight",
            title="Weight of a token in a mean of means",
            left=r"\frac{\partial \tilde{L}}{\partial \ell_{d,t}}",
            right=1 / (B * own_count),
            lets={own_count: sum_over(counted[b, t], t, T)},
            also=(token_losses,),
            prepare=_last,
            implementation=NLL,
            check=_micro_weight,
            note="The gradient is autograd's, for a token of the last micro-batch.",
        ),
        Equation(
            label="token-weight",
            title="Weight of a token in the mean over tokens",
            left=r"w_{i,t}^{\mathrm{tokens}}",
            right=1 / sum_over(lengths[j], j, G),
            implementation=CLIPPED,
            check=_token_weight,
            prepare=choose_answer,
            source="yu2025",
            note="With `token_level_loss=True`; the gradient is autograd's.",
        ),
        Equation(
            label="answer-weight",
            title="Weight of a token in the mean over answers",
            left=r"w_{i,t}^{\mathrm{answers}}",
            right=1 / (G * lengths[i]),
            implementation=CLIPPED,
            check=_answer_weight,
            prepare=choose_answer,
            source="shao2024",
            note="With `token_level_loss=False`; the gradient is autograd's.",
        ),
        Equation(
            label="constant-weight",
            title="Weight of a token in Dr. GRPO's loss",
            left=r"w_{i,t}^{\mathrm{constant}}",
            right=1 / (G * longest),
            implementation="nemo_rl_ref.custom.policy_gradient.DrGRPOLossFn",
            check=_constant_weight,
            prepare=choose_answer,
            also=(lengths,),
            source="liu2025drgrpo",
            note="The gradient is autograd's. The class is this site's, not NeMo RL's.",
        ),
    ]
