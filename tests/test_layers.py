# SPDX-License-Identifier: Apache-2.0
"""Which folder may import which, and that no private name is used outside its folder.

The contracts are in ``pyproject.toml``, under ``[tool.importlinter]``.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Names with an underscore that are public, those of named tuples.
PUBLIC = {"_asdict", "_fields", "_make", "_replace"}
#: Private names that are used outside their folder, by file, and why.
EXCEPTIONS = {
    # They measure the operators themselves. The mirror has no public name for them: NeMo RL's
    # names are those of the loss and the estimator around them.
    "benchmarks/_peers.py": {
        "nemo_rl_ref.algorithms._recurrence",
        "nemo_rl_ref.algorithms.loss._clipped_pg_terms",
    },
    "benchmarks/bench_kernels.py": {"nemo_rl_ref.algorithms.loss._clipped_pg_terms"},
    # Measures the estimator with another recurrence in its place.
    "benchmarks/bench_gae.py": {"nemo_rl_ref.algorithms._gae"},
    # Records for the site what the tests compare with TRL.
    "benchmarks/record_drift.py": {"nemo_rl_history"},
    "benchmarks/record_trl_differences.py": {"trl_differences"},
}


def lint_imports(folder):
    """Run import-linter on the package in a folder, with the contracts there."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_every_import_fits_the_layers():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("data/collate_fn.py", "import nemo_rl_ref.algorithms.utils", "A file imports"),
        ("kernels/gae.py", "import nemo_rl_ref.files.whole", "A file imports"),
        ("doctor/__init__.py", "", "A file imports"),
        ("custom/batch.py", "import nemo_rl_ref.logprobs", "custom/ imports"),
        ("rl/trainer.py", "import nemo_rl_ref.algorithms._gae", "A private module"),
    ],
)
def test_an_import_that_does_not_fit_is_found(tmp_path, file, line, contract):
    only_code = shutil.ignore_patterns("__pycache__", "assets", "*.json")
    shutil.copytree(ROOT / "nemo_rl_ref", tmp_path / "nemo_rl_ref", ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "nemo_rl_ref" / file
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as text:
        text.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    (broken,) = [text for text in done.stdout.splitlines() if text.endswith(" BROKEN")]
    assert done.returncode == 1 and broken.startswith(contract)


@pytest.mark.parametrize(
    "path", (ROOT / "nemo_rl_ref" / "files").glob("*.py"), ids=lambda p: p.stem
)
def test_files_needs_the_standard_library_only(path):
    """Where a file is imported; a function may import what it reads a format with."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert name.split(".")[0] in {"nemo_rl_ref", *sys.stdlib_module_names}, name


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def crossing_names(text, file):
    """Every private name of the package, and module of the tests, that a file takes from elsewhere.

    Args:
        text: Of the file.
        file: Its path from the root.

    Yields:
        Dotted names.
    """
    here = file.rpartition("/")[0].replace("/", ".")
    tree, names, local = ast.parse(text), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            local |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names]
            local |= {a.asname: a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            names.append(f"{local.get(first, first)}.{rest}")
    for name in {*names, *local.values()}:
        top, *rest = name.split(".")
        if top == "tests" or (ROOT / "tests" / "help" / f"{top}.py").exists():
            yield top
        at = next((n for n, part in enumerate(rest) if private(part)), None)
        if top == "nemo_rl_ref" and at is not None:
            home = [top, *rest[:at]]  # a module, or a folder
            if not ROOT.joinpath(*home).is_dir():
                home.pop()
            if ".".join(home) != here:
                yield ".".join([top, *rest[: at + 1]])


def test_no_private_name_crosses_a_folder():
    files = [ROOT / "conf.py"]
    for folder in ("nemo_rl_ref", "notebooks", "docs", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    found = {}
    for path in files:
        file = path.relative_to(ROOT).as_posix()
        if names := set(crossing_names(path.read_text(encoding="utf-8"), file)):
            found[file] = names
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    "text",
    [
        "from nemo_rl_ref.kernels.loader import _key",
        "from nemo_rl_ref.kernels import loader\nloader._key('a')",
        "import nemo_rl_ref.kernels.loader as x\nx._key('a')",
        "import nemo_rl_ref.kernels.loader\nnemo_rl_ref.kernels.loader._key('a')",
        "from nemo_rl_ref.algorithms.loss import _nll",
        "from nemo_rl_ref.algorithms.loss._nll import NLLLossFn",
        "def f():\n    from nemo_rl_ref.algorithms.loss import NLLLossFn as L\n    L._check(1)",
        "from tests.help import studies",
        "import studies",
    ],
)
def test_a_private_name_from_another_folder_is_found(text):
    for file in ("nemo_rl_ref/rl/trainer.py", "nemo_rl_ref/algorithms/utils.py", "notebooks/x.py"):
        assert list(crossing_names(text, file)), file
