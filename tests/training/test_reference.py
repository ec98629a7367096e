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


def test_samples_that_were_tokenized_get_it_or_else_all(pairs):
    reference, accelerator = tiny.load_policy().eval(), Accelerator(cpu=True)
    pairs.tokenize([4, 1])
    add_reference_logprobs(reference, [pairs], accelerator)
    some = pairs.batch([1, 4])["reference_policy_logprobs"]
    with pytest.raises(ValueError, match="jsonl:1: the sample has no reference_policy_logprobs"):
        pairs.batch([1, 0])
    other = preference_pairs(
        BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS)), tiny.load_tokenizer(), max_seq_length=16
    )
    add_reference_logprobs(reference, [other], accelerator, batch_size=7)
    assert other.tokenized == list(range(256))
    torch.testing.assert_close(
        other.batch([1, 4])["reference_policy_logprobs"], some, rtol=0, atol=1e-5
    )
