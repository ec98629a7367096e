# SPDX-License-Identifier: Apache-2.0
"""Records, each with its place for errors, from all that NeMo RL reads data from.

That is a JSON Lines, JSON, Parquet, Arrow, CSV or text file; a folder that ``save_to_disk`` of
Hugging Face's ``datasets`` has written; and what its ``load_dataset`` takes, a folder of data files
or a name on the hub.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

#: Suffixes of files with one JSON object a line, or one array of objects.
JSON_LINES = (".json", ".jsonl")

#: Suffixes of other files, and what the ``datasets`` library calls them.
TABLES = {".arrow": "arrow", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

#: The longest line of a JSON Lines file, in bytes.
MAX_LINE = 32 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8


class DataError(ValueError):
    """A record cannot be used. The message names the file and the line."""


#: The longest that a record's tokens may take, in seconds of the processor.
MAX_SECONDS = 60.0


@contextmanager
def tokenizing(place: str) -> Iterator[None]:
    """Tokenize one record inside: whatever is raised becomes an error that names its place.

    A chat template is a program. One that has not ended after `MAX_SECONDS` is stopped, where
    the system can: in the main thread, not on Windows.

    Args:
        place: The record's file and line.

    Raises:
        DataError: For any error but a `DataError`, with its first line.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"the chat template did not end after {MAX_SECONDS:g} s")

    in_main = threading.current_thread() is threading.main_thread()
    limited = in_main and hasattr(signal, "setitimer")
    before = signal.signal(signal.SIGVTALRM, stop) if limited else None
    if limited:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of the template, of the tokenizer
        text = str(error).strip().split("\n")[0]
        raise DataError(f"{place}: cannot be tokenized: {type(error).__name__}: {text}") from error
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


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
        path: A UTF-8 file with one JSON object a line, or, as the ``datasets`` library reads it,
            one array of objects.

    Yields:
        The place, ``file:line``, in an array ``file[row]``, and the object.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a line is not JSON, not an object, or longer than `MAX_LINE`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data_path: no file at {path}; expected a .jsonl file")
    with path.open("rb") as file:
        is_array = file.peek(4096).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
        for place, record in _read_array(path, file) if is_array else _read_lines(path, file):
            if not isinstance(record, dict):
                raise DataError(
                    f"{place}: got a JSON {type(record).__name__}; expected an object, {{...}}"
                )
            yield place, record


def _read_array(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for row, record in enumerate(_parse(str(path), file.read(), "one JSON array of objects")):
        yield f"{path}[{row}]", record


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
    for number, raw in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if len(raw) > MAX_LINE:
            raise DataError(f"{place}: got more than {MAX_LINE} bytes, expected one record a line")
        if raw.removeprefix(_BYTE_ORDER_MARK).strip():
            yield place, _parse(place, raw, "one JSON object a line")


def _parse(place: str, raw: bytes, expected: str) -> Any:
    """The value of a JSON text."""
    try:
        text = raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start} of the line") from error
    try:
        value = json.loads(text)
        if "\\u" in text:  # a tokenizer takes no half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DataError(f"{place}: {half!r} is half a character, expected Unicode text") from error
    except RecursionError as error:
        raise DataError(
            f"{place}: nested too deeply: {text[:80]!r}; expected {expected}"
        ) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        where = where if "\n" in text else f"column {error.colno}"
        raise DataError(
            f"{place}: not JSON ({error.msg}, {where}): {text[:80]!r}; expected {expected}"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place}: not JSON ({error})") from error
    return value


def _read_datasets(
    path: str, subset: str | None, split: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of what ``datasets`` reads; without a split, those of ``train``."""
    import datasets  # only needed for these

    kind = TABLES.get(Path(path).suffix)
    local = kind or Path(path).is_absolute() or path.startswith(".")
    if local and not Path(path).exists():
        raise FileNotFoundError(f"data_path: nothing at {path}; expected a file or a folder")
    if not kind and Path(path).is_file():
        raise ValueError(
            f"data_path: got {path}, expected a file with the suffix "
            f"{', '.join((*JSON_LINES, *TABLES))}; NeMo RL reads no other, packed ones neither"
        )
    try:
        if kind:
            found, split = datasets.load_dataset(kind, data_files=path), None
        elif any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, subset)
    except Exception as error:  # of pandas, of PyArrow, of the hub
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read: {reason}") from error
    name = split or "train"
    if isinstance(found, datasets.DatasetDict):
        if name not in found:
            raise ValueError(f"split: got {name!r}, but {path} has {', '.join(map(str, found))}")
        found = found[name]
    elif split:
        raise ValueError(f"split: got {split!r}, but {path} has no splits; set it to null")
    for row, record in enumerate(found):
        fields = dict(record)
        if kind == "csv":  # its numbers are text that looks like numbers
            fields = {k: str(v) if isinstance(v, (int, float)) else v for k, v in fields.items()}
        yield (f"{path}[{row}]" if kind else f"{path}[{name}][{row}]"), fields
