# SPDX-License-Identifier: Apache-2.0
"""What a loss is: the protocol that trainers call, and the three enums that describe a loss.

These names are not re-exported by ``algorithms.loss``, there as here.
"""

import enum
from typing import Any, Protocol

import torch

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class LossType(enum.Enum):
    """What a loss is a mean over. The trainer scales gradients by the matching global count."""

    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    """The global count that a metric has been divided by.

    A loss may carry ``metric_normalizations: dict[str, MetricNormalizer]``. A trainer that calls
    it with counts of 1 uses the table to divide each metric later. A metric that is not in the
    table counts as divided by what belongs to the loss's `LossType`.
    """

    TOKENS = "tokens"  # divided by global_valid_toks
    SEQUENCES = "sequences"  # divided by global_valid_seqs
    NONE = "none"  # not divided: counts, means over a micro-batch, minima and maxima


class LossInputType(enum.Enum):
    """What the model output is turned into before the loss sees it."""

    LOGIT = "logit"
    LOGPROB = "logprob"
    DISTILLATION = "distillation"
    DISTILLATION_CROSS_TOKENIZER = "distillation_cross_tokenizer"
    DRAFT = "draft"


class LossFunction(Protocol):
    """A callable that maps a micro-batch to a scalar loss and metrics.

    Attributes:
        loss_type: whether the loss is a mean over tokens or over sequences.
        input_type: which keyword arguments the trainer passes, see `__call__`.
    """

    loss_type: LossType
    input_type: LossInputType

    def __call__(
        self,
        data: BatchedDataDict,
        global_valid_seqs: torch.Tensor,
        global_valid_toks: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the micro-batch's share of the loss over the global batch.

        A loss divides by the global counts, not by its own, so that the losses, gradients and
        metrics of all micro-batches sum to those of the global batch.

        Args:
            data: the micro-batch: masks and whatever else the loss needs, a `BatchedDataDict`
                or a plain dict. Tensors in it are (B, ...).
            global_valid_seqs: number of sequences with ``sample_mask`` 1 in the global batch,
                over all micro-batches and ranks; scalar.
            global_valid_toks: number of unmasked tokens in the global batch; scalar.
            **kwargs: the model's output, by `input_type`:

                - LOGPROB: ``next_token_logprobs`` (B, S-1), nats. Entry t is the log-probability
                  of token t+1 given the tokens up to t.
                - LOGIT: ``logits`` (B, ...).
                - DISTILLATION: ``student_topk_logprobs``, ``teacher_topk_logprobs``, ``H_all``.
                - DISTILLATION_CROSS_TOKENIZER: ``logits``, ``teacher_full_logits_by_idx``.
                - DRAFT: ``teacher_logits``, ``student_logits``, ``mask``.

        Returns:
            The scalar loss to minimize, and metrics by name.
        """
        ...
