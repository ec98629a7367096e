# SPDX-License-Identifier: Apache-2.0
"""What a search costs apart from training, beside Optuna alone.

    python benchmarks/bench_tune.py            # about a minute on two cores
    python benchmarks/bench_tune.py --write    # and record it in results/

The space is configs/spaces/dpo.yaml, the sampler TPE. A trial trains nothing: it draws its values
and reports three validations, of a made-up function; its own time is taken off. The contenders take
turns, block by block, each with a study of its own in an empty folder, so that a slow moment of the
machine hits all. Numbers are medians over blocks, in seconds a trial.

optuna, memory   Study.optimize, nothing is kept
optuna, sqlite   Study.optimize with a SQLite file, as Optuna's documentation opens one
ours             nemo_rl_ref.tune: heartbeat, a write-ahead log, values, seeds, times and steps
                 recorded, median pruning

Then: 1,000 finished trials are written, and by a fresh connection read, with PED-ANOVA's
importances. The script fails if ours costs more than 2 % of a trial of 10 seconds at 100 or at
1,000 trials, or if reading 1,000 trials takes 5 seconds or more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # noqa: E402
from optuna.trial import TrialState, create_trial  # noqa: E402

from nemo_rl_ref.tune.search import Settings, open_search, work  # noqa: E402
from nemo_rl_ref.tune.spec import make_spec  # noqa: E402

METRIC = "val:validation-default_loss"
TRIAL_SECONDS, MOST_SHARE, MOST_TO_READ = 10.0, 0.02, 5.0
BLOCK, BLOCKS, MANY, AFTER_MANY = 10, 10, 1000, 10


def score(values, step):
    return abs(math.log10(values["policy.optimizer.kwargs.lr"]) + 3.5) + 1 / step


def run(spec, values, folder, *, seed=None, observe=None):
    """Stands in for a training."""
    for step in (20, 40, 60):
        metrics = {METRIC: score(values, step)}
        observe(step, metrics)
    return metrics


def spec_of():
    return make_spec("dpo", ROOT / "configs/dpo.yaml", ROOT / "configs/spaces/dpo.yaml", [METRIC])


class Ours:
    """A study of this package; each block goes on with it."""

    def __init__(self, folder, done=0):
        self.folder, self.done = folder, done

    def block(self, trials):
        self.done += trials
        settings = Settings(trials=self.done, pruner="median")
        search = open_search(spec_of(), settings, self.folder, runner=run)
        started = time.perf_counter()
        work(search)
        return time.perf_counter() - started


class Optuna:
    """A study of Optuna's with the same space and reports."""

    def __init__(self, storage=None):
        sampler = optuna.samplers.TPESampler(seed=0)
        pruner = optuna.pruners.MedianPruner()
        self.study = optuna.create_study(storage=storage, sampler=sampler, pruner=pruner)
        self.space = spec_of().space

    def block(self, trials):
        started = time.perf_counter()
        self.study.optimize(self.objective, n_trials=trials)
        return time.perf_counter() - started

    def objective(self, trial):
        values = self.space.suggest(trial)
        for step in (20, 40, 60):
            trial.report(score(values, step), step)
            if step < 60 and trial.should_prune():
                raise optuna.TrialPruned
        return score(values, 60)


def write_many(folder):
    """A study of 1,000 finished trials, as a search leaves it."""
    spec = spec_of()
    study = open_search(spec, Settings(trials=MANY), folder, runner=run).study
    distributions = spec.space.distributions()
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(MANY):
        trial = drawn.ask()
        values = spec.space.suggest(trial)
        drawn.tell(trial, 0.0)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=score(values, 60),
                params=trial.params,
                distributions=distributions,
                intermediate_values={step: score(values, step) for step in (20, 40, 60)},
                user_attrs={
                    "values": values, "seed": 42, "steps": 60, "seconds": 3.0, "worker": "x-1",
                },
            )
        )  # fmt: skip
        assert number < MANY


def read_many(folder):
    """Seconds to read the trials, and to read them and rank their keys."""
    started = time.perf_counter()
    study = open_search(spec_of(), Settings(trials=MANY), folder, runner=run).study
    trials = study.get_trials(deepcopy=False)
    read = time.perf_counter() - started
    importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    both = time.perf_counter() - started
    assert len(trials) == MANY
    assert max(importances, key=importances.get) == "policy.optimizer.kwargs.lr"
    return read, both


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the numbers in results/")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec_of()  # imports the trainers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = {
            "optuna, memory": Optuna(),
            "optuna, sqlite": Optuna(f"sqlite:///{folder}/optuna.db"),
            "ours": Ours(folder / "ours"),
        }
        seconds = {name: [] for name in contenders}
        for _ in range(BLOCKS):
            for name, contender in contenders.items():
                seconds[name].append(contender.block(BLOCK) / BLOCK)
        per_trial = {name: statistics.median(found) for name, found in seconds.items()}
        write_many(folder / "many")
        read, both = min(read_many(folder / "many") for _ in range(3))
        many = Ours(folder / "many", MANY).block(AFTER_MANY) / AFTER_MANY
    first = per_trial["ours"]
    print(f"{device_name()}; seconds a trial, the first {BLOCK * BLOCKS} trials, TPE")
    for name, found in per_trial.items():
        print(f"  {name:15} {found:8.4f}   ours is {first / found:.2f} times that")
    print(f"after {MANY:,} trials, ours: {many:.4f}")
    shares = {"first_100": first / TRIAL_SECONDS, "after_1000": many / TRIAL_SECONDS}
    print("share of a 10-second trial: " + ", ".join(f"{k} {v:.2%}" for k, v in shares.items()))
    print(f"{MANY:,} trials read in {read:.2f} s, with importances {both:.2f} s")
    if options.write:
        numbers = {
            "seconds_per_trial": {name: round(found, 5) for name, found in per_trial.items()},
            "ratio_to_optuna_sqlite": round(first / per_trial["optuna, sqlite"], 3),
            "seconds_per_trial_after_1000": round(many, 5),
            "share_of_10_s": {name: round(share, 5) for name, share in shares.items()},
            "read_1000_seconds": round(read, 3),
            "read_1000_with_importances_seconds": round(both, 3),
            "optuna": optuna.__version__,
        }
        write_result("bench_tune.py", numbers)
    failed = max(shares.values()) > MOST_SHARE or both >= MOST_TO_READ
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
