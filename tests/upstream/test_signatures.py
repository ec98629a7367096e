# SPDX-License-Identifier: Apache-2.0
"""Every public symbol of the mirror against NeMo RL's manifest.

The walk finds symbols by itself: what is added under ``nemo_rl_ref.algorithms`` or
``nemo_rl_ref.distributed`` is compared from then on, and fails if NeMo RL does not have it.
"""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pydantic
import pytest

import nemo_rl_ref.algorithms
import nemo_rl_ref.distributed
from nemo_rl_ref.upstream import load_manifest

SYMBOLS = load_manifest()["symbols"]
PACKAGES = (nemo_rl_ref.algorithms, nemo_rl_ref.distributed)

# What a mirrored class has in NeMo RL and not here, and why.
LEFT_OUT = {
    "nemo_rl.distributed.batched_data_dict.BatchedDataDict": {
        "__init__": "inherited; NeMo RL's sets attributes for packed batches",
        "ADDITIONAL_OPTIONAL_KEY_TENSORS": "packed media",
        "_PIXEL_DTYPE_CAST_KEYS": "packed media",
        "get_multimodal_dict": "packed media",
        "get_microbatch_iterator_dynamic_shapes_len": "dynamic batching",
        "make_microbatch_iterator_with_dynamic_shapes": "dynamic batching",
        "get_microbatch_iterator_for_packable_sequences_len": "sequence packing",
        "make_microbatch_iterator_for_packable_sequences": "sequence packing",
    },
}


def public_modules(package):
    """The package and all modules below it whose path has no leading underscore."""
    yield package
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "._" not in info.name:
            yield importlib.import_module(info.name)


def mirrored_symbols():
    """Each public class and function defined in the mirror, with all paths that lead to it.

    A symbol defined in a private file has the paths of the public modules that import it.
    """
    found = {}
    for package in PACKAGES:
        for module in public_modules(package):
            for name, value in vars(module).items():
                is_code = inspect.isclass(value) or inspect.isfunction(value)
                if (
                    is_code
                    and not name.startswith("_")
                    and value.__module__.startswith(tuple(package.__name__ for package in PACKAGES))
                ):
                    path = f"{module.__name__}.{name}".replace("nemo_rl_ref", "nemo_rl", 1)
                    found.setdefault(value, set()).add(path)
    return found


MIRRORED = mirrored_symbols()


def signature_of(node):
    """A signature as the manifest writes it: defaults, no annotations."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(node.args)})"


def describe(symbol):
    """A symbol in the manifest's terms, read from its source."""
    node = ast.parse(textwrap.dedent(inspect.getsource(symbol))).body[0]
    if isinstance(node, ast.FunctionDef):
        return {"kind": "function", "signature": signature_of(node)}
    fields, methods = {}, {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            if not item.name.startswith("_") or item.name in ("__init__", "__call__"):
                methods[item.name] = {"signature": signature_of(item)}
        elif isinstance(item, ast.AnnAssign):
            fields[item.target.id] = {"type": ast.unparse(item.annotation)}
            if item.value is not None:
                fields[item.target.id]["default"] = ast.unparse(item.value)
        elif isinstance(item, ast.Assign):
            fields[item.targets[0].id] = {"default": ast.unparse(item.value)}
    bases = [ast.unparse(base) for base in node.bases]
    return {"kind": "class", "bases": bases, "fields": fields, "methods": methods}


def expected_description(path):
    """The manifest's entry without positions and without what is left out here."""
    left_out = LEFT_OUT.get(path, {})
    entry = {key: value for key, value in SYMBOLS[path].items() if key not in ("file", "line")}
    if entry["kind"] == "class":
        entry["fields"] = {k: v for k, v in entry["fields"].items() if k not in left_out}
        entry["methods"] = {
            name: {"signature": method["signature"]}
            for name, method in entry["methods"].items()
            if name not in left_out
        }
    return entry


@pytest.mark.parametrize("symbol", MIRRORED, ids=lambda symbol: symbol.__qualname__)
def test_symbol_matches_manifest(symbol):
    known = sorted(MIRRORED[symbol] & SYMBOLS.keys())
    assert known, (
        f"NeMo RL has none of {sorted(MIRRORED[symbol])}: what it does not have belongs elsewhere"
    )
    for path in known:
        assert describe(symbol) == expected_description(path), path


CONFIGS = [s for s in MIRRORED if inspect.isclass(s) and issubclass(s, pydantic.BaseModel)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_config_defaults(config):
    """The defaults once more, as pydantic has them at run time."""
    (path,) = [path for path in MIRRORED[config] if path in SYMBOLS]
    fields = SYMBOLS[path]["fields"]
    assert config.model_fields.keys() == fields.keys()
    for name, field in config.model_fields.items():
        if field.is_required():
            assert "default" not in fields[name], name
        elif field.default_factory is not None:
            # A sub-configuration: the factory's name, or what a lambda calls with constants.
            written = ast.parse(fields[name]["default"], mode="eval").body.keywords[0].value
            if isinstance(written, ast.Name):
                assert field.default_factory.__name__ == written.id, name
            else:
                arguments = {k.arg: ast.literal_eval(k.value) for k in written.body.keywords}
                assert field.default_factory() == arguments, name
        else:
            default = fields[name]["default"]
            if default.startswith("Field("):
                default = default.removeprefix("Field(default=").split(",")[0]
            assert field.default == ast.literal_eval(default), name


def test_the_walk_finds_what_is_there():
    """Guards the walk itself: symbols in private files, in packages and in modules."""
    names = {symbol.__qualname__ for symbol in MIRRORED}
    assert names >= {
        *("NLLLossFn", "PreferenceLossFn", "PreferenceLossDataDict"),
        *("DPOLossFn", "DPOLossConfig", "DPOLossDataDict"),
        *("LossFunction", "LossType", "LossInputType", "MetricNormalizer"),
        *("calculate_kl", "masked_mean", "BatchedDataDict", "SlicedDataDict"),
    }
    assert "DPOLossConfig" in {config.__qualname__ for config in CONFIGS}


def test_left_out_is_still_true():
    """Nothing is listed as left out that NeMo RL does not have or that is here by now."""
    for path, names in LEFT_OUT.items():
        entry = SYMBOLS[path]
        (symbol,) = [symbol for symbol, paths in MIRRORED.items() if path in paths]
        here = describe(symbol)
        for name in names:
            assert name in entry["fields"] or name in entry["methods"], name
            assert name not in here["fields"] and name not in here["methods"], name


def test_protocol_is_not_re_exported():
    """As in NeMo RL: the protocol and its enums come from `interfaces` only."""
    package = importlib.import_module("nemo_rl_ref.algorithms.loss")
    for name in ("LossFunction", "LossType", "LossInputType", "MetricNormalizer"):
        assert not hasattr(package, name)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("nemo_rl_ref", ["torch", "pydantic", "transformers", "trl"]),
        ("nemo_rl_ref.algorithms.loss", ["transformers", "trl", "accelerate", "datasets"]),
        ("nemo_rl_ref.logprobs", ["transformers", "trl", "pydantic"]),
    ],
)
def test_import_is_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
