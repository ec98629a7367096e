# SPDX-License-Identifier: Apache-2.0
"""How much a step of the SFT and DPO runners costs above the model's own work.

    python tests/benchmarks/bench_sft_dpo_step.py            # about two minutes on two cores
    python tests/benchmarks/bench_sft_dpo_step.py --write    # and record it in results/

What is timed is the runner as a user starts it: ``run_sft.train`` and ``run_dpo.train`` with a
configuration, whose log says how long each step took. Collation, the metrics, the log and the
check that loss and gradient are finite are in it; validation and checkpoints are off. The floor
beside it runs on the same batches: forward, backward from the sum of the logits, optimizer step.
What a user would take instead of the SFT runner is beside it: ``transformers.Trainer`` on the same
rows, padded and masked by its collator, with its defaults except for the optimizer. DPO beside TRL
is in bench_dpo_step.py. The contenders take turns in one process, so that a slow moment of the
machine hits all of them. Numbers are medians.
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
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from _clock import Clock  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from rich.progress import track  # noqa: E402
from trainer_runs import RUNNERS, make_config  # noqa: E402

from nemo_rl_ref import run_dpo, run_sft, tiny, trainer  # noqa: E402
from nemo_rl_ref.metrics_file import read_metrics  # noqa: E402
from nemo_rl_ref.optimizers import make_optimizer  # noqa: E402

SAMPLES = {"sft": 64, "dpo": 32}  # a step has 64 rows in both
ROUND = 24  # steps a contender takes before the other one's turn
WARM_UP = 4  # steps of each turn that are not counted
OPTIMIZER = {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-4, "weight_decay": 0.0}}


def configuration(section, folder, name):
    batch = SAMPLES[section]
    changes = {
        f"{section}__max_num_epochs": 1,
        f"{section}__max_num_steps": ROUND,
        f"{section}__val_period": 0,
        f"{section}__val_at_start": False,
        "policy__train_global_batch_size": batch,
        "policy__train_micro_batch_size": batch,
        "policy__optimizer": {**OPTIMIZER, "kwargs": {**OPTIMIZER["kwargs"], "fused": True}},
        "policy__scheduler": None,
        "checkpointing__enabled": False,
        "checkpointing__metric_name": None,
    }
    return make_config(section, folder, samples=batch * ROUND, name=name, **changes)


def runner_turn(section, config):
    """Seconds a step, as the runner's log has them."""
    with contextlib.redirect_stdout(io.StringIO()):
        RUNNERS[section].train(config)
    metrics = read_metrics(config["logger"]["log_dir"])
    return [values["timing/train/total_step_time"] for values in metrics.values()][WARM_UP:]


def batches_of(section, config):
    """The batches that the runner trains on."""
    tokenizer = tiny.load_tokenizer()
    if section == "sft":
        part = run_sft.load_response_dataset(config["data"]["train"])
        parts = [(part.dataset, part.places, part.task_spec)]
        samples = run_sft._samples(parts, tokenizer, config)
    else:
        samples, _ = run_dpo.preference_samples(config, tokenizer, add_loss_mask=True)
    plan = trainer.Plan(len(samples), SAMPLES[section], 1, ROUND, True, config[section]["seed"])
    return [samples.batch(plan.numbers(step)) for step in range(plan.steps)]


def floor_turn(batches, config, device):
    """Seconds a step of the model's own forward, backward and optimizer step."""
    model = tiny.load_policy().to(device)
    optimizer = make_optimizer(config["policy"]["optimizer"], model.parameters())
    ids = [batch["input_ids"].to(device) for batch in batches]
    seconds = []
    for input_ids in ids:
        started = time.perf_counter()
        model(input_ids=input_ids, use_cache=False).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def trainer_turn(batches, folder):
    """Seconds a step of `transformers.Trainer`, from the end of one step to that of the next."""
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

    clock = Clock()
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
    steps = [after - before for before, after in itertools.pairwise(clock.ticks)]
    return steps[WARM_UP:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = trainer.make_accelerator("float32").device
    turns = {(section, kind): [] for section in SAMPLES for kind in ("floor", "runner")}
    turns["sft", "Trainer"] = []
    with tempfile.TemporaryDirectory() as folder:
        batches = {}
        for number in track(range(arguments.rounds), description="rounds"):
            for section in SAMPLES:
                config = configuration(section, Path(folder), f"{section}-{number}")
                batches.setdefault(section, batches_of(section, config))
                floor = floor_turn(batches[section], config, device)
                turns[section, "floor"] += floor
                turns[section, "runner"] += runner_turn(section, config)
            turns["sft", "Trainer"] += trainer_turn(batches["sft"], Path(folder))
    medians = {key: statistics.median(seconds) for key, seconds in turns.items()}
    print(f"{device_name()}, {torch.get_num_threads()} threads, 64 rows a step")
    for (section, kind), value in medians.items():
        ratio = value / medians[section, "floor"]
        print(f"{section} {kind:8}{value * 1e3:8.2f} ms a step{ratio:7.2f} x floor")
    if arguments.write:
        numbers = {
            section: {
                "samples_per_step": SAMPLES[section],
                "seconds_per_step": {
                    kind: round(value, 6) for (of, kind), value in medians.items() if of == section
                },
                "step over floor": round(medians[section, "runner"] / medians[section, "floor"], 3),
            }
            for section in SAMPLES
        }
        over = medians["sft", "Trainer"] / medians["sft", "runner"]
        numbers["sft"]["steps per second over Trainer"] = round(over, 3)
        write_result("sft_dpo_step", numbers)


if __name__ == "__main__":
    main()
