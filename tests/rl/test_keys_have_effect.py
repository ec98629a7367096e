# SPDX-License-Identifier: Apache-2.0
"""Every key that GRPO reads: it is changed, and what two steps come to is different."""

import functools
import json

import pytest
import torch
from rl_runs import settings

from nemo_rl_ref.config.settings import used_keys
from nemo_rl_ref.rl.settings import GRPOSettings
from nemo_rl_ref.rl.trainer import RLTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

#: In both runs: two updates a step, and steps so large that the second is off-policy.
COMMON = {
    "policy.train_global_batch_size": 8,
    "policy.train_micro_batch_size": 8,
    "policy.optimizer.kwargs.lr": 0.003,
    "policy.generation.max_new_tokens": 4,
}
OFF = {"loss_fn.use_importance_sampling_correction": True}
KL = {"loss_fn.reference_policy_kl_penalty": 0.1}
SCALING = {"grpo.reward_scaling.enabled": True}
SHAPING = {
    "grpo.reward_shaping.enabled": True,
    "grpo.reward_shaping.overlong_buffer_length": 3,
    "grpo.reward_shaping.overlong_buffer_penalty": 1.0,
    "grpo.reward_shaping.max_response_length": 4,
}
TIS = {
    **OFF,
    "loss_fn.truncated_importance_sampling_type": "tis",
    "loss_fn.truncated_importance_sampling_ratio": 2.0,
}
ICEPOP = {
    **TIS,
    "loss_fn.truncated_importance_sampling_type": "icepop",
    "loss_fn.truncated_importance_sampling_ratio_min": 0.0,
}
RPP = {"grpo.adv_estimator.name": "reinforce_plus_plus"}

#: By key: another value, and what both runs have besides.
CHANGED = {
    "grpo.adv_estimator.minus_baseline": (False, RPP),
    "grpo.adv_estimator.name": ("reinforce_plus_plus", {}),
    "grpo.adv_estimator.normalize_rewards": (False, {}),
    "grpo.adv_estimator.use_leave_one_out_baseline": (False, {}),
    "grpo.advantage_clip_high": (0.1, {}),
    "grpo.advantage_clip_low": (-0.1, {}),
    "grpo.batch_multiplier": (2.0, {"grpo.use_dynamic_sampling": True}),
    "grpo.num_generations_per_prompt": (6, {}),
    "grpo.num_prompts_per_step": (6, {}),
    "grpo.overlong_filtering": (True, {}),
    "grpo.reward_scaling.enabled": (True, {"grpo.reward_scaling.target_max": 2.0}),
    "grpo.reward_scaling.source_max": (2.0, SCALING),
    "grpo.reward_scaling.source_min": (-2.0, SCALING),
    "grpo.reward_scaling.target_max": (2.0, SCALING),
    "grpo.reward_scaling.target_min": (-2.0, SCALING),
    "grpo.reward_shaping.enabled": (False, SHAPING),
    "grpo.reward_shaping.max_response_length": (5, SHAPING),
    "grpo.reward_shaping.overlong_buffer_length": (2, SHAPING),
    "grpo.reward_shaping.overlong_buffer_penalty": (3.0, SHAPING),
    "grpo.seed": (8, {}),
    "grpo.use_dynamic_sampling": (True, {}),
    "grpo.use_leave_one_out_baseline": (False, {"grpo.use_dynamic_sampling": True}),
    "loss_fn.disable_ppo_ratio": (True, {}),
    "loss_fn.kl_input_clamp_value": (0.01, KL),
    "loss_fn.kl_output_clamp_value": (0.0001, KL),
    "loss_fn.ratio_clip_c": (1.01, {}),
    "loss_fn.ratio_clip_max": (0.001, {}),
    "loss_fn.ratio_clip_min": (0.001, {"grpo.seed": 9}),
    "loss_fn.reference_policy_kl_penalty": (1.0, {}),
    "loss_fn.reference_policy_kl_type": ("k1", KL),
    "loss_fn.sequence_level_importance_ratios": (True, {"loss_fn.token_level_loss": False}),
    "loss_fn.token_level_loss": (False, {"grpo.seed": 1}),
    "loss_fn.truncated_importance_sampling_ratio": (0.5, TIS),
    "loss_fn.truncated_importance_sampling_ratio_min": (1.5, ICEPOP),
    "loss_fn.truncated_importance_sampling_type": (
        "icepop",
        {
            **ICEPOP,
            "loss_fn.truncated_importance_sampling_type": "tis",
            "loss_fn.truncated_importance_sampling_ratio": 0.5,
        },
    ),
    "loss_fn.use_cispo": (True, {}),
    "loss_fn.use_importance_sampling_correction": (True, {"policy.generation.temperature": 1.0}),
    "loss_fn.use_kl_in_reward": (True, {**KL, **RPP}),
    "loss_fn.use_on_policy_kl_approximation": (True, KL),
    "policy.generation.max_new_tokens": (2, {}),
    "policy.generation.stop_strings": (["1"], {}),
    "policy.generation.stop_token_ids": ([3, 4, 5, 6, 7], {}),
    "policy.generation.temperature": (0.5, {}),
    "policy.generation.top_k": (2, {}),
    "policy.generation.top_p": (0.5, {}),
    "policy.max_grad_norm": (1e-4, {}),
    "policy.optimizer.kwargs": ({"lr": 0.001}, {}),
    "policy.optimizer.name": ("torch.optim.SGD", {"policy.optimizer.kwargs": {"lr": 0.02}}),
    "policy.precision": ("bfloat16", {}),
    "policy.tokenizer.chat_template": ("{{ messages[0]['content'] }} ", {}),
    "policy.train_global_batch_size": (16, {}),
}


#: Keys that act where the rewards of a group are all the same.
GROUPS_ALIKE = {"grpo.use_dynamic_sampling", "grpo.use_leave_one_out_baseline"}

#: Read, too; by a key or the section that it is in, where its effect is seen, or why it has none.
ELSEWHERE = {
    "checkpointing": "tests/utils/test_checkpoint.py, tests/training/test_resume.py",
    "data": "tests/data, tests/training/test_samples.py",
    "grpo.async_grpo": "must be off",
    "grpo.calculate_advantages_on_gpu": "where it is computed",
    "grpo.debug_payload_metrics": "must be off",
    "grpo.deduplicate_multimodal_data": "text has nothing of it",
    "grpo.adv_estimator.reward_weights": "test_gdpo_takes_components",
    "grpo.dynamic_sampling_max_gen_batches": "test_dynamic_sampling",
    "grpo.invalid_tool_call_advantage": "must be off",
    "grpo.malformed_thinking_advantage": "must be off",
    "grpo.max_num_epochs": "test_epochs_end_and_begin",
    "grpo.max_num_steps": "test_a_run_logs_validates_and_saves",
    "grpo.max_rollout_turns": "must be 1",
    "grpo.max_val_samples": "test_validation_without_a_number_takes_all_prompts",
    "grpo.normalize_rewards": "read by grpo.adv_estimator in NeMo RL's files",
    "grpo.reward_shaping.stop_properly_penalty_coef": "test_stop_properly",
    "grpo.seq_logprob_error_threshold": "test_seq_logprob_errors",
    "grpo.skip_reference_policy_logprobs_calculation": "what is not needed is never computed",
    "grpo.stop_at_validation_metric": "test_early_stop",
    "grpo.stop_at_validation_threshold": "test_early_stop",
    "grpo.val_at_end": "tests/training/test_keys_have_effect.py",
    "grpo.val_at_start": "tests/training/test_keys_have_effect.py",
    "grpo.val_batch_size": "how many at once",
    "grpo.val_num_generations_per_prompt": "test_a_run_logs_validates_and_saves",
    "grpo.val_period": "tests/training/test_keys_have_effect.py",
    "grpo.val_start_at": "tests/training/test_keys_have_effect.py",
    "logger": "tests/utils/test_logger.py",
    "loss_fn.force_on_policy_ratio": "tests/algorithms/test_clipped_pg.py",
    "loss_fn.positive_example_nll_weight": "only in PPO, a warning says so",
    "on_policy_distillation": "test_every_estimator_and_loss",
    "policy.generation.val_temperature": "tests/training/test_keys_have_effect.py",
    "policy.generation.val_top_k": "tests/rl/test_generate.py",
    "policy.generation.val_top_p": "tests/rl/test_generate.py",
    "policy.generation_batch_size": "how many at once",
    "policy.logprob_batch_size": "how many at once",
    "policy.make_sequence_length_divisible_by": "test_batches_are_padded_on_the_right",
    "policy.max_total_sequence_length": "test_no_room",
    "policy.model_name": "tests/training/test_dropout.py",
    "policy.scheduler": "test_the_learning_rate_follows_the_schedule",
    "policy.tokenizer.chat_template_kwargs": "tests/algorithms/test_utils.py",
    "policy.tokenizer.name": "tests/training/test_models.py",
    "policy.train_micro_batch_size": "test_several_updates_and_micro_batches: none",
}


def reward(prompt, response, truth):
    """A reward from 0 to 1 that differs within every group."""
    return 1 / (1 + abs(int(response) - int(truth))) if response.isdigit() else 0.1 * len(response)


def one_or_zero(prompt, response, truth):
    """A reward that many groups have in common."""
    return float(response.isdigit() and int(response) % 2 == 0)


@functools.cache
def outcome(changes, folder, environment):
    """Metrics of two steps and the weights after them; changes are JSON."""
    trainer = RLTrainer(settings(folder, json.loads(changes)), environment=environment)
    state = dict.fromkeys(trainer.counters, 0)
    metrics = []
    for _ in range(2):
        metrics.append({k: v for k, v in trainer.next_step(state).items() if v == v})
        state["total_steps"] += 1
    weights = [p.detach().double().abs().sum().item() for p in trainer.policy.model.parameters()]
    return metrics, torch.tensor(weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.mark.parametrize("key", CHANGED)
def test_another_value_is_another_run(key, folder):
    value, besides = CHANGED[key]
    plain = {**COMMON, **besides}
    environment = one_or_zero if key in GROUPS_ALIKE else reward
    (first, weights), (second, other) = (
        outcome(json.dumps(changes), folder, environment)
        for changes in (plain, {**plain, key: value})
    )
    assert first != second
    assert not torch.equal(weights, other)


def test_every_key_that_is_read_is_in_a_table():
    """A new key needs a line in `CHANGED`, or in `ELSEWHERE` with the reason."""
    left = set(used_keys(GRPOSettings)) - set(CHANGED)
    sections = tuple(f"{name}." for name in ELSEWHERE)
    assert (
        sorted(key for key in left if key not in ELSEWHERE and not key.startswith(sections)) == []
    )
    assert sorted(set(CHANGED) - set(used_keys(GRPOSettings))) == []
