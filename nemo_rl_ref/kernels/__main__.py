# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the log-probabilities take of a GPU, by the assembler. No GPU is needed.

.. code-block:: sh

    python -m nemo_rl_ref.kernels sm_90
    python -m nemo_rl_ref.kernels sm_80 sm_100 --only "bfloat16, 512"

Exits with 1 if a kernel keeps anything in a stack frame or spills registers to memory.
"""

from __future__ import annotations

import argparse
import sys

from nemo_rl_ref.kernels import loader, token_logprobs

#: Where each source's instances are listed.
SOURCES = (token_logprobs,)


def main(arguments: list[str] | None = None) -> int:
    """Print a table, one line a kernel and architecture.

    Args:
        arguments: Of the command line, instead of those in ``sys.argv``.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.kernels",
        description="Compile the CUDA kernels of the log-probabilities and show registers, "
        "shared memory, stack frame and spills. No GPU is needed.",
    )
    parser.add_argument("architectures", nargs="+", metavar="ARCHITECTURE", help="such as sm_90")
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name holds this")
    options = parser.parse_args(arguments)
    kernels = [k for module in SOURCES for k in module.instances() if options.only in k[1]]
    if not kernels:
        parser.error(f"--only: no kernel's name holds {options.only!r}")
    width = max(len(expression) for _, expression in kernels)
    print(f"{'':8}{'kernel':{width}}  registers  shared  stack  spills")
    clean = True
    for architecture in options.architectures:
        for source, expression in kernels:
            try:
                compiled = loader.compile_kernel(source, expression, architecture, verbose=True)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 2
            r = compiled.resources
            clean = clean and not r.stack_bytes and not r.spill_bytes
            print(
                f"{architecture:8}{expression:{width}}  {r.registers:9}  {r.shared_bytes:6}  "
                f"{r.stack_bytes:5}  {r.spill_bytes:6}",
                flush=True,
            )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
