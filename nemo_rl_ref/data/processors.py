# SPDX-License-Identifier: Apache-2.0
"""From a record to tokens: chat template, end token, and which tokens are trained on."""

from __future__ import annotations

import os.path
import warnings
from typing import Any

import torch


def format_messages(messages: list[dict[str, str]], tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenize a conversation message by message with the tokenizer's chat template.

    The template is applied to ever longer prefixes of the conversation. The text a message adds
    is the text of that message, so the joined tokens are those of the whole conversation. The
    begin token is added to the first message and the end token to the last one, unless the
    template has put them there already.

    Args:
        messages: Chat messages, ``{"role": str, "content": str}``.
        tokenizer: A Hugging Face tokenizer with a chat template.

    Returns:
        The messages with ``content`` as templated and ``token_ids``, an int64 tensor ``(T,)``.
    """
    formatted: list[dict[str, Any]] = []
    before = ""
    for index, message in enumerate(messages):
        after = tokenizer.apply_chat_template(
            messages[: index + 1], tokenize=False, add_special_tokens=False
        )
        text = after[len(os.path.commonprefix([before, after])) :]
        if index == 0 and tokenizer.bos_token and not text.startswith(tokenizer.bos_token):
            text = tokenizer.bos_token + text
        ended = tokenizer.eos_token and text.rstrip("\n").endswith(tokenizer.eos_token)
        if index == len(messages) - 1 and tokenizer.eos_token and not ended:
            text += tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        formatted.append(
            {**message, "content": text, "token_ids": torch.tensor(ids, dtype=torch.int64)}
        )
        before = after
    return formatted


def preference_preprocessor(
    datum_dict: dict[str, Any],
    task_data_spec: Any,
    tokenizer: Any,
    max_seq_length: int,
    idx: int,
) -> dict[str, Any]:
    """Tokenize one pair for DPO or reward-model training.

    A pair longer than ``max_seq_length`` is cut to a stub and given weight zero, with a warning,
    as NeMo RL does. :func:`nemo_rl_ref.preferences.load_preferences` refuses it instead,
    unless told otherwise.

    Args:
        datum_dict: A record in ranked form (``context``, ``completions``).
        task_data_spec: Not used here; NeMo RL takes prompt templates from it. Pass ``None``.
        tokenizer: A Hugging Face tokenizer with a chat template.
        max_seq_length: Longest allowed prompt plus answer, in tokens.
        idx: The record's number, carried into the result.

    Returns:
        ``message_log_chosen`` and ``message_log_rejected`` (messages with ``token_ids``),
        ``length_chosen`` and ``length_rejected`` in tokens, ``loss_multiplier`` (1.0, or 0.0 for
        a pair that was too long) and ``idx``.
    """
    first, second = sorted(datum_dict["completions"], key=lambda entry: entry["rank"])
    logs = [
        format_messages(datum_dict["context"] + entry["completion"], tokenizer)
        for entry in (first, second)
    ]
    lengths = [_length(log) for log in logs]
    loss_multiplier = 1.0
    if max(lengths) > max_seq_length:
        warnings.warn(
            f"record {idx}: {max(lengths)} tokens, more than max_seq_length={max_seq_length}; "
            "its weight is set to 0",
            stacklevel=2,
        )
        loss_multiplier = 0.0
        for log in logs:
            for message in log:
                message["token_ids"] = message["token_ids"][: min(4, max_seq_length // len(log))]
        lengths = [_length(log) for log in logs]
    return {
        "message_log_chosen": logs[0],
        "message_log_rejected": logs[1],
        "length_chosen": lengths[0],
        "length_rejected": lengths[1],
        "loss_multiplier": loss_multiplier,
        "idx": idx,
    }


def _length(message_log: list[dict[str, Any]]) -> int:
    return sum(len(message["token_ids"]) for message in message_log)
