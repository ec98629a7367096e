# SPDX-License-Identifier: Apache-2.0
"""What belongs to a dataset besides its records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Optional, Union

PathLike = Union[str, "os.PathLike[Any]"]


@dataclass
class TaskDataSpec:
    """Texts around the records of a dataset. The settings for video in NeMo RL's are left out.

    Attributes:
        task_name: The dataset's name.
        prompt_file: A text file with ``{}`` where the first user message goes, and other braces
            doubled.
        system_prompt_file: A text file. Supervised and preference data do not use it, as in NeMo
            RL.
        prompt: What `prompt_file` holds, or None.
        system_prompt: What `system_prompt_file` holds, or None.
    """

    task_name: Optional[str] = None
    prompt_file: Optional[PathLike] = None
    system_prompt_file: Optional[PathLike] = None

    def __post_init__(self) -> None:
        self.prompt = _read("prompt_file", self.prompt_file)
        if self.prompt is not None:
            _check_placeholder(f"prompt_file: {self.prompt_file}", self.prompt)
        self.system_prompt = _read("system_prompt_file", self.system_prompt_file)

    def copy_defaults(self, from_spec: TaskDataSpec) -> None:
        """Take over the texts that are not set here."""
        self.prompt = self.prompt if self.prompt is not None else from_spec.prompt
        if self.system_prompt is None:
            self.system_prompt = from_spec.system_prompt


def _read(key: str, path: Optional[PathLike]) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: no file at {path}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path} is not UTF-8 at byte {error.start}") from error


def _check_placeholder(where: str, prompt: str) -> None:
    """A prompt is filled in by ``str.format``, which also follows attributes and fails late."""
    try:
        fields = [part[1:] for part in Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        fields = [error]
    if fields not in ([("", "", None)], [("0", "", None)] * (len(fields) or 1)):
        found = [f"{{{field[0]}}}" if isinstance(field, tuple) else str(field) for field in fields]
        raise ValueError(
            f"{where} has {', '.join(found) or 'no placeholder'}, expected {{}} once, where the "
            r"message goes; write braces that are text twice, as in \boxed{{}}"
        )
