# SPDX-License-Identifier: Apache-2.0
"""SFT, DPO and reward-model runs: what a step computes, what is validated, logged and refused."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import curve, make_config, records, run, write_lines

from nemo_rl_ref import run_dpo, tiny
from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.data.processors import sft_processor
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.training.samples import Samples, flat_sample

SECTIONS = ["sft", "dpo", "rm"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


# What a step computes


@pytest.mark.parametrize("section", SECTIONS)
def test_micro_batches_make_no_difference(section, tmp_path):
    """Rows of different lengths, and micro-batches of different sizes."""
    curves = []
    for size in (8, 3):
        _, metrics = run(section, tmp_path, name=f"of-{size}", policy__train_micro_batch_size=size)
        curves.append(curve(metrics))
    assert len(curves[0]) == 12
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_supervised_loss_is_the_mean_over_the_answers_tokens(tmp_path, tokenizer):
    """The first step and the first validation, against the model's own loss with labels."""
    _, metrics = run("sft", tmp_path, sft__max_num_steps=1, data__shuffle=False)
    model = tiny.load_policy().eval()

    def mean_loss(path, count):
        total, tokens = 0.0, 0
        for row in records(path, count):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["chosen"]},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            labels = ids.clone()
            labels[0, : 1 + len(row["prompt"])] = -100
            answer = int((labels != -100).sum())
            assert answer == len(row["chosen"]) + 1  # and the end token
            with torch.no_grad():
                total += model(input_ids=ids, labels=labels).loss.item() * answer
            tokens += answer
        return total / tokens

    assert metrics[1]["train/loss"] == pytest.approx(mean_loss(tiny.TRAIN_PAIRS, 8), rel=1e-5)
    validation = mean_loss(tiny.VALIDATION_PAIRS, 12)  # two batches of six
    assert metrics[0]["validation/val_loss"] == pytest.approx(validation, rel=1e-5)


def test_preference_validation_is_the_mean_over_the_pairs(tmp_path):
    """The last batch is smaller; every pair has the same weight."""
    changes = {"dpo__val_batches": -1, "samples": 16, "dpo__max_num_steps": 4}
    whole, _ = run("dpo", tmp_path, name="one", dpo__val_global_batch_size=16, **changes)
    parts, _ = run("dpo", tmp_path, name="many", dpo__val_global_batch_size=5, **changes)
    assert parts["validation"] == pytest.approx(whole["validation"], rel=1e-4)
    assert parts["validation"]["validation-default_num_valid_samples"] == 16


def test_the_learning_rate_follows_the_schedule(tmp_path):
    _, metrics = run("sft", tmp_path)
    expected = {step + 1: 1e-3 * (0.1 + 0.9 * step / 5) for step in range(5)}
    expected |= {6 + k: 1e-3 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(7)}
    assert curve(metrics, "train/lr") == pytest.approx(expected, rel=1e-6)


def test_max_grad_norm(tmp_path):
    """A tiny limit freezes plain gradient descent, and the norm is reported as it was before."""
    sgd = {
        "policy__optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 1e-2}},
        "policy__scheduler": None,
    }
    before = load_file(tiny.MODEL / "model.safetensors")
    moved = []
    for name, limit in (("small", 1e-12), ("none", None)):
        _, metrics = run("sft", tmp_path, name=name, policy__max_grad_norm=limit, **sgd)
        after = load_file(tmp_path / name / "step_12/policy/weights/model.safetensors")
        moved.append(max((after[key] - before[key]).abs().max().item() for key in before))
        assert min(curve(metrics, "train/grad_norm").values()) > 0.1
    assert moved[0] < 1e-9 < 1e-4 < moved[1]


def test_bfloat16_is_close_and_keeps_the_weights_in_float32(tmp_path):
    _, exact = run("dpo", tmp_path, name="float32")
    _, rough = run("dpo", tmp_path, name="bfloat16", policy__precision="bfloat16")
    assert rough[1]["train/rewards_chosen_mean"] == 0.0  # policy and reference round alike
    assert curve(rough) != curve(exact)
    assert curve(rough) == pytest.approx(curve(exact), abs=0.1)
    weights = load_file(tmp_path / "bfloat16/step_12/policy/weights/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("section", SECTIONS)
def test_training_helps(section, tmp_path):
    """On the data that it trains on, over and over."""
    changes = {f"{section}__max_num_epochs": 30, f"{section}__max_num_steps": 60}
    changes |= {"policy__train_micro_batch_size": 8, "policy__scheduler": None}
    changes |= {f"{section}__val_period": 0, "checkpointing__save_period": 60}
    _, metrics = run(section, tmp_path, samples=16, **changes)
    losses = curve(metrics)
    assert losses[60] < 0.6 * losses[1], losses


# Names


def test_metrics_have_nemo_rls_names(tmp_path):
    counts = {"global_valid_seqs", "global_valid_toks"}
    rewards = {"loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean"}
    of_loss = {
        "sft": {"loss", "num_unmasked_tokens", "num_valid_samples"},
        "dpo": {*rewards, "sft_loss", "preference_loss", "num_valid_samples"},
        "rm": {*rewards, "num_valid_samples"},
    }
    of_validation = {
        "sft": ("validation", {"val_loss"}),
        "dpo": ("validation-default", of_loss["dpo"] | counts),
        "rm": ("validation-default", of_loss["rm"]),
    }
    for section in SECTIONS:
        _, metrics = run(section, tmp_path, name=section)
        prefix, expected = of_validation[section]
        assert {n for n in metrics[0] if not n.startswith("timing")} == {
            f"{prefix}/{name}" for name in expected
        }
        trained = {n.removeprefix("train/") for n in metrics[1] if n.startswith("train/")}
        assert trained == of_loss[section] | counts | {"grad_norm", "lr"}
        timing = {n for n in metrics[4] if n.startswith("timing/")}
        assert timing >= {
            "timing/train/total_step_time",
            "timing/train/policy_training",
            "timing/train/checkpointing",
            "timing/train/valid_tokens_per_sec_per_gpu",
            "timing/validation/total_validation_time",
        }


def test_validation_sets_have_names(tmp_path):
    paths = {"addition": str(tiny.RANKED_VALIDATION_PAIRS)}
    _, metrics = run(
        "dpo",
        tmp_path,
        data__val_data_paths=paths,
        checkpointing__metric_name="val:validation-addition_accuracy",
        checkpointing__higher_is_better=True,
    )
    assert "validation-addition/loss" in metrics[0]
    assert "validation-default/loss" not in metrics[0]


# Data


def test_which_tokens_are_trained_on(tokenizer):
    messages = [
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5="},
        {"role": "assistant", "content": "9"},
    ]
    sample = sft_processor({"messages": messages}, None, tokenizer, 32, 0)
    short = sft_processor({"messages": messages[:2]}, None, tokenizer, 32, 1)

    def trained_on(batch):
        return [
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(batch["input_ids"], batch["token_mask"], strict=True)
        ]

    def batch_of(multiple, only_final):
        samples = Samples(
            [sample, short],
            ["", ""],
            lambda record, _: flat_sample(record, only_unmask_final=only_final),
            pad_token_id=0,
            multiple=multiple,
        )
        return samples.batch([0, 1])

    assert trained_on(batch_of(1, False)) == ["3</s>9</s>", "3</s>"]
    batch = batch_of(8, True)
    assert trained_on(batch) == ["9</s>", "3</s>"]
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_lengths"].tolist() == [13, 7]


def test_a_conversation_that_is_too_long_has_no_weight(tokenizer):
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    lengths = {
        limit: sft_processor({"messages": messages}, None, tokenizer, limit, 0) for limit in (7, 8)
    }
    assert [lengths[limit]["loss_multiplier"] for limit in (7, 8)] == [0.0, 1.0]
    assert lengths[7]["length"] == 7  # as in NeMo RL: exactly the limit is too long


def test_several_datasets_and_a_split_for_validation(tmp_path, tokenizer):
    rows = [{"q": r["prompt"], "a": r["chosen"]} for r in records(tiny.TRAIN_PAIRS, 30)]
    entries = [
        {"data_path": write_lines(tmp_path / "a.jsonl", rows[:10])},
        {"data_path": write_lines(tmp_path / "b.jsonl", rows[10:]), "split_validation_size": 5},
    ]
    default = {"dataset_name": "ResponseDataset", "input_key": "q", "output_key": "a"}
    result, metrics = run(
        "sft", tmp_path, data__train=entries, data__default=default, data__validation=None
    )
    assert result["total_steps"] == 3 * (25 // 8)
    assert "validation/val_loss" in metrics[0]


def test_prompt_file_and_chat_template(tmp_path):
    """Both change what the model reads, and so the loss."""
    (tmp_path / "prompt.txt").write_text("1+1=2{}")
    entry = make_config("sft", tmp_path)["data"]["train"]
    losses = []
    for name, changes in {
        "plain": {},
        "prompt": {"data__train": {**entry, "prompt_file": str(tmp_path / "prompt.txt")}},
        "template": {
            "policy__tokenizer__chat_template": "{% for m in messages %}+{{ m.content }}"
            "{% endfor %}"
        },
    }.items():
        _, metrics = run("sft", tmp_path, name=name, sft__max_num_steps=1, **changes)
        losses.append(metrics[1]["train/loss"])
    assert len(set(losses)) == 3


def test_a_passthrough_template_joins_the_contents():
    tokenizer = get_tokenizer({"name": str(tiny.MODEL), "chat_template": None})
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "1+2=3"


# The reference policy


def test_reference_logprobs_are_computed_once_and_kept(tmp_path, monkeypatch):
    asked, load_policy = [], run_dpo.load_policy

    def counting(name, **options):
        model = load_policy(name, **options)
        model.register_forward_hook(lambda *_: asked.append(name))
        return model

    def forward_passes(**changes):
        """How many there are in a run, of the reference policy and of the policy itself."""
        asked.clear()
        run("dpo", tmp_path, **changes)
        return len(asked)

    monkeypatch.setattr(run_dpo, "load_policy", counting)
    first = forward_passes(dpo__max_num_steps=12)
    kept = tmp_path / "run" / "reference_logprobs.safetensors"
    assert kept.exists()
    assert forward_passes() == 0  # the run is at its end
    of_a_step = forward_passes(dpo__max_num_steps=13)  # the file is there
    os.truncate(kept, kept.stat().st_size - 10)
    with pytest.warns(UserWarning, match="computed again"):
        again = forward_passes(dpo__max_num_steps=14)
    assert of_a_step < again < first
    assert forward_passes(name="elsewhere", checkpointing__enabled=False) == first
    assert not (tmp_path / "elsewhere").exists()


def test_reference_logprobs_are_those_of_each_batch(tmp_path, monkeypatch):
    """Against a run that asks the reference in every step, as NeMo RL does."""
    _, once = run("dpo", tmp_path, name="once")
    reference, batch_of = tiny.load_policy().eval(), Samples.batch

    def batch_and_reference(samples, numbers):
        data = batch_of(samples, numbers)
        with torch.no_grad():
            logits = reference(input_ids=data["input_ids"]).logits.log_softmax(-1)
        ids = data["input_ids"][:, 1:, None]
        logprobs = logits[:, :-1].gather(-1, ids)[..., 0]
        data["reference_policy_logprobs"] = torch.nn.functional.pad(logprobs, (0, 1))
        return data

    monkeypatch.setattr(run_dpo, "keep_reference_logprobs", lambda *_: None)
    monkeypatch.setattr(Samples, "batch", batch_and_reference)
    _, again = run("dpo", tmp_path, name="every-time")
    assert curve(once) == pytest.approx(curve(again), abs=1e-5)


def test_without_training_the_policy_is_its_reference(tmp_path):
    _, metrics = run("dpo", tmp_path, dpo__max_num_steps=1)
    assert metrics[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


# Checkpoints and time


def test_the_best_checkpoints_and_the_last_are_kept(tmp_path):
    changes = {
        "sft__val_period": 1,
        "checkpointing__save_period": 1,
        "checkpointing__keep_top_k": 2,
    }
    _, metrics = run("sft", tmp_path, **changes)
    losses = {s: v for s, v in curve(metrics, "validation/val_loss").items() if s}
    best = sorted(losses, key=losses.get)[:2]
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {f"step_{step}" for step in {*best, 12}}
    assert 12 not in best  # or this would show less


def test_a_run_stops_in_time(tmp_path, capsys):
    result, _ = run("sft", tmp_path, checkpointing__checkpoint_must_save_by="00:00:00:00")
    assert result["total_steps"] == 1
    assert (tmp_path / "run" / "step_1").is_dir()
    out = capsys.readouterr().out
    assert "checkpoint_must_save_by: the time is up" in out and "sft: stopped at step 1" in out


# Watching a run


class EnoughError(Exception):
    pass


def test_an_observer_sees_every_step_and_can_end_the_run(tmp_path):
    seen = []

    def observe(step, metrics):
        seen.append((step, metrics))
        if step == 8:
            raise EnoughError

    with pytest.raises(EnoughError):
        run("dpo", tmp_path, observe=observe)
    assert [step for step, _ in seen] == list(range(9))  # validation at the start is step 0
    written = read_metrics(tmp_path / "run-logs")
    for step, metrics in seen:
        name = "validation-default_loss"
        assert (f"val:{name}" in metrics) == (step in (0, 4, 8))
        if step:
            assert metrics["train:loss"] == written[step]["train/loss"]
        if step in (0, 4, 8):
            assert metrics[f"val:{name}"] == written[step]["validation-default/loss"]
    # The eighth step was over: its checkpoint is there, and the run goes on from it.
    result, _ = run("dpo", tmp_path)
    assert result["total_steps"] == 12


def test_a_checkpoint_is_ranked_by_a_value_of_its_own_step_only(tmp_path, capsys):
    """Not by the validation before the first step, nor by that of an earlier one."""
    run(
        "dpo", tmp_path, dpo__max_num_steps=3, dpo__val_period=2, checkpointing__save_period=1,
        checkpointing__keep_top_k=None,
    )  # fmt: skip
    metric = "val:validation-default_loss"
    ranked = {}
    for folder in sorted((tmp_path / "run").glob("step_*")):
        ranked[folder.name] = metric in json.loads((folder / "training_info.json").read_text())
    assert ranked == {"step_1": False, "step_2": True, "step_3": False}
    said = capsys.readouterr().out
    for step in (1, 3):
        assert f"step {step} has no {metric}, so its checkpoint is not ranked" in said
