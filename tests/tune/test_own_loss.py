# SPDX-License-Identifier: Apache-2.0
"""Searches that train with a loss of the user's own, and over its own keys."""

import math
import shutil
from pathlib import Path

import pytest

from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.tune import make_spec
from nemo_rl_ref.tune.__main__ import main
from nemo_rl_ref.tune.space import SpaceError
from nemo_rl_ref.tune.spec import SpecError

ACCURACY = "val:validation-default_accuracy"
LOSS = Path("notebooks/get_started/my_loss.py")
SHORT = ["dpo.max_num_steps=1", "policy.train_global_batch_size=8", "dpo.val_at_start=false"]


@pytest.fixture
def loss(tmp_path):
    return shutil.copy(LOSS, tmp_path / f"loss_of_{tmp_path.name}.py")


def spec_with(file, space, **options):
    options = {"loss": f"{file}:MyLoss"} | options
    return make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY], SHORT, **options)


def test_a_key_of_the_loss_is_searched_and_reaches_it(loss, tmp_path, capfd):
    space = tmp_path / "space.yaml"
    space.write_text("dpo.margin: {choice: [0.25, 4.0]}")
    line = [
        "dpo", "--config", "configs/dpo.yaml", "--space", str(space), "--objective", ACCURACY,
        "--loss", f"{loss}:MyLoss", "--folder", str(tmp_path / "study"), "--sampler", "grid",
        "--trials", "2", *SHORT,
    ]  # fmt: skip
    assert main(line) == 0
    assert "++dpo.margin=" in capfd.readouterr().out
    # Before the first update the loss is -log σ(-margin): each trial has trained with its own.
    logs = [read_metrics(path.parent) for path in (tmp_path / "study").rglob("metrics.jsonl")]
    losses = sorted(log[1]["train/loss"] for log in logs)
    assert losses == pytest.approx([math.log1p(math.exp(m)) for m in (0.25, 4.0)], abs=1e-4)
    # The search is of that file: edited, it is another search.
    edited = Path(loss)
    edited.write_text(edited.read_text() + "\n# edited\n")
    assert main(line) == 1
    assert "loss" in capfd.readouterr().err


def test_a_misspelt_key_of_the_loss_is_refused_with_the_nearest(loss):
    with pytest.raises(SpaceError, match=r"dpo\.margn: MyLoss has no setting 'margn'.*'margin'"):
        spec_with(loss, {"dpo.margn": {"uniform": [0.0, 1.0]}})


def test_without_a_loss_its_key_is_none_of_nemo_rls(loss):
    with pytest.raises(SpaceError, match=r"dpo\.margin: got dpo\.margin, expected a key of NeMo"):
        spec_with(loss, {"dpo.margin": {"uniform": [0.0, 1.0]}}, loss=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "nowhere.py:MyLoss"}, "--loss: no file at nowhere.py"),
        ({"loss": None, "env": "nowhere.py:reward"}, "--env: got nowhere.py:reward with dpo"),
        ({"launcher": "nemo-rl"}, "not with NeMo RL itself"),
    ],
)
def test_what_cannot_be_trained_with_is_refused_at_once(loss, options, message):
    with pytest.raises((SpecError, ValueError), match=message):
        spec_with(loss, {"policy.optimizer.kwargs.lr": 1e-4}, **options)


def test_the_study_knows_its_loss_and_is_read_back(loss):
    spec = spec_with(loss, {"dpo.margin": {"uniform": [0.0, 1.0]}})
    written = spec.to_dict()
    assert "SHA-256" in written["loss"][1]
    assert type(spec).from_dict(written) == spec
