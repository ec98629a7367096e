# SPDX-License-Identifier: Apache-2.0
"""The loop of every run: steps, validations, logs and checkpoints in their order.

`Run` also knows what to do when a number is not finite or the time is up. What a step computes is
a trainer's: `nemo_rl_ref.training.supervised.Supervised` for SFT, DPO and reward models, or
`nemo_rl_ref.rl.trainer.RLTrainer` for GRPO and PPO.

What a step does depends on nothing but the configuration, the files it names and the state in the
last checkpoint. So a run that is killed and started again by the same command goes on with the
same bits, on the same hardware with the same number of processes and threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_rl_ref.config.sections import RunSettings, TrainedConfig
from nemo_rl_ref.files.lock import FolderInUse, FolderLock
from nemo_rl_ref.files.sealed import CheckpointError, check_checkpoint, clear_leftovers
from nemo_rl_ref.training.checkpoints import Trained, save_checkpoint
from nemo_rl_ref.training.identity import RESULTS, changes, effects, refuse, source_of
from nemo_rl_ref.training.optimizers import make_optimizer, make_scheduler
from nemo_rl_ref.training.processes import (
    from_main,
    is_deepspeed,
    prepare_deepspeed,
)
from nemo_rl_ref.training.progress import Progress, in_words, tell
from nemo_rl_ref.training.step import NotFinite
from nemo_rl_ref.utils.checkpoint import CheckpointManager
from nemo_rl_ref.utils.logger import Logger
from nemo_rl_ref.utils.timer import TimeoutChecker, Timer

#: Called by the main process after a step and what follows it: the number of steps done and the
#: metrics, under the names of ``checkpointing.metric_name``: ``train:…`` and ``val:…``. What it
#: raises ends the run.
Observer = Callable[[int, Mapping[str, float]], None]


def observed(metrics: Mapping[str, float], validation: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step as an `Observer` gets them."""
    return {f"train:{name}": value for name, value in metrics.items()} | {
        f"val:{name}": value for name, value in validation.items()
    }


class Trainer(Protocol):
    """What `Run` asks of a trainer. Making one checks the settings and loads the data.

    Attributes:
        settings: The settings of the run.
        config: The configuration that they were read from, to keep with logs and checkpoints.
        accelerator: The run's ``accelerate.Accelerator``.
        tokenizer: Saved with the checkpoints.
        digests: Sums over what is trained on, ``data.train`` and ``tokenizer``.
        loss_fn: The loss.
        environment: A reward of the user's own, or None.
        counters: The names of what a checkpoint counts; among them are ``total_steps``,
            ``consumed_samples`` and ``total_valid_tokens``, which `Run` counts.
        samples: Number of training samples.
        samples_per_step: How many of them a step takes.
        steps: Number of steps of the whole run, at most.
        metric_names: The names of validation metrics; None if they are not known before.
        models: The models by name, the policy first. From `load` on.
        timer: Where a step's time goes.
    """

    settings: RunSettings
    config: Mapping[str, Any]
    accelerator: Any
    tokenizer: Any
    digests: Mapping[str, str]
    loss_fn: Any
    environment: Any
    counters: tuple[str, ...]
    samples: int
    samples_per_step: int
    steps: int
    metric_names: Sequence[str] | None
    models: dict[str, Trained]
    timer: Timer

    def load(self, checkpoint: str | None = None) -> None:
        """Load the models, as they are in a checkpoint if one is given."""

    def next_step(self, state: dict[str, Any]) -> dict[str, float] | None:
        """Take one step from the counters in ``state``, and count what is the trainer's own.

        Returns:
            The metrics; None if the data are used up, and no step was taken.

        Raises:
            NotFinite: If a loss or gradient is not finite.
        """

    def is_last(self, state: Mapping[str, Any]) -> bool:
        """Whether there is no step after those that ``state`` counts."""
        ...

    def validations(self, done: int) -> Iterator[tuple[str, dict[str, float]]]:
        """Validate, and yield prefix and metrics of every validation set."""
        ...


def make_trained(
    accelerator: Any, model: Any, section: TrainedConfig, key: str = "policy"
) -> Trained:
    """Give a model the optimizer and the scheduler of its section, ready to train.

    Args:
        accelerator: The run's ``accelerate.Accelerator``.
        model: The model.
        section: The section that the model is trained by.
        key: The section's name, for messages.
    """
    optimizer = make_optimizer(section.optimizer, model.parameters(), f"{key}.optimizer")
    prepare_deepspeed(accelerator, section, key)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = optimizer.optimizer
    while not isinstance(inner, torch.optim.Optimizer):  # DeepSpeed has its own around PyTorch's
        inner = inner.optimizer
    scheduler = make_scheduler(section.scheduler, inner, f"{key}.scheduler")
    # Accelerate's wrapper scales float16 gradients, which there are none of here, and looks for a
    # package that is not installed on Python's path, twice in every step.
    return Trained(model, optimizer if is_deepspeed(accelerator) else inner, scheduler)


class Run:
    """Steps of a trainer, and what follows them, from the last checkpoint if there is one.

    Args:
        trainer: What is trained.
        allow_config_changes: Resume although configuration or data have changed.
        observe: Watches the run and can end it.
        report: Called by the main process at the end with what the run has come to: ``state``
            (``done``, ``stopped`` or ``nothing to train``), ``step``, ``checkpoint``,
            ``metrics_file``, the last ``train`` and ``validation`` metrics, ``best_validation``
            with the step that it was measured at, and the ``limit`` that ended the run.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        allow_config_changes: bool = False,
        observe: Observer | None = None,
        report: Callable[[dict[str, Any]], Any] | None = None,
    ):
        self.trainer, self.settings = trainer, trainer.settings
        self.name, self.section = self.settings.algorithm, self.settings.section
        # What only GRPO has:
        self.first_validation = getattr(self.section, "val_start_at", -1)
        self.stop_metric = getattr(self.section, "stop_at_validation_metric", None)
        self.stop_threshold = getattr(self.section, "stop_at_validation_threshold", None)
        self.saving = self.settings.checkpointing
        self.main = trainer.accelerator.is_main_process
        self.observe, self.report = observe if self.main else None, report
        self.manager = CheckpointManager(self.saving.model_dump()) if self.saving.enabled else None
        self.logger: Logger | None = None
        self.metrics: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.best: dict[str, Any] | None = None  # the best validation: metric, value, step
        self.metrics_file: str | None = None
        self.log_problem: str | None = None
        self.time_is_up = False
        self._check_names()
        self.timeout = TimeoutChecker(self.saving.checkpoint_must_save_by, True)
        self.lock = self._take_folder()
        try:
            self._start(allow_config_changes)
        except BaseException:
            self._let_go()
            raise

    def _take_folder(self) -> FolderLock | None:
        """Nobody else writes checkpoints there until the run ends."""
        lock, problem = None, None
        if self.manager and self.main:
            try:
                lock = FolderLock(self.manager.checkpoint_dir)
                clear_leftovers(self.manager.checkpoint_dir)
            except FolderInUse as error:
                problem = f"checkpointing.checkpoint_dir: {error}"
            except OSError as error:
                problem = (
                    f"checkpointing.checkpoint_dir: {self.manager.checkpoint_dir} cannot be "
                    f"written to: {error}"
                )
        if problem := from_main(problem):
            raise CheckpointError(problem)
        return lock

    def _let_go(self) -> None:
        if self.lock:
            self.lock.release()

    def _start(self, allow_config_changes: bool) -> None:
        """Find the checkpoint to go on from, and load the models."""
        trainer = self.trainer
        checkpoint = self.manager.get_latest_checkpoint_path() if self.manager else None
        self.state: dict[str, Any] = dict.fromkeys(trainer.counters, 0)
        self.identity = self._identity
        if self.manager and checkpoint:
            self._resume(self.manager, checkpoint, allow_config_changes)
            if self._is_over():
                return
        trainer.load(checkpoint)
        if problem := from_main(self._open_logs() if self.main else None):
            raise ValueError(problem)
        if self.logger:
            print(
                f"{self.name}: {trainer.steps} steps of {trainer.samples_per_step} samples out "
                f"of {trainer.samples}, {trainer.accelerator.num_processes} process(es), "
                f"{self.settings.policy.precision} on {trainer.accelerator.device.type}; "
                f"logs in {self.logger.base_log_dir}; "
                + (f"resumed from {checkpoint}" if checkpoint else "from the start")
            )

    def _open_logs(self) -> str | None:
        """Begin the log files; what is wrong, if they cannot be written."""
        folder = self.settings.logger.log_dir
        try:
            self.logger = Logger(self.settings.logger.model_dump())
            self.logger.log_hyperparams(self.trainer.config)
        except OSError as error:
            return f"logger.log_dir: {folder} cannot be written to: {error}"
        self.metrics_file = str(Path(folder) / "metrics.jsonl")
        return None

    def _check_names(self) -> None:
        """The name of a metric that will never be there is found before the first step."""
        names, prefix = self.trainer.metric_names, "val:"
        ranking = self.manager.metric_name if self.manager else None
        wanted = [(f"{self.name}.stop_at_validation_metric", self.stop_metric, "")]
        if ranking and ranking.startswith(prefix):
            wanted.append(("checkpointing.metric_name", ranking, prefix))
        for key, name, prefix in wanted:
            if name and names and name.removeprefix(prefix) not in names:
                expected = ", ".join(prefix + known for known in names)
                raise ValueError(f"{key}: got {name!r}, expected one of {expected}")

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint of this run is of, besides its configuration."""
        trainer = self.trainer
        found = {"algorithm": self.name, "results": RESULTS, "loss": source_of(trainer.loss_fn)}
        if trainer.environment is not None:
            found["reward"] = source_of(trainer.environment)
        return {**found, **trainer.digests}

    def _resume(
        self, manager: CheckpointManager, checkpoint: str, allow_config_changes: bool
    ) -> None:
        check_checkpoint(checkpoint)
        info = manager.load_training_info(checkpoint) or {}
        found = changes(checkpoint, info.get("identity", {}), self.identity, self.settings)
        if found and not allow_config_changes:
            raise refuse(checkpoint, found)
        if self.main:
            for line in effects(found):
                print(f"WARNING: {line}")
        self.state = {name: info[name] for name in self.state}
        self.best, self.metrics_file = info.get("best_validation"), info.get("metrics_file")
        if self.stop_metric in info:
            self.validation = {self.stop_metric: info[self.stop_metric]}

    def train(self) -> dict[str, Any]:
        """Take all steps that are left.

        Returns:
            The counters at the end, with the metrics of the last step under ``train`` and of the
            last validation under ``validation``.

        Raises:
            CheckpointError: If a checkpoint cannot be written.
            NotFinite: If a loss or gradient is not finite. The message names step, samples and
                layer.
        """
        state = "nothing to train" if self._is_over() else "done"
        try:
            if not self.done and self.section.val_at_start:
                self._validate()
                self._observe({}, self.validation)
            self.timeout.start_iterations()
            with Progress(self.name, self.trainer.steps, self.done, self.main) as progress:
                while not self._is_over() and self._step(progress):
                    pass
            if self.time_is_up and not self._is_over():
                state = "stopped"
            if problem := from_main(self.log_problem):
                raise self._without_logs(problem)
        finally:
            self._let_go()
            if self.logger:
                self.logger.finish()
        if self.main:
            result = self._result(state)
            tell(result)
            if self.report:
                self.report(result)
        trained = self.metrics if state != "nothing to train" else {}
        return {**self.state, "train": trained, "validation": self.validation}

    def _result(self, state: str) -> dict[str, Any]:
        """What the run has come to; see the class."""
        latest = self.manager.get_latest_checkpoint_path() if self.manager else None
        best = self.best
        if best:
            path = self._folder(best["step"]) if self.manager else None
            best = {**best, "checkpoint": str(path) if path and path.exists() else None}
        limit = "max_num_steps" if self.done >= self.section.max_num_steps > 0 else "max_num_epochs"
        value = getattr(self.section, limit)
        if self._has_stopped_early():
            limit, value = "validation", self.stop_threshold
        return {
            "algorithm": self.name, "state": state, "step": self.done, "checkpoint": latest,
            "metrics_file": self.metrics_file, "train": self.metrics,
            "validation": self.validation, "best_validation": best, "limit": limit,
            "limited_to": value,
        }  # fmt: skip

    @property
    def done(self) -> int:
        """Number of steps done."""
        return self.state["total_steps"]

    def _is_over(self) -> bool:
        """Whether all steps are done, or validation has reached what it was to reach."""
        return self._has_stopped_early() or self.trainer.is_last(self.state)

    def _has_stopped_early(self) -> bool:
        if self.stop_metric is None or self.stop_threshold is None:
            return False
        return self.validation.get(self.stop_metric, -math.inf) >= self.stop_threshold

    def _step(self, progress: Progress) -> bool:
        """One step and what follows it; False if the run ends with it."""
        trainer, started = self.trainer, time.perf_counter()
        before = dict(self.state)
        try:
            metrics = trainer.next_step(self.state)
        except NotFinite as error:
            raise self._stopped(error, before) from None
        if metrics is None:  # the prompts ran out in the middle of a step
            if self.manager and not self._folder(self.done).exists():
                self._save(self.metrics, {})
            return False
        tokens = metrics.get("global_valid_toks", 0)
        self.state["total_steps"] += 1
        self.state["consumed_samples"] += trainer.samples_per_step
        self.state["total_valid_tokens"] += tokens  # a mean over the updates of a step
        self.metrics, validation = metrics, {}
        self._log(metrics, "train")
        self._check_ranking(metrics)
        last = trainer.is_last(self.state)
        period = self.section.val_period
        due = period > 0 and self.done % period == 0
        due = due and self.done >= self.first_validation
        if due or (last and self.section.val_at_end):
            validation = self._validate()
        failed = from_main(self.log_problem)
        stop = self._time_is_up()
        periods = (self.saving.save_period, self.saving.ft_save_period)
        due = any(period and self.done % period == 0 for period in periods)
        if self.manager and (due or last or stop or failed or self._is_over()):
            with trainer.timer.time("checkpointing"):
                self._save(metrics, validation)
        if failed:
            raise self._without_logs(failed)
        spent = trainer.timer.get_timing_metrics("sum")
        trainer.timer.reset()
        seconds = {**spent, "total_step_time": time.perf_counter() - started}
        per_second = tokens / seconds["total_step_time"]
        per_gpu = per_second / trainer.accelerator.num_processes
        self._log({**seconds, "valid_tokens_per_sec_per_gpu": per_gpu}, "timing/train")
        progress.show(self.done, metrics, per_second)
        self._observe(metrics, validation)
        if stop and self.main:
            print("checkpointing.checkpoint_must_save_by: the time is up")
        self.time_is_up = stop
        return not stop

    def _validate(self) -> dict[str, float]:
        """Metrics of all validation sets, under the names of ``checkpointing.metric_name``."""
        # What validation takes is not the step's.
        steps_timer, self.trainer.timer, prefix = self.trainer.timer, Timer(), "validation"
        self.validation = {}
        began = started = time.perf_counter()
        for prefix, metrics in self.trainer.validations(self.done):
            if self.main and not metrics:
                print(f"WARNING: {prefix} has no valid sample, so it has no metrics")
            self._log(metrics, prefix)
            if self.main and metrics:
                at = f"{self.name} step {self.done}/{self.trainer.steps}"
                print(f"{at}  {prefix}: {in_words(metrics)}", flush=True)
            now = time.perf_counter()
            self._log({"total_validation_time": now - started}, f"timing/{prefix}")
            started, alone = now, prefix == "validation"
            for name, value in metrics.items():
                self.validation[name if alone else f"{prefix}_{name}"] = value
        if prefix != "validation":
            self._log({"total_validation_time": started - began}, "timing/validation")
        self.trainer.timer = steps_timer
        self._note_best()
        return self.validation

    def _note_best(self) -> None:
        """Keep the validation that is best by ``checkpointing.metric_name``, and its step."""
        where, _, name = (self.saving.metric_name or "").partition(":")
        value = self.validation.get(name)
        if where != "val" or value is None or value != value:
            return
        old, sign = self.best, 1 if self.saving.higher_is_better else -1
        if not old or old["metric"] != name or sign * value > sign * old["value"]:
            self.best = {"metric": name, "value": value, "step": self.done}

    def _time_is_up(self) -> bool:
        self.timeout.mark_iteration()
        up = self.timeout.check_save()
        # The clock of one process counts for all.
        return from_main(up) if self.saving.checkpoint_must_save_by else up

    def _check_ranking(self, metrics: Mapping[str, float]) -> None:
        where, _, name = ((self.manager and self.manager.metric_name) or "").partition(":")
        if where == "train" and name not in metrics:
            raise ValueError(
                f"checkpointing.metric_name: got 'train:{name}', expected 'train:' and one of "
                f"{', '.join(sorted(metrics))}"
            )

    def _folder(self, step: int) -> Path:
        assert self.manager
        return self.manager.checkpoint_dir / f"step_{step}"

    def _save(
        self, metrics: Mapping[str, float], validation: Mapping[str, float], **more: Any
    ) -> None:
        assert self.manager
        info = {**self.state, **validation, "identity": self.identity}
        info |= {"metrics_file": self.metrics_file, "best_validation": self.best}
        if "accuracy" in validation:
            info["val_reward"] = validation["accuracy"]  # as NeMo RL's GRPO calls it
        name = self.manager.metric_name
        if name:
            source, _, metric = name.partition(":")
            value = (metrics if source == "train" else validation).get(metric)
            if value is not None:
                info[name] = value
            elif self.main and not more:
                print(
                    f"WARNING: step {self.done} has no {name}, so its checkpoint is not ranked; "
                    "let checkpointing.save_period be a multiple of val_period"
                )
        save_checkpoint(
            self.manager,
            self.done,
            info,
            self.trainer.config,
            accelerator=self.trainer.accelerator,
            models=self.trainer.models,
            tokenizer=self.trainer.tokenizer,
            **more,
        )

    def _stopped(self, error: NotFinite, before: dict[str, Any]) -> NotFinite:
        """Save the run as it was before a step that went wrong, and say where it is."""
        self.state = before
        saved = "No checkpoint is written, because checkpointing.enabled is false"
        if self.manager and not error.model_is_whole:
            saved = f"The last checkpoint is {self.manager.get_latest_checkpoint_path()}"
        elif self.manager:
            if not self._folder(self.done).exists():
                self._save({}, {}, random_state=error.random_state)
            saved = f"The run as it was before the step is in {self._folder(self.done)}"
        return NotFinite(f"step {self.done + 1}: {error}. The step was not taken. {saved}")

    def _observe(self, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        if self.observe:
            self.observe(self.done, observed(metrics, validation))

    def _log(self, metrics: Mapping[str, float], prefix: str) -> None:
        if self.logger and metrics and not self.log_problem:
            try:
                self.logger.log_metrics(dict(metrics), self.done, prefix=prefix)
            except OSError as error:  # the run is saved first, by all processes together
                self.log_problem = f"{self.logger.base_log_dir}: cannot be written to: {error}"

    def _without_logs(self, problem: str) -> OSError:
        """The error that ends a run whose logs cannot be written any more."""
        latest = self.manager.get_latest_checkpoint_path() if self.manager else None
        saved = f"The last checkpoint is {latest}" if latest else "Nothing is saved"
        return OSError(f"logger.log_dir: {problem}. Step {self.done} is done. {saved}")
