# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be trained: one error with the folder and what is wrong with it."""

import json
import os
import shutil

import pytest
import torch
from rl_runs import settings
from safetensors.torch import load_file, save_file
from trainer_runs import run

from nemo_rl_ref import run_grpo, tiny
from nemo_rl_ref.training.models import load_policy, load_reward_model, load_value_model

LOST = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.MODEL, folder)
    return folder


def weights(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(tiny.MODEL / FILE).items()}
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


FILE = "model.safetensors"
DAMAGE = {
    "a weight is missing": (
        lambda p: weights(p, lambda t: t.pop(LOST)),
        rf"model has no {LOST}. They would be random: it is not a whole",
    ),
    "another shape": (
        lambda p: weights(p, lambda t: t.update({LOST: torch.zeros(3, 3)})),
        rf"has weights of other shapes: {LOST} \(3, 3\) for \(",
    ),
    "cut in the header": (lambda p: os.truncate(p / FILE, 1000), rf"/{FILE}: cannot be read: "),
    "cut in the weights": (lambda p: os.truncate(p / FILE, 90_000), rf"/{FILE}: cannot be read: "),
    "empty": (lambda p: os.truncate(p / FILE, 0), rf"/{FILE}: cannot be read: "),
    "no weights": (lambda p: (p / FILE).unlink(), "/model: cannot be loaded: .*no file named"),
    "pickled weights": (
        lambda p: (p / FILE).rename(p / "pytorch_model.bin"),
        "/model: cannot be loaded: .*no file named",
    ),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "cannot be loaded: .*valid JSON"),
    "another kind": (
        lambda p: (p / "config.json").write_text(json.dumps({"model_type": "bert"})),
        r"/model has no .* and \d+ more\. They would be random: it is not a whole Bert",
    ),
    "no kind": (lambda p: (p / "config.json").write_text("{}"), "/model: cannot be loaded: "),
    "gone": (shutil.rmtree, "there is no folder .*/model$"),
}


@pytest.mark.filterwarnings("ignore")  # what transformers says of it
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("load", [load_policy, load_reward_model, load_value_model])
def test_a_model_that_is_not_whole_is_refused(model, damage, load):
    """Kind: what a library makes up or passes over. For each of the models that are loaded."""
    change, message = DAMAGE[damage]
    change(model)
    arguments = (model, 0) if load is load_reward_model else (model,)
    key = "value" if load is load_value_model else "policy"
    with pytest.raises(ValueError, match=rf"^{key}\.model_name: .*{message}"):
        load(*arguments)


def test_only_a_head_that_was_never_there_is_drawn(tmp_path):
    """A reward model without its head is none."""
    reward = load_reward_model(tiny.MODEL, 0)
    reward.save_pretrained(tmp_path / "reward")
    load_reward_model(tmp_path / "reward", 0)
    file = tmp_path / "reward" / FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors.pop("score.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"reward has no score\.weight"):
        load_reward_model(tmp_path / "reward", 0)


def test_a_name_that_is_no_folder_may_be_one_of_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="there is no folder results/nowhere, and from the hub it"):
        load_policy("results/nowhere")


@pytest.fixture
def larger(tmp_path):
    """A tokenizer with more tokens than the model has embeddings."""
    tokenizer = tiny.load_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(200)])
    tokenizer.save_pretrained(tmp_path / "larger")
    return tmp_path / "larger"


@pytest.mark.parametrize("section", ["sft", "dpo", "rm"])
def test_a_tokenizer_with_too_many_tokens_is_refused(section, larger, tmp_path):
    """Whether the data have such a token or not: once, when the model is loaded."""
    message = (
        r"policy\.tokenizer\.name: its tokens go up to \d+ \('<199>'\), and policy\.model_name"
    )
    with pytest.raises(ValueError, match=message):
        run(section, tmp_path, policy__tokenizer={"name": str(larger)})
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_too_many_tokens_is_refused_by_every_model_of_a_run(larger, tmp_path):
    resized = tiny.load_policy()
    resized.resize_token_embeddings(500)
    resized.save_pretrained(tmp_path / "resized")
    tokenizer = {"name": str(larger)}
    config = settings(tmp_path, {"policy.tokenizer": tokenizer})
    with pytest.raises(ValueError, match="and policy.model_name .* has embeddings for"):
        run_grpo.train(config)
    changes = {"policy.tokenizer": tokenizer, "policy.model_name": str(tmp_path / "resized")}
    with pytest.raises(ValueError, match="and value.model_name .* has embeddings for"):
        run_grpo.train(settings(tmp_path, changes, ppo=True))
    run_grpo.train(settings(tmp_path, changes | {"grpo.max_num_steps": 1}))


def test_a_tokenizer_that_is_not_there(tmp_path):
    for name, message in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "cannot be lo")):
        with pytest.raises(ValueError, match=rf"^policy\.tokenizer\.name: .*{message}"):
            run("sft", tmp_path, policy__tokenizer={"name": str(name)})
