# SPDX-License-Identifier: Apache-2.0
"""What the trainers mirror of NeMo RL outside its algorithms: names and signatures."""

import ast
import inspect
import subprocess
import sys
import textwrap

import pytest

from nemo_rl_ref.data import interfaces, processors
from nemo_rl_ref.data.datasets import preference_datasets, response_datasets, utils
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils import checkpoint, logger, timer

SYMBOLS = load_manifest()["symbols"]
MIRRORED = [
    value
    for module in (checkpoint, logger, timer)
    for value in vars(module).values()
    if getattr(value, "__module__", None) == module.__name__ and not value.__name__.startswith("_")
] + [
    interfaces.TaskDataSpec,
    processors.preference_preprocessor,
    processors.sft_processor,
    preference_datasets.load_preference_dataset,
    response_datasets.load_response_dataset,
    response_datasets.OpenAIFormatDataset,
    response_datasets.ResponseDataset,
    utils.update_single_dataset_config,
    utils.warn_on_unsupported_dataset_config_keys,
]
#: Methods that NeMo RL has in a class's base.
INHERITED = {"ResponseDataset": {"split_train_validation"}}


def signature_of(node):
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(node.args)})"


@pytest.mark.parametrize("symbol", MIRRORED, ids=lambda symbol: symbol.__qualname__)
def test_name_and_signature(symbol):
    path = f"{symbol.__module__}.{symbol.__qualname__}".replace("nemo_rl_ref", "nemo_rl", 1)
    assert path in SYMBOLS, f"NeMo RL has no {path}: what it does not have belongs elsewhere"
    node = ast.parse(textwrap.dedent(inspect.getsource(symbol))).body[0]
    if isinstance(node, ast.FunctionDef):
        assert signature_of(node) == SYMBOLS[path]["signature"]
        return
    methods = {
        item.name: signature_of(item)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
        and (not item.name.startswith("_") or item.name == "__init__")
    }
    expected = {name: entry["signature"] for name, entry in SYMBOLS[path]["methods"].items()}
    own = methods.keys() - INHERITED.get(symbol.__name__, set())
    assert {name: methods[name] for name in own} == {name: expected.get(name) for name in own}


def test_the_list_is_not_empty():
    names = {symbol.__name__ for symbol in MIRRORED}
    assert names >= {"CheckpointManager", "Logger", "TimeoutChecker", "get_next_experiment_dir"}


def test_the_trainers_import_without_the_libraries_of_a_run():
    """Whoever only reads a loss needs none of them."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'trl', 'omegaconf', 'hydra', 'rich', 'accelerate', 'yaml',\n"
        "             'datasets', 'tensorboard', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from nemo_rl_ref import run_dpo, run_grpo, run_rm, run_sft\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
