# SPDX-License-Identifier: Apache-2.0
"""What belongs to a dataset besides its records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

PathLike = Union[str, "os.PathLike[Any]"]


@dataclass
class TaskDataSpec:
    """Texts around the records of a dataset. The settings for video in NeMo RL's are left out.

    Attributes:
        task_name: The dataset's name.
        prompt_file: A text file with ``{}`` where the first user message goes.
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
    return Path(path).read_text(encoding="utf-8")
