# SPDX-License-Identifier: Apache-2.0
"""What of a launch reaches CUDA's driver, through cuda-core; the driver here only takes notes."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_compiler import needs_compiler

from nemo_rl_ref.kernels import backend, loader

SOURCE, EXPRESSION = "gae", "gae<float, unsigned char>"
ARGUMENTS = [None, 5, -1, 1 << 40, 2.5, -0.0]

# Of PyTorch only what says which device and stream are current is not the real one: a build
# without CUDA has none.
SCRIPT = f"""
import contextlib, sys, types, threading, torch
from nemo_rl_ref.kernels import loader
stream = types.SimpleNamespace(cuda_stream=int(sys.argv[1], 0))
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 1
torch.cuda.current_stream = lambda *device: stream
torch.cuda.get_device_capability = lambda *device: (9, 0)
assert loader._driver_version() == 13
tensor = torch.zeros(4)
print(tensor.data_ptr())

def launch(arguments, grid):
    loader.launch("{SOURCE}", "{EXPRESSION}", grid, 64, arguments, tensor.device)

launch([tensor, *{ARGUMENTS!r}], 3)
launch([tensor[1:], *{ARGUMENTS!r}], 0)
thread = threading.Thread(target=launch, args=([tensor[1:], *{ARGUMENTS!r}], (1 << 31) - 1))
thread.start()
thread.join()
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with a libcuda.so.1."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler was found, so launches were not looked at")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[1] / "help" / "driver.c"
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and tests that launch on it")
@pytest.mark.parametrize("stream", [0, 0x7FFF12345678])  # PyTorch's default stream is 0
def test_what_the_driver_gets(driver, stream, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_RL_REF_CACHE", str(tmp_path))
    loader.cached_kernel(SOURCE, EXPRESSION, "sm_90")  # here: NVRTC, too, would ask the driver
    log = tmp_path / "log"
    environment = {
        "LD_LIBRARY_PATH": f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "DRIVER_LOG": str(log),
        "DRIVER_ARGUMENTS": str(1 + len(ARGUMENTS)),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, hex(stream)],
        check=False,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    address = int(done.stdout)
    words = [0, 5, 2**64 - 1, 1 << 40, *struct.unpack("QQ", struct.pack("dd", 2.5, -0.0))]
    rest = " ".join(f"{word:x}" for word in words)
    load, kernel, *launches = log.read_text().splitlines()
    assert load == "load ELF" and kernel.startswith("kernel _Z3gaeIfhE")
    where = "launch 0x1001 0x3000"
    pointer = "0" if stream == 0 else hex(stream)
    assert launches == [
        f"{where} 3,1,1 64,1,1 0 {pointer} {address:x} {rest}",
        f"{where} {2**31 - 1},1,1 64,1,1 0 {pointer} {address + 4:x} {rest}",
    ]


@pytest.fixture
def gpu(monkeypatch):
    """As if there were an H100 with a driver of CUDA 13."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(loader, "_driver_version", lambda: 13)
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@needs_compiler
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("wanted", ["cuda", None])
def test_the_choice_compiles_whole(wanted):
    """Dynamo asks what can run and does not look into it: there are no graphs of NVRTC."""
    device = torch.device("cuda", 0)

    def function(x):
        return x + 1 if backend.use_kernels(wanted, device) else x

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), 90), ((12, 0), 120), ((10, 3), 103), ((10, 4), 103), ((12, 9), 121)],
)
def test_for_what_is_compiled(capability, expected, monkeypatch):
    """For the GPU itself, or for an older one of its family."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    loader._architecture.cache_clear()
    assert loader._architecture(0) == f"sm_{expected}"
    loader._architecture.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_too_new(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Z100")
    reason = loader.unavailable(torch.device("cuda", 0))
    assert reason.startswith("Z100 has compute capability 99.0, which NVRTC 13.0 does not know")


@needs_compiler
@pytest.mark.usefixtures("gpu")
def test_a_driver_that_is_too_old(monkeypatch):
    device = torch.device("cuda", 0)
    assert loader.unavailable(device) is None
    monkeypatch.setattr(loader, "_driver_version", lambda: 12)
    assert "the driver is one of CUDA 12, which does not load" in loader.unavailable(device)
    with pytest.raises(loader.KernelsUnavailable, match="update the driver"):
        backend.use_kernels("cuda", device)
