# SPDX-License-Identifier: Apache-2.0
"""Calls of NeMo RL's losses with the numbers of an equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What :func:`nemo_rl_ref.algorithms.utils.masked_mean` adds to every denominator.
ADDED = 1e-8


def count(value: float) -> Tensor:
    """Return a count to normalise by, less the 1e-8 that NeMo RL's mean adds to it."""
    return torch.tensor(float(value) - ADDED, dtype=torch.float64)


def pair_batch(
    policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Make NeMo RL's batch of pairs, each answer one token long.

    Args:
        policy_w: log-probabilities of the chosen answers under the policy, `(P,)`, nats.
        policy_l: those of the rejected answers.
        reference_w: those of the chosen answers under the reference.
        reference_l: those of the rejected answers under the reference.

    Returns:
        `next_token_logprobs` of shape `(2P, 1)` and the batch, float64.
    """

    def rows(chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.stack([chosen, rejected], dim=1).reshape(-1, 1)

    policy = rows(policy_w, policy_l)
    reference = rows(reference_w, reference_l)
    length = len(policy)
    return policy, {
        "input_ids": torch.zeros(length, 2, dtype=torch.long),
        # Of (B, S) entries the first S - 1 are read: reference_policy_logprobs[:, :-1].
        "reference_policy_logprobs": torch.cat([reference, torch.zeros_like(reference)], dim=1),
        "token_mask": torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(length, 2),
        "sample_mask": torch.ones(length, dtype=torch.float64),
    }


def pair_counts(pairs: int) -> dict[str, Tensor]:
    """Return both global counts for `pairs` pairs of answers of one token."""
    # global_valid_seqs is halved before 1e-8 is added.
    return {"global_valid_seqs": 2 * count(pairs), "global_valid_toks": count(2 * pairs)}
