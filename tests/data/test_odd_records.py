# SPDX-License-Identifier: Apache-2.0
"""Records, prompt files and chat templates that are odd: read as meant, or one error with a place."""

import json
import warnings

import pytest
from rl_runs import settings as rl_config

from nemo_rl_ref import tiny
from nemo_rl_ref.config.sections import DataConfig
from nemo_rl_ref.data.datasets.preference_datasets import (
    BinaryPreferenceDataset,
    PreferenceDataset,
)
from nemo_rl_ref.data.datasets.response_datasets import OpenAIFormatDataset, ResponseDataset
from nemo_rl_ref.data.interfaces import TaskDataSpec
from nemo_rl_ref.data.processors import format_messages
from nemo_rl_ref.files import records
from nemo_rl_ref.files.records import DataError
from nemo_rl_ref.rl.rollouts import load_prompts
from nemo_rl_ref.training.samples import preference_pairs


@pytest.fixture
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture
def write(tmp_path):
    def lines(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return lines


def said(content, role="user"):
    return {"role": role, "content": content}


def pair(*, context=None, ranks=(0, 1), answers=("3", "4")):
    return {
        "context": [said("1+2=")] if context is None else context,
        "completions": [
            {"rank": rank, "completion": [said(answer, "assistant")]}
            for rank, answer in zip(ranks, answers, strict=True)
        ],
    }


PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]


def test_the_text_parts_of_a_content_are_joined(write):
    """Else a template prints the list. In every format, in every message, and with no part."""
    talk = [said(PARTS), said(PARTS[1:], "assistant")]
    expected = [said("1+2="), said("2=", "assistant")]
    for kind in (ResponseDataset, OpenAIFormatDataset):
        assert kind(write({"messages": talk})).dataset[0]["messages"] == expected
    ranked = PreferenceDataset(write(pair(context=talk[:1], answers=(PARTS, [])))).dataset[0]
    assert ranked["context"] == expected[:1]
    contents = [c["completion"][0]["content"] for c in ranked["completions"]]
    assert contents == ["1+2=", ""]
    binary = {"prompt": talk[:1], "chosen": "3", "rejected": "4"}
    assert BinaryPreferenceDataset(write(binary)).dataset[0]["context"] == expected[:1]


@pytest.mark.parametrize("content", [
    3, True, None, {"text": "2"}, ["2"], [{"type": "image", "image": "a.png"}],
    [*PARTS, {"type": "image_url"}], [{"type": "text", "text": 2}], [None],
])  # fmt: skip
def test_a_content_that_is_no_text_is_refused(write, content):
    """Numbers, objects, images, null: of any message of any format."""
    talk = [said("1"), said(content, "assistant")]
    place = r"rows.jsonl:2: .*\[1\]\.content is .*, expected text, or parts"
    good = {"messages": [said("1"), said("2", "assistant")]}
    for kind in (ResponseDataset, OpenAIFormatDataset):
        with pytest.raises(DataError, match=place):
            kind(write(good, {"messages": talk}))
    place = r"rows.jsonl:2: .*\[0\]\.content is .*, expected text, or parts"
    with pytest.raises(DataError, match=place):
        PreferenceDataset(write(pair(), pair(context=[said(content)])))
    with pytest.raises(DataError, match=place):
        PreferenceDataset(write(pair(), pair(answers=("1", content))))
    binary = {"prompt": "1", "chosen": "3", "rejected": "4"}
    with pytest.raises(DataError, match=place):
        BinaryPreferenceDataset(write(binary, {**binary, "prompt": [said(content)]}))


def test_a_message_with_calls_of_tools_may_have_no_content(write):
    calls = {**said(None, "assistant"), "tool_calls": [{"function": {"name": "add"}}]}
    read = ResponseDataset(write({"messages": [said("1+2="), calls]})).dataset[0]["messages"]
    assert read[1] == calls


@pytest.mark.parametrize("role", [3, "", None, ["user"]])
def test_a_role_that_is_no_text_is_refused(write, role):
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*\[0\]\.role is .*, expected text"):
        ResponseDataset(write({"messages": [said("1", role), said("2", "assistant")]}))


def test_a_system_field_that_is_no_text_is_refused(write):
    row = {"messages": [said("1"), said("2", "assistant")], "system": 3}
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'system' is 3, expected text"):
        OpenAIFormatDataset(write(row), system_key="system")
    assert len(OpenAIFormatDataset(write(row)).dataset[0]["messages"]) == 2


@pytest.mark.parametrize("ranks", [
    ("10", "9"), (0, "1"), (None, 1), (True, False), (float("nan"), 1), ([0], [1]),
])  # fmt: skip
def test_a_rank_that_is_no_number_is_refused(write, ranks):
    """As text "10" is before "9", and the worse answer would be chosen."""
    with pytest.raises(DataError, match=r"rows.jsonl:1: completions\[.\]\.rank is .* a number"):
        PreferenceDataset(write(pair(ranks=ranks)))


def test_ranks_may_be_real_and_negative(write, tokenizer):
    dataset = PreferenceDataset(write(pair(ranks=(0.5, -1))))
    chosen, _ = preference_pairs(dataset, tokenizer, max_seq_length=16)[0]["input_ids"]
    assert tokenizer.decode(chosen).endswith("4</s>")


@pytest.mark.parametrize("prompt", [[], ["1"], [said(3)], [{"content": "1"}]])
def test_a_prompt_of_no_messages_is_refused(write, prompt):
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'prompt'.* is .*, expected"):
        BinaryPreferenceDataset(write({"prompt": prompt, "chosen": "3", "rejected": "4"}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: context.* is .*, expected"):
        PreferenceDataset(write(pair(context=prompt)))


# Prompts of GRPO and PPO


def prompts(folder, row, tokenizer, **files):
    data = rl_config(folder)["data"]
    path = folder / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data["train"] = {"data_path": str(path), **files}
    return load_prompts(DataConfig(**data), tokenizer)[0]


@pytest.mark.parametrize("roles", [
    ("system", "user", "assistant"), ("assistant",), ("assistant", "assistant"),
    ("user", "user", "assistant"), ("user", "assistant", "user", "assistant"),
])  # fmt: skip
def test_a_prompt_is_one_message_of_the_user_and_one_of_the_assistant(tmp_path, tokenizer, roles):
    """Else a question would be the ground truth, and no reward is ever given."""
    row = {"messages": [said(str(n), role) for n, role in enumerate(roles)]}
    with pytest.raises(DataError, match=rf"row.jsonl:1: got texts from {', '.join(roles)}; exp"):
        prompts(tmp_path, row, tokenizer)


def test_a_prompt_of_messages_is_read(tmp_path, tokenizer):
    row = {"messages": [said(PARTS), said("3", "assistant")]}
    (prompt,) = prompts(tmp_path, row, tokenizer)
    assert "1+2=" in prompt.text and prompt.truth == "3"


@pytest.mark.parametrize("text", [
    "", "no place", r"\boxed{}: {}", "{} {}", "{0.__class__}", "{0[0]}", "{name}", "{!r}", "{:>9}",
    "{", "}", "{}{0}", "{1}",
])  # fmt: skip
def test_a_prompt_file_has_one_place_for_the_message(tmp_path, tokenizer, text):
    """Nothing is dropped, no attribute is followed, and no record is needed to find it out."""
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"prompt_file: .*prompt.txt has .*, expected {} once"):
        prompts(tmp_path, {"input": "1+2=", "output": "3"}, tokenizer, prompt_file=str(file))


@pytest.mark.parametrize("text", ["{}", r"\boxed{{}}: {}", "{0}, again {0}"])
def test_a_prompt_file_is_filled_in(tmp_path, text):
    (tmp_path / "prompt.txt").write_text(text)
    spec = TaskDataSpec(prompt_file=tmp_path / "prompt.txt")
    assert "{0.__class__}" in spec.prompt.format("{0.__class__}")  # a message is no format


def test_a_prompt_file_that_is_not_utf_8_is_named(tmp_path):
    for key in ("prompt_file", "system_prompt_file"):
        (tmp_path / "p.txt").write_bytes(b"{} \xff")
        with pytest.raises(ValueError, match=rf"^{key}: .*p\.txt is not UTF-8 at byte 3"):
            TaskDataSpec(**{key: tmp_path / "p.txt"})


# Chat templates


RAISES = "{{ raise_exception('System role not supported') }}"
NO_TEXT = "{% for m in messages %}{{ m['content'] + m['name'] }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "reason"), [
    (RAISES, "TemplateError: System role not supported"),
    (NO_TEXT, "UndefinedError: .* has no attribute 'name'"),
    ("{% for m in messages %}", "TemplateSyntaxError: "),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
    (ENDLESS, r"TimeoutError: the chat template did not end after 0\.2 s"),
])  # fmt: skip
def test_a_template_that_fails_names_the_record(
    write, tmp_path, tokenizer, monkeypatch, template, reason
):
    """Also one that does not end; in preference data, and in prompts."""
    monkeypatch.setattr(records, "MAX_SECONDS", 0.2)
    tokenizer.chat_template = template
    samples = preference_pairs(PreferenceDataset(write(pair())), tokenizer, max_seq_length=16)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: cannot be tokenized: {reason}") as caught:
        samples.tokenize()
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match=rf"row.jsonl:1: cannot be tokenized: {reason}"):
        prompts(tmp_path, {"input": "1+2=", "output": "3"}, tokenizer)


#: As Qwen3's: what an answer thinks is dropped as soon as a message follows.
FORGETS = (
    "{% for m in messages %}<s>{{ m['content'].split('</think>')[-1] if not loop.last else "
    "m['content'] }}</s>{% endfor %}"
)
TALK = [said("1"), said("<think>2</think>3", "assistant"), said("4"), said("5", "assistant")]


def test_a_template_that_rewrites_earlier_messages_gets_a_warning(tokenizer):
    own = tokenizer.chat_template
    tokenizer.chat_template = FORGETS
    with pytest.warns(UserWarning, match="the chat template writes earlier messages otherwise"):
        logs = format_messages(TALK, tokenizer)
    assert logs[2]["content"].count("3") == 1  # the answer before it, again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        format_messages(TALK[:2], tokenizer)
        for template in (own, "{% for m in messages %}{{ m['content'] }}{% endfor %}</s>\n"):
            tokenizer.chat_template = template
            for prompt in (False, True):
                format_messages(TALK, tokenizer, add_generation_prompt=prompt)
