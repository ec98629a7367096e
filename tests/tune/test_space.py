# SPDX-License-Identifier: Apache-2.0
"""Search spaces: what is refused, what a trial gets, and the override line.

With ``NEMO_RL_CHECKOUT`` set to a checkout of NeMo RL, the override line is also applied to its own
``dpo.yaml``.
"""

import os
import shlex
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from optuna.trial import FixedTrial

from nemo_rl_ref.config.types import key_types
from nemo_rl_ref.tune.methods import SearchError, grid_points
from nemo_rl_ref.tune.space import Space, SpaceError, override_line
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils.config import (
    load_config,
    parse_hydra_overrides,
    register_omegaconf_resolvers,
)

LR, BETA = "policy.optimizer.kwargs.lr", "dpo.reference_policy_kl_penalty"
GLOBAL, MICRO = "policy.train_global_batch_size", "policy.train_micro_batch_size"
STEPS, BETAS = "dpo.max_num_steps", "policy.optimizer.kwargs.betas"

REFUSED = {
    "nothing": ({}, ["got {}", "expected keys"]),
    "unknown key": (
        {"policy.optimzer.kwargs.lr": {"log_uniform": [1e-6, 1e-3]}},
        ["got policy.optimzer.kwargs.lr", f"did you mean {LR}?"],
    ),
    "misspelt in an open section": (
        {"policy.optimizer.kwargs.lrr": {"log_uniform": [1e-6, 1e-3]}},
        ["policy.optimizer.kwargs.lrr", f"did you mean {LR}?"],
    ),
    "a section": ({"policy.optimizer": {"choice": ["a"]}}, ["it is a section", "policy.optimizer."]),
    "unknown distribution": ({LR: {"loguniform": [1, 2]}}, [LR, "got loguniform", "log_uniform"]),
    "two distributions": (
        {LR: {"uniform": [0, 1], "choice": [1.0]}},
        [LR, "got uniform and choice", "expected one of them"],
    ),
    "empty entry": ({LR: {}}, [LR, "got nothing", "log_uniform"]),
    "real range of a whole key": (
        {STEPS: {"log_uniform": [10, 100]}},
        [STEPS, "got a range of real numbers", "whole numbers", "expected log_int"],
    ),
    "range of a switch": (
        {"dpo.val_at_start": {"int": [0, 1]}},
        ["dpo.val_at_start", "got a range of numbers", "true or false", "expected choice"],
    ),
    "choice of a wrong type": (
        {GLOBAL: {"choice": [16, "32"]}},
        [GLOBAL, "got '32', a str", "whole numbers"],
    ),
    "half a batch": ({GLOBAL: {"choice": [16, 32.5]}}, [GLOBAL, "got 32.5, a float"]),
    "fixed value of a wrong type": ({STEPS: "many"}, [STEPS, "got 'many', a str", "whole numbers"]),
    "inverted range": (
        {LR: {"uniform": [1e-3, 1e-6]}},
        [LR, "low 0.001 and high 1e-06", "low below high"],
    ),
    "empty range": ({LR: {"uniform": [0.1, 0.1]}}, [LR, "low below high"]),
    "log range from 0": ({LR: {"log_uniform": [0, 1e-3]}}, [LR, "got low 0", "above 0"]),
    "not a range": ({LR: {"uniform": [1]}}, [LR, "got [1]", "two numbers [low, high]"]),
    "infinite range": ({LR: {"uniform": [0, float("inf")]}}, [LR, "two numbers"]),
    "fractions in int": ({STEPS: {"int": [1, 2.5]}}, [STEPS, "1, 2.5", "whole numbers"]),
    "step that misses the end": (
        {STEPS: {"int": [10, 35], "step": 10}},
        [STEPS, "step: got 10", "35 is not reached from 10", "30 as the high end"],
    ),
    "step of a log range": (
        {STEPS: {"log_int": [1, 8], "step": 2}},
        [STEPS, "step: stands beside uniform or int only"],
    ),
    "empty choice": ({LR: {"choice": []}}, [LR, "got []", "a list of values"]),
    "the same choice twice": ({GLOBAL: {"choice": [16, 16]}}, [GLOBAL, "got 16 twice"]),
    "tie to a key that is nowhere": (
        {MICRO: {"equals": GLOBAL}},
        [MICRO, f"equals: got {GLOBAL}", "expected a key of the space"],
    ),
    "tie to a misspelt key": (
        {MICRO: {"equals": "policy.train_global_batch_sise"}},
        [MICRO, "got policy.train_global_batch_sise", f"did you mean {GLOBAL}?"],
    ),
    "tie to itself": ({MICRO: {"equals": MICRO}}, [MICRO, "another key than its own"]),
    "circle of ties": (
        {MICRO: {"equals": GLOBAL}, GLOBAL: {"equals": MICRO}},
        ["tied to itself", f"{MICRO} -> {GLOBAL} -> {MICRO}"],
    ),
    "circle through a condition": (
        {LR: {"choice": [1.0], "when": {BETA: 1.0}}, BETA: {"choice": [1.0], "when": {LR: 1.0}}},
        ["tied to itself", f"{LR} -> {BETA} -> {LR}"],
    ),
    "divides without a limit": (
        {GLOBAL: 64, MICRO: {"divides": GLOBAL}},
        [MICRO, "divides: got neither", "at_most"],
    ),
    "limit of no whole number": (
        {GLOBAL: 64, MICRO: {"divides": GLOBAL, "at_most": 2.5}},
        [MICRO, "at_most: got 2.5", "whole number"],
    ),
    "divisors for a text": (
        {GLOBAL: 64, "policy.precision": {"divides": GLOBAL, "at_most": 2}},
        ["policy.precision", "it takes text"],
    ),
    "equals and a range": (
        {GLOBAL: 64, MICRO: {"equals": GLOBAL, "int": [1, 2]}},
        [MICRO, "equals and int"],
    ),
    "product of one": ({MICRO: {"product_of": [GLOBAL]}}, [MICRO, "a list of keys and numbers"]),
    "condition never met": (
        {GLOBAL: {"choice": [16, 32]}, LR: {"uniform": [0, 1], "when": {GLOBAL: 64}}},
        [LR, f"when: {GLOBAL}: got 64, which it never is", "16, 32"],
    ),
    "condition on a missing key": (
        {LR: {"uniform": [0, 1], "when": {GLOBAL: 64}}},
        [LR, f"when: got {GLOBAL}", "a key of the space"],
    ),
    "a key and one in it": (
        {BETAS: {"choice": [[0.9, 0.98]]}, f"{BETAS}.0": {"uniform": [0.8, 0.9]}},
        [f"{BETAS}.0", BETAS],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_with_its_key(name):
    written, parts = REFUSED[name]
    with pytest.raises(SpaceError) as caught:
        Space.from_dict(written)
    for part in parts:
        assert part in str(caught.value)


def read(tmp_path, text, **options):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return Space.read(path, **options)


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    text = f"{LR}: {{uniform: [0, 1]}}\n{BETA}: 0.1\n{LR}: {{uniform: [0, 2]}}\n"
    with pytest.raises(
        SpaceError, match=rf"space.yaml: (.|\n)*found duplicate key {LR}(.|\n)*line 3"
    ):
        read(tmp_path, text)


def test_what_is_not_yaml_is_refused_with_the_file(tmp_path):
    with pytest.raises(SpaceError, match=r"space.yaml: cannot be read as YAML"):
        read(tmp_path, "a: [1")


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    space = read(tmp_path, f"{LR}: {{log_uniform: [1e-6, 1E-3]}}\n{BETA}: 1e-1\n")
    dist = space.distributions()[LR]
    assert (dist.low, dist.high, dist.log) == (1e-6, 1e-3, True)
    assert space.suggest(FixedTrial({LR: 1e-4})) == {LR: 1e-4, BETA: 0.1}


def test_distributions_have_ends_steps_and_scales():
    space = Space.from_dict(
        {
            LR: {"uniform": [0.1, 0.5], "step": 0.1},
            STEPS: {"int": [10, 30], "step": 10},
            GLOBAL: {"log_int": [1, 64]},
            "dpo.val_at_start": {"choice": [True, False]},
            BETAS: {"choice": [[0.9, 0.98], [0.9, 0.999]]},
            "dpo.sft_loss_weight": {"log_uniform": [0.01, 1.0]},
        }
    )
    found = space.distributions()
    logarithmic = optuna.distributions.FloatDistribution(0.01, 1.0, log=True)
    assert found["dpo.sft_loss_weight"] == logarithmic
    assert found[LR] == optuna.distributions.FloatDistribution(0.1, 0.5, step=0.1)
    assert found[STEPS] == optuna.distributions.IntDistribution(10, 30, step=10)
    assert found[GLOBAL] == optuna.distributions.IntDistribution(1, 64, log=True)
    assert found[BETAS].choices == ("[0.9, 0.98]", "[0.9, 0.999]")
    drawn = {LR: 0.2, STEPS: 20, GLOBAL: 7, "dpo.val_at_start": True, BETAS: "[0.9, 0.98]"}
    drawn["dpo.sft_loss_weight"] = 0.1
    assert space.suggest(FixedTrial(drawn)) == {**drawn, BETAS: [0.9, 0.98]}


def test_a_space_is_the_same_after_a_round_trip():
    space = Space.from_dict(EVERYTHING, base={"dpo.val_batches": 4})
    assert Space.from_dict(space.to_dict(), base={"dpo.val_batches": 4}) == space
    study = optuna.create_study()
    for _ in range(20):
        trial = study.ask()
        values = space.suggest(trial)
        assert space.suggest(FixedTrial(trial.params)) == values
        study.tell(trial, 0.0)


PROMPTS, COPIES = "grpo.num_prompts_per_step", "grpo.num_generations_per_prompt"
EVERYTHING = {
    MICRO: {"divides": GLOBAL, "at_most": 24},
    GLOBAL: {"product_of": [PROMPTS, COPIES]},
    PROMPTS: {"choice": [8, 12]},
    COPIES: {"int": [2, 8], "step": 2},
    "dpo.val_micro_batch_size": {"divides": GLOBAL, "choice": [4, 16]},
    "dpo.val_global_batch_size": {"equals": MICRO},
    "dpo.val_period": {"fraction_of": STEPS, "fraction": 0.3},
    STEPS: 60,
    LR: {"log_uniform": [1e-6, 1e-3]},
    "policy.optimizer.kwargs.eps": {"fraction_of": LR, "uniform": [0.1, 0.9]},
    "dpo.sft_loss_weight": {"choice": [0, 0.5]},
    "dpo.sft_average_log_probs": {"choice": [True, False], "when": {"dpo.sft_loss_weight": 0.5}},
    "rm.val_batches": {"equals": "dpo.val_batches"},
}
DRAWN = {
    PROMPTS: 12, COPIES: 6, "dpo.val_micro_batch_size": 16, LR: 1e-4,
    "policy.optimizer.kwargs.eps": 0.5, "dpo.sft_loss_weight": 0.5,
    "dpo.sft_average_log_probs": True,
}  # fmt: skip


def test_ties_and_conditions_are_resolved():
    space = Space.from_dict(EVERYTHING, base={"dpo.val_batches": 4})
    values = space.suggest(FixedTrial(DRAWN))
    assert list(values) == list(EVERYTHING)
    assert values[GLOBAL] == 72
    assert values[MICRO] == 24
    assert values["dpo.val_micro_batch_size"] == 12, "the largest divisor of 72 up to 16"
    assert values["dpo.val_global_batch_size"] == 24
    assert values["dpo.val_period"] == 18
    assert values["policy.optimizer.kwargs.eps"] == pytest.approx(5e-5)
    assert values["rm.val_batches"] == 4
    without = space.suggest(FixedTrial({**DRAWN, "dpo.sft_loss_weight": 0}))
    assert "dpo.sft_average_log_probs" not in without


def test_a_prime_is_divided_by_one():
    space = Space.from_dict({GLOBAL: 7, MICRO: {"divides": GLOBAL, "at_most": 4}})
    assert space.suggest(FixedTrial({}))[MICRO] == 1


def test_one_is_not_true():
    key = "dpo.val_at_start"
    space = Space.from_dict(
        {key: {"choice": [True, False]}, LR: {"choice": [0.5], "when": {key: True}}}
    )
    assert LR in space.suggest(FixedTrial({key: True, LR: 0.5}))
    assert LR not in space.suggest(FixedTrial({key: False, LR: 0.5}))
    with pytest.raises(SpaceError, match="got 1, which it never is"):
        Space.from_dict({key: {"choice": [True, False]}, LR: {"choice": [0.5], "when": {key: 1}}})


def test_a_grid_has_every_point_once_and_only_where_conditions_are_met():
    space = Space.from_dict(
        {
            "dpo.sft_loss_weight": {"choice": [0, 0.5]},
            "dpo.sft_average_log_probs": {
                "choice": [True, False],
                "when": {"dpo.sft_loss_weight": 0.5},
            },
            STEPS: {"int": [10, 30], "step": 10},
        }
    )
    points = grid_points(space)
    assert len(points) == 3 * (1 + 2)
    assert len({str(sorted(point.items())) for point in points}) == 9
    with pytest.raises(SearchError, match=f"{LR} has log_uniform; expected choice"):
        grid_points(Space.from_dict({LR: {"log_uniform": [1e-6, 1e-3]}}))


def test_types_are_nemo_rls():
    assert key_types(STEPS) == {"int"}
    assert key_types("policy.max_grad_norm") == {"float", "int", "null"}
    assert key_types(LR) == {"int", "float"}, "an optimizer's arguments, from configuration files"
    assert key_types("grpo.adv_estimator.name") == {"str"}


# The override line


def nested(flat):
    config = OmegaConf.create({})
    for key, value in flat.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def nemo_rls_dpo():
    flat = load_manifest()["configs"]["dpo.yaml"]
    return nested({key: value for key, value in flat.items() if "#" not in key})


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\n\r", exclude_categories=["Cs"]),
    max_size=12,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@given(VALUES)
def test_an_override_means_its_value_to_hydra(value):
    config = parse_hydra_overrides(nested({}), shlex.split(override_line({"a.b": value})))
    found = OmegaConf.to_container(config, resolve=False)["a"]["b"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["", "it's", "\\", "\\'", "a\\", "null", "true", "1e-3", "${x}", "a b=c,d", "[1]", "é"]
)
def test_texts_are_quoted(text):
    config = parse_hydra_overrides(nested({}), shlex.split(override_line({"a": text})))
    assert OmegaConf.to_container(config, resolve=False)["a"] == text


SPACE = {
    LR: 3.2e-05, BETA: 0.1, BETAS: [0.9, 0.98], "policy.max_grad_norm": None,
    "policy.optimizer.kwargs.amsgrad": True, "policy.precision": "float32", GLOBAL: 16,
}  # fmt: skip


def check_on(config):
    flat = {key: 0 for key in SPACE if OmegaConf.select(config, key) is not None}
    flat["policy.max_grad_norm"] = 1.0
    line = override_line(SPACE, flat)
    assert f" {BETA}=0.1 " in line
    assert "++policy.optimizer.kwargs.amsgrad=true" in line
    assert "amsgrad" not in flat
    found = parse_hydra_overrides(config, shlex.split(line))
    for key, value in SPACE.items():
        there = OmegaConf.select(found, key)
        assert (list(there) if isinstance(value, list) else there) == value
    return found


def test_the_override_line_loads_with_the_keys_of_nemo_rls_dpo_yaml():
    check_on(nemo_rls_dpo())


def test_an_entry_of_a_list_can_be_overridden():
    config = load_config("configs/dpo.yaml")
    line = override_line({"policy.scheduler.0.kwargs.total_iters": 3})
    found = parse_hydra_overrides(config, shlex.split(line))
    assert found.policy.scheduler[0].kwargs.total_iters == 3
    assert found.policy.scheduler[0].kwargs.start_factor == 0.1


def test_the_override_line_loads_with_nemo_rls_own_dpo_yaml():
    path = os.environ.get("NEMO_RL_CHECKOUT")
    if not path:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    register_omegaconf_resolvers()
    found = check_on(load_config(Path(path) / "examples/configs/dpo.yaml"))
    OmegaConf.to_container(found, resolve=True)
