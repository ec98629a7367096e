# SPDX-License-Identifier: Apache-2.0
"""The batches of `check_loss`: how they are made, cut, compared and made small."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_ref.contract._batches import build_batch, make_batch
from nemo_rl_ref.contract._calls import Result, add_metrics, difference, relative
from nemo_rl_ref.contract._invariance import join
from nemo_rl_ref.contract._masking import with_masked
from nemo_rl_ref.contract._probes import NotApplicable, Subject
from nemo_rl_ref.contract._shrink import shrink

KINDS = {
    "logprob": ("logprob", "token_level", False),
    "pairs": ("logprob", "sequence_level", True),
    "reward-pairs": ("logit", "sequence_level", True),
    "values": ("logit", "token_level", False),
    "rewards": ("logit", "sequence_level", False),
    "distillation": ("distillation", "token_level", False),
    "draft": ("draft", "token_level", False),
}


def make(kind="logprob", seed=0, dtype=torch.float64):
    input_type, loss_type, pairs = KINDS[kind]
    return build_batch(*make_batch(input_type, loss_type, pairs, True, seed, dtype), dtype, "made")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_batches_have_what_probes_need(kind, seed):
    batch = make(kind, seed)
    group = 2 if KINDS[kind][2] else 1
    masks, samples = batch.token_mask, batch.sample_mask
    assert not masks[:, 0].any()
    assert (masks[:, 1:].sum(-1) > 0).all()
    by_group = samples.reshape(-1, group)
    assert (by_group.all(-1) | ~by_group.any(-1)).all()  # pairs are masked as a whole
    assert (~by_group.any(-1)).sum() == 1
    assert samples[0] and samples[-1]
    tokens = (masks * samples[:, None]).sum(-1)
    assert tokens[0] != tokens[1]  # a mean of means differs from the mean
    lengths = batch.data["input_lengths"]
    columns = torch.arange(batch.tokens)
    assert not (masks & (columns >= lengths[:, None])).any()
    assert lengths.max() == batch.tokens > lengths.min()
    starts = masks.float().argmax(-1)
    inside = (columns >= starts[:, None]) & (columns < lengths[:, None])
    assert (inside & ~masks).any()  # holes
    seqs, toks = batch.counts()
    assert seqs == samples.sum() and toks == tokens.sum()
    assert seqs.dtype == toks.dtype == torch.float32


def test_free_inputs():
    expected = {
        "logprob": ("next_token_logprobs",),
        "values": ("logits",),
        "distillation": ("student_topk_logprobs", "H_all"),
        "draft": ("student_logits",),
    }
    for kind, names in expected.items():
        assert make(kind).free == names
    inputs = {"a": torch.ones(2, 3), "b": torch.ones(2, 3, requires_grad=True)}
    masks = {"token_mask": torch.ones(2, 3), "sample_mask": torch.ones(2)}
    assert build_batch(inputs, masks, torch.float32, "made").free == ("b",)


def test_log_probabilities_are_below_zero_and_entropies_fit():
    for kind in ("logprob", "pairs", "distillation"):
        batch = make(kind, 1)
        for part, name in batch.floating():
            if "logprobs" in name and "generation" not in name:
                assert (getattr(batch, part)[name] < 0).all(), name
    assert (make("distillation").inputs["H_all"] < 0).all()  # Σ p log p


def test_odd_seeds_rank_responses_in_another_order():
    """Else a loss that sorts the batch would look like one that does not."""
    batch = make("pairs", seed=1)
    mask = batch.token_mask[:, 1:]
    policy = (batch.inputs["next_token_logprobs"] * mask).sum(-1)
    reference = (batch.data["reference_policy_logprobs"][:, :-1] * mask).sum(-1)
    margins = [(x[::2] - x[1::2])[batch.sample_mask[::2]].argsort() for x in (policy, reference)]
    assert not torch.equal(*margins)


def test_columns():
    batch = make("logprob")
    kept = [0, 2, 3, 8]
    cut = batch.columns(kept)
    assert torch.equal(cut.data["advantages"], batch.data["advantages"][:, kept])
    # Entry t belongs to token t+1.
    logprobs = batch.inputs["next_token_logprobs"][:, [1, 2, 7]]
    assert torch.equal(cut.inputs["next_token_logprobs"], logprobs)
    assert torch.equal(cut.data["rewards"], batch.data["rewards"])
    lengths = [sum(c < n for c in kept) for n in batch.data["input_lengths"].tolist()]
    assert cut.data["input_lengths"].tolist() == lengths
    # One column left looks like a number a row; it stays a column of tokens.
    smallest = batch.columns([0, 1])
    assert smallest.inputs["next_token_logprobs"].shape == (batch.rows, 1)
    assert smallest.padded(2).inputs["next_token_logprobs"].shape == (batch.rows, 3)
    assert make("rewards").columns([0, 1]).padded(2).inputs["logits"].shape == (6, 1)


def test_padded_and_cut_is_the_same():
    for kind in KINDS:
        batch = make(kind)
        again = batch.padded(3).columns(range(batch.tokens))
        for part in ("inputs", "data"):
            for name, tensor in getattr(batch, part).items():
                assert torch.equal(getattr(again, part)[name], tensor), (kind, name)
        wide = batch.padded(3)
        assert not wide.token_mask[:, batch.tokens :].any()
        assert wide.counts()[1] == batch.counts()[1]


def test_take_keeps_lists_in_step():
    inputs = {"logits": torch.arange(3.0)}
    data = {"token_mask": torch.ones(3, 4), "sample_mask": torch.ones(3), "ids": ["a", "b", "c"]}
    batch = build_batch(inputs, {**data, "names": ["x", "y"]}, torch.float32, "made").take([2, 0])
    assert batch.data["ids"] == ["c", "a"] and batch.inputs["logits"].tolist() == [2.0, 0.0]
    assert batch.data["names"] == ["x", "y"]  # no list of rows


def test_where_entries_count():
    inputs = {"next_token_logprobs": torch.ones(2, 3)}
    data = {
        "token_mask": torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]]),
        "sample_mask": torch.tensor([1.0, 0.0]),
        "advantages": torch.ones(2, 4),
        "reference_policy_logprobs": torch.ones(2, 4),
        "rewards": torch.ones(2),
        "topk": torch.ones(2, 4, 2),
    }
    batch = build_batch(inputs, data, torch.float32, "made")

    def row(part, name):
        where = batch.valid(part, name)
        assert not where[1].any()  # a masked sample
        return where[0].tolist()

    assert row("inputs", "next_token_logprobs") == [False, True, False]
    assert row("data", "advantages") == [False, False, True, False]
    # It may be read shifted or not.
    assert row("data", "reference_policy_logprobs") == [False, True, True, False]
    assert row("data", "topk") == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert batch.valid("data", "rewards").tolist() == [True, False]
    draft = make("draft")
    expected = (draft.inputs["token_mask"] != 0) & draft.sample_mask[:, None]
    assert torch.equal(draft.valid("inputs", "student_logits")[..., 0], expected)


def test_masks_move_together():
    draft = make("draft")
    mask = draft.token_mask
    mask[0] = False
    changed = draft.with_tokens(mask)
    assert not changed.inputs["token_mask"][0].any()
    assert torch.equal(changed.inputs["token_mask"][1:], draft.inputs["token_mask"][1:])
    assert draft.token_mask[0].any()  # the batch itself is as before


def subject(group=1):
    return Subject(lambda: None, None, None, group, make, torch.float64, frozenset())


def test_something_is_masked():
    batch = make("rewards").with_samples(torch.ones(6))
    assert with_masked(subject(), batch).sample_mask.tolist() == [True] * 5 + [False]
    assert with_masked(subject(2), batch).sample_mask.tolist() == [True] * 4 + [False] * 2
    one = build_batch(
        {"logits": torch.ones(1)},
        {"token_mask": torch.ones(1, 3), "sample_mask": torch.ones(1)},
        torch.float32,
        "made",
    )
    with pytest.raises(NotApplicable, match="nothing masked"):
        with_masked(subject(), one)


def test_describe():
    text = make().take([0]).columns([0, 1]).describe(["advantages"])
    assert text.splitlines()[0] == "1 row, 2 tokens"
    assert text.splitlines()[2] == "token_mask = [[0, 0]]"
    assert "advantages = [[" in text and "returns" not in text


def result(value=1.0, grad=(1.0, 2.0), **metrics):
    return Result(value, {"x": torch.tensor(grad, dtype=torch.float64)}, metrics)


@pytest.mark.parametrize(
    ("actual", "expected", "size", "where"),
    [
        (result(), result(), 0, "loss"),
        (result(1.1), result(), 0.1, "loss"),
        (result(math.nan), result(), math.inf, "loss"),
        (result(math.nan), result(math.nan), 0, "loss"),
        (result(math.inf), result(math.inf), 0, "loss"),
        (result(grad=(1.0, 2.5)), result(), 0.25, "gradient by x"),
        (result(grad=(1.0, math.nan)), result(), math.inf, "gradient by x"),
        (result(grad=(1.0, 0.0)), result(grad=(0.0, 0.0)), 1e8, "gradient by x"),
        (result(a=1.0, b=2.0), result(a=1.0, b=4.0), 0.5, "metric b"),
        (result(a=1.0), result(), math.inf, "metric a"),
        (result(1e-12), result(0.0), 1e-10, "loss"),
    ],
)
def test_difference(actual, expected, size, where):
    gap = difference(actual, expected)
    assert gap.size == pytest.approx(size) and gap.where == where
    assert difference(actual, expected, skip=["a", "b"]).where in ("loss", "gradient by x")


def test_relative_to_small_numbers():
    assert relative(0.0, 0.001) == pytest.approx(0.1)
    assert relative(-0.0, 0.0) == 0


def test_metrics_combine_as_in_trainers():
    parts = [
        {"loss": 1.0, "r_min": math.inf, "r_max": -math.inf, "num_x": 2.0},
        {"loss": 2.0, "r_min": 3.0, "r_max": 4.0, "num_x": 1.0, "late": 5.0},
        {"loss": math.nan, "r_min": 2.0, "r_max": 1.0, "num_x": 0.0},
    ]
    total = add_metrics(parts)
    assert math.isnan(total.pop("loss"))
    assert total == {"r_min": 2.0, "r_max": 4.0, "num_x": 3.0, "late": 5.0}
    assert add_metrics([{"r_min": math.inf}]) == {"r_min": math.inf}


def test_gradients_go_to_their_rows():
    batch = make().take([0, 1, 2]).columns([0, 1, 2])
    parts = [Result(1.0, {"next_token_logprobs": torch.tensor([[2.0, 3.0]])}, {})]
    parts.append(Result(1.0, {"next_token_logprobs": torch.tensor([[5.0], [7.0]])}, {}))
    total = join(batch, [[1], [2, 0]], parts)
    assert total.grads["next_token_logprobs"].tolist() == [[7.0, 0.0], [2.0, 3.0], [5.0, 0.0]]
    assert total.value == 2.0


@settings(max_examples=25)
@given(
    wanted_rows=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    wanted_columns=st.sets(st.integers(1, 8), min_size=1, max_size=3),
)
def test_shrinking_finds_the_smallest(wanted_rows, wanted_columns):
    """What is wanted stays, all else goes."""
    batch = make()
    rewards = batch.data["rewards"][sorted(wanted_rows)].tolist()
    marks = batch.data["advantages"][0, sorted(wanted_columns)].tolist()
    batch.data["advantages"][:] = batch.data["advantages"][0]

    def shows(smaller):
        return set(rewards) <= set(smaller.data["rewards"].tolist()) and set(marks) <= set(
            smaller.data["advantages"][0].tolist()
        )

    small = shrink(batch, 1, shows)
    assert small.data["rewards"].tolist() == rewards
    assert small.data["advantages"][0, 1:].tolist() == marks


def test_shrinking_keeps_pairs_and_ends():
    batch = make("pairs")
    wanted = batch.data["rewards"][5].item()
    small = shrink(batch, 2, lambda b: wanted in b.data["rewards"].tolist())
    assert small.data["rewards"].tolist() == batch.data["rewards"][4:6].tolist()
    tries = []
    generator = torch.Generator().manual_seed(0)

    def now_and_then(smaller):
        tries.append(smaller)
        return bool(torch.rand((), generator=generator) < 0.02)

    wide = make().padded(200)
    shrink(wide, 1, now_and_then)
    assert len(tries) <= 150
