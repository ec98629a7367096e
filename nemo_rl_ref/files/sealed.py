# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or not there, and checked before anything is read from them.

Not in NeMo RL, which writes a checkpoint as ``tmp_step_N`` and renames it too, and then trusts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which file and what to do."""


def seal(folder: Path) -> None:
    """Write ``files.json``, size and SHA-256 of every file, and flush everything to the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = (path.stat().st_size, _digest(path))
        flush(path)
    (folder / "files.json").write_text(json.dumps(files, indent=1) + "\n")
    for path in [folder / "files.json", *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_checkpoint(checkpoint_path: str | Path) -> None:
    """Compare every file of a checkpoint with the sizes and sums it was sealed with.

    Args:
        checkpoint_path: The checkpoint.

    Raises:
        CheckpointError: If a file is missing, cut short, changed, or was put to those of a model
            later. The message names it, and the checkpoint to go back to.
    """
    folder = Path(checkpoint_path)
    listed = read_json(folder / "files.json")
    try:
        sums = {folder / name: (size, digest) for name, (size, digest) in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise broken(folder / "files.json", f"is not what was written: {error}") from error
    parts = [path for path in folder.iterdir() if path.is_dir()]
    for path in (path for part in parts for path in part.rglob("*")):
        if path.is_file() and path not in sums:
            raise broken(path, "was put there later, and libraries would read it")
    for path, (size, digest) in sums.items():
        if not path.exists():
            raise broken(path, "the file is missing")
        if path.stat().st_size != size:
            raise broken(path, f"has {path.stat().st_size} bytes, {size} were written")
        if _digest(path) != digest:
            raise broken(path, "is not what was written: its SHA-256 differs")


def temporary_name(step: int) -> str:
    """The name under which this process writes the checkpoint of a step."""
    return f"tmp_step_{step}_{socket.gethostname()}_{os.getpid()}"


def clear_leftovers(folder: Path) -> None:
    """Put away what a killed run left behind. Call it before a checkpoint is looked for.

    Only names that this package makes are touched.

    Args:
        folder: The folder of the checkpoints, which no other run writes to.
    """
    for path in list(folder.iterdir()):
        if re.fullmatch(r"old_step_\d+", path.name) and path.is_dir():
            final = path.with_name(path.name.removeprefix("old_"))
            if not final.exists():  # killed between the two renames of a replacement
                os.rename(path, final)
        if path.is_dir() and re.fullmatch(
            r"(old|removed)_step_\d+|tmp_step_\d+(_[\w.-]+_\d+)?", path.name
        ):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.reference_logprobs\.safetensors\.\w{8}\.tmp", path.name):
            path.unlink(missing_ok=True)  # of nemo_rl_ref.files.whole


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; `CheckpointError` if that cannot be done."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise broken(path, f"cannot be read: {error}") from error


def broken(path: Path, problem: str) -> CheckpointError:
    """The error for a file that is no good: it says what to do with the checkpoint."""
    folder = next(p for p in (path, *path.parents) if re.fullmatch(r"(\w+_)?step_\d+", p.name))
    others = [s for s in steps_in(folder.parent) if folder.name != f"step_{s}"]
    then = (
        f"the run then resumes from {folder.parent / f'step_{max(others)}'}"
        if others
        else "there is no other checkpoint, so the run then starts afresh"
    )
    return CheckpointError(
        f"{path}: {problem}. The checkpoint cannot be used. Move {folder} away; {then}"
    )


def steps_in(folder: Path) -> list[int]:
    """The steps of which a folder has checkpoints."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return [int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
