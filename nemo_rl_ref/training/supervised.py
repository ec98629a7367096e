# SPDX-License-Identifier: Apache-2.0
"""The trainer of SFT, DPO and reward models: training on data that are there before the run.

A `Task` says what the three differ in; `Supervised` is the `nemo_rl_ref.training.loop.Trainer` of
a task, and `fit` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nemo_rl_ref.algorithms.utils import maybe_pad_last_batch, set_seed
from nemo_rl_ref.config.sections import RunSettings
from nemo_rl_ref.config.settings import read_settings
from nemo_rl_ref.training.checkpoints import load_checkpoint
from nemo_rl_ref.training.identity import model_digest, tokenizer_digest
from nemo_rl_ref.training.loop import Run, make_trained
from nemo_rl_ref.training.optimizers import check_optimizer
from nemo_rl_ref.training.processes import make_accelerator
from nemo_rl_ref.training.samples import Batches, Samples, digest
from nemo_rl_ref.training.step import run_batch, update, weighted_means
from nemo_rl_ref.utils.checkpoint import CheckpointManager
from nemo_rl_ref.utils.timer import Timer

Settings = TypeVar("Settings", bound=RunSettings)


@dataclass
class Task:
    """What one kind of training on fixed data is.

    Attributes:
        train: What to train on.
        validation: What to validate on, by name.
        load_model: Loads the model of a name or path.
        loss_fn: The loss, in NeMo RL's protocol.
        validation_metrics: The loss's metrics that validation reports, and what it calls them;
            None for all, under their own names.
        pairs: Whether a sample is a pair, two rows of a batch. Then the validation sets have
            their names in those of the metrics, and every pair has the same weight in a mean, as
            in NeMo RL; otherwise every token.
        prepare: Called once, before the model is loaded, with the accelerator, the sets of
            samples, of which those are tokenized that the run uses, and the folder of the
            checkpoints or None.
    """

    train: Samples
    validation: dict[str, Samples]
    load_model: Callable[[str | Path], Any]
    loss_fn: Any
    validation_metrics: Mapping[str, str] | None = None
    pairs: bool = True
    prepare: Callable[[Any, list[Samples], Path | None], None] | None = None


def read_supervised_settings(config: Mapping[str, Any], kind: type[Settings]) -> Settings:
    """Read the settings of a run, and try its optimizer.

    Args:
        config: The whole configuration, resolved, a plain dict.
        kind: `SFTSettings`, `DPOSettings` or `RMSettings` of `nemo_rl_ref.config.sections`.

    Raises:
        ValueError: If a setting cannot be used. The message names the key.
    """
    settings = read_settings(config, kind)
    check_optimizer(settings.policy, "policy")
    return settings


class Supervised:
    """The trainer of a `Task`: a `Trainer` for data that are there before the run.

    Args:
        task: What to train.
        settings: The settings of the run.
        tokenizer: The tokenizer.
        config: The configuration that they were read from.
    """

    counters: tuple[str, ...] = (
        "epoch", "step", "total_steps", "consumed_samples", "total_valid_tokens",
    )  # fmt: skip

    def __init__(
        self, task: Task, settings: RunSettings, tokenizer: Any, config: Mapping[str, Any]
    ):
        self.task, self.tokenizer = task, tokenizer
        self.settings, self.section, self.policy = settings, settings.section, settings.policy
        self.config = config
        self.accelerator = make_accelerator(self.policy.precision)
        self.rows, self.timer = 2 if task.pairs else 1, Timer()
        self.batches = self._check()
        self.loss_fn, self.environment = task.loss_fn, None
        reference = {"reference": model_digest(self.policy.model_name)} if task.prepare else {}
        self.digests: Mapping[str, str] = {
            "data.train": digest(task.train.records),
            "tokenizer": tokenizer_digest(tokenizer),
            **reference,
        }
        self.samples, self.samples_per_step = self.batches.samples, self.batches.batch_size
        self.steps = len(self.batches)
        prefixes = [f"validation-{name}_" if task.pairs else "" for name in task.validation]
        logged = task.validation_metrics
        names = logged and [prefix + name for prefix in prefixes for name in logged.values()]
        self.metric_names: Sequence[str] | None = list(names) if names else None

    def _check(self) -> Batches:
        """Settings that cannot be used are found before anything is loaded."""
        task, ranks, section = self.task, self.accelerator.num_processes, self.section
        batch_size, self.micro = (
            self.policy.train_global_batch_size,
            self.policy.train_micro_batch_size,
        )
        batches = Batches(
            len(task.train),
            batch_size,
            section.seed,
            section.max_num_epochs,
            section.max_num_steps,
            self.settings.data.shuffle,
            self.settings.data.num_workers,
        )
        if batch_size % ranks:
            raise ValueError(
                f"policy.train_global_batch_size: got {batch_size} with {ranks} processes, "
                "expected a multiple of their number"
            )
        if not batches.per_epoch:
            raise ValueError(
                f"policy.train_global_batch_size: got {batch_size} with {len(task.train)} samples "
                "in data.train, which does not make one batch"
            )
        whole = batch_size <= self.micro and ranks == 1
        if getattr(task.loss_fn, "needs_whole_batch", False) and not whole:
            raise ValueError(
                f"policy.train_micro_batch_size: {type(task.loss_fn).__name__} couples the samples "
                f"of a batch; set it to policy.train_global_batch_size, {batch_size}, and run one "
                "process"
            )
        return batches

    def load(self, checkpoint: str | None = None) -> None:
        """Tokenize what the run will use, so that a bad record is found now; load the model."""
        task = self.task
        self._tokenize("data.train", task.train, self.batches.used())
        self.validated_on: dict[str, range] = {}
        for name, samples in task.validation.items():
            batches, size = self.section.val_batches, self.section.val_global_batch_size
            limit = batches * size if batches > 0 else len(samples)
            self.validated_on[name] = range(min(limit, len(samples)))
            self._tokenize("data.validation", samples, self.validated_on[name])
        if task.prepare:
            saving = self.settings.checkpointing
            folder = saving.checkpoint_dir if saving.enabled else None
            task.prepare(self.accelerator, [task.train, *task.validation.values()], folder)
        set_seed(self.batches.seed)
        weights, _ = CheckpointManager.get_resume_paths(checkpoint)
        model = task.load_model(weights or self.policy.model_name)
        if self.accelerator.process_index:  # dropout differs between processes
            torch.manual_seed(self.batches.seed + self.accelerator.process_index)
        self.trained = make_trained(self.accelerator, model, self.policy)
        self.models = {"policy": self.trained}
        if checkpoint:
            load_checkpoint(checkpoint, accelerator=self.accelerator, models=self.models)

    def _tokenize(self, key: str, samples: Samples, numbers: Sequence[int]) -> None:
        """Tokenize, and say once how many samples are too long, not once for each."""
        dropped = samples.tokenize(numbers)
        limit = self.settings.data.max_input_seq_length
        text = (
            f"{dropped} of {len(numbers)} samples are longer than data.max_input_seq_length={limit}"
        )
        if dropped and dropped == len(numbers):
            raise ValueError(f"{key}: {text}; raise it, there is nothing left to learn from")
        if dropped and self.accelerator.is_main_process:
            print(f"WARNING: {key}: {text} and have no weight")

    def next_step(self, state: dict[str, Any]) -> dict[str, float]:
        """See `Trainer`."""
        numbers = self.batches[state["total_steps"]]
        with self.timer.time("data_processing"):
            batch = self.task.train.batch(numbers)
        with self.timer.time("policy_training"):
            metrics = update(
                self.trained.model,
                self.trained.optimizer,
                self.task.loss_fn,
                batch,
                self.accelerator,
                micro_rows=self.micro * self.rows,
                max_grad_norm=self.policy.max_grad_norm,
                rows=self.rows,
                place=lambda number: self.task.train.places[numbers[number]],
            )
            self.trained.scheduler.step()
        # As NeMo RL counts: the epoch is that of the step done, and 0 is its last step.
        state["epoch"] = state["total_steps"] // self.batches.per_epoch
        state["step"] = (state["total_steps"] + 1) % self.batches.per_epoch
        return metrics

    def is_last(self, state: Mapping[str, Any]) -> bool:
        """See `Trainer`."""
        return state["total_steps"] >= self.steps

    def validations(self, done: int) -> Iterator[tuple[str, dict[str, float]]]:
        """See `Trainer`. Each batch has the weight in a mean that NeMo RL gives it."""
        task, model, size = self.task, self.trained.model, self.section.val_global_batch_size
        model.eval()
        for name, samples in task.validation.items():
            results, numbers = [], self.validated_on[name]
            for low in range(0, len(numbers), size):
                batch = samples.batch(numbers[low : low + size])
                weight = batch["sample_mask"].sum()
                if not task.pairs:
                    weight = (batch["sample_mask"].unsqueeze(-1) * batch["token_mask"]).sum()
                batch = maybe_pad_last_batch(batch, self.accelerator.num_processes, self.rows)
                metrics = run_batch(
                    model,
                    task.loss_fn,
                    batch,
                    self.accelerator,
                    micro_rows=self.section.val_micro_batch_size * self.rows,
                    backward=False,
                )
                if weight > 0:
                    results.append((weight.item(), metrics))
            yield (
                f"validation-{name}" if task.pairs else "validation",
                weighted_means(results, task.validation_metrics),
            )
        model.train()


def fit(
    task: Task, settings: RunSettings, tokenizer: Any, config: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Train as settings say, from the last checkpoint if there is one.

    Args:
        task: What to train.
        settings: The settings of the run.
        tokenizer: Saved with the checkpoints.
        config: The configuration that they were read from.
        **options: ``allow_config_changes``, ``observe`` and ``report`` of `Run`.

    Returns:
        What `Run.train` returns.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used, or none can be written.
        NotFinite: If a loss or gradient is not finite. The message names step, samples and layer.
    """
    return Run(Supervised(task, settings, tokenizer, config), **options).train()
