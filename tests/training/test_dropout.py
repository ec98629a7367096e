# SPDX-License-Identifier: Apache-2.0
"""Dropout is on in updates and nowhere else: not in validation, rollouts or the reference."""

import math

import pytest
from rl_runs import settings
from trainer_runs import model_with_dropout, run

from nemo_rl_ref import run_grpo, tiny
from nemo_rl_ref.files.metrics import read_metrics


@pytest.mark.parametrize("section", ["sft", "dpo", "rm"])
def test_validation_is_that_of_the_model_without_dropout(section, tmp_path):
    """At step 0 both models have the same weights; in the first update they differ."""
    first = {}
    for name, model in (("plain", tiny.MODEL), ("dropout", model_with_dropout(tmp_path))):
        short = {f"{section}__max_num_steps": 1, f"{section}__val_at_end": False}
        _, metrics = run(
            section, tmp_path / name, model=model, checkpointing__enabled=False, **short
        )
        first[name] = metrics
    seen = {key: value for key, value in first["plain"][0].items() if key.startswith("validation")}
    assert len(seen) >= 1
    assert {key: first["dropout"][0][key] for key in seen} == seen
    assert first["plain"][1]["train/loss"] != first["dropout"][1]["train/loss"]


def test_the_reference_of_dpo_has_no_dropout(tmp_path):
    """Before the first update the policy is its reference, so every pair has loss log 2."""
    model = model_with_dropout(tmp_path)
    short = {"dpo__max_num_steps": 1, "checkpointing__enabled": False}
    _, metrics = run("dpo", tmp_path, model=model, **short)
    assert metrics[0]["validation-default/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("rows", [8, 16], ids=["two updates a step", "one update a step"])
def test_rollouts_and_old_log_probabilities_are_of_the_model_without_dropout(rows, tmp_path):
    """Sampler and trainer agree on each token, and both models give the same responses."""
    first = {}
    for name, model in (("plain", tiny.MODEL), ("dropout", model_with_dropout(tmp_path))):
        changes = {
            "policy.model_name": str(model),
            "grpo.max_num_steps": 1,
            "grpo.val_at_start": True,
            "logger.log_dir": str(tmp_path / name),
            "policy.train_micro_batch_size": rows,
            "policy.train_global_batch_size": rows,
        }
        run_grpo.train(settings(tmp_path, changes))
        first[name] = read_metrics(tmp_path / name)
    plain, dropout = first["plain"], first["dropout"]
    for key in ("validation/accuracy", "validation/avg_length"):
        assert dropout[0][key] == plain[0][key]
    for key in ("train/reward", "train/mean_gen_tokens_per_sample"):
        assert dropout[1][key] == plain[1][key]
    assert dropout[1]["train/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
    assert dropout[1]["train/loss"] != plain[1]["train/loss"]
