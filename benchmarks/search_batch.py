# SPDX-License-Identifier: Apache-2.0
"""DPO by batch size and learning rate, validated after each of four epochs.

    python benchmarks/search_batch.py       # a few minutes on one core; again to go on

Every run sees the same 512 pairs four times; the warm-up is over the same number of pairs. Written to
results/search-batch.json.
"""

from __future__ import annotations

import argparse
import itertools

from _search import DPO, RATE, WARM_UP, WORK, Store, Trainings, header, write

BATCH = "policy.train_global_batch_size"
GRID_SEEDS = range(3)
EPOCH, EPOCHS = 512, 4
BATCHES, BATCH_RATES = (8, 32, 128), (3e-5, 1e-4, 3e-4, 1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    trainings, store, runs = Trainings(), Store("batch"), []

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
    write("batch", {**header(DPO), "epoch": EPOCH, "runs": runs})


if __name__ == "__main__":
    main()
