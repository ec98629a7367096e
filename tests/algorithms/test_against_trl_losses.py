# SPDX-License-Identifier: Apache-2.0
"""Against TRL's own code where TRL computes the same thing.

TRL's DPO loss is a method of its trainer. It is called here on a stand-in for the trainer, with
log-probabilities instead of a model, so that the two losses see exactly the same numbers.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.logprobs import token_logprobs

BETA = 0.3


def random_logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(3, 7, 50, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(50, (3, 7), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_logprobs(dtype, temperature):
    logits, targets = random_logits(dtype)
    ours = token_logprobs(logits, targets, temperature=temperature)
    theirs = selective_log_softmax(logits, targets, temperature=temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-6)
    (grad,) = torch.autograd.grad(ours.exp().sum(), logits)
    (expected,) = torch.autograd.grad(theirs.exp().sum(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_token_logprobs_of_bfloat16_logits():
    """TRL stays in bfloat16 there; the results agree to its 8 bits, and ours is the closer one."""
    logits, targets = random_logits(torch.bfloat16)
    exact = token_logprobs(logits.detach().double(), targets)
    ours = token_logprobs(logits, targets)
    theirs = selective_log_softmax(logits, targets)
    torch.testing.assert_close(ours, theirs.float(), rtol=0.02, atol=0.02)
    assert (ours - exact).abs().max() < 1e-5 < (theirs - exact).abs().max()


def test_entropy():
    logits, targets = random_logits()
    ours = token_logprobs(logits, targets, return_entropy=True)[1]
    theirs = entropy_from_logits(logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-6)
    (grad,) = torch.autograd.grad(ours.square().sum(), logits)
    (expected,) = torch.autograd.grad(theirs.square().sum(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=2e-6)


def make_pairs(equal_lengths):
    """Log-probabilities of 5 pairs, (10, 8), rows alternating, and a mask of the responses."""
    generator = torch.Generator().manual_seed(9)
    policy, reference = -3 * torch.rand(2, 10, 8, generator=generator)
    prompt = torch.randint(1, 5, (10, 1), generator=generator)
    length = torch.randint(1, 5, (10, 1), generator=generator)
    if equal_lengths:
        length.fill_(3)
    position = torch.arange(9)
    mask = ((position >= prompt) & (position < prompt + length)).float()
    return policy.requires_grad_(), reference, mask


def trl_loss(policy, reference, mask, loss_types, loss_weights):
    """Loss and metrics of TRL's trainer: chosen rows first, then rejected, masked beforehand."""
    order = torch.cat([torch.arange(0, 10, 2), torch.arange(1, 10, 2)])
    mask = mask[order]
    logprobs = policy[order] * mask[:, 1:]
    reference_sums = (reference[order] * mask[:, 1:]).sum(-1)
    zeros = torch.zeros_like(logprobs)
    model_output = SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=loss_weights,
        beta=BETA,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(10, 9, dtype=torch.int64),
        "attention_mask": torch.ones(10, 9, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": reference_sums[:5],
        "ref_rejected_logps": reference_sums[5:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: model_output, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(
    ("loss_types", "loss_weights", "cfg", "equal_lengths"),
    [
        (["sigmoid"], [1.0], {}, False),
        (["sigmoid_norm"], [1.0], {"preference_average_log_probs": True}, False),
        # TRL's SFT term is a mean over all tokens. That is our mean over pairs of means over
        # tokens only if the chosen responses are of one length.
        (
            ["sigmoid", "sft"],
            [0.7, 0.2],
            {"preference_loss_weight": 0.7, "sft_loss_weight": 0.2, "sft_average_log_probs": True},
            True,
        ),
    ],
)
def test_dpo_loss(loss_types, loss_weights, cfg, equal_lengths):
    policy, reference, mask = make_pairs(equal_lengths)
    theirs, their_metrics = trl_loss(policy, reference, mask, loss_types, loss_weights)

    data = {
        "token_mask": mask,
        "sample_mask": torch.ones(10),
        "reference_policy_logprobs": torch.cat([reference, torch.zeros(10, 1)], 1),
    }
    loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=BETA, **cfg))
    tokens = mask[:, 1:].sum()
    ours, metrics = loss_fn(
        policy, data, global_valid_seqs=torch.tensor(10.0), global_valid_toks=tokens
    )

    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(ours, policy)
    (expected,) = torch.autograd.grad(theirs, policy)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    if not loss_fn.preference_average_log_probs:  # TRL's metrics are of the sums in any case
        assert metrics["accuracy"] == pytest.approx(their_metrics["rewards/accuracies"], abs=1e-6)
        for ours_name, name in (
            ("rewards_chosen_mean", "rewards/chosen"),
            ("rewards_rejected_mean", "rewards/rejected"),
        ):
            # TRL's rewards are multiplied by beta, NeMo RL's are not.
            assert BETA * metrics[ours_name] == pytest.approx(their_metrics[name], abs=1e-5)
