# SPDX-License-Identifier: Apache-2.0
"""The memory-bound functions of RL losses, beside what a user would pick instead, and the floors.

    python benchmarks/bench_kernels.py                    # on a GPU, about five minutes
    python benchmarks/bench_kernels.py --write            # and record it in results/
    python benchmarks/bench_kernels.py --device cpu --quick   # tiny sizes, a few seconds

Without a GPU the script says so and ends, unless ``--device cpu`` asks for the CPU, where the
functions run plain PyTorch and the numbers only show that the script works.

A call is measured with CUDA events, behind a short sleep of the GPU, so that launches do not
count where the GPU is the slower one. Contenders take turns; numbers are medians. Every call of a
contender gets another set of inputs, of more bytes together than twice the L2 cache, so that none
of them is found there. Memory is what the allocator had in use at most, above what was in use
before the call, which is inputs.

Floors are those of nemo_rl_ref.kernels.floors: bytes over the bandwidth of a copy of 1 GiB that is
measured in between; for the linear one also the time of its four matrix products in cuBLAS.
``requirements-gpu.txt`` pins the peers; one that is not installed is reported as absent, one that
fails with its error, and how far its results are from ours is written down.

Asked on an H100 or H200: see `ASKS`. The script fails there if one is not met.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _peers import CONTENDERS, versions  # noqa: E402
from _record import device_name, write_result  # noqa: E402
from rich.progress import track  # noqa: E402

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn  # noqa: E402
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import Settings  # noqa: E402
from nemo_rl_ref.kernels import floors  # noqa: E402
from nemo_rl_ref.kernels.floors import Floor  # noqa: E402
from nemo_rl_ref.memory import measure_peak  # noqa: E402

FORWARD = "log-probabilities and entropy, forward"
BOTH = "log-probabilities, forward and backward"
LINEAR = "linear log-probabilities, forward and backward"
GAE = "generalized advantage estimation"
CLIPPED = "clipped policy gradient, forward and backward"

#: By workload: what is asked of ours, in words, and the check of its results.
ASKS: dict[str, list[tuple[str, Callable[[dict[str, Any]], bool]]]] = {
    FORWARD: [("at least 90 % of copy bandwidth", lambda r: r["of floor"]["ours"] >= 0.90)],
    BOTH: [
        ("at least 85 % of copy bandwidth", lambda r: r["of floor"]["ours"] >= 0.85),
        ("faster than every peer", lambda r: _fastest(r) == "ours"),
    ],
    LINEAR: [
        ("at least 80 % of its matrix products' speed", lambda r: r["of floor"]["ours"] >= 0.80),
        ("as fast as the fastest peer with values per token", lambda r: _fastest(r) == "ours"),
        (
            "at most 512 MiB beyond inputs and gradients",
            lambda r: r["extra bytes"]["ours"] <= 512 << 20,
        ),
    ],
    GAE: [
        ("at least 70 % of copy bandwidth", lambda r: r["of floor"]["ours"] >= 0.70),
        (
            "at least 500 times the time loop",
            lambda r: r["seconds"]["NeMo RL's time loop"] >= 500 * r["seconds"]["ours"],
        ),
    ],
    CLIPPED: [
        ("one kernel each way", lambda r: r["kernels"] == {"forward": 1, "backward": 1}),
        (
            "faster than torch.compile",
            lambda r: r["seconds"]["ours"] < r["seconds"].get("torch.compile", float("inf")),
        ),
    ],
}


@dataclass
class Workload:
    """What is measured.

    Attributes:
        name: A key of `CONTENDERS`.
        size: The sizes, for the record.
        make: Makes the inputs of a call; those that need a gradient require one.
        floor: What has to be moved and computed at least.
        backward: Whether backward is part of a call.
        options: Further keyword arguments of every contender.
        tail: Further positional arguments of every contender.
    """

    name: str
    size: dict[str, int]
    make: Callable[[], list[torch.Tensor]]
    floor: Floor
    backward: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    tail: tuple[Any, ...] = ()


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """The workloads, at full size or at a tiny one."""
    N, V, H = (64, 1003, 32) if quick else (8192, 128256, 4096)
    B, S = (8, 64) if quick else (512, 8192)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16, grad=False):
        made = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        return made.requires_grad_(grad)

    def targets():
        return torch.randint(V, (N,), device=device, generator=generator)

    def mask():
        return (torch.rand(B, S, device=device, generator=generator) < 0.8).float()

    def logits(grad):
        return lambda: [normal(N, V, grad=grad), targets()]

    def hidden():
        weight = (normal(V, H) / H**0.5).requires_grad_()
        return [normal(N, H, grad=True), weight, targets()]

    def tokens():
        return [normal(B, S, dtype=torch.float32), normal(B, S, dtype=torch.float32), mask()]

    def policies():
        current = -normal(B, S, dtype=torch.float32).abs()
        others = [current + 0.1 * normal(B, S, dtype=torch.float32) for _ in range(3)]
        return [current.requires_grad_(), *others, normal(B, S, dtype=torch.float32), mask()]

    config = ClippedPGLossConfig(
        ratio_clip_c=3.0,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="tis",
        truncated_importance_sampling_ratio=2.0,
    )
    settings = Settings.of(ClippedPGLossFn(config))
    size = {"N": N, "V": V}
    forward = floors.token_logprobs(N, V, backward=False)
    both = floors.token_logprobs(N, V, backward=True)
    return [
        Workload(FORWARD, size, logits(False), forward),
        Workload(BOTH, size, logits(True), both, backward=True),
        Workload(
            LINEAR,
            size | {"H": H},
            hidden,
            floors.linear_token_logprobs(N, V, H),
            backward=True,
        ),
        Workload(
            GAE,
            {"B": B, "S": S},
            tokens,
            floors.gae(B, S),
            options={"gamma": 0.99, "lam": 0.95},
        ),
        Workload(
            CLIPPED,
            {"B": B, "S": S},
            policies,
            floors.clipped_pg_terms(B, S),
            backward=True,
            tail=(settings,),
        ),
    ]


class Stopwatch:
    """Times calls: with CUDA events, or with the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], Any]) -> float:
        """Seconds of a call."""
        if not self.on_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches are made
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def call(function: Callable, workload: Workload, inputs: list[torch.Tensor]) -> None:
    """A forward pass and, if the workload has it, a backward pass; gradients are dropped."""
    outputs = function(*inputs, *workload.tail, **workload.options)
    if workload.backward:
        loss_of(outputs, workload).backward()
        for tensor in inputs:
            tensor.grad = None


def loss_of(outputs: Any, workload: Workload) -> torch.Tensor:
    """A number to differentiate: the loss among the terms, or a sum of log-probabilities."""
    if workload.name == CLIPPED:
        return outputs[0]
    return (outputs[0] if isinstance(outputs, tuple) else outputs).sum()


def turn(
    watch: Stopwatch, function: Callable, workload: Workload, sets: Iterator[list[torch.Tensor]]
) -> float:
    """Seconds of one call on the next set of inputs."""
    inputs = next(sets)
    return watch(lambda: call(function, workload, inputs))


def rotate(made: list[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The sets of inputs again and again."""
    while True:
        yield from made


def input_sets(workload: Workload, device: torch.device) -> list[list[torch.Tensor]]:
    """At least two sets of inputs, together of more than twice the bytes of the L2 cache."""
    made = [workload.make()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in made[0])
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    made += [workload.make() for _ in range(max(1, 2 * cache // size))]
    return made


def build(
    workload: Workload, inputs: list[torch.Tensor], left_out: set[str]
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The contenders that can be made and run, and why the others cannot."""
    functions, missing = {}, {}
    for name, make in CONTENDERS[workload.name].items():
        if name in left_out:
            missing[name] = "left out with --quick"
            continue
        try:
            function = make()
            call(function, workload, inputs)
        except ImportError as error:
            if name == "ours":
                raise
            missing[name] = f"absent: {error}"
        except Exception as error:  # a peer's failure is a result, ours is not
            if name == "ours":
                raise
            missing[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            functions[name] = function
    return functions, missing


def copy_seconds(watch: Stopwatch, device: torch.device, size: int) -> Callable[[], float]:
    """A function that times a copy of `size` bytes, which moves twice as many."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: watch(lambda: target.copy_(source))


def product_seconds(watch: Stopwatch, inputs: list[torch.Tensor]) -> Callable[[], float]:
    """A function that times the four matrix products of the linear workload in cuBLAS."""
    hidden, weight = (tensor.detach() for tensor in inputs[:2])
    logits = hidden @ weight.T

    def run():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return lambda: watch(run)


def measure(
    workload: Workload, device: torch.device, rounds: int, left_out: set[str], copy: int
) -> dict[str, Any]:
    """Measure all contenders of a workload, in turns, with its floors between them."""
    watch = Stopwatch(device)
    made = input_sets(workload, device)
    functions, missing = build(workload, made[0], left_out)
    references = {"copy": copy_seconds(watch, device, copy)}
    if workload.floor.operations:
        references["products"] = product_seconds(watch, made[0])
    sets = rotate(made)
    seconds: dict[str, list[float]] = {name: [] for name in (*functions, *references)}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            # What takes a fraction of a second has few calls a round.
            taken = turn(watch, function, workload, sets)
            calls = 1 if taken > 0.2 else 5
            times = [taken] + [turn(watch, function, workload, sets) for _ in range(calls - 1)]
            if round_number:  # the first round warms up
                seconds[name] += times
        for name, reference in references.items():
            times = [reference() for _ in range(3)]
            if round_number:
                seconds[name] += times
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bandwidth = 2 * copy / medians.pop("copy")
    result: dict[str, Any] = {
        "size": workload.size,
        "sets of inputs": len(made),
        "bytes": workload.floor.bytes,
        "operations": workload.floor.operations,
        "copy, bytes per second": round(bandwidth),
    }
    rate = float("inf")
    if workload.floor.operations:
        rate = workload.floor.operations / medians.pop("products")
        result["matrix products, operations per second"] = round(rate)
    floor = workload.floor.seconds(bandwidth, rate)
    result["floor, seconds"] = floor
    result["seconds"] = medians
    result["of floor"] = {name: round(floor / value, 4) for name, value in medians.items()}
    result["missing"] = missing
    del references
    gradients = sum(
        tensor.numel() * tensor.element_size() for tensor in made[0] if tensor.requires_grad
    )
    result["largest difference to ours"] = {
        name: difference(function, functions["ours"], workload, made[0])
        for name, function in functions.items()
        if name != "ours"
    }
    result["extra bytes"] = {
        name: extra_bytes(function, workload, made[0], device, gradients)
        for name, function in functions.items()
    }
    if workload.name == CLIPPED and device.type == "cuda":
        result["kernels"] = count_kernels(functions["ours"], workload, made[0])
    return result


@torch.no_grad()
def difference(
    function: Callable, ours: Callable, workload: Workload, inputs: list[torch.Tensor]
) -> float:
    """Largest difference of results; of sums, where one of the two gives only those."""

    def results(run):
        copies = [tensor.detach().clone() for tensor in inputs]  # some write over their inputs
        outputs = run(*copies, *workload.tail, **workload.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    apart = []
    for a, b in zip(results(function), results(ours), strict=False):
        if a.shape != b.shape:
            a, b = a.float().sum() / len(inputs[0]), b.float().sum() / len(inputs[0])
        apart.append((a.float() - b.float()).abs().max())
    return torch.stack(apart).max().item()  # of a NaN, NaN


def extra_bytes(
    function: Callable,
    workload: Workload,
    inputs: list[torch.Tensor],
    device: torch.device,
    gradients: int,
) -> int:
    """Peak memory of a call beyond its inputs and, with backward, their gradients."""
    used = measure_peak(lambda: call(function, workload, inputs), device)
    return max(used - (gradients if workload.backward else 0), 0)


def count_kernels(
    function: Callable, workload: Workload, inputs: list[torch.Tensor]
) -> dict[str, int]:
    """Number of kernels of ours that a forward and a backward pass launch."""
    from torch.profiler import ProfilerActivity, profile

    def kernels(run):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            result = run()
            torch.cuda.synchronize()
        names = [event.name() for event in found.profiler.kineto_results.events()]
        return result, sum("clipped_pg_" in name for name in names)

    outputs, forward = kernels(lambda: function(*inputs, *workload.tail, **workload.options))
    loss = loss_of(outputs, workload)
    _, backward = kernels(loss.backward)
    for tensor in inputs:
        tensor.grad = None
    return {"forward": forward, "backward": backward}


def _fastest(result: dict[str, Any]) -> str:
    per_token = {n: s for n, s in result["seconds"].items() if not n.endswith("(scalar)")}
    return min(per_token, key=per_token.__getitem__)


def judge(found: dict[str, dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What was asked, and whether it was reached; None where the device is another."""
    asked_here = any(name in device for name in ("H100", "H200"))
    return [
        {"workload": name, "asked": text, "met": check(result) if asked_here else None}
        for name, result in found.items()
        for text, check in ASKS[name]
    ]


def report(name: str, result: dict[str, Any]) -> str:
    """A table of one workload, for the terminal."""
    size = ", ".join(f"{key} = {value}" for key, value in result["size"].items())
    lines = [f"\n{name}: {size}", f"{'':24}{'ms':>12}{'of floor':>10}{'extra MiB':>12}"]
    for contender, seconds in sorted(result["seconds"].items(), key=lambda item: item[1]):
        extra = result["extra bytes"][contender] / 2**20
        share = result["of floor"][contender]
        lines.append(f"{contender:24}{seconds * 1e3:12.3f}{share:10.0%}{extra:12.1f}")
    floor = result["floor, seconds"]
    lines.append(f"{'floor':24}{floor * 1e3:12.3f}{'100%':>10}")
    lines += [f"{contender:24}{reason}" for contender, reason in result["missing"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where to run")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without torch.compile")
    parser.add_argument("--only", metavar="WORD", help="only workloads with this in their name")
    parser.add_argument("--write", action="store_true", help="record the result in results/")
    parser.add_argument("--results", type=Path, metavar="DIR", help="another folder for --write")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected 1 or more")
    if arguments.write and arguments.quick and not arguments.results:
        parser.error("--write: the sizes of --quick are no result; give --results DIR to try it")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: the kernels were not measured; --device cpu --quick tries the script")
        return
    device = torch.device(arguments.device)
    todo = [
        workload
        for workload in workloads(device, arguments.quick)
        if not arguments.only or arguments.only in workload.name
    ]
    if not todo:
        parser.error(f"--only: no workload has {arguments.only!r} in its name: {', '.join(ASKS)}")
    left_out = {"torch.compile"} if arguments.quick else set()
    copy = 1 << 20 if arguments.quick else 1 << 30
    name = device_name(device.type)
    print(f"{name}, PyTorch {torch.__version__}; peers: {versions()}")
    found = {}
    for workload in track(todo, description="Measuring", transient=True):
        found[workload.name] = measure(workload, device, arguments.rounds, left_out, copy)
        print(report(workload.name, found[workload.name]))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    asks = judge(found, name)
    if arguments.write:
        numbers = {"peers": versions(), "workloads": found, "asks": asks}
        write_result("kernels", numbers, device=device.type, folder=arguments.results)
    for ask in asks:
        word = {True: "reached", False: "MISSED", None: "not asked of this device"}[ask["met"]]
        print(f"{word:8}  {ask['workload']}: {ask['asked']}")
    if missed := [ask for ask in asks if ask["met"] is False]:
        sys.exit(f"{len(missed)} of {len(asks)} not reached")


if __name__ == "__main__":
    main()
