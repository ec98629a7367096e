# SPDX-License-Identifier: Apache-2.0
"""Runs the log-probability kernels under compute-sanitizer.

    python tests/gpu/sanitize.py            # every tool
    python tests/gpu/sanitize.py racecheck  # one of memcheck, racecheck, initcheck, synccheck

Exits with 0 where no tool found an error. Needs a GPU and compute-sanitizer, a part of CUDA's
toolkit.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ROOT = Path(__file__).parents[2]


def run(tool: str) -> int:
    """Start this script again, under a tool, and return its exit status."""
    # Errors of API calls reach Python by themselves. Those that cuda-bindings gets when it looks
    # for functions that an older driver does not have are none.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--report-api-errors", "no"]
    if tool == "initcheck":
        # Only the kernels': PyTorch's own copy padding that nobody wrote.
        command += ["--kernel-name", "kernel_substring=token_logprobs"]
    # Memory of its own for every tensor, so that an access beyond its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, sys.executable, __file__, "--inside"], check=False, env=environment
    )
    return done.returncode


def inside() -> None:
    """What a tool watches: few launches that touch every branch."""
    sys.path.insert(0, str(ROOT / "tests" / "help"))
    import token_logprobs_cases as cases
    import torch

    device = torch.device("cuda", 0)
    for dtype in cases.DTYPES.values():
        cases.sizes(device, dtype, 1000)
        cases.strides(device, dtype)
        cases.in_place(device, dtype)
        cases.pieces_and_cap(device, dtype, 5.0)
    cases.sizes(device, torch.bfloat16, 128257)
    torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    if arguments == ["--inside"]:
        inside()
        return 0
    if any(argument not in TOOLS for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer was not found; it is a part of CUDA's toolkit", file=sys.stderr)
        return 2
    return max(run(tool) for tool in arguments or TOOLS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
