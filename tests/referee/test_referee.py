# SPDX-License-Identifier: Apache-2.0
"""What `make referee` has recorded, and that its comparison sees a difference. Needs no NeMo RL."""

import copy
import json

import compare
import pytest
from small_site import TOP
from variants import VARIANTS, algorithm, overrides

from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.config.sections import DPOSettings, RMSettings, SFTSettings
from nemo_rl_ref.config.settings import read_settings, used_keys
from nemo_rl_ref.rl.settings import NOT_HERE_IN_RL, GRPOSettings, PPOSettings

RECORDED = json.loads((TOP / "benchmarks/results/referee.json").read_text())
KINDS = {
    "sft": SFTSettings, "dpo": DPOSettings, "rm": RMSettings, "grpo": GRPOSettings,
    "ppo": PPOSettings,
}  # fmt: skip


def test_every_variant_was_run_and_agrees_with_nemo_rl():
    assert len(VARIANTS) >= 20 and list(RECORDED["variants"]) == list(VARIANTS)
    for name, found in RECORDED["variants"].items():
        assert found["unexplained"] == [], name
        assert found["steps"] >= 1 and found["batches"] >= found["steps"], name
        assert found["largest"]["learning rate"] == found["largest"].get("masks", 0) == 0, name
        assert max(found["largest"].values()) <= compare.BOUND == RECORDED["bound"], name


#: NeMo RL's unit tests of what is mirrored whole; others fail where names are left out.
WHOLE = (
    "algorithms/test_advantage_estimator.py", "algorithms/test_loss_functions.py",
    "algorithms/test_reward_functions.py", "distributed/test_batched_data_dict.py",
    "utils/test_config.py", "utils/test_timer.py",
)  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_nemo_rls_own_unit_tests_pass(name):
    found = RECORDED["unit_tests"][name]
    assert found["passed"] and found["failed"] == {}


def test_each_difference_that_stays_has_its_reason_on_the_page():
    page = (TOP / "docs/reference/against-nemo-rl.md").read_text().lower()
    met = {reason for found in RECORDED["variants"].values() for reason in found["stays"]}
    assert met and all(reason in page for reason in met)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_only_keys_that_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(TOP)
    kind = algorithm(name)
    not_here = {"not_here": NOT_HERE_IN_RL} if kind in ("grpo", "ppo") else {}
    config, _ = read_config(
        f"configs/{kind}.yaml", overrides(name, tmp_path), used_keys(KINDS[kind]), **not_here
    )
    read_settings(config, KINDS[kind])


def a_record():
    """A step of one batch of two rows, a validation and a checkpoint."""
    batch = {
        "training": True, "of": "policy", "sample_mask": [1.0, 1.0],
        "input_ids": [[1, 5, 6, 2], [1, 7, 2]], "token_mask": [[0, 0, 1, 1], [0, 1, 1]],
        "advantages": [[0.0, 0.0, 0.5, 0.5], [0.0, -0.5, -0.5]],
    }  # fmt: skip
    return {
        "batches": [batch],
        "metrics": [
            [1, "train", {"loss": 0.5, "lr": 1e-4}],
            [1, "validation", {"accuracy": 0.25}],
            [1, "timing/train", {"total_step_time": 1.0}],
        ],
        "checkpoints": [[1, {"total_steps": 1, "val:accuracy": 0.25}]],
        "kept": [1],
    }


def test_a_record_agrees_with_itself():
    found = compare.compare(a_record(), a_record())
    assert found["unexplained"] == [] and max(found["largest"].values()) == 0
    assert (found["steps"], found["batches"], found["stays"]) == (1, 1, [])


def put(*path, value):
    def change(record):
        place = record
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


CHANGES = {
    "a token": (put("batches", 0, "input_ids", 1, 1, value=8), "batches: batch 0"),
    "the order of rows": (lambda r: r["batches"][0]["input_ids"].reverse(), "batches: batch 0"),
    "a mask": (put("batches", 0, "token_mask", 0, 1, value=1), "masks"),
    "a sample's weight": (put("batches", 0, "sample_mask", value=[1.0, 0.0]), "sample_mask"),
    "an advantage": (put("batches", 0, "advantages", 0, 2, value=0.501), "advantages, by 1.0e-03"),
    "a batch more": (lambda r: r["batches"].append(r["batches"][0]), "2 ↔ 1 training batches"),
    "a loss": (put("metrics", 0, 2, "loss", value=0.5002), "train/loss 0.5002 ↔ 0.5"),
    "a loss that is no number": (put("metrics", 0, 2, "loss", value="nan"), "train/loss nan ↔ 0.5"),
    "a learning rate, by rounding": (put("metrics", 0, 2, "lr", value=1.0000001e-4), "train/lr"),
    "a validation less": (lambda r: r["metrics"].pop(1), "validation: only one side"),
    "a step of validation": (put("metrics", 1, 0, value=2), "only one side"),
    "a checkpoint kept": (put("kept", value=[1, 2]), "checkpoints kept: [1, 2] ↔ [1]"),
    "a counter": (put("checkpoints", 0, 1, "total_steps", value=2), "total_steps 2 ↔ 1"),
    "a ranking": (put("checkpoints", 0, 1, "val:loss", value=2), "no val:loss here"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_comparison_sees(change):
    alter, message = CHANGES[change]
    record = copy.deepcopy(a_record())
    alter(record)
    found = compare.compare(record, a_record())
    assert any(message in text for text in found["unexplained"]), found["unexplained"]


def test_tokens_after_the_response_are_the_environments_message_if_no_loss_reads_them():
    theirs = a_record()
    theirs["batches"][0]["input_ids"][1] += [9, 9]
    theirs["batches"][0]["token_mask"][1] += [0, 0]
    theirs["batches"][0]["advantages"][1] += [-0.5, -0.5]
    found = compare.compare(theirs, a_record())
    assert found["unexplained"] == [] and found["stays"] == ["environment message"]
    theirs["batches"][0]["token_mask"][1][-1] = 1
    assert compare.compare(theirs, a_record())["unexplained"]
