# SPDX-License-Identifier: Apache-2.0
"""The package as `pip install .` leaves it, away from the repository."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("nemo_rl_ref", "configs", "benchmarks/results", "notebooks/get_started")


def pip(*arguments: str, folder: Path) -> None:
    """Run pip without a network."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(folder: Path) -> Path:
    """Build the wheel, from a copy so that no build folder is left in the repository."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in BUILT_FROM:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip("wheel", ".", "--no-build-isolation", "-w", str(folder), folder=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a folder; return what Python needs on its path to find it."""
    pip("install", "--prefix", str(folder), str(wheel), folder=folder.parent)
    at = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    assert Path(at, "nemo_rl_ref").is_dir()
    return Path(at)
