# SPDX-License-Identifier: Apache-2.0
"""When a run has to save because its time is up."""

from __future__ import annotations

import re
import time
from typing import Optional


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
