# SPDX-License-Identifier: Apache-2.0
import os

from hypothesis import settings

# Before torch is loaded: idle threads spin briefly, then sleep. With GNU OpenMP's own choice the
# tests are many times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
if "PYTEST_XDIST_WORKER" in os.environ:  # the tests of other files have the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Same examples on every run; no deadline, because a shared machine can stall any of them.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("tests")
