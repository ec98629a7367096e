# SPDX-License-Identifier: Apache-2.0
"""Who chooses between the CUDA kernels and plain PyTorch, and what is said about it."""

import logging

import pytest
import torch

from nemo_rl_ref.kernels import backend, loader
from nemo_rl_ref.logprobs import token_logprobs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def start(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_logged", set())


@pytest.fixture
def ready(monkeypatch):
    """As if there were a GPU and everything that compiles kernels."""
    real = loader.unavailable
    monkeypatch.setattr(
        loader, "unavailable", lambda device: None if device.type == "cuda" else real(device)
    )


def lacking(monkeypatch, reason="cuda-core cannot be imported; install the extra"):
    monkeypatch.setattr(loader, "unavailable", lambda device: reason)


@pytest.mark.parametrize(
    ("argument", "variable", "device", "kernels"),
    [
        (None, None, CUDA, True),
        (None, None, CPU, False),
        (None, "auto", CUDA, True),
        (None, "", CUDA, True),
        (None, "torch", CUDA, False),
        (None, "cuda", CUDA, True),
        ("torch", "cuda", CUDA, False),
        ("cuda", "torch", CUDA, True),
        ("torch", None, CPU, False),
    ],
)
def test_choice(argument, variable, device, kernels, ready, monkeypatch):
    if variable is not None:
        monkeypatch.setenv(backend.VARIABLE, variable)
    assert backend.use_kernels(argument, device) is kernels


def test_unknown(monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'auto', expected 'cuda', 'torch' or None"):
        backend.use_kernels("auto", CPU)
    monkeypatch.setenv(backend.VARIABLE, "gpu")
    with pytest.raises(ValueError, match=r"NEMO_RL_REF_BACKEND is 'gpu', expected 'auto', 'cuda'"):
        backend.use_kernels(None, CPU)


def test_not_on_cuda(monkeypatch):
    logits, targets = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the argument backend asks .* but the tensors are on cpu"):
        token_logprobs(logits, targets, backend="cuda")
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="the environment variable NEMO_RL_REF_BACKEND asks"):
        token_logprobs(logits, targets)
    assert token_logprobs(logits, targets, backend="torch") < 0


def test_what_is_missing(monkeypatch, caplog):
    """An error where the kernels are asked for; else a warning, and plain PyTorch."""
    lacking(monkeypatch)
    with pytest.raises(loader.KernelsUnavailable, match="cuda-core cannot be imported; install"):
        backend.use_kernels("cuda", CUDA)
    with caplog.at_level(logging.INFO, "nemo_rl_ref.kernels"):
        assert backend.use_kernels(None, CUDA) is False
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "plain PyTorch, because cuda-core cannot be imported; install the extra")
    ]


def test_logged_once(ready, caplog):
    with caplog.at_level(logging.INFO, "nemo_rl_ref.kernels"):
        for _ in range(3):
            backend.use_kernels(None, CUDA)
            backend.use_kernels(None, CPU)
            backend.use_kernels("torch", CUDA)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "CUDA kernels, because the tensors are on CUDA"),
        ("INFO", "plain PyTorch, because the tensors are on cpu, not on CUDA"),
        ("INFO", "plain PyTorch, chosen by the argument backend"),
    ]


def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert loader.unavailable(CUDA) == ("Tesla T4 has compute capability 7.5, the kernels need 8.0")
