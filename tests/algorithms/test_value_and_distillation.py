# SPDX-License-Identifier: Apache-2.0
"""Value, distillation and draft losses: definitions in plain Python, gradients, bad input."""

import math
import multiprocessing
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_ref.algorithms.loss import (
    DistillationLossConfig,
    DistillationLossFn,
    DraftCrossEntropyLossFn,
    MseValueLossConfig,
    MseValueLossFn,
)
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

MASK_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64])


def make_batch(
    rows=3, length=5, vocabulary=4, seed=0, dtype=torch.float64, mask_dtype=torch.float32
):
    """A batch that has what each of the three losses needs."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "token_mask": (randn(rows, length) > -0.4).to(mask_dtype),
        "sample_mask": (randn(rows) > -0.7).to(mask_dtype),
        "input_ids": torch.zeros(rows, length, dtype=torch.int64),
        "returns": randn(rows, length),
        "values": randn(rows, length),
        "new_values": randn(rows, length),
        "student": randn(rows, length - 1, vocabulary),
        "teacher": randn(rows, length - 1, vocabulary),
    }


batches = st.builds(
    make_batch,
    rows=st.integers(0, 4),
    length=st.integers(2, 6),
    vocabulary=st.integers(3, 6),
    seed=st.integers(0, 999),
    mask_dtype=MASK_DTYPES,
)


def token_count(data, first=0):
    mask = data["token_mask"][:, first:].double() * data["sample_mask"].double()[:, None]
    return mask.sum()


def unmasked(data, first=0):
    """(row, position) of the unmasked tokens, positions counted from column `first`."""
    mask = data["token_mask"][:, first:] * data["sample_mask"][:, None]
    return [tuple(index) for index in mask.nonzero().tolist()]


def split(data, cut):
    for rows in (slice(0, cut), slice(cut, None)):
        yield {key: value[rows] for key, value in data.items()}


# Value


def run_value(cfg, data, values=None, count=None):
    values = data["new_values"] if values is None else values
    values = values.clone().requires_grad_()
    count = token_count(data) if count is None else count
    loss, metrics = MseValueLossFn(cfg)(values, data, None, count)
    loss.backward()
    return loss.item(), values.grad, metrics


value_configs = st.builds(
    MseValueLossConfig,
    scale=st.sampled_from([1.0, 0.5]),
    cliprange=st.sampled_from([None, 0.0, 0.2, 1.0]),
)


@given(value_configs, batches)
def test_value_is_its_definition(cfg, data):
    v, old, r = (data[key].tolist() for key in ("new_values", "values", "returns"))
    tokens = unmasked(data)

    def mean(f):
        return sum(f(v[i][t], old[i][t], r[i][t]) for i, t in tokens) / max(len(tokens), 1)

    def clipped(v, old, r):
        return (min(max(v, old - cfg.cliprange), old + cfg.cliprange) - r) ** 2

    def error(v, old, r):
        return (v - r) ** 2

    def worst(*x):
        return max(error(*x), clipped(*x)) if cfg.cliprange else error(*x)

    valid = [v[i][t] for i, t in tokens]
    loss, _, metrics = run_value(cfg, data)
    assert metrics == pytest.approx(
        {
            "loss": cfg.scale * mean(worst) / 2,
            "vf_clipfrac": mean(lambda *x: clipped(*x) > error(*x)) if cfg.cliprange else 0.0,
            "returns_mean": mean(lambda v, old, r: r),
            "values_mean": mean(lambda v, old, r: v),
            "values_min": min(valid, default=0.0),
            "values_max": max(valid, default=0.0),
            "returns_sq_mean": mean(lambda v, old, r: r * r),
            "residual_sq_mean": mean(error),
            "num_valid_samples": len(v),
        },
        rel=1e-6,
        abs=1e-7,
    )
    assert loss == metrics["loss"]


@pytest.mark.parametrize(
    ("value", "gradient"),
    [
        (0.1, 0.1 - 1.0),  # within 0.2 of the old value, 0
        (0.5, 0.0),  # has moved towards the return, 1, by more than that
        (-0.5, -0.5 - 1.0),  # has moved away: on the way back
        (3.0, 3.0 - 1.0),  # past the return and further from it than the clipped value
    ],
)
def test_value_gradient(value, gradient):
    data = {
        "token_mask": torch.ones(1, 1),
        "sample_mask": torch.ones(1),
        "returns": torch.ones(1, 1),
        "values": torch.zeros(1, 1),
    }
    _, grad, _ = run_value(MseValueLossConfig(cliprange=0.2), data, torch.tensor([[value]]))
    assert grad.item() == pytest.approx(gradient)


@given(value_configs, batches, st.integers(0, 4))
def test_value_micro_batches_sum(cfg, data, cut):
    loss, grad, metrics = run_value(cfg, data)
    parts = [run_value(cfg, part, count=token_count(data)) for part in split(data, cut)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
    for name in metrics.keys() - {"values_min", "values_max"}:
        assert sum(part[2][name] for part in parts) == pytest.approx(metrics[name], abs=1e-6)


@given(value_configs, batches)
def test_value_masked_entries_do_not_matter(cfg, data):
    off = (data["token_mask"] * data["sample_mask"][:, None]) == 0
    other = {**data, "returns": data["returns"].masked_fill(off, 50.0)}
    other["values"] = data["values"].masked_fill(off, -50.0)
    a = run_value(cfg, data)
    b = run_value(cfg, other, data["new_values"].masked_fill(off, 7.0))
    assert a[0] == b[0] and a[2] == b[2] and torch.equal(a[1], b[1])
    assert not a[1][off].any()


def test_value_shapes_attributes_and_containers():
    data, cfg = make_batch(), MseValueLossConfig(cliprange=0.2)
    flat, column = run_value(cfg, data), run_value(cfg, data, data["new_values"].unsqueeze(-1))
    assert flat[0] == column[0] and torch.equal(flat[1], column[1].squeeze(-1))
    boxed = run_value(cfg, BatchedDataDict(data))
    assert boxed[0] == flat[0] and boxed[2] == flat[2]
    loss_fn = MseValueLossFn(cfg)
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL and loss_fn.input_type is LossInputType.LOGIT
    half = make_batch(dtype=torch.bfloat16)
    assert run_value(cfg, half)[1].dtype == torch.bfloat16
    single = run_value(
        cfg,
        {key: value[:, :1] for key, value in data.items() if value.ndim > 1}
        | {"sample_mask": data["sample_mask"]},
    )
    assert single[1].shape == (3, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_mask": None}, KeyError, "data has no 'token_mask', which MseValueLossFn needs"),
        ({"returns": None}, KeyError, "data has no 'returns', which MseValueLossFn needs"),
        ({"values": None}, KeyError, "data has no 'values', which MseValueLossFn needs"),
        ({"sample_mask": None}, KeyError, "data has no 'sample_mask', which MseValueLossFn"),
        ({"returns": torch.ones(3, 4)}, ValueError, r"\['returns'\] .*\(3, 4\), .*\(3, 5\)"),
        (
            {"new_values": torch.ones(3, 5, 2)},
            ValueError,
            r"logits has shape \(3, 5, 2\), expected",
        ),
        ({"new_values": torch.ones(3)}, ValueError, r"logits has shape \(3,\), expected \(B, S\)"),
        ({"new_values": torch.ones(3, 5).int()}, TypeError, "logits has dtype torch.int32"),
    ],
)
def test_value_bad_input(change, error, message):
    data = {**make_batch(), **change}
    values = data["new_values"]
    data = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(error, match=message):
        MseValueLossFn(MseValueLossConfig(cliprange=0.2))(values, data, None, torch.tensor(1.0))


def test_value_bad_config_and_count():
    data = make_batch()
    with pytest.raises(ValueError, match="cliprange is -0.1, expected 0 or more, or None"):
        MseValueLossFn(MseValueLossConfig(cliprange=-0.1))
    with pytest.raises(TypeError, match="cfg is a dict, expected a MseValueLossConfig"):
        MseValueLossFn({"scale": 1.0})
    with pytest.raises(ValueError, match="scael"):
        MseValueLossConfig(scael=1.0)
    with pytest.raises(ValueError, match="global_valid_toks is None"):
        MseValueLossFn(MseValueLossConfig())(data["new_values"], data, None, None)
    del data["values"]  # not needed without clipping
    run_value(MseValueLossConfig(), data)


# Distillation


def run_distillation(cfg, data, k=2, count=None, **overrides):
    """The top k are the first k tokens. The gradient is that of the student's top-k logprobs."""
    full = data["student"].log_softmax(-1)
    student = full[..., :k].clone().requires_grad_()
    arguments = {
        "student_topk_logprobs": student,
        "teacher_topk_logprobs": data["teacher"].log_softmax(-1)[..., :k],
        "H_all": (full.exp() * full).sum(-1),
        "global_valid_toks": token_count(data, 1) if count is None else count,
        **overrides,
    }
    loss, metrics = DistillationLossFn(cfg)(data=data, global_valid_seqs=None, **arguments)
    loss.backward()
    return loss.item(), student.grad, metrics


distillation_configs = st.builds(
    DistillationLossConfig,
    kl_type=st.sampled_from(["forward", "reverse", "mixed"]),
    mixed_kl_weight=st.sampled_from([0.0, 0.3, 1.0]),
    zero_outside_topk=st.booleans(),
)


@given(distillation_configs, batches, st.integers(1, 3))
def test_distillation_is_its_definition(cfg, data, k):
    """Over the whole vocabulary where the teacher's rest counts as e^-100."""
    tokens = unmasked(data, 1)
    total = 0.0
    for i, t in tokens:
        log_q = data["student"][i, t].log_softmax(-1).tolist()
        log_p = data["teacher"][i, t].log_softmax(-1).tolist()
        forward = sum(math.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in range(k))
        reverse = sum(math.exp(log_q[v]) * (log_q[v] - log_p[v]) for v in range(k))
        if cfg.zero_outside_topk:
            reverse += sum(math.exp(x) * (x + 100) for x in log_q[k:])
        w = {"forward": 1, "reverse": 0, "mixed": cfg.mixed_kl_weight}[cfg.kl_type]
        total += w * forward + (1 - w) * reverse
    loss, _, metrics = run_distillation(cfg, data, k)
    assert loss == pytest.approx(total / max(len(tokens), 1), rel=1e-6, abs=1e-7)
    assert metrics == {"loss": loss, "num_valid_samples": len(data["sample_mask"])}


def test_distillation_with_the_whole_vocabulary_is_the_kl():
    """Forward is KL(p‖q) and reverse KL(q‖p), gradients with respect to the logits included."""
    data = make_batch(rows=1, length=2)
    data |= {"token_mask": torch.ones(1, 2), "sample_mask": torch.ones(1)}
    log_p = data["teacher"].log_softmax(-1)
    logits = data["student"].clone().requires_grad_()
    for kind in ("forward", "reverse"):
        log_q = logits.log_softmax(-1)
        a, b = (log_p, log_q) if kind == "forward" else (log_q, log_p)
        exact = (a.exp() * (a - b)).sum()
        loss, _ = DistillationLossFn(DistillationLossConfig(kl_type=kind))(
            log_q, log_p, None, data, None, torch.tensor(1.0)
        )
        torch.testing.assert_close(loss, exact, rtol=1e-7, atol=0)
        grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, exact)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
        if kind == "forward":
            torch.testing.assert_close(grads[0], log_q.exp() - log_p.exp(), rtol=1e-6, atol=1e-9)


@given(distillation_configs, batches, st.integers(0, 4))
def test_distillation_micro_batches_sum(cfg, data, cut):
    loss, grad, _ = run_distillation(cfg, data)
    parts = [run_distillation(cfg, part, count=token_count(data, 1)) for part in split(data, cut)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)


def test_distillation_masks():
    """Column 0 is not used, positions beyond T are cut, and without masks it is a plain mean."""
    data, cfg = make_batch(), DistillationLossConfig()
    data["sample_mask"][:] = 1
    base = run_distillation(cfg, data)
    off = data["token_mask"][:, 1:] == 0
    assert off.any() and not base[1][off].any()
    other = {**data, "token_mask": data["token_mask"].clone()}
    other["token_mask"][:, 0] = 1 - other["token_mask"][:, 0]
    assert run_distillation(cfg, other)[0] == base[0]

    short = {**data, "student": data["student"][:, :2], "teacher": data["teacher"][:, :2]}
    cut = {**short, "token_mask": data["token_mask"][:, :3]}
    count = torch.tensor(5.0)
    assert (
        run_distillation(cfg, short, count=count)[0] == run_distillation(cfg, cut, count=count)[0]
    )

    ones = {**data, "token_mask": torch.ones(3, 5)}
    del data["token_mask"]
    plain = run_distillation(cfg, data, global_valid_toks=None, count=0)[0]
    assert plain == pytest.approx(run_distillation(cfg, ones)[0], rel=1e-7)


def test_distillation_attributes():
    loss_fn = DistillationLossFn(DistillationLossConfig(anything=1))
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL
    assert loss_fn.input_type is LossInputType.DISTILLATION


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"H_all": None},
            ValueError,
            "H_all is None, .*zero_outside_topk=True with kl_type='mixed'",
        ),
        ({"H_all": torch.ones(3, 5)}, ValueError, r"H_all has shape \(3, 5\), expected .*\(3, 4\)"),
        (
            {"teacher_topk_logprobs": torch.ones(3, 4, 3)},
            ValueError,
            r"teacher_topk_logprobs has shape \(3, 4, 3\), expected that of .*, \(3, 4, 2\)",
        ),
        (
            {"teacher_topk_logprobs": torch.ones(3, 4, 2).int()},
            TypeError,
            "teacher_topk_logprobs has dtype torch.int32",
        ),
        (
            {"student_topk_logprobs": torch.ones(3, 4)},
            ValueError,
            r"student_topk_logprobs has shape \(3, 4\), expected three dimensions",
        ),
        ({"global_valid_toks": None}, ValueError, "global_valid_toks is None"),
    ],
)
def test_distillation_bad_input(overrides, error, message):
    cfg = DistillationLossConfig(zero_outside_topk=True)
    with pytest.raises(error, match=message):
        run_distillation(cfg, make_batch(), **overrides)


def test_distillation_bad_data_and_config():
    data, cfg = make_batch(), DistillationLossConfig()
    with pytest.raises(ValueError, match=r"\['token_mask'\] has shape \(3, 4\), .* S at least 5"):
        run_distillation(cfg, {**data, "token_mask": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r"\['sample_mask'\] has shape \(2,\), expected"):
        run_distillation(cfg, {**data, "sample_mask": torch.ones(2)}, count=torch.tensor(1.0))
    with pytest.raises(KeyError, match="data has no 'input_ids', which DistillationLossFn"):
        run_distillation(cfg, {key: data[key] for key in data if key != "input_ids"})
    with pytest.raises(ValueError, match="kl_type is 'both', expected 'forward', 'reverse'"):
        DistillationLossFn(DistillationLossConfig(kl_type="both"))
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"mixed_kl_weight is {weight}, expected 0 to 1"):
            DistillationLossFn(DistillationLossConfig(mixed_kl_weight=weight))
    with pytest.raises(TypeError, match="cfg is a dict, expected a DistillationLossConfig"):
        DistillationLossFn({})


# Draft


def run_draft(data, group=None, count=None, columns=slice(None)):
    student = data["student"][..., columns].clone().requires_grad_()
    mask = data["token_mask"][:, 1:]
    count = token_count(data, 1) if count is None else count
    loss = DraftCrossEntropyLossFn(group)(
        data["teacher"][..., columns], student, mask, data, None, count
    )
    loss.backward()
    return loss, student.grad


@given(batches)
def test_draft_is_its_definition(data):
    """Value: Σ p (-log q). Gradient: (q - p) / N at unmasked positions."""
    tokens = unmasked(data, 1)
    p, q = data["teacher"].softmax(-1), data["student"].softmax(-1)
    total = 0.0
    expected = torch.zeros_like(p)
    for i, t in tokens:
        pairs = zip(p[i, t].tolist(), q[i, t].tolist(), strict=True)
        total -= sum(a * math.log(b) for a, b in pairs)
        expected[i, t] = (q[i, t] - p[i, t]) / len(tokens)
    loss, grad = run_draft(data)
    assert isinstance(loss, torch.Tensor) and loss.shape == ()
    assert loss.item() == pytest.approx(total / max(len(tokens), 1), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_draft_of_the_teacher_itself_is_the_entropy():
    data = make_batch()
    data["student"] = data["teacher"] + 3.0  # a constant shift is the same distribution
    loss, grad = run_draft(data)
    p = data["teacher"].softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    assert loss.item() == pytest.approx(((entropy * mask).sum() / mask.sum()).item())
    assert grad.abs().max() < 1e-12


@given(batches, st.integers(0, 4))
def test_draft_micro_batches_sum(data, cut):
    loss, grad = run_draft(data)
    parts = [run_draft(part, count=token_count(data, 1)) for part in split(data, cut)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)


def draft_on_rank(rank, path, queue=None):
    """Each of two ranks has a part of the vocabulary; 2 and 5 columns."""
    torch.distributed.init_process_group(
        "gloo", f"file://{path}", timedelta(seconds=60), world_size=2, rank=rank
    )
    try:
        columns = slice(0, 2) if rank == 0 else slice(2, 7)
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            data = make_batch(vocabulary=7, dtype=dtype)
            data["student"] = data["student"] * 3 + 200  # exp overflows float32 without care
            loss, grad = run_draft(data, torch.distributed.group.WORLD, columns=columns)
            results.append((loss.detach(), grad))
        if queue is not None:
            queue.put([(loss.item(), grad.double().tolist()) for loss, grad in results])
        return results
    finally:
        torch.distributed.destroy_process_group()


def test_draft_with_a_vocabulary_on_two_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    other = context.Process(target=draft_on_rank, args=(1, tmp_path / "store", queue))
    other.start()
    first = draft_on_rank(0, tmp_path / "store")
    second = queue.get(timeout=60)
    other.join(60)
    assert other.exitcode == 0
    for number, (dtype, tolerance) in enumerate([(torch.float64, 1e-12), (torch.bfloat16, 2e-2)]):
        data = make_batch(vocabulary=7, dtype=dtype)
        data["student"] = data["student"] * 3 + 200
        whole = {key: value.double() for key, value in data.items()}
        loss, grad = run_draft(whole)
        for rank_loss in (first[number][0].item(), second[number][0]):
            assert rank_loss == pytest.approx(loss.item(), rel=1e-6)
        assert first[number][1].dtype == dtype
        joined = torch.cat(
            [first[number][1].double(), torch.tensor(second[number][1]).double()], -1
        )
        torch.testing.assert_close(joined, grad, rtol=max(tolerance, 1e-6), atol=tolerance)


def test_draft_bad_input():
    data = make_batch()
    count, mask = torch.tensor(5.0), data["token_mask"][:, 1:]
    loss_fn = DraftCrossEntropyLossFn()
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL and loss_fn.input_type is LossInputType.DRAFT
    teacher, student = data["teacher"], data["student"]
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(3, 4, 3\), expected that of"):
        loss_fn(teacher[..., :3], student, mask, data, None, count)
    with pytest.raises(ValueError, match=r"student_logits has shape \(3, 4\), expected three"):
        loss_fn(teacher, student[..., 0], mask, data, None, count)
    with pytest.raises(TypeError, match="student_logits has dtype torch.int64"):
        loss_fn(teacher, student.long(), mask, data, None, count)
    with pytest.raises(
        ValueError, match=r"token_mask has shape \(3, 5\), expected \(B, T\) = \(3, 4"
    ):
        loss_fn(teacher, student, data["token_mask"], data, None, count)
    with pytest.raises(KeyError, match="data has no 'sample_mask', which DraftCrossEntropyLossFn"):
        loss_fn(teacher, student, mask, {}, None, count)
    with pytest.raises(ValueError, match="global_valid_toks is None"):
        loss_fn(teacher, student, mask, data, None, None)
