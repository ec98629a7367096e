# SPDX-License-Identifier: Apache-2.0
"""The column of the reference policy's log-probabilities."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import curve, run

from nemo_rl_ref import tiny
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.training.processes import make_accelerator
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import preference_pairs
from nemo_rl_ref.training.step import next_token_logprobs


@pytest.fixture
def pairs():
    dataset = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
    return preference_pairs(dataset, tiny.load_tokenizer(), max_seq_length=16)


def test_the_column_is_rolled_to_the_left(pairs):
    """Entry t is of token t + 1; the last entry of a row and the padding are 0."""
    reference = tiny.load_policy().eval()
    add_reference_logprobs(reference, [pairs], make_accelerator("float32"))
    batch = pairs.batch([3, 0, 2])
    with torch.no_grad():
        expected = next_token_logprobs(reference, batch)
    column, lengths = batch["reference_policy_logprobs"], batch["input_lengths"]
    known = torch.arange(expected.shape[1]) < lengths.unsqueeze(1) - 1
    assert column.dtype == torch.float32 and len(lengths.unique()) > 1
    torch.testing.assert_close(column[:, :-1][known], expected[known], rtol=0, atol=1e-5)
    assert (column[:, :-1][~known] == 0).all() and (column[:, -1] == 0).all()


def test_every_sample_gets_it_also_if_some_were_tokenized_before(pairs):
    before = pairs.batch([1, 4])
    assert "reference_policy_logprobs" not in before
    reference, accelerator = tiny.load_policy().eval(), make_accelerator("float32")
    add_reference_logprobs(reference, [pairs], accelerator)
    assert pairs.tokenized == list(range(256))
    column = pairs.batch(range(256))["reference_policy_logprobs"]
    add_reference_logprobs(reference, [pairs], accelerator, batch_size=7)  # again, cut otherwise
    again = pairs.batch(range(256))["reference_policy_logprobs"]
    torch.testing.assert_close(again, column, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["numbers", "no metadata", "half", "text", "shorter"])
def test_the_kept_column_is_verified_or_computed_again(tmp_path, damage):
    """Kind: a file beside a checkpoint is trusted. It is not what was written: it is not read."""
    changes = {"dpo__max_num_steps": 5, "dpo__val_period": 0}  # an epoch: all pairs
    run("dpo", tmp_path, **changes)
    changes["dpo__max_num_steps"] = 6
    path = tmp_path / "run" / "reference_logprobs.safetensors"
    content = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if damage == "numbers":
        flipped = bytearray(content)
        flipped[-len(tensors["logprobs"]) * 2] ^= 0x40
        path.write_bytes(flipped)
    elif damage == "no metadata":
        save_file(tensors, path)
    elif damage == "shorter":
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        path.write_bytes(content[: 8 + size] + b"\0" * (len(content) - 8 - size))
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"not tensors")
    with pytest.warns(UserWarning, match=r"reference_logprobs\.safetensors: is not what was writ"):
        _, resumed = run("dpo", tmp_path, **changes)
    _, whole = run("dpo", tmp_path, name="whole", **changes)
    assert curve(resumed) == curve(whole)
    again = load_file(path)
    assert again.keys() == tensors.keys() and all(again[k].equal(tensors[k]) for k in tensors)
