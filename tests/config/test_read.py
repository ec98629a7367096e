# SPDX-License-Identifier: Apache-2.0
"""Overrides that do not fit: the message says what was probably meant."""

import pytest
from omegaconf import OmegaConf

from nemo_rl_ref.config.keys import ConfigKeyError
from nemo_rl_ref.config.read import apply_overrides, read_config
from nemo_rl_ref.utils.config import OverridesError


@pytest.fixture
def config():
    return OmegaConf.create(
        {
            "dpo": {"seed": 42, "sft_loss_weight": 0},
            "policy": {"optimizer": {"name": "x", "kwargs": {"lr": 1.0}}, "tags": ["a"]},
        }
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.sft_loss_wieght=1", r"The nearest key is 'dpo\.sft_loss_weight'"),
        ("policy.lr=1", r"The nearest key is 'policy\.optimizer\.kwargs\.lr'"),
        ("~dpo.sed", r"does not exist\.\nThe nearest key is 'dpo\.seed'"),
        ("dpo.val_period=5", r"\+\+dpo\.val_period=5 adds it"),
    ],
)
def test_bad_overrides_name_the_nearest_key(config, override, message):
    with pytest.raises(
        OverridesError, match=rf"^Failed to parse Hydra overrides: (.|\n)*{message}"
    ):
        apply_overrides(config, [override])


@pytest.mark.parametrize(("text", "message"), [
    ("policy.precision: bfloat16",
     "policy.precision: got the key 'policy.precision', expected policy: {precision: …}"),
    ("a.b.c: 1", "a.b.c: got the key 'a.b.c', expected a: {b: {c: …}}"),
    ("policy: {optimizer.name: x}",
     "policy.optimizer.name: got the key 'optimizer.name', expected optimizer: {name: …}"),
])  # fmt: skip
def test_a_key_with_dots_in_a_file_is_shown_nested(tmp_path, text, message):
    """It looks like an override, and nothing would read it. Names that are a user's may have dots."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigKeyError) as caught:
        read_config(tmp_path / "run.yaml", [], ["policy", "data.val_data_paths"])
    assert str(caught.value) == (
        f"{tmp_path}/run.yaml: keys with dots, which nothing reads:\n  {message}"
    )
    (tmp_path / "run.yaml").write_text("data: {val_data_paths: {set-1.0: x.jsonl}}")
    config, _ = read_config(tmp_path / "run.yaml", [], ["policy", "data.val_data_paths"])
    assert config["data"]["val_data_paths"] == {"set-1.0": "x.jsonl"}


@pytest.mark.parametrize(("text", "problem"), [
    ("${nowhere}", "Interpolation key 'nowhere' not found"),
    ("${oc.env:NOT_THERE_AT_ALL}", "Environment variable 'NOT_THERE_AT_ALL' not found"),
    ("${mul:2,x}", ""), ("${div:1,0}", "ZeroDivisionError"), ("${no_such:1}", "Unsupported"),
    ("${policy.precision}", ""),
])  # fmt: skip
def test_an_interpolation_that_fails_is_one_line_with_its_key(tmp_path, text, problem):
    (tmp_path / "run.yaml").write_text(f"policy: {{precision: '{text}'}}")
    if text == "${mul:2,x}":
        assert read_config(tmp_path / "run.yaml", [], ["policy"])[0] == {
            "policy": {"precision": "xx"}
        }
        return
    with pytest.raises(ConfigKeyError) as caught:
        read_config(tmp_path / "run.yaml", [], ["policy"])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/run.yaml: policy.precision: ") and problem in message
    assert len(message.splitlines()) == 1


def test_good_overrides_are_applied(config):
    assert apply_overrides(config, ["dpo.seed=7"]).dpo.seed == 7
