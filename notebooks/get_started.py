# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Get started: the commands
#
# The commands of the page [Get Started](../docs/get-started.md), each run as a reader would type
# it: in a folder with the three files of `notebooks/get_started` and the project's `configs`.

# %%
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nemo_rl_ref
from nemo_rl_ref.files.shipped import shipped

FOLDER = Path(tempfile.mkdtemp(prefix="get-started-"))
for file in shipped("notebooks/get_started").glob("my_*"):
    shutil.copy(file, FOLDER)
(FOLDER / "configs").symlink_to(shipped("configs"))
(FOLDER / "nemo_rl_ref").symlink_to(Path(nemo_rl_ref.__file__).parent)


def run(command):
    """Run a command of the page, print what it prints, and return the seconds it took."""
    words = shlex.split(command)
    assert words[0] == "python"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=FOLDER,
        env=os.environ | {"TQDM_DISABLE": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
    print(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).rstrip())
    return time.perf_counter() - began


# %%
#| label: start-check
#| num: start-check-seconds = {seconds:.0f}
seconds = run("python -m nemo_rl_ref.contract my_loss.py:MyLoss")

# %%
#| label: start-train
#| num: start-train-seconds = {seconds:.0f}
seconds = run(
    "python -m nemo_rl_ref.run_dpo --config configs/dpo.yaml --loss my_loss.py:MyLoss "
    "dpo.max_num_steps=30 checkpointing.checkpoint_dir=results/my_loss"
)

# %%
#| label: start-compare
#| num: start-compare-seconds = {seconds:.0f}
seconds = run(
    "python -m nemo_rl_ref.compare dpo --config configs/dpo.yaml --loss my_loss.py:MyLoss "
    "--seeds 3 dpo.max_num_steps=30"
)

# %%
#| label: start-difference
#| alt: Above, the share of held-out pairs in the right order with the loss and with the default, a
#|   line joining the two runs of each seed. Below, the differences and their mean with its interval.
from IPython.display import SVG

SVG(data=(FOLDER / "results/compare_dpo/difference.svg").read_text())

# %%
#| label: start-tune
#| num: start-tune-seconds = {seconds:.0f}
seconds = run(
    "python -m nemo_rl_ref.tune dpo --config configs/dpo.yaml --loss my_loss.py:MyLoss "
    "--space my_space.yaml --objective val:validation-default_accuracy --trials 5 "
    "dpo.max_num_steps=30"
)

# %%
#| label: start-export
run("python -m nemo_rl_ref.export my_loss.py:MyLoss --algorithm dpo --to my_project");

# %%
#| label: start-overlay
print((FOLDER / "my_project/my_loss.yaml").read_text())

# %%
#| label: start-reward
#| num: start-reward-seconds = {seconds:.0f}
seconds = run(
    "python -m nemo_rl_ref.run_grpo --config configs/grpo_tiny.yaml --env my_reward.py:reward "
    "grpo.max_num_steps=8 checkpointing.checkpoint_dir=results/my_reward"
)

# %%
#| label: start-export-reward
run(
    "python -m nemo_rl_ref.export --env my_reward.py:reward --algorithm grpo --to my_reward_project"
)
shutil.rmtree(FOLDER)
