# SPDX-License-Identifier: Apache-2.0
"""Stands in for NeMo RL's examples/run_dpo.py: its arguments, its log files, its ways to end.

It trains nothing. The validation accuracy is highest at a learning rate of 1e-4 and grows with the
steps. As NeMo RL does, it puts its logs into the next free ``exp_NNN``, writes TensorBoard events
under NeMo RL's tags, validation before training, and leaves an exception on the standard error.
``++stand_in.…`` keys make it fail.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4]))

from omegaconf import OmegaConf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_rl_ref.utils.config import load_config, parse_hydra_overrides

#: Code of a process that SIGTERM does not end.
CHILD = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print(flush=True); time.sleep(600)"
)


def parse_args():
    parser = argparse.ArgumentParser(description="Run DPO training with configuration")
    parser.add_argument("--config", type=str, default=None, help="Path to YAML config file")
    return parser.parse_known_args()


def get_next_experiment_dir(base):
    """The next free ``exp_NNN``; the logger, which has it, imports PyTorch."""
    taken = [int(path.name[4:]) for path in Path(base).glob("exp_*")]
    folder = os.path.join(base, f"exp_{max(taken, default=0) + 1:03d}")
    os.makedirs(folder)
    return folder


class Writer:
    """Writes scalars as PyTorch's SummaryWriter does, without importing PyTorch."""

    def __init__(self, folder):
        os.makedirs(folder)
        self.file = EventFileWriter(folder)

    def log(self, metrics, step, prefix):
        for name, number in metrics.items():
            value = Summary.Value(tag=f"{prefix}/{name}", simple_value=number)
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
            self.file.add_event(event)
        self.file.flush()


def main():
    args, overrides = parse_args()
    config = parse_hydra_overrides(load_config(args.config), overrides)
    config = OmegaConf.to_container(config, resolve=True)
    odd = config.get("stand_in", {})
    log_dir = get_next_experiment_dir(config["logger"]["log_dir"])
    print(f"Using log directory: {log_dir}", flush=True)
    if odd.get("child"):  # of the group, and deaf to SIGTERM, as a worker that is in a kernel
        command = [sys.executable, "-c", CHILD]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()  # it is deaf by now
        print(f"processes {os.getpid()} {child.pid}", flush=True)
    assert config["logger"]["tensorboard_enabled"] and "tensorboard" in config["logger"]
    if odd.get("silent"):
        return
    writer = Writer(os.path.join(log_dir, "tensorboard"))
    lr = config["policy"]["optimizer"]["kwargs"]["lr"]
    dpo = config["dpo"]
    peak = 0.9 - 0.1 * abs(math.log10(lr) + 4)
    for step in range(1, dpo["max_num_steps"] + 1):
        time.sleep(odd.get("seconds_per_step", 0))
        if step == odd.get("out_of_memory_at"):
            print("(DTensorPolicyWorker pid=4321) torch.OutOfMemoryError: CUDA out of memory. "
                  "Tried to allocate 2.00 GiB.", file=sys.stderr)  # fmt: skip
            raise RuntimeError("a worker died")
        if step == odd.get("raise_at"):
            raise ValueError(f"policy.train_global_batch_size: got 7 at step {step}")
        if step == odd.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        last = step == dpo["max_num_steps"] and dpo.get("val_at_end")
        if step % dpo["val_period"] == 0 or last:
            accuracy = peak * (1 - math.exp(-step / 4))
            validation = {"loss": 1 - accuracy, "accuracy": accuracy}
            writer.log(validation, step, "validation-default")
            writer.log({"total_validation_time": 0.1}, step, "timing/validation-default")
        loss = math.nan if step == odd.get("nan_at") else 1 / step
        writer.log({"loss": loss, "lr": lr, "seed": dpo["seed"]}, step, "train")
        writer.log({"policy_training": 0.1}, step, "timing/train")
    print("Max number of steps has been reached, stopping training early", flush=True)


if __name__ == "__main__":
    main()
