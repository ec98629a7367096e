# SPDX-License-Identifier: Apache-2.0
"""Where the checkpoints of a run lie, which is the latest and the best, and which are kept.

`CheckpointManager` is NeMo RL's, without the background thread. A checkpoint is written as
``tmp_step_20_…``, sealed (`nemo_rl_ref.files.sealed`) and renamed to ``step_20``. What is in it:
`nemo_rl_ref.training.checkpoints`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

from nemo_rl_ref.files.sealed import flush, read_json, seal, steps_in, temporary_name

PathLike = Union[str, "os.PathLike[Any]"]


class CheckpointManager:
    """Where the checkpoints of a run lie, and which of them are kept.

    With ``keep_top_k``, those at multiples of ``save_period`` are kept that are best by
    ``metric_name``, or newest where there is none; equal ones by age. ``ft_keep_latest_k`` keeps
    the newest besides. The latest is never removed, because a run resumes from it.

    Args:
        config: The section ``checkpointing``, checked: see
            `nemo_rl_ref.config.sections.CheckpointingConfig`.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.checkpoint_dir = Path(config["checkpoint_dir"])
        self.metric_name: str | None = config.get("metric_name")
        self.higher_is_better = config.get("higher_is_better", False)
        self.keep_top_k = config.get("keep_top_k")
        self.save_period: int = config["save_period"]
        self.ft_keep_latest_k: int | None = config.get("ft_keep_latest_k")
        self.save_optimizer = config.get("save_optimizer", True)

    @staticmethod
    def get_resume_paths(
        last_checkpoint_path: Optional[PathLike],
        *,
        model_component: Literal["policy", "value"] = "policy",
    ) -> tuple[Optional[Path], Optional[Path]]:
        """Return the folders of weights and optimizer in a checkpoint.

        Args:
            last_checkpoint_path: The checkpoint; None for a run that starts fresh.
            model_component: Which model.

        Returns:
            Both None without a checkpoint; the second None where no optimizer was saved, with a
            warning.
        """
        if not last_checkpoint_path:
            return None, None
        component = Path(last_checkpoint_path) / model_component
        if (component / "optimizer").exists():
            return component / "weights", component / "optimizer"
        warnings.warn(
            f"{component / 'optimizer'}: not in the checkpoint, the optimizer starts afresh",
            stacklevel=2,
        )
        return component / "weights", None

    def init_tmp_checkpoint(
        self, step: int, training_info: Mapping[str, Any], run_config: Optional[Any] = None
    ) -> PathLike:
        """Make the folder that a checkpoint is written in, with its counters and configuration.

        Args:
            step: Number of steps done.
            training_info: Goes to ``training_info.json``; tensors of one element become numbers.
            run_config: Goes to ``config.yaml``: a plain dict or a pydantic model.

        Returns:
            The folder, absolute: ``tmp_step_{step}`` with host and process.
        """
        import yaml

        folder = (self.checkpoint_dir / temporary_name(step)).absolute()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        info = {k: v.item() if hasattr(v, "item") else v for k, v in training_info.items()}
        (folder / "training_info.json").write_text(json.dumps(info, indent=1) + "\n")
        if run_config is not None:
            plain = run_config if isinstance(run_config, Mapping) else run_config.model_dump()
            (folder / "config.yaml").write_text(yaml.safe_dump(dict(plain), sort_keys=False))
        return folder

    def finalize_checkpoint(self, checkpoint_path: PathLike) -> None:
        """Seal a temporary checkpoint, give it its name, and remove what need not be kept.

        Args:
            checkpoint_path: From `init_tmp_checkpoint`, with everything in it.
        """
        temporary = Path(checkpoint_path)
        seal(temporary)
        final = temporary.parent / "_".join(temporary.name.split("_")[1:3])
        old = temporary.parent / f"old_{final.name}"
        if final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        self.remove_old_checkpoints()

    def remove_old_checkpoints(self, exclude_latest: bool = True) -> None:
        """Remove the checkpoints that no rule keeps; see the class.

        Args:
            exclude_latest: Never remove the latest.
        """
        history = _history(self.checkpoint_dir)
        if not history or (self.keep_top_k is None and self.ft_keep_latest_k is None):
            return
        kept = {max(history)} if exclude_latest else set()
        periodic = sorted((s for s in history if s % self.save_period == 0), reverse=True)
        if self.keep_top_k is not None:
            kept.update(sorted(periodic, key=lambda s: self._rank(history[s]))[: self.keep_top_k])
        else:
            kept.update(periodic)
        kept.update(sorted(history, reverse=True)[: self.ft_keep_latest_k or 0])
        for step in history.keys() - kept:
            # Renamed first: a folder that is half removed is never taken for a checkpoint.
            removed = self.checkpoint_dir / f"removed_step_{step}"
            os.rename(self.checkpoint_dir / f"step_{step}", removed)
            shutil.rmtree(removed, ignore_errors=True)

    def get_best_checkpoint_path(self) -> Optional[str]:
        """Return the checkpoint that is best by ``metric_name``, the newest of equals.

        Checkpoints without the metric are passed over with a warning. If none has it, the result
        is the latest; None if there is no checkpoint.
        """
        history = _history(self.checkpoint_dir)
        ranked = [step for step in history if self.metric_name in history[step]]
        if len(ranked) < len(history):
            warnings.warn(
                f"{self.checkpoint_dir}: steps {sorted(history.keys() - set(ranked))} have no "
                f"{self.metric_name!r}; set val_at_end, or save_period to a multiple of val_period",
                stacklevel=2,
            )
        if not ranked:
            return self.get_latest_checkpoint_path()
        best = min(sorted(ranked, reverse=True), key=lambda s: self._rank(history[s]))
        return str(self.checkpoint_dir / f"step_{best}")

    def get_latest_checkpoint_path(self) -> Optional[str]:
        """Return the checkpoint with the most steps, or None if there is none."""
        steps = steps_in(self.checkpoint_dir)
        return str(self.checkpoint_dir / f"step_{max(steps)}") if steps else None

    def load_training_info(
        self, checkpoint_path: Optional[PathLike] = None
    ) -> Optional[dict[str, Any]]:
        """Return what ``training_info.json`` holds, or None without a checkpoint."""
        if checkpoint_path is None:
            return None
        return read_json(Path(checkpoint_path) / "training_info.json")

    def _rank(self, info: Mapping[str, Any]) -> float:
        """Smaller is better. Without a metric all are equal; what lacks it comes last."""
        if self.metric_name is None:
            return 0.0
        value = info.get(self.metric_name)
        if value is None or value != value:
            return float("inf")
        return -value if self.higher_is_better else value


def _history(folder: Path) -> dict[int, dict[str, Any]]:
    """The training info of every checkpoint that this package has sealed, by step."""
    folders = {step: folder / f"step_{step}" for step in steps_in(folder)}
    return {
        step: read_json(path / "training_info.json")
        for step, path in folders.items()
        if (path / "files.json").exists()
    }
