# SPDX-License-Identifier: Apache-2.0
"""Losses called with logits: packed sequences one after the other, and a draft model's loss beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss.loss_functions import DraftCrossEntropyLossFn
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

#: Like `nemo_rl_ref.algorithms.loss.utils.prepare_loss_input`.
PrepareFn = Callable[..., tuple[dict[str, Any], Any]]


class SequencePackingLossWrapper:
    """Call a loss with each of the sequences that are packed into one row, and add up.

    Args:
        loss_fn: The loss.
        prepare_fn: Turns a sequence's logits into the loss's keyword arguments, such as
            `nemo_rl_ref.algorithms.loss.utils.prepare_loss_input`.
        cu_seqlens_q: Where the sequences would start without padding, and end, (B+1,).
        cu_seqlens_q_padded: Where they start in the row, (B+1,); the former if not given.
        vocab_parallel_rank: Passed to ``prepare_fn``.
        vocab_parallel_group: Passed to ``prepare_fn``.
        context_parallel_group: Passed to ``prepare_fn``.

    Example:
        Two sequences of 2 and 1 tokens in one row; only the first has a token to predict:

        >>> from nemo_rl_ref.algorithms.loss import NLLLossFn, prepare_loss_input
        >>> ids, mask = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 1], [1, 0]])
        >>> data = BatchedDataDict(input_ids=ids, token_mask=mask, sample_mask=torch.ones(2))
        >>> packed = SequencePackingLossWrapper(
        ...     NLLLossFn(), prepare_loss_input, cu_seqlens_q=torch.tensor([0, 2, 3])
        ... )
        >>> packed(torch.zeros(1, 3, 4), data, torch.tensor(2), torch.tensor(1))[0]
        tensor(1.3863)
    """

    def __init__(
        self,
        loss_fn: Any,
        prepare_fn: PrepareFn,
        cu_seqlens_q: Tensor,
        cu_seqlens_q_padded: Optional[Tensor] = None,
        vocab_parallel_rank: Optional[int] = None,
        vocab_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
        context_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
    ):
        self.loss_fn, self.prepare_fn = loss_fn, prepare_fn
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_q_padded = cu_seqlens_q_padded
        self.vocab_parallel_rank = vocab_parallel_rank
        self.vocab_parallel_group = vocab_parallel_group
        self.context_parallel_group = context_parallel_group

    def __call__(
        self,
        next_token_logits: Tensor,
        data: BatchedDataDict[Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss of a packed micro-batch.

        Args:
            next_token_logits: (1, T, V), the sequences one after the other.
            data: The sequences, not packed, (B, S).
            global_valid_seqs: See `nemo_rl_ref.algorithms.loss.interfaces.LossFunction`.
            global_valid_toks: See above.

        Returns:
            The sum of the losses and of the metrics; minima and maxima of ratios are those of the
            finite values.
        """
        lengths = self.cu_seqlens_q.diff().tolist()
        starts = self.cu_seqlens_q if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded
        bounds, metrics = starts.tolist(), {}
        total: Any = 0
        for number, length in enumerate(lengths):
            one = {
                key: value[:, :length]
                if torch.is_tensor(value) and value.ndim > 1 and value.shape[1] > 1
                else value
                for key, value in data.slice(number, number + 1).items()
            }
            loss_input, one = self.prepare_fn(
                logits=next_token_logits[:, bounds[number] : bounds[number + 1]],
                data=one,
                loss_fn=self.loss_fn,
                vocab_parallel_rank=self.vocab_parallel_rank,
                vocab_parallel_group=self.vocab_parallel_group,
                context_parallel_group=self.context_parallel_group,
            )
            loss, found = self.loss_fn(
                data=one,
                global_valid_seqs=global_valid_seqs,
                global_valid_toks=global_valid_toks,
                **loss_input,
            )
            total = total + loss
            for name, value in found.items():
                number_found = value.item() if torch.is_tensor(value) and not value.ndim else value
                metrics[name] = _joined(name, metrics.get(name), number_found)
        return total, metrics


def _joined(name: str, before: Any, value: Any) -> Any:
    """A metric with that of one more sequence."""
    for how, end, nothing in ((min, "_min", math.inf), (max, "_max", -math.inf)):
        if name in (f"probs_ratio{end}", f"probs_ratio_clamped{end}"):
            before = nothing if before is None else before
            return before if math.isinf(value) else how(before, value)
    return value if before is None else before + value


class DraftLossWrapper:
    """Add a draft model's cross-entropy to the policy's loss.

    Args:
        loss_fn: Called with logits, batch and counts, for the policy's loss and metrics.
        prepare_fn: Makes what `DraftCrossEntropyLossFn` takes.
        data_dict: The micro-batch; kept as NeMo RL does.
        loss_weight: Weight of the draft's loss.
        vocab_parallel_rank: Passed to ``prepare_fn``.
        vocab_parallel_group: Passed to ``prepare_fn``.
        context_parallel_group: Passed to ``prepare_fn``.

    Example:
        >>> from nemo_rl_ref.algorithms.loss import prepare_loss_input
        >>> mask = torch.ones(1, 2)
        >>> data = {"token_mask": mask, "sample_mask": mask[:, 0]}
        >>> data["student_logits"] = torch.zeros(1, 2, 4)
        >>> both = DraftLossWrapper(
        ...     lambda *arguments: (torch.tensor(1.0), {}), prepare_loss_input, data, loss_weight=0.5
        ... )
        >>> both(torch.zeros(1, 2, 4), data, None, torch.tensor(1))
        (tensor(1.6931), {'draft_loss': 1.3862943649291992})
    """

    def __init__(
        self,
        loss_fn: Callable[..., tuple[Tensor, dict[str, Any]]],
        prepare_fn: PrepareFn,
        data_dict: BatchedDataDict[Any],
        loss_weight: float = 1.0,
        vocab_parallel_rank: Optional[int] = None,
        vocab_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
        context_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
    ):
        self.loss_fn, self.prepare_fn = loss_fn, prepare_fn
        self.data_dict, self.loss_weight = data_dict, loss_weight
        self.vocab_parallel_rank = vocab_parallel_rank
        self.vocab_parallel_group = vocab_parallel_group
        self.context_parallel_group = context_parallel_group
        self.draft_loss_fn = DraftCrossEntropyLossFn(vocab_parallel_group=vocab_parallel_group)

    def __call__(
        self,
        next_token_logits: Tensor,
        data: BatchedDataDict[Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute both losses; the policy's metrics get ``draft_loss``.

        Raises:
            ValueError: If ``global_valid_toks`` is None.
        """
        if global_valid_toks is None:
            raise ValueError("global_valid_toks is None, expected the number of valid tokens")
        counts = (global_valid_seqs, global_valid_toks)
        loss, metrics = self.loss_fn(next_token_logits, data, *counts, **kwargs)
        loss_input, data = self.prepare_fn(
            logits=next_token_logits,
            data=data,
            loss_fn=self.draft_loss_fn,
            vocab_parallel_rank=self.vocab_parallel_rank,
            vocab_parallel_group=self.vocab_parallel_group,
            context_parallel_group=self.context_parallel_group,
        )
        draft = self.draft_loss_fn(
            data=data,
            global_valid_seqs=global_valid_seqs,
            global_valid_toks=global_valid_toks,
            **loss_input,
        )
        metrics["draft_loss"] = draft.item()
        return loss + self.loss_weight * draft, metrics


def wrap_loss_fn_with_input_preparation(
    next_token_logits: Tensor,
    data: BatchedDataDict[Any],
    global_valid_seqs: Tensor | None,
    global_valid_toks: Tensor | None,
    loss_fn: Any,
    prepare_fn: PrepareFn,
    vocab_parallel_rank: Optional[int] = None,
    vocab_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
    context_parallel_group: Optional[torch.distributed.ProcessGroup] = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Prepare a loss's input from logits, and call it.

    Args:
        next_token_logits: (B, S, V).
        data: The micro-batch.
        global_valid_seqs: See `nemo_rl_ref.algorithms.loss.interfaces.LossFunction`.
        global_valid_toks: See above.
        loss_fn: The loss.
        prepare_fn: Such as `nemo_rl_ref.algorithms.loss.utils.prepare_loss_input`.
        vocab_parallel_rank: Passed to ``prepare_fn``.
        vocab_parallel_group: Passed to ``prepare_fn``.
        context_parallel_group: Passed to ``prepare_fn``.

    Returns:
        What the loss returns.

    Example:
        >>> from nemo_rl_ref.algorithms.loss import NLLLossFn, prepare_loss_input
        >>> mask = torch.ones(1, 2)
        >>> data = {"input_ids": mask.long(), "token_mask": mask, "sample_mask": mask[:, 0]}
        >>> counts, loss_fn = (torch.tensor(1), torch.tensor(1)), NLLLossFn()
        >>> wrap_loss_fn_with_input_preparation(
        ...     torch.zeros(1, 2, 4), data, *counts, loss_fn, prepare_loss_input
        ... )[0]
        tensor(1.3863)
    """
    loss_input, data = prepare_fn(
        logits=next_token_logits,
        data=data,
        loss_fn=loss_fn,
        vocab_parallel_rank=vocab_parallel_rank,
        vocab_parallel_group=vocab_parallel_group,
        context_parallel_group=context_parallel_group,
    )
    return loss_fn(
        data=data,
        global_valid_seqs=global_valid_seqs,
        global_valid_toks=global_valid_toks,
        **loss_input,
    )
