# SPDX-License-Identifier: Apache-2.0
"""Searches on a Ray of this machine with two workers."""

import os
import secrets
import shlex
import sys
import warnings
from pathlib import Path

import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from ray_runners import broken, deadly, reserved, together, validations
from studies import ACCURACY, AVERAGE, LR, MICRO, SFT, spec_of

from nemo_rl_ref.tune import SearchStopped, StudyError, optimize, optimize_on_ray
from nemo_rl_ref.tune.engines.ray import ENVIRONMENT
from nemo_rl_ref.tune.outcome.best import best_of
from nemo_rl_ref.tune.outcome.report import render
from nemo_rl_ref.tune.search import Settings, open_search, quiet

# Ray leaves sockets, files and processes to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A Ray with two CPUs, without dashboard, statistics, or files in the home folder."""
    token = (
        tmp_path_factory.mktemp("ray") / "token"
    )  # without it, Ray writes one to the home folder
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in {**ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(token)}.items():
            patch.setenv(name, value)
        warnings.simplefilter("ignore")
        import ray

        paths = os.pathsep.join(
            map(str, (Path(__file__).parents[2] / "help", Path(__file__).parents[3]))
        )
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={
                "env_vars": {"PYTHONPATH": paths},
                "py_executable": shlex.quote(sys.executable),
            },
        )
        yield
        ray.shutdown()


def state(study):
    return [trial.state.name for trial in study.trials]


@pytest.fixture(scope="module")
def searched(two_workers, tmp_path_factory):
    """Six trials on two workers, with a failed one and one that is not a number."""
    folder = tmp_path_factory.mktemp("together")
    study = optimize_on_ray(
        spec_of(), folder=folder, trials=6, runner=together, sampler="random", seed=1
    )
    return study, folder


def test_trials_run_in_two_actors(searched):
    study, folder = searched
    pids = [(folder / f"trial_{n:04d}" / "pid").read_text() for n in (0, 1)]
    assert len({*pids, str(os.getpid())}) == 3
    assert len(study.trials) == 6


def test_the_study_is_as_one_without_ray(searched, tmp_path):
    study, _ = searched
    alone = optimize(
        spec_of(), folder=tmp_path, trials=6, runner=after_the_first_two, sampler="random", seed=1
    )
    assert [t.state for t in study.trials] == [t.state for t in alone.trials]
    for ours, theirs in zip(study.trials, alone.trials, strict=True):
        assert ours.user_attrs.keys() == theirs.user_attrs.keys()
        assert ours.intermediate_values.keys() == theirs.intermediate_values.keys()
        for name in ("seed", "steps", "failure"):
            assert ours.user_attrs.get(name) == theirs.user_attrs.get(name), name
    assert study.user_attrs == alone.user_attrs


def after_the_first_two(spec, values, folder, *, seed=None, observe=None):
    """As `together`, for one process: no one to wait for."""
    for number in (0, 1):
        (folder.parent / f"here-{number}").touch()
    return together(spec, values, folder, seed=seed, observe=observe)


def test_failures_have_reasons_and_no_value(searched):
    study, _ = searched
    assert state(study) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    reasons = [t.user_attrs["failure"] for t in study.trials[2:4]]
    assert reasons == ["out of memory", f"step 20: {ACCURACY} is nan"]
    assert all(t.values is None for t in study.trials[2:4])


def test_conditional_and_tied_keys(searched):
    study, _ = searched
    for trial in study.trials:
        values = trial.user_attrs["values"]
        assert (AVERAGE in trial.params) == (values[SFT] == 0.1)
        assert MICRO in values and MICRO not in trial.params


def test_report_and_best_work_on_it(searched):
    study, _ = searched
    assert f"{LR}={study.best_trial.params[LR]!r}" in best_of(study).override_line
    assert "2 failed" in render(study)


def test_it_goes_on_with_what_others_began_and_optuna_prunes(two_workers, tmp_path):
    """Four trials without Ray, one left running by a dead process; then on Ray up to ten."""
    spec, options = spec_of(), {"sampler": "random", "seed": 5, "pruner": "successive-halving"}
    before = optimize(spec, folder=tmp_path, trials=4, runner=validations, **options).trials
    search = open_search(spec, Settings(trials=5, **options), tmp_path, heartbeats=False)
    spec.space.suggest(search.study.ask())
    params = search.study.trials[4].params
    study = optimize_on_ray(spec, folder=tmp_path, trials=10, runner=validations, **options)
    assert study.trials[:4] == before
    left, again = study.trials[4:6]
    assert left.state is TrialState.FAIL and again.params == params == left.params
    with quiet():
        assert RetryHeartbeatStaleTrialCallback.retry_history(again) == [4]
    counted = [t for t in study.trials if t.number != 4]
    assert len(counted) == 10 and all(t.state.is_finished() for t in counted)
    assert "PRUNED" in [t.state.name for t in counted[4:]]
    for trial in counted[4:]:
        steps = list(trial.intermediate_values)
        assert steps == ([20, 40, 60] if trial.state is TrialState.COMPLETE else [20])
        assert trial.user_attrs["steps"] == steps[-1], "it ran on after it was pruned"


def test_a_trial_whose_actor_is_killed_is_run_once_more(two_workers, tmp_path):
    study = optimize_on_ray(spec_of(), folder=tmp_path, trials=1, runner=deadly, sampler="random")
    assert state(study) == ["FAIL", "COMPLETE"]
    assert study.trials[0].params == study.trials[1].params


def test_three_failures_of_a_cause_end_the_search(two_workers, tmp_path):
    with pytest.raises(SearchStopped, match="3 trials failed of the same cause: ZeroDivisionError"):
        optimize_on_ray(spec_of(), folder=tmp_path, trials=30, runner=broken, sampler="random")
    study = open_search(spec_of(), Settings(), tmp_path).study
    ended = [t for t in study.trials if t.user_attrs.get("failure")]
    assert 3 <= len(ended) <= 4  # another one may have been under way
    assert not study.get_trials(states=(TrialState.RUNNING,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cpus_per_trial": -1}, StudyError, "gpus_per_trial: got -1 and 0"),
        ({"cpus_per_trial": 0}, StudyError, "gpus_per_trial: got 0 and 0"),
        ({"trials": 0}, StudyError, "trials: got 0"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        optimize_on_ray(spec_of(), folder=tmp_path, **options)


def test_a_trial_has_the_cpus_that_were_asked_for(two_workers, tmp_path):
    study = optimize_on_ray(
        spec_of(), folder=tmp_path, trials=1, cpus_per_trial=2, runner=reserved, sampler="random"
    )
    assert study.trials[0].values == [2.0]


def test_more_than_a_node_has_is_refused(two_workers, tmp_path):
    with pytest.raises(StudyError, match=r"got 3 and 0, which no node has; expected at most .*2.0"):
        optimize_on_ray(spec_of(), folder=tmp_path, trials=1, cpus_per_trial=3)
