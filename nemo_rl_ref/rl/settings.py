# SPDX-License-Identifier: Apache-2.0
"""What GRPO and PPO read of a configuration, checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_ref.algorithms import advantage_estimator as estimators
from nemo_rl_ref.algorithms.grpo import GRPOConfig
from nemo_rl_ref.algorithms.logits_sampling_utils import TrainingSamplingParams
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.algorithms.ppo import PPOConfig
from nemo_rl_ref.config.lists import NOT_HERE

#: Keys that :mod:`nemo_rl_ref.rl.trainer` reads besides those of every trainer.
USED_KEYS = (
    *(f"grpo.{name}" for name in GRPOConfig.model_fields),
    *(f"ppo.{name}" for name in PPOConfig.model_fields),
    "loss_fn", "value_loss_fn", "policy.logprob_batch_size", "policy.generation_batch_size",
    "policy.max_total_sequence_length", "policy.generation.max_new_tokens",
    "policy.generation.temperature", "policy.generation.top_p", "policy.generation.top_k",
    "policy.generation.val_temperature", "policy.generation.val_top_p",
    "policy.generation.val_top_k", "policy.generation.stop_token_ids",
    "policy.generation.stop_strings", "value.model_name", "value.train_global_batch_size",
    "value.train_micro_batch_size", "value.max_grad_norm", "value.optimizer", "value.scheduler",
    "on_policy_distillation.enabled", "on_policy_distillation.teacher_model_by_agent_name",
)  # fmt: skip

#: As for every trainer, but with on-policy distillation from one teacher.
NOT_HERE_IN_RL = {
    key: what for key, what in NOT_HERE.items() if key != "on_policy_distillation.enabled"
}

ESTIMATORS = {
    "grpo": {
        "grpo": estimators.GRPOAdvantageEstimator,
        "gdpo": estimators.GDPOAdvantageEstimator,
        "reinforce_plus_plus": estimators.ReinforcePlusPlusAdvantageEstimator,
        "opd": estimators.OPDAdvantageEstimator,
    },
    "ppo": {
        "gae": estimators.GeneralizedAdvantageEstimator,
        "raw_reward": estimators.RawRewardAdvantageEstimator,
    },
}


def section_name(config: Mapping[str, Any]) -> str:
    """``ppo`` if the configuration has such a section, else ``grpo``.

    Raises:
        ValueError: If it has neither.
    """
    for name in ("ppo", "grpo"):
        if name in config:
            return name
    raise ValueError("the configuration has neither a section grpo nor a section ppo")


def read_settings(config: Mapping[str, Any], ranks: int = 1) -> GRPOConfig | PPOConfig:
    """Read the section ``grpo`` or ``ppo``, and check it together with the others.

    Args:
        config: The whole configuration, a plain dict.
        ranks: Number of processes.

    Returns:
        The section, with NeMo RL's defaults for what is not set.

    Raises:
        ValueError: If settings contradict each other or are not implemented. The message names
            the key.
    """
    name = section_name(config)
    cfg = (PPOConfig if name == "ppo" else GRPOConfig)(**config[name])
    loss = ClippedPGLossConfig(**config["loss_fn"])
    rows = cfg.num_prompts_per_step * cfg.num_generations_per_prompt
    batch = config["policy"]["train_global_batch_size"]
    multiplier, validates = cfg.batch_multiplier, uses_validation(cfg)
    is_async = getattr(getattr(cfg, f"async_{name}"), "enabled", False)  # None counts as off
    stops = getattr(cfg, "stop_at_validation_metric", None) is not None
    kl = loss.reference_policy_kl_penalty
    on_policy = not loss.force_on_policy_ratio or updates_per_step(config, cfg) == 1
    skips = cfg.skip_reference_policy_logprobs_calculation
    checks = [
        (rows > 0 and rows % batch == 0, "policy.train_global_batch_size", batch,
         f"a divisor of num_prompts_per_step * num_generations_per_prompt, which is {rows}"),
        (batch % ranks == 0, "policy.train_global_batch_size", batch,
         f"a multiple of the {ranks} processes"),
        (cfg.max_rollout_turns == 1, f"{name}.max_rollout_turns", cfg.max_rollout_turns,
         "1: a response ends the episode"),
        (not is_async, f"{name}.async_{name}.enabled", True,
         "false: rollouts and training take turns here"),
        (name == "grpo" or not cfg.use_dynamic_sampling, "ppo.use_dynamic_sampling", True,
         "false: NeMo RL's PPO does not read it"),
        (cfg.use_dynamic_sampling or multiplier == 1, f"{name}.batch_multiplier", multiplier,
         "1 without use_dynamic_sampling"),
        (not validates or cfg.max_val_samples >= cfg.val_batch_size, f"{name}.max_val_samples",
         cfg.max_val_samples, f"at least val_batch_size, which is {cfg.val_batch_size}"),
        (not stops or cfg.stop_at_validation_threshold is not None,
         f"{name}.stop_at_validation_threshold", None, "a number: a metric to stop at is set"),
        (on_policy, "loss_fn.force_on_policy_ratio", True,
         f"false: a step makes {updates_per_step(config, cfg)} updates"),
        (not (skips and kl), f"{name}.skip_reference_policy_logprobs_calculation", True,
         f"false with loss_fn.reference_policy_kl_penalty {kl}"),
        *((getattr(cfg, key, None) is None, f"{name}.{key}", getattr(cfg, key, None),
           "null: NeMo Gym is not here")
          for key in ("invalid_tool_call_advantage", "malformed_thinking_advantage")),
    ]  # fmt: skip
    for fine, key, got, expected in checks:
        if not fine:
            raise ValueError(f"{key}: got {got!r}, expected {expected}")
    if name == "grpo" and loss.positive_example_nll_weight:
        warnings.warn(
            "loss_fn.positive_example_nll_weight: without effect in GRPO, as in NeMo RL, which "
            "hands no rewards to the loss there",
            stacklevel=2,
        )
    return cfg


def updates_per_step(config: Mapping[str, Any], cfg: GRPOConfig | PPOConfig) -> int:
    """Optimizer steps of the policy for one batch of rollouts."""
    rows = cfg.num_prompts_per_step * cfg.num_generations_per_prompt
    batches = rows // config["policy"]["train_global_batch_size"]
    return batches * getattr(cfg, "ppo_epochs", 1)


def uses_validation(cfg: GRPOConfig | PPOConfig) -> bool:
    """Whether a run validates at any time."""
    return bool(cfg.val_period > 0 or cfg.val_at_start or cfg.val_at_end)


def check_prompts(
    cfg: GRPOConfig | PPOConfig, training: Sequence[Any], validation: Sequence[Any]
) -> None:
    """Check that there are prompts enough for a step, and some to validate on where that is set.

    Raises:
        ValueError: If there are not. The message names the key.
    """
    needed = int(cfg.num_prompts_per_step * cfg.batch_multiplier)
    if len(training) < needed:
        raise ValueError(
            f"data.train: {len(training)} prompts, expected at least the {needed} of one step"
        )
    if uses_validation(cfg) and not validation:
        raise ValueError(
            "data.validation: not set, expected a dataset, or val_period=0, val_at_start=false "
            "and val_at_end=false"
        )


def make_estimator(config: Mapping[str, Any], cfg: GRPOConfig | PPOConfig) -> Any:
    """The advantage estimator that ``adv_estimator.name`` asks for.

    Raises:
        ValueError: If there is none of that name.
    """
    section, settings = section_name(config), cfg.adv_estimator
    name = settings["name"] if section == "ppo" else settings.name
    if name not in ESTIMATORS[section]:
        raise ValueError(
            f"{section}.adv_estimator.name: got {name!r}, expected "
            f"{' or '.join(ESTIMATORS[section])}"
        )
    return ESTIMATORS[section][name](settings, ClippedPGLossConfig(**config["loss_fn"]))


def sampling_params(generation: Mapping[str, Any], prefix: str = "") -> TrainingSamplingParams:
    """How responses are sampled; with the prefix ``val_``, in validation.

    NeMo RL's validation uses the ``val_`` settings only with NeMo Gym; here it always does.
    """

    def value(key: str, default: Any) -> Any:
        found = generation.get(prefix + key, generation.get(key))
        return default if found is None else found

    return TrainingSamplingParams(
        top_k=value("top_k", None), top_p=value("top_p", 1.0), temperature=value("temperature", 1.0)
    )


def teacher_name(config: Mapping[str, Any]) -> str:
    """The teacher of on-policy distillation.

    Raises:
        ValueError: If distillation is off or has other than one teacher.
    """
    section = config.get("on_policy_distillation") or {}
    names = set((section.get("teacher_model_by_agent_name") or {}).values())
    if not section.get("enabled") or len(names) != 1:
        raise ValueError(
            "on_policy_distillation: grpo.adv_estimator.name 'opd' needs enabled: true and the "
            f"same teacher for all of teacher_model_by_agent_name, got {sorted(names)}"
        )
    return names.pop()
