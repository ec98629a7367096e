# SPDX-License-Identifier: Apache-2.0
"""A study: trials that are asked for, trained and told, by any number of processes.

The budget of a study is its first ``trials`` trials, by number. Optuna numbers trials without gaps
in any storage, so a process knows from the number of a trial alone whether it is within the budget,
whatever the others do. A trial whose process was killed goes back to the queue under its number and
with its parameters. So a budget of 100 ends with exactly 100 finished trials.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.tune.runner import Runner, TrialFailed, cause_of, run_trial
from nemo_rl_ref.tune.samplers import GridSampler, make_pruner, make_sampler
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.storage import open_storage

#: Called after every change of a trial that this process makes.
Listener = Callable[["Search"], None]
#: A trial whose process was killed so often is not tried again.
MOST_DEATHS = 10
#: Sections of a configuration that may differ when a study goes on.
_MAY_CHANGE = ("logger.", "cluster.", "checkpointing.")
#: Seconds between two looks at what other processes do.
_PATIENCE = 0.5


class StudyError(ValueError):
    """A study that cannot be used for a search."""


class Stopped(KeyboardInterrupt):
    """The search was asked to end: Ctrl-C, or a signal."""


class SearchStopped(RuntimeError):
    """A search that ended itself. The message says why."""


@dataclass(frozen=True)
class Settings:
    """How a search is run. What may differ between the processes of one study, and what not.

    Attributes:
        trials: The budget: trials that are to be finished, in any way.
        sampler: One of `nemo_rl_ref.tune.samplers.SAMPLERS`.
        pruner: One of `nemo_rl_ref.tune.samplers.PRUNERS`.
        seed: Of the sampler.
        vary_seed: Train trial n with the configuration's seed + n instead of its seed. Must be the
            same for all of a study.
        threads: Torch's threads of each process.
        max_failures: Failures of one cause, since this process began, that end the search; 0 for
            never.
        storage: A database in SQLAlchemy's form; None for a SQLite file in the folder.
        name: The study's name in the storage; None for the folder's.
        heartbeat: Seconds between two signs of life of a running trial.
        grace: Seconds without one after which a trial counts as abandoned.
    """

    trials: int = 30
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    vary_seed: bool = False
    threads: int = 1
    max_failures: int = 3
    storage: str | None = None
    name: str | None = None
    heartbeat: int = 5
    grace: int = 60

    def __post_init__(self) -> None:
        whole = {"trials": 1, "threads": 1, "max_failures": 0, "heartbeat": 1, "grace": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise StudyError(f"{name}: got {value!r}, expected a whole number from {least} on")
        if self.grace < 2 * self.heartbeat:
            raise StudyError(
                f"grace: got {self.grace} s with a heartbeat every {self.heartbeat} s, expected at "
                "least twice as long"
            )


def worker_name(pid: int) -> str:
    """The name that a process of this machine signs its trials with."""
    return f"{socket.gethostname()}-{pid}"


@dataclass
class Search:
    """What a process needs to work on a study.

    Attributes:
        study: The study.
        spec: What is searched.
        settings: How.
        folder: Of the study; trial n has ``trial_n`` in it.
        runner: Runs a trial.
        listen: Called after every change of a trial that this process makes.
        budget: Trials to finish: those of the settings, at most the points of a grid.
        began: When this process began.
        worker: The name of this process.
    """

    study: optuna.Study
    spec: Spec
    settings: Settings
    folder: Path
    runner: Runner
    listen: Listener | None = None
    budget: int = 0
    began: datetime = field(default_factory=datetime.now)
    worker: str = field(default_factory=lambda: worker_name(os.getpid()))

    def trials(self) -> list[FrozenTrial]:
        """The trials of the budget so far."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.number < self.budget]

    def finished(self) -> int:
        """How many of the budget are finished."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def changed(self) -> None:
        """Tell the listener."""
        if self.listen:
            self.listen(self)


def open_search(
    spec: Spec,
    settings: Settings,
    folder: str | Path,
    *,
    runner: Runner = run_trial,
    listen: Listener | None = None,
) -> Search:
    """Open a study, or make it.

    Args:
        spec: What is searched.
        settings: How.
        folder: Of the study.
        runner: Runs a trial.
        listen: Called after every change of a trial that this process makes.

    Returns:
        The search.

    Raises:
        StudyError: If the study of that name is of another search; the message says what differs.
        SearchError: If sampler or pruner cannot be used for the search.
    """
    sampler = make_sampler(settings.sampler, spec, settings.seed)
    pruner = make_pruner(settings.pruner, spec)
    folder = Path(folder)
    storage = open_storage(
        settings.storage, folder, heartbeat=settings.heartbeat, grace=settings.grace
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=settings.name or folder.resolve().name,
        storage=storage,
        directions=[objective.direction for objective in spec.objectives],
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    _claim_study(study, spec, settings)
    budget = settings.trials
    if isinstance(sampler, GridSampler):
        budget = min(budget, len(sampler.points))
    return Search(study, spec, settings, folder, runner, listen, budget)


def _claim_study(study: optuna.Study, spec: Spec, settings: Settings) -> None:
    """Write what the study searches, or check that it searches the same."""
    ours = {"spec": spec.to_dict(), "base": spec.base, "vary_seed": settings.vary_seed}
    ours["base"] = {k: v for k, v in ours["base"].items() if not k.startswith(_MAY_CHANGE)}
    if "spec" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name}: got a study with trials that are not of this program, "
                "expected a new name"
            )
        for name in ("base", "vary_seed", "spec"):  # the last one says that all are there
            study.set_user_attr(name, ours[name])
    theirs = study.user_attrs  # also after writing: another process may have been faster
    differences = list(_differences(theirs, ours))
    if differences:
        shown = "\n  ".join([*differences[:8], *(["…"] if len(differences) > 8 else [])])
        raise StudyError(
            f"study {study.study_name}: its trials are of another search:\n  {shown}\n"
            "Give what it was begun with, or a new folder (and name)"
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """What two searches differ in, a line each."""
    then, now = theirs["spec"], ours["spec"]
    if then["algorithm"] != now["algorithm"]:
        yield f"algorithm: {then['algorithm']} then, {now['algorithm']} now"
    if then["launcher"] != now["launcher"]:
        yield f"launcher: {then['launcher']} then, {now['launcher']} now"
    if then["objectives"] != now["objectives"]:
        yield f"objectives: {', '.join(then['objectives'])} then, {', '.join(now['objectives'])} now"
    for what, old, new in (
        ("space", then["space"], now["space"]),
        ("configuration", theirs["base"], ours["base"]),
    ):
        for key in {**old, **new}:
            if old.get(key, "absent") != new.get(key, "absent"):
                yield f"{what}: {key}: {old.get(key, 'absent')} then, {new.get(key, 'absent')} now"
    if theirs["vary_seed"] != ours["vary_seed"]:
        yield f"vary_seed: {theirs['vary_seed']} then, {ours['vary_seed']} now"


# One process at work


def work(search: Search) -> None:
    """Run trials until the budget is finished, whoever finishes them.

    Raises:
        SearchStopped: If the search ends itself: the objective is not logged, or too many trials
            failed of one cause.
        Stopped: If it was asked to end. The trial that ran is back in the queue.
    """
    while True:
        check_failures(search)
        requeue_abandoned(search)
        trial = claim(search)
        if trial is not None:
            run(search, trial)
        elif search.finished() >= search.budget:
            return
        else:
            time.sleep(_PATIENCE)


def claim(search: Search) -> optuna.Trial | None:
    """Take the next trial of the budget; None if others have all that are left."""
    study, budget = search.study, search.budget
    trials = study.get_trials(deepcopy=False)
    waiting = any(t.state is TrialState.WAITING and t.number < budget for t in trials)
    if not waiting and len(trials) >= budget:
        return None
    with warnings.catch_warnings():
        # Optuna warns that ask() sends no heartbeat; `run` does.
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used")
        trial = study.ask()
    if trial.number >= budget:  # another process was faster
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return None
    return trial


def requeue_abandoned(search: Search) -> list[int]:
    """Put trials whose process has died back in the queue, and return their numbers.

    Optuna's own way is to fail the trial and to add a copy. Between the two a process can be
    killed, and then the trial is lost; here it is one step of the storage. Optuna's heartbeat says
    which trials are abandoned, except those whose process died before the first beat.
    """
    study, storage, now = search.study, search.study._storage, datetime.now()
    silent = set(storage._get_stale_trial_ids(study._study_id))
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        age = abs((now - trial.datetime_start).total_seconds())
        never = "worker" not in trial.user_attrs
        abandoned = (never or trial._trial_id in silent) and age > search.settings.grace
        if abandoned and requeue(study, trial):
            found.append(trial.number)
            search.changed()
    return found


def requeue(study: optuna.Study, trial: FrozenTrial | optuna.Trial, *, died: bool = True) -> bool:
    """Put a running trial back in the queue; False if it has been finished meanwhile.

    Args:
        study: The study.
        trial: The trial.
        died: Whether its process died. A trial that has seen too many die is failed instead.
    """
    storage, deaths = study._storage, trial.user_attrs.get("deaths", 0) + died
    try:
        if deaths >= MOST_DEATHS:
            return not fail(study, trial, f"its process was killed {deaths} times")
        if died:
            storage.set_trial_user_attr(trial._trial_id, "deaths", deaths)
        return storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    except UpdateFinishedTrialError:
        return False


def run(search: Search, trial: optuna.Trial) -> None:
    """Train a trial that was claimed, and tell the study how it ended."""
    study, storage = search.study, search.study._storage
    watcher = Watcher(search, trial)
    try:
        storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("worker", search.worker)
        with get_heartbeat_thread(trial._trial_id, storage):
            _train(search, trial, watcher)
    except KeyboardInterrupt:
        requeue(study, trial, died=False)
        raise
    except UpdateFinishedTrialError:
        pass  # taken for dead, and finished by another process; that result counts
    search.changed()


def _train(search: Search, trial: optuna.Trial, watcher: Watcher) -> None:
    study, spec, settings = search.study, search.spec, search.settings
    seed = spec.seed + trial.number if settings.vary_seed else spec.seed
    trial.set_user_attr("seed", seed)
    began = time.perf_counter()
    state, values, reason, stop = TrialState.COMPLETE, None, None, None
    try:
        settings_of_trial = spec.space.suggest(trial)
        trial.set_user_attr("values", settings_of_trial)
        search.changed()
        began = time.perf_counter()
        folder = search.folder / f"trial_{trial.number:04d}"
        metrics = search.runner(spec, settings_of_trial, folder, seed=seed, observe=watcher)
        values = watcher.values(metrics)
    except TrialPruned:
        state = TrialState.PRUNED
    except TrialFailed as error:
        state, reason = TrialState.FAIL, error.reason
    except SearchStopped as error:
        state, reason, stop = TrialState.FAIL, str(error), error
    trial.set_user_attr("seconds", round(time.perf_counter() - began, 3))
    trial.set_user_attr("steps", watcher.step)
    if state is TrialState.FAIL:
        fail(study, trial, reason)
    else:
        tell(study, trial, state, values)
    if stop is not None:
        raise stop


def tell(
    study: optuna.Study,
    trial: optuna.Trial | FrozenTrial,
    state: TrialState,
    values: list[float] | None = None,
) -> bool:
    """Finish a trial; False if it is no longer ours to finish."""
    try:
        study.tell(trial.number, values, state=state)
    except (UpdateFinishedTrialError, ValueError):
        if study._storage.get_trial(trial._trial_id).state is TrialState.RUNNING:
            raise
        return False
    return True


def fail(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str) -> bool:
    """Record a trial as failed, with its reason; False if it is no longer ours to finish."""
    study._storage.set_trial_user_attr(trial._trial_id, "failure", reason)
    return tell(study, trial, TrialState.FAIL)


class Watcher:
    """Watches a training: reports validations, prunes, and finds what is not as it should be.

    Args:
        search: The search.
        trial: The trial.
    """

    def __init__(self, search: Search, trial: optuna.Trial):
        self.search, self.trial = search, trial
        self.step = 0
        self.seen: dict[str, None] = {}
        self.checked: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called by the trainer after a step.

        Args:
            step: Steps done.
            metrics: Metrics of the step, and of the validation if there was one.

        Raises:
            TrialPruned: If the trial is not worth going on with.
            TrialFailed: If an objective is not a finite number.
            SearchStopped: If the run does not log an objective.
        """
        self.step = step
        self.seen.update(dict.fromkeys(metrics))
        for source in {name.partition(":")[0] for name in metrics} - self.checked:
            self.checked.add(source)
            self._check_names(source)
        objectives = self.search.spec.objectives
        for objective in objectives:
            value = metrics.get(objective.metric)
            if value is not None and not math.isfinite(value):
                raise TrialFailed(f"step {step}: {objective.metric} is {value}")
        if len(objectives) == 1 and step and any(name.startswith("val:") for name in metrics):
            self._report(step, metrics.get(objectives[0].metric))

    def _report(self, step: int, value: float | None) -> None:
        if value is None:
            return
        with warnings.catch_warnings():
            # A trial that is run again reports what it has reported before.
            warnings.filterwarnings("ignore", "The reported value is ignored because")
            self.trial.report(value, step)
        self.search.changed()
        # A run that has come to its end is complete, wherever it stands.
        if step < (self.search.spec.max_steps or math.inf) and self.trial.should_prune():
            raise TrialPruned

    def _check_names(self, source: str) -> None:
        there = [name for name in self.seen if name.startswith(f"{source}:")]
        for objective in self.search.spec.objectives:
            if objective.metric.startswith(f"{source}:") and objective.metric not in there:
                raise SearchStopped(
                    f"objective: got {objective.metric}, which the run does not log; it logs "
                    f"{', '.join(sorted(there))}"
                )

    def values(self, metrics: Mapping[str, float]) -> list[float]:
        """The objectives at the end of a run.

        Raises:
            TrialFailed: If one is not a finite number.
            SearchStopped: If the run did not log one.
        """
        found = []
        for objective in self.search.spec.objectives:
            if objective.metric not in metrics:
                raise SearchStopped(
                    f"objective: got {objective.metric}, which the run did not log; it logged "
                    f"{', '.join(sorted(metrics)) or 'nothing'}"
                )
            value = float(metrics[objective.metric])
            if not math.isfinite(value):
                raise TrialFailed(f"step {self.step}: {objective.metric} is {value}")
            found.append(value)
        return found


def check_failures(search: Search) -> None:
    """Raise `SearchStopped` if too many trials have failed of one cause since this process began."""
    most = search.settings.max_failures
    causes: Counter[str] = Counter()
    for trial in search.trials():
        reason = trial.user_attrs.get("failure")
        if trial.state is not TrialState.FAIL or not reason or not trial.datetime_complete:
            continue
        if trial.datetime_complete >= search.began:
            causes[cause_of(reason)] += 1
            if most and causes[cause_of(reason)] >= most:
                raise SearchStopped(f"{most} trials failed of the same cause: {reason}")


# The whole search


def optimize(
    spec: Spec,
    *,
    folder: str | Path,
    jobs: int = 1,
    runner: Runner = run_trial,
    listen: Listener | None = None,
    **settings: Any,
) -> optuna.Study:
    """Search until the budget is finished.

    A study that was interrupted goes on. Several calls, in several processes, can work on one.

    Args:
        spec: What is searched.
        folder: Of the study: its storage and the output of its trials.
        jobs: Processes. 1 trains in this one.
        runner: Runs a trial. With several jobs, a function that they can import.
        listen: Called after every change of a trial that this process makes or sees.
        **settings: See `Settings`.

    Returns:
        The study.

    Raises:
        StudyError: If the study of that name is of another search, or a setting is wrong.
        SearchError: If sampler or pruner cannot be used for the search.
        SearchStopped: If the search ends itself, see `work`.
        Stopped: If it was asked to end.
    """
    search = open_search(spec, Settings(**settings), folder, runner=runner, listen=listen)
    run_search(search, jobs)
    return search.study


def run_search(search: Search, jobs: int = 1) -> None:
    """Run trials until the budget is finished, in this process or in several others.

    Args:
        search: From `open_search`.
        jobs: Processes. 1 trains in this one.

    Raises:
        StudyError: If there is no such number of processes.
        SearchStopped: If the search ends itself, see `work`.
        Stopped: If it was asked to end.
    """
    if type(jobs) is not int or jobs < 1:
        raise StudyError(f"jobs: got {jobs!r}, expected a whole number from 1 on")
    with stopping_at_signals():
        if jobs == 1:
            with torch_threads(search.settings.threads):
                work(search)
        else:
            from nemo_rl_ref.tune.workers import supervise

            supervise(search, jobs)


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Torch computes with so many threads, also if it is imported only now."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    if torch:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        if torch:
            torch.set_num_threads(threads)
