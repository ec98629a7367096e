# SPDX-License-Identifier: Apache-2.0
"""Keys that a run reads change what it does: each is changed, and the effect is seen."""

import math

import pytest
from rl_runs import settings
from trainer_runs import curve, run

from nemo_rl_ref import run_grpo
from nemo_rl_ref.files.metrics import read_metrics

SHORT = {
    "dpo__max_num_steps": 3, "dpo__val_period": 2, "dpo__val_at_start": False,
    "checkpointing__enabled": False,
}  # fmt: skip


def validated(metrics):
    """The steps that have a validation."""
    return [step for step, found in metrics.items() if any("validation" in name for name in found)]


def trained(folder, **changes):
    """Metrics of three steps of DPO."""
    return run("dpo", folder, **{**SHORT, **changes})[1]


@pytest.mark.parametrize(
    ("key", "value", "steps"),
    [
        ("val_period", 2, [2]),
        ("val_period", 3, [3]),
        ("val_period", 0, []),
        ("val_at_start", True, [0, 2]),
        ("val_at_end", True, [2, 3]),
    ],
)
def test_when_dpo_validates(key, value, steps, tmp_path):
    assert validated(trained(tmp_path, **{f"dpo__{key}": value})) == steps


@pytest.mark.parametrize(
    ("key", "value", "pairs"),
    [("val_batches", 1, 6), ("val_batches", 3, 18), ("val_global_batch_size", 5, 10)],
)
def test_how_much_dpo_validates_on(key, value, pairs, tmp_path):
    """A metric over n pairs of log 2 is the same for all n; accuracy is a share of n."""
    metrics = trained(tmp_path, dpo__max_num_steps=2, **{f"dpo__{key}": value})
    right = metrics[2]["validation-default/accuracy"] * pairs
    assert right == pytest.approx(round(right), abs=1e-4)
    assert metrics[2]["validation-default/num_valid_samples"] == pairs


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo__seed": 4},
        {"data__shuffle": False},
        {"dpo__reference_policy_kl_penalty": 0.5},
        {"dpo__preference_loss_weight": 0.5},
        {"dpo__sft_loss_weight": 0.5},
        {"dpo__preference_average_log_probs": True},
        {"policy__train_global_batch_size": 6},
        {"policy__optimizer__kwargs__lr": 1e-4},
        {"policy__optimizer__kwargs__weight_decay": 10.0},
        {"policy__max_grad_norm": 1e-3},
        {"policy__scheduler": None},
        {"policy__precision": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_dpo_trains_depends_on(changes, tmp_path):
    plain = curve(trained(tmp_path / "plain"))
    changed = curve(trained(tmp_path / "changed", **changes))
    assert list(plain) == list(changed) == [1, 2, 3]
    assert plain != changed
    # The same settings give the same numbers, so the difference is the key's.
    assert curve(trained(tmp_path / "again")) == plain


def sampled(folder, changes):
    """Metrics of four steps of GRPO."""
    common = {"grpo.max_num_steps": 4, "logger.log_dir": str(folder / "logs")}
    folder.mkdir(exist_ok=True)
    run_grpo.train(settings(folder, {**common, **changes}))
    return read_metrics(folder / "logs")


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"grpo.val_period": 1}, [1, 2, 3, 4]),
        ({"grpo.val_period": 1, "grpo.val_start_at": 3}, [3, 4]),
        ({"grpo.val_at_start": True}, [0]),
        ({"grpo.val_at_end": True}, [4]),
    ],
    ids=["val_period", "val_start_at", "val_at_start", "val_at_end"],
)
def test_when_grpo_validates(changes, steps, tmp_path):
    assert validated(sampled(tmp_path, changes)) == steps


def test_the_temperature_of_validation_is_its_own(tmp_path):
    """Greedy at val_temperature 0, whatever the training's; another answer at a high one."""
    first = {}
    for name, value in (("greedy", 0.0), ("also greedy", 0.0), ("hot", 8.0)):
        changes = {
            "grpo.val_at_start": True, "grpo.max_num_steps": 1,
            "policy.generation.val_temperature": value,
            "policy.generation.temperature": 1.0 if name == "greedy" else 0.7,
        }  # fmt: skip
        first[name] = sampled(tmp_path / name, changes)[0]
    names = ("validation/accuracy", "validation/avg_length")
    found = {name: [metrics[key] for key in names] for name, metrics in first.items()}
    assert found["greedy"] == found["also greedy"] != found["hot"]


@pytest.mark.parametrize(("end", "value"), [("low", -0.5), ("high", 0.5)])
def test_advantage_clip(end, value, tmp_path):
    metrics = sampled(tmp_path, {f"grpo.advantage_clip_{end}": value, "grpo.max_num_steps": 3})
    worst = {"low": min, "high": max}[end](
        found[f"train/advantages/{'min' if end == 'low' else 'max'}"]
        for step, found in metrics.items()
        if step
    )
    assert math.isclose(worst, value)
