# SPDX-License-Identifier: Apache-2.0
"""The reference policy's log-probabilities: computed once for the samples of a run, and kept.

Samples are taken in the order of their lengths, some at a time, so that the result depends on
which samples there are and not on the order in which a run needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_rl_ref.config.sections import PolicyConfig
from nemo_rl_ref.files.whole import replacing
from nemo_rl_ref.padding import PackedRows
from nemo_rl_ref.training.samples import Samples
from nemo_rl_ref.training.step import next_token_logprobs

#: Samples of one set and the numbers of some of them: what one forward pass takes.
_Chunk = tuple[Samples, list[int]]


def add_reference_logprobs(
    policy: PolicyConfig,
    sets: Sequence[tuple[Samples, Sequence[int]]],
    load_model: Callable[[str], Any],
    accelerator: Any,
    folder: Path | None,
) -> None:
    """Give the batches of preference samples ``reference_policy_logprobs``.

    The model must fit on one device.

    Args:
        policy: The section ``policy``; ``train_micro_batch_size`` pairs are run at a time.
        sets: Samples, with the numbers of those that are needed. The samples are changed: their
            batches get the log-probabilities, float32 ``(B, S)`` in nats, column ``t`` for token
            ``t + 1``.
        load_model: Loads the model of ``policy.model_name``.
        accelerator: The run's ``accelerate.Accelerator``.
        folder: Where ``reference_logprobs.safetensors`` is kept; None to keep it nowhere.
    """
    from accelerate.utils import gather_object

    chunks: list[_Chunk] = []
    for samples, numbers in sets:
        length = lambda n, s=samples: max(map(len, s[n]["rows"]))  # noqa: E731
        ordered, size = sorted(numbers, key=length), policy.train_micro_batch_size
        chunks += [(samples, ordered[i : i + size]) for i in range(0, len(ordered), size)]
    fingerprint = _fingerprint(policy, chunks)
    path = folder / "reference_logprobs.safetensors" if folder else None
    rows = _read(path, fingerprint) if path else None
    if not all(gather_object([rows is not None])):  # processes may see different disks
        rows = _compute(policy, load_model, chunks, accelerator)
        if path and accelerator.is_main_process:
            _write(path, rows, fingerprint)
    packed = PackedRows(rows)
    pairs = ((samples, number) for samples, numbers in chunks for number in numbers)
    firsts: dict[int, dict[int, int]] = {id(samples): {} for samples, _ in sets}
    for pair, (samples, number) in enumerate(pairs):
        firsts[id(samples)][number] = 2 * pair
    for samples, _ in sets:
        samples.batch = _with_reference(samples.batch, packed, firsts[id(samples)])


def _with_reference(batch: Any, packed: PackedRows, firsts: Mapping[int, int]) -> Any:
    """A `Samples.batch` that adds the rows of each sample, the first of which is given."""

    def with_reference(numbers: Sequence[int]) -> Any:
        data = batch(numbers)
        rows = torch.tensor([first for n in numbers for first in (firsts[n], firsts[n] + 1)])
        (logprobs,), _ = packed.padded(rows, (0,), width=data["input_ids"].shape[1])
        data["reference_policy_logprobs"] = logprobs
        return data

    return with_reference


@torch.no_grad()
def _compute(
    policy: PolicyConfig,
    load_model: Callable[[str], Any],
    chunks: Sequence[_Chunk],
    accelerator: Any,
) -> list[torch.Tensor]:
    """One tensor a row, without padding, in the order of the chunks; processes take turns."""
    from accelerate.utils import gather_object

    model = load_model(policy.model_name).eval().to(accelerator.device)
    if accelerator.is_main_process:
        print(f"reference log-probabilities of {sum(len(n) for _, n in chunks)} pairs", flush=True)
    mine = []
    for turn in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        samples, numbers = chunks[turn]
        data = samples.batch(numbers).to(accelerator.device)
        with accelerator.autocast():
            logprobs = next_token_logprobs(model, data).cpu()
        lengths = data["input_lengths"].tolist()
        mine.append(
            (turn, [row[: n - 1].clone() for row, n in zip(logprobs, lengths, strict=True)])
        )
    everyone = gather_object(mine) if accelerator.num_processes > 1 else mine
    return [row for _, rows in sorted(everyone, key=lambda item: item[0]) for row in rows]


def _fingerprint(policy: PolicyConfig, chunks: Sequence[_Chunk]) -> str:
    """A sum over what the log-probabilities depend on: model, precision and tokens."""
    name = str(policy.model_name)
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    summed = hashlib.sha256(json.dumps([name, policy.precision, stats]).encode())
    for samples, numbers in chunks:
        summed.update(samples.batch(numbers)["input_ids"].numpy().tobytes())
    return summed.hexdigest()


def _write(path: Path, rows: Sequence[torch.Tensor], fingerprint: str) -> None:
    from safetensors.torch import save_file

    lengths = torch.tensor([len(row) for row in rows])
    tensors = {"logprobs": torch.cat(list(rows)), "lengths": lengths}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"fingerprint": fingerprint})


def _read(path: Path, fingerprint: str) -> list[torch.Tensor] | None:
    """What was kept, or None if that is nothing, of something else, or cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if file.metadata().get("fingerprint") == fingerprint:
                return list(file.get_tensor("logprobs").split(file.get_tensor("lengths").tolist()))
    except (OSError, SafetensorError):
        pass  # not there, or cut short: it is computed again
    return None
