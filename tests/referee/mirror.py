# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for NeMo RL's own unit tests: ``nemo_rl`` means ``nemo_rl_ref``, CUDA the CPU.

A name that the mirror does not have can be imported; a test that uses it is skipped, with the name as
the reason. Outcomes go to the JSON file that ``REFEREE_OUTCOMES`` names.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
from collections import Counter

import pytest
import stand_ins
import torch

OURS, THEIRS = "nemo_rl_ref", "nemo_rl"


def _ours(name):
    """The name of a module of the mirror."""
    return OURS + name[len(THEIRS) :] if name.split(".")[0] == THEIRS else name


class NotMirrored:
    """What the mirror does not have. Whatever is done with it skips the test."""

    def __init__(self, name):
        self.name = name

    def skip(self, *args, **kwargs):
        pytest.skip(f"not mirrored: {self.name}", allow_module_level=True)

    __call__ = __enter__ = __iter__ = __len__ = __eq__ = __lt__ = __gt__ = __or__ = __ror__ = skip
    __getitem__ = __contains__ = __add__ = __radd__ = skip
    __hash__ = object.__hash__

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return NotMirrored(f"{self.name}.{name}")

    def __mro_entries__(self, bases):
        self.skip()


class _Module(types.ModuleType):
    """A module of NeMo RL: that of the mirror, or one in which nothing is there."""

    __path__ = []

    def __init__(self, name):
        super().__init__(name)
        try:
            ours = importlib.import_module(_ours(name))
        except ModuleNotFoundError:
            ours = None
        object.__setattr__(self, "_ours", ours)

    def __getattr__(self, name):
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if hasattr(self._ours, name):
            return getattr(self._ours, name)
        return NotMirrored(f"{self.__name__.removeprefix('nemo_rl.')}.{name}")

    def __setattr__(self, name, value):
        if self._ours is None or name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._ours, name, value)

    def __delattr__(self, name):
        if self._ours is None or name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._ours, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == THEIRS or name.startswith(THEIRS + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


OUTCOMES = {"passed": [], "not applicable": Counter(), "failed": {}}


def pytest_configure(config):
    for name in (
        "mcore",
        "automodel",
        "vllm",
        "sglang",
        "trtllm",
        "hf_gated",
        "nemo_gym",
        "run_first",
    ):
        config.addinivalue_line("markers", f"{name}: needs what this machine does not have")
    config.addinivalue_line("markers", "asyncio: a coroutine")
    if checkout := os.environ.get("REFEREE_CHECKOUT"):  # NeMo RL itself, to see what it can do here
        stand_ins.install(checkout)
    else:
        sys.meta_path.insert(0, _Finder())
        stand_ins.cuda_is_cpu()
        logger = logging.getLogger
        logging.getLogger = lambda name=None: logger(_ours(name) if name else name)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in ("mcore", "automodel", "vllm", "sglang", "trtllm", "hf_gated", "nemo_gym"):
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"marked {mark}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A method or an argument that the mirror's classes do not have is not applicable either."""
    report = yield
    error = call.excinfo and call.excinfo.value
    missing = None
    if isinstance(error, AttributeError) and error.obj is not None:
        kind = error.obj if isinstance(error.obj, type) else type(error.obj)
        if kind.__module__.startswith(OURS):
            missing = f"{kind.__module__.removeprefix(OURS + '.')}.{kind.__name__}.{error.name}"
    elif isinstance(error, ModuleNotFoundError):
        missing = f"the package {error.name}"
    elif isinstance(error, NotImplementedError):
        missing = str(error)
    elif isinstance(error, TypeError) and "context manager protocol" in str(error):
        missing = f"{str(error).split(chr(39))[1]}.__enter__"
    if missing and report.failed:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"Skipped: not mirrored: {missing}")
    return report


def pytest_runtest_logreport(report):
    if report.skipped:
        _skipped(report)
    elif report.failed:
        text = str(report.longrepr)
        if report.when == "setup" and "fixture '" in text and "' not found" in text:
            name = text.split("fixture '")[1].split("'")[0]
            OUTCOMES["not applicable"][f"fixture {name}"] += 1
        else:
            OUTCOMES["failed"][report.nodeid.partition("::")[2]] = _last_line(report)
    elif report.when == "call":
        OUTCOMES["passed"].append(report.nodeid.partition("::")[2])


def pytest_collectreport(report):
    if report.skipped:
        _skipped(report)
    elif report.failed:
        OUTCOMES["failed"]["collection"] = _last_line(report)


def _skipped(report):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    OUTCOMES["not applicable"][reason.removeprefix("Skipped: ")] += 1


def _last_line(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr).strip()).splitlines()[0][:200]


def pytest_sessionfinish(session):
    with open(os.environ["REFEREE_OUTCOMES"], "w") as file:
        json.dump(OUTCOMES, file)
