# SPDX-License-Identifier: Apache-2.0
"""The trainer of GRPO and PPO: rollouts, rewards, a filter, log-probabilities, advantages, updates.

`RLTrainer.step` is the algorithm, and each of its lines is a method:

1. sample ``num_generations_per_prompt`` responses to each of ``num_prompts_per_step`` prompts
   and score them (:mod:`nemo_rl_ref.rl.rollouts`, :mod:`nemo_rl_ref.rl.rewards`);
2. scale and shape the rewards, and compare each with its group's;
3. drop groups that teach nothing; if too few are left, go back to the first line;
4. run policy, reference, teacher and value model over the responses, as far as they are needed;
5. turn rewards into advantages;
6. update the policy once for every ``train_global_batch_size`` responses (PPO: ``ppo_epochs``
   times over, the value model before the policy).

Every process has the whole batch of rollouts, samples its share of the prompts and trains on its
share of the rows. Random numbers come from the seed and the number of the step, not from a
generator that runs on, so that a resumed run draws what the interrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_rl_ref.algorithms import advantage_estimator as estimators
from nemo_rl_ref.algorithms.grpo import compute_and_apply_seq_logprob_error_masking as seq_errors
from nemo_rl_ref.algorithms.grpo import dynamic_sampling, scale_rewards
from nemo_rl_ref.algorithms.logits_sampling_utils import (
    TrainingSamplingParams,
    need_top_k_or_top_p_filtering,
)
from nemo_rl_ref.algorithms.loss import ClippedPGLossFn, MseValueLossFn
from nemo_rl_ref.algorithms.reward_functions import apply_reward_shaping
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    mask_out_neg_inf_logprobs,
    set_seed,
)
from nemo_rl_ref.config.sections import TrainedConfig
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.rl.generate import left_pad, response_logprobs
from nemo_rl_ref.rl.rewards import Environment
from nemo_rl_ref.rl.rollouts import Prompt, batch_metrics, load_prompts, roll_out
from nemo_rl_ref.rl.settings import (
    GRPOSettings,
    PPOSettings,
    check_processes,
    make_estimator,
    make_loss,
    read_rl_settings,
    sampling_params,
    teacher_name,
    updates_per_step,
)
from nemo_rl_ref.training.checkpoints import Trained, load_checkpoint
from nemo_rl_ref.training.identity import model_digest, tokenizer_digest
from nemo_rl_ref.training.loop import make_trained
from nemo_rl_ref.training.models import load_policy, load_tokenizer, load_value_model, token_values
from nemo_rl_ref.training.processes import by_share, is_sharded, make_accelerator, whole_model
from nemo_rl_ref.training.samples import Batches, digest
from nemo_rl_ref.training.step import NotFinite, checked_result, combine_updates, update
from nemo_rl_ref.utils.checkpoint import CheckpointManager
from nemo_rl_ref.utils.timer import Timer

Batch = BatchedDataDict[Any]


class RLTrainer:
    """The models of a run, and what one step does to them: a `nemo_rl_ref.training.loop.Trainer`.

    Args:
        config: The configuration, a plain dict with all interpolations resolved.
        environment: Scores all responses; if not given, that of each dataset's ``env_name``.
        loss_fn: The loss; NeMo RL's `ClippedPGLossFn` if not given.
        load: Whether to load the models at once; otherwise `load` does.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
    """

    counters = (
        "consumed_samples", "current_step", "current_epoch", "total_steps", "total_valid_tokens",
        "data_position",
    )  # fmt: skip

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        environment: Environment | None = None,
        loss_fn: Any = None,
        load: bool = True,
    ):
        self.settings = settings = read_rl_settings(config)
        policy = self.policy_config = settings.policy
        self.config, self.cfg = config, settings.section
        self.accelerator, self.timer = make_accelerator(policy.precision), Timer()
        check_processes(settings, self.accelerator.num_processes)
        cfg, self.is_ppo = self.cfg, isinstance(settings, PPOSettings)
        self.updates, self.loss_config = updates_per_step(settings), settings.loss_fn
        self.loss_fn = loss_fn or make_loss(ClippedPGLossFn, self.loss_config, "loss_fn")
        self.estimator = make_estimator(settings)
        self.value_config: Any = None
        self.value_loss_fn: Any = None
        self.teacher_name = None
        if isinstance(settings, GRPOSettings):
            if isinstance(self.estimator, estimators.OPDAdvantageEstimator):
                self.teacher_name = teacher_name(settings.on_policy_distillation)
        elif isinstance(self.estimator, estimators.GeneralizedAdvantageEstimator):
            self.value_config = settings.value
            self.value_loss_fn = make_loss(MseValueLossFn, settings.value_loss_fn, "value_loss_fn")
        self.tokenizer = load_tokenizer(policy.tokenizer)
        self.train_prompts, self.val_prompts = load_prompts(
            settings.data, self.tokenizer, environment
        )
        prompts = ((prompt.text, prompt.truth) for prompt in self.train_prompts)
        self.environment = environment
        self.digests = {
            "data.train": digest(prompts),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }
        frozen = [self.teacher_name] if self.teacher_name else []
        if self.loss_config.reference_policy_kl_penalty:
            frozen.append(policy.model_name)
        if frozen:
            self.digests["reference"] = " ".join(map(model_digest, frozen))
        self.sampling, self.val_sampling = sampling_params(policy.generation)
        self.filters = need_top_k_or_top_p_filtering(self.sampling)
        self.samples, self.samples_per_step = len(self.train_prompts), cfg.num_prompts_per_step
        batch_size = int(cfg.num_prompts_per_step * cfg.batch_multiplier)
        self.batches = Batches(
            self.samples,
            batch_size,
            cfg.seed,
            cfg.max_num_epochs,
            shuffle=settings.data.shuffle,
            num_workers=settings.data.num_workers,
        )
        self.steps, self.updates_made = min(len(self.batches), cfg.max_num_steps), 0
        several = getattr(cfg, "val_num_generations_per_prompt", 1) > 1
        self.metric_names = ("accuracy", "avg_length", *(("pass_k",) if several else ()))
        if load:
            self.load()

    def load(self, checkpoint: str | None = None) -> None:
        """Load the models, as they are in a checkpoint if one is given."""
        policy = self.policy_config
        set_seed(self.cfg.seed)
        weights, _ = CheckpointManager.get_resume_paths(checkpoint)
        model = load_policy(weights or policy.model_name, tokenizer=self.tokenizer)
        self.has_dropout = any(  # Transformers' attention has it without a module
            (isinstance(part, torch.nn.Dropout) and part.p) or getattr(part, "attention_dropout", 0)
            for part in model.modules()
        )
        self.whole = self._frozen(weights or policy.model_name, is_sharded(self.accelerator))
        self.policy = make_trained(self.accelerator, model, policy)
        self.models = {"policy": self.policy}
        kl = self.loss_config.reference_policy_kl_penalty
        self.reference = self._frozen(policy.model_name, kl)
        key = "on_policy_distillation.teacher_model_by_agent_name"
        self.teacher = self._frozen(self.teacher_name, self.teacher_name, key)
        if self.value_config is not None:
            weights, _ = CheckpointManager.get_resume_paths(checkpoint, model_component="value")
            model = load_value_model(weights or self.value_config.model_name, self.tokenizer)
            self.models["value"] = make_trained(self.accelerator, model, self.value_config, "value")
        if checkpoint:
            load_checkpoint(checkpoint, accelerator=self.accelerator, models=self.models)

    def _frozen(self, name: Any, wanted: Any = True, key: str = "policy.model_name") -> Any:
        if wanted:
            model = load_policy(name, key=key, tokenizer=self.tokenizer).eval()
            return model.requires_grad_(False).to(self.accelerator.device)

    def next_step(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """A step with the prompts that follow; see `nemo_rl_ref.training.loop.Trainer`."""
        while state["current_epoch"] < self.cfg.max_num_epochs:
            metrics = self.step(self._prompts(state), state["total_steps"])
            if metrics is not None:
                state["current_step"] += 1
                return metrics
            state["current_epoch"] += 1
            state["current_step"] = state["data_position"] = 0
        return None

    def _prompts(self, state: dict[str, Any]) -> Iterator[list[Prompt]]:
        """Yield the batches that are left of the epoch; count in ``state`` those that are taken."""
        first = state["current_epoch"] * self.batches.per_epoch
        for number in range(first + state["data_position"], first + self.batches.per_epoch):
            state["data_position"] += 1
            yield [self.train_prompts[prompt] for prompt in self.batches[number]]

    def is_last(self, state: Mapping[str, Any]) -> bool:
        """See `nemo_rl_ref.training.loop.Trainer`."""
        taken = state["current_epoch"] * self.batches.per_epoch + state["data_position"]
        return state["total_steps"] >= self.cfg.max_num_steps or taken >= len(self.batches)

    def step(self, batches: Iterator[list[Prompt]], number: int) -> dict[str, Any] | None:
        """Take one step of the algorithm.

        Args:
            batches: The prompts of the next batches of rollouts.
            number: Steps done before.

        Returns:
            NeMo RL's training metrics; None if the prompts ran out before the step was full.
        """
        self.updates_made, kept = 0, None
        for tried, prompts in enumerate(batches, start=1):
            batch, sampled = self.sample(prompts, (number, tried))
            batch = self.reward(batch)
            batch, is_full, kept, filtered = self.filter(batch, kept, tried)
            if is_full:
                break
        else:
            return None
        data, metrics = self.add_logprobs(batch)
        metrics |= self.add_advantages(batch, data)
        metrics |= self.update_models(batch, data, number)
        return {**metrics, **filtered, **sampled, **batch_metrics(batch)}

    def sample(
        self,
        prompts: list[Prompt],
        number: tuple[int, ...],
        sampling: TrainingSamplingParams | None = None,
        copies: int | None = None,
    ) -> tuple[Batch, dict[str, float]]:
        """Sample responses with the policy as it is, and score them.

        Args:
            prompts: The prompts.
            number: Of the step and of the batch in it; with the run's seed it makes the random
                numbers.
            sampling: Temperature, top-k and top-p; those of training if not given.
            copies: Responses to each prompt; ``num_generations_per_prompt`` if not given.

        Returns:
            What `nemo_rl_ref.rl.rollouts.roll_out` returns.
        """
        seed = self.cfg.seed
        for part in number:
            seed = (seed * 1_000_003 + part) % (1 << 62)
        with self.timer.time("generation"):
            return roll_out(
                whole_model(self.policy.model, self.whole, self.accelerator),
                self.tokenizer,
                prompts,
                self.policy_config,
                sampling or self.sampling,
                copies=copies or self.cfg.num_generations_per_prompt,
                seed=seed,
                accelerator=self.accelerator,
            )

    def reward(self, batch: Batch) -> Batch:
        """Scale and shape the rewards; add ``baseline`` and ``std`` (B,) of each response's group.

        Args:
            batch: From `sample`.
        """
        cfg = self.cfg
        with self.timer.time("reward_calculation"):
            batch = scale_rewards(batch, cfg.reward_scaling)
            batch = apply_reward_shaping(batch, cfg.reward_shaping)
            raw = batch.get("unshaped_total_reward") if cfg.use_dynamic_sampling else None
            batch["baseline"], batch["std"] = calculate_baseline_and_std_per_prompt(
                _prompt_ids(batch),
                batch["total_reward"],
                torch.ones_like(batch["total_reward"]),
                leave_one_out_baseline=getattr(cfg, "use_leave_one_out_baseline", True),
                std_rewards=raw,
            )
        return batch

    def filter(
        self, batch: Batch, kept: Batch | None, tried: int
    ) -> tuple[Batch, bool, Batch | None, dict[str, float]]:
        """Leave out groups whose rewards are all the same, if ``use_dynamic_sampling`` asks for it.

        Args:
            batch: From `reward`.
            kept: What was kept of the step's batches before.
            tried: Number of the step's batches, with this one.

        Returns:
            The responses to train on, whether they are enough for the step, what is kept now, and
            metrics.
        """
        batch, is_full, kept, metrics = dynamic_sampling(
            batch, batch["std"], batch["baseline"], tried, SimpleNamespace(grpo=self.cfg),
            self.timer, kept,
        )  # fmt: skip
        if is_full and self.cfg.use_dynamic_sampling:
            metrics["dynamic_sampling_num_gen_batches"] = tried
            metrics["filtered_reward"] = batch["filtered_reward"].mean().item()
        return batch, is_full, kept, metrics

    def add_logprobs(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Run the models over the responses, as far as advantages and losses need them.

        Args:
            batch: From `filter`.

        Returns:
            What the losses read, but for the advantages: ``prev_logprobs`` (unless the update finds
            them), ``reference_policy_logprobs``, ``teacher_logprobs`` and ``values``, (B, S). And
            metrics.
        """
        cfg, metrics = self.cfg, {}
        names = ("input_ids", "input_lengths", "generation_logprobs", "token_mask")
        data: Batch = BatchedDataDict({name: batch[name] for name in names})
        data["prompt_lengths"], data["sample_mask"] = batch["length"], batch["loss_multiplier"]
        if cfg.overlong_filtering:
            data["sample_mask"] = data["sample_mask"].masked_fill(batch["truncated"], 0)
        if self.is_ppo:
            data["rewards"] = self._rewards(batch)
        if self.value_loss_fn is not None:
            with self.timer.time("value_inference"):
                data["values"] = self._by_share(token_values, self.models["value"].model, data)
        with self.timer.time("policy_and_reference_logprobs"):
            if self.reference is not None:
                data["reference_policy_logprobs"] = self._by_share(
                    self._unfiltered, self.reference, data
                )
            if self.teacher is not None:
                data["teacher_logprobs"] = self._by_share(self._unfiltered, self.teacher, data)
            if self._prev_logprobs_first:
                data["prev_logprobs"] = self._by_share(self._logprobs, self.policy.model, data)
                threshold = cfg.seq_logprob_error_threshold
                metrics = _seq_errors(data, self._rewards(batch), threshold)
        return data, metrics

    def add_advantages(self, batch: Batch, data: Batch) -> dict[str, float]:
        """Turn rewards into ``advantages`` (B, S), and ``returns`` where there are values.

        Args:
            batch: From `filter`.
            data: From `add_logprobs`; gets them.

        Returns:
            Metrics.
        """
        cfg, mask = self.cfg, data["token_mask"] * data["sample_mask"].unsqueeze(-1)
        is_empty = not mask.any()
        if is_empty and self.accelerator.is_main_process:
            print(
                "WARNING: no response of this step counts in the loss, which is 0: prompts longer "
                "than data.max_input_seq_length, overlong_filtering and "
                "seq_logprob_error_threshold leave none"
            )
        with self.timer.time("advantage_calculation"):
            reference, prev = data.get("reference_policy_logprobs"), data.get("prev_logprobs")
            result = self.estimator.compute_advantage(
                prompt_ids=_prompt_ids(batch),
                rewards=self._rewards(batch),
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
        if is_empty:  # REINFORCE++ divides by the number of tokens
            advantages = advantages.nan_to_num(0.0)
        data["advantages"] = advantages
        shown = advantages[(mask if self.is_ppo else data["token_mask"]).bool()]
        # As NeMo RL has it, 0 where there is none.
        ends = dict.fromkeys(("mean", "max", "min"), 0.0)
        if len(shown):
            ends = {end: getattr(shown, end)().item() for end in ends}
        return {
            **getattr(self.estimator, "last_metrics", {}),
            **{f"advantages/{end}": value for end, value in ends.items()},
        }

    def update_models(self, batch: Batch, data: Batch, number: int) -> dict[str, float]:
        """Train the value model, if there is one, and the policy, ``ppo_epochs`` times over.

        Args:
            batch: From `filter`.
            data: From `add_logprobs` and `add_advantages`.
            number: Steps done before.

        Returns:
            The metrics of the last of these times.

        Raises:
            NotFinite: If a loss or gradient is not finite. That update is not made.
        """
        metrics: dict[str, float] = {}
        for _ in range(getattr(self.cfg, "ppo_epochs", 1)):
            if self.value_loss_fn is not None:
                with self.timer.time("value_training"):
                    metrics |= self.update_value(data)
            if number >= getattr(self.cfg, "policy_training_start_step", 0):
                with self.timer.time("policy_training"):
                    metrics |= self.update_policy(data)
        if not self._prev_logprobs_first and not self.loss_config.force_on_policy_ratio:
            metrics |= _seq_errors(data, batch["total_reward"], None)
        return metrics

    def _rewards(self, batch: Batch) -> Tensor:
        return batch["filtered_reward" if self.cfg.use_dynamic_sampling else "total_reward"]

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

    def _by_share(self, function: Callable[..., Tensor], model: Any, data: Batch) -> Tensor:
        size = self.policy_config.logprob_batch_size
        model.eval()
        found = by_share(lambda part: function(model, part), data, self.accelerator, size)
        model.train()
        return found

    def _update(
        self, trained: Trained, section: TrainedConfig, data: Batch, loss: Callable[..., Any]
    ) -> dict[str, float]:
        """One optimizer step for every ``train_global_batch_size`` rows, then the scheduler's.

        Returns:
            The loss's metrics, means over the updates as in NeMo RL; ``grad_norm`` is the last
            update's, before clipping.

        Raises:
            NotFinite: If a loss or gradient is not finite. That update is not made.
        """
        metrics: dict[str, list[float]] = {}
        size = section.train_global_batch_size
        for low in range(0, data.size, size):
            try:
                found = update(
                    trained.model,
                    trained.optimizer,
                    None,
                    data.slice(low, low + size),
                    self.accelerator,
                    micro_rows=section.train_micro_batch_size,
                    max_grad_norm=section.max_grad_norm,
                    loss=loss,
                    place=lambda row: f"response {low + row}",  # noqa: B023, called at once
                )
            except NotFinite as error:
                error.model_is_whole &= not self.updates_made
                raise
            self.updates_made += 1
            for name, value in found.items():
                metrics.setdefault(name, []).append(value)
        trained.scheduler.step()
        return {name: combine_updates(name, values) for name, values in metrics.items()}

    def update_policy(self, data: Batch) -> dict[str, float]:
        """Train the policy on a batch of rollouts once.

        Args:
            data: From `add_advantages`. Gets ``prev_logprobs`` if it has none.
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
            found = self.loss_fn(
                next_token_logprobs=logprobs[:, 1:],
                data=part,
                global_valid_seqs=seqs,
                global_valid_toks=toks,
            )
            return checked_result(self.loss_fn, found)

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

        section = self.value_config
        found = self._update(self.models["value"], section, data, loss)
        names = ("returns_mean", "values_mean", "returns_sq_mean", "residual_sq_mean")
        returns, values, returns_sq, residual_sq = (found[name] for name in names)
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
        most = cfg.max_val_samples
        size = cfg.val_batch_size or most or len(self.val_prompts)
        wanted = self.val_prompts if most is None else self.val_prompts[: most // size * size]
        for low in range(0, len(wanted), size):
            prompts = wanted[low : low + size]
            # Training's batches of a step are numbered from 1 on.
            batch, metrics = self.sample(prompts, (number, -1 - low), self.val_sampling, copies)
            rewards.append(batch["total_reward"])
            lengths.append(metrics["mean_gen_tokens_per_sample"])
        total = torch.cat(rewards)
        found = {"accuracy": total.mean().item(), "avg_length": sum(lengths) / len(lengths)}
        if copies > 1:
            found["pass_k"] = (total.view(-1, copies) > 0).any(1).float().mean().item()
        return found

    def validations(self, done: int) -> Iterator[tuple[str, dict[str, float]]]:
        """See `nemo_rl_ref.training.loop.Trainer`."""
        yield "validation", self.validate(done)


def _prompt_ids(batch: Batch) -> Tensor:
    """The tokens of each prompt, (B, P), to group by; -1, which is no token, where there is none."""
    ids, mask = left_pad(batch["input_ids"], batch["length"])
    return ids.masked_fill(mask == 0, -1)


def _seq_errors(data: Batch, rewards: Tensor, threshold: float | None) -> dict[str, float]:
    metrics = seq_errors(data, rewards, threshold)
    metrics["num_masked_seqs_by_logprob_error"] = metrics.pop("num_masked_seqs")
    return metrics
