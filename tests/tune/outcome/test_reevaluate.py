# SPDX-License-Identifier: Apache-2.0
"""Re-evaluation over fresh seeds: the statistics, resuming, and what is said about the result."""

import math
import random

import numpy as np
import optuna
import pytest
from bs4 import BeautifulSoup
from scipy import stats
from studies import ACCURACY, BETA, KL, LR, make_study, score, spec_of

from nemo_rl_ref.tune.outcome.reevaluate import (
    FIRST_SEED,
    compare,
    fresh_seeds,
    reevaluate,
    top_candidates,
)
from nemo_rl_ref.tune.outcome.report import render
from nemo_rl_ref.tune.trial import TrialFailed

DEFAULTS = {LR: 3e-4, BETA: 0.1}  # of configs/dpo.yaml


def noise(seed, scale=0.02):
    return random.Random(seed).gauss(0, scale)


def runner(spec, values, folder, *, seed=None, observe=None):
    """A run whose value has noise that is the same for all configurations with a seed, and more."""
    values = {**DEFAULTS, **values}
    own = noise(f"{seed} {values[LR]}", 0.002)
    return {ACCURACY: score(values, noise(seed) + own), "train:loss": 1.0}


@pytest.fixture(scope="module")
def study():
    return make_study(30, failing=lambda n: n == 2, seed=3)


# Statistics


def test_the_interval_and_the_probability_are_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.8, 0.05, 8), generator.normal(0.75, 0.05, 8)
    found = compare(dict(enumerate(a)), dict(enumerate(b)), maximize=True)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["mean_difference"] == pytest.approx((a - b).mean())
    one_sided = stats.ttest_rel(a, b, alternative="greater").pvalue
    assert found["probability"] == pytest.approx(1 - one_sided)
    assert found["wins"] == np.mean(a > b)
    assert found["pairs"] == 8


def test_the_probability_is_the_posterior_of_the_stated_model():
    """Drawn: σ² from its scaled inverse χ², then μ given σ²."""
    d = np.array([0.1, -0.05, 0.2, 0.02, 0.07])
    found = compare(dict(enumerate(d)), dict.fromkeys(range(5), 0.0), maximize=True)
    generator = np.random.default_rng(1)
    variance = 4 * d.var(ddof=1) / generator.chisquare(4, 400_000)
    mean = generator.normal(d.mean(), np.sqrt(variance / 5))
    assert found["probability"] == pytest.approx((mean > 0).mean(), abs=0.004)


def test_the_interval_covers_the_true_difference_in_95_of_100():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        d = generator.normal(0.3, 1.0, 5)
        found = compare(dict(enumerate(d)), dict.fromkeys(range(5), 0.0), maximize=True)
        covered += found["low"] <= 0.3 <= found["high"]
    assert covered / 500 == pytest.approx(0.95, abs=0.025)


def test_simultaneous_intervals_cover_all_candidates_at_once():
    generator = np.random.default_rng(3)
    covered = alone = 0
    for _ in range(250):
        found = [
            compare(dict(enumerate(d)), dict.fromkeys(range(5), 0.0), maximize=True, candidates=4)
            for d in generator.normal(0, 1, (4, 5))
        ]
        covered += all(f["low_simultaneous"] <= 0 <= f["high_simultaneous"] for f in found)
        alone += all(f["low"] <= 0 <= f["high"] for f in found)
    assert covered / 250 >= 0.94
    assert alone / 250 < 0.9  # which is why there are simultaneous ones


def test_where_less_is_better_signs_are_turned():
    a, b = {0: 0.1, 1: 0.2, 2: 0.15}, {0: 0.3, 1: 0.35, 2: 0.25}
    up, down = (compare(a, b, maximize=m) for m in (True, False))
    assert down["mean_difference"] == -up["mean_difference"] > 0
    assert down["probability"] == pytest.approx(1 - up["probability"])
    assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))


def test_only_common_seeds_are_paired():
    found = compare({1: 0.5, 2: 0.7, 3: 9.0}, {2: 0.6, 1: 0.45, 4: -9.0}, maximize=True)
    assert found["pairs"] == 2
    assert found["mean_difference"] == pytest.approx(0.075)
    assert found["default_mean"] == pytest.approx(0.525)


@pytest.mark.parametrize(
    ("candidate", "default"), [({1: 0.5}, {1: 0.4}), ({1: 0.5, 2: 0.5}, {1: 0.4, 2: 0.4}), ({}, {})]
)
def test_without_spread_there_is_no_interval_and_no_probability(candidate, default):
    found = compare(candidate, default, maximize=True)
    assert not {"low", "high", "probability"} & found.keys()


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(ValueError, match=f"level: got {level}"):
        compare({}, {}, maximize=True, level=level)


# Seeds and candidates


def test_seeds_of_the_search_are_never_used_again(study):
    assert fresh_seeds(study, 2) == (FIRST_SEED, FIRST_SEED + 1)
    assert fresh_seeds(study, 2, also=[FIRST_SEED]) == (FIRST_SEED + 1, FIRST_SEED + 2)
    varied = optuna.create_study()
    for seed in (FIRST_SEED, FIRST_SEED + 2):
        varied.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"seed": seed}))
    assert fresh_seeds(varied, 3) == (FIRST_SEED + 1, FIRST_SEED + 3, FIRST_SEED + 4)
    with pytest.raises(ValueError, match="seeds: got 0"):
        fresh_seeds(study, 0)


def test_candidates_are_the_best_and_different(study):
    found = top_candidates(study, 4)
    values = [value for _, _, value in found]
    assert values == sorted((t.value for t in study.trials if t.values), reverse=True)[:4]
    assert found[0][0] == study.best_trial.number
    with pytest.raises(ValueError, match="top: got 0"):
        top_candidates(study, 0)


def test_the_default_has_what_all_trials_have(study, tmp_path):
    """Otherwise the default would train for more steps than the trials."""
    seen = []

    def watched(spec, values, folder, *, seed=None, observe=None):
        seen.append(values)
        return runner(spec, values, folder, seed=seed)

    reevaluate(study, tmp_path, top=1, seeds=1, run_trial=watched, show=lambda text: None)
    assert seen == [{"dpo.max_num_steps": 60}, study.best_trial.user_attrs["values"]]


def test_equal_configurations_count_once():
    study = make_study(3, spec_of({LR: {"choice": [1e-4]}}))
    assert len(top_candidates(study, 3)) == 1


def test_several_objectives_are_refused():
    spec = spec_of(objectives=(f"{ACCURACY}:maximize", f"{KL}:minimize"))
    with pytest.raises(ValueError, match="2 objectives"):
        top_candidates(make_study(3, spec), 1)


# Runs


def test_winner_default_and_optimism(study, tmp_path):
    said = []
    result = reevaluate(study, tmp_path, top=2, seeds=6, run_trial=runner, show=said.append)
    assert len(said) == 18 and "18 of 18" in said[-1] and "default, seed 10000" in said[0]
    assert result.winner.name == f"trial {study.best_trial.number}"
    assert result.winner.search_value == study.best_value
    fresh = [r.value for r in result.runs if r.candidate == result.winner.name]
    assert len(fresh) == 6
    assert result.winner.mean == pytest.approx(np.mean(fresh))
    assert result.winner.optimism == pytest.approx(study.best_value - np.mean(fresh))
    default = [r.value for r in result.runs if r.candidate == "default"]
    assert result.winner.default_mean == pytest.approx(np.mean(default))
    # The noise of a seed is in both: paired, the difference is known far better.
    assert result.winner.high - result.winner.low < 0.01 < np.std(default)
    assert result.winner.probability > 0.99
    text = " ".join(result.sentences())
    assert "The interval does not contain zero: it is better" in text
    assert "the mean over fresh seeds is the one to quote" in text


def test_interrupted_and_resumed(study, tmp_path):
    calls = []

    def counted(spec, values, folder, *, seed=None, observe=None):
        calls.append((seed, values.get(LR)))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return runner(spec, values, folder, seed=seed)

    options = {"top": 2, "seeds": 4, "run_trial": counted, "show": lambda text: None}
    with pytest.raises(KeyboardInterrupt):
        reevaluate(study, tmp_path, **options)
    assert len(list(tmp_path.glob("*/run.json"))) == 4
    again = reevaluate(study, tmp_path, **options)
    assert len(calls) == 13  # the interrupted one twice, the others once
    assert len(list(tmp_path.glob("*/run.json"))) == 12
    fresh = reevaluate(study, tmp_path / "other", **{**options, "run_trial": runner})
    assert [r.value for r in again.runs] == [r.value for r in fresh.runs]
    calls.clear()
    more = reevaluate(study, tmp_path, **{**options, "seeds": 5})
    assert len(calls) == 3 and more.winner.pairs == 5


def test_runs_of_another_search_are_not_mixed_in(study, tmp_path):
    calls = []

    def counted(spec, values, folder, *, seed=None, observe=None):
        calls.append(seed)
        return runner(spec, values, folder, seed=seed)

    options = {"top": 1, "seeds": 2, "run_trial": counted, "show": lambda text: None}
    other = make_study(30, spec_of(overrides=("dpo.val_period=30",)), seed=3)
    for one in (study, study, other, other):
        reevaluate(one, tmp_path, **options)
    assert len(calls) == 8


def test_failures_are_reasons_and_not_values(study, tmp_path):
    def failing(spec, values, folder, *, seed=None, observe=None):
        if LR in values and seed == FIRST_SEED:
            raise TrialFailed("out of memory")
        if LR in values and seed == FIRST_SEED + 1:
            return {ACCURACY: math.nan}
        if LR in values and seed == FIRST_SEED + 2:
            return {"train:loss": 1.0}
        return runner(spec, values, folder, seed=seed)

    result = reevaluate(study, tmp_path, top=1, seeds=6, run_trial=failing, show=lambda text: None)
    assert [r.failure for r in result.failures] == [
        "out of memory", f"{ACCURACY} is nan", f"the run has no {ACCURACY}",
    ]  # fmt: skip
    assert result.winner.failed == 3 and result.winner.pairs == 3
    both = [r.value for r in result.runs if r.candidate == "default"][3:]
    assert result.winner.default_mean == pytest.approx(np.mean(both))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_not_averaged(study, tmp_path, value):
    def odd(spec, values, folder, *, seed=None, observe=None):
        return {ACCURACY: value if LR in values else 0.5}

    result = reevaluate(study, tmp_path, top=1, seeds=1, run_trial=odd, show=lambda text: None)
    assert result.winner.mean is None, "it was averaged"
    assert [run.failure for run in result.failures] == [f"{ACCURACY} is {value}"]


def test_where_all_fail_it_is_said(study, tmp_path):
    def failing(spec, values, folder, *, seed=None, observe=None):
        raise TrialFailed("out of memory")

    result = reevaluate(study, tmp_path, top=1, seeds=2, run_trial=failing, show=lambda text: None)
    assert "no seed on which both finished" in result.sentences()[-1]


def test_a_programming_error_is_not_a_failed_run(study, tmp_path):
    def broken(spec, values, folder, *, seed=None, observe=None):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reevaluate(study, tmp_path, top=1, seeds=1, run_trial=broken)
    assert not list(tmp_path.glob("*/run.json"))


def test_a_difference_smaller_than_the_noise_is_not_celebrated(study, tmp_path):
    def flat(spec, values, folder, *, seed=None, observe=None):
        return {ACCURACY: 0.5 + noise(f"{seed} {values.get(LR)}")}

    result = reevaluate(study, tmp_path, top=3, seeds=5, run_trial=flat, show=lambda text: None)
    assert "The interval contains zero" in " ".join(result.sentences())
    # The search promised far more than the runs give.
    assert result.winner.optimism == pytest.approx(study.best_value - 0.5, abs=0.05)


def test_a_candidate_that_overtakes_is_read_by_its_simultaneous_interval(study, tmp_path):
    second = top_candidates(study, 2)[1][1]

    def better_second(spec, values, folder, *, seed=None, observe=None):
        bonus = 0.2 if values == second else 0.0
        return {ACCURACY: 0.5 + bonus + noise(f"{seed} {values.get(LR)}")}

    result = reevaluate(
        study, tmp_path, top=2, seeds=4, run_trial=better_second, show=lambda text: None
    )
    overtaken = result.comparisons[1]
    assert overtaken.low_simultaneous < overtaken.low
    assert f"{overtaken.low_simultaneous:.4g} to" in render(study, reevaluation=result)


def test_runs_that_end_at_different_steps_are_compared_with_a_word(study, tmp_path):
    """And a value that is older than its run is not compared at all."""

    def lengths(last_of):
        def run(spec, values, folder, *, seed=None, observe=None):
            observe(20, found := runner(spec, values, folder, seed=seed))
            observe(last_of(seed), {"train:loss": 1.0} if last_of(seed) > 60 else found)
            return found

        return run

    longer = lengths(lambda seed: 60 - 20 * (seed % 2))
    result = reevaluate(study, tmp_path / "a", top=1, seeds=2, run_trial=longer)
    assert "The runs ended at different steps, 40 to 60" in result.sentences()[0]
    stale = reevaluate(study, tmp_path / "b", top=1, seeds=1, run_trial=lengths(lambda seed: 80))
    assert {run.failure for run in stale.runs} == {
        f"{ACCURACY} was last measured at step 20, and the run ended with step 80"
    }


def test_the_report_has_it(study, tmp_path):
    result = reevaluate(study, tmp_path, top=3, seeds=4, run_trial=runner, show=lambda text: None)
    soup = BeautifulSoup(render(study, reevaluation=result), "html.parser")
    section = soup.find("h2", string="Re-evaluation over fresh seeds").parent
    text = " ".join(section.get_text(" ").split())
    assert result.sentences()[1] in text
    assert len(section.table.find_all("tr")) == 4
