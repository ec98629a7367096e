# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` does on a machine with a GPU: tests, sanitizers, notebooks, benchmarks.

Every step runs, also after one that failed. The benchmarks write
benchmarks/results/<device>.json. The exit status is 0 if nothing failed.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = ("tests", "sanitizers", "notebooks", "benchmarks")
SANITIZED = "tests/gpu/sanitized_calls.py"
KERNELS = ("token_logprobs", "gae", "clipped_pg")


def missing():
    """What a run needs and does not have, in a few words; None if nothing."""
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no GPU; does nvidia-smi list one?"
    from nemo_rl_ref.kernels import loader

    return loader.unavailable(torch.device("cuda"))


def absent_peers():
    """The pinned peers of the benchmarks that are not installed in the pinned version."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements-gpu.txt").read_text(), re.M)
    found = []
    for name, version in pins:
        try:
            if importlib.metadata.version(name) != version:
                found.append(f"{name} {version}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} {version}")
    return found


def commands(step):
    """The commands of a step, each a list, with the name under which it is reported."""
    python = sys.executable
    if step == "tests":
        yield "the kernels' tests", [python, "-m", "pytest", "tests/kernels", "tests/gpu"]
    elif step == "sanitizers":
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            print("left out: compute-sanitizer is not on the path; it comes with the CUDA toolkit")
            return
        for check in ("memcheck", "racecheck"):
            # Errors of API calls reach Python by themselves. Those that cuda-bindings gets when
            # it looks for functions that an older driver does not have are none.
            options = ["--error-exitcode", "1", "--tool", check, "--report-api-errors", "no"]
            for kernel in KERNELS:  # not PyTorch's own
                options += ["--kernel-name", f"kernel_substring={kernel}"]
            yield f"compute-sanitizer {check}", [tool, *options, python, SANITIZED]
    elif step == "notebooks":
        for notebook in sorted(ROOT.glob("notebooks/*.py")):
            yield f"notebooks/{notebook.name}", [python, f"notebooks/{notebook.name}"]
    else:
        if peers := absent_peers():
            print(f"absent peers: {', '.join(peers)}: pip install -r requirements-gpu.txt")
        for script in sorted(ROOT.glob("benchmarks/bench_*.py")):
            name = f"benchmarks/{script.name}"
            yield name, [python, name, "--write"]


def main():
    """Run the steps; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; all")
    arguments = parser.parse_args()
    for step in arguments.steps:
        if step not in STEPS:
            parser.error(f"{step}: no such step; there are {', '.join(STEPS)}")
    sys.path.insert(0, str(ROOT))
    if lack := missing():
        print(f"error: no GPU to run on: {lack}", file=sys.stderr)
        return 1
    results = []
    for step in arguments.steps or STEPS:
        environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        if step == "sanitizers":  # memory of its own for every tensor: accesses beyond it are seen
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        for name, command in commands(step):
            print(f"\n== {name}", flush=True)
            start = time.monotonic()
            status = subprocess.run(command, cwd=ROOT, env=environment).returncode
            results.append((name, status, time.monotonic() - start))
    print()
    for name, status, seconds in results:
        print(f"{'ok' if status == 0 else f'failed ({status})':12} {seconds:7.1f} s  {name}")
    return int(any(status for _, status, _ in results))


if __name__ == "__main__":
    sys.exit(main())
