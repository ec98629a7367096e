# SPDX-License-Identifier: Apache-2.0
"""Conversations in OpenAI's format."""

from __future__ import annotations

from types import NoneType
from typing import Any

from nemo_rl_ref.data.datasets.response_datasets.response_dataset import read_conversation
from nemo_rl_ref.files.records import DataError, Records


class OpenAIFormatDataset(Records):
    """Conversations, one JSON object a line: ``{"messages": [{"role": …, "content": …}, …]}``.

    Records keep the structure they have in the file, so that ``use_preserving_dataset`` changes
    nothing here.

    Args:
        data_path: A ``.jsonl`` file.
        chat_key: Field that holds the messages. The last one is the assistant's.
        system_key: Field that holds a system message to put first.
        system_prompt: System message where there is no such field.
        tool_key: Field that holds tool descriptions for the chat template.
        use_preserving_dataset: Accepted, see above.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: For a malformed line, or messages that are not as above. The message names file
            and line.
    """

    def __init__(
        self,
        data_path: str,
        chat_key: str = "messages",
        system_key: str | None = None,
        system_prompt: str | None = None,
        tool_key: str | None = "tools",
        use_preserving_dataset: bool = False,
        **kwargs: Any,
    ) -> None:
        self.chat_key = chat_key
        self.system_key = system_key
        self.system_prompt = system_prompt
        self.tool_key = tool_key
        super().__init__(data_path)
        conversations = []
        for record, place in zip(self.dataset, self.places, strict=True):
            if chat_key not in record:
                raise DataError(f"{place}: no field {chat_key!r}; got {sorted(record)}")
            system = record.get(system_key) if system_key else None
            if not isinstance(system, (str, NoneType)):
                raise DataError(f"{place}: field {system_key!r} is {system!r:.80}, expected text")
            messages = read_conversation(record[chat_key], place, chat_key)
            conversations.append(self.format_data({**record, chat_key: messages}))
        self.dataset = conversations

    def format_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return ``messages``, ``task_name`` and, if there are any, ``tools``."""
        messages = list(data[self.chat_key])
        system = self.system_prompt
        if self.system_key is not None and self.system_key in data:
            system = data[self.system_key]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        result = {"messages": messages, "task_name": self.task_name}
        if self.tool_key and self.tool_key in data:
            result["tools"] = data[self.tool_key]
        return result
