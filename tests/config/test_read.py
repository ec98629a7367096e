# SPDX-License-Identifier: Apache-2.0
"""Overrides that do not fit: the message says what was probably meant."""

import pytest
from omegaconf import OmegaConf

from nemo_rl_ref.config.read import apply_overrides
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


def test_good_overrides_are_applied(config):
    assert apply_overrides(config, ["dpo.seed=7"]).dpo.seed == 7
