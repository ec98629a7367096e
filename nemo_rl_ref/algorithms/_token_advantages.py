# SPDX-License-Identifier: Apache-2.0
"""Advantages without groups or value model: Reinforce++, raw reward, on-policy distillation."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nemo_rl_ref.algorithms._advantage_checks import (
    check_kl_logprobs,
    check_mask,
    check_rewards,
    config_value,
    given_logprobs,
)
from nemo_rl_ref.algorithms._group_advantages import AdvEstimatorConfig
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.algorithms.utils import calculate_baseline_and_std_per_prompt, calculate_kl


def normalize_over_tokens(advantages: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """(A - mean) / std, with mean and (biased) variance sums over the mask divided by `count`.

    The variance is at least 1e-8. Masked entries are shifted and scaled, too.
    """
    mean = (advantages * mask).sum() / count
    variance = ((advantages - mean).square() * mask).sum() / count
    return (advantages - mean) * variance.clamp(min=1e-8).rsqrt()


class ReinforcePlusPlusAdvantageEstimator:
    r"""The reward, minus a group mean and a KL penalty, normalized over all tokens of the batch.

    .. math:: \hat A_{i,t} = r_i - b_i - β \, k_{i,t} \qquad
              A_{i,t} = \frac{\hat A_{i,t} - \mathrm{mean}(\hat A)}{\mathrm{std}(\hat A)}

    with b the mean reward of the responses to the prompt, response i included (0 without
    ``minus_baseline``), and k the estimate of KL(π‖π_ref) at token t (only with
    ``use_kl_in_reward``), clamped as `calculate_kl` does by default. Mean and standard deviation
    are over the unmasked tokens of the whole batch, not of a group; the variance is at least 1e-8.
    If every token is masked the advantages are NaN, as in NeMo RL.

    Source: Hu et al. (2025), https://arxiv.org/abs/2501.03262.

    Args:
        estimator_config: ``minus_baseline``.
        loss_config: ``use_kl_in_reward``, ``reference_policy_kl_penalty`` (β) and
            ``reference_policy_kl_type``.

    Example:
        A right response of one token and a wrong one of three to the same prompt:

        >>> import torch
        >>> estimator = ReinforcePlusPlusAdvantageEstimator(
        ...     AdvEstimatorConfig(), ClippedPGLossConfig()
        ... )
        >>> mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> advantages = estimator.compute_advantage(
        ...     torch.ones(2, 1), torch.tensor([1.0, 0.0]), mask
        ... )
        >>> advantages * mask
        tensor([[ 1.7321,  0.0000,  0.0000],
                [-0.5774, -0.5774, -0.5774]])
    """

    def __init__(self, estimator_config: AdvEstimatorConfig, loss_config: ClippedPGLossConfig):
        self.minus_baseline = estimator_config.minus_baseline
        self.use_kl_in_reward = loss_config.use_kl_in_reward
        self.kl_coef = loss_config.reference_policy_kl_penalty
        self.kl_type = loss_config.reference_policy_kl_type

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor,
        mask: Tensor,
        logprobs_policy: Tensor | None = None,
        logprobs_reference: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes the advantages of a global batch.

        Args:
            prompt_ids: (B, P) token ids; rows that are equal are the same prompt.
            rewards: (B,) floating.
            mask: (B, S), 1 on response tokens.
            logprobs_policy: (B, S), nats, finite also under the mask; only with a KL penalty.
            logprobs_reference: (B, S), nats, as `logprobs_policy`.
            **kwargs: not used.

        Returns:
            (B, S).

        Raises:
            TypeError: if `rewards` is not floating.
            ValueError: if a shape does not fit, or log-probabilities are None and the
                configuration asks for a KL penalty (NeMo RL leaves the penalty out).
        """
        check_rewards(rewards, mask)
        advantages = rewards
        if self.minus_baseline:
            baseline, _ = calculate_baseline_and_std_per_prompt(
                prompt_ids, rewards, rewards.new_ones(len(rewards)), leave_one_out_baseline=False
            )
            advantages = rewards - baseline
        advantages = advantages.unsqueeze(-1).expand(mask.shape)
        if self.use_kl_in_reward and self.kl_coef != 0:
            names = ("logprobs_policy", "logprobs_reference")
            pair = check_kl_logprobs(names[0], logprobs_policy, names[1], logprobs_reference, mask)
            kl = calculate_kl(*pair, kl_type=self.kl_type)
            advantages = advantages - self.kl_coef * kl
        return normalize_over_tokens(advantages, mask, mask.sum())


class RawRewardAdvantageEstimator:
    """The reward itself as the advantage of every token, if asked for normalized over the batch.

    Args:
        estimator_config: a dict with ``normalize_advantages``: subtract the mean over unmasked
            tokens and divide by their (biased) standard deviation, the variance being at least
            1e-8.
        loss_config: not used.

    Example:
        >>> import torch
        >>> estimator = RawRewardAdvantageEstimator(
        ...     {"normalize_advantages": False}, ClippedPGLossConfig()
        ... )
        >>> advantages, _ = estimator.compute_advantage(
        ...     None, torch.tensor([1.0, -1.0]), torch.ones(2, 2)
        ... )
        >>> advantages
        tensor([[ 1.,  1.],
                [-1., -1.]])
    """

    def __init__(self, estimator_config: dict[str, Any], loss_config: ClippedPGLossConfig):
        self.normalize_advantages = config_value(
            "RawRewardAdvantageEstimator", estimator_config, "normalize_advantages"
        )

    def compute_advantage(
        self, prompt_ids: Tensor | None, rewards: Tensor, mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Computes the advantages of a global batch.

        Args:
            prompt_ids: not used.
            rewards: (B,) floating.
            mask: (B, S), 1 on response tokens.
            **kwargs: not used.

        Returns:
            The advantages, (B, S), and None in the place of returns.

        Raises:
            TypeError: if `rewards` is not floating.
            ValueError: if a shape does not fit.
        """
        check_rewards(rewards, mask)
        advantages = rewards.unsqueeze(-1).expand(mask.shape)
        if self.normalize_advantages:
            advantages = normalize_over_tokens(advantages, mask, mask.sum().clamp(min=1))
        return advantages, None


class OPDAdvantageEstimator:
    r"""On-policy distillation: how much more probable the teacher finds the sampled token.

    .. math:: A_t = \log π_{teacher}(x_t \mid x_{<t}) - \log π_{old}(x_t \mid x_{<t})

    Its mean over tokens drawn from the student is -KL(student‖teacher): the policy gradient with
    it reduces the reverse KL. To be used with ``disable_ppo_ratio`` and the "icepop" truncation
    in `ClippedPGLossFn`.

    Source: Xiao et al. (2026), https://arxiv.org/abs/2601.02780, Eq. 8.

    Args:
        estimator_config: not used.
        loss_config: not used.

    Attributes:
        last_metrics: of the last call, over its unmasked tokens: mean difference, mean and
            (bias-corrected) standard deviation of the advantages; 0 where there are too few.

    Example:
        The teacher finds the first token more likely and the second less likely:

        >>> import torch
        >>> teacher, student = torch.tensor([[-0.5, -3.0]]), torch.tensor([[-1.0, -2.0]])
        >>> estimator = OPDAdvantageEstimator({}, None)
        >>> estimator.compute_advantage(None, None, torch.ones(1, 2), teacher, student)
        tensor([[ 0.5000, -1.0000]])
    """

    def __init__(self, estimator_config: Mapping[str, Any], loss_config: Any):
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(
        self,
        prompt_ids: Tensor | None,
        rewards: Tensor | None,
        mask: Tensor,
        teacher_logprobs: Tensor | None = None,
        prev_logprobs: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes the advantages of a global batch.

        Args:
            prompt_ids: not used.
            rewards: not used.
            mask: (B, S), 1 on response tokens.
            teacher_logprobs: (B, S), nats, finite also under the mask.
            prev_logprobs: (B, S), the student's, nats, as `teacher_logprobs`.
            **kwargs: not used.

        Returns:
            (B, S), without gradient, 0 where the mask is 0.

        Raises:
            ValueError: if log-probabilities are None or a shape does not fit.
        """
        check_mask(mask)
        teacher = given_logprobs("teacher_logprobs", teacher_logprobs, mask)
        gap = (teacher - given_logprobs("prev_logprobs", prev_logprobs, mask)).detach()
        advantages = gap * mask
        valid = advantages[mask.bool()]
        prefix = "on_policy_distillation"
        self.last_metrics = {
            f"{prefix}/teacher_student_logprob_gap_mean": (
                gap[mask.bool()].mean().item() if valid.numel() else 0.0
            ),
            f"{prefix}/adv_mean": valid.mean().item() if valid.numel() else 0.0,
            f"{prefix}/adv_std": valid.std().item() if valid.numel() > 1 else 0.0,
        }
        return advantages
