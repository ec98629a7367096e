# SPDX-License-Identifier: Apache-2.0
"""One trial of a search: a training with some values of a configuration replaced.

A *runner* is a function with the signature of `run_trial`. This one trains in the process that
calls it, as ``python -m nemo_rl_ref.run_dpo`` and the others do.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.tune.space import overrides
from nemo_rl_ref.tune.trainers import runner_of

if TYPE_CHECKING:
    from nemo_rl_ref.tune.spec import Spec

#: Called with the number of steps done and their metrics; what it raises ends the run.
Observe = Callable[[int, Mapping[str, float]], None]
#: Runs one trial: `run_trial`, or a function with its signature.
Runner = Callable[..., dict[str, float]]


class Ages:
    """Notes at which step of a run each metric was measured last; an observer.

    Attributes:
        step: The last step of the run so far.
        measured: By metric, the step of its last value.
    """

    def __init__(self) -> None:
        self.step = 0
        self.measured: dict[str, int] = {}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note what was measured after so many steps."""
        self.step = step
        self.measured.update(dict.fromkeys(metrics, step))

    def problem(self, metric: str) -> str:
        """Say why a metric's last value does not tell what the run came to; empty if it does."""
        step = self.measured.get(metric)
        if step is None or 0 < step == self.step:
            return ""
        where = f"at step {step}" if step else "before the first step"
        return f"{metric} was last measured {where}, and the run ended with step {self.step}"


class TrialFailed(Exception):
    """A trial that has no result, and why.

    Attributes:
        reason: One line: ``out of memory``, ``step 12: loss nan, gradient norm nan``.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def run_trial(
    spec: Spec,
    values: Mapping[str, Any],
    folder: str | Path,
    *,
    seed: int | None = None,
    observe: Observe | None = None,
) -> dict[str, float]:
    """Train once, in this process.

    Args:
        spec: The search.
        values: The values of this trial by key.
        folder: Where its logs go, and ``output.txt`` with what it prints.
        seed: The seed of the training; None for the configuration's.
        observe: Called after steps with the metrics, ``train:…`` and ``val:…``.

    Returns:
        The last value of every metric, by name.

    Raises:
        TrialFailed: If the training fails, with the reason; the traceback is in ``output.txt``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    from_observe: list[BaseException] = []

    def watch(step: int, found: Mapping[str, float]) -> None:
        metrics.update(found)
        if observe is not None:
            try:
                observe(step, found)
            except BaseException as error:
                from_observe.append(error)
                raise

    output = (folder / "output.txt").open("w", encoding="utf-8")
    with output, redirect_stdout(output), redirect_stderr(output):
        try:
            config = trial_config(spec, values, folder, seed)
            runner_of(spec.algorithm).train(config, observe=watch, **spec.options)
        except Exception as error:
            if error in from_observe:
                raise
            traceback.print_exc()
            failed = TrialFailed(reason_of(error))
        else:
            return metrics
    gc.collect()  # what the traceback held
    raise failed


def trial_config(
    spec: Spec, values: Mapping[str, Any], folder: Path, seed: int | None
) -> dict[str, Any]:
    """Read the configuration of a trial: values set, logs in the folder, no checkpoints."""
    runner = runner_of(spec.algorithm)
    ours = {"logger.log_dir": str(folder), **settings_of_search(spec, seed)}
    lines = [*spec.overrides, *overrides(values), *overrides(ours)]
    config, _ = read_config(spec.config, lines, runner.used, not_here=runner.not_here)
    return config


def settings_of_search(spec: Spec, seed: int | None) -> dict[str, Any]:
    """What a search sets in every trial, besides its values: above all, what it judges by is new.

    A ``val:`` objective is measured at the last step, whatever the period of validation.
    """
    found: dict[str, Any] = {"checkpointing.enabled": False}
    if spec.validates_at_end:
        found[f"{spec.algorithm}.val_at_end"] = True
    if seed is not None:
        found[f"{spec.algorithm}.seed"] = seed
    return found


def reason_of(error: BaseException) -> str:
    """Say why a training failed, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search(
        r"out of memory|not enough memory|can't allocate|cannot allocate", text, re.IGNORECASE
    ):
        return "out of memory"
    if isinstance(error, FloatingPointError):  # "step 12: loss nan, gradient norm nan. It starts …"
        return re.split(r"[.;] ", text)[0]
    return f"{type(error).__name__}: {text}"[:300]


def cause_of(reason: str) -> str:
    """Take the numbers out of a reason: what two failures of the same cause have in common."""
    return re.sub(
        r"[-+]?(?:\d[\d_.]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b)", "#", reason, flags=re.IGNORECASE
    )
