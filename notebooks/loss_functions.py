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

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn, NLLLossFn

# Two sequences in a global batch. The first has 2 tokens to learn from, the second 6.
# They are processed one at a time, as two micro-batches.
logprobs = -torch.tensor([[4.0, 4.0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
logprobs.requires_grad_()
token_mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])  # (B, S); S - 1 targets
data = {"token_mask": token_mask, "sample_mask": torch.ones(2)}
micro_batches = [slice(0, 1), slice(1, 2)]

# %%
#| label: means-wrong
#| num: means-whole = {whole.item():.2f}
#| num: means-wrong = {mean_of_means.item():.2f}
#| num: means-factor = {weights(mean_of_means)[0] / weights(mean_of_means)[1]:.0f}
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

# %% [markdown]
# ## What a reduction rewards

# %%
#| label: reduction-weights
#| num: reduction-token = {push(True)[1][1] / push(True)[1][0]:.0f}
#| num: reduction-sequence = {push(False)[0][0] / push(False)[0][1]:.0f}
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

# Two answers with the same advantage, of 2 and of 6 tokens.
tokens_of = torch.tensor([2, 6])
lengths = token_mask[:, 1:].sum(1)
assert torch.equal(lengths, tokens_of)
answers = {
    "token_mask": token_mask,
    "sample_mask": torch.ones(2),
    "advantages": torch.ones(2, 7),
    "prev_logprobs": torch.zeros(2, 7),
    "generation_logprobs": torch.zeros(2, 7),
}


def push(token_level_loss):
    """How strongly the gradient pushes up each answer: by token, and in all."""
    loss_fn = ClippedPGLossFn(
        ClippedPGLossConfig(token_level_loss=token_level_loss, reference_policy_kl_penalty=0.0)
    )
    logprobs = torch.zeros(2, 6, requires_grad=True)
    loss, _ = loss_fn(logprobs, answers, torch.tensor(2.0), lengths.sum())
    weight = -torch.autograd.grad(loss, logprobs)[0]
    return weight[:, 0], weight.sum(1)


print("token_level_loss   a token, short | long    the answer, short | long")
for token_level in (True, False):
    (short, long), (short_all, long_all) = (x.tolist() for x in push(token_level))
    print(f"{token_level!s:18} {short:.4f} | {long:.4f}          {short_all:.4f} | {long_all:.4f}")

# %% [markdown]
# ## A term that does not add up

# %%
#| label: positive-nll
#| num: positive-whole = {nll_whole:.2f}
#| num: positive-parts = {nll_parts:.2f}
positive = ClippedPGLossFn(
    ClippedPGLossConfig(positive_example_nll_weight=1.0, reference_policy_kl_penalty=0.0)
)
policy_logprobs = -torch.tensor([[1.0] * 6, [0.5] * 6])
rewarded = answers | {"advantages": torch.zeros(2, 7), "rewards": torch.ones(2)}


def loss_of(rows):
    """The loss of some rows as a micro-batch, divided by the counts of the global batch."""
    part = {name: tensor[rows] for name, tensor in rewarded.items()}
    return positive(policy_logprobs[rows], part, torch.tensor(2.0), lengths.sum())[0].item()


nll_whole = loss_of(everything)
nll_parts = sum(loss_of(rows) for rows in micro_batches)
print(f"as one micro-batch {nll_whole:.3f}, as two {nll_parts:.3f}")
assert nll_parts > 1.5 * nll_whole

# %% [markdown]
# ## What clipping does to the gradient

# %%
#| label: clip-gradient
#| alt: Two panels. Weight of the gradient of a token's log-probability against the ratio, for
#|   advantage +1 above and -1 below. With PPO's clip it is the ratio itself until 1.2, then zero,
#|   for +1; and zero below 0.8, minus the ratio above, for -1. Clip-higher moves the upper bound to
#|   1.28. Dual clip makes the weight zero beyond 3 for the negative advantage. CISPO's weight stays
#|   constant beyond its bound instead of vanishing.
from nemo_rl_ref.show.figures import LINES, panels

variants = {
    "PPO, ε = 0.2": {},
    "clip-higher, 0.28": {"ratio_clip_max": 0.28},
    "dual clip, c = 3": {"ratio_clip_c": 3.0},
    "CISPO, 0.2": {"use_cispo": True},
}
ratios = torch.linspace(0.02, 4.0, 399)


def gradient_weight(advantage, flags):
    """Minus the gradient of the loss by log π, for one-token answers of every ratio."""
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **flags))
    count = len(ratios)
    batch = {
        "token_mask": torch.tensor([[0, 1]]).expand(count, 2),
        "sample_mask": torch.ones(count),
        "advantages": torch.full((count, 2), advantage),
        "prev_logprobs": torch.zeros(count, 2),
        "generation_logprobs": torch.zeros(count, 2),
    }
    logprobs = ratios.log()[:, None].requires_grad_()
    loss, _ = loss_fn(logprobs, batch, torch.tensor(1.0), torch.tensor(1.0))
    return -torch.autograd.grad(loss, logprobs)[0][:, 0]


figure, axes = panels(2)
for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
    for style, (name, flags) in zip(LINES, variants.items(), strict=False):
        weight = gradient_weight(advantage, flags)
        axis.plot(ratios, weight, label=name, color=style["color"], linestyle=style["linestyle"])
    axis.set_title(f"gradient weight of log π, advantage {advantage:+.0f}")
axes[0].legend(fontsize=9)
axes[1].set_xlabel("ratio π/π_old")

ppo = gradient_weight(1.0, {})
assert (ppo[ratios > 1.2] == 0).all() and torch.allclose(ppo[ratios < 1.2], ratios[ratios < 1.2])
assert (gradient_weight(-1.0, {})[ratios < 0.8] == 0).all();

# %% [markdown]
# ## Estimators of the KL divergence

# %%
#| label: kl-estimator-values
#| num: kl-near = {true_kl['near'].item():.4f}
#| num: kl-far = {true_kl['far'].item():.4f}
#| num: kl-weighted-k2-near = {100 * found['near', 'weighted k2'][2]:.1f}
#| num: kl-weighted-k2-far = {100 * found['far', 'weighted k2'][2]:.0f}
from nemo_rl_ref.algorithms.utils import calculate_kl

torch.manual_seed(1)
vocabulary = 50
policy_logits = torch.randn(vocabulary, dtype=torch.float64, requires_grad=True)
step = torch.randn(vocabulary, dtype=torch.float64)


def exact(kind, log_ref):
    """Mean, spread and mean gradient of an estimator over all tokens, each with its probability."""
    log_pi = torch.log_softmax(policy_logits, dim=0)
    pi = log_pi.exp()
    weight = None
    if kind.startswith("weighted"):  # as in NeMo RL: its value is 1, its gradient that of π/π_old
        weight = torch.exp(log_pi - log_pi.detach())
    values_of = calculate_kl(log_pi, log_ref, kind[-2:], None, None, weight)
    mean = (pi.detach() * values_of).sum()  # the sampled tokens are not differentiated
    spread = (pi * (values_of - mean).square()).sum().sqrt()
    return mean.item(), spread.item(), torch.autograd.grad(mean, policy_logits)[0]


KINDS = ("k1", "k2", "k3", "weighted k1", "weighted k2", "weighted k3")
true_kl, found = {}, {}
for place, share in (("near", 0.1), ("far", 1.0)):
    log_ref = torch.log_softmax(policy_logits.detach().lerp(step, share), dim=0)
    log_pi = torch.log_softmax(policy_logits, dim=0)
    true_kl[place] = (log_pi.exp() * (log_pi - log_ref)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl[place], policy_logits)
    rows = {kind: exact(kind, log_ref) for kind in KINDS}
    for kind, (mean, spread, gradient) in rows.items():
        gap = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
        found[place, kind] = mean, spread, gap
        if not kind.endswith("k2"):
            assert abs(mean - true_kl[place]) < 1e-12  # unbiased as a value
        if kind in ("k2", "weighted k1", "weighted k3"):
            assert gap < 1e-12  # right as a gradient
    assert rows["k1"][2].norm() < 1e-12  # no gradient at all
    assert found[place, "weighted k2"][2] > 0.05  # the weight makes a right gradient wrong
assert found["near", "k3"][1] < 0.2 * found["near", "k1"][1]
assert found["far", "k3"][1] > found["far", "k1"][1]

# %%
#| label: kl-estimator-table
from IPython.display import Markdown

table = ["| reference | | mean | bias | standard deviation | gradient's error |", "| --- " * 6 + "|"]
for (place, kind), (mean, spread, gap) in found.items():
    bias = round(mean - true_kl[place].item(), 4) + 0.0
    table.append(f"| {place} | {kind} | {mean:.4f} | {bias:+.4f} | {spread:.4f} | {gap:.0%} |")
Markdown("\n".join(table))

# %% [markdown]
# ## How each preference loss weighs a pair

# %%
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.custom import batch as coupled
from nemo_rl_ref.custom import f_divergence, pairwise, reference_free, reward_aware

BETA = 0.5


def build(loss_class, **settings):
    """A loss with its defaults, β = 0.5."""
    return loss_class(DPOLossConfig(reference_policy_kl_penalty=BETA, **settings))


preference_losses = {
    "DPO": build(DPOLossFn),
    "length-normalized": build(pairwise.LengthNormalizedDPOLossFn),
    "IPO": build(pairwise.IPOLossFn),
    "hinge": build(pairwise.HingeLossFn),
    "robust DPO": build(pairwise.RobustDPOLossFn),
    "conservative DPO": build(pairwise.ConservativeDPOLossFn),
    "EXO": build(pairwise.EXOPairLossFn),
    "NCA": build(pairwise.NCAPairLossFn),
    "SPPO (hard)": build(pairwise.SPPOHardLossFn),
    "APO-zero": build(pairwise.APOZeroLossFn),
    "APO-down": build(pairwise.APODownLossFn),
    "DiscoPOP": build(pairwise.DiscoPOPLossFn),
    "f-DPO (forward KL)": build(f_divergence.FDivergenceDPOLossFn, f_divergence_type="forward_kl"),
    "f-DPO (JS)": build(f_divergence.FDivergenceDPOLossFn, f_divergence_type="js_divergence"),
    "f-DPO (α)": build(f_divergence.FDivergenceDPOLossFn, f_divergence_type="alpha_divergence"),
    "RPO (sq)": build(reward_aware.RPOLossFn, preference_loss="rpo_sq"),
    "RPO (backward KL)": build(reward_aware.RPOLossFn, preference_loss="rpo_bwd_kl"),
    "RPO (forward KL)": build(reward_aware.RPOLossFn, preference_loss="rpo_fwd_kl"),
    "BCO": build(coupled.BCOPairLossFn, bco_delta="zero"),
    "CPO": build(reference_free.CPOLossFn),
    "SimPO": build(reference_free.SimPOLossFn),
    "SLiC-HF": build(reference_free.SLiCLossFn),
    "ORPO": build(reference_free.ORPOLossFn, sft_loss_weight=1.0),
    "AOT": build(coupled.AOTLossFn),
    "AOT unpaired": build(coupled.AOTUnpairedLossFn),
    "KTO": build(coupled.KTOLossFn),
}

# %%
#| label: pair-weights
#| alt: Eight panels of the weight with which a pair's chosen answer is pushed up, against the
#|   margin. DPO, SimPO and BCO fall smoothly to zero, hinge in one step. IPO, SPPO and RPO with
#|   squares fall on a straight line and turn negative. EXO, APO-zero and KTO are largest near a margin
#|   of 0; DiscoPOP dips there. Those of NCA, APO-down, ORPO and the f-divergences differ from the weight
#|   with which the rejected answer is pushed down, which is dotted.
#| caption: How hard a pair is pushed at each margin, as a multiple of β. Solid for the chosen answer;
#|   dotted for the rejected one, where it differs. Length-normalized DPO, CPO and both AOT draw
#|   DPO's line for such a pair, SLiC-HF hinge's.
#| num: weights-turn = {", ".join(n for n, w in weights_of.items() if (-w[:, 0]).min() < -1e-3)}
#| num: weights-stay = {", ".join(n for n, w in at_eight.items() if w > 0.1)}
#| num: weights-differ = {", ".join(n for n, w in weights_of.items() if (w[:, 0] + w[:,
#|   1]).abs().max() > 1e-3)}
import matplotlib.pyplot as plt

margins = torch.linspace(-8, 8, 49)


def pair_weights(loss_fn):
    """Gradient on chosen and rejected log-probability, for pairs of one-token answers."""
    chosen = []
    for margin in margins.tolist():
        # Both answers have reference log-probability -4.5 and move apart by the margin.
        logprobs = torch.tensor([[-4.5 + margin / 2], [-4.5 - margin / 2]], requires_grad=True)
        pair = {
            "reference_policy_logprobs": torch.full((2, 2), -4.5),
            "token_mask": torch.tensor([[0, 1], [0, 1]]),
            "sample_mask": torch.ones(2),
            "gt_rewards": torch.tensor([1.0, 0.0]),
            "mismatched_logprobs": torch.full((2,), -4.5),
            "mismatched_reference_logprobs": torch.full((2,), -4.5),
        }
        loss, _ = loss_fn(logprobs, pair, torch.tensor(2.0), torch.tensor(2.0))
        chosen.append(torch.autograd.grad(loss, logprobs)[0][:, 0])
    return torch.stack(chosen) / BETA


weights_of = {name: pair_weights(loss_fn) for name, loss_fn in preference_losses.items()}
assert all(weight.isfinite().all() for weight in weights_of.values())
at_eight = {name: -weight[-1, 0].item() for name, weight in weights_of.items()}
shapes = {
    "Falls to zero": ("DPO", "SimPO", "BCO", "hinge"),
    "Labels that may be wrong": ("DPO", "robust DPO", "conservative DPO"),
    "A straight line": ("IPO", "SPPO (hard)", "RPO (sq)"),
    "Most near a margin of 0": ("EXO", "APO-zero", "KTO"),
    "Aims at a given margin": ("RPO (backward KL)", "RPO (forward KL)"),
    "Another divergence": ("f-DPO (forward KL)", "f-DPO (JS)", "f-DPO (α)"),
    "Each answer by itself": ("NCA", "APO-down"),
    "Shapes of their own": ("ORPO", "DiscoPOP"),
}
same = {"DPO": ("length-normalized", "CPO", "AOT", "AOT unpaired"), "hinge": ("SLiC-HF",)}
for name, others in same.items():
    for other in others:
        torch.testing.assert_close(weights_of[other], weights_of[name])
drawn = {name for names in shapes.values() for name in names}
assert drawn | {other for others in same.values() for other in others} == set(weights_of)
panels(1)  # the common look
plt.close("all")
figure, grid = plt.subplots(4, 2, figsize=(4.8, 9.4), sharex=True)
for axis, (shape, names) in zip(grid.flat, shapes.items(), strict=True):
    for name, line in zip(names, LINES, strict=False):
        weight = weights_of[name]
        axis.plot(margins, -weight[:, 0], label=name, markevery=12, **{**line, "linestyle": "-"})
        if (weight[:, 0] + weight[:, 1]).abs().max() > 1e-3:
            axis.plot(margins, weight[:, 1], color=line["color"], linestyle=":")
    axis.set_title(shape)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9.2)
    if max(-weights_of[name][:, 0].min() for name in names) > 3:
        axis.set_ylim(-8, 8) if shape == "A straight line" else axis.set_ylim(-0.5, 5.5)
figure.supxlabel("margin: log-ratio of chosen less that of rejected (nats)", fontsize=10);

# %% [markdown]
# ## Which promises each loss keeps

# %%
#| label: promises
from nemo_rl_ref.contract import PROMISES

table = ["| promise | what it says |", "| --- | --- |"]
table += [f"| {name} | {entry[0]} |" for name, entry in PROMISES.items()]
Markdown("\n".join(table))

# %%
#| label: contract-table
#| num: contract-losses = {len(reports)}
#| num: contract-all = {", ".join(kept)}
from nemo_rl_ref.algorithms.loss import (
    DistillationLossConfig,
    DistillationLossFn,
    DraftCrossEntropyLossFn,
    MseValueLossConfig,
    MseValueLossFn,
    PreferenceLossFn,
)
from nemo_rl_ref.contract import check_losses
from nemo_rl_ref.custom import policy_gradient, policy_gradient_extras


def build_pg(loss_class, **settings):
    """A policy-gradient loss with its defaults."""
    return loss_class(ClippedPGLossConfig(**settings))


policy_gradient_losses = {
    "Dr. GRPO": build_pg(policy_gradient.DrGRPOLossFn, max_response_length=8),
    "BNPO": build_pg(policy_gradient.BNPOLossFn),
    "LUSPO": build_pg(policy_gradient.LUSPOLossFn),
    "SAPO": build_pg(policy_gradient.SAPOLossFn),
    "VESPO": build_pg(policy_gradient.VESPOLossFn),
    "DAPO": build_pg(policy_gradient_extras.DAPOLossFn),
    "entropy-regularized": build_pg(policy_gradient_extras.EntropyPGLossFn),
    "MaxRL": build_pg(policy_gradient_extras.MaxRLLossFn),
}

every_loss = {
    "NLL": NLLLossFn(),
    "preference (reward model)": PreferenceLossFn(),
    "clipped policy gradient": ClippedPGLossFn(ClippedPGLossConfig()),
    "value": MseValueLossFn(MseValueLossConfig()),
    "distillation": DistillationLossFn(DistillationLossConfig()),
    "draft": DraftCrossEntropyLossFn(),
    **preference_losses,
    **policy_gradient_losses,
}
reports = check_losses(every_loss)
kept = [name for name, report in reports.items() if report.ok]


def needs(loss_fn):
    """What a loss reads that NeMo RL's trainer does not provide, and whether it couples a batch."""
    needed = [f"`{key}`" for key in getattr(loss_fn, "needs_data", ())]
    return ", ".join(needed + ["whole batch"] * bool(getattr(loss_fn, "needs_whole_batch", False)))


marks = {"ok": "✓", "failed": "✗", "not applicable": "–"}
table = ["| loss | needs | " + " | ".join(PROMISES) + " |", "| --- " * (len(PROMISES) + 2) + "|"]
for name, report in reports.items():
    cells = [marks[entry.status] for entry in report.entries]
    table.append(f"| {name} | {needs(every_loss[name])} | " + " | ".join(cells) + " |")
Markdown("\n".join(table))

# %% [markdown]
# ## A loss from nothing to green

# %%
#| label: green-1
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl_ref.contract import check_loss


class FirstTry:
    """Minus the mean log-probability, as one would write it."""

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        loss = -(next_token_logprobs * mask).sum() / mask.sum()
        return loss, {"loss": loss}


first = check_loss(FirstTry())
print(f"broken: {', '.join(first.failed)}")

# %%
#| label: green-2
print(first["micro-batches"].failures[0].problem)
print(first["protocol"].failures[0].problem)


# %%
#| label: green-3
class SecondTry(FirstTry):
    """Divides by the global count; the metric is a float."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        loss = -(next_token_logprobs * mask).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


second = check_loss(SecondTry())
print(f"broken: {', '.join(second.failed)}")

# %%
#| label: green-4
print(second["masks"].failures[0].problem)


# %%
#| label: green-5
class ThirdTry(SecondTry):
    """Selects before it sums: what is masked cannot get in, not even as NaN times zero."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        counted = next_token_logprobs.masked_fill(mask == 0, 0.0)
        loss = -(counted * mask).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


third = check_loss(ThirdTry())
assert not first.ok and not second.ok and third.ok
third

# %% [markdown]
# ## Numerical rules

# %%
#| label: numerical-rules
from torch.nn.functional import logsigmoid

far = torch.tensor(-120.0)
small = torch.tensor(1e-6)
many = torch.full((10_000,), 1e-3, dtype=torch.bfloat16)
running = torch.zeros((), dtype=torch.bfloat16)
for value in many:
    running = running + value
print(f"log(sigmoid(-120)) = {torch.log(torch.sigmoid(far)).item()},", end=" ")
print(f"logsigmoid(-120) = {logsigmoid(far).item()}")
print(f"exp(1e-6) - 1 = {(torch.exp(small) - 1).item():.3e},", end=" ")
print(f"expm1(1e-6) = {torch.expm1(small).item():.3e}")
print(f"ten thousand times 0.001, added in bfloat16: {running.item():.3f},", end=" ")
print(f"in float32: {many.float().sum().item():.3f}")

# %% [markdown]
# ## How far from NeMo RL's own numbers

# %%
#| label: upstream-differences
#| num: golden-cases = {sum(count for count, _ in by_symbol.values())}
#| num: golden-worst = {max(worst for _, worst in by_symbol.values()):.1e}
from nemo_rl_ref.contract.replay import differences

rows = ["| symbol | recorded cases | largest difference |", "| --- | --- | --- |"]
by_symbol = differences()
for symbol, (count, worst) in sorted(by_symbol.items()):
    rows.append(f"| `{symbol}` | {count} | {worst:.1e} |")
Markdown("\n".join(rows))

# %% [markdown]
# ## How far from TRL
#
# The tests drive the loss methods of TRL's trainers. What they found was recorded by
# `benchmarks/record_trl_differences.py`.

# %%
#| label: trl-differences
#| num: trl-losses = {len(to_trl)}
#| num: trl-worst = {max(to_trl.values()):.1e}
import json

from nemo_rl_ref.files.shipped import shipped

RESULTS = shipped("benchmarks/results")
to_trl = json.loads((RESULTS / "trl-differences.json").read_text())["differences"]
assert max(to_trl.values()) < 1e-5
rows = ["| loss | largest relative difference to TRL |", "| --- | --- |"]
rows += [f"| {name.replace('_', ' ')} | {worst:.1e} |" for name, worst in to_trl.items()]
Markdown("\n".join(rows))
