# SPDX-License-Identifier: Apache-2.0
"""From a record to tokens: chat template, end token, and which tokens are trained on."""

from __future__ import annotations

import os.path
import warnings
from typing import Any

import torch


def format_messages(
    messages: list[dict[str, str]],
    tokenizer: Any,
    *,
    add_bos: bool = True,
    add_eos: bool = True,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    prompt: str | None = None,
) -> list[dict[str, Any]]:
    """Tokenize a conversation message by message with the tokenizer's chat template.

    The template is applied to ever longer prefixes of the conversation. The text a message adds
    is the text of that message, so the joined tokens are those of the whole conversation, as long
    as the template does not write earlier messages otherwise when one is added. One that does,
    such as Qwen3's, which drops earlier ``<think>`` parts, gets a warning: from where the text
    differs, it is a second time in the message that was added, as in NeMo RL. The begin token is
    added to the first message and the end token to the last one, unless the template has put them
    there already.

    Args:
        messages: Chat messages, ``{"role": str, "content": str}``.
        tokenizer: A Hugging Face tokenizer with a chat template.
        add_bos: Whether to add the begin token, if the tokenizer has one.
        add_eos: Whether to add the end token, if the tokenizer has one.
        add_generation_prompt: Whether what the template puts before an answer belongs to the
            message before it, and is not trained on, or to the answer.
        tools: Tool descriptions for the template.
        prompt: A text with ``{}`` where the content of the first user message goes.

    Returns:
        The messages with ``content`` as templated and ``token_ids``, an int64 tensor ``(T,)``.
    """
    formatted: list[dict[str, Any]] = []
    before = ""
    if prompt:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        filled = {"role": "user", "content": prompt.format(messages[first]["content"])}
        messages = [*messages[:first], filled, *messages[first + 1 :]]
    options = {} if tools is None else {"tools": tools}
    for index, message in enumerate(messages):
        after = tokenizer.apply_chat_template(
            messages[: index + 1],
            tokenize=False,
            add_special_tokens=False,
            add_generation_prompt=add_generation_prompt and message["role"] in ("user", "tool"),
            **options,
        )
        kept = before.rstrip().removesuffix(tokenizer.eos_token or "").rstrip()
        if not after.startswith(kept):
            warnings.warn(
                "the chat template writes earlier messages otherwise when one is added: parts of "
                "them are a second time in the tokens of the message after them, as in NeMo RL; "
                "train on one answer a record, or set policy.tokenizer.chat_template",
                stacklevel=2,
            )
        text = after[len(os.path.commonprefix([before, after])) :]  # noqa: RUF071, of strings
        if (
            add_bos
            and index == 0
            and tokenizer.bos_token
            and not text.startswith(tokenizer.bos_token)
        ):
            text = tokenizer.bos_token + text
        ended = tokenizer.eos_token and text.rstrip("\n").endswith(tokenizer.eos_token)
        if add_eos and index == len(messages) - 1 and tokenizer.eos_token and not ended:
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
    as NeMo RL does. :func:`nemo_rl_ref.training.samples.preference_pairs` refuses it instead,
    unless told otherwise.

    Args:
        datum_dict: A record in ranked form (``context``, ``completions``).
        task_data_spec: A :class:`~nemo_rl_ref.data.interfaces.TaskDataSpec` whose prompt the first
            user message is put into, or ``None``.
        tokenizer: A Hugging Face tokenizer with a chat template.
        max_seq_length: Longest allowed prompt plus answer, in tokens.
        idx: The record's number, carried into the result.

    Returns:
        ``message_log_chosen`` and ``message_log_rejected`` (messages with ``token_ids``),
        ``length_chosen`` and ``length_rejected`` in tokens, ``loss_multiplier`` (1.0, or 0.0 for
        a pair that was too long) and ``idx``.
    """
    first, second = sorted(datum_dict["completions"], key=lambda entry: entry["rank"])
    prompt = task_data_spec.prompt if task_data_spec else None
    logs = [
        format_messages(datum_dict["context"] + entry["completion"], tokenizer, prompt=prompt)
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


def sft_processor(
    datum_dict: dict[str, Any],
    task_data_spec: Any,
    tokenizer: Any,
    max_seq_length: int,
    idx: int,
    add_bos: bool = True,
    add_eos: bool = True,
    add_generation_prompt: bool = False,
) -> dict[str, Any]:
    """Tokenize one conversation for supervised training.

    A conversation of ``max_seq_length`` tokens or more is cut to a stub and given weight zero, as
    in NeMo RL. (:func:`preference_preprocessor` still takes one of exactly that length.)

    Args:
        datum_dict: A record with ``messages``, and ``tools`` if the template needs them.
        task_data_spec: As for :func:`preference_preprocessor`.
        tokenizer: A Hugging Face tokenizer with a chat template.
        max_seq_length: In tokens.
        idx: The record's number, carried into the result.
        add_bos: See :func:`format_messages`.
        add_eos: See :func:`format_messages`.
        add_generation_prompt: See :func:`format_messages`.

    Returns:
        ``message_log`` (messages with ``token_ids``), ``length`` in tokens before any cut,
        ``extra_env_info`` (None), ``loss_multiplier`` (1.0, or 0.0 if it was too long) and ``idx``.
    """
    message_log = format_messages(
        datum_dict["messages"],
        tokenizer,
        add_bos=add_bos,
        add_eos=add_eos,
        add_generation_prompt=add_generation_prompt,
        tools=datum_dict.get("tools"),
        prompt=task_data_spec.prompt if task_data_spec else None,
    )
    length = _length(message_log)
    too_long = length >= max_seq_length
    if too_long:
        for message in message_log:
            limit = min(4, max_seq_length // len(message_log))
            message["token_ids"] = message["token_ids"][:limit]
    return {
        "message_log": message_log,
        "length": length,
        "extra_env_info": None,
        "loss_multiplier": 0.0 if too_long else 1.0,
        "idx": idx,
    }


def _length(message_log: list[dict[str, Any]]) -> int:
    return sum(len(message["token_ids"]) for message in message_log)


def math_hf_data_processor(
    datum_dict: dict[str, Any],
    task_data_spec: Any,
    tokenizer: Any,
    max_seq_length: int,
    idx: int,
) -> dict[str, Any]:
    """Tokenize one problem for rollouts.

    A prompt of ``max_seq_length`` tokens or more is cut to a stub and given weight zero, as in
    NeMo RL.

    Args:
        datum_dict: A record whose ``messages`` are the problem and its answer.
        task_data_spec: A :class:`~nemo_rl_ref.data.interfaces.TaskDataSpec`: its prompt, which the
            problem is put into, and its system prompt.
        tokenizer: A Hugging Face tokenizer with a chat template.
        max_seq_length: In tokens.
        idx: The record's number, carried into the result.

    Returns:
        ``message_log`` (one message with the templated ``content`` and ``token_ids`` (T,)),
        ``length`` in tokens before any cut, ``extra_env_info`` with the ``ground_truth``,
        ``loss_multiplier`` (1.0, or 0.0 if it was too long), ``idx`` and ``task_name``.
    """
    problem, answer = (message["content"] for message in datum_dict["messages"][:2])
    if task_data_spec.prompt:
        problem = task_data_spec.prompt.format(problem)
    system = task_data_spec.system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": problem})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, add_special_tokens=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    too_long = len(ids) >= max_seq_length
    kept = ids[: min(4, max_seq_length)] if too_long else ids
    token_ids = torch.tensor(kept, dtype=torch.int64)
    return {
        "message_log": [{"role": "user", "content": text, "token_ids": token_ids}],
        "length": len(ids),
        "extra_env_info": {"ground_truth": answer},
        "loss_multiplier": 0.0 if too_long else 1.0,
        "idx": idx,
        "task_name": datum_dict["task_name"],
    }
