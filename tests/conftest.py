# SPDX-License-Identifier: Apache-2.0
import os

from hypothesis import settings

# Before torch is loaded: idle threads sleep instead of spinning. On a busy machine the tests would
# be many times slower otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Same examples on every run; no deadline, because a shared machine can stall any of them.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("tests")
