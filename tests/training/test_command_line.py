# SPDX-License-Identifier: Apache-2.0
"""What the programs print, and how they end: errors, Ctrl-C, a closed output, results."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rl_runs import settings
from trainer_runs import curve, make_config

from nemo_rl_ref import run_dpo, run_grpo, run_sft
from nemo_rl_ref.files.metrics import read_metrics

ROOT = Path(__file__).parents[2]
HEAD = """
import torch
from nemo_rl_ref.algorithms.loss import NLLLossFn

class MyLoss(NLLLossFn):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        found = super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
        loss, metrics = found
"""


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])


def config_file(folder, section="sft", **changes):
    path = folder / f"{section}.yaml"
    config = settings(folder) if section == "grpo" else make_config(section, folder, **changes)
    path.write_text(yaml.safe_dump(config))
    return str(path)


def program(folder, *arguments, **changes):
    """A process that trains."""
    command = [
        sys.executable,
        "-m",
        "nemo_rl_ref.run_sft",
        "--config",
        config_file(folder, **changes),
    ]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Code of the user's

BAD_LOSSES = {
    # what the file says: the end of the error, after file and line
    "import sys; sys.exit(0)": r"it calls sys\.exit \(.*:1\)$",
    "x = 1\nnope": r"NameError: name 'nope' is not defined \(.*:2\)$",
    "x = 1\ndef f(:": r"SyntaxError: invalid syntax .*:2\)$",
    "def MyLoss(*a): pass": r":1\), expected a class of losses, with loss_type and input_type",
    "MyLoss = 5": r"got int \(5\), expected a class of losses",
    "class MyLoss:\n    pass": r":1\) has no __call__",
    HEAD + "        return loss": r":6: MyLoss returned Tensor, expected a tuple of the loss",
    HEAD + "        return loss.repeat(3), metrics": r":6: MyLoss returned .* shape \(3,\), exp",
    HEAD
    + "        return loss.detach(), metrics": r":6: MyLoss returned a loss without a gradient",
    HEAD + "        return loss.item(), metrics": r":6: MyLoss returned a loss that is a float",
    HEAD
    + "        return loss, {'note': 'x'}": r":6: MyLoss returned the metric 'note' as 'x', exp",
    HEAD
    + "        return loss, {'a': data['token_mask']}": r":6: MyLoss returned the metric 'a' as",
    HEAD
    + "        return loss + torch.zeros(3) @ torch.zeros(4), metrics": r":9: RuntimeError: .*",
    HEAD
    + "        return loss + data['no_such_column'].sum(), metrics": r":9: KeyError: .*no_such",
    HEAD + "        raise SystemExit": r":9: SystemExit: ",
    HEAD + "        raise ValueError('odd')": r":9: ValueError: odd",
}


@pytest.mark.parametrize("text", BAD_LOSSES, ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_a_loss_that_is_none_is_one_error_with_file_and_line(text, tmp_path, capsys):
    """Kind: code of the user's, at import, when it is built, checked and called."""
    name = f"bad_loss_{abs(hash(text))}"
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    arguments = ["--config", config_file(tmp_path, sft__val_at_start=False)]
    assert run_sft.main([*arguments, "--loss", f"{file}:MyLoss"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(BAD_LOSSES[text], error) and (str(file) in error or "got int" in error)
    assert not (tmp_path / "run").exists()


BAD_REWARDS = {
    "class my_reward:\n    pass": r"got a class \(.*py:1\), expected a function of three texts",
    "my_reward = 'right'": r"got str \('right'\), expected a function of three texts",
    "def my_reward(prompt, response): pass": r"py:1\): too many positional arguments, expected a f",
    "def my_reward(p, r, t): return 'much'": r"returned 'much' for the response",
    "def my_reward(p, r, t):\n    return [][0]": r"py:2: IndexError: list index out of range",
    "def my_reward(p, r, t):\n    import sys; sys.exit(0)": r"py:2: SystemExit: 0",
}


@pytest.mark.parametrize("text", BAD_REWARDS, ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_a_reward_that_is_none_is_one_error_with_file_and_line(text, tmp_path, capsys):
    file = tmp_path / f"bad_reward_{abs(hash(text))}.py"
    file.write_text(text)
    arguments = ["--config", config_file(tmp_path, "grpo"), "--env", f"{file}:my_reward"]
    assert run_grpo.main(arguments) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(BAD_REWARDS[text], error), error


def test_an_error_of_the_program_itself_is_one_line_and_a_file(tmp_path, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise KeyError("inside")

    monkeypatch.setattr("nemo_rl_ref.training.supervised.update", fails)
    assert run_sft.main(["--config", config_file(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    file = re.fullmatch(
        r"error: this program failed: KeyError: 'inside' \(traceback: (.*)\)", error
    )
    assert "raise KeyError" in Path(file[1]).read_text()


# Starts that fail


def test_a_failed_start_leaves_nothing_and_a_folder_of_the_users_stays(tmp_path, capsys):
    """Refused by the settings, by the data, by the model; below folders that are made for it."""
    arguments = ["--config", config_file(tmp_path), f"logger.log_dir={tmp_path}/deep/logs"]
    for override in ("policy.precision=float8", "policy.model_name=/nowhere", "--loss=x.py:y"):
        assert run_sft.main([*arguments, override]) == 1
        assert not (tmp_path / "deep").exists() and not (tmp_path / "run").exists()
    (tmp_path / "deep").mkdir()
    assert run_sft.main([*arguments, "policy.model_name=/nowhere"]) == 1
    assert os.listdir(tmp_path / "deep") == []
    for expected in (["exp_001"], ["exp_001"]):  # a run that has nothing to do leaves nothing
        assert run_sft.main([*arguments, "sft.max_num_steps=1"]) == 0
        assert os.listdir(tmp_path / "deep" / "logs") == expected


def test_a_log_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["--config", config_file(tmp_path), f"logger.log_dir={tmp_path}/file/logs"]
    assert run_sft.main(arguments) == 1
    assert f"error: logger.log_dir: {tmp_path}/file/logs cannot be" in capsys.readouterr().err


def test_a_full_log_disk_ends_the_run_with_a_checkpoint(tmp_path, capsys):
    """The limit is on the size of a file, so that the checkpoint, written under none, fits."""

    def fill(step, metrics):
        if step == 6:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size() + 20, hard))

    def size():
        return (tmp_path / "run-logs" / "metrics.jsonl").stat().st_size

    from nemo_rl_ref.training import loop
    from nemo_rl_ref.training.checkpoints import save_checkpoint

    def save(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return save_checkpoint(*arguments, **options)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = make_config("sft", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        try:
            with pytest.raises(OSError, match="logger.log_dir: .*run-logs: cannot be written") as e:
                run_sft.train(config, observe=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(e.value).endswith(f"Step 7 is done. The last checkpoint is {tmp_path}/run/step_7")
    lines = (tmp_path / "run-logs" / "metrics.jsonl").read_text()
    assert lines.endswith("}\n") and all(json.loads(line) for line in lines.splitlines())
    run_sft.train(make_config("sft", tmp_path))
    run_sft.train(make_config("sft", tmp_path, name="whole"))
    logs, whole = (read_metrics(tmp_path / f"{name}-logs") for name in ("run", "whole"))
    assert {s: v for s, v in curve(logs).items() if s != 7} == {
        s: v for s, v in curve(whole).items() if s != 7
    }


# How a program ends


def test_control_c_says_in_one_line_how_to_go_on(tmp_path):
    running = program(tmp_path, "sft.max_num_steps=100000", "sft.max_num_epochs=100000",
                      sft__val_period=0)  # fmt: skip
    end = time.monotonic() + 120
    while not list((tmp_path / "run").glob("step_*")):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    line = errors.splitlines()[-1]
    found = re.fullmatch(
        r"interrupted: the last checkpoint is (\S+/step_\d+); this goes on from it: python -m "
        r"nemo_rl_ref\.run_sft --config \S+ sft.max_num_steps=100000 sft.max_num_epochs=100000",
        line,
    )
    assert found and Path(found[1]).exists() and "Traceback" not in errors
    assert not (tmp_path / "run" / ".lock").exists()


def test_control_c_before_there_is_a_checkpoint(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_rl_ref.training.supervised.update", interrupt)
    arguments = ["--config", config_file(tmp_path)]
    assert run_sft.main(arguments) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted before the first checkpoint; this starts again: python -m ")
    assert run_sft.main([*arguments, "checkpointing.enabled=false"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted: no checkpoint is written; this starts again: python -m ")


def test_a_closed_output_does_not_end_the_run(tmp_path):
    """As with `| head -1`, both streams; a resumed run has all the steps."""
    running = program(tmp_path)
    running.stdout.readline()
    running.stdout.close()
    running.stderr.close()
    assert running.wait(timeout=120) == 0
    (folder,) = (tmp_path / "run-logs").iterdir()
    assert max(curve(read_metrics(folder))) == 12
    assert (tmp_path / "run" / "step_12").exists()


# What it prints


def test_what_a_run_says(tmp_path, capsys):
    config = config_file(tmp_path, "dpo", samples=24)
    assert run_dpo.main(["--config", config]) == 0
    out = capsys.readouterr().out
    number = r"-?[\d.e+-]+"
    assert re.search(rf"^dpo step 0/9  validation-default: loss {number}, ", out, re.M)
    assert re.search(
        rf"^dpo step 9/9  0:00:00 left  loss {number}  accuracy {number}  lr {number}  "
        r"[\d,]+ tokens/s$",
        out,
        re.M,
    )
    end = out[out.index("dpo: done at step 9\n") :].splitlines()
    metrics = read_metrics(tmp_path / "run-logs")
    losses = curve(metrics, "validation-default/loss")
    best = min(losses, key=losses.get)
    assert end[1] == f"  checkpoint       {tmp_path}/run/step_9"
    assert end[2] == f"  metrics          {tmp_path}/run-logs/exp_001/metrics.jsonl"
    assert end[3].startswith("  last validation  validation-default_loss ")
    assert end[4].startswith(
        f"  best validation  validation-default_loss {losses[best]:.4g} (step {best}"
    )
    assert end[5].endswith("dpo.max_num_epochs=6") and len(end) == 6


def test_the_command_that_it_ends_with_trains_on(tmp_path, capsys):
    arguments = ["--config", config_file(tmp_path), "sft.max_num_steps=3", "++sft.note='a b'"]
    assert run_sft.main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    import shlex

    words = shlex.split(last.removeprefix("  to train on"))
    assert words[:3] == ["python", "-m", "nemo_rl_ref.run_sft"]
    assert run_sft.main(words[3:]) == 0
    assert "sft: done at step 6" in capsys.readouterr().out


def test_json_is_one_object_and_all_else_is_on_the_other_stream(tmp_path, capsys):
    arguments = ["--config", config_file(tmp_path), "--json"]
    for state in ("done", "nothing to train"):
        assert run_sft.main(arguments) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert result["state"] == state and result["step"] == 12
        assert result["checkpoint"] == str(tmp_path / "run" / "step_12")
        assert result["metrics_file"] == str(tmp_path / "run-logs" / "exp_001" / "metrics.jsonl")
        assert result["best_validation"]["metric"] == "val_loss"
        assert "at step 12" in captured.err
    losses = curve(read_metrics(tmp_path / "run-logs"), "validation/val_loss")
    best = result["best_validation"]
    assert best["value"] == losses[best["step"]] == min(losses.values())
    assert run_sft.main([*arguments, "policy.precision=float8"]) == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith("policy.precision: got 'float8'")
