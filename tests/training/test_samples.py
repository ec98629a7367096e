# SPDX-License-Identifier: Apache-2.0
"""Samples, their columns and batches; the order of the data, which is NeMo RL's; bad pairs."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from trainer_runs import make_config, run

from nemo_rl_ref import tiny
from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.config.sections import SFTSettings
from nemo_rl_ref.config.settings import read_settings, used_keys
from nemo_rl_ref.data.collate_fn import preference_collate_fn
from nemo_rl_ref.data.datasets.preference_datasets import (
    BinaryPreferenceDataset,
    PreferenceDataset,
)
from nemo_rl_ref.data.processors import preference_preprocessor
from nemo_rl_ref.files.records import DataError
from nemo_rl_ref.training.samples import Batches, Samples, order, preference_pairs

GOOD = {"prompt": "1+2=", "chosen": "3", "rejected": "12"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture
def pairs_of(tmp_path, tokenizer):
    """Samples of a file with these pairs."""

    def make(*lines, max_seq_length=16, **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        dataset = BinaryPreferenceDataset(str(path))
        return preference_pairs(dataset, tokenizer, max_seq_length=max_seq_length, **options)

    return make


# The order

#: Three epochs of torchdata 0.11.0's ``StatefulDataLoader(range(7), shuffle=True)`` after
#: ``torch.manual_seed(seed)``, by seed and ``num_workers``.
RECORDED = {
    (42, 0): [[5, 0, 1, 3, 2, 4, 6], [2, 6, 5, 0, 1, 3, 4], [0, 4, 5, 6, 2, 1, 3]],
    (7, 0): [[6, 0, 4, 1, 2, 5, 3], [6, 1, 3, 0, 2, 5, 4], [0, 1, 2, 6, 3, 5, 4]],
    (42, 1): [[2, 6, 5, 0, 1, 3, 4], [1, 2, 3, 5, 0, 6, 4], [4, 2, 5, 6, 0, 1, 3]],
    (7, 1): [[6, 1, 3, 0, 2, 5, 4], [4, 5, 2, 3, 1, 6, 0], [2, 3, 5, 1, 0, 6, 4]],
}


@pytest.mark.parametrize(("seed", "num_workers"), RECORDED)
@pytest.mark.parametrize("epoch", range(3))
def test_the_order_is_that_of_nemo_rls_loader(seed, num_workers, epoch):
    expected = RECORDED[seed, num_workers][epoch]
    assert list(order(7, seed, epoch, num_workers)) == expected
    assert order(7, seed, epoch, 3 * num_workers) == order(7, seed, epoch, num_workers)
    batches = Batches(7, 2, seed, max_epochs=3, num_workers=num_workers)
    assert [n for step in range(3) for n in batches[3 * epoch + step]] == expected[:6]


def test_every_epoch_has_every_sample_once_and_its_own_order():
    batches = Batches(samples=20, batch_size=5, seed=7, max_epochs=3)
    assert len(batches) == 12 == len(list(batches)) and batches.per_epoch == 4
    epochs = [[n for step in range(4) for n in batches[4 * epoch + step]] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    same = Batches(samples=20, batch_size=5, seed=7, max_epochs=3, max_steps=9)
    assert list(same) == list(batches)[:9]
    assert list(batches) != list(Batches(samples=20, batch_size=5, seed=8, max_epochs=3))


def test_a_part_batch_is_left_out_and_the_file_keeps_its_order_without_shuffling():
    plain = Batches(samples=11, batch_size=5, seed=7, max_epochs=2, shuffle=False)
    assert list(plain) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2
    with pytest.raises(IndexError, match="got 4, expected one of 4 batches from 0 on"):
        plain[4]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "batch_size: got 0, expected a positive"), (9, "batch_size: got 9 with 1 samples")],
)
def test_bad_batch_size(size, expected):
    with pytest.raises(ValueError, match=expected):
        list(Batches(samples=1, batch_size=size, seed=0))


# Columns and batches

ROWS = [torch.arange(1, length + 1) for length in (3, 1, 5, 2)]


def columns_of(per_sample=1, **options):
    """Samples of some of `ROWS` each, with a column that tells odd tokens."""

    def tokenize(record, number):
        rows = [ROWS[row] for row in record]
        odd = [row % 2 for row in rows]
        return {"input_ids": rows, "token_mask": odd, "loss_multiplier": float(number != 1)}

    records = [range(row, row + per_sample) for row in range(0, 4, per_sample)]
    places = [f"file:{number}" for number in range(len(records))]
    return Samples(records, places, tokenize, pad_token_id=-7, **options)


def padded(rows, fill, width):
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(together, (0, width - together.shape[1]), value=fill)


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8)])
def test_batches_are_padded_on_the_right_as_pytorch_pads(multiple, width):
    numbers = [2, 0, 0, 1]
    batch = columns_of(multiple=multiple).batch(numbers)
    rows = [ROWS[number] for number in numbers]
    assert torch.equal(batch["input_ids"], padded(rows, -7, width))
    assert torch.equal(batch["token_mask"], padded([row % 2 for row in rows], 0, width))
    assert batch["input_lengths"].tolist() == [5, 3, 3, 1]
    assert batch["sample_mask"].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert "token_mask" not in columns_of(add_loss_mask=False).batch([0])


def test_the_rows_of_a_sample_stay_together():
    batch = columns_of(per_sample=2).batch([1, 0])
    assert batch["input_lengths"].tolist() == [5, 2, 3, 1]
    assert batch["sample_mask"].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_column_that_is_added_is_in_the_batches():
    samples = columns_of(per_sample=2)
    thirds = {0: [ROWS[0] / 3, ROWS[1] / 3], 1: [ROWS[2] / 3, ROWS[3] / 3]}
    samples.add("thirds", thirds, fill=9)
    batch = samples.batch([1, 0])
    expected = padded([row / 3 for row in (ROWS[2], ROWS[3], ROWS[0], ROWS[1])], 9, 5)
    assert batch["thirds"].dtype == torch.float32 and torch.equal(batch["thirds"], expected)
    assert samples.tokenized == [0, 1]


def test_a_column_must_fit_and_must_be_there():
    samples = columns_of()
    with pytest.raises(ValueError, match=r"x: got rows of \[2\] values for file:0, expected \[3\]"):
        samples.add("x", {0: [torch.zeros(2)]})
    samples.add("x", {0: [torch.zeros(3)]})
    assert samples.batch([0])["x"].tolist() == [[0.0] * 3]
    with pytest.raises(ValueError, match="file:2: the sample has no x; add it first"):
        samples.batch([0, 2])


# Pairs


def test_both_formats_give_the_same_batches(tokenizer):
    binary, ranked = (
        preference_pairs(dataset, tokenizer, max_seq_length=16).batch(range(64))
        for dataset in (
            BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS)),
            PreferenceDataset(str(tiny.RANKED_VALIDATION_PAIRS)),
        )
    )
    for name in binary:
        assert torch.equal(binary[name], ranked[name]), name


def test_batch_layout(tokenizer, pairs_of):
    batch = pairs_of(GOOD, {"prompt": "10+20=", "chosen": "30", "rejected": "3"}).batch([0, 1])
    rows = ["<s>1+2=3</s>", "<s>1+2=12</s>", "<s>10+20=30</s>", "<s>10+20=3</s>"]
    for row, text in enumerate(rows):
        length = batch["input_lengths"][row]
        assert tokenizer.decode(batch["input_ids"][row, :length]) == text
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        # What counts is the answer and its end token, nothing of prompt and padding.
        counted = batch["input_ids"][row][batch["token_mask"][row] == 1]
        assert tokenizer.decode(counted) == text.split("=")[1]
    assert batch["sample_mask"].tolist() == [1.0] * 4


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_are_those_of_nemo_rls_collate_function(tokenizer, multiple):
    dataset = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
    samples = preference_pairs(dataset, tokenizer, max_seq_length=16, multiple=multiple)
    numbers = [5, 0, 17]
    pairs = [preference_preprocessor(dataset[n], None, tokenizer, 16, n) for n in numbers]
    batch = samples.batch(numbers)
    expected = preference_collate_fn(pairs, tokenizer, multiple, True)
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == expected[name].dtype


def test_too_long_pair_is_refused_with_its_line(pairs_of):
    samples = pairs_of(GOOD, {**GOOD, "prompt": "11111+2="}, max_seq_length=10)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: the pair has 12 tokens, more than .*=10"):
        samples.tokenize()


def test_too_long_pair_can_be_masked_as_nemo_rl_does(pairs_of):
    lines = (GOOD, {**GOOD, "prompt": "11111+2="})
    samples = pairs_of(*lines, max_seq_length=10, mask_too_long=True)
    with pytest.warns(UserWarning, match="record 1: 12 tokens, more than max_seq_length=10"):
        samples[1]
    assert samples.tokenize() == 1  # and says it once, by the number of them
    batch = samples.batch([0, 1])
    assert batch["sample_mask"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert batch["input_ids"].shape[1] <= 10


@pytest.mark.parametrize("mask_too_long", [False, True])
def test_pair_that_differs_only_as_text(pairs_of, mask_too_long):
    # Unknown characters are all the same token.
    samples = pairs_of({**GOOD, "chosen": "x", "rejected": "y"}, mask_too_long=mask_too_long)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen and rejected are the same tokens"):
        samples.batch([0])


def test_a_pair_that_is_cut_off_has_no_weight_even_if_nothing_is_left_to_tell_it_apart(pairs_of):
    long = {"prompt": "1+2=", "chosen": "3" * 20 + "1", "rejected": "3" * 20 + "2"}
    samples = pairs_of(GOOD, long, mask_too_long=True)
    assert samples.tokenize() == 1
    assert samples.batch([0, 1])["sample_mask"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_tokenizer_without_chat_template_or_pad_token():
    bad = tiny.load_tokenizer()
    bad.chat_template = None
    dataset = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
    with pytest.raises(ValueError, match="tokenizer: it has no chat template"):
        preference_pairs(dataset, bad, max_seq_length=16)
    bad.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: it has no pad token"):
        preference_pairs(dataset, bad, max_seq_length=16)


def test_max_seq_length_must_be_positive(pairs_of):
    with pytest.raises(ValueError, match="max_seq_length: got 0"):
        pairs_of(GOOD, max_seq_length=0)


@pytest.mark.parametrize("steps", [1, 3, 7, 10**9, -1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_a_run_uses_is_known_however_long_it_is(steps, shuffle):
    """Of a billion epochs, a billion steps, or both, nothing is looked at twice."""
    many = Batches(11, 5, seed=7, max_epochs=10**9, max_steps=steps, shuffle=shuffle)
    few = [many[number] for number in range(min(len(many), 400))]
    assert many.used() == sorted({number for numbers in few for number in numbers})


@pytest.mark.parametrize("section", ["sft", "dpo", "rm"])
def test_a_run_without_end_begins_at_once(section, tmp_path):
    """With as many epochs and steps as can be set; ended here by its observer."""

    class End(Exception):
        pass

    def observe(step, metrics):
        raise End

    changes = {f"{section}__{key}": 2**63 - 1 for key in ("max_num_epochs", "max_num_steps")}
    with pytest.raises(End):
        run(section, tmp_path, observe=observe, checkpointing__enabled=False, **changes)


def test_shuffle_off_in_any_spelling_of_yaml_keeps_the_order(tmp_path):
    """Hydra reads ``off`` as text; settings that were plain dicts took text for true."""
    orders = []
    for value in ("off", "no", "false", "False", "0"):
        path = tmp_path / "run.yaml"
        OmegaConf.save(OmegaConf.create(make_config("sft", tmp_path)), path)
        config, _ = read_config(path, [f"data.shuffle={value}"], used_keys(SFTSettings))
        settings = read_settings(config, SFTSettings)
        orders.append(list(Batches(8, 4, 3, shuffle=settings.data.shuffle)))
    assert orders == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 5
