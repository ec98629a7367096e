# SPDX-License-Identifier: Apache-2.0
"""`BatchedDataDict`: what each method does to tensors and lists, and its errors."""

import copy
import multiprocessing
import pickle
import sys
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_ref.algorithms.loss import DPOLossDataDict
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict


def letters(rows):
    """A batch whose three values name their row: a letter, its number, and the number twice."""
    numbers = torch.arange(rows)
    return BatchedDataDict(
        {
            "letter": [chr(97 + i) for i in range(rows)],
            "number": numbers,
            "twice": torch.stack([numbers, numbers], 1).float(),
        }
    )


def spell(batch):
    """The rows of a batch as a string, after checking that its values still agree."""
    numbers = [ord(letter) - 97 for letter in batch["letter"]]
    assert batch["number"].tolist() == numbers
    assert batch["twice"].tolist() == [[number, number] for number in numbers]
    assert batch["twice"].dtype == torch.float32
    return "".join(batch["letter"])


def test_it_is_a_dictionary():
    batch = BatchedDataDict[DPOLossDataDict]({"a": torch.zeros(3, 2)}, b=[1, 2, 3])
    assert list(batch) == ["a", "b"] and batch["b"] == [1, 2, 3] and "c" not in batch
    assert batch.size == 3 and batch.get_dict() is batch.data
    assert BatchedDataDict().size == 0
    assert BatchedDataDict({"b": [1, 2]}).size == 2
    again = pickle.loads(pickle.dumps(letters(4)))
    assert type(again) is BatchedDataDict and spell(again) == "abcd"


class TestFromBatches:
    def test_concatenates_and_pads(self):
        first = {
            "ids": torch.tensor([[1, 2]]),
            "mask": torch.tensor([[1.0, 1.0]]),
            "names": ["a"],
            "length": torch.tensor([2]),
            "top": torch.ones(1, 2, 3),
        }
        second = {
            "ids": torch.tensor([[3], [4]]),
            "mask": torch.tensor([[1.0], [1.0]]),
            "names": ["b", "c"],
            "length": torch.tensor([1, 1]),
            "top": torch.ones(2, 1, 3),
        }
        batch = BatchedDataDict.from_batches([first, second], pad_value_dict={"ids": 9, "top": -1})
        assert batch["ids"].tolist() == [[1, 2], [3, 9], [4, 9]]
        assert batch["mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
        assert batch["names"] == ["a", "b", "c"]
        assert batch["length"].tolist() == [2, 1, 1]
        assert batch["top"].shape == (3, 2, 3)
        assert batch["top"][1:, 1].eq(-1).all() and batch["top"].eq(-1).sum() == 6
        assert list(batch) == sorted(first) and type(batch) is BatchedDataDict
        assert first["ids"].tolist() == [[1, 2]]

    def test_of_nothing(self):
        assert BatchedDataDict.from_batches([]) == {}
        assert BatchedDataDict.from_batches([{}, {}]) == {}

    def test_batches_without_rows(self):
        """They need not have the keys, and do not widen the others."""
        rows = {"ids": torch.ones(1, 2), "w": torch.ones(1)}
        empty = {"ids": torch.ones(0, 5), "w": torch.ones(0)}
        for nothing in ({}, empty, {"w": torch.ones(0)}):
            batch = BatchedDataDict.from_batches([nothing, rows])
            assert batch["ids"].tolist() == [[1, 1]] and batch["w"].tolist() == [1]

    def test_subclass(self):
        assert type(SlicedDataDict.from_batches([letters(2)])) is SlicedDataDict

    def test_errors(self):
        batches = [{"a": [1], "b": [2]}, {"a": [1]}]
        with pytest.raises(
            KeyError, match=r"key 'b' is missing in batches \[1\], which are non-empty"
        ):
            BatchedDataDict.from_batches(batches)
        with pytest.raises(TypeError, match=r"key 'a' holds a tuple, expected a tensor or a list"):
            BatchedDataDict.from_batches([{"a": (1, 2)}])
        with pytest.raises(TypeError, match=r"key 'a' holds a list, expected a tensor or a list"):
            BatchedDataDict.from_batches([{"a": torch.ones(1)}, {"a": [1]}])
        with pytest.raises(NotImplementedError, match="allow_missing_packed_tensors"):
            BatchedDataDict.from_batches([], allow_missing_packed_tensors=True)


class TestChunk:
    def test_every_rank(self):
        parts = [letters(6).chunk(rank, 3) for rank in range(3)]
        assert [spell(part) for part in parts] == ["ab", "cd", "ef"]
        assert type(parts[0]) is SlicedDataDict

    def test_is_a_copy(self):
        batch = letters(4)
        batch.chunk(0, 2)["number"].fill_(7)
        assert spell(batch) == "abcd"

    def test_errors(self):
        with pytest.raises(ValueError, match=r"chunks is 4, expected a divisor of the 6 rows"):
            letters(6).chunk(0, 4)
        for rank in (2, -1):
            with pytest.raises(ValueError, match=rf"rank is {rank}, expected 0 to 1"):
                letters(6).chunk(rank, 2)
        with pytest.raises(ValueError, match=r"the keys have \{'a': 1, 'b': 2\} rows"):
            BatchedDataDict({"a": [1], "b": [1, 2]}).chunk(0, 1)


class TestShardByBatchSize:
    @pytest.mark.parametrize(
        ("rows", "arguments", "expected"),
        [
            (8, {"shards": 2}, ["abcd", "efgh"]),
            (8, {"shards": 2, "batch_size": 4}, ["abef", "cdgh"]),
            (8, {"shards": 2, "batch_size": 2}, ["aceg", "bdfh"]),
            (5, {"shards": 2, "allow_uneven_shards": True}, ["abc", "de"]),
            (5, {"shards": 4, "allow_uneven_shards": True}, ["ab", "cd", "e", ""]),
            (0, {"shards": 2}, ["", ""]),
        ],
    )
    def test_examples(self, rows, arguments, expected):
        shards = letters(rows).shard_by_batch_size(**arguments)
        assert [spell(shard) for shard in shards] == expected
        assert all(type(shard) is SlicedDataDict for shard in shards)

    @given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
    def test_each_global_batch_is_split_over_the_shards(self, shards, per_shard, batches):
        """The k-th global batch of the whole is the k-th local batches of all shards in turn."""
        size = shards * per_shard
        whole = letters(size * batches)
        parts = whole.shard_by_batch_size(shards, batch_size=size)
        for k in range(batches):
            local = [spell(part.get_batch(k, per_shard)) for part in parts]
            assert "".join(local) == spell(whole.get_batch(k, size))

    def test_errors(self):
        batch = letters(8)
        with pytest.raises(
            ValueError, match=r"Total batch size \(8\) is not a multiple of batch_size \(3\)"
        ):
            batch.shard_by_batch_size(1, batch_size=3)
        with pytest.raises(ValueError, match=r"Batch size \(8\) is not a multiple of shards \(3\)"):
            batch.shard_by_batch_size(3)
        with pytest.raises(ValueError, match=r"batch_size is 4, expected None together with allow"):
            batch.shard_by_batch_size(2, batch_size=4, allow_uneven_shards=True)
        with pytest.raises(NotImplementedError, match="dynamic_batching_args"):
            batch.shard_by_batch_size(2, dynamic_batching_args={})
        with pytest.raises(NotImplementedError, match="sequence_packing_args"):
            batch.shard_by_batch_size(2, sequence_packing_args={})
        with pytest.raises(
            ValueError, match=r"not the same across the rollout batch: the keys have"
        ):
            BatchedDataDict({"a": [1], "b": [1, 2]}).shard_by_batch_size(1)


def test_slice_get_batch_and_micro_batches():
    batch = letters(6)
    assert spell(batch.slice(1, 4)) == "bcd"
    assert spell(batch.get_batch(1, 4 // 2)) == "cd"
    assert [spell(part) for part in batch.make_microbatch_iterator(2)] == ["ab", "cd", "ef"]
    view = batch.slice(0, 2)
    assert type(view) is SlicedDataDict
    assert view["number"].data_ptr() == batch["number"].data_ptr()

    with pytest.raises(ValueError, match=r"end is 7, expected at most 6, rows of 'number'"):
        batch.slice(0, 7)
    with pytest.raises(ValueError, match=r"batch_size is None, expected a number"):
        batch.get_batch(0)
    with pytest.raises(ValueError, match=r"microbatch_size is 4, expected a divisor of the 6 row"):
        next(batch.make_microbatch_iterator(4))


def test_repeat_interleave():
    batch = letters(3)
    batch["log"] = [{"turns": [i]} for i in range(3)]
    repeated = batch.repeat_interleave(2)
    assert spell(repeated) == "aabbcc" and type(repeated) is BatchedDataDict
    repeated["log"][0]["turns"].append("new")  # list items are deep copies
    assert [item["turns"] for item in repeated["log"]] == [[0, "new"], [0], [1], [1], [2], [2]]
    assert batch["log"][0] == {"turns": [0]}
    with pytest.raises(NotImplementedError, match="share_immutable_media"):
        batch.repeat_interleave(2, share_immutable_media=True)


def test_truncate_tensors():
    batch = BatchedDataDict(
        {"w": torch.ones(2), "ids": torch.ones(2, 5), "top": torch.ones(2, 5, 3)}
    )
    batch["names"] = ["a", "b"]
    batch.truncate_tensors(dim=1, truncated_len=4)
    assert {key: value.shape for key, value in batch.items() if key != "names"} == {
        "w": (2,),
        "ids": (2, 4),
        "top": (2, 4, 3),
    }
    assert batch["names"] == ["a", "b"]


@given(st.permutations(range(7)))
def test_reorder_data_undoes_a_selection(order):
    batch = letters(7).select_indices(order)
    assert spell(batch) == "".join(chr(97 + i) for i in order)
    assert batch.reorder_data(order) is None
    assert spell(batch) == "abcdefg"


def test_reorder_data_keeps_the_order_of_equals():
    batch = letters(4)
    batch.reorder_data([1, 0, 1, 0])
    assert spell(batch) == "bdac"
    with pytest.raises(ValueError, match=r"reorded_indices has 3 entries, expected 4, one a row"):
        batch.reorder_data([0, 1, 2])


def test_select_indices():
    batch = letters(4)
    assert spell(batch.select_indices([3, 0, 0])) == "daa"
    assert spell(batch.select_indices(torch.tensor([1, 2]))) == "bc"
    batch["bad"] = (1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"key 'bad' holds a tuple, expected a tensor or a list"):
        batch.select_indices([0])


def test_to_works_in_place():
    batch = BatchedDataDict({"a": torch.ones(2), "b": ["x", "y"]})
    assert batch.to("meta") is batch
    assert batch["a"].device.type == "meta" and batch["b"] == ["x", "y"]


def test_copy_does_not_share_keys():
    batch = letters(2)
    other = copy.copy(batch)
    other["extra"] = [1, 2]
    assert "extra" not in batch and type(other) is BatchedDataDict


def gather_on_rank(rank, path):
    """Gathers twice on one of two ranks: one row and two, and no row and three."""
    torch.distributed.init_process_group(
        "gloo", f"file://{path}", timedelta(seconds=60), world_size=2, rank=rank
    )
    try:
        for cut in (1, 0):
            start, end = ((0, cut), (cut, 3))[rank]
            batch = letters(3).slice(start, end)
            batch["flag"] = torch.tensor([True, False, True])[start:end]
            gathered = batch.all_gather(torch.distributed.group.WORLD)
            assert spell(gathered) == "abc"
            assert gathered["flag"].tolist() == [True, False, True]
            assert type(gathered) is SlicedDataDict
    finally:
        torch.distributed.destroy_process_group()


def test_all_gather_of_unequal_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    path = tmp_path / "store"
    other = multiprocessing.get_context("spawn").Process(target=gather_on_rank, args=(1, path))
    other.start()
    gather_on_rank(0, path)
    other.join(60)
    assert other.exitcode == 0


def test_all_gather_refuses_other_values():
    with pytest.raises(TypeError, match=r"key 'a' holds a tuple, expected a tensor or a list"):
        BatchedDataDict({"a": (1,)}).all_gather(None)
