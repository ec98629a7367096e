# SPDX-License-Identifier: Apache-2.0
"""The recorded searches can be made again: what their scripts share still trains.

In a process of its own, because it replaces functions of the trainers.
"""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import _search
trainings = _search.Trainings()
for task in _search.TASKS.values():
    run = trainings.run(task, {_search.RATE: 1e-4}, seed=0, steps=1, val_period=1)
    print(json.dumps(run))
"""


def test_both_tasks_of_the_studies_train():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(BENCHMARKS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 2
    for run in runs:
        assert run["steps"] == len(run["curve"]) == 1
        assert 0 < run["curve"][0][1] < 1 and run["kl"] > 0
