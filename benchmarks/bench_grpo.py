# SPDX-License-Identifier: Apache-2.0
"""How much GRPO learns in a minute, and how fast its steps are beside TRL's and the model's floor.

    python benchmarks/bench_grpo.py            # about six minutes on two cores
    python benchmarks/bench_grpo.py --write    # and record it in results/

Learning: configs/grpo_tiny.yaml from the shipped weights, `--seconds` of training, `--seeds` runs;
the share of the 1,000 held-out sums answered exactly right, sampled at temperature 1 as the shipped
model's share is. Validation is not counted in the time.

Speed: steps of 64 prompts with 8 responses of at most 5 tokens, one update each. The contenders
have the same model, prompts and optimizer, and take turns in one process, so that a slow moment of
the machine hits all of them. Numbers are medians, on the wall clock
and of processor time; where other programs run beside it, only the latter mean something.

GRPO            a whole step of nemo_rl_ref.rl.trainer: sampling, rewards, advantages, update
GRPO, update    its update alone, on rollouts that are there
GRPO, update plain  the same without sharing prompts: forward passes over whole rows
floor           forward, backward from the sum of the logits, optimizer step, same rows
TRL             a step of GRPOTrainer with its defaults, except for float32, no activation
                checkpointing and no logging
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from _clock import Clock  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from rich.progress import track  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from nemo_rl_ref import tiny  # noqa: E402
from nemo_rl_ref.config.read import read_config  # noqa: E402
from nemo_rl_ref.config.settings import used_keys  # noqa: E402
from nemo_rl_ref.rl import trainer as rl_trainer  # noqa: E402
from nemo_rl_ref.rl.settings import GRPOSettings  # noqa: E402
from nemo_rl_ref.rl.trainer import RLTrainer  # noqa: E402
from nemo_rl_ref.training.samples import Batches  # noqa: E402
from nemo_rl_ref.training.step import next_token_logprobs  # noqa: E402

CONFIG = ROOT / "configs/grpo_tiny.yaml"
PROMPTS, COPIES, LONGEST = 64, 8, 5  # the sizes of the tuned example
ROUND = 10  # steps a contender takes before the next one's turn
WARM_UP = 3  # steps of each turn that are not counted


def configuration(*overrides):
    lines = ["checkpointing.enabled=false", *overrides]
    config, _ = read_config(CONFIG, lines, used_keys(GRPOSettings))
    return config


def batches_of(trainer):
    """Batches of prompts, more than any contender takes."""
    prompts, cfg = trainer.train_prompts, trainer.cfg
    order = Batches(len(prompts), cfg.num_prompts_per_step, cfg.seed, max_epochs=10_000)
    return ([prompts[number] for number in numbers] for numbers in order)


def learn(seed, seconds):
    """Share of right answers before and after, and the number of steps."""
    trainer = RLTrainer(configuration(f"grpo.seed={seed}"))
    before, batches, step = trainer.validate(0)["accuracy"], batches_of(trainer), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        trainer.step(batches, step)
        step += 1
    return before, trainer.validate(step)["accuracy"], step


def tick():
    """Seconds on the wall clock, and those of the processor on all threads."""
    return time.perf_counter(), time.process_time()


def steps_of(ticks):
    """Seconds between ticks, by both clocks, the first ones of a turn left out."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ticks)][WARM_UP:]


class Ours:
    """Steps of this trainer, or parts of them."""

    def __init__(self, part):
        rows = f"{PROMPTS * COPIES}"
        self.part = part
        self.trainer = RLTrainer(
            configuration(
                f"grpo.num_prompts_per_step={PROMPTS}",
                f"grpo.num_generations_per_prompt={COPIES}",
                f"policy.train_global_batch_size={rows}",
                f"policy.train_micro_batch_size={rows}",
                f"policy.generation.max_new_tokens={LONGEST}",
                "policy.optimizer.kwargs.lr=1e-6",
            )
        )
        self.batches, self.number = batches_of(self.trainer), 0
        if part != "step":
            self.data = self.rollouts()

    def rollouts(self):
        """The training data of one step."""
        kept = []
        update = self.trainer.update_policy

        def keep(data):
            kept.append(data)
            return update(data)

        self.trainer.update_policy = keep
        self.trainer.step(self.batches, 0)
        self.trainer.update_policy = update
        data = kept[0]
        del data.data["prev_logprobs"]  # as it was before the update
        return data

    def once(self):
        if self.part == "step":
            self.trainer.step(self.batches, self.number)
            self.number += 1
        elif self.part == "floor":
            policy = self.trainer.policy
            ids = self.data["input_ids"]
            policy.model(input_ids=ids, use_cache=False).logits.sum().backward()
            policy.optimizer.step()
            policy.optimizer.zero_grad()
        else:
            self.trainer.update_policy(self.data)
            del self.data.data["prev_logprobs"]

    def turn(self):
        shared = rl_trainer.response_logprobs
        if self.part == "plain":
            rl_trainer.response_logprobs = lambda model, data, *_, **__: next_token_logprobs(
                model, data
            )
        ticks = [tick()]
        for _ in range(ROUND):
            self.once()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ticks.append(tick())
        rl_trainer.response_logprobs = shared
        return steps_of(ticks)


def exactly_right(completions, answer, **rest):
    """TRL's reward function."""
    pairs = zip(completions, answer, strict=True)
    return [float(messages[0]["content"] == wanted) for messages, wanted in pairs]


class Trl:
    """TRL's trainer; a turn is a fresh trainer, as a run in TRL is."""

    def __init__(self, tokenizer, prompts):
        self.tokenizer = tokenizer
        self.data = datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": prompt.text.removeprefix("<s>")}],
                    "answer": prompt.truth,
                }
                for prompt in prompts
            ]
        )

    def turn(self):
        clock = Clock(tick)
        with tempfile.TemporaryDirectory() as folder:
            trainer = GRPOTrainer(
                model=tiny.load_policy(),
                reward_funcs=exactly_right,
                args=GRPOConfig(
                    output_dir=folder,
                    per_device_train_batch_size=PROMPTS * COPIES,
                    num_generations=COPIES,
                    max_completion_length=LONGEST,
                    max_steps=ROUND + 1,
                    learning_rate=1e-6,
                    bf16=False,
                    gradient_checkpointing=False,
                    logging_strategy="no",
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available(),
                ),
                train_dataset=self.data,
                processing_class=self.tokenizer,
                callbacks=[clock],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return steps_of(clock.ticks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, a seed")
    parser.add_argument("--seeds", type=int, default=3, help="runs; 0 leaves learning out")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    os.chdir(ROOT)  # the paths in the configuration are relative to it
    ours = {
        "GRPO": Ours("step"),
        "GRPO, update": Ours("update"),
        "GRPO, update plain": Ours("plain"),
        "floor": Ours("floor"),
    }
    trainer = ours["GRPO"].trainer
    contenders = {**ours, "TRL": Trl(trainer.tokenizer, trainer.train_prompts)}
    turns = {name: [] for name in contenders}
    for _ in track(range(arguments.rounds), description="rounds"):
        for name, contender in contenders.items():
            turns[name].append(contender.turn())
    seconds, processor = (
        {
            name: statistics.median(step[clock] for turn in per_turn for step in turn)
            for name, per_turn in turns.items()
        }
        for clock in (0, 1)
    )
    print(f"{device_name()}, {torch.get_num_threads()} threads, {PROMPTS} x {COPIES} responses")
    ratios = {}
    for clock, taken in (("", seconds), (", processor time", processor)):
        for name, value in taken.items():
            over = value / taken["floor"]
            print(f"{name + clock:36}{value * 1e3:8.2f} ms a step{over:8.2f} x floor")
        update, plain = taken["GRPO, update"], taken["GRPO, update plain"]
        ratios[f"steps per second over TRL{clock}"] = taken["TRL"] / taken["GRPO"]
        ratios[f"update over floor{clock}"] = update / taken["floor"]
        ratios[f"update without shared prompts over floor{clock}"] = plain / taken["floor"]
    runs = [learn(seed, arguments.seconds) for seed in range(arguments.seeds)]
    numbers = {}
    if runs:
        before, after = (statistics.mean(run[i] for run in runs) for i in (0, 1))
        ratios["accuracy after over before"] = after / before
        numbers = {
            "seconds_of_training": arguments.seconds,
            "accuracy_before": [round(run[0], 4) for run in runs],
            "accuracy_after": [round(run[1], 4) for run in runs],
            "steps": [run[2] for run in runs],
        }
        for name, value in numbers.items():
            print(f"{name:20} {value}")
    for name, ratio in ratios.items():
        print(f"{name:60}{ratio:6.2f}")

    if arguments.write:
        write_result(
            "grpo",
            {
                "rows_per_step": PROMPTS * COPIES,
                "seconds_per_step": {name: round(value, 6) for name, value in seconds.items()},
                "processor_seconds_per_step": {
                    name: round(value, 6) for name, value in processor.items()
                },
                **numbers,
                "ratios": {name: round(value, 3) for name, value in ratios.items()},
            },
        )


if __name__ == "__main__":
    main()
