# SPDX-License-Identifier: Apache-2.0
"""Runs listings one after the other, each in a process of its own that is forked from this one.

What nearly all of them import has been imported before, which takes most of a short one's time.
Started as a script, it reads the folder of a `listing.py` from each line and answers with the exit
status. What the listing prints goes to `output.txt` beside it.
"""

import os
import runpy
import signal
import sys
import traceback

IMPORTED = ("torch", "accelerate", "transformers", "nemo_rl_ref.tiny")


def be_listing(folder: str) -> None:
    """Be `python listing.py` in a folder; does not return."""
    code = 1
    try:
        signal.alarm(600)  # a listing that hangs is ended, and named
        output = os.open(f"{folder}/output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.argv, sys.path[0] = ["listing.py"], folder
        runpy.run_path("listing.py", run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    for line in sys.stdin:
        if not (child := os.fork()):
            be_listing(line.rstrip("\n"))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
