# SPDX-License-Identifier: Apache-2.0
"""How far a run is, and where its time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Timer:
    """Seconds by name, added up until they are taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measure what runs in the context."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the seconds and start again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class Progress:
    """A bar in a terminal, elsewhere a line now and then: step, loss, valid tokens a second.

    Args:
        title: What is running.
        total: Number of steps.
        done: Steps that an earlier run has done.
        enabled: Whether to show anything; one process does.
    """

    def __init__(self, title: str, total: int, done: int, enabled: bool):
        self.title, self.total, self.done, self.enabled = title, total, done, enabled
        self.bar: Any = None
        self.shown = 0.0

    def __enter__(self) -> Progress:
        if self.enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns)
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=self.total, completed=self.done)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int, loss: float, tokens_per_second: float) -> None:
        """Show where the run is."""
        shows = self.enabled and (time.monotonic() - self.shown > 10 or done == self.total)
        if not (self.bar or shows):
            return
        text = (
            f"{self.title} step {done}/{self.total}  loss {loss:.4f}  "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.line, completed=done, description=text)
        else:
            self.shown = time.monotonic()
            print(text, flush=True)
