# SPDX-License-Identifier: Apache-2.0
"""From a configuration's entry to a dataset."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl_ref.data.interfaces import TaskDataSpec
from nemo_rl_ref.files.records import JSON_LINES, TABLES, DataError

#: Keys that say which data a run sees: a dataset that does not take one must not be silent.
_BEHAVIORAL_KEYS = (
    "chosen_key", "data_path", "input_key", "output_key", "prompt_key", "rejected_key", "seed",
    "split", "split_validation_size", "subset",
)  # fmt: skip


def update_single_dataset_config(
    data_config: dict[str, Any], default_data_config: dict[str, Any]
) -> None:
    """Fill in, in place, what an entry leaves out and ``data.default`` has."""
    for key, value in default_data_config.items():
        data_config.setdefault(key, value)


def warn_on_unsupported_dataset_config_keys(
    dataset_class: Any, data_config: Mapping[str, Any]
) -> None:
    """Warn of keys that choose the data and that the dataset does not take."""
    accepted = inspect.signature(dataset_class).parameters
    for key in _BEHAVIORAL_KEYS:
        value = data_config.get(key)
        if value is None or key in accepted or (key == "split_validation_size" and not value):
            continue
        warnings.warn(
            f"{key}: got {value!r}, and {dataset_class.__name__} takes no such key: it is ignored",
            stacklevel=3,
        )


def build_dataset(data_config: Mapping[str, Any], registry: Mapping[str, Any]) -> Any:
    """Build the dataset that an entry names. Not in NeMo RL.

    Args:
        data_config: ``dataset_name``, one of the registry's, and its arguments.
        registry: Classes by name.

    Raises:
        ValueError: If the name is not in the registry, or there is no ``data_path``.
    """
    name = data_config.get("dataset_name")
    if not isinstance(name, str) or name not in registry:
        near = difflib.get_close_matches(str(name), registry, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"dataset_name: got {name!r}; {hint}Here it can be {' or '.join(registry)}, with "
            f"data_path, a file ({', '.join((*JSON_LINES, *TABLES))}), a folder, or the name of a "
            "Hugging Face dataset. NeMo RL's other datasets, and dotted names of classes, are left "
            "out"
        )
    if not data_config.get("data_path"):
        raise ValueError(f"data_path: not set, expected the data file of the {name}")
    warn_on_unsupported_dataset_config_keys(registry[name], data_config)
    split = data_config.get("split")
    is_file = Path(data_config["data_path"]).suffix in (*JSON_LINES, *TABLES)
    if split not in (None, "train") and is_file:
        warnings.warn(
            f"split: got {split!r} for the local file {data_config['data_path']}, which has no "
            "splits: all of it is used here, and NeMo RL stops; set split to null",
            stacklevel=3,
        )
    dataset = registry[name](**data_config)
    dataset.task_spec = TaskDataSpec(
        task_name=dataset.task_name,
        prompt_file=data_config.get("prompt_file"),
        system_prompt_file=data_config.get("system_prompt_file"),
    )
    return dataset


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Check chat messages, and join the parts of a content that is written in parts. Not in NeMo RL.

    NeMo RL hands both to the chat template as they are, and one that expects text prints the parts
    as Python does.

    Args:
        messages: A list of ``{"role": …, "content": …}``. A content is text, a list of parts
            ``{"type": "text", "text": …}``, or None in a message with ``tool_calls``.
        where: The record's place and the field, for errors.

    Returns:
        The messages, every content text or None.

    Raises:
        DataError: If they are anything else. The message begins with `where`.
    """
    shape = 'a list of {"role": …, "content": …}'
    if not (isinstance(messages, list) and messages):
        raise DataError(f"{where} is {messages!r:.80}, expected {shape}")
    found = []
    for number, message in enumerate(messages):
        if not (isinstance(message, Mapping) and {"role", "content"} <= set(message)):
            raise DataError(f"{where} is {messages!r:.80}, expected {shape}")
        if not (isinstance(message["role"], str) and message["role"]):
            raise DataError(f"{where}[{number}].role is {message['role']!r:.80}, expected text")
        content = message["content"]
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, Mapping)]
            texts = [part.get("text") for part in parts if part.get("type") == "text"]
            texts = [text for text in texts if isinstance(text, str)]
            content = "".join(texts) if len(texts) == len(content) else content
        if not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
            raise DataError(
                f"{where}[{number}].content is {content!r:.80}, expected text, or parts "
                '{"type": "text", "text": …}; images and sounds are left out'
            )
        found.append({**message, "content": content})
    return found
