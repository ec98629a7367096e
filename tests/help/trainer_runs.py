# SPDX-License-Identifier: Apache-2.0
"""Small runs of the trainers for the tests: configurations, data, and curves."""

import json
import shutil

from nemo_rl_ref import run_dpo, run_rm, run_sft, tiny
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.files.whole import write_text

RUNNERS = {"sft": run_sft, "dpo": run_dpo, "rm": run_rm}


def records(path, count):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # two processes may do it
    return str(path)


def make_config(section, folder, *, samples=40, name="run", model=tiny.MODEL, **changes):
    """A configuration as the runners get it; changes have dotted keys with ``__`` for the dot."""
    folder.mkdir(exist_ok=True)
    sets = {}
    for part, path in (("train", tiny.TRAIN_PAIRS), ("validation", tiny.VALIDATION_PAIRS)):
        rows = records(path, samples)
        kind = "BinaryPreferenceDataset"
        if section == "sft":
            kind = "ResponseDataset"
            rows = [{"input": row["prompt"], "output": row["chosen"]} for row in rows]
        file = write_lines(folder / f"{section}.{part}.jsonl", rows)
        sets[part] = {"dataset_name": kind, "data_path": file}
    metric = "val_loss" if section == "sft" else "validation-default_loss"
    config = {
        section: {
            "max_num_epochs": 3, "max_num_steps": 12, "val_period": 4, "val_batches": 2,
            "val_global_batch_size": 6, "val_micro_batch_size": 4, "val_at_start": True,
            "val_at_end": False, "seed": 3,
        },
        "checkpointing": {
            "enabled": True, "checkpoint_dir": str(folder / name), "metric_name": f"val:{metric}",
            "higher_is_better": False, "keep_top_k": 2, "save_period": 4,
            "checkpoint_must_save_by": None, "save_optimizer": True,
        },
        "policy": {
            "model_name": str(model), "tokenizer": {"name": str(tiny.MODEL)},
            "train_global_batch_size": 8, "train_micro_batch_size": 3,
            "max_total_sequence_length": 32, "precision": "float32", "max_grad_norm": 1.0,
            "make_sequence_length_divisible_by": 1,
            "reward_model_cfg": {"enabled": True, "reward_model_type": "bradley_terry"},
            "optimizer": {
                "name": "torch.optim.AdamW",
                "kwargs": {"lr": 1e-3, "weight_decay": 0.1, "foreach": False, "fused": False},
            },
            "scheduler": [
                {
                    "name": "torch.optim.lr_scheduler.LinearLR",
                    "kwargs": {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 5},
                },
                {
                    "name": "torch.optim.lr_scheduler.CosineAnnealingLR",
                    "kwargs": {"T_max": 10},
                },
                {"milestones": [5]},
            ],
        },
        "data": {
            "max_input_seq_length": 32, "shuffle": True, "add_bos": True, "add_eos": True,
            "add_generation_prompt": False, "num_workers": 1, **sets,
        },
        "logger": {"log_dir": str(folder / f"{name}-logs"), "tensorboard_enabled": False},
        "cluster": {"gpus_per_node": 1, "num_nodes": 1},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        tree = config
        for part in path:
            tree = tree[part]
        tree[last] = value
    return config


def run(section, folder, **changes):
    """Train; return the result and the metrics by step."""
    names = ("loss", "strict", "allow_config_changes", "observe")
    options = {k: changes.pop(k) for k in names if k in changes}
    config = make_config(section, folder, **changes)
    result = RUNNERS[section].train(config, **options)
    return result, read_metrics(config["logger"]["log_dir"])


def curve(metrics, name="train/loss"):
    return {step: values[name] for step, values in metrics.items() if name in values}


def model_with_dropout(folder):
    """The shipped model with dropout, so that a run depends on the random generators."""
    copy = folder / "model-with-dropout"
    if not copy.exists():
        shutil.copytree(tiny.MODEL, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return copy
