# SPDX-License-Identifier: Apache-2.0
"""Metrics to a JSON Lines file and to TensorBoard, under NeMo RL's names.

The file is `nemo_rl_ref.files.metrics`'s, ``metrics.jsonl`` in the log folder.
Weights & Biases, SwanLab, MLflow and the GPU monitor are left out: their keys are known and have
no effect.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from nemo_rl_ref.files.metrics import JsonlLogger, number_of, numbered_runs


class LoggerInterface(ABC):
    """What every place that metrics go to can do."""

    @abstractmethod
    def log_metrics(
        self,
        metrics: dict[str, Any],
        step: int,
        prefix: Optional[str] = "",
        step_metric: Optional[str] = None,
        step_finished: bool = False,
    ) -> None:
        """Log numbers by name."""

    @abstractmethod
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the configuration."""

    @abstractmethod
    def log_histogram(self, histogram: list[Any], step: int, name: str) -> None:
        """Log the distribution of many numbers."""

    @abstractmethod
    def log_plot(self, figure: Any, step: int, name: str) -> None:
        """Log a Matplotlib figure."""


class TensorboardLogger(LoggerInterface):
    """TensorBoard.

    Args:
        cfg: The section ``logger.tensorboard``; not used, as in NeMo RL.
        log_dir: The folder of the event files.
    """

    def __init__(self, cfg: Any, log_dir: Optional[str] = None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=log_dir)

    def log_metrics(
        self,
        metrics: dict[str, Any],
        step: int,
        prefix: Optional[str] = "",
        step_metric: Optional[str] = None,
        step_finished: bool = False,
    ) -> None:
        """Log the metrics that are single numbers; the others are passed over."""
        for name, value in metrics.items():
            number = number_of(value)
            if number is not None:
                self.writer.add_scalar(f"{prefix}/{name}" if prefix else name, number, step)
        self.writer.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the configuration, flattened."""
        flat = flatten_dict(params)
        kinds = (bool, int, float, str)
        self.writer.add_hparams(
            {k: v if isinstance(v, kinds) else str(v) for k, v in flat.items()}, {}
        )

    def log_histogram(self, histogram: list[Any], step: int, name: str) -> None:
        """Nothing, as in NeMo RL."""

    def log_plot(self, figure: Any, step: int, name: str) -> None:
        """Log a figure as an image."""
        self.writer.add_figure(name, figure, step)


class Logger(LoggerInterface):
    """All places that metrics go to.

    Args:
        cfg: The section ``logger``: ``log_dir``, ``tensorboard_enabled``.

    Raises:
        ValueError: If there is no ``log_dir``.
    """

    def __init__(self, cfg: Any):
        if not cfg.get("log_dir"):
            raise ValueError("logger.log_dir: not set, expected a folder")
        self.base_log_dir = str(cfg["log_dir"])
        os.makedirs(self.base_log_dir, exist_ok=True)
        self.loggers: list[Any] = [JsonlLogger(Path(self.base_log_dir) / "metrics.jsonl")]
        if cfg.get("tensorboard_enabled"):
            if importlib.util.find_spec("tensorboard"):
                folder = os.path.join(self.base_log_dir, "tensorboard")
                self.loggers.append(TensorboardLogger(cfg.get("tensorboard"), log_dir=folder))
            else:
                warnings.warn(
                    "logger.tensorboard_enabled is true and the package tensorboard is not "
                    "installed: metrics go to metrics.jsonl only",
                    stacklevel=2,
                )

    def log_metrics(
        self,
        metrics: dict[str, Any],
        step: int,
        prefix: Optional[str] = "",
        step_metric: Optional[str] = None,
        step_finished: bool = False,
    ) -> None:
        """Log numbers by name.

        Args:
            metrics: Numbers, or tensors of one element.
            step: Number of steps done.
            prefix: Put before every name, with a slash: ``train``, ``validation``.
            step_metric: Not used; NeMo RL needs it for Weights & Biases.
            step_finished: Not used, as above.
        """
        for logger in self.loggers:
            logger.log_metrics(metrics, step, prefix, step_metric, step_finished)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the configuration; also as ``hyperparams.json`` in the log folder."""
        text = json.dumps(params, indent=1, default=str)
        Path(self.base_log_dir, "hyperparams.json").write_text(text + "\n")
        for logger in self.loggers:
            logger.log_hyperparams(params)

    def finish(self) -> None:
        """Close all files."""
        for logger in self.loggers:
            if isinstance(logger, TensorboardLogger):
                logger.writer.close()

    def log_batched_dict_as_jsonl(self, to_log: Any, filename: str) -> None:
        """Write a batch to a JSON Lines file, a row a line, over what was there.

        Args:
            to_log: Keys to lists or tensors of the same length.
            filename: Relative to the log folder.
        """
        columns = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in to_log.items()}
        rows = zip(*columns.values(), strict=True)
        lines = [
            json.dumps(
                {**{k: [v] for k, v in zip(columns, row, strict=True)}, "idx": i}, default=str
            )
            for i, row in enumerate(rows)
        ]
        self._write(filename, lines, "w")

    def log_string_list_as_jsonl(self, to_log: list[str], filename: str) -> None:
        """Append strings, one a line, to a file in the log folder."""
        self._write(filename, to_log, "a")

    def log_histogram(self, histogram: list[Any], step: int, name: str) -> None:
        """Log the distribution of many numbers."""
        for logger in self.loggers:
            logger.log_histogram(histogram, step, name)

    def log_plot(self, figure: Any, step: int, name: str) -> None:
        """Log a Matplotlib figure."""
        for logger in self.loggers:
            logger.log_plot(figure, step, name)

    def _write(self, filename: str, lines: list[str], mode: str) -> None:
        path = Path(self.base_log_dir, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.writelines(line + "\n" for line in lines)


def flatten_dict(d: Mapping[str, Any], sep: str = ".", expand_lists: bool = True) -> dict[str, Any]:
    """Turn a nested dict into one level: ``{"a": {"b": [1]}}`` into ``{"a.b.0": 1}``.

    Args:
        d: The dict.
        sep: Goes between the parts of a key.
        expand_lists: Whether list entries get keys of their own.
    """
    flat: dict[str, Any] = {}

    def add(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                add(inner, f"{key}{sep}{name}" if key else str(name))
        elif expand_lists and isinstance(value, list):
            for index, inner in enumerate(value):
                add(inner, f"{key}{sep}{index}")
        else:
            flat[key] = value

    add(d, "")
    return flat


def get_next_experiment_dir(base_log_dir: str) -> str:
    """Make and return the folder ``exp_001`` below another, or the next number that is free."""
    os.makedirs(base_log_dir, exist_ok=True)
    number = max((number for number, _ in numbered_runs(base_log_dir)), default=0)
    while True:
        number += 1
        folder = os.path.join(base_log_dir, f"exp_{number:03d}")
        try:
            os.mkdir(folder)
        except FileExistsError:  # another run has made it just now
            continue
        return folder
