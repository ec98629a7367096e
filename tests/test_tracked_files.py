# SPDX-License-Identifier: Apache-2.0
"""What git tracks: text, and binary files in the asset folders alone."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASSETS = ("assets", "_static")
TOP = {
    "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "benchmarks", "conf.py",
    "configs", "docs", "nemo_rl_ref", "notebooks", "pyproject.toml", "requirements-gpu.txt",
    "requirements-lab.txt", "requirements.txt", "tests",
}  # fmt: skip


def tracked(folder: Path) -> list[str]:
    """The paths that git tracks in a folder, with ``/``."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if name]


def strays(folder: Path) -> list[str]:
    """Tracked binary files outside the asset folders; what Git itself takes for binary."""
    names = [n for n in tracked(folder) if not set(Path(n).parts[:-1]) & set(ASSETS)]
    files = [name for name in names if (folder / name).is_file()]
    return [name for name in files if b"\0" in (folder / name).read_bytes()[:8000]]


def test_binary_files_lie_in_asset_folders():
    assert strays(ROOT) == []


def test_a_wheel_at_the_top_is_noticed(tmp_path):
    (tmp_path / "assets").mkdir()
    for name in ("some-1.0-py3-none-any.whl", "assets/model.safetensors"):
        (tmp_path / name).write_bytes(b"PK\3\4\0\0")
    (tmp_path / "notes.md").write_text("text")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert strays(tmp_path) == ["some-1.0-py3-none-any.whl"]


def test_the_top_level_is_what_the_readme_says():
    names = {name.split("/")[0] for name in tracked(ROOT)}
    assert {name for name in names if not name.startswith(".")} <= TOP
