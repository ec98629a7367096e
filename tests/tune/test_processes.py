# SPDX-License-Identifier: Apache-2.0
"""Several processes on one study: killed ones, interrupted ones, and the command that starts them."""

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import stand_in
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from nemo_rl_ref.tune import __main__ as command
from nemo_rl_ref.tune.search import Settings, open_search, quiet

HELP = Path(__file__).parents[1] / "help"
TRIALS = 12
#: Seconds that a machine that is busy may take.
PATIENCE = 300


def search_of(folder, trials):
    settings = Settings(trials=trials, sampler="random", grace=2)
    return open_search(stand_in.make(), settings, folder, runner=stand_in.run)


def test_a_killed_trial_is_run_once_more_and_nothing_counts_twice(tmp_path):
    arguments = [sys.executable, HELP / "killed_study.py", tmp_path, str(TRIALS)]
    output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    ended = json.loads(output.stdout)
    assert set(ended["killed"].values()) == {-signal.SIGKILL}, ended["killed"]
    assert ended["steady"] == 0

    search = search_of(tmp_path, TRIALS)
    trials, counted = search.study.trials, search.finished()
    assert len(counted) == TRIALS
    with quiet():
        history = {t.number: RetryHeartbeatStaleTrialCallback.retry_history(t) for t in trials}
    killed = [t.number for t in trials if t.state is TrialState.FAIL]
    assert len(killed) >= 2, "nobody was killed in a trial"
    again = {numbers[-1]: number for number, numbers in history.items() if numbers}
    for number in killed:
        assert "failure" not in trials[number].user_attrs
        if number in again:
            old, new = trials[number].params.items(), trials[again[number]].params.items()
            assert old <= new, "it was run again with other values"
        else:
            assert len(history[number]) == 1, "a trial that was killed once was not run again"
    counted = [t for t in counted if t.state is TrialState.COMPLETE]
    for trial in counted:
        assert trial.value == stand_in.loss(trial.params)
    drawn = Counter(trial.params[stand_in.LR] for trial in counted)
    assert set(drawn.values()) == {1}, "two trials have the same parameters"


def test_processes_that_begin_at_once_share_a_grid_and_run_each_point(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {[str(HELP), str(HELP.parents[1])]}\n"
        "import stand_in\nfrom nemo_rl_ref.tune import optimize\n"
        "space = {stand_in.LR: {'choice': [1e-4, 1e-3]},"
        " stand_in.BETA: {'uniform': [0.1, 0.4], 'step': 0.1}}\n"
        f"optimize(stand_in.make(space), folder={str(tmp_path)!r}, runner=stand_in.run,"
        " trials=8, sampler='grid')\n"
    )
    environment = {**os.environ, "STAND_IN_SECONDS": "0.5"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in both] == [0, 0]
    done = [t for t in search_of_grid(tmp_path).study.trials if t.state is TrialState.COMPLETE]
    assert len({str(sorted(t.params.items())) for t in done}) == 8
    assert len({t.user_attrs["worker"] for t in done}) == 2


def search_of_grid(folder):
    space = {
        stand_in.LR: {"choice": [1e-4, 1e-3]},
        stand_in.BETA: {"uniform": [0.1, 0.4], "step": 0.1},
    }
    return open_search(stand_in.make(space), Settings(sampler="grid"), folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_and_its_trial_is_queued_again(tmp_path, number):
    code = (
        f"import sys; sys.path[:0] = {[str(HELP), str(HELP.parents[1])]}\n"
        "import stand_in\nfrom nemo_rl_ref.tune import optimize, Stopped\n"
        "try:\n"
        f"    optimize(stand_in.make(), folder={str(tmp_path)!r}, runner=stand_in.run, trials=4)\n"
        "except Stopped as error:\n    sys.exit(f'stopped by {error}')\n"
    )
    environment = {**os.environ, "STAND_IN_SECONDS": "600"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    while not list(tmp_path.glob("trial_*/runs.txt")):
        assert time.monotonic() - began < PATIENCE, "it never began"
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert said.strip() == f"stopped by {signal.Signals(number).name}"
    assert [t.state.name for t in search_of(tmp_path, 4).study.trials] == ["FAIL", "WAITING"]


# The command's --jobs


def test_jobs_are_plain_processes_of_the_same_command(monkeypatch):
    started = []

    class Process:
        def __init__(self, line, env, start_new_session):
            assert start_new_session, "Ctrl-C is for the process that starts the others"
            started.append((line, env.get("CUDA_VISIBLE_DEVICES")))

        def wait(self):
            return 0

    monkeypatch.setattr(command.subprocess, "Popen", Process)
    monkeypatch.setattr(command, "visible_devices", lambda: ["4", "6"])
    assert command.start_processes(["dpo", "--jobs", "3"], 3) == 0
    line = [sys.executable, "-m", "nemo_rl_ref.tune", "dpo", "--jobs", "3"]
    assert {tuple(one) for one, _ in started} == {(*line, "--jobs", "1", "--only-trials")}
    assert [device for _, device in started] == ["4", "6", "4"]
    parser = command.make_parser()
    required = ["dpo", "--config", "c", "--space", "s", "--objective", "o"]
    options, _ = parser.parse_known_args([*required, "--jobs", "3", "--jobs", "1", "--only-trials"])
    assert options.jobs == 1 and options.only_trials


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [
        (0, None, []),
        (3, None, ["0", "1", "2"]),
        (2, "5, GPU-8a1b", ["5", "GPU-8a1b"]),
        (2, "2,7,-1,4", ["2", "7"]),  # CUDA reads up to the first that there is not
    ],
)
def test_the_devices_of_processes(monkeypatch, count, named, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert command.visible_devices() == expected


def test_ctrl_c_with_jobs_is_one_line_and_leaves_nothing_behind(tmp_path):
    """In a terminal the signal goes to the whole group: here to all processes at once."""
    space = tmp_path / "space.yaml"
    space.write_text(f"{stand_in.LR}: {{log_uniform: [1e-5, 1e-3]}}\n")
    folder = tmp_path / "s"
    line = [
        sys.executable, "-m", "nemo_rl_ref.tune", "dpo", "--config", "configs/dpo.yaml",
        "--space", str(space), "--objective", "val:validation-default_accuracy", "--folder",
        str(folder), "--launcher", "nemo-rl", "--checkout", str(HELP / "nemo_rl_stand_in"),
        "--launch-command", shlex.quote(sys.executable), "--jobs", "2", "dpo.max_num_steps=900",
        "++stand_in.seconds_per_step=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    began = time.monotonic()
    while len(list(folder.glob("trial_*/logs/exp_*"))) < 2:
        assert time.monotonic() - began < PATIENCE and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    (last,) = [text for text in said.splitlines() if not text.startswith(("study ", "every "))]
    assert last.startswith(
        "interrupted; 0 of 30 trials are finished, and nothing is lost. To go on"
    )
    with closing(sqlite3.connect(folder / "study.db", timeout=1)) as database:
        states = Counter(state for (state,) in database.execute("select state from trials"))
        database.execute("begin immediate")
    assert states == {"FAIL": 2, "WAITING": 2}
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder) not in running
