# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every architecture without spilling; the cache; what may be missing."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_compiler import needs_compiler

from nemo_rl_ref.kernels import __main__ as report
from nemo_rl_ref.kernels import loader, token_logprobs
from nemo_rl_ref.kernels.token_logprobs import _BLOCK, _NAMES, _SMALL_BLOCK

FORWARD = "token_logprobs_forward<float, 128, false, false>"


def instances(dtype, block):
    return [e for _, e in token_logprobs.instances() if f"<{dtype}, {block}, " in e]


# Every instance for the architecture in the middle; for the others those with the most registers.
@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("sm_90", dtype) for dtype in _NAMES.values()]
    + [(sm, dtype) for sm in ("sm_80", "sm_100") for dtype in ("bfloat16", "double")],
)
def test_registers_are_enough(architecture, dtype, record_property):
    limit = 128 if dtype == "double" else 64
    expressions = instances(dtype, _BLOCK)
    if architecture == "sm_90":
        expressions += instances(dtype, _SMALL_BLOCK)[:1]
    else:
        expressions = [e for e in expressions if "true, " in e]
    for expression in expressions:
        compiled = loader.compile_kernel("token_logprobs", expression, architecture, verbose=True)
        took = compiled.resources
        record_property(f"{architecture} {expression}", str(took))
        assert compiled.cubin.startswith(b"\x7fELF")
        assert took.stack_bytes == 0 and took.spill_bytes == 0, (expression, took)
        assert took.registers <= limit, (expression, took)


@needs_compiler
@pytest.mark.parametrize(
    "edit",
    [
        # An array indexed by what is only known at run time lies in memory.
        (
            "A z[kUnroll<T> * W];",
            "A z[kUnroll<T> * W]; z[start % 2] = 0; row.total += z[(int)row.total];",
        ),
        # Registers for 2048 threads at once.
        ("(sizeof(T) == 8 ? 512 : 1024) / BLOCK", "2048 / BLOCK"),
    ],
)
def test_planted_fault(edit, tmp_path, monkeypatch):
    for path in loader.SOURCES.glob("*.cu*"):
        text = path.read_text()
        if path.name == "token_logprobs.cu":
            assert text.count(edit[0]) == 1
            text = text.replace(*edit)
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(loader, "SOURCES", tmp_path)
    with pytest.raises(AssertionError):
        test_registers_are_enough("sm_90", "bfloat16", lambda *_: None)


@needs_compiler
def test_report(capsys, monkeypatch):
    assert report.main(["sm_90", "--only", "backward<float, 128, false"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "registers", "shared", "stack", "spills"]
    assert len(lines) == 2 and all(line.split()[-2:] == ["0", "0"] for line in lines)
    assert report.main(["sm_1", "--only", "backward<float, 128, false, true"]) == 2
    assert "does not compile for sm_1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["sm_90", "--only", "nothing"])
    assert "--only: no kernel's name holds 'nothing'" in capsys.readouterr().err
    spilled = loader.Compiled(
        "f", b"", "Used 9 registers 8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads"
    )
    monkeypatch.setattr(loader, "compile_kernel", lambda *_, **__: spilled)
    assert report.main(["sm_90", "--only", "backward<float, 128, false, true"]) == 1


@needs_compiler
def test_a_wrong_expression():
    with pytest.raises(
        RuntimeError, match=r"token_logprobs.cu: nothing<float> does not compile fo"
    ):
        loader.compile_kernel("token_logprobs", "nothing<float>", "sm_90")


def test_resources_need_a_verbose_log():
    with pytest.raises(ValueError, match=r"f: the log has no .*registers"):
        _ = loader.Compiled("f", b"").resources


# ---- the cache ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_RL_REF_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def count(monkeypatch):
    """Counts compilations."""
    calls = []
    compile_kernel = loader.compile_kernel
    monkeypatch.setattr(
        loader, "compile_kernel", lambda *args: calls.append(args) or compile_kernel(*args)
    )
    return calls


def get(expression=FORWARD, architecture="sm_90"):
    return loader.cached_kernel("token_logprobs", expression, architecture)


@needs_compiler
def test_compiled_once(cache, count):
    first, second = get(), get()
    assert len(count) == 1
    assert (first.symbol, first.cubin) == (second.symbol, second.cubin)
    assert "token_logprobs_forward" in first.symbol
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]  # and no temporary file
    get(architecture="sm_80")
    get(FORWARD.replace("float", "double"))
    assert len(count) == 3 and len(list(cache.iterdir())) == 3


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-100], lambda data: b"", lambda data: data[:400] + b"x" + data[401:]],
    ids=["truncated", "empty", "a byte changed"],
)
def test_a_damaged_entry_is_made_again(damage, cache, count):
    expected = get()
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert get().cubin == expected.cubin and len(count) == 2
    assert get().cubin == expected.cubin and len(count) == 2


@needs_compiler
@pytest.mark.parametrize("how", ["owner", "writable", "link"])
def test_an_entry_of_another_user_is_not_taken(cache, count, monkeypatch, how):
    """In a folder that several share. Nor one that others can write, nor a link to another entry."""
    expected, other = get(), get(FORWARD.replace("float", "double"))
    path = next(p for p in cache.iterdir() if expected.cubin in p.read_bytes())
    if how == "link":
        path.unlink()
        path.hardlink_to(*cache.iterdir())
        assert other.cubin in path.read_bytes()
    elif how == "writable":
        path.chmod(0o666)
    elif os.geteuid():
        with monkeypatch.context() as patch:
            patch.setattr(loader.os, "geteuid", lambda: os.getuid() + 1)
            assert get().cubin == expected.cubin and len(count) == 3
        return
    else:
        os.chown(path, 12345, -1)
    assert get().cubin == expected.cubin and len(count) == 3
    assert get().cubin == expected.cubin and len(count) == 3  # it was replaced


@needs_compiler
def test_another_source_or_compiler_is_another_entry(cache, tmp_path, monkeypatch):
    names = {loader._key("token_logprobs", FORWARD, "sm_90")}
    folder = tmp_path / "sources"
    folder.mkdir()
    for changed in (None, "common.cuh", "token_logprobs.cu"):
        for path in loader.SOURCES.glob("*.cu*"):
            (folder / path.name).write_text(
                path.read_text() + ("// changed\n" if path.name == changed else "")
            )
        with monkeypatch.context() as patch:
            patch.setattr(loader, "SOURCES", folder)
            loader._sources_digest.cache_clear()
            names.add(loader._key("token_logprobs", FORWARD, "sm_90"))
    loader._sources_digest.cache_clear()
    assert len(names) == 3
    monkeypatch.setattr(loader, "_compiler_version", lambda: "99.0")
    names.add(loader._key("token_logprobs", FORWARD, "sm_90"))
    assert len(names) == 4


@needs_compiler
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, count):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEMO_RL_REF_CACHE", str(tmp_path / "file"))
    assert get().cubin.startswith(b"\x7fELF") and get() and len(count) == 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_RL_REF_CACHE", str(tmp_path))
    assert loader.cache_directory() == tmp_path / "kernels"
    monkeypatch.delenv("NEMO_RL_REF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loader.cache_directory() == tmp_path / "nemo-rl-ref" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loader.cache_directory() == tmp_path / ".cache" / "nemo-rl-ref" / "kernels"


WRITER = """
import sys
from pathlib import Path
from nemo_rl_ref.kernels import loader
path, mine = Path(sys.argv[1]), sys.argv[2]
for i in range(300):
    loader._write_entry(path, loader.Compiled(mine, mine.encode() * 40_000))
    entry = loader._read_entry(path)
    assert entry is not None and entry.cubin == entry.symbol.encode() * 40_000
"""


def test_several_processes(tmp_path):
    """Two write the same entry, over and over; neither ever reads half of one."""
    path = tmp_path / "kernels" / "entry.cubin"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE, text=True
        )
        for name in ("first", "other")
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert [p.name for p in path.parent.iterdir()] == ["entry.cubin"]


# ---- what may be missing ----


@pytest.fixture
def fresh():
    loader._compiler_version.cache_clear()
    yield
    loader._compiler_version.cache_clear()


def test_without_cuda_core(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(
        loader.KernelsUnavailable,
        match=r"cuda-core, .* install the extra, in a clone: pip install '\.\[kernels\]'",
    ):
        loader.compile_kernel("token_logprobs", FORWARD, "sm_90")


@needs_compiler
def test_without_nvrtc(monkeypatch, fresh):
    from cuda.bindings import nvrtc

    def missing():
        raise RuntimeError("libnvrtc.so.13 not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(
        loader.KernelsUnavailable, match=r"NVRTC, .*libnvrtc.so.13 not found.*'\.\[kernels"
    ):
        loader.compile_kernel("token_logprobs", FORWARD, "sm_90")


def test_a_tensor_on_another_device():
    with pytest.raises(RuntimeError, match="argument 1 is on cpu, expected meta"):
        loader.kernel_arguments([3, torch.zeros(1)], torch.device("meta"))
