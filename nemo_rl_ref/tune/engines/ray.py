# SPDX-License-Identifier: Apache-2.0
"""A search on Ray: its trials in actors, on one machine or a cluster.

For example::

    study = optimize_on_ray(spec, folder="results/tune_dpo", trials=100, gpus_per_trial=1)

Actors run trials. The process that calls this function, the driver, alone holds the study: it asks
for trials, hears of each validation, lets Optuna's pruner decide, and tells how a trial ended. A
trial whose actor died is queued once more; so are, when a search goes on, those that a killed
driver left running. Therefore no other process may work on the study meanwhile. Either engine
goes on with what the other began.

On a cluster the configuration, the data and this package must be at the same paths on every node.
With the launcher for NeMo RL a trial is itself a program that asks the same cluster for GPUs; give
the trials ``gpus_per_trial=0`` then, or both wait for each other.
"""

from __future__ import annotations

import math
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.exceptions import TrialPruned
from optuna.trial import TrialState
from ray.exceptions import RayActorError

from nemo_rl_ref.tune.search import (
    Listener,
    Search,
    SearchStopped,
    Settings,
    StudyError,
    Watcher,
    holding_signals,
    open_search,
    stopping_at_signals,
    torch_threads,
)
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.trial import Ages, Runner, TrialFailed, reason_of, run_trial

#: Ray's settings: nothing is sent home; a trial without GPUs of its own sees the machine's.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
#: Seconds that actors have to end their trials when the search is ended.
_LAST_WORDS = 10.0


def optimize_on_ray(
    spec: Spec,
    *,
    folder: str | Path,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    address: str | None = None,
    jobs: int | None = None,
    runner: Runner = run_trial,
    listen: Listener | None = None,
    **settings: Any,
) -> optuna.Study:
    """Search until all trials are finished, trials running on Ray.

    Args:
        spec: What is searched.
        folder: Of the study.
        cpus_per_trial: What Ray reserves for a trial.
        gpus_per_trial: The same; a fraction lets several trials share one.
        address: Of a Ray cluster, ``auto`` for this machine's. None uses the Ray that this process
            is connected to, or starts one.
        jobs: Trials at a time; None for as many as the CPUs and GPUs allow.
        runner: Runs a trial; Ray's workers must be able to import it.
        listen: Told of each finished trial.
        **settings: See `nemo_rl_ref.tune.search.Settings`.

    Raises:
        StudyError: If no node has room for a trial. And as `nemo_rl_ref.tune.search.optimize`.
    """
    wanted = {"CPU": cpus_per_trial, "GPU": gpus_per_trial}
    if min(wanted.values()) < 0 or not any(wanted.values()):
        raise StudyError(
            f"cpus_per_trial, gpus_per_trial: got {cpus_per_trial} and {gpus_per_trial}, expected "
            "none below 0 and one above"
        )
    search = open_search(
        spec, Settings(**settings), folder, runner=runner, listen=listen, heartbeats=False
    )
    cpus = math.ceil(jobs * cpus_per_trial) if jobs else None
    with stopping_at_signals(), _ray(address, cpus), holding_signals(True):
        most = _most_at_once(wanted)
        _Driver(search, wanted, min(jobs or most, most)).run()
    return search.study


class _Worker:
    """An actor. Its trial runs in a thread that waits at each validation for the driver's word."""

    def __init__(self, cwd: str, threads: int):
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads, self._ended = threads, False
        if os.path.isdir(cwd):
            os.chdir(cwd)

    def begin(self, *trial: Any) -> tuple[Any, ...]:
        """Begin a trial; returns what happens first."""
        threading.Thread(target=self._run, args=trial, daemon=True).start()
        return self._events.get()

    def go_on(self, word: bool) -> tuple[Any, ...]:
        """Go on after a validation, or end the trial; returns what happens next."""
        self._words.put(word)
        return self._events.get()

    def end(self) -> None:
        """End the trial at its next step, so that a program that it runs is ended too."""
        self._ended = True

    def _run(
        self, runner: Runner, spec: Spec, values: dict[str, Any], folder: Path, seed: int
    ) -> None:
        start, ages, reason, metrics = time.perf_counter(), Ages(), None, {}

        def observe(step: int, found: Mapping[str, float]) -> None:
            first = not ages.step
            ages(step, found)
            if self._ended:
                raise TrialPruned
            if first or any(name.startswith("val:") for name in found):
                self._events.put(("step", step, dict(found)))
                if not self._words.get():
                    raise TrialPruned

        try:
            with torch_threads(self._threads):
                metrics = dict(runner(spec, values, folder, seed=seed, observe=observe))
        except TrialPruned:
            reason = "ended by the driver"
        except Exception as error:  # of the runner: a reason for the study
            reason = error.reason if isinstance(error, TrialFailed) else reason_of(error)
        self._events.put(("end", round(time.perf_counter() - start, 3), ages, reason, metrics))


@dataclass
class _Running:
    """A trial that an actor runs, and why the driver has ended it."""

    worker: Any
    trial: optuna.Trial
    watcher: Watcher
    ended: Exception | None = None


class _Driver:
    """Asks the study for trials, has actors run them, ``most`` at a time, and tells the study."""

    def __init__(self, search: Search, wanted: Mapping[str, float], most: int):
        self.search, self.study, self.most = search, search.study, most
        resources: Any = {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"]}
        self.actor: Any = ray.remote(_Worker).options(max_concurrency=2, **resources)
        self.idle: list[Any] = []
        self.running: dict[Any, _Running] = {}

    def run(self) -> None:
        """Run trials until all are finished."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self._fail_and_queue(trial.number)  # its driver, or its process, is gone
        try:
            while True:
                while len(self.running) < self.most and self._has_room():
                    self._begin(self.study.ask())
                if not self.running:
                    return
                with holding_signals(False):
                    ready, _ = ray.wait(list(self.running), timeout=1.0)
                for event in ready:
                    self._hear(self.running.pop(event), event)
        finally:  # where it was interrupted, or has ended itself
            workers = [one.worker for one in self.running.values()]
            if self.running:
                _ = [worker.end.remote() for worker in workers]
                ray.wait(list(self.running), num_returns=len(workers), timeout=_LAST_WORDS)
            for one in self.running.values():
                self._fail_and_queue(one.trial.number)
            for worker in (*workers, *self.idle):
                ray.kill(worker)

    def _has_room(self) -> bool:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        may_draw = self.search.settings.sampler != "grid"
        left = self.search.budget - len(self.search.finished()) - len(self.running)
        return left > 0 and bool(waiting or may_draw)

    def _begin(self, trial: optuna.Trial) -> None:
        values, folder, seed = self.search.begin(trial)
        cwd, threads = os.getcwd(), self.search.settings.threads
        worker = self.idle.pop() if self.idle else self.actor.remote(cwd, threads)
        spec, runner = self.search.spec, self.search.runner
        event = worker.begin.remote(runner, spec, values, folder.resolve(), seed)
        self.running[event] = _Running(worker, trial, Watcher(spec, trial))

    def _hear(self, one: _Running, event: Any) -> None:
        try:
            kind, *found = ray.get(event)
        except RayActorError as error:
            why = " ".join(str(error).split()).split(". ")[0]
            self._fail_and_queue(one.trial.number, most=1)
            print(f"trial {one.trial.number}: its actor died: {why}"[:300], flush=True)
            return
        if kind == "end":
            self.idle.append(one.worker)
            self._tell(one, found)
            return
        try:
            one.watcher(*found)
        except (TrialPruned, TrialFailed, SearchStopped) as error:
            one.ended = error
        self.running[one.worker.go_on.remote(one.ended is None)] = one

    def _tell(self, one: _Running, end: list[Any]) -> None:
        trial, (seconds, one.watcher.ages, reason, metrics) = one.trial, end
        trial.set_user_attr("seconds", seconds)
        trial.set_user_attr("steps", one.watcher.ages.step)
        try:
            if one.ended is not None:
                raise one.ended
            if reason is not None:
                raise TrialFailed(reason)
            self.study.tell(trial, one.watcher.values(metrics))
        except TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except (TrialFailed, SearchStopped) as error:
            trial.set_user_attr("failure", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            if isinstance(error, SearchStopped):
                raise
        self.search.note(self.study.trials[trial.number])

    def _fail_and_queue(self, number: int, most: int | None = None) -> None:
        """Queue a trial once more under a new number, unless that was done ``most`` times."""
        self.study.tell(number, state=TrialState.FAIL)
        self.search.run_again(number, most)


@contextmanager
def _ray(address: str | None, cpus: int | None) -> Iterator[None]:
    """Connect to Ray; one that was started here is ended again."""
    if ray.is_initialized():
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"address": address}
    if address is None:
        # Its workers import what this process can import: the runner, and this package. Ray gives
        # the interpreter to a shell as it is; its path may hold a space.
        paths = os.pathsep.join(path for path in sys.path if path)
        python = {"env_vars": {"PYTHONPATH": paths}, "py_executable": shlex.quote(sys.executable)}
        options = {"num_cpus": cpus, "include_dashboard": False, "runtime_env": python}
    ray.init(log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _most_at_once(wanted: Mapping[str, float]) -> int:
    """How many trials the nodes can run; Ray would wait forever for one that fits on none."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = {name: number for name, number in wanted.items() if number}
    fit = sum(min(int(n.get(name, 0) / x) for name, x in needed.items()) for n in nodes)
    if not fit:
        raise StudyError(
            f"cpus_per_trial, gpus_per_trial: got {wanted['CPU']:g} and {wanted['GPU']:g}, which "
            f"no node has; expected at most {[{k: n.get(k, 0) for k in wanted} for n in nodes]}"
        )
    return fit
