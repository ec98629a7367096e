# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses that are NeMo RL's with a flag set, a term added or other advantages.

All flags of `ClippedPGLossConfig` work. Masks, extremes and metrics are as in `ClippedPGLossFn`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossDataDict,
    ClippedPGLossFn,
)
from nemo_rl_ref.algorithms.loss.interfaces import LossType, MetricNormalizer
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class DAPOLossFn(ClippedPGLossFn):
    r"""DAPO's token mean: every token of the global batch counts the same.

    .. math:: L = -\frac{1}{\sum_i |y_i|} \sum_i \sum_t \min\big(ρ_{i,t} A_i, \;
              \mathrm{clip}(ρ_{i,t}, 1 - ε_{low}, 1 + ε_{high}) A_i\big)

    NeMo RL has it: this is `ClippedPGLossFn` with ``token_level_loss``, whatever the config says.
    The paper also has ``ratio_clip_max=0.28`` (ε_high), ``ratio_clip_min=0.2`` (ε_low) and
    ``reference_policy_kl_penalty=0``; these are left to the config. TRL calls the reduction "dapo".

    Source: Yu et al. (2025), https://arxiv.org/abs/2503.14476, the loss "DAPO".

    Example:
        >>> DAPOLossFn(ClippedPGLossConfig(token_level_loss=False)).loss_type
        <LossType.TOKEN_LEVEL: 'token_level'>
    """

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        if isinstance(cfg, ClippedPGLossConfig):
            cfg = cfg.model_copy(update={"token_level_loss": True})
        super().__init__(cfg, use_fused_linear_logprobs)


class EntropyPGLossFn(ClippedPGLossFn):
    r"""GRPO, or whatever the flags make, with a bonus for entropy.

    .. math:: L = L_{PG} - c \, \hat H, \quad
              \hat H = \underset{i,t}{\mathrm{mean}} \; -w_{i,t} \log π_θ(y_{i,t} \mid x, y_{i,<t}),
              \quad w_{i,t} =
              \frac{π_θ(y_{i,t} \mid x, y_{i,<t})}{π_{gen}(y_{i,t} \mid x, y_{i,<t})}

    c is the config key ``entropy_coefficient``, 0.01 if not given; the mean is over tokens or over
    responses, as that of the loss.

    NeMo RL gives a loss the log-probabilities of the sampled tokens only. Entropies in `data` would
    be constants without gradient. So the entropy is estimated from the samples: for y ~ π_gen,
    E[-w log π] = H, and the gradient of w counts too: that of -w log π is -w (log π + 1) ∇log π,
    whose mean is ∇H, because E[w ∇log π] = 0. Without w (log π alone) the gradient on policy would
    be zero in the mean. log w is clamped to at most 20 nats. It is exact in the mean, and noisier
    than the entropy of the logits, which TRL has (its ``entropy_coef``). TRL takes the mean over
    the tokens of a micro-batch, whatever the loss is a mean over.

    The metric ``entropy_estimate`` is Ĥ, nats.

    Source: Mnih et al. (2016), https://arxiv.org/abs/1602.01783, Section 4, after Williams and
    Peng (1991); for language models He et al. (2025), https://arxiv.org/abs/2505.22312.

    Raises:
        ValueError: if ``entropy_coefficient`` is negative or no number.

    Example:
        On policy and without advantages, the loss is -c times the mean of -log π:

        >>> old = torch.tensor([[0.0, -1.0, -1.0]])
        >>> data = {"token_mask": torch.ones(1, 3), "sample_mask": torch.ones(1)}
        >>> data |= {
        ...     "advantages": torch.zeros(1, 3),
        ...     "prev_logprobs": old,
        ...     "generation_logprobs": old,
        ... }
        >>> cfg = ClippedPGLossConfig(reference_policy_kl_penalty=0.0, entropy_coefficient=0.5)
        >>> EntropyPGLossFn(cfg)(old[:, 1:], data, torch.tensor(1), torch.tensor(2))[0]
        tensor(-0.5000)
    """

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        value = getattr(cfg, "entropy_coefficient", 0.01)
        number = isinstance(value, float | int) and not isinstance(value, bool)
        if not (number and 0 <= value < math.inf):
            raise ValueError(f"entropy_coefficient: got {value!r}, expected a number, 0 or more")
        self.entropy_coefficient = value
        per_token = self.loss_type == LossType.TOKEN_LEVEL
        self.metric_normalizations["entropy_estimate"] = (
            MetricNormalizer.TOKENS if per_token else MetricNormalizer.SEQUENCES
        )

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[ClippedPGLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch. Arguments and metrics: `ClippedPGLossFn`."""
        policy_loss, metrics = super().__call__(
            next_token_logprobs, data, global_valid_seqs, global_valid_toks
        )
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        log_w = (next_token_logprobs - data["generation_logprobs"][:, 1:]).clamp(max=20.0)
        estimates = -log_w.exp() * next_token_logprobs
        if self.loss_type == LossType.TOKEN_LEVEL:
            mask = token_mask * sample_mask.unsqueeze(-1)
            entropy = masked_mean(estimates, mask, global_normalization_factor=global_valid_toks)
        else:
            rows = masked_mean(estimates, token_mask, dim=-1)
            entropy = masked_mean(rows, sample_mask, global_normalization_factor=global_valid_seqs)
        loss = policy_loss - self.entropy_coefficient * entropy
        return loss, {**metrics, "loss": loss.item(), "entropy_estimate": entropy.item()}


class MaxRLLossFn(ClippedPGLossFn):
    r"""Maximum-likelihood RL: divides the advantage by the success rate of its prompt.

    .. math:: A_i = \frac{r_i - \bar r}{\bar r}, \qquad A_i = 0 \text{ if } \bar r = 0

    with r the reward, 0 or 1, and r̄ its mean over the responses to the same prompt. The surrogate
    is that of `ClippedPGLossFn`. With ``disable_ppo_ratio`` and ``token_level_loss`` the gradient
    is the paper's estimator, divided by the tokens of the batch instead of by its responses.

    It needs the advantages r - r̄ in `data`, in NeMo RL those of the GRPO estimator with
    ``normalize_rewards: false`` and ``use_leave_one_out_baseline: false``. Rewards being 0 or 1,
    they tell r̄ by themselves: it is 1 - (r - r̄) for a success, -(r - r̄) for a failure, so that a
    failure gets -1. Other rewards, and other terms in the advantage, give wrong numbers without a
    word. r̄ counts as at least 0.001: enough for groups of up to 1000 responses.

    Source: Tajwar et al. (2026), https://arxiv.org/abs/2602.02710, Algorithm 1, step 8.

    Raises:
        ValueError: if ``use_kl_in_reward`` is set.

    Example:
        A success of a prompt with a success rate of 1/4 has r - r̄ = 3/4 and counts 3:

        >>> old = torch.tensor([[0.0, -1.0, -1.0]])
        >>> data = {"token_mask": torch.ones(1, 3), "sample_mask": torch.ones(1)}
        >>> data |= {"prev_logprobs": old, "generation_logprobs": old}
        >>> data["advantages"] = torch.full((1, 3), 0.75)
        >>> loss_fn = MaxRLLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
        >>> loss_fn(old[:, 1:], data, torch.tensor(1), torch.tensor(2))[0]
        tensor(-3.)
    """

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        if cfg.use_kl_in_reward:
            raise ValueError(
                "use_kl_in_reward: got True, expected False: with a KL in the reward the "
                "advantages do not tell the success rate"
            )

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[ClippedPGLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch. Arguments and metrics: `ClippedPGLossFn`."""
        centered = data["advantages"]
        success = centered / (1 - centered).clamp(min=1e-3)
        advantages = torch.where(centered > 0, success, -(centered < 0).to(centered.dtype))
        data = {**data, "advantages": advantages}
        return super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
