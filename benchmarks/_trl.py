# SPDX-License-Identifier: Apache-2.0
"""TRL's DPO trainer as a contender of the benchmarks."""

import itertools
import logging
import tempfile

import datasets
import torch
import transformers
from _clock import Clock
from trl import DPOConfig, DPOTrainer

from nemo_rl_ref import tiny


class TrlDpo:
    """A turn is a fresh trainer, as a run in TRL is.

    Args:
        records: pairs in ranked form, as `BinaryPreferenceDataset` has them.
        tokenizer: the tokenizer.
        precompute: whether TRL computes the reference's log-probabilities once.
        pairs: a step.
        steps: a turn.
    """

    def __init__(self, records, tokenizer, *, precompute, pairs, steps):
        datasets.disable_progress_bars()
        logging.getLogger("trl").setLevel(logging.ERROR)
        self.tokenizer, self.precompute, self.pairs, self.steps = (
            tokenizer,
            precompute,
            pairs,
            steps,
        )
        self.data = datasets.Dataset.from_list(
            [
                {
                    "prompt": record["context"],
                    "chosen": record["completions"][0]["completion"],
                    "rejected": record["completions"][1]["completion"],
                }
                for record in records[: pairs * steps]
            ]
        )

    def turn(self):
        """Seconds a step, all steps but the first."""
        clock = Clock()
        self.train(clock)
        return [after - before for before, after in itertools.pairwise(clock.ticks)]

    def train(self, clock):
        """Train with a callback."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model=tiny.load_policy(),
                args=DPOConfig(
                    output_dir=folder,
                    beta=0.1,
                    per_device_train_batch_size=self.pairs,
                    max_steps=self.steps,
                    learning_rate=1e-4,
                    bf16=False,
                    gradient_checkpointing=False,
                    precompute_ref_log_probs=self.precompute,
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
