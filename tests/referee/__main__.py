# SPDX-License-Identifier: Apache-2.0
"""Run NeMo RL's training loops and unit tests beside this project: ``make referee CHECKOUT=…``.

Results go to ``benchmarks/results/referee.json``, a variant at a time; a variant that is there is
not run again, unless ``--again`` is given or the checkout is of another commit.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import compare
import unit
from variants import VARIANTS

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS = ROOT / "benchmarks/results/referee.json"
WORK = ROOT / "_build/referee"
VENV = ROOT / "_build/referee-venv"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", required=True, type=Path, help="a folder with NeMo RL")
    parser.add_argument("--commit", help="its commit, if the folder is not a git checkout")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--here", action="store_true", help="not NeMo RL's side, if it has run")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args()
    checkout = options.checkout.absolute()
    if not (checkout / "nemo_rl/algorithms").is_dir():
        parser.error(f"--checkout: {checkout} has no nemo_rl/algorithms")
    commit = options.commit or commit_of(checkout)
    if commit is None:
        parser.error(f"--checkout: {checkout} is no git checkout; give its commit with --commit")
    python = environment()
    wanted = [name for name in VARIANTS if options.only in name]
    done = read(commit)["variants"]
    for name in wanted:
        if name not in done or done[name]["unexplained"] or options.again or options.here:
            write(commit, "variants", name, run(name, checkout, python, options.here), VARIANTS)
    tests, done = unit.files(checkout), read(commit)["unit_tests"]
    for name in tests:
        if options.only in name and (name not in done or options.again):
            write(commit, "unit_tests", name, run_unit_tests(name, checkout, python), tests)
    results = read(commit)
    bad = [name for name in wanted if results["variants"][name]["unexplained"]]
    for name in bad:
        print(f"{name}:", *results["variants"][name]["unexplained"][:8], sep="\n  ")
    print(f"{len(wanted) - len(bad)} of {len(wanted)} variants agree; {RESULTS.relative_to(ROOT)}")
    return 1 if bad else 0


def run_unit_tests(name, checkout, python):
    """Run a file of NeMo RL's unit tests against the mirror."""
    WORK.mkdir(parents=True, exist_ok=True)
    found = unit.run(name, checkout, python, WORK)
    skipped, failed = sum(found["not applicable"].values()), len(found["failed"])
    print(
        f"{name}: {found['passed']} passed, {skipped} not applicable, {failed} failed", flush=True
    )
    return found


def commit_of(folder):
    """The commit of a git checkout; None if it is none."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def environment():
    """The interpreter of an environment with what NeMo RL imports on top of this one's packages."""
    wanted, key = FOLDER / "requirements.txt", VENV / "made-from.txt"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest() + sys.prefix
    python = VENV / "bin/python"
    if not key.exists() or key.read_text() != digest:
        print(f"making {VENV.relative_to(ROOT)}", flush=True)
        venv.create(VENV, clear=True, with_pip=True)
        shared = [path for path in sys.path if path.endswith("site-packages")]
        (site,) = VENV.glob("lib/python*/site-packages")
        (site / "this-project.pth").write_text("".join(f"{path}\n" for path in shared))
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", wanted]
        subprocess.run(install, check=True)
        key.write_text(digest)
    return python


def read(commit):
    """The results there are of this commit of NeMo RL."""
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
        if results["nemo_rl"] == commit:
            return results
    return {"nemo_rl": commit, "bound": compare.BOUND, "variants": {}, "unit_tests": {}}


def write(commit, part, name, found, order):
    """Add a result in one step, so that the file is whole whenever the run is stopped."""
    from nemo_rl_ref.files.whole import write_text

    results = read(commit)
    of_part = {**results[part], name: found}
    results[part] = {known: of_part[known] for known in order if known in of_part}
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")


def stamp():
    """Date, commit and versions of what runs now."""
    packages = ("torch", "transformers", "accelerate")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit_of(ROOT),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def run(name, checkout, python, here=False):
    """Run a variant on both sides, each in a process, and compare what they did."""
    print(f"{name} …", end=" ", flush=True)
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    records = {}
    for side, interpreter in (("nemo_rl", python), ("here", sys.executable)):
        folder = WORK / slug / side
        out = folder / "record.json"
        if not (here and side == "nemo_rl" and out.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            command = [interpreter, FOLDER / "side.py", folder, side, name, checkout]
            with open(folder / "output.txt", "w") as output:
                status = subprocess.run(
                    list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, check=False,
                    env={**os.environ, "GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": "1"},
                ).returncode  # fmt: skip
            if status:
                last = (folder / "output.txt").read_text().splitlines()[-1:]
                print("failed", flush=True)
                return {**stamp(), "unexplained": [f"{side} failed: {' '.join(last)}"]}
        records[side] = json.loads(out.read_text())
    found = compare.compare(records["nemo_rl"], records["here"])
    largest = max(found["largest"].values(), default=0.0)
    print(f"{len(found['unexplained'])} unexplained; largest difference {largest:.1e}", flush=True)
    return {**stamp(), **found}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
