# SPDX-License-Identifier: Apache-2.0
"""Keys of NeMo RL's that do not go together, and the line of its source that refuses them.

Each is an assertion or an error there, most of them after the cluster and the model are set up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Get = Callable[[str], Any]


@dataclass(frozen=True)
class Clash:
    """One combination that NeMo RL refuses.

    Attributes:
        keys: The keys, the one to change first.
        says: What is wrong, to follow the keys and their values.
        file: In NeMo RL.
        line: Of the check.
        holds: Whether a configuration has it, given a function from key to value.
    """

    keys: tuple[str, ...]
    says: str
    file: str
    line: int
    holds: Callable[[Get], Any]


def _both(first: str, second: str, says: str, file: str, line: int) -> Clash:
    """Two switches that must not both be on."""
    return Clash((first, second), says, file, line, lambda get: get(first) and get(second))


def _without(first: str, second: str, says: str, file: str, line: int) -> Clash:
    """A switch that needs another."""
    return Clash((first, second), says, file, line, lambda get: get(first) and not get(second))


_LOSS = "nemo_rl/algorithms/loss/loss_functions.py"
_DPO = "nemo_rl/algorithms/dpo.py"
_GRPO = "nemo_rl/algorithms/grpo.py"
_RUN_GRPO = "examples/run_grpo.py"
_POLICY = "nemo_rl/models/policy/lm_policy.py"
_TIS = "loss_fn.truncated_importance_sampling"
_FUSED = "policy.megatron_cfg.use_fused_linear_logprobs"
_MEGATRON, _DTENSOR = "policy.megatron_cfg.enabled", "policy.dtensor_cfg.enabled"
_PACKING, _DYNAMIC = "policy.sequence_packing.enabled", "policy.dynamic_batching.enabled"
_ASYNC = "grpo.async_grpo.enabled"
_ANSWERS = ("grpo.num_prompts_per_step", "grpo.num_generations_per_prompt")
_BATCH = "policy.train_global_batch_size"

CLASHES: tuple[Clash, ...] = (
    Clash(
        (_DYNAMIC, "dpo"), "DPO keeps pairs together, dynamic batching does not", _DPO, 163,
        lambda get: get("dpo") is not None and get(_DYNAMIC),
    ),
    Clash(
        (_PACKING, "dpo"), "DPO keeps pairs together, sequence packing does not", _DPO, 167,
        lambda get: get("dpo") is not None and get(_PACKING),
    ),
    _both(_MEGATRON, _DTENSOR, "one of the two trains, not both", _POLICY, 121),
    _without("policy.draft.enabled", _MEGATRON, "a draft model needs Megatron", _POLICY, 126),
    _both("policy.draft.enabled", _PACKING, "a draft model needs it off", _POLICY, 131),
    _both("loss_fn.use_cispo", "loss_fn.disable_ppo_ratio", "CISPO needs the ratio", _LOSS, 272),
    _both("loss_fn.use_cispo", "loss_fn.force_on_policy_ratio", "CISPO needs the ratio", _LOSS, 276),
    _both(
        "loss_fn.use_cispo", "loss_fn.sequence_level_importance_ratios",
        "CISPO's weights belong to tokens", _LOSS, 280,
    ),
    _both("loss_fn.use_cispo", "loss_fn.ratio_clip_c", "CISPO has no dual clipping", _LOSS, 284),
    Clash(
        ("loss_fn.use_cispo", "loss_fn.token_level_loss"), "CISPO is a mean over tokens", _LOSS, 289,
        lambda get: get("loss_fn.use_cispo") and get("loss_fn.token_level_loss") is False,
    ),
    _both(
        "loss_fn.sequence_level_importance_ratios", "loss_fn.token_level_loss",
        "ratios of sequences go with a mean over sequences", _LOSS, 266,
    ),
    _without(
        f"{_TIS}_type", "loss_fn.use_importance_sampling_correction",
        "what is truncated is this correction", _LOSS, 293,
    ),
    _without(f"{_TIS}_type", f"{_TIS}_ratio", "it needs its upper bound", _LOSS, 304),
    Clash(
        (f"{_TIS}_ratio_min", f"{_TIS}_type"), "this type needs a lower bound too", _LOSS, 316,
        lambda get: get(f"{_TIS}_type") in ("icepop", "seq-mask-tis")
        and get(f"{_TIS}_ratio_min") is None,
    ),
    Clash(
        ("loss_fn.force_on_policy_ratio", _BATCH, *_ANSWERS),
        "the batch of an update must hold all answers of a step", _GRPO, 701,
        lambda get: get("loss_fn.force_on_policy_ratio")
        and None not in (get(_BATCH), *map(get, _ANSWERS))
        and get(_ANSWERS[0]) * get(_ANSWERS[1]) != get(_BATCH),
    ),
    _both(
        "grpo.skip_reference_policy_logprobs_calculation", "loss_fn.reference_policy_kl_penalty",
        "the penalty needs the reference", _GRPO, 712,
    ),
    Clash(
        ("grpo.batch_multiplier", "grpo.use_dynamic_sampling"),
        "it is for dynamic sampling, and 1 without it", _GRPO, 571,
        lambda get: not get("grpo.use_dynamic_sampling")
        and get("grpo.batch_multiplier") not in (None, 1),
    ),
    Clash(
        (_FUSED, _PACKING), "fused log-probabilities do not know packed sequences", _GRPO, 672,
        lambda get: get("grpo") is not None and get(_FUSED) and get(_MEGATRON) and get(_PACKING),
    ),
    _both(_ASYNC, "grpo.use_dynamic_sampling", "not with asynchronous rollouts", _RUN_GRPO, 186),
    _both(_ASYNC, "grpo.reward_scaling.enabled", "not with asynchronous rollouts", _RUN_GRPO, 190),
    _both(_ASYNC, "grpo.reward_shaping.enabled", "not with asynchronous rollouts", _RUN_GRPO, 194),
    _both(_ASYNC, "data.use_multiple_dataloader", "not with asynchronous rollouts", _RUN_GRPO, 200),
    _without(
        _ASYNC, "loss_fn.use_importance_sampling_correction",
        "what was sampled by an older policy is corrected for", _GRPO, 4127,
    ),
)  # fmt: skip


def find_clashes(config: Mapping[str, Any]) -> Iterator[Clash]:
    """Find the combinations of a configuration that NeMo RL refuses.

    Args:
        config: The configuration, resolved, in plain dictionaries.
    """

    def get(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    yield from (clash for clash in CLASHES if clash.holds(get))
