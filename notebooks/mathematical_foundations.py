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
# # Mathematical foundations: the checks
#
# Theorems of the page
# [Mathematical Foundations](../docs/advanced/algorithm-development/mathematical-foundations.md),
# verified by listing every answer of a world small enough for that. Nothing is sampled, and
# everything is float64.

# %% [markdown]
# ## The optimum of reward under a KL penalty

# %%
#| label: kl-world
import itertools

import torch

from nemo_rl_ref.display import values

torch.manual_seed(0)
BETA = 0.3
answers = list(itertools.product("abc", repeat=3))  # every answer of three tokens

reward = torch.randn(len(answers), dtype=torch.float64)
log_ref = torch.log_softmax(torch.randn(len(answers), dtype=torch.float64), dim=0)


def kl(log_p, log_q):
    """KL(p || q) in nats, an exact sum over all answers."""
    return (log_p.exp() * (log_p - log_q)).sum()


def objective(log_p):
    """Expected reward less β times the divergence from the reference."""
    return (log_p.exp() * reward).sum() - BETA * kl(log_p, log_ref)


print(f"{len(answers)} answers, from {''.join(answers[0])} to {''.join(answers[-1])}")

# %%
#| label: kl-optimum
log_z = torch.logsumexp(log_ref + reward / BETA, dim=0)
log_best = log_ref + reward / BETA - log_z

# Any policy misses the optimum by exactly β KL(policy || best).
rivals = [
    torch.log_softmax(scale * torch.randn(len(answers), dtype=torch.float64), dim=0)
    for scale in (0.1, 1.0, 10.0)
    for _ in range(400)
]
gap_error = max(
    abs((objective(log_best) - objective(rival) - BETA * kl(rival, log_best)).item())
    for rival in rivals
)
value_error = abs((objective(log_best) - BETA * log_z).item())
assert gap_error < 1e-12 and value_error < 1e-12
values(kl_rivals=len(rivals), kl_gap_error=f"{gap_error:.0e}", kl_value_error=f"{value_error:.0e}")

# %%
#| label: kl-implicit-reward
implied = BETA * (log_best - log_ref)
# Two answers to one prompt: their difference is the reward's, whatever Z is.
differences = implied[:, None] - implied[None, :] - (reward[:, None] - reward[None, :])
implied_error = differences.abs().max().item()
assert implied_error < 1e-12
values(kl_implied_error=f"{implied_error:.0e}")

# %% [markdown]
# The other direction: gradient ascent on the objective, over all policies at once, ends there.

# %%
#| label: kl-ascent
logits = torch.zeros(len(answers), dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.LBFGS(
    [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
)


def closure():
    optimizer.zero_grad()
    loss = -objective(torch.log_softmax(logits, dim=0))
    loss.backward()
    return loss


optimizer.step(closure)
found = torch.log_softmax(logits.detach(), dim=0)
ascent_error = (found.exp() - log_best.exp()).abs().max().item()
assert ascent_error < 1e-6
values(kl_ascent_error=f"{ascent_error:.0e}")
