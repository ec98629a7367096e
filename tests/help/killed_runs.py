# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again, beside one that is not. Started by test_resume.py.

    python tests/help/killed_runs.py FOLDER

Every run is a forked child, so that the libraries are loaded once. The kill is SIGKILL, by the
child itself when it comes to the planned point, or by the parent after a random time. Prints one
JSON object: how each child ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "help")]

import torch  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401, loaded before the first fork
from accelerate import Accelerator  # noqa: E402, F401
from trainer_runs import model_with_dropout, run  # noqa: E402

import nemo_rl_ref.files.metrics as metrics_file  # noqa: E402
import nemo_rl_ref.training.supervised as trainer  # noqa: E402
import nemo_rl_ref.utils.checkpoint as checkpoint  # noqa: E402

SETTINGS = {
    "dpo__max_num_steps": 15,
    "checkpointing__save_period": 2,
    "dpo__val_period": 2,
    "dpo__sft_loss_weight": 0.1,
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner, name, number, after=False):
    """The program dies when a function is called for the given time, or when that call is over."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and not after:
            die()
        result = original(*args, **kwargs)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, counted)


def die_in_the_middle_of_a_file(number):
    original, calls = torch.save, []

    def half(state, path):
        original(state, path)
        calls.append(path)
        if len(calls) == number:
            os.truncate(path, path.stat().st_size // 2)
            die()

    torch.save = half


def die_while_removing():
    original = checkpoint.shutil.rmtree

    def half(path, **options):
        if Path(path).name.startswith("removed"):
            original(Path(path) / "policy")
            die()
        original(path, **options)

    checkpoint.shutil.rmtree = half


# Where a child dies. Those above go on from what those before them left.
POINTS = {
    "before the first checkpoint": lambda: die_at_call(trainer, "update", 2),
    "in a step": lambda: die_at_call(trainer, "update", 4),
    "after a step, before its log line": lambda: die_at_call(
        metrics_file.JsonlLogger, "log_metrics", 4
    ),
    "in the middle of a file": lambda: die_in_the_middle_of_a_file(1),
    "before the sums are written": lambda: die_at_call(checkpoint, "seal", 1),
    "before the checkpoint gets its name": lambda: die_at_call(checkpoint.os, "rename", 1),
    "after the checkpoint got its name": lambda: die_at_call(
        checkpoint.os, "rename", 1, after=True
    ),
    "while an old checkpoint is removed": die_while_removing,
}


def start(folder, name, plan=None):
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        if plan:
            plan()
        run("dpo", folder, name=name, model=model_with_dropout(folder), **SETTINGS)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def end(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model_with_dropout(folder)
    started = time.monotonic()
    ends = {"uninterrupted": end(start(folder, "whole"))}
    seconds = time.monotonic() - started
    for point, plan in POINTS.items():
        ends[point] = end(start(folder, "killed", plan))
    ends["the rest"] = end(start(folder, "killed"))
    draw = random.Random(0)
    for number in range(5):
        child = start(folder, "random")
        time.sleep(draw.uniform(0.1, 0.5) * seconds)
        os.kill(child, signal.SIGKILL)
        ends[f"at random moment {number}"] = end(child)
    ends["the rest after random moments"] = end(start(folder, "random"))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
