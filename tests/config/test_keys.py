# SPDX-License-Identifier: Apache-2.0
"""Every key is used, ignored, without effect, new, or an error.

With ``NEMO_RL_CHECKOUT`` set to a checkout of NeMo RL at the pinned commit, ``keys.json`` is made
again from it, and every configuration in it is accounted for.
"""

import os
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_rl_ref.config.keys import (
    ConfigKeyError,
    check_keys,
    flatten_keys,
    key_exists,
    nearest_key,
)
from nemo_rl_ref.config.lists import CAUTIONS, IGNORED, NOT_HERE
from nemo_rl_ref.config.read import read_config
from nemo_rl_ref.upstream import load_keys, load_manifest
from nemo_rl_ref.utils.config import (
    load_config,
    parse_hydra_overrides,
    register_omegaconf_resolvers,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem != "common")


# What exists


@pytest.mark.parametrize(
    "key",
    [
        "dpo.sft_loss_weight",  # in a class and in files
        "grpo.val_start_at",
        "policy.generation.vllm_cfg.async_engine",  # in a subclass of the annotated class
        "policy.generation.mcore_generation_config.max_tokens",
        "policy.scheduler.0.kwargs.anything",  # an open dictionary in a list
        "policy.scheduler.1.milestones",
        "policy.optimizer.kwargs.amsgrad",
        "policy.hf_config_overrides.rope.theta",
        "policy.generation.vllm_kwargs.compilation_config.backend",
        "policy.megatron_cfg.env_vars.ANY_NAME",  # free names with values
        "data.train.data_path",
        "data.train.a_field_of_my_dataset",
        "data.train.0.a_field_of_my_dataset",  # a list of datasets
        "data.val_data_paths.hard",
        "env.my_environment.its_setting",
        "policy",
    ],
)
def test_key_exists(key):
    assert key_exists(key)


@pytest.mark.parametrize(
    "key",
    [
        "dpo.sft_loss_wieght",
        "dpo.seed.deeper",
        "policy.optimizer.nmae",
        "policy.scheduler.0.nmae",
        "policy.scheduler.first.name",
        "policy.megatron_cfg.tensor_modl_parallel_size",
        "data.shufle",
        "polcy",
    ],
)
def test_key_does_not_exist(key):
    assert not key_exists(key)


def test_every_key_of_the_manifest_exists():
    configs = load_manifest()["configs"]
    unknown = {key for config in configs.values() for key in config if not key_exists(key)}
    assert {key for key in unknown if not key.startswith("defaults")} <= {
        "data._override_",
        "grpo.adv_estimator._override_",
    }


def test_patterns_name_real_keys():
    for pattern in (*IGNORED, *NOT_HERE, *CAUTIONS):
        assert key_exists(pattern.replace("*", "math")), pattern


# flatten_keys, nearest_key


def test_flatten():
    config = {"a": {"b": 1, "c": {}}, "l": [1, 2], "m": [{"x": 1}, {"y": None}], "e": []}
    flat = {"a.b": 1, "a.c": {}, "l": [1, 2], "m.0.x": 1, "m.1.y": None, "e": []}
    assert flatten_keys(config) == flat
    assert flatten_keys(OmegaConf.create(config)) == flat
    assert flatten_keys(OmegaConf.create({"a": "${b}", "b": {"c": 1}})) == {"a": "${b}", "b.c": 1}


def test_nearest():
    known = ["policy.lr_scale", "policy.optimizer.kwargs.lr", "dpo.seed", "value.precision"]
    assert nearest_key("policy.lr", known) == "policy.optimizer.kwargs.lr"
    assert nearest_key("dop.seed", known) == "dpo.seed"
    assert nearest_key("policy.precison", known) == "value.precision"
    assert nearest_key("xyz.abc", known) is None


# check_keys


def check(text, *overrides, used=("dpo", "policy.optimizer"), **kwargs):
    config = OmegaConf.create(textwrap.dedent(text))
    return check_keys(parse_hydra_overrides(config, overrides), used, overrides=overrides, **kwargs)


CONFIG = """
    dpo: {seed: 1, sft_loss_weight: 0}
    policy:
      optimizer: {name: x, kwargs: {lr: 1, betas: [0.9, 0.98]}}
      megatron_cfg: {enabled: false, optimizer: {lr: 1}}
      max_grad_norm: 1
    cluster: {num_nodes: 1}
    grpo: {seed: 1, async_grpo: {enabled: false}}
"""


def test_each_key_is_in_one_place():
    report = check(CONFIG)
    assert report.used == (
        "dpo.seed", "dpo.sft_loss_weight", "policy.optimizer.name", "policy.optimizer.kwargs.lr",
        "policy.optimizer.kwargs.betas",
    )  # fmt: skip
    assert report.ignored == {
        "Megatron": ("policy.megatron_cfg.enabled", "policy.megatron_cfg.optimizer.lr"),
        "Ray": ("cluster.num_nodes",),
        "features that are off": ("grpo.async_grpo.enabled",),
    }
    assert report.unread == ("policy.max_grad_norm", "grpo")
    assert report.new == report.warnings == ()


def test_the_summary_is_short():
    assert str(check(CONFIG)) == (
        "configuration: 5 keys used\n"
        "  ignored: 4 (Megatron 2, Ray 1, features that are off 1)\n"
        "  in NeMo RL, not read by this run: policy.max_grad_norm, grpo"
    )
    assert str(check("dpo: {seed: 1}")) == "configuration: 1 keys used"


def test_the_longest_pattern_decides():
    text = "policy: {dtensor_cfg: {enabled: true, activation_checkpointing: true}}"
    report = check(text, used=["policy.dtensor_cfg.activation_checkpointing", "policy"])
    assert report.used == ("policy.dtensor_cfg.activation_checkpointing",)
    assert report.ignored == {"DTensor": ("policy.dtensor_cfg.enabled",)}
    # As long: used.
    report = check("cluster: {num_nodes: 1}", used=["cluster"])
    assert report.used == ("cluster.num_nodes",)


def test_a_star_is_one_part():
    text = "env: {math: {num_workers: 8, math_verify_impl: x}, code: {num_workers: 1}}"
    report = check(text, used=["env.math"])
    assert report.used == ("env.math.math_verify_impl",)
    assert report.ignored == {"workers": ("env.math.num_workers", "env.code.num_workers")}


def test_unknown_keys_are_one_error_with_the_nearest():
    with pytest.raises(ConfigKeyError) as caught:
        check(
            """
            dpo: {sft_loss_wieght: 1}
            policy:
              optimzer: {name: x, kwargs: {lr: 1}}
              scheduler: [{name: a}, {nmae: b}]
              megatron_cfg: {tensor_modl_parallel_size: 2}
            zzz: {qqq: 1}
            """
        )
    assert str(caught.value).splitlines()[1:] == [
        "  dpo.sft_loss_wieght: NeMo RL has no such key; the nearest key is dpo.sft_loss_weight",
        "  policy.optimzer: NeMo RL has no such key; the nearest key is policy.optimizer",
        "  policy.scheduler.1.nmae: NeMo RL has no such key;"
        " the nearest key is policy.scheduler.1.name",
        "  policy.megatron_cfg.tensor_modl_parallel_size: NeMo RL has no such key;"
        " the nearest key is policy.megatron_cfg.tensor_model_parallel_size",
        "  zzz: NeMo RL has no such key",
        "  (a key of your own is added on the command line, as ++key=value)",
    ]


def test_a_pattern_of_used_does_not_hide_a_misspelt_key_below_it():
    with pytest.raises(ConfigKeyError, match=r"dpo\.sead"):
        check("dpo: {sead: 1}", used=["dpo", "dpo.*"])


def test_an_override_without_plus_adds_no_key():
    with pytest.raises(ConfigKeyError, match=r"dpo\.sead.*nearest key is dpo\.seed"):
        check("dpo: {sead: 1}", "dpo.sead=2")


def test_a_key_that_a_runner_names_exists():
    assert check("dpo: {dpop_penalty: 1}", used=["dpo.dpop_penalty"]).used == ("dpo.dpop_penalty",)


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_new_key_of_the_command_line(plus):
    report = check(CONFIG, f"{plus}dpo.dpop_penalty=5.0", f"{plus}mine={{a: 1, b: 2}}")
    assert report.new == ("dpo.dpop_penalty", "mine.a", "mine.b")
    assert report.warnings == ()
    assert "new, not in NeMo RL: dpo.dpop_penalty, mine.a, mine.b" in str(report)


def test_a_new_key_that_looks_misspelt_is_a_warning():
    report = check(CONFIG, "++dpo.sft_loss_wieght=1")
    assert report.new == ("dpo.sft_loss_wieght",)
    assert report.warnings == (
        "NeMo RL does not name dpo.sft_loss_wieght; did you mean dpo.sft_loss_weight?",
    )


def test_a_misspelt_key_where_any_is_legal_is_a_warning():
    report = check(
        "data: {train: [{data_pth: a, my_field: b}], default: {dataset_nme: c}}", used=["data"]
    )
    assert report.warnings == (
        "NeMo RL does not name data.train.0.data_pth; did you mean data.train.0.data_path?",
        "NeMo RL does not name data.default.dataset_nme; did you mean data.default.dataset_name?",
    )


def test_an_override_without_effect_is_louder_than_a_key_of_the_file():
    overrides = ["cluster.num_nodes=2", "grpo.seed=2", "dpo.seed=2", "policy.megatron_cfg={}"]
    report = check(CONFIG, *overrides)
    assert report.warnings == (
        "cluster.num_nodes=2 on the command line has no effect here (ignored: Ray)",
        "grpo.seed=2 on the command line has no effect here (this run does not read it)",
        "policy.megatron_cfg={} on the command line has no effect here (ignored: Megatron)",
    )
    assert str(report).count("\nWARNING: ") == 3


def test_a_section_given_at_once_has_an_effect_if_one_key_has():
    report = check(CONFIG, "policy={optimizer: {name: y}, max_grad_norm: 2}")
    assert report.warnings == ()


def test_a_key_that_a_used_key_refers_to_is_used():
    text = """
        dpo: {seed: '${policy.max_total_sequence_length}', sft_loss_weight: '${.val_batches}'}
        policy:
          max_total_sequence_length: '${mul:2,${policy.train_micro_batch_size}}'
          train_micro_batch_size: 4
          optimizer: ${value.optimizer}
          max_grad_norm: '${policy.logprob_batch_size}'
          logprob_batch_size: 3
          model_name: m
          tokenizer: {name: '${..model_name}', chat_template: '${mine.template}'}
        value: {optimizer: {name: x, kwargs: {lr: 1}}}
        cluster: {num_nodes: 1}
    """
    overrides = ["policy.train_micro_batch_size=8", "value.optimizer.name=y", "++dpo.val_batches=1"]
    overrides += ["policy.model_name=n", "++mine.template=t"]
    used = ["dpo.seed", "dpo.sft_loss_weight", "policy.optimizer", "policy.tokenizer"]
    report = check(text, *overrides, used=used)
    assert set(report.used) == {
        "dpo.seed", "policy.max_total_sequence_length", "policy.train_micro_batch_size",
        "dpo.sft_loss_weight", "dpo.val_batches",
        "policy.optimizer", "value.optimizer.name", "value.optimizer.kwargs.lr",
        "policy.tokenizer.name", "policy.tokenizer.chat_template", "policy.model_name",
    }  # fmt: skip
    assert report.new == ("mine.template",)
    assert report.unread == ("policy.max_grad_norm", "policy.logprob_batch_size")
    assert report.warnings == ()


def test_a_reference_does_not_make_a_key_exist():
    with pytest.raises(ConfigKeyError, match=r"polcy: NeMo RL has no such key"):
        check("dpo: {seed: '${polcy.seed}'}\npolcy: {seed: 1}")


def test_deleting_is_no_key():
    report = check(CONFIG, "~policy.optimizer", "~cluster.num_nodes")
    assert report.used == ("dpo.seed", "dpo.sft_loss_weight")
    assert report.ignored["Ray"] == ("cluster",)  # the empty section
    assert report.warnings == ()


def test_what_is_not_here_must_be_off():
    text = "policy: {dtensor_cfg: {lora_cfg: {enabled: %s}}, quant_cfg: %s}"
    check(text % ("false", "null"))
    check(text % ("'${policy.quant_cfg}'", "null"))
    with pytest.raises(ConfigKeyError) as caught:
        check(text % ("'${policy.quant_cfg}'", "FP8"))
    assert str(caught.value).splitlines()[1:] == [
        "  policy.dtensor_cfg.lora_cfg.enabled: got 'FP8'; this package has no LoRA",
        "  policy.quant_cfg: got 'FP8'; this package has no quantization-aware training",
    ]
    check(text % ("true", "FP8"), not_here={})


def test_what_is_ignored_but_can_change_results_is_a_warning():
    (warning,) = check("policy: {megatron_cfg: {enabled: true}}").warnings
    assert warning.startswith("policy.megatron_cfg.enabled is on: NeMo RL then takes optimizer")


def test_plain_dictionaries_too():
    assert check_keys({"dpo": {"seed": 1}}, ["dpo"]).used == ("dpo.seed",)


def test_a_merge_marker_is_no_key_of_its_own():
    assert check("grpo: {adv_estimator: {_override_: true, name: grpo}}", used=["grpo"]).used


# read_config


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
        return tmp_path / "a.yaml"

    return write


def test_read_config_resolves(file):
    path = file("dpo: {seed: '${mul:2,3}'}\npolicy: {max_grad_norm: '${dpo.seed}'}")
    config, report = read_config(path, ["++dpo.mine=1"], ["dpo"])
    assert config == {"dpo": {"seed": 6, "mine": 1}, "policy": {"max_grad_norm": 6}}
    assert type(config["dpo"]) is dict
    assert report.new == ("dpo.mine",) and report.unread == ("policy",)


def test_read_config_wants_values_only_for_what_is_used(file):
    path = file("dpo:\n  seed: ???\nlogger:\n  log_dir: ???\n")
    with pytest.raises(ConfigKeyError, match=r"a\.yaml: no value for dpo\.seed; give it as dpo"):
        read_config(path, [], ["dpo"])
    assert read_config(path, ["dpo.seed=1"], ["dpo"])[0]["dpo"] == {"seed": 1}


def test_read_config_names_what_cannot_be_resolved(file):
    with pytest.raises(ConfigKeyError, match=r"a\.yaml: dpo\.seed: .*'nothing' not found"):
        read_config(file("dpo: {seed: '${nothing}'}"), [], ["dpo"])


def test_read_config_names_the_file_of_a_misspelt_key(file):
    with pytest.raises(ConfigKeyError, match=r"a\.yaml: keys that cannot be used:\n  dpo\.sead: "):
        read_config(file("dpo: {sead: 1}"), [], ["dpo"])


# The examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_hold_only_keys_that_nemo_rl_names(path):
    register_omegaconf_resolvers()
    config = load_config(path)
    assert OmegaConf.missing_keys(config) == set()
    report = check_keys(config, [""])
    assert report.new == report.warnings == ()
    named = {key for key in load_keys()["keys"] if "#" not in key}
    indexed = {key for key in flatten_keys(config) if any(p.isdecimal() for p in key.split("."))}
    free = {"policy.optimizer.kwargs", "value.optimizer.kwargs"}
    unnamed = {k for k in flatten_keys(config) if k not in named and k not in indexed}
    assert {key for key in unnamed if key.rpartition(".")[0] not in free} == set()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_name_files_that_exist_and_their_own_command(path):
    config = OmegaConf.to_container(load_config(path), resolve=True)
    for name in (config["data"]["train"]["data_path"], config["data"]["validation"]["data_path"]):
        assert (ROOT / name).is_file(), name
    assert (ROOT / config["policy"]["model_name"] / "model.safetensors").is_file()
    assert config["checkpointing"]["checkpoint_dir"] == f"results/{path.stem}"
    assert f"--config configs/{path.name}" in path.read_text()


def test_there_is_an_example_for_every_trainer():
    assert [path.stem for path in EXAMPLES] == ["dpo", "grpo", "grpo_tiny", "ppo", "rm", "sft"]


# NeMo RL's own files


@pytest.fixture(scope="module")
def checkout():
    path = os.environ.get("NEMO_RL_CHECKOUT")
    if not path:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    return Path(path)


def test_every_configuration_of_a_checkout_is_accounted_for(checkout):
    register_omegaconf_resolvers()
    for path in sorted((checkout / "examples/configs").rglob("*.yaml")):
        config = load_config(path)
        report = check_keys(config, ["policy"], not_here={})
        assert report.new == ()
        assert report.warnings == () or "is on: NeMo RL then" in report.warnings[0], path
