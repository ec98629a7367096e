# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood."""

from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss._checks import check_token_batch
from nemo_rl_ref.algorithms.loss.interfaces import (
    LossFunction,
    LossInputType,
    LossType,
    MetricNormalizer,
)
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class NLLLossFn(LossFunction):
    r"""Negative log-likelihood of the unmasked tokens: the loss of supervised fine-tuning.

    .. math:: L(θ) = -\frac{1}{N} \sum_{b,t} m_{b,t} \log π_θ(x_{b,t} \mid x_{b,<t})

    with m the token mask times the sample mask and N the number of unmasked tokens in the global
    batch, ``global_valid_toks``.

    Args:
        use_fused_linear_logprobs: kept on the instance and not used by the loss, which computes
            the same numbers either way. NeMo RL's trainer reads it there to learn that the model
            has returned log-probabilities instead of logits (its Megatron backend can compute
            them without holding the logits).

    Attributes:
        metric_normalizations: what each metric has been divided by.

    Example:
        Column 0 of the mask belongs to no log-probability:

        >>> logprobs = torch.tensor([[-1.0, -2.0, -6.0]])
        >>> data = {"token_mask": torch.tensor([[1, 1, 1, 0]]), "sample_mask": torch.ones(1)}
        >>> loss, metrics = NLLLossFn()(logprobs, data, None, global_valid_toks=torch.tensor(2))
        >>> loss
        tensor(1.5000)
        >>> metrics
        {'loss': 1.5, 'num_unmasked_tokens': 2.0, 'num_valid_samples': 1.0}
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, use_fused_linear_logprobs: bool = False):
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.metric_normalizations = {
            "loss": MetricNormalizer.TOKENS,
            "num_unmasked_tokens": MetricNormalizer.NONE,
            "num_valid_samples": MetricNormalizer.NONE,
        }

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[Any] | dict[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor,
        dpo_loss: bool = False,
        dpo_average_log_probs: bool = False,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch.

        A NaN or infinite log-probability makes the loss NaN even where the mask is 0.

        Args:
            next_token_logprobs: (B, S-1) floating, nats; entry t belongs to token t+1.
            data: ``token_mask`` (B, S), of which column 0 is not used, and ``sample_mask`` (B,).
            global_valid_seqs: not used.
            global_valid_toks: number of unmasked tokens in the global batch, scalar. Not used
                with `dpo_loss`.
            dpo_loss: return one loss a row, undivided; DPO adds it as its SFT term.
            dpo_average_log_probs: with `dpo_loss`, divide each row by its unmasked tokens.

        Returns:
            The loss, scalar or, with `dpo_loss`, (B,), and the metrics ``loss`` (a float, or with
            `dpo_loss` the tensor), ``num_unmasked_tokens`` and ``num_valid_samples``.

        Raises:
            KeyError: if a key is missing in `data`.
            TypeError: if `next_token_logprobs` is not floating.
            ValueError: if a shape does not fit, or `global_valid_toks` is None where it is used.
        """
        check_token_batch("NLLLossFn", next_token_logprobs, data, ("token_mask",))
        sample_mask = data["sample_mask"]
        # The log-probability at t belongs to token t+1, and so do the masks.
        mask = data["token_mask"][:, 1:] * sample_mask.unsqueeze(-1)

        if dpo_loss:
            loss = -(next_token_logprobs * mask).sum(-1)
            if dpo_average_log_probs:
                loss = loss / mask.sum(-1).clamp(min=1)
        else:
            if global_valid_toks is None:
                raise ValueError(
                    "global_valid_toks is None, expected the number of unmasked tokens "
                    "in the global batch"
                )
            loss = -masked_mean(
                next_token_logprobs, mask, global_normalization_factor=global_valid_toks
            )

        return loss, {
            "loss": loss if dpo_loss else loss.item(),
            "num_unmasked_tokens": mask.sum().item(),
            "num_valid_samples": sample_mask.sum().item(),
        }
