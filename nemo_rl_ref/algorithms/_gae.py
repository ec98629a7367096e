# SPDX-License-Identifier: Apache-2.0
"""Generalized advantage estimation, without a loop over time steps."""

from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms._advantage_checks import (
    check_kl_logprobs,
    check_like_mask,
    check_rewards,
    config_value,
)
from nemo_rl_ref.algorithms._recurrence import gae
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.algorithms.utils import calculate_kl, masked_mean, masked_var


class GeneralizedAdvantageEstimator:
    r"""Generalized advantage estimation (GAE), with the variants that VAPO added.

    .. math::

        δ_t &= r_t + γ V_{t'} - V_t \\
        A_t &= δ_t + γ λ A_{t'} = \sum_{l \ge 0} (γλ)^l δ_{t+l} \qquad R_t = A_t + V_t

    with V the value, R the return, and t' the next *unmasked* token; after the last one V and A
    are 0. Masked tokens between unmasked ones (a tool's output between two turns) are passed
    over, as if they were not there. The reward is at the last unmasked token, and with
    ``use_kl_in_reward`` every unmasked token has -β k_t, with k the estimate of KL(π‖π_ref)
    clamped as `calculate_kl` does by default.

    λ = 1 is the sum of discounted rewards minus V, without bias from V; λ = 0 trusts V after one
    step and has the smallest variance.

    VAPO: returns with one λ (``gae_lambda_value``), advantages with another
    (``gae_lambda_policy``), which can depend on the length l of the response,
    λ = 1 - 1/(α l), so that the reward is felt as far as the response is long.

    The recurrence is affine in what comes from the right, so it is solved by joining neighbors
    instead of a loop over time: in plain PyTorch in log2(S) rounds, on CUDA in one kernel that
    reads and writes everything once and sums in float64.

    Source: Schulman et al. (2016), https://arxiv.org/abs/1506.02438, Eq. 16; Yue et al. (2025),
    https://arxiv.org/abs/2504.05118 (VAPO), Section 4.

    Args:
        estimator_config: a dict with ``gae_lambda``, ``gae_gamma``, ``normalize_advantages``
            (subtract the mean and divide by the standard deviation over unmasked tokens),
            ``gae_lambda_value`` and ``gae_lambda_policy`` (None for ``gae_lambda``) and
            ``length_adaptive_alpha`` (α, 0 for a λ that is the same for all lengths; it goes
            before ``gae_lambda_policy``).
        loss_config: ``use_kl_in_reward``, ``reference_policy_kl_penalty`` (β) and
            ``reference_policy_kl_type``.

    Raises:
        KeyError: if a key is missing in `estimator_config`.

    Example:
        Three tokens with reward 1 at the end, of which the critic expects 0.5 throughout:

        >>> config = {"gae_lambda": 0.5, "gae_gamma": 1.0, "normalize_advantages": False}
        >>> config |= {
        ...     "gae_lambda_value": None,
        ...     "gae_lambda_policy": None,
        ...     "length_adaptive_alpha": 0.0,
        ... }
        >>> estimator = GeneralizedAdvantageEstimator(config, ClippedPGLossConfig())
        >>> mask, values = torch.ones(1, 3), torch.full((1, 3), 0.5)
        >>> advantages, returns = estimator.compute_advantage(None, torch.ones(1), mask, values)
        >>> advantages, returns
        (tensor([[0.1250, 0.2500, 0.5000]]), tensor([[0.6250, 0.7500, 1.0000]]))
    """

    def __init__(self, estimator_config: dict[str, Any], loss_config: ClippedPGLossConfig):
        def value(key: str) -> Any:
            return config_value("GeneralizedAdvantageEstimator", estimator_config, key)

        self.gae_lambda = value("gae_lambda")
        self.gae_gamma = value("gae_gamma")
        self.normalize_advantages = value("normalize_advantages")
        self.gae_lambda_value = value("gae_lambda_value")
        self.gae_lambda_policy = value("gae_lambda_policy")
        self.length_adaptive_alpha = value("length_adaptive_alpha")
        self.use_kl_in_reward = loss_config.use_kl_in_reward
        self.kl_coef = loss_config.reference_policy_kl_penalty
        self.kl_type = loss_config.reference_policy_kl_type

    def compute_advantage(
        self,
        prompt_ids: Tensor | None,
        rewards: Tensor,
        mask: Tensor,
        values: Tensor,
        reference_logprobs: Tensor | None = None,
        logprobs: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Computes the advantages and returns of a batch.

        What stands under a 0 of the mask, be it NaN, reaches no unmasked token.

        Args:
            prompt_ids: not used.
            rewards: (B,) floating.
            mask: (B, S), 1 on response tokens, 0 elsewhere.
            values: (B, S) floating, V, in units of reward.
            reference_logprobs: (B, S), nats; only with a KL penalty.
            logprobs: (B, S), nats, of the policy that sampled; only with a KL penalty.
            **kwargs: not used.

        Returns:
            Advantages, 0 under the mask, and returns, each (B, S). At a masked token the return
            is its value plus the advantage of the next unmasked token, as in NeMo RL. With
            normalization, a batch with a single unmasked token has advantage NaN there, as in
            NeMo RL.

        Raises:
            TypeError: if `rewards` is not floating.
            ValueError: if a shape does not fit, or log-probabilities are None and the
                configuration asks for a KL penalty (NeMo RL leaves the penalty out).
        """
        check_rewards(rewards, mask)
        check_like_mask("values", values, mask)
        token_rewards = self._token_rewards(rewards, mask, logprobs, reference_logprobs)

        lambda_value, lambda_policy = self._lambdas(mask)
        arguments, gamma = (token_rewards, values, mask), self.gae_gamma
        advantages, returns = gae(*arguments, gamma=gamma, lam=lambda_policy)
        if lambda_value is not lambda_policy:
            _, returns = gae(*arguments, gamma=gamma, lam=lambda_value)
        if self.normalize_advantages:
            mean = masked_mean(advantages, mask)
            variance = masked_var(advantages, mask, mean)
            advantages = (advantages - mean) * (variance + 1e-8).rsqrt()
        return advantages.masked_fill(~mask.bool(), 0), returns

    def _token_rewards(
        self,
        rewards: Tensor,
        mask: Tensor,
        logprobs: Tensor | None,
        reference_logprobs: Tensor | None,
    ) -> Tensor:
        """The reward at the last unmasked token, minus the KL penalty at every token; (B, S)."""
        # A row without unmasked tokens has its reward at the masked token 0, where it is not read.
        positions = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
        last = (mask.bool() * positions).amax(1, keepdim=True).long()
        token_rewards = rewards.new_zeros(mask.shape).scatter(1, last, rewards.unsqueeze(-1))
        if self.use_kl_in_reward and self.kl_coef > 0:
            names = ("logprobs", "reference_logprobs")
            pair = check_kl_logprobs(names[0], logprobs, names[1], reference_logprobs, mask)
            kl = calculate_kl(*pair, self.kl_type)
            token_rewards = token_rewards - self.kl_coef * kl
        return token_rewards

    def _lambdas(self, mask: Tensor) -> tuple[float, float | Tensor]:
        """λ for returns and λ for advantages: the same object if they are the same."""
        of_value = self.gae_lambda if self.gae_lambda_value is None else self.gae_lambda_value
        of_policy = self.gae_lambda if self.gae_lambda_policy is None else self.gae_lambda_policy
        if self.length_adaptive_alpha > 0:
            lengths = mask.sum(1).float()
            of_policy = 1 - 1 / (self.length_adaptive_alpha * lengths).clamp(min=1)
        return of_value, of_policy
