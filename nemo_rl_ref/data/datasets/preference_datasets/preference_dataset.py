# SPDX-License-Identifier: Apache-2.0
"""Pairs written as a context and ranked completions."""

from __future__ import annotations

import math
from typing import Any

from nemo_rl_ref.data.datasets.utils import read_messages
from nemo_rl_ref.files.records import DataError, Records


class PreferenceDataset(Records):
    """Preference data in ranked form, one JSON object a line.

    A record is ``{"context": [messages], "completions": [{"rank": 0, "completion": [messages]},
    {"rank": 1, "completion": [messages]}]}``; the lower rank is preferred. A message is
    ``{"role": …, "content": …}``. Training takes exactly two completions with different ranks.

    Args:
        data_path: A ``.jsonl``, ``.parquet``, ``.arrow`` or ``.csv`` file, a folder that
            ``save_to_disk`` wrote or of data files, or the name of a Hugging Face dataset, with
            these fields.
        subset: Subset of a Hugging Face dataset.
        split: Split of a Hugging Face dataset or a folder; ``train`` if not given.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: For a malformed line, a missing field, a wrong number of completions, a tie,
            two equal completions, or an empty file. The message names file and line.
    """

    def __init__(
        self,
        data_path: str,
        subset: str | None = None,
        split: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_path, subset, split)
        self.dataset = [
            {**_read_ranked(record, place), "task_name": self.task_name}
            for record, place in zip(self.dataset, self.places, strict=True)
        ]


def _read_ranked(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The record with every content as text."""
    for key in ("context", "completions"):
        if key not in record:
            raise DataError(
                f"{place}: no field {key!r}; got {sorted(record)}, expected context, completions"
            )
        if not isinstance(record[key], list):
            raise DataError(
                f"{place}: field {key!r} is {type(record[key]).__name__}, expected a list"
            )
    if len(record["completions"]) != 2:
        raise DataError(f"{place}: got {len(record['completions'])} completions, expected 2")
    completions = []
    for number, entry in enumerate(record["completions"]):
        where = f"{place}: completions[{number}]"
        if not isinstance(entry, dict) or "rank" not in entry or "completion" not in entry:
            raise DataError(
                f'{where} is {entry!r:.80}, expected {{"rank": int, "completion": [messages]}}'
            )
        rank = entry["rank"]
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or math.isnan(rank):
            raise DataError(f"{where}.rank is {rank!r:.80}, expected a number")
        messages = read_messages(entry["completion"], f"{where}.completion")
        completions.append({**entry, "completion": messages})
    context = read_messages(record["context"], f"{place}: context")
    first, second = completions
    if first["rank"] == second["rank"]:
        raise DataError(
            f"{place}: both completions have rank {first['rank']}; a tie expresses no preference"
        )
    if first["completion"] == second["completion"]:
        raise DataError(
            f"{place}: both completions are {first['completion']!r:.80}; "
            "a pair must differ to express a preference"
        )
    return {**record, "context": context, "completions": completions}
