# SPDX-License-Identifier: Apache-2.0
"""Where benchmark results go: results/<device>.json, one entry a script."""

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_rl_ref.files.whole import write_text

ROOT = Path(__file__).parents[1]


def _on_cuda(device):
    return torch.cuda.is_available() if device is None else device == "cuda"


def device_name(device=None):
    """The name of the GPU if there is one, else of the processor; or of "cuda" or "cpu"."""
    if _on_cuda(device):
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def write_result(script, numbers, device=None, folder=None):
    """Put a script's numbers into its device's file, with date, commit and versions.

    Args:
        script: the name of the entry; other entries of the file stay.
        numbers: the entry.
        device: "cuda" or "cpu"; what there is if not given.
        folder: where the file is; results/ if not given.
    """
    on_cuda = _on_cuda(device)
    device = device_name(device)
    slug = "-".join(re.findall(r"[a-z0-9]+", device.lower().replace("(r)", "")))
    if not on_cuda:
        slug += f"-{os.cpu_count()}-cores"
    path = Path(folder or Path(__file__).parent / "results") / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[script] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
        },
        **numbers,
    }
    write_text(path, json.dumps(results, indent=2) + "\n")
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
