# SPDX-License-Identifier: Apache-2.0
"""What makes the files in `custom` usable in NeMo RL after a change of the import prefix."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl_ref.export.slice import NotAlone, whole_class
from nemo_rl_ref.upstream import load_manifest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in (ROOT / "nemo_rl_ref" / "custom").glob("*.py") if path.name != "__init__.py"
)
IDS = [path.stem for path in FILES]


def imported_names(text):
    """(module, name) of every import in a text, wherever it stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not survive copying"
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_are_in_nemo_rl(path):
    """By the manifest: the name is defined at or below the module it is imported from."""
    symbols = load_manifest()["symbols"]
    for module, name in imported_names(path.read_text(encoding="utf-8")):
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


def blocks(prefix):
    """What the site offers to copy, by class: every class of `custom`, complete."""
    return {
        node.name: whole_class(path.read_text(encoding="utf-8"), node.name, prefix)
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def what_goes_wrong(texts, package, folder):
    """Run texts where nothing but torch, pydantic and one package can be imported."""
    given = os.environ.get("NEMO_RL_PYTHON") if package == "nemo_rl" else None
    command = [
        given or sys.executable,
        str(ROOT / "tests" / "help" / "run_blocks.py"),
        package,
        str(folder),
    ]
    done = subprocess.run(
        command, input=json.dumps(texts), cwd="/", capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_each_copied_loss_runs_with_torch_and_the_mirror_alone():
    """Its example, too. Shown once on texts that import or lack something else."""
    bad = {
        "A": "import transformers\nclass A: pass",
        "B": "from nemo_rl_ref.custom.pairwise import PairLossFn\nclass B(PairLossFn): pass",
        "C": "class C(PairLossFn): pass",
    }
    wrong = what_goes_wrong(blocks("nemo_rl_ref") | bad, "nemo_rl_ref", ROOT)
    assert wrong.keys() == bad.keys(), wrong
    assert "transformers is out of reach" in wrong["A"] and "custom is out of" in wrong["B"]
    assert "'PairLossFn' is not defined" in wrong["C"]


def test_each_copied_loss_imports_what_nemo_rl_has():
    symbols = load_manifest()["symbols"]
    for loss, text in blocks("nemo_rl").items():
        assert "nemo_rl_ref" not in text
        for module, name in imported_names(text):
            if module.split(".")[0] == "nemo_rl":
                found = [
                    k for k in symbols if k.startswith(f"{module}.") and k.endswith(f".{name}")
                ]
                assert found, f"{loss} imports {name} from {module}, which NeMo RL does not have"


def test_each_copied_loss_runs_in_nemo_rl():
    """With `NEMO_RL_PYTHON`, a Python in which the checkout can be imported, if this one is not."""
    checkout = os.environ.get("NEMO_RL_CHECKOUT")
    if not checkout:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    assert what_goes_wrong(blocks("nemo_rl"), "nemo_rl", checkout) == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1", "A: the file defines no class or function"),
        ("class A(B): pass", "uses B, which is defined nowhere"),
        ("from . import b\nclass A(b.B): pass", "imports from '.'; a file alone has no folder"),
    ],
)
def test_what_cannot_stand_alone_is_refused(text, why):
    with pytest.raises(NotAlone, match=why):
        whole_class(text, "A")
