# SPDX-License-Identifier: Apache-2.0
"""Outputs of NeMo RL's own code for recorded inputs, computed in an environment of its own.

`make_golden` exports a commit of a checkout, makes a virtual environment of the packages in
``golden.txt`` and starts this file there as a script. The script puts NeMo RL's modules where the
mirror's would be imported, so that `nemo_rl_ref.contract.replay` calls NeMo RL, and records what
comes back.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

#: Modules that NeMo RL imports and that compute nothing: empty ones stand in for them.
TRACKERS = ("mlflow", "swanlab", "wandb")


def make_golden(source: Any, environment: Path) -> dict[str, Any]:
    """Run every case of ``golden.json`` again.

    Args:
        source: The `checkout.Checkout` whose code runs, at its commit.
        environment: The folder of the virtual environment. It is made if it is not there, or if
            ``golden.txt`` is another by now, which downloads PyTorch.

    Returns:
        The new contents of ``golden.json``: the same cases and inputs. Outputs that agree to 1e-6
        stay as they are, so that another processor's rounding changes nothing.

    Raises:
        ValueError: The packages cannot be installed, or NeMo RL's code fails; with the last line
            that was printed.
    """
    made_from, wanted = environment / "golden.txt", (FOLDER / "golden.txt").read_text("utf-8")
    python = environment / "bin/python"
    if not made_from.is_file() or made_from.read_text(encoding="utf-8") != wanted:
        venv.create(environment, clear=True, with_pip=True)
        _run([python, "-m", "pip", "install", "-q", "-r", FOLDER / "golden.txt"], "golden.txt")
        made_from.write_text(wanted, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for path, text in source.texts.items():
            if path.startswith("nemo_rl/"):
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
        result = Path(folder, "result.json")
        _run([python, "-P", __file__, folder, FOLDER.parent.parent, result], "NeMo RL's code")
        made = json.loads(result.read_text(encoding="utf-8"))
    recorded = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    for case, outputs in zip(recorded["cases"], made["outputs"], strict=True):
        if not _agree(outputs, case["outputs"]):
            case["outputs"] = outputs
    return recorded | {"commit": source.commit, "torch": made["torch"]}


def _agree(made: Any, recorded: Any) -> bool:
    """Whether two outputs have one structure, and numbers that differ by 1e-6 at most."""
    if isinstance(made, dict) and isinstance(recorded, dict):
        same = made.keys() == recorded.keys()
        return same and all(_agree(made[key], recorded[key]) for key in made)
    if isinstance(made, list) and isinstance(recorded, list):
        same = len(made) == len(recorded)
        return same and all(_agree(a, b) for a, b in zip(made, recorded, strict=True))
    if isinstance(made, float) and isinstance(recorded, float):
        both_nan = made != made and recorded != recorded
        return both_nan or math.isclose(made, recorded, rel_tol=1e-6, abs_tol=1e-6)
    return type(made) is type(recorded) and made == recorded


def golden_text(golden: dict[str, Any]) -> str:
    """Write the contents of ``golden.json``, an input or output a line."""
    text = json.dumps(golden, indent=1)
    flat = re.compile(r"\[[^][{}\"]*\]|\{\s*\"shape\"[^{}]*\}")
    for _ in range(2):  # the list of a tensor's numbers, then the tensor
        text = flat.sub(lambda match: re.sub(r"\s+", " ", match[0]), text)
    return text + "\n"


def _run(command: list[Any], what: str) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise ValueError(f"golden: {what} failed: {lines[-1]}")


def _encode(value: Any) -> Any:
    """Tensors and numbers as ``golden.json`` has them: nine digits hold a float32."""
    import torch

    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        dtype, data = str(value.dtype).removeprefix("torch."), value.flatten().tolist()
        return {"shape": list(value.shape), "dtype": dtype, "data": [_encode(x) for x in data]}
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _replay(source: str, root: str, result: str) -> None:
    """The script in the other environment: import NeMo RL as the mirror, and run the cases."""
    import importlib.machinery
    import importlib.util
    import types
    import typing

    import torch

    sys.path[:0] = [source, root]
    # Pydantic wants this one before Python 3.12; golden.txt has it.
    typing.TypedDict = importlib.import_module("typing_extensions").TypedDict
    for name in TRACKERS:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    for name in (
        "algorithms",
        "algorithms.utils",
        "algorithms.loss",
        "algorithms.advantage_estimator",
    ):
        sys.modules[f"nemo_rl_ref.{name}"] = importlib.import_module(f"nemo_rl.{name}")
    path = Path(root, "nemo_rl_ref/contract/replay.py")
    spec = importlib.util.spec_from_file_location("replay", path)
    assert spec is not None and spec.loader is not None
    replay = sys.modules["replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replay)
    outputs = [_encode(replay.run_case(case)) for case in replay.load_golden()]
    content = {"torch": torch.__version__, "outputs": outputs}
    Path(result).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    _replay(*sys.argv[1:])
