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
import warnings

import torch
from accelerate import Accelerator

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import Batches, preference_pairs
from nemo_rl_ref.training.step import run_batch, update

STEPS, PAIRS, SEEDS = 16, 32, 6
LEARNING_RATES = (1e-4, 1.3e-4, 3e-4)

accelerator = Accelerator()
tokenizer = tiny.load_tokenizer()
reference = tiny.load_policy().eval().to(accelerator.device)
loss_fn = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1, sft_loss_weight=0.1))


def load(path):
    return preference_pairs(BinaryPreferenceDataset(str(path)), tokenizer, max_seq_length=16)


train_pairs, held_out_pairs = load(tiny.TRAIN_PAIRS), load(tiny.VALIDATION_PAIRS)
add_reference_logprobs(reference, [train_pairs, held_out_pairs], accelerator)
held_out = held_out_pairs.batch(range(len(held_out_pairs)))


def run(learning_rate, seed):
    """Train on the pairs in this seed's order; return the held-out loss in nats."""
    policy = tiny.load_policy()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for numbers in Batches(len(train_pairs), PAIRS, seed, max_steps=STEPS):
        update(
            policy,
            optimizer,
            loss_fn,
            train_pairs.batch(numbers),
            accelerator,
            micro_rows=2 * PAIRS,
            max_grad_norm=1.0,
            rows=2,  # a pair is two rows
        )
    return run_batch(
        policy, loss_fn, held_out, accelerator, micro_rows=held_out.size, backward=False
    )["loss"]


losses = {rate: [run(rate, seed) for seed in range(SEEDS)] for rate in LEARNING_RATES}

# %%
#| label: noise-figure
#| alt: Held-out loss of six seeds at each of three learning rates, one dot a run, with mean and
#|   standard deviation. The dots of the two nearest learning rates overlap.
from nemo_rl_ref.show.figures import LINES, panels

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
axis.set_title("Held-out loss (nats), one dot a seed")

# %%
#| label: noise-numbers
#| num: noise-sd = {statistics.stdev(base):.4f}
#| num: noise-near = {near_mean:+.4f} ± {near_error:.4f}
#| num: noise-far = {far_mean:+.4f} ± {far_error:.4f}
#| num: noise-near-interval = {interval(near_mean, near_error)}
#| num: noise-far-interval = {interval(far_mean, far_error)}
#| num: noise-t = {T:.2f}
#| num: noise-near-unpaired = {unpaired_error(near, base):.4f}
#| num: noise-far-unpaired = {unpaired_error(far, base):.4f}
#| num: noise-near-error = {near_error:.4f}
#| num: noise-far-error = {far_error:.4f}
#| num: noise-seeds = {SEEDS}
#| num: noise-steps = {STEPS}
near, far = losses[LEARNING_RATES[1]], losses[LEARNING_RATES[2]]
base = losses[LEARNING_RATES[0]]


def difference(a, b):
    """Mean of a - b over the seeds, which share the order of the pairs, and its standard error."""
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

# %% [markdown]
# ## Recorded runs
#
# What needs hundreds of runs was run once. `make studies` makes these files again, in one to two hours
# on one core: `search_pool.py`, `search_samplers.py`, `search_batch.py` and `search_modelled.py` in
# `benchmarks`.

# %%
#| label: search-recorded
#| num: search-runs = {sum(len(found['runs']) for found in files):,}
#| num: search-hours = {seconds / 3600:.1f}
#| num: search-date = {max(found["date"] for found in files)}
#| num: search-device = {POOL["dpo"]["device"]}
#| num: search-optuna = {POOL["dpo"]["versions"]["optuna"]}
#| num: search-torch = {POOL["dpo"]["versions"]["torch"]}
#| num: search-random = {len(part(POOL["dpo"], "random"))}
#| num: search-steps-dpo = {STEPS_OF["dpo"]}
#| num: search-steps-grpo = {STEPS_OF["grpo"]}
import json
from pathlib import Path

import numpy as np
from IPython.display import Markdown

from nemo_rl_ref.files.shipped import shipped

RECORDED = shipped("benchmarks/results")


def read(name):
    """A recorded file; a run's `curve` has a row a validation: step, objective, other metrics."""
    return json.loads((RECORDED / f"search-{name}.json").read_text())


POOL = {task: read(f"pool-{task}") for task in ("dpo", "grpo")}
SEARCHED = {task: read(f"samplers-{task}") for task in POOL}
BATCHES, MODELLED = read("batch"), read("modelled")
RATE, BETA = "policy.optimizer.kwargs.lr", "dpo.reference_policy_kl_penalty"
PENALTY, BATCH = "loss_fn.reference_policy_kl_penalty", "policy.train_global_batch_size"
NAMES = {"dpo": "DPO", "grpo": "GRPO"}
STEPS_OF = {task: found["steps"] for task, found in POOL.items()}
rng = np.random.default_rng(0)  # of all resampling


def part(found, name):
    """The runs of a part of a file that did not fail."""
    return [run for run in found["runs"] if run["part"] == name and "failure" not in run]


def final(run):
    """The objective at the end of a run."""
    return run["curve"][-1][1]


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}"


files = [*POOL.values(), *SEARCHED.values(), BATCHES]
seconds = sum(run["seconds"] for found in files for run in found["runs"])
failed = sum("failure" in run for found in files for run in found["runs"])
assert failed == 0, failed  # the page says so
rows = ["| | DPO | GRPO |", "| --- " * 3 + "|"]
for name in ("objective", "config", "steps"):
    rows.append(f"| {name} | " + " | ".join(f"`{POOL[task][name]}`" for task in POOL) + " |")
Markdown("\n".join(rows))

# %%
#| label: search-spaces


def shown_range(written):
    """A distribution as people write it."""
    kind, of = written["name"], written["attributes"]
    if kind == "CategoricalDistribution":
        return ", ".join(str(choice).lower() for choice in of["choices"])
    return f"{of['low']:g} to {of['high']:g}" + (", log" if of["log"] else "")


for task, found in POOL.items():
    print(f"{NAMES[task]}, {found['objective']} after {found['steps']} steps")
    for key, written in found["space"].items():
        print(f"    {key:46} {shown_range(written)}")

# %% [markdown]
# ## The noise of these two tasks

# %%
#| label: noise-tasks
#| num: noise-dpo-sd = {percent(SIGMA['dpo'])}
#| num: noise-dpo-sd-low = {percent(SIGMA_INTERVAL['dpo'][0])}
#| num: noise-dpo-sd-high = {percent(SIGMA_INTERVAL['dpo'][1])}
#| num: noise-dpo-seeds = {NOISE['dpo']['seeds']}
#| num: noise-dpo-correlation = {NOISE['dpo']['correlation']:+.2f}
#| num: noise-dpo-three = {percent(detectable(SIGMA['dpo'], 3))}
#| num: noise-grpo-sd = {percent(SIGMA['grpo'])}
#| num: noise-grpo-sd-low = {percent(SIGMA_INTERVAL['grpo'][0])}
#| num: noise-grpo-sd-high = {percent(SIGMA_INTERVAL['grpo'][1])}
#| num: noise-grpo-correlation = {NOISE['grpo']['correlation']:+.2f}
#| num: noise-grpo-three = {percent(detectable(SIGMA['grpo'], 3))}
from scipy import stats


def noise(task):
    """Of two settings with many seeds: deviations, that of the paired difference, correlation."""
    runs = part(POOL[task], "noise")
    first, second = (
        [final(run) for run in sorted(runs, key=lambda run: run["seed"]) if run["number"] == n]
        for n in (0, 1)
    )
    apart = statistics.stdev([a - b for a, b in zip(first, second, strict=True)])
    return {
        "deviations": (statistics.stdev(first), statistics.stdev(second)),
        "difference": apart,
        "correlation": stats.pearsonr(first, second)[0],
        "seeds": len(first),
        "mean": statistics.mean(first),
    }


NOISE = {task: noise(task) for task in POOL}
#: Of one setting: both settings' variances, averaged.
SIGMA = {
    task: statistics.mean(s**2 for s in found["deviations"]) ** 0.5 for task, found in NOISE.items()
}


def detectable(sigma, seeds, level=0.95):
    """Half the interval of a difference of two settings, each with so many seeds of its own."""
    quantile = stats.t.ppf((1 + level) / 2, 2 * seeds - 2)
    return quantile * sigma * (2 / seeds) ** 0.5


assert NOISE["dpo"]["correlation"] > 0.5 > abs(NOISE["grpo"]["correlation"])  # the page says so
SIGMA_INTERVAL = {}
for task, found in NOISE.items():
    n = found["seeds"]
    low, high = ((n - 1) / stats.chi2.ppf(q, 2 * (n - 1)) * 2 for q in (0.975, 0.025))
    SIGMA_INTERVAL[task] = SIGMA[task] * low**0.5, SIGMA[task] * high**0.5

# %%
#| label: fig-detectable
#| alt: Half the width of the 95 percent interval of a difference over the number of seeds, for DPO
#|   and GRPO. Both fall steeply from two to five seeds and slowly afterwards.
#| caption: Half the 95 % interval of a difference of two settings with so many seeds each, from the
#|   standard deviations measured here. A smaller measured difference has zero in its interval.
figure, (axis,) = panels(1, height=2.8)
numbers = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20]
for line, task in enumerate(POOL):
    axis.plot(
        numbers, [100 * detectable(SIGMA[task], n) for n in numbers], label=NAMES[task],
        **LINES[line],
    )  # fmt: skip
axis.set_ylim(0)
axis.set_xlabel("seeds of each of the two settings")
axis.set_title("Half the interval of a difference (percentage points)")
axis.legend()

# %% [markdown]
# ## Which keys matter

# %%
import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
SHARES = {"best half": 0.5, "best fifth": 0.2}  # that PED-ANOVA compares with all runs
BOOTSTRAPS, SHUFFLES = 30, 60


def importances(task, runs, scores, share):
    """Optuna's PED-ANOVA by key, not normalized: 0 where the best runs' values lie as all do."""
    space = {
        key: optuna.distributions.json_to_distribution(json.dumps(written))
        for key, written in POOL[task]["space"].items()
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=run["values"], distributions=space, value=score)
            for run, score in zip(runs, scores, strict=True)
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)


IMPORTANCE = {}
for task, share in itertools.product(POOL, SHARES):
    runs = part(POOL[task], "random")
    scores = np.array([final(run) for run in runs])
    drawn = {key: [] for key in POOL[task]["space"]}
    for _ in range(BOOTSTRAPS):
        chosen = rng.integers(len(runs), size=len(runs))
        sample = importances(task, [runs[i] for i in chosen], scores[chosen], SHARES[share])
        for key, value in sample.items():
            drawn[key].append(value)
    shuffled = [
        importances(task, runs, rng.permutation(scores), SHARES[share]) for _ in range(SHUFFLES)
    ]
    IMPORTANCE[task, share] = {
        "found": importances(task, runs, scores, SHARES[share]),
        "interval": {key: np.quantile(values_, (0.05, 0.95)) for key, values_ in drawn.items()},
        "chance": {key: max(one[key] for one in shuffled) for key in drawn},
    }

# %%
#| label: fig-importance
#| alt: Importance of each searched key with its bootstrap interval, for DPO and GRPO, once for what
#|   sets the better half of the runs apart and once for the best fifth.
#| caption: Dots are PED-ANOVA's importances, bars 90 % bootstrap intervals over the runs. Crosses
#|   are the largest of 60 importances for shuffled results; a dot left of its cross says nothing.
figure, axes = panels(2, height=3.4)
for axis, task in zip(axes, POOL, strict=True):
    keys = sorted(POOL[task]["space"], key=IMPORTANCE[task, "best half"]["found"].get)
    for line, share in enumerate(SHARES):
        found, style = IMPORTANCE[task, share], LINES[line]
        for place, key in enumerate(keys):
            at = place + 0.15 - 0.3 * line
            axis.plot(found["interval"][key], [at, at], color=style["color"], linewidth=1.5)
            axis.plot(
                found["found"][key], at, style["marker"], color=style["color"],
                label=share if not place else None,
            )  # fmt: skip
            axis.plot(found["chance"][key], at, "x", color="#666666", markersize=5)
    shown = [key.split("kwargs.")[-1].split("policy.")[-1] for key in keys]
    axis.set_yticks(range(len(keys)), shown, fontsize=8)
    most = max(max(IMPORTANCE[task, share]["found"].values()) for share in SHARES)
    axis.set_xlim(0, 1.7 * most)
    axis.set_title(f"Importance, {NAMES[task]}")
axes[0].legend(fontsize=8, loc="lower right")

# %%
#| label: importance-numbers
#| num: importance-shuffles = {SHUFFLES}
#| num: importance-tests = {tests}
#| num: importance-by-chance = {tests / (SHUFFLES + 1):.1f}
rows = [
    "| | what sets apart | keys clear of chance | importance, 90 % interval |",
    "| --- " * 4 + "|",
]
CLEAR = {}
for (task, share), found in IMPORTANCE.items():
    CLEAR[task, share] = [
        key for key in found["found"] if found["found"][key] > found["chance"][key]
    ]
    shown = [
        "{:.3f}, {:.3f} to {:.3f}".format(found["found"][key], *found["interval"][key])
        for key in CLEAR[task, share]
    ]
    keys = "<br>".join(f"`{key}`" for key in CLEAR[task, share])
    rows.append(f"| {NAMES[task]} | the {share} | {keys or 'none'} | {'<br>'.join(shown)} |")
# What the page says of them.
assert CLEAR["dpo", "best half"] == [RATE, "dpo.sft_loss_weight"]
assert set(CLEAR["dpo", "best fifth"]) == {RATE, BETA}
assert CLEAR["grpo", "best half"] == [RATE]
assert CLEAR["grpo", "best fifth"] == [RATE, "grpo.num_generations_per_prompt"]
tests = len(SHARES) * sum(len(found["space"]) for found in POOL.values())
Markdown("\n".join(rows))

# %%
#| label: fig-slices
#| alt: The objective of every random run over the learning rate, for DPO and GRPO. Each has a
#|   broad top and falls off steeply towards high rates.
#| caption: Every random run, and the median of each tenth of them.
#| num: slice-dpo-low = {BEST_RATES['dpo'][0]:.2g}
#| num: slice-dpo-high = {BEST_RATES['dpo'][1]:.2g}
#| num: slice-dpo-worse = {percent(ABOVE['dpo'][0], 0)}
#| num: slice-dpo-better = {percent(ABOVE['dpo'][1], 0)}
#| num: slice-dpo-rank = {RANK['dpo']:+.2f}
#| num: slice-grpo-low = {BEST_RATES['grpo'][0]:.2g}
#| num: slice-grpo-high = {BEST_RATES['grpo'][1]:.2g}
#| num: slice-grpo-worse = {percent(ABOVE['grpo'][0], 0)}
#| num: slice-grpo-better = {percent(ABOVE['grpo'][1], 0)}
#| num: slice-grpo-rank = {RANK['grpo']:+.2f}
figure, axes = panels(2, height=2.5)
SMALL = 3e-4  # above it the accuracy falls
BEST_RATES, ABOVE, RANK = {}, {}, {}
for axis, task in zip(axes, POOL, strict=True):
    runs = sorted(part(POOL[task], "random"), key=lambda run: run["values"][RATE])
    x, y = [run["values"][RATE] for run in runs], [100 * final(run) for run in runs]
    axis.semilogx(x, y, "o", color=LINES[0]["color"], alpha=0.5, markersize=3.5)
    tenths = np.array_split(np.arange(len(runs)), 10)
    middle = [
        (np.exp(np.mean(np.log([x[i] for i in t]))), np.median([y[i] for i in t])) for t in tenths
    ]
    axis.semilogx(*zip(*middle, strict=True), **LINES[1])
    axis.set_title(f"{NAMES[task]}: {POOL[task]['objective']} (%)")
    low, high = np.quantile(
        [run["values"][RATE] for run in sorted(runs, key=final)[-len(runs) // 10 :]], (0, 1)
    )
    runs.sort(key=final)
    BEST_RATES[task] = low, high
    ABOVE[task] = [
        np.mean([run["values"][RATE] > high for run in half])
        for half in (runs[: len(runs) // 2], runs[len(runs) // 2 :])
    ]
    lower = [run for run in runs if run["values"][RATE] < SMALL]
    rank = stats.spearmanr([run["values"][RATE] for run in lower], [final(run) for run in lower])
    RANK[task] = rank[0]
axes[-1].set_xlabel(RATE)

# %%
#| label: fig-other-slices
#| alt: The objective over the ratio of SFT weight and β, and over β, for DPO, and over the group
#|   size for GRPO, for runs with a learning rate that is not too large. DPO's accuracy falls where the
#|   ratio is above eight and rises with β; GRPO's falls with the group size.
#| caption: Random runs with a learning rate below 3e-4. Squares are means of a fifth of the runs,
#|   or of a group size, with 95 % intervals.
SFT, GROUPS = "dpo.sft_loss_weight", "grpo.num_generations_per_prompt"
SLICES = {
    "DPO (%) over sft_loss_weight / reference_policy_kl_penalty": (
        "dpo", lambda run: run["values"][SFT] / run["values"][BETA]
    ),
    "DPO (%) over reference_policy_kl_penalty": ("dpo", lambda run: run["values"][BETA]),
    "GRPO (%) over num_generations_per_prompt": ("grpo", lambda run: run["values"][GROUPS]),
}  # fmt: skip
MEANS, EDGES = [], []
figure, axes = panels(3, height=2.1)
for axis, (title, (task, value)) in zip(axes, SLICES.items(), strict=True):
    runs = [run for run in part(POOL[task], "random") if run["values"][RATE] < SMALL]
    runs.sort(key=value)
    x, y = np.array([(value(run), 100 * final(run)) for run in runs]).T
    axis.semilogx(x, y, "o", color=LINES[0]["color"], alpha=0.5, markersize=3.5)
    if task == "grpo":
        groups = [np.flatnonzero(x == one) for one in sorted(set(x))]
        axis.set_xticks(sorted(set(x)), [f"{one:.0f}" for one in sorted(set(x))])
        axis.minorticks_off()
    else:
        groups = np.array_split(np.arange(len(x)), 5)
    MEANS.append([])
    EDGES.append(x[groups[-1][0]])
    for group in groups:
        middle = y[group].mean()
        half = stats.sem(y[group]) * stats.t.ppf(0.975, len(group) - 1)
        MEANS[-1].append(f"{middle:.1f} ± {half:.1f}")
        at = np.exp(np.log(x[group]).mean())
        axis.errorbar(at, middle, half, capsize=4, color=LINES[1]["color"], marker="s")
    axis.set_title(title, fontsize=9)

# %%
#| label: slice-numbers
#| num: slice-ratio-edge = {EDGES[0]:.0f}
#| num: slice-ratio-others = {", ".join(MEANS[0][:-1])}
#| num: slice-beta-rank = {rank[0]:+.2f}
#| num: slice-beta-p = {rank[1]:.1g}
#| num: slice-beta-runs = {len(apart)}
#| num: slice-ratio-last = {MEANS[0][-1]}
#| num: slice-beta-first = {MEANS[1][0]}
#| num: slice-beta-last = {MEANS[1][-1]}
#| num: slice-groups-first = {MEANS[2][0]}
#| num: slice-groups-last = {MEANS[2][-1]}
# β where the ratio is not large, so that the ratio is not what is seen.
apart = [
    run
    for run in part(POOL["dpo"], "random")
    if run["values"][RATE] < SMALL and run["values"][SFT] < EDGES[0] * run["values"][BETA]
]
rank = stats.spearmanr([run["values"][BETA] for run in apart], [final(run) for run in apart])

# %% [markdown]
# ## Learning rate and β
#
# What a Gaussian process, fitted to the random runs, says over the two keys, the others fixed
# (`benchmarks/search_modelled.py`).

# %%
#| label: rate-beta
surface = MODELLED["surface"]
rates, betas = (np.array(surface[name]) for name in ("rates", "betas"))
accuracy, error, divergence = (100 * np.array(surface[n]) for n in ("accuracy", "error", "kl"))
divergence /= 100
for key, scale in MODELLED["length_scales"].items():
    print(f"{key:46} length scale {scale:5.2f} of its range")

# %%
#| label: fig-rate-beta
#| alt: Two maps over the learning rate and β. Accuracy is high left of a boundary that lies at a
#|   rate of a few times 1e-4, and higher for large β. Lines of equal KL divergence run nearly
#|   upright, so it is the learning rate that decides about it.
#| caption: Dots are the random runs, of which the other keys differ. White lines are level lines.
from matplotlib.patheffects import withStroke

RIM = [withStroke(linewidth=2.5, foreground="#333333")]  # white is not seen on yellow
figure, axes = panels(2, height=3.1)
runs = part(POOL["dpo"], "random")
for axis, table, levels, title in (
    (axes[0], accuracy, range(50, 90, 5), "Pairs in the right order (%)"),
    (axes[1], np.log10(divergence), np.arange(-2, 1.1, 0.5), "KL to the reference (nats, log)"),
):
    axis.pcolormesh(rates, betas, table, cmap="cividis", shading="gouraud", rasterized=True)
    lines = axis.contour(
        rates, betas, table, levels=levels, colors="white", linewidths=1, linestyles="solid"
    )
    lines.set_path_effects(RIM)
    label = (lambda v: f"{v:.0f}") if table is accuracy else (lambda v: f"{10**v:.2g}")
    for text in axis.clabel(lines, fmt=label, fontsize=8):
        text.set_path_effects(RIM)
    axis.plot(
        [run["values"][RATE] for run in runs], [run["values"][BETA] for run in runs], "o",
        color="black", markersize=3, markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(False)
    axis.set_ylabel("β")
    axis.set_title(title)
axes[-1].set_xlabel(RATE)

# %%
#| label: rate-beta-numbers
#| num: surface-fitted = {MODELLED["fitted_to"]}
#| num: surface-correlation = {MODELLED['left_out_rank_correlation']:.2f}
#| num: surface-correlation-kl = {MODELLED['left_out_rank_correlation_kl']:.2f}
#| num: surface-error = {max(error[row, accuracy[row].argmax()] for row in ends.values()):.1f}
#| num: surface-best = {np.median(best_rates):.1g}
#| num: surface-same = {(best_rates == np.median(best_rates)).sum()}
#| num: surface-rows = {len(best_rates)}
#| num: surface-top-low = {accuracy[ends['low']].max():.0f}
#| num: surface-top-high = {accuracy[ends['high']].max():.0f}
#| num: surface-beta-low = {betas[0]:g}
#| num: surface-beta-high = {betas[-1]:g}
#| num: surface-kl-rates = {np.median(divergence[:, -1] / divergence[:, 0]):.0f}
#| num: surface-kl-betas = {np.median(divergence.max(0) / divergence.min(0)):.1f}
#| num: kl-rank-rate = {kl_rank('dpo', RATE):+.2f}
#| num: kl-rank-beta = {kl_rank('dpo', BETA):+.2f}
#| num: kl-rank-grpo-rate = {kl_rank('grpo', RATE):+.2f}
#| num: kl-rank-grpo-penalty = {kl_rank('grpo', PENALTY):+.2f}
best_rates = rates[accuracy.argmax(1)]
ends = {name: row for name, row in (("low", 0), ("high", -1))}


def kl_rank(task, key):
    """The rank correlation of a key with the KL divergence over the random runs."""
    runs = part(POOL[task], "random")
    return stats.spearmanr([run["values"][key] for run in runs], [run["kl"] for run in runs])[0]

# %% [markdown]
# ## Batch size, learning rate, epochs

# %%
batches = {}
for run in part(BATCHES, "batch"):
    for epoch, row in enumerate(run["curve"], start=1):
        key = epoch, run["values"][BATCH], run["values"][RATE]
        batches.setdefault(key, []).append(row[1])
epochs, sizes, batch_rates = (sorted({key[i] for key in batches}) for i in range(3))
batch_seeds = len(batches[epochs[0], sizes[0], batch_rates[0]])

# %%
#| label: fig-batch
#| alt: Three panels, after one, two and four epochs: accuracy over the learning rate for three
#|   batch sizes. After one epoch the smallest batch is far ahead; after four, the tops are close, and
#|   that of the smallest batch lies at the lowest rate.
#| caption: Means of three seeds; the bands go from the lowest to the highest of them.
from nemo_rl_ref.show.figures import band

shown_epochs = (1, 2, 4)
figure, axes = panels(len(shown_epochs), height=2.2)
for axis, epoch in zip(axes, shown_epochs, strict=True):
    for line, size in enumerate(sizes):
        of_rates = [[100 * v for v in batches[epoch, size, rate]] for rate in batch_rates]
        band(axis, batch_rates, [list(one) for one in zip(*of_rates, strict=True)], f"{size}", line)
    axis.set_xscale("log")
    axis.set_title(f"Pairs in the right order (%), epoch {epoch}")
axes[0].legend(title="pairs a step", fontsize=8, title_fontsize=8)
axes[-1].set_xlabel(RATE)

# %%
#| label: batch-numbers
#| num: batch-seeds = {batch_seeds}
#| num: batch-noise-low =
#|   {percent(spread(runs for (_, _, rate), runs in batches.items() if rate == batch_rates[0]))}
#| num: batch-noise-high =
#|   {percent(spread(runs for (_, _, rate), runs in batches.items() if rate == batch_rates[-1]))}
#| num: batch-small = {sizes[0]}
#| num: batch-large = {sizes[-1]}
#| num: batch-small-first = {percent(np.mean(top(1, sizes[0])[0]))}
#| num: batch-large-first = {percent(np.mean(top(1, sizes[-1])[0]))}
#| num: batch-first = {percent(first[0])}
#| num: batch-first-interval = {percent(first[1])} to {percent(first[2])}
#| num: batch-last = {percent(last[0])}
#| num: batch-last-interval = {percent(last[1])} to {percent(last[2])}
#| num: batch-lost-small = {lost(sizes[0], sizes[-1])}
#| num: batch-lost-large = {lost(sizes[-1], sizes[0])}
#| num: batch-times = {best_rate[sizes[-1]] / best_rate[sizes[0]]:.0f}


def top(epoch, size):
    """The runs of the best rate of the grid, by their mean, and that rate."""
    rate = max(batch_rates, key=lambda rate: np.mean(batches[epoch, size, rate]))
    return batches[epoch, size, rate], rate


def welch(one, other):
    """Standard error of a difference of means of unequal noise, and its degrees of freedom."""
    parts = [statistics.variance(runs) / len(runs) for runs in (one, other)]
    below = sum(part**2 / (len(runs) - 1) for part, runs in zip(parts, (one, other), strict=True))
    return sum(parts) ** 0.5, sum(parts) ** 2 / below


def apart(epoch):
    """Smallest minus largest batch, each at its best rate: mean and 95 % interval (Welch)."""
    few, many = top(epoch, sizes[0])[0], top(epoch, sizes[-1])[0]
    error, freedom = welch(few, many)
    middle, half = np.mean(few) - np.mean(many), stats.t.ppf(0.975, freedom) * error
    return middle, middle - half, middle + half


def spread(runs):
    """The standard deviation over seeds, pooled over settings."""
    return np.mean([statistics.variance(one) for one in runs]) ** 0.5


rows = ["| pairs a step | best (%) and its rate after 1 epoch | 2 epochs | 4 epochs |"]
rows.append("| --- " * 4 + "|")
for size in sizes:
    cells = []
    for epoch in shown_epochs:
        runs, rate = top(epoch, size)
        error = statistics.stdev(runs) / len(runs) ** 0.5
        cells.append(f"{percent(np.mean(runs))} ± {percent(error)} at {rate:.0e}")
    rows.append(f"| {size} | " + " | ".join(cells) + " |")
first, last = apart(shown_epochs[0]), apart(shown_epochs[-1])
best_rate = {size: top(shown_epochs[-1], size)[1] for size in sizes}


def lost(size, other):
    """What a size loses at the rate that suits another: mean and standard error, in points."""
    own, taken = top(shown_epochs[-1], size)[0], batches[shown_epochs[-1], size, best_rate[other]]
    return f"{percent(np.mean(own) - np.mean(taken))} ± {percent(welch(own, taken)[0])}"


# What the page says of them.
assert first[1] > 0 and last[1] > 0 and last[0] < first[0]
assert best_rate[sizes[0]] < best_rate[sizes[-1]]
Markdown("\n".join(rows))

# %% [markdown]
# ## How early a run can be judged


# %%
def spearman_of(pairs):
    """Rank correlation, with a 90 % bootstrap interval over the settings."""
    pairs = np.array(pairs)
    draws = []
    for _ in range(300):
        sample = pairs[rng.integers(len(pairs), size=len(pairs))]
        draws.append(stats.spearmanr(sample[:, 0], sample[:, 1])[0])
    low, high = np.nanquantile(draws, (0.05, 0.95))
    return stats.spearmanr(pairs[:, 0], pairs[:, 1])[0], low, high


EARLY = {}
for task in POOL:
    runs = part(POOL[task], "random")
    middle = statistics.median(map(final, runs))
    better = [run for run in runs if final(run) >= middle]
    for group, chosen in (("all", runs), ("better half", better)):
        EARLY[task, group] = {
            runs[0]["curve"][at][0] / STEPS_OF[task]: spearman_of(
                [(run["curve"][at][1], final(run)) for run in chosen]
            )
            for at in range(len(runs[0]["curve"]) - 1)
        }

# %%
#| label: fig-early
#| alt: Rank correlation of the objective during a run with that at its end, over the fraction of
#|   the run, for DPO and GRPO. For all settings it starts near 0.7 to 0.9; among the better half it
#|   starts much lower.
#| caption: Bars are 90 % bootstrap intervals. The better half is chosen by the end of the runs.
figure, axes = panels(2, height=2.5)
for axis, task in zip(axes, POOL, strict=True):
    for line, group in enumerate(("all", "better half")):
        found = EARLY[task, group]
        middle, low, high = np.array(list(found.values())).T
        axis.errorbar(
            np.array(list(found)) + 0.006 * line, middle, (middle - low, high - middle),
            label=f"{group} settings" if group == "all" else group, capsize=3, **LINES[line],
        )  # fmt: skip
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.35, 1.02)
    axis.set_title(f"Rank correlation with the end, {NAMES[task]}")
axes[0].legend(fontsize=8, loc="lower right")
axes[-1].set_xlabel("fraction of the run")

# %%
#| label: early-numbers
#| num: early-dpo-spread = {percent(UPPER_SPREAD['dpo'])}
#| num: early-dpo-first = {100 * min(EARLY['dpo', 'all']):.0f}
#| num: early-dpo-all = {first_rank('dpo', 'all')[0]:.2f}
#| num: early-dpo-all-interval = {first_rank('dpo', 'all')[1]:.2f} to
#|   {first_rank('dpo', 'all')[2]:.2f}
#| num: early-dpo-half = {first_rank('dpo', 'better half')[0]:.2f}
#| num: early-dpo-half-interval = {first_rank('dpo', 'better half')[1]:.2f} to
#|   {first_rank('dpo', 'better half')[2]:.2f}
#| num: early-grpo-spread = {percent(UPPER_SPREAD['grpo'])}
#| num: early-grpo-first = {100 * min(EARLY['grpo', 'all']):.0f}
#| num: early-grpo-all = {first_rank('grpo', 'all')[0]:.2f}
#| num: early-grpo-all-interval = {first_rank('grpo', 'all')[1]:.2f} to
#|   {first_rank('grpo', 'all')[2]:.2f}
#| num: early-grpo-half = {first_rank('grpo', 'better half')[0]:.2f}
#| num: early-grpo-half-interval = {first_rank('grpo', 'better half')[1]:.2f} to
#|   {first_rank('grpo', 'better half')[2]:.2f}
# How far apart the better half's ends are, to be read beside the seed's deviation.
UPPER_SPREAD = {}
for task in POOL:
    ends = sorted(final(run) for run in part(POOL[task], "random"))
    UPPER_SPREAD[task] = statistics.stdev(ends[len(ends) // 2 :])


def first_rank(task, group):
    """The rank correlation at the first validation, and its interval."""
    found = EARLY[task, group]
    return found[min(found)]

# %% [markdown]
# ### What pruning saves

# %%
#| label: pruning
#| num: pruned-replays = {REPLAYS}
#| num: pruned-dpo-saved = {percent(statistics.mean(PRUNED['dpo']['saved']), 0)}
#| num: pruned-dpo-kept = {percent(statistics.mean(PRUNED['dpo']['kept']), 0)}
#| num: pruned-dpo-lost = {percent(statistics.mean(PRUNED['dpo']['lost']))}
#| num: pruned-dpo-lost-most = {percent(float(np.quantile(PRUNED['dpo']['lost'], 0.95)))}
#| num: pruned-grpo-saved = {percent(statistics.mean(PRUNED['grpo']['saved']), 0)}
#| num: pruned-grpo-kept = {percent(statistics.mean(PRUNED['grpo']['kept']), 0)}
#| num: pruned-grpo-lost = {percent(statistics.mean(PRUNED['grpo']['lost']))}
#| num: pruned-grpo-lost-most = {percent(float(np.quantile(PRUNED['grpo']['lost'], 0.95)))}
from nemo_rl_ref.tune.methods import REDUCTION


def halve(runs, task, reduction=REDUCTION):
    """Replay successive halving: for each run the steps it gets, in the order of the runs.

    A run goes on from a rung if it is among the best 1 / reduction of those that came there.
    """
    rungs, step = [], POOL[task]["val_period"]
    while step < STEPS_OF[task]:
        rungs.append(step)
        step *= reduction
    seen = {rung: [] for rung in rungs}
    given = []
    for run in runs:
        value_at = {row[0]: row[1] for row in run["curve"]}
        steps = STEPS_OF[task]
        for rung in rungs:
            seen[rung].append(value_at[rung])
            kept = max(1, len(seen[rung]) // reduction)
            if value_at[rung] < sorted(seen[rung], reverse=True)[kept - 1]:
                steps = rung
                break
        given.append(steps)
    return given


def with_optuna(runs, task):
    """The same by Optuna's pruner."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=POOL[task]["val_period"], reduction_factor=REDUCTION
    )
    study = optuna.create_study(direction="maximize", pruner=pruner)
    given = []
    for run in runs:
        trial, steps = study.ask(), STEPS_OF[task]
        for step, value, *_ in run["curve"][:-1]:
            trial.report(value, step)
            if trial.should_prune():
                steps = step
                break
        study.tell(trial, value if steps < STEPS_OF[task] else final(run))
        given.append(steps)
    return given


PRUNED, REPLAYS = {}, 400
for task in POOL:
    runs = part(POOL[task], "random")
    assert halve(runs, task) == with_optuna(runs, task)
    saved, lost, found_best = [], [], []
    for _ in range(REPLAYS):
        chosen = [runs[i] for i in rng.choice(len(runs), size=24, replace=False)]
        steps = halve(chosen, task)
        whole = [run for run, given in zip(chosen, steps, strict=True) if given == STEPS_OF[task]]
        saved.append(1 - sum(steps) / (STEPS_OF[task] * len(chosen)))
        lost.append(max(map(final, chosen)) - max(map(final, whole)))
        found_best.append(lost[-1] == 0)
    PRUNED[task] = {"saved": saved, "lost": lost, "kept": found_best}

# %% [markdown]
# ## Search methods

# %%
#| label: modeled
#| num: modeled-searches = {len(searches["random"])}
#| num: modeled-trials = {MODEL_BUDGET}
#| num: modeled-fitted = {MODELLED["fitted_to"]}
#| num: modeled-correlation = {MODELLED['left_out_rank_correlation']:.2f}
#| num: modeled-noise = {percent(MODELLED["noise"])}
#| num: modeled-tpe = {shown_interval(MORE['tpe'])}
#| num: modeled-gp = {shown_interval(MORE['gp'])}
#| num: modeled-cmaes = {shown_interval(MORE['cmaes'])}
#| num: modeled-curse = {percent(statistics.mean(seen - true for runs in searches.values() for
#|   seen, true in (taken(run, MODEL_BUDGET) for run in runs)))}
METHODS = {"random": "random", "tpe": "TPE", "gp": "Gaussian process", "cmaes": "CMA-ES"}


def mean_interval(found):
    """Mean and half its 95 % interval, Student's t over the searches."""
    half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return statistics.mean(found), half


def shown_interval(found):
    middle, half = mean_interval(found)
    return f"{percent(middle)} ± {percent(half)}"


def taken(run, budget):
    """What a search takes after so many trials, the best as seen, and its true value."""
    at = int(np.argmax(run["seen"][:budget]))
    return run["seen"][at], run["true"][at]


searches = {method: part(MODELLED, method) for method in METHODS}
MODEL_BUDGET = len(searches["random"][0]["seen"])
TRUE = {method: [taken(run, MODEL_BUDGET)[1] for run in runs] for method, runs in searches.items()}
MORE = {
    method: [a - b for a, b in zip(found, TRUE["random"], strict=True)]
    for method, found in TRUE.items()
}
rows = [
    "| | best as seen (%) | its true value (%) | more than random (points) |",
    "| --- " * 4 + "|",
]
for method, runs in searches.items():
    seen = shown_interval([taken(run, MODEL_BUDGET)[0] for run in runs])
    more = "—" if method == "random" else shown_interval(MORE[method])
    rows.append(f"| {METHODS[method]} | {seen} | {shown_interval(TRUE[method])} | {more} |")
# What the page says of them.
assert mean_interval(MORE["gp"])[0] > mean_interval(MORE["gp"])[1]
for method in ("tpe", "cmaes"):
    middle, half = mean_interval(MORE[method])
    assert middle - half < 0 < middle + half
Markdown("\n".join(rows))

# %%
#| label: fig-modeled
#| alt: True value of what a search would take over the number of trials, for random search, TPE, a
#|   Gaussian process and CMA-ES.
#| caption: Means over the searches; bars at the end are 95 % intervals.
figure, (axis,) = panels(1, height=3.2)
numbers = np.arange(3, MODEL_BUDGET + 1)
for line, (method, runs) in enumerate(searches.items()):
    true = 100 * np.array([[taken(run, n)[1] for n in numbers] for run in runs])
    axis.plot(numbers, true.mean(0), label=METHODS[method], markevery=3, **LINES[line])
    middle, half = mean_interval(true[:, -1].tolist())
    axis.errorbar(
        MODEL_BUDGET + 0.5 * (line + 1), middle, half, color=LINES[line]["color"], capsize=3
    )
axis.set_xlabel("trials")
axis.set_title("True accuracy of what would be taken (%)")
axis.legend(fontsize=8, loc="lower right")

# %%
#| label: claim
#| num: claim-dpo-share = {SHOWN['dpo']}
#| num: claim-dpo-reached = {REACHED['dpo']}
#| num: claim-grpo-reached = {REACHED['grpo']}
#| num: claim-budget = {BUDGET}
#| num: claim-searches = {len(SEARCHES)}
SEARCHES = range(5)  # each with its own seed, of the sampler and of the trainings
BUDGET = 24  # whole runs of a random search
LIMIT = {"dpo": 16, "grpo": 12}  # of a pruned one


def search_of(task, method, seed):
    """The runs of a search in their order."""
    found = POOL[task] if method == "random" else SEARCHED[task]
    runs = [run for run in part(found, method) if run["seed"] == seed]
    return sorted(runs, key=lambda run: run["number"])


def best_so_far(task, runs):
    """Whole runs spent, and the best end of a run that was not pruned, after every run."""
    spent, best, curve = 0, -np.inf, []
    for run in runs:
        spent += run["steps"]
        best = best if "pruned" in run else max(best, final(run))
        curve.append((spent / STEPS_OF[task], best))
    return curve


def when_as_good(curve, target):
    """Whole runs spent until a search was at least as good; infinite if it never was."""
    return next((spent for spent, best in curve if best >= target), np.inf)


CURVES = {
    (task, method): [best_so_far(task, search_of(task, method, seed)) for seed in SEARCHES]
    for task in LIMIT
    for method in ("random", "tpe+pruning")
}
rows = [
    "| | compute until as good as random's best, five searches | median | a whole pruned search |",
    "| --- " * 4 + "|",
]
SHARE, SHOWN, REACHED = {}, {}, {}
for task, limit in LIMIT.items():
    targets = [curve[-1][1] for curve in CURVES[task, "random"]]
    pairs = zip(CURVES[task, "tpe+pruning"], targets, strict=True)
    shares = [when_as_good(curve, target) / BUDGET for curve, target in pairs]
    SHARE[task] = statistics.median(shares)
    over = f"over {limit / BUDGET:.0%}"
    shown = [over if share == np.inf else f"{share:.0%}" for share in sorted(shares)]
    trials = statistics.median(len(curve) for curve in CURVES[task, "tpe+pruning"])
    rows.append(
        f"| {NAMES[task]} | {', '.join(shown)} | **{shown[len(shown) // 2]}** "
        f"| {trials:.0f} trials, the steps of {limit} whole runs |"
    )
    SHOWN[task] = shown[len(shown) // 2]
    REACHED[task] = sum(share <= 0.5 for share in shares)
Markdown("\n".join(rows))

# %%
#| label: fig-claim
#| alt: The best value found so far over the compute spent, for random search and for TPE with
#|   pruning, for DPO and GRPO, five searches each.
#| caption: Thin lines are searches, thick ones their medians. The unit of compute is a whole run;
#|   the dotted line marks half of what random search was given.
figure, axes = panels(len(LIMIT), height=3.2)
for axis, task in zip(axes, LIMIT, strict=True):
    for line, (method, name) in enumerate((("random", "random"), ("tpe+pruning", "TPE, pruned"))):
        until = np.arange(1, (BUDGET if method == "random" else LIMIT[task]) + 1)
        found = []
        for curve in CURVES[task, method]:
            spent, best = np.array(curve).T
            at = np.searchsorted(spent, until + 1e-9) - 1
            found.append(np.where(at >= 0, best[np.maximum(at, 0)], -np.inf))
            shown = np.isfinite(found[-1])
            axis.plot(
                until[shown], 100 * found[-1][shown], color=LINES[line]["color"], alpha=0.25,
                linewidth=0.8,
            )  # fmt: skip
        middle = np.median(found, axis=0)
        shown = np.isfinite(middle)
        axis.plot(until[shown], 100 * middle[shown], label=name, markevery=3, **LINES[line])
    axis.axvline(BUDGET / 2, color="#777777", linewidth=1, linestyle=":")
    axis.set_ylim(bottom={"dpo": 70, "grpo": 12}[task])
    axis.set_title(f"Best {POOL[task]['objective']} so far (%), {NAMES[task]}")
axes[0].legend(fontsize=8, loc="lower right")
axes[-1].set_xlabel("compute spent (whole runs)")

# %%
#| label: fresh
#| num: fresh-random = {shown_interval(again["random"])}
#| num: fresh-pruned = {shown_interval(again["tpe+pruning"])}
#| num: fresh-random-search = {shown_interval(found["random"])}
#| num: fresh-pruned-search = {shown_interval(found["tpe+pruning"])}
#| num: fresh-curse = {percent(statistics.mean(found["random"]) - statistics.mean(again["random"]))}
#| num: fresh-gain = {100 * gain:+.1f}
#| num: fresh-gain-interval = {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}


def fresh(method):
    """For each DPO search, the mean of its winner over fresh seeds."""
    again = part(SEARCHED["dpo"], f"again {method}")
    return [
        statistics.mean(final(run) for run in again if run["search"] == seed) for seed in SEARCHES
    ]


found = {
    method: [curve[-1][1] for curve in CURVES["dpo", method]]
    for method in ("random", "tpe+pruning")
}
again = {method: fresh(method) for method in found}
gain, half = mean_interval(
    [a - b for a, b in zip(again["tpe+pruning"], again["random"], strict=True)]
)

# %% [markdown]
# ## KL against reward


# %%
def front_of(points):
    """Those that no other beats in both: accuracy (more) and KL (less); by KL."""
    best, kept = -np.inf, []
    for kl, value in sorted(points):
        if value > best:
            kept.append((kl, value))
            best = value
    return kept


random_points = [(run["kl"], final(run)) for run in part(POOL["grpo"], "random")]

# %%
#| label: fig-front
#| alt: Accuracy over the KL divergence to the reference for GRPO, every random run a dot. The front
#|   rises up to half a nat and ends; many runs with a large KL have an accuracy near zero.
#| caption: Every random run is a dot, the line is the front.
figure, (axis,) = panels(1, height=3.2)
kl, value = np.array(random_points).T
axis.semilogx(kl, 100 * value, "o", color=LINES[0]["color"], alpha=0.4, markersize=4)
kl, value = np.array(front_of(random_points)).T
axis.step([*kl, max(random_points)[0]], [*100 * value, 100 * value[-1]], where="post", color="k")
axis.set_title("val:accuracy (%), GRPO")
axis.set_xlabel("KL to the reference (nats an answer)")

# %%
#| label: front-numbers
#| num: front-kl = {best_kl:.2f}
#| num: front-lost = {percent(np.mean([kl > best_kl for kl, _ in random_points]), 0)}
best_kl, best_value = front_of(random_points)[-1]

# %%
#| label: front-table
BOUNDS = (0.03, 0.1, 0.3, 1.0)
rows = [
    "| KL at most (nats) | best accuracy (%) | " + f"`{PENALTY}` | `{RATE}` |",
    "| --- " * 4 + "|",
]
for bound in BOUNDS:
    allowed = [run for run in part(POOL["grpo"], "random") if run["kl"] <= bound]
    best = max(allowed, key=final)
    rows.append(
        f"| {bound:g} | {percent(final(best))} | {best['values'][PENALTY]:.2g} "
        f"| {best['values'][RATE]:.2g} |"
    )
Markdown("\n".join(rows))

# %% [markdown]
# ## Memory

# %%
#| label: memory-table
#| num: llama-parameters = {llama.parameters / 1e9:.2f}
#| num: memory-plain = {estimates['log_softmax'].peak / 2**30:.1f}
#| num: memory-fused = {estimates['linear_token_logprobs'].peak / 2**30:.1f}
from nemo_rl_ref.memory import Model, Step, compare, estimate, measure_peak
from nemo_rl_ref.memory import table as memory_table

#: Llama 3.2 1B, the model of NeMo RL's dpo.yaml; its micro-batch is 2 pairs of 1,024 tokens.
llama = Model(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
dpo_step = Step(rows=4, sequence_length=1024, reference="host")
estimates = compare(llama, dpo_step)
Markdown(memory_table(estimates))

# %%
#| label: memory-check
#| num: memory-error = {100 * memory_error:.1f}
tiny_model, tiny_step = tiny.load_policy(), Step(64, 16, precision="float32", fsdp=False)
shapes = Model.from_config(tiny_model.config)
optimizer = torch.optim.AdamW(tiny_model.parameters(), foreach=False)
ids = torch.randint(0, shapes.vocab_size, (tiny_step.rows, tiny_step.sequence_length))


def micro_batch():
    """What a step holds besides weights, optimizer state and earlier gradients."""
    logits = tiny_model(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None]).sum().backward()


micro_batch()
optimizer.step()
optimizer.zero_grad()
micro_batch()
measured = measure_peak(micro_batch)
found = estimate(shapes, tiny_step)
there = found.weights + found.optimizer + found.gradients
memory_error = abs(found.peak - there - measured) / measured
print(f"measured {measured / 2**20:.2f} MiB, estimated {(found.peak - there) / 2**20:.2f} MiB")
assert memory_error < 0.05

# %% [markdown]
# ## A budget planner

# %%
#| label: plan
from nemo_rl_ref.tune.plans import make_plans

PLANS = {}
for task, budget in itertools.product(POOL, (20, 60)):
    PLANS[task, budget] = make_plans(
        budget,  # whole runs
        pilot=[final(run) for run in part(POOL[task], "random")],
        noise=SIGMA[task],
        correlations={fraction: found[0] for fraction, found in EARLY[task, "all"].items()},
        draws=1000,
    )

# %%
#| label: plan-table
#| num: plan-gain-dpo-20 = {gain('dpo', 20):.1f}
#| num: plan-gain-dpo-60 = {gain('dpo', 60):.1f}
#| num: plan-gain-grpo-20 = {gain('grpo', 20):.1f}
#| num: plan-gain-grpo-60 = {gain('grpo', 60):.1f}


def plain(plans):
    """Every setting whole and once, the best is taken: what a search without a plan does."""
    return next(plan for plan in plans if plan.fraction == 1 and plan.finalists == 1)


def gain(task, budget):
    """What the best plan adds to a search without one, in percentage points."""
    plans = PLANS[task, budget]
    return 100 * (plans[0].expected - plain(plans).expected)


rows = [
    "| | budget | settings | trained for | finalists × seeds | expected (%) | without a plan (%) |",
    "| --- " * 7 + "|",
]
for (task, budget), plans in PLANS.items():
    best = plans[0]
    second = f"{best.finalists} × {best.seeds}" if best.seeds else "none"
    rows.append(
        f"| {NAMES[task]} | {budget} | {best.trials} | {best.fraction:.0%} | {second} "
        f"| {percent(best.expected)} | {percent(plain(plans).expected)} |"
    )
Markdown("\n".join(rows))

# %%
#| label: plan-check
#| num: plan-error = {percent(plan_error)}
#| num: plan-checks = {len(checked)}
#| num: plan-less = {sum(planned > replayed for *_, planned, replayed in checked)}
# One stage, simulated by the planner without noise and replayed with the runs themselves.
checked = []
for task in POOL:
    runs = part(POOL[task], "random")
    for at, fraction in enumerate(EARLY[task, "all"]):
        replayed = []
        for _ in range(2000):
            chosen = [runs[i] for i in rng.choice(len(runs), size=12, replace=False)]
            replayed.append(final(max(chosen, key=lambda run: run["curve"][at][1])))
        plans = make_plans(
            12 * fraction, pilot=[final(run) for run in runs], noise=0.0, finalists=[1],
            correlations={fraction: EARLY[task, "all"][fraction][0]},
        )  # fmt: skip
        planned = next(plan for plan in plans if plan.trials == 12)
        checked.append((task, fraction, planned.expected, statistics.mean(replayed)))
        print(
            f"{NAMES[task]:5} {fraction:5.0%}  planned {planned.expected:.3f}  "
            f"replayed {statistics.mean(replayed):.3f}"
        )
plan_error = max(abs(planned - replayed) for *_, planned, replayed in checked)
assert plan_error == max(planned - replayed for *_, planned, replayed in checked)
gains = [plans[0].expected - plain(plans).expected for plans in PLANS.values()]
assert max(gains) < plan_error  # the page says so

# %% [markdown]
# ## A study, live
#
# The pairs of the recorded runs: the sum, and a random number with as many digits.

# %%
import random
import tempfile

from nemo_rl_ref.tiny.addition import answer, problems, prompt

folder = Path(tempfile.mkdtemp())
draw = random.Random(0)


def write_pairs(name, of):
    """Pairs in the form of the shipped ones."""
    rows = []
    for problem in of:
        right = answer(problem)
        lowest = 10 ** (len(right) - 1) if len(right) > 1 else 0
        wrong = draw.choice([n for n in range(lowest, 10 ** len(right)) if str(n) != right])
        row = {"prompt": prompt(problem), "chosen": right, "rejected": str(wrong)}
        rows.append(json.dumps(row) + "\n")
    (folder / name).write_text("".join(rows))


trained_on, never_seen = problems()
write_pairs("train.jsonl", trained_on[:2048])
write_pairs("validation.jsonl", never_seen[:200])

# %%
#| label: live-spec
from nemo_rl_ref import tiny
from nemo_rl_ref.files.shipped import shipped
from nemo_rl_ref.tune import make_spec, optimize

spec = make_spec(
    "dpo",
    str(shipped("configs/dpo.yaml")),
    {
        "policy.optimizer.kwargs.lr": {"log_uniform": [1e-5, 3e-3]},
        "dpo.reference_policy_kl_penalty": {"log_uniform": [0.01, 3.0]},
    },
    ["val:validation-default_accuracy"],
    [
        f"policy.model_name={tiny.MODEL}",
        f"data.train.data_path={folder}/train.jsonl",
        f"data.validation.data_path={folder}/validation.jsonl",
        "policy.train_global_batch_size=16",
        "policy.train_micro_batch_size=16",
        "dpo.max_num_steps=32",
        "dpo.val_period=8",
        "dpo.val_at_start=false",
        "dpo.val_batches=-1",
        "dpo.val_global_batch_size=200",
        "dpo.val_micro_batch_size=200",
    ],
)

# %%
#| label: live-run
study = optimize(
    spec, folder=folder / "study", trials=10, sampler="tpe", pruner="successive-halving", seed=1
)
for trial in study.trials:
    at = trial.user_attrs
    shown = ", ".join(f"{key.split('.')[-1]}={value:.2g}" for key, value in trial.params.items())
    steps, value = max(trial.intermediate_values.items())
    print(f"{trial.number:2} {trial.state.name:8} {steps:3} steps {value:.3f}  {shown}")

# %%
#| label: live-best
from nemo_rl_ref.tune.outcome.best import best_of

best = best_of(study)
print(best.override_line)

# %%
#| label: live-again
#| num: live-trials = {len(study.trials)}
#| num: live-pruned = {sum(trial.state.name == 'PRUNED' for trial in study.trials)}
#| num: live-best = {percent(again.winner.search_value)}
#| num: live-fresh = {percent(again.winner.mean)}
#| num: live-default = {percent(again.winner.default_mean)}
#| num: live-difference = {100 * again.winner.mean_difference:+.1f}
#| num: live-interval = {100 * again.winner.low:+.1f} to {100 * again.winner.high:+.1f}
#| num: live-seeds = {again.winner.pairs}
from nemo_rl_ref.tune.outcome.reevaluate import reevaluate

again = reevaluate(study, folder / "study", top=1, seeds=3, show=lambda line: None)
print("\n".join(again.sentences()))

# %%
#| label: live-report
from nemo_rl_ref.tune.outcome.best import write_yaml
from nemo_rl_ref.tune.outcome.report import write_report

report = write_report(study, folder / "report.html", reevaluation=again)
config = write_yaml(best, folder / "best.yaml")
print(report.name)
print(f"{config.name}: {len(config.read_text().splitlines())} lines, loads as NeMo RL loads it")
