# SPDX-License-Identifier: Apache-2.0
"""Runs the code that launches CUDA kernels on CPU tensors, through a thread harness."""

import pytest
import torch

from nemo_rl_ref.kernels import loader


@pytest.fixture
def on_threads(monkeypatch):
    """A function of a harness; after it, kernels can be asked for with ``backend="cuda"``.

    Memory that PyTorch has not written to is NaN, so a kernel that leaves out an element shows.
    """

    def use(harness):
        monkeypatch.setattr(loader, "launch", harness.launch)
        monkeypatch.setattr(loader, "unavailable", lambda device: None)

    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # then PyTorch fills memory that nobody wrote to
    yield use
    torch.use_deterministic_algorithms(was_deterministic)
