# SPDX-License-Identifier: Apache-2.0
"""When the steps of another library's trainer end."""

import time

import transformers


class Clock(transformers.TrainerCallback):
    """Notes when each step of a Trainer ends.

    Args:
        now: reads the time, or several times at once.
    """

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.ticks = []

    def on_step_end(self, *args, **kwargs):
        self.ticks.append(self.now())


class ClockBetween(transformers.TrainerCallback):
    """Does something else after each step of a Trainer, which does not count in the next one.

    Args:
        between: called after each step; what it returns is kept.
    """

    def __init__(self, between):
        self.between = between
        self.steps, self.others, self.started = [], [], None

    def on_step_end(self, *args, **kwargs):
        if self.started is not None:
            self.steps.append(time.perf_counter() - self.started)
        other = self.between()
        if self.started is not None:
            self.others.append(other)
        self.started = time.perf_counter()
