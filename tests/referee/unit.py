# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's own unit tests against the mirror, see `mirror`: outcomes by file."""

import json
import os
import subprocess
from pathlib import Path

FOLDERS = ("algorithms", "utils", "data", "distributed")
#: Seconds for one file; a few wait for processes on GPUs that never start.
LIMIT = 300


def files(checkout):
    """The test files, relative to ``tests/unit``."""
    top = Path(checkout) / "tests/unit"
    found = [path for folder in FOLDERS for path in sorted((top / folder).rglob("test_*.py"))]
    return [path.relative_to(top).as_posix() for path in found]


def run(name, checkout, python, work):
    """Run a test file against the mirror.

    Tests that fail, but fail just so with NeMo RL itself, need what this machine does not have.

    Returns:
        ``passed``, a number; ``not applicable``, numbers by reason; ``failed``, messages by test.
    """
    found = _pytest([name], checkout, python, work, {})
    reasons, failed = dict(found["not applicable"]), found["failed"]
    names = [f"{name}::{test}" for test in failed if test != "collection"]
    if names:
        real = _pytest(names, checkout, python, work, {"REFEREE_CHECKOUT": str(checkout)})
        for test in [test for test in failed if test not in real["passed"]]:
            reason = "fails with NeMo RL itself on this machine"
            reasons[reason] = reasons.get(reason, 0) + 1
            del failed[test]
    return {"passed": len(found["passed"]), "not applicable": reasons, "failed": failed}


def _pytest(names, checkout, python, work, environment):
    here, top = Path(__file__).parent, Path(checkout)
    out = work / f"{os.getpid()}.outcomes.json"
    out.unlink(missing_ok=True)
    paths = [here.parents[1], here, top]
    command = [
        python, "-m", "pytest", "-p", "mirror", "--noconftest", "-c", "/dev/null", "-q",
        "--rootdir", top, "-p", "no:cacheprovider", *(f"tests/unit/{name}" for name in names),
    ]  # fmt: skip
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "REFEREE_OUTCOMES": str(out),
        "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1", **environment,
    }  # fmt: skip
    with open(work / "output.txt", "w") as output:
        try:
            subprocess.run(
                list(map(str, command)), cwd=top, env={**os.environ, **variables}, stdout=output,
                stderr=subprocess.STDOUT, timeout=LIMIT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            output.write("stopped: took too long\n")
    if out.exists():
        found = json.loads(out.read_text())
        out.unlink()
        return found
    last = (work / "output.txt").read_text().strip().splitlines()[-1:]
    return {"passed": [], "not applicable": {}, "failed": {"collection": " ".join(last)}}
