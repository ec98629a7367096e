# SPDX-License-Identifier: Apache-2.0
"""Records, each with its place for errors, from all that NeMo RL reads data from.

That is a JSON Lines, Parquet, Arrow or CSV file; a folder that ``save_to_disk`` of Hugging Face's
``datasets`` has written; and what its ``load_dataset`` takes, a folder of data files or a name on
the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Suffixes of files with one JSON object a line.
JSON_LINES = (".json", ".jsonl")

#: Suffixes of other files, and what the ``datasets`` library calls them.
TABLES = {".arrow": "arrow", ".csv": "csv", ".parquet": "parquet"}


class DataError(ValueError):
    """A record cannot be used. The message names the file and the line."""


class Records:
    """Records of one data file, each with the place it came from.

    Attributes:
        dataset: The records, one dict each.
        places: For every record, ``file:line`` (or ``dataset[split][row]``), used in errors.
        task_name: The last two parts of the path joined by ``-``, without the suffix.
    """

    dataset: list[dict[str, Any]]
    places: list[str]
    task_name: str

    def __init__(self, data_path: str, subset: str | None = None, split: str | None = None) -> None:
        self.task_name = "-".join(str(data_path).split("/")[-2:]).split(".")[0].lstrip("-")
        if Path(data_path).suffix in (*JSON_LINES, *TABLES) and subset is not None:
            raise ValueError(
                f"subset: got {subset!r} with the local file {data_path}; "
                "a subset exists only for Hugging Face datasets"
            )
        if Path(data_path).suffix in JSON_LINES:
            rows = list(read_jsonl(data_path))
        else:
            rows = list(_read_datasets(str(data_path), subset, split))
        if not rows:
            raise DataError(f"{data_path}: no records; expected one JSON object a line")
        self.places = [place for place, _ in rows]
        self.dataset = [record for _, record in rows]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(place, record)`` for every non-blank line of a JSON Lines file.

    Args:
        path: A UTF-8 file with one JSON object a line.

    Yields:
        The place, ``file:line``, and the object.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a line is not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data_path: no file at {path}; expected a .jsonl file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 at byte {error.start} of the line") from error
            except json.JSONDecodeError as error:
                text = raw.decode("utf-8").strip()
                raise DataError(
                    f"{place}: not JSON ({error.msg}, column {error.colno}): {text[:80]!r}; "
                    "expected one JSON object a line"
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{place}: got a JSON {type(record).__name__}; expected an object, {{...}}"
                )
            yield place, record


def _read_datasets(
    path: str, subset: str | None, split: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of what ``datasets`` reads; without a split, those of ``train``."""
    import datasets  # only needed for these

    kind = TABLES.get(Path(path).suffix)
    local = kind or Path(path).is_absolute() or path.startswith(".")
    if local and not Path(path).exists():
        raise FileNotFoundError(f"data_path: nothing at {path}; expected a file or a folder")
    if kind:
        found, split = datasets.load_dataset(kind, data_files=path), None
    elif any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(path)
    else:
        found = datasets.load_dataset(path, subset)
    name = split or "train"
    if isinstance(found, datasets.DatasetDict):
        if name not in found:
            raise ValueError(f"split: got {name!r}, but {path} has {', '.join(map(str, found))}")
        found = found[name]
    elif split:
        raise ValueError(f"split: got {split!r}, but {path} has no splits; set it to null")
    for row, record in enumerate(found):
        yield (f"{path}[{row}]" if kind else f"{path}[{name}][{row}]"), dict(record)
