# SPDX-License-Identifier: Apache-2.0
"""The operator of the clipped policy gradient's CUDA kernels, with its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss.interfaces import LossType
from nemo_rl_ref.kernels import clipped_pg as kernels

if TYPE_CHECKING:
    from nemo_rl_ref.algorithms.loss._clipped_pg_terms import Settings


def flags_and_numbers(settings: Settings) -> tuple[int, list[float]]:
    """Return the settings as the kernels take them."""
    kind = settings.truncated_importance_sampling_type
    by_response = settings.sequence_level_importance_ratios
    beta, mu = settings.reference_policy_kl_penalty, settings.positive_example_nll_weight
    ratio = "token"
    if settings.force_on_policy_ratio:
        ratio = "ratio is one"
    elif settings.disable_ppo_ratio:
        ratio = "ratio is log-probability"
    elif by_response:
        ratio = "ratio of response"
    on = {
        ratio: ratio != "token",
        "cispo": settings.use_cispo,
        "dual clip": settings.ratio_clip_c is not None,
        "kl": beta != 0,
        "k1": settings.reference_policy_kl_type == "k1",
        "k2": settings.reference_policy_kl_type == "k2",
        "kl input clamp": settings.kl_input_clamp_value is not None,
        "kl output clamp": settings.kl_output_clamp_value is not None,
        "kl weighted": settings.use_on_policy_kl_approximation,
        "correction": settings.use_importance_sampling_correction,
        "weight of response": by_response,
        "clamp weights": kind == "tis",
        "zero weights": kind == "icepop",
        "zero responses": kind == "seq-mask-tis",
        "mean of responses": settings.loss_type is LossType.SEQUENCE_LEVEL,
        "positive nll": mu > 0,
    }
    numbers = [
        1.0 - settings.ratio_clip_min,
        1.0 + settings.ratio_clip_max,
        settings.ratio_clip_c,
        settings.kl_input_clamp_value,
        settings.kl_output_clamp_value,
        settings.truncated_importance_sampling_ratio_min,
        settings.truncated_importance_sampling_ratio,
        beta,
        mu,
    ]
    flags = sum(kernels.FLAGS[name] for name, wanted in on.items() if wanted)
    return flags, [0.0 if number is None else float(number) for number in numbers]


def run_op(
    settings: Settings,
    given: tuple[Any, ...],
    counts: tuple[Tensor | float | None, Tensor | float | None],
) -> Tensor:
    """Bring the arguments into the form that the kernels take, and run the operator."""
    *tensors, mask, sample_mask, rewards = given
    device = tensors[0].device
    flags, numbers = flags_and_numbers(settings)
    if rewards is None:
        flags &= ~kernels.FLAGS["positive nll"]
    dtype = torch.float32
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        dtype = torch.float64
    tensors = [None if x is None else x.to(dtype) for x in tensors]
    if mask.dtype not in kernels.MASK_DTYPES:
        mask = mask.to(dtype)

    def scalar(count: Tensor | float | None) -> Tensor | None:
        if count is None:
            return None
        if not isinstance(count, Tensor):  # filled on the device: to copy it would be to wait
            return torch.full((), count, dtype=torch.float64, device=device)
        count = count.to(device)
        return count if count.dtype in kernels.NUMBER_DTYPES else count.double()

    of_rows = (
        None if x is None else x if x.dtype in kernels.NUMBER_DTYPES else x.double()
        for x in (sample_mask, rewards)
    )
    return _op(*tensors, mask, *of_rows, *map(scalar, counts), flags, numbers)[0]


@torch.library.custom_op("nemo_rl_ref::clipped_pg_terms", mutates_args=())
def _op(
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    tensors = kernels.Tensors(
        *(logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask),
        *(rewards, valid_seqs, valid_toks),
    )
    return kernels.forward(tensors, flags, numbers)


@torch.library.custom_op("nemo_rl_ref::clipped_pg_grad", mutates_args=())
def _grad_op(
    grad_terms: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    tensors = kernels.Tensors(
        *(logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask),
        *(rewards, valid_seqs, valid_toks),
    )
    return kernels.backward(grad_terms, kept, tensors, flags, numbers)


@_op.register_fake
def _(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kept = logprobs.new_empty(kernels.kept_size(logprobs.shape[0]), dtype=torch.float64)
    return logprobs.new_empty(kernels.NUMBER_OF_TERMS), kept


@_grad_op.register_fake
def _(
    grad_terms: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(
        (0,) if unfiltered is None else logprobs.shape
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.flags, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_terms: Tensor, grad_kept: Tensor) -> tuple[Any, ...]:
    kept, *tensors = ctx.saved_tensors
    grad, grad_unfiltered = _grad_op(
        grad_terms.contiguous(), kept, *tensors, ctx.flags, ctx.numbers
    )
    return grad, *[None] * 4, None if tensors[5] is None else grad_unfiltered, *[None] * 7


_op.register_autograd(_backward, setup_context=_setup_context)
