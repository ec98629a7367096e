# SPDX-License-Identifier: Apache-2.0
"""What the command makes of a study: files in its folder, a re-evaluation, other launchers."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from studies import ACCURACY, KL, LR, make_study

from nemo_rl_ref.tune import StudyError, make_spec
from nemo_rl_ref.tune.__main__ import main
from nemo_rl_ref.tune.outcome.write import write_outcome
from nemo_rl_ref.tune.search import Settings, open_search
from nemo_rl_ref.tune.spec import SpecError

CHECKOUT = Path(__file__).parents[2] / "help" / "nemo_rl_stand_in"


@pytest.fixture
def arguments(tmp_path):
    """The command's arguments for a small search with the stand-in of NeMo RL."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({LR: {"log_uniform": [1e-5, 1e-3]}}))
    return [
        "dpo", "--config", "configs/dpo.yaml", "--space", str(space), "--objective", ACCURACY,
        "--folder", str(tmp_path / "study"), "--sampler", "random", "--launcher", "nemo-rl",
        "--checkout", str(CHECKOUT), "--launch-command", shlex.quote(sys.executable),
        "dpo.max_num_steps=4", "dpo.val_period=2",
    ]  # fmt: skip


def test_a_search_leaves_report_best_and_reevaluation(arguments, tmp_path, capsys):
    line = [*arguments, "--trials", "1", "--reevaluate", "1", "--top", "1"]
    assert main(line) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "study"
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert f"{LR}={best['policy']['optimizer']['kwargs']['lr']!r}" in said
    assert best["dpo"]["max_num_steps"] == 4
    assert "Re-evaluation over fresh seeds" in (folder / "report.html").read_text()
    assert "run 2 of 2" in said and "One pair of runs has no spread" in said
    assert main(line) == 0  # nothing is left to do
    again = capsys.readouterr().out
    assert "run 1 of" not in again and "goes on after 1 of 1 trials" in again


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reevaluate", "0"], "--reevaluate: got 0, expected 1 or more"),
        (["--top", "0"], "--top: got 0, expected 1 or more"),
        (["--jobs", "0"], "--jobs: got 0, expected 1 or more"),
        (["--seed", "1", "--jobs", "2"], "with --jobs each process needs another"),
        (["--gpus-per-trial", "1"], "are for --engine ray"),
        (["--launcher", "here"], "--launcher nemo-rl and --checkout FOLDER go together"),
        (["--choose", "knee"], "--choose is for several objectives"),
        (["--objective", "train:loss", "--reevaluate", "2"], "compares by one objective"),
    ],
)
def test_options_that_do_not_go_together(arguments, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main([*arguments, *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_rule_is_read_before_any_trial_runs(arguments, tmp_path, capsys):
    more = ["--objective", "train:loss", "--choose", f"{ACCURACY} where {KL} <= 1"]
    assert main([*arguments, *more]) == 1
    assert f"rule: got {KL!r}" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_what_is_no_checkout_is_refused_before_any_trial_runs(arguments, tmp_path, capsys):
    assert main([*arguments, "--checkout", str(tmp_path)]) == 1
    assert "expected NeMo RL" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_nemo_rl_reads_keys_that_the_trainers_here_do_not():
    key = "policy.megatron_cfg.optimizer.lr"
    space = {key: {"log_uniform": [1e-6, 1e-4]}}
    with pytest.raises(ValueError, match="a key without effect here"):
        make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY])
    spec = make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY], launcher="nemo-rl")
    assert spec.from_dict(spec.to_dict()) == spec
    assert spec.max_steps == 120
    with pytest.raises(SpecError, match="launcher: got 'slurm'"):
        make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY], launcher="slurm")


def test_a_study_of_one_launcher_does_not_go_on_with_the_other(tmp_path):
    space = {LR: {"log_uniform": [1e-5, 1e-3]}}
    here, there = (
        make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY], launcher=launcher)
        for launcher in ("here", "nemo-rl")
    )
    open_search(here, Settings(), tmp_path)
    with pytest.raises(StudyError, match="launcher: here then, nemo-rl now"):
        open_search(there, Settings(), tmp_path)


def test_without_a_complete_trial_there_is_a_report_and_no_best(tmp_path):
    said = write_outcome(make_study(2, failing=lambda n: True), tmp_path)
    assert said[0] == "trials: 2 failed" and "no best configuration: " in "\n".join(said)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
