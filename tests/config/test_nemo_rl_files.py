# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's own configurations: runnable with another model, other data and sizes, or refused.

Those in ``examples/configs`` itself are in the manifest. With ``NEMO_RL_CHECKOUT`` set to a checkout
of NeMo RL, its recipes are tried, too.
"""

import contextlib
import io
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from omegaconf import OmegaConf
from rl_runs import write_problems
from trainer_runs import make_config

from nemo_rl_ref import run_dpo, run_grpo, run_rm, run_sft, tiny
from nemo_rl_ref.config.keys import key_exists
from nemo_rl_ref.training.loop import Run
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils.config import load_config, register_omegaconf_resolvers

TRAINERS = {"sft": run_sft, "dpo": run_dpo, "rm": run_rm, "grpo": run_grpo, "ppo": run_grpo}
CONFIGS = load_manifest()["configs"]


@pytest.fixture
def dry(monkeypatch):
    """Everything but the steps, without messages."""
    monkeypatch.setattr(Run, "train", lambda run: {"validation": {}})
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register_omegaconf_resolvers()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


def overrides(section, config, folder):
    """Another model, other data, and sizes that fit them."""
    lines = {
        "policy.model_name": tiny.MODEL,
        "policy.tokenizer.name": tiny.MODEL,
        "policy.train_global_batch_size": 8,
        "policy.train_micro_batch_size": 8,
        "policy.max_total_sequence_length": 4096,
        "data.max_input_seq_length": 4096,
        "checkpointing.checkpoint_dir": folder / "checkpoints",
        "logger.log_dir": folder / "logs",
    }
    if section in ("grpo", "ppo"):
        lines |= {f"{section}.num_prompts_per_step": 4, f"{section}.num_generations_per_prompt": 2}
        lines |= {f"{section}.val_batch_size": 8, f"{section}.max_val_samples": 8}
        lines |= {"policy.logprob_batch_size": 8, "policy.generation.max_new_tokens": 8}
        path = write_problems(folder)
        data = f"{{dataset_name: ResponseDataset, data_path: '{path}', env_name: math}}"
    else:
        entry = make_config(section, folder)["data"]["train"]
        data = f"{{dataset_name: {entry['dataset_name']}, data_path: '{entry['data_path']}'}}"
    if section == "ppo":
        lines |= {f"value.train_{size}_batch_size": 8 for size in ("global", "micro")}
        lines["value.model_name"] = tiny.MODEL
    parts = ("train", "validation", "default")
    gone = [f"~data.{part}" for part in parts if OmegaConf.select(config, f"data.{part}")]
    new = [f"++data.{part}={data}" for part in parts[:2]]
    quoted = {k: v if isinstance(v, int) else f"'{v}'" for k, v in lines.items()}
    return [*gone, *new, *(f"++{key}={value}" for key, value in quoted.items())]


def tried(path, folder):
    """What becomes of a configuration: "runs", or the error."""
    config = load_config(path)
    OmegaConf.to_container(config, resolve=False)
    section = next((name for name in TRAINERS if name in config), None)
    lines = overrides(section, config, folder) if section else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = TRAINERS.get(section, run_grpo).main(["--config", str(path), *lines])
    return "runs" if status == 0 else err.getvalue()


def names_what_is_missing(error):
    """Whether every problem of an error is a key of NeMo RL's, or the section of another program."""
    assert error.startswith("error: "), error
    lines = re.sub(r"^error: (/[^:]*\.yaml: (?=[a-z_.]+: ))?", "", error).splitlines()
    if lines[0].endswith("keys that cannot be used:"):
        lines = [line.strip() for line in lines[1:]]
    if lines[0].startswith("ppo or grpo: not set, expected a mapping; the configuration has "):
        return True
    keys = [line.partition(": ")[0] for line in lines if not line.startswith("(a key of your own")]
    return all(key_exists(key) for key in keys)


def write(name, folder):
    """A configuration of the manifest as a file, beside those it inherits from."""
    for other, flat in CONFIGS.items():
        tree = {}
        for key, value in flat.items():
            *path, last = key.split(".")
            place = tree
            for part in path:
                place = place.setdefault(part, {})
            # The manifest has numbers such as 1e-5 as YAML 1.1 reads them, as text.
            is_number = isinstance(value, str) and re.fullmatch(r"-?[\d.]+e-?\d+", value)
            place[last] = float(value) if is_number else value
        OmegaConf.save(OmegaConf.create(tree), folder / other)
    return folder / name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_the_manifest_runs_or_says_what_is_missing(name, dry, tmp_path):
    result = tried(write(name, tmp_path), tmp_path)
    print(name, result)
    assert result == "runs" or names_what_is_missing(result), result


@pytest.mark.filterwarnings("ignore")
def test_every_configuration_of_a_checkout_runs_or_says_what_is_missing(dry, tmp_path):
    checkout = os.environ.get("NEMO_RL_CHECKOUT") or os.environ.get("CHECKOUT")
    if not checkout:
        pytest.skip("neither NEMO_RL_CHECKOUT nor CHECKOUT names a checkout of NeMo RL")
    paths = sorted(Path(checkout, "examples/configs").rglob("*.yaml"))
    results = {}
    for number, path in enumerate(paths):
        (folder := tmp_path / str(number)).mkdir()
        results[str(path)] = tried(path, folder)
    bad = {
        path: result
        for path, result in results.items()
        if result != "runs" and not names_what_is_missing(result)
    }
    print(Counter(result[:200] for result in results.values()).most_common())
    assert len(paths) > 200 and not bad
