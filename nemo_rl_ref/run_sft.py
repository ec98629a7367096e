# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with NeMo RL's configuration.

    python -m nemo_rl_ref.run_sft --config sft.yaml policy.model_name=… data.train.data_path=…
    accelerate launch --num_processes 4 -m nemo_rl_ref.run_sft --config sft.yaml …

It trains on the tokens of the assistant's messages, all of them or the last one
(``sft.only_unmask_final``), from the last checkpoint if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.command_line import run
from nemo_rl_ref.data.datasets.response_datasets import load_response_dataset
from nemo_rl_ref.data.datasets.utils import update_single_dataset_config
from nemo_rl_ref.data.processors import sft_processor
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.tiny import load_policy
from nemo_rl_ref.trainer import USED_KEYS, Samples, Task, fit
from nemo_rl_ref.user_code import checked_loss

USED = (*USED_KEYS, "sft", "data.add_bos", "data.add_eos", "data.add_generation_prompt")


def train(config: dict[str, Any], *, loss: str | None = None, strict: bool = False, **options: Any):
    """Fine-tune as a configuration says.

    Args:
        config: The configuration, resolved, a plain dict.
        loss: ``file.py:Class`` to take in the place of the negative log-likelihood.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: Passed to `nemo_rl_ref.trainer.fit`.

    Returns:
        What `nemo_rl_ref.trainer.fit` returns.
    """
    section, data = config["sft"], config["data"]
    loss_fn = NLLLossFn()
    if loss:
        loss_fn = checked_loss(loss, section, "sft", pairs=False, strict=strict)
    tokenizer = get_tokenizer(config["policy"]["tokenizer"])
    sets = {"train": [], "validation": []}
    for part in sets:
        entries = data.get(part) or []
        for entry in [entries] if isinstance(entries, Mapping) else entries:
            entry = dict(entry)
            update_single_dataset_config(entry, data.get("default") or {})
            dataset = load_response_dataset(entry)
            sets[part].append((dataset.dataset, dataset.places, dataset.task_spec))
            if part == "train" and getattr(dataset, "val_dataset", None):
                sets["validation"].append(
                    (dataset.val_dataset, dataset.val_places, dataset.task_spec)
                )
    if not sets["train"]:
        raise ValueError("data.train: not set, expected a dataset or a list of them")
    if not sets["validation"] and section.get("val_period", 0) > 0:
        raise ValueError(
            f"sft.val_period: got {section['val_period']} without data.validation; set it to 0, or "
            "data.train.split_validation_size above 0"
        )
    samples = {part: _samples(parts, tokenizer, config) for part, parts in sets.items() if parts}
    task = Task(
        "sft",
        samples["train"],
        {"default": samples["validation"]} if "validation" in samples else {},
        load_policy,
        loss_fn,
        validation_metrics={"loss": "val_loss"},
        pairs=False,
    )
    return fit(task, config, tokenizer, **options)


def _samples(parts: list[tuple[Any, ...]], tokenizer: Any, config: Mapping[str, Any]) -> Samples:
    """The records of one or several datasets, each with its prompt."""
    data = config["data"]
    flags = {
        key: data[key] for key in ("add_bos", "add_eos", "add_generation_prompt") if key in data
    }

    only_final = bool(config["sft"].get("only_unmask_final", False))

    def tokenize(record: tuple[dict[str, Any], Any], number: int) -> dict[str, Any]:
        datum, spec = record
        limit = data["max_input_seq_length"]
        sample = sft_processor(datum, spec, tokenizer, limit, number, **flags)
        return flat_sample(sample, only_unmask_final=only_final)

    multiple = config["policy"].get("make_sequence_length_divisible_by") or 1
    return Samples(
        [(record, spec) for records, _, spec in parts for record in records],
        [place for _, places, _ in parts for place in places],
        tokenize,
        lambda samples: sft_batch(samples, tokenizer.pad_token_id, multiple),
    )


def flat_sample(sample: dict[str, Any], *, only_unmask_final: bool) -> dict[str, Any]:
    """Join the messages of a conversation.

    Args:
        sample: From `nemo_rl_ref.data.processors.sft_processor`.
        only_unmask_final: Train on the last message only, whoever it is from, instead of on all
            messages of the assistant.

    Returns:
        ``input_ids`` and ``token_mask``, int64 ``(T,)``, and ``loss_multiplier``.
    """
    log = sample["message_log"]
    wanted = [m is log[-1] if only_unmask_final else m["role"] == "assistant" for m in log]
    masks = [torch.full_like(m["token_ids"], w) for m, w in zip(log, wanted, strict=True)]
    return {
        "input_ids": torch.cat([m["token_ids"] for m in log]),
        "token_mask": torch.cat(masks),
        "loss_multiplier": sample["loss_multiplier"],
    }


def sft_batch(
    samples: list[dict[str, Any]], pad_token_id: int, multiple: int
) -> BatchedDataDict[Any]:
    """Pad conversations on the right into a batch.

    Args:
        samples: From `flat_sample`.
        pad_token_id: Fills ``input_ids``.
        multiple: ``S`` is rounded up to a multiple of this.

    Returns:
        ``input_ids`` int64 ``(B, S)``, ``input_lengths`` int64 ``(B,)``, ``token_mask`` int64
        ``(B, S)`` and ``sample_mask`` float32 ``(B,)``.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]

    def padded(key: str, fill: int) -> torch.Tensor:
        rows = [sample[key] for sample in samples]
        batch = pad_sequence(rows, batch_first=True, padding_value=fill)
        return torch.nn.functional.pad(batch, (0, -max(lengths) % multiple), value=fill)

    return BatchedDataDict(
        {
            "input_ids": padded("input_ids", pad_token_id),
            "input_lengths": torch.tensor(lengths),
            "token_mask": padded("token_mask", 0),
            "sample_mask": torch.tensor([sample["loss_multiplier"] for sample in samples]),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run(argv, __doc__.split("\n")[0], USED, train)


if __name__ == "__main__":
    sys.exit(main())
