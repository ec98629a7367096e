# SPDX-License-Identifier: Apache-2.0
"""Where a run's time goes, and when it has to save because its time is up."""

from __future__ import annotations

import logging
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Optional

logger = logging.getLogger(__name__)

_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
    "std": statistics.pstdev,
    "sum": sum,
    "count": len,
}


class Timer:
    """Seconds by label, all measurements of it, and points in time. Threads may share one.

    Each call is logged at level DEBUG, with the context and the time in UTC.

    Args:
        context: Says which timer it is, for the log: ``rank``, ``worker``; the host's name is added.
    """

    def __init__(self, context: Optional[dict[str, object]] = None) -> None:
        self._timers: dict[str, list[float]] = {}
        self._start_times: dict[str, float] = {}
        self._markers: dict[str, list[tuple[float, Optional[dict[str, Any]]]]] = {}
        self._context = {"hostname": socket.gethostname(), **(context or {})}
        self._lock = threading.RLock()

    def start(self, label: str, should_log: bool = True) -> None:
        """Start the clock of a label.

        Raises:
            ValueError: If it is running.
        """
        with self._lock:
            if label in self._start_times:
                raise ValueError(f"label: {label!r} is running already")
            self._start_times[label] = time.perf_counter()
        self._log(label, "start", should_log)

    def stop(self, label: str, should_log: bool = True) -> float:
        """Stop the clock of a label, and return the seconds since its start.

        Raises:
            ValueError: If it is not running.
        """
        with self._lock:
            if label not in self._start_times:
                running = ", ".join(self._start_times) or "none is"
                raise ValueError(f"label: {label!r} is not running; running: {running}")
            elapsed = time.perf_counter() - self._start_times.pop(label)
            self._timers.setdefault(label, []).append(elapsed)
        self._log(label, f"end elapsed={elapsed:.4f}s", should_log)
        return elapsed

    @contextmanager
    def time(self, label: str, should_log: bool = True) -> Iterator[None]:
        """Measure what runs in the context."""
        self.start(label, should_log)
        try:
            yield
        finally:
            self.stop(label, should_log)

    def record(self, label: str, elapsed: float) -> None:
        """Add seconds that were measured elsewhere."""
        with self._lock:
            self._timers.setdefault(label, []).append(elapsed)
        self._log(label, f"record elapsed={elapsed:.4f}s")

    def mark(self, label: str, metadata: Optional[dict[str, Any]] = None) -> float:
        """Note that something happened now, and return the seconds since 1970."""
        now = time.time()
        with self._lock:
            self._markers.setdefault(label, []).append((now, metadata))
        self._log(label, f"mark meta={metadata}" if metadata else "mark")
        return now

    def get_markers(self, label: Optional[str] = None) -> dict[str, list[Any]]:
        """Return what `mark` has noted, of one label or of all: time and metadata by label."""
        with self._lock:
            labels = self._markers if label is None else [label]
            return {name: list(self._markers.get(name, [])) for name in labels}

    def get_elapsed(self, label: str) -> list[float]:
        """Return all measurements of a label.

        Raises:
            KeyError: If there are none.
        """
        with self._lock:
            if label not in self._timers:
                raise KeyError(f"label: nothing was measured for {label!r}")
            return self._timers[label]

    def get_latest_elapsed(self, label: str) -> float:
        """Return the last measurement of a label; errors as in `get_elapsed`."""
        return self.get_elapsed(label)[-1]

    def reduce(self, label: str, operation: str = "mean") -> float:
        """Return one number for a label's measurements.

        Args:
            label: The label.
            operation: ``mean``, ``median``, ``min``, ``max``, ``std``, ``sum`` or ``count``.

        Raises:
            KeyError: If nothing was measured.
            ValueError: If there is no such operation.
        """
        if operation not in _REDUCTIONS:
            raise ValueError(
                f"operation: got {operation!r}, expected one of {', '.join(_REDUCTIONS)}"
            )
        return _REDUCTIONS[operation](self.get_elapsed(label))

    def get_timing_metrics(
        self, reduction_op: str | Mapping[str, str] = "mean"
    ) -> dict[str, float | list[float]]:
        """Return the measurements of all labels.

        Args:
            reduction_op: See `reduce`; for all labels, or by label. A label without one keeps all
                its measurements.
        """
        with self._lock:
            if isinstance(reduction_op, str):
                reduction_op = dict.fromkeys(self._timers, reduction_op)
            return {
                label: self.reduce(label, reduction_op[label]) if label in reduction_op else values
                for label, values in self._timers.items()
            }

    def reset(self, label: Optional[str] = None) -> None:
        """Forget a label, or all."""
        with self._lock:
            for kept in (self._timers, self._start_times, self._markers):
                if label:
                    kept.pop(label, None)
                else:
                    kept.clear()

    def _log(self, label: str, event: str, should_log: bool = True) -> None:
        if should_log and logger.isEnabledFor(logging.DEBUG):
            context = " ".join(f"{name}={value}" for name, value in self._context.items())
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            logger.debug("[%s] %s %s ts=%s", context, label, event, now)


class ThreadSafeTimer(Timer):
    """NeMo RL's name for a timer that threads may share; every `Timer` is one here."""


def convert_to_seconds(time_string: str) -> int:
    """Turn ``DD:HH:MM:SS`` into seconds.

    Raises:
        ValueError: If it is not of that form.
    """
    if not re.fullmatch(r"\d+:\d+:\d+:\d+", str(time_string)):
        raise ValueError(f"got {time_string!r}, expected DD:HH:MM:SS such as '00:03:45:00'")
    days, hours, minutes, seconds = map(int, time_string.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class TimeoutChecker:
    """Says once that it is time to save.

    Args:
        timeout: Time from now, ``DD:HH:MM:SS``; None for never.
        fit_last_save_time: Leave room for one more iteration of average length.
    """

    def __init__(
        self, timeout: Optional[str] = "00:03:45:00", fit_last_save_time: bool = False
    ) -> None:
        self.last_save_time = float("inf") if timeout is None else convert_to_seconds(timeout)
        self.start_time = time.monotonic()
        self.last_saved = False
        self.iteration_times: list[float] = []
        self.previous_iteration_time: float | None = None
        self.fit_last_save_time = fit_last_save_time

    def check_save(self) -> bool:
        """Whether the time is up; True only the first time."""
        expected = time.monotonic() - self.start_time
        if self.fit_last_save_time and self.iteration_times:
            expected += sum(self.iteration_times) / len(self.iteration_times)
        if self.last_saved or expected < self.last_save_time:
            return False
        self.last_saved = True
        return True

    def start_iterations(self) -> None:
        """Start the clock of the first iteration."""
        self.previous_iteration_time = time.monotonic()

    def mark_iteration(self) -> None:
        """Note that an iteration has ended."""
        now = time.monotonic()
        if self.previous_iteration_time is not None:
            self.iteration_times.append(now - self.previous_iteration_time)
        self.previous_iteration_time = now
