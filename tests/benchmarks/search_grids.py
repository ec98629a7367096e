# SPDX-License-Identifier: Apache-2.0
"""Batch size by learning rate, the KL penalty, and the learning rate by width, on grids.

    python tests/benchmarks/search_grids.py       # five minutes on one core; again to go on

`batch`: DPO on 512 pairs, batch size by learning rate, validated after each of four epochs. `penalty`:
GRPO trained twice as long, by the KL penalty. `width`: supervised training of fresh models of three
widths, by the learning rate. They are written to results/search-grids.json.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from _search import (
    DPO, GRPO, PENALTY, RATE, SFT, WARM_UP, WORK, Store, Trainings, header, write,
)  # fmt: skip

from nemo_rl_ref import tiny

BATCH = "policy.train_global_batch_size"
GRID_SEEDS = range(1)
EPOCH, EPOCHS = 512, 4
BATCHES, BATCH_RATES = (8, 32, 128), (3e-5, 1e-4, 3e-4, 1e-3)
PENALTIES = (0.0, 0.03, 0.1, 0.3, 1.0)
WIDTHS, WIDTH_RATES = (24, 48, 96), (1e-3, 3e-3, 1e-2, 3e-2)


def make_model(width):
    """A fresh model of this width; heads keep their size, as in larger models of a family."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = WORK / f"width-{width}"
    if not (folder / "model.safetensors").exists():
        config = Qwen3Config.from_pretrained(tiny.MODEL)
        config.hidden_size, config.intermediate_size = width, 8 * width // 3
        config.num_attention_heads = config.num_key_value_heads = width // config.head_dim
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    trainings, store, runs = Trainings(), Store("grids"), []

    def add(part, task, values, seed, **options):
        key = f"{part} {values} {seed}"
        record = store.get(key, lambda: trainings.run(task, values, seed, **options))
        runs.append({"part": part, **record})

    rows = (WORK / "pairs.train.jsonl").read_text().splitlines(keepends=True)[:EPOCH]
    (WORK / "pairs.epoch.jsonl").write_text("".join(rows))
    for seed in GRID_SEEDS:
        for batch, rate in itertools.product(BATCHES, BATCH_RATES):
            add(
                "batch",
                DPO,
                {RATE: rate, BATCH: batch, WARM_UP: max(1, 80 // batch)},
                seed,
                steps=EPOCHS * EPOCH // batch,
                val_period=EPOCH // batch,
                overrides=[f"data.train.data_path={WORK}/pairs.epoch.jsonl"],
            )
        for penalty in PENALTIES:
            add("penalty", GRPO, {RATE: 2e-4, PENALTY: penalty}, seed, steps=2 * GRPO.steps)
        for rate, width in itertools.product(WIDTH_RATES, WIDTHS):
            override = f"policy.model_name={make_model(width)}"
            values = {RATE: rate, "width": width}
            record = store.get(
                f"width {values} {seed}",
                lambda rate=rate, override=override, seed=seed: trainings.run(
                    SFT, {RATE: rate}, seed, overrides=[override]
                ),
            )
            runs.append({"part": "width", **record, "values": values})
    columns = {task.name: [task.objective, *task.kept] for task in (DPO, GRPO, SFT)}
    write("grids", {**header(), "columns": columns, "epoch": EPOCH, "runs": runs})


if __name__ == "__main__":
    main()
