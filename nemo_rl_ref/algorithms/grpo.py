# SPDX-License-Identifier: Apache-2.0
"""GRPO's settings, and what happens to a batch of rollouts before the loss sees it.

The training loop is in :mod:`nemo_rl_ref.rl.trainer`.
"""

from typing import Any, Optional

import torch
from pydantic import BaseModel, Field

from nemo_rl_ref.algorithms.advantage_estimator import AdvEstimatorConfig
from nemo_rl_ref.algorithms.reward_functions import RewardShapingConfig
from nemo_rl_ref.algorithms.utils import get_gdpo_reward_component_keys
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class RewardScalingConfig(BaseModel, extra="allow"):
    """``grpo.reward_scaling``: rewards are clamped to the source interval and mapped to the target.

    Attributes:
        enabled: Whether rewards are scaled at all.
        source_min: Reward that becomes ``target_min``.
        source_max: Reward that becomes ``target_max``.
        target_min: Lowest scaled reward.
        target_max: Highest scaled reward.
    """

    enabled: bool = False
    source_min: float = 0.0
    source_max: float = 1.0
    target_min: float = 0.0
    target_max: float = 1.0


class AsyncGRPOConfig(BaseModel, extra="allow"):
    """``grpo.async_grpo``: rollouts beside training. Not implemented here; must be disabled."""

    enabled: bool = False
    max_trajectory_age_steps: int = 1
    max_generation_failures: int = 0
    in_flight_weight_updates: bool = False
    recompute_kv_cache_after_weight_updates: bool = False


class GRPOConfig(BaseModel, extra="allow"):
    """``grpo`` in NeMo RL's configuration. A step is one batch of rollouts and its updates.

    Attributes:
        num_prompts_per_step: Prompts of a step.
        num_generations_per_prompt: Responses to each: the group.
        max_num_epochs: Passes over the prompts, at most.
        max_num_steps: Steps, at most.
        max_rollout_turns: Turns of a conversation; 1 here.
        normalize_rewards: Divide advantages by the group's standard deviation. Configurations
            copy it into ``adv_estimator``, which is what counts.
        advantage_clip_low: Lowest advantage; None for no limit.
        advantage_clip_high: Highest advantage; None for no limit.
        use_leave_one_out_baseline: Leave a response out of its own baseline.
        val_period: Steps between validations; 0 for none.
        val_start_at: First step that may validate; -1 for any.
        val_batch_size: Prompts generated for at once in validation; None for all.
        val_at_start: Validate before the first step.
        val_at_end: Validate after the last step.
        max_val_samples: Prompts of a validation; cut to a multiple of ``val_batch_size``. None
            for all there are, as NeMo RL's program for NeMo Gym has it.
        val_num_generations_per_prompt: Responses to each; more than 1 adds the metric ``pass_k``.
        stop_at_validation_metric: Stop training once this validation metric
        stop_at_validation_threshold: reaches this value; None for never.
        skip_reference_policy_logprobs_calculation: Do not run the reference policy.
        seed: Seeds data order and sampling.
        async_grpo: Must be disabled.
        overlong_filtering: Responses that were cut off do not count in the loss.
        use_dynamic_sampling: Drop groups whose rewards are all the same, and go on generating
            until the step is full.
        dynamic_sampling_max_gen_batches: Batches a step may generate for that.
        batch_multiplier: Prompts generated for at once over ``num_prompts_per_step``.
        reward_shaping: See `RewardShapingConfig`.
        reward_scaling: See `RewardScalingConfig`.
        calculate_advantages_on_gpu: Not used here.
        seq_logprob_error_threshold: Responses whose mean exp(abs(log π_old - log π_gen)) is larger
            do not count in the loss; None for no limit.
        invalid_tool_call_advantage: Not implemented here; must be None.
        malformed_thinking_advantage: Not implemented here; must be None.
        adv_estimator: See `AdvEstimatorConfig`.
        deduplicate_multimodal_data: Not used here.
        debug_payload_metrics: Not used here.
    """

    num_prompts_per_step: int = 32
    num_generations_per_prompt: int = 16
    max_num_epochs: int = 1
    max_num_steps: int = 1000000
    max_rollout_turns: int = 1
    normalize_rewards: bool = True
    advantage_clip_low: float | None = None
    advantage_clip_high: float | None = None
    use_leave_one_out_baseline: bool = True
    val_period: int = 10
    val_start_at: int = -1
    val_batch_size: int | None = 256
    val_at_start: bool = False
    val_at_end: bool = False
    max_val_samples: int | None = 256
    val_num_generations_per_prompt: int = 1
    stop_at_validation_metric: str | None = None
    stop_at_validation_threshold: float | None = None
    skip_reference_policy_logprobs_calculation: bool = False
    seed: int = 42
    async_grpo: AsyncGRPOConfig | None = Field(default_factory=AsyncGRPOConfig)
    overlong_filtering: bool = False
    use_dynamic_sampling: bool = False
    dynamic_sampling_max_gen_batches: int = 10
    batch_multiplier: float = 1.0
    reward_shaping: RewardShapingConfig = Field(default_factory=RewardShapingConfig)
    reward_scaling: RewardScalingConfig = Field(default_factory=RewardScalingConfig)
    calculate_advantages_on_gpu: bool = False
    seq_logprob_error_threshold: float | None = None
    invalid_tool_call_advantage: float | None = None
    malformed_thinking_advantage: float | None = None
    adv_estimator: AdvEstimatorConfig = Field(default_factory=AdvEstimatorConfig)
    deduplicate_multimodal_data: bool = False
    debug_payload_metrics: bool = False


def scale_rewards(
    repeated_batch: BatchedDataDict, reward_scaling_cfg: RewardScalingConfig
) -> BatchedDataDict:
    """Maps rewards linearly from one interval to another, in place; what is outside is clamped.

    Args:
        repeated_batch: ``total_reward`` (B,) and, if there are any, components ``reward/<name>``.
        reward_scaling_cfg: The two intervals.

    Returns:
        The same batch.

    Raises:
        ValueError: If the source interval is empty.

    Example:
        >>> batch = BatchedDataDict({"total_reward": torch.tensor([0.0, 0.5, 1.0])})
        >>> cfg = RewardScalingConfig(enabled=True, target_min=-1.0)
        >>> scale_rewards(batch, cfg)["total_reward"]
        tensor([-1.,  0.,  1.])
    """
    cfg = reward_scaling_cfg
    if not cfg.enabled:
        return repeated_batch
    if not cfg.source_min < cfg.source_max:
        raise ValueError(
            f"reward_scaling.source_max is {cfg.source_max}, expected more than source_min, "
            f"which is {cfg.source_min}"
        )
    rewards = repeated_batch["total_reward"]
    outside = int(((rewards < cfg.source_min) | (rewards > cfg.source_max)).sum())
    if outside:
        print(
            f"[WARNING]: reward_scaling: {outside} of {len(rewards)} rewards are outside "
            f"[{cfg.source_min}, {cfg.source_max}] and are clamped to it"
        )
    for key in ("total_reward", *get_gdpo_reward_component_keys(repeated_batch)):
        unit = repeated_batch[key].clamp(cfg.source_min, cfg.source_max) - cfg.source_min
        unit = unit / (cfg.source_max - cfg.source_min)
        repeated_batch[key] = cfg.target_min + unit * (cfg.target_max - cfg.target_min)
    return repeated_batch


def dynamic_sampling(
    repeated_batch: BatchedDataDict,
    std: torch.Tensor,
    baseline: torch.Tensor,
    dynamic_sampling_num_gen_batches: int,
    master_config: Any,
    timer: Any,
    batch_cache: Optional[BatchedDataDict] = None,
) -> tuple[BatchedDataDict, bool, Optional[BatchedDataDict], dict[str, Any]]:
    """Keeps the responses whose group has different rewards, until there are enough for a step.

    A group whose rewards are all the same has advantage 0. With a leave-one-out baseline the
    standard deviation differs within a group, so that single responses can be dropped: of rewards
    [1, 0, 0, 0] the first, whose others are the same. That is as in NeMo RL.

    Source: Yu et al. (2025), https://arxiv.org/abs/2503.14476 (DAPO), Section 3.2.

    Args:
        repeated_batch: The responses just generated, with ``total_reward`` (B,).
        std: (B,), of the rewards in each response's group.
        baseline: (B,), likewise.
        dynamic_sampling_num_gen_batches: Batches generated for this step, with this one.
        master_config: Its attribute ``grpo`` is a `GRPOConfig`.
        timer: Its ``time(name)`` is a context manager.
        batch_cache: What was kept of the batches before; None for nothing.

    Returns:
        The responses to train on; whether they are enough; the new cache; and, if they are enough,
        the metric ``dynamic_sampling_num_discarded_valid_samples``. With filtering, the rewards of
        the kept responses are under ``filtered_reward`` and those of all under ``total_reward``,
        cut to the same number of rows.

    Raises:
        ValueError: If there are not enough after ``dynamic_sampling_max_gen_batches``.

    Example:
        Of two groups of two, the second has the same reward twice and is dropped:

        >>> from contextlib import nullcontext
        >>> from types import SimpleNamespace
        >>> grpo = GRPOConfig(num_prompts_per_step=1, num_generations_per_prompt=2)
        >>> grpo.use_dynamic_sampling = True
        >>> batch = BatchedDataDict({"total_reward": torch.tensor([1.0, 0.0, 1.0, 1.0])})
        >>> std = torch.tensor([0.7, 0.7, 0.0, 0.0])
        >>> timer = SimpleNamespace(time=nullcontext)
        >>> kept, enough, *_ = dynamic_sampling(
        ...     batch, std, std, 1, SimpleNamespace(grpo=grpo), timer
        ... )
        >>> kept["filtered_reward"], enough
        (tensor([1., 0.]), True)
    """
    cfg = master_config.grpo
    repeated_batch["baseline"], repeated_batch["std"] = baseline, std
    if not cfg.use_dynamic_sampling:
        return repeated_batch, True, batch_cache, {}
    needed = cfg.num_prompts_per_step * cfg.num_generations_per_prompt
    with timer.time("dynamic_sampling"):
        kept = repeated_batch.select_indices((std != 0).nonzero().squeeze(-1).tolist())
        kept["filtered_reward"] = kept["total_reward"]
        kept["total_reward"] = repeated_batch["total_reward"]
        if len(kept["filtered_reward"]):
            batch_cache = (
                kept if batch_cache is None else BatchedDataDict.from_batches([batch_cache, kept])
            )
        found = 0 if batch_cache is None else len(batch_cache["filtered_reward"])
        if batch_cache is not None and found >= needed:
            metrics = {"dynamic_sampling_num_discarded_valid_samples": found - needed}
            return batch_cache.slice(0, needed), True, batch_cache, metrics
        if dynamic_sampling_num_gen_batches > cfg.dynamic_sampling_max_gen_batches:
            raise ValueError(
                f"dynamic_sampling_max_gen_batches: {cfg.dynamic_sampling_max_gen_batches} batches "
                f"gave {found} responses in groups with different rewards, {needed} are needed; "
                "take prompts that are neither too easy nor too hard, or raise it, "
                "num_generations_per_prompt or batch_multiplier"
            )
        return (kept if batch_cache is None else batch_cache), False, batch_cache, {}


def compute_and_apply_seq_logprob_error_masking(
    train_data: BatchedDataDict,
    rewards: torch.Tensor,
    seq_logprob_error_threshold: Optional[float],
) -> dict[str, float]:
    """Measures how far trainer and sampler disagree on each response, and drops the worst.

    The error of a response is the mean over its tokens of exp(abs(log π_old - log π_gen)), which
    is 1 where the two agree. A response without tokens that count has none.

    Args:
        train_data: ``token_mask``, ``prev_logprobs`` and ``generation_logprobs`` (B, S),
            ``sample_mask`` (B,). The last is replaced if a threshold is given.
        rewards: (B,), to tell how many of the dropped responses had reward 1.
        seq_logprob_error_threshold: Largest error that is kept; None to measure only.

    Returns:
        ``max_``, ``mean_`` and ``min_seq_mult_prob_error``, the same three with ``_after_mask``,
        ``num_masked_seqs``, and ``masked_correct_pct``, the share of these with reward 1, 0 to 1.

    Example:
        The trainer finds the second response half as likely as the sampler did:

        >>> data = BatchedDataDict({"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)})
        >>> data["prev_logprobs"] = torch.tensor([[0.0, -1.0], [0.0, -1.7]])
        >>> data["generation_logprobs"] = torch.tensor([[0.0, -1.0], [0.0, -1.0]])
        >>> metrics = compute_and_apply_seq_logprob_error_masking(data, torch.ones(2), 1.5)
        >>> data["sample_mask"], round(metrics["max_seq_mult_prob_error"], 2)
        (tensor([1., 0.]), 2.01)
    """
    sample_mask = train_data["sample_mask"]
    mask = train_data["token_mask"][:, 1:] * sample_mask.unsqueeze(-1)
    gap = train_data["generation_logprobs"][:, 1:] - train_data["prev_logprobs"][:, 1:]
    tokens = mask.sum(-1)
    errors = ((gap.abs() * mask).exp() * mask).sum(-1) / tokens.clamp(min=1)

    kept = sample_mask
    if seq_logprob_error_threshold is not None:
        kept = (errors <= seq_logprob_error_threshold).float() * sample_mask
        train_data["sample_mask"] = kept
    dropped = (sample_mask - kept).bool()
    correct = (rewards.view(-1)[dropped] == 1).float()
    return {
        **_extent("seq_mult_prob_error", errors[tokens > 0], ""),
        **_extent("seq_mult_prob_error", errors[(tokens > 0) & kept.bool()], "_after_mask"),
        "num_masked_seqs": int(dropped.sum()),
        "masked_correct_pct": correct.mean().item() if len(correct) else 0.0,
    }


def _extent(name: str, values: torch.Tensor, suffix: str) -> dict[str, float]:
    parts = ("max", "mean", "min")
    return {
        f"{part}_{name}{suffix}": getattr(values, part)().item() if len(values) else 0.0
        for part in parts
    }
