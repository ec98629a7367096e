# SPDX-License-Identifier: Apache-2.0
"""Two processes work on one study of 100 trials, and one of them is killed again and again."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import stand_in
from optuna.trial import TrialState

from nemo_rl_ref.tune.study import Settings, open_search

TRIALS, KILLS = 100, 10


def test_no_trial_is_lost_or_counted_twice(tmp_path):
    script = Path(__file__).parents[1] / "help" / "killed_study.py"
    arguments = [sys.executable, str(script), str(tmp_path), str(TRIALS), str(KILLS)]
    output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    ended = json.loads(output.stdout)
    assert set(ended["planned"].values()) == {-signal.SIGKILL}, ended["planned"]
    assert ended["killed"] == [-signal.SIGKILL] * KILLS
    assert (ended["steady"], ended["last"]) == (0, 0)

    search = open_search(stand_in.make(), Settings(trials=TRIALS), tmp_path, runner=stand_in.run)
    finished = [trial for trial in search.study.get_trials() if trial.state.is_finished()]
    assert [trial.number for trial in finished] == list(range(TRIALS))
    assert {trial.state for trial in finished} == {TrialState.COMPLETE}
    for trial in finished:
        values = trial.user_attrs["values"]
        assert trial.value == stand_in.loss(values)
        assert trial.params == values
    drawn = Counter(trial.params[stand_in.LR] for trial in finished)
    assert set(drawn.values()) == {1}, "two trials have the same parameters"
    deaths = sum(trial.user_attrs.get("deaths", 0) for trial in finished)
    assert len(ended["planned"]) - 1 <= deaths <= len(ended["planned"]) + KILLS
