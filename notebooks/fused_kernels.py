# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fused kernels: the checks and the measurements
#
# The cells behind the page [Fused Kernels](../docs/advanced/performance/fused-kernels.md). On a
# CPU the functions run plain PyTorch: the numbers and the memory are then the CPU's, and the
# kernels are compiled but not run. Where PyTorch sees a CUDA device the same cells run the kernels.

# %% [markdown]
# ## Where the memory goes

# %%
#| label: memory-model
from transformers import LlamaConfig

from nemo_rl_ref.memory import Model, Step, compare

# The sizes of Llama-3.1-8B. For your own model: Model.from_config("path/of/the/model").
model = Model.from_config(
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
)
# Two DPO pairs of 2048 tokens on each of 8 GPUs, in bfloat16.
# Step.from_config reads the same from a NeMo RL configuration.
step = Step(rows=4, sequence_length=2048, shards=8, activation_checkpointing=True, reference="host")
found = compare(model, step)

# %%
#| label: memory-model-table
#| num: memory-parameters = {model.parameters / 1e9:.2f}
#| num: memory-tokens = {step.rows * step.sequence_length:,}
#| num: memory-logit-tensor = {4 * step.rows * step.sequence_length * model.vocab_size / 2**30:.1f}
#| num: memory-logits = {naive.logits / 2**30:.1f}
#| num: memory-activations = {naive.activations / 2**30:.1f}
#| num: memory-share = {naive.logits / naive.peak:.0%}
#| num: memory-peak = {naive.peak / 2**30:.1f}
#| num: memory-peak-fused = {fused.peak / 2**30:.1f}
#| num: memory-when-fused = {fused.when}
from IPython.display import Markdown

from nemo_rl_ref.memory import table

naive, fused = found["log_softmax"], found["linear_token_logprobs"]
Markdown(table(found))

# %%
#| label: memory-figure
#| alt: Horizontal bars of memory in GiB for the three ways to make log-probabilities, each divided
#|   into weights, gradients, optimizer state, activations, and logits. With log_softmax the logits
#|   are the longest part; with linear_token_logprobs they are hardly seen.
#| caption: Memory of one GPU when the log-probabilities are made, by the calculator.
from nemo_rl_ref.show.figures import LINES, panels

parts = ("weights", "gradients", "optimizer", "activations", "logits")
hatches = ("", "//", "..", "xx", "\\\\")
figure, (axis,) = panels(1, height=2.9)
for row, estimate in enumerate(found.values()):
    left = 0.0
    for part, line, hatch in zip(parts, LINES, hatches, strict=True):
        width = getattr(estimate, part) / 2**30
        axis.barh(
            row, width, left=left, height=0.6, color=line["color"], hatch=hatch,
            edgecolor="white", label=part if row == 0 else None,
        )  # fmt: skip
        left += width
axis.set_yticks(range(len(found)), [name.replace("_", "_\n", 1) for name in found])
axis.invert_yaxis()
axis.grid(False, axis="y")
axis.set_xlabel("GiB")
_ = figure.legend(loc="outside lower center", ncols=3, fontsize=8)

# %% [markdown]
# ### The same, measured

# %%
#| label: memory-measured
#| num: measured-device = {"a CUDA device" if device == "cuda" else "the CPU that built this page"}
#| num: measured-ratio = {measured['log_softmax'] / measured['linear_token_logprobs']:.1f}
#| num: measured-apart = {apart:.0e}
#| num: measured-off = {max(abs(calculated[n] / measured[n] - 1) for n in ways):.1%}
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import nemo_rl_ref.logprobs as functions
from nemo_rl_ref.memory import estimate as estimate_memory
from nemo_rl_ref.memory import measure_peak

device = "cuda" if torch.cuda.is_available() else "cpu"
threads = torch.get_num_threads()
torch.manual_seed(0)
small = Qwen3Config(
    vocab_size=16000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)
policy = Qwen3ForCausalLM(small).to(device)
rows, length = 4, 128
ids = torch.randint(small.vocab_size, (rows, length), device=device)


def by_log_softmax():
    """What NeMo RL does without a vocabulary-parallel group."""
    logits = policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def by_token_logprobs():
    logits = policy(input_ids=ids, use_cache=False).logits
    return functions.token_logprobs(logits[:, :-1], ids[:, 1:])


# What the fused function may use beside inputs and gradients: a tile of 1 MiB, 128 bytes a row.
EXTRA = (1 << 20) + 128 * rows * length


def by_linear_token_logprobs():
    hidden = policy.model(input_ids=ids, use_cache=False).last_hidden_state
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)  # the last has no target
    logprobs = functions.linear_token_logprobs(
        hidden, policy.lm_head.weight, targets, max_extra_bytes=EXTRA
    )
    return logprobs[:, :-1]


ways = {
    "log_softmax": by_log_softmax,
    "token_logprobs": by_token_logprobs,
    "linear_token_logprobs": by_linear_token_logprobs,
}


def micro_batch(way):
    """Forward and backward; the gradients are added to those of the micro-batch before."""
    way().sum().backward()


torch.set_num_threads(1)  # the pieces of token_logprobs grow with the number of threads
micro_batch(by_log_softmax)
lines = ["| MiB beside weights and gradients | measured | calculated |", "| --- | --: | --: |"]
measured, calculated = {}, {}
for name, way in ways.items():
    measured[name] = measure_peak(lambda way=way: micro_batch(way), device)
    small_step = Step(
        rows=rows, sequence_length=length, precision="float32", fsdp=False, logprobs=name,
        max_extra_bytes=EXTRA,
    )  # fmt: skip
    of_step = estimate_memory(Model.from_config(small), small_step)
    beside = of_step.weights + of_step.gradients + of_step.optimizer
    calculated[name] = max(
        size - beside for when, size in of_step.moments.items() if when != "optimizer"
    )
    lines.append(f"| `{name}` | {measured[name] / 2**20:.1f} | {calculated[name] / 2**20:.1f} |")
torch.set_num_threads(threads)
with torch.no_grad():
    results = [way() for way in ways.values()]
apart = max((result - results[0]).abs().max().item() for result in results)
Markdown("\n".join(lines))

# %% [markdown]
# ## The online softmax


# %%
#| label: online-softmax
#| num: online-worst = {worst:.0e}
#| num: online-largest = {row_logits.max():.0f}
#| num: online-overflow = {float(with_overflow)}
import torch


def online(logits, target, block):
    """Log-probability and entropy of a row that is read once, block by block, in nats."""
    top, total, weighted = -torch.inf, 0.0, 0.0
    for start in range(0, len(logits), block):
        part = logits[start : start + block]
        other = part.max()
        e = (part - other).exp()
        parts = [(top, total, weighted), (other, e.sum(), ((part - other) * e).sum())]
        # Both parts go over to the larger maximum, then their sums are added.
        new, total, weighted = max(top, other), 0.0, 0.0
        for its_top, its_total, its_weighted in parts:
            if its_top == -torch.inf:  # nothing seen yet
                continue
            change = its_top - new
            total += its_total * change.exp()
            weighted += (its_weighted + its_total * change) * change.exp()
        top = new
    return logits[target] - top - total.log(), total.log() - weighted / total


torch.manual_seed(0)
row_logits = 100 + 3 * torch.randn(1003, dtype=torch.float64)
logp = torch.log_softmax(row_logits, -1)
expected = torch.stack([logp[7], -(logp.exp() * logp).sum()])
worst = max(
    (torch.stack(online(row_logits, 7, block)) - expected).abs().max().item()
    for block in (1, 2, 32, 500, 1003)
)
single = row_logits.float()
with_overflow = single[7] - single.exp().sum().log()  # float32, without a maximum
print(f"apart from log_softmax: {worst:.0e}; without the maximum: {with_overflow}")

# %% [markdown]
# ## What the compiler made of it

# %%
#| label: compiled
#| num: compiled-spills = {str(sum(r["spills"] for r in reports.values())) if reports else
#|   "unknown"}
#| num: compiled-stack = {str(sum(r["stack"] for r in reports.values())) if reports else "unknown"}
import re

from nemo_rl_ref.kernels import clipped_pg
from nemo_rl_ref.kernels.loader import KernelsUnavailable, compile_kernel

# Function 4 is compiled for the flags of a loss: here those of GRPO with a KL penalty.
FLAGS = sum(clipped_pg.FLAGS[name] for name in ("kl", "kl input clamp", "kl output clamp"))
KERNELS = {
    "1, forward, with entropy": (
        "token_logprobs",
        "token_logprobs_forward<bfloat16, 512, true, false>",
    ),
    "1, backward": ("token_logprobs", "token_logprobs_backward<bfloat16, 512, false, false>"),
    "3": ("gae", "gae<float, unsigned char>"),
    "4, forward": ("clipped_pg", f"clipped_pg_forward<float, float, {FLAGS}>"),
    "4, backward": ("clipped_pg", f"clipped_pg_backward<float, float, {FLAGS}>"),
}
ARCHITECTURES = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200"}


def report(source, expression, architecture):
    """Registers of a thread, and bytes of stack and spills, from the assembler's own words."""
    log = compile_kernel(source, expression, architecture, verbose=True).log

    def find(pattern):
        return int(re.search(pattern, log)[1])

    return {
        "registers": find(r"Used (\d+) registers"),
        "stack": find(r"(\d+) bytes stack frame"),
        "spills": find(r"(\d+) bytes spill stores") + find(r"(\d+) bytes spill loads"),
    }


try:
    reports = {
        (kernel, architecture): report(*what, architecture)
        for kernel, what in KERNELS.items()
        for architecture in ARCHITECTURES
    }
except KernelsUnavailable as error:  # on macOS, which has no NVRTC
    reports, compiled_table = {}, f"Not compiled here: {error}"
else:
    compiled_table = "\n".join(
        [
            "| registers a thread | " + " | ".join(f"`{a}`" for a in ARCHITECTURES) + " |",
            "| --- | " + " | ".join("--:" for _ in ARCHITECTURES) + " |",
            *(
                f"| {kernel} | "
                + " | ".join(str(reports[kernel, a]["registers"]) for a in ARCHITECTURES)
                + " |"
                for kernel in KERNELS
            ),
        ]
    )
Markdown(compiled_table)

# %% [markdown]
# ## Floors

# %%
#| label: floors
#| num: floor-ridge = {TENSOR / BANDWIDTH:.0f}
#| num: floor-intensity = {least['2, forward and backward'].intensity:.0f}
#| num: floor-linear = {least['2, forward and backward'].seconds(BANDWIDTH, TENSOR) * 1e3:.0f}
from nemo_rl_ref.kernels import floors

# Sizes of the benchmark, and what NVIDIA's data sheet of the H100 SXM names as its limits.
N, V, H, B, S = 8192, 128256, 4096, 512, 8192
BANDWIDTH, TENSOR = 3.35e12, 989e12  # bytes and dense bfloat16 operations a second
least = {
    "1, forward": floors.token_logprobs(N, V, backward=False),
    "1, forward and backward": floors.token_logprobs(N, V, backward=True),
    "2, forward and backward": floors.linear_token_logprobs(N, V, H),
    "3": floors.gae(B, S),
    "4, forward and backward": floors.clipped_pg_terms(B, S),
}
floor_lines = [
    "| function | GB | TFLOP | operations a byte | ms on an H100 at least |",
    "| --- | --: | --: | --: | --: |",
]
for name, floor in least.items():
    floor_lines.append(
        f"| {name} | {floor.bytes / 1e9:.2f} | {floor.operations / 1e12:.1f} "
        f"| {floor.intensity:.0f} | {floor.seconds(BANDWIDTH, TENSOR) * 1e3:.2f} |"
    )
Markdown("\n".join(floor_lines))

# %% [markdown]
# ## Measured

# %%
#| label: results
import json

from nemo_rl_ref.files.shipped import shipped

RESULTS = shipped("benchmarks/results")
recorded = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
on_gpu = {name: entries["kernels"] for name, entries in recorded.items() if "kernels" in entries}


def gpu_table(entry):
    """Every contender of every workload: milliseconds, share of the floor, memory."""
    lines = [
        f"{entry['device']}, {entry['date']}, commit {entry['commit'][:7]}, PyTorch "
        f"{entry['versions']['torch']}. Peers: "
        + ", ".join(f"{name} {version}" for name, version in entry["peers"].items()),
        "",
        "| | ms | of the floor | MiB beyond inputs and gradients |",
        "| --- | --: | --: | --: |",
    ]
    for workload, result in entry["workloads"].items():
        lines.append(f"| **{workload}** | | | |")
        for name, seconds in sorted(result["seconds"].items(), key=lambda item: item[1]):
            extra = result["extra bytes"][name] / 2**20
            lines.append(
                f"| {name} | {seconds * 1e3:.2f} | {result['of floor'][name]:.0%} | {extra:.0f} |"
            )
    return "\n".join(lines)


NOT_YET = (
    "**Not yet measured.** There is no result file of a GPU in `benchmarks/results`. "
    "`make gpu` on a machine with one writes it; this table and the figure are then drawn from it."
)
Markdown("\n\n".join(gpu_table(entry) for entry in on_gpu.values()) if on_gpu else NOT_YET)

# %%
#| label: roofline
#| alt: Roofline, TFLOP/s over operations a byte on logarithmic axes. A line rises with the memory
#|   bandwidth up to a ridge and is flat from there on, at the speed of matrix products. Function 2
#|   lies far to the right of the ridge. Contenders are points once a GPU has been measured.
#| caption: The roofline of a measured GPU with the contenders for function 2; while there is none, the
#|   limits in the data sheet of the H100 SXM and where function 2 lies.
figure, (axis,) = panels(1, height=3.2)
if on_gpu:
    entry = next(iter(on_gpu.values()))
    result = entry["workloads"]["linear log-probabilities, forward and backward"]
    bandwidth = result["copy, bytes per second"]
    products = result["matrix products, operations per second"]
    intensity = result["operations"] / result["bytes"]
    for (name, seconds), line in zip(result["seconds"].items(), LINES * 3, strict=False):
        axis.loglog(
            intensity, result["operations"] / seconds / 1e12, line["marker"],
            color=line["color"], label=name,
        )  # fmt: skip
    axis.set_title(f"TFLOP/s of function 2, {entry['device']}")
else:
    bandwidth, products = BANDWIDTH, TENSOR
    intensity = least["2, forward and backward"].intensity
    axis.axvline(intensity, color=LINES[1]["color"], linestyle="--", label="function 2")
    axis.set_title("TFLOP/s, by the data sheet of the H100 SXM")
ridge = products / bandwidth
reach = [ridge / 100, ridge, ridge * 100]
roof = [min(products, bandwidth * x) / 1e12 for x in reach]
axis.loglog(reach, roof, color=LINES[0]["color"], label="limit")
axis.set_xlabel("operations a byte")
axis.legend(fontsize=8, loc="upper left")

# %%
#| label: cpu-results
#| num: cpu-memory = {first['gather over ours, memory']:.1f}
#| num: cpu-time = {first['gather over ours, time']:.2f}
#| num: cpu-time-low = {first['gather over ours, time, 95 % interval'][0]:.2f}
#| num: cpu-time-high = {first['gather over ours, time, 95 % interval'][1]:.2f}
#| num: cpu-rounds = {first['rounds']}
on_cpu = {
    name: entries["linear_logprobs"]
    for name, entries in recorded.items()
    if "linear_logprobs" in entries
}
lines = []
for entry in on_cpu.values():
    size = ", ".join(f"{key} = {value}" for key, value in entry["size"].items())
    lines += [
        f"{entry['device']}, {entry['threads']} threads, {entry['date']}, {size}, float32.",
        "",
        "| | seconds | MiB |",
        "| --- | --: | --: |",
        *(
            f"| {name} | {seconds:.2f} | {entry['bytes'][name] / 2**20:.0f} |"
            for name, seconds in entry["seconds"].items()
        ),
    ]
    lines.append("")
first = next(iter(on_cpu.values()))  # the sentence below the table is about it
Markdown("\n".join(lines))

# %% [markdown]
# ## In one's own model

# %%
#| label: own-model
#| num: own-difference = {BOUND:.0e}
import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.logprobs import linear_token_logprobs, token_logprobs

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = tiny.load_tokenizer()
model = tiny.load_policy().to(device)
texts = ["12+34=46", "7+8=15"]
batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(device)

# The decoder without its head gives hidden states (B, S, H); the head's weight is (V, H).
hidden = model.model(**batch, use_cache=False).last_hidden_state
# Position t is asked for token t + 1. The last position and padding have no target: -100.
targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
targets = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=-100)
logprobs, entropy = linear_token_logprobs(
    hidden, model.lm_head.weight, targets, return_entropy=True
)
(-logprobs.sum()).backward()

with torch.no_grad():
    logits = model(**batch, use_cache=False).logits
    difference = (token_logprobs(logits, targets) - logprobs).abs().max().item()
BOUND = 1e-4 if device == "cuda" else 1e-5  # nats
assert difference < BOUND, difference
print("log-probability of each text in nats:", [f"{v:.3f}" for v in logprobs.sum(-1).tolist()])

# %% [markdown]
# ## In TRL

# %%
#| label: trl-trainer
#| num: trl-difference = {trl_difference:.0e}
import logging
import tempfile
import warnings

import datasets
import transformers
from trl import GRPOConfig, GRPOTrainer

warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, not ours
transformers.utils.logging.disable_progress_bar()
logging.getLogger("trl").setLevel(logging.ERROR)


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with these log-probabilities: text models, one process, no auxiliary loss."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
        compute_entropy=False, compute_aux_loss=False, **inputs,
    ):  # fmt: skip
        if compute_aux_loss or any(value is not None for value in inputs.values()):
            raise NotImplementedError("images and auxiliary losses are left to TRL's own function")
        # The decoder is called past the wrappers that join processes: DDP would add up nothing.
        if self.accelerator.num_processes > 1:
            raise NotImplementedError(f"got {self.accelerator.num_processes} processes, expected 1")
        model = self.accelerator.unwrap_model(model)
        found = []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            with self.accelerator.autocast():
                hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
                hidden = hidden.last_hidden_state[:, -logits_to_keep - 1 : -1]
            targets = ids.masked_fill(mask == 0, -100)[:, -logits_to_keep:]
            found.append(
                linear_token_logprobs(
                    hidden, model.lm_head.weight, targets, temperature=self.temperature,
                    return_entropy=True,
                )
            )  # fmt: skip
        logps, entropies = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return logps, entropies if compute_entropy else None, None


def make(trainer_class, folder):
    return trainer_class(
        model=tiny.load_policy(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(
            output_dir=folder,
            report_to="none",
            bf16=False,
            temperature=0.7,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+2="}]),
        processing_class=tokenizer,
    )


with tempfile.TemporaryDirectory() as folder:
    ours, theirs = make(FusedGRPOTrainer, folder), make(GRPOTrainer, folder)
    arguments = (batch["input_ids"], batch["attention_mask"], 3)
    fused_logps, fused_entropies, _ = ours._get_per_token_logps_and_entropies(
        ours.model, *arguments, compute_entropy=True
    )
    their_logps, their_entropies, _ = theirs._get_per_token_logps_and_entropies(
        theirs.model, *arguments, compute_entropy=True
    )
trl_difference = max(
    (fused_logps - their_logps).abs().max().item(),
    (fused_entropies - their_entropies).abs().max().item(),
)
assert trl_difference < 1e-5, trl_difference

# %% [markdown]
# ## In NeMo RL

# %%
#| label: nemo-rl-forward
import contextlib
import types

from transformers.modeling_outputs import CausalLMOutput


@contextlib.contextmanager
def scoring(model):
    """Let a Hugging Face decoder return next-token log-probabilities (B, S), as long as it lasts.

    Column t belongs to token t + 1; the last is 0.
    """
    original = model.forward

    def forward(self, input_ids=None, **inputs):
        inputs.pop("labels", None)
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
        logprobs = linear_token_logprobs(hidden, self.lm_head.weight, targets)
        return CausalLMOutput(logits=logprobs)

    model.forward = types.MethodType(forward, model)
    try:
        yield model
    finally:
        model.forward = original


# %%
#| label: nemo-rl-loss
#| num: nemo-gradient-difference = {gradient_difference:.0e}
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.upstream import load_manifest

# What this stands on in NeMo RL, at the pinned commit.
symbols = load_manifest()["symbols"]
prepare = symbols["nemo_rl.algorithms.loss.utils.prepare_loss_input"]["signature"]
init = symbols["nemo_rl.algorithms.loss.loss_functions.DPOLossFn"]["methods"]["__init__"]
assert prepare.startswith("(logits, data, loss_fn"), prepare
assert init["signature"] == "(self, cfg, use_fused_linear_logprobs=False)", init

loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1), use_fused_linear_logprobs=True)
ids = batch["input_ids"]
data = {
    "input_ids": ids,
    "token_mask": batch["attention_mask"].float(),
    "sample_mask": torch.ones(2, device=device),
    "reference_policy_logprobs": torch.zeros(ids.shape, device=device),
}
counts = data["sample_mask"].sum(), data["token_mask"][:, 1:].sum()

patched = tiny.load_policy().to(device).train()
with scoring(patched):  # in a worker: around the body of `train`
    # NeMo RL's prepare_loss_input: "logits" are taken as log-probabilities, cut to (B, S - 1).
    fused_logprobs = patched(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] - 1]
    fused_loss, _ = loss_fn(fused_logprobs, data, *counts)
    fused_loss.backward()
    # Validation of DPO and SFT is `train` in evaluation mode, with the same loss.
    with torch.no_grad():
        validated = patched.eval()(input_ids=ids, use_cache=False).logits[:, : ids.shape[1] - 1]
        validation_loss, _ = loss_fn(validated, data, *counts)

plain = tiny.load_policy().to(device).train()
plain_logits = plain(input_ids=ids, use_cache=False).logits
plain_loss, _ = loss_fn(token_logprobs(plain_logits[:, :-1], ids[:, 1:]), data, *counts)
plain_loss.backward()
gradient_difference = max(
    (a.grad - b.grad).abs().max().item()
    for a, b in zip(patched.parameters(), plain.parameters(), strict=True)
)
assert abs(fused_loss.item() - plain_loss.item()) < 1e-5
assert gradient_difference < 1e-5, gradient_difference
assert abs(validation_loss.item() - plain_loss.item()) < 1e-5
assert patched(input_ids=ids, use_cache=False).logits.shape == plain_logits.shape  # as before
