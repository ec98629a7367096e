# SPDX-License-Identifier: Apache-2.0
"""The recurrence of generalised advantage estimation, for all time steps at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def masked_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """The advantages of `nemo_rl_ref.kernels.gae`.

    Args:
        rewards: (B, S), one a token.
        values: (B, S).
        mask: (B, S), 0 and 1.
        gamma: γ.
        lam: λ, a number or one a row, (B,).

    Returns:
        (B, S). At a masked token, the advantage of the next unmasked one, 0 after the last.
    """
    valid = mask.bool()
    steps = valid.shape[1]
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    wide = torch.promote_types(dtype, torch.float32)

    # The unmasked tokens of a row, pushed to the right end of it, so that the next unmasked token
    # is the next column. After them one column of zeros, and one that takes the masked tokens and
    # is not read. `place` is where a token goes, for a masked one where the next unmasked goes.
    tokens_from_here = valid.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    place = (steps - tokens_from_here).long()
    to = torch.where(valid, place, steps + 1)
    empty = torch.zeros(len(valid), steps + 2, dtype=wide, device=values.device)
    r = empty.scatter(1, to, rewards.to(wide))[:, :steps]
    v = empty.scatter(1, to, values.to(wide))
    v, next_v = v[:, :steps], v[:, 1 : steps + 1]

    # A + V has the recurrence y_t = r_t + γ (1 - λ) V_t' + γ λ y_t', with fewer terms that cancel.
    lam = torch.as_tensor(lam, dtype=torch.float64, device=values.device).reshape(-1, 1)
    rest = (gamma * (1 - lam)).to(wide)
    advantages = discounted_suffix_sums(r + rest * next_v, gamma * lam) - v
    return pad(advantages, (0, 1)).gather(1, place).to(dtype)


def discounted_suffix_sums(x: Tensor, decay: Tensor) -> Tensor:
    r"""Solves y_t = x_t + c y_{t+1} for all t at once: y_t is the sum over l of c^l x_{t+l}.

    After the round with span n, y_t holds the first 2n terms: the n it had, and the n of y_{t+n}
    times c^n. So log2(S) rounds are enough. Rounding errors grow with the number of rounds, not
    of steps: near c = 1 it is at least as accurate as the loop.

    Args:
        x: (B, S) floating.
        decay: c, (B, 1) or (1, 1), float64, so that its powers are right.

    Returns:
        y, (B, S).
    """
    span = 1
    while span < x.shape[1]:
        longer = x.clone()
        longer[:, :-span].addcmul_(x[:, span:], (decay**span).to(x.dtype))
        x, span = longer, 2 * span
    return x
