# SPDX-License-Identifier: Apache-2.0
"""The loop that supervised, preference and reward-model training share.

A `Task` says what differs between them: the data, the model, the loss and the names of the
validation metrics. `fit` does the rest: the order of the data, steps over micro-batches and
processes, validation, logs, checkpoints, and what happens when a number is not finite.

What a step does depends on nothing but the configuration, the files it names and the state in the
last checkpoint. So a run that is killed and started again by the same command goes on with the
same bits, on the same hardware with the same number of processes and threads.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nemo_rl_ref.algorithms.loss.interfaces import LossInputType
from nemo_rl_ref.algorithms.utils import maybe_pad_last_batch, set_seed
from nemo_rl_ref.checkpoints import (
    Trained,
    check_checkpoint,
    check_same_config,
    clear_leftovers,
    get_random_state,
    load_checkpoint,
    save_checkpoint,
    set_random_state,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.divergence import find_origin
from nemo_rl_ref.optimizers import make_optimizer, make_scheduler
from nemo_rl_ref.training import next_token_logprobs, valid_counts
from nemo_rl_ref.utils.checkpoint import CheckpointManager
from nemo_rl_ref.utils.logger import Logger
from nemo_rl_ref.utils.timer import TimeoutChecker

#: What may differ between a checkpoint and the run that resumes from it, below any section.
_MAY_CHANGE = (
    "logger", "cluster", "checkpointing", "data.validation", "data.val_data_paths",
    "data.num_workers", "policy.train_micro_batch_size",
)  # fmt: skip
_SECTION_MAY_CHANGE = (
    "max_num_steps", "max_num_epochs", "val_period", "val_batches", "val_global_batch_size",
    "val_micro_batch_size", "val_at_start", "val_at_end",
)  # fmt: skip

#: The keys of a configuration that `fit` reads; what is below them is read too.
USED_KEYS = (
    "checkpointing.enabled", "checkpointing.checkpoint_dir", "checkpointing.metric_name",
    "checkpointing.higher_is_better", "checkpointing.keep_top_k", "checkpointing.save_period",
    "checkpointing.ft_save_period", "checkpointing.ft_keep_latest_k",
    "checkpointing.checkpoint_must_save_by", "checkpointing.save_optimizer",
    "data.shuffle", "data.train", "data.validation", "data.default", "data.max_input_seq_length",
    "logger.log_dir", "logger.tensorboard_enabled",
    "policy.model_name", "policy.tokenizer.name", "policy.tokenizer.chat_template",
    "policy.tokenizer.chat_template_kwargs", "policy.train_global_batch_size",
    "policy.train_micro_batch_size", "policy.precision", "policy.max_grad_norm",
    "policy.optimizer", "policy.scheduler", "policy.make_sequence_length_divisible_by",
    "policy.max_total_sequence_length", "logger.tensorboard",
)  # fmt: skip


class Samples:
    """Records that are tokenized when they are first used, and batches of them.

    Args:
        records: The records.
        places: Where each comes from, for messages.
        tokenize: Makes a sample of a record and its number.
        collate: Makes a padded batch of samples.
    """

    def __init__(
        self,
        records: Sequence[Any],
        places: Sequence[str],
        tokenize: Callable[[Any, int], dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], BatchedDataDict[Any]],
    ):
        self.records, self.places = records, places
        self._tokenize, self._collate = tokenize, collate
        self._samples: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number not in self._samples:
            self._samples[number] = self._tokenize(self.records[number], number)
        return self._samples[number]

    def batch(self, numbers: Sequence[int]) -> BatchedDataDict[Any]:
        """The padded batch of the samples with these numbers."""
        return self._collate([self[number] for number in numbers])

    def digest(self) -> str:
        """A sum over all records, to notice that a data file has changed."""
        summed = hashlib.sha256()
        for record in self.records:
            summed.update(repr(record).encode())
        return summed.hexdigest()


@dataclass
class Task:
    """What one kind of training is.

    Attributes:
        section: Its section in the configuration: ``sft``, ``dpo`` or ``rm``.
        train: What to train on.
        validation: What to validate on, by name.
        load_model: Loads the model of a name or path.
        loss_fn: The loss, in NeMo RL's protocol.
        validation_metrics: The loss's metrics that validation reports, and what it calls them;
            None for all, under their own names.
        pairs: Whether a sample is a pair, two rows of a batch. Then the validation sets have
            their names in those of the metrics, and every pair has the same weight in a mean, as
            in NeMo RL; otherwise every token.
        prepare: Called once, before the model is loaded, with the accelerator, the numbers of the
            samples that the run trains on, those it validates on by name, and the folder of the
            checkpoints or None.
    """

    section: str
    train: Samples
    validation: dict[str, Samples]
    load_model: Callable[[str | Path], Any]
    loss_fn: Any
    validation_metrics: Mapping[str, str] | None = None
    pairs: bool = True
    prepare: Callable[[Any, list[int], dict[str, range], Path | None], None] | None = None

    @property
    def rows(self) -> int:
        """Rows of a batch that a sample has."""
        return 2 if self.pairs else 1

    def prefix(self, name: str) -> str:
        """The prefix of a validation set's metrics in the logs."""
        return f"validation-{name}" if self.pairs else "validation"

    def key(self, name: str, metric: str) -> str:
        """The name of a validation metric in ``checkpointing.metric_name``, after ``val:``."""
        return f"{self.prefix(name)}_{metric}" if self.pairs else metric


@dataclass(frozen=True)
class Plan:
    """Which samples each step trains on: every epoch a new order, the last part batch left out.

    Attributes:
        samples: Number of samples.
        batch_size: Samples a step.
        max_epochs: Epochs to train.
        max_steps: Steps to train if that is fewer; below 0 for no limit.
        shuffle: Whether to shuffle.
        seed: Seeds the order, together with the epoch.
    """

    samples: int
    batch_size: int
    max_epochs: int
    max_steps: int
    shuffle: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches."""
        return self.samples // self.batch_size

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        most = self.max_epochs * self.steps_per_epoch
        return most if self.max_steps < 0 else min(most, self.max_steps)

    def numbers(self, step: int) -> list[int]:
        """The samples of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.samples, self.seed, epoch) if self.shuffle else range(self.samples)
        return list(order[within * self.batch_size : (within + 1) * self.batch_size])


@lru_cache(maxsize=2)
def _order(samples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(samples, generator=generator).tolist()


class NotFinite(FloatingPointError):
    """The loss or the gradient of a step is not finite. The step was not taken."""


def compute_loss(
    model: Any, loss_fn: Any, data: BatchedDataDict[Any], counts: tuple[Any, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run a model and a loss that takes log-probabilities or the model's output itself.

    Args:
        model: A Hugging Face model with ``logits``.
        loss_fn: A loss with ``input_type`` ``LOGPROB`` or ``LOGIT``.
        data: The (micro-)batch, padded on the right.
        counts: ``global_valid_seqs`` and ``global_valid_toks``.

    Returns:
        The loss, a scalar, and its metrics.

    Raises:
        ValueError: If the loss takes another input.
    """
    if loss_fn.input_type is LossInputType.LOGPROB:
        inputs = {"next_token_logprobs": next_token_logprobs(model, data)}
    elif loss_fn.input_type is LossInputType.LOGIT:
        inputs = {"logits": model(input_ids=data["input_ids"], use_cache=False).logits}
    else:
        raise ValueError(
            f"loss_fn: {type(loss_fn).__name__} takes {loss_fn.input_type}, expected "
            f"{LossInputType.LOGPROB} or {LossInputType.LOGIT}"
        )
    seqs, toks = counts
    return loss_fn(data=data, global_valid_seqs=seqs, global_valid_toks=toks, **inputs)


def global_counts(batch: BatchedDataDict[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``global_valid_seqs`` and ``global_valid_toks``; without a mask, all columns count."""
    if "token_mask" in batch:
        return valid_counts(batch)
    seqs = batch["sample_mask"].sum()
    return seqs, seqs * batch["input_ids"].shape[1]


def run_batch(
    model: Any,
    loss_fn: Any,
    batch: BatchedDataDict[Any],
    accelerator: Any,
    *,
    micro_rows: int,
    backward: bool,
    loss: Callable[..., tuple[torch.Tensor, dict[str, Any]]] = compute_loss,
) -> dict[str, float]:
    """Run a global batch in micro-batches on this process's share of the rows.

    Args:
        model: From ``accelerator.prepare``.
        loss_fn: The loss. It is normalised by the counts of the whole batch, so that the results
            of micro-batches and processes sum to those of the whole.
        batch: The global batch, the same on all processes, its rows a multiple of their number.
        accelerator: The run's ``accelerate.Accelerator``.
        micro_rows: Rows of a forward pass.
        backward: Whether to compute gradients too.
        loss: Runs model and loss on a micro-batch.

    Returns:
        The loss's metrics over the global batch, as NeMo RL combines them (names ending in
        ``_min`` or ``_max`` by minimum and maximum, all others by sums), ``loss`` and the counts.
    """
    from accelerate.utils import gather_object

    batch = batch.to(accelerator.device)
    counts = global_counts(batch)
    ranks, rows = accelerator.num_processes, batch.size // accelerator.num_processes
    start = accelerator.process_index * rows
    results: list[dict[str, float]] = []
    for low in range(start, start + rows, micro_rows):
        high = min(low + micro_rows, start + rows)
        # Gradients travel between processes once, with the last micro-batch.
        alone = backward and ranks > 1 and high < start + rows
        with accelerator.no_sync(model) if alone else nullcontext():
            value, metrics = loss(model, loss_fn, batch.slice(low, high), counts)
            if backward:
                # Data-parallel training averages gradients over processes; these are to be summed.
                accelerator.backward(value * ranks if ranks > 1 else value)
        results.append({**metrics, "loss": value.item()})
    if ranks > 1:
        results = gather_object(results)
    combined = {
        name: _combine(name, [r[name] for r in results if name in r]) for name in results[0]
    }
    seqs, toks = counts
    return {**combined, "global_valid_seqs": seqs.item(), "global_valid_toks": toks.item()}


def _combine(name: str, values: list[Any]) -> float:
    how = min if name.endswith("_min") else max if name.endswith("_max") else sum
    return float(how(float(value) for value in values))


def train_step(
    trained: Trained,
    loss_fn: Any,
    batch: BatchedDataDict[Any],
    accelerator: Any,
    *,
    micro_rows: int,
    max_grad_norm: float | None,
    loss: Callable[..., tuple[torch.Tensor, dict[str, Any]]] = compute_loss,
) -> dict[str, float]:
    """Take one optimizer step on a global batch.

    Args:
        trained: Model, optimizer and scheduler.
        loss_fn: See `run_batch`.
        batch: See `run_batch`.
        accelerator: See `run_batch`.
        micro_rows: See `run_batch`.
        max_grad_norm: A longer gradient is scaled down to this norm; None for no limit.
        loss: See `run_batch`.

    Returns:
        The metrics of `run_batch`, ``grad_norm`` before clipping and ``lr`` of this step.

    Raises:
        NotFinite: If loss or gradient norm are not finite. Model, optimizer and scheduler are as
            they were.
    """
    metrics = run_batch(
        trained.model, loss_fn, batch, accelerator, micro_rows=micro_rows, backward=True, loss=loss
    )
    limit = math.inf if max_grad_norm is None else max_grad_norm
    metrics["grad_norm"] = float(accelerator.clip_grad_norm_(trained.model.parameters(), limit))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        trained.optimizer.zero_grad()
        raise NotFinite(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
    metrics["lr"] = trained.optimizer.param_groups[0]["lr"]
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.scheduler.step()
    return metrics


def make_accelerator(precision: str) -> Any:
    """Make the ``accelerate.Accelerator`` of ``policy.precision``: weights stay float32.

    Raises:
        ValueError: If the precision is not float32 or bfloat16.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    modes = {"float32": "no", "bfloat16": "bf16"}
    if precision not in modes:
        raise ValueError(f"policy.precision: got {precision!r}, expected {' or '.join(modes)}")
    AcceleratorState._reset_state()  # an earlier run in this program may have had another precision
    return Accelerator(mixed_precision=modes[precision], cpu=process_state().device.type == "cpu")


def process_state() -> Any:
    """Which process this is: ``accelerate.PartialState``. Without a GPU several run on the CPU."""
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=forced or (several and not torch.cuda.is_available()))


#: Called by the main process after a step and what follows it: the number of steps done and the
#: metrics, under the names of ``checkpointing.metric_name``: ``train:…`` and ``val:…``. What it
#: raises ends the run.
Observer = Callable[[int, Mapping[str, float]], None]


def observed(metrics: Mapping[str, float], validation: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step as an `Observer` gets them."""
    return {f"train:{name}": value for name, value in metrics.items()} | {
        f"val:{name}": value for name, value in validation.items()
    }


def fit(
    task: Task,
    config: dict[str, Any],
    tokenizer: Any,
    *,
    allow_config_changes: bool = False,
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Train as a configuration says, from the last checkpoint if there is one.

    Args:
        task: What to train.
        config: The whole configuration, resolved, a plain dict.
        tokenizer: Saved with the checkpoints.
        allow_config_changes: Resume although configuration or data have changed.
        observe: Watches the run and can end it.

    Returns:
        The counters at the end, with the metrics of the last step under ``train`` and of the last
        validation under ``validation``.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used, or none can be written.
        FloatingPointError: If a loss or gradient is not finite. The message names step, samples
            and layer.
    """
    run = _Run(task, config, tokenizer, allow_config_changes, observe)
    try:
        return run.train()
    finally:
        run.close()


class _Run:
    """`fit` in parts."""

    def __init__(
        self,
        task: Task,
        config: dict[str, Any],
        tokenizer: Any,
        allow_config_changes: bool,
        observe: Observer | None,
    ):
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.section, self.policy = config[task.section], config["policy"]
        self.saving = config["checkpointing"]
        self.accelerator = make_accelerator(self.policy["precision"])
        self.main = self.accelerator.is_main_process
        self.observe = observe if self.main else None
        self.plan = self._check()
        self.manager = CheckpointManager(self.saving) if self.saving["enabled"] else None
        self.logger: Logger | None = None
        self._check_metric_name()
        self.timeout = TimeoutChecker(self.saving.get("checkpoint_must_save_by"), True)

        if self.manager and self.main:
            clear_leftovers(self.manager.checkpoint_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = self.manager.get_latest_checkpoint_path() if self.manager else None
        names = ("epoch", "step", "total_steps", "consumed_samples", "total_valid_tokens")
        self.state: dict[str, Any] = dict.fromkeys(names, 0)
        self.digest = task.train.digest()
        if checkpoint:
            self._check_resumable(checkpoint, allow_config_changes)
        self._prepare()
        self.trained = self._load(checkpoint)
        if self.main:
            self.logger = Logger(config["logger"])
            self.logger.log_hyperparams(config)
            print(
                f"{task.section}: {self.plan.steps} steps of {self.plan.batch_size} samples out of "
                f"{len(task.train)}, {self.accelerator.num_processes} process(es), "
                f"{self.policy['precision']} on {self.accelerator.device.type}; logs in "
                f"{self.logger.base_log_dir}; "
                + (f"resumed from {checkpoint}" if checkpoint else "from the start")
            )

    # Before any work is done

    def _integer(self, tree: Mapping[str, Any], key: str, least: int, default: int | None) -> int:
        value = tree.get(key.rpartition(".")[2], default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key}: got {value!r}, expected an integer from {least} on")
        return value

    def _check(self) -> Plan:
        task, name, ranks = self.task, self.task.section, self.accelerator.num_processes
        batch_size = self._integer(self.policy, "policy.train_global_batch_size", 1, None)
        self.micro = self._integer(self.policy, "policy.train_micro_batch_size", 1, None)
        self.val_batch = self._integer(self.section, f"{name}.val_global_batch_size", 1, batch_size)
        self.val_micro = self._integer(self.section, f"{name}.val_micro_batch_size", 1, self.micro)
        self.val_batches = self._integer(self.section, f"{name}.val_batches", -1, -1)
        self.val_period = self._integer(self.section, f"{name}.val_period", -1, 0)
        steps = self._integer(self.section, f"{name}.max_num_steps", -1 if name == "rm" else 1, -1)
        plan = Plan(
            len(task.train),
            batch_size,
            self._integer(self.section, f"{name}.max_num_epochs", 1, 1),
            steps,
            bool(self.config["data"].get("shuffle", True)),
            self._integer(self.section, f"{name}.seed", 0, 42),
        )
        if batch_size % ranks:
            raise ValueError(
                f"policy.train_global_batch_size: got {batch_size} with {ranks} processes, "
                "expected a multiple of their number"
            )
        if not plan.steps_per_epoch:
            raise ValueError(
                f"policy.train_global_batch_size: got {batch_size} with {len(task.train)} samples "
                "in data.train, which does not make one batch"
            )
        whole = batch_size // ranks <= self.micro and ranks == 1
        if getattr(task.loss_fn, "needs_whole_batch", False) and not whole:
            raise ValueError(
                f"policy.train_micro_batch_size: {type(task.loss_fn).__name__} couples the samples "
                f"of a batch; set it to policy.train_global_batch_size, {batch_size}, and run one "
                "process"
            )
        # A name or argument that is wrong is found now, on a parameter that stands for all.
        trial = make_optimizer(self.policy["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
        make_scheduler(self.policy.get("scheduler"), trial)
        limit = self.policy.get("max_grad_norm")
        if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
            raise ValueError(f"policy.max_grad_norm: got {limit!r}, expected null or above 0")
        return plan

    def _check_metric_name(self) -> None:
        """A name that will never be there is found before the first step, where it can be."""
        name = self.manager.metric_name if self.manager else None
        if name and name.startswith("val:") and self.task.validation_metrics is not None:
            logged = self.task.validation_metrics.values()
            names = [f"val:{self.task.key(d, m)}" for d in self.task.validation for m in logged]
            if names and name not in names:
                raise ValueError(
                    f"checkpointing.metric_name: got {name!r}, expected one of {', '.join(names)}"
                )

    def _check_resumable(self, checkpoint: str, allow_config_changes: bool) -> None:
        check_checkpoint(checkpoint)
        info = self.manager.load_training_info(checkpoint)
        if not allow_config_changes:
            section = tuple(f"{self.task.section}.{key}" for key in _SECTION_MAY_CHANGE)
            check_same_config(checkpoint, self.config, may_change=(*_MAY_CHANGE, *section))
            if info.get("data_sha256") != self.digest:
                raise ValueError(
                    f"data.train: the data have changed since {checkpoint} was written; put them "
                    "back, set checkpointing.checkpoint_dir to a new folder for a new run, or, to "
                    "go on with the changes, pass --allow-config-changes"
                )
        self.state = {key: info[key] for key in self.state}

    def _prepare(self) -> None:
        """Tokenize what the run will use, so that a bad record is found now."""
        steps = range(self.plan.steps)
        trained_on = sorted({number for step in steps for number in self.plan.numbers(step)})
        self._tokenize("data.train", self.task.train, trained_on)
        validated_on = {}
        for name, samples in self.task.validation.items():
            limit = self.val_batches * self.val_batch if self.val_batches > 0 else len(samples)
            validated_on[name] = range(min(limit, len(samples)))
            self._tokenize("data.validation", samples, validated_on[name])
        self.validated_on = validated_on
        if self.task.prepare:
            folder = self.manager.checkpoint_dir if self.manager else None
            self.task.prepare(self.accelerator, trained_on, validated_on, folder)

    def _tokenize(self, key: str, samples: Samples, numbers: Sequence[int]) -> None:
        """Tokenize, and say once how many samples are too long, not once for each."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"record \d+: \d+ tokens, more than max_seq_length")
            dropped = sum(samples[number]["loss_multiplier"] == 0 for number in numbers)
        limit = self.config["data"]["max_input_seq_length"]
        text = (
            f"{dropped} of {len(numbers)} samples are longer than data.max_input_seq_length={limit}"
        )
        if dropped and dropped == len(numbers):
            raise ValueError(f"{key}: {text}; raise it, there is nothing left to learn from")
        if dropped and self.main:
            print(f"WARNING: {key}: {text} and have no weight")

    def _load(self, checkpoint: str | None) -> Trained:
        set_seed(self.section.get("seed", 42))
        weights, _ = CheckpointManager.get_resume_paths(checkpoint)
        model = self.task.load_model(weights or self.policy["model_name"])
        if self.accelerator.process_index:  # dropout differs between processes
            torch.manual_seed(self.section.get("seed", 42) + self.accelerator.process_index)
        optimizer = make_optimizer(self.policy["optimizer"], model.parameters())
        model, optimizer = self.accelerator.prepare(model, optimizer)
        scheduler = make_scheduler(self.policy.get("scheduler"), optimizer.optimizer)
        trained = Trained(model, optimizer, scheduler)
        if checkpoint:
            load_checkpoint(checkpoint, accelerator=self.accelerator, models={"policy": trained})
        return trained

    # The run itself

    def train(self) -> dict[str, Any]:
        """All steps that are left."""
        result: dict[str, Any] = {"train": {}, "validation": {}}
        done = self.state["total_steps"]
        if done == 0 and self.section.get("val_at_start"):
            result["validation"] = self._validate(0)
            if self.observe:
                self.observe(0, observed({}, result["validation"]))
        self.timeout.start_iterations()
        with Progress(self.task.section, self.plan.steps, done, self.main) as progress:
            while done < self.plan.steps:
                started = time.perf_counter()
                metrics, seconds = self._step(done)
                done += 1
                self._count(done, metrics)
                self._log(metrics, done, "train")
                last = done == self.plan.steps
                validation: dict[str, float] = {}
                if (self.val_period > 0 and done % self.val_period == 0) or (
                    last and self.section.get("val_at_end")
                ):
                    validation = result["validation"] = self._validate(done)
                stop = self._time_is_up()
                if self.manager and (last or stop or self._is_due(done)):
                    now = time.perf_counter()
                    self._save(done, metrics, validation)
                    seconds["checkpointing"] = time.perf_counter() - now
                seconds["total_step_time"] = time.perf_counter() - started
                per_second = metrics["global_valid_toks"] / seconds["total_step_time"]
                per_gpu = per_second / self.accelerator.num_processes
                self._log(
                    {**seconds, "valid_tokens_per_sec_per_gpu": per_gpu}, done, "timing/train"
                )
                progress.show(done, metrics["loss"], per_second)
                if self.observe:
                    self.observe(done, observed(metrics, validation))
                result["train"] = metrics
                if stop:
                    print("checkpointing.checkpoint_must_save_by: saved, and stopped")
                    break
        return {**self.state, **result}

    def close(self) -> None:
        """Close the logs."""
        if self.logger:
            self.logger.finish()

    def _step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        started = time.perf_counter()
        batch = self.task.train.batch(self.plan.numbers(step))
        collated = time.perf_counter()
        random_state = get_random_state()
        try:
            metrics = train_step(
                self.trained,
                self.task.loss_fn,
                batch,
                self.accelerator,
                micro_rows=self.micro * self.task.rows,
                max_grad_norm=self.policy.get("max_grad_norm"),
            )
        except NotFinite as error:
            raise self._not_finite(step, batch, random_state, error) from None
        trained = time.perf_counter()
        return metrics, {
            "data_processing": collated - started,
            "policy_training": trained - collated,
        }

    def _count(self, done: int, metrics: Mapping[str, float]) -> None:
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        self.state.update(
            epoch=epoch,
            step=within,
            total_steps=done,
            consumed_samples=self.state["consumed_samples"] + self.plan.batch_size,
            total_valid_tokens=self.state["total_valid_tokens"] + int(metrics["global_valid_toks"]),
        )

    def _is_due(self, done: int) -> bool:
        periods = (self.saving["save_period"], self.saving.get("ft_save_period"))
        return any(period and done % period == 0 for period in periods)

    def _time_is_up(self) -> bool:
        from accelerate.utils import broadcast_object_list

        self.timeout.mark_iteration()
        up = [self.timeout.check_save()]
        if self.accelerator.num_processes > 1 and self.saving.get("checkpoint_must_save_by"):
            broadcast_object_list(up)  # the clock of one process counts for all
        return up[0]

    def _save(
        self, done: int, metrics: Mapping[str, float], validation: Mapping[str, float], **more: Any
    ) -> Path:
        info = {**self.state, **validation, "data_sha256": self.digest}
        name = self.manager.metric_name
        if name:
            source, _, metric = name.partition(":")
            value = (metrics if source == "train" else validation).get(metric)
            if value is not None:
                info[name] = value
            elif self.main and not more:
                print(
                    f"WARNING: step {done} has no {name}, so its checkpoint is not ranked; let "
                    "checkpointing.save_period be a multiple of val_period"
                )
        return save_checkpoint(
            self.manager,
            done,
            info,
            self.config,
            accelerator=self.accelerator,
            models={"policy": self.trained},
            tokenizer=self.tokenizer,
            **more,
        )

    def _validate(self, done: int) -> dict[str, float]:
        """Metrics over every validation set, each batch with the weight NeMo RL gives it."""
        task, total, keyed = self.task, 0.0, {}
        self.trained.model.eval()
        for name, samples in task.validation.items():
            started = time.perf_counter()
            results, numbers = [], self.validated_on[name]
            for low in range(0, len(numbers), self.val_batch):
                batch = samples.batch(numbers[low : low + self.val_batch])
                weight = batch["sample_mask"].sum()
                if not task.pairs:
                    weight = (batch["sample_mask"].unsqueeze(-1) * batch["token_mask"]).sum()
                batch = maybe_pad_last_batch(batch, self.accelerator.num_processes, task.rows)
                with torch.no_grad():
                    metrics = run_batch(
                        self.trained.model,
                        task.loss_fn,
                        batch,
                        self.accelerator,
                        micro_rows=self.val_micro * task.rows,
                        backward=False,
                    )
                if weight > 0:
                    results.append((weight.item(), metrics))
            metrics = _weighted(results, task.validation_metrics)
            if self.main and not metrics:
                print(f"WARNING: {task.prefix(name)} has no valid sample, so it has no metrics")
            seconds = time.perf_counter() - started
            total += seconds
            self._log(metrics, done, task.prefix(name))
            self._log({"total_validation_time": seconds}, done, f"timing/{task.prefix(name)}")
            keyed.update({task.key(name, metric): value for metric, value in metrics.items()})
        if task.pairs and task.validation:
            self._log({"total_validation_time": total}, done, "timing/validation")
        self.trained.model.train()
        return keyed

    def _log(self, metrics: Mapping[str, float], done: int, prefix: str) -> None:
        if self.logger and metrics:
            self.logger.log_metrics(dict(metrics), done, prefix=prefix)

    def _not_finite(
        self, step: int, batch: Any, random_state: dict[str, Any], error: NotFinite
    ) -> FloatingPointError:
        """Look for the origin, save the state before the step, and say so."""
        from accelerate.utils import broadcast_object_list

        task, numbers = self.task, self.plan.numbers(step)
        found: list[Any] = ["", True]
        if self.main:
            counts = global_counts(batch)
            model = self.accelerator.unwrap_model(self.trained.model)
            set_random_state(random_state)
            origin = find_origin(
                model,
                lambda part: compute_loss(model, task.loss_fn, part, counts)[0],
                batch.to(self.accelerator.device),
                rows=task.rows,
            )
            shown = [task.train.places[numbers[i]] for i in origin.samples[:8]]
            found = [
                f"It starts in {origin.where}"
                + (f", with {len(origin.samples)} of {len(numbers)} samples: " if shown else "")
                + ", ".join(shown),
                origin.model_is_finite,
            ]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        saved = "No checkpoint is written, because checkpointing.enabled is false"
        if self.manager and not found[1]:
            saved = f"The last checkpoint is {self.manager.get_latest_checkpoint_path()}"
        elif self.manager:
            path = self.manager.checkpoint_dir / f"step_{step}"
            if not path.exists():
                self._save(step, {}, {}, random_state=random_state)
            saved = f"The run as it was before the step is in {path}"
        return FloatingPointError(
            f"step {step + 1}: {error}. {found[0]}. The step was not taken. {saved}"
        )


def _weighted(
    results: Sequence[tuple[float, Mapping[str, float]]], names: Mapping[str, str] | None
) -> dict[str, float]:
    """Means of metrics by weight; counts are summed."""
    if not results:
        return {}
    names = {name: name for name in results[0][1]} if names is None else names
    total, combined = sum(weight for weight, _ in results), {}
    for name, shown in names.items():
        values = [metrics[name] for _, metrics in results]
        if name.startswith(("num_", "global_valid_")) or name.endswith(("_min", "_max")):
            combined[shown] = _combine(name, values)
        else:
            parts = (w * value for (w, _), value in zip(results, values, strict=True))
            combined[shown] = sum(parts) / total
    return combined


class Progress:
    """A bar in a terminal, elsewhere a line now and then: step, loss, valid tokens a second."""

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
        text = (
            f"{self.title} step {done}/{self.total}  loss {loss:.4f}  "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.line, completed=done, description=text)
        elif self.enabled and (time.monotonic() - self.shown > 10 or done == self.total):
            self.shown = time.monotonic()
            print(text, flush=True)
