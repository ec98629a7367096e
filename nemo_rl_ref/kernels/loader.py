# SPDX-License-Identifier: Apache-2.0
# cuda-core and cuda-bindings are compiled, without annotations:
# pyright: reportAttributeAccessIssue=false
"""Compiles the CUDA kernels at first use, keeps them on disk, and launches them.

A kernel is a template in a ``.cu`` file beside this module, such as
``token_logprobs_forward<bfloat16, 512, true, false>`` in ``token_logprobs.cu``. NVRTC compiles the
one instance that is asked for to machine code for the device at hand; neither ``nvcc`` nor a host
compiler is needed. The machine code is kept in a folder under a name that is a hash of everything
it depends on, so that it is compiled once for all processes and never stale.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Where the sources are.
SOURCES = Path(__file__).parent

#: The oldest architecture the kernels are written for, as a compute capability.
MINIMUM_CAPABILITY = (8, 0)

_INSTALL = "install the extra, in a clone: pip install '.[kernels]'"
_MAGIC = b"nemo-rl-ref kernel 2\n"


class KernelsUnavailable(RuntimeError):
    """What compiles or launches the kernels is missing. The message says what to install."""


@dataclass(frozen=True)
class Resources:
    """What a thread or a block of a kernel takes, as the assembler reports it.

    Attributes:
        registers: Of a thread, 32 bits each.
        stack_bytes: Of a thread, in memory: arrays and what did not fit into registers.
        spill_bytes: Of a thread: stores and loads of what did not fit into registers.
        shared_bytes: Of a block.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        symbol: Its name in the machine code.
        cubin: The machine code.
        log: What the compiler said, and with ``verbose`` the assembler.
    """

    symbol: str
    cubin: bytes
    log: str = ""

    @property
    def resources(self) -> Resources:
        """What the kernel takes; of one that was compiled with ``verbose``.

        Raises:
            ValueError: If the log does not say it.
        """

        def number(pattern: str, default: int | None = None) -> int:
            if found := re.search(pattern, self.log):
                return int(found[1])
            if default is None:
                raise ValueError(f"{self.symbol}: the log has no {pattern!r}: {self.log!r}")
            return default

        return Resources(
            registers=number(r"Used (\d+) registers"),
            stack_bytes=number(r"(\d+) bytes stack frame"),
            spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            shared_bytes=number(r"(\d+) bytes smem", 0),
        )


def compile_kernel(
    source: str, expression: str, architecture: str, *, verbose: bool = False
) -> Compiled:
    """Compile one instance of a kernel. Needs no GPU, and looks at no cache.

    Args:
        source: The file without its ending, such as ``"token_logprobs"``, or a path to another.
        expression: The kernel with its template arguments.
        architecture: For which GPUs, such as ``"sm_90"``.
        verbose: Also ask the assembler for its report.

    Returns:
        The machine code, and the compiler's log.

    Raises:
        KernelsUnavailable: If cuda-core or NVRTC is not installed.
        RuntimeError: If the source does not compile; the message holds the compiler's.
    """
    program, options = _compiler()
    _compiler_version()
    options = options(
        name=f"{Path(source).name}.cu",
        arch=architecture,
        std="c++17",
        include_path=[str(SOURCES)],
        ptxas_options=["-v"] if verbose else None,
    )
    log = _Log()
    code = program((SOURCES / f"{source}.cu").read_text(), "c++", options)
    try:
        result = code.compile("cubin", name_expressions=(expression,), logs=log)
    except Exception as error:
        raise RuntimeError(
            f"{source}.cu: {expression} does not compile for {architecture}: {error}"
        ) from error
    finally:
        code.close()
        del code  # the error's traceback would keep it, in a cycle that cuda-core cannot clear
    symbol = result.symbol_mapping[expression]
    symbol = symbol.decode() if isinstance(symbol, bytes) else symbol
    return Compiled(symbol, bytes(result.code), log.text)


def cached_kernel(source: str, expression: str, architecture: str) -> Compiled:
    """The same from the cache, where it is compiled and stored at first.

    The name of an entry is a hash of the source and headers, the expression, the architecture and
    the compiler's version. An entry is written to a temporary file that is then renamed, so
    processes that compile the same kernel at the same time do not disturb each other. An entry
    that is damaged, or another user's, is made again. Where the folder cannot be written to,
    nothing is kept.

    Args:
        source: As for :func:`compile_kernel`.
        expression: As for :func:`compile_kernel`.
        architecture: As for :func:`compile_kernel`.

    Returns:
        The machine code, without a log if it was in the cache.

    Raises:
        KernelsUnavailable: If cuda-core or NVRTC is not installed.
        RuntimeError: If the source does not compile.
    """
    path = cache_directory() / f"{_key(source, expression, architecture)}.cubin"
    entry = _read_entry(path)
    if entry is None:
        entry = compile_kernel(source, expression, architecture)
        _write_entry(path, entry)
    return entry


def cache_directory() -> Path:
    """The folder with compiled kernels.

    ``kernels`` in ``$NEMO_RL_REF_CACHE``; without that variable in
    ``$XDG_CACHE_HOME/nemo-rl-ref``, or ``~/.cache/nemo-rl-ref``.
    """
    root = os.environ.get("NEMO_RL_REF_CACHE")
    if root:
        return Path(root) / "kernels"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "nemo-rl-ref" / "kernels"


def launch(
    source: str,
    expression: str,
    grid: int,
    block: int,
    arguments: Sequence[Tensor | int | float | None],
    device: torch.device,
) -> None:
    """Start a kernel on PyTorch's current stream of a device, and return without waiting.

    Nothing is allocated, and but for the first launch of a kernel in a process nothing is loaded,
    so a launch can be captured into a CUDA graph after one warm-up, as PyTorch asks for anyway.

    Args:
        source: As for :func:`compile_kernel`.
        expression: As for :func:`compile_kernel`.
        grid: Number of blocks; with 0 nothing is done.
        block: Threads of a block.
        arguments: The kernel's: a tensor for a pointer to its first element, ``None`` for a null
            pointer, an int for a ``long long``, a float for a ``double``.
        device: Where the tensors are.

    Raises:
        KernelsUnavailable: If cuda-core or NVRTC is not installed.
        RuntimeError: If a tensor is on another device, or CUDA reports an error.
    """
    values = kernel_arguments(arguments, device)
    if grid == 0:
        return
    import cuda.core as cuda

    with torch.cuda.device(device):
        # A thread that autograd started may not have a CUDA context yet.
        cuda.Device(torch.cuda.current_device()).set_current()
        kernel = _kernel(source, expression, _architecture(torch.cuda.current_device()))
        config = cuda.LaunchConfig(grid=grid, block=block)
        # By its address: cuda-core warns of another library's stream object, and that of
        # PyTorch's older releases does not say what it is.
        stream = cuda.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        cuda.launch(stream, config, kernel, *values)


def kernel_arguments(
    arguments: Sequence[Tensor | int | float | None], device: torch.device
) -> list[int | float]:
    """Arguments as CUDA takes them: 64-bit integers, addresses among them, and doubles.

    Args:
        arguments: As for :func:`launch`.
        device: Where tensors have to be.

    Returns:
        An int or float for each.

    Raises:
        RuntimeError: If a tensor is on another device.
    """
    values: list[int | float] = []
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.device != device:
                raise RuntimeError(
                    f"argument {position} is on {argument.device}, expected {device}"
                )
            values.append(argument.data_ptr())
        elif argument is None:
            values.append(0)
        else:
            values.append(argument)
    return values


def unavailable(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None if they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, the kernels need "
            f"{MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
        )
    try:
        compiler, driver = _compiler_version(), _driver_version()
    except KernelsUnavailable as error:
        return str(error)
    if driver < int(compiler.split(".")[0]):
        return (
            f"the driver is one of CUDA {driver}, which does not load what NVRTC {compiler} makes; "
            "update the driver"
        )
    if _newest_known(capability) is None:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, which NVRTC {compiler} does not know; update it"
        )
    return None


# Dynamo shall call this while it compiles, not look into it. It is what
# torch.compiler.assume_constant_result sets, which would take seconds to import.
unavailable._dynamo_marked_constant = True


def _compiler() -> tuple[Any, Any]:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelsUnavailable(
            f"cuda-core, which compiles the CUDA kernels, cannot be imported ({error}); {_INSTALL}"
        ) from error
    return Program, ProgramOptions


@lru_cache
def _compiler_version() -> str:
    _compiler()
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # an import that fails, or a library that is not found
        raise KernelsUnavailable(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({error}); {_INSTALL}"
        ) from error
    if int(status):
        raise KernelsUnavailable(f"NVRTC does not tell its version ({status}); {_INSTALL}")
    return f"{major}.{minor}"


@lru_cache
def _driver_version() -> int:
    try:
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
    except Exception as error:  # no driver, or one too old for the bindings
        raise KernelsUnavailable(f"CUDA's driver cannot be asked ({error})") from error
    if int(status):
        raise KernelsUnavailable(f"CUDA's driver does not tell its version ({status})")
    return version // 1000


class _Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def _key(source: str, expression: str, architecture: str) -> str:
    digest = hashlib.sha256(_sources_digest(source))
    for part in (source, expression, architecture, "c++17", _compiler_version()):
        digest.update(part.encode() + b"\0")
    return f"{Path(source).name}-{architecture}-{digest.hexdigest()[:32]}"


@lru_cache
def _sources_digest(source: str) -> bytes:
    digest = hashlib.sha256()
    for path in [SOURCES / f"{source}.cu", *sorted(SOURCES.glob("*.cuh"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def _read_entry(path: Path) -> Compiled | None:
    """An entry is: the magic line, a SHA-256 of its name and the rest, the symbol's line, the cubin.

    One that another user wrote, or can write, is none: it would run with this user's data. Root may.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_uid not in (os.geteuid(), 0) or state.st_mode & 0o022:
                return None
            data = file.read()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    digest, rest = data[len(_MAGIC) : head], data[head:]
    if not data.startswith(_MAGIC) or _digest(path, rest) != digest:
        return None
    symbol, _, cubin = rest.partition(b"\n")
    return Compiled(symbol.decode(), cubin)


def _digest(path: Path, rest: bytes) -> bytes:
    """The sum of an entry; with its name, so that a link to another entry is none."""
    return hashlib.sha256(path.name.encode() + b"\0" + rest).digest()


def _write_entry(path: Path, entry: Compiled) -> None:
    rest = entry.symbol.encode() + b"\n" + entry.cubin
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(_MAGIC + _digest(path, rest) + rest)
        temporary.replace(path)
    except OSError:  # a read-only or full disk: the kernel runs all the same
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@lru_cache
def _architecture(device_index: int) -> str:
    return f"sm_{_newest_known(torch.cuda.get_device_capability(device_index))}"


@lru_cache
def _newest_known(capability: tuple[int, int]) -> int | None:
    """The newest architecture that NVRTC knows whose machine code runs on such a GPU.

    That is what has the same major number and no larger minor number.
    """
    from cuda.bindings import nvrtc

    status, known = nvrtc.nvrtcGetSupportedArchs()
    if int(status):
        raise RuntimeError(f"NVRTC does not tell what it can compile for ({status})")
    major, minor = capability
    return max((a for a in known if a // 10 == major and a % 10 <= minor), default=None)


@cache
def _kernel(source: str, expression: str, architecture: str) -> Any:
    from cuda.core import ObjectCode

    compiled = cached_kernel(source, expression, architecture)
    # A library belongs to no context, so one serves all devices of an architecture.
    return ObjectCode.from_cubin(compiled.cubin, name=expression).get_kernel(compiled.symbol)
