# SPDX-License-Identifier: Apache-2.0
"""What all five trainers refuse: one line with the key, before a model or a record is read."""

import contextlib
import re

import pytest
import transformers
from omegaconf import OmegaConf
from rl_runs import settings as rl_config
from trainer_runs import make_config

from nemo_rl_ref import run_dpo, run_grpo, run_rm, run_sft

TRAINERS = {"sft": run_sft, "dpo": run_dpo, "rm": run_rm, "grpo": run_grpo, "ppo": run_grpo}


class Loaded(BaseException):
    """Something was loaded. Not an error, so that nobody makes another one of it."""


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    """No model and no tokenizer can be loaded."""

    def refuse(*args, **options):
        raise Loaded

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification",
                 "AutoModelForTokenClassification", "AutoTokenizer", "AutoConfig"):  # fmt: skip
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)


def configuration(section, folder):
    if section in ("grpo", "ppo"):
        return rl_config(folder, ppo=section == "ppo")
    return make_config(section, folder)


def changed(config, key, value):
    *path, last = key.split(".")
    place = config
    for part in path:
        place[part] = dict(place.get(part, {}))  # a copy: sections may share one
        place = place[part]
    place[last] = value
    return config


def refused(section, config):
    """The message of the error that the trainer raises."""
    with pytest.raises(ValueError) as caught:
        TRAINERS[section].train(config)
    return str(caught.value)


EVERYWHERE = [
    # Wrong types
    ("policy.train_global_batch_size", "many", "an integer from 1 on"),
    ("policy.train_micro_batch_size", True, "an integer from 1 on"),
    ("policy.train_micro_batch_size", 1.5, "an integer from 1 on"),
    ("policy.max_total_sequence_length", [16], "an integer from 1 on"),
    ("policy.model_name", 7, "text"),
    ("policy.tokenizer", "tiny", "a mapping with name"),
    ("policy.optimizer.kwargs", [1], "a mapping"),
    ("policy.scheduler", "torch.optim.lr_scheduler.StepLR",
     "null or a mapping with name and kwargs, or a list of them"),
    ("data.shuffle", "maybe", "true or false"),
    ("data.shuffle", 2, "true or false"),
    ("checkpointing.enabled", "enabled", "true or false"),
    ("checkpointing.save_optimizer", "none", "true or false"),
    ("logger.tensorboard_enabled", {}, "true or false"),
    # Out of range
    ("policy.train_global_batch_size", 0, "an integer from 1 on"),
    ("policy.max_grad_norm", -1.0, "null or a number above 0"),
    ("policy.max_grad_norm", 0, "null or a number above 0"),
    ("policy.max_grad_norm", float("nan"), "null or a number above 0"),
    ("policy.make_sequence_length_divisible_by", 0, "an integer from 1 to 1048576"),
    ("data.max_input_seq_length", 0, "null or an integer from 1 on"),
    ("checkpointing.save_period", 0, "an integer from 1 on"),
    ("checkpointing.keep_top_k", -1, "null or an integer from 0 on"),
    ("{section}.seed", -1, "an integer from 0 "),
    ("{section}.seed", 2**32, "an integer from 0 and below 4294967296"),
    ("policy.make_sequence_length_divisible_by", -8, "an integer from 1 to 1048576"),
    ("policy.make_sequence_length_divisible_by", 2**31, "an integer from 1 to 1048576"),
    ("policy.optimizer.kwargs.lr", float("nan"), "a number"),
    ("data.train.seed", -1, "an integer from 0 on"),
    ("data.train.split_validation_size", float("nan"), "a number from 0 on"),
    ("{section}.max_num_epochs", 0, "an integer from 1 on"),
    ("{section}.max_num_epochs", 2**63, "an integer from 1 on and below 9223372036854775808"),
    ("{section}.max_num_steps", 10**30, "an integer from -?1 on and below 9223372036854775808"),
    ("policy.train_micro_batch_size", 2**63, "an integer from 1 on and below 92233720368547758"),
    ("{section}.val_period", -2, "an integer from -1 on"),
    # Misspelt names
    ("policy.precision", "bf16", "float32 or bfloat16"),
    ("checkpointing.metric_name", "accuracy", "null, or 'val:' or 'train:'"),
    ("checkpointing.checkpoint_must_save_by", "4h", "DD:HH:MM:SS"),
    # Null where there has to be a value
    ("policy", None, "a mapping with model_name"),
    ("policy.model_name", None, "text"),
    ("policy.optimizer", None, "a mapping with name, kwargs"),
    ("data.train", None, "(a dataset|one dataset)"),
    ("data.shuffle", None, "true or false"),
    ("logger.log_dir", None, "a folder"),
    ("{section}.val_at_start", None, "true or false"),
]  # fmt: skip

OF_ONE = [
    ("sft", "sft.max_num_steps", 0, "an integer from 1 on"),
    ("sft", "sft.only_unmask_final", "last", "true or false"),
    ("sft", "data.add_bos", "b", "true or false"),
    ("dpo", "dpo.max_num_steps", -1, "an integer from 1 on"),
    ("dpo", "dpo.preference_loss_weight", "heavy", "a number"),
    ("dpo", "dpo.sft_average_log_probs", 3, "true or false"),
    ("dpo", "data.val_data_paths", "x.jsonl", "null or a mapping"),
    ("rm", "rm.max_num_steps", -2, "an integer from -1 on"),
    ("rm", "policy.reward_model_cfg.reward_model_type", "regression", "bradley_terry"),
    ("grpo", "grpo.num_generations_per_prompt", 0, "an integer from 1 on"),
    ("grpo", "grpo.max_num_steps", 0, "an integer from 1 on"),
    ("grpo", "grpo.max_num_steps", -1, "an integer from 1 on"),
    ("grpo", "loss_fn.ratio_clip_min", float("nan"), "a number"),
    ("grpo", "grpo.use_dynamic_sampling", "on demand", "true or false"),
    ("grpo", "grpo.batch_multiplier", -1.0, "a number above 0"),
    ("grpo", "grpo.adv_estimator.name", "grop", "grpo or gdpo or reinforce_plus_plus or opd"),
    ("grpo", "grpo.reward_scaling", None, "a mapping"),
    ("grpo", "loss_fn.ratio_clip_max", "wide", "a number"),
    ("grpo", "policy.generation.temperature", -0.5, "a number from 0 on"),
    ("grpo", "policy.generation.top_p", 1.5, "a number above 0 to 1"),
    ("grpo", "policy.generation.top_p", 0, "a number above 0 to 1"),
    ("grpo", "policy.generation.temperature", float("inf"), "a number from 0 on"),
    ("grpo", "policy.generation.top_k", 0, "null or an integer from 1 on or -1"),
    ("ppo", "policy.generation.top_k", -2, "null or an integer from 1 on or -1"),
    ("grpo", "policy.generation.val_top_k", 1.5, "null or an integer from 1 on or -1"),
    ("grpo", "policy.generation.max_new_tokens", None, "an integer from 1 to 1048576"),
    ("grpo", "policy.generation.max_new_tokens", 0, "an integer from 1 to 1048576"),
    ("grpo", "policy.generation.max_new_tokens", 2**62, "an integer from 1 to 1048576"),
    ("grpo", "grpo.num_generations_per_prompt", 2**31, "at most 1048576 responses a step"),
    ("grpo", "grpo.val_num_generations_per_prompt", 2**31, "at most 1048576"),
    ("ppo", "value.train_global_batch_size", 32, "a divisor of num_prompts_per_step"),
    ("ppo", "value.train_global_batch_size", 6, "a divisor of num_prompts_per_step"),
    ("grpo", "policy.generation.stop_token_ids", 2, "null or a list, each an integer from 0 on"),
    ("grpo", "policy.generation.stop_strings", "12", "null or a list, each text"),
    ("grpo", "policy.logprob_batch_size", 0, "null or an integer from 1 on"),
    ("ppo", "ppo.ppo_epochs", 0, "an integer from 1 on"),
    ("ppo", "value.max_grad_norm", -1.0, "null or a number above 0"),
    ("ppo", "ppo.adv_estimator.gae_lambda", "long", "a number"),
    ("ppo", "value.max_grad_norm", -1, "null or a number above 0"),
    ("ppo", "value.train_micro_batch_size", "all", "an integer from 1 on"),
    ("ppo", "value_loss_fn.cliprang", 0.2, "no such key"),
]


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(("key", "value", "expected"), EVERYWHERE)
def test_a_wrong_value_is_one_line_in_every_trainer(section, key, value, expected, tmp_path):
    check(section, key.format(section=section), value, expected, tmp_path)


@pytest.mark.parametrize(("section", "key", "value", "expected"), OF_ONE)
def test_a_wrong_value_is_one_line(section, key, value, expected, tmp_path):
    check(section, key, value, expected, tmp_path)


def check(section, key, value, expected, folder):
    message = refused(section, changed(configuration(section, folder), key, value))
    start = re.escape(f"{key}: got {value!r}, expected ")
    assert re.match(f"{start}{expected}", message), message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("key", "value", "message"), [
    ("policy.generation.stop_strings", ["a", ""],
     "policy.generation.stop_strings.1: got '', expected text that is not empty"),
    ("policy.generation.stop_strings", [1],
     "policy.generation.stop_strings.0: got 1, expected text that is not empty"),
    ("policy.generation.stop_token_ids", [-1],
     "policy.generation.stop_token_ids.0: got -1, expected an integer from 0 on"),
    ("policy.optimizer.kwargs.betas", [0.9, float("nan")],
     "policy.optimizer.kwargs.betas.1: got nan, expected a number"),
])  # fmt: skip
def test_a_wrong_entry_of_a_list_is_one_line(key, value, message, tmp_path):
    assert refused("grpo", changed(configuration("grpo", tmp_path), key, value)) == message


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("policy.train_micro_batch_size", "an integer from 1 on"),
        ("policy.precision", "float32 or bfloat16"),
        ("policy.max_total_sequence_length", "an integer from 1 on"),
        ("data.shuffle", "true or false"),
        ("checkpointing.metric_name", "null or text"),
        ("logger.log_dir", "a folder"),
        ("{section}", "a mapping"),
    ],
)
def test_a_missing_key_is_one_line(section, key, expected, tmp_path):
    key = key.format(section=section)
    config = configuration(section, tmp_path)
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place[part]
    del place[last]
    message = refused(section, config)
    if key == section:
        key = {"grpo": "ppo or grpo", "ppo": "ppo or grpo"}.get(section, section)
        expected += f"; the configuration has {', '.join(config)}"
    assert message == f"{key}: not set, expected {expected}"


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("policy.optimizer.name", "torch.optim.AdmaW",
         "policy.optimizer.name: got 'torch.optim.AdmaW'; did you mean torch.optim.AdamW?"),
        ("policy.optimizer.kwargs", {"lr": -1.0}, "policy.optimizer: torch.optim.AdamW refuses"),
        ("policy.scheduler", {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"stp": 1}},
         "policy.scheduler.kwargs.stp: torch.optim.lr_scheduler.StepLR has no such argument"),
        ("policy.scheduler", [{"milestones": [1]}], "policy.scheduler: got milestones [[1]]"),
    ],
)  # fmt: skip
def test_an_optimizer_is_tried_before_a_model_is_loaded(section, key, value, message, tmp_path):
    found = refused(section, changed(configuration(section, tmp_path), key, value))
    assert found.startswith(message) and len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("grpo", "loss_fn.reference_policy_kl_type", "k4", "loss_fn.reference_policy_kl_type is"),
        ("grpo", "loss_fn.ratio_clip_c", 0.5, "loss_fn.ratio_clip_c is 0.5, expected more than 1"),
        ("ppo", "value_loss_fn.cliprange", -0.2, "value_loss_fn.cliprange is -0.2, expected 0"),
        ("ppo", "value.optimizer.name", "Adam", "value.optimizer.name: got 'Adam'"),
        ("grpo", "grpo.adv_estimator", {"name": "opd"}, "on_policy_distillation: grpo.adv_est"),
        ("ppo", "ppo.adv_estimator", {"name": "gae"}, "ppo.adv_estimator: estimator_config has no"),
    ],
)
def test_a_loss_and_an_estimator_are_made_before_a_model(section, key, value, message, tmp_path):
    config = changed(configuration(section, tmp_path), key, value)
    assert refused(section, config).startswith(message)


@pytest.mark.parametrize("section", TRAINERS)
def test_a_good_configuration_gets_as_far_as_the_tokenizer(section, tmp_path):
    with pytest.raises(Loaded):
        TRAINERS[section].train(configuration(section, tmp_path))


@pytest.mark.parametrize("section", TRAINERS)
def test_the_command_line_reads_what_the_environment_has(section, tmp_path, monkeypatch, capsys):
    """An interpolation of the environment is text, also where a number or a switch is wanted."""
    path = tmp_path / "run.yaml"
    OmegaConf.save(OmegaConf.create(configuration(section, tmp_path)), path)
    lines = ["policy.train_micro_batch_size=${oc.env:ROWS}", 'data.shuffle="false"']
    monkeypatch.setenv("ROWS", "2")
    with pytest.raises(Loaded):
        TRAINERS[section].main(["--config", str(path), *lines])
    monkeypatch.setenv("ROWS", "two")
    capsys.readouterr()
    assert TRAINERS[section].main(["--config", str(path), *lines]) == 1
    out = capsys.readouterr()
    assert out.err == (
        "error: policy.train_micro_batch_size: got 'two', expected an integer from 1 on\n"
    )
    assert out.out == "" and not list(tmp_path.glob("*logs*/*"))  # a failed start leaves nothing


# Whole files and whole sections

CAN_BE_EMPTY = ("loss_fn", "value_loss_fn", "data.train")


def said(section, path, capsys):
    """What the program prints to stderr, which is one error."""
    capsys.readouterr()
    assert TRAINERS[section].main(["--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error: ") == 1
    return error.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(("raw", "message"), [
    (b"", "{kind}: not set, expected a mapping; the configuration has nothing"),
    (b"# nothing\n---\n", "{kind}: not set, expected a mapping; the configuration has nothing"),
    (b"policy:\n", "{kind}: not set, expected a mapping; the configuration has policy"),
    (b"[1, 2]", "{path}: got a list, expected a mapping of keys to values"),
    (b"text", "{path}: "),
    (b"a: {b", "{path}: cannot be read as YAML: "),
    (b"a: 1\na: 2", "{path}: cannot be read as YAML: "),
    (b"a: !!python/object/apply:os.system [x]", "{path}: cannot be read as YAML: "),
    (b"\x00", "{path}: "),
    (b"a: ${b}", "{path}: "),
    (b"defaults: nowhere.yaml", "no configuration file "),
    (b"1: 2", "{path}: keys that cannot be used:\n  1: NeMo RL has no such key"),
])  # fmt: skip
def test_a_broken_file_is_one_error(section, raw, message, tmp_path, capsys):
    """Empty, another kind of YAML, no YAML at all, or one that names what is not there."""
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    kind = "ppo or grpo" if section in ("grpo", "ppo") else section
    assert said(section, path, capsys).startswith(message.format(path=path, kind=kind))


@pytest.mark.parametrize("section", ["sft", "dpo", "rm", "grpo"])
@pytest.mark.parametrize("program", ["sft", "dpo", "rm", "grpo"])
def test_the_configuration_of_another_program_is_told_apart(section, program, tmp_path, capsys):
    if section == program:
        return
    OmegaConf.save(OmegaConf.create(configuration(section, tmp_path)), tmp_path / "run.yaml")
    kind = {"grpo": "ppo or grpo"}.get(program, program)
    start = f"{kind}: not set, expected a mapping; the configuration has "
    assert re.match(rf"{start}.*\b{section}\b", said(program, tmp_path / "run.yaml", capsys))


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize("part", ["policy", "data", "checkpointing", "logger", "policy.generation",
                                  "policy.tokenizer", "data.train", "{section}", "value",
                                  "loss_fn", "value_loss_fn"])  # fmt: skip
@pytest.mark.parametrize("value", [None, {}, [], "text", 3, "missing"])
def test_a_section_of_another_shape_is_an_error_of_its_keys(section, part, value, tmp_path, capsys):
    """Null, empty, a list, a text, a number, or not there: every section of every trainer."""
    part = part.format(section=section)
    config = configuration(section, tmp_path)
    *path, last = part.split(".")
    place = config
    for name in path:
        place = place.get(name, {})
    if last not in place:
        return
    place[last] = value
    if value == "missing":
        del place[last]
    OmegaConf.save(OmegaConf.create(config), tmp_path / "run.yaml")
    if (value == {} or value == "missing") and part in (section, *CAN_BE_EMPTY):
        with contextlib.suppress(Loaded):  # everything has a default
            said(section, tmp_path / "run.yaml", capsys)
        return
    for line in said(section, tmp_path / "run.yaml", capsys).splitlines():
        assert line.startswith(part) or "ppo or grpo: not set" in line, line


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(("kwargs", "message"), [
    ({"lr": 1e-3, "betas": [0.9]}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"lr": 1e-3, "betas": 0.9}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"lr": 1e-3, "betas": ["a", "b"]}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"lr": "fast"}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"lr": None}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"lr": [1e-3]}, "policy.optimizer: torch.optim.AdamW refuses"),
    ({"params": []}, "policy.optimizer"),
    ({"lr": 1e-3, "foreach": True, "fused": True}, "policy.optimizer: torch.optim.AdamW refuses"),
])  # fmt: skip
def test_arguments_that_an_optimizer_refuses_are_one_line(section, kwargs, message, tmp_path):
    config = changed(configuration(section, tmp_path), "policy.optimizer.kwargs", kwargs)
    found = refused(section, config)
    assert found.startswith(message) and len(found.splitlines()) == 1


@pytest.mark.parametrize("section", TRAINERS)
@pytest.mark.parametrize(("name", "kwargs"), [
    ("StepLR", {"step_size": "two"}), ("StepLR", {"step_size": None}), ("StepLR", {}),
    ("LinearLR", {"start_factor": 2.0}), ("LambdaLR", {"lr_lambda": 1}), ("SequentialLR", {}),
    ("CosineAnnealingLR", {"T_max": 0}), ("CosineAnnealingLR", {"T_max": "ten"}),
    ("MultiStepLR", {"milestones": 3}), ("StepLR", {"step_size": 0}),
    ("ReduceLROnPlateau", {}), ("ExponentialLR", {"gamma": -1.0}),
    ("ExponentialLR", {"gamma": float("inf")}),
])  # fmt: skip
def test_a_scheduler_that_cannot_step_is_one_line(section, name, kwargs, tmp_path):
    scheduler = {"name": f"torch.optim.lr_scheduler.{name}", "kwargs": kwargs}
    found = refused(
        section, changed(configuration(section, tmp_path), "policy.scheduler", scheduler)
    )
    assert found.startswith("policy.scheduler") and len(found.splitlines()) == 1


def test_every_scheduler_of_a_list_is_tried(tmp_path):
    """Also those that have their turn late."""
    schedulers = [
        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"total_iters": 1000}},
        {"name": "torch.optim.lr_scheduler.CosineAnnealingLR", "kwargs": {"T_max": 0}},
        {"milestones": [1000]},
    ]
    found = refused("sft", changed(configuration("sft", tmp_path), "policy.scheduler", schedulers))
    assert found.startswith(
        "policy.scheduler.1: torch.optim.lr_scheduler.CosineAnnealingLR refuses"
    )
