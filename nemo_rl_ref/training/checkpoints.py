# SPDX-License-Identifier: Apache-2.0
"""What a run needs to go on with the same bits: written on all processes together, and read back.

Not in NeMo RL, whose workers write their own shards. A checkpoint is a folder::

    step_20/
        training_info.json         counters, and the metric that ranks it
        config.yaml                the configuration of the run
        files.json                 size and SHA-256 of every other file
        policy/weights/            config.json and model.safetensors, as from_pretrained reads them
        policy/tokenizer/
        policy/optimizer/          optimizer.pt: averages, schedule; random.pt: generators

Weights are safetensors. Of the other files only tensors and plain containers are read.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nemo_rl_ref.files.sealed import CheckpointError, broken, temporary_name
from nemo_rl_ref.training.processes import from_main, is_deepspeed, is_sharded
from nemo_rl_ref.utils.checkpoint import CheckpointManager, PathLike

__all__ = [
    "Trained",
    "get_random_state",
    "load_checkpoint",
    "save_checkpoint",
    "set_random_state",
]


@dataclass
class Trained:
    """A model and what moves it: what a checkpoint holds under one name.

    Attributes:
        model: From ``accelerator.prepare``. If it has ``save_pretrained``, that writes it.
        optimizer: Its optimizer.
        scheduler: The learning-rate scheduler, not prepared.
    """

    model: Any
    optimizer: Any
    scheduler: Any


def save_checkpoint(
    manager: CheckpointManager,
    step: int,
    training_info: Mapping[str, Any],
    run_config: Mapping[str, Any] | None,
    *,
    accelerator: Any,
    models: Mapping[str, Trained],
    tokenizer: Any = None,
    random_state: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, on all processes together.

    Args:
        manager: Says where, and removes what need not be kept.
        step: Number of steps done.
        training_info: Counters and metrics, see `CheckpointManager.init_tmp_checkpoint`.
        run_config: The configuration, a plain dict.
        accelerator: The run's ``accelerate.Accelerator``.
        models: By name, ``policy`` and for PPO ``value``.
        tokenizer: Saved beside the policy if given.
        random_state: From `get_random_state`; as it is now if not given.

    Returns:
        The folder.

    Raises:
        CheckpointError: If a file cannot be written. What was written is removed; earlier
            checkpoints are untouched.
    """
    from accelerate.utils import gather_object

    states = {name: accelerator.get_state_dict(trained.model) for name, trained in models.items()}
    optimizers = {
        name: _optimizer_state(trained, accelerator)
        for name, trained in models.items()
        if manager.save_optimizer
    }
    random_states = gather_object([random_state or get_random_state()])
    if not manager.save_optimizer:
        random_states = []
    problem: str | None = None
    folder = (manager.checkpoint_dir / temporary_name(step)).absolute()
    if accelerator.is_main_process:
        name = "training_info.json"
        try:
            manager.init_tmp_checkpoint(step, training_info, run_config)
            for name, write in _parts(
                models, states, optimizers, random_states, tokenizer, accelerator
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write(folder / name)
            name = "files.json"
            if not is_deepspeed(accelerator):
                manager.finalize_checkpoint(folder)
        except Exception as error:  # OSError, or what safetensors and torch make of one
            shutil.rmtree(folder, ignore_errors=True)
            latest = manager.get_latest_checkpoint_path()
            problem = (
                f"{folder / name}: cannot be written: "
                f"{error}. Step {step} is not saved. "
                + (f"{latest} is whole: " if latest else "There is no earlier checkpoint: ")
                + "free space, or move the folder to a larger disk and set "
                "checkpointing.checkpoint_dir, and start the same command again"
            )
    if problem := from_main(problem):
        raise CheckpointError(problem)
    if is_deepspeed(accelerator):
        folder = from_main(folder)  # the main process has named it
        if manager.save_optimizer:
            accelerator.save_state(str(folder / "policy" / "optimizer" / "deepspeed"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            manager.finalize_checkpoint(folder)
    accelerator.wait_for_everyone()
    return manager.checkpoint_dir / f"step_{step}"


def load_checkpoint(
    checkpoint_path: PathLike, *, accelerator: Any, models: Mapping[str, Trained]
) -> None:
    """Put optimizers, schedulers and random generators back.

    Of an optimizer only the averages come from the checkpoint. Its rate and all that the
    configuration says come from the configuration, and so does the schedule, which is stepped to
    where it was. The weights are those of ``weights`` in the checkpoint; load them before
    ``accelerator.prepare``. Call `check_checkpoint` first.

    Args:
        checkpoint_path: The checkpoint.
        accelerator: The run's ``accelerate.Accelerator``.
        models: By name, as they were saved.

    Raises:
        CheckpointError: If a file cannot be read, or does not fit the model.
    """
    for name, trained in models.items():
        _, folder = CheckpointManager.get_resume_paths(
            checkpoint_path, model_component=cast(Any, name)
        )
        if folder is None:
            continue
        path = folder / "optimizer.pt"
        state = _torch_load(path)
        try:
            _load_optimizer(trained, state, path, accelerator)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: does not fit this run's model and optimizer: {error}. Set "
                "checkpointing.checkpoint_dir to a new folder for a new run"
            ) from error
    path = Path(checkpoint_path) / next(iter(models)) / "optimizer" / "random.pt"
    if path.exists():
        states = _torch_load(path)
        if accelerator.process_index < len(states):
            set_random_state(states[accelerator.process_index])


def get_random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's generators, as tensors and numbers."""
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys, "int64")), *rest],
        **get_torch_random_state(),
    }


def get_torch_random_state() -> dict[str, Any]:
    """PyTorch's part of `get_random_state`, which takes a few microseconds."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `get_random_state` returned."""
    import numpy

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _parts(
    models: Mapping[str, Trained],
    states: Mapping[str, Any],
    optimizers: Mapping[str, Any],
    random_states: list[dict[str, Any]],
    tokenizer: Any,
    accelerator: Any,
) -> list[tuple[str, Callable[[Path], None]]]:
    """What a checkpoint consists of: the name of each part, and what writes it."""
    parts: list[tuple[str, Callable[[Path], None]]] = []
    for name, trained in models.items():
        model = accelerator.unwrap_model(trained.model)
        parts.append((f"{name}/weights", lambda p, m=model, s=states[name]: _save_weights(m, s, p)))
        if name in optimizers:
            state = {
                "optimizer": optimizers[name],
                "kind": type(trained.optimizer).__name__,
                "scheduler_steps": trained.scheduler.last_epoch,
            }
            parts.append((f"{name}/optimizer/optimizer.pt", lambda p, s=state: torch.save(s, p)))
    first = next(iter(models))
    if random_states:
        parts.append((f"{first}/optimizer/random.pt", lambda p: torch.save(random_states, p)))
    if tokenizer is not None:
        parts.append((f"{first}/tokenizer", lambda p: tokenizer.save_pretrained(p)))
    return parts


def _optimizer_state(trained: Trained, accelerator: Any) -> dict[str, Any] | None:
    """The optimizer's whole state, which with FSDP only the main process gets.

    None with DeepSpeed, which writes its own.
    """
    if is_deepspeed(accelerator):
        return None
    if not is_sharded(accelerator):
        return trained.optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(trained.model, trained.optimizer, options=options)


def _load_optimizer(trained: Trained, saved: dict[str, Any], path: Path, accelerator: Any) -> None:
    """Load the averages into an optimizer as it was made, and step its schedule to where it was."""
    optimizer, state = trained.optimizer, saved["optimizer"]
    ours = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    if state is None:
        accelerator.load_state(str(path.parent / "deepspeed"))
    elif saved["kind"] != type(optimizer).__name__ or _kept(state["param_groups"]) != _kept(ours):
        warnings.warn(
            f"{path}: its {saved['kind']} keeps other averages than this run's "
            f"{type(optimizer).__name__}, which start at 0",
            stacklevel=2,
        )
    elif is_sharded(accelerator):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(trained.model, optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, ours, strict=True):
        group.update(mine)
    with warnings.catch_warnings():  # an earlier run has taken the optimizer's steps
        warnings.simplefilter("ignore")
        for _ in range(saved["scheduler_steps"]):
            trained.scheduler.step()


def _kept(groups: list[dict[str, Any]]) -> list[list[bool]]:
    """The switches that decide which averages an optimizer keeps for a parameter."""
    return [[bool(g.get(key)) for key in ("amsgrad", "centered", "momentum")] for g in groups]


def _save_weights(model: Any, state: dict[str, Any], folder: Path) -> None:
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared = first.setdefault(id(parameter), name)
        if name in state and shared in state:  # tied weights are two tensors in a gathered state
            state[name] = state[shared]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=state)
    else:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever its reader stumbles over
        raise broken(path, f"cannot be read: {error}") from error
