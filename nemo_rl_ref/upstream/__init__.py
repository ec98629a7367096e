# SPDX-License-Identifier: Apache-2.0
"""What is known about NeMo RL at one commit, as data.

``manifest.json`` lists symbols, signatures, files and configurations. ``golden.json`` lists inputs
and the outputs that NeMo RL's own code returned for them. ``keys.json`` lists every key that a
configuration of NeMo RL may have, ``places.json`` where in its source each of them stands.
``sources.json`` has hashes of what the code computes. ``python -m nemo_rl_ref.upstream`` makes them.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

#: The commit of NVIDIA-NeMo/RL that the files describe.
COMMIT = "7ea279abfbeb698b092856d0dab61e7cf39bc909"

#: Where the files are.
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class GoldenCase:
    """One call of NeMo RL's code.

    Attributes:
        symbol: dotted path under ``nemo_rl``, for example ``algorithms.loss.DPOLossFn``.
        case: a name, unique among the cases of the symbol.
        config: the configuration the symbol was built or called with.
        inputs: the arguments; tensors are decoded.
        outputs: what came back, for a loss ``loss``, ``grad`` (with respect to the first input)
            and ``metrics``; tensors are decoded.
    """

    symbol: str
    case: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]


@cache
def load_manifest() -> dict[str, Any]:
    """Reads ``manifest.json``: ``symbols``, ``exports``, ``configs``, ``scripts`` and ``files``.

    Returns:
        The parsed file. It is read once and shared: do not write to it.

    Raises:
        ValueError: if the file describes another commit than `COMMIT`.
    """
    return read_facts("manifest.json")


@cache
def load_golden() -> tuple[GoldenCase, ...]:
    """Reads ``golden.json`` and decodes its tensors.

    Returns:
        All cases. They are read once and shared: clone a tensor before writing to it.

    Raises:
        ValueError: if the file describes another commit than `COMMIT`.
    """
    return tuple(GoldenCase(**_decode(case)) for case in read_facts("golden.json")["cases"])


@cache
def load_keys() -> dict[str, Any]:
    """Reads ``keys.json``: ``keys``, all configuration keys, and ``open``, sections with any key.

    Returns:
        The parsed file. It is read once and shared: do not write to it.

    Raises:
        ValueError: if the file describes another commit than `COMMIT`.
    """
    return read_facts("keys.json")


def read_facts(name: str) -> dict[str, Any]:
    """Reads one of the files by its name.

    Raises:
        ValueError: if the file describes another commit than `COMMIT`.
    """
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    if content["commit"] != COMMIT:
        raise ValueError(f"{name}: commit is {content['commit']}, expected {COMMIT}")
    return content


def _decode(value: Any) -> Any:
    """Turns every ``{"shape", "dtype", "data"}`` below `value` into a tensor."""
    if isinstance(value, dict):
        if value.keys() == {"shape", "dtype", "data"}:
            import torch  # here, because the names of keys are also wanted without it

            dtype = getattr(torch, value["dtype"])
            return torch.tensor(value["data"], dtype=dtype).reshape(value["shape"])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
