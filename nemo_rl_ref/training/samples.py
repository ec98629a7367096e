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

from nemo_rl_ref.config.sections import (
    DataConfig,
    DatasetConfig,
    DPOSettings,
    RMSettings,
    SFTSettings,
)
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
        batch: BatchedDataDict[Any] = BatchedDataDict(zip(("input_ids", "token_mask"), cut))
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
        seed: Of the run; seeds the order, see `order`.
        num_workers: ``data.num_workers``, see `order`.
    """

    samples: int
    batch_size: int
    max_epochs: int
    max_steps: int
    shuffle: bool
    seed: int
    num_workers: int = 1

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
        numbers: Sequence[int] = range(self.samples)
        if self.shuffle:
            numbers = order(self.samples, self.seed, epoch, self.num_workers)
        return list(numbers[within * self.batch_size : (within + 1) * self.batch_size])


@lru_cache(maxsize=2)
def order(samples: int, seed: int, epoch: int, num_workers: int = 1) -> tuple[int, ...]:
    """Return the order of an epoch's samples, which is that of NeMo RL's data loader.

    NeMo RL seeds PyTorch with the run's seed and makes a torchdata ``StatefulDataLoader``, whose
    sampler takes the next int64 as its own seed and draws a permutation for each pass. A loader
    with workers draws two for each epoch and uses the second.

    Args:
        samples: Number of samples.
        seed: Of the run.
        epoch: From 0.
        num_workers: ``data.num_workers``; only whether it is 0 matters.

    Returns:
        The numbers of the samples, each once.

    Example:
        >>> order(5, seed=42, epoch=0)
        (4, 3, 2, 0, 1)
    """
    run = torch.Generator().manual_seed(seed)
    seed_of_sampler = torch.empty((), dtype=torch.int64).random_(generator=run)
    sampler = torch.Generator().manual_seed(int(seed_of_sampler))
    for _ in range(2 * epoch + 1 if num_workers else epoch):
        torch.randperm(samples, generator=sampler)
    return tuple(torch.randperm(samples, generator=sampler).tolist())


def load_datasets(
    data: DataConfig, load: Callable[[dict[str, Any]], Any]
) -> Iterator[tuple[str, DatasetConfig, Any]]:
    """Load the datasets of a configuration.

    Args:
        data: The section ``data``.
        load: Loads the dataset of an entry.

    Yields:
        ``train`` or ``validation``, the entry, filled up with ``data.default``, and the dataset.

    Raises:
        ValueError: What `load` raises, with the part's key before it.
        FileNotFoundError: Likewise.
    """
    for part, entries in (("train", data.train), ("validation", data.validation or [])):
        for entry in (_filled(entry, data.default) for entry in entries):
            try:
                dataset = load(entry.given())
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"data.{part}: {error}") from error
            yield part, entry, dataset


def _filled(entry: DatasetConfig, default: DatasetConfig | None) -> DatasetConfig:
    """An entry, with what it leaves out taken from the default."""
    given = entry.given()
    update_single_dataset_config(given, default.given() if default else {})
    return DatasetConfig(**given)


def supervised_samples(settings: SFTSettings, tokenizer: Any) -> tuple[Samples, dict[str, Samples]]:
    """The training conversations, and the validation ones, if any, under ``default``.

    Args:
        settings: The settings of the run.
        tokenizer: The tokenizer, with a chat template and a pad token.

    Raises:
        ValueError: If a dataset cannot be loaded.
        DataError: For a bad record.
    """
    data = settings.data
    found: dict[str, list[tuple[Any, Any, str]]] = {"train": [], "validation": []}
    for part, _, dataset in load_datasets(data, load_response_dataset):
        parts = [(part, dataset.dataset, dataset.places)]
        if part == "train" and getattr(dataset, "val_dataset", None):
            parts.append(("validation", dataset.val_dataset, dataset.val_places))
        for name, records, places in parts:
            rows = zip(records, places, strict=True)
            found[name] += [(record, dataset.task_spec, place) for record, place in rows]

    def tokenize(record: tuple[dict[str, Any], Any], number: int) -> dict[str, Any]:
        datum, spec = record
        sample = sft_processor(
            datum,
            spec,
            tokenizer,
            data.longest,
            number,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            add_generation_prompt=data.add_generation_prompt,
        )
        return flat_sample(sample, only_unmask_final=settings.sft.only_unmask_final)

    def samples(rows: list[tuple[Any, Any, str]]) -> Samples:
        return Samples(
            [row[:2] for row in rows],
            [row[2] for row in rows],
            tokenize,
            pad_token_id=tokenizer.pad_token_id,
            multiple=settings.policy.make_sequence_length_divisible_by,
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
    settings: DPOSettings | RMSettings, tokenizer: Any, *, add_loss_mask: bool
) -> tuple[Samples, dict[str, Samples]]:
    """The training pairs, and the validation pairs by name, that a configuration asks for.

    Args:
        settings: The settings of the run.
        tokenizer: The tokenizer, with a chat template and a pad token.
        add_loss_mask: Whether batches have ``token_mask``.

    Raises:
        ValueError: If a dataset cannot be loaded.
        DataError: For a bad record.
    """
    data = settings.data

    def samples(entry: DatasetConfig) -> Samples:
        dataset = load_preference_dataset(_filled(entry, data.default).given())
        limit, spec = data.longest, dataset.task_spec
        return Samples(
            dataset.dataset,
            dataset.places,
            lambda record, n: pair(preference_preprocessor(record, spec, tokenizer, limit, n)),
            pad_token_id=tokenizer.pad_token_id,
            multiple=settings.policy.make_sequence_length_divisible_by,
            add_loss_mask=add_loss_mask,
        )

    def pair(datum: Mapping[str, Any]) -> dict[str, Any]:
        logs = [datum[f"message_log_{side}"] for side in ("chosen", "rejected")]
        return {
            "rows": [torch.cat([message["token_ids"] for message in log]) for log in logs],
            "masks": [last_message_mask(log) for log in logs],
            "loss_multiplier": datum["loss_multiplier"],
        }

    named = data.val_data_paths or {}
    sets = {
        name: DatasetConfig(dataset_name="PreferenceDataset", data_path=path)
        for name, path in named.items()
    }
    if not sets and data.validation:
        sets = {"default": data.validation}
    return samples(data.train), {name: samples(entry) for name, entry in sets.items()}
