# SPDX-License-Identifier: Apache-2.0
"""A run goes on from its own checkpoint only, and with the settings that it is given."""

import functools
import json
import shutil
import sys

import pytest
from rl_runs import settings as rl_settings
from trainer_runs import curve, run

from nemo_rl_ref import run_grpo, tiny
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.files.sealed import CheckpointError, seal
from nemo_rl_ref.training import identity

LOSS = """
from nemo_rl_ref.algorithms.loss import NLLLossFn
from sft_weight import WEIGHT

class HeavyLoss(NLLLossFn):
    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        return WEIGHT * loss, metrics

class OtherLoss(HeavyLoss):
    pass
"""
REWARD = """
def short(prompt, response, ground_truth):
    return -float(len(response))

def long(prompt, response, ground_truth):
    return float(len(response))
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Losses and rewards of the user's, in files."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "sft_loss.py").write_text(LOSS)
    (tmp_path / "sft_weight.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "my_reward.py").write_text(REWARD)
    yield tmp_path
    for name in ("sft_loss", "sft_weight", "my_reward"):
        sys.modules.pop(name, None)


def short_run(section, folder, **changes):
    return run(section, folder, **{f"{section}__max_num_steps": 4, **changes})


def refusal(section, folder, **changes):
    with pytest.raises(CheckpointError) as caught:
        short_run(section, folder, **changes)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'run' / 'step_4'}: the checkpoint is of another run:")
    assert "checkpointing.checkpoint_dir to a new folder" in message
    assert "--allow-config-changes" in message
    return message


def test_another_loss_is_another_run(code):
    """Kind: what trains is in no configuration: class, file, a file that it imports, or none."""
    spec = f"{code / 'sft_loss.py'}:HeavyLoss"
    short_run("sft", code, loss=spec)
    short_run("sft", code, loss=spec)  # the same one is not refused
    assert "loss: HeavyLoss of sft_loss.py" in refusal("sft", code)
    assert "OtherLoss of sft_loss.py" in refusal("sft", code, loss=spec.replace("Heavy", "Other"))
    (code / "sft_weight.py").write_text("WEIGHT = 30.0\n")
    assert "loss: HeavyLoss of sft_loss.py, SHA" in refusal("sft", code, loss=spec)
    (code / "sft_weight.py").write_text("WEIGHT = 2.0\n")
    (code / "sft_loss.py").write_text(LOSS.replace("WEIGHT *", "3 * WEIGHT *"))
    assert "loss: HeavyLoss of sft_loss.py, SHA" in refusal("sft", code, loss=spec)
    result, _ = run("sft", code, loss=spec, allow_config_changes=True, sft__max_num_steps=5)
    assert result["total_steps"] == 5


def test_an_edited_loss_is_read_again_in_the_same_program(code):
    """As in a notebook: Python keeps the module that it has imported."""
    spec = f"{code / 'sft_loss.py'}:HeavyLoss"
    changes = {"sft__max_num_steps": 1, "checkpointing__enabled": False}
    _, before = run("sft", code, name="before", loss=spec, **changes)
    (code / "sft_loss.py").write_text(LOSS.replace("WEIGHT *", "3 * WEIGHT *"))
    _, after = run("sft", code, name="after", loss=spec, **changes)
    assert after[1]["train/loss"] == pytest.approx(3 * before[1]["train/loss"], rel=1e-5)
    (code / "sft_weight.py").write_text("WEIGHT = 20.0\n")
    _, helper = run("sft", code, name="helper", loss=spec, **changes)
    assert helper[1]["train/loss"] == pytest.approx(30 * before[1]["train/loss"], rel=1e-5)


def test_another_reward_is_another_run(code):
    changes = {"checkpointing.enabled": True, "grpo.max_num_steps": 1}
    spec = f"{code / 'my_reward.py'}:short"
    run_grpo.train(rl_settings(code, changes), env=spec)
    run_grpo.train(rl_settings(code, changes), env=spec)
    for other in (spec.replace("short", "long"), None):
        with pytest.raises(CheckpointError, match="reward: short of my_reward.py, SHA.* now"):
            run_grpo.train(rl_settings(code, changes), env=other)
    (code / "my_reward.py").write_text(REWARD.replace("-float", "-2 * float"))
    with pytest.raises(CheckpointError, match="reward: short of my_reward.py, SHA"):
        run_grpo.train(rl_settings(code, changes), env=spec)


def test_other_data_another_tokenizer_and_another_version_are_named(tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny.MODEL, model)
    named = {"policy__tokenizer": {"name": str(model)}}
    short_run("sft", tmp_path, **named)
    assert "data.train: the records have changed" in refusal("sft", tmp_path, samples=41, **named)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    message = refusal("sft", tmp_path, **named, policy__precision="bfloat16")
    assert "tokenizer: its tokens or its chat template have changed" in message
    assert "policy.precision: 'float32' in the checkpoint, 'bfloat16' now" in message
    monkeypatch.setattr("nemo_rl_ref.training.loop.RESULTS", identity.RESULTS + 1)
    assert "results: this version of the package trains another result" in refusal(
        "sft", tmp_path, **named
    )


def test_another_algorithm_is_refused_whatever_is_allowed(tmp_path):
    """The counters and the model's head are others; the weights can be trained on."""
    short_run("sft", tmp_path)
    for section in ("dpo", "rm"):
        with pytest.raises(CheckpointError, match=f"is of a run of sft, this is {section}. Set .*"):
            short_run(section, tmp_path, allow_config_changes=True)


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    """Reached by steps or by epochs; asked for fewer steps than were done; and in GRPO."""
    _, before = short_run("sft", tmp_path)
    for steps in (4, 3):
        capsys.readouterr()
        result, after = run("sft", tmp_path, sft__max_num_steps=steps)
        assert result["total_steps"] == 4 and after == before
        out = capsys.readouterr().out
        assert "sft: finished at step 4, nothing to train" in out
        assert str(tmp_path / "run" / "step_4") in out
    changes = {"checkpointing.enabled": True, "grpo.max_num_steps": 9, "data.train": {
        "data_path": str(rl_settings(tmp_path)["data"]["train"]["data_path"])}}  # fmt: skip
    changes["grpo.num_prompts_per_step"] = 32  # two steps an epoch
    changes["policy.train_global_batch_size"] = 128
    for _ in range(2):
        capsys.readouterr()
        run_grpo.train(rl_settings(tmp_path, changes))
    assert "grpo: finished at step 2, nothing to train" in capsys.readouterr().out


def test_a_run_that_validation_has_stopped_stays_stopped(tmp_path, capsys):
    changes = {
        "checkpointing.enabled": True, "grpo.max_num_steps": 5, "grpo.val_period": 1,
        "grpo.stop_at_validation_metric": "accuracy", "grpo.stop_at_validation_threshold": 0.0,
    }  # fmt: skip
    run_grpo.train(rl_settings(tmp_path, changes))
    run_grpo.train(rl_settings(tmp_path, changes))
    assert "grpo: finished at step 1, nothing to train" in capsys.readouterr().out
    assert list(read_metrics(tmp_path / "logs")) == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"policy__optimizer__kwargs__lr": 3e-4},
        {"policy__optimizer__kwargs__weight_decay": 0.5},
        {"policy__scheduler": None},
        {"policy__scheduler": {"name": "torch.optim.lr_scheduler.StepLR",
                               "kwargs": {"step_size": 2, "gamma": 0.5}}},
        {"policy__scheduler": {"name": "torch.optim.lr_scheduler.OneCycleLR",
                               "kwargs": {"max_lr": 0.01, "total_steps": 20}}},
    ],
    ids=["lr", "weight_decay", "no scheduler", "another scheduler", "one that turns betas too"],
)  # fmt: skip
def test_the_optimizers_settings_are_the_configurations(changes, tmp_path, capsys):
    """Kind: an optimizer's state brings its settings with it; a scheduler's does, too."""
    run("sft", tmp_path, sft__max_num_steps=8)
    _, resumed = run("sft", tmp_path, allow_config_changes=True, **changes)
    out = capsys.readouterr().out
    for key in changes:
        assert f"WARNING: {key.replace('__', '.')}" in out
    _, fresh = run("sft", tmp_path, name="fresh", **changes)
    rates, expected = curve(resumed, "train/lr"), curve(fresh, "train/lr")
    assert [rates[step] for step in range(9, 13)] == [expected[step] for step in range(9, 13)]
    if "policy__optimizer__kwargs__weight_decay" in changes:
        import torch

        state = torch.load(tmp_path / "run/step_12/policy/optimizer/optimizer.pt")
        assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "torch.optim.SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
        {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-3, "amsgrad": True}},
    ],
)
def test_an_optimizer_that_keeps_other_averages_starts_without(optimizer, tmp_path):
    run("sft", tmp_path, sft__max_num_steps=8)
    with pytest.warns(UserWarning, match="keeps other averages than this run's"):
        result, _ = run("sft", tmp_path, allow_config_changes=True, policy__optimizer=optimizer)
    assert result["total_steps"] == 12


def test_what_a_change_does_not_do_is_said(tmp_path, capsys):
    run("sft", tmp_path, sft__max_num_steps=8)
    other = tmp_path / "other"
    shutil.copytree(tiny.MODEL, other)
    run("sft", tmp_path, allow_config_changes=True, model=other)
    out = capsys.readouterr().out
    assert "WARNING: policy.model_name: " in out and "no effect on the policy" in out
    info = json.loads((tmp_path / "run/step_12/training_info.json").read_text())
    assert info["identity"]["algorithm"] == "sft"


def test_another_reference_model_is_another_run(tmp_path):
    """The folder is the same, what is in it is not. SFT needs it at its start only."""
    model = tmp_path / "model"
    shutil.copytree(tiny.MODEL, model)
    for section in ("dpo", "sft"):
        short_run(section, tmp_path, model=model, name=section)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="reference: the files of the reference model"):
        short_run("dpo", tmp_path, model=model, name="dpo")
    shutil.rmtree(model)
    result, _ = run("sft", tmp_path, model=model, name="sft", sft__max_num_steps=5)
    assert result["total_steps"] == 5
    kl = {"loss_fn.reference_policy_kl_penalty": 0.1, "checkpointing.enabled": True}
    shutil.copytree(tiny.MODEL, model)
    kl["policy.model_name"] = str(model)
    run_grpo.train(rl_settings(tmp_path, kl))
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="reference: the files of the reference model"):
        run_grpo.train(rl_settings(tmp_path, kl))


def test_a_configuration_that_is_not_read_any_more_is_another_run(tmp_path):
    short_run("sft", tmp_path)
    folder = tmp_path / "run" / "step_4"
    text = (folder / "config.yaml").read_text().replace("float32", "float8")
    (folder / "config.yaml").write_text(text)
    (folder / "files.json").unlink()
    seal(folder)
    message = refusal("sft", tmp_path)
    assert "config.yaml: not a configuration that this version reads: policy.precision" in message
    result, _ = run("sft", tmp_path, allow_config_changes=True, sft__max_num_steps=5)
    assert result["total_steps"] == 5


def test_a_decorated_function_is_the_one_that_was_written():
    written = identity.source_of(short_run)
    assert written.startswith("short_run of test_identity.py, SHA-256 ")
    assert identity.source_of(functools.lru_cache(functools.partial(short_run, "sft"))) == written
    assert identity.source_of(tiny.load_policy) == "load_policy"  # this package's
