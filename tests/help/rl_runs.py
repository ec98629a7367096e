# SPDX-License-Identifier: Apache-2.0
"""Small configurations for the tests of run_grpo."""

import copy
import json
from pathlib import Path

from nemo_rl_ref.tiny import MODEL
from nemo_rl_ref.tiny.addition import answer, problems, prompt

GENERATION = {
    "max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": None,
    "val_temperature": 1.0, "val_top_p": 1.0, "val_top_k": None, "stop_token_ids": None,
    "stop_strings": None,
}  # fmt: skip
OPTIMIZER = {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-3, "weight_decay": 0.0}}
GAE = {
    "name": "gae", "gae_lambda": 0.95, "gae_gamma": 1, "normalize_advantages": True,
    "gae_lambda_value": None, "gae_lambda_policy": None, "length_adaptive_alpha": 0.0,
}  # fmt: skip


def write_problems(folder, count=64, seed=0):
    """A ResponseDataset of sums."""
    path = Path(folder) / "problems.jsonl"
    if path.exists():  # another process may be reading it
        return path
    rows = problems()[seed][:count]
    lines = [json.dumps({"input": prompt(row), "output": answer(row)}) + "\n" for row in rows]
    path.write_text("".join(lines))
    return path


def settings(folder, changes=None, *, ppo=False):
    """A whole configuration: 4 prompts, 4 responses each, one update, nothing else.

    Args:
        folder: For data, logs and checkpoints.
        changes: Values by dotted key.
        ppo: With a section ppo and a value model.
    """
    common = {
        "num_prompts_per_step": 4, "num_generations_per_prompt": 4, "max_num_epochs": 1,
        "max_num_steps": 2, "val_period": 0, "val_at_start": False, "val_batch_size": 8,
        "max_val_samples": 16, "seed": 7,
    }  # fmt: skip
    sizes = {"train_global_batch_size": 16, "train_micro_batch_size": 16}
    config = {
        "grpo": common,
        "loss_fn": {"reference_policy_kl_penalty": 0.0},
        "policy": {
            "model_name": str(MODEL), "tokenizer": {"name": str(MODEL)}, **sizes,
            "logprob_batch_size": 16, "generation_batch_size": 64, "precision": "float32",
            "max_total_sequence_length": 16,
            "make_sequence_length_divisible_by": 1, "max_grad_norm": 1.0, "optimizer": OPTIMIZER,
            "generation": GENERATION,
        },
        "data": {
            "max_input_seq_length": 16, "shuffle": True,
            "train": {"data_path": str(write_problems(folder))},
            "validation": {"data_path": str(write_problems(folder))},
            "default": {"dataset_name": "ResponseDataset", "env_name": "math"},
        },
        "checkpointing": {
            "enabled": False, "checkpoint_dir": str(Path(folder) / "checkpoints"),
            "metric_name": None, "higher_is_better": True, "save_period": 1,
        },
        "logger": {"log_dir": str(Path(folder) / "logs"), "tensorboard_enabled": False},
    }  # fmt: skip
    if ppo:
        config["ppo"] = {**config.pop("grpo"), "ppo_epochs": 2, "adv_estimator": GAE}
        config["value_loss_fn"] = {"scale": 0.5, "cliprange": 0.2}
        config["value"] = {
            "model_name": str(MODEL),
            **sizes,
            "max_grad_norm": 1.0,
            "optimizer": OPTIMIZER,
        }
    config = copy.deepcopy(config)
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return config
