# SPDX-License-Identifier: Apache-2.0
"""A loss or gradient that is not finite: the run stops, says where it starts, and loses nothing."""

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import curve, model_with_dropout, records, run

from nemo_rl_ref import tiny
from nemo_rl_ref.training.samples import Batches

DIVERGES = """
import torch
from nemo_rl_ref.algorithms.loss import NLLLossFn

class Diverges(NLLLossFn):
    '''Goes wrong on conversations of ten tokens, in the third step or later.'''

    calls = 0

    def __call__(self, next_token_logprobs, data, **counts):
        Diverges.calls += torch.is_grad_enabled()
        loss, metrics = super().__call__(next_token_logprobs, data, **counts)
        if Diverges.calls > {after} and (data["input_lengths"] == 10).any():
            {go_wrong}
        return loss, metrics
"""


def diverging_loss(folder, name, go_wrong, after=4):
    path = folder / f"{name}.py"
    path.write_text(DIVERGES.format(go_wrong=go_wrong, after=after))
    return f"{path}:Diverges"


@pytest.fixture
def unchecked(monkeypatch):
    """Losses that are made to go wrong are not checked for promises here."""
    monkeypatch.setattr(
        "nemo_rl_ref.training.user_code.check_loss",
        lambda *a, **k: type("R", (), {"ok": True, "failed": (), "own": ()}),
    )


@pytest.mark.parametrize(
    ("name", "go_wrong", "where"),
    [
        ("loss_is_nan", "loss = loss * float('nan')", "the loss function: what the model returns"),
        (
            "gradient_is_nan",
            "loss = loss + (next_token_logprobs.sum() * 0).abs().sqrt()",
            "the backward pass of the loss function",
        ),
    ],
)
def test_a_loss_that_diverges_stops_the_run_and_names_the_samples(
    name, go_wrong, where, tmp_path, unchecked
):
    spec = diverging_loss(tmp_path, name, go_wrong)
    changes = {
        "policy__train_micro_batch_size": 4,
        "sft__val_at_start": False,
        "sft__val_period": 0,
    }
    with pytest.raises(FloatingPointError) as error:
        run("sft", tmp_path, loss=spec, checkpointing__metric_name=None, **changes)
    message = str(error.value)
    assert message.startswith("step 3: loss "), message
    assert f"it starts in {where}" in message
    rows = records(tmp_path / "sft.train.jsonl", 40)
    order = Batches(samples=40, batch_size=8, seed=3)[2]
    guilty = [n for n in order if len(rows[n]["input"] + rows[n]["output"]) + 2 == 10]
    assert 0 < len(guilty) < 8
    places = ", ".join(f"{tmp_path / 'sft.train.jsonl'}:{n + 1}" for n in guilty)
    assert f"with {len(guilty)} of 8 samples: {places}. The step was not taken." in message
    assert f"The run as it was before the step is in {tmp_path / 'run' / 'step_2'}" in message
    # From there, with a loss that is in order, the run goes on as if nothing had been.
    changes["checkpointing__metric_name"] = None
    _, cured = run("sft", tmp_path, allow_config_changes=True, **changes)
    _, whole = run("sft", tmp_path, name="whole", **changes)
    assert curve(cured) == curve(whole) and len(curve(whole)) == 12


def broken_model(folder, name, change):
    model = tiny.load_policy()
    with torch.no_grad():
        change(model.model.layers[1].mlp)
    model.save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "change", "where"),
    [
        (
            "overflows",
            lambda mlp: mlp.up_proj.weight.fill_(3e38),
            "model.layers.1.mlp.up_proj (Linear), in the forward pass, with 8 of 8 samples: ",
        ),
        (
            "between",
            lambda mlp: (mlp.up_proj.weight.mul_(1e20), mlp.gate_proj.weight.mul_(1e20)),
            "model.layers.1.mlp, between its layers, in the forward pass, with 8 of 8 samples: ",
        ),
    ],
)
def test_a_layer_that_overflows_is_named(name, change, where, tmp_path):
    model = broken_model(tmp_path, name, change)
    with pytest.raises(FloatingPointError) as error:
        run("sft", tmp_path, model=model, sft__val_at_start=False)
    assert f"it starts in {where}" in str(error.value)
    assert str(error.value).endswith(f"is in {tmp_path / 'run' / 'step_0'}")
    (weights,) = (tmp_path / "run/step_0/policy/weights").glob("*.safetensors")
    saved, given = load_file(weights), load_file(model / "model.safetensors")
    assert all(saved[key].equal(given[key]) for key in given)


def test_a_parameter_that_is_nan_is_named_and_not_saved(tmp_path):
    model = broken_model(tmp_path, "nan", lambda mlp: mlp.down_proj.weight[0].fill_(float("nan")))
    with pytest.raises(FloatingPointError) as error:
        run("sft", tmp_path, model=model, sft__val_at_start=False)
    assert "the parameter model.layers.1.mlp.down_proj.weight, which is not finite itself" in str(
        error.value
    )
    assert str(error.value).endswith("The last checkpoint is None")
    assert not list((tmp_path / "run").glob("step_*"))


def test_dropout_is_drawn_again_after_a_stop(tmp_path, unchecked):
    """The checkpoint of before has the generators of before, too."""
    model = model_with_dropout(tmp_path)
    spec = diverging_loss(tmp_path, "with_dropout", "loss = loss * float('inf')")
    changes = {"model": model, "sft__val_at_start": False, "sft__val_period": 0}
    with pytest.raises(FloatingPointError, match="step 3: loss inf"):
        run("sft", tmp_path, loss=spec, policy__train_micro_batch_size=4, **changes)
    changes["policy__train_micro_batch_size"] = 4
    _, cured = run("sft", tmp_path, allow_config_changes=True, **changes)
    _, whole = run("sft", tmp_path, name="whole", **changes)
    assert curve(cured) == curve(whole)
