# SPDX-License-Identifier: Apache-2.0
"""Sampling and scoring with shared prompts, against the same computed plainly."""

import pytest
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.logits_sampling_utils import (
    TrainingSamplingParams,
    apply_top_k_top_p,
    need_top_k_or_top_p_filtering,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.rl.generate import (
    generate,
    left_pad,
    response_kl,
    response_logprobs,
    sample_responses,
)
from nemo_rl_ref.training.step import next_token_logprobs

PLAIN = TrainingSamplingParams()
PROMPTS = ["0+1=", "7+8=", "90+9=", "12+34="]  # 5, 5, 6 and 7 tokens


@pytest.fixture(scope="module")
def model():
    return tiny.load_policy()


@pytest.fixture(scope="module")
def reference():
    return tiny.load_policy().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


def inputs(tokenizer, prompts, copies=1):
    rows = [
        torch.tensor(tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"])
        for prompt in prompts
        for _ in range(copies)
    ]
    return BatchedDataDict(
        {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "input_lengths": torch.tensor([len(row) for row in rows]),
        }
    )


def uniforms(rows, steps=5, seed=0):
    return torch.rand(
        rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def sample(model, tokenizer, data, sampling=PLAIN, numbers=None, **options):
    numbers = uniforms(len(data["input_ids"])) if numbers is None else numbers
    options.setdefault("max_total_sequence_length", 32)
    return generate(model, tokenizer, data, sampling, numbers, **options)


def rollouts(model, tokenizer, sampling=PLAIN, copies=3, **options):
    data = inputs(tokenizer, PROMPTS, copies)
    out = sample(model, tokenizer, data, sampling, **options)
    batch = BatchedDataDict(
        {
            "input_ids": out["output_ids"],
            "input_lengths": out["unpadded_sequence_lengths"],
            "prompt_lengths": data["input_lengths"],
        }
    )
    columns = torch.arange(out["output_ids"].shape[1])
    mask = (columns >= data["input_lengths"].unsqueeze(1)) & (
        columns < out["unpadded_sequence_lengths"].unsqueeze(1)
    )
    return batch, out, mask


def test_left_pad():
    ids, mask = left_pad(torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([3, 1]))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_greedy_is_the_argmax_of_a_plain_forward(model, tokenizer):
    data = inputs(tokenizer, PROMPTS)
    out = sample(model, tokenizer, data, TrainingSamplingParams(temperature=0.0))
    for row, (ids, length) in enumerate(zip(data["input_ids"], data["input_lengths"], strict=True)):
        tokens = ids[:length].tolist()
        while len(tokens) < length + 5 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert out["output_ids"][row, : len(tokens)].tolist() == tokens
        assert out["unpadded_sequence_lengths"][row] == len(tokens)
        assert (out["output_ids"][row, len(tokens) :] == tokenizer.pad_token_id).all()


def test_logprobs_of_sampler_and_trainer_agree_with_a_plain_forward(model, tokenizer):
    batch, out, mask = rollouts(model, tokenizer)
    with torch.no_grad():
        plain = next_token_logprobs(model, batch) * mask[:, 1:]
        shared = response_logprobs(model, batch, PLAIN)
    assert mask.any(1).all() and len(set(batch["prompt_lengths"].tolist())) > 1
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out["logprobs"][:, 1:], plain, atol=1e-4, rtol=1e-5)
    assert out["logprobs"][~mask].abs().max() == 0


@pytest.mark.parametrize("rows", [slice(None), slice(1, 9), slice(0, 12, 3)])
def test_gradient_through_shared_prompts(model, tokenizer, rows):
    """Even groups, uneven groups, and no groups at all."""
    batch, _, mask = rollouts(model, tokenizer)
    batch = BatchedDataDict({key: value[rows] for key, value in batch.items()})
    mask = mask[rows][:, 1:]
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    shared = response_logprobs(model, batch, PLAIN)
    plain = next_token_logprobs(model, batch) * mask
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((shared * weights).sum(), parameters),
        torch.autograd.grad((plain * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


def test_a_response_depends_on_its_prompt_and_numbers_only(model, tokenizer):
    data, numbers = inputs(tokenizer, PROMPTS, 3), uniforms(12)
    whole = sample(model, tokenizer, data, numbers=numbers)
    for options in ({"batch_size": 5}, {"batch_size": 1}):
        parts = sample(model, tokenizer, data, numbers=numbers, **options)
        for key in ("output_ids", "generation_lengths", "truncated"):
            assert torch.equal(whole[key], parts[key]), key
    row = sample(
        model,
        tokenizer,
        BatchedDataDict({key: value[7:8] for key, value in data.items()}),
        numbers=numbers[7:8],
    )
    length = int(row["unpadded_sequence_lengths"])
    assert torch.equal(row["output_ids"][0], whole["output_ids"][7, :length])


def test_tokens_are_drawn_in_proportion(model, tokenizer):
    """With equally spaced numbers, each token is drawn n p times, give or take one."""
    data, count = inputs(tokenizer, ["12+34="], 400), 400
    numbers = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(1)
    for temperature in (1.0, 2.0):
        out = sample(
            model, tokenizer, data, TrainingSamplingParams(temperature=temperature), numbers
        )
        with torch.no_grad():
            logits = model(input_ids=data["input_ids"][:1]).logits[0, -1] / temperature
        drawn = torch.bincount(out["output_ids"][:, 7], minlength=16)
        assert (drawn - count * logits.softmax(-1)).abs().max() < 1.01
    assert drawn.count_nonzero() > 5


def test_ends(model, tokenizer):
    data = inputs(tokenizer, PROMPTS)
    numbers = uniforms(4, steps=2)
    out = sample(model, tokenizer, data, numbers=numbers)
    assert out["truncated"].any() and out["generation_lengths"].max() == 2
    short = sample(model, tokenizer, data, max_total_sequence_length=8)
    room = 8 - data["input_lengths"]
    assert (short["generation_lengths"] <= room).all()
    assert (short["generation_lengths"] == room)[short["truncated"]].all()
    assert short["truncated"][3]  # one token is not enough for a sum and its end

    data = inputs(tokenizer, PROMPTS, 4)
    wanted = set(tokenizer.convert_tokens_to_ids(["3", "4"]))
    stops = sample(model, tokenizer, data, stop_token_ids=sorted(wanted))
    assert 0 < stops["truncated"].sum() < 16
    for row, cut in enumerate(stops["truncated"].tolist()):
        response = stops["output_ids"][row, data["input_lengths"][row] :].tolist()
        response = response[: stops["generation_lengths"][row]]
        assert not wanted & set(response[:-1])
        assert (response[-1] not in wanted) == cut


def test_stop_strings(model, tokenizer):
    data = inputs(tokenizer, PROMPTS, 4)
    free = sample(model, tokenizer, data)
    texts = [
        tokenizer.decode(row[start:stop])
        for row, start, stop in zip(
            free["output_ids"],
            data["input_lengths"],
            free["unpadded_sequence_lengths"],
            strict=True,
        )
    ]
    stop = next(text[0] for text in texts if text[1].isdigit())
    out = sample(model, tokenizer, data, stop_strings=[stop, "never"])
    for row, text in enumerate(texts):
        length = int(out["unpadded_sequence_lengths"][row])
        response = tokenizer.decode(out["output_ids"][row, data["input_lengths"][row] : length])
        end = text.find(stop)
        assert response == (text if end < 0 else text[: end + len(stop)])
    assert not torch.equal(out["generation_lengths"], free["generation_lengths"])


class Script:
    """A model that says given bytes, whatever it is asked."""

    training = False

    def __init__(self, text):
        self.ids = list(text.encode())
        self.past_key_values = self

    def eval(self):
        self.said = 0

    def train(self, mode):
        assert mode is False

    def __call__(self, input_ids, **options):
        self.logits = torch.full((len(input_ids), 1, 257), -50.0)
        self.logits[:, :, self.ids[self.said]] = 50.0
        self.said += 1
        return self


@pytest.mark.parametrize(
    "stop", ["\N{GRINNING FACE}" * 4, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 9, "zzz"]
)
def test_a_stop_string_of_many_bytes_is_found(stop):
    """Where a token is a byte: four a character, three, one. Only the end of the text is read."""

    class Bytes:
        eos_token_id, pad_token_id = 256, 256

        def batch_decode(self, rows, skip_special_tokens):
            return [bytes(row.tolist()).decode(errors="replace") for row in rows]

    before = "\N{GREEK SMALL LETTER PI}" * 20
    data = BatchedDataDict(
        {"input_ids": torch.ones(1, 1).long(), "input_lengths": torch.ones(1).long()}
    )
    out = generate(
        Script(before + stop + "and more"), Bytes(), data, PLAIN, uniforms(1, 80),
        max_total_sequence_length=100, stop_strings=["-", stop],
    )  # fmt: skip
    assert out["generation_lengths"].tolist() == [len((before + stop).encode())]
    assert out["truncated"].tolist() == [False]


def test_no_room(model, tokenizer):
    with pytest.raises(ValueError, match="max_total_sequence_length is 7, expected more"):
        sample(model, tokenizer, inputs(tokenizer, PROMPTS), max_total_sequence_length=7)


def test_mode_and_generator_are_left_alone(model, tokenizer):
    before = torch.get_rng_state()
    sample(model, tokenizer, inputs(tokenizer, PROMPTS))
    assert model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}])
def test_filtered_sampling_is_scored_the_same_way(model, tokenizer, options):
    sampling = TrainingSamplingParams(temperature=1.3, **options)
    batch, out, mask = rollouts(model, tokenizer, sampling)
    with torch.no_grad():
        scores = response_logprobs(model, batch, sampling)
        unfiltered = response_logprobs(model, batch, sampling, filtered=False)
        plain = response_logprobs(model, batch, TrainingSamplingParams(temperature=1.3))
    torch.testing.assert_close(scores, out["logprobs"][:, 1:], atol=1e-4, rtol=1e-5)
    assert (scores >= unfiltered - 1e-6).all() and (scores > unfiltered + 1e-3).any()
    assert torch.equal(unfiltered, plain)


def test_top_k_top_p_keep_what_they_should():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    cases = {
        (2, 1.0): [1, 1, 0, 0],
        (None, 0.69): [1, 1, 0, 0],
        (None, 0.71): [1, 1, 1, 0],
        (3, 0.4): [1, 0, 0, 0],
        (-1, 0.01): [1, 0, 0, 0],
        # After top-k the probabilities are 4/7 and 3/7.
        (2, 0.56): [1, 0, 0, 0],
    }
    for (top_k, top_p), expected in cases.items():
        filtered, keep = apply_top_k_top_p(logits, top_k, top_p)
        assert keep.int().tolist() == [expected], (top_k, top_p)
        assert torch.equal(filtered.isinf(), ~keep)
    assert apply_top_k_top_p(logits, None, 1.0) == (logits, None)
    assert not need_top_k_or_top_p_filtering(TrainingSamplingParams(top_k=-1))
    many = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = [apply_top_k_top_p(many, 5, 0.6, chunk_size=size)[0] for size in (None, 4)]
    assert torch.equal(*results)
    results[0].masked_fill(results[0].isinf(), 0).sum().backward()
    assert torch.equal(many.grad, (~results[0].isinf()).float())


# The model's own sampler, and how far a policy has moved


def test_samples_are_seeded_and_leave_the_generator_alone(reference, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = sample_responses(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=3)
    assert torch.equal(torch.rand(1), expected)
    again = sample_responses(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=3)
    other = sample_responses(reference, tokenizer, ["1+2="] * 20, max_new_tokens=5, seed=4)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.texts(tokenizer) != other.texts(tokenizer)


def test_greedy_does_not_depend_on_the_other_prompts(reference, tokenizer):
    prompts = ["1+2=", "98+76=", "5+60="]
    together = sample_responses(reference, tokenizer, prompts, max_new_tokens=5, temperature=0)
    options = {"max_new_tokens": 5, "temperature": 0}
    alone = [
        sample_responses(reference, tokenizer, [p], **options).texts(tokenizer) for p in prompts
    ]
    assert together.texts(tokenizer) == [text for (text,) in alone]


def test_the_attention_mask_covers_prompt_response_and_end_token(reference, tokenizer):
    samples = sample_responses(reference, tokenizer, ["1+2=", "98+76="], max_new_tokens=6)
    for ids, mask, text in zip(
        samples.input_ids, samples.attention_mask, samples.texts(tokenizer), strict=True
    ):
        covered = tokenizer.decode(ids[mask.bool()])
        assert covered.startswith("<s>") and covered.endswith(f"={text}</s>")


def test_kl_of_a_policy_to_itself_is_zero(reference, tokenizer):
    samples = sample_responses(reference, tokenizer, ["1+2=", "98+76="], max_new_tokens=5)
    assert response_kl(reference, reference, samples) == 0.0


def test_kl_is_that_of_the_responses(reference, tokenizer):
    """The estimate is the log-ratio of sampled answers, on average; here with many samples."""
    policy = tiny.load_policy().eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.6)
    samples = sample_responses(policy, tokenizer, ["47+38="] * 1500, max_new_tokens=6, seed=1)
    answers = samples.attention_mask[:, samples.start :]
    with torch.no_grad():
        log_ratio = sum(
            sign
            * next_token_logprobs(model, {"input_ids": samples.input_ids})[:, samples.start - 1 :]
            for model, sign in ((policy, 1), (reference, -1))
        )
    by_answer = (log_ratio * answers).sum(1)
    error = by_answer.std() / len(by_answer) ** 0.5
    assert abs(response_kl(policy, reference, samples) - by_answer.mean()) < 4 * error
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
        sample_responses(reference, tokenizer, max_new_tokens=3, **arguments)
