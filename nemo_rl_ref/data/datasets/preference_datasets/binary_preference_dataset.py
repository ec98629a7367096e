# SPDX-License-Identifier: Apache-2.0
"""Pairs written as prompt, chosen and rejected text."""

from __future__ import annotations

from typing import Any

from nemo_rl_ref.data.datasets.utils import read_messages
from nemo_rl_ref.files.records import DataError, Records


class BinaryPreferenceDataset(Records):
    """Preference pairs, one JSON object a line: ``{"prompt": …, "chosen": …, "rejected": …}``.

    The prompt is a string, or a list of chat messages. Each record is turned into the ranked
    form of :class:`~nemo_rl_ref.data.datasets.preference_datasets.PreferenceDataset`, the chosen
    answer with rank 0 and the rejected one with rank 1.

    Args:
        data_path: A ``.jsonl``, ``.parquet``, ``.arrow`` or ``.csv`` file, a folder that
            ``save_to_disk`` wrote or of data files, or the name of a Hugging Face dataset, with
            these fields.
        prompt_key: Field that holds the prompt.
        chosen_key: Field that holds the preferred answer.
        rejected_key: Field that holds the other answer.
        subset: Subset of a Hugging Face dataset.
        split: Split of a Hugging Face dataset or a folder; ``train`` if not given.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: For a malformed line, a missing field, a field of the wrong type, an empty
            file, or a chosen answer equal to the rejected one. The message names file and line.
    """

    def __init__(
        self,
        data_path: str,
        prompt_key: str = "prompt",
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        subset: str | None = None,
        split: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.prompt_key = prompt_key
        self.chosen_key = chosen_key
        self.rejected_key = rejected_key
        super().__init__(data_path, subset, split)
        self.dataset = [
            self._format_checked(record, place)
            for record, place in zip(self.dataset, self.places, strict=True)
        ]

    def format_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the record in ranked form: ``context``, ``completions``, ``task_name``."""
        prompt = data[self.prompt_key]
        context = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        completions = [
            {"rank": rank, "completion": [{"role": "assistant", "content": data[key]}]}
            for rank, key in enumerate((self.chosen_key, self.rejected_key))
        ]
        return {"context": context, "completions": completions, "task_name": self.task_name}

    def _format_checked(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        keys = (self.prompt_key, self.chosen_key, self.rejected_key)
        for key in keys:
            if key not in record:
                raise DataError(
                    f"{place}: no field {key!r}; got {sorted(record)}, expected "
                    f"{', '.join(map(str, keys))}"
                )
            accepted = (str, list) if key == self.prompt_key else str
            if not isinstance(record[key], accepted):
                raise DataError(
                    f"{place}: field {key!r} is {type(record[key]).__name__}, expected a string"
                )
        if record[self.chosen_key] == record[self.rejected_key]:
            raise DataError(
                f"{place}: {self.chosen_key!r} and {self.rejected_key!r} are both "
                f"{record[self.chosen_key]!r}; a pair must differ to express a preference"
            )
        if isinstance(prompt := record[self.prompt_key], list):
            prompt = read_messages(prompt, f"{place}: field {self.prompt_key!r}")
        return self.format_data({**record, self.prompt_key: prompt})
