# SPDX-License-Identifier: Apache-2.0
"""A search on Ray: the trials of a study as Ray Tune trials, on one machine or a cluster. ::

    study = optimize_on_ray(spec, folder="results/tune_dpo", trials=100, gpus_per_trial=1)

The study is the one that `nemo_rl_ref.tune.study` keeps: the same storage, samplers, attributes and
budget, so that a report or a re-evaluation does not see the difference, and a search that was begun
without Ray goes on with it. Ray Tune places the trials, gives them their resources and watches
their workers; pruning is Tune's ASHA.

Suggestions come from Optuna through a small `Searcher` over the study's ask and tell. Ray's own
``OptunaSearch`` (2.60) runs with Optuna 5 and takes conditional spaces as a function, but what it
records is not what happened: a trial that ASHA stops is told as complete with its last intermediate
value, intermediate values are counted by reports and not by training steps, and a failed trial
leaves no reason.

Resuming is the same call again. The study says which trials are missing, and those that ran when
the search ended are in the queue again under their numbers; what ASHA had seen is told it again
from the intermediate values. Ray's ``Tuner.restore`` is not used: it unpickles files, and keeps a
second account of the trials beside the study's.

On a cluster the configuration, the data and this package must be at the same paths on every node,
and the folder of the study on a shared disk if the trials' logs are to be kept together. Only the
process that calls this function writes to the study.

With the launcher for NeMo RL a trial is itself a program that asks the same cluster for GPUs; give
the trials ``gpus_per_trial=0`` then, or both wait for each other.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from nemo_rl_ref.tune.runner import Runner, TrialFailed, reason_of, run_trial
from nemo_rl_ref.tune.samplers import REDUCTION, SearchError
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.study import (
    Listener,
    Search,
    SearchStopped,
    Settings,
    Stopped,
    StudyError,
    Watcher,
    check_failures,
    claim,
    fail,
    open_search,
    requeue,
    requeue_abandoned,
    stopping_at_signals,
    tell,
    torch_threads,
)

#: How often Ray starts a trial again whose worker died. An error of the training is no such death.
RESTARTS = 2

#: ASHA's brackets by the name of the pruner.
BRACKETS = {"successive-halving": 1, "hyperband": 3}

#: For a trial without a known number of steps.
_NO_LIMIT = 10**9

#: Ray's settings, unless the environment has them: nothing is sent home, Tune prints nothing and
#: writes no logs of its own, workers stay in the folder in which the search was started.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}


def optimize_on_ray(
    spec: Spec,
    *,
    folder: str | Path,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    address: str | None = None,
    cpus: int | None = None,
    runner: Runner = run_trial,
    listen: Listener | None = None,
    **settings: Any,
) -> optuna.Study:
    """Search until the budget is finished, trials running on Ray.

    A study that was interrupted goes on, whichever engine began it.

    Args:
        spec: What is searched.
        folder: Of the study: its storage and the output of its trials.
        cpus_per_trial: CPUs that Ray reserves for a trial.
        gpus_per_trial: GPUs that Ray reserves for a trial; a fraction lets several share one.
        address: Of a Ray cluster, ``auto`` for the one that this machine is part of. None uses the
            Ray that this process is connected to, or starts one on this machine.
        cpus: CPUs of a Ray that is started here, and so the number of trials at a time; None for
            all of the machine.
        runner: Runs a trial; Ray's workers must be able to import it.
        listen: Called after every change of a trial.
        **settings: See `nemo_rl_ref.tune.study.Settings`. ``pruner`` is ``none``,
            ``successive-halving`` (ASHA) or ``hyperband`` (ASHA with three brackets).

    Returns:
        The study.

    Raises:
        StudyError: If the study of that name is of another search, or a setting is wrong.
        SearchError: If sampler or pruner cannot be used for the search.
        SearchStopped: If the search ends itself, see `nemo_rl_ref.tune.study.work`.
        Stopped: If it was asked to end. The trials that ran are back in the queue.
    """
    _check_options(cpus_per_trial, gpus_per_trial, parsed := Settings(**settings))
    search = open_search(spec, parsed, folder, runner=runner, listen=listen)
    run_on_ray(
        search, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, address=address,
        cpus=cpus,
    )  # fmt: skip
    return search.study


def run_on_ray(
    search: Search,
    *,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    address: str | None = None,
    cpus: int | None = None,
) -> None:
    """As `optimize_on_ray`, for a search that is open.

    Args:
        search: From `nemo_rl_ref.tune.study.open_search`.
        cpus_per_trial: See `optimize_on_ray`, as what follows.
        gpus_per_trial: See there.
        address: See there.
        cpus: See there.

    Raises:
        StudyError: As `optimize_on_ray`.
        SearchError: As `optimize_on_ray`.
        SearchStopped: As `optimize_on_ray`.
        Stopped: As `optimize_on_ray`.
    """
    _check_options(cpus_per_trial, gpus_per_trial, search.settings)
    resources = {"cpu": cpus_per_trial, "gpu": gpus_per_trial}
    search.study.pruner = optuna.pruners.NopPruner()  # Tune prunes
    folder = search.folder.resolve()
    work = _Work(search)
    with _environment(), stopping_at_signals(), _ray(address, cpus), work.closing():
        _check_resources(resources)
        tuner = tune.Tuner(
            tune.with_resources(_trainable(search, folder), resources),
            tune_config=tune.TuneConfig(
                search_alg=_Asker(work),
                scheduler=work.scheduler(),
                reuse_actors=not gpus_per_trial,  # a CUDA context belongs to one trial
                num_samples=-1,  # the searcher says when the budget is used up
                trial_name_creator=lambda trial: f"trial_{trial.config['number']:04d}",
                trial_dirname_creator=lambda trial: f"trial_{trial.config['number']:04d}",
            ),
            run_config=tune.RunConfig(
                name=f"{search.study.study_name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=str(folder / "ray"),
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_Recorder(work)],
                stop=_StopAll(work),
                verbose=0,
            ),
        )
        tuner.fit()
    if work.stopped is not None:
        raise work.stopped
    if search.finished() < search.budget:
        raise Stopped("the search was interrupted")


def _check_options(cpus_per_trial: float, gpus_per_trial: float, settings: Settings) -> None:
    for name, value in (("cpus", cpus_per_trial), ("gpus", gpus_per_trial)):
        if not isinstance(value, (int, float)) or not (value >= 0 and math.isfinite(value)):
            raise StudyError(f"{name}_per_trial: got {value!r}, expected a number from 0 on")
    if not cpus_per_trial and not gpus_per_trial:
        raise StudyError("cpus_per_trial: got 0 with gpus_per_trial 0, expected one above 0")
    if settings.pruner not in ("none", *BRACKETS):
        raise SearchError(
            f"pruner: got {settings.pruner!r} with Ray, expected none, {' or '.join(BRACKETS)}"
        )


# On a worker


def _trainable(search: Search, folder: Path) -> Any:
    """What a worker runs for a trial; it carries the search's settings, not its study."""
    spec, runner, threads, cwd = search.spec, search.runner, search.settings.threads, os.getcwd()
    metrics_of_interest = [objective.metric for objective in spec.objectives]

    def train(config: dict[str, Any]) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)
        began, last, told = time.perf_counter(), 0, False

        def observe(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal last, told
            last = step
            for metric in metrics_of_interest:
                if not math.isfinite(metrics.get(metric, 0.0)):
                    raise TrialFailed(f"step {step}: {metric} is {metrics[metric]}")
            validated = any(name.startswith("val:") for name in metrics)
            if validated or not told:
                told = told or any(name.startswith("train:") for name in metrics)
                one = metrics.get(metrics_of_interest[0]) if len(metrics_of_interest) == 1 else None
                rung = {"objective": one, "step": step} if one is not None and step else {}
                tune.report({"metrics": json.dumps(dict(metrics)), "at": step, **rung})

        end: dict[str, Any] = {"end": "complete"}
        try:
            with torch_threads(threads):
                values = json.loads(config["values"])
                trial_folder = folder / f"trial_{config['number']:04d}"
                found = runner(spec, values, trial_folder, seed=config["seed"], observe=observe)
            end["metrics"] = json.dumps(dict(found))
        except TrialFailed as error:
            end = {"end": "failed", "reason": error.reason}
        except Exception as error:  # noqa: BLE001, of the runner: a reason for the study, no retry
            end = {"end": "failed", "reason": reason_of(error)}
        seconds = round(time.perf_counter() - began, 3)
        tune.report({**end, "at": last, "seconds": seconds})

    return train


# In the process that holds the study


@dataclass
class _Running:
    """A trial that Ray runs."""

    trial: optuna.Trial
    watcher: Watcher
    alive: ExitStack


@dataclass
class _Work:
    """What searcher, scheduler and recorder share.

    Attributes:
        search: The search.
        running: The trials that Ray runs or is about to run, by Ray's id.
        pruned: Ids of the trials that ASHA ended.
        stopped: Why the search ends itself.
    """

    search: Search
    running: dict[str, _Running] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    stopped: SearchStopped | None = None

    def __reduce__(self) -> Any:
        """Ray's files about the experiment, which nobody reads, hold nothing of the study."""
        return (dict, ())

    def scheduler(self) -> Any:
        """ASHA, told what the study has seen before; or none."""
        name, spec = self.search.settings.pruner, self.search.spec
        if name == "none":
            return FIFOScheduler()
        limit = spec.max_steps or _NO_LIMIT
        asha = _Asha(
            self, time_attr="step", max_t=max(limit, spec.val_period),
            grace_period=spec.val_period, reduction_factor=REDUCTION, brackets=BRACKETS[name],
            stop_last_trials=False, metric="objective",
            mode="max" if spec.objectives[0].direction == "maximize" else "min",
        )  # fmt: skip
        for trial in self.search.trials():
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                _replay(asha, trial)
        return asha

    def claim(self, ray_id: str) -> optuna.Trial | None:
        """The study's next trial, kept alive from now on."""
        requeue_abandoned(self.search)
        trial = claim(self.search)
        if trial is None:
            return None
        storage = self.search.study._storage
        alive = ExitStack()
        storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("worker", f"ray {self.search.worker}")
        alive.enter_context(get_heartbeat_thread(trial._trial_id, storage))
        self.running[ray_id] = _Running(trial, Watcher(self.search, trial), alive)
        return trial

    def end(self, ray_id: str, last: Mapping[str, Any]) -> None:
        """Tell the study how a trial ended."""
        if ray_id not in self.running:
            return
        one = self.running.pop(ray_id)
        study, trial, watcher = self.search.study, one.trial, one.watcher
        if "seconds" in last:
            trial.set_user_attr("seconds", last["seconds"])
        elif "time_total_s" in last:
            trial.set_user_attr("seconds", round(float(last["time_total_s"]), 3))
        trial.set_user_attr("steps", int(last.get("at", watcher.step)))
        try:
            if last.get("end") == "failed":
                fail(study, trial, last["reason"])
            elif last.get("end") == "complete":
                tell(study, trial, TrialState.COMPLETE, watcher.values(json.loads(last["metrics"])))
            elif ray_id in self.pruned:
                tell(study, trial, TrialState.PRUNED)
            else:  # the whole search ends
                requeue(study, trial, died=False)
        except TrialFailed as error:
            fail(study, trial, error.reason)
        except SearchStopped as error:
            fail(study, trial, str(error))
            self.stopped = error
        finally:
            one.alive.close()
        self.after_change()

    def after_change(self) -> None:
        """Look whether the search must end, and tell the listener."""
        try:
            check_failures(self.search)
        except SearchStopped as error:
            self.stopped = error
        self.search.changed()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """In the end no trial is left running: those that are go back in the queue."""
        try:
            yield
        finally:
            for one in self.running.values():
                one.alive.close()
                requeue(self.search.study, one.trial, died=False)
            self.running.clear()


def _replay(asha: ASHAScheduler, trial: FrozenTrial) -> None:
    """Tell ASHA the intermediate values of a trial of an earlier run."""
    stand_in = SimpleNamespace(trial_id=f"earlier-{trial.number}")
    asha.on_trial_add(None, stand_in)
    for step, value in sorted(trial.intermediate_values.items()):
        if step and math.isfinite(value):
            ASHAScheduler.on_trial_result(asha, None, stand_in, {"step": step, "objective": value})


class _Asha(ASHAScheduler):
    """ASHA that says which trials it ended."""

    def __init__(self, work: _Work, **options: Any):
        super().__init__(**options)
        self._work = work

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As ASHA."""
        action = super().on_trial_result(tune_controller, trial, result)
        if action == self.STOP:
            self._work.pruned.add(trial.trial_id)
        return action

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study has all that is needed to go on."""
        Path(checkpoint_path).touch()


class _Asker(Searcher):
    """Asks the study for trials."""

    def __init__(self, work: _Work):
        super().__init__()
        self._work = work

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None while others have all that are left; FINISHED in the end."""
        work, search = self._work, self._work.search
        if work.stopped is not None or search.finished() >= search.budget:
            return Searcher.FINISHED
        trial = work.claim(trial_id)
        if trial is None:
            mine_are_all = search.finished() + len(work.running) >= search.budget
            return Searcher.FINISHED if mine_are_all else None
        try:
            values = search.spec.space.suggest(trial)
        except ValueError as error:  # a tie without a result: the space's fault
            work.end(trial_id, {"end": "failed", "reason": reason_of(error), "seconds": 0.0})
            return None
        varied = trial.number if search.settings.vary_seed else 0
        seed = search.spec.seed + varied
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("values", values)
        search.changed()
        return {"number": trial.number, "values": json.dumps(values), "seed": seed}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the recorder knows more."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study has all that is needed to go on."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Not used, see the module."""
        raise NotImplementedError("a search resumes from its study: call optimize_on_ray again")


class _Recorder(Callback):
    """Writes what happens to the study."""

    def __init__(self, work: _Work):
        self._work = work

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Intermediate values."""
        one = self._work.running.get(trial.trial_id)
        if one is None or "end" in result or "metrics" not in result:
            return
        try:
            one.watcher(int(result["at"]), json.loads(result["metrics"]))
        except SearchStopped as error:
            fail(self._work.search.study, one.trial, str(error))
            self._work.stopped = error

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial that ended by itself, or was ended."""
        self._work.end(trial.trial_id, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial whose worker died too often."""
        error = trial.get_error()
        reason = reason_of(error) if error is not None else "no reason was recorded"
        last = {"end": "failed", "reason": _of_worker(reason)}
        self._work.end(trial.trial_id, {**(trial.last_result or {}), **last})


def _of_worker(reason: str) -> str:
    """What Ray says about a dead worker, shortened to what matters."""
    if reason == "out of memory":
        return reason
    first = reason.split(". ")[0]
    times = f" {RESTARTS + 1} times" if RESTARTS else ""
    return f"its worker died{times}: {first}"[:300]


class _StopAll(Stopper):
    """Ends all trials once the search has ended itself."""

    def __init__(self, work: _Work):
        self._work = work

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether to."""
        return self._work.stopped is not None


# Ray itself


@contextmanager
def _environment() -> Iterator[None]:
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.ERROR)  # it misses the files that it was told not to write
    try:
        with warnings.catch_warnings():
            # Ray leaves sockets and files to the garbage collector, and warns of its own future.
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", module=r"ray(\.|$)")
            yield
    finally:
        log.setLevel(level)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _ray(address: str | None, cpus: int | None) -> Iterator[None]:
    """Connected to Ray; ended again if it was started here."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False}
    if address:
        options["address"] = address
    else:
        # Its workers import what this process can import: the runner, and this package.
        paths = os.pathsep.join(path for path in sys.path if path)
        options |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            # Ray gives the interpreter to a shell as it is; its path may hold a space.
            "runtime_env": {
                "env_vars": {"PYTHONPATH": paths},
                "py_executable": shlex.quote(sys.executable),
            },
        }
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


def _check_resources(resources: Mapping[str, float]) -> None:
    """Raise if no node can ever run a trial: Ray would wait for it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": resources["cpu"], "GPU": resources["gpu"]}
    if not any(all(node.get(k, 0) >= v for k, v in wanted.items()) for node in nodes):
        most = {k: max((node.get(k, 0) for node in nodes), default=0) for k in wanted}
        raise StudyError(
            f"cpus_per_trial, gpus_per_trial: got {wanted['CPU']:g} and {wanted['GPU']:g}, but no "
            f"node has them; the most on one node are {most['CPU']:g} and {most['GPU']:g}"
        )
