# SPDX-License-Identifier: Apache-2.0
"""Runs that end before they should: killed, out of disk, with a checkpoint that is no good."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from trainer_runs import curve, make_config, run

from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.files.sealed import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "help" / "killed_runs.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads(result.stdout.splitlines()[-1])


def test_the_children_died_where_they_should(killed):
    _, ends = killed
    survivors = ("uninterrupted", "the rest", "the rest after random moments")
    planned = {point: code for point, code in ends.items() if not point.startswith("at random")}
    assert planned == {point: 0 if point in survivors else -9 for point in planned}
    assert set(ends.values()) <= {0, -9}


@pytest.mark.parametrize("name", ["killed", "random"])
def test_a_killed_run_goes_on_with_the_same_bits(killed, name):
    folder, _ = killed
    whole, resumed = (read_metrics(folder / f"{run}-logs") for run in ("whole", name))
    assert list(curve(whole)) == list(range(1, 16))
    for metric in ("train/loss", "train/grad_norm", "train/lr", "validation-default/loss"):
        assert curve(resumed, metric) == curve(whole, metric), metric
    weights = "step_15/policy/weights/model.safetensors"
    ours, theirs = (load_file(folder / run / weights) for run in ("whole", name))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["killed", "random"])
def test_nothing_is_left_over(killed, name):
    folder, _ = killed
    left = {path.name for path in (folder / name).iterdir()}
    assert left == {path.name for path in (folder / "whole").iterdir()}


@pytest.fixture
def stopped(tmp_path):
    """A run that has come to step 8 of 12, with checkpoints at 4 and 8."""
    run("sft", tmp_path, sft__max_num_steps=8)
    return tmp_path


def test_a_run_is_made_longer_by_its_number_of_steps(stopped):
    _, longer = run("sft", stopped)
    _, whole = run("sft", stopped, name="whole")
    assert curve(longer) == curve(whole)


def test_another_configuration_is_refused_and_named(stopped):
    message = (
        r"step_8: the checkpoint is of another run:\n"
        r"  policy\.optimizer\.kwargs\.lr: 0\.001 in the checkpoint, 0\.002 now\n"
    )
    changes = {"policy__optimizer__kwargs__lr": 0.002}
    with pytest.raises(CheckpointError, match=message):
        run("sft", stopped, **changes)
    result, _ = run("sft", stopped, allow_config_changes=True, **changes)
    assert result["total_steps"] == 12


def test_a_value_written_otherwise_is_the_same_configuration(stopped):
    """In quotes, or as a whole number: what counts is what is read."""
    changes = {
        "data__shuffle": "true", "policy__train_global_batch_size": "8", "policy__max_grad_norm": 1,
    }  # fmt: skip
    result, _ = run("sft", stopped, **changes)
    assert result["total_steps"] == 12
    config = stopped / "run" / "step_12" / "config.yaml"
    assert yaml.safe_load(config.read_text())["data"]["shuffle"] == "true"  # as it was given


@pytest.mark.parametrize(
    "name",
    [
        "policy/weights/model.safetensors",
        "policy/optimizer/optimizer.pt",
        "policy/optimizer/random.pt",
        "training_info.json",
        "config.yaml",
    ],
)
@pytest.mark.parametrize("damage", ["cut short", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_works(stopped, name, damage):
    path = stopped / "run" / "step_8" / name
    size = path.stat().st_size
    if damage == "cut short":
        os.truncate(path, size // 2)
        problem = f"has {size // 2} bytes, {size} were written"
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[size // 2] ^= 1
        path.write_bytes(content)
        problem = "is not what was written"
    else:
        path.unlink()
        problem = "the file is missing"
    with pytest.raises(CheckpointError) as error:
        run("sft", stopped)
    message = str(error.value)
    assert message.startswith(f"{path}: {problem}"), message
    assert f"Move {path.parents[name.count('/')]} away; the run then resumes from" in message
    assert message.endswith("step_4")
    shutil.move(stopped / "run" / "step_8", stopped / "away")
    _, metrics = run("sft", stopped)
    assert max(curve(metrics)) == 12


def test_a_checkpoint_without_its_list_of_files_is_refused(stopped):
    (stopped / "run" / "step_8" / "files.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_8/files\.json: cannot be read: "):
        run("sft", stopped)


def test_a_full_disk_destroys_nothing(stopped):
    _, whole = run("sft", stopped, name="whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = (stopped / "run" / "step_8" / "files.json").read_text()
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # less than the weights
    try:
        with pytest.raises(CheckpointError) as error:
            run("sft", stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert re.search(r"run/tmp_step_12_.*/policy/weights: cannot be written: ", message)
    assert re.search(r"Step 12 is not saved\. .*/step_8 is whole: free space", message)
    assert sorted(path.name for path in (stopped / "run").iterdir()) == ["step_4", "step_8"]
    assert (stopped / "run" / "step_8" / "files.json").read_text() == before
    _, metrics = run("sft", stopped)
    assert curve(metrics) == curve(whole)


def test_without_its_optimizer_a_run_goes_on_and_says_so(tmp_path):
    run("sft", tmp_path, sft__max_num_steps=8, checkpointing__save_optimizer=False)
    with pytest.warns(UserWarning, match="optimizer: not in the checkpoint, the optimizer starts"):
        result, _ = run("sft", tmp_path, checkpointing__save_optimizer=False)
    assert result["total_steps"] == 12


def test_a_checkpoint_is_a_model_and_holds_the_configuration(stopped):
    from nemo_rl_ref import tiny

    folder = stopped / "run" / "step_8"
    model = tiny.load_policy(folder / "policy" / "weights")
    assert sum(parameter.numel() for parameter in model.parameters()) > 200_000
    assert tiny.load_tokenizer(folder / "policy" / "tokenizer").chat_template
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    expected = make_config("sft", stopped, sft__max_num_steps=8)
    assert saved == json.loads(json.dumps(expected))
    info = json.loads((folder / "training_info.json").read_text())
    assert (info["epoch"], info["step"], info["total_steps"]) == (1, 3, 8)
    assert info["consumed_samples"] == 64


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    """Kind: two runs write one folder; also from the same program, and while the first ends."""

    def second(step, metrics):
        with pytest.raises(CheckpointError) as caught:
            run("sft", tmp_path)
        text = f"another run (host {socket.gethostname()}, pid {os.getpid()}) writes to {folder}"
        assert text in str(caught.value)
        assert str(caught.value).startswith("checkpointing.checkpoint_dir: ")
        seen.append(step)

    folder, seen = tmp_path / "run", []
    run("sft", tmp_path, sft__max_num_steps=4, observe=second)
    assert seen == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["step_4"]
    result, _ = run("sft", tmp_path)
    assert result["total_steps"] == 12


def test_a_run_that_fails_lets_go_of_the_folder_and_leaves_nothing(tmp_path):
    for changes in (
        {"model": tmp_path / "nowhere"},
        {"samples": 9, "data__max_input_seq_length": 2},
    ):
        with pytest.raises((ValueError, OSError)):
            run("sft", tmp_path, **changes)
        assert not (tmp_path / "run").exists() and not (tmp_path / "run-logs").exists()
    run("sft", tmp_path, sft__max_num_steps=1)


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    """A file where the folder should be, and a folder that is read-only."""
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match=r"checkpointing\.checkpoint_dir: .*/run cannot be w"):
        run("sft", tmp_path, model=tmp_path / "nowhere")
    (tmp_path / "run").unlink()
    if os.geteuid() == 0:  # may write everywhere
        monkeypatch.setattr(
            "nemo_rl_ref.training.loop.FolderLock",
            lambda folder: (_ for _ in ()).throw(PermissionError(13, "Permission denied", folder)),
        )
    else:
        (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="cannot be written to: .*Permission denied"):
        run("sft", tmp_path, model=tmp_path / "nowhere")
