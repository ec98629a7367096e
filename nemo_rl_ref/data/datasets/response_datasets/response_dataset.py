# SPDX-License-Identifier: Apache-2.0
"""Prompts with their answers."""

from __future__ import annotations

from typing import Any, Optional

from nemo_rl_ref.data.datasets.utils import read_messages
from nemo_rl_ref.files.records import DataError, Records


class ResponseDataset(Records):
    """Prompts with answers, one JSON object a line: ``{"input": …, "output": …}``.

    A record may instead have ``messages``, a list of chat messages, which is then taken as it is.

    Args:
        data_path: A ``.jsonl``, ``.parquet``, ``.arrow`` or ``.csv`` file, a folder that
            ``save_to_disk`` wrote or of data files, or the name of a Hugging Face dataset, with
            these fields.
        input_key: Field that holds the prompt.
        output_key: Field that holds the answer.
        subset: Subset of a Hugging Face dataset.
        split: Split of a Hugging Face dataset or a folder; ``train`` if not given.
        split_validation_size: Records to hold out for validation: their number, or below 1 their
            share. They are in ``val_dataset`` and ``val_places``, which are None if it is 0.
        seed: Seeds the choice of the held-out records.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: For a malformed line, a missing field, a field of the wrong type, or an empty
            file. The message names file and line.
    """

    val_dataset: list[dict[str, Any]] | None = None
    val_places: list[str] | None = None

    def __init__(
        self,
        data_path: str,
        input_key: str = "input",
        output_key: str = "output",
        subset: Optional[str] = None,
        split: Optional[str] = None,
        split_validation_size: float = 0,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        self.input_key = input_key
        self.output_key = output_key
        super().__init__(data_path, subset, split)
        self.dataset = [
            self._format_checked(record, place)
            for record, place in zip(self.dataset, self.places, strict=True)
        ]
        if split_validation_size > 0:
            self.split_train_validation(split_validation_size, seed)

    def format_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the record as chat messages: ``messages``, ``task_name``."""
        return {
            "messages": [
                {"role": "user", "content": data[self.input_key]},
                {"role": "assistant", "content": data[self.output_key]},
            ],
            "task_name": self.task_name,
        }

    def split_train_validation(self, test_size: float | int, seed: int) -> None:
        """Hold out records for validation: those that the ``datasets`` library would choose."""
        import datasets

        size = int(test_size) if test_size >= 1 else test_size
        if size >= len(self.dataset):
            raise ValueError(
                f"split_validation_size: got {test_size} with {len(self.dataset)} records, "
                "which leaves none to train on"
            )
        numbers = datasets.Dataset.from_dict({"row": list(range(len(self.dataset)))})
        parts = numbers.train_test_split(test_size=size, seed=seed)
        records, places = self.dataset, self.places
        self.val_dataset = [records[row] for row in parts["test"]["row"]]
        self.val_places = [places[row] for row in parts["test"]["row"]]
        self.dataset = [records[row] for row in parts["train"]["row"]]
        self.places = [places[row] for row in parts["train"]["row"]]

    def _format_checked(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        if "messages" in record:
            messages = read_conversation(record["messages"], place)
            return {**record, "messages": messages, "task_name": self.task_name}
        for key in (self.input_key, self.output_key):
            if key not in record:
                raise DataError(
                    f"{place}: no field {key!r}; got {sorted(record)}, expected "
                    f"{self.input_key}, {self.output_key}"
                )
            if not isinstance(record[key], str):
                raise DataError(
                    f"{place}: field {key!r} is {type(record[key]).__name__}, expected a string"
                )
        return self.format_data(record)


def read_conversation(messages: Any, place: str, key: str = "messages") -> list[dict[str, Any]]:
    """`nemo_rl_ref.data.datasets.utils.read_messages`, the last one from the assistant."""
    messages = read_messages(messages, f"{place}: field {key!r}")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the last message is from {messages[-1]['role']!r}, expected 'assistant'"
        )
    return messages
