# SPDX-License-Identifier: Apache-2.0
"""The check of somebody's NeMo RL configuration finds what is wrong with it, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from nemo_rl_ref.config.__main__ import main
from nemo_rl_ref.config.clashes import CLASHES

ROOT = Path(__file__).parents[2]

WRONG = {
    "unknown": ("++dpo.reference_policy_kl_penatly=0.1", 1, "reference_policy_kl_penalty"),
    "wrong type": ("dpo.reference_policy_kl_penalty=high", 1, "expected float"),
    "dead": ("++policy.generation_batch_size=8", 0, "no line of NeMo RL was found"),
    "clash": ("++policy.sequence_packing.enabled=true", 1, "dpo.py:167"),
}


def facts(capsys, *words):
    status = main(["check", str(ROOT / "configs/dpo.yaml"), "--json", *words])
    return status, {fact["key"]: fact for fact in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("problem", WRONG)
def test_a_problem_is_told_at_its_key(problem, capsys):
    override, status, says = WRONG[problem]
    found_status, found = facts(capsys, override)
    fact = found[override.lstrip("+").split("=")[0]]
    assert (found_status, fact["problem"]) == (status, problem) and says in fact["says"]


def test_a_good_key_has_its_type_default_and_reader(capsys):
    status, found = facts(capsys)
    fact = found["dpo.reference_policy_kl_penalty"]
    assert status == 0 and not fact["problem"]
    assert (fact["types"], fact["default"]) == ("float", "0.05")
    assert fact["read"] == "nemo_rl/algorithms/loss/loss_functions.py:1026"


def test_the_table_shows_only_problems_if_asked(capsys):
    words = ["check", str(ROOT / "configs/dpo.yaml"), "--problems"]
    assert main([*words, "++policy.generation_batch_size=8"]) == 0
    output = capsys.readouterr().out
    assert "1 dead" in output and "max_num_steps" not in output


def test_a_file_that_is_not_there_is_one_line(capsys):
    assert main(["check", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif("NEMO_RL_CHECKOUT" not in os.environ, reason="needs a checkout of NeMo RL")
def test_every_clash_names_a_line_that_checks():
    for clash in CLASHES:
        lines = Path(os.environ["NEMO_RL_CHECKOUT"], clash.file).read_text().splitlines()
        assert lines[clash.line - 1].split()[0] in ("assert", "if"), clash
