# SPDX-License-Identifier: Apache-2.0
"""Tokenized samples, the order they come in, and batches of them."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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
from nemo_rl_ref.data.llm_message_utils import (
    add_loss_mask_to_message_log,
    message_log_to_flat_messages,
)
from nemo_rl_ref.data.processors import preference_preprocessor, sft_processor
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.files.records import DataError, tokenizing


class Samples:
    """Records that are tokenized when they are first used, in named columns, and batches of them.

    The tokens of a column stand in one tensor, row after row, out of which padded batches are cut.

    Args:
        records: The records.
        places: Where each comes from, for messages.
        tokenize: Makes a sample of a record and its number: under the name of each column a list
            with a tensor ``(T,)`` for each of the sample's rows, ``input_ids`` (int64) and
            ``token_mask`` (int64, 1 on tokens that are trained on); and ``loss_multiplier``, its
            weight.
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
        self._multiple = multiple
        self._fills: dict[str, float] = {"input_ids": pad_token_id}
        if add_loss_mask:
            self._fills["token_mask"] = 0
        self._samples: dict[int, dict[str, Any]] = {}
        self._first = torch.full((len(records),), -1)  # a sample's first row; -1 for none yet

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number not in self._samples:
            with tokenizing(self.places[number]):
                self._samples[number] = self._tokenize(self.records[number], number)
        return self._samples[number]

    @property
    def tokenized(self) -> list[int]:
        """The numbers of the samples that have been tokenized, ascending."""
        return sorted(self._samples)

    def tokenize(self, numbers: Iterable[int] | None = None) -> int:
        """Tokenize some samples now, all if not given.

        Returns:
            How many of them are too long and have no weight.

        Raises:
            DataError: For a bad record. The message names file and line.
        """
        numbers = range(len(self)) if numbers is None else numbers
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"record \d+: \d+ tokens, more than max_seq_length")
            dropped = sum(self[number]["loss_multiplier"] == 0 for number in numbers)
        self._pack()
        return dropped

    def add(self, name: str, rows: Mapping[int, Sequence[Tensor]], fill: float = 0) -> None:
        """Add a column to samples.

        Args:
            name: What batches call it.
            rows: By a sample's number, a tensor ``(T,)`` for each of its rows, as long as the row.
            fill: The value of the padding.

        Raises:
            ValueError: If a sample's rows have other lengths than its tokens.
        """
        for number, given in rows.items():
            expected = [len(row) for row in self[number]["input_ids"]]
            if (lengths := [len(row) for row in given]) != expected:
                raise ValueError(
                    f"{name}: got rows of {lengths} values for {self.places[number]}, expected "
                    f"{expected}, one a token"
                )
            self[number][name] = given
        self._fills[name] = fill
        self._pack()

    def _pack(self) -> None:
        whole = {n: s for n, s in self._samples.items() if self._fills.keys() <= s.keys()}
        self._first.fill_(-1)
        if not whole:
            return
        samples = whole.values()
        self._flat = {
            name: torch.cat([row for sample in samples for row in sample[name]])
            for name in self._fills
        }
        self._lengths = torch.tensor([len(row) for s in samples for row in s["input_ids"]])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._rows = len(self._lengths) // len(whole)  # of each sample
        self._first[list(whole)] = torch.arange(len(whole)) * self._rows
        self._weights = torch.tensor([sample["loss_multiplier"] for sample in samples])

    def batch(self, numbers: Sequence[int]) -> BatchedDataDict[Any]:
        """The padded batch of the samples with these numbers.

        Returns:
            The rows of a sample next to each other: ``input_ids`` int64 ``(B, S)``, padded on the
            right, ``token_mask`` int64 ``(B, S)`` if asked for, and other columns that were added,
            ``(B, S)``; ``input_lengths`` int64 ``(B,)`` and ``sample_mask`` float32 ``(B,)``.

        Raises:
            ValueError: If a column was added to other samples, and not to one of these.
        """
        first = self._first[numbers]
        if (first < 0).any():
            self.tokenize(numbers)
            first = self._first[numbers]
            for number in (n for n in numbers if self._first[n] < 0):
                lacking = ", ".join(self._fills.keys() - self._samples[number].keys())
                place = self.places[number]
                raise ValueError(f"{place}: the sample has no {lacking}; add it first")
        rows = first
        if self._rows > 1:
            rows = (first.unsqueeze(1) + torch.arange(self._rows)).flatten()
        lengths = self._lengths[rows]
        columns = torch.arange(-(-int(lengths.max()) // self._multiple) * self._multiple)
        padding = columns >= lengths.unsqueeze(1)
        places = (self._starts[rows].unsqueeze(1) + columns).masked_fill_(padding, 0)
        batch: BatchedDataDict[Any] = BatchedDataDict(
            {
                name: flat[places].masked_fill_(padding, self._fills[name])
                for name, flat in self._flat.items()
            }
        )
        batch["input_lengths"] = lengths
        batch["sample_mask"] = self._weights[rows // self._rows]
        return batch


def digest(records: Iterable[Any]) -> str:
    """A sum over all records, to notice that a data file has changed."""
    summed = hashlib.sha256()
    for record in records:
        summed.update(repr(record).encode())
    return summed.hexdigest()


@dataclass(frozen=True)
class Batches:
    """Which samples each batch of a run has: every epoch a new order, the last part batch left out.

    A sequence of lists with the numbers of samples; batch ``k`` belongs to epoch
    ``k // per_epoch``.

    Attributes:
        samples: Number of samples.
        batch_size: Samples of a batch.
        seed: Of the run; seeds the order, see `order`.
        max_epochs: How often to go through the samples.
        max_steps: Number of batches if that is fewer; below 0 for no limit.
        shuffle: Whether to shuffle.
        num_workers: ``data.num_workers``, see `order`.

    Raises:
        ValueError: If ``batch_size`` is not positive; in a loop, if it is more than ``samples``.

    Example:
        >>> list(Batches(samples=5, batch_size=2, seed=42))
        [[4, 3], [2, 0]]
    """

    samples: int
    batch_size: int
    seed: int
    max_epochs: int = 1
    max_steps: int = -1
    shuffle: bool = True
    num_workers: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a positive number")

    @property
    def per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return self.samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        if not self.per_epoch:
            raise ValueError(
                f"batch_size: got {self.batch_size} with {self.samples} samples, which does not "
                "make one batch"
            )
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        most = min(self.max_epochs * self.per_epoch, sys.maxsize)
        return most if self.max_steps < 0 else min(most, self.max_steps)

    def __getitem__(self, number: int) -> list[int]:
        if not 0 <= number < len(self):
            raise IndexError(f"number: got {number}, expected one of {len(self)} batches from 0 on")
        epoch, within = divmod(number, self.per_epoch)
        numbers: Sequence[int] = range(self.samples)
        if self.shuffle:
            numbers = order(self.samples, self.seed, epoch, self.num_workers)
        return list(numbers[within * self.batch_size : (within + 1) * self.batch_size])

    def used(self) -> list[int]:
        """The numbers of the samples that any batch has, ascending.

        Not every epoch is looked at: a run may have more of them than can be counted.
        """
        looked_at = len(self) if self.shuffle else min(len(self), self.per_epoch)
        found: set[int] = set()
        for number in range(looked_at):
            found.update(self[number])
            if len(found) == self.samples:
                break
        return sorted(found)


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
            with _in_part(part):
                dataset = load(entry.given())
            yield part, entry, dataset


@contextmanager
def _in_part(part: str) -> Iterator[None]:
    """What is raised inside has the part's key before it, once."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"data.{part}: {error}") from error


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
    add_loss_mask_to_message_log([sample["message_log"]], only_unmask_final=only_unmask_final)
    flat = message_log_to_flat_messages(sample["message_log"])
    return {
        "input_ids": [flat["token_ids"]],
        "token_mask": [flat["token_loss_mask"]],
        "loss_multiplier": sample["loss_multiplier"],
    }


def preference_pairs(
    dataset: Any,
    tokenizer: Any,
    *,
    max_seq_length: int,
    mask_too_long: bool = False,
    multiple: int = 1,
    add_loss_mask: bool = True,
) -> Samples:
    """Make samples of the pairs of a preference dataset: the chosen row first, then the rejected.

    Args:
        dataset: A :class:`~nemo_rl_ref.data.datasets.preference_datasets.BinaryPreferenceDataset`
            or :class:`~nemo_rl_ref.data.datasets.preference_datasets.PreferenceDataset`.
        tokenizer: A Hugging Face tokenizer with a chat template and a pad token.
        max_seq_length: Longest allowed prompt plus response, in tokens.
        mask_too_long: What to do with a longer pair: ``False`` is an error, ``True`` keeps it with
            weight zero, as NeMo RL does.
        multiple: See `Samples`.
        add_loss_mask: See `Samples`.

    Returns:
        The samples. Tokenizing one raises a ``DataError`` that names file and line if the pair is
        too long, or its two responses are the same tokens.

    Raises:
        ValueError: If ``max_seq_length`` is not positive, or ``tokenizer`` has no chat template or
            no pad token.
    """
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length: got {max_seq_length}, expected a positive integer")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no pad token; set tokenizer.pad_token")
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: it has no chat template; set tokenizer.chat_template")
    spec = getattr(dataset, "task_spec", None)
    limit = max_seq_length if mask_too_long else 1 << 62  # without a limit the true length is told

    def tokenize(record: Mapping[str, Any], number: int) -> dict[str, Any]:
        datum = preference_preprocessor(dict(record), spec, tokenizer, limit, number)
        longest = max(datum["length_chosen"], datum["length_rejected"])
        if longest > max_seq_length:
            raise DataError(
                f"{dataset.places[number]}: the pair has {longest} tokens, more than "
                f"max_seq_length={max_seq_length}; raise the limit, shorten the pair, or pass "
                "mask_too_long=True to keep it with weight 0"
            )
        logs = [datum[f"message_log_{side}"] for side in ("chosen", "rejected")]
        rows = [torch.cat([message["token_ids"] for message in log]) for log in logs]
        if datum["loss_multiplier"] and torch.equal(*rows):
            raise DataError(
                f"{dataset.places[number]}: chosen and rejected are the same tokens; "
                "a pair must differ to express a preference"
            )
        return {
            "input_ids": rows,
            "token_mask": [last_message_mask(log) for log in logs],
            "loss_multiplier": datum["loss_multiplier"],
        }

    return Samples(
        dataset.dataset,
        dataset.places,
        tokenize,
        pad_token_id=tokenizer.pad_token_id,
        multiple=multiple,
        add_loss_mask=add_loss_mask,
    )


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

    def samples(entry: DatasetConfig, part: str) -> Samples:
        with _in_part(part):
            dataset = load_preference_dataset(_filled(entry, data.default).given())
        return preference_pairs(
            dataset,
            tokenizer,
            max_seq_length=data.longest,
            mask_too_long=True,
            multiple=settings.policy.make_sequence_length_divisible_by,
            add_loss_mask=add_loss_mask,
        )

    named = data.val_data_paths or {}
    sets = {
        name: DatasetConfig(dataset_name="PreferenceDataset", data_path=path)
        for name, path in named.items()
    }
    if not sets and data.validation:
        sets = {"default": data.validation}
    part = "val_data_paths" if named else "validation"
    validation = {name: samples(entry, part) for name, entry in sets.items()}
    return samples(data.train, "train"), validation
