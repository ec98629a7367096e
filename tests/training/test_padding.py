# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths as one tensor, against PyTorch's own padding."""

import pytest
import torch

from nemo_rl_ref.padding import PackedRows, pad_right

ROWS = [torch.arange(1, length + 1) for length in (3, 1, 5, 2)]


def naive(rows, fill, width):
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=fill)


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 5), ({"multiple": 4}, 8), ({"width": 7}, 7), ({"width": 7, "multiple": 3}, 9)],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_rows_are_padded_on_the_right(options, width, dtype):
    rows = [row.to(dtype) for row in ROWS]
    padded = pad_right(rows, -7, **options)
    assert padded.dtype == dtype and torch.equal(padded, naive(rows, -7, width))


def test_batches_are_cut_out_of_packed_rows():
    packed = PackedRows([row / 3 for row in ROWS])
    numbers = [2, 0, 0, 1]
    expected = naive([ROWS[number] / 3 for number in numbers], 0, 6)
    (cut,), lengths = packed.padded(torch.tensor(numbers), (0,), width=6)
    assert torch.equal(cut, expected) and lengths.tolist() == [5, 3, 3, 1]
    (cut,), _ = packed.padded(torch.tensor([1]), (0,))
    assert cut.tolist() == [[pytest.approx(1 / 3)]]


def test_columns_have_their_own_padding():
    packed = PackedRows(ROWS, [row % 2 for row in ROWS])
    (ids, odd), _ = packed.padded(torch.tensor([3, 2]), (-7, 9), multiple=4)
    assert torch.equal(ids, naive([ROWS[3], ROWS[2]], -7, 8))
    assert torch.equal(odd, naive([ROWS[3] % 2, ROWS[2] % 2], 9, 8))
