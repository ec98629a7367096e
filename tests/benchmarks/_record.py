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

from nemo_rl_ref.atomic import write_text

ROOT = Path(__file__).parents[2]


def device_name():
    """The GPU if there is one, else the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def write_result(script, numbers):
    """Put a script's numbers into its device's file, with date, commit and versions."""
    device = device_name()
    slug = "-".join(re.findall(r"[a-z0-9]+", device.lower().replace("(r)", "")))
    if not torch.cuda.is_available():
        slug += f"-{os.cpu_count()}-cores"
    path = Path(__file__).parent / "results" / f"{slug}.json"
    path.parent.mkdir(exist_ok=True)
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
    print(path.relative_to(ROOT))
