# SPDX-License-Identifier: Apache-2.0
"""Losses over pairs of a chosen and a rejected response."""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss._checks import (
    check_floating,
    check_pairs,
    check_sample_mask,
    check_token_batch,
)
from nemo_rl_ref.algorithms.loss._nll import NLLLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class PreferenceLossDataDict(TypedDict):
    """Keys of a reward-model batch. The loss itself reads ``sample_mask`` only."""

    input_ids: torch.Tensor
    token_mask: torch.Tensor
    sample_mask: torch.Tensor


class PreferenceLossFn(LossFunction):
    r"""Bradley-Terry loss on scalar rewards: the loss of reward-model training.

    .. math:: L(θ) = -\frac{1}{P} \sum_i m_i \log σ\big(r_θ(x_i, y_i^w) - r_θ(x_i, y_i^l)\big)

    with m the sample mask and P the number of valid pairs in the global batch,
    ``global_valid_seqs / 2``. Rows alternate: even rows are chosen, odd rows the rejected
    responses of the same pairs. The two rows of a pair should have the same ``sample_mask``: the
    loss and the accuracy use that of the chosen row, ``rewards_rejected_mean`` that of the
    rejected row.

    Source: Rafailov et al. (2023), https://arxiv.org/abs/2305.18290, Eq. 2.

    Example:
        Rewards of a chosen and a rejected response:

        >>> data = {"sample_mask": torch.ones(2)}
        >>> loss, metrics = PreferenceLossFn()(
        ...     torch.tensor([2.0, 1.0]), data, torch.tensor(2), None
        ... )
        >>> loss
        tensor(0.3133)
        >>> metrics["accuracy"]
        1.0
    """

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGIT

    def split_output_tensor(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Splits rows (2P, ...) into chosen (P, ...) and rejected (P, ...), both views."""
        return tensor[::2], tensor[1::2]

    def _preference_loss(
        self,
        rewards: Tensor,
        sample_mask: Tensor,
        global_valid_seqs: Tensor,
        beta: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns loss, accuracy, mean chosen and mean rejected reward, each a scalar.

        `rewards` and `sample_mask` are (2P,). `beta` scales the reward difference inside the
        sigmoid; the two mean rewards are not scaled by it.
        """
        chosen, rejected = self.split_output_tensor(rewards)
        chosen_mask, rejected_mask = sample_mask[::2], sample_mask[1::2]
        pairs = global_valid_seqs / 2

        # logsigmoid(x) is log(sigmoid(x)) that does not underflow for very negative x.
        # The mask comes in here and in masked_mean: weights are squared, 0 and 1 stay the same.
        loss = -logsigmoid(beta * (chosen - rejected)) * chosen_mask
        return (
            masked_mean(loss, chosen_mask, global_normalization_factor=pairs),
            masked_mean(chosen > rejected, chosen_mask, global_normalization_factor=pairs),
            masked_mean(chosen, chosen_mask, global_normalization_factor=pairs),
            masked_mean(rejected, rejected_mask, global_normalization_factor=pairs),
        )

    def __call__(
        self,
        logits: Tensor,
        data: BatchedDataDict[PreferenceLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch of P pairs.

        Args:
            logits: the rewards, (2P, 1) or (2P,), floating.
            data: ``sample_mask`` (2P,).
            global_valid_seqs: number of valid sequences in the global batch, two a pair; scalar.
            global_valid_toks: not used.

        Returns:
            The scalar loss and the metrics ``loss``, ``accuracy`` (share of pairs with the larger
            reward on the chosen response; a tie counts as wrong), ``rewards_chosen_mean``,
            ``rewards_rejected_mean`` and ``num_valid_samples`` (pairs). All but the last are
            shares of global means: over the micro-batches they sum.

        Raises:
            KeyError: if ``sample_mask`` is missing in `data`.
            TypeError: if `logits` is not floating.
            ValueError: if a shape does not fit or the number of rows is odd.
        """
        check_floating("logits", logits)
        if logits.ndim == 0 or logits.shape[1:] not in ((), (1,)):
            raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, 1) or (B,)")
        check_pairs("logits", logits, global_valid_seqs)
        check_sample_mask("PreferenceLossFn", data, len(logits))

        sample_mask = data["sample_mask"]
        loss, accuracy, chosen_mean, rejected_mean = self._preference_loss(
            logits.squeeze(-1), sample_mask, global_valid_seqs
        )
        return loss, {
            "loss": loss.item(),
            "accuracy": accuracy.item(),
            "rewards_chosen_mean": chosen_mean.item(),
            "rewards_rejected_mean": rejected_mean.item(),
            "num_valid_samples": (sample_mask.sum() / 2).item(),
        }


class DPOLossConfig(BaseModel, extra="allow"):
    """Configuration of `DPOLossFn`.

    Unknown fields are accepted, as in NeMo RL, where the same object carries the settings of the
    whole run. A misspelt field is therefore accepted too, and has no effect.
    """

    #: How strongly the policy is held to the reference, β. Multiplies the log-ratios.
    reference_policy_kl_penalty: float = 0.05
    #: Weight of the preference term.
    preference_loss_weight: float = 1.0
    #: Weight of the SFT term on the chosen responses. 0 leaves it out.
    sft_loss_weight: float = 0.0
    #: Use the mean log-ratio over a response's tokens instead of the sum.
    preference_average_log_probs: bool = False
    #: Use the mean log-probability over a response's tokens in the SFT term instead of the sum.
    sft_average_log_probs: bool = False


class DPOLossDataDict(TypedDict):
    """Keys of a DPO batch. The loss does not read ``input_ids``."""

    input_ids: torch.Tensor
    reference_policy_logprobs: torch.Tensor
    token_mask: torch.Tensor
    sample_mask: torch.Tensor


class DPOLossFn(PreferenceLossFn):
    r"""Direct preference optimization.

    .. math::
        L(θ) &= w_p L_p(θ) + w_s L_s(θ) \\
        L_p(θ) &= -\frac{1}{P} \sum_i m_i \log σ\big(β (r_θ(x_i, y_i^w) - r_θ(x_i, y_i^l))\big) \\
        L_s(θ) &= -\frac{1}{P} \sum_i m_i \sum_t \log π_θ(y^w_{i,t} \mid x_i, y^w_{i,<t}) \\
        r_θ(x, y) &= \sum_t \log \frac{π_θ(y_t \mid x, y_{<t})}{π_{ref}(y_t \mid x, y_{<t})}

    with P the number of valid pairs in the global batch, ``global_valid_seqs / 2``. Both sums over
    t can be made means over the response's tokens. The gradient of a pair's term in L_p is
    weighted by β σ(-β (r^w - r^l)): pairs that are already right get the small weight.

    Source: Rafailov et al. (2023), https://arxiv.org/abs/2305.18290, Eq. 7 for L_p; Pang et al.
    (2024), https://arxiv.org/abs/2404.19733, Section 2 for adding L_s.

    Args:
        cfg: the weights and switches.
        use_fused_linear_logprobs: kept on the instance, see `NLLLossFn`; changes no number.

    Example:
        One pair of one-token responses, whose log-ratios to the reference are 1 and -1:

        >>> logprobs = torch.tensor([[-1.0], [-3.0]])
        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.5))
        >>> loss, metrics = loss_fn(logprobs, data, torch.tensor(2), None)
        >>> loss, metrics["rewards_chosen_mean"], metrics["rewards_rejected_mean"]
        (tensor(0.3133), 1.0, -1.0)
    """

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        if isinstance(cfg, Mapping):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}, expected a DPOLossConfig: DPOLossConfig(**cfg)"
            )
        self.reference_policy_kl_penalty = cfg.reference_policy_kl_penalty
        self.preference_loss_weight = cfg.preference_loss_weight
        self.sft_loss_weight = cfg.sft_loss_weight
        self.preference_average_log_probs = cfg.preference_average_log_probs
        self.sft_average_log_probs = cfg.sft_average_log_probs
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.sft_loss = NLLLossFn(use_fused_linear_logprobs=use_fused_linear_logprobs)

    def _dpo_loss(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns preference loss, accuracy, mean chosen and mean rejected log-ratio."""
        token_mask = data["token_mask"][:, 1:]
        # Entry t is stored where token t+1 is predicted, so the last column is dropped, not the
        # first: unlike the masks, and unlike the policy-gradient losses.
        reference_logprobs = data["reference_policy_logprobs"][:, :-1]

        log_ratios = ((next_token_logprobs - reference_logprobs) * token_mask).sum(-1)
        if self.preference_average_log_probs:
            log_ratios = log_ratios / token_mask.sum(-1).clamp(min=1)

        return self._preference_loss(
            log_ratios, data["sample_mask"], global_valid_seqs, self.reference_policy_kl_penalty
        )

    def __call__(  # type: ignore[override]
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch of P pairs, rows alternating chosen and rejected.

        A NaN or infinite log-probability makes the loss NaN even where a mask is 0: fill the
        log-probabilities of padding with finite numbers.

        Args:
            next_token_logprobs: policy, (2P, S-1) floating, nats; entry t belongs to token t+1.
            data: ``token_mask`` (2P, S), 1 on response tokens, column 0 not used;
                ``sample_mask`` (2P,), equal within a pair, 0 for rows that only fill the batch;
                ``reference_policy_logprobs`` (2P, S) floating, nats, whose entry t belongs to
                token t+1 as in `next_token_logprobs`, last column not used.
            global_valid_seqs: number of valid sequences in the global batch, two a pair; scalar.
            global_valid_toks: number of unmasked tokens in the global batch, scalar. It must be
                given where the SFT term is on, as in NeMo RL, and its value is not used.

        Returns:
            The scalar loss and the metrics ``loss``, ``sft_loss`` and ``preference_loss``
            (unweighted), ``accuracy`` (share of pairs with the larger log-ratio on the chosen
            response), ``rewards_chosen_mean`` and ``rewards_rejected_mean`` (log-ratios in nats,
            *not* multiplied by β), ``num_valid_samples`` (pairs). All but the last are shares of
            global means: over the micro-batches they sum. Before the first step the policy is its
            reference and every pair a tie: ``accuracy`` is then rounding noise, anything from 0
            to about 0.5, and changes with the size of the micro-batches, as in NeMo RL.

        Raises:
            KeyError: if a key is missing in `data`.
            TypeError: if log-probabilities are not floating.
            ValueError: if a shape does not fit, the number of rows is odd, or a count is None.
        """
        check_token_batch(
            "DPOLossFn", next_token_logprobs, data, ("token_mask", "reference_policy_logprobs")
        )
        check_floating("data['reference_policy_logprobs']", data["reference_policy_logprobs"])
        check_pairs("next_token_logprobs", next_token_logprobs, global_valid_seqs)

        sft_loss = torch.tensor(0.0)
        if self.sft_loss_weight > 0:
            if global_valid_toks is None:
                raise ValueError(
                    "global_valid_toks is None, expected the number of unmasked tokens in the "
                    f"global batch, because sft_loss_weight is {self.sft_loss_weight}"
                )
            row_losses, _ = self.sft_loss(
                next_token_logprobs,
                data,
                global_valid_seqs=global_valid_seqs,
                global_valid_toks=global_valid_toks,
                dpo_loss=True,
                dpo_average_log_probs=self.sft_average_log_probs,
            )
            chosen_losses, _ = self.split_output_tensor(row_losses)
            sft_loss = masked_mean(
                chosen_losses,
                data["sample_mask"][::2],
                global_normalization_factor=global_valid_seqs / 2,
            )
        preference_loss, accuracy, chosen_mean, rejected_mean = self._dpo_loss(
            next_token_logprobs, data, global_valid_seqs
        )
        loss = self.sft_loss_weight * sft_loss + self.preference_loss_weight * preference_loss

        return loss, {
            "loss": loss.item(),
            "sft_loss": sft_loss.item(),
            "preference_loss": preference_loss.item(),
            "accuracy": accuracy.item(),
            "rewards_chosen_mean": chosen_mean.item(),
            "rewards_rejected_mean": rejected_mean.item(),
            "num_valid_samples": (data["sample_mask"].sum() / 2).item(),
        }
