# SPDX-License-Identifier: Apache-2.0
"""What the trainers refuse before any work is done, and their command line."""

import json
from pathlib import Path

import pytest
from trainer_runs import make_config, records, run, write_lines

from nemo_rl_ref import run_dpo, run_rm, run_sft, tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.config.sections import DPOSettings
from nemo_rl_ref.config.settings import read_settings
from nemo_rl_ref.training.samples import preference_samples
from nemo_rl_ref.training.supervised import Task, fit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "sft",
            {"policy__train_global_batch_size": 0},
            "policy.train_global_batch_size: got 0, exp",
        ),
        (
            "sft",
            {"policy__train_micro_batch_size": "eight"},
            "policy.train_micro_batch_size: got 'eight', expected an integer from 1 on",
        ),
        ("sft", {"policy__train_global_batch_size": 64}, "got 64 with 40 samples in data.train"),
        (
            "sft",
            {"policy__precision": "float16"},
            "policy.precision: got 'float16', expected float32",
        ),
        ("sft", {"policy__max_grad_norm": -1}, "policy.max_grad_norm: got -1, expected null or"),
        (
            "sft",
            {"sft__max_num_steps": -1},
            "sft.max_num_steps: got -1, expected an integer from 1",
        ),
        ("sft", {"data__validation": None}, "sft.val_period: got 4 without data.validation"),
        (
            "sft",
            {"checkpointing__metric_name": "val:validation-default_loss"},
            "checkpointing.metric_name: got 'val:validation-default_loss', expected one of val:",
        ),
        (
            "sft",
            {"checkpointing__metric_name": "val_loss"},
            "got 'val_loss', expected null, or 'val:'",
        ),
        (
            "sft",
            {"checkpointing__save_period": 0},
            "checkpointing.save_period: got 0, expected an integer from 1 on",
        ),
        ("sft", {"checkpointing__checkpoint_must_save_by": "4h"}, "got '4h', expected DD:HH:MM:SS"),
        (
            "sft",
            {"data__train": {"dataset_name": "squad"}},
            "dataset_name: got 'squad'; Here it can be",
        ),
        ("dpo", {"data__train": {"dataset_name": "os.system"}}, "dataset_name: got 'os.system'"),
        ("dpo", {"data__train": []}, r"data.train: got \[\], expected one dataset"),
        ("dpo", {"policy__optimizer__name": "torch.optim.AdamV"}, "did you mean torch.optim.Adam"),
        (
            "rm",
            {"policy__reward_model_cfg__reward_model_type": "regression"},
            "policy.reward_model_cfg.reward_model_type: got 'regression', expected bradley_terry",
        ),
    ],
)
def test_bad_settings(section, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(section, tmp_path, **changes)
    assert not list(tmp_path.glob("run/step_*")) and not (tmp_path / "run-logs").exists()


def test_a_bad_record_is_found_before_the_first_step(tmp_path):
    rows = [{"input": "1+1=", "output": "2"}] * 20 + [{"input": "1+1="}]
    entry = {
        "dataset_name": "ResponseDataset",
        "data_path": write_lines(tmp_path / "bad.jsonl", rows),
    }
    with pytest.raises(ValueError, match=r"bad\.jsonl:21: no field 'output'; got \['input'\], exp"):
        run("sft", tmp_path, data__train=entry)


def test_samples_that_are_too_long_are_counted_once(tmp_path, capsys):
    limit = 10  # tokens; a pair of exactly that length still fits
    lengths = [
        2 + len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        for row in records(tiny.TRAIN_PAIRS, 40)
    ]
    too_long = sum(length > limit for length in lengths)
    assert 0 < too_long < 40
    result, _ = run("dpo", tmp_path, data__max_input_seq_length=limit)
    text = f"data.train: {too_long} of 40 samples are longer than data.max_input_seq_length=10 and"
    assert capsys.readouterr().out.count(text) == 1
    assert result["total_steps"] == 12
    with pytest.raises(
        ValueError, match="data.train: 40 of 40 samples are longer than data.max_in"
    ):
        run("dpo", tmp_path, name="short", data__max_input_seq_length=4)


def test_a_loss_that_needs_whole_batches_gets_them(tmp_path):
    class Couples(DPOLossFn):
        needs_whole_batch = True

    config = make_config("dpo", tmp_path)
    settings = read_settings(config, DPOSettings)
    tokenizer = get_tokenizer(config["policy"]["tokenizer"])
    training, validation = preference_samples(settings, tokenizer, add_loss_mask=True)
    task = Task(training, validation, tiny.load_policy, Couples(DPOLossConfig()))
    with pytest.raises(
        ValueError, match="train_micro_batch_size: Couples couples the samples of a"
    ):
        fit(task, settings, tokenizer, config)


# The command line


@pytest.mark.parametrize(
    ("section", "runner"), [("sft", run_sft), ("dpo", run_dpo), ("rm", run_rm)]
)
def test_the_example_configurations_run(section, runner, tmp_path, monkeypatch, capsys):
    pytest.importorskip("hydra")
    monkeypatch.chdir(ROOT)
    arguments = ["--config", f"configs/{section}.yaml", f"{section}.max_num_steps=2"]
    arguments += [f"checkpointing.checkpoint_dir={tmp_path}/run", f"logger.log_dir={tmp_path}/logs"]
    assert runner.main(arguments) == 0
    out = capsys.readouterr().out
    assert "keys used" in out and f"{section} step 2/2  0:00:00 left  loss" in out
    assert (tmp_path / "run" / "step_2" / "policy" / "weights" / "model.safetensors").exists()
    assert (tmp_path / "logs" / "exp_001" / "metrics.jsonl").exists()


def test_errors_are_printed_in_one_piece(tmp_path, monkeypatch, capsys):
    pytest.importorskip("hydra")
    monkeypatch.chdir(ROOT)
    assert run_dpo.main(["--config", "configs/dpo.yaml", "dpo.max_num_step=2"]) == 1
    assert "dpo.max_num_steps" in capsys.readouterr().err
    arguments = [
        "--config",
        "configs/dpo.yaml",
        f"logger.log_dir={tmp_path}",
        "policy.precision=int8",
    ]
    assert run_dpo.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: policy.precision: got 'int8', expected")
    with pytest.raises(SystemExit):
        run_dpo.main(["--config", "configs/dpo.yaml", "--stric"])


def test_settings_are_written_beside_the_metrics(tmp_path):
    run("sft", tmp_path, sft__max_num_steps=1)
    written = json.loads((tmp_path / "run-logs" / "hyperparams.json").read_text())
    assert written["policy"]["train_global_batch_size"] == 8
