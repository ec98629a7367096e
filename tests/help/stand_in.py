# SPDX-License-Identifier: Apache-2.0
"""A runner that trains nothing, in a few milliseconds, and searches that use it."""

import math
import os
import time
from pathlib import Path

from nemo_rl_ref.tune.space import Space
from nemo_rl_ref.tune.spec import Objective, Spec
from nemo_rl_ref.tune.trial import TrialFailed

LR, BETA = "policy.optimizer.kwargs.lr", "dpo.reference_policy_kl_penalty"
SPACE = {LR: {"log_uniform": [1e-6, 1e-2]}, BETA: {"uniform": [0.01, 1.0]}}
BASE = {"dpo.seed": 42, "dpo.val_period": 3, "dpo.max_num_steps": 9, "dpo.val_batches": 4}


def make(space=None, objectives=("val:loss:minimize",), **base):
    """A search with a configuration that is not in a file, so that no trainer is imported."""
    base = {**BASE, **base}
    spec = Spec(
        "dpo", "none.yaml", (), Space.from_dict(space or SPACE, base=base),
        tuple(Objective.parse(text) for text in objectives),
    )  # fmt: skip
    spec.__dict__["base"] = base
    return spec


def loss(values, step=9):
    return abs(math.log10(values[LR]) + 4) + values[BETA] + 1 / (1 + step)


def run(spec, values, folder, *, seed=None, observe=None):
    """Nine steps, every third validated; leaves a line for each start and end of a run."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note(folder, "began")
    if pipe := os.environ.get("STAND_IN_PIPE"):
        os.write(int(pipe), b".")
    gate = os.environ.get("STAND_IN_GATE")
    while gate and not os.path.exists(gate):
        time.sleep(0.05)
    seconds = float(os.environ.get("STAND_IN_SECONDS", "0"))
    for step in range(1, 10):
        time.sleep(seconds / 9)
        value, metrics = loss(values, step), {"train:loss": loss(values, step)}
        if step % 3 == 0:
            metrics |= {"val:loss": value, "val:accuracy": -value}
        if observe:
            observe(step, metrics)
    note(folder, "ended")
    return metrics


def note(folder, what):
    with (folder / "runs.txt").open("a") as file:
        file.write(f"{what} {os.getpid()}\n")


def failing(spec, values, folder, *, seed=None, observe=None):
    raise TrialFailed(f"step {seed}: loss nan, gradient norm {values[LR]}")
