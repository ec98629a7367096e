# SPDX-License-Identifier: Apache-2.0
"""What happens to a batch of rollouts: rewards, environments, filters; and its prompts."""

import contextlib
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.grpo import (
    GRPOConfig,
    RewardScalingConfig,
    compute_and_apply_seq_logprob_error_masking,
    dynamic_sampling,
    scale_rewards,
)
from nemo_rl_ref.algorithms.ppo import AsyncPPOConfig, PPOConfig
from nemo_rl_ref.algorithms.reward_functions import RewardShapingConfig, apply_reward_shaping
from nemo_rl_ref.config.sections import DataConfig
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.files.records import DataError
from nemo_rl_ref.rl.rewards import (
    ENVIRONMENTS,
    exact_match,
    final_answer,
    math_multi_reward,
    math_reward,
    score,
)
from nemo_rl_ref.rl.rollouts import load_prompts

# Reward shaping


def shaped(rewards, lengths=None, truncated=None, message_log=None, **settings):
    batch = BatchedDataDict({"total_reward": torch.tensor(rewards)})
    if lengths is not None:
        batch["response_token_lengths"] = lengths
    if truncated is not None:
        batch["truncated"] = truncated
    if message_log is not None:
        batch["message_log"] = message_log
    return apply_reward_shaping(batch, RewardShapingConfig(enabled=True, **settings))


OVERLONG = {"overlong_buffer_length": 4, "overlong_buffer_penalty": 2.0, "max_response_length": 10}


def test_overlong_penalty_grows_from_the_start_of_the_buffer():
    batch = shaped([1.0, 1.0, 0.0, 1.0, 1.0], lengths=[5, 6, 8, 10, 12], **OVERLONG)
    assert batch["total_reward"].tolist() == [1.0, 1.0, -1.0, -1.0, -2.0]
    assert batch["unshaped_total_reward"].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_lengths_from_the_message_log():
    logs = [
        [
            {"role": "user", "token_ids": torch.zeros(30)},
            {"role": "assistant", "token_ids": torch.zeros(length)},
            {"role": "assistant", "token_ids": torch.zeros(99)},
        ]
        for length in (5, 8)
    ]
    assert shaped([1.0, 1.0], message_log=logs, **OVERLONG)["total_reward"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="no message of role assistant"):
        shaped([1.0], message_log=[[{"role": "user", "token_ids": torch.zeros(3)}]], **OVERLONG)


@pytest.mark.parametrize("truncated", [[True, False, True], torch.tensor([True, False, True])])
def test_stop_properly(truncated):
    with pytest.warns(UserWarning, match="max_response_length have no effect"):
        batch = shaped(
            [1.0, 1.0, -2.0],
            truncated=truncated,
            stop_properly_penalty_coef=0.25,
            max_response_length=3,
        )
    assert batch["total_reward"].tolist() == [0.25, 1.0, -0.5]


def test_shaping_refuses():
    off = BatchedDataDict({"total_reward": torch.ones(2)})
    assert "unshaped_total_reward" not in apply_reward_shaping(off, RewardShapingConfig())
    for change, message in [
        ({"overlong_buffer_length": None}, "reward_shaping.overlong_buffer_length is None"),
        ({"overlong_buffer_penalty": -1.0}, "overlong_buffer_penalty is -1.0, expected 0 or more"),
        ({"overlong_buffer_length": 0}, "overlong_buffer_length is 0, expected 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            shaped([1.0], lengths=[3], **{**OVERLONG, **change})
    with pytest.raises(ValueError, match="got 2 responses and 1 reward"):
        shaped([1.0], lengths=[3, 4], **OVERLONG)
    with pytest.raises(ValueError, match=r"coef must be in \[0, 1\], got 1.5"):
        shaped([1.0], truncated=[True], stop_properly_penalty_coef=1.5)
    with pytest.raises(ValueError, match="truncated field not found"):
        shaped([1.0], stop_properly_penalty_coef=0.5)


# Reward scaling


def test_scaling_maps_and_clamps(capsys):
    batch = BatchedDataDict(
        {
            "total_reward": torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]),
            "reward/format": torch.tensor([0.0, 0.5, 1.0, 2.0, 2.0]),
        }
    )
    cfg = RewardScalingConfig(enabled=True, source_max=2.0, target_min=-1.0)
    scaled = scale_rewards(batch, cfg)
    assert scaled["total_reward"].tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert scaled["reward/format"].tolist() == [-1.0, -0.5, 0.0, 1.0, 1.0]
    assert "2 of 5 rewards are outside [0.0, 2.0]" in capsys.readouterr().out
    assert scale_rewards(batch, RewardScalingConfig()) is batch
    with pytest.raises(ValueError, match="source_max is 0.0, expected more than source_min"):
        scale_rewards(batch, RewardScalingConfig(enabled=True, source_max=0.0))


# Dynamic sampling


class NoTimer:
    def time(self, name):
        return contextlib.nullcontext()


def filtered(rewards, std, tried=1, cache=None, **settings):
    cfg = GRPOConfig(
        num_prompts_per_step=2, num_generations_per_prompt=2, use_dynamic_sampling=True, **settings
    )
    batch = BatchedDataDict(
        {"total_reward": torch.tensor(rewards), "idx": list(range(len(rewards)))}
    )
    std = torch.tensor(std)
    return dynamic_sampling(
        batch, std, std * 10, tried, SimpleNamespace(grpo=cfg), NoTimer(), cache
    )


def test_dynamic_sampling_collects_until_the_step_is_full():
    batch, complete, cache, metrics = filtered([1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0])
    assert not complete and metrics == {} and cache["idx"] == [0, 1]
    batch, complete, cache, metrics = filtered([1.0] * 4, [0.0] * 4, tried=2, cache=cache)
    assert not complete and cache["idx"] == [0, 1]
    batch, complete, _, metrics = filtered(
        [0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 0.3], tried=3, cache=cache
    )
    assert complete and metrics == {"dynamic_sampling_num_discarded_valid_samples": 1}
    assert batch["idx"] == [0, 1, 1, 2]
    assert batch["filtered_reward"].tolist() == [1.0, 0.0, 1.0, 2.0]
    assert batch["std"].tolist() == pytest.approx([0.5, 0.5, 0.1, 0.2])
    assert batch["baseline"].tolist() == pytest.approx([5.0, 5.0, 1.0, 2.0])
    assert len(batch["total_reward"]) == 4


def test_dynamic_sampling_gives_up():
    filtered([1.0, 1.0], [0.0, 0.0], tried=3, dynamic_sampling_max_gen_batches=3)
    with pytest.raises(ValueError, match="3 batches gave 0 responses .* 4 are needed"):
        filtered([1.0, 1.0], [0.0, 0.0], tried=4, dynamic_sampling_max_gen_batches=3)


def test_without_dynamic_sampling_everything_is_kept():
    cfg = SimpleNamespace(grpo=GRPOConfig())
    batch = BatchedDataDict({"total_reward": torch.ones(3)})
    out, complete, cache, metrics = dynamic_sampling(
        batch, torch.zeros(3), torch.ones(3), 1, cfg, NoTimer()
    )
    assert out is batch and complete and cache is None and metrics == {}
    assert batch["baseline"].tolist() == [1.0] * 3


# Disagreement of trainer and sampler


def mismatch(threshold):
    gap = torch.tensor([[9.0, 0.0, 0.1], [9.0, 0.5, -0.5], [9.0, 3.0, 3.0], [9.0, 1.0, 9.0]])
    data = BatchedDataDict(
        {
            "generation_logprobs": torch.zeros(4, 3),
            "prev_logprobs": gap,
            "token_mask": torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]]),
            "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        }
    )
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])
    return data, compute_and_apply_seq_logprob_error_masking(data, rewards, threshold)


def test_seq_logprob_errors():
    errors = [(1 + math.exp(0.1)) / 2, math.exp(0.5), math.e]
    data, metrics = mismatch(None)
    assert metrics["max_seq_mult_prob_error"] == pytest.approx(errors[2])
    assert metrics["mean_seq_mult_prob_error"] == pytest.approx(sum(errors) / 3)
    assert metrics["min_seq_mult_prob_error_after_mask"] == pytest.approx(errors[0])
    assert metrics["num_masked_seqs"] == 0 and metrics["masked_correct_pct"] == 0.0
    assert data["sample_mask"].tolist() == [1.0, 1.0, 0.0, 1.0]

    data, metrics = mismatch(1.5)
    assert data["sample_mask"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert metrics["num_masked_seqs"] == 2 and metrics["masked_correct_pct"] == 0.5
    assert metrics["max_seq_mult_prob_error"] == pytest.approx(errors[2])
    assert metrics["max_seq_mult_prob_error_after_mask"] == pytest.approx(errors[0])


# Environments


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("46", "46", True),
        (" 46. ", "46", True),
        ("47", "46", False),
        ("", "46", False),
        (r"first \boxed{1}, then \boxed{46}", "46", True),
        (r"46, no: \boxed{45}", "46", False),
        (r"\boxed{x^{2}}", "x^{2}", True),
        ("1,234,567", "1234567", True),
        ("1,23", "123", False),
        ("0.5", r"\frac{1}{2}", True),
        ("50%", "1/2", True),
        ("1/0", "1/0", True),
        ("9" * 5000 + "!", "46", False),
    ],
)
def test_math_reward(response, truth, right):
    assert math_reward("", response, truth) == float(right)


def test_other_environments():
    assert final_answer(r"a \boxed{b{c}d} e") == "b{c}d" and final_answer(r"\boxed{46") == "46"
    assert exact_match("", "046", "46") == 0.0 and exact_match("", "46", "46") == 1.0
    good = "<think>a\nb</think>\n<answer>46</answer>"
    assert math_multi_reward("", good, "46") == {"correctness": 1, "integer": 1, "format": 1}
    assert math_multi_reward("", "46", "46") == {"correctness": 1, "integer": 1, "format": 0}
    assert math_multi_reward("", good + "<answer>x</answer>", "46") == {
        "correctness": 0,
        "integer": 0,
        "format": 0,
    }
    assert ENVIRONMENTS["math"] is math_reward


def test_a_reward_is_a_number_of_whatever_library():
    """NumPy's, PyTorch's, Python's: as the reward, and as a component."""
    for one in (1, 1.0, True, np.float32(1), np.int64(1), np.float64(1), np.array(1.0),
                torch.tensor(1.0), torch.tensor(1), torch.tensor(True), Fraction(1)):  # fmt: skip
        batch = score([lambda *texts, r=one: r] * 2, [""] * 2, [""] * 2, [""] * 2)
        assert batch["total_reward"].tolist() == [1.0, 1.0]
        batch = score([lambda *texts, r=one: {"a": r, "b": 2}], [""], [""], [""])
        assert batch["total_reward"].tolist() == [3.0] and batch["reward/a"].tolist() == [1.0]


@pytest.mark.parametrize("bad", [
    np.float32("nan"), torch.tensor(float("inf")), torch.ones(1), np.ones(2), "1", None, 10**400,
    1e39, 1j, [1.0], {}, {"a": None}, {"a": 3e38, "b": 3e38},
])  # fmt: skip
def test_a_reward_that_is_no_finite_number_is_refused(bad):
    """Also what is finite in Python and not in float32, and a sum that is not."""
    with pytest.raises(ValueError, match="returned .* expected a finite number or a dict of them"):
        score([lambda *texts: bad], [""], ["x"], [""])


def test_score():
    batch = score([math_multi_reward] * 2, ["", ""], ["46", "x"], ["46", "46"])
    assert batch["total_reward"].tolist() == [2.0, 0.0]
    assert sorted(batch) == [
        "reward/correctness",
        "reward/format",
        "reward/integer",
        "total_reward",
    ]
    for bad in (None, "1", float("nan"), float("inf"), {"a": None}):
        with pytest.raises(ValueError, match="environment <lambda>: returned .* expected a finite"):
            score([lambda *texts, bad=bad: bad], [""], ["x"], [""])
    with pytest.raises(ValueError, match="all rows must have the same"):
        score([math_multi_reward, math_reward], ["", ""], ["x", "y"], ["", ""])


# Prompts


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


def data_section(path, longest=8, default=None, **more):
    entry = {"data_path": str(path), "dataset_name": "ResponseDataset", "env_name": "math", **more}
    return DataConfig(train=entry, max_input_seq_length=longest, shuffle=True, default=default)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    records = [{"input": f"{n}+1=", "output": str(n + 1)} for n in (1, 22, 100, 4, 5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts(problems, tokenizer, tmp_path):
    train, validation = load_prompts(data_section(problems), tokenizer)
    assert validation == [] and [prompt.truth for prompt in train] == ["2", "23", "101", "5", "6"]
    assert train[1].text == "<s>22+1=" and tokenizer.decode(train[1].ids) == "<s>22+1="
    assert [prompt.weight for prompt in train] == [1.0] * 5
    short = load_prompts(data_section(problems, longest=7), tokenizer)[0]
    assert [prompt.weight for prompt in short] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert len(short[2].ids) == 4
    whole = load_prompts(data_section(problems, longest=None), tokenizer)[0]
    assert [prompt.weight for prompt in whole] == [1.0] * 5

    template = tmp_path / "prompt.txt"
    template.write_text("0+{}")
    default = {"prompt_file": str(template), "env_name": "nothing"}
    data = data_section(problems, default=default, split_validation_size=2, seed=3)
    train, held_out = load_prompts(data, tokenizer)
    assert len(train) == 3 and len(held_out) == 2
    assert all(prompt.text.startswith("<s>0+") for prompt in train + held_out)


def test_prompts_refuse(problems, tokenizer, tmp_path):
    for change, message in [
        ({"env_name": "mat"}, "data.train.env_name: got 'mat'; did you mean 'math'"),
        ({"dataset_name": "gsm8k"}, "data.train: dataset_name: got 'gsm8k'"),
        ({"processor": "vlm"}, "data.train.processor: got 'vlm', expected math_hf_data_processor"),
        ({"prompt_file": "no.txt"}, "data.train: prompt_file: no file at no.txt"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_prompts(data_section(problems, **change), tokenizer)
    problems.write_text('{"input": "1+1="}\n')
    with pytest.raises(DataError, match=r"problems.jsonl:1: no field 'output'"):
        load_prompts(data_section(problems), tokenizer)


def test_ppo_settings():
    with pytest.raises(ValueError, match="lead_steps is 1, expected at least"):
        AsyncPPOConfig(warmup_generation_lead_steps=1, max_trajectory_age_steps=2)
    assert AsyncPPOConfig(max_trajectory_age_steps=3).resolved_warmup_generation_lead_steps == 3
    with pytest.raises(ValueError, match="policy_training_start_step is 0"):
        PPOConfig(async_ppo={"enabled": True, "warmup_generation_lead_steps": 2})


def test_what_nemo_rl_asserts_against_is_a_value_error_and_an_assertion_error():
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="coef must be in"):
            shaped([1.0], stop_properly_penalty_coef=-0.5)
