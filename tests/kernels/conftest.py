# SPDX-License-Identifier: Apache-2.0
"""Runs the code that launches CUDA kernels on CPU tensors, through a thread harness."""

import pytest

from nemo_rl_ref.kernels import loader


@pytest.fixture
def on_threads(monkeypatch):
    """A function of a harness; after it, kernels can be asked for with ``backend="cuda"``."""

    def use(harness):
        monkeypatch.setattr(loader, "launch", harness.launch)
        monkeypatch.setattr(loader, "unavailable", lambda device: None)

    return use
