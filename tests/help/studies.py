# SPDX-License-Identifier: Apache-2.0
"""Studies for the tests: what a search leaves behind, without any training."""

import math
import random

import optuna
from optuna.trial import TrialState

from nemo_rl_ref.tune import make_spec

LR = "policy.optimizer.kwargs.lr"
BETA = "dpo.reference_policy_kl_penalty"
SFT = "dpo.sft_loss_weight"
AVERAGE = "dpo.sft_average_log_probs"
BATCH = "policy.train_global_batch_size"
MICRO = "policy.train_micro_batch_size"
ACCURACY, KL = "val:validation-default_accuracy", "train:kl"
SPACE = {
    LR: {"log_uniform": [1e-6, 1e-2]},
    BETA: {"log_uniform": [0.01, 1.0]},
    SFT: {"choice": [0, 0.1]},
    AVERAGE: {"choice": [True, False], "when": {SFT: 0.1}},
    BATCH: {"choice": [16, 32, 64]},
    MICRO: {"divides": BATCH, "at_most": 32},
    "dpo.max_num_steps": 60,
}


def spec_of(space=None, objectives=(f"{ACCURACY}:maximize",), overrides=("dpo.val_period=20",)):
    return make_spec("dpo", "configs/dpo.yaml", space or SPACE, objectives, overrides)


def score(values, noise=0.0):
    """0.9 at a learning rate of 1e-4; β matters a little, the rest not at all."""
    distance = abs(math.log10(values[LR]) + 4)
    return 0.9 - 0.15 * distance - 0.03 * abs(math.log10(values.get(BETA, 0.1)) + 1) + noise


def make_study(
    trials,
    spec=None,
    *,
    seed=0,
    failing=lambda number: False,
    pruning=lambda number: False,
    storage=None,
    name="study",
):
    """A finished study; random points, values from `score` with a little noise."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = spec or spec_of()
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed=seed),
        directions=[objective.direction for objective in spec.objectives],
    )
    study.set_user_attr("spec", spec.to_dict())
    study.set_user_attr("base", spec.base)
    noise = random.Random(seed)
    for number in range(trials):
        trial = study.ask()
        values = spec.space.suggest(trial)
        trial.set_user_attr("values", values)
        trial.set_user_attr("seconds", 1.5)
        trial.set_user_attr("steps", 60)
        trial.set_user_attr("seed", 42)
        if failing(number):
            nan = f"step {number}: loss nan, gradient norm nan"
            reason = nan if number % 4 == 3 else "out of memory"
            trial.set_user_attr("failure", reason)
            study.tell(trial, state=TrialState.FAIL)
            continue
        found = score(values, noise.gauss(0, 0.01))
        if len(spec.objectives) > 1:
            study.tell(trial, [found, 100 * values[LR] + noise.random() * 0.01])
            continue
        for step in (20, 40, 60):
            trial.report(found * (1 - math.exp(-step / 20)), step)
            if pruning(number) and step == 40:
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, found)
    return study
