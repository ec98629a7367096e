# SPDX-License-Identifier: Apache-2.0
"""GRPO and PPO on one machine, with NeMo RL's configuration files.

    python -m nemo_rl_ref.run_grpo --config configs/grpo_tiny.yaml grpo.max_num_steps=50
    python -m nemo_rl_ref.run_grpo --config configs/ppo.yaml --env my_file.py:reward
    accelerate launch --num_processes 2 -m nemo_rl_ref.run_grpo --config configs/grpo_tiny.yaml

A configuration with a section ``ppo`` is trained with PPO, one with ``grpo`` with GRPO. One step:

1. sample ``num_generations_per_prompt`` responses to each of ``num_prompts_per_step`` prompts
   and score them (:mod:`nemo_rl_ref.rollouts`, :mod:`nemo_rl_ref.environments`);
2. scale and shape the rewards, drop groups that teach nothing, turn rewards into advantages;
3. update the policy once for every ``train_global_batch_size`` responses (PPO: ``ppo_epochs``
   times over, the value model before the policy).

Every process has the whole batch of rollouts, samples its share of the prompts and trains on its
share of the rows. Random numbers come from the seed and the number of the step, not from a
generator that runs on, so that a resumed run draws what the interrupted one would have drawn.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_rl_ref.algorithms.advantage_estimator import (
    GeneralizedAdvantageEstimator,
    OPDAdvantageEstimator,
)
from nemo_rl_ref.algorithms.grpo import (
    compute_and_apply_seq_logprob_error_masking,
    dynamic_sampling,
    scale_rewards,
)
from nemo_rl_ref.algorithms.logits_sampling_utils import need_top_k_or_top_p_filtering
from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossFn,
    MseValueLossConfig,
    MseValueLossFn,
)
from nemo_rl_ref.algorithms.reward_functions import apply_reward_shaping
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    get_tokenizer,
    mask_out_neg_inf_logprobs,
    set_seed,
)
from nemo_rl_ref.checkpoints import (
    Trained,
    check_checkpoint,
    check_same_config,
    clear_leftovers,
    load_checkpoint,
    save_checkpoint,
)
from nemo_rl_ref.command_line import run
from nemo_rl_ref.decoding import left_pad, response_logprobs
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.divergence import Origin, find_origin
from nemo_rl_ref.environments import Environment
from nemo_rl_ref.optimizers import make_optimizer, make_scheduler
from nemo_rl_ref.rl_settings import (
    NOT_HERE_IN_RL,
    USED_KEYS,
    make_estimator,
    read_settings,
    sampling_params,
    section_name,
    teacher_name,
    updates_per_step,
    uses_validation,
)
from nemo_rl_ref.rollouts import Prompt, load_prompts, prompt_batches, roll_out
from nemo_rl_ref.tiny import load_policy
from nemo_rl_ref.trainer import USED_KEYS as EVERY_TRAINERS_KEYS
from nemo_rl_ref.trainer import (
    NotFinite,
    Observer,
    Progress,
    make_accelerator,
    observed,
    run_batch,
)
from nemo_rl_ref.training import valid_counts
from nemo_rl_ref.user_code import checked_loss, load_object
from nemo_rl_ref.utils.checkpoint import CheckpointManager
from nemo_rl_ref.utils.logger import Logger
from nemo_rl_ref.value_model import load_value_model, token_values

Batch = BatchedDataDict[Any]
AVERAGED = ("lr", "global_valid_seqs", "global_valid_toks")  # over updates; others are added up


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


class Trainer:
    """The models of a run, and what one step does to them.

    Args:
        config: The configuration, a plain dict with all interpolations resolved.
        environment: Scores all responses; if not given, that of each dataset's ``env_name``.
        loss_fn: The loss; NeMo RL's `ClippedPGLossFn` if not given.
        checkpoint: Folder of the checkpoint to resume from.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        environment: Environment | None = None,
        loss_fn: Any = None,
        checkpoint: str | None = None,
    ):
        policy = self.policy_config = config["policy"]
        self.config = config
        self.accelerator = make_accelerator(policy["precision"])
        self.cfg = cfg = read_settings(config, self.accelerator.num_processes)
        self.is_ppo = section_name(config) == "ppo"
        self.updates = updates_per_step(config, cfg)
        self.loss_config = ClippedPGLossConfig(**config["loss_fn"])
        self.loss_fn = loss_fn or ClippedPGLossFn(self.loss_config)
        self.estimator = make_estimator(config, cfg)
        self.tokenizer = get_tokenizer(policy["tokenizer"])
        self.train_prompts, self.val_prompts = load_prompts(
            config["data"], self.tokenizer, environment
        )
        self.sampling = sampling_params(policy["generation"])
        self.val_sampling = sampling_params(policy["generation"], "val_")
        self.filters = need_top_k_or_top_p_filtering(self.sampling)
        self.timer = Timer()

        set_seed(cfg.seed)
        weights, _ = CheckpointManager.get_resume_paths(checkpoint)
        model = load_policy(weights or policy["model_name"])
        self.has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
        self.policy = self._trained(model, policy, "policy")
        self.models = {"policy": self.policy}
        self.reference = self.teacher = self.value_loss_fn = None
        if self.loss_config.reference_policy_kl_penalty:
            self.reference = self._frozen(policy["model_name"])
        if isinstance(self.estimator, OPDAdvantageEstimator):
            self.teacher = self._frozen(teacher_name(config))
        if isinstance(self.estimator, GeneralizedAdvantageEstimator):
            weights, _ = CheckpointManager.get_resume_paths(checkpoint, model_component="value")
            model = load_value_model(weights or config["value"]["model_name"])
            self.models["value"] = self._trained(model, config["value"], "value")
            self.value_loss_fn = MseValueLossFn(MseValueLossConfig(**config["value_loss_fn"]))
        if checkpoint:
            load_checkpoint(checkpoint, accelerator=self.accelerator, models=self.models)

    def _trained(self, model: Any, section: Mapping[str, Any], key: str) -> Trained:
        optimizer = make_optimizer(section["optimizer"], model.parameters(), f"{key}.optimizer")
        model, optimizer = self.accelerator.prepare(model, optimizer)
        scheduler = section.get("scheduler")
        return Trained(
            model, optimizer, make_scheduler(scheduler, optimizer.optimizer, f"{key}.scheduler")
        )

    def _frozen(self, name: str) -> Any:
        return load_policy(name).eval().requires_grad_(False).to(self.accelerator.device)

    def step(self, batches: Iterator[list[Prompt]], number: int) -> dict[str, Any] | None:
        """Rollouts, advantages, updates.

        Args:
            batches: The prompts of the next batches of rollouts.
            number: Steps done before.

        Returns:
            NeMo RL's training metrics; None if the prompts ran out before the step was full.
        """
        cfg, cache, complete, tried = self.cfg, None, False, 0
        while not complete:
            prompts = next(batches, None)
            if prompts is None:
                return None
            tried += 1
            batch, rollout_metrics = self._roll_out(
                prompts, cfg.num_generations_per_prompt, self.sampling, (number, tried)
            )
            with self.timer.time("reward_calculation"):
                batch = scale_rewards(batch, cfg.reward_scaling)
                batch = apply_reward_shaping(batch, cfg.reward_shaping)
                raw = batch.get("unshaped_total_reward") if cfg.use_dynamic_sampling else None
                baseline, std = calculate_baseline_and_std_per_prompt(
                    left_pad(batch["input_ids"], batch["length"])[0],
                    batch["total_reward"],
                    torch.ones_like(batch["total_reward"]),
                    leave_one_out_baseline=getattr(cfg, "use_leave_one_out_baseline", True),
                    std_rewards=raw,
                )
            batch, complete, cache, sampled = dynamic_sampling(
                batch, std, baseline, tried, SimpleNamespace(grpo=cfg), self.timer, cache
            )
        if cfg.use_dynamic_sampling:
            sampled["dynamic_sampling_num_gen_batches"] = tried
            sampled["filtered_reward"] = batch["filtered_reward"].mean().item()
        data, metrics = self.training_data(batch)
        for _ in range(getattr(cfg, "ppo_epochs", 1)):
            if self.value_loss_fn is not None:
                with self.timer.time("value_training"):
                    metrics.update(self.update_value(data))
            if number >= getattr(cfg, "policy_training_start_step", 0):
                with self.timer.time("policy_training"):
                    metrics.update(self.update_policy(data))
        if not self._prev_logprobs_first and not self.loss_config.force_on_policy_ratio:
            metrics.update(_seq_errors(data, batch["total_reward"], None))
        zeros, ones = ((batch["baseline"] == b).float().mean().item() * 100 for b in (0, 1))
        return {
            **metrics,
            **sampled,
            **rollout_metrics,
            "reward": batch["total_reward"].mean().item(),
            "mean_prompt_length": batch["length"].float().mean().item(),
            "total_num_tokens": batch["input_lengths"].sum().item(),
            "baseline_reward/pct_0": zeros,
            "baseline_reward/pct_1": ones,
            "baseline_reward/pct_mixed": 100 - zeros - ones,
        }

    def _roll_out(
        self, prompts: list[Prompt], copies: int, sampling: Any, number: tuple[int, ...]
    ) -> tuple[Batch, dict[str, float]]:
        seed = self.cfg.seed
        for part in number:
            seed = (seed * 1_000_003 + part) % (1 << 62)
        with self.timer.time("generation"):
            return roll_out(
                self.accelerator.unwrap_model(self.policy.model),
                self.tokenizer,
                prompts,
                self.policy_config,
                sampling,
                copies=copies,
                seed=seed,
                accelerator=self.accelerator,
            )

    def training_data(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Log-probabilities, values and advantages of a batch of rollouts.

        Args:
            batch: From `roll_out`, through `dynamic_sampling`.

        Returns:
            What the losses read, and metrics.

        Raises:
            ValueError: If no response counts in the loss.
        """
        cfg = self.cfg
        rewards = batch["filtered_reward" if cfg.use_dynamic_sampling else "total_reward"]
        columns = torch.arange(batch["input_ids"].shape[1], device=rewards.device)
        starts, stops = batch["length"].unsqueeze(1), batch["input_lengths"].unsqueeze(1)
        weight = batch["loss_multiplier"]
        data: Batch = BatchedDataDict(
            {
                "input_ids": batch["input_ids"],
                "input_lengths": batch["input_lengths"],
                "prompt_lengths": batch["length"],
                "generation_logprobs": batch["generation_logprobs"],
                "token_mask": ((columns >= starts) & (columns < stops)).long(),
                "sample_mask": (
                    weight.masked_fill(batch["truncated"], 0) if cfg.overlong_filtering else weight
                ),
                **({"rewards": rewards} if self.is_ppo else {}),
            }
        )
        if self.value_loss_fn is not None:
            with self.timer.time("value_inference"):
                data["values"] = self._by_share(token_values, self.models["value"].model, data)
        metrics: dict[str, float] = {}
        with self.timer.time("policy_and_reference_logprobs"):
            if self.reference is not None:
                data["reference_policy_logprobs"] = self._by_share(
                    self._unfiltered, self.reference, data
                )
            if self.teacher is not None:
                data["teacher_logprobs"] = self._by_share(self._unfiltered, self.teacher, data)
            if self._prev_logprobs_first:
                data["prev_logprobs"] = self._by_share(self._logprobs, self.policy.model, data)
                metrics = _seq_errors(data, rewards, cfg.seq_logprob_error_threshold)
        mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
        if not mask.any():
            raise ValueError(
                "no response counts in the loss: all prompts are longer than "
                "data.max_input_seq_length, or overlong_filtering or seq_logprob_error_threshold "
                "leave none"
            )
        with self.timer.time("advantage_calculation"):
            reference, prev = data.get("reference_policy_logprobs"), data.get("prev_logprobs")
            result = self.estimator.compute_advantage(
                prompt_ids=left_pad(batch["input_ids"], batch["length"])[0],
                rewards=rewards,
                mask=mask,
                repeated_batch=batch,
                # One quantity under the names of several estimators.
                **dict.fromkeys(("logprobs", "logprobs_policy", "prev_logprobs"), prev),
                **dict.fromkeys(("reference_logprobs", "logprobs_reference"), reference),
                **{name: data[name] for name in ("teacher_logprobs", "values") if name in data},
            )
        advantages, returns = result if isinstance(result, tuple) else (result, None)
        if returns is not None:
            data["returns"] = returns
        low, high = (getattr(cfg, f"advantage_clip_{end}", None) for end in ("low", "high"))
        if low is not None or high is not None:
            advantages = advantages.clamp(low, high)
        data["advantages"] = advantages
        shown = advantages[(mask if self.is_ppo else data["token_mask"]).bool()]
        metrics.update(getattr(self.estimator, "last_metrics", {}))
        ends = {end: getattr(shown, end)().item() for end in ("mean", "max", "min")}
        return data, {**metrics, **{f"advantages/{end}": value for end, value in ends.items()}}

    @property
    def _prev_logprobs_first(self) -> bool:
        """Whether the policy has to be run before its update to know log π_old.

        If a step makes one update, that update computes it anyway: then it is taken from there,
        unless the advantages or the masks depend on it.
        """
        needed = self.loss_config.use_kl_in_reward and self.reference is not None
        needed |= self.teacher is not None or self.cfg.seq_logprob_error_threshold is not None
        several = self.updates > 1 or self.has_dropout
        return needed or (several and not self.loss_config.force_on_policy_ratio)

    def _logprobs(self, model: Any, data: Batch) -> Tensor:
        """Log π of the policy, (B, S), column t for token t."""
        logprobs = response_logprobs(model, data, self.sampling)
        if self.filters:
            mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
            logprobs = mask_out_neg_inf_logprobs(logprobs, mask[:, 1:], "logprobs")
        return pad(logprobs, (1, 0))

    def _unfiltered(self, model: Any, data: Batch) -> Tensor:
        """Log π without top-k and top-p, (B, S), column t for token t."""
        return pad(response_logprobs(model, data, self.sampling, filtered=False), (1, 0))

    @torch.no_grad()
    def _by_share(self, function: Callable[..., Tensor], model: Any, data: Batch) -> Tensor:
        """Apply a function to this process's rows in batches, and gather those of all."""
        rows = data.size // self.accelerator.num_processes
        first = self.accelerator.process_index * rows
        size = self.policy_config.get("logprob_batch_size") or rows
        model.eval()
        parts = [
            function(model, data.slice(low, min(low + size, first + rows)))
            for low in range(first, first + rows, size)
        ]
        model.train()
        return self.accelerator.gather(torch.cat(parts))

    def _update(
        self, trained: Trained, section: Mapping[str, Any], data: Batch, loss: Callable[..., Any]
    ) -> dict[str, float]:
        """One optimizer step for every ``train_global_batch_size`` rows, then the scheduler's.

        Returns:
            The loss's metrics, over updates as NeMo RL adds them up; ``grad_norm`` is the last
            update's, before clipping.

        Raises:
            NotFinite: If a loss or gradient is not finite. That update is not made.
        """
        metrics: dict[str, list[float]] = {}
        limit = section.get("max_grad_norm") or math.inf
        for low in range(0, data.size, section["train_global_batch_size"]):
            batch = data.slice(low, low + section["train_global_batch_size"])
            found = run_batch(
                trained.model,
                None,
                batch,
                self.accelerator,
                micro_rows=section["train_micro_batch_size"],
                backward=True,
                loss=loss,
            )
            norm = float(self.accelerator.clip_grad_norm_(trained.model.parameters(), limit))
            if not (math.isfinite(norm) and math.isfinite(found["loss"])):
                trained.optimizer.zero_grad()
                origin = self._origin(trained, batch, loss)
                error = NotFinite(
                    f"loss {found['loss']}, gradient norm {norm}; it starts in {origin.where}, "
                    f"responses {origin.samples[:8]} of rows {low} to {low + batch.size - 1}"
                )
                error.model_is_finite = origin.model_is_finite
                raise error
            found["lr"] = trained.optimizer.param_groups[0]["lr"]
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            for name, value in found.items():
                metrics.setdefault(name, []).append(value)
        trained.scheduler.step()
        return {**{name: _over_updates(name, v) for name, v in metrics.items()}, "grad_norm": norm}

    def _origin(self, trained: Trained, batch: Batch, loss: Callable[..., Any]) -> Origin:
        model, counts = self.accelerator.unwrap_model(trained.model), valid_counts(batch)
        return find_origin(model, lambda part: loss(model, None, part, counts)[0], batch, rows=1)

    def update_policy(self, data: Batch) -> dict[str, float]:
        """Train the policy on a batch of rollouts once.

        Args:
            data: From `training_data`. Gets ``prev_logprobs`` if it has none.
        """
        seen: list[Tensor] = []

        def loss(model: Any, _: Any, part: Batch, counts: tuple[Tensor, Tensor]) -> Any:
            logprobs = self._logprobs(model, part)
            if self.filters and self.reference is not None:
                part["curr_logprobs_unfiltered"] = self._unfiltered(model, part)[:, 1:]
            if "prev_logprobs" not in part:
                part["prev_logprobs"] = logprobs.detach()
                seen.append(part["prev_logprobs"])
            seqs, toks = counts
            return self.loss_fn(
                next_token_logprobs=logprobs[:, 1:],
                data=part,
                global_valid_seqs=seqs,
                global_valid_toks=toks,
            )

        metrics = self._update(self.policy, self.policy_config, data, loss)
        if seen:
            data["prev_logprobs"] = self.accelerator.gather(torch.cat(seen))
        return metrics

    def update_value(self, data: Batch) -> dict[str, float]:
        """Train the value model on a batch of rollouts once.

        Returns:
            Metrics under ``critic/``, with the explained variance of the returns.
        """

        def loss(model: Any, _: Any, part: Batch, counts: tuple[Tensor, Tensor]) -> Any:
            seqs, toks = counts
            return self.value_loss_fn(
                logits=token_values(model, part),
                data=part,
                global_valid_seqs=seqs,
                global_valid_toks=toks,
            )

        section = self.config["value"]
        found = self._update(self.models["value"], section, data, loss)
        names = ("returns_mean", "values_mean", "returns_sq_mean", "residual_sq_mean")
        returns, values, returns_sq, residual_sq = (
            found[name] * section["train_global_batch_size"] / data.size for name in names
        )
        residual = residual_sq - (returns - values) ** 2
        found["explained_var"] = 1.0 - residual / max(returns_sq - returns**2, 1e-8)
        return {f"critic/{name}": value for name, value in found.items()}

    def validate(self, number: int) -> dict[str, float]:
        """Mean reward of responses to the validation prompts, as the environment gives it.

        Args:
            number: Steps done.

        Returns:
            ``accuracy``, ``avg_length`` in tokens, and with several responses a prompt ``pass_k``,
            the share of prompts with a positive reward among theirs.
        """
        cfg, rewards, lengths = self.cfg, [], []
        copies = getattr(cfg, "val_num_generations_per_prompt", 1)
        wanted = self.val_prompts[: cfg.max_val_samples // cfg.val_batch_size * cfg.val_batch_size]
        for low in range(0, len(wanted), cfg.val_batch_size):
            prompts = wanted[low : low + cfg.val_batch_size]
            # Training's batches of a step are numbered from 1 on.
            batch, metrics = self._roll_out(prompts, copies, self.val_sampling, (number, -1 - low))
            rewards.append(batch["total_reward"])
            lengths.append(metrics["mean_gen_tokens_per_sample"])
        total = torch.cat(rewards)
        found = {"accuracy": total.mean().item(), "avg_length": sum(lengths) / len(lengths)}
        if copies > 1:
            found["pass_k"] = (total.view(-1, copies) > 0).any(1).float().mean().item()
        return found


def _over_updates(name: str, values: list[float]) -> float:
    if name in AVERAGED:
        return sum(values) / len(values)
    if name.endswith(("_min", "_max")):  # infinite where a micro-batch has no token that counts
        finite = [value for value in values if math.isfinite(value)]
        return (min if name.endswith("_min") else max)(finite, default=-1.0)
    return sum(values)


def _seq_errors(data: Batch, rewards: Tensor, threshold: float | None) -> dict[str, float]:
    metrics = compute_and_apply_seq_logprob_error_masking(data, rewards, threshold)
    metrics["num_masked_seqs_by_logprob_error"] = metrics.pop("num_masked_seqs")
    return metrics


class Run:
    """Steps, validations, logs and checkpoints in their order.

    Args:
        trainer: The models.
        manager: Of the checkpoints.
        info: The counters in the checkpoint to resume from; None to start.
        observe: Watches the run and can end it.
    """

    def __init__(
        self,
        trainer: Trainer,
        manager: CheckpointManager,
        info: Any = None,
        observe: Observer | None = None,
    ):
        self.observe = observe if trainer.accelerator.is_main_process else None
        self.trainer, self.manager, self.cfg = trainer, manager, trainer.cfg
        self.saving, self.logger = trainer.config["checkpointing"], None
        names = ("consumed_samples", "current_step", "current_epoch", "total_steps")
        names = (*names, "total_valid_tokens", "data_position")
        self.info = {name: (info or {}).get(name, 0) for name in names}
        self.validation: dict[str, float] = {}
        self.batch_size = int(self.cfg.num_prompts_per_step * self.cfg.batch_multiplier)
        if len(trainer.train_prompts) < self.batch_size:
            raise ValueError(
                f"data.train: {len(trainer.train_prompts)} prompts, expected at least the "
                f"{self.batch_size} of one step"
            )
        if uses_validation(self.cfg) and not trainer.val_prompts:
            raise ValueError(
                "data.validation: not set, expected a dataset, or val_period=0, val_at_start=false "
                "and val_at_end=false"
            )
        if trainer.accelerator.is_main_process:
            if self.saving["enabled"]:
                clear_leftovers(manager.checkpoint_dir)
            self.logger = Logger(trainer.config["logger"])
            self.logger.log_hyperparams(trainer.config)
        trainer.accelerator.wait_for_everyone()

    def train(self) -> dict[str, float]:
        """Train to the end; returns the last validation's metrics."""
        try:
            self._train()
        finally:
            if self.logger is not None:
                self.logger.finish()
        return self.validation

    def _train(self) -> None:
        info, cfg = self.info, self.cfg
        if cfg.val_at_start and info["total_steps"] == 0:
            self._validate()
            if self.observe:
                self.observe(0, observed({}, self.validation))
        steps = len(self.trainer.train_prompts) // self.batch_size * cfg.max_num_epochs
        total = min(steps, cfg.max_num_steps)
        name = section_name(self.trainer.config)
        with Progress(name, total, info["total_steps"], self.logger is not None) as self.progress:
            while info["current_epoch"] < cfg.max_num_epochs and not self._over():
                batches = self._batches()
                while not self._over() and self._step(batches):
                    pass
                if self._over():
                    break
                info["current_epoch"] += 1
                info["current_step"] = info["data_position"] = 0

    def _batches(self) -> Iterator[list[Prompt]]:
        """The rest of the epoch's batches; counts them."""
        for batch in prompt_batches(
            self.trainer.train_prompts,
            self.batch_size,
            shuffle=self.trainer.config["data"].get("shuffle", True),
            seed=self.cfg.seed,
            epoch=self.info["current_epoch"],
            start=self.info["data_position"],
        ):
            self.info["data_position"] += 1
            yield batch

    def _over(self) -> bool:
        """Whether all steps are done, or validation has reached what it was to reach."""
        name = getattr(self.cfg, "stop_at_validation_metric", None)
        if name and self.validation and name not in self.validation:
            raise ValueError(
                f"grpo.stop_at_validation_metric: got {name!r}, expected "
                f"{' or '.join(self.validation)}"
            )
        reached = name and self.validation.get(name, -math.inf)
        if reached is not None and reached >= self.cfg.stop_at_validation_threshold:
            return True
        return self.info["total_steps"] >= self.cfg.max_num_steps

    def _step(self, batches: Iterator[list[Prompt]]) -> bool:
        """One step and what follows it; False if the epoch is over."""
        trainer, info, cfg = self.trainer, self.info, self.cfg
        before, start = dict(info), time.perf_counter()
        try:
            metrics = trainer.step(batches, info["total_steps"])
        except NotFinite as error:
            saved = self.saving["enabled"] and error.model_is_finite
            if saved:
                self._save(before)
            where = f"step_{info['total_steps']} has the run before it" if saved else "not saved"
            raise NotFinite(f"step {info['total_steps'] + 1}: {error}; {where}") from error
        if metrics is None:
            return False
        tokens = metrics.get("global_valid_toks", 0)
        info["total_steps"] += 1
        info["current_step"] += 1
        info["consumed_samples"] += cfg.num_prompts_per_step
        info["total_valid_tokens"] += int(tokens)
        self._log(metrics, "train")
        done = info["total_steps"]
        per_epoch = len(trainer.train_prompts) // self.batch_size
        last = done >= cfg.max_num_steps or (
            info["current_epoch"] + 1 >= cfg.max_num_epochs and info["data_position"] >= per_epoch
        )
        due = cfg.val_period > 0 and done % cfg.val_period == 0
        due = due and done >= getattr(cfg, "val_start_at", -1)
        validation = self._validate() if due or (cfg.val_at_end and last) else {}
        periods = (self.saving["save_period"], self.saving.get("ft_save_period"))
        saves = last or self._over() or any(p and done % p == 0 for p in periods)
        if self.saving["enabled"] and saves:
            self._save(self._ranked(metrics, validation))
        seconds = {"total_step_time": time.perf_counter() - start, **trainer.timer.take()}
        rate = tokens / seconds["total_step_time"]
        per_gpu = rate / trainer.accelerator.num_processes
        self._log({**seconds, "valid_tokens_per_sec_per_gpu": per_gpu}, "timing/train")
        self.progress.show(done, metrics.get("loss", math.nan), rate)
        if self.observe:
            self.observe(done, observed(metrics, validation))
        return True

    def _ranked(
        self, metrics: Mapping[str, float], validation: Mapping[str, float]
    ) -> dict[str, Any]:
        """The counters, with the metric that ranks the checkpoint if it was measured."""
        info, name = dict(self.info), self.manager.metric_name
        if validation:
            info["val_reward"] = validation["accuracy"]
        if name:
            where, _, metric = name.partition(":")
            source = metrics if where == "train" else validation
            if source and metric not in source:
                raise ValueError(
                    f"checkpointing.metric_name: got {name!r}, expected one of {sorted(source)}"
                )
            if source:
                info[name] = source[metric]
        return info

    def _save(self, info: Mapping[str, Any]) -> None:
        trainer = self.trainer
        with trainer.timer.time("checkpointing"):
            save_checkpoint(
                self.manager,
                info["total_steps"],
                info,
                trainer.config,
                accelerator=trainer.accelerator,
                models=trainer.models,
                tokenizer=trainer.tokenizer,
            )

    def _validate(self) -> dict[str, float]:
        start, timer = time.perf_counter(), self.trainer.timer
        seconds = dict(timer.seconds)
        self.validation = self.trainer.validate(self.info["total_steps"])
        timer.seconds = seconds  # what validation took is not the step's
        self._log(self.validation, "validation")
        self._log({"total_validation_time": time.perf_counter() - start}, "timing/validation")
        return self.validation

    def _log(self, metrics: Mapping[str, Any], prefix: str) -> None:
        if self.logger is not None:
            self.logger.log_metrics(dict(metrics), self.info["total_steps"], prefix=prefix)


def train(
    config: dict[str, Any],
    *,
    env: str | None = None,
    loss: str | None = None,
    strict: bool = False,
    allow_config_changes: bool = False,
    observe: Observer | None = None,
) -> dict[str, float]:
    """Run GRPO or PPO to the end, from the last checkpoint if there is one.

    Args:
        config: The configuration, resolved, a plain dict.
        env: ``file.py:function`` that scores all responses, see `nemo_rl_ref.environments`; if not
            given, each dataset's ``env_name`` does.
        loss: ``file.py:Class`` to take in the place of `ClippedPGLossFn`.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        allow_config_changes: Resume although the configuration has changed.
        observe: Watches the run and can end it.

    Returns:
        The last validation's metrics; empty if there was none.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used, or none can be written.
        NotFinite: If a loss or gradient is not finite. The message names step, samples and layer.
    """
    read_settings(config)
    loss_fn = None
    if loss:
        section = config["loss_fn"]
        loss_fn = checked_loss(loss, section, "loss_fn", pairs=False, strict=strict)
    manager = CheckpointManager(config["checkpointing"])
    enabled = config["checkpointing"]["enabled"]
    checkpoint = manager.get_latest_checkpoint_path() if enabled else None
    if checkpoint:
        check_checkpoint(checkpoint)
        if not allow_config_changes:
            name = section_name(config)
            ends = (f"{name}.max_num_steps", f"{name}.max_num_epochs")
            check_same_config(
                checkpoint, config, may_change=("checkpointing", "logger", "cluster", *ends)
            )
    trainer = Trainer(
        config,
        environment=load_object(env, "--env") if env else None,
        loss_fn=loss_fn,
        checkpoint=checkpoint,
    )
    return Run(trainer, manager, manager.load_training_info(checkpoint), observe).train()


def main(argv: list[str] | None = None) -> int:
    """Train with the configuration on the command line, and return the exit status."""
    used = (*EVERY_TRAINERS_KEYS, *USED_KEYS)
    return run(argv, __doc__.splitlines()[0], used, train, env=True, not_here=NOT_HERE_IN_RL)


if __name__ == "__main__":
    sys.exit(main())
