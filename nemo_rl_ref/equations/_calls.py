# SPDX-License-Identifier: Apache-2.0
"""Calls of NeMo RL's losses with the numbers of an equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What :func:`nemo_rl_ref.algorithms.utils.masked_mean` adds to every denominator.
ADDED = 1e-8


def count(value: float) -> Tensor:
    """Return a count to normalize by, less the 1e-8 that NeMo RL's mean adds to it."""
    return torch.tensor(float(value) - ADDED, dtype=torch.float64)


#: How the log-probability of a chosen and of a rejected answer is spread over its tokens. The
#: chosen one has two, then padding. Powers of two, so that the sum is exact.
SHARES = torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]], dtype=torch.float64)
REFERENCE_SHARES = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)


def pair_batch(
    policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Make NeMo RL's batch of pairs.

    Two prompt tokens come first. A chosen answer has two tokens and one of padding, a rejected
    answer three. What does not count has a log-probability that would change the loss if it were
    read.

    Args:
        policy_w: log-probabilities of the chosen answers under the policy, `(P,)`, nats.
        policy_l: those of the rejected answers.
        reference_w: those of the chosen answers under the reference.
        reference_l: those of the rejected answers under the reference.

    Returns:
        `next_token_logprobs` of shape `(2P, 4)` and the batch, float64.
    """
    pairs = len(policy_w)
    counted = (SHARES > 0).double().repeat(pairs, 1)

    def rows(chosen: Tensor, rejected: Tensor, shares: Tensor, other: float) -> Tensor:
        answers = torch.stack([chosen, rejected], dim=1)[:, :, None] * shares
        tokens = answers.reshape(-1, 3) + other * (1 - counted)
        return torch.nn.functional.pad(tokens, (1, 0), value=other)  # the second prompt token

    policy = rows(policy_w, policy_l, SHARES, -1.5)
    reference = rows(reference_w, reference_l, REFERENCE_SHARES, -0.5)
    return policy, {
        "input_ids": torch.zeros(2 * pairs, 5, dtype=torch.long),
        # Of (B, S) entries the first S - 1 are read: reference_policy_logprobs[:, :-1].
        "reference_policy_logprobs": torch.nn.functional.pad(reference, (0, 1), value=7.0),
        "token_mask": torch.nn.functional.pad(counted, (2, 0)),
        "sample_mask": torch.ones(2 * pairs, dtype=torch.float64),
    }


def pair_counts(pairs: int) -> dict[str, Tensor]:
    """Return both global counts for `pairs` pairs of :func:`pair_batch`."""
    # global_valid_seqs is halved before 1e-8 is added.
    return {"global_valid_seqs": 2 * count(pairs), "global_valid_toks": count(5 * pairs)}
