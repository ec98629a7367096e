# SPDX-License-Identifier: Apache-2.0
"""Generalised advantage estimation: plain PyTorch, or the kernel of ``gae.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_rl_ref.algorithms._recurrence import discounted_suffix_sums, masked_gae
from nemo_rl_ref.kernels import loader
from nemo_rl_ref.kernels.backend import use_kernels

_TYPES = {torch.float32: "float", torch.float64: "double"}
_MASKS = {
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long long",
}

# A thread has 16 tokens of a tile, and a block at most 128 threads: as in gae.cu.
_TOKENS_OF_THREAD, _MOST_THREADS = 16, 128


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation over the unmasked tokens of every row.

    .. math::
        δ_t = r_t + γ V_{t'} - V_t, \qquad A_t = δ_t + γ λ A_{t'}, \qquad R_t = A_t + V_t

    with t' the next *unmasked* token; after the last one V and A are 0. Masked tokens are passed
    over: what stands there, be it NaN, reaches no unmasked token.

    The recurrence is affine in what comes from the right, so it is solved by joining neighbours
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
            mask if mask.dtype in _MASKS else mask != 0,
            lam.detach().to(values.device, torch.float64) if per_row else None,
            float(gamma),
            0.0 if per_row else float(lam),
            True,
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


@torch.library.custom_op("nemo_rl_ref::gae", mutates_args=())
def _op(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lambdas: Tensor | None,
    gamma: float,
    lam: float,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    if kernels:
        return run_kernel(rewards, values, mask, lambdas, gamma, lam)
    advantages = masked_gae(rewards, values, mask, gamma, lam if lambdas is None else lambdas)
    return advantages, advantages + values


@_op.register_fake
def _(rewards: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, mask, lambdas, ctx.gamma, ctx.lam, _ = inputs
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
    return to_rewards.to(dtype), to_values.to(dtype), *[None] * 5


_op.register_autograd(_backward, setup_context=_setup_context)


def run_kernel(
    rewards: Tensor, values: Tensor, mask: Tensor, lambdas: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Run ``gae.cu`` on rewards and values of one dtype, float32 or float64, (B, S) with S > 0."""
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
    expression = f"gae<{_TYPES[values.dtype]}, {_MASKS[mask.dtype]}>"
    loader.launch("gae", expression, rows, threads, arguments, values.device)
    return advantages, returns
