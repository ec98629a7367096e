# SPDX-License-Identifier: Apache-2.0
"""A loss from a file of the user's: found, built, checked, trained with."""

import sys

import pytest
from trainer_runs import curve, run

from nemo_rl_ref.contract.user_code import UsageError, find
from nemo_rl_ref.training.user_code import build_loss

GOOD = """
import torch
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn

class MarginLossFn(DPOLossFn):
    '''DPO whose chosen answers must win by a margin.'''

    def __init__(self, cfg: DPOLossConfig):
        super().__init__(cfg)
        self.margin = float(getattr(cfg, "margin", 0.0))

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        # NeMo RL's DPO loss lets an infinity through a mask; this one keeps every promise.
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
        reference = torch.where(mask, data["reference_policy_logprobs"][:, :-1], 0.0)
        clean = {**data, "reference_policy_logprobs": torch.nn.functional.pad(reference, (0, 1))}
        policy = torch.where(mask, next_token_logprobs, 0.0)
        return super().__call__(policy, clean, global_valid_seqs, global_valid_toks)

    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        shifted = rewards.clone()
        shifted[1::2] = shifted[1::2] + self.margin / beta
        return super()._preference_loss(shifted, sample_mask, global_valid_seqs, beta)
"""
# Divides by the micro-batch's own count, which is wrong as soon as there are several.
BAD = """
from nemo_rl_ref.algorithms.loss import DPOLossFn

class OwnCountLossFn(DPOLossFn):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        own = data["sample_mask"].sum()
        return super().__call__(next_token_logprobs, data, own, global_valid_toks)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])  # find appends to it

    def write_file(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def test_a_loss_gets_its_settings_from_the_section(write, tmp_path, capsys):
    spec = write("margin_loss.py", GOOD) + ":MarginLossFn"
    changes = {"dpo__max_num_steps": 2, "dpo__reference_policy_kl_penalty": 0.1}
    _, plain = run("dpo", tmp_path, name="plain", **changes)
    _, zero = run("dpo", tmp_path, name="zero", loss=spec, strict=True, **changes)
    _, margin = run("dpo", tmp_path, name="margin", loss=spec, dpo__margin=1.0, **changes)
    assert curve(zero) == curve(plain)
    assert margin[1]["train/loss"] == pytest.approx(1.3133, abs=1e-4)  # log(1 + e)
    assert capsys.readouterr().out.count("MarginLossFn keeps NeMo RL's promises") == 2


def test_a_broken_promise_is_a_warning_and_with_strict_an_error(write, tmp_path, capsys):
    spec = write("own_count_loss.py", BAD) + ":OwnCountLossFn"
    result, _ = run("dpo", tmp_path, loss=spec, dpo__max_num_steps=1)
    assert result["total_steps"] == 1
    out = capsys.readouterr().out
    assert f"WARNING: {spec} breaks NeMo RL's promises: micro-batches, ranks" in out
    with pytest.raises(
        ValueError, match="--strict: .*OwnCountLossFn breaks NeMo RL's promises: micro"
    ):
        run("dpo", tmp_path, name="strict", loss=spec, strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    "spec",
    ["nemo_rl_ref.algorithms.loss:DPOLossFn", "nemo_rl_ref.custom.pairwise:IPOLossFn", "own"],
)
def test_strict_refuses_only_what_is_the_authors_own(write, tmp_path, capsys, spec):
    """NeMo RL's loss lets a NaN through a mask, and what derives from it does so too."""
    if spec == "own":
        text = "from nemo_rl_ref.algorithms.loss import DPOLossFn\nclass Mine(DPOLossFn): ...\n"
        spec = write("mine_only.py", text) + ":Mine"
    result, _ = run("dpo", tmp_path, loss=spec, strict=True, dpo__max_num_steps=1)
    assert result["total_steps"] == 1
    out = capsys.readouterr().out
    assert "1. As in NeMo RL's DPOLossFn: an infinity or NaN in a masked place" in out
    assert "\n2. " not in out and "breaks NeMo RL's promises" not in out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_loss", "--loss: got 'my_loss', expected path/to/file.py:Name"),
        ("my_package.losses:MyLoss", "--loss: cannot import my_package.losses: Module"),
        ("json:MyLoss", "--loss: json has no 'MyLoss'; it has "),
        ("{folder}/nowhere_loss.py:MyLoss", "--loss: no file at .*nowhere_loss.py"),
        (
            "{folder}/margin_b.py:MarginLoss",
            "has no 'MarginLoss'; did you mean 'MarginLossFn'",
        ),
        ("{folder}/margin_c.py:Other", "has no 'Other'; it has MarginLossFn$"),
        (
            "{folder}/json.py:MyLoss",
            "the name 'json' belongs to another module, .*; rename",
        ),
        (
            "{folder}/breaks_loss.py:MyLoss",
            r"cannot import .*: ZeroDivisionError: division by zero \(.*breaks_loss.py:1\)$",
        ),
    ],
)
def test_what_cannot_be_loaded(spec, message, write, tmp_path):
    write("margin_b.py", GOOD)
    write("margin_c.py", GOOD)
    write("json.py", "")
    write("breaks_loss.py", "1 / 0")
    with pytest.raises(UsageError, match=message):
        find(spec.format(folder=tmp_path), "--loss")


def test_settings_that_a_loss_refuses(write):
    text = GOOD.replace("self.margin = ", "raise RuntimeError('no margin') or ")
    kind = find(write("refusing_loss.py", text) + ":MarginLossFn")
    with pytest.raises(ValueError, match="--loss with the section dpo: .*RuntimeError: no margin"):
        build_loss(kind, {"margin": 1.0}, "dpo")


def test_fields_of_others_are_kept_from_a_strict_config(write):
    text = """
        from pydantic import BaseModel
        class Settings(BaseModel, extra="forbid"):
            margin: float = 0.0
        class StrictLoss:
            def __init__(self, cfg: Settings, seed: int = 0):
                self.cfg, self.seed = cfg, seed
            def __call__(self, **inputs):
                return 0.0, {}
    """.replace("\n        ", "\n")
    kind = find(write("strict_loss.py", text) + ":StrictLoss")
    loss = build_loss(kind, {"margin": 0.5, "seed": 3, "max_num_steps": 10}, "dpo")
    assert (loss.cfg.margin, loss.seed) == (0.5, 3)


@pytest.mark.parametrize("where", ["import", "init", "call"])
def test_an_endless_loop_ends_with_its_line(write, tmp_path, monkeypatch, where):
    monkeypatch.setattr("nemo_rl_ref.contract.limits.SECONDS", 2.0)
    loop = "    while True: pass\n"
    init = f"    def __init__(self):\n    {loop}"
    call = f"    def __call__(self, *args, **named):\n    {loop}"
    body = {"import": f"    x = 1\n{loop}", "init": init, "call": call}[where]
    text = f"from nemo_rl_ref.algorithms.loss import DPOLossFn\nclass Endless(DPOLossFn):\n{body}"
    path = write(f"endless_{where}.py", text)
    with pytest.raises(ValueError, match="took longer than 2 s") as caught:
        run("dpo", tmp_path, loss=f"{path}:Endless", dpo__max_num_steps=1)
    assert str(caught.value).endswith(f"({path}:4)")
