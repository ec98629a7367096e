# SPDX-License-Identifier: Apache-2.0
"""Code of the user's: how long it may run, and at which line of it something happened."""

from __future__ import annotations

import inspect
import signal
import threading
import traceback
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

#: Seconds that a check may take; it takes a few, and longer on a busy machine.
SECONDS = 120.0


class Overtime(BaseException):
    """The time is up. No exception of the user's code, which may catch those."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise `Overtime` if what runs inside takes too long; in the main thread of a POSIX system."""
    seconds = SECONDS
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield  # or within the limit of a caller
        return

    def stop(number: int, frame: Any) -> None:
        raise Overtime(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def file_of(thing: Any) -> str:
    """The source file of a function, of a class, or of an object's class; empty if unknown."""
    try:
        kind = thing if hasattr(thing, "__qualname__") else type(thing)
        return inspect.getsourcefile(kind) or ""
    except (OSError, TypeError):
        return ""


def written_at(thing: Any) -> str:
    """File and line of a function or class as ``(my_loss.py:7)``, or empty."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    try:
        return f" ({file_of(kind)}:{inspect.getsourcelines(kind)[1]})"
    except (OSError, TypeError):
        return ""


def raised_at(error: BaseException, file: str) -> str:
    """The line of a file that an error came through as ``(my_loss.py:7)``, or empty."""
    line = line_of(error, {file}) if file else ""
    return f" ({line})" if line else ""


def line_of(error: BaseException | None, files: Set[str]) -> str:
    """``file:line`` of the last call in some files that an error, or a cause of it, came through."""
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename in files:
            return f"{error.filename}:{error.lineno}"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}"
        error = error.__cause__
    return ""
