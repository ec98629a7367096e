# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is of, and what is another in the run that would go on from it.

Not in NeMo RL, which resumes from the newest checkpoint in the folder, whatever run wrote it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl_ref.config.sections import RunSettings
from nemo_rl_ref.config.settings import read_settings
from nemo_rl_ref.contract.user_code import sources
from nemo_rl_ref.files.sealed import CheckpointError
from nemo_rl_ref.utils.logger import flatten_dict

#: Raised by hand whenever the same configuration and data train another result than before.
RESULTS = 1

#: What may differ between a checkpoint and the run that resumes from it, below any section.
_MAY_CHANGE = (
    "logger", "cluster", "checkpointing", "data.validation", "data.val_data_paths",
    "policy.train_micro_batch_size",
)  # fmt: skip
_SECTION_MAY_CHANGE = (
    "max_num_steps", "max_num_epochs", "val_period", "val_batches", "val_global_batch_size",
    "val_micro_batch_size", "val_at_start", "val_at_end",
)  # fmt: skip

#: What a change of these does, where it is not what it says.
_EFFECT = {
    "policy.model_name": "no effect on the policy, whose weights are the checkpoint's; a reference"
    " policy is the new model",
    "value.model_name": "no effect: the weights are the checkpoint's",
    "policy.optimizer.name": "the new optimizer starts without the old one's averages",
    "value.optimizer.name": "the new optimizer starts without the old one's averages",
}


def source_of(thing: Any) -> str:
    """The name of a loss or a reward, and a sum over the file that it is written in.

    The sum is also over the modules that the file imports from its own folder. What belongs to
    this package has none: `RESULTS` stands for it.

    Args:
        thing: A function, a class, or an object of one.
    """
    thing = inspect.unwrap(thing)
    while isinstance(thing, functools.partial):
        thing = inspect.unwrap(thing.func)
    kind = thing if inspect.isroutine(thing) or isinstance(thing, type) else type(thing)
    name, module = kind.__qualname__, kind.__module__ or ""
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return name
    try:
        path = Path(inspect.getsourcefile(kind) or "")
        content = b"".join(file.read_bytes() for file in sources(path))
    except (OSError, TypeError):  # of no file: made in a notebook
        return f"{name} of {module}"
    return f"{name} of {path.name}, SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def tokenizer_digest(tokenizer: Any) -> str:
    """A sum over a tokenizer's tokens and its chat template."""
    parts = (tokenizer.chat_template, sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def model_digest(name: str | Path) -> str:
    """A sum over the files of a model that a run compares itself with; the name of one of the hub.

    Args:
        name: Name or path.
    """
    summed = hashlib.sha256()
    files = [*Path(name).glob("*.safetensors"), *Path(name).glob("config.json")]
    for path in sorted(files):
        with path.open("rb") as file:
            summed.update(hashlib.file_digest(file, "sha256").digest())
    return summed.hexdigest() if files else str(name)


def changes(
    checkpoint: str | Path, saved: Mapping[str, Any], ours: Mapping[str, Any], settings: RunSettings
) -> dict[str, str]:
    """Compare what a checkpoint is of with a run: the configurations as they are read, and more.

    Args:
        checkpoint: The checkpoint.
        saved: What the run that wrote it was: ``algorithm``, ``results`` (`RESULTS`), ``loss``,
            ``reward`` (see `source_of`), and sums: ``tokenizer``, ``data.train``, ``reference``.
        ours: The same of this run.
        settings: Of this run. What its configuration does not have is not compared.

    Returns:
        What is another, in words, by its key or name. Steps, validation, logs, checkpoints and the
        size of micro-batches may change.

    Raises:
        CheckpointError: If it is of another algorithm.
    """
    import yaml

    def given(read: RunSettings) -> dict[str, Any]:
        return flatten_dict(read.model_dump(mode="json", exclude_unset=True))

    name = settings.algorithm
    if saved.get("algorithm", name) != name:
        raise CheckpointError(
            f"{checkpoint}: is of a run of {saved['algorithm']}, this is {name}. Set "
            "checkpointing.checkpoint_dir to a new folder; to train on from its weights, set "
            f"policy.model_name={checkpoint}/policy/weights besides"
        )
    path = Path(checkpoint) / "config.yaml"
    try:
        old = given(read_settings(yaml.safe_load(path.read_text()), type(settings)))
    except ValueError as error:
        return {"config.yaml": f"not a configuration that this version reads: {error}"}
    new = given(settings)
    may_change = (*_MAY_CHANGE, *(f"{name}.{key}" for key in _SECTION_MAY_CHANGE))
    found = {
        key: f"{old.get(key, 'not there')!r} in the checkpoint, {new.get(key, 'not there')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in may_change)
    }
    words = {
        "data.train": "the records have changed",
        "tokenizer": "its tokens or its chat template have changed",
        "reference": "the files of the reference model (policy.model_name, or the teacher) are others",
        "results": "this version of the package trains another result",
    }
    for key in ours.keys() | saved.keys():
        if saved.get(key) != ours.get(key):
            both = f"{saved.get(key)} in the checkpoint, {ours.get(key)} now"
            found[key] = words.get(key) or both
    return found


def refuse(checkpoint: str | Path, found: Mapping[str, str]) -> CheckpointError:
    """The error for a run that is another than its checkpoint's; see `changes`."""
    lines = [f"{key}: {text}" for key, text in list(found.items())[:20]]
    shown = "\n  ".join([*lines, *([f"and {len(found) - 20} more"] if len(found) > 20 else [])])
    return CheckpointError(
        f"{checkpoint}: the checkpoint is of another run:\n  {shown}\nSet them back. Or set "
        "checkpointing.checkpoint_dir to a new folder for a new run. Or, to go on with the "
        "changes, pass --allow-config-changes"
    )


def effects(found: Mapping[str, str]) -> list[str]:
    """What each change does to a run that goes on with it, one line each; see `changes`."""
    return [f"{key}: {text}: {_EFFECT.get(key, 'from here on')}" for key, text in found.items()]
