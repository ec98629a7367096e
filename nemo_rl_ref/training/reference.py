# SPDX-License-Identifier: Apache-2.0
"""The reference policy's log-probabilities: a column of preference samples, computed once.

The reference policy does not change, and neither does a sample. Samples are taken in the order of
their lengths, some at a time, so that the result depends on which samples there are and not on the
order in which a run needs them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.config.sections import PolicyConfig
from nemo_rl_ref.files.whole import replacing
from nemo_rl_ref.training.samples import Samples
from nemo_rl_ref.training.step import next_token_logprobs

COLUMN = "reference_policy_logprobs"

#: Samples of one set and the numbers of some of them: what one forward pass takes.
_Chunk = tuple[Samples, list[int]]


def add_reference_logprobs(
    model: Any, sets: Sequence[Samples], accelerator: Any, *, batch_size: int = 64
) -> None:
    """Give preference samples the column ``reference_policy_logprobs``.

    It is float32, in nats, laid out as NeMo RL has it for DPO: entry ``t`` belongs to token
    ``t + 1``, and the last one is 0.

    Args:
        model: The reference policy, in evaluation mode.
        sets: The samples, all of which get the column.
        accelerator: An ``accelerate.Accelerator``.
        batch_size: Samples of a forward pass.
    """
    for samples in sets:
        samples.tokenize()
    chunks = _chunks(sets, batch_size)
    _add(chunks, _compute(model, chunks, accelerator))


def keep_reference_logprobs(
    policy: PolicyConfig,
    sets: Sequence[Samples],
    load_model: Callable[[str], Any],
    accelerator: Any,
    folder: Path | None,
) -> None:
    """Do the same for a run, which keeps them in a file.

    The model must fit on one device.

    Args:
        policy: The section ``policy``; ``train_micro_batch_size`` pairs are run at a time.
        sets: The samples. Those that have been tokenized get the column.
        load_model: Loads the model of ``policy.model_name``.
        accelerator: The run's ``accelerate.Accelerator``.
        folder: Where ``reference_logprobs.safetensors`` is kept; None to keep it nowhere.
    """
    from accelerate.utils import gather_object
    from safetensors import SafetensorError

    chunks = _chunks(sets, policy.train_micro_batch_size)
    fingerprint = _fingerprint(policy, chunks)
    path = folder / "reference_logprobs.safetensors" if folder else None
    found = _read(path, fingerprint) if path else None
    rows = found or []
    if not all(gather_object([found is not None])):  # processes may see different disks
        model = load_model(policy.model_name).eval().to(accelerator.device)
        if accelerator.is_main_process:
            pairs = sum(len(numbers) for _, numbers in chunks)
            print(f"reference log-probabilities of {pairs} pairs", flush=True)
        rows = _compute(model, chunks, accelerator)
        if path and accelerator.is_main_process:
            try:
                _write(path, rows, fingerprint)
            except (OSError, SafetensorError) as error:
                warnings.warn(f"{path}: cannot be kept: {error}", stacklevel=2)
    _add(chunks, rows)


def _chunks(sets: Sequence[Samples], size: int) -> list[_Chunk]:
    """The tokenized samples of each set, the shortest first, some at a time."""
    chunks: list[_Chunk] = []
    for samples in sets:
        lengths = {n: max(map(len, samples[n]["input_ids"])) for n in samples.tokenized}
        ordered = sorted(lengths, key=lengths.__getitem__)
        chunks += [(samples, ordered[low : low + size]) for low in range(0, len(ordered), size)]
    return chunks


@torch.no_grad()
def _compute(model: Any, chunks: Sequence[_Chunk], accelerator: Any) -> list[Tensor]:
    """One tensor a row, as long as the row, in the order of the chunks; processes take turns."""
    from accelerate.utils import gather_object

    mine = []
    for turn in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        samples, numbers = chunks[turn]
        data = samples.batch(numbers).to(accelerator.device)
        with accelerator.autocast():
            logprobs = next_token_logprobs(model, data).cpu()
        shifted = torch.nn.functional.pad(logprobs, (0, 1))
        rows = list(zip(shifted, data["input_lengths"].tolist(), strict=True))
        for row, length in rows:
            row[length - 1] = 0  # predicts what comes after the row
        mine.append((turn, [row[:length].clone() for row, length in rows]))
    everyone = gather_object(mine) if accelerator.num_processes > 1 else mine
    return [row for _, rows in sorted(everyone, key=lambda item: item[0]) for row in rows]


def _add(chunks: Sequence[_Chunk], rows: Sequence[Tensor]) -> None:
    """Give each sample its rows, which are in the order of the chunks."""
    left, found = iter(rows), {}
    for samples, numbers in chunks:
        of_set = found.setdefault(samples, {})
        for number in numbers:
            of_set[number] = [next(left) for _ in samples[number]["input_ids"]]
    for samples, of_set in found.items():
        samples.add(COLUMN, of_set)


def _fingerprint(policy: PolicyConfig, chunks: Sequence[_Chunk]) -> str:
    """A sum over what the log-probabilities depend on: model, precision and tokens."""
    name = str(policy.model_name)
    files = sorted(p for p in Path(name).iterdir() if p.is_file()) if Path(name).is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    summed = hashlib.sha256(json.dumps([COLUMN, name, policy.precision, stats]).encode())
    for samples, numbers in chunks:
        summed.update(samples.batch(numbers)["input_ids"].numpy().tobytes())
    return summed.hexdigest()


def _write(path: Path, rows: Sequence[Tensor], fingerprint: str) -> None:
    from safetensors.torch import save_file

    lengths = torch.tensor([len(row) for row in rows])
    tensors = {"logprobs": torch.cat(list(rows)), "lengths": lengths}
    metadata = {"fingerprint": fingerprint, "sha256": _sum(tensors)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _read(path: Path, fingerprint: str) -> list[Tensor] | None:
    """What was kept, or None if that is nothing, of something else, or not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("logprobs", "lengths")}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        metadata, tensors = {}, {}
    if metadata.get("sha256") != _sum(tensors):
        warnings.warn(f"{path}: is not what was written; it is computed again", stacklevel=2)
        return None
    if metadata["fingerprint"] != fingerprint:
        return None
    return list(tensors["logprobs"].split(tensors["lengths"].tolist()))


def _sum(tensors: dict[str, Tensor]) -> str:
    summed = hashlib.sha256()
    for tensor in tensors.values():
        summed.update(tensor.numpy().tobytes())
    return summed.hexdigest()
