# SPDX-License-Identifier: Apache-2.0
"""Executes the CUDA kernels on the CPU, one thread for each of CUDA's.

:class:`ThreadHarness` compiles a ``.cu`` file with a C++20 compiler and has the ``launch`` of
:mod:`nemo_rl_ref.kernels.loader`, so the code that launches kernels on a GPU runs on CPU tensors
just as well:

    monkeypatch.setattr(loader, "launch", ThreadHarness("token_logprobs", expressions).launch)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nemo_rl_ref.kernels import loader

_HEADER = Path(__file__).parent / "cuda_threads.h"
_FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-pthread"]

#: Compiled harnesses, kept from one run of the tests to the next under a hash of what they hold.
BUILDS = Path(tempfile.gettempdir()) / f"nemo-rl-ref-harness-{os.getuid()}"

SKIPPED = "no C++20 compiler was found, so the CUDA kernels were not executed on the CPU"


class KernelFault(RuntimeError):
    """A kernel used a barrier, a shuffle or an address wrongly, or raced."""


@lru_cache
def compiler() -> str | None:
    """The command of a compiler that knows C++20, or None."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name) and _compiles(name):
            return name
    return None


@lru_cache
def has_thread_sanitizer() -> bool:
    """Whether programs built with ThreadSanitizer run here."""
    return compiler() is not None and _compiles(compiler(), "-fsanitize=thread", run=True)


def _compiles(command: str, *flags: str, run: bool = False) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text(
            "#include <barrier>\n#include <thread>\nint main() { std::barrier b(1); }"
        )
        program = Path(folder) / "try"
        built = subprocess.run(
            [command, *_FLAGS, *flags, str(source), "-o", str(program)],
            check=False,
            capture_output=True,
        )
        return built.returncode == 0 and (
            not run
            or subprocess.run([str(program)], check=False, capture_output=True).returncode == 0
        )


class ThreadHarness:
    """A kernel's source, built for the CPU.

    Args:
        source: The file without its ending, such as ``"token_logprobs"``, or a path to another.
        expressions: The instances to build, such as ``"token_logprobs_forward<float, 64, ...>"``.
            Use small blocks: every thread is one of the operating system's.
        edits: Pairs of a text that occurs once in the source or in ``common.cuh`` and another to
            put in its place: a planted fault.
        sanitize: Build with ThreadSanitizer and run each launch as a process of its own. A data
            race is then a :class:`KernelFault`.
    """

    def __init__(
        self,
        source: str,
        expressions: Iterable[str],
        *,
        edits: Sequence[tuple[str, str]] = (),
        sanitize: bool = False,
    ) -> None:
        self.source, self.expressions = source, tuple(expressions)
        self.sanitize = sanitize
        self.path = self._build(edits)
        if not sanitize:
            self._run = ctypes.CDLL(str(self.path)).harness_run
            self._run.restype = ctypes.c_char_p

    def launch(
        self,
        source: str,
        expression: str,
        grid: int,
        block: int,
        arguments: Sequence[Tensor | int | float | None],
        device: torch.device,
    ) -> None:
        """What :func:`nemo_rl_ref.kernels.loader.launch` does, on the CPU and at once."""
        assert source == self.source, f"built for {self.source}.cu, asked for {source}.cu"
        values = loader.kernel_arguments(arguments, device)
        if grid == 0:
            return
        if self.sanitize:
            return self._run_program(expression, grid, block, arguments)
        boxes = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values]
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        fault = self._run(expression.encode(), grid, block, len(boxes), pointers)
        if fault is not None:
            raise KernelFault(fault.decode())

    def _run_program(self, expression, grid, block, arguments) -> None:
        storages = {
            a.untyped_storage().data_ptr(): a.untyped_storage()
            for a in arguments
            if isinstance(a, Tensor)
        }
        order = list(storages)
        parts = [struct.pack("q", len(order))]
        places = {}
        for address, storage in storages.items():
            parts.append(struct.pack("qq", storage.nbytes(), address % 16))
            places[address] = sum(map(len, parts))
            parts.append(ctypes.string_at(address, storage.nbytes()))
        name = expression.encode()
        parts.append(struct.pack("q", len(name)) + name)
        parts.append(struct.pack("qqq", grid, block, len(arguments)))
        for a in arguments:
            if isinstance(a, Tensor):
                start = a.untyped_storage().data_ptr()
                parts.append(struct.pack("qqq", 2, order.index(start), a.data_ptr() - start))
            elif a is None:
                parts.append(struct.pack("qqq", 2, -1, 0))
            else:
                parts.append(
                    struct.pack("qd" if isinstance(a, float) else "qq", isinstance(a, float), a)
                )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "launch"
            file.write_bytes(b"".join(parts))
            done = subprocess.run(
                [str(self.path), str(file)],
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"},
            )
            if done.returncode:
                raise KernelFault(done.stderr.strip() or f"exit status {done.returncode}")
            data = file.read_bytes()
        for address, storage in storages.items():
            ctypes.memmove(address, data[places[address] :][: storage.nbytes()], storage.nbytes())

    def _build(self, edits: Sequence[tuple[str, str]]) -> Path:
        texts = {p.name: p.read_text() for p in loader.SOURCES.glob("*.cuh")}
        main = f"{Path(self.source).name}.cu"
        texts[main] = (loader.SOURCES / f"{self.source}.cu").read_text()
        for old, new in edits:
            places = [name for name, text in texts.items() for _ in range(text.count(old))]
            assert len(places) == 1, f"{old!r} occurs {len(places)} times, expected once"
            texts[places[0]] = texts[places[0]].replace(old, new)
        entries = "".join(f'    entry<&{e}>("{e}"),\n' for e in self.expressions)
        texts["harness.cpp"] = (
            f'#include "cuda_threads.h"\n#include "{main}"\n'
            f"const std::vector<harness::Entry> harness::entries = {{\n{entries}}};\n"
            "int main(int count, char** names) { return harness_main(count, names); }\n"
        )
        texts["cuda_threads.h"] = _HEADER.read_text()
        flags = [*_FLAGS, *(["-fsanitize=thread", "-g"] if self.sanitize else ["-shared", "-fPIC"])]
        digest = hashlib.sha256(repr((compiler(), flags, sorted(texts.items()))).encode())
        target = BUILDS / f"{Path(self.source).name}-{digest.hexdigest()[:32]}"
        if target.exists():
            return target
        BUILDS.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)
            built = subprocess.run(
                [compiler(), *flags, "harness.cpp", "-o", "out"],
                cwd=folder,
                check=False,
                capture_output=True,
                text=True,
            )
            if built.returncode:
                raise RuntimeError(f"{main} does not compile for the CPU:\n{built.stderr}")
            (Path(folder) / "out").replace(target)
        return target
