# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

# Same examples on every run; no deadline, because a shared machine can stall any of them.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("tests")
