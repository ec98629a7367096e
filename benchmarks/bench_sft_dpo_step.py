# SPDX-License-Identifier: Apache-2.0
"""How much a step of the SFT and DPO runners costs above the model's own work.

    python benchmarks/bench_sft_dpo_step.py            # about two minutes on two cores
    python benchmarks/bench_sft_dpo_step.py --write    # and record it in results/

What is timed is the runner as a user starts it: ``run_sft.train`` and ``run_dpo.train`` with a
configuration, whose log says how long each step took. Collation, the metrics, the log and the
check that loss and gradient are finite are in it; validation and checkpoints are off. The floor
beside it runs on the same batches: forward, backward from the sum of the logits, optimizer step.
What a user would take instead is beside it: ``transformers.Trainer`` on the same rows, padded and
masked by its collator, and TRL's ``DPOTrainer`` on the same pairs, as it is and with the reference
computed once as in the runner, both with their defaults except for the optimizer, float32 and what
is off in the runner.

After every step of a contender one of the floor is taken, and the ratio is the median over such
pairs of neighbors, a few milliseconds apart: so neither a slow moment nor a slow minute of the
machine is in it. Seconds are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the paths in the configurations are relative to it

import torch  # noqa: E402
import transformers  # noqa: E402
from _clock import ClockBetween  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from _trl import TrlDpo  # noqa: E402
from rich.progress import track  # noqa: E402

from nemo_rl_ref import run_dpo, run_sft, tiny  # noqa: E402
from nemo_rl_ref.config.read import read_config  # noqa: E402
from nemo_rl_ref.config.sections import DPOSettings, OptimizerConfig, SFTSettings  # noqa: E402
from nemo_rl_ref.config.settings import read_settings  # noqa: E402
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset  # noqa: E402
from nemo_rl_ref.files.metrics import read_metrics  # noqa: E402
from nemo_rl_ref.training.optimizers import make_optimizer  # noqa: E402
from nemo_rl_ref.training.processes import make_accelerator  # noqa: E402
from nemo_rl_ref.training.samples import Batches, preference_samples, supervised_samples  # noqa: E402

RUNNERS = {"sft": run_sft, "dpo": run_dpo}
SAMPLES = {"sft": 64, "dpo": 32}  # a step has 64 rows in both
ROUND = 24  # steps a contender takes before the other one's turn
WARM_UP = 4  # steps of each turn that are not counted
OPTIMIZER = {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-4, "weight_decay": 0.0}}


def configuration(section, folder, name):
    batch, lines = SAMPLES[section], tiny.TRAIN_PAIRS.read_text().splitlines(keepends=True)
    data = folder / f"{section}.jsonl"
    data.write_text("".join(lines[: batch * ROUND]))
    overrides = {
        f"{section}.max_num_epochs": 1,
        f"{section}.max_num_steps": ROUND,
        f"{section}.val_period": 0,
        f"{section}.val_at_start": "false",
        f"{section}.val_at_end": "false",
        "policy.train_global_batch_size": batch,
        "policy.train_micro_batch_size": batch,
        "policy.max_total_sequence_length": 32,
        "policy.optimizer.kwargs.lr": OPTIMIZER["kwargs"]["lr"],
        "policy.optimizer.kwargs.betas": "[0.9,0.999]",
        "policy.optimizer.kwargs.fused": "true",
        "policy.scheduler": "null",
        "checkpointing.enabled": "false",
        "data.train.data_path": data,
        "logger.log_dir": folder / f"{name}-logs",
    }
    lines = [f"{key}={value}" for key, value in overrides.items()]
    return read_config(ROOT / f"configs/{section}.yaml", lines, RUNNERS[section].USED)[0]


def runner_turn(section, config, floor):
    """Seconds of each step, as the runner's log has them, and of the floor's after it."""
    floors = []
    with contextlib.redirect_stdout(io.StringIO()):
        RUNNERS[section].train(config, observe=lambda step, metrics: floors.append(floor.step()))
    metrics = read_metrics(config["logger"]["log_dir"])
    steps = [values["timing/train/total_step_time"] for values in metrics.values()]
    return list(zip(steps, floors, strict=True))


def batches_of(section, config):
    """The batches that the runner trains on."""
    tokenizer = tiny.load_tokenizer()
    if section == "sft":
        samples, _ = supervised_samples(read_settings(config, SFTSettings), tokenizer)
    else:
        settings = read_settings(config, DPOSettings)
        samples, _ = preference_samples(settings, tokenizer, add_loss_mask=True)
    order = Batches(len(samples), SAMPLES[section], config[section]["seed"], max_steps=ROUND)
    return [samples.batch(numbers) for numbers in order]


class Floor:
    """The model's own forward, backward and optimizer step, on the runner's batches in turn."""

    def __init__(self, batches, config, device):
        self.model = tiny.load_policy().to(device)
        self.optimizer = make_optimizer(
            OptimizerConfig(**config["policy"]["optimizer"]), self.model.parameters()
        )
        self.ids = itertools.cycle([batch["input_ids"].to(device) for batch in batches])
        self.device = device

    def step(self):
        """Seconds of the next step."""
        input_ids = next(self.ids)
        started = time.perf_counter()
        self.model(input_ids=input_ids, use_cache=False).logits.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def trainer_turn(batches, folder, floor):
    """Seconds of each step of `transformers.Trainer` but the first, and of the floor's after it."""
    rows = []
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["token_mask"] == 0, -100)
        rows += [
            {"input_ids": ids, "labels": label}
            for ids, label in zip(batch["input_ids"], labels, strict=True)
        ]

    def collate(samples):
        names = ("input_ids", "labels")
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [sample[name] for sample in samples], True, fill[name]
            )
            for name in names
        }

    clock = ClockBetween(floor.step)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=ROUND,
        per_device_train_batch_size=SAMPLES["sft"],
        learning_rate=OPTIMIZER["kwargs"]["lr"],
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        transformers.Trainer(
            model=tiny.load_policy(),
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        ).train()
    return list(zip(clock.steps, clock.others, strict=True))


def trl_turn(trl, floor):
    """Seconds of each step of TRL's trainer but the first, and of the floor's after it."""
    clock = ClockBetween(floor.step)
    trl.train(clock)
    return list(zip(clock.steps, clock.others, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, tokenizer = make_accelerator("float32").device, tiny.load_tokenizer()
    found = {section: {} for section in SAMPLES}
    with tempfile.TemporaryDirectory() as folder:
        floors, batches = {}, {}
        for section in SAMPLES:
            config = configuration(section, Path(folder), section)
            batches[section] = batches_of(section, config)
            floors[section] = Floor(batches[section], config, device)
        pairs = BinaryPreferenceDataset(config["data"]["train"]["data_path"]).dataset
        sizes = {"pairs": SAMPLES["dpo"], "steps": ROUND}
        trl = TrlDpo(pairs, tokenizer, precompute=False, **sizes)
        trl_once = TrlDpo(pairs, tokenizer, precompute=True, **sizes)
        for number in track(range(arguments.rounds), description="rounds"):
            for section in SAMPLES:
                floor = floors[section]
                config = configuration(section, Path(folder), f"{section}-{number}")
                turns = {"runner": runner_turn(section, config, floor)}
                if section == "sft":
                    turns["Trainer"] = trainer_turn(batches[section], Path(folder), floor)
                else:
                    turns["TRL"] = trl_turn(trl, floor)
                    turns["TRL, precomputed"] = trl_turn(trl_once, floor)
                for kind, steps in turns.items():
                    found[section].setdefault(kind, []).extend(steps[WARM_UP:])
    numbers = {}
    print(f"{device_name()}, {torch.get_num_threads()} threads, 64 rows a step")
    for section, steps in found.items():
        over_floor = {
            kind: statistics.median(step / floor for step, floor in of)
            for kind, of in steps.items()
        }
        seconds = {kind: statistics.median(step for step, _ in of) for kind, of in steps.items()}
        seconds["floor"] = statistics.median(floor for of in steps.values() for _, floor in of)
        print(f"{section} {'floor':18}{seconds['floor'] * 1e3:8.2f} ms a step")
        for kind, ratio in over_floor.items():
            text = f"{section} {kind:18}{seconds[kind] * 1e3:8.2f} ms a step{ratio:7.2f} x floor"
            print(
                text + ("" if kind == "runner" else f"{ratio / over_floor['runner']:7.2f} x runner")
            )
        numbers[section] = {
            "samples_per_step": SAMPLES[section],
            "seconds_per_step": {kind: round(value, 6) for kind, value in seconds.items()},
            "step over floor": round(over_floor["runner"], 3),
        }
        for kind in list(over_floor)[1:]:
            name = f"steps per second over {kind}"
            numbers[section][name] = round(over_floor[kind] / over_floor["runner"], 3)
            numbers[section][f"{name}, most that the floor allows"] = round(over_floor[kind], 3)
    if arguments.write:
        write_result("sft_dpo_step", numbers)


if __name__ == "__main__":
    main()
