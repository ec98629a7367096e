# SPDX-License-Identifier: Apache-2.0
"""The column of the reference policy's log-probabilities."""

import pytest
import torch
from accelerate import Accelerator

from nemo_rl_ref import tiny
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
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
    add_reference_logprobs(reference, [pairs], Accelerator(cpu=True))
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
    reference, accelerator = tiny.load_policy().eval(), Accelerator(cpu=True)
    add_reference_logprobs(reference, [pairs], accelerator)
    assert pairs.tokenized == list(range(256))
    column = pairs.batch(range(256))["reference_policy_logprobs"]
    add_reference_logprobs(reference, [pairs], accelerator, batch_size=7)  # again, cut otherwise
    again = pairs.batch(range(256))["reference_policy_logprobs"]
    torch.testing.assert_close(again, column, rtol=0, atol=1e-5)
