# SPDX-License-Identifier: Apache-2.0
"""PPO's settings. The training loop is in :mod:`nemo_rl_ref.rl.trainer`."""

from typing import Any

from pydantic import BaseModel, Field, model_validator

from nemo_rl_ref.algorithms.grpo import RewardScalingConfig
from nemo_rl_ref.algorithms.reward_functions import RewardShapingConfig


class AsyncPPOConfig(BaseModel, extra="allow"):
    """``ppo.async_ppo``: rollouts beside training. Not implemented here; must be disabled."""

    enabled: bool = False
    max_trajectory_age_steps: int = Field(default=1, ge=1)
    warmup_generation_lead_steps: int | None = Field(default=None, ge=1)
    in_flight_weight_updates: bool = False
    recompute_kv_cache_after_weight_updates: bool = False
    drop_incomplete_targets_on_restore: bool = False

    @model_validator(mode="after")
    def validate_settings(self) -> "AsyncPPOConfig":
        """Checks that generation may run ahead as far as a trajectory may be old."""
        lead = self.warmup_generation_lead_steps
        if lead is not None and lead < self.max_trajectory_age_steps:
            raise ValueError(
                f"warmup_generation_lead_steps is {lead}, expected at least "
                f"max_trajectory_age_steps, which is {self.max_trajectory_age_steps}"
            )
        return self

    @property
    def resolved_warmup_generation_lead_steps(self) -> int:
        """The lead, or the largest age where none is given."""
        lead = self.warmup_generation_lead_steps
        return self.max_trajectory_age_steps if lead is None else lead


#: ``ppo.adv_estimator``: ``name``, "gae" or "raw_reward", with the settings of its class. NeMo RL's
#: is a TypedDict, which pydantic does not take from the standard library below Python 3.12.
AdvEstimatorConfig = dict[str, Any]


class PPOConfig(BaseModel, extra="allow"):
    """``ppo`` in NeMo RL's configuration. Attributes that `GRPOConfig` has mean the same here.

    Attributes:
        ppo_epochs: Passes over the rollouts of a step; in each, the value model is trained first.
        adv_estimator: ``name``, "gae" or "raw_reward", with the settings of its class.
        policy_training_start_step: Steps that train the value model only.
        async_ppo: Must be disabled.
        use_dynamic_sampling: Must be false: NeMo RL's loop does not read it.
    """

    num_prompts_per_step: int = 32
    num_generations_per_prompt: int = 16
    max_num_epochs: int = 100000
    max_num_steps: int = 100000
    max_rollout_turns: int = 1
    val_period: int = 20
    val_batch_size: int = 256
    val_at_start: bool = True
    val_at_end: bool = False
    max_val_samples: int = 256
    skip_reference_policy_logprobs_calculation: bool = True
    seed: int = 42
    overlong_filtering: bool = False
    use_dynamic_sampling: bool = False
    dynamic_sampling_max_gen_batches: int = 10
    batch_multiplier: float = 1.0
    ppo_epochs: int = 4
    reward_shaping: RewardShapingConfig = Field(default_factory=RewardShapingConfig)
    reward_scaling: RewardScalingConfig = Field(default_factory=RewardScalingConfig)
    adv_estimator: AdvEstimatorConfig = Field(
        default_factory=lambda: AdvEstimatorConfig(
            name="gae",
            gae_lambda=0.95,
            gae_gamma=1.0,
            normalize_advantages=True,
            gae_lambda_value=None,
            gae_lambda_policy=None,
            length_adaptive_alpha=0.0,
        )
    )
    policy_training_start_step: int = 0
    seq_logprob_error_threshold: float | None = None
    async_ppo: AsyncPPOConfig = Field(default_factory=AsyncPPOConfig)

    @model_validator(mode="after")
    def validate_async_warmup_settings(self) -> "PPOConfig":
        """Checks that a lead for the warm-up comes with a warm-up."""
        if (
            self.async_ppo.enabled
            and self.policy_training_start_step == 0
            and self.async_ppo.warmup_generation_lead_steps is not None
        ):
            raise ValueError(
                "warmup_generation_lead_steps is set and policy_training_start_step is 0, "
                "expected more than 0"
            )
        return self
