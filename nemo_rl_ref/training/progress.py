# SPDX-License-Identifier: Apache-2.0
"""How far a run is, and what it has come to."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

#: The metrics that a line about training shows, and how.
_SHOWN = {"loss": ".4f", "accuracy": ".3f", "reward": ".4f", "lr": ".2e"}
#: The metrics that a line about a validation shows, of those that there are.
_VALIDATED = ("loss", "val_loss", "accuracy", "pass_k", "avg_length")


class Progress:
    """A bar in a terminal, elsewhere a line now and then.

    It has the step, the time that is left, loss, accuracy or reward, learning rate, and valid
    tokens a second.

    Args:
        title: What is running.
        total: Number of steps.
        done: Steps that an earlier run has done.
        enabled: Whether to show anything; one process does.
    """

    def __init__(self, title: str, total: int, done: int, enabled: bool):
        self.title, self.total, self.done, self.enabled = title, total, done, enabled
        self.bar: Any = None
        self.shown, self.started = 0.0, time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled and sys.stdout is not None and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            # Names in the text, and what the user calls a metric, are no markup.
            text = TextColumn("{task.description}", markup=False)
            self.bar = Bar(BarColumn(10), text)
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=self.total, completed=self.done)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int, metrics: Mapping[str, float], tokens_per_second: float) -> None:
        """Show where the run is.

        Args:
            done: Steps done.
            metrics: Of the last step.
            tokens_per_second: Likewise.
        """
        now = time.monotonic()
        shows = self.enabled and (now - self.shown > 10 or done == self.total)
        if not (self.bar or shows):
            return
        left = (now - self.started) / (done - self.done) * (self.total - done)
        parts = [f"{self.title} step {done}/{self.total}", f"{timedelta(seconds=round(left))} left"]
        parts += [
            f"{name} {metrics[name]:{form}}" for name, form in _SHOWN.items() if name in metrics
        ]
        text = "  ".join([*parts, f"{tokens_per_second:,.0f} tokens/s"])
        if self.bar:
            self.bar.update(self.line, completed=done, description=text)
        else:
            self.shown = now
            print(text, flush=True)


def in_words(metrics: Mapping[str, float]) -> str:
    """Validation metrics in a line: those that say most, or the first of a loss of one's own."""
    known = [
        name for name in metrics if name.rpartition("_")[2] in _VALIDATED or name in _VALIDATED
    ]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in (known or [*metrics])[:6])


def tell(result: Mapping[str, Any]) -> None:
    """Print what a run has come to.

    Args:
        result: See `nemo_rl_ref.training.loop.Run`.
    """
    name, step = result["algorithm"], result["step"]
    if result["state"] == "nothing to train":
        print(f"{name}: finished at step {step}, nothing to train")
    else:
        print(f"{name}: {result['state']} at step {step}")
    rows = {"checkpoint": result["checkpoint"], "metrics": result["metrics_file"]}
    if result["validation"]:
        rows["last validation"] = in_words(result["validation"])
    if best := result["best_validation"]:
        where = f", {best['checkpoint']}" if best["checkpoint"] else ""
        rows["best validation"] = (
            f"{best['metric']} {best['value']:.4g} (step {best['step']}{where})"
        )
    for title, text in rows.items():
        if text:
            print(f"  {title:<16} {text}", flush=True)
