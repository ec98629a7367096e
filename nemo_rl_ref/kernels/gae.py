# SPDX-License-Identifier: Apache-2.0
"""The launch of the kernel of ``gae.cu``: a recurrence over time from right to left."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl_ref.kernels import loader

_TYPES = {torch.float32: "float", torch.float64: "double"}
#: The dtypes of a mask that the kernel takes, and what they are there.
MASK_DTYPES = {
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long long",
}

# A thread has 16 tokens of a tile, and a block at most 128 threads: as in gae.cu.
_TOKENS_OF_THREAD, _MOST_THREADS = 16, 128


def forward(
    rewards: Tensor, values: Tensor, mask: Tensor, lambdas: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel: advantages and returns of every row.

    Args:
        rewards: (B, S) with S > 0, float32 or float64.
        values: (B, S), of the same dtype.
        mask: (B, S), of one of `MASK_DTYPES`, not 0 on the tokens that count.
        lambdas: λ of each row, (B,) float64, or None for `lam`.
        gamma: γ.
        lam: λ; not read with `lambdas`.

    Returns:
        Two of (B, S), in the dtype of `values`.
    """
    rewards, values, mask = (
        x if x.stride(1) == 1 else x.contiguous() for x in (rewards, values, mask)
    )
    rows, steps = values.shape
    advantages, returns = (
        torch.empty((rows, steps), dtype=values.dtype, device=values.device) for _ in range(2)
    )
    threads = min(max(32, -(-steps // (32 * _TOKENS_OF_THREAD)) * 32), _MOST_THREADS)
    arguments = [
        *(rewards, values, mask, None if lambdas is None else lambdas.contiguous()),
        *(advantages, returns, steps, rewards.stride(0), values.stride(0), mask.stride(0)),
        *(gamma, lam),
    ]
    expression = f"gae<{_TYPES[values.dtype]}, {MASK_DTYPES[mask.dtype]}>"
    loader.launch("gae", expression, rows, threads, arguments, values.device)
    return advantages, returns
