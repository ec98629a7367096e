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
# # Loss functions: the checks
#
# The cells behind the page
# [Loss Functions](../docs/core-design/design-principles/loss-functions.md).

# %% [markdown]
# ## A mean of means is not the mean

# %%
#| label: means-batch
import torch

from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.display import values

# Two sequences in a global batch. The first has 2 tokens to learn from, the second 6.
# They are processed one at a time, as two micro-batches.
logprobs = -torch.tensor([[4.0, 4.0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
logprobs.requires_grad_()
token_mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])  # (B, S); S - 1 targets
data = {"token_mask": token_mask, "sample_mask": torch.ones(2)}
micro_batches = [slice(0, 1), slice(1, 2)]

# %%
#| label: means-wrong
loss_fn = NLLLossFn()


def total(counts_of):
    """Sum the loss over the micro-batches, each divided by counts_of(its rows)."""
    loss = 0.0
    for rows in micro_batches:
        part = {name: tensor[rows] for name, tensor in data.items()}
        tokens = token_mask[counts_of(rows), 1:].sum()
        loss = loss + loss_fn(logprobs[rows], part, torch.tensor(2.0), tokens)[0]
    return loss


everything = slice(0, 2)
mean_of_means = total(lambda rows: rows) / len(micro_batches)  # each by its own tokens
by_global_count = total(lambda rows: everything)  # each by the tokens of the global batch
whole, _ = loss_fn(logprobs, data, torch.tensor(2.0), token_mask[:, 1:].sum())


def weights(loss):
    """Minus the gradient of the loss for one token of each sequence: the token's weight."""
    return -torch.autograd.grad(loss, logprobs, retain_graph=True)[0][:, 0]


print(f"{'':24}loss    weight of a token, short | long")
for name, loss in (
    ("whole batch", whole),
    ("by the global count", by_global_count),
    ("mean of means", mean_of_means),
):
    short, long = weights(loss).tolist()
    print(f"{name:24}{loss.item():.4f}  {short:.4f} | {long:.4f}")

assert torch.allclose(by_global_count, whole, rtol=0, atol=1e-7)
assert torch.equal(weights(by_global_count), weights(whole))
short, long = weights(mean_of_means).tolist()
values(
    means_whole=f"{whole.item():.2f}",
    means_wrong=f"{mean_of_means.item():.2f}",
    means_factor=f"{short / long:.0f}",
)
