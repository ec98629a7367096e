# SPDX-License-Identifier: Apache-2.0
"""Generalized advantage estimation without a loop over time steps, beside the loop.

    python benchmarks/bench_gae.py            # about ten seconds on two cores
    python benchmarks/bench_gae.py --write    # and record it in results/

Batch 64, length 2048, a fifth of the tokens masked at random, float32 on the CPU. Both contenders
do all of ``compute_advantage``: reward at the last token, recurrence, whitening. They take turns,
so that a slow moment of the machine hits both. Numbers are medians.

loop    GeneralizedAdvantageEstimator with its recurrence replaced by a loop over time steps
ours    GeneralizedAdvantageEstimator

Three settings: one λ for all; VAPO's λ by length, with its own λ for returns; γλ = 1, where
rounding adds up most. Differences are to the loop in float64, relative to the larger of 1 and the
result: the loop in float32 has rounding errors of its own, up to 1e-5, which are printed beside
ours. The script fails if ours differs by more than 1e-5 or is less than 10 times as fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _peers import time_loop  # noqa: E402
from _record import device_name, write_result  # noqa: E402

from nemo_rl_ref.algorithms import _gae  # noqa: E402
from nemo_rl_ref.algorithms.advantage_estimator import GeneralizedAdvantageEstimator  # noqa: E402
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig  # noqa: E402

BATCH, LENGTH = 64, 2048
TOLERANCE, SPEED_UP = 1e-5, 10
BASE = {
    "gae_lambda": 0.95,
    "gae_gamma": 1.0,
    "normalize_advantages": True,
    "gae_lambda_value": None,
    "gae_lambda_policy": None,
    "length_adaptive_alpha": 0.0,
}
SETTINGS = {
    "one lambda": BASE,
    "VAPO": {**BASE, "gae_lambda_value": 1.0, "length_adaptive_alpha": 0.05},
    "gamma lambda = 1": {**BASE, "gae_lambda": 1.0},
}


def make_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_ids": None,
        "rewards": torch.randn(BATCH, generator=generator),
        "mask": (torch.rand(BATCH, LENGTH, generator=generator) < 0.8).float(),
        "values": torch.randn(BATCH, LENGTH, generator=generator),
    }


def timed(config, batch, recurrence):
    """Seconds and results of one call, with `recurrence` as the recurrence."""
    estimator = GeneralizedAdvantageEstimator(config, ClippedPGLossConfig())
    ours, _gae.gae = _gae.gae, recurrence
    try:
        start = time.perf_counter()
        results = estimator.compute_advantage(**batch)
        return time.perf_counter() - start, results
    finally:
        _gae.gae = ours


def largest_difference(ours, theirs):
    """Relative to the larger of 1 and the result, over advantages and returns."""
    return max(
        ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        for a, b in zip(ours, theirs, strict=True)
    )


def measure(config, batch, rounds):
    contenders = {"loop": (time_loop, 1), "ours": (_gae.gae, 5)}
    seconds = {name: [] for name in contenders}
    results = {}
    for round_number in range(rounds + 1):
        for name, (recurrence, calls) in contenders.items():
            for _ in range(calls):
                taken, results[name] = timed(config, batch, recurrence)
                if round_number:  # the first round warms up
                    seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    double = {**batch, **{key: batch[key].double() for key in ("rewards", "mask", "values")}}
    _, exact = timed(config, double, time_loop)
    return medians, {name: largest_difference(results[name], exact) for name in contenders}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")

    print(f"{device_name()}, {torch.get_num_threads()} threads, {BATCH} x {LENGTH}, float32")
    batch = make_batch()
    found, failed = {}, []
    for name, config in SETTINGS.items():
        seconds, difference = measure(config, batch, arguments.rounds)
        ratio = seconds["loop"] / seconds["ours"]
        found[name] = {
            "seconds": {key: round(value, 6) for key, value in seconds.items()},
            "loop over ours": round(ratio, 2),
            "largest difference to the loop in float64": difference,
        }
        print(
            f"{name:18} loop {seconds['loop'] * 1e3:8.2f} ms  ours {seconds['ours'] * 1e3:7.2f} ms"
            f"  {ratio:6.1f} x"
            f"  difference: loop {difference['loop']:.1e} ours {difference['ours']:.1e}"
        )
        if difference["ours"] > TOLERANCE:
            failed.append(
                f"{name}: difference {difference['ours']:.1e}, expected at most {TOLERANCE}"
            )
        if ratio < SPEED_UP:
            failed.append(f"{name}: {ratio:.1f} times the loop, expected at least {SPEED_UP}")
    if arguments.write:
        write_result("gae", {"batch": BATCH, "length": LENGTH, "settings": found})
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
