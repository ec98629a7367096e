# SPDX-License-Identifier: Apache-2.0
"""Calls of NeMo RL's advantage estimators and policy-gradient losses with an equation's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.equations._calls import ADDED, count

#: As a token mask, it makes the 1e-8 that :func:`masked_mean` adds to a sum of the mask vanish.
HEAVY = 2.0**40
#: Which answer of a group an equation is evaluated for, by the size of the group.
PLACES = {2: 2, 3: 1, 8: 5}


def choose_answer(drawn: dict[str, Any]) -> dict[str, Any]:
    """Let the index i stand for one answer of the group."""
    return drawn | {"i": PLACES[drawn["G"]]}


def scores(drawn: dict[str, Any]) -> dict[str, Any]:
    """Make rewards multiples of 1/4, so that equal ones have exactly no spread, and choose i.

    Every fourth group has rewards 64 times as large.
    """
    rewards = np.round(4 * drawn["rewards"]) / 4
    rewards[::4] *= 64
    return choose_answer(drawn | {"rewards": rewards})


def in_one_batch(values: Tensor) -> tuple[Tensor, Tensor]:
    """Put all groups, `(n, G)`, into one batch whose rows alternate between the prompts.

    Returns:
        The prompts' token ids, `(n * G, 1)`, and the values, `(n * G,)`.
    """
    prompts = torch.arange(len(values)).repeat(values.shape[1])
    return prompts[:, None], values.T.reshape(-1)


def of_answer(batch: Tensor, groups: int, answer: int) -> Tensor:
    """Take one answer of each group out of such a batch, `(n,)`; `answer` counts from 1."""
    return batch.reshape(-1, groups)[answer - 1]


def settings(**flags: Any) -> ClippedPGLossConfig:
    """Return a configuration without KL and clamps, with numbers instead of tensors."""
    defaults = {
        "reference_policy_kl_penalty": 0.0,
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
    }
    plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in flags.items()}
    return ClippedPGLossConfig(**(defaults | plain))


def loss_of(
    loss_fn: Callable[..., tuple[Tensor, dict[str, Any]]],
    logprobs: Tensor,
    previous: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    times: float = 1.0,
) -> Tensor:
    """Call a policy-gradient loss on a whole batch.

    Args:
        loss_fn: the loss.
        logprobs: log-probabilities of the tokens, `(B, T)`, nats.
        previous: the same under the policy that the update began from.
        advantages: one for each answer, `(B,)`.
        mask: 1 for the tokens that count, `(B, T)`; None for all.
        reference: the log-probabilities under the reference; None where no KL is asked for.
        times: what the loss multiplies the number of answers by before 1e-8 is added to it.

    Returns:
        The loss, a scalar.
    """
    mask = torch.ones_like(previous) if mask is None else mask

    def stored(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)

    data = {
        "token_mask": stored(mask),
        "sample_mask": torch.ones(len(mask), dtype=torch.float64),
        "advantages": stored(advantages[:, None].expand(mask.shape)),
        "prev_logprobs": stored(previous),
        "generation_logprobs": stored(previous),
    }
    if reference is not None:
        data["reference_policy_logprobs"] = stored(reference)
    tokens = float((mask > 0).sum())
    answers = torch.tensor(len(mask) - ADDED / times, dtype=torch.float64)
    return loss_fn(logprobs, data, answers, count(tokens))[0]
