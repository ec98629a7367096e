# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of hidden states on the CPU, without the logits: memory and time.

    python benchmarks/bench_linear_logprobs.py            # about a minute on two cores
    python benchmarks/bench_linear_logprobs.py --write    # and record it in results/

2048 tokens, hidden size 256, vocabulary 32,000, float32. A call is forward and backward, with
gradients for the hidden states and the weight. The contenders take turns, each round in another
order, TRL in every third; times are medians. "gather over ours" in time is the median over the
rounds of the ratio within a round, with a 95 % confidence interval. Memory is the largest sum of
PyTorch's allocations during a call, the two gradients included.

gather  logits = hidden @ weight.T, log_softmax, gather
TRL     trl.kernels.ChunkedLogProbFunction, at the chunk size of TRL's trainers
ours    nemo_rl_ref.logprobs.linear_token_logprobs

The script fails if ours needs more than an eighth of gather's memory, or if it is slower beyond
noise: if the whole interval is below 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # noqa: E402

from nemo_rl_ref.logprobs import linear_token_logprobs  # noqa: E402
from nemo_rl_ref.memory import measure_peak  # noqa: E402

TOKENS, HIDDEN, VOCABULARY = 2048, 256, 32000
MEMORY = 8  # times less than gather's
FEWEST_ROUNDS = 6  # fewer have no 95 % interval of the median


def gather(hidden, weight, targets):
    logp = torch.log_softmax(F.linear(hidden, weight), -1)
    return logp.gather(-1, targets[:, None])[:, 0]


def trl(hidden, weight, targets):
    arguments = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *arguments)[0]


CONTENDERS = {"gather": gather, "TRL": trl, "ours": linear_token_logprobs}


def call(function, inputs):
    """Forward and backward; returns the log-probabilities and the gradients."""
    logprobs = function(*inputs)
    logprobs.sum().backward()
    grads = [tensor.grad for tensor in inputs[:2]]
    for tensor in inputs[:2]:
        tensor.grad = None
    return [logprobs.detach(), *grads]


def interval(ratios):
    """95 % confidence interval of the median, from two of the ratios: nothing is assumed of noise.

    Fewer than k of n ratios are below the median with the probability of fewer than k heads in n
    tosses. So between the k-th smallest and the k-th largest it lies with 1 minus twice that.
    """
    n, k, tail = len(ratios), 0, 0
    while 2 * (tail + math.comb(n, k)) <= 0.05 * 2**n:
        tail += math.comb(n, k)
        k += 1
    if not k:
        raise ValueError(f"ratios: got {n}, expected {FEWEST_ROUNDS} or more")
    ordered = sorted(ratios)
    return ordered[k - 1], ordered[n - k]


def failures(smaller, ratio, low, high, difference):
    """What was missed, one sentence each."""
    failed = []
    if smaller < MEMORY:
        failed.append(f"memory: {smaller:.1f} times less than gather's, expected {MEMORY}")
    if high < 1:
        failed.append(
            f"time: gather over ours is {ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}, "
            "expected 1 or more within the interval"
        )
    if difference > 1e-3:
        failed.append(f"largest difference {difference:.1e}, expected at most 1e-3")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    arguments = parser.parse_args()
    if arguments.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds: got {arguments.rounds}, expected {FEWEST_ROUNDS} or more")

    torch.manual_seed(0)
    inputs = [
        torch.randn(TOKENS, HIDDEN, requires_grad=True),
        (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_(),
        torch.randint(VOCABULARY, (TOKENS,)),
    ]
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads")
    seconds = {name: [] for name in CONTENDERS}
    for round_number in range(arguments.rounds + 1):
        turn = round_number % len(CONTENDERS)
        names = [*CONTENDERS][turn:] + [*CONTENDERS][:turn]
        for name in names if round_number // len(CONTENDERS) % 2 else reversed(names):
            if name == "TRL" and round_number % 3:  # takes longest, and decides about nothing here
                continue
            start = time.perf_counter()
            call(CONTENDERS[name], inputs)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {
        name: measure_peak(lambda function=function: call(function, inputs))
        for name, function in CONTENDERS.items()
    }
    results = {name: call(function, inputs) for name, function in CONTENDERS.items()}
    difference = max(
        (a - b).abs().max().item() for a, b in zip(results["ours"], results["gather"], strict=True)
    )
    for name in CONTENDERS:
        print(f"{name:8}{medians[name]:8.3f} s{memory[name] / 2**20:10.1f} MiB")
    smaller = memory["gather"] / memory["ours"]
    ratios = [a / b for a, b in zip(seconds["gather"], seconds["ours"], strict=True)]
    faster, (low, high) = statistics.median(ratios), interval(ratios)
    print(
        f"gather over ours: {smaller:.1f} in memory, {faster:.2f} in time "
        f"(95 % interval {low:.2f} to {high:.2f}); apart {difference:.1e}"
    )
    if arguments.write:
        write_result(
            "linear_logprobs",
            {
                "size": {"N": TOKENS, "H": HIDDEN, "V": VOCABULARY},
                "seconds": {name: round(value, 4) for name, value in medians.items()},
                "bytes": memory,
                "gather over ours, memory": round(smaller, 2),
                "gather over ours, time": round(faster, 3),
                "gather over ours, time, 95 % interval": [round(low, 3), round(high, 3)],
                "rounds": arguments.rounds,
                "largest difference": difference,
            },
            device="cpu",
        )
    failed = failures(smaller, faster, low, high, difference)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
