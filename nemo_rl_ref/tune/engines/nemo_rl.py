# SPDX-License-Identifier: Apache-2.0
"""A runner of trials that starts a checkout of NeMo RL instead of this package's trainers.

For example::

    study = optimize(spec, folder="results/tune_dpo", runner=launcher("~/RL"), trials=30)

A trial is a process: the checkout's ``examples/run_dpo.py``, or another algorithm's, with
``--config`` and overrides, started by ``uv run`` in the checkout. What it prints goes to
``output.txt`` in the trial's folder, its logs to ``logs`` there; it writes no checkpoints.

Its metrics are read from the TensorBoard event files that NeMo RL's logger writes: of what it can
log to, the only one that is a file as it runs and holds every number. PyTorch's writer puts every
value on disk at once where TensorFlow is not installed, as in NeMo RL's lock file, and within 120 s
where it is. A step is passed on when the next one begins, or the run ends. The tag
``validation-default/loss`` is the metric ``val:validation-default_loss``.

A trial that is pruned or interrupted gets SIGTERM, to the whole process group, and SIGKILL after a
grace period. One that fails becomes `TrialFailed` with what its output says last.

NeMo RL joins a Ray cluster of the machine with the same ``CUDA_VISIBLE_DEVICES``, and otherwise
starts its own; trials side by side need a cluster that was started before, or different GPUs. Paths
in the configuration are relative to the checkout.

Tested with a script that takes the same arguments, writes the same files and fails in the same
ways; NeMo RL itself needs GPUs and was not run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_ref.tune.space import overrides
from nemo_rl_ref.tune.trial import Observe, TrialFailed, settings_of_search
from nemo_rl_ref.upstream import load_manifest

if TYPE_CHECKING:
    from nemo_rl_ref.tune.spec import Spec

#: How a script of the checkout is started.
COMMAND = ("uv", "run")

#: A number of steps, and the metrics at it.
Step = tuple[int, dict[str, float]]

#: Bytes from the end of the output in which the reason of a failure is looked for.
_TAIL = 1 << 18


class LauncherError(ValueError):
    """A checkout that cannot be used."""


def script_of(algorithm: str) -> str:
    """Name the script of an algorithm, relative to a checkout; the manifest has it."""
    script, scripts = f"examples/run_{algorithm}.py", load_manifest()["scripts"]
    if script not in scripts:
        raise LauncherError(f"algorithm: got {algorithm!r}; NeMo RL has {', '.join(scripts)}")
    return script


def launcher(
    checkout: str | Path,
    *,
    command: Sequence[str] = COMMAND,
    grace: float = 30.0,
    poll: float = 1.0,
) -> Callable[..., dict[str, float]]:
    """Make a runner of trials, with the signature of `nemo_rl_ref.tune.trial.run_trial`.

    Args:
        checkout: A checkout of NeMo RL.
        command: What starts a script in it; the script and its arguments follow.
        grace: Seconds between SIGTERM and SIGKILL.
        poll: Seconds between two looks at the run.

    Raises:
        LauncherError: If the folder is no checkout of NeMo RL, or the command does not exist.
    """
    folder = Path(checkout).expanduser().resolve()
    script = folder / "examples" / "run_dpo.py"
    if not script.is_file():
        raise LauncherError(f"checkout: {folder} has no examples/run_dpo.py, expected NeMo RL")
    if not command or shutil.which(command[0]) is None:
        raise LauncherError(
            f"command: no program {command[0] if command else ''!r}; NeMo RL is started by "
            f"{' '.join(COMMAND)}, give another command if it is installed otherwise"
        )
    for name, value in (("grace", grace), ("poll", poll)):
        if not value > 0:
            raise LauncherError(f"{name}: got {value!r}, expected seconds above 0")
    options = {"checkout": str(folder), "command": tuple(command), "grace": grace, "poll": poll}
    return functools.partial(run_trial, **options)


def run_trial(
    spec: Spec,
    values: Mapping[str, Any],
    folder: str | Path,
    *,
    seed: int | None = None,
    observe: Observe | None = None,
    checkout: str,
    command: Sequence[str] = COMMAND,
    grace: float = 30.0,
    poll: float = 1.0,
) -> dict[str, float]:
    """Train with a checkout of NeMo RL: see `nemo_rl_ref.tune.trial.run_trial` and `launcher`.

    Raises:
        TrialFailed: If the run fails, with the reason; all it printed is in ``output.txt``.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder / "logs"
    before = set(logs.glob("exp_*"))  # of an earlier attempt
    line = [
        *command, script_of(spec.algorithm), "--config", str(Path(spec.config).resolve()),
        *spec.overrides, *overrides(values),
        *overrides(_ours(spec, folder, seed)),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("VIRTUAL_ENV", None)  # ours, not the checkout's
    metrics: dict[str, float] = {}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            line, cwd=checkout, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            steps = _Steps(logs, before)
            while process.poll() is None:
                _pass_on(steps.new(), metrics, observe)
                _wait(process, poll)
            _pass_on(steps.new(last=True), metrics, observe)
        except BaseException:
            stop(process, grace)
            raise
    if process.returncode != 0:
        raise TrialFailed(reason_from(_tail(folder / "output.txt"), process.returncode))
    if not metrics:
        raise TrialFailed(f"the run wrote no metrics: no TensorBoard events below {logs}")
    return metrics


def _ours(spec: Spec, folder: Path, seed: int | None) -> dict[str, Any]:
    """What the launcher itself sets."""
    found = {
        "logger.log_dir": str(folder / "logs"),
        "logger.tensorboard_enabled": True,
        # Its value is not read where log_dir is given, but the section must be there.
        "logger.tensorboard.log_dir": "tensorboard",
    }
    return found | settings_of_search(spec, seed)


def _pass_on(steps: Iterable[Step], metrics: dict[str, float], observe: Observe | None) -> None:
    for step, found in steps:
        metrics.update(found)
        loss = found.get("train:loss", 0.0)
        if not math.isfinite(loss):
            raise TrialFailed(f"step {step}: loss {loss}")
        if observe is not None:
            observe(step, found)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):  # it still runs
        process.wait(seconds)


def stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process that leads a session, and its group: SIGTERM, and SIGKILL ``grace`` s later."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        _wait(process, grace)
    _signal(process, signal.SIGKILL)  # also what the leader left behind
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        os.killpg(process.pid, number)


class _Steps:
    """The metrics of a run that is under way, step by step; folders ``before`` it are not its."""

    def __init__(self, logs: Path, before: set[Path]):
        self._logs, self._before = logs, before
        self._loaders: dict[Path, Any] = {}
        self._pending: dict[int, dict[str, float]] = {}

    def new(self, *, last: bool = False) -> Iterator[Step]:
        """Read the steps that are over since the last call, at a run's end the ``last`` one too."""
        for path in sorted(self._logs.glob("exp_*/tensorboard/events.out.tfevents.*")):
            if path.parents[1] not in self._before:
                self._read(path)
        newest = max(self._pending, default=0)
        for step in sorted(self._pending):
            if last or step < newest:
                yield step, self._pending.pop(step)

    def _read(self, path: Path) -> None:
        from tensorboard.backend.event_processing.event_file_loader import (
            LegacyEventFileLoader,
        )

        if path not in self._loaders:
            self._loaders[path] = LegacyEventFileLoader(str(path))
        for event in self._loaders[path].Load():
            for value in event.summary.value:
                name = metric_name(value.tag)
                if name and value.HasField("simple_value"):
                    self._pending.setdefault(event.step, {})[name] = value.simple_value


def metric_name(tag: str) -> str | None:
    """Name a TensorBoard tag of NeMo RL as in ``checkpointing.metric_name``; None for timings."""
    prefix, _, name = tag.partition("/")
    if not name:
        return None
    if prefix == "train":
        return f"train:{name}"
    if prefix == "validation":
        return f"val:{name}"
    return f"val:{prefix}_{name}" if prefix.startswith("validation-") else None


_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can.t allocate", re.IGNORECASE)
_EXCEPTION = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit))(?::\s*(.*))?")
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|^\s*\([^()]*pid=\d+[^()]*\)\s*")


def reason_from(output: str, status: int) -> str:
    """Say why a run failed, in one line.

    Args:
        output: What it printed last.
        status: Its exit status, negative for a signal as `subprocess` has it; a shell's 128 + n
            counts as signal n.

    Returns:
        ``out of memory``; or the last exception; or the signal; or the status and the last line.
    """
    lines = [_DECORATION.sub("", text).strip() for text in output.splitlines()]
    lines = [text for text in lines if text]
    if any(_OUT_OF_MEMORY.search(text) for text in lines):
        return "out of memory"
    for text in reversed(lines):
        if found := _EXCEPTION.fullmatch(text):
            return f"{found[1]}: {found[2]}"[:300] if found[2] else found[1]
    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    if number:
        name = signal.Signals(number).name
        hint = ", often the system out of memory" if number == signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    return f"exit status {status}: {lines[-1] if lines else 'no output'}"[:300]


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")
