# SPDX-License-Identifier: Apache-2.0
"""GRPO runs that are killed, and runs of two processes, beside one that is neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rl_runs import write_problems

ROOT = Path(__file__).parents[2]
SCRIPT = f"""
import json, os, random, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "help")!r}]
from pathlib import Path
import torch
import transformers.models.qwen3.modeling_qwen3
from rl_runs import settings
from nemo_rl_ref.run_grpo import train

folder, job = Path(sys.argv[1]), sys.argv[2]
CHANGES = {{
    "max_num_steps": 6, "max_num_epochs": 2, "num_prompts_per_step": 20, "val_period": 2,
    "num_generations_per_prompt": 2, "max_val_samples": 8, "val_batch_size": 8,
}}
POLICY = {{
    "policy.train_global_batch_size": 20, "policy.train_micro_batch_size": 5,
    "checkpointing.enabled": True, "loss_fn.reference_policy_kl_penalty": 0.05,
    "policy.optimizer.kwargs.lr": 1e-4,
}}

def run(name, ppo):
    section = "ppo" if ppo else "grpo"
    (folder / name).mkdir(exist_ok=True)
    changes = {{f"{{section}}.{{key}}": value for key, value in CHANGES.items()}} | POLICY
    if ppo:
        changes["ppo.skip_reference_policy_logprobs_calculation"] = False
        changes["value.train_global_batch_size"] = 20
    config = settings(folder / name, changes, ppo=ppo)
    logs = Path(config["logger"]["log_dir"])
    number = len(list(logs.glob("exp_*"))) if job == "kill" else 0
    config["logger"]["log_dir"] = str(logs / f"exp_{{number:03d}}")
    train(config)

def child(name, ppo, seconds=None):
    process = os.fork()
    if not process:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(name, ppo)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

if job == "kill":
    ends, draw = {{}}, random.Random(1)
    for ppo in (False, True):
        start = time.monotonic()
        ends[f"whole-{{ppo}}"] = [child(f"whole-{{ppo}}", ppo)]
        took = time.monotonic() - start
        times = [draw.uniform(0.2, 0.8) * took for _ in range(4)]
        ends[f"killed-{{ppo}}"] = [child(f"killed-{{ppo}}", ppo, s) for s in [*times, None]]
    print(json.dumps(ends))
else:
    for ppo in (False, True):
        run(f"{{job}}-{{ppo}}", ppo)
"""


def start(folder, job, *launcher):
    script = folder / "runs.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), job],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def curves(folder):
    """Every metric but the timings, by step; a step that was done again counts as done last."""
    found = {}
    for path in sorted((folder / "logs").glob("exp_*/metrics.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            step = found.setdefault(line.pop("step"), {})
            step.update({k: v for k, v in line.items() if not k.startswith("timing/")})
    return found


def test_killed_runs_go_on_with_the_same_bits(tmp_path):
    ends = json.loads(start(tmp_path, "kill").splitlines()[-1])
    for ppo in (False, True):
        assert ends[f"whole-{ppo}"] == [0]
        assert ends[f"killed-{ppo}"][-1] == 0 and set(ends[f"killed-{ppo}"][:-1]) <= {0, -9}
        whole, killed = curves(tmp_path / f"whole-{ppo}"), curves(tmp_path / f"killed-{ppo}")
        assert list(whole) == [1, 2, 3, 4, 5, 6] and sorted(killed) == list(whole)
        assert killed == whole
    assert -9 in ends["killed-False"] + ends["killed-True"]


def test_two_processes_train_what_one_does(tmp_path):
    start(tmp_path, "one")
    for ppo in (False, True):
        (tmp_path / f"two-{ppo}").mkdir()
        write_problems(tmp_path / f"two-{ppo}")
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    start(tmp_path, "two", *launch, "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2")
    for ppo in (False, True):
        one, two = curves(tmp_path / f"one-{ppo}"), curves(tmp_path / f"two-{ppo}")
        assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
        for step, metrics in one.items():
            assert metrics.keys() == two[step].keys()
            assert metrics["train/reward"] == two[step]["train/reward"]
            for name in ("train/loss", "train/reward", "train/kl_penalty", "validation/accuracy"):
                if name in metrics:
                    assert metrics[name] == pytest.approx(two[step][name], abs=1e-5), (step, name)
            for name in ("train/grad_norm", "train/probs_ratio_max", "train/critic/loss"):
                if name in metrics:
                    assert metrics[name] == pytest.approx(two[step][name], rel=1e-3), (step, name)
