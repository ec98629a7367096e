# SPDX-License-Identifier: Apache-2.0
"""What a training loop does, in plain numbers: batches, metrics and checkpoints, in their order."""

import json
import math
from pathlib import Path

import torch

#: What is kept of a batch, where it is there. Each is cut to its row's length.
COLUMNS = (
    "input_ids", "token_mask", "generation_logprobs", "prev_logprobs",
    "reference_policy_logprobs", "advantages", "returns", "values",
)  # fmt: skip

RECORD = {"batches": [], "metrics": [], "checkpoints": [], "kept": []}


def batch(data, size, *, training, of="policy"):
    """Note the batches of a call, ``size`` rows each.

    Args:
        data: ``input_ids`` (B, S), ``input_lengths`` (B,), and what else the loss reads.
        size: Rows of an update.
        training: Whether the model is trained on them.
        of: Which model.
    """
    lengths = data["input_lengths"].tolist()
    rows = {
        name: [values[:n].tolist() for values, n in zip(data[name], lengths, strict=True)]
        for name in COLUMNS
        if isinstance(data.get(name), torch.Tensor)
    }
    rows["sample_mask"] = data["sample_mask"].tolist()
    for low in range(0, len(lengths), size):
        part = {name: values[low : low + size] for name, values in rows.items()}
        RECORD["batches"].append({"training": training, "of": of, **part})


def metrics_of(logger):
    """Note the metrics that a class of loggers gets."""
    log_metrics = logger.log_metrics

    def noted(self, metrics, step, prefix="", *args, **kwargs):
        numbers = {name: _number(value) for name, value in metrics.items()}
        found = {name: value for name, value in numbers.items() if value is not None}
        RECORD["metrics"].append([int(step), prefix, found])
        return log_metrics(self, metrics, step, prefix, *args, **kwargs)

    logger.log_metrics = noted


def _number(value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if hasattr(value, "item") and getattr(value, "size", 2) == 1:
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return value if isinstance(value, int) or math.isfinite(value) else str(value)
    return None


def checkpoints_of(manager):
    """Note what a class of checkpoint managers is asked to write, and what is then there."""
    begin = manager.init_tmp_checkpoint

    def begun(self, step, training_info, *args, **kwargs):
        info = {name: _number(value) for name, value in vars_of(training_info).items()}
        info = {name: value for name, value in info.items() if value is not None}
        RECORD["checkpoints"].append([int(step), info])
        RECORD["folder"] = str(self.checkpoint_dir)
        return begin(self, step, training_info, *args, **kwargs)

    manager.init_tmp_checkpoint = begun


def vars_of(info):
    return dict(info) if hasattr(info, "keys") else dict(vars(info))


def write(path):
    """Write all that was noted to a JSON file."""
    folder = Path(RECORD.pop("folder", "/nowhere"))
    if folder.is_dir():
        RECORD["kept"] = sorted(int(path.name[5:]) for path in folder.glob("step_*"))
    Path(path).write_text(json.dumps(RECORD))
