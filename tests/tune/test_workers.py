# SPDX-License-Identifier: Apache-2.0
"""Several processes on one study: workers that die, and a supervisor that dies."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in
from optuna.trial import TrialState

from nemo_rl_ref.tune import workers
from nemo_rl_ref.tune.study import (
    SearchStopped,
    Settings,
    Stopped,
    open_search,
    optimize,
)
from nemo_rl_ref.tune.workers import how_it_died

#: Seconds. A worker of the tests sleeps for longer.
PATIENCE = 500
SETTINGS = {"sampler": "random", "heartbeat": 1, "grace": 120}


def dying(spec, values, folder, *, seed=None, observe=None):
    """The second trial kills its process, as a system without memory does, the first time."""
    if folder.name == "trial_0001" and not folder.exists():
        folder.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return stand_in.run(spec, values, folder, seed=seed, observe=observe)


def telling_its_device(spec, values, folder, *, seed=None, observe=None):
    """Each trial leaves the name of the GPUs that its process sees."""
    time.sleep(0.2)  # so that no worker does all of them
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    folder.parent.joinpath(f"device_{os.getpid()}_{seen}").touch()
    return stand_in.run(spec, values, folder, seed=seed, observe=observe)


def wrong(spec, values, folder, *, seed=None, observe=None):
    raise KeyError("a mistake of the program's")


def interrupting(spec, values, folder, *, seed=None, observe=None):
    """The second trial sends its process what Ctrl-C sends."""
    if folder.name == "trial_0001":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    return stand_in.run(spec, values, folder, seed=seed, observe=observe)


def trials_of(folder, trials):
    search = open_search(stand_in.make(), Settings(trials=trials), folder, runner=stand_in.run)
    return search.study.trials


def test_a_worker_that_dies_takes_its_trial_with_it_and_is_replaced(tmp_path):
    folder = tmp_path / "s"
    optimize(stand_in.make(), folder=folder, runner=dying, jobs=2, trials=8, **SETTINGS)
    trials = [trial for trial in trials_of(folder, 8) if trial.state.is_finished()]
    assert [trial.number for trial in trials] == list(range(8))
    states = {trial.number: trial.state for trial in trials}
    assert states.pop(1) is TrialState.FAIL
    assert set(states.values()) == {TrialState.COMPLETE}
    assert trials[1].user_attrs["failure"] == "worker killed by SIGKILL (out of memory?)"
    assert len({trial.user_attrs["worker"] for trial in trials}) >= 2
    assert len({trial.params[stand_in.LR] for trial in trials}) == 8


def test_a_mistake_in_a_worker_ends_the_search_with_its_message(tmp_path):
    with pytest.raises(SearchStopped, match=r"worker \d: KeyError: .*; see .*worker_\d.txt"):
        optimize(stand_in.make(), folder=tmp_path / "s", runner=wrong, jobs=2, trials=4, **SETTINGS)
    assert any("mistake" in path.read_text() for path in tmp_path.glob("s/worker_*.txt"))


def test_workers_that_die_before_they_begin_end_the_search(tmp_path, monkeypatch):
    source = (
        f"import os\nif os.getpid() != {os.getpid()}: os._exit(5)\ndef run(*args, **kwargs): ...\n"
    )
    (tmp_path / "dies_in_workers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    run = importlib.import_module("dies_in_workers").run

    with pytest.raises(SearchStopped, match="3 workers ended with exit status 5 before they began"):
        optimize(stand_in.make(), folder=tmp_path / "s", runner=run, jobs=2, trials=4, **SETTINGS)


def test_ctrl_c_ends_cleanly(tmp_path):
    folder, before = tmp_path / "s", signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="SIGINT"):
        optimize(stand_in.make(), folder=folder, runner=interrupting, trials=4, **SETTINGS)
    assert [trial.state.name for trial in trials_of(folder, 4)] == ["COMPLETE", "WAITING"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_trials_go_back_to_the_queue_when_the_supervisor_ends(tmp_path, number):
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1] / 'help'), '.']}\n"
        "import stand_in\nfrom nemo_rl_ref.tune import optimize, Stopped\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        f"        optimize(stand_in.make(), folder={str(tmp_path / 's')!r}, runner=stand_in.run,"
        f" jobs=2, trials=4, **{SETTINGS})\n"
        "    except Stopped:\n        print('stopped')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "STAND_IN_SECONDS": "600"}
    said = tmp_path / "said.txt"  # a pipe would be open for as long as a worker lives
    with said.open("w") as output:
        process = subprocess.Popen([sys.executable, script], env=environment, stdout=output)
    until(lambda: len(list(tmp_path.glob("s/trial_*/runs.txt"))) == 2)
    process.send_signal(number)
    process.wait(PATIENCE)
    assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert said.read_text().strip() == ("stopped" if number == signal.SIGTERM else "")
    workers = {line.split()[1] for path in tmp_path.glob("s/trial_*/runs.txt")
               for line in path.read_text().splitlines()}  # fmt: skip
    try:
        until(
            lambda: [t.state.name for t in trials_of(tmp_path / "s", 4)] == ["WAITING", "WAITING"],
            "the trials are not back in the queue",
        )
        until(lambda: not any(map(runs, workers)), "a worker outlives its supervisor")
    finally:
        for pid in filter(runs, workers):
            os.kill(int(pid), signal.SIGKILL)


def runs(pid):
    """Whether there is such a process, other than one that nobody has waited for."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(condition, otherwise="it never began"):
    """Wait, for as long as a machine that is busy or stopped may take."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE, otherwise
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [
        (0, None, []),
        (1, None, []),
        (1, "3", []),
        (3, None, ["0", "1", "2"]),
        (2, "5, GPU-8a1b", ["5", "GPU-8a1b"]),
        (2, "2,7,-1,4", ["2", "7"]),  # CUDA reads up to the first that there is not
    ],
)
def test_the_devices_of_workers(count, named, expected):
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert workers.visible_devices(count, environment) == expected


@pytest.mark.parametrize(
    ("count", "named", "expected"), [(2, "4,6", ["4", "6", "4"]), (1, "4,6", ["4,6"] * 3)]
)
def test_each_worker_sees_its_device(tmp_path, monkeypatch, count, named, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(workers, "_count_devices", lambda: count)
    folder = tmp_path / "s"
    optimize(
        stand_in.make(), folder=folder, runner=telling_its_device, jobs=3, trials=12, **SETTINGS
    )
    told = [path.name.split("_")[-1] for path in folder.rglob("device_*")]
    assert sorted(told) == sorted(expected)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == named


def test_how_a_process_died():
    assert how_it_died(3) == "ended with exit status 3"
    assert how_it_died(-11) == "killed by SIGSEGV"
    assert how_it_died(-9) == "killed by SIGKILL (out of memory?)"
