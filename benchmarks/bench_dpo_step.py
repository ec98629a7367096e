# SPDX-License-Identifier: Apache-2.0
"""How much a DPO step costs above the model's own work, and beside TRL's trainer.

    python benchmarks/bench_dpo_step.py            # about two minutes on two cores
    python benchmarks/bench_dpo_step.py --write    # and record it in results/

All contenders have the same model, pairs, batch size and optimizer, and take turns in one process,
so that a slow moment of the machine hits all of them. Numbers are medians.

floor           forward, backward from the sum of the logits, optimizer step
ours            a step of nemo_rl_ref.training.step.update, reference log-probabilities known
ours, all in    the same, with collation and the reference forward in every step
TRL             a step of DPOTrainer with its defaults, except for float32 and no activation
                checkpointing: it runs the reference in every step
TRL, precomputed  the same with precompute_ref_log_probs=True
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from _trl import TrlDpo  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from rich.progress import track  # noqa: E402

from nemo_rl_ref import tiny  # noqa: E402
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn  # noqa: E402
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset  # noqa: E402
from nemo_rl_ref.training.reference import add_reference_logprobs  # noqa: E402
from nemo_rl_ref.training.samples import Batches, preference_pairs  # noqa: E402
from nemo_rl_ref.training.step import next_token_logprobs, update  # noqa: E402

PAIRS = 32
ROUND = 24  # steps a contender takes before the next one's turn
WARM_UP = 4  # steps of each turn that are not counted


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)


def steps_of(ticks):
    """Seconds between ticks."""
    return [after - before for before, after in itertools.pairwise(ticks)]


class Ours:
    """Contenders that are a loop over batches."""

    def __init__(self, kind, data, tokenizer):
        self.kind = kind
        self.accelerator = Accelerator()
        self.model = tiny.load_policy()
        self.reference = tiny.load_policy().eval().to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(
            self.model, make_optimizer(self.model)
        )
        self.pairs = preference_pairs(data, tokenizer, max_seq_length=16)
        self.pairs.tokenize(range(ROUND * PAIRS))
        self.order = Batches(ROUND * PAIRS, PAIRS, seed=0, shuffle=False)
        self.loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1))
        if kind != "ours, all in":
            add_reference_logprobs(self.reference, [self.pairs], self.accelerator)
        self.batches = [self.pairs.batch(numbers) for numbers in self.order]

    def floor(self):
        for batch in self.batches:
            self.model(input_ids=batch["input_ids"], use_cache=False).logits.sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield

    def all_in(self):
        for numbers in self.order:
            batch = self.pairs.batch(numbers).to(self.accelerator.device)
            with torch.no_grad():
                logprobs = next_token_logprobs(self.reference, batch)
            batch["reference_policy_logprobs"] = torch.nn.functional.pad(logprobs, (0, 1))
            yield batch

    def steps(self):
        for batch in self.batches if self.kind == "ours" else self.all_in():
            yield update(
                self.model,
                self.optimizer,
                self.loss_fn,
                batch,
                self.accelerator,
                micro_rows=batch.size,
                max_grad_norm=1.0,
                rows=2,
            )

    def turn(self):
        steps = self.floor() if self.kind == "floor" else self.steps()
        ticks = [time.perf_counter()]
        for _ in steps:
            ticks.append(time.perf_counter())
            self.wait()
        return steps_of(ticks)

    def wait(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = tiny.load_tokenizer()
    data = BinaryPreferenceDataset(str(tiny.TRAIN_PAIRS))
    sizes = {"pairs": PAIRS, "steps": ROUND}
    contenders = {
        "floor": Ours("floor", data, tokenizer),
        "ours": Ours("ours", data, tokenizer),
        "ours, all in": Ours("ours, all in", data, tokenizer),
        "TRL": TrlDpo(data.dataset, tokenizer, precompute=False, **sizes),
        "TRL, precomputed": TrlDpo(data.dataset, tokenizer, precompute=True, **sizes),
    }
    turns = {name: [] for name in contenders}
    for _ in track(range(arguments.rounds), description="rounds"):
        for name, contender in contenders.items():
            turns[name].append(contender.turn()[WARM_UP:])

    seconds = {
        name: statistics.median(step for turn in per_turn for step in turn)
        for name, per_turn in turns.items()
    }
    print(f"{device_name()}, {torch.get_num_threads()} threads, {PAIRS} pairs a step")
    for name, value in seconds.items():
        print(
            f"{name:18}{value * 1e3:8.2f} ms a step {PAIRS / value:9.0f} pairs/s"
            f"{value / seconds['floor']:7.2f} x floor"
        )
    ratios = {
        "step over floor": seconds["ours"] / seconds["floor"],
        "pairs per second over TRL": seconds["TRL"] / seconds["ours"],
        "pairs per second over TRL, precomputed": seconds["TRL, precomputed"] / seconds["ours"],
        "pairs per second over TRL, all in": seconds["TRL"] / seconds["ours, all in"],
    }
    for name, ratio in ratios.items():
        print(f"{name:40}{ratio:6.2f}")

    if arguments.write:
        write_result(
            "dpo_step",
            {
                "pairs_per_step": PAIRS,
                "seconds_per_step": {name: round(value, 6) for name, value in seconds.items()},
                "ratios": {name: round(value, 3) for name, value in ratios.items()},
            },
        )


if __name__ == "__main__":
    main()
