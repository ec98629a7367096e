# SPDX-License-Identifier: Apache-2.0
"""Runners of trials for the tests of the Ray engine; Ray's workers import them."""

import math
import os
import signal
import time
from pathlib import Path

from studies import ACCURACY, LR, score

from nemo_rl_ref.tune.trial import TrialFailed


def validations(spec, values, folder, *, seed=None, observe=None):
    """Three validations; a high learning rate is worse from the first on."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "pid").write_text(str(os.getpid()))
    metrics = {}
    for step in range(1, 61):
        metrics = {"train:loss": 1 / step}
        if step % 20 == 0:
            metrics[ACCURACY] = score(values) * (1 - math.exp(-step / 20))
        observe(step, metrics)
    return metrics


def together(spec, values, folder, *, seed=None, observe=None):
    """Trials 0 and 1 wait for each other, trial 2 fails, trial 3 has a NaN."""
    number = int(Path(folder).name.removeprefix("trial_"))
    study = Path(folder).parent
    if number in (0, 1):
        (study / f"here-{number}").touch()
        while not (study / f"here-{1 - number}").exists():
            time.sleep(0.05)
    if number == 2:
        raise TrialFailed("out of memory")
    if number == 3:
        observe(20, {"train:loss": 1.0, ACCURACY: math.nan})
    return validations(spec, values, folder, seed=seed, observe=observe)


def reserved(spec, values, folder, *, seed=None, observe=None):
    """The CPUs that Ray has reserved for the trial, as its objective."""
    import ray

    return {ACCURACY: ray.get_runtime_context().get_assigned_resources()["CPU"]}


def deadly(spec, values, folder, *, seed=None, observe=None):
    """The first trial kills its worker, as the system does with one that takes too much memory."""
    if Path(folder).name == "trial_0000":
        os.kill(os.getpid(), signal.SIGKILL)
    return validations(spec, values, folder, seed=seed, observe=observe)


def broken(spec, values, folder, *, seed=None, observe=None):
    """An error of the runner itself, with a number that differs from trial to trial."""
    raise ZeroDivisionError(f"at {values[LR]}")
