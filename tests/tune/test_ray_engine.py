# SPDX-License-Identifier: Apache-2.0
"""Searches on a Ray of this machine with two workers."""

import os
import secrets
import shlex
import sys
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from ray_runners import broken, deadly, reserved, together, validations
from studies import ACCURACY, AVERAGE, LR, MICRO, SFT, spec_of

from nemo_rl_ref.tune import SearchStopped, StudyError, optimize, ray_engine
from nemo_rl_ref.tune.best import best_of
from nemo_rl_ref.tune.ray_engine import ENVIRONMENT, _Work, optimize_on_ray
from nemo_rl_ref.tune.report import render
from nemo_rl_ref.tune.samplers import SearchError
from nemo_rl_ref.tune.study import Settings, claim, open_search, tell

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
            map(str, (Path(__file__).parents[1] / "help", Path(__file__).parents[2]))
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


def test_trials_run_on_both_workers(searched):
    study, folder = searched
    pids = [(folder / f"trial_{n:04d}" / "pid").read_text() for n in (0, 1)]
    assert len({*pids, str(os.getpid())}) == 3
    assert len(study.trials) == 6


def test_the_study_is_as_one_without_ray(searched, tmp_path):
    study, _ = searched
    alone = optimize(
        spec_of(), folder=tmp_path, trials=6, runner=after_the_first_two, sampler="random", seed=1
    )
    for ours, theirs in zip(study.trials, alone.trials, strict=True):
        assert ours.params == theirs.params and ours.state == theirs.state
        assert ours.values == theirs.values
        assert ours.intermediate_values == theirs.intermediate_values
        assert ours.user_attrs.keys() == theirs.user_attrs.keys()
        for name in ("values", "seed", "steps", "failure"):
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


def test_it_goes_on_where_it_was_ended_and_asha_prunes(two_workers, tmp_path):
    """Four trials without Ray, one left running by a dead process; then on Ray up to ten."""
    spec, options = spec_of(), {"sampler": "random", "seed": 5, "heartbeat": 1, "grace": 2}
    study = optimize(spec, folder=tmp_path, trials=4, runner=validations, **options)
    before = study.trials
    search = open_search(spec, Settings(trials=5, **options), tmp_path)
    abandoned = claim(search)
    spec.space.suggest(abandoned)
    params = study.trials[4].params
    study = optimize_on_ray(
        spec, folder=tmp_path, trials=10, runner=validations, pruner="successive-halving", **options
    )
    assert len(study.trials) == 10 and all(t.state.is_finished() for t in study.trials)
    assert study.trials[:4] == before
    assert len({t.params[LR] for t in study.trials}) == 10, "a finished trial was run again"
    pids = [(tmp_path / f"trial_{number:04d}" / "pid").read_text() for number in range(4)]
    assert pids == [str(os.getpid())] * 4, "a finished trial was run again"
    assert study.trials[4].params == params  # run under its number, with its parameters
    states = state(study)
    assert "PRUNED" in states[5:] and "COMPLETE" in states[4:]
    for trial in study.trials[4:]:
        steps = list(trial.intermediate_values)
        if trial.state is TrialState.PRUNED:  # ASHA knew of the trials before
            assert steps in ([20], [20, 40], [20, 40, 60])
            rung = 60 if steps[-1] == 60 else 20
            there = [
                t.intermediate_values[rung] for t in study.trials if rung in t.intermediate_values
            ]
            assert trial.intermediate_values[rung] < max(there)
        else:
            assert steps == [20, 40, 60]


def test_asha_is_told_what_the_study_has_seen(tmp_path):
    spec = spec_of()
    search = open_search(spec, Settings(trials=9, pruner="successive-halving"), tmp_path)
    for value in (0.2, 0.5, 0.8):
        trial = claim(search)
        for step in (20, 40, 60):
            trial.report(value + step / 1000, step)
        tell(search.study, trial, TrialState.COMPLETE, [value])
    asha = _Work(search).scheduler()
    (bracket,) = asha._brackets
    rungs = {milestone: sorted(recorded.values()) for milestone, recorded in bracket._rungs}
    assert rungs.keys() == {60, 20}
    assert rungs[60] == pytest.approx([0.26, 0.56, 0.86])
    assert rungs[20] == pytest.approx([0.22, 0.52, 0.82])


def test_a_worker_that_is_killed_fails_its_trial(two_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "RESTARTS", 0)
    study = optimize_on_ray(spec_of(), folder=tmp_path, trials=1, runner=deadly, sampler="random")
    (trial,) = study.trials
    assert trial.state is TrialState.FAIL
    assert trial.user_attrs["failure"].startswith("its worker died: ")


def test_three_failures_of_a_cause_end_the_search(two_workers, tmp_path):
    with pytest.raises(SearchStopped, match="3 trials failed of the same cause: ZeroDivisionError"):
        optimize_on_ray(spec_of(), folder=tmp_path, trials=30, runner=broken, sampler="random")
    study = open_search(spec_of(), Settings(), tmp_path).study
    ended = [t for t in study.trials if t.state is TrialState.FAIL]
    assert 3 <= len(ended) <= 4  # another one may have been under way
    assert not study.get_trials(states=(TrialState.RUNNING,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pruner": "median"}, SearchError, "pruner: got 'median' with Ray"),
        ({"cpus_per_trial": -1}, StudyError, "cpus_per_trial: got -1"),
        ({"cpus_per_trial": 0}, StudyError, "cpus_per_trial: got 0 with gpus_per_trial 0"),
        ({"trials": 0}, StudyError, "trials: got 0"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        optimize_on_ray(spec_of(), folder=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_has_the_cpus_that_were_asked_for(two_workers, tmp_path):
    study = optimize_on_ray(
        spec_of(), folder=tmp_path, trials=1, cpus_per_trial=2, runner=reserved, sampler="random"
    )
    assert study.trials[0].values == [2.0]


def test_more_than_a_node_has_is_refused(two_workers, tmp_path):
    with pytest.raises(StudyError, match=r"got 3 and 0, but no node has them; .* are 2 and 0"):
        optimize_on_ray(spec_of(), folder=tmp_path, trials=1, cpus_per_trial=3)
    assert optuna.load_study(study_name=tmp_path.name, storage=f"sqlite:///{tmp_path}/study.db")
