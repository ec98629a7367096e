# SPDX-License-Identifier: Apache-2.0
"""Prompts, and rollouts: responses sampled to them and scored."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_rl_ref.algorithms.logits_sampling_utils import TrainingSamplingParams
from nemo_rl_ref.config.sections import DataConfig, DatasetConfig, SampledPolicyConfig
from nemo_rl_ref.data.datasets.response_datasets import load_response_dataset
from nemo_rl_ref.data.processors import math_hf_data_processor
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.files.records import DataError, tokenizing
from nemo_rl_ref.rl.generate import generate
from nemo_rl_ref.rl.rewards import ENVIRONMENTS, Environment, score
from nemo_rl_ref.training.samples import load_datasets


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: Its tokens after the chat template, int64 (T,).
        text: The text of these tokens, as the environment gets it.
        truth: The ground truth.
        environment: Scores the responses.
        weight: 1, or 0 if the prompt was too long, which counts in no loss.
    """

    ids: Tensor
    text: str
    truth: str
    environment: Environment
    weight: float


def load_prompts(
    data: DataConfig, tokenizer: Any, environment: Environment | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Load the training and validation prompts of a configuration.

    Args:
        data: The section ``data``.
        tokenizer: A Hugging Face tokenizer with a chat template.
        environment: Scores all responses; if not given, that of each entry's ``env_name``.

    Returns:
        Training and validation prompts. The latter may be none.

    Raises:
        ValueError: If a setting cannot be used. The message names its key.
        DataError: If a record cannot be used. The message names file and line.
    """
    prompts: dict[str, list[Prompt]] = {"train": [], "validation": []}
    for part, entry, dataset in load_datasets(data, load_response_dataset):
        scorer = environment or _environment(entry, part)
        processor = entry.processor or "math_hf_data_processor"
        if processor != "math_hf_data_processor":
            raise ValueError(
                f"data.{part}.processor: got {processor!r}, expected math_hf_data_processor"
            )
        parts = [(part, dataset.dataset, dataset.places)]
        if part == "train" and getattr(dataset, "val_dataset", None):
            parts.append(("validation", dataset.val_dataset, dataset.val_places))
        for where, records, places in parts:
            for index, (record, place) in enumerate(zip(records, places, strict=True)):
                _check_roles(record["messages"], place)
                with tokenizing(place):
                    datum = math_hf_data_processor(
                        record, dataset.task_spec, tokenizer, data.longest, index
                    )
                prompts[where].append(_prompt(datum, scorer))
    return prompts["train"], prompts["validation"]


def _check_roles(messages: list[dict[str, Any]], place: str) -> None:
    """A problem and its answer; NeMo RL takes the first two messages, whosever they are."""
    roles = [message["role"] for message in messages if message["content"] is not None]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{place}: got texts from {', '.join(roles)}; expected one from user, the problem, "
            "and one from assistant, the ground truth; a system message comes from "
            "system_prompt_file"
        )


def _prompt(datum: Mapping[str, Any], environment: Environment) -> Prompt:
    (message,) = datum["message_log"]
    return Prompt(
        ids=message["token_ids"],
        text=message["content"],
        truth=datum["extra_env_info"]["ground_truth"],
        environment=environment,
        weight=datum["loss_multiplier"],
    )


def _environment(entry: DatasetConfig, part: str) -> Environment:
    name = entry.env_name
    if name not in ENVIRONMENTS:
        near = difflib.get_close_matches(str(name), ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"data.{part}.env_name: got {name!r}; {hint}It can be {', '.join(ENVIRONMENTS)}, or "
            "give a function with --env my_file.py:reward"
        )
    return ENVIRONMENTS[name]


def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    policy: SampledPolicyConfig,
    sampling: TrainingSamplingParams,
    *,
    copies: int,
    seed: int,
    accelerator: Any,
) -> tuple[BatchedDataDict[Any], dict[str, float]]:
    """Sample and score responses, each process to its share of the prompts.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: The prompts of all processes.
        policy: The section ``policy``.
        sampling: Temperature, top-k and top-p.
        copies: Responses to each prompt.
        seed: Of the random numbers, which belong to the responses, whatever process samples them.
        accelerator: An ``accelerate.Accelerator``.

    Returns:
        The responses, those to one prompt next to each other, the same on every process: NeMo
        RL's ``input_lengths``, ``length`` (of the prompt), ``generation_logprobs``,
        ``total_reward``, ``reward/<name>``, ``truncated``, ``loss_multiplier``, and
        ``input_ids`` (B, S), ``token_mask`` int64 (B, S), 1 on the response's tokens,
        ``response_token_lengths`` (B,), ``content`` (texts). And NeMo RL's rollout metrics.
    """
    generation, longest = policy.generation, policy.max_total_sequence_length
    uniforms = torch.rand(
        len(prompts) * copies,
        min(generation.max_new_tokens, longest),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    ranks, rank = accelerator.num_processes, accelerator.process_index
    low, high = (len(prompts) * r // ranks for r in (rank, rank + 1))
    rows = [prompt for prompt in prompts[low:high] for _ in range(copies)]
    parts = []
    if rows:
        ids = pad_sequence([prompt.ids for prompt in prompts[low:high]], batch_first=True)
        ids = ids.repeat_interleave(copies, dim=0)
        lengths = torch.tensor([len(prompt.ids) for prompt in rows])
        inputs = BatchedDataDict({"input_ids": ids, "input_lengths": lengths})
        out = generate(
            model,
            tokenizer,
            inputs.to(accelerator.device),
            sampling,
            uniforms[low * copies : high * copies].to(accelerator.device),
            max_total_sequence_length=longest,
            stop_token_ids=generation.stop_token_ids,
            stop_strings=generation.stop_strings,
            batch_size=policy.generation_batch_size,
        )
        parts.append(_scored(out.to("cpu"), rows, lengths, tokenizer))
    if ranks > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    batch = BatchedDataDict.from_batches(parts, {"input_ids": tokenizer.pad_token_id})
    sizes = batch["response_token_lengths"].float()
    metrics = {
        "total_turns": len(sizes),
        "avg_turns_per_sample": 1.0,
        "max_turns_per_sample": 1,
        "natural_termination_rate": 1.0,
        "truncation_rate": batch["truncated"].float().mean().item(),
        "max_turns_reached_rate": 0.0,
        "mean_total_tokens_per_sample": sizes.mean().item(),
        "mean_gen_tokens_per_sample": sizes.mean().item(),
        "max_gen_tokens_per_sample": sizes.max().item(),
        "mean_env_tokens_per_sample": 0.0,
    }
    return batch.to(accelerator.device), metrics


def _scored(
    out: BatchedDataDict[Any], rows: list[Prompt], lengths: Tensor, tokenizer: Any
) -> BatchedDataDict[Any]:
    """Responses with their texts and rewards."""
    spans = zip(lengths.tolist(), out["unpadded_sequence_lengths"].tolist(), strict=True)
    rows_of_ids = zip(out["output_ids"].tolist(), spans, strict=True)
    responses = [ids[start:stop] for ids, (start, stop) in rows_of_ids]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    columns, stops = torch.arange(out["output_ids"].shape[1]), out["unpadded_sequence_lengths"]
    in_response = (columns >= lengths.unsqueeze(1)) & (columns < stops.unsqueeze(1))
    return BatchedDataDict(
        {
            "input_ids": out["output_ids"],
            "input_lengths": stops,
            "token_mask": in_response.long(),
            "length": lengths,
            "generation_logprobs": out["logprobs"],
            "response_token_lengths": out["generation_lengths"],
            "truncated": out["truncated"],
            "loss_multiplier": torch.tensor([prompt.weight for prompt in rows]),
            "content": texts,
            **score(
                [prompt.environment for prompt in rows],
                [prompt.text for prompt in rows],
                texts,
                [prompt.truth for prompt in rows],
            ),
        }
    )


def batch_metrics(batch: Mapping[str, Any]) -> dict[str, float]:
    """NeMo RL's metrics of the responses that a step trains on.

    Args:
        batch: From `roll_out`, with ``baseline`` (B,), the mean reward of each response's group.

    Returns:
        Mean reward and prompt length, number of tokens, and the shares, in percent, of responses
        whose group has the baseline 0, 1 or another one.
    """
    zeros, ones = ((batch["baseline"] == b).float().mean().item() * 100 for b in (0, 1))
    return {
        "reward": batch["total_reward"].mean().item(),
        "mean_prompt_length": batch["length"].float().mean().item(),
        "total_num_tokens": batch["input_lengths"].sum().item(),
        "baseline_reward/pct_0": zeros,
        "baseline_reward/pct_1": ones,
        "baseline_reward/pct_mixed": 100 - zeros - ones,
    }
