# SPDX-License-Identifier: Apache-2.0
"""Two processes on one study, one of them killed again and again. Started by test_killed.py.

    python tests/help/killed_study.py FOLDER TRIALS KILLS

Every process is a forked child, so that the libraries are loaded once. The kill is SIGKILL, by the
child itself at a planned point, or by the parent after a random time. Prints one JSON object: how
each child ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import stand_in
from optuna.storages import RDBStorage, _CachedStorage
from optuna.study import Study

from nemo_rl_ref.tune import study

SETTINGS = {"heartbeat": 1, "grace": 2, "sampler": "random"}


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
    "a new trial, not yet ours": lambda: die_around(Study, "ask", after=True),
    "before the first sign of life": lambda: die_around(
        _CachedStorage, "record_heartbeat", after=False
    ),
    "a sign of life, no name": lambda: die_around(RDBStorage, "record_heartbeat", after=True),
    "some parameters drawn": lambda: die_around(_CachedStorage, "set_trial_param", after=True),
    "before the result is told": lambda: die_around(Study, "tell", after=False),
    "after the result is told": lambda: die_around(Study, "tell", after=True),
}


def child(folder, trials, seconds, prepare=None):
    """Start a process whose trials take so long; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    os.environ["STAND_IN_SECONDS"] = str(seconds)
    if prepare:
        prepare()
    status = 1
    try:
        study.optimize(
            stand_in.make(), folder=folder, runner=stand_in.run, trials=trials, **SETTINGS
        )
        status = 0
    finally:
        os._exit(status)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    folder, trials, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    steady, chance = child(folder, trials, seconds=0.3), random.Random(0)
    planned = {
        name: ended(child(folder, trials, 0.1, prepare)) for name, prepare in PLANNED.items()
    }
    killed = []
    for _ in range(kills):
        reader, writer = os.pipe()
        pid = child(folder, trials, 0.2, lambda w=writer: os.environ.update(STAND_IN_PIPE=str(w)))
        os.close(writer)
        os.read(reader, 1)  # returns when a run has begun, or the child has ended
        os.close(reader)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        killed.append(ended(pid))
    last = ended(child(folder, trials, seconds=0.01))
    print(json.dumps({"planned": planned, "killed": killed, "last": last, "steady": ended(steady)}))


if __name__ == "__main__":
    main()
