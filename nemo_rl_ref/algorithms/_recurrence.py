# SPDX-License-Identifier: Apache-2.0
"""The recurrence of generalized advantage estimation, for all time steps at once.

`gae` is plain PyTorch, or the kernel of ``kernels/gae.cu``, an operator with its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_rl_ref.kernels import gae as kernel
from nemo_rl_ref.kernels.backend import use_kernels


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Estimate advantages and returns over the unmasked tokens of every row.

    .. math::
        δ_t = r_t + γ V_{t'} - V_t, \qquad A_t = δ_t + γ λ A_{t'}, \qquad R_t = A_t + V_t

    with t' the next *unmasked* token; after the last one V and A are 0. Masked tokens are passed
    over: what stands there, be it NaN, reaches no unmasked token.

    The recurrence is affine in what comes from the right, so it is solved by joining neighbors
    instead of a loop over time: in plain PyTorch in log2(S) rounds, on CUDA in one kernel that
    reads and writes everything once and sums in float64. Rewards and values have gradients; that
    of the kernel's is computed in plain PyTorch.

    Source: Schulman et al. (2016), https://arxiv.org/abs/1506.02438, Eq. 16.

    Args:
        rewards: (B, S) floating, one a token.
        values: (B, S) floating, V, in units of reward.
        mask: (B, S), not 0 on the tokens that count.
        gamma: γ.
        lam: λ, a number or one a row, (B,) floating, without a gradient.
        backend: "cuda", "torch", or None for what `NEMO_RL_REF_BACKEND` says, else by device.

    Returns:
        Advantages and returns, each (B, S), in the wider dtype of `rewards` and `values`. At a
        masked token the advantage is that of the next unmasked one, 0 after the last, and the
        return is its own value plus that.

    Raises:
        TypeError: if `rewards` or `values` is not floating.
        ValueError: if a shape does not fit, or the backend is unknown or not to be had.
    """
    _check(rewards, values, mask, lam)
    if use_kernels(backend, values.device) and values.numel():
        dtype = torch.promote_types(rewards.dtype, values.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        per_row = isinstance(lam, Tensor)
        advantages, returns = _op(
            rewards.to(wide),
            values.to(wide),
            mask if mask.dtype in kernel.MASK_DTYPES else mask != 0,
            lam.detach().to(values.device, torch.float64) if per_row else None,
            float(gamma),
            0.0 if per_row else float(lam),
        )
        return advantages.to(dtype), returns.to(dtype)
    advantages = masked_gae(rewards, values, mask, gamma, lam)
    return advantages, advantages + values


def _check(rewards: Tensor, values: Tensor, mask: Tensor, lam: float | Tensor) -> None:
    for name, tensor in (("rewards", rewards), ("values", values)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if values.ndim != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}, expected (B, S)")
    for name, tensor in (("rewards", rewards), ("mask", mask)):
        if tensor.shape != values.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of values, "
                f"{tuple(values.shape)}"
            )
    if isinstance(lam, Tensor) and lam.shape != values.shape[:1]:
        raise ValueError(
            f"lam has shape {tuple(lam.shape)}, expected (B,) = {tuple(values.shape[:1])}"
        )


def masked_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Compute the advantages of `gae`, in plain PyTorch.

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
    r"""Solve y_t = x_t + c y_{t+1} for all t at once: y_t is the sum over l of c^l x_{t+l}.

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


@torch.library.custom_op("nemo_rl_ref::gae", mutates_args=())
def _op(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lambdas: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return kernel.forward(rewards, values, mask, lambdas, gamma, lam)


@_op.register_fake
def _(rewards: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, mask, lambdas, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(mask, lambdas)


def _backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple[Any, ...]:
    """The same recurrence from left to right: what a token's reward and value have reached."""
    mask, lambdas = ctx.saved_tensors
    gamma, wide = ctx.gamma, torch.float64
    lam = torch.full((1, 1), ctx.lam, dtype=wide, device=mask.device)
    if lambdas is not None:
        lam = lambdas.reshape(-1, 1)
    valid = mask != 0
    steps = valid.shape[1]
    tokens_from_here = valid.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    place = (steps - tokens_from_here).long()  # as in masked_gae
    arriving = torch.zeros(len(valid), steps + 1, dtype=wide, device=mask.device)
    arriving = arriving.scatter_add(1, place, (grad_advantages + grad_returns).to(wide))
    sums = discounted_suffix_sums(arriving[:, :steps].flip(1), gamma * lam).flip(1)
    before = pad(sums, (1, 0)).gather(1, place)
    here, own = pad(sums, (0, 1)).gather(1, place), arriving.gather(1, place)
    to_rewards = torch.where(valid, here, 0.0)
    to_values = torch.where(valid, gamma * (1 - lam) * before - own, 0.0) + grad_returns
    dtype = grad_returns.dtype
    return to_rewards.to(dtype), to_values.to(dtype), *[None] * 4


_op.register_autograd(_backward, setup_context=_setup_context)
