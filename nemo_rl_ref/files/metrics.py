# SPDX-License-Identifier: Apache-2.0
"""Metrics in a JSON Lines file. Not in NeMo RL.

One line is one call of `nemo_rl_ref.utils.logger.Logger.log_metrics`: the step, and the metrics
under the names that they have in TensorBoard::

    {"step": 3, "train/loss": 0.68, "train/grad_norm": 1.2, "train/lr": 5e-06}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional


class JsonlLogger:
    """A JSON Lines file, with the methods of NeMo RL's loggers.

    A line is handed to the system whole, so a run that is killed leaves whole lines. One that does
    not fit on the disk is taken back.

    Args:
        path: The file; lines are appended.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def log_metrics(
        self,
        metrics: dict[str, Any],
        step: int,
        prefix: Optional[str] = "",
        step_metric: Optional[str] = None,
        step_finished: bool = False,
    ) -> None:
        """Write one line. NaN and infinities become strings, which JSON has no numbers for."""
        line: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            number = number_of(value)
            if isinstance(number, float) and not math.isfinite(number):
                number = str(number)
            line[f"{prefix}/{name}" if prefix else name] = value if number is None else number
        left = (json.dumps(line, default=str) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: checkpoints hold the configuration, and `Logger` writes it beside this file."""

    def log_histogram(self, histogram: list[Any], step: int, name: str) -> None:
        """Nothing."""

    def log_plot(self, figure: Any, step: int, name: str) -> None:
        """Nothing."""


def read_metrics(log_dir: str | Path) -> dict[int, dict[str, Any]]:
    """Read ``metrics.jsonl`` of a run, and of all its continuations.

    Args:
        log_dir: ``logger.log_dir``: a folder of ``exp_001``, ``exp_002``, …, or one of these. A run
            that resumes logs to the next of them. Where two have the same step, the later counts.

    Returns:
        By step, the metrics of that step.
    """
    merged: dict[int, dict[str, Any]] = {}
    runs = [folder for _, folder in numbered_runs(log_dir)]
    for path in (folder / "metrics.jsonl" for folder in (*runs, Path(log_dir))):
        for line in _lines(path):
            merged.setdefault(line.pop("step"), {}).update(line)
    return dict(sorted(merged.items()))


def numbered_runs(log_dir: str | Path) -> list[tuple[int, Path]]:
    """Number and path of the folders ``exp_001``, ``exp_002``, … below another, in their order."""
    found = Path(log_dir).glob("exp_*")
    named = ((re.fullmatch(r"exp_(\d+)", path.name), path) for path in found)
    return sorted((int(match[1]), path) for match, path in named if match)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text().split("\n") if path.exists() else [""]
    for number, text in enumerate(lines[:-1], start=1):  # behind the last newline is half a line
        try:
            yield json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of metrics: {text[:80]!r}") from error


def number_of(value: Any) -> int | float | None:
    """Return a Python number, or None for what is not a single number.

    Args:
        value: A number, or a tensor or an array of one.
    """
    if isinstance(value, (int, float)):
        return value
    size = value.numel() if hasattr(value, "numel") else getattr(value, "size", 0)
    return value.item() if hasattr(value, "item") and size == 1 else None
