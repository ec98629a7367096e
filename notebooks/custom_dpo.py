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
# # Custom DPO, step by step
#
# You will read preference pairs, check the DPO loss against its definition, write a loss of your
# own in one cell, train both, and lay the result beside TRL's trainer. The text that explains the
# steps is on the page [Custom DPO Implementation](../docs/advanced/algorithm-development/custom-dpo.md).
#
# The notebook runs on a CPU. Where PyTorch sees a CUDA device it uses that, and longer runs.

# %%
#| label: dpo-setup
#| num: policy-parameters = {reference.num_parameters():,}
#| num: dpo-rate = {LEARNING_RATE:g}
import statistics
import warnings

import torch
from accelerate import Accelerator

from nemo_rl_ref import tiny

warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, not ours

on_gpu = torch.cuda.is_available()
STEPS = 360 if on_gpu else 120  # optimizer steps of a run
PAIRS = 32  # preference pairs a step
SEEDS = range(5 if on_gpu else 3)  # a seed decides the order of the pairs
BETA = 0.1  # NeMo RL: dpo.reference_policy_kl_penalty
LEARNING_RATE = 3e-4  # NeMo RL: policy.optimizer.kwargs.lr

accelerator = Accelerator()
tokenizer = tiny.load_tokenizer()  # or load_tokenizer("Qwen/Qwen3-0.6B")
reference = tiny.load_policy().eval().to(accelerator.device)
print(f"{reference.num_parameters():,} parameters on {accelerator.device}")

# %% [markdown]
# ## The data

# %%
#| label: dpo-data
#| num: pairs-held-out = {len(held_out_pairs)}
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.training.samples import preference_pairs

train_data = BinaryPreferenceDataset(str(tiny.TRAIN_PAIRS))
held_out_data = BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS))
train_pairs = preference_pairs(train_data, tokenizer, max_seq_length=16)
held_out_pairs = preference_pairs(held_out_data, tokenizer, max_seq_length=16)
print(f"{len(train_pairs):,} pairs to train on, {len(held_out_pairs)} held out. The first:")
print(tiny.TRAIN_PAIRS.read_text().splitlines()[0])

# %%
#| label: dpo-answers
#| num: pairs-same-start = {same_start:.0%}
#| num: pairs-same-length = {same_length:.0%}
answers = [
    [completion["completion"][0]["content"] for completion in record["completions"]]
    for record in train_data.dataset
]
same_start = sum(chosen[0] == rejected[0] for chosen, rejected in answers) / len(answers)
same_length = sum(len(chosen) == len(rejected) for chosen, rejected in answers) / len(answers)

# %%
#| label: dpo-batch
batch = train_pairs.batch([0, 1])
for name, tensor in batch.items():
    print(f"{name:14} {tensor.dtype!s:14} {tuple(tensor.shape)}")

# %%
#| label: dpo-batch-table
from IPython.display import Markdown


def token_table(batch):
    """One row a sequence; tokens the loss looks at in bold."""
    lines = ["| row | answer | tokens |", "| --- | --- | --- |"]
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["token_mask"], strict=True)):
        tokens = [t.strip("<>") for t in tokenizer.convert_ids_to_tokens(ids)]
        shown = [f"**`{t}`**" if m else f"`{t}`" for t, m in zip(tokens, mask, strict=True)]
        lines.append(f"| {row} | {('chosen', 'rejected')[row % 2]} | {' '.join(shown)} |")
    return Markdown("\n".join(lines))


token_table(batch)

# %% [markdown]
# ## The loss from its definition
#
# In float64, from log-probabilities drawn at random: equation by equation, without the class.

# %%
#| label: dpo-by-hand
torch.manual_seed(0)
pairs, length = 4, 7
log_pi = torch.randn(2 * pairs, length - 1, dtype=torch.float64, requires_grad=True)
log_pi_ref = torch.randn(2 * pairs, length - 1, dtype=torch.float64)
answer = torch.ones(2 * pairs, length, dtype=torch.float64)
answer[:, :3] = 0  # three prompt tokens

h = ((log_pi - log_pi_ref) * answer[:, 1:]).sum(1)  # log-ratio of each answer
margin = BETA * (h[0::2] - h[1::2])  # even rows are chosen, odd rows rejected
by_hand = -torch.log(torch.sigmoid(margin)).mean()
(gradient,) = torch.autograd.grad(by_hand, log_pi)

# %%
#| label: dpo-by-class
#| num: dpo-loss-error = {loss_error:.1e}
#| num: dpo-gradient-error = {gradient_error:.1e}
#| num: dpo-derivation-error = {derivation_error:.1e}
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn

loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=BETA))
loss, metrics = loss_fn(
    log_pi,
    data={
        # (B, S): column t holds the log-probability of token t + 1, the last column is not read
        "reference_policy_logprobs": torch.nn.functional.pad(log_pi_ref, (0, 1)),
        "token_mask": answer,
        "sample_mask": torch.ones(2 * pairs, dtype=torch.float64),
    },
    global_valid_seqs=torch.tensor(2.0 * pairs, dtype=torch.float64),
    global_valid_toks=answer[:, 1:].sum(),
)
(class_gradient,) = torch.autograd.grad(loss, log_pi)
for name, value in metrics.items():
    print(f"{name:22}{value:.6f}")

# The gradient as the page derives it: -β σ(-margin) / pairs on every chosen token.
weight = BETA * torch.sigmoid(-margin.detach()) / pairs
sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(pairs)
derived = sign[:, None] * weight.repeat_interleave(2)[:, None] * answer[:, 1:]

loss_error = (loss - by_hand).abs().item()
gradient_error = (class_gradient - gradient).abs().max().item()
derivation_error = (derived - gradient).abs().max().item()
assert loss_error < 1e-7 and gradient_error < 1e-7 and derivation_error < 1e-15

# %% [markdown]
# ## A loss of one's own
#
# DPO-Positive. The cell stands alone: copied into a file, with the import prefix changed to
# `nemo_rl`, it is a loss for NeMo RL.

# %%
#| label: dpop-loss
import torch

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn


class DPOPLossFn(DPOLossFn):
    """DPO-Positive: DPO that also objects when the chosen answer becomes less likely.

    The chosen answer's log-ratio h_w enters as h_w - λ max(0, -h_w). (Pal et al., 2024,
    https://arxiv.org/abs/2402.13228.) λ is the config key `dpo.dpop_penalty`, 5 if not given.
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.penalty = getattr(cfg, "dpop_penalty", 5.0)
        if not self.penalty >= 0:
            raise ValueError(f"dpop_penalty: got {self.penalty}, expected 0 or more")

    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        chosen, rejected = self.split_output_tensor(rewards)
        penalized = chosen - self.penalty * torch.relu(-chosen)
        rows = torch.stack([penalized, rejected], dim=1).flatten()
        loss, *_ = super()._preference_loss(rows, sample_mask, global_valid_seqs, beta)
        # The metrics stay those of the true rewards, so that they compare with DPO's.
        _, *metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)
        return loss, *metrics


# %%
#| label: dpop-checks
#| num: dpop-paper-error = {dpop_error:.1e}
#| num: dpop-split-error = {f"by {split_error:.1e}" if split_error else "not at all"}
from nemo_rl_ref.custom import pairwise


def loss_and_gradient(loss_fn, logprobs, data):
    """The loss over all rows at once, normalized by their number, and its gradient."""
    logprobs = logprobs.detach().requires_grad_()
    seqs = torch.tensor(float(len(data["sample_mask"])), dtype=logprobs.dtype)
    loss, _ = loss_fn(logprobs, data, seqs, data["token_mask"][:, 1:].sum())
    return loss, torch.autograd.grad(loss, logprobs)[0]


data = {
    "reference_policy_logprobs": torch.nn.functional.pad(log_pi_ref, (0, 1)),
    "token_mask": answer,
    "sample_mask": torch.ones(2 * pairs, dtype=torch.float64),
}
settings = {"reference_policy_kl_penalty": BETA}
dpop = DPOPLossFn(DPOLossConfig(**settings, dpop_penalty=5.0))

# Without the penalty it is DPO, to the bit.
plain = DPOPLossFn(DPOLossConfig(**settings, dpop_penalty=0.0))
for ours, dpo in zip(
    loss_and_gradient(plain, log_pi, data), loss_and_gradient(loss_fn, log_pi, data), strict=True
):
    assert torch.equal(ours, dpo)

# Its value is the paper's equation.
h_w, h_l = h.detach()[0::2], h.detach()[1::2]
paper = -torch.log(torch.sigmoid(BETA * (h_w - h_l - 5.0 * torch.relu(-h_w)))).mean()
dpop_error = (loss_and_gradient(dpop, log_pi, data)[0] - paper).abs().item()
assert dpop_error < 1e-7

# So is that of this project's class, written for all losses of pairs alike.
again = pairwise.DPOPLossFn(DPOLossConfig(**settings, dpop_penalty=5.0))
for ours, theirs in zip(
    loss_and_gradient(dpop, log_pi, data), loss_and_gradient(again, log_pi, data), strict=True
):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)

# Micro-batches of one pair and of three pairs add up to the whole batch.
whole, whole_gradient = loss_and_gradient(dpop, log_pi, data)
seqs = torch.tensor(2.0 * pairs, dtype=torch.float64)
logprobs = log_pi.detach().requires_grad_()
parts = sum(
    dpop(logprobs[rows], {k: v[rows] for k, v in data.items()}, seqs, None)[0]
    for rows in (slice(0, 2), slice(2, 8))
)
parts_gradient = torch.autograd.grad(parts, logprobs)[0]
split_error = max(
    (parts - whole).abs().item(), (parts_gradient - whole_gradient).abs().max().item()
)
assert split_error < 1e-15

# %% [markdown]
# ## Training

# %%
#| label: dpo-run
from nemo_rl_ref.rl.generate import response_kl, sample_responses
from nemo_rl_ref.tiny.addition import is_correct, problems, prompt
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import Batches
from nemo_rl_ref.training.step import run_batch, update

_, never_seen = problems()
prompts = [prompt(problem) for problem in never_seen[:500]]
add_reference_logprobs(reference, [train_pairs, held_out_pairs], accelerator)
held_out = held_out_pairs.batch(range(len(held_out_pairs)))


def measure(policy, loss_fn):
    """What the policy does on pairs and problems it was not trained on."""
    pairs = run_batch(
        policy, loss_fn, held_out, accelerator, micro_rows=held_out.size, backward=False
    )
    responses = sample_responses(policy, tokenizer, prompts, max_new_tokens=5, seed=5)
    right = map(is_correct, prompts, responses.texts(tokenizer))
    return {
        "preference accuracy": pairs["accuracy"],
        "reward margin": BETA * (pairs["rewards_chosen_mean"] - pairs["rewards_rejected_mean"]),
        "chosen log-ratio": pairs["rewards_chosen_mean"],
        "exact match": sum(right) / len(prompts),
        "KL to reference": response_kl(policy, reference, responses),
    }


def take_step(policy, optimizer, loss_fn, numbers):
    """Update the policy on the pairs with these numbers. Return NeMo RL's metrics."""
    batch = train_pairs.batch(numbers)
    return update(
        policy,
        optimizer,
        loss_fn,
        batch,
        accelerator,
        micro_rows=batch.size,
        max_grad_norm=1.0,
        rows=2,  # a pair is two rows
    )


def run(loss_fn, learning_rate, seed):
    """Train a fresh copy of the policy. Return what was measured, by step."""
    policy = tiny.load_policy()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    measured = {0: before}
    batches = Batches(len(train_pairs), PAIRS, seed, max_epochs=10, max_steps=STEPS)
    for step, numbers in enumerate(batches, start=1):
        take_step(policy, optimizer, loss_fn, numbers)
        if step % (STEPS // 3) == 0:
            measured[step] = measure(policy, loss_fn)
    return measured


before = measure(reference, loss_fn)
del before["preference accuracy"]  # before the first step every pair is a tie


# %%
#| label: dpo-compare
SFT_WEIGHT, PENALTY = 0.1, 5.0
contenders = {
    "DPO": (DPOLossFn(DPOLossConfig(**settings)), LEARNING_RATE),
    "DPO, a third of the rate": (DPOLossFn(DPOLossConfig(**settings)), LEARNING_RATE / 3),
    "DPO + SFT term": (
        DPOLossFn(DPOLossConfig(**settings, sft_loss_weight=SFT_WEIGHT)),
        LEARNING_RATE,
    ),
    "DPOP": (DPOPLossFn(DPOLossConfig(**settings, dpop_penalty=PENALTY)), LEARNING_RATE),
}
runs = {
    name: [run(loss_fn, rate, seed) for seed in SEEDS]
    for name, (loss_fn, rate) in contenders.items()
}


# %%
#| label: dpo-compare-table
def at_end(name, quantity):
    """Mean and standard deviation over the seeds after the last step."""
    finals = [measured[STEPS][quantity] for measured in runs[name]]
    return statistics.mean(finals), statistics.stdev(finals)


quantities = list(runs["DPO"][0][STEPS])
table = [
    "| | " + " | ".join(["before", *runs]) + " |",
    "| --- " * (len(runs) + 2) + "|",
]
for quantity in quantities:
    cells = [f"{before[quantity]:z.3f}" if quantity in before else "–"]
    cells += ["{:.3f}\u00a0±\u00a0{:.3f}".format(*at_end(name, quantity)) for name in runs]
    table.append(f"| {quantity} | " + " | ".join(cells) + " |")
Markdown("\n".join(table))

# %%
#| label: dpo-numbers
#| num: dpo-seeds = {len(SEEDS)}
#| num: dpo-steps = {STEPS}
#| num: dpo-pairs = {PAIRS}
#| num: dpo-slow-rate = {LEARNING_RATE / 3:g}
#| num: dpo-beta = {BETA:g}
#| num: dpo-sft-weight = {SFT_WEIGHT:g}
#| num: dpo-penalty = {PENALTY:g}
#| num: accuracy-error = {100 * standard_error(dpo['preference accuracy'], len(held_out_pairs)):.0f}
#| num: exact-error = {100 * standard_error(before['exact match'], len(prompts)):.1f}
#| num: exact-prompts = {len(prompts)}
#| num: exact-before = {before['exact match']:.1%}
#| num: exact-dpo = {dpo['exact match']:.1%}
#| num: accuracy-dpo = {dpo['preference accuracy']:.1%}
#| num: chosen-dpo = {dpo['chosen log-ratio']:+.3f}
#| num: kl-dpo = {dpo['KL to reference']:.3f}
#| num: exact-slow = {slow['exact match']:.1%}
#| num: chosen-slow = {slow['chosen log-ratio']:+.3f}
#| num: exact-sft = {sft['exact match']:.1%}
#| num: exact-lead-low = {100 * lead.low:+.1f}
#| num: exact-lead-high = {100 * lead.high:+.1f}
#| num: accuracy-sft = {sft['preference accuracy']:.1%}
#| num: margin-sft = {sft['reward margin']:.3f}
#| num: kl-sft = {sft['KL to reference']:.3f}
#| num: exact-dpop = {dpop['exact match']:.1%}
#| num: margin-dpop = {dpop['reward margin']:.3f}
#| num: chosen-dpop = {dpop['chosen log-ratio']:+.3f}
#| num: kl-dpop = {dpop['KL to reference']:.3f}
# What the page says of these runs. If it stops being true, the build stops.
from scipy.stats import ttest_rel

end = {name: {q: at_end(name, q)[0] for q in quantities} for name in runs}
dpo, slow, sft, dpop = end.values()
for plain in (dpo, slow):
    assert plain["preference accuracy"] > 0.5 and plain["reward margin"] > 0
    assert plain["chosen log-ratio"] < -0.5 < min(sft["chosen log-ratio"], dpop["chosen log-ratio"])
    assert plain["exact match"] < before["exact match"]
    assert plain["KL to reference"] > sft["KL to reference"] > dpop["KL to reference"]
for quantity in ("preference accuracy", "reward margin", "exact match"):
    assert sft[quantity] > max(dpo[quantity], slow[quantity], dpop[quantity])
with_sft, with_penalty = list(runs.values())[2:]
lead = ttest_rel(*([m[STEPS]["exact match"] for m in r] for r in (with_sft, with_penalty)))
lead = lead.confidence_interval()  # paired by seed, 95 %
assert all(m[STEPS]["chosen log-ratio"] < -0.5 for m in runs["DPO"])  # in every seed


def standard_error(share, count):
    """Of a share measured on `count` independent cases."""
    return (share * (1 - share) / count) ** 0.5

# %%
#| label: dpo-curves-pairs
#| alt: Two panels over training steps for DPO at two learning rates, DPO with an SFT term, and
#|   DPOP. Above, held-out preference accuracy, which rises for all four. Below, the log-ratio of
#|   the chosen answers, which falls below zero for DPO, further at the higher rate, and stays near
#|   zero for the other two.
from nemo_rl_ref.show.figures import band, panels


def curves(*titled):
    """A panel for each quantity: mean over the seeds, and the range from lowest to highest."""
    figure, axes = panels(len(titled))
    for axis, (quantity, title) in zip(axes, titled, strict=True):
        for line, (name, seeds) in enumerate(runs.items()):
            steps = [step for step, measured in seeds[0].items() if quantity in measured]
            band(axis, steps, [[m[s][quantity] for s in steps] for m in seeds], name, line)
        axis.set_title(title)
        axis.set_xlim(-0.03 * STEPS, 1.03 * STEPS)
    axes[-1].set_xlabel("optimizer steps")
    axes[0].legend(fontsize=9)
    return figure


curves(
    ("preference accuracy", "Held-out pairs in the right order"),
    ("chosen log-ratio", "log π/π_ref of chosen answers (nats)"),
);

# %%
#| label: dpo-curves-answers
#| alt: Two panels over training steps for the same four runs. Above, the share of sampled
#|   answers that are exactly right. Below, the KL divergence to the reference in nats an answer,
#|   largest for DPO at the higher rate.
curves(
    ("exact match", "Sampled answers that are exactly right"),
    ("KL to reference", "KL to the reference (nats an answer)"),
);

# %%
#| label: dpo-margins
#| alt: Reward margin on held-out pairs over training steps, in units of β times log-ratio, for the
#|   same four runs.
curves(("reward margin", "Reward margin β (h_w − h_l), held out"));

# %% [markdown]
# ## The same run in TRL
#
# Same weights, pairs, order, batch layout and optimizer. TRL's defaults that change the numbers
# are switched off: bfloat16, activation checkpointing, the linear learning-rate decay.

# %%
#| label: dpo-trl
#| num: trl-max-diff = {max(differences):.1e}
#| num: trl-steps = {len(differences)}
#| num: trl-pairs = {TRL_PAIRS}
#| num: trl-rate = {TRL_LEARNING_RATE:g}
import logging
import tempfile

import datasets
import transformers
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
logging.getLogger("trl").setLevel(logging.ERROR)

TRL_STEPS, TRL_PAIRS, TRL_LEARNING_RATE = 200, 8, 1e-4


class InOrder(DPOTrainer):
    """TRL's trainer, taking the pairs as they come and keeping every loss unrounded."""

    losses: list

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(loss.item())
        return result


order = [(17 * i) % len(train_data) for i in range(TRL_STEPS * TRL_PAIRS)]
records = [train_data[i] for i in order]
with tempfile.TemporaryDirectory() as folder:
    trainer = InOrder(
        model=tiny.load_policy(),
        args=DPOConfig(
            output_dir=folder,
            beta=BETA,
            per_device_train_batch_size=TRL_PAIRS,
            max_steps=TRL_STEPS,
            learning_rate=TRL_LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not on_gpu,
        ),
        train_dataset=datasets.Dataset.from_list(
            [
                {
                    "prompt": record["context"],
                    "chosen": record["completions"][0]["completion"],
                    "rejected": record["completions"][1]["completion"],
                }
                for record in records
            ]
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.losses = []
    trainer.train();

policy = tiny.load_policy()
optimizer = torch.optim.AdamW(
    policy.parameters(), lr=TRL_LEARNING_RATE, weight_decay=0.0, fused=True
)
policy, optimizer = accelerator.prepare(policy, optimizer)
ours = [
    take_step(policy, optimizer, contenders["DPO"][0], order[low : low + TRL_PAIRS])["loss"]
    for low in range(0, len(order), TRL_PAIRS)
]
differences = [abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)]
assert max(differences) < 1e-4

# %%
#| label: dpo-trl-curve
#| alt: Above, the DPO loss over 200 steps from this trainer and from TRL's; the curves coincide.
#|   Below, the absolute difference on a logarithmic axis.
from nemo_rl_ref.show.figures import LINES

figure, (above, below) = panels(2)
above.plot(trainer.losses, label="TRL", color=LINES[1]["color"], linewidth=3.5, alpha=0.5)
above.plot(ours, label="this trainer", color=LINES[0]["color"], linewidth=1)
above.set_title("DPO loss (nats)")
above.legend(fontsize=9)
below.semilogy([max(d, 1e-9) for d in differences], color=LINES[2]["color"], linewidth=1)
below.set_title("absolute difference (none is drawn at 1e-9)")
below.set_xlabel("optimizer steps");

# %% [markdown]
# ## What a step costs
#
# The benchmark is a script of its own. Here its recorded results are read.

# %%
#| label: dpo-cost
#| num: cost-floor = {on_cpu['ratios']['step over floor']:.2f}
#| num: cost-trl = {on_cpu['ratios']['pairs per second over TRL']:.2f}
#| num: cost-trl-precomputed = {on_cpu['ratios']['pairs per second over TRL, precomputed']:.2f}
#| num: cost-date = {on_cpu['date']}
import json
from pathlib import Path

from nemo_rl_ref.files.shipped import shipped

recorded = shipped("benchmarks/results")
rows = ["| device | contender | ms a step | pairs/s | over the floor |", "| --- " * 5 + "|"]
for file in sorted(recorded.glob("*.json")):
    result = json.loads(file.read_text()).get("dpo_step")
    if result is None:
        continue
    for name, seconds in result["seconds_per_step"].items():
        rows.append(
            f"| {result['device']}, {result['threads']} threads | {name} | {1e3 * seconds:.1f} "
            f"| {result['pairs_per_step'] / seconds:,.0f} "
            f"| {seconds / result['seconds_per_step']['floor']:.2f} |"
        )
    if not result["device"].startswith("NVIDIA"):  # the numbers that the page's text gives
        on_cpu = result
Markdown("\n".join(rows))

# %% [markdown]
# ## How the class reaches another process
#
# Ray ships a loss with cloudpickle. The cell shows cloudpickle's side of that: it pickles a loss
# here and unpickles it in a fresh interpreter that knows nothing of this notebook, nor of the
# folder in which `my_losses.py` stands.

# %%
#| label: dpo-pickle
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import cloudpickle

receiver = "import pickle, sys; print(type(pickle.load(sys.stdin.buffer)).__name__, 'arrived')"


def ship(loss_fn):
    """Send a loss to a fresh Python process; return the last line of what it says."""
    result = subprocess.run(
        [sys.executable, "-c", receiver],
        input=cloudpickle.dumps(loss_fn),
        capture_output=True,
        env={"PYTHONPATH": str(Path(tiny.__file__).parents[2])},  # nemo_rl_ref is installed there
        check=False,
    )
    return (result.stdout or result.stderr).decode().strip().splitlines()[-1]


config = DPOLossConfig(**settings)
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "my_losses.py").write_text(
        "from nemo_rl_ref.algorithms.loss import DPOLossFn\n\n\nclass MyLossFn(DPOLossFn): ...\n"
    )
    sys.path.insert(0, folder)
    my_losses = importlib.import_module("my_losses")
    in_main = ship(DPOPLossFn(config))
    by_reference = ship(my_losses.MyLossFn(config))
    cloudpickle.register_pickle_by_value(my_losses)
    by_value = ship(my_losses.MyLossFn(config))
    sys.path.remove(folder)

print(f"defined in this notebook:    {in_main}")
print(f"in a module, by reference:   {by_reference}")
print(f"in a module, by value:       {by_value}")
assert "DPOPLossFn arrived" in in_main and "MyLossFn arrived" in by_value
assert "ModuleNotFoundError" in by_reference
