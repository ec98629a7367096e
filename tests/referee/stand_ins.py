# SPDX-License-Identifier: Apache-2.0
"""Lets NeMo RL be imported and run on a machine with no GPU: what is not there stands still.

Nothing of NeMo RL is changed: packages that a CPU machine does not have are empty, ``cuda`` means
``cpu``, and its check that Transformers is old is answered with an old version.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
import typing

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

#: Imported by NeMo RL, and used only by what the loops do not reach: quantization, HTTP servers,
#: loggers in the cloud, and sound.
ABSENT = (
    "aiohttp", "fastapi", "httpx", "mlflow", "soundfile", "swanlab", "torchao", "uvicorn", "wandb",
)  # fmt: skip


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for each package in a list, and for each module in one."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name == "nemo_rl.models.policy":  # which asks, when imported, whether it is below 5.12
            import transformers.processing_utils  # noqa: F401, it makes ``transformers`` anew

            sys.modules["transformers"].__version__ = "5.11.0"
        if any(name == absent or name.startswith(absent + ".") for absent in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


class OnCPU(TorchFunctionMode):
    """Whatever is asked of ``cuda`` is done on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        return func(*map(_cpu, args), **kwargs)


def _cpu(value):
    is_cuda = isinstance(value, str) and value.partition(":")[0] == "cuda"
    if is_cuda or (isinstance(value, torch.device) and value.type == "cuda"):
        return "cpu"
    return value


def install(checkout, absent=ABSENT):
    """Make ``nemo_rl`` of a checkout importable in this process, and CUDA mean CPU.

    Args:
        checkout: The folder with NeMo RL's ``nemo_rl`` and ``examples``.
        absent: The packages and modules that are to be empty.
    """
    typing.TypedDict = typing_extensions.TypedDict  # what pydantic wants before Python 3.12
    os.environ["NRL_LOG_LEVEL"] = "WARNING"
    sys.meta_path.insert(0, _Finder(absent))
    sys.path[:0] = [str(checkout), os.path.join(checkout, "examples")]
    cuda_is_cpu()


def cuda_is_cpu():
    """Make CUDA mean CPU in this process."""
    nothing = types.SimpleNamespace(range_push=lambda name: None, range_pop=lambda: None)
    torch.cuda.nvtx = nothing
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.get_device_name = lambda *args: "CPU"
    torch.cuda.current_device = lambda: 0
    OnCPU().__enter__()
