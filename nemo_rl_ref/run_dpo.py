# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation with NeMo RL's configuration.

    python -m nemo_rl_ref.run_dpo --config dpo.yaml policy.model_name=… data.train.data_path=…
    python -m nemo_rl_ref.run_dpo --config dpo.yaml --loss my_loss.py:MyLoss ++dpo.margin=0.5 …
    accelerate launch --num_processes 4 -m nemo_rl_ref.run_dpo --config dpo.yaml …

The reference policy is the model of ``policy.model_name`` as it is before training. It does not
change, and neither does a sample, so its log-probabilities are computed once, for the samples that
the run will use; NeMo RL computes them again in every step. They are kept beside the checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.command_line import run
from nemo_rl_ref.data.collate_fn import preference_collate_fn
from nemo_rl_ref.data.datasets.preference_datasets import load_preference_dataset
from nemo_rl_ref.data.datasets.utils import update_single_dataset_config
from nemo_rl_ref.data.processors import preference_preprocessor
from nemo_rl_ref.tiny import load_policy
from nemo_rl_ref.trainer import USED_KEYS, Samples, Task, fit
from nemo_rl_ref.training import next_token_logprobs
from nemo_rl_ref.user_code import checked_loss

USED = (*USED_KEYS, "dpo", "data.val_data_paths")
METRICS = (
    "loss", "sft_loss", "preference_loss", "accuracy", "rewards_chosen_mean",
    "rewards_rejected_mean", "num_valid_samples", "global_valid_seqs", "global_valid_toks",
)  # fmt: skip


def train(config: dict[str, Any], *, loss: str | None = None, strict: bool = False, **options: Any):
    """Train as a configuration says.

    Args:
        config: The configuration, resolved, a plain dict.
        loss: ``file.py:Class`` to take in the place of `DPOLossFn`.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: Passed to `nemo_rl_ref.trainer.fit`.

    Returns:
        What `nemo_rl_ref.trainer.fit` returns.
    """
    section = config["dpo"]
    if loss:
        loss_fn = checked_loss(loss, section, "dpo", pairs=True, strict=strict)
    else:
        loss_fn = DPOLossFn(DPOLossConfig(**section))
    tokenizer = get_tokenizer(config["policy"]["tokenizer"])
    training, validation = preference_samples(config, tokenizer, add_loss_mask=True)
    task = Task(
        "dpo",
        training,
        validation,
        load_policy,
        loss_fn,
        validation_metrics=None if loss else {name: name for name in METRICS},
    )
    task.prepare = lambda *run: add_reference_logprobs(config["policy"], task, *run)
    return fit(task, config, tokenizer, **options)


def preference_samples(
    config: Mapping[str, Any], tokenizer: Any, *, add_loss_mask: bool
) -> tuple[Samples, dict[str, Samples]]:
    """The training pairs, and the validation pairs by name, that a configuration asks for.

    Args:
        config: The configuration; read are ``data`` and ``policy``.
        tokenizer: The tokenizer, with a chat template and a pad token.
        add_loss_mask: Whether batches have ``token_mask``.

    Raises:
        ValueError: If there are no training data.
        DataError: For a bad record.
    """
    data, multiple = config["data"], config["policy"].get("make_sequence_length_divisible_by") or 1

    def samples(entry: Mapping[str, Any]) -> Samples:
        entry = dict(entry)
        update_single_dataset_config(entry, data.get("default") or {})
        pairs = load_preference_dataset(entry)
        limit, spec = data["max_input_seq_length"], pairs.task_spec
        return Samples(
            pairs.dataset,
            pairs.places,
            lambda record, n: preference_preprocessor(record, spec, tokenizer, limit, n),
            lambda chosen: preference_collate_fn(chosen, tokenizer, multiple, add_loss_mask),
        )

    if not isinstance(data.get("train"), Mapping):
        raise ValueError(f"data.train: got {data.get('train')!r}, expected one dataset")
    named = data.get("val_data_paths") or {}
    sets = {n: {"dataset_name": "PreferenceDataset", "data_path": p} for n, p in named.items()}
    if not sets and data.get("validation"):
        sets = {"default": data["validation"]}
    return samples(data["train"]), {name: samples(entry) for name, entry in sets.items()}


def add_reference_logprobs(
    policy: Mapping[str, Any],
    task: Task,
    accelerator: Any,
    trained_on: Sequence[int],
    validated_on: Mapping[str, Sequence[int]],
    folder: Path | None,
) -> None:
    """Give the batches of a task ``reference_policy_logprobs``, computed once for each sample.

    Samples are taken in the order of their lengths, ``train_micro_batch_size`` at a time, so that
    the result depends on which samples there are and not on the order in which a run needs them.
    The model must fit on one device.

    Args:
        policy: The section ``policy``.
        task: Its samples are changed: their batches get the log-probabilities, float32 ``(B, S)``
            in nats, column ``t`` for token ``t + 1``.
        accelerator: The run's ``accelerate.Accelerator``.
        trained_on: Numbers of the training samples that are needed.
        validated_on: Numbers of the validation samples that are needed, by name.
        folder: Where ``reference_logprobs.safetensors`` is kept; None to keep it nowhere.
    """
    from accelerate.utils import gather_object

    sets = [
        (task.train, trained_on),
        *((task.validation[n], validated_on[n]) for n in validated_on),
    ]
    chunks = []
    for samples, numbers in sets:
        length = lambda n, s=samples: max(s[n]["length_chosen"], s[n]["length_rejected"])  # noqa: E731
        ordered, size = sorted(numbers, key=length), policy["train_micro_batch_size"]
        chunks += [(samples, ordered[i : i + size]) for i in range(0, len(ordered), size)]
    fingerprint = _fingerprint(policy, chunks)
    path = folder / "reference_logprobs.safetensors" if folder else None
    rows = _read(path, fingerprint) if path else None
    if not all(gather_object([rows is not None])):  # processes may see different disks
        rows = _compute(policy, task, chunks, accelerator)
        if path and accelerator.is_main_process:
            _write(path, rows, fingerprint)
    by_sample: dict[int, dict[int, list[torch.Tensor]]] = {id(s): {} for s, _ in sets}
    at = 0
    for samples, numbers in chunks:
        for number in numbers:
            by_sample[id(samples)][number] = rows[at : at + 2]
            at += 2
    for samples, _ in sets:
        samples.batch = _with_reference(samples.batch, by_sample[id(samples)])


def _with_reference(batch: Any, reference: Mapping[int, list[torch.Tensor]]) -> Any:
    def with_reference(numbers: Sequence[int]) -> Any:
        data = batch(numbers)
        logprobs = pad_sequence([v for number in numbers for v in reference[number]], True)
        missing = data["input_ids"].shape[1] - logprobs.shape[1]
        data["reference_policy_logprobs"] = torch.nn.functional.pad(logprobs, (0, missing))
        return data

    return with_reference


@torch.no_grad()
def _compute(
    policy: Mapping[str, Any], task: Task, chunks: Sequence[Any], accelerator: Any
) -> list[torch.Tensor]:
    """One tensor a row, without padding, in the order of the chunks; processes take turns."""
    from accelerate.utils import gather_object

    model = task.load_model(policy["model_name"]).eval().to(accelerator.device)
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


def _fingerprint(policy: Mapping[str, Any], chunks: Sequence[Any]) -> str:
    """A sum over what the log-probabilities depend on: model, precision and tokens."""
    name = str(policy["model_name"])
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    summed = hashlib.sha256(json.dumps([name, policy["precision"], stats]).encode())
    for samples, numbers in chunks:
        summed.update(samples.batch(numbers)["input_ids"].numpy().tobytes())
    return summed.hexdigest()


def _write(path: Path, rows: Sequence[torch.Tensor], fingerprint: str) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp_{path.name}")
    lengths = torch.tensor([len(row) for row in rows])
    tensors = {"logprobs": torch.cat(list(rows)), "lengths": lengths}
    save_file(tensors, temporary, metadata={"fingerprint": fingerprint})
    os.replace(temporary, path)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run(argv, __doc__.split("\n")[0], USED, train)


if __name__ == "__main__":
    sys.exit(main())
