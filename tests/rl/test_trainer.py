# SPDX-License-Identifier: Apache-2.0
"""GRPO and PPO, whole steps: against the same computed by hand, and with every setting."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from rl_runs import GAE, settings

from nemo_rl_ref import run_grpo, tiny
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.config.sections import OnPolicyDistillationConfig
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.rl.settings import check_processes, read_rl_settings, teacher_name
from nemo_rl_ref.rl.trainer import RLTrainer
from nemo_rl_ref.run_grpo import train
from nemo_rl_ref.training.models import load_value_model, token_values
from nemo_rl_ref.training.samples import Batches
from nemo_rl_ref.training.step import NotFinite, next_token_logprobs
from nemo_rl_ref.upstream import load_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*newly initialized.*")


def batches(trainer, seed=3):
    order = Batches(len(trainer.train_prompts), trainer.batches.batch_size, seed)
    return ([trainer.train_prompts[number] for number in numbers] for numbers in order)


def steps(config, count=2, **options):
    """Metrics of some steps, and the trainer."""
    trainer = RLTrainer(config, **options)
    source = batches(trainer)
    return [trainer.step(source, number) for number in range(count)], trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.model.parameters()])


def dense(prompt, response, truth):
    """A reward that differs within every group: how far the answer is off."""
    return -abs(int(response) - int(truth)) / 100 if response.isdigit() else -2.0


def logged(folder):
    return read_metrics(Path(folder) / "logs")


# One step by hand


@pytest.mark.parametrize("micro", [16, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_step_is_what_it_says(tmp_path, micro, penalty):
    changes = {
        "loss_fn.reference_policy_kl_penalty": penalty,
        "policy.train_micro_batch_size": micro,
        "grpo.adv_estimator": {"use_leave_one_out_baseline": False},
    }
    trainer = RLTrainer(settings(tmp_path, changes), environment=dense)
    # Away from the reference policy, so that the penalty has a gradient.
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.mul_(1.01)
    model = tiny.load_policy()
    model.load_state_dict(trainer.policy.model.state_dict())
    reference = tiny.load_policy().eval()
    seen = {}
    update = trainer.update_policy

    def spy(data):
        seen.update(data)
        return update(data)

    trainer.update_policy = spy
    metrics = trainer.step(batches(trainer), 0)

    ids, mask = seen["input_ids"], seen["token_mask"]
    for row, (start, stop) in enumerate(
        zip(seen["prompt_lengths"], seen["input_lengths"], strict=True)
    ):
        assert mask[row].nonzero().flatten().tolist() == list(range(start, stop))
    with torch.no_grad():
        old, ref = next_token_logprobs(model, seen), next_token_logprobs(reference, seen)
    texts = trainer.tokenizer.batch_decode(ids * mask, skip_special_tokens=True)
    prompts = trainer.tokenizer.batch_decode(ids * (1 - mask), skip_special_tokens=True)
    rewards = torch.tensor(
        [dense("", t, str(eval(p.strip("=")))) for t, p in zip(texts, prompts, strict=True)]
    )
    groups = rewards.view(4, 4)
    deviation = groups - groups.mean(1, keepdim=True)
    advantages = (deviation / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    shown = (advantages.unsqueeze(1) * mask)[mask.bool()]
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert metrics["advantages/mean"] == pytest.approx(shown.mean().item(), abs=1e-4)

    logp = next_token_logprobs(model, seen)
    ratio = (logp - old).exp()
    log_ratio = ref - logp
    kl = (logp - logp.detach()).exp() * (log_ratio.exp() - 1 - log_ratio)
    per_token = -ratio * advantages.unsqueeze(1) + penalty * kl
    loss = (per_token * mask[:, 1:]).sum() / mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-8).step()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=2e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert metrics["kl_penalty"] == pytest.approx(
        ((kl * mask[:, 1:]).sum() / mask.sum()).item() if penalty else 0.0, rel=1e-3
    )
    by_hand = torch.cat([p.detach().flatten() for p in model.parameters()])
    # Adam's first step is the sign of the gradient: where that is 0 up to rounding, it differs.
    assert (by_hand - weights(trainer)).abs().gt(1e-5).float().mean() < 2e-3


def test_prev_logprobs_from_the_update_are_those_computed_before_it(tmp_path):
    config = settings(tmp_path, {"grpo.num_generations_per_prompt": 4})
    first, trainer = steps(config, environment=dense)
    other = RLTrainer(config, environment=dense)
    other.has_dropout = True  # there is none; but now they are computed first
    assert other._prev_logprobs_first and not trainer._prev_logprobs_first
    source = batches(other)
    second = [other.step(source, number) for number in range(2)]
    assert first[0].keys() == second[0].keys()
    for a, b in zip(first, second, strict=True):
        for name, value in a.items():
            assert value == pytest.approx(b[name], abs=1e-5), name
    torch.testing.assert_close(weights(trainer), weights(other), atol=1e-4, rtol=0)


def test_another_seed_or_step_gives_other_responses(tmp_path):
    """The same gives the same; so does nothing else."""
    drawn = {}
    for name, seed, number in (
        ("a", 7, (0, 1)),
        ("b", 7, (1, 1)),
        ("c", 7, (0, 2)),
        ("d", 8, (0, 1)),
    ):
        trainer = RLTrainer(settings(tmp_path, {"grpo.seed": seed}), environment=dense)
        prompts = trainer.train_prompts[:4]
        again, first = (trainer.sample(prompts, number)[0]["input_ids"] for _ in range(2))
        assert torch.equal(first, again)
        drawn[name] = str(first.tolist())
    assert len(set(drawn.values())) == 4


def test_several_updates_and_micro_batches(tmp_path):
    """The second update of a step is off-policy; micro-batches change nothing."""
    several = {"policy.train_global_batch_size": 8, "policy.train_micro_batch_size": 8}
    (metrics, _), trainer = steps(settings(tmp_path, several), environment=dense)
    assert trainer.updates == 2 and metrics["probs_ratio_max"] > 1.001
    assert metrics["global_valid_seqs"] == 8 and metrics["num_valid_samples"] == 8
    assert metrics["probs_ratio"] == pytest.approx(1, abs=0.1)  # means, as in NeMo RL
    several["policy.train_micro_batch_size"] = 3
    (again, _), other = steps(settings(tmp_path, several), environment=dense)
    for name in ("loss", "grad_norm", "probs_ratio_min", "probs_ratio_max", "approx_entropy"):
        assert metrics[name] == pytest.approx(again[name], rel=1e-3, abs=1e-5), name


def test_it_learns(tmp_path):
    """A reward that is easy to raise: the answer has at most two characters."""
    changes = {
        "grpo.num_prompts_per_step": 4,
        "grpo.num_generations_per_prompt": 16,
        "policy.train_global_batch_size": 64,
        "policy.train_micro_batch_size": 64,
    }
    (first, *_, last), _ = steps(
        settings(tmp_path, changes), 12, environment=lambda p, r, t: float(len(r) <= 2)
    )
    assert last["reward"] > first["reward"] + 0.3


# Settings


NLL = {"loss_fn.positive_example_nll_weight": 0.1}
KL = {"loss_fn.reference_policy_kl_penalty": 0.05}
SAMPLING = {"loss_fn.use_importance_sampling_correction": True}
VARIANTS = {
    "grpo": {},
    "no leave-one-out": {"grpo.adv_estimator": {"use_leave_one_out_baseline": False}},
    "Dr. GRPO": {"grpo.adv_estimator": {"normalize_rewards": False}},
    "advantage clip": {"grpo.advantage_clip_low": -0.1, "grpo.advantage_clip_high": 0.1},
    "reinforce++": {"grpo.adv_estimator": {"name": "reinforce_plus_plus"}},
    "reinforce++ with KL in the reward": {
        "grpo.adv_estimator": {"name": "reinforce_plus_plus", "minus_baseline": False},
        "loss_fn.use_kl_in_reward": True,
        **KL,
    },
    "opd": {
        "grpo.adv_estimator": {"name": "opd"},
        "on_policy_distillation": {
            "enabled": True,
            "teacher_model_by_agent_name": {"math": str(tiny.MODEL)},
        },
        "loss_fn.disable_ppo_ratio": True,
    },
    "k1": {**KL, "loss_fn.reference_policy_kl_type": "k1"},
    "k2 on policy": {
        **KL,
        "loss_fn.reference_policy_kl_type": "k2",
        "loss_fn.use_on_policy_kl_approximation": True,
    },
    "REINFORCE": {"loss_fn.disable_ppo_ratio": True},
    "GSPO": {
        "loss_fn.sequence_level_importance_ratios": True,
        "loss_fn.token_level_loss": False,
    },
    "CISPO": {"loss_fn.use_cispo": True},
    "dual clip": {"loss_fn.ratio_clip_c": 3.0, "loss_fn.ratio_clip_max": 0.28},
    "on-policy ratio": {"loss_fn.force_on_policy_ratio": True},
    "tis": {
        **SAMPLING,
        "loss_fn.truncated_importance_sampling_type": "tis",
        "loss_fn.truncated_importance_sampling_ratio": 2.0,
    },
    "icepop": {
        **SAMPLING,
        "loss_fn.truncated_importance_sampling_type": "icepop",
        "loss_fn.truncated_importance_sampling_ratio": 2.0,
        "loss_fn.truncated_importance_sampling_ratio_min": 0.5,
    },
    "seq-mask-tis": {
        **SAMPLING,
        "loss_fn.truncated_importance_sampling_type": "seq-mask-tis",
        "loss_fn.truncated_importance_sampling_ratio": 1.1,
        "loss_fn.truncated_importance_sampling_ratio_min": 0.9,
    },
    "sampler mismatch": {"grpo.seq_logprob_error_threshold": 1.01},
    "top-k and temperature": {
        "policy.generation.top_k": 4,
        "policy.generation.top_p": 0.95,
        "policy.generation.temperature": 1.2,
        **KL,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_estimator_and_loss(tmp_path, changes):
    """Two steps; where sampler and trainer are the same, their ratio is 1 and nothing is cut."""
    metrics, trainer = steps(settings(tmp_path, changes), environment=dense)
    for one in metrics:
        assert all(math.isfinite(value) for value in one.values())
        assert one["token_mult_prob_error"] == pytest.approx(1, abs=1e-3)
        assert one["num_valid_samples"] == 16
        assert one.get("num_masked_seqs_by_logprob_error", 0) == 0
    moved = weights(trainer) - weights(RLTrainer(settings(tmp_path, changes)))
    if changes is VARIANTS["opd"]:  # the teacher is the student: at first there is nothing to learn
        assert abs(metrics[0]["on_policy_distillation/adv_mean"]) < 1e-5
    assert moved.abs().max() > 1e-5
    if changes.get("loss_fn.reference_policy_kl_penalty") and not changes.get(
        "loss_fn.use_kl_in_reward"
    ):
        assert abs(metrics[0]["kl_penalty"]) < 1e-6 < abs(metrics[1]["kl_penalty"])
    if changes is VARIANTS["advantage clip"]:
        assert metrics[0]["advantages/max"] == pytest.approx(0.1)
        assert metrics[0]["advantages/min"] == pytest.approx(-0.1)


def test_gdpo_takes_components(tmp_path):
    def reward(prompt, response, truth):
        return {"length": float(len(response) == len(truth)), "off": dense("", response, truth)}

    config = settings(tmp_path, {"grpo.adv_estimator": {"name": "gdpo"}})
    (metrics, _), _ = steps(config, environment=reward)
    assert abs(metrics["advantages/mean"]) < 1 and metrics["advantages/max"] > 0
    with pytest.raises(ValueError, match="expected two or more"):
        steps(config, environment=dense)


def test_overlong_filtering_and_shaping(tmp_path):
    """Truncated responses count in no mean; shaped rewards are what advantages see."""
    changes = {"policy.generation.max_new_tokens": 3, "grpo.overlong_filtering": True}
    (metrics, _), _ = steps(settings(tmp_path, changes), environment=dense)
    cut = metrics["truncation_rate"] * 16
    assert 0 < cut < 16 and metrics["num_valid_samples"] == 16 - cut == metrics["global_valid_seqs"]

    changes = {
        "grpo.reward_shaping": {"enabled": True, "stop_properly_penalty_coef": 0.0},
        "policy.generation.max_new_tokens": 3,
    }
    (metrics, _), _ = steps(settings(tmp_path, changes), environment=lambda *texts: 1.0)
    assert metrics["reward"] == pytest.approx(1 - metrics["truncation_rate"])
    changes = {
        "grpo.reward_scaling": {"enabled": True, "target_min": -1.0},
        "grpo.reward_shaping": {
            "enabled": True,
            "overlong_buffer_length": 1,
            "overlong_buffer_penalty": 1.0,
            "max_response_length": 2,
        },
    }
    (metrics, _), _ = steps(settings(tmp_path, changes), environment=lambda *texts: 0.5)
    # Scaled to 0 first; then a response of n > 1 tokens loses n - 1.
    assert metrics["reward"] == pytest.approx(1 - metrics["mean_gen_tokens_per_sample"], abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo.seq_logprob_error_threshold": 0.5},
        {"grpo.adv_estimator": {"name": "grpo", "normalize_rewards": False}},
        {"grpo.adv_estimator": {"name": "reinforce_plus_plus"}},
        {"grpo.adv_estimator": {"name": "gdpo"}},
        {"loss_fn.reference_policy_kl_penalty": 0.1, "policy.train_global_batch_size": 8},
        {"loss_fn.token_level_loss": False},
        {"ppo.ppo_epochs": 2},
        {"ppo.adv_estimator": {**GAE, "name": "raw_reward"}},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items())[:60],
)
def test_a_step_in_which_no_response_counts_has_loss_zero(tmp_path, capsys, changes):
    """Kind: an error that comes again at every resume, because the same step is taken again.

    As NeMo RL: the step is taken, whatever makes advantages, and the run goes on.
    """
    name = next(iter(changes)).partition(".")[0]
    name = "ppo" if name == "ppo" else "grpo"
    cut = {"policy.generation.max_new_tokens": 1, f"{name}.overlong_filtering": True}
    environment = dense
    if "gdpo" in str(changes):
        environment = lambda *texts: {"a": 1.0, "b": float(len(texts[1]))}  # noqa: E731
    found, _ = steps(
        settings(tmp_path, {**cut, **changes}, ppo=name == "ppo"), environment=environment
    )
    assert capsys.readouterr().out.count("WARNING: no response of this step counts in") == 2
    for metrics in found:
        assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
        assert all(math.isfinite(value) for value in metrics.values()), metrics


def test_prompts_that_are_all_too_long_are_refused_before_the_first_step(tmp_path):
    changes = {"data.max_input_seq_length": 2}
    with pytest.raises(ValueError, match="data.train: all .* prompts are longer than data.max_in"):
        run_grpo.train(settings(tmp_path, changes))


def test_dynamic_sampling(tmp_path):
    changes = {
        "grpo.use_dynamic_sampling": True,
        "grpo.batch_multiplier": 2,
        "grpo.adv_estimator": {"use_leave_one_out_baseline": False},
        "grpo.use_leave_one_out_baseline": False,
    }
    config = settings(tmp_path, changes)
    (metrics, _), trainer = steps(config)
    assert metrics["dynamic_sampling_num_gen_batches"] >= 1
    assert metrics["num_valid_samples"] == 16
    assert 0 < metrics["filtered_reward"] < 1
    assert metrics["advantages/max"] > 0 > metrics["advantages/min"]
    # All the same: no group is ever kept, until the batches or the prompts run out.
    config = settings(tmp_path, {**changes, "grpo.dynamic_sampling_max_gen_batches": 2})
    with pytest.raises(ValueError, match="dynamic_sampling_max_gen_batches: 2 batches gave 0"):
        steps(config, environment=lambda *texts: 1.0)
    found, _ = steps(settings(tmp_path, changes), 1, environment=lambda *texts: 1.0)
    assert found == [None]


# PPO


def test_values_belong_to_the_state_before_a_token(tmp_path):
    torch.manual_seed(0)
    model = load_value_model(tiny.MODEL)
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 5, 6, 9, 2]])
    with torch.no_grad():
        values = token_values(model, {"input_ids": ids})
        assert values[:, 0].tolist() == [0.0, 0.0]
        assert torch.equal(values[0, :4], values[1, :4]) and values[0, 4] != values[1, 4]
        alone = model(input_ids=ids[:1, :3]).logits[0, -1, 0]
    assert values[0, 3].item() == pytest.approx(alone.item(), abs=1e-5)


def test_ppo(tmp_path):
    config = settings(tmp_path, {"ppo.max_num_steps": 3}, ppo=True)
    metrics, trainer = steps(config, 3, environment=dense)
    assert trainer.updates == 2 and {"policy", "value"} == set(trainer.models)
    for one in metrics:
        assert one["critic/loss"] > 0 and one["critic/explained_var"] <= 1
        assert one["probs_ratio_max"] > 1.0001  # the second epoch is off-policy
        assert abs(one["advantages/mean"]) < 1e-4  # normalized over tokens


def test_explained_variance_is_that_of_the_whole_batch_with_several_updates(tmp_path, monkeypatch):
    """From the values before the updates, which a learning rate of 0 leaves as they were."""
    changes = {
        "value.train_global_batch_size": 8,
        "value.optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 0.0}},
        "ppo.ppo_epochs": 1,
    }
    seen = []
    update_value = RLTrainer.update_value
    monkeypatch.setattr(
        RLTrainer,
        "update_value",
        lambda self, data: (seen.append(data), update_value(self, data))[1],
    )
    (one,), _ = steps(settings(tmp_path, changes, ppo=True), 1, environment=dense)
    (data,) = seen
    halves = []
    for rows in (slice(0, 8), slice(8, 16)):
        on = data["token_mask"][rows].bool()
        returns, values = data["returns"][rows][on], data["values"][rows][on]
        numbers = (returns, values, returns**2, (returns - values) ** 2)
        halves.append([number.mean() for number in numbers])
    returns, values, squares, errors = torch.tensor(halves).mean(0)
    expected = 1 - (errors - (returns - values) ** 2) / (squares - returns**2)
    assert one["critic/explained_var"] == pytest.approx(expected.item(), abs=1e-4)


def test_ppo_value_model_learns(tmp_path):
    """With a constant reward the values have one thing to say."""
    changes = {
        "ppo.ppo_epochs": 8,
        "ppo.policy_training_start_step": 9,
        "value_loss_fn": {"scale": 1.0, "cliprange": None},
    }
    metrics, trainer = steps(settings(tmp_path, changes, ppo=True), 4, environment=lambda *t: 1.0)
    assert metrics[-1]["critic/values_mean"] == pytest.approx(1.0, abs=0.3)
    assert metrics[-1]["critic/residual_sq_mean"] < 0.2 * metrics[0]["critic/residual_sq_mean"]
    assert "loss" not in metrics[-1]  # critic warm-up: the policy was left alone
    assert torch.equal(weights(trainer), weights(RLTrainer(settings(tmp_path))))


def test_ppo_without_a_value_model(tmp_path):
    changes = {"ppo.adv_estimator": {"name": "raw_reward", "normalize_advantages": True}}
    (metrics, _), trainer = steps(settings(tmp_path, changes, ppo=True), environment=dense)
    assert set(trainer.models) == {"policy"} and "critic/loss" not in metrics
    assert abs(metrics["advantages/mean"]) < 1e-4


def test_ppo_with_kl_in_the_reward_and_positive_nll(tmp_path):
    changes = {"loss_fn.use_kl_in_reward": True, **KL, **NLL}
    changes["ppo.skip_reference_policy_logprobs_calculation"] = False
    (_, metrics), _ = steps(settings(tmp_path, changes, ppo=True), environment=lambda *t: 1.0)
    assert metrics["positive_nll_loss"] > 0 and metrics["kl_penalty"] == 0


# Runs


NEMO_RL_TRAIN = {
    "loss", "grad_norm", "lr", "reward", "mean_prompt_length", "total_num_tokens",
    "advantages/mean", "advantages/max", "advantages/min", "probs_ratio", "probs_ratio_min",
    "probs_ratio_max", "probs_ratio_clamped", "probs_ratio_clamped_min", "probs_ratio_clamped_max",
    "kl_penalty", "token_mult_prob_error", "gen_kl_error", "policy_kl_error",
    "js_divergence_error", "sampling_importance_ratio", "num_valid_samples", "approx_entropy",
    "global_valid_seqs", "global_valid_toks", "baseline_reward/pct_0", "baseline_reward/pct_1",
    "baseline_reward/pct_mixed", "total_turns", "avg_turns_per_sample", "max_turns_per_sample",
    "natural_termination_rate", "truncation_rate", "max_turns_reached_rate",
    "mean_total_tokens_per_sample", "mean_gen_tokens_per_sample", "max_gen_tokens_per_sample",
    "mean_env_tokens_per_sample", "max_seq_mult_prob_error", "mean_seq_mult_prob_error",
    "min_seq_mult_prob_error", "max_seq_mult_prob_error_after_mask",
    "mean_seq_mult_prob_error_after_mask", "min_seq_mult_prob_error_after_mask",
    "num_masked_seqs_by_logprob_error", "masked_correct_pct",
}  # fmt: skip


def test_a_run_logs_validates_and_saves(tmp_path):
    changes = {
        "grpo.max_num_steps": 3,
        "grpo.val_period": 2,
        "grpo.val_at_start": True,
        "grpo.val_num_generations_per_prompt": 3,
        "checkpointing.enabled": True,
        "checkpointing.save_period": 2,
        "checkpointing.metric_name": "val:accuracy",
    }
    result = train(settings(tmp_path, changes))
    metrics = logged(tmp_path)
    assert list(metrics) == [0, 1, 2, 3]
    names = {name.removeprefix("train/") for name in metrics[1] if name.startswith("train/")}
    assert names >= NEMO_RL_TRAIN, NEMO_RL_TRAIN - names
    for step in (0, 2):
        assert 0 <= metrics[step]["validation/accuracy"] <= metrics[step]["validation/pass_k"] <= 1
        assert 1 < metrics[step]["validation/avg_length"] <= 5
    assert result["accuracy"] == metrics[2]["validation/accuracy"]
    assert metrics[1]["timing/train/generation"] < metrics[1]["timing/train/total_step_time"]
    info = json.loads((tmp_path / "checkpoints/step_2/training_info.json").read_text())
    assert info["val:accuracy"] == result["accuracy"] and info["total_steps"] == 2
    assert (tmp_path / "checkpoints/step_3/policy/weights/model.safetensors").exists()


def test_an_observer_sees_every_step_and_can_end_the_run(tmp_path):
    seen = []

    def observe(step, metrics):
        seen.append((step, metrics))
        if step == 2:
            raise KeyboardInterrupt

    changes = {"grpo.max_num_steps": 4, "grpo.val_period": 2, "grpo.val_at_start": True}
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, changes), observe=observe)
    assert [step for step, _ in seen] == [0, 1, 2]
    written = logged(tmp_path)
    assert seen[1][1]["train:reward"] == written[1]["train/reward"]
    assert "val:accuracy" not in seen[1][1]
    for step in (0, 2):
        assert seen[step][1]["val:accuracy"] == written[step]["validation/accuracy"]


def test_epochs_end_and_begin(tmp_path):
    changes = {"grpo.max_num_epochs": 2, "grpo.max_num_steps": 100}
    changes |= {"grpo.num_prompts_per_step": 24, "grpo.num_generations_per_prompt": 2}
    changes |= {"policy.train_global_batch_size": 48, "checkpointing.enabled": True}
    train(settings(tmp_path, changes), env=None)
    assert list(logged(tmp_path)) == [1, 2, 3, 4]  # 64 prompts are two batches of 24
    info = json.loads((tmp_path / "checkpoints/step_4/training_info.json").read_text())
    assert (info["current_epoch"], info["current_step"], info["consumed_samples"]) == (1, 2, 96)


def test_resumed_is_uninterrupted(tmp_path):
    changes = {
        "grpo.max_num_steps": 5,
        "grpo.max_num_epochs": 2,
        "grpo.num_prompts_per_step": 20,
        "grpo.num_generations_per_prompt": 2,
        "grpo.use_dynamic_sampling": False,
        "grpo.val_period": 2,
        "policy.train_global_batch_size": 20,
        "checkpointing.enabled": True,
        "checkpointing.save_period": 2,
        **KL,
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    train(settings(tmp_path / "whole", changes))
    for last in (1, 4, 5):
        train(settings(tmp_path / "parts", {**changes, "grpo.max_num_steps": last}))
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert list(whole) == list(parts) == [1, 2, 3, 4, 5]
    for step, metrics in whole.items():
        for name, value in metrics.items():
            if not name.startswith("timing/"):
                assert parts[step].get(name) == value, (step, name)


def test_ppo_resumes(tmp_path):
    changes = {"ppo.max_num_steps": 3, "checkpointing.enabled": True}
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    train(settings(tmp_path / "whole", changes, ppo=True))
    for last in (1, 3):
        train(settings(tmp_path / "parts", {**changes, "ppo.max_num_steps": last}, ppo=True))
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    for name in ("train/loss", "train/critic/loss", "train/critic/grad_norm"):
        assert [whole[s][name] for s in whole] == [parts[s][name] for s in parts], name


def test_another_configuration_does_not_resume(tmp_path):
    changes = {"grpo.max_num_steps": 1, "checkpointing.enabled": True}
    train(settings(tmp_path, changes))
    other = settings(tmp_path, {**changes, "loss_fn.ratio_clip_max": 0.5})
    with pytest.raises(RuntimeError, match="loss_fn.ratio_clip_max"):
        train(other)
    train(other, allow_config_changes=True)


def test_early_stop(tmp_path):
    changes = {
        "grpo.max_num_steps": 9,
        "grpo.val_period": 2,
        "grpo.stop_at_validation_metric": "accuracy",
        "grpo.stop_at_validation_threshold": 0.0,
        "checkpointing.enabled": True,
        "checkpointing.save_period": 100,
    }
    train(settings(tmp_path, changes))
    assert list(logged(tmp_path)) == [1, 2] and (tmp_path / "checkpoints/step_2").exists()
    with pytest.raises(ValueError, match="stop_at_validation_metric: got 'accuracy_k'"):
        train(settings(tmp_path, {**changes, "grpo.stop_at_validation_metric": "accuracy_k"}),
              allow_config_changes=True)  # fmt: skip


def test_not_a_number_stops_the_run(tmp_path, monkeypatch):
    class Broken(ClippedPGLossFn):
        calls = 0

        def __call__(self, next_token_logprobs, data, **counts):
            Broken.calls += 1
            loss, metrics = super().__call__(next_token_logprobs, data, **counts)
            return (loss * math.nan if Broken.calls > 1 else loss), metrics

    monkeypatch.setattr("nemo_rl_ref.rl.trainer.ClippedPGLossFn", Broken)
    config = settings(tmp_path, {"grpo.max_num_steps": 4, "checkpointing.enabled": True,
                                 "checkpointing.save_period": 50})  # fmt: skip
    with pytest.raises(NotFinite, match="step 2: .*gradient norm nan; it starts in the loss f"):
        train(config)
    info = json.loads((tmp_path / "checkpoints/step_1/training_info.json").read_text())
    assert info["total_steps"] == 1 and info["data_position"] == 1
    monkeypatch.undo()
    saved = tiny.load_policy(tmp_path / "checkpoints/step_1/policy/weights")
    fresh = RLTrainer(settings(tmp_path))
    fresh.step(batches(fresh, fresh.cfg.seed), 0)
    assert torch.equal(
        torch.cat([p.detach().flatten() for p in saved.parameters()]), weights(fresh)
    )


def test_env_and_loss_of_ones_own(tmp_path, capsys):
    code = tmp_path / "my_pieces_of_grpo.py"
    code.write_text(
        "from nemo_rl_ref.algorithms.loss import ClippedPGLossFn\n"
        "def reward(prompt, response, truth):\n    return 0.25\n"
        "class Mine(ClippedPGLossFn):\n    pass\n"
        "class Broken(ClippedPGLossFn):\n"
        "    def __call__(self, *args, **kwargs):\n"
        "        loss, metrics = super().__call__(*args, **kwargs)\n"
        "        return loss + 1, metrics\n"
    )
    train(settings(tmp_path, {"grpo.max_num_steps": 1}), env=f"{code}:reward", loss=f"{code}:Mine")
    assert logged(tmp_path)[1]["train/reward"] == 0.25
    # As its parent, it multiplies by masks; tests/contract/test_contract.py has what it warns of.
    assert "Mine: 7 of 9 promises kept" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="--strict: .*Broken breaks NeMo RL's promises: micro-batch"
    ):
        train(settings(tmp_path), loss=f"{code}:Broken", strict=True)


def test_prompts_that_differ_are_never_one_group(tmp_path):
    """Whatever the padding is filled with: a token 0 before, tokens of padding before and after."""
    trainer = RLTrainer(settings(tmp_path), load=False)
    pad = trainer.tokenizer.pad_token_id
    prompts = [[5, 6], [0, 5, 6], [0, 0, 5, 6], [pad, 5, 6], [5, 6, pad], [5, 6, 0], [0], [pad]]
    prompts = [prompt for prompt in dict.fromkeys(map(tuple, prompts)) for _ in range(2)]
    rewards = torch.arange(len(prompts)).float()
    batch = BatchedDataDict(
        {
            "input_ids": torch.nn.utils.rnn.pad_sequence(
                [torch.tensor([*prompt, 7]) for prompt in prompts], True, pad
            ),
            "length": torch.tensor([len(prompt) for prompt in prompts]),
            "total_reward": rewards,
        }
    )
    others = rewards.view(-1, 2).flip(1).flatten()  # each group is two responses
    assert torch.equal(trainer.reward(batch)["baseline"], others)


@pytest.mark.parametrize(("most", "size"), [(None, None), (None, 5), (8, None), (8, 8)])
def test_validation_without_a_number_takes_all_prompts(tmp_path, most, size):
    """``null`` for the number of prompts, or for how many at once, as NeMo RL's types allow."""
    changes = {"grpo.max_val_samples": most, "grpo.val_batch_size": size, "grpo.val_period": 1}
    trainer, seen = RLTrainer(settings(tmp_path, changes)), []
    sample = trainer.sample
    trainer.sample = lambda prompts, *rest: seen.append(len(prompts)) or sample(prompts, *rest)
    trainer.validate(0)
    assert sum(seen) == (most or len(trainer.val_prompts))
    assert set(seen[:-1]) <= {size} and seen[-1] <= (size or sum(seen))


# What is refused


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 0),
        ({"grpo.num_generations_per_prompt": 1, "policy.train_global_batch_size": 4}, 1),
        ({"policy.generation.temperature": 0}, 1),
        ({"policy.generation.top_k": 1}, 1),
        ({"policy.generation.val_temperature": 0}, 0),
        ({"policy.generation.temperature": 0, "grpo.adv_estimator": {"name": "gdpo"}}, 1),
        ({"policy.generation.temperature": 0,
          "grpo.adv_estimator": {"name": "reinforce_plus_plus"}}, 1),
        ({"policy.generation.temperature": 0,
          "grpo.adv_estimator": {"name": "reinforce_plus_plus", "minus_baseline": False}}, 0),
    ],
)  # fmt: skip
def test_groups_that_cannot_learn_get_one_warning(tmp_path, changes, count):
    """One response, or equal ones; not where a response is compared with those to other prompts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        read_rl_settings(settings(tmp_path, changes))
        read_rl_settings(settings(tmp_path, changes))  # the program does it in two places
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == count
    assert all("rewards teach nothing, as in NeMo RL" in text for text in texts)


def test_ppo_learns_from_one_response(tmp_path):
    changes = {"ppo.num_generations_per_prompt": 1, "policy.train_global_batch_size": 4,
               "value.train_global_batch_size": 4}  # fmt: skip
    read_rl_settings(settings(tmp_path, changes, ppo=True))  # a warning would be an error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.train_global_batch_size": 7}, "policy.train_global_batch_size: got 7, .* is 16"),
        ({"grpo.max_rollout_turns": 2}, "grpo.max_rollout_turns: got 2, expected 1"),
        ({"grpo.async_grpo": {"enabled": True}}, "grpo.async_grpo.enabled: got True"),
        ({"grpo.batch_multiplier": 2}, "grpo.batch_multiplier: got 2.0, expected 1 without"),
        ({"grpo.val_period": 1, "grpo.max_val_samples": 4}, "grpo.max_val_samples: got 4"),
        ({"grpo.stop_at_validation_metric": "accuracy"}, "grpo.stop_at_validation_threshold"),
        (
            {"loss_fn.force_on_policy_ratio": True, "policy.train_global_batch_size": 8},
            "loss_fn.force_on_policy_ratio: got True, expected false: a step makes 2",
        ),
        (
            {**KL, "grpo.skip_reference_policy_logprobs_calculation": True},
            "grpo.skip_reference_policy_logprobs_calculation: got True",
        ),
        ({"grpo.invalid_tool_call_advantage": -5.0}, "grpo.invalid_tool_call_advantage: got -5.0"),
        ({"grpo.adv_estimator": {"name": "gae"}}, "grpo.adv_estimator.name: got 'gae'"),
        ({"policy.precision": "float8"}, "policy.precision: got 'float8'"),
        ({"grpo.num_prompts_per_step": 100, "policy.train_global_batch_size": 400},
         "data.train: 64 prompts, expected at least the 100"),
        ({"grpo.val_period": 1, "data.validation": None}, "data.validation: not set"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, changes))


def test_more_refusals(tmp_path):
    with pytest.raises(ValueError, match="ppo or grpo: not set, .* the configuration has policy"):
        train({"policy": {}})
    with pytest.raises(ValueError, match="a multiple of the 3 processes"):
        check_processes(read_rl_settings(settings(tmp_path)), 3)
    with pytest.raises(ValueError, match="ppo.use_dynamic_sampling: got True"):
        read_rl_settings(settings(tmp_path, {"ppo.use_dynamic_sampling": True}, ppo=True))
    with pytest.raises(ValueError, match="ppo.adv_estimator.name: got 'grpo', expected gae or raw"):
        steps(settings(tmp_path, {"ppo.adv_estimator": {**GAE, "name": "grpo"}}, ppo=True))
    with pytest.raises(ValueError, match="on_policy_distillation: .* the same teacher"):
        teacher_name(OnPolicyDistillationConfig(enabled=True))
    with pytest.warns(UserWarning, match="positive_example_nll_weight: without effect in GRPO"):
        read_rl_settings(settings(tmp_path, NLL))


def test_the_loss_config_reaches_the_loss(tmp_path):
    trainer = RLTrainer(settings(tmp_path, {"loss_fn.ratio_clip_max": 0.28}))
    assert trainer.loss_fn.ratio_clip_max == 0.28
    assert vars(trainer.loss_fn) == vars(
        ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, ratio_clip_max=0.28))
    )


# NeMo RL's own files


@pytest.mark.parametrize("name", ["grpo_math_1B", "ppo_math_1B"])
def test_nemo_rls_own_configuration_runs(tmp_path, name):
    """The file as NeMo RL has it, with another model, other data and smaller sizes."""
    omegaconf = pytest.importorskip("omegaconf")
    tree = {}
    for key, value in load_manifest()["configs"][f"{name}.yaml"].items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        # The manifest was read with YAML 1.1, for which 1e-8 is text; OmegaConf has it as a number.
        is_number = isinstance(value, str) and re.fullmatch(r"\d(\.\d+)?e-\d+", value)
        place[last] = float(value) if is_number else value
    path = tmp_path / f"{name}.yaml"
    omegaconf.OmegaConf.save(omegaconf.OmegaConf.create(tree), path)
    section = name[:4].rstrip("_")
    data = settings(tmp_path)["data"]["train"]["data_path"]
    status = run_grpo.main(
        [
            "--config",
            str(path),
            f"policy.model_name={tiny.MODEL}",
            "data.train.dataset_name=ResponseDataset",
            f"+data.train.data_path={data}",
            f"++data.validation={{dataset_name: ResponseDataset, data_path: {data}}}",
            "data.default.prompt_file=null",
            f"{section}.num_prompts_per_step=4",
            f"{section}.num_generations_per_prompt=4",
            f"{section}.max_num_steps=1",
            f"{section}.val_batch_size=4",
            f"{section}.max_val_samples=4",
            "policy.train_global_batch_size=16",
            "policy.max_total_sequence_length=16",
            "data.max_input_seq_length=16",
            f"checkpointing.checkpoint_dir={tmp_path / 'checkpoints'}",
            f"logger.log_dir={tmp_path / 'logs'}",
        ]
    )
    assert status == 0
    assert logged(tmp_path)[1]["train/num_valid_samples"] == 16


def test_the_command_line_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # the paths in the examples are relative to it
    for example, override, message in [
        ("grpo_tiny", "grpo.num_prompt_per_step=4", "nearest key is 'grpo.num_prompts_per_step'"),
        ("grpo_tiny", "grpo.max_rollout_turns=3", "grpo.max_rollout_turns: got 3, expected 1"),
        ("ppo", "ppo.async_ppo.enabled=true", "this package has no asynchronous rollouts"),
        ("ppo", "--environment=x.py:y", "no such option"),
    ]:
        arguments = ["--config", f"configs/{example}.yaml", f"logger.log_dir={tmp_path}"]
        try:
            assert run_grpo.main([*arguments, override]) == 1
        except SystemExit as stopped:  # argparse
            assert stopped.code == 2
        assert message in capsys.readouterr().err
