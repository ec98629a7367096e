# SPDX-License-Identifier: Apache-2.0
"""Losses of the whole batch: definitions in plain Python, what they do to micro-batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_checks import (
    BETA,
    check_definition,
    check_micro_batches_sum,
    check_promises,
    check_setting,
    config,
    counts,
    make_batch,
    row_sums,
    run,
)

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.custom.batch import AOTLossFn, AOTUnpairedLossFn, BCOPairLossFn, KTOLossFn
from nemo_rl_ref.custom.pairwise import ConservativeDPOLossFn

EPS = 0.2
batches = st.builds(
    make_batch,
    pairs=st.integers(0, 5),
    length=st.integers(1, 7),
    seed=st.integers(0, 999),
    mask_dtype=st.sampled_from([torch.float32, torch.bool, torch.int64]),
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def valid_pairs(values, data):
    """(chosen, rejected) of the pairs that count, as floats."""
    pairs = values.reshape(-1, 2)[data["sample_mask"][::2].bool()]
    return [tuple(pair) for pair in pairs.tolist()]


def log_ratios(batch, average=False):
    logprobs, data = batch
    return row_sums(logprobs - data["reference_policy_logprobs"][:, :-1], data, average)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def smoothed(margin):
    return -(1 - EPS) * math.log(sigmoid(margin)) - EPS * math.log(sigmoid(-margin))


@given(batch=batches, average=st.booleans())
def test_aot_unpaired(batch, average):
    loss_fn = AOTUnpairedLossFn(config(label_smoothing=EPS, preference_average_log_probs=average))
    pairs = valid_pairs(log_ratios(batch, average), batch[1])
    chosen, rejected = sorted(w for w, _ in pairs), sorted(l for _, l in pairs)
    expected = mean(smoothed(BETA * (w - l)) for w, l in zip(chosen, rejected, strict=True))
    assert run(loss_fn, *batch)[0].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(batch=batches, average=st.booleans())
def test_aot(batch, average):
    logprobs, data = batch
    loss_fn = AOTLossFn(config(label_smoothing=EPS, preference_average_log_probs=average))
    policy = valid_pairs(row_sums(logprobs, data, average), data)
    reference = row_sums(data["reference_policy_logprobs"][:, :-1], data, average)
    u = sorted(w - l for w, l in policy)
    v = sorted(w - l for w, l in valid_pairs(reference, data))
    expected = mean(smoothed(BETA * (a - b)) for a, b in zip(u, v, strict=True))
    assert run(loss_fn, *batch)[0].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(seed=st.integers(0, 99))
def test_aot_unpaired_does_not_care_who_is_paired(seed):
    logprobs, data = make_batch(seed=seed)
    data["sample_mask"].fill_(1)
    order = torch.arange(8)
    order[1::2] = torch.tensor([5, 1, 7, 3])
    moved = {key: value[order] for key, value in data.items()}
    loss_fn = AOTUnpairedLossFn(config())
    loss, grad, _ = run(loss_fn, logprobs, data)
    again = run(loss_fn, logprobs[order], moved)
    torch.testing.assert_close(again[0], loss)
    torch.testing.assert_close(again[1], grad[order])


@pytest.mark.parametrize("loss_class", [AOTLossFn, AOTUnpairedLossFn])
def test_aot_of_one_pair_is_conservative_dpo(loss_class):
    batch = make_batch(pairs=1, seed=1)
    batch[1]["sample_mask"].fill_(1)
    ours = run(loss_class(config(label_smoothing=EPS)), *batch)
    expected = run(ConservativeDPOLossFn(config(label_smoothing=EPS)), *batch)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


@given(batch=batches, average=st.booleans())
def test_bco_with_batch_delta(batch, average):
    h = BETA * log_ratios(batch, average)
    pairs = valid_pairs(h, batch[1])
    delta = mean((w + l) / 2 for w, l in pairs)
    expected = mean(-math.log(sigmoid(w - delta)) - math.log(sigmoid(delta - l)) for w, l in pairs)
    loss, grad, _ = run(BCOPairLossFn(config(preference_average_log_probs=average)), *batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    # No gradient through delta: -β σ(-(w - δ)) on a chosen token, over pairs (and length).
    mask = batch[1]["token_mask"][:, 1:].double()
    weights = torch.stack([-torch.sigmoid(delta - h[::2]), torch.sigmoid(h[1::2] - delta)], 1)
    weights = BETA * weights.flatten() * batch[1]["sample_mask"].double() / max(len(pairs), 1)
    if average:
        weights = weights / mask.sum(1).clamp(min=1)
    torch.testing.assert_close(grad, weights[:, None] * mask, rtol=1e-6, atol=1e-8)


@given(batch=batches, average=st.booleans())
def test_bco_with_zero_delta(batch, average):
    loss_fn = BCOPairLossFn(config(bco_delta="zero", preference_average_log_probs=average))

    def pair_loss(w, l):
        return -torch.log(torch.sigmoid(BETA * w)) - torch.log(torch.sigmoid(-BETA * l))

    check_definition(loss_fn, pair_loss, batch, average)


@given(batch=batches, average=st.booleans())
def test_kto(batch, average):
    data = batch[1]
    settings = {"kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5}
    loss_fn = KTOLossFn(config(**settings, preference_average_log_probs=average))
    ratios = data["mismatched_logprobs"] - data["mismatched_reference_logprobs"]
    z = max(0.0, mean(x for pair in valid_pairs(ratios, data) for x in pair))

    # λ - v(x, y), response by response
    def pair_loss(w, l):
        desirable = 1.5 - 1.5 * torch.sigmoid(BETA * (w - z))
        undesirable = 0.5 - 0.5 * torch.sigmoid(BETA * (z - l))
        return (desirable + undesirable) / 2

    check_definition(loss_fn, pair_loss, batch, average)


def test_kto_reference_point():
    _, data = make_batch()
    data["sample_mask"][:] = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1])
    ratio = torch.tensor([3.0, 1, 999, 999, -2, 2, 4, -2], dtype=torch.float64)
    data["mismatched_logprobs"] = (ratio - 5).requires_grad_()
    data["mismatched_reference_logprobs"] = torch.full((8,), -5.0, dtype=torch.float64)
    z = KTOLossFn(config()).reference_point(data)
    assert z.item() == pytest.approx(1.0) and not z.requires_grad
    data["mismatched_reference_logprobs"] = torch.full((8,), 5.0, dtype=torch.float64)
    assert KTOLossFn(config()).reference_point(data) == 0


LOSSES = {
    "aot": AOTLossFn(config()),
    "aot_unpaired": AOTUnpairedLossFn(config(label_smoothing=EPS)),
    "bco": BCOPairLossFn(config()),
    "bco_zero": BCOPairLossFn(config(bco_delta="zero")),
    "kto": KTOLossFn(config()),
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_promises(loss_fn):
    check_promises(loss_fn, sums=not loss_fn.needs_whole_batch)


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_needs_whole_batch_says_what_is_true(loss_fn):
    """Losses of micro-batches sum to the batch's exactly if `needs_whole_batch` is false."""
    logprobs, data = make_batch(pairs=6, seed=8)
    whole = run(loss_fn, logprobs, data)
    parts = [
        run(loss_fn, logprobs[rows], {k: v[rows] for k, v in data.items()}, **counts(data))
        for rows in (slice(0, 6), slice(6, None))
    ]
    difference = abs(parts[0][0] + parts[1][0] - whole[0])
    assert (difference > 1e-4) == loss_fn.needs_whole_batch
    # Metrics sum in any case, but for the loss itself.
    for name in whole[2].keys() - {"loss", "preference_loss"}:
        assert parts[0][2][name] + parts[1][2][name] == pytest.approx(whole[2][name])


def test_kto_sums_if_every_row_holds_the_global_mean():
    batch = make_batch(pairs=6, seed=8)
    batch[1]["mismatched_logprobs"][:] = batch[1]["mismatched_reference_logprobs"] + 0.7
    check_micro_batches_sum(KTOLossFn(config()), batch, cut=2)


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_metrics_are_those_of_dpo(loss_fn):
    batch = make_batch(seed=6)
    ours, of_dpo = run(loss_fn, *batch)[2], run(DPOLossFn(config()), *batch)[2]
    for name in ours.keys() - {"loss", "preference_loss"}:
        assert ours[name] == of_dpo[name], name


def test_missing_and_misshapen_data():
    for key in KTOLossFn.needs_data:
        logprobs, data = make_batch()
        data[key] = data[key][:3]
        with pytest.raises(ValueError, match=rf"data\['{key}'\] has shape \(3,\), expected .*8"):
            run(KTOLossFn(config()), logprobs, data)
        del data[key]
        with pytest.raises(KeyError, match=f"'{key}', which KTOLossFn needs"):
            run(KTOLossFn(config()), logprobs, data)


def test_settings():
    check_setting(BCOPairLossFn, "bco_delta", ["batch", "zero"], ["running", 0.0])
    check_setting(AOTLossFn, "label_smoothing", [0, 0.5], [-0.1, 0.6, "0.1"])
    check_setting(KTOLossFn, "kto_desirable_weight", [0, 2.0], [-1, "1"])
    check_setting(KTOLossFn, "kto_undesirable_weight", [0, 2.0], [-1, math.nan])
