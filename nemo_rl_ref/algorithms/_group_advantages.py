# SPDX-License-Identifier: Apache-2.0
"""Advantages that compare the responses to one prompt with each other: GRPO and GDPO."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from nemo_rl_ref.algorithms._advantage_checks import check_mask, check_rewards
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    get_gdpo_reward_component_keys,
)


class AdvEstimatorConfig(BaseModel, extra="allow"):
    """``grpo.adv_estimator`` in NeMo RL's configuration.

    Attributes:
        name: "grpo", "gdpo" or "reinforce_plus_plus"; read by NeMo RL's trainer, not here.
        normalize_rewards: GRPO, GDPO: divide by the standard deviation of the group.
        use_leave_one_out_baseline: GRPO, GDPO: leave the response itself out of its baseline.
        reward_weights: GDPO: one weight for each reward component, in the order of their sorted
            names; None for 1.
        minus_baseline: Reinforce++: subtract the mean reward of the group.
    """

    name: str = "grpo"
    normalize_rewards: bool = True
    use_leave_one_out_baseline: bool = True
    reward_weights: list[float] | None = None
    minus_baseline: bool = True


def group_advantages(
    prompt_ids: Tensor, rewards: Tensor, leave_one_out: bool, normalize: bool
) -> Tensor:
    """(r - b) / (s + 1e-6) for each response, (B,); undivided where s is 0 or `normalize` False.

    Baseline b and standard deviation s: `calculate_baseline_and_std_per_prompt`.
    """
    baseline, std = calculate_baseline_and_std_per_prompt(
        prompt_ids, rewards, torch.ones_like(rewards), leave_one_out_baseline=leave_one_out
    )
    advantages = rewards - baseline
    if not normalize:
        return advantages
    return torch.where(std > 0, advantages / (std + 1e-6), advantages)


class GRPOAdvantageEstimator:
    r"""The reward against that of the other responses to the same prompt.

    .. math:: A_i = \frac{r_i - b_i}{s_i + 10^{-6}}

    with b the mean and s the standard deviation of the rewards of the responses to the prompt,
    without response i itself if ``use_leave_one_out_baseline``. Every token of a response has its
    A. Not divided where s is 0, or anywhere without ``normalize_rewards``.

    A group whose rewards are all the same has advantage 0 and teaches nothing. Where a response
    is left out of its own s, rewards [1, 0, 0, 0] give [1, -0.577, -0.577, -0.577].

    Source: Shao et al. (2024), https://arxiv.org/abs/2402.03300, Section 4.1; leaving one out:
    Ahmadian et al. (2024), https://arxiv.org/abs/2402.14740.

    Args:
        estimator_config: ``use_leave_one_out_baseline`` and ``normalize_rewards``.
        loss_config: not used.

    Example:
        Four responses of two tokens to one prompt:

        >>> estimator = GRPOAdvantageEstimator(AdvEstimatorConfig(), ClippedPGLossConfig())
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> estimator.compute_advantage(torch.ones(4, 1), rewards, torch.ones(4, 2))
        tensor([[ 1.0000,  1.0000],
                [-0.5773, -0.5773],
                [-0.5773, -0.5773],
                [-0.5773, -0.5773]])
    """

    def __init__(self, estimator_config: AdvEstimatorConfig, loss_config: ClippedPGLossConfig):
        self.use_leave_one_out_baseline = estimator_config.use_leave_one_out_baseline
        self.normalize_rewards = estimator_config.normalize_rewards

    def compute_advantage(
        self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Computes the advantages of a global batch.

        Args:
            prompt_ids: (B, P) token ids; rows that are equal are the same prompt.
            rewards: (B,) floating.
            mask: (B, S), response tokens. Only its shape is used: masked tokens have the
                advantage, too.
            **kwargs: not used.

        Returns:
            (B, S), a view: one number a row.

        Raises:
            TypeError: if `rewards` is not floating.
            ValueError: if a shape does not fit.
        """
        check_rewards(rewards, mask)
        advantages = group_advantages(
            prompt_ids, rewards, self.use_leave_one_out_baseline, self.normalize_rewards
        )
        return advantages.unsqueeze(-1).expand(mask.shape)


class GDPOAdvantageEstimator:
    r"""GRPO's advantage for each reward component by itself, then added and normalized.

    .. math:: A_i = \frac{\tilde A_i - \mathrm{mean}(\tilde A)}{\mathrm{std}(\tilde A)} \qquad
              \tilde A_i = \sum_n w_n A_i^{(n)}

    with A⁽ⁿ⁾ GRPO's advantage for component n and w ``reward_weights``. Mean and (bias-corrected)
    standard deviation are over the responses of the batch. Where that deviation is 0 it does not
    divide. Normalizing each component before adding keeps one with a wide range from drowning
    the others.

    Source: Liu et al. (2026), https://arxiv.org/abs/2601.05242.

    Args:
        estimator_config: ``use_leave_one_out_baseline``, ``normalize_rewards`` and
            ``reward_weights``.
        loss_config: not used.

    Example:
        A component with a range of 1 and one with a range of 10 count the same:

        >>> config = AdvEstimatorConfig(use_leave_one_out_baseline=False)
        >>> estimator = GDPOAdvantageEstimator(config, ClippedPGLossConfig())
        >>> batch = {
        ...     "reward/answer": torch.tensor([1.0, 0.0]),
        ...     "reward/length": torch.tensor([10.0, 0.0]),
        ... }
        >>> estimator.compute_advantage(torch.ones(2, 1), None, torch.ones(2, 1), batch)
        tensor([[ 0.7071],
                [-0.7071]])
    """

    def __init__(self, estimator_config: AdvEstimatorConfig, loss_config: ClippedPGLossConfig):
        self.use_leave_one_out_baseline = estimator_config.use_leave_one_out_baseline
        self.normalize_rewards = estimator_config.normalize_rewards
        self.reward_weights = estimator_config.reward_weights

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor | None,
        mask: Tensor,
        repeated_batch: Mapping[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """Computes the advantages of a global batch.

        Args:
            prompt_ids: (B, P) token ids; rows that are equal are the same prompt.
            rewards: not used.
            mask: (B, S), response tokens. Only its shape is used.
            repeated_batch: holds the reward components under keys ``reward/<name>``, each (B,)
                floating. At least two.
            **kwargs: not used.

        Returns:
            (B, S), a view: one number a row.

        Raises:
            TypeError: if a component is not floating.
            ValueError: if there are fewer than two components, the number of weights is not that
                of the components, or a shape does not fit.
        """
        check_mask(mask)
        keys = get_gdpo_reward_component_keys(repeated_batch)
        if len(keys) < 2:
            raise ValueError(
                f"repeated_batch has the reward components {keys}, expected two or more "
                "(keys reward/<name>); for a single reward use GRPO"
            )
        weights = [1.0] * len(keys) if self.reward_weights is None else self.reward_weights
        if len(weights) != len(keys):
            raise ValueError(
                f"reward_weights has {len(weights)} entries, expected {len(keys)}, one for each of "
                f"{keys} in this order"
            )
        total = torch.zeros((), device=mask.device)
        for key, weight in zip(keys, weights, strict=True):
            check_rewards(repeated_batch[key], mask)
            total = total + weight * group_advantages(
                prompt_ids,
                repeated_batch[key],
                self.use_leave_one_out_baseline,
                self.normalize_rewards,
            )
        centered = total - total.mean()
        # A single response has no standard deviation, and torch would warn about it.
        std = total.std() if len(total) > 1 else torch.zeros_like(total.sum())
        advantages = torch.where(std > 0, centered / std, centered)
        return advantages.unsqueeze(-1).expand(mask.shape)
