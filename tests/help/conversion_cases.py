# SPDX-License-Identifier: Apache-2.0
"""Cases for the conversions of ``common.cuh``: on threads of the CPU, and on a GPU."""

from pathlib import Path

import torch

from nemo_rl_ref.kernels import loader

SOURCE = str(Path(__file__).parent / "conversions")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXPRESSIONS = [
    *(f"convert<{name}, {portable}>" for name in TYPES for portable in ("true", "false")),
    *(f"repack_all<{name}>" for name in (*TYPES, "float", "double")),
]


def floats(dtype):
    """All numbers of a 16-bit type, those halfway between two, and their neighbors in float32."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = patterns.float()
    between = (exact.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(
        torch.float32
    )
    around = [between, *(between.nextafter(torch.tensor(x)) for x in (torch.inf, -torch.inf))]
    tiny = torch.linspace(0, 2.0**-13, 4096, dtype=torch.float64).float()
    return patterns, torch.cat([exact, *around, tiny, -tiny])


def conversions(device, name, portable):
    dtype = TYPES[name]
    patterns, wide = floats(dtype)
    narrow = patterns.repeat(-(-wide.numel() // patterns.numel()))[: wide.numel()]
    wide, narrow = wide.to(device), narrow.to(device)
    narrowed, widened = torch.zeros_like(narrow), torch.zeros_like(wide)
    flag = "true" if portable else "false"
    arguments = [wide, narrow, wide.numel(), narrowed, widened]
    loader.launch(SOURCE, f"convert<{name}, {flag}>", 1, 32, arguments, wide.device)
    for ours, theirs in ((narrowed, wide.to(dtype)), (widened, narrow.float())):
        assert torch.equal(ours.isnan(), theirs.isnan())
        kind = torch.int16 if ours.dtype == dtype else torch.int32
        number = ~ours.isnan()
        assert torch.equal(ours.view(kind)[number], theirs.view(kind)[number])


def repacking(device, name):
    dtype = {**TYPES, "float": torch.float32, "double": torch.float64}[name]
    values = floats(torch.float16)[1][: 1 << 14].nan_to_num().to(dtype).to(device)
    result = torch.zeros_like(values)
    vectors = values.numel() * values.element_size() // 16
    arguments = [values, vectors, result]
    loader.launch(SOURCE, f"repack_all<{name}>", 1, 32, arguments, values.device)
    assert torch.equal(values, result)
