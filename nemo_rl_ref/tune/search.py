# SPDX-License-Identifier: Apache-2.0
"""A study: opened, worked on by any number of processes, interrupted, resumed, counted.

For example::

    study = optimize(spec, folder="results/tune_dpo", trials=30)

The study is Optuna's, in a relational database: a SQLite file in the folder, or any that SQLAlchemy
can use. Several processes that are given the same study share its trials. Each sends signs of life
while it trains. A trial without one for a grace period belongs to a process that has died: it is
failed, and queued once more with its values, under a new number that names the old
(``RetryHeartbeatStaleTrialCallback.retry_history``). The two count once.

A process that finds only as many trials left as others run waits for them for a grace period; by
then those of dead processes are back in the queue. Then it goes on, so n processes may end with up
to n - 1 trials more than asked. The one gap is a process that dies within the milliseconds between
Optuna's giving it a trial and the first sign of life: that trial stays ``RUNNING`` and counts for
nothing, another is run instead, and a grid lacks a point.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import signal
import socket
import sqlite3
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, TrialPruned, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from nemo_rl_ref.tune.methods import grid_points, make_pruner, make_sampler
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.trial import Ages, Runner, TrialFailed, cause_of, reason_of, run_trial

#: Called with the search and each trial that this process has finished.
Listener = Callable[["Search", FrozenTrial], None]
#: The file of a study in its folder.
FILE = "study.db"
#: Sections of a configuration that may differ when a study goes on.
_MAY_CHANGE = ("logger.", "cluster.", "checkpointing.")
#: Seconds between two looks at what other processes do, and that a statement waits for them.
_PERIOD = 0.5
_PATIENCE = 120


class StudyError(ValueError):
    """A study that cannot be used for a search."""


class Stopped(KeyboardInterrupt):
    """The search was asked to end: Ctrl-C, or a signal."""


class SearchStopped(RuntimeError):
    """A search that ended itself. The message says why."""


@dataclass(frozen=True)
class Settings:
    """How a search is run.

    Attributes:
        trials: Trials to finish: complete, pruned or failed. One that is run again counts once.
        sampler: One of `nemo_rl_ref.tune.methods.SAMPLERS`.
        pruner: One of `nemo_rl_ref.tune.methods.PRUNERS`.
        seed: Of the sampler; None for another in each process. With one, a study that one process
            makes without a pause can be made again.
        vary_seed: Train trial n with the configuration's seed + n instead of its seed. Must be the
            same for all of a study.
        threads: Torch's threads.
        max_failures: Failures of one cause, since this process began, that end the search; 0 for
            never.
        storage: A database in SQLAlchemy's form; None for a SQLite file in the folder.
        name: The study's name in the storage; None for the folder's.
        grace: Seconds without a sign of life after which the process of a trial counts as dead.
    """

    trials: int = 30
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int | None = None
    vary_seed: bool = False
    threads: int = 1
    max_failures: int = 3
    storage: str | None = None
    name: str | None = None
    grace: int = 60

    def __post_init__(self) -> None:
        for name, least in {"trials": 1, "threads": 1, "max_failures": 0, "grace": 2}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise StudyError(f"{name}: got {value!r}, expected a whole number from {least} on")

    @property
    def heartbeat(self) -> int:
        """Seconds between two signs of life."""
        return max(1, self.grace // 6)


@dataclass
class Search:
    """A study that this process works on.

    Attributes:
        study: The study.
        spec: What is searched.
        settings: How.
        folder: Of the study; trial n has ``trial_n`` in it.
        runner: Runs a trial.
        listen: Told of each trial that this process has finished.
        budget: Trials to finish: those of the settings, at most the points of a grid.
        began: When this process began.
        current: The number of the trial that it runs; None between two.
    """

    study: optuna.Study
    spec: Spec
    settings: Settings
    folder: Path
    runner: Runner
    listen: Listener | None = None
    budget: int = 0
    began: datetime = field(default_factory=datetime.now)
    current: int | None = None

    def finished(self) -> list[FrozenTrial]:
        """The trials that count: finished, and not run again under another number."""
        trials = self.study.get_trials(deepcopy=False)
        with quiet():
            again = {n for t in trials for n in RetryHeartbeatStaleTrialCallback.retry_history(t)}
        return [t for t in trials if t.state.is_finished() and t.number not in again]

    def has_room(self) -> bool:
        """Say whether there is a trial left to run, after waiting for what others may leave."""
        until = time.monotonic() + self.settings.grace + 2 * self.settings.heartbeat
        is_grid = self.settings.sampler == "grid"  # which ends with its points
        while True:
            with quiet():
                fail_stale_trials(self.study)
            states = Counter(trial.state for trial in self.study.get_trials(deepcopy=False))
            left = self.settings.trials - len(self.finished())
            if left <= 0 or states[TrialState.WAITING]:
                return left > 0
            others = states[TrialState.RUNNING]
            if not others or time.monotonic() > until or not (is_grid or others >= left):
                return not is_grid
            with holding_signals(False):
                time.sleep(_PERIOD)

    def begin(self, trial: optuna.Trial) -> tuple[dict[str, Any], Path, int]:
        """Begin a trial: draw and note its values by key, its folder, and its training's seed."""
        varied = trial.number if self.settings.vary_seed else 0
        seed = trial.user_attrs.get("seed", self.spec.seed + varied)  # one that is run again has it
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("worker", f"{socket.gethostname()}-{os.getpid()}")
        values = self.spec.space.suggest(trial)
        trial.set_user_attr("values", values)
        return values, self.folder / f"trial_{trial.number:04d}", seed

    def objective(self, trial: optuna.Trial) -> list[float]:
        """Run a trial in this process: the function that Optuna calls."""
        self.current = trial.number
        watcher, start = Watcher(self.spec, trial), time.perf_counter()
        try:
            values, folder, seed = self.begin(trial)
            start = time.perf_counter()
            with holding_signals(False):
                metrics = self.runner(self.spec, values, folder, seed=seed, observe=watcher)
            return watcher.values(metrics)
        except (TrialPruned, UpdateFinishedTrialError):
            raise
        except Exception as error:
            reason = error.reason if isinstance(error, TrialFailed) else reason_of(error)
            trial.set_user_attr("failure", reason)
            raise
        finally:
            trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
            trial.set_user_attr("steps", watcher.ages.step)

    def note(self, trial: FrozenTrial) -> None:
        """Tell the listener that this process has finished a trial, and count failures."""
        self.current = None
        if self.listen:
            self.listen(self, trial)
        check_failures(self)

    def after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Note a trial and stop where none is left: the callback of Optuna's loop."""
        self.note(trial)
        if not self.has_room():
            study.stop()

    def run_again(self, number: int, most: int | None = None) -> None:
        """Queue a trial once more under a new number, unless that was done ``most`` times."""
        with quiet():
            RetryHeartbeatStaleTrialCallback(most)(self.study, self.study.trials[number])


class Watcher:
    """Watches a training: reports validations, prunes, and finds what is not as it should be."""

    def __init__(self, spec: Spec, trial: optuna.Trial):
        self.spec, self.trial = spec, trial
        self.ages = Ages()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step, and of its validation; the trainer calls this.

        Raises:
            TrialPruned: If the trial is not worth going on with.
            TrialFailed: If an objective is not a finite number.
            SearchStopped: If the run does not log an objective.
        """
        with holding_signals(True):
            self._look(step, metrics)

    def _look(self, step: int, metrics: Mapping[str, float]) -> None:
        objectives = self.spec.objectives
        self.ages(step, metrics)
        for objective in objectives:
            source = objective.metric.partition(":")[0]
            there = sorted(name for name in metrics if name.startswith(f"{source}:"))
            if there and objective.metric not in self.ages.measured:
                raise _not_logged(objective.metric, there)
            self._check_number(objective.metric, metrics.get(objective.metric, 0.0))
        value = metrics.get(objectives[0].metric)
        validated = any(name.startswith("val:") for name in metrics)
        if len(objectives) == 1 and step and validated and value is not None:
            self.trial.report(value, step)
            # A run that has come to its end is complete, wherever it stands.
            if step < (self.spec.max_steps or math.inf) and self.trial.should_prune():
                raise TrialPruned

    def _check_number(self, metric: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrialFailed(f"step {self.ages.step}: {metric} is {value}")

    def values(self, metrics: Mapping[str, float]) -> list[float]:
        """Take the objectives from the metrics at the end of a run.

        Raises:
            TrialFailed: If one is not a finite number.
            SearchStopped: If the run did not log one, or not at its last step.
        """
        names = [objective.metric for objective in self.spec.objectives]
        for name in names:
            if name not in metrics:
                raise _not_logged(name, sorted(metrics))
            if problem := self.ages.problem(name):
                raise SearchStopped(f"objective: {problem}; expected a value of the last step")
            self._check_number(name, metrics[name])
        return [float(metrics[name]) for name in names]


def _not_logged(metric: str, there: list[str]) -> SearchStopped:
    near = difflib.get_close_matches(metric, there, n=1)
    mean = f" (did you mean {near[0]}?)" if near else ""
    return SearchStopped(
        f"objective: got {metric}, which the run does not log{mean}; it logs "
        f"{', '.join(there) or 'nothing'}"
    )


def check_failures(search: Search) -> None:
    """Raise `SearchStopped` if too many trials failed of one cause since this process began."""
    most = search.settings.max_failures
    causes: Counter[str] = Counter()
    for trial in search.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        reason = trial.user_attrs.get("failure")
        if reason and trial.datetime_complete and trial.datetime_complete >= search.began:
            causes[cause_of(reason)] += 1
            if most and causes[cause_of(reason)] >= most:
                raise SearchStopped(f"{most} trials failed of the same cause: {reason}")


# Opening a study


def open_search(
    spec: Spec,
    settings: Settings,
    folder: str | Path,
    *,
    runner: Runner = run_trial,
    listen: Listener | None = None,
    heartbeats: bool = True,
) -> Search:
    """Open a study, or make it; a grid is queued whole.

    Args:
        spec: What is searched.
        settings: How.
        folder: Of the study. It is made.
        runner: Runs a trial.
        listen: Told of each finished trial.
        heartbeats: Whether trials send signs of life: those of Optuna's own loop do.

    Raises:
        StudyError: If the study of that name is of another search; the message says what differs.
        SearchError: If sampler or pruner cannot be used for the search.
        ValueError: If the database cannot be used; the message has its address, without password.
    """
    points = grid_points(spec.space) if settings.sampler == "grid" else None
    sampler, pruner = make_sampler(settings.sampler, spec), make_pruner(settings.pruner, spec)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with FileLock(folder / ".lock"):  # the tables and a grid are made once
        study = optuna.create_study(
            study_name=settings.name or folder.resolve().name, load_if_exists=True,
            storage=_open_storage(settings, folder, heartbeats), sampler=sampler, pruner=pruner,
            directions=[cast(Any, objective.direction) for objective in spec.objectives],
        )  # fmt: skip
        _claim_study(study, spec, settings)
        if points is not None and study.user_attrs.get("grid") != len(points):
            for point in points:
                study.enqueue_trial(point, skip_if_exists=True)
            study.set_user_attr("grid", len(points))
    if settings.seed is not None:  # one that goes on must not draw the same again
        done = len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler(settings.sampler, spec, settings.seed + 1000 * done)
    budget = settings.trials if points is None else min(settings.trials, len(points))
    return Search(study, spec, settings, folder, runner, listen, budget)


def _open_storage(settings: Settings, folder: Path, heartbeats: bool) -> RDBStorage:
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError

    url = settings.storage
    if url is None:
        path = str((folder / FILE).resolve())
        url = URL.create("sqlite", database=path).render_as_string(hide_password=False)
    options = {"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite:") else {}
    try:
        if settings.storage is None:  # the file keeps this mode, in which nobody waits for readers
            with closing(sqlite3.connect(folder / FILE, timeout=_PATIENCE)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        with quiet():
            return RDBStorage(
                url, engine_kwargs=options, grace_period=settings.grace,
                heartbeat_interval=settings.heartbeat if heartbeats else None,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )  # fmt: skip
    except (SQLAlchemyError, sqlite3.Error, RuntimeError) as error:  # the last: another schema
        raise ValueError(
            f"storage: got {address(settings.storage or path)}, expected a database as "
            f"sqlite:///study.db or postgresql://user@host/name: {str(error).splitlines()[0]}"
        ) from error


def address(url: str) -> str:
    """Write a database's address without its password."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _claim_study(study: optuna.Study, spec: Spec, settings: Settings) -> None:
    """Write what the study searches, or check that it searches the same."""
    base = {key: v for key, v in spec.base.items() if not key.startswith(_MAY_CHANGE)}
    ours = {"base": base, "vary_seed": settings.vary_seed, "spec": spec.to_dict()}
    if "spec" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name}: got a study with trials that are not of this program, "
                "expected a new name"
            )
        for name, value in ours.items():  # the last one says that all are there
            study.set_user_attr(name, value)
    then, now = _by_key(study.user_attrs), _by_key(ours)  # another process may have been faster
    pairs = {key: (then.get(key, "absent"), now.get(key, "absent")) for key in {**then, **now}}
    different = [f"{key}: {a} then, {b} now" for key, (a, b) in pairs.items() if a != b]
    if different:
        shown = "\n  ".join([*different[:8], *(["…"] if len(different) > 8 else [])])
        raise StudyError(
            f"study {study.study_name}: its trials are of another search:\n  {shown}\n"
            "Give what it was begun with, or a new folder (and name)"
        )


def _by_key(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all of a study, by a name for each part."""
    spec = attributes["spec"]
    found = {name: spec[name] for name in ("algorithm", "launcher", "objectives")}
    found |= {f"--{name}": spec[name][1] for name in ("loss", "env") if name in spec}
    found |= {f"space: {key}": value for key, value in spec["space"].items()}
    found |= {f"configuration: {key}": value for key, value in attributes["base"].items()}
    return found | {"vary_seed": attributes["vary_seed"]}


# Running it


def optimize(
    spec: Spec,
    *,
    folder: str | Path,
    runner: Runner = run_trial,
    listen: Listener | None = None,
    **settings: Any,
) -> optuna.Study:
    """Search until all trials are finished; a study that was interrupted goes on.

    Args:
        spec: What is searched.
        folder: Of the study: its database and the output of its trials.
        runner: Runs a trial.
        listen: Called with the search and each trial that this process has finished.
        **settings: See `Settings`.

    Raises:
        StudyError: If a setting is wrong, or as `open_search`.
        SearchError: As `open_search`.
        SearchStopped: As `work`, as `Stopped`.
    """
    search = open_search(spec, Settings(**settings), folder, runner=runner, listen=listen)
    work(search)
    return search.study


def work(search: Search) -> None:
    """Run trials in this process until all are finished, whoever finishes them.

    Raises:
        SearchStopped: If the search ends itself: the objective is not logged, or too many trials
            failed of one cause.
        Stopped: If it was asked to end. The trial that ran is queued again.
    """
    threads = torch_threads(search.settings.threads)
    with stopping_at_signals(), threads, holding_signals(True):
        while search.has_room():
            try:
                callbacks = [search.after]
                search.study.optimize(search.objective, callbacks=callbacks, catch=(TrialFailed,))
                return
            except KeyboardInterrupt:
                if search.current is not None:
                    search.run_again(search.current)
                raise
            except (UpdateFinishedTrialError, ValueError):
                if not _was_taken(search):
                    raise


def _was_taken(search: Search) -> bool:
    """Whether the current trial was finished elsewhere: its result counts, ours is dropped."""
    if search.current is None:
        return False
    trial, search.current = search.study.trials[search.current], None
    return trial.state.is_finished() and "failure" not in trial.user_attrs


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out Optuna's warnings that heartbeats, there since 2021, are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@dataclass
class _Signals:
    """What the handler of signals shares with the code that it interrupts."""

    held: bool = False
    came: str = ""

    def check(self) -> None:
        """Raise `Stopped` if a signal came, unless signals are held back.

        It is raised again at the next chance: an import may have swallowed it.
        """
        if self.came and not self.held:
            raise Stopped(self.came)


_SIGNALS = _Signals()


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at SIGINT, SIGTERM and SIGHUP, see `holding_signals`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        for one in before:  # a second one must not interrupt what is put in order after the first
            signal.signal(one, signal.SIG_IGN)
        _SIGNALS.came = signal.Signals(number).name
        _SIGNALS.check()

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        _SIGNALS.came = ""
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def holding_signals(hold: bool) -> Iterator[None]:
    """Hold back what a signal raises to the end of the context, or let it through inside of that.

    A transaction that is interrupted leaves the database locked by this very process, and a trial
    that is interrupted between being drawn and being noted stays ``RUNNING``.
    """
    before, _SIGNALS.held = _SIGNALS.held, hold
    try:
        _SIGNALS.check()
        yield
    finally:
        _SIGNALS.held = before
    _SIGNALS.check()


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
