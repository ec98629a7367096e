# SPDX-License-Identifier: Apache-2.0
"""Processes of one study that are killed, beside one that is not. Started by test_processes.py.

    python tests/help/killed_study.py FOLDER TRIALS

Every process is a forked child, so that the libraries are loaded once. The kill is SIGKILL, by the
child itself at a planned point, or by the parent while the child trains. The steady process is in its
first trial until all are killed. Prints one JSON object: how each child ended.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import stand_in
import torch  # noqa: F401, loaded before the first fork
from optuna.storages import RDBStorage
from optuna.trial import Trial

from nemo_rl_ref.tune.search import Search, optimize

SETTINGS = {"grace": 2, "sampler": "random"}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_around(owner, name, after):
    """The program dies when a function is called, or when that call is over."""
    original = getattr(owner, name)

    def doomed(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        die()

    setattr(owner, name, doomed)


PLANNED = {
    "before the first sign of life": lambda: die_around(
        RDBStorage, "record_heartbeat", after=False
    ),
    "some parameters drawn": lambda: die_around(Trial, "suggest_float", after=True),
    "after a validation": lambda: die_around(Trial, "report", after=True),
    "after the result is told": lambda: die_around(Search, "note", after=False),
}


def child(folder, trials, prepare=None, **environment):
    """Start a process; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    if prepare:
        prepare()
    status = 1
    try:
        optimize(stand_in.make(), folder=folder, runner=stand_in.run, trials=trials, **SETTINGS)
        status = 0
    finally:
        os._exit(status)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(folder, trials, **environment):
    """Start a process and wait until it trains."""
    reader, writer = os.pipe()
    pid = child(folder, trials, STAND_IN_PIPE=str(writer), **environment)
    os.read(reader, 1)
    return pid


def main():
    folder, trials = sys.argv[1], int(sys.argv[2])
    gate = Path(folder, "gate")
    steady = begun(folder, trials, STAND_IN_GATE=str(gate))
    killed = {name: ended(child(folder, trials, prepare)) for name, prepare in PLANNED.items()}
    pid = begun(folder, trials, STAND_IN_SECONDS="600")
    os.kill(pid, signal.SIGKILL)
    killed["in a training"] = ended(pid)
    gate.touch()
    print(json.dumps({"killed": killed, "steady": ended(steady)}))


if __name__ == "__main__":
    main()
