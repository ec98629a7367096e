# SPDX-License-Identifier: Apache-2.0
"""The training step, generation and what is measured with it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn, NLLLossFn, PreferenceLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.generation import answer_kl, sample_answers
from nemo_rl_ref.preferences import load_preferences, preference_batches
from nemo_rl_ref.tiny.addition import is_correct, problems, prompt
from nemo_rl_ref.training.step import (
    add_reference_logprobs,
    evaluate,
    next_token_logprobs,
    train,
    valid_counts,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return tiny.load_policy().eval()


@pytest.fixture(scope="module")
def batches(tokenizer, reference):
    pairs = load_preferences(
        BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS)), tokenizer, max_seq_length=16
    )
    return add_reference_logprobs(
        reference, preference_batches(pairs[:24], tokenizer, batch_size=8, seed=0)
    )


def dpo(**settings):
    return DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1, **settings))


def run(batches, loss_fn, learning_rate=1e-3, model=None, **options):
    model = model or tiny.load_policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, list(train(model, loss_fn, batches, optimizer, accelerator, **options))


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


def test_reference_is_rolled_to_the_left(reference, batches):
    batch = batches[0]
    with torch.no_grad():
        expected = next_token_logprobs(reference, batch)
    assert torch.equal(batch["reference_policy_logprobs"][:, :-1], expected)
    assert (batch["reference_policy_logprobs"][:, -1] == 0).all()


def test_counts_leave_out_column_zero_and_masked_samples():
    data = {
        "token_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
        "sample_mask": torch.tensor([1.0, 0.0]),
    }
    assert [count.item() for count in valid_counts(data)] == [1.0, 1.0]


def test_first_step_starts_at_log_two(batches):
    _, steps = run(batches[:1], dpo())
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[0]["accuracy"] == 0.0  # no answer is preferred yet; a tie counts as wrong


@pytest.mark.parametrize("micro_batch_size", [2, 6, 16])
def test_micro_batches_train_the_same_model(batches, micro_batch_size):
    loss_fn = dpo(sft_loss_weight=0.1)
    whole, whole_steps = run(batches, loss_fn)
    parts, parts_steps = run(batches, loss_fn, micro_batch_size=micro_batch_size)
    for a, b in zip(whole_steps, parts_steps, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_training_moves_the_margin(batches):
    model, steps = run(batches * 4, dpo())
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    after = evaluate(model, dpo(), batches)
    assert after["rewards_chosen_mean"] > after["rewards_rejected_mean"]


def test_evaluation_does_not_depend_on_the_batches(reference, tokenizer, batches):
    pairs = load_preferences(
        BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS)), tokenizer, max_seq_length=16
    )[:30]
    policy = tiny.load_policy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    measured = [
        evaluate(
            policy,
            dpo(),
            add_reference_logprobs(
                reference,
                preference_batches(pairs, tokenizer, batch_size=size, drop_last=False),
            ),
        )
        for size in (30, 7)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert policy.training and measured[0]["num_valid_samples"] == 30


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
    message = "step 1: loss nan, gradient norm nan; it starts in the loss function"
    with pytest.raises(FloatingPointError, match=message):
        run([batches[0], poisoned], dpo(), learning_rate=0.0, model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("size", [0, -2])
def test_bad_micro_batch_size(batches, size):
    with pytest.raises(ValueError, match=f"micro_batch_size: got {size}, expected a positive"):
        run(batches, dpo(), micro_batch_size=size)


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
        "from nemo_rl_ref.preferences import load_preferences, preference_batches\n"
        "from nemo_rl_ref.training.step import add_reference_logprobs, train\n"
        "torch.set_num_threads(1)\n"
        "accelerator = Accelerator(cpu=True)\n"
        "tokenizer = tiny.load_tokenizer()\n"
        "data = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))\n"
        "pairs = load_preferences(data, tokenizer, max_seq_length=16)\n"
        "batches = add_reference_logprobs(\n"
        "    tiny.load_policy().eval(), preference_batches(pairs, tokenizer, batch_size=16)\n"
        ")[:6]\n"
        "loss_fn = DPOLossFn(DPOLossConfig(sft_loss_weight=0.1))\n"
        "policy = tiny.load_policy()\n"
        "optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)\n"
        "policy, optimizer = accelerator.prepare(policy, optimizer)\n"
        "losses = [m['loss'] for m in train(policy, loss_fn, batches, optimizer, accelerator)]\n"
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


# Generation


def test_samples_are_seeded_and_leave_the_generator_alone(reference, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = sample_answers(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=3)
    assert torch.equal(torch.rand(1), expected)
    again = sample_answers(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=3)
    other = sample_answers(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=4)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.texts(tokenizer) != other.texts(tokenizer)


def test_greedy_does_not_depend_on_the_other_prompts(reference, tokenizer):
    prompts = ["1+2=", "98+76=", "5+60="]
    together = sample_answers(reference, tokenizer, prompts, max_new_tokens=5, temperature=0)
    alone = [
        sample_answers(reference, tokenizer, [p], max_new_tokens=5, temperature=0).texts(tokenizer)
        for p in prompts
    ]
    assert together.texts(tokenizer) == [text for (text,) in alone]


def test_the_attention_mask_covers_prompt_answer_and_end_token(reference, tokenizer):
    samples = sample_answers(reference, tokenizer, ["1+2=", "98+76="], max_new_tokens=6)
    for ids, mask, text in zip(
        samples.input_ids, samples.attention_mask, samples.texts(tokenizer), strict=True
    ):
        covered = tokenizer.decode(ids[mask.bool()])
        assert covered.startswith("<s>") and covered.endswith(f"={text}</s>")


def test_kl_of_a_policy_to_itself_is_zero(reference, tokenizer):
    samples = sample_answers(reference, tokenizer, ["1+2=", "98+76="], max_new_tokens=5)
    assert answer_kl(reference, reference, samples) == 0.0


def test_kl_is_that_of_the_answers(reference, tokenizer):
    """The estimate is the log-ratio of sampled answers, on average; here with many samples."""
    policy = tiny.load_policy().eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.6)
    samples = sample_answers(policy, tokenizer, ["47+38="] * 1500, max_new_tokens=6, seed=1)
    answers = samples.attention_mask[:, samples.start :]
    with torch.no_grad():
        log_ratio = sum(
            sign
            * next_token_logprobs(model, {"input_ids": samples.input_ids})[:, samples.start - 1 :]
            for model, sign in ((policy, 1), (reference, -1))
        )
    by_answer = (log_ratio * answers).sum(1)
    error = by_answer.std() / len(by_answer) ** 0.5
    assert abs(answer_kl(policy, reference, samples) - by_answer.mean()) < 4 * error
    assert by_answer.mean() > 10 * error  # there is something to measure


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompts": []}, "prompts: got none"),
        ({"prompts": ["1+2="], "temperature": -1.0}, "temperature: got -1.0, expected 0 or more"),
    ],
)
def test_bad_sampling_arguments(reference, tokenizer, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        sample_answers(reference, tokenizer, max_new_tokens=3, **arguments)


# The tiny world


def test_problems_are_split():
    train_problems, held_out = problems()
    assert len(train_problems) == 9000 and len(held_out) == 1000
    assert len({*train_problems, *held_out}) == 10000


def test_no_held_out_problem_is_trained_on():
    train_problems, held_out = problems()
    trained = {r["context"][0]["content"] for r in BinaryPreferenceDataset(str(tiny.TRAIN_PAIRS))}
    validated = {
        r["context"][0]["content"] for r in BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
    }
    assert trained <= {prompt(p) for p in train_problems}
    assert validated <= {prompt(p) for p in held_out}


def test_every_chosen_answer_is_right_and_every_rejected_one_wrong():
    for path in (tiny.TRAIN_PAIRS, tiny.VALIDATION_PAIRS):
        for record in BinaryPreferenceDataset(str(path)):
            question = record["context"][0]["content"]
            chosen, rejected = (c["completion"][0]["content"] for c in record["completions"])
            assert is_correct(question, chosen) and not is_correct(question, rejected)


@pytest.mark.parametrize("answer", ["47", "046", "46 ", "+46", "", "4６"])
def test_wrong_answers(answer):
    assert is_correct("12+34=", "46") and not is_correct("12+34=", answer)


def test_what_is_not_a_problem():
    with pytest.raises(ValueError, match=r"prompt_text: got '12\+=', expected a problem such as"):
        is_correct("12+=", "12")


def test_shipped_weights_are_small_safetensors_and_leave_room_to_learn(reference, tokenizer):
    weights = [p for p in tiny.MODEL.iterdir() if p.suffix in {".safetensors", ".bin", ".pt"}]
    assert [p.suffix for p in weights] == [".safetensors"]
    assert weights[0].stat().st_size < 2_000_000
    prompts = [prompt(p) for p in problems()[1]]
    texts = sample_answers(reference, tokenizer, prompts, max_new_tokens=5).texts(tokenizer)
    assert 0.08 < sum(map(is_correct, prompts, texts)) / len(prompts) < 0.3


def test_a_model_from_elsewhere(tmp_path):
    """The argument that replaces the shipped model by any other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny.load_tokenizer().save_pretrained(tmp_path)
    assert type(tiny.load_policy(tmp_path)).__name__ == "LlamaForCausalLM"
    assert len(tiny.load_tokenizer(str(tmp_path))) == 16


def test_weights_in_a_pickle_are_refused(tmp_path):
    model = tiny.load_policy()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        tiny.load_policy(tmp_path)
