# SPDX-License-Identifier: Apache-2.0
"""The task of addition, its data, and the model that is shipped."""

import pytest
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.rl.generate import sample_responses
from nemo_rl_ref.tiny.addition import is_correct, problems, prompt


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return tiny.load_policy().eval()


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
    texts = sample_responses(reference, tokenizer, prompts, max_new_tokens=5).texts(tokenizer)
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
    with pytest.raises(ValueError, match="model.safetensors"):
        tiny.load_policy(tmp_path)
