# SPDX-License-Identifier: Apache-2.0
"""From a configuration's data to batches: samples that are tokenized once, and their order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nemo_rl_ref.data.collate_fn import last_message_mask
from nemo_rl_ref.data.datasets.preference_datasets import load_preference_dataset
from nemo_rl_ref.data.datasets.response_datasets import load_response_dataset
from nemo_rl_ref.data.datasets.utils import update_single_dataset_config
from nemo_rl_ref.data.processors import preference_preprocessor, sft_processor
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.padding import PackedRows


class Samples:
    """Records that are tokenized when they are first used, and batches of them.

    Args:
        records: The records.
        places: Where each comes from, for messages.
        tokenize: Makes a sample of a record and its number: ``rows``, the tokens of each of its
            rows, int64 ``(T,)``; ``masks``, 1 on those that are trained on; and
            ``loss_multiplier``, its weight.
        pad_token_id: Fills ``input_ids``.
        multiple: ``S`` is rounded up to a multiple of this.
        add_loss_mask: Whether batches have ``token_mask``.
    """

    def __init__(
        self,
        records: Sequence[Any],
        places: Sequence[str],
        tokenize: Callable[[Any, int], dict[str, Any]],
        *,
        pad_token_id: int,
        multiple: int = 1,
        add_loss_mask: bool = True,
    ):
        self.records, self.places, self._tokenize = records, places, tokenize
        self._fills, self._multiple = (pad_token_id, 0)[: 1 + add_loss_mask], multiple
        self._samples: dict[int, dict[str, Any]] = {}
        self._first = torch.full((len(records),), -1)  # where in the packed rows a sample starts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number not in self._samples:
            self._samples[number] = self._tokenize(self.records[number], number)
        return self._samples[number]

    def tokenize(self, numbers: Sequence[int]) -> int:
        """Tokenize some samples now; returns how many of them are too long and have no weight."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"record \d+: \d+ tokens, more than max_seq_length")
            dropped = sum(self[number]["loss_multiplier"] == 0 for number in numbers)
        self._pack()
        return dropped

    def _pack(self) -> None:
        samples = self._samples.values()
        keys = ("rows", "masks")[: len(self._fills)]
        self._packed = PackedRows(*([row for s in samples for row in s[key]] for key in keys))
        self._per_sample = len(next(iter(samples))["rows"])
        self._first[list(self._samples)] = torch.arange(len(samples)) * self._per_sample
        self._weights = torch.tensor([sample["loss_multiplier"] for sample in samples])

    def batch(self, numbers: Sequence[int]) -> BatchedDataDict[Any]:
        """The padded batch of the samples with these numbers.

        Returns:
            The rows of a sample next to each other: ``input_ids`` int64 ``(B, S)``, padded on the
            right, ``input_lengths`` int64 ``(B,)``, ``sample_mask`` float32 ``(B,)`` and, if
            asked for, ``token_mask`` int64 ``(B, S)``.
        """
        first = self._first[numbers]
        if (first < 0).any():
            self.tokenize(numbers)
            first = self._first[numbers]
        rows = first
        if self._per_sample > 1:
            rows = (first.unsqueeze(1) + torch.arange(self._per_sample)).flatten()
        cut, lengths = self._packed.padded(rows, self._fills, multiple=self._multiple)
        batch: BatchedDataDict[Any] = BatchedDataDict(
            zip(("input_ids", "token_mask"), cut, strict=False)
        )
        batch["input_lengths"] = lengths
        batch["sample_mask"] = self._weights[rows // self._per_sample]
        return batch


def digest(records: Iterable[Any]) -> str:
    """A sum over all records, to notice that a data file has changed."""
    summed = hashlib.sha256()
    for record in records:
        summed.update(repr(record).encode())
    return summed.hexdigest()


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


def load_datasets(
    data: Mapping[str, Any], load: Callable[[dict[str, Any]], Any]
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Load the datasets of a configuration.

    Args:
        data: The section ``data``: ``train`` and ``validation``, each an entry or a list of them,
            and ``default``, for what an entry leaves out.
        load: Loads the dataset of an entry.

    Yields:
        ``train`` or ``validation``, the entry and the dataset.

    Raises:
        ValueError: What `load` raises, with the part's key before it.
        FileNotFoundError: Likewise.
    """
    for part in ("train", "validation"):
        entries = data.get(part) or []
        for entry in [entries] if isinstance(entries, Mapping) else entries:
            entry = dict(entry)
            update_single_dataset_config(entry, data.get("default") or {})
            try:
                dataset = load(entry)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"data.{part}: {error}") from error
            yield part, entry, dataset


def supervised_samples(
    config: Mapping[str, Any], tokenizer: Any
) -> tuple[Samples, dict[str, Samples]]:
    """The training conversations, and the validation ones, if any, under ``default``.

    Args:
        config: The configuration; read are ``data``, ``policy`` and ``sft``.
        tokenizer: The tokenizer, with a chat template and a pad token.

    Raises:
        ValueError: If there are no training data.
        DataError: For a bad record.
    """
    data = config["data"]
    found: dict[str, list[tuple[Any, Any, str]]] = {"train": [], "validation": []}
    for part, _, dataset in load_datasets(data, load_response_dataset):
        parts = [(part, dataset.dataset, dataset.places)]
        if part == "train" and getattr(dataset, "val_dataset", None):
            parts.append(("validation", dataset.val_dataset, dataset.val_places))
        for name, records, places in parts:
            rows = zip(records, places, strict=True)
            found[name] += [(record, dataset.task_spec, place) for record, place in rows]
    if not found["train"]:
        raise ValueError("data.train: not set, expected a dataset or a list of them")
    names = ("add_bos", "add_eos", "add_generation_prompt")
    flags = {name: data[name] for name in names if name in data}
    only_final = bool(config["sft"].get("only_unmask_final", False))
    multiple = config["policy"].get("make_sequence_length_divisible_by") or 1

    def tokenize(record: tuple[dict[str, Any], Any], number: int) -> dict[str, Any]:
        datum, spec = record
        limit = data["max_input_seq_length"]
        sample = sft_processor(datum, spec, tokenizer, limit, number, **flags)
        return flat_sample(sample, only_unmask_final=only_final)

    def samples(rows: list[tuple[Any, Any, str]]) -> Samples:
        return Samples(
            [row[:2] for row in rows],
            [row[2] for row in rows],
            tokenize,
            pad_token_id=tokenizer.pad_token_id,
            multiple=multiple,
        )

    validation = found["validation"]
    return samples(found["train"]), {"default": samples(validation)} if validation else {}


def flat_sample(sample: dict[str, Any], *, only_unmask_final: bool) -> dict[str, Any]:
    """Join the messages of a conversation.

    Args:
        sample: From `nemo_rl_ref.data.processors.sft_processor`.
        only_unmask_final: Train on the last message only, whoever it is from, instead of on all
            messages of the assistant.

    Returns:
        A sample of `Samples`, of one row.
    """
    log = sample["message_log"]
    wanted = [m is log[-1] if only_unmask_final else m["role"] == "assistant" for m in log]
    masks = [torch.full_like(m["token_ids"], w) for m, w in zip(log, wanted, strict=True)]
    return {
        "rows": [torch.cat([m["token_ids"] for m in log])],
        "masks": [torch.cat(masks)],
        "loss_multiplier": sample["loss_multiplier"],
    }


def preference_samples(
    config: Mapping[str, Any], tokenizer: Any, *, add_loss_mask: bool
) -> tuple[Samples, dict[str, Samples]]:
    """The training pairs, and the validation pairs by name, that a configuration asks for.

    Args:
        config: The configuration; read are ``data`` and ``policy``.
        tokenizer: The tokenizer, with a chat template and a pad token.
        add_loss_mask: Whether batches have ``token_mask``.

    Raises:
        ValueError: If there are no training data.
        DataError: For a bad record.
    """
    data, multiple = config["data"], config["policy"].get("make_sequence_length_divisible_by") or 1

    def samples(entry: Mapping[str, Any]) -> Samples:
        entry = dict(entry)
        update_single_dataset_config(entry, data.get("default") or {})
        dataset = load_preference_dataset(entry)
        limit, spec = data["max_input_seq_length"], dataset.task_spec
        return Samples(
            dataset.dataset,
            dataset.places,
            lambda record, n: pair(preference_preprocessor(record, spec, tokenizer, limit, n)),
            pad_token_id=tokenizer.pad_token_id,
            multiple=multiple,
            add_loss_mask=add_loss_mask,
        )

    def pair(datum: Mapping[str, Any]) -> dict[str, Any]:
        logs = [datum[f"message_log_{side}"] for side in ("chosen", "rejected")]
        return {
            "rows": [torch.cat([message["token_ids"] for message in log]) for log in logs],
            "masks": [last_message_mask(log) for log in logs],
            "loss_multiplier": datum["loss_multiplier"],
        }

    if not isinstance(data.get("train"), Mapping):
        raise ValueError(f"data.train: got {data.get('train')!r}, expected one dataset")
    named = data.get("val_data_paths") or {}
    sets = {n: {"dataset_name": "PreferenceDataset", "data_path": p} for n, p in named.items()}
    if not sets and data.get("validation"):
        sets = {"default": data["validation"]}
    return samples(data["train"]), {name: samples(entry) for name, entry in sets.items()}
