# SPDX-License-Identifier: Apache-2.0
"""What makes the files in `custom` usable in NeMo RL after a change of the import prefix."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl_ref.upstream import load_manifest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in (ROOT / "nemo_rl_ref" / "custom").glob("*.py") if path.name != "__init__.py"
)
IDS = [path.stem for path in FILES]


def imported_names(path):
    """(module, name) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import does not survive copying"
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_are_in_nemo_rl(path):
    """By the manifest: the name is defined at or below the module it is imported from."""
    symbols = load_manifest()["symbols"]
    for module, name in imported_names(path):
        top = module.split(".")[0]
        if top != "nemo_rl_ref":
            assert top in {"torch", *sys.stdlib_module_names}, module
            continue
        below = module.replace("nemo_rl_ref", "nemo_rl", 1) + "."
        assert any(key.startswith(below) and key.endswith(f".{name}") for key in symbols), (
            f"{path.name} imports {name} from {module}, which NeMo RL does not have"
        )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_loss_cites_its_source_and_declares_its_needs(path):
    module = importlib.import_module(f"nemo_rl_ref.custom.{path.stem}")
    bases = {"PairLossFn", "ReferenceFreeLossFn"}
    losses = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name not in bases
    ]
    assert losses
    for loss in losses:
        assert "Source:" in loss.__doc__ and "https://" in loss.__doc__, loss
        assert ".. math::" in loss.__doc__ or "====" in loss.__doc__, loss
        needs = getattr(loss, "needs_data", ())
        assert isinstance(needs, tuple)
        for key in needs:
            assert f"``{key}``" in loss.__doc__, (loss, key)


def test_import_is_light():
    modules = ", ".join(f"nemo_rl_ref.custom.{path.stem}" for path in FILES)
    forbidden = ["transformers", "trl", "accelerate", "datasets"]
    code = f"import sys, {modules}; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
