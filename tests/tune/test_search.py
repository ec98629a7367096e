# SPDX-License-Identifier: Apache-2.0
"""Studies in one process, with a runner that trains nothing."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import stand_in
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from nemo_rl_ref.tune.methods import PRUNERS, SAMPLERS, SearchError, make_pruner
from nemo_rl_ref.tune.search import (
    SearchStopped,
    Settings,
    Stopped,
    StudyError,
    address,
    holding_signals,
    open_search,
    optimize,
    quiet,
    stopping_at_signals,
    work,
)
from nemo_rl_ref.tune.spec import Objective, SpecError
from nemo_rl_ref.tune.trial import TrialFailed, cause_of, reason_of

LR, BETA = stand_in.LR, stand_in.BETA


def search(tmp_path, spec=None, runner=stand_in.run, **settings):
    settings = {"trials": 6, "sampler": "random", **settings}
    return optimize(spec or stand_in.make(), folder=tmp_path / "s", runner=runner, **settings)


def opened(tmp_path, **settings):
    return open_search(
        stand_in.make(), Settings(**{"sampler": "random", **settings}), tmp_path / "s",
        runner=stand_in.run,
    )  # fmt: skip


def params(study):
    return [trial.params for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def test_a_trial_has_all_that_is_known_about_it(tmp_path):
    study = search(tmp_path, trials=2)
    for trial in study.trials:
        assert trial.state is TrialState.COMPLETE
        assert trial.params == trial.user_attrs["values"]
        assert trial.value == stand_in.loss(trial.params)
        assert trial.intermediate_values == {
            step: stand_in.loss(trial.params, step) for step in (3, 6, 9)
        }
        assert (trial.user_attrs["seed"], trial.user_attrs["steps"]) == (42, 9)
        assert trial.user_attrs["seconds"] >= 0
        assert "failure" not in trial.user_attrs
        assert (tmp_path / "s" / f"trial_{trial.number:04d}").is_dir()
    assert study.user_attrs["spec"] == stand_in.make().to_dict()


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "gp", "random", "qmc"])
def test_a_study_that_goes_on_does_not_draw_what_it_has_drawn(tmp_path, sampler):
    first = params(search(tmp_path, trials=3, sampler=sampler, seed=3))
    more = params(search(tmp_path, trials=6, sampler=sampler, seed=3))
    assert more[:3] == first
    assert len({p[LR] for p in more}) == 6


def test_a_seed_makes_the_same_study_again(tmp_path):
    first = params(search(tmp_path / "first", trials=3, seed=3))
    assert params(search(tmp_path / "again", trials=3, seed=3)) == first
    assert params(search(tmp_path / "other", trials=2, seed=4)) != first[:2]


def test_a_grid_is_searched_once_and_then_the_study_is_over(tmp_path):
    space = {LR: {"choice": [1e-4, 1e-3]}, BETA: {"uniform": [0.1, 0.3], "step": 0.1}}
    study = search(tmp_path, stand_in.make(space), trials=100, sampler="grid")
    points = {(p[LR], p[BETA]) for p in params(study)}
    assert len(study.trials) == len(points) == 6
    assert study.best_params == {LR: 1e-4, BETA: 0.1}


def test_a_grid_goes_on_where_it_was_and_is_not_queued_twice(tmp_path):
    space = {LR: {"choice": [1e-4, 1e-3]}, BETA: {"uniform": [0.1, 0.3], "step": 0.1}}
    first = search(tmp_path, stand_in.make(space), trials=2, sampler="grid")
    assert [t.state.name for t in first.trials] == ["COMPLETE"] * 2 + ["WAITING"] * 4
    study = search(tmp_path, stand_in.make(space), trials=6, sampler="grid")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6
    assert len({(p[LR], p[BETA]) for p in params(study)}) == 6


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "none"])
def test_pruners_end_trials_that_are_behind(tmp_path, pruner):
    study = search(tmp_path, trials=14, pruner=pruner, seed=3)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.PRUNED) + states.count(TrialState.COMPLETE) == 14
    assert states.count(TrialState.PRUNED) > 3
    for trial in study.trials:
        if trial.state is TrialState.PRUNED:
            assert trial.user_attrs["steps"] == trial.last_step < 9
    best = min(stand_in.loss(trial.params) for trial in study.trials)
    assert study.best_value <= 1.5 * best


@pytest.fixture
def given(monkeypatch):
    """What Optuna's pruners are made with."""
    for name in ("SuccessiveHalvingPruner", "HyperbandPruner"):
        monkeypatch.setattr(f"nemo_rl_ref.tune.methods.pruners.{name}", dict)
    return make_pruner


def test_the_first_rung_is_the_first_validation(given):
    spec = stand_in.make(**{"dpo.val_period": 4, "dpo.max_num_steps": 40})
    assert given("successive-halving", spec) == {"min_resource": 4, "reduction_factor": 3}
    hyperband = {"min_resource": 4, "max_resource": 40, "reduction_factor": 3}
    assert given("hyperband", spec) == hyperband


def test_steps_that_the_space_fixes_are_those_of_all_trials(given):
    fixed = {**stand_in.SPACE, "dpo.val_period": 2, "dpo.max_num_steps": 18}
    hyperband = given("hyperband", stand_in.make(fixed))
    assert (hyperband["min_resource"], hyperband["max_resource"]) == (2, 18)
    tied = {"divides": "dpo.val_batches", "at_most": 3}
    spec = stand_in.make({**stand_in.SPACE, "dpo.max_num_steps": tied})
    assert spec.max_steps is None, "3 is the tie's limit"


def test_several_objectives_have_a_front(tmp_path):
    spec = stand_in.make(objectives=("val:loss", "val:accuracy"))
    study = search(tmp_path, spec, sampler="tpe")
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert all(len(trial.values) == 2 for trial in study.trials)
    assert len(study.best_trials) == 1, "here one says what the other says"


REFUSED = {
    "prune a front": (
        {"objectives": ("val:loss", "val:accuracy")}, {"pruner": "median"}, SearchError,
        "got median with 2 objectives; a trial that is behind in one may lead in another",
    ),
    "cmaes for a front": (
        {"objectives": ("val:loss", "val:accuracy")}, {"sampler": "cmaes"}, SearchError,
        "cmaes searches for one objective",
    ),
    "cmaes without a number": (
        {"space": {LR: {"choice": [1e-4, 1e-3]}}}, {"sampler": "cmaes"}, SearchError,
        "this space has choices only",
    ),
    "prune at unequal steps": (
        {"space": {"dpo.val_period": {"int": [1, 3]}}}, {"pruner": "median"}, SearchError,
        "trials are compared at equal steps",
    ),
    "prune without validation": (
        {"dpo.val_period": 0}, {"pruner": "hyperband"}, SearchError, "dpo.val_period is not set",
    ),
    "no such sampler": ({}, {"sampler": "tp"}, SearchError, "sampler: got 'tp', expected tpe"),
    "no trials": ({}, {"trials": 0}, StudyError, "trials: got 0, expected a whole number from 1"),
    "no grace": ({}, {"grace": 1}, StudyError, "grace: got 1, expected a whole number from 2 on"),
    "a grid without end": (
        {}, {"sampler": "grid"}, SearchError, f"{LR} has log_uniform; expected choice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_before_a_trial(tmp_path, name):
    spec, settings, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        search(tmp_path, stand_in.make(**spec), **settings)
    assert not list(tmp_path.glob("s/trial_*"))


def test_directions_are_read_only_from_names_that_are_certain():
    assert Objective.parse("val:validation-default_loss").direction == "minimize"
    assert Objective.parse("val:accuracy").direction == "maximize"
    assert Objective.parse("train:reward").direction == "maximize"
    assert Objective.parse("train:kl:minimize") == Objective("train:kl", "minimize")
    with pytest.raises(SpecError, match="train:kl, whose name does not say .* train:kl:minimize"):
        Objective.parse("train:kl")
    with pytest.raises(SpecError, match="got 'accuracy', expected train:NAME or val:NAME"):
        Objective.parse("accuracy")


# Going on


CHANGES = {
    "space": ({"space": {**stand_in.SPACE, BETA: {"uniform": [0.01, 2.0]}}},
              rf"space: {BETA}: .*1.0.* then, .*2.0.* now"),
    "configuration": ({"dpo.val_batches": 5}, "configuration: dpo.val_batches: 4 then, 5 now"),
    "objective": ({"objectives": ("val:accuracy",)},
                  r"objectives: \[.val:loss:minimize.\] then, \[.val:accuracy:maximize.\] now"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_study_does_not_go_on_as_another_search(tmp_path, name):
    search(tmp_path, trials=1)
    spec, message = CHANGES[name]
    with pytest.raises(StudyError, match=message):
        search(tmp_path, stand_in.make(**spec), trials=2)
    with pytest.raises(StudyError, match="vary_seed: False then, True now"):
        search(tmp_path, trials=2, vary_seed=True)
    assert len(search(tmp_path, trials=2, sampler="tpe").trials) == 2, "the sampler may change"


def test_a_study_of_somebody_else_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/theirs.db"
    optuna.create_study(study_name="x", storage=url).optimize(lambda trial: 1.0, n_trials=1)
    with pytest.raises(StudyError, match="trials that are not of this program"):
        search(tmp_path, storage=url, name="x")


def test_several_studies_share_a_database(tmp_path):
    url = f"sqlite:///{tmp_path}/all.db"
    for name in ("one", "two"):
        assert len(search(tmp_path / name, trials=2, storage=url, name=name).trials) == 2
    assert optuna.get_all_study_names(url) == ["one", "two"]


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path):
    with pytest.raises(
        ValueError, match=r"storage: got x://me:\*\*\*@host/db, expected a database"
    ):
        search(tmp_path, storage="x://me:secret@host/db")
    with pytest.raises(ValueError, match="storage: got sqlite:////nowhere/at/all.db"):
        search(tmp_path, storage="sqlite:////nowhere/at/all.db")


def test_an_interrupted_trial_is_run_again_under_a_number_that_names_it_and_counts_once(tmp_path):
    def interrupted(spec, values, folder, *, seed=None, observe=None):
        observe(1, {"val:loss": stand_in.loss(values, 1)})
        if folder.name == "trial_0001":
            raise Stopped("SIGINT")
        return stand_in.run(spec, values, folder, seed=seed, observe=observe)

    with pytest.raises(Stopped):
        search(tmp_path, trials=3, runner=interrupted, vary_seed=True)
    before = opened(tmp_path, trials=3, vary_seed=True).study.trials
    assert [trial.state.name for trial in before] == ["COMPLETE", "FAIL", "WAITING"]
    study = search(tmp_path, trials=3, vary_seed=True)
    assert [trial.state.name for trial in study.trials] == [
        "COMPLETE",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
    ]
    again = study.trials[2]
    with quiet():
        assert RetryHeartbeatStaleTrialCallback.retry_history(again) == [1]
    assert again.params == before[1].params
    assert again.user_attrs["seed"] == before[1].user_attrs["seed"] == 43, "it has another seed"
    assert len(opened(tmp_path, trials=3, vary_seed=True).finished()) == 3


def test_who_was_taken_for_dead_and_comes_back_changes_nothing(tmp_path):
    slow, other = opened(tmp_path, trials=1, grace=2), opened(tmp_path, trials=1, grace=2)

    def overtaken(spec, values, folder, *, seed=None, observe=None):
        if slow.study.trials[0].state is TrialState.RUNNING:
            other.study.tell(0, state=TrialState.FAIL)
            other.run_again(0)
            work(other)
        return {"val:loss": -1000.0}

    slow.runner = overtaken
    work(slow)
    taken, again = slow.study.trials
    assert (taken.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert again.value == stand_in.loss(again.params) and again.params == taken.params


@pytest.fixture
def last_of_another(tmp_path):
    """A search of one trial, which another process runs; and what ends that trial."""
    one, two = opened(tmp_path, trials=1, grace=2), opened(tmp_path, trials=1, grace=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ask() sends no signs of life
        trial = one.study.ask()
    return two, lambda: one.study.tell(trial, 0.0)


def test_a_process_waits_for_the_last_trial_of_another_and_runs_none_more(last_of_another):
    search, end = last_of_another
    with ThreadPoolExecutor() as pool:
        room = pool.submit(search.has_room)
        time.sleep(0.3)
        assert not room.done()
        end()
        assert room.result(timeout=3) is False


def test_after_a_grace_period_it_waits_no_longer(last_of_another):
    search, _ = last_of_another
    assert search.has_room()
    search.settings = Settings(trials=1, sampler="grid", grace=2)
    assert not search.has_room(), "a grid has no other points"


def test_seeds_are_fixed_or_vary_with_the_trial(tmp_path):
    fixed = search(tmp_path / "a", trials=3).trials
    varied = search(tmp_path / "b", trials=3, vary_seed=True).trials
    assert [trial.user_attrs["seed"] for trial in fixed] == [42, 42, 42]
    assert [trial.user_attrs["seed"] for trial in varied] == [42, 43, 44]


# Failures


def test_failures_are_recorded_and_three_of_a_cause_end_the_search(tmp_path):
    with pytest.raises(SearchStopped, match="3 trials failed of the same cause: step 42: loss nan"):
        search(tmp_path, trials=10, runner=stand_in.failing)
    trials = opened(tmp_path, trials=10).study.trials
    assert [trial.state.name for trial in trials] == ["FAIL"] * 3
    assert {trial.value for trial in trials} == {None}
    assert all(t.user_attrs["failure"].startswith("step 42: loss nan") for t in trials)
    study = search(tmp_path, trials=10)  # mended: it goes on, and the old failures do not count
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3 + ["COMPLETE"] * 7


def test_failures_of_different_causes_do_not_end_the_search(tmp_path):
    reasons = iter(["out of memory", "step 1: loss nan", "ValueError: policy.x: 3"] * 2)

    def failing(*args, **kwargs):
        raise TrialFailed(next(reasons))

    assert len(search(tmp_path, trials=6, runner=failing, max_failures=0).trials) == 6


def test_causes_are_reasons_without_numbers():
    assert cause_of("step 12: loss nan, gradient norm 1.5e+03") == cause_of(
        "step 3: loss inf, gradient norm nan"
    )
    assert cause_of("ValueError: lr: 0.1") != cause_of("ValueError: beta: 0.1")
    assert cause_of("infinite") == "infinite"


def test_reasons_are_one_line():
    assert reason_of(MemoryError()) == "out of memory"
    assert reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"
    assert reason_of(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")) == "out of memory"
    nan = FloatingPointError("step 12: loss nan, gradient norm nan. It starts in x. The step …")
    assert reason_of(nan) == "step 12: loss nan, gradient norm nan"
    assert reason_of(ValueError("a: got 1,\n  expected 2")) == "ValueError: a: got 1, expected 2"


@pytest.mark.parametrize("where", ["on the way", "at the end"])
def test_a_number_that_is_none_is_a_failure_not_a_score(tmp_path, where):
    early, late = (float("nan"), 1.0) if where == "on the way" else (1.0, float("nan"))

    def nan(spec, values, folder, *, seed=None, observe=None):
        observe(4, {"val:loss": early})
        return {"val:loss": late}

    (trial,) = search(tmp_path, trials=1, runner=nan).trials
    assert trial.user_attrs["failure"] == "step 4: val:loss is nan"


def test_an_objective_that_is_not_logged_ends_the_search_with_those_that_are(tmp_path):
    spec = stand_in.make(objectives=("val:reward",))
    with pytest.raises(SearchStopped, match="got val:reward, .*not log; it logs val:accuracy, val"):
        search(tmp_path, spec)
    (trial,) = open_search(spec, Settings(), tmp_path / "s").study.trials
    assert trial.state is TrialState.FAIL
    assert not (tmp_path / "s/trial_0000/runs.txt").read_text().count("ended"), "at the first step"
    spec = stand_in.make(objectives=("val:reward",))

    def silent(*args, **kwargs):
        return {}

    with pytest.raises(SearchStopped, match="got val:reward, .* it logs nothing"):
        search(tmp_path / "silent", spec, runner=silent)


def test_a_mistake_in_a_runner_is_not_a_failed_trial(tmp_path):
    def wrong(*args, **kwargs):
        raise KeyError("a mistake of the program's")

    with pytest.raises(KeyError):
        search(tmp_path, trials=1, runner=wrong)


def test_every_sampler_is_tested():
    assert set(SAMPLERS) == {"tpe", "cmaes", "gp", "random", "qmc", "grid"}


def test_the_package_imports_neither_ray_nor_torch():
    code = (
        "import sys, nemo_rl_ref.tune, nemo_rl_ref.tune.search, nemo_rl_ref.tune.__main__\n"
        "print(sorted({'ray', 'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.strip() == "[]"


# The age of a metric


def measuring(*steps, last=9):
    """A runner that validates after these of its steps."""

    def runner(spec, values, folder, *, seed=None, observe=None):
        metrics = {}
        for step in sorted({*steps, last}):
            found = {"train:loss": 1.0} if step else {}
            found |= {"val:loss": stand_in.loss(values, step)} if step in steps else {}
            observe(step, found)
            metrics.update(found)
        return metrics

    return runner


@pytest.mark.parametrize(
    ("runner", "why"),
    [
        (measuring(0), "was last measured before the first step, and the run ended with step 9"),
        (measuring(3), "was last measured at step 3, and the run ended with step 9"),
        (measuring(0, last=0), "was last measured before the first step"),
    ],
)
def test_a_value_that_is_older_than_the_run_is_refused(tmp_path, runner, why):
    """A runner may validate only before training, or not at its end, or take no step at all."""
    with pytest.raises(SearchStopped, match=f"objective: val:loss {why}"):
        search(tmp_path, runner=runner)
    (trial,) = opened(tmp_path).study.trials
    assert trial.state is TrialState.FAIL and trial.value is None


def test_a_value_of_the_last_step_is_taken(tmp_path):
    study = search(tmp_path, runner=measuring(0, 3, 9), trials=1)
    assert study.best_value == stand_in.loss(study.best_params, 9)


# What a user may call things


@pytest.mark.parametrize(
    "name", ["what?", "a#b", "per%20cent", "{x}", "a&b=c", "[lr=1]", "x@y:1", 'it\'s "so"', "$x$"]
)
def test_a_study_is_in_its_folder_whatever_that_is_called(tmp_path, name):
    """A name goes into a database's URL, and into patterns of files."""
    opened(tmp_path / name)
    assert [path.name for path in (tmp_path / name / "s").glob("*.db")] == ["study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_password_is_not_shown():
    for secret in ("secret", "se@cr:et"):
        shown = address(f"postgresql://me:{secret}@host/name")
        assert shown == "postgresql://me:***@host/name"


# Signals


def test_a_signal_waits_for_what_must_not_be_cut_in_two():
    """A transaction that is interrupted leaves the database locked by this process."""
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), stopping_at_signals():
        with holding_signals(True):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("in one piece")
        done.append("not this")
    assert done == ["in one piece"]
    with (
        pytest.raises(Stopped, match="SIGINT"), stopping_at_signals(), holding_signals(True),
        holding_signals(False),
    ):  # fmt: skip
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not this")


def test_a_signal_that_was_swallowed_is_raised_again():
    """Some packages catch everything around their imports, which a first trial runs into."""
    with pytest.raises(Stopped), stopping_at_signals():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        with holding_signals(True):
            pass


def test_a_signal_that_the_user_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping_at_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("moment", ["ask", "report", "tell"])
def test_a_signal_in_a_transaction_leaves_no_trial_running(tmp_path, monkeypatch, moment):
    owner, name = {
        "ask": (optuna.Study, "ask"),
        "report": (RDBStorage, "set_trial_intermediate_value"),
        "tell": (RDBStorage, "set_trial_state_values"),
    }[moment]
    plain, count = getattr(owner, name), []

    def interrupted(self, *arguments, **named):
        result = plain(self, *arguments, **named)
        count.append(0)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(Stopped):
        search(tmp_path)
    monkeypatch.undo()
    states = [trial.state for trial in opened(tmp_path).study.trials]
    assert TrialState.RUNNING not in states
    assert (
        not sqlite3.connect(tmp_path / "s/study.db", timeout=1).execute("begin immediate").close()
    )
