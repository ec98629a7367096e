# SPDX-License-Identifier: Apache-2.0
"""TPE with successive halving beside random search, at equal compute, and with fresh seeds.

    python benchmarks/search_samplers.py    # ten minutes on one core; again to go on

A search may spend as many optimizer steps as 16 whole runs for DPO and as 12 for GRPO. Random search,
with 24 runs, is the part `random` of search_pool.py. The best settings of DPO's searches are trained
again with three fresh seeds. Written to results/search-samplers-dpo.json and
results/search-samplers-grpo.json.
"""

from __future__ import annotations

import argparse

import optuna
from _search import DPO, GRPO, SEEDS, TASKS, SeededByTrial, Store, Trainings, header, write
from search_pool import random_values

from nemo_rl_ref.tune.methods import REDUCTION

FRESH_SEEDS = (1000, 1001, 1002)
SAMPLERS = {"tpe": lambda seed: optuna.samplers.TPESampler(seed=seed)}
#: Task, method, budget in whole runs; in the order in which they are run.
SEARCHES = ((DPO, "tpe+pruning", 16), (GRPO, "tpe+pruning", 12))


def pruner(task):
    """Successive halving: the best third goes on, from the first validation to three times it."""
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=task.val_period, reduction_factor=REDUCTION
    )


def search(task, method, trials, seed, trainings, store):
    """The runs of one search in their order; `pruned` where a run was ended early."""
    name, _, prunes = method.partition("+")
    study = optuna.create_study(
        direction="maximize",
        sampler=SeededByTrial(SAMPLERS[name], seed),
        pruner=pruner(task) if prunes else optuna.pruners.NopPruner(),
    )
    spent, budget, runs = 0, trials * task.steps, []
    while spent + task.steps <= budget:
        trial = study.ask(task.space)

        def watch(step, value, trial=trial):
            trial.report(value, step)
            if step < task.steps and trial.should_prune():
                raise optuna.TrialPruned

        def train(trial=trial, watch=watch):
            try:
                return trainings.run(task, trial.params, seed, watch=watch)
            except optuna.TrialPruned:
                return {**trainings.last, "pruned": True}

        key = f"{task.name} {method} {seed} {trial.number}"
        is_new = key not in store.done
        record = store.get(key, train)
        if record["values"] != trial.params:
            raise RuntimeError(f"{store.path}: {key} was made by another script; remove the file")
        if not is_new:
            for step, value, *_ in record["curve"]:
                trial.report(value, step)
        if "failure" in record:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif "pruned" in record:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, record["curve"][-1][1])
        spent += record["steps"]
        runs.append({"part": method, "number": trial.number, **record})
    return runs


def random_search(task, seed):
    """The runs of the random search in search_pool.py."""
    done = Store("pool").done
    return [
        {"part": "random", "number": number, **done[f"{task.name} random {seed} {number}"]}
        for number, _ in enumerate(random_values(task, seed))
    ]


def winner(runs):
    """The whole run with the best end."""
    whole = [run for run in runs if "pruned" not in run and "failure" not in run]
    return max(whole, key=lambda run: run["curve"][-1][1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TASK:METHOD", help="one of the searches, not written")
    only = parser.parse_args().only
    trainings, store = Trainings(), Store("samplers")
    runs = {name: [] for name in TASKS}

    def again(task, method, seed, found):
        best = winner(found)
        for fresh in FRESH_SEEDS:
            record = store.get(
                f"{task.name} again {method} {seed} {fresh}",
                lambda fresh=fresh: trainings.run(
                    task, best["values"], fresh, val_period=task.steps
                ),
            )
            again = {"part": f"again {method}", "number": best["number"], "search": seed}
            runs[task.name].append({**again, **record})

    for task, method, trials in SEARCHES:
        if only not in (None, f"{task.name}:{method}"):
            continue
        for seed in SEEDS:
            found = search(task, method, trials, seed, trainings, store)
            runs[task.name] += found
            if task is DPO:
                again(task, method, seed, found)
                again(task, "random", seed, random_search(task, seed))
    for task in TASKS.values() if only is None else ():
        write(f"samplers-{task.name}", {**header(task), "runs": runs[task.name]})


if __name__ == "__main__":
    main()
