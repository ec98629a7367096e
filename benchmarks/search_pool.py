# SPDX-License-Identifier: Apache-2.0
"""Runs at random settings: how noisy, which keys matter, how early a run can be judged.

    python benchmarks/search_pool.py        # 12 minutes on one core; again to go on

`noise` has two settings with twelve seeds each, `random` five random searches of 24 runs each, every
run with its validation curve. They are written to results/search-pool-dpo.json and
results/search-pool-grpo.json.
"""

from __future__ import annotations

import argparse

import optuna
from _search import PENALTY, RATE, SEEDS, TASKS, TRIALS, Store, Trainings, header, write

NOISE_SEEDS = 12
USUAL = {  # settings of the noise measurement, two that a person would compare
    "dpo": ({RATE: 1e-4}, {RATE: 1.5e-4}),
    "grpo": ({RATE: 2e-4, PENALTY: 0.01}, {RATE: 3e-4, PENALTY: 0.01}),
}


def random_values(task, seed):
    """The settings of a random search, in its order."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(TRIALS):
        trial = study.ask(task.space)
        yield trial.params
        study.tell(trial, 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("noise", "random"), help="one part, not written")
    only = parser.parse_args().only
    trainings, store = Trainings(), Store("pool")
    runs = {name: [] for name in TASKS}

    def add(task, part, values, seed, number, **options):
        record = store.get(
            f"{task.name} {part} {seed} {number}",
            lambda: trainings.run(task, values, seed, **options),
        )
        runs[task.name].append({"part": part, "number": number, **record})

    for task in TASKS.values():
        if only in (None, "noise"):
            for number, values in enumerate(USUAL[task.name]):
                for seed in range(NOISE_SEEDS):
                    add(task, "noise", values, seed, number)
        if only in (None, "random"):
            for seed in SEEDS:
                for number, values in enumerate(random_values(task, seed)):
                    add(task, "random", values, seed, number)
    if only is None:
        for task in TASKS.values():
            write(f"pool-{task.name}", {**header(task), "runs": runs[task.name]})


if __name__ == "__main__":
    main()
