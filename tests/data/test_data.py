# SPDX-License-Identifier: Apache-2.0
"""Preference data: formats, tokens, masks, padding, and what bad input is told."""

import json

import pytest
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.data.collate_fn import preference_collate_fn
from nemo_rl_ref.data.datasets.preference_datasets import (
    BinaryPreferenceDataset,
    PreferenceDataset,
)
from nemo_rl_ref.data.processors import format_messages, preference_preprocessor
from nemo_rl_ref.files.records import DataError

GOOD = {"prompt": "1+2=", "chosen": "3", "rejected": "12"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "pairs.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n")
        return str(path)

    return write_lines


def ranked(chosen_rank=0, **changes):
    record = {
        "context": [{"role": "user", "content": "1+2="}],
        "completions": [
            {"rank": chosen_rank, "completion": [{"role": "assistant", "content": "3"}]},
            {"rank": 1 - chosen_rank, "completion": [{"role": "assistant", "content": "12"}]},
        ],
    }
    return {**record, **changes}


# What a file becomes


def test_binary_records_become_ranked(write):
    dataset = BinaryPreferenceDataset(write(GOOD))
    assert dataset[0] == {**ranked(), "task_name": dataset.task_name}
    assert dataset.task_name.endswith("pairs")


def test_the_lower_rank_is_chosen_wherever_it_stands(write, tokenizer):
    pair = preference_preprocessor(
        PreferenceDataset(write(ranked(chosen_rank=1)))[0], None, tokenizer, 16, 0
    )
    assert tokenizer.decode(pair["message_log_chosen"][-1]["token_ids"]) == "12</s>"


def test_blank_lines_are_skipped_and_do_not_shift_line_numbers(write):
    dataset = BinaryPreferenceDataset(write(GOOD, "", {**GOOD, "prompt": "2+1="}))
    assert [place.rsplit(":", 1)[1] for place in dataset.places] == ["1", "3"]


def test_prompt_as_messages(write):
    messages = [{"role": "user", "content": "1+2="}]
    assert BinaryPreferenceDataset(write({**GOOD, "prompt": messages}))[0]["context"] == messages


def test_padding_to_a_multiple(tokenizer, write):
    dataset = BinaryPreferenceDataset(write(GOOD))
    pairs = [preference_preprocessor(dataset[0], None, tokenizer, 16, 0)]
    batch = preference_collate_fn(
        pairs, tokenizer, make_sequence_length_divisible_by=8, add_loss_mask=True
    )
    assert batch["input_ids"].shape == batch["token_mask"].shape == (2, 8)
    assert "token_mask" not in preference_collate_fn(pairs, tokenizer, 1, False)


def test_messages_join_to_the_whole_conversation(tokenizer):
    messages = [
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5="},
        {"role": "assistant", "content": "9"},
    ]
    joined = torch.cat([m["token_ids"] for m in format_messages(messages, tokenizer)])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(joined) == whole
    assert whole.count("<s>") == 1


def test_begin_and_end_tokens_are_added_where_the_template_has_none(tokenizer):
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        first, last = format_messages(
            ranked()["context"] + [{"role": "a", "content": "3"}], tokenizer
        )
    finally:
        tokenizer.chat_template = template
    assert (first["content"], last["content"]) == ("<s>1+2=", "3</s>")


# What bad input is told


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, '{"prompt": "1+2=",'], r"pairs.jsonl:2: not JSON .* expected one JSON object"),
        ([GOOD, "[1, 2]"], r"pairs.jsonl:2: got a JSON list; expected an object"),
        ([{"prompt": "1", "chosen": "2"}], r"pairs.jsonl:1: no field 'rejected'; got \['chosen'"),
        ([{**GOOD, "chosen": 3}], r"pairs.jsonl:1: field 'chosen' is int, expected a string"),
        ([GOOD, {**GOOD, "rejected": "3"}], r"pairs.jsonl:2: 'chosen' and 'rejected' are both '3'"),
        ([""], r"pairs.jsonl: no records; expected one JSON object a line"),
    ],
)
def test_bad_binary_file(write, lines, expected):
    with pytest.raises(DataError, match=expected):
        BinaryPreferenceDataset(write(*lines))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"completions": []}, r":1: no field 'context'"),
        (ranked(context="1+2="), r":1: field 'context' is str, expected a list"),
        (ranked(context=[]), r":1: context is \[\], expected a list of"),
        (ranked(completions=ranked()["completions"][:1]), r":1: got 1 completions, expected 2"),
        (ranked(completions=[{"rank": 0}, {"rank": 1}]), r"completions\[0\] is .*expected"),
        (
            ranked(completions=[{**c, "rank": 0} for c in ranked()["completions"]]),
            r":1: both completions have rank 0; a tie",
        ),
        (
            ranked(completions=[{**ranked()["completions"][0], "rank": r} for r in (0, 1)]),
            r":1: both completions are .*a pair must differ",
        ),
    ],
)
def test_bad_ranked_file(write, record, expected):
    with pytest.raises(DataError, match=expected):
        PreferenceDataset(write(record))


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:2: not UTF-8 at byte 12"):
        BinaryPreferenceDataset(str(path))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_path: no file at .*missing.jsonl"):
        BinaryPreferenceDataset(str(tmp_path / "missing.jsonl"))


def test_subset_of_a_local_file(write):
    with pytest.raises(ValueError, match=r"subset: got 'x' with the local file"):
        BinaryPreferenceDataset(write(GOOD), subset="x")


def test_collate_refuses_nothing(tokenizer):
    with pytest.raises(ValueError, match="data_batch: got no pairs"):
        preference_collate_fn([], tokenizer, 1, True)
