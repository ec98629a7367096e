# SPDX-License-Identifier: Apache-2.0
"""Studies of the tests are kept in memory: a database waits for the disk at every transaction."""

import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path():
    """A folder that is in memory where the system has one."""
    with tempfile.TemporaryDirectory(
        dir=MEMORY if MEMORY.is_dir() else None, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)
