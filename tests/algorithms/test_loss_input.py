# SPDX-License-Identifier: Apache-2.0
"""What a loss is given from logits, written naively; packed sequences; the draft's loss beside."""

import pytest
import torch

from nemo_rl_ref.algorithms.logits_sampling_utils import TrainingSamplingParams
from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossFn,
    DistillationLossConfig,
    DistillationLossFn,
    DraftCrossEntropyLossFn,
    DraftLossWrapper,
    MseValueLossConfig,
    MseValueLossFn,
    NLLLossFn,
    SequencePackingLossWrapper,
    prepare_loss_input,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

B, S, V = 3, 5, 7


@pytest.fixture
def logits():
    return torch.randn(B, S, V, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def data():
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    return BatchedDataDict(input_ids=ids, token_mask=mask, sample_mask=torch.ones(B))


def test_logprobs_are_those_of_the_next_token(logits, data):
    found, _ = prepare_loss_input(logits, data, NLLLossFn())
    for row in range(B):
        for t in range(S - 1):
            expected = logits[row, t].log_softmax(-1)[data["input_ids"][row, t + 1]]
            torch.testing.assert_close(found["next_token_logprobs"][row, t], expected)


def test_filtered_logprobs_keep_the_unfiltered_ones_for_the_kl_penalty(logits, data):
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.1))
    params = TrainingSamplingParams(top_k=2)
    found, data = prepare_loss_input(logits, data, loss_fn, sampling_params=params)
    plain, _ = prepare_loss_input(logits, data, NLLLossFn())
    torch.testing.assert_close(data["curr_logprobs_unfiltered"], plain["next_token_logprobs"])
    kept = logits[:, :-1] >= logits[:, :-1].topk(2).values[..., -1:]
    whole = logits[:, :-1].masked_fill(~kept, -torch.inf).log_softmax(-1)
    expected = whole.gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    mask = data["token_mask"][:, 1:].bool() & expected.isfinite()
    assert mask.any()
    torch.testing.assert_close(found["next_token_logprobs"][mask], expected[mask])


@pytest.mark.parametrize("outside", [True, False])
def test_distillation_compares_the_teachers_tokens_one_column_ahead(logits, data, outside):
    data["teacher_topk_logits"] = torch.randn(B, S, 2, generator=torch.Generator().manual_seed(2))
    data["teacher_topk_indices"] = torch.tensor([4, 1]).expand(B, S, 2)
    cfg = DistillationLossConfig(kl_type="reverse", zero_outside_topk=outside)
    found, _ = prepare_loss_input(logits, data, DistillationLossFn(cfg))
    whole = logits.log_softmax(-1)
    student = whole[..., [4, 1]] if outside else logits[..., [4, 1]].log_softmax(-1)
    torch.testing.assert_close(found["student_topk_logprobs"], student[:, :-1])
    teacher = data["teacher_topk_logits"].log_softmax(-1)
    torch.testing.assert_close(found["teacher_topk_logprobs"], teacher[:, :-1])
    if outside:
        torch.testing.assert_close(found["H_all"], (whole.exp() * whole).sum(-1)[:, :-1])
    else:
        assert found["H_all"] is None


def test_a_draft_is_compared_with_the_next_position_and_in_its_own_vocabulary(logits, data):
    data["student_logits"] = torch.zeros(B, S, 3)
    d2t = torch.tensor([1, 2, 4])  # draft tokens 0, 1, 2 are the teacher's 1, 3, 6
    found, _ = prepare_loss_input(logits, data, DraftCrossEntropyLossFn(), d2t=d2t)
    expected = logits[:, 1:, [1, 3, 6]].detach()
    torch.testing.assert_close(found["teacher_logits"][:, :-1], expected)
    assert not found["teacher_logits"].requires_grad and not found["teacher_logits"][:, -1].any()
    assert found["token_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_a_value_loss_gets_the_output_itself_and_a_group_is_refused(logits, data):
    loss_fn = MseValueLossFn(MseValueLossConfig(scale=0.5, cliprange=0.2))
    assert prepare_loss_input(logits, data, loss_fn)[0]["logits"] is logits
    with pytest.raises(NotImplementedError, match="vocab_parallel_group"):
        prepare_loss_input(logits, data, loss_fn, vocab_parallel_group=object())


@pytest.mark.parametrize("padding", [0, 2])
def test_packed_sequences_have_the_loss_and_gradient_of_rows(logits, data, padding):
    lengths = [5, 4, 3]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    padded = torch.tensor([0, *(n + padding for n in lengths)]).cumsum(0)
    row = [
        torch.nn.functional.pad(logits[number, :n], (0, 0, 0, padding))
        for number, n in enumerate(lengths)
    ]
    counts = (torch.tensor(B), data["token_mask"][:, 1:].sum())
    data |= {"generation_logprobs": torch.zeros(B, S), "prev_logprobs": torch.zeros(B, S)}
    data |= {"advantages": torch.arange(B * S).view(B, S) - 7.0}
    data |= {"reference_policy_logprobs": torch.zeros(B, S)}
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig())
    packed = SequencePackingLossWrapper(loss_fn, prepare_loss_input, ends, padded)
    loss, metrics = packed(torch.cat(row).unsqueeze(0), data, *counts)
    loss_input, _ = prepare_loss_input(logits, data, loss_fn)
    expected, whole = loss_fn(
        data=data, global_valid_seqs=counts[0], global_valid_toks=counts[1], **loss_input
    )
    torch.testing.assert_close(loss, expected)
    gradients = (
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)
    )
    torch.testing.assert_close(*gradients)
    for name in ("loss", "probs_ratio", "probs_ratio_min", "probs_ratio_max"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-5), name


def test_the_drafts_loss_is_added_with_its_weight(logits, data):
    data["student_logits"] = torch.zeros(B, S, V)
    counts = (torch.tensor(B), torch.tensor(4))
    policy = torch.tensor(2.0)
    both = DraftLossWrapper(lambda *arguments: (policy, {}), prepare_loss_input, data, 0.25)
    loss, metrics = both(logits, data, *counts)
    loss_input, _ = prepare_loss_input(logits, data, DraftCrossEntropyLossFn())
    draft = DraftCrossEntropyLossFn()(
        data=data, global_valid_seqs=counts[0], global_valid_toks=counts[1], **loss_input
    )
    torch.testing.assert_close(loss, 2 + 0.25 * draft)
    assert metrics == {"draft_loss": draft.item()}
    with pytest.raises(ValueError, match="global_valid_toks"):
        both(logits, data, counts[0], None)
