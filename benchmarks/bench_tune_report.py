# SPDX-License-Identifier: Apache-2.0
"""A study of 1,000 finished trials: how long it takes to load it and to write its report.

    python benchmarks/bench_tune_report.py            # about a minute on two cores
    python benchmarks/bench_tune_report.py --write    # and record it in results/

Eight parameters, one of them conditional, ten intermediate values a trial, in the SQLite file that
a search writes by default. Every measurement is a new process, imports included: what a person
waits for after typing the command. Numbers are medians. The figures are Optuna's, and take most of it.

The script fails if loading and report together take 15 seconds or more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIALS, LIMIT = 1000, 15.0
SPACE = {
    "policy.optimizer.kwargs.lr": {"log_uniform": [1e-6, 1e-2]},
    "policy.optimizer.kwargs.weight_decay": {"uniform": [0.0, 0.2]},
    "policy.max_grad_norm": {"log_uniform": [0.1, 10.0]},
    "policy.train_global_batch_size": {"choice": [16, 32, 64]},
    "dpo.reference_policy_kl_penalty": {"log_uniform": [0.01, 1.0]},
    "dpo.sft_loss_weight": {"choice": [0, 0.1]},
    "dpo.sft_average_log_probs": {"choice": [True, False], "when": {"dpo.sft_loss_weight": 0.1}},
    "dpo.max_num_epochs": {"int": [1, 8]},
}


def make(url):
    """Write the study; its values follow from its parameters, with a little noise."""
    import random

    import optuna

    from nemo_rl_ref.tune import make_spec

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = make_spec("dpo", "configs/dpo.yaml", SPACE, ["val:validation-default_accuracy"])
    memory = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    noise = random.Random(0)
    study = optuna.create_study(storage=url, study_name="bench", direction="maximize")
    study.set_user_attr("spec", spec.to_dict())
    study.set_user_attr("base", spec.base)
    trials = []
    for _ in range(TRIALS):
        trial = memory.ask()
        values = spec.space.suggest(trial)
        lr = values["policy.optimizer.kwargs.lr"]
        value = 0.9 - 0.1 * abs(math.log10(lr) + 4) + noise.gauss(0, 0.02)
        trials.append(
            optuna.trial.create_trial(
                value=value,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"values": values, "seconds": 10.0, "steps": 100, "seed": 42},
                intermediate_values={
                    s: value * (1 - math.exp(-s / 40)) for s in range(10, 101, 10)
                },
            )
        )
    study.add_trials(trials)


def once(url, folder):
    started = time.perf_counter()
    import optuna

    from nemo_rl_ref.tune.outcome.report import write_report

    study = optuna.load_study(study_name="bench", storage=url)
    study.get_trials(deepcopy=False)
    loaded = time.perf_counter()
    path = write_report(study, folder / "report.html")
    ended = time.perf_counter()
    return {
        "load": loaded - started,
        "report": ended - loaded,
        "total": ended - started,
        "kilobytes": path.stat().st_size / 1e3,
    }


def measured(url, folder):
    """One measurement, in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", url, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    if arguments.one:
        url, folder = arguments.one
        print(json.dumps(once(url, Path(folder))))
        return
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'study.db'}"
        make(url)
        measured(url, folder)  # fills the disk's cache
        results = [measured(url, folder) for _ in range(arguments.rounds)]
    medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
    print(
        f"load {medians['load']:5.2f} s  report {medians['report']:5.2f} s  "
        f"total {medians['total']:5.2f} s  {medians['kilobytes']:6.0f} kB"
    )
    if arguments.write:
        from _record import write_result

        rounded = {key: round(value, 3) for key, value in medians.items()}
        numbers = {"trials": TRIALS, "parameters": len(SPACE), "seconds": rounded}
        write_result("tune_report", numbers)
    if medians["total"] >= LIMIT:
        sys.exit(f"{medians['total']:.2f} s, expected less than {LIMIT}")


if __name__ == "__main__":
    main()
