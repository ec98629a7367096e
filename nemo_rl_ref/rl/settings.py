# SPDX-License-Identifier: Apache-2.0
"""The settings of GRPO and PPO, read and checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from nemo_rl_ref.algorithms import advantage_estimator as estimators
from nemo_rl_ref.algorithms.grpo import GRPOConfig
from nemo_rl_ref.algorithms.logits_sampling_utils import TrainingSamplingParams
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, MseValueLossConfig
from nemo_rl_ref.algorithms.ppo import PPOConfig
from nemo_rl_ref.config.lists import NOT_HERE
from nemo_rl_ref.config.sections import (
    GenerationConfig,
    OnPolicyDistillationConfig,
    RunSettings,
    SampledPolicyConfig,
    ValueConfig,
)
from nemo_rl_ref.config.settings import Section, read_settings
from nemo_rl_ref.training.optimizers import check_optimizer


class GRPOSettings(RunSettings):
    """The settings of GRPO."""

    algorithm = "grpo"

    policy: SampledPolicyConfig
    loss_fn: ClippedPGLossConfig
    on_policy_distillation: OnPolicyDistillationConfig | None = None
    grpo: GRPOConfig


class ValueEstimatorConfig(Section):
    """``ppo.adv_estimator``, which is a dict in `PPOConfig`; what is not given stays out of it."""

    name: str
    gae_lambda: float = 0.95
    gae_gamma: float = 1.0
    normalize_advantages: bool = True
    gae_lambda_value: float | None = None
    gae_lambda_policy: float | None = None
    length_adaptive_alpha: float = 0.0


class TypedPPOConfig(PPOConfig):
    """``ppo``."""

    adv_estimator: ValueEstimatorConfig = Field(
        default_factory=lambda: ValueEstimatorConfig(**PPOConfig().adv_estimator)
    )


class PPOSettings(RunSettings):
    """The settings of PPO."""

    algorithm = "ppo"

    policy: SampledPolicyConfig
    loss_fn: ClippedPGLossConfig
    value: ValueConfig
    value_loss_fn: MseValueLossConfig
    ppo: TypedPPOConfig


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


#: What NumPy's generator does not take any more.
_SEEDS_END = 2**32

#: More responses than this at once are a slip of the finger: each is a row of every tensor.
_MOST_ROWS = 2**20

#: The least that numbers of ``grpo`` and ``ppo`` may be; NeMo RL's classes have no bounds.
_LEAST = {
    "num_prompts_per_step": 1, "num_generations_per_prompt": 1, "max_num_epochs": 1,
    "max_num_steps": 1, "val_period": -1, "val_start_at": -1, "val_batch_size": 1,
    "max_val_samples": 1, "val_num_generations_per_prompt": 1, "seed": 0,
    "dynamic_sampling_max_gen_batches": 1, "ppo_epochs": 1, "policy_training_start_step": 0,
}  # fmt: skip


def read_rl_settings(config: Mapping[str, Any]) -> GRPOSettings | PPOSettings:
    """Read a configuration: PPO's if it has a section ``ppo``, else GRPO's.

    Args:
        config: The whole configuration, a plain dict.

    Returns:
        The settings, with NeMo RL's defaults for what is not set.

    Raises:
        ValueError: If a setting cannot be used, or settings contradict each other. The message
            names the key.
    """
    settings = read_settings(config, PPOSettings, GRPOSettings)
    _check_section(settings)
    _check_together(settings)
    # With stacklevel 1, so that a run that reads its settings in two places is told once.
    for warning in _nothing_to_compare(settings):
        warnings.warn(f"{warning}: rewards teach nothing, as in NeMo RL", stacklevel=1)
    check_optimizer(settings.policy, "policy")
    if isinstance(settings, PPOSettings):
        check_optimizer(settings.value, "value")
    elif settings.loss_fn.positive_example_nll_weight:
        warnings.warn(
            "loss_fn.positive_example_nll_weight: without effect in GRPO, as in NeMo RL, which "
            "hands no rewards to the loss there",
            stacklevel=1,
        )
    return settings


def _check_section(settings: GRPOSettings | PPOSettings) -> None:
    """Check the section ``grpo`` or ``ppo`` by itself."""
    name, cfg = settings.algorithm, settings.section
    for key, least in _LEAST.items():
        value = getattr(cfg, key, None)
        if value is not None and not least <= value < 2**63:
            end = "" if value < least else f" and below {2**63}"
            raise ValueError(f"{name}.{key}: got {value}, expected an integer from {least} on{end}")
    multiplier, validates = cfg.batch_multiplier, uses_validation(cfg)
    is_async = getattr(getattr(cfg, f"async_{name}"), "enabled", False)  # None counts as off
    stops = getattr(cfg, "stop_at_validation_metric", None) is not None
    checks = [
        (multiplier > 0, "batch_multiplier", multiplier, "a number above 0"),
        (cfg.max_rollout_turns == 1, "max_rollout_turns", cfg.max_rollout_turns,
         "1: a response ends the episode"),
        (not is_async, f"async_{name}.enabled", True,
         "false: rollouts and training take turns here"),
        (name == "grpo" or not cfg.use_dynamic_sampling, "use_dynamic_sampling", True,
         "false: NeMo RL's PPO does not read it"),
        (cfg.use_dynamic_sampling or multiplier == 1, "batch_multiplier", multiplier,
         "1 without use_dynamic_sampling"),
        (cfg.seed < _SEEDS_END, "seed", cfg.seed, f"an integer from 0 and below {_SEEDS_END}"),
        (not validates or cfg.max_val_samples is None
         or cfg.max_val_samples >= (cfg.val_batch_size or 0), "max_val_samples",
         cfg.max_val_samples,
         f"at least val_batch_size, which is {cfg.val_batch_size}"),
        (not stops or cfg.stop_at_validation_threshold is not None,
         "stop_at_validation_threshold", None, "a number: a metric to stop at is set"),
        *((getattr(cfg, key, None) is None, key, getattr(cfg, key, None),
           "null: NeMo Gym is not here")
          for key in ("invalid_tool_call_advantage", "malformed_thinking_advantage")),
    ]  # fmt: skip
    for fine, key, got, expected in checks:
        if not fine:
            raise ValueError(f"{name}.{key}: got {got!r}, expected {expected}")


def _nothing_to_compare(settings: GRPOSettings | PPOSettings) -> Iterator[str]:
    """The settings with which all responses of a group have the same reward, as GRPO compares."""
    estimator = settings.section.adv_estimator
    compares = estimator.name in ("grpo", "gdpo")
    compares |= estimator.name == "reinforce_plus_plus" and estimator.minus_baseline
    if not compares or isinstance(settings, PPOSettings):
        return
    generation = settings.policy.generation
    if settings.section.num_generations_per_prompt == 1:
        yield "grpo.num_generations_per_prompt: got 1, and a response has no other to compare with"
    for key, same in (("temperature", 0), ("top_k", 1)):
        if (value := getattr(generation, key)) == same:
            yield f"policy.generation.{key}: got {value}, and the responses to a prompt are equal"


def _check_together(settings: GRPOSettings | PPOSettings) -> None:
    """Check that ``grpo`` or ``ppo``, ``policy`` and ``loss_fn`` fit each other."""
    name, cfg, loss = settings.algorithm, settings.section, settings.loss_fn
    rows = cfg.num_prompts_per_step * cfg.num_generations_per_prompt
    batch, updates = settings.policy.train_global_batch_size, updates_per_step(settings)
    kl = loss.reference_policy_kl_penalty
    val_copies = getattr(cfg, "val_num_generations_per_prompt", 1)
    sizes = {"policy": batch}
    if isinstance(settings, PPOSettings) and cfg.adv_estimator.name == "gae":
        sizes["value"] = settings.value.train_global_batch_size
    checks = [
        (rows <= _MOST_ROWS, f"{name}.num_generations_per_prompt", cfg.num_generations_per_prompt,
         f"at most {_MOST_ROWS} responses a step, and they are {rows}"),
        (val_copies <= _MOST_ROWS, f"{name}.val_num_generations_per_prompt", val_copies,
         f"at most {_MOST_ROWS}"),
        *((rows % size == 0, f"{key}.train_global_batch_size", size,
           f"a divisor of num_prompts_per_step * num_generations_per_prompt, which is {rows}")
          for key, size in sizes.items()),
        (not loss.force_on_policy_ratio or updates == 1, "loss_fn.force_on_policy_ratio", True,
         f"false: a step makes {updates} updates"),
        (not (cfg.skip_reference_policy_logprobs_calculation and kl),
         f"{name}.skip_reference_policy_logprobs_calculation", True,
         f"false with loss_fn.reference_policy_kl_penalty {kl}"),
    ]  # fmt: skip
    for fine, key, got, expected in checks:
        if not fine:
            raise ValueError(f"{key}: got {got!r}, expected {expected}")


def updates_per_step(settings: GRPOSettings | PPOSettings) -> int:
    """Optimizer steps of the policy for one batch of rollouts."""
    cfg = settings.section
    rows = cfg.num_prompts_per_step * cfg.num_generations_per_prompt
    batches = rows // settings.policy.train_global_batch_size
    return batches * getattr(cfg, "ppo_epochs", 1)


def uses_validation(cfg: GRPOConfig | PPOConfig) -> bool:
    """Whether a run validates at any time."""
    return bool(cfg.val_period > 0 or cfg.val_at_start or cfg.val_at_end)


def make_loss(kind: Any, section: Any, key: str) -> Any:
    """Make a loss of its section.

    Raises:
        ValueError: If it refuses the section. The message names the key.
    """
    try:
        return kind(section)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error


def check_processes(settings: GRPOSettings | PPOSettings, ranks: int) -> None:
    """Check that the processes can share a batch.

    Raises:
        ValueError: If they cannot. The message names the key.
    """
    batch = settings.policy.train_global_batch_size
    if batch % ranks:
        raise ValueError(
            f"policy.train_global_batch_size: got {batch}, expected a multiple of the {ranks} "
            "processes"
        )


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
    if not any(prompt.weight for prompt in training):
        raise ValueError(
            f"data.train: all {len(training)} prompts are longer than data.max_input_seq_length; "
            "raise it, there is nothing to learn from"
        )
    if uses_validation(cfg) and not validation:
        raise ValueError(
            "data.validation: not set, expected a dataset, or val_period=0, val_at_start=false "
            "and val_at_end=false"
        )


def make_estimator(settings: GRPOSettings | PPOSettings) -> Any:
    """Make the advantage estimator that ``adv_estimator.name`` asks for.

    Raises:
        ValueError: If there is none of that name, or it needs another setting.
    """
    section, chosen = settings.algorithm, settings.section.adv_estimator
    name = chosen.name
    if name not in ESTIMATORS[section]:
        raise ValueError(
            f"{section}.adv_estimator.name: got {name!r}, expected "
            f"{' or '.join(ESTIMATORS[section])}"
        )
    # NeMo RL's PPO has these settings as a dict.
    given = chosen.given() if isinstance(settings, PPOSettings) else chosen
    try:
        return ESTIMATORS[section][name](given, settings.loss_fn)
    except KeyError as error:
        raise ValueError(f"{section}.adv_estimator: {error.args[0]}") from error


def sampling_params(
    generation: GenerationConfig,
) -> tuple[TrainingSamplingParams, TrainingSamplingParams]:
    """How responses are sampled in training and in validation.

    NeMo RL's validation uses the ``val_`` settings only with NeMo Gym; here it always does.
    """
    g = generation
    return (
        TrainingSamplingParams(top_k=g.top_k, top_p=g.top_p, temperature=g.temperature),
        TrainingSamplingParams(top_k=g.val_top_k, top_p=g.val_top_p, temperature=g.val_temperature),
    )


def teacher_name(distillation: OnPolicyDistillationConfig | None) -> str:
    """The teacher of on-policy distillation.

    Raises:
        ValueError: If distillation is off or has other than one teacher.
    """
    names = set(distillation.teacher_model_by_agent_name.values()) if distillation else set()
    if not (distillation and distillation.enabled) or len(names) != 1:
        raise ValueError(
            "on_policy_distillation: grpo.adv_estimator.name 'opd' needs enabled: true and the "
            f"same teacher for all of teacher_model_by_agent_name, got {sorted(names)}"
        )
    return names.pop()
