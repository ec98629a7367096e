# SPDX-License-Identifier: Apache-2.0
"""Losses that know by how much the chosen response is better."""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossDataDict, DPOLossFn
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

OBJECTIVES = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(σ(a)) ‖ Bernoulli(σ(b))) from the logits a and b, nats.

    Example:
        >>> import torch
        >>> bernoulli_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.3278])
    """
    heads = logsigmoid(a).exp() * (logsigmoid(a) - logsigmoid(b))
    return heads + logsigmoid(-a).exp() * (logsigmoid(-a) - logsigmoid(-b))


class RPOLossFn(DPOLossFn):
    r"""Reward-aware preference optimization: fits the margin to a known difference of rewards.

    With a = β (h_w - h_l), h as in DPO, and b = η (r_w - r_l), r being the known rewards:

    ==========  ============================================
    objective   loss of a pair
    ==========  ============================================
    rpo_sq      (a - b)²
    rpo_fwd_kl  KL(Bernoulli(σ(a)) ‖ Bernoulli(σ(b)))
    rpo_bwd_kl  KL(Bernoulli(σ(b)) ‖ Bernoulli(σ(a)))
    ==========  ============================================

    rpo_bwd_kl with an infinite difference of rewards is DPO. rpo_fwd_kl has no gradient for very
    wrong pairs. The chosen response need not have the larger reward.

    Needs in ``data``, besides DPO's: ``gt_rewards`` (2P,) floating, the reward of each row.

    Config keys, named as in NeMo RL's pull request 1388: ``preference_loss``, one of the
    objectives, "rpo_bwd_kl" if not given; ``gt_reward_scale``, η, 1 if not given.

    Source: Sun et al. (2025), https://arxiv.org/abs/2502.00203; NVIDIA (2024), "Nemotron-4 340B
    Technical Report", https://arxiv.org/abs/2406.11704, for rpo_bwd_kl. Where a text has a factor
    of 1/2 before the square, put it into ``preference_loss_weight``.

    Raises:
        ValueError: if ``preference_loss`` is unknown or ``gt_reward_scale`` is not positive.

    Example:
        The loss is 0 where the margin is the difference of the rewards:

        >>> import torch
        >>> loss_fn = RPOLossFn(DPOLossConfig(preference_loss="rpo_sq"))
        >>> loss_fn.pair_losses(
        ...     margin=torch.tensor([1.0, 3.0]), reward_margin=torch.tensor([1.0, 1.0])
        ... )
        tensor([0., 4.])
    """

    needs_data = ("gt_rewards",)

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.objective = getattr(cfg, "preference_loss", "rpo_bwd_kl")
        self.reward_scale = getattr(cfg, "gt_reward_scale", 1.0)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"preference_loss: got {self.objective!r}, expected one of {OBJECTIVES}"
            )
        if not (isinstance(self.reward_scale, float | int) and self.reward_scale > 0):
            raise ValueError(
                f"gt_reward_scale: got {self.reward_scale!r}, expected a number, more than 0"
            )

    def pair_losses(self, margin: Tensor, reward_margin: Tensor) -> Tensor:
        """Returns the loss of each pair (P,) from a (P,) and b (P,)."""
        if self.objective == "rpo_sq":
            return (margin - reward_margin).square()
        if self.objective == "rpo_fwd_kl":
            return bernoulli_kl(margin, reward_margin)
        return bernoulli_kl(reward_margin, margin)

    def _dpo_loss(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample_mask, token_mask = data["sample_mask"], data["token_mask"][:, 1:]
        if "gt_rewards" not in data:
            raise KeyError(
                f"data has no 'gt_rewards', which RPOLossFn needs; it has {sorted(data)}"
            )
        if data["gt_rewards"].shape != sample_mask.shape:
            raise ValueError(
                f"data['gt_rewards'] has shape {tuple(data['gt_rewards'].shape)}, "
                f"expected (B,) = {tuple(sample_mask.shape)}"
            )
        log_ratios = next_token_logprobs - data["reference_policy_logprobs"][:, :-1]
        log_ratios = (log_ratios * token_mask).sum(-1)
        if self.preference_average_log_probs:
            log_ratios = log_ratios / token_mask.sum(-1).clamp(min=1)
        log_ratios = log_ratios.masked_fill(sample_mask == 0, 0.0)
        metrics = self._preference_loss(log_ratios, sample_mask, global_valid_seqs)[1:]

        rewards = data["gt_rewards"].masked_fill(sample_mask == 0, 0.0)
        chosen, rejected = self.split_output_tensor(log_ratios)
        better, worse = self.split_output_tensor(rewards)
        losses = self.pair_losses(
            self.reference_policy_kl_penalty * (chosen - rejected),
            self.reward_scale * (better - worse),
        )
        loss = masked_mean(
            losses, sample_mask[::2], global_normalization_factor=global_valid_seqs / 2
        )
        return loss, *metrics
