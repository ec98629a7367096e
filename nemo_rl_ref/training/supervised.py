# SPDX-License-Identifier: Apache-2.0
"""The trainer of SFT, DPO and reward models: training on data that are there before the run.

A `Task` says what the three differ in; `Supervised` is the `nemo_rl_ref.training.loop.Trainer` of
a task, and `fit` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_rl_ref.algorithms.utils import maybe_pad_last_batch, set_seed
from nemo_rl_ref.training.checkpoints import load_checkpoint
from nemo_rl_ref.training.loop import Run, make_trained
from nemo_rl_ref.training.optimizers import make_optimizer, make_scheduler
from nemo_rl_ref.training.processes import make_accelerator
from nemo_rl_ref.training.progress import Timer
from nemo_rl_ref.training.samples import Batches, Samples, digest
from nemo_rl_ref.training.step import run_batch, update, weighted_means
from nemo_rl_ref.utils.checkpoint import CheckpointManager


@dataclass
class Task:
    """What one kind of training on fixed data is.

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
        prepare: Called once, before the model is loaded, with the accelerator, the sets of
            samples, of which those are tokenized that the run uses, and the folder of the
            checkpoints or None.
    """

    section: str
    train: Samples
    validation: dict[str, Samples]
    load_model: Callable[[str | Path], Any]
    loss_fn: Any
    validation_metrics: Mapping[str, str] | None = None
    pairs: bool = True
    prepare: Callable[[Any, list[Samples], Path | None], None] | None = None


class Supervised:
    """The trainer of a `Task`: a `Trainer` for data that are there before the run.

    Args:
        task: What to train.
        config: The whole configuration, resolved, a plain dict.
        tokenizer: The tokenizer.
    """

    counters = ("epoch", "step", "total_steps", "consumed_samples", "total_valid_tokens")

    def __init__(self, task: Task, config: dict[str, Any], tokenizer: Any):
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.name, self.section, self.policy = task.section, config[task.section], config["policy"]
        self.accelerator = make_accelerator(self.policy["precision"])
        self.rows, self.timer = 2 if task.pairs else 1, Timer()
        self.batches = self._check()
        self.digest = digest(task.train.records)
        self.samples, self.samples_per_step = self.batches.samples, self.batches.batch_size
        self.steps = len(self.batches)
        prefixes = [f"validation-{name}_" if task.pairs else "" for name in task.validation]
        logged = task.validation_metrics
        self.metric_names = logged and [p + name for p in prefixes for name in logged.values()]

    def _check(self) -> Batches:
        """Settings that cannot be used are found before anything is loaded."""
        task, name, ranks = self.task, self.task.section, self.accelerator.num_processes

        def integer(tree: Mapping[str, Any], key: str, least: int, default: Any = None) -> int:
            value = tree.get(key.rpartition(".")[2], default)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{key}: got {value!r}, expected an integer from {least} on")
            return value

        batch_size = integer(self.policy, "policy.train_global_batch_size", 1)
        self.micro = integer(self.policy, "policy.train_micro_batch_size", 1)
        self.val_batch = integer(self.section, f"{name}.val_global_batch_size", 1, batch_size)
        self.val_micro = integer(self.section, f"{name}.val_micro_batch_size", 1, self.micro)
        self.val_batches = integer(self.section, f"{name}.val_batches", -1, -1)
        integer(self.section, f"{name}.val_period", -1, 0)
        batches = Batches(
            len(task.train),
            batch_size,
            integer(self.section, f"{name}.seed", 0, 42),
            integer(self.section, f"{name}.max_num_epochs", 1, 1),
            integer(self.section, f"{name}.max_num_steps", -1 if name == "rm" else 1, -1),
            bool(self.config["data"].get("shuffle", True)),
            integer(self.config["data"], "data.num_workers", 0, 1),
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
        # A name or argument that is wrong is found now, on a parameter that stands for all.
        trial = make_optimizer(self.policy["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
        make_scheduler(self.policy.get("scheduler"), trial)
        limit = self.policy.get("max_grad_norm")
        if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
            raise ValueError(f"policy.max_grad_norm: got {limit!r}, expected null or above 0")
        return batches

    def load(self, checkpoint: str | None = None) -> None:
        """Tokenize what the run will use, so that a bad record is found now; load the model."""
        task = self.task
        trained_on = sorted({number for numbers in self.batches for number in numbers})
        self._tokenize("data.train", task.train, trained_on)
        self.validated_on: dict[str, range] = {}
        for name, samples in task.validation.items():
            limit = self.val_batches * self.val_batch if self.val_batches > 0 else len(samples)
            self.validated_on[name] = range(min(limit, len(samples)))
            self._tokenize("data.validation", samples, self.validated_on[name])
        if task.prepare:
            saving = self.config["checkpointing"]
            folder = Path(saving["checkpoint_dir"]) if saving["enabled"] else None
            task.prepare(self.accelerator, [task.train, *task.validation.values()], folder)
        set_seed(self.batches.seed)
        weights, _ = CheckpointManager.get_resume_paths(checkpoint)
        model = task.load_model(weights or self.policy["model_name"])
        if self.accelerator.process_index:  # dropout differs between processes
            torch.manual_seed(self.batches.seed + self.accelerator.process_index)
        self.trained = make_trained(self.accelerator, model, self.policy)
        self.models = {"policy": self.trained}
        if checkpoint:
            load_checkpoint(checkpoint, accelerator=self.accelerator, models=self.models)

    def _tokenize(self, key: str, samples: Samples, numbers: Sequence[int]) -> None:
        """Tokenize, and say once how many samples are too long, not once for each."""
        dropped = samples.tokenize(numbers)
        limit = self.config["data"]["max_input_seq_length"]
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
                max_grad_norm=self.policy.get("max_grad_norm"),
                rows=self.rows,
                place=lambda number: self.task.train.places[numbers[number]],
            )
            self.trained.scheduler.step()
        state["epoch"], state["step"] = divmod(state["total_steps"] + 1, self.batches.per_epoch)
        return metrics

    def is_last(self, state: Mapping[str, Any]) -> bool:
        """See `Trainer`."""
        return state["total_steps"] >= self.steps

    def validations(self, done: int) -> Iterator[tuple[str, dict[str, float]]]:
        """See `Trainer`. Each batch has the weight in a mean that NeMo RL gives it."""
        task, model = self.task, self.trained.model
        model.eval()
        for name, samples in task.validation.items():
            results, numbers = [], self.validated_on[name]
            for low in range(0, len(numbers), self.val_batch):
                batch = samples.batch(numbers[low : low + self.val_batch])
                weight = batch["sample_mask"].sum()
                if not task.pairs:
                    weight = (batch["sample_mask"].unsqueeze(-1) * batch["token_mask"]).sum()
                batch = maybe_pad_last_batch(batch, self.accelerator.num_processes, self.rows)
                size = self.val_micro * self.rows
                metrics = run_batch(
                    model, task.loss_fn, batch, self.accelerator, micro_rows=size, backward=False
                )
                if weight > 0:
                    results.append((weight.item(), metrics))
            yield (
                f"validation-{name}" if task.pairs else "validation",
                weighted_means(results, task.validation_metrics),
            )
        model.train()


def fit(task: Task, config: dict[str, Any], tokenizer: Any, **options: Any) -> dict[str, Any]:
    """Train as a configuration says, from the last checkpoint if there is one.

    Args:
        task: What to train.
        config: The whole configuration, resolved, a plain dict.
        tokenizer: Saved with the checkpoints.
        **options: ``allow_config_changes`` and ``observe`` of `Run`.

    Returns:
        What `Run.train` returns.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used, or none can be written.
        NotFinite: If a loss or gradient is not finite. The message names step, samples and layer.
    """
    return Run(Supervised(task, config, tokenizer), **options).train()
