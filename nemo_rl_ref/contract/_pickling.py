# SPDX-License-Identifier: Apache-2.0
"""Sending a loss to a fresh interpreter, as Ray sends it to a worker."""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import LIMIT, call, difference
from nemo_rl_ref.contract._probes import Finding

_CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from nemo_rl_ref.contract._pickling import serve; serve()"
)
#: Seconds; most of them go to loading torch.
_TIMEOUT = 300


class FreshInterpreter:
    """A second Python, started at once so that it loads torch while other checks run.

    It has the `sys.path` of this process, so that it finds the modules that this one found.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> FreshInterpreter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def ask(self, message: bytes, count: int) -> list[tuple[str, Any]]:
        """Sends a message to `serve`; returns its `count` answers, or what went wrong for each."""
        try:
            out, errors = self._process.communicate(message, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            return [("error", f"no answer within {_TIMEOUT} s")] * count
        if self._process.returncode:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            status = f"exit status {self._process.returncode}: {' '.join(last)}"
            return [("error", status)] * count
        return pickle.loads(out)  # from the pipe of our own process


def pickles(
    losses: list[Callable[..., Any]], batches: list[list[Batch]], fresh: FreshInterpreter
) -> list[Finding]:
    """Each loss unpickles elsewhere and returns the same numbers there.

    Args:
        losses: the losses.
        batches: what each is called with, the smallest first.
        fresh: an interpreter that has answered nothing yet.
    """
    import cloudpickle

    parcels: list[tuple[bytes, bytes] | str] = []
    for loss_fn, its_batches in zip(losses, batches, strict=True):
        try:
            parcels.append((cloudpickle.dumps(loss_fn), pickle.dumps(its_batches)))
        except Exception as error:  # pickling runs the loss's own code, which may raise anything
            parcels.append(f"cloudpickle cannot pickle it: {type(error).__name__}: {error}")
    sent = [parcel for parcel in parcels if not isinstance(parcel, str)]
    answers = iter(fresh.ask(pickle.dumps(sent), len(sent)))
    return [
        _failed(parcel)
        if isinstance(parcel, str)
        else _compare(loss_fn, its_batches, len(parcel[0]), next(answers))
        for loss_fn, its_batches, parcel in zip(losses, batches, parcels, strict=True)
    ]


def _compare(
    loss_fn: Callable[..., Any], batches: list[Batch], size: int, reply: tuple[str, Any]
) -> Finding:
    """Holds what a loss did in the other interpreter against what it does here."""
    status, answer = reply
    if status == "error":
        return _failed(f"in a fresh interpreter: {answer}")
    worst = 0.0
    for batch, there in zip(batches, answer, strict=True):
        gap = difference(there, call(loss_fn, batch))
        worst = max(worst, gap.size)
        if gap.size > LIMIT:
            problem = f"in a fresh interpreter: {gap.detail}"
            return Finding("behaves differently", gap.size, problem, batch)
    return Finding(f"{size} bytes, {_way(loss_fn)}; largest difference {worst:.1e}", worst)


def serve() -> None:
    """Answers one message on standard input: unpickles losses, calls them, sends the results."""
    stream, sys.stdout = sys.stdout.buffer, sys.stderr  # what a loss prints is no answer
    answers: list[tuple[str, Any]] = []
    for blob, packed in pickle.load(sys.stdin.buffer):
        try:
            loss_fn = pickle.loads(blob)
            answers.append(("ok", [call(loss_fn, batch) for batch in pickle.loads(packed)]))
        except Exception:  # the asking process reports it
            answers.append(("error", traceback.format_exc(limit=0).strip().splitlines()[-1]))
    stream.write(pickle.dumps(answers))
    stream.flush()


def _way(loss_fn: Any) -> str:
    """How cloudpickle sends the loss."""
    import cloudpickle

    kind = loss_fn if hasattr(loss_fn, "__qualname__") else type(loss_fn)
    module = kind.__module__
    by_value = module == "__main__" or "<locals>" in kind.__qualname__
    if by_value or module in cloudpickle.list_registry_pickle_by_value():
        return "by value"
    return f"by reference: a worker must be able to import {module}"


def _failed(problem: str) -> Finding:
    return Finding("does not travel", float("inf"), problem)
