# SPDX-License-Identifier: Apache-2.0
"""requirements.txt, pyproject.toml and the wheel that `pip install .` builds."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from installed import build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_rl_ref"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT, TRANSITIVE = re.split(
    "^# What the above need.*$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M
)


def pins(text: str) -> dict[str, Requirement]:
    """The requirements in a part of requirements.txt, by normalized name."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(r.name) for r in requirements]
    assert len(set(names)) == len(names), "a package is pinned twice"
    return dict(zip(names, requirements, strict=True))


PINS = pins(DIRECT) | pins(TRANSITIVE)


def needed(names: set[str]) -> set[str]:
    """The packages that `names` need here, directly or not, by what is installed."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        found.add(key)
        for line in importlib.metadata.requires(name) or []:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    return {key.split("[")[0] for key in found}


COMPILE_KERNELS = {"cuda-core", "cuda-bindings", "cuda-pathfinder", "nvidia-cuda-nvrtc"}


def is_cuda(name: str) -> bool:
    """Whether only CUDA builds of PyTorch need it."""
    return name not in COMPILE_KERNELS and (
        name.startswith(("nvidia-", "cuda-")) or name == "triton"
    )


def test_every_line_is_an_exact_pin_and_explained():
    for name, requirement in PINS.items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", name
        assert not specifier.version.endswith("*"), name
        assert not is_cuda(name), f"{name} is only in CUDA builds of PyTorch"
    unexplained = [x for x in DIRECT.splitlines() if "==" in x and not re.search(r" # \w", x)]
    assert unexplained == []


def test_pins_are_what_is_installed():
    for name, requirement in PINS.items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert Version(importlib.metadata.version(name)) in requirement.specifier, name


def test_everything_needed_is_pinned_and_nothing_else():
    here = {n for n, r in PINS.items() if r.marker is None or r.marker.evaluate()}
    with_extras = {f"{n}[{','.join(r.extras)}]" for n, r in pins(DIRECT).items()}
    missing = {name for name in needed(with_extras) - here if not is_cuda(name)}
    assert missing == set()
    assert here - needed(with_extras) == set()


def imported_modules() -> dict[str, str]:
    """Every module that a file of ours imports, with one such file; not our own modules."""
    files = [ROOT / "conf.py"]
    for folder in ("nemo_rl_ref", "docs/_ext", "notebooks", "benchmarks", "tests"):
        files += sorted((ROOT / folder).rglob("*.py"))
    own = {"nemo_rl_ref"} | {f.stem for f in files} | {f.parent.name for f in files}
    own |= {f.stem for f in (ROOT / "docs").rglob("*.py")}  # launchers beside their pages
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.split(".")[0], str(file.relative_to(ROOT)))
    known = own | set(sys.stdlib_module_names)
    return {module: file for module, file in found.items() if module not in known}


#: What only the GPU benchmarks import, where it is installed, and the distribution it is part of.
PEERS = {
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}


#: What only `make referee` imports, besides NeMo RL from a checkout: what is pinned in
#: tests/referee/requirements.txt, and what pydantic brings.
REFEREE = {"nemo_automodel", "typing_extensions"}


def test_what_the_referee_needs_is_pinned_exactly_and_imported_by_it_alone():
    text = (ROOT / "tests/referee/requirements.txt").read_text(encoding="utf-8")
    assert "nemo-automodel" in pins(text) and not set(pins(text)) & set(pins(DIRECT))
    assert all(str(r.specifier).startswith("==") for r in pins(text).values())
    found = {m: file for m, file in imported_modules().items() if m in REFEREE}
    assert found.keys() == REFEREE
    assert all(file.startswith("tests/referee/") for file in found.values())


def test_what_make_lab_adds_is_pinned_exactly():
    lab = pins((ROOT / "requirements-lab.txt").read_text(encoding="utf-8"))
    assert lab and all(str(r.specifier).startswith("==") for r in lab.values())


def test_peers_are_pinned_exactly_and_imported_by_the_benchmarks_alone():
    text = (ROOT / "requirements-gpu.txt").read_text(encoding="utf-8")
    assert set(pins(text)) == set(PEERS.values())
    assert all(str(r.specifier).startswith("==") for r in pins(text).values())
    found = {m: file for m, file in imported_modules().items() if m in PEERS}
    assert found == dict.fromkeys(PEERS, "benchmarks/_peers.py")


def test_what_is_imported_is_chosen_by_hand():
    distributions = importlib.metadata.packages_distributions()
    for module, file in imported_modules().items():
        if module in PEERS or module in REFEREE:
            continue
        names = {canonicalize_name(name) for name in distributions.get(module, [])}
        assert names & set(pins(DIRECT)), f"{file} imports {module}: not in requirements.txt"


def extras() -> list[Requirement]:
    lines = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def test_pins_lie_within_the_projects_ranges():
    for requirement in extras():
        (pin,) = PINS[canonicalize_name(requirement.name)].specifier
        assert Version(pin.version) in requirement.specifier, str(requirement)


def test_python_versions_agree():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= v[:2] <= (3, 13)" in (ROOT / ".ci" / "venv.sh").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this state of the repository."""
    return build_wheel(tmp_path_factory.mktemp("a wheel"))


def test_wheel_holds_every_file_of_the_package(wheel):
    ours = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {str(p.relative_to(ROOT)) for p in ours if p.name != ".DS_Store"}
    beside = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/spaces").glob("*.yaml")]
    beside += (ROOT / "benchmarks/results").glob("*.json")
    beside += (ROOT / "notebooks/get_started").glob("my_*")
    expected |= {f"share/nemo-rl-ref/{p.relative_to(ROOT)}" for p in beside}
    assert any(name.endswith(".safetensors") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        names = {n.split(".data/data/")[-1] for n in archive.namelist() if ".dist-info/" not in n}
        assert names == expected
        assert any(n.endswith("dist-info/licenses/LICENSE") for n in archive.namelist())


def test_wheel_needs_only_torch_and_pydantic(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        info = zipfile.Path(archive, name.removesuffix("METADATA"))
        metadata = importlib.metadata.PathDistribution(info).metadata
    assert metadata["Name"] == "nemo-rl-ref"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] in (">=3.11,<3.14", "<3.14,>=3.11")
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    minimal = {r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert minimal == {"torch", "pydantic"}
    assert set(metadata.get_all("Provides-Extra")) == {
        "equations", "train", "tune", "ray", "kernels", "trl", "notebooks", "docs", "test",
        "upstream",
    }  # fmt: skip


def test_import_from_the_wheel_loads_no_trainer(wheel):
    """Also with the modules that every reader starts from, and from outside the repository."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import nemo_rl_ref; "
        "assert nemo_rl_ref.__file__.startswith(sys.argv[1]), nemo_rl_ref.__file__; "
        "import nemo_rl_ref.algorithms.loss, nemo_rl_ref.logprobs; "
        "import nemo_rl_ref.distributed.batched_data_dict; "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(wheel)], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    heavy = {"transformers", "trl", "accelerate", "datasets", "tokenizers", "matplotlib", "rich"}
    assert "torch" in loaded
    assert loaded & heavy == set()
