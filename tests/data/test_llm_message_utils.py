# SPDX-License-Identifier: Apache-2.0
"""Message logs: masks, joining and padding, and that the names are NeMo RL's."""

import ast
import inspect

import pytest
import torch

from nemo_rl_ref.data import llm_message_utils
from nemo_rl_ref.data.llm_message_utils import (
    add_loss_mask_to_message_log,
    batched_message_log_to_flat_message,
    message_log_to_flat_messages,
)
from nemo_rl_ref.upstream import load_manifest

FUNCTIONS = (
    add_loss_mask_to_message_log,
    batched_message_log_to_flat_message,
    message_log_to_flat_messages,
)


def message(role, *ids, **more):
    return {"role": role, "content": role[0], "token_ids": torch.tensor(ids), **more}


def two_turns():
    return [
        message("user", 1, 2, 3),
        message("assistant", 4),
        message("user", 5, 6),
        message("assistant", 7, 8),
    ]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_signature_is_that_of_nemo_rl(function):
    path = f"nemo_rl.data.llm_message_utils.{function.__name__}"
    source = ast.parse(inspect.getsource(llm_message_utils))
    node = next(n for n in source.body if getattr(n, "name", None) == function.__name__)
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    assert f"({ast.unparse(node.args)})" == load_manifest()["symbols"][path]["signature"]


def test_messages_are_joined():
    flat = message_log_to_flat_messages(two_turns())
    assert flat["token_ids"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert flat["role"] == ["user", "assistant", "user", "assistant"]
    assert message_log_to_flat_messages([]) == {}


def test_a_key_of_some_messages_is_joined_from_those():
    log = [message("user", 1, 2), message("assistant", 3, scores=torch.tensor([0.5]))]
    assert message_log_to_flat_messages(log)["scores"].tolist() == [0.5]


def test_shapes_that_do_not_join_are_named():
    log = [message("user", 1), {"token_ids": torch.zeros(1, 2)}]
    with pytest.raises(RuntimeError, match=r"'token_ids' has shapes \[\(1,\), \(1, 2\)\]"):
        message_log_to_flat_messages(log)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 0, 0, 1, 0, 0, 1, 1]),
        ({"only_unmask_final": True}, [0, 0, 0, 0, 0, 0, 1, 1]),
        ({"roles_to_train_on": ["User"]}, [1, 1, 1, 0, 1, 1, 0, 0]),
        ({"roles_to_train_on": ["user"], "only_unmask_final": True}, [0] * 6 + [1, 1]),
    ],
)
def test_which_tokens_are_trained_on(settings, expected):
    log = two_turns()
    add_loss_mask_to_message_log([log], **settings)
    mask = message_log_to_flat_messages(log)["token_loss_mask"]
    assert mask.tolist() == expected and mask.dtype == torch.int64


def test_no_argument_is_changed():
    roles = ["Assistant"]
    add_loss_mask_to_message_log([two_turns()], roles)
    assert roles == ["Assistant"]


def test_rows_are_padded_on_the_right():
    batch, lengths = batched_message_log_to_flat_message(
        [[message("user", 1, 2), message("assistant", 3)], [message("user", 4)]],
        {"token_ids": 9},
        make_sequence_length_divisible_by=4,
    )
    assert batch["token_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["role"] == [["user", "assistant"], ["user"]]
    assert lengths.tolist() == [3, 1] and lengths.dtype == torch.int32


def test_a_width_that_divides_is_left():
    batch, _ = batched_message_log_to_flat_message(
        [[message("user", 1, 2)]], make_sequence_length_divisible_by=2
    )
    assert batch["token_ids"].shape == (1, 2)


def test_a_missing_tensor_becomes_padding():
    # The length is that of the longest tensor of a row.
    logs = [[message("a", 1, 2, scores=torch.tensor([0.5]))], [message("a", 3)]]
    batch, lengths = batched_message_log_to_flat_message(logs)
    assert batch["scores"].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert lengths.tolist() == [2, 1]


def test_batches_without_tensors():
    batch, lengths = batched_message_log_to_flat_message([])
    assert len(batch) == 0 and lengths.shape == (0,)
    batch, lengths = batched_message_log_to_flat_message([[{"role": "user"}], [{"role": "tool"}]])
    assert batch["role"] == ["user", "tool"] and lengths.shape == (0,)


def test_mixed_dtypes_are_named():
    logs = [[message("user", 1)], [{"role": "user", "token_ids": torch.tensor([1.0])}]]
    with pytest.raises(RuntimeError, match="'token_ids' has torch.float32 on cpu, torch.int64"):
        batched_message_log_to_flat_message(logs)
