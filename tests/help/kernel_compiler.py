# SPDX-License-Identifier: Apache-2.0
"""Whether the CUDA kernels can be compiled here."""

import pytest

from nemo_rl_ref.kernels import loader

try:
    loader._compiler_version()
    MISSING = None
except loader.KernelsUnavailable as error:
    MISSING = f"the CUDA kernels were not compiled: {error}"

needs_compiler = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
