# SPDX-License-Identifier: Apache-2.0
"""What a loss gets to see, made from a model's logits, in one process."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.logits_sampling_utils import (
    TrainingSamplingParams,
    apply_top_k_top_p,
    need_top_k_or_top_p_filtering,
)
from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType
from nemo_rl_ref.algorithms.utils import mask_out_neg_inf_logprobs
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.logprobs import token_logprobs


def prepare_loss_input(
    logits: Tensor,
    data: BatchedDataDict[Any],
    loss_fn: LossFunction,
    vocab_parallel_rank: Optional[int] = None,
    vocab_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
    context_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
    sampling_params: Optional[TrainingSamplingParams] = None,
    d2t: Optional[Tensor] = None,
    chunk_size: Optional[int] = None,
) -> tuple[dict[str, Any], BatchedDataDict[Any]]:
    """Turn a model's logits into the keyword arguments that a loss takes, by its ``input_type``.

    Args:
        logits: (B, S, V), already divided by the temperature. Entry t is about token t + 1.
        data: The micro-batch. With top-k or top-p, and a loss with a KL penalty, it gets
            ``curr_logprobs_unfiltered`` (B, S-1).
        loss_fn: The loss; of ``input_type`` ``LOGIT``, ``LOGPROB``, ``DISTILLATION`` or ``DRAFT``.
        vocab_parallel_rank: Must be None, as the groups: one process has the whole vocabulary.
        vocab_parallel_group: See above.
        context_parallel_group: See above.
        sampling_params: Top-k and top-p that the tokens were sampled with.
        d2t: For ``DRAFT``: what is added to a token's number in the draft's vocabulary to get its
            number in the teacher's, (V_draft,).
        chunk_size: Changes no number, and has no effect here.

    Returns:
        The keyword arguments, and the micro-batch.

    Raises:
        NotImplementedError: If a group is given, or the loss compares models with other tokens.
        ValueError: If the teacher's k is 0.

    Example:
        >>> from nemo_rl_ref.algorithms.loss import NLLLossFn
        >>> data = {"input_ids": torch.tensor([[0, 1]])}
        >>> prepare_loss_input(torch.zeros(1, 2, 4), data, NLLLossFn())[0]
        {'next_token_logprobs': tensor([[-1.3863]])}
    """
    if vocab_parallel_group is not None or context_parallel_group is not None:
        raise NotImplementedError("vocab_parallel_group, context_parallel_group: one process only")
    kind = loss_fn.input_type
    if kind is LossInputType.LOGIT:
        return {"logits": logits}, data
    if kind is LossInputType.LOGPROB:
        return _logprobs(logits, data, loss_fn, sampling_params), data
    if kind is LossInputType.DISTILLATION:
        return _top_k_logprobs(logits, data, loss_fn), data
    if kind is LossInputType.DRAFT:
        return _draft(logits, data, d2t), data
    raise NotImplementedError(f"loss_fn: input_type {kind} is left out")


def _logprobs(
    logits: Tensor, data: Any, loss_fn: Any, sampling_params: Optional[TrainingSamplingParams]
) -> dict[str, Tensor]:
    ids = data["input_ids"]
    if getattr(loss_fn, "use_fused_linear_logprobs", False):  # they are log-probabilities already
        return {"next_token_logprobs": logits.float()[:, : ids.shape[1] - 1]}
    logits = logits[:, : ids.shape[1] - 1]  # a packed sequence's logits have padding
    if sampling_params is None or not need_top_k_or_top_p_filtering(sampling_params):
        return {"next_token_logprobs": _of_next(logits, ids)}
    top_k, top_p = sampling_params.top_k, sampling_params.top_p
    filtered, _ = apply_top_k_top_p(logits.float(), top_k, top_p)
    logprobs = _of_next(filtered, ids)
    mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    logprobs = mask_out_neg_inf_logprobs(logprobs, mask[:, 1:], "curr_logprobs")
    if getattr(loss_fn, "reference_policy_kl_penalty", 0):
        data["curr_logprobs_unfiltered"] = _of_next(logits, ids)
    return {"next_token_logprobs": logprobs}


def _of_next(logits: Tensor, ids: Tensor) -> Any:
    """Log-probability of the token after each, (B, S-1), from logits (B, S-1, V)."""
    return token_logprobs(logits, ids[:, 1:])


def _top_k_logprobs(logits: Tensor, data: Any, loss_fn: Any) -> dict[str, Optional[Tensor]]:
    """Student and teacher on the teacher's k tokens, (B, S-1, k), and the student's -entropy."""
    indices = data["teacher_topk_indices"].to(logits.device)
    if not indices.shape[-1]:
        raise ValueError("topk must be positive: data['teacher_topk_indices'] has no tokens")
    logits, entropy = logits.float(), None
    if loss_fn.zero_outside_topk:
        whole = logits.log_softmax(-1)
        student = whole.gather(-1, indices)
        if loss_fn.kl_type != "forward":
            entropy = (whole.exp() * whole).sum(-1)[:, :-1]
    else:
        student = logits.gather(-1, indices).log_softmax(-1)
    teacher = data["teacher_topk_logits"].to(logits.device, torch.float32).log_softmax(-1)
    return {
        "student_topk_logprobs": student[:, :-1],
        "teacher_topk_logprobs": teacher[:, :-1],
        "H_all": entropy,
    }


def _draft(logits: Tensor, data: Any, d2t: Optional[Tensor]) -> dict[str, Tensor]:
    """Teacher and mask one column to the left, as the draft predicts one token further."""
    teacher, mask = (_from_next(values) for values in (logits.detach(), data["token_mask"]))
    if d2t is not None:
        teacher = teacher[:, :, torch.arange(len(d2t), device=d2t.device) + d2t]
    return {
        "teacher_logits": teacher, "student_logits": data["student_logits"], "token_mask": mask,
    }  # fmt: skip


def _from_next(values: Tensor) -> Tensor:
    """Each column from the one after it; 0 in the last."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
