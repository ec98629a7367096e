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
# # Hyperparameter optimization: the measurements
#
# The cells behind the page
# [Hyperparameter Optimization](../docs/advanced/algorithm-development/hyperparameter-optimization.md).

# %% [markdown]
# ## How much of a difference is the seed?

# %%
#| label: noise-runs
import itertools
import statistics

import torch
from accelerate import Accelerator

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.display import values
from nemo_rl_ref.preferences import load_preferences, preference_batches
from nemo_rl_ref.training import add_reference_logprobs, evaluate, train

STEPS, PAIRS, SEEDS = 16, 32, 6
LEARNING_RATES = (1e-4, 1.3e-4, 3e-4)

accelerator = Accelerator()
tokenizer = tiny.load_tokenizer()
reference = tiny.load_policy().eval().to(accelerator.device)
loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1, sft_loss_weight=0.1))


def load(path):
    return load_preferences(BinaryPreferenceDataset(str(path)), tokenizer, max_seq_length=16)


train_pairs, held_out_pairs = load(tiny.TRAIN_PAIRS), load(tiny.VALIDATION_PAIRS)
held_out = add_reference_logprobs(
    reference, preference_batches(held_out_pairs, tokenizer, batch_size=256)
)
orders = [
    add_reference_logprobs(
        reference,
        itertools.islice(
            preference_batches(train_pairs, tokenizer, batch_size=PAIRS, seed=seed), STEPS
        ),
    )
    for seed in range(SEEDS)
]


def run(learning_rate, seed):
    """Train on the pairs in this seed's order; return the held-out loss in nats."""
    policy = tiny.load_policy()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for _ in train(policy, loss_fn, orders[seed], optimizer, accelerator):
        pass
    return evaluate(policy, loss_fn, held_out)["loss"]


losses = {rate: [run(rate, seed) for seed in range(SEEDS)] for rate in LEARNING_RATES}

# %%
#| label: noise-figure
#| alt: Held-out loss of six seeds at each of three learning rates, one dot a run, with mean and
#|   standard deviation. The dots of the two nearest learning rates overlap.
from nemo_rl_ref.plotting import LINES, panels

figure, (axis,) = panels(1, height=3.0)
for place, (rate, runs) in enumerate(losses.items()):
    axis.plot([place] * SEEDS, runs, "o", color=LINES[0]["color"], alpha=0.6)
    axis.errorbar(
        place + 0.15, statistics.mean(runs), statistics.stdev(runs),
        fmt="s", color=LINES[1]["color"], capsize=4,
    )  # fmt: skip
axis.set_xticks(range(len(losses)), [f"{rate:g}" for rate in losses])
axis.set_xlim(-0.5, len(losses) - 0.5)
axis.set_xlabel("policy.optimizer.kwargs.lr")
axis.set_title("Held-out loss (nats), one dot a seed");

# %%
#| label: noise-numbers
near, far = losses[LEARNING_RATES[1]], losses[LEARNING_RATES[2]]
base = losses[LEARNING_RATES[0]]


def difference(a, b):
    """Mean of a - b over the seeds, which share the order of their pairs, and its standard error."""
    paired = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(paired), statistics.stdev(paired) / len(paired) ** 0.5


def unpaired_error(a, b):
    """The standard error of the same difference for runs that share nothing."""
    return ((statistics.variance(a) + statistics.variance(b)) / len(a)) ** 0.5


(near_mean, near_error), (far_mean, far_error) = difference(near, base), difference(far, base)
T = 2.571  # Student's t, 97.5 % quantile, 5 degrees of freedom: for six seeds


def interval(mean, error):
    """The 95 % confidence interval of a mean over six pairs."""
    return f"{mean - T * error:+.4f} to {mean + T * error:+.4f}"


values(
    noise_sd=f"{statistics.stdev(base):.4f}",
    noise_near=f"{near_mean:+.4f} ± {near_error:.4f}",
    noise_far=f"{far_mean:+.4f} ± {far_error:.4f}",
    noise_near_interval=interval(near_mean, near_error),
    noise_far_interval=interval(far_mean, far_error),
    noise_t=f"{T:.2f}",
    noise_near_unpaired=f"{unpaired_error(near, base):.4f}",
    noise_seeds=SEEDS,
    noise_steps=STEPS,
)
