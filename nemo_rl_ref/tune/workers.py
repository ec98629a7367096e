# SPDX-License-Identifier: Apache-2.0
"""Several processes on one study: started, watched, and started again when they die.

A worker lives as long as the search: libraries are imported once. It shares nothing with the
others but the study, so a worker that dies, for want of memory for example, takes only its trial
with it. That trial is recorded as failed, with what the process died of. If the supervising process
dies too, nobody records anything: then the trials are abandoned, and go back to the queue.

Where there are several GPUs, each worker sees one of them, in turn: with ``CUDA_VISIBLE_DEVICES``,
from among those that it names already.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nemo_rl_ref.tune.runner import Runner
from nemo_rl_ref.tune.spec import Spec
from nemo_rl_ref.tune.study import (
    Search,
    SearchStopped,
    Settings,
    Stopped,
    check_failures,
    fail,
    open_search,
    requeue,
    stopping_at_signals,
    torch_threads,
    work,
    worker_name,
)

#: Seconds between two looks at the workers.
_PERIOD = 0.5
#: Seconds that a worker has to put its trial back before it is killed.
_LAST_WORDS = 20.0
#: Workers that die before they have begun a trial, one after the other, until the search ends.
_MOST_IDLE_DEATHS = 3


@dataclass
class Worker:
    """A process of a search.

    Attributes:
        number: From 0; a worker that is started again keeps its number.
        process: The process.
        words: What it says at its end: nothing if it is killed.
    """

    number: int
    process: Any
    words: Connection

    @property
    def name(self) -> str:
        """The name it signs its trials with."""
        return worker_name(self.process.pid)


def supervise(search: Search, jobs: int) -> None:
    """Run trials in so many processes until the budget is finished.

    Args:
        search: The search. This process runs no trials of it.
        jobs: Number of processes.

    Raises:
        SearchStopped: As `nemo_rl_ref.tune.study.work`, or if workers die before they begin.
        Stopped: If the search was asked to end. The trials that ran are back in the queue.
    """
    devices = visible_devices(_count_devices(), os.environ)
    workers = [_start(search, number, devices) for number in range(jobs)]
    idle_deaths = 0
    try:
        while workers:
            wait([worker.process.sentinel for worker in workers], timeout=_PERIOD)
            check_failures(search)
            search.changed()
            for worker in [w for w in workers if not w.process.is_alive()]:
                workers.remove(worker)
                words = _last_words(worker)
                if words == "finished":
                    continue
                if words:
                    raise SearchStopped(words)
                idle_deaths = 0 if _bury(search, worker) else idle_deaths + 1
                if idle_deaths >= _MOST_IDLE_DEATHS:
                    raise SearchStopped(
                        f"{idle_deaths} workers {how_it_died(worker.process.exitcode)} before they "
                        f"began a trial; see {output_file(search.folder, worker.number)}"
                    )
                workers.append(_start(search, worker.number, devices))
    finally:
        _end(search, workers)
    search.changed()


def output_file(folder: Path, number: int) -> Path:
    """What a worker prints, and what a library prints when it crashes."""
    return folder / f"worker_{number}.txt"


def how_it_died(exitcode: int) -> str:
    """``killed by SIGKILL (out of memory?)`` and the like."""
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"killed by {name}" + (" (out of memory?)" if exitcode == -signal.SIGKILL else "")


def visible_devices(count: int, environment: Mapping[str, str]) -> list[str]:
    """The GPUs that workers take in turn, as ``CUDA_VISIBLE_DEVICES`` names them.

    Args:
        count: How many GPUs this process sees.
        environment: Its environment variables.

    Returns:
        Their names, none where there is nothing to choose from.
    """
    if count < 2:
        return []
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else map(str, range(count))
    return [name.strip() for name in names][:count]


def _count_devices() -> int:
    import torch  # which the workers need, but nothing else here

    return torch.cuda.device_count()


@contextmanager
def _showing(device: str | None) -> Iterator[None]:
    """Processes that start now see this GPU alone."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if device is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _start(search: Search, number: int, devices: list[str]) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_work,
        args=(search.spec, search.settings, search.folder, search.runner, number, theirs),
        name=f"tune worker {number}",
    )
    device = devices[number % len(devices)] if devices else None
    # In the environment that the process inherits.
    with torch_threads(search.settings.threads), _showing(device):
        process.start()
    theirs.close()
    return Worker(number, process, ours)


def _last_words(worker: Worker) -> str:
    try:
        return worker.words.recv() if worker.words.poll() else ""
    except EOFError:
        return ""
    finally:
        worker.words.close()


def _bury(search: Search, worker: Worker) -> bool:
    """Record the trial of a worker that died as failed; False if it had none."""
    trials = [t for t in search.trials() if _is_running(t) and _is_of(t, worker)]
    for trial in trials:
        fail(search.study, trial, f"worker {how_it_died(worker.process.exitcode)}")
    return bool(trials)


def _is_running(trial: Any) -> bool:
    return trial.state.name == "RUNNING"


def _is_of(trial: Any, worker: Worker) -> bool:
    return trial.user_attrs.get("worker") == worker.name


def _end(search: Search, workers: list[Worker]) -> None:
    """Ask the workers to end, and put the trials back of those that do not."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_LAST_WORDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.words.close()
        for trial in search.trials():
            if _is_running(trial) and _is_of(trial, worker):
                requeue(search.study, trial, died=False)


def _work(
    spec: Spec, settings: Settings, folder: Path, runner: Runner, number: int, words: Connection
) -> None:
    """The life of a worker."""
    with output_file(folder, number).open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    _end_with_parent()
    try:
        with stopping_at_signals(), torch_threads(settings.threads):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor gets it too, and says so
            work(open_search(spec, settings, folder, runner=runner))
        words.send("finished")
    except Stopped:
        words.send("finished")
    except SearchStopped as error:
        words.send(str(error))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        place = output_file(folder, number)
        words.send(f"worker {number}: {type(error).__name__}: {error}; see {place}")


def _end_with_parent() -> None:
    """When the supervisor dies, put the trial back and end."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_LAST_WORDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
