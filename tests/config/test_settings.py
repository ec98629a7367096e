# SPDX-License-Identifier: Apache-2.0
"""A configuration read into typed settings: NeMo RL's own files, values, and what is refused."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from trainer_runs import make_config

from nemo_rl_ref.config import sections
from nemo_rl_ref.config.keys import key_exists
from nemo_rl_ref.config.sections import DPOSettings, RMSettings, SFTSettings
from nemo_rl_ref.config.settings import read_settings, used_keys
from nemo_rl_ref.rl.settings import GRPOSettings, PPOSettings
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils.config import load_config, register_omegaconf_resolvers

#: What NeMo RL does not ask of every algorithm and every backend, and the algorithm needs here.
NEEDED = ("optimizer", "generation", "reward_model_cfg")
KINDS = (SFTSettings, DPOSettings, RMSettings, PPOSettings, GRPOSettings)
CONFIGS, SYMBOLS = load_manifest()["configs"], load_manifest()["symbols"]


# NeMo RL's own configurations


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The configurations of the manifest as files, which refer to each other."""
    folder = tmp_path_factory.mktemp("configs")
    for name, flat in CONFIGS.items():
        tree = {}
        for key, value in flat.items():
            *path, last = key.split(".")
            place = tree
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        OmegaConf.save(OmegaConf.create(tree), folder / name)
    register_omegaconf_resolvers()
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_nemo_rls_configurations_are_read(name, files):
    config = OmegaConf.to_container(load_config(files / name), resolve=True)
    kinds = [kind for kind in KINDS if kind.algorithm in config]
    if "distillation" in config:
        assert not kinds
        return
    (kind,) = kinds
    # Where Megatron trains, the optimizer is in another section, which this package has not.
    lacking = [s for s in ("policy", "value") if s in config and not config[s].get("optimizer")]
    if lacking:
        assert all(config[section]["megatron_cfg"]["enabled"] for section in lacking)
        with pytest.raises(ValueError) as caught:
            read_settings(config, kind)
        assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
            f"{section}.optimizer" for section in lacking
        ]
        return
    settings = read_settings(config, kind)
    assert settings.section is getattr(settings, kind.algorithm)
    dumped = settings.model_dump(mode="json", exclude_unset=True)
    assert dumped.keys() == config.keys() and read_settings(dumped, kind) == settings
    for key in used_keys(kind):
        node, value = config, settings
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
            value = value[part] if isinstance(value, dict) else getattr(value, part, None)
        if isinstance(node, (bool, int, float, str)) and not isinstance(value, os.PathLike):
            assert value == node, key


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_a_key_of_nemo_rl(kind):
    keys = used_keys(kind)
    assert len(keys) > 30 and [key for key in keys if not key_exists(key)] == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("SFTConfig", "algorithms.sft.SFTConfig"),
        ("DPOConfig", "algorithms.dpo.DPOConfig"),
        ("RMConfig", "algorithms.rm.RMConfig"),
        ("SampledPolicyConfig", "models.policy.PolicyConfig"),
        ("RewardPolicyConfig", "models.policy.PolicyConfig"),
        ("OptimizerConfig", "models.policy.PytorchOptimizerConfig"),
        ("SchedulerConfig", "models.policy.SinglePytorchSchedulerConfig"),
        ("MilestonesConfig", "models.policy.SinglePytorchMilestonesConfig"),
        ("TokenizerConfig", "models.policy.TokenizerConfig"),
        ("RewardModelConfig", "models.policy.RewardModelConfig"),
        ("GenerationConfig", "models.generation.interfaces.GenerationConfig"),
        ("ConversationsConfig", "data.DataConfig"),
        ("CheckpointingConfig", "utils.checkpoint.CheckpointingConfig"),
        ("LoggerConfig", "utils.logger.LoggerConfig"),
        ("OnPolicyDistillationConfig", "algorithms.opd.OnPolicyDistillationConfig"),
    ],
)
def test_fields_defaults_and_nulls_are_nemo_rls(ours, theirs):
    fields = SYMBOLS[f"nemo_rl.{theirs}"]["fields"]
    for name, field in getattr(sections, ours).model_fields.items():
        declared = fields[name]
        optional = "default" in declared or "NotRequired" in declared["type"]
        optional &= name not in NEEDED
        assert field.is_required() is not optional, name
        default = declared.get("default", "")
        if re.fullmatch(r"-?[\d.]+|True|False|None", default):
            assert repr(field.default) == default, name
        if "None" in declared["type"] and name not in NEEDED:
            TypeAdapter(field.rebuild_annotation()).validate_python(None)


# Values


def of(section, folder, **changes):
    kind = {"sft": SFTSettings, "dpo": DPOSettings, "rm": RMSettings}[section]
    return read_settings(make_config(section, folder, **changes), kind)


def test_values_mean_what_they_mean_in_nemo_rl(tmp_path):
    settings = of(
        "dpo",
        tmp_path,
        data__shuffle="off",
        checkpointing__enabled="false",
        policy__train_micro_batch_size="8",
        policy__max_grad_norm="1e-3",
        dpo__val_at_start="True",
        dpo__preference_loss_weight=1,
        dpo__margin=0.5,
    )
    assert settings.data.shuffle is settings.checkpointing.enabled is False
    assert settings.policy.train_micro_batch_size == 8 and settings.dpo.val_at_start is True
    assert settings.policy.max_grad_norm == 1e-3
    assert settings.dpo.given()["margin"] == 0.5 and "sft_loss_weight" not in settings.dpo.given()
    assert of("sft", tmp_path, policy__max_grad_norm=None).policy.max_grad_norm is None


def test_one_dataset_is_a_list_of_one(tmp_path):
    one = of("sft", tmp_path).data
    assert len(one.train) == len(one.validation) == 1
    two = of("sft", tmp_path, data__train=[{"data_path": "a"}, {"data_path": "b", "mine": 1}]).data
    assert [entry.given() for entry in two.train] == [
        {"data_path": "a"}, {"data_path": "b", "mine": 1},
    ]  # fmt: skip


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)))
def test_a_clip_norm_is_null_or_a_number_above_0(value):
    adapter = TypeAdapter(sections.TrainedConfig)
    tree = {
        "model_name": "m", "train_global_batch_size": 1, "train_micro_batch_size": 1,
        "optimizer": {"name": "o", "kwargs": {}}, "max_grad_norm": value,
    }  # fmt: skip
    try:
        number = None if value is None else float(value)
        fine = number is None or (number > 0 and not isinstance(value, bool))
    except ValueError:
        fine = False
    try:
        read = read_settings(tree, sections.TrainedConfig).max_grad_norm
    except ValueError as error:
        assert not fine
        line = f"max_grad_norm: got {value!r}, expected null or a number above 0"
        assert str(error) == line
    else:
        assert fine and read == number
        assert adapter.validate_python(tree).max_grad_norm == number


def test_each_wrong_value_has_a_line(tmp_path):
    with pytest.raises(ValueError) as caught:
        of(
            "sft", tmp_path,
            policy__scheduler=[{"name": "x"}, {"milestones": ["y"]}, 3],
            policy__tokenizer={},
            data__train={"data_path": "x", "seed": "one"},
            checkpointing__save_period="ten",
            checkpointing__metric_name="loss",
            checkpointing__checkpoint_must_save_by="4h",
            checkpointing__keep_top_k=-1,
            checkpointing__checkpoint_dir=None,
            logger=None,
            sft__seed=True,
        )  # fmt: skip
    assert sorted(str(caught.value).splitlines()) == [
        "checkpointing.checkpoint_dir: got None, expected a path",
        "checkpointing.checkpoint_must_save_by: got '4h', expected DD:HH:MM:SS such as"
        " '00:03:45:00'",
        "checkpointing.keep_top_k: got -1, expected null or an integer from 0 on",
        "checkpointing.metric_name: got 'loss', expected null, or 'val:' or 'train:' followed by"
        " the name of a metric, such as 'val:val_loss'",
        "checkpointing.save_period: got 'ten', expected an integer from 1 on",
        "data.train.seed: got 'one', expected an integer from 0 on",
        "logger: got None, expected a mapping with log_dir, tensorboard_enabled",
        "policy.scheduler.0.kwargs: not set, expected a mapping",
        "policy.scheduler.1.milestones.0: got 'y', expected an integer",
        "policy.scheduler.2: got 3, expected a mapping with name and kwargs, or with milestones",
        "policy.tokenizer.name: not set, expected text",
        "sft.seed: got True, expected an integer from 0 and below 4294967296",
    ]


def test_the_configuration_is_not_changed(tmp_path):
    config = make_config("sft", tmp_path, data__shuffle="off")
    before = OmegaConf.create(config)
    read_settings(config, SFTSettings)
    assert OmegaConf.create(config) == before
