# SPDX-License-Identifier: Apache-2.0
"""One update, and a batch without one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn, NLLLossFn, PreferenceLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.training.processes import make_accelerator
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import Batches, preference_pairs
from nemo_rl_ref.training.step import (
    NotFinite,
    next_token_logprobs,
    run_batch,
    update,
    valid_counts,
    weighted_means,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return tiny.load_policy().eval()


@pytest.fixture(scope="module")
def pairs(tokenizer, reference):
    dataset = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
    samples = preference_pairs(dataset, tokenizer, max_seq_length=16)
    samples.tokenize(range(30))
    add_reference_logprobs(reference, [samples], make_accelerator("float32"), batch_size=8)
    return samples


@pytest.fixture(scope="module")
def batches(pairs):
    return [pairs.batch(numbers) for numbers in Batches(24, 8, seed=0)]


def dpo(**settings):
    return DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1, **settings))


def run(batches, loss_fn, learning_rate=1e-3, model=None, micro_rows=None, max_grad_norm=1.0):
    """Take a step on each batch; return the model and the steps' metrics."""
    model = model or tiny.load_policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    accelerator = make_accelerator("float32")
    model, optimizer = accelerator.prepare(model, optimizer)
    options = {"max_grad_norm": max_grad_norm, "rows": 2}
    return model, [
        update(
            model, optimizer, loss_fn, batch, accelerator,
            micro_rows=batch.size if micro_rows is None else micro_rows, **options,
        )
        for batch in batches
    ]  # fmt: skip


def test_an_update_has_the_gradient_of_its_own_batch_alone(batches):
    """At a learning rate of 0, what came before must not matter."""
    _, (_, second) = run(batches[:2], dpo(), learning_rate=0.0)
    _, (alone,) = run(batches[1:2], dpo(), learning_rate=0.0)
    assert second["grad_norm"] == alone["grad_norm"]


def measure(model, loss_fn, batch, micro_rows=64):
    return run_batch(
        model, loss_fn, batch, make_accelerator("float32"), micro_rows=micro_rows, backward=False
    )


def test_logprobs_do_not_depend_on_padding(reference, batches):
    """Why no attention mask is needed: right padding changes nothing before it."""
    batch = batches[0]
    padded = torch.nn.functional.pad(batch["input_ids"], (0, 5))
    mask = batch["token_mask"][:, 1:].bool()
    with torch.no_grad():
        short = next_token_logprobs(reference, batch)
        long = next_token_logprobs(reference, {"input_ids": padded})[:, : short.shape[1]]
        lengths = batch["input_lengths"]
        attention_mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        logits = reference(input_ids=padded, attention_mask=attention_mask).logits
    masked = torch.log_softmax(logits[:, :-1], -1).gather(-1, padded[:, 1:, None])[..., 0]
    torch.testing.assert_close(long[mask], short[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(masked[:, : short.shape[1]][mask], short[mask], rtol=0, atol=1e-5)


def test_counts_leave_out_column_zero_and_masked_samples():
    data = {
        "token_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
        "sample_mask": torch.tensor([1.0, 0.0]),
    }
    assert [count.item() for count in valid_counts(data)] == [1.0, 1.0]


def test_first_step_starts_at_log_two(batches):
    _, steps = run(batches[:1], dpo())
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(steps[0]["rewards_chosen_mean"]) < 1e-5  # policy and reference are the same


@pytest.mark.parametrize("micro_rows", [2, 6, 16])
def test_micro_batches_train_the_same_model(batches, micro_rows):
    loss_fn = dpo(sft_loss_weight=0.1)
    whole, whole_steps = run(batches, loss_fn)
    parts, parts_steps = run(batches, loss_fn, micro_rows=micro_rows)
    for a, b in zip(whole_steps, parts_steps, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_training_moves_the_margin(batches):
    model, steps = run(batches * 4, dpo())
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    after = weighted_means([(8.0, measure(model, dpo(), batch)) for batch in batches])
    assert after["rewards_chosen_mean"] > after["rewards_rejected_mean"]


def test_evaluation_does_not_depend_on_the_batches(pairs):
    """One batch, the same in micro-batches, and the mean over smaller batches by their weights."""
    policy = tiny.load_policy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    whole = measure(policy, dpo(), pairs.batch(range(30)))
    assert whole["num_valid_samples"] == 30
    assert measure(policy, dpo(), pairs.batch(range(30)), micro_rows=8) == pytest.approx(
        whole, rel=1e-4
    )
    results = []
    for low in range(0, 30, 7):
        batch = pairs.batch(range(low, min(low + 7, 30)))
        results.append((batch["sample_mask"].sum().item(), measure(policy, dpo(), batch)))
    assert weighted_means(results) == pytest.approx(whole, rel=1e-4)


def test_without_backward_there_is_no_graph(batches):
    seen = []

    class Watching(DPOLossFn):
        def __call__(self, next_token_logprobs, *args, **kwargs):
            seen.append(next_token_logprobs.requires_grad)
            return super().__call__(next_token_logprobs, *args, **kwargs)

    model = tiny.load_policy()
    loss_fn = Watching(DPOLossConfig(reference_policy_kl_penalty=0.1))
    measure(model, loss_fn, batches[0])
    assert seen == [False] and all(p.grad is None for p in model.parameters())
    run(batches[:1], loss_fn, model=model)
    assert seen == [False, True]


def test_gradient_clipping(batches):
    _, steps = run(batches[:1], dpo(), max_grad_norm=1e-9)
    frozen, _ = run(batches[:1], dpo(), learning_rate=0.0)
    assert steps[0]["grad_norm"] > 0.01  # reported as it was before
    model, _ = run(batches[:1], NLLLossFn(), max_grad_norm=1e30)
    assert not torch.equal(
        next(iter(model.parameters())).detach(), next(iter(frozen.parameters())).detach()
    )


def test_a_gradient_that_is_not_finite_stops_before_the_step(batches):
    poisoned = copy.deepcopy(batches[0])
    poisoned["reference_policy_logprobs"][0, 8] = float("nan")
    model = tiny.load_policy()
    before = copy.deepcopy(model.state_dict())
    message = (
        "loss nan, gradient norm nan; it starts in the loss function: what the model returns is "
        "finite, with 1 of 8 samples: sample 0"
    )
    with pytest.raises(NotFinite, match=message):
        run([batches[0], poisoned], dpo(), learning_rate=0.0, model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("size", [0, -2])
def test_bad_micro_rows(batches, size):
    with pytest.raises(ValueError, match=f"micro_rows: got {size}, expected a positive"):
        run(batches, dpo(), micro_rows=size)


def test_a_loss_with_another_input_is_refused(batches):
    class Distils(NLLLossFn):
        input_type = LossInputType.DISTILLATION

    with pytest.raises(ValueError, match=r"loss_fn: Distils takes LossInputType.DISTILLATION, exp"):
        run(batches, Distils())
    with pytest.raises(ValueError, match=r"logits has shape \(16, 11, 16\), expected \(B, 1\)"):
        run(batches, PreferenceLossFn())  # takes the rewards of a model that has them


def test_two_processes_train_what_one_does(tmp_path):
    """The same global batches on one and on two ranks give the same losses."""
    script = tmp_path / "curve.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from nemo_rl_ref import tiny\n"
        "from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn\n"
        "from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset\n"
        "from nemo_rl_ref.training.reference import add_reference_logprobs\n"
        "from nemo_rl_ref.training.samples import Batches, preference_pairs\n"
        "from nemo_rl_ref.training.step import update\n"
        "torch.set_num_threads(1)\n"
        "accelerator = Accelerator(cpu=True)\n"
        "tokenizer = tiny.load_tokenizer()\n"
        "data = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))\n"
        "pairs = preference_pairs(data, tokenizer, max_seq_length=16)\n"
        "add_reference_logprobs(tiny.load_policy().eval(), [pairs], accelerator)\n"
        "loss_fn = DPOLossFn(DPOLossConfig(sft_loss_weight=0.1))\n"
        "policy = tiny.load_policy()\n"
        "optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)\n"
        "policy, optimizer = accelerator.prepare(policy, optimizer)\n"
        "options = {'micro_rows': 32, 'max_grad_norm': 1.0, 'rows': 2}\n"
        "losses = [\n"
        "    update(policy, optimizer, loss_fn, pairs.batch(n), accelerator, **options)['loss']\n"
        "    for n in Batches(len(pairs), 16, seed=0, max_steps=6)\n"
        "]\n"
        "if accelerator.num_processes == 2:\n"
        "    try:\n"
        "        batch = pairs.batch(range(3)).slice(0, 5)\n"
        "        update(policy, optimizer, loss_fn, batch, accelerator, **options)\n"
        "        raise SystemExit('5 rows were dealt to 2 processes')\n"
        "    except ValueError as error:\n"
        "        assert 'batch: got 5 rows, expected a multiple of 2 processes' in str(error)\n"
        "if accelerator.is_main_process:\n"
        "    print('LOSSES', accelerator.num_processes, *losses)\n"
    )
    curves = {}
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for launcher in ([], two):
        result = subprocess.run(
            [sys.executable, *launcher, str(script)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        line = next(s for s in result.stdout.splitlines() if s.startswith("LOSSES"))
        _, count, *losses = line.split()
        curves[int(count)] = [float(loss) for loss in losses]
    assert set(curves) == {1, 2}
    assert curves[1] == pytest.approx(curves[2], abs=1e-5)
