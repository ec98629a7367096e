# SPDX-License-Identifier: Apache-2.0
"""The command, with trainings of a few steps on the tiny model."""

import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing

import optuna
import pytest
import stand_in

from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.tune.__main__ import main
from nemo_rl_ref.tune.search import Settings, Stopped, open_search, optimize
from nemo_rl_ref.tune.spec import make_spec
from nemo_rl_ref.tune.trainers import runner_of
from nemo_rl_ref.tune.trial import run_trial

LR, BETA = stand_in.LR, stand_in.BETA
SPACE = f"{LR}: {{log_uniform: [1e-5, 1e-3]}}\n{BETA}: {{choice: [0.05, 0.5]}}\n"
METRIC = "val:validation-default_accuracy"
SHORT = (
    "dpo.max_num_steps=2", "dpo.val_period=1", "dpo.val_batches=1", "dpo.val_at_start=false",
    "dpo.val_global_batch_size=8", "policy.train_global_batch_size=8",
)  # fmt: skip


def command(
    tmp_path, *more, config="configs/dpo.yaml", space=SPACE, objective=METRIC, overrides=SHORT
):
    path = tmp_path / "space.yaml"
    path.write_text(space)
    return [
        "dpo", "--config", config, "--space", str(path), "--objective", objective,
        "--folder", str(tmp_path / "s"), *more, *overrides,
    ]  # fmt: skip


def test_a_search_runs_goes_on_and_ends_with_a_line_that_loads(tmp_path, capfd):
    assert main(command(tmp_path, "--trials", "1")) == 0
    assert main(command(tmp_path, "--trials", "2")) == 0
    output = capfd.readouterr().out
    assert "goes on after 1 of 2 trials" in output
    assert "(1/1)" in output
    assert "(2/2)" in output
    assert "trials: 2 finished" in output
    line = next(text for text in output.splitlines()[::-1] if f"{LR}=" in text)
    trainer = runner_of("dpo")
    config, report = read_config("configs/dpo.yaml", shlex.split(line), trainer.used)
    assert 1e-5 <= config["policy"]["optimizer"]["kwargs"]["lr"] <= 1e-3
    assert report.new == ()
    printed = (tmp_path / "s/trial_0001/output.txt").read_text()
    assert "dpo: 2 steps of 8 samples" in printed
    assert "dpo: 2 steps" not in output

    assert main(command(tmp_path, "--trials", "3", overrides=(*SHORT, "dpo.seed=7"))) == 1
    assert "configuration: dpo.seed: 42 then, 7 now" in capfd.readouterr().err


REFUSED = {
    "a key that this trainer ignores": (
        {"space": "policy.dtensor_cfg.cpu_offload: {choice: [true, false]}"},
        ["policy.dtensor_cfg.cpu_offload", "without effect here (ignored: DTensor)"],
    ),
    "a key of another algorithm": (
        {"space": "grpo.num_prompts_per_step: {int: [1, 8]}"},
        ["grpo.num_prompts_per_step", "the trainer does not read it", "the dpo trainer reads"],
    ),
    "a seed": ({"space": "dpo.seed: {int: [1, 9]}"}, ["dpo.seed", "a lucky run", "--vary-seed"]),
    "what the search sets": (
        {"space": "checkpointing.save_period: {int: [1, 9]}"},
        ["checkpointing.save_period", "writes no checkpoints"],
    ),
    "a validation that is not at the end": (
        {"space": "dpo.val_at_end: {choice: [true, false]}"},
        ["dpo.val_at_end", "trials are compared by their last step"],
    ),
    "set twice": (
        {"space": "dpo.max_num_steps: {int: [1, 9]}"},
        ["dpo.max_num_steps", "set by the override dpo.max_num_steps=2 too"],
    ),
    "a range for a text": (
        {"space": "policy.optimizer.name: {uniform: [0, 1]}"},
        ["policy.optimizer.name", "text", "expected choice"],
    ),
    "an objective without direction": (
        {"objective": "val:validation-default_rewards_chosen_mean"},
        ["does not say which way is better", "rewards_chosen_mean:maximize"],
    ),
    "an objective that is not logged": (
        {"objective": "val:accuracy"},
        ["got val:accuracy, which the run does not log", METRIC],
    ),
    "an objective with a misspelt name": (
        {"objective": "val:validation-defualt_accuracy"},
        [f"which the run does not log (did you mean {METRIC}?); it logs "],
    ),
    "an objective with a misspelt end": (
        {"objective": "val:validation-default_acuracy"},
        [f"got val:validation-default_acuracy; did you mean {METRIC}?"],
    ),
    "another algorithm's configuration": (
        {"config": "configs/grpo_tiny.yaml"},
        ["configs/grpo_tiny.yaml: got a configuration of grpo, expected the section dpo"],
    ),
    "an override of nothing": ({"overrides": ("dpo.bta=1",)}, ["dpo.bta=1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_in_one_piece(tmp_path, capfd, name):
    changes, parts = REFUSED[name]
    assert main(command(tmp_path, "--trials", "1", **changes)) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    for part in parts:
        assert part in error


def test_a_misspelt_option_is_refused(tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path, "--trails", "3"))
    assert caught.value.code == 2
    assert "--trails: no such option" in capfd.readouterr().err


def test_a_validation_objective_is_measured_at_the_last_step_whatever_the_period(tmp_path, capfd):
    """Else every trial has the value before the first update: a loss of log 2, an accuracy of ties."""
    short = [text for text in SHORT if "val_period" not in text and "val_at" not in text]
    period = ("dpo.val_period=25", "dpo.val_at_start=true", "dpo.val_at_end=false")
    loss = "val:validation-default_loss"
    line = command(tmp_path, "--trials", "2", objective=loss, overrides=(*short, *period))
    assert main(line) == 0
    said = capfd.readouterr().out
    assert "every trial validates at its last step, as with dpo.val_at_end=true" in said
    assert " at step 2, the lowest" in said
    study = open_search(
        make_spec("dpo", "configs/dpo.yaml", tmp_path / "space.yaml", [loss], (*short, *period)),
        Settings(), tmp_path / "s",
    ).study  # fmt: skip
    values = [trial.value for trial in study.trials]
    assert len(set(values)) == 2 and not any(abs(value - 0.693147) < 1e-5 for value in values)


def test_an_interrupted_search_says_how_to_go_on(tmp_path, capfd, monkeypatch):
    def interrupted(*args):
        raise Stopped("SIGINT")

    monkeypatch.setattr("nemo_rl_ref.tune.__main__.work", interrupted)
    arguments = command(tmp_path, "--trials", "9")
    assert main(arguments) == 130
    output = capfd.readouterr().out
    assert "interrupted; 0 of 9 trials are finished, and nothing is lost" in output
    assert f"To go on: python -m nemo_rl_ref.tune {shlex.join(arguments)}" in output
    assert len(output.splitlines()) == 2, "where the study is, and how to go on"


def test_a_training_that_fails_is_recorded_with_its_reason(tmp_path):
    space = {LR: {"choice": [1e30, 1e31]}}
    spec = make_spec("dpo", "configs/dpo.yaml", space, [METRIC], SHORT)
    study = optimize(spec, folder=tmp_path / "s", trials=1)
    (trial,) = study.trials
    assert trial.state.name == "FAIL"
    assert trial.user_attrs["failure"].startswith("step 2: ")
    assert "nan" in trial.user_attrs["failure"]
    assert "The step was not taken" in (tmp_path / "s/trial_0000/output.txt").read_text()


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_the_spaces_of_this_repository_fit_their_configurations(tmp_path, algorithm):
    config = {"dpo": "configs/dpo.yaml", "grpo": "configs/grpo_tiny.yaml"}[algorithm]
    metric = {"dpo": METRIC, "grpo": "val:accuracy"}[algorithm]
    spec = make_spec(algorithm, config, f"configs/spaces/{algorithm}.yaml", [metric])
    values = spec.space.suggest(optuna.create_study().ask())
    values[f"{algorithm}.max_num_steps"] = 1
    metrics = run_trial(spec, values, tmp_path / "trial", seed=1)
    assert metric in metrics
    assert (tmp_path / "trial/output.txt").read_text().count("step 1/1  0:00:00 left") == 1


#: A search in whose trials the disk is full from the second step on: no file may grow.
FULL_DISK = """
import resource, sys
from nemo_rl_ref.tune import __main__ as command

def run(spec, values, folder, *, seed=None, observe=None):
    observe(1, {"val:loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    observe(2, {"val:loss": 1.0})
    return {"val:loss": 1.0}

command.run_trial = run
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_full_disk_ends_a_search_in_one_line(tmp_path):
    line = command(tmp_path, "--trials", "3", objective="val:loss")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *line], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: the study's database: ")
    assert "To go on: python -m nemo_rl_ref.tune dpo" in done.stderr


def of_a_later_optuna(path):
    spec = make_spec("dpo", "configs/dpo.yaml", {LR: {"choice": [1e-4]}}, [METRIC], SHORT)
    open_search(spec, Settings(), path.parent)
    with closing(sqlite3.connect(path)) as database:
        database.execute("update alembic_version set version_num = 'v99.0.0.a'")
        database.commit()


def damaged(path):
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 500)


def a_folder(path):
    path.mkdir(parents=True)


@pytest.mark.parametrize("spoil", [of_a_later_optuna, damaged, a_folder])
def test_a_database_that_cannot_be_used_is_named_in_one_line(tmp_path, capsys, spoil):
    path = tmp_path / "s" / "study.db"
    spoil(path)
    assert main(command(tmp_path, "--trials", "3")) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"error: storage: got {path}, expected a database as ")
