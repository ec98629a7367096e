# SPDX-License-Identifier: Apache-2.0
"""Which line of NeMo RL reads a key, found in source text; and what is recorded of it."""

import ast
import os
from pathlib import Path

import pytest

from nemo_rl_ref.upstream.readers import find_reads, load_readers, make_readers

SOURCE = """
class GRPOConfig(BaseModel):
    reward_shaping: RewardShapingConfig
    filter_overlong_prompts: bool = False

def setup(master_config):
    policy_config = master_config.policy
    generation = policy_config["generation"]
    x = generation["top_p"]
    y = (policy_config.get("megatron_cfg") or {}).get("enabled")
    Optimizer(**policy_config["optimizer"]["kwargs"])
    return master_config.grpo.seed

def shape(cfg: RewardShapingConfig):
    return cfg.penalty
"""


def reads_of(source):
    return find_reads({"nemo_rl/grpo.py": ast.parse(source.lstrip("\n"))})


EXPECTED = {
    "policy.generation.top_p": [["nemo_rl/grpo.py", 8]],
    "policy.megatron_cfg.enabled": [["nemo_rl/grpo.py", 9]],
    "policy.optimizer.kwargs.lr": "passed on",
    "grpo.seed": [["nemo_rl/grpo.py", 11]],
    "grpo.reward_shaping.penalty": [["nemo_rl/grpo.py", 14]],
    "teacher.seed": "name",
    "grpo.filter_overlong_prompts": None,
}


@pytest.mark.parametrize("key", EXPECTED)
def test_the_line_that_reads_a_key_is_found(key):
    found = make_readers(reads_of(SOURCE), EXPECTED, ())
    assert found[key] == EXPECTED[key]


def test_a_declared_key_that_no_line_reads_is_told_from_one_that_is_read():
    read = SOURCE + "\ndef f(c):\n    return c.grpo.filter_overlong_prompts\n"
    found = make_readers(reads_of(read), ["grpo.filter_overlong_prompts"], ())
    assert found["grpo.filter_overlong_prompts"] is not None


def test_keys_that_recipes_set_and_nothing_reads_are_recorded():
    readers = load_readers()
    assert readers["grpo.zero_variance_prompt_filtering"] is None
    assert readers["policy.generation_batch_size"] is None
    assert readers["grpo.overlong_filtering"][0] == ["nemo_rl/algorithms/grpo.py", 3136]
    assert readers["loss_fn.ratio_clip_min"] and readers["dpo.reference_policy_kl_penalty"]


@pytest.mark.skipif("NEMO_RL_CHECKOUT" not in os.environ, reason="needs a checkout of NeMo RL")
def test_recorded_lines_name_their_key():
    lines = {}
    for key, places in load_readers().items():
        for file, line in places if isinstance(places, list) else ():
            path = Path(os.environ["NEMO_RL_CHECKOUT"], file)
            text = lines.setdefault(file, path.read_text().splitlines())
            near = "\n".join(text[max(0, line - 4) : line + 6])
            assert key.rpartition(".")[2] in near, (key, file, line)
