# SPDX-License-Identifier: Apache-2.0
"""Trials that run a checkout of NeMo RL, with a stand-in script in its place."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from nemo_rl_ref.tune import SearchStopped, make_spec, optimize
from nemo_rl_ref.tune.engines.nemo_rl import (
    LauncherError,
    launcher,
    metric_name,
    reason_from,
    run_trial,
    script_of,
    stop,
)
from nemo_rl_ref.tune.trial import TrialFailed
from nemo_rl_ref.upstream import load_manifest

CHECKOUT = Path(__file__).parents[2] / "help" / "nemo_rl_stand_in"
ACCURACY = "val:validation-default_accuracy"
OPTIONS = {"checkout": str(CHECKOUT), "command": (sys.executable,), "poll": 0.05}


@pytest.fixture(scope="module")
def spec():
    space = {"policy.optimizer.kwargs.lr": {"log_uniform": [1e-6, 1e-2]}}
    return make_spec(
        "dpo", "configs/dpo.yaml", space, [ACCURACY], ["dpo.max_num_steps=6", "dpo.val_period=2"]
    )


def trial(spec, folder, observe=None, **odd):
    values = {"policy.optimizer.kwargs.lr": 1e-4}
    values |= {f"stand_in.{name}": value for name, value in odd.items()}
    return run_trial(spec, values, folder, seed=7, observe=observe, **OPTIONS)


def test_metrics_by_nemo_rls_names_and_steps_in_order(spec, tmp_path):
    seen = []
    found = trial(spec, tmp_path, lambda step, metrics: seen.append((step, dict(metrics))))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [step for step, metrics in seen if ACCURACY in metrics] == [2, 4, 6]
    assert seen[1][1].keys() == {
        "val:validation-default_loss", ACCURACY, "train:loss", "train:lr", "train:seed",
    }  # fmt: skip
    assert found[ACCURACY] == seen[-1][1][ACCURACY]
    assert found["train:loss"] == pytest.approx(1 / 6)
    assert found["train:seed"] == 7  # the trial's seed, not the configuration's
    assert "Max number of steps" in (tmp_path / "output.txt").read_text()


def test_a_second_attempt_does_not_read_the_first_ones_metrics(spec, tmp_path):
    trial(spec, tmp_path)
    with pytest.raises(TrialFailed, match="wrote no metrics"):
        trial(spec, tmp_path, silent=True)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["exp_001", "exp_002"]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"out_of_memory_at": 3}, "out of memory"),
        ({"raise_at": 3}, "ValueError: policy.train_global_batch_size: got 7 at step 3"),
        ({"kill_at": 3}, "killed by SIGKILL, often the system out of memory"),
        ({"nan_at": 3, "seconds_per_step": 0.1}, "step 3: loss nan"),
    ],
)
def test_a_failure_has_its_reason(spec, tmp_path, odd, reason):
    with pytest.raises(TrialFailed) as failed:
        trial(spec, tmp_path, **odd)
    assert failed.value.reason == reason


def test_an_override_that_nemo_rl_refuses_is_the_reason(spec, tmp_path):
    wrong = make_spec("dpo", "configs/dpo.yaml", spec.space, [ACCURACY])
    wrong.__dict__["overrides"] = ("dpo.no_such_key=1",)
    with pytest.raises(TrialFailed, match=r"OverridesError: .*dpo\.no_such_key"):
        trial(wrong, tmp_path)


def test_pruning_ends_the_process(spec, tmp_path):
    def observe(step, metrics):
        if ACCURACY in metrics:
            raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        trial(spec, tmp_path, observe, seconds_per_step=0.4, child=True)
    output = (tmp_path / "output.txt").read_text()
    assert "Max number of steps" not in output
    script, child = (int(pid) for pid in output.split("processes ")[1].split()[:2])
    assert not Path(f"/proc/{script}").exists(), "the script still runs"
    assert_it_ends(child)  # also one that SIGTERM alone does not end


def assert_it_ends(pid):
    """A process that is not ours to wait for was killed."""
    for _ in range(1000):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("a process of the group was left running")


def test_one_that_ignores_sigterm_is_killed_after_the_grace_period():
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '180']); print(child.pid, flush=True); time.sleep(180)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(process.stdout.readline())
    stop(process, grace=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL, "it ran to its own end: no SIGKILL"
    assert_it_ends(child)


def test_a_study_runs_on_it(spec, tmp_path):
    runner = launcher(CHECKOUT, command=[sys.executable], poll=0.05)
    study = optimize(spec, folder=tmp_path, trials=2, runner=runner, sampler="random")
    for trial in study.trials:
        lr = trial.params["policy.optimizer.kwargs.lr"]
        peak = 0.9 - 0.1 * abs(math.log10(lr) + 4)
        assert trial.value == pytest.approx(peak * (1 - math.exp(-6 / 4)), abs=1e-6)
        assert list(trial.intermediate_values) == [2, 4, 6]
        logs = tmp_path / f"trial_{trial.number:04d}" / "logs"
        assert [path.name for path in logs.glob("*")] == ["exp_001"], "not its own log_dir"


def test_an_objective_that_the_script_never_logs_ends_the_search(spec, tmp_path):
    other = make_spec(
        "dpo", "configs/dpo.yaml", spec.space, ["val:rewards:maximize"], spec.overrides
    )
    runner = launcher(CHECKOUT, command=[sys.executable], poll=0.05)
    with pytest.raises(SearchStopped, match=f"got val:rewards, .* it logs {ACCURACY}, val:valid"):
        optimize(other, folder=tmp_path, trials=2, runner=runner, sampler="random")


def test_names_of_tags():
    assert metric_name("train/loss") == "train:loss"
    assert metric_name("train/critic/loss") == "train:critic/loss"
    assert metric_name("validation/accuracy") == "val:accuracy"
    assert metric_name("validation-default/loss") == "val:validation-default_loss"
    assert metric_name("timing/train/policy_training") is None
    assert metric_name("ray/node.0.gpu.1.util") is None
    assert metric_name("hp_metric") is None


def test_the_default_metrics_of_nemo_rls_files_are_names_of_tags():
    names = {
        "dpo.yaml": "validation-default/loss",
        "rm.yaml": "validation-default/loss",
        "sft.yaml": "validation/val_loss",
        "grpo_math_1B.yaml": "validation/accuracy",
        "ppo_math_1B.yaml": "validation/accuracy",
    }
    configs = load_manifest()["configs"]
    for file, tag in names.items():
        assert metric_name(tag) == configs[file]["checkpointing.metric_name"], file


@pytest.mark.parametrize(
    ("output", "status", "reason"),
    [
        ("\x1b[36m(W pid=7)\x1b[0m torch.OutOfMemoryError: CUDA out of memory.\n", 1,
         "out of memory"),
        ("ray.exceptions.RayTaskError(ValueError): x\nValueError: seed\n", 1, "ValueError: seed"),
        ("KeyError: 'x'\nThen:\nRuntimeError: a worker died\n", 1, "RuntimeError: a worker died"),
        ("KeyboardInterrupt\n", 1, "KeyboardInterrupt"),
        ("step 3\n", 137, "killed by SIGKILL, often the system out of memory"),
        ("step 3\n", -15, "killed by SIGTERM"),
        ("starting\ncannot open\n\n", 2, "exit status 2: cannot open"),
        ("", 2, "exit status 2: no output"),
    ],
)  # fmt: skip
def test_reasons(output, status, reason):
    assert reason_from(output, status) == reason


def test_scripts_are_the_manifests():
    for algorithm in ("sft", "dpo", "rm", "grpo", "ppo"):
        assert script_of(algorithm) == f"examples/run_{algorithm}.py"
    with pytest.raises(LauncherError, match="got 'dqn'"):
        script_of("dqn")


def test_what_is_no_checkout_is_refused_before_any_trial(tmp_path):
    with pytest.raises(LauncherError, match=r"has no examples/run_dpo\.py"):
        launcher(tmp_path)
    with pytest.raises(LauncherError, match="no program 'no-such-program'"):
        launcher(CHECKOUT, command=["no-such-program"])
    with pytest.raises(LauncherError, match="grace: got 0"):
        launcher(CHECKOUT, command=[sys.executable], grace=0)
