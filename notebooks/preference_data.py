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
# # Preference data and runs that go wrong
#
# You will make preference pairs with one fault at a time (flipped labels, a bias towards length,
# ties), train several losses on them, and then spoil a DPO run in three ways and repair it. The
# text that explains the results is on the page
# [Preference Data](../docs/advanced/algorithm-development/preference-data.md).

# %%
#| label: data-setup
import json
import math
import random
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from IPython.display import Markdown

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.rl.generate import response_kl, sample_responses
from nemo_rl_ref.show.figures import LINES, band, panels
from nemo_rl_ref.tiny.addition import answer, is_correct, problems, prompt
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import Batches, preference_pairs
from nemo_rl_ref.training.step import run_batch, update

warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, not ours

SEEDS = range(3)  # a seed decides the data's faults and the order of the pairs
PAIRS = 16  # preference pairs a step: policy.train_global_batch_size
LEARNING_RATE = 3e-4
BETA = 0.1

accelerator = Accelerator()
tokenizer = tiny.load_tokenizer()
reference = tiny.load_policy().eval().to(accelerator.device)
train_problems, never_seen = problems()
prompts = [prompt(problem) for problem in never_seen[:250]]


def config(**keys):
    return DPOLossConfig(**{"reference_policy_kl_penalty": BETA, **keys})


def load(records, reference):
    """Pairs from records, by way of a file as NeMo RL reads it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        dataset = BinaryPreferenceDataset(str(file))
    pairs = preference_pairs(dataset, tokenizer, max_seq_length=32)
    add_reference_logprobs(reference, [pairs], accelerator)
    return pairs


def batches_of(records, steps, seed, reference=reference):
    """Global batches for a run: as many epochs as it takes, each in another order."""
    pairs = load(records, reference)
    order = Batches(len(pairs), PAIRS, seed, max_epochs=steps, max_steps=steps)
    return [pairs.batch(numbers) for numbers in order]


def held_out_batch(records, reference=reference):
    pairs = load(records, reference)
    return pairs.batch(range(len(pairs)))


def fit(loss_fn, batches, *, learning_rate=LEARNING_RATE, start=reference):
    """Train a copy of `start`. Yield the policy and the step's metrics after every step."""
    policy = tiny.load_policy()
    policy.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for batch in batches:
        yield policy, update(
            policy,
            optimizer,
            loss_fn,
            batch,
            accelerator,
            micro_rows=batch.size,
            max_grad_norm=1.0,
            rows=2,  # a pair is two rows
        )


def mean(results, quantity):
    return statistics.mean(result[quantity] for result in results)


def table(runs, quantities):
    """Mean and standard deviation over the seeds, one row for each contender."""
    rows = ["| | " + " | ".join(quantities) + " |", "| --- " * (len(quantities) + 1) + "|"]
    for name, results in runs.items():
        cells = [
            f"{mean(results, q):.3f}\u00a0±\u00a0{statistics.stdev(r[q] for r in results):.3f}"
            for q in quantities
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return Markdown("\n".join(rows))


# %% [markdown]
# ## Data with one fault at a time
#
# The chosen answer is the sum, the rejected one a random number of as many digits.


# %%
#| label: data-pairs
def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


TRAIN, HELD_OUT = read(tiny.TRAIN_PAIRS), read(tiny.VALIDATION_PAIRS)


def wrong(right, rng):
    """A random number that is not `right`, with as many digits."""
    lowest, highest = 10 ** (len(right) - 1) if len(right) > 1 else 0, 10 ** len(right)
    return str(rng.choice([n for n in range(lowest, min(highest, 199)) if str(n) != right]))


def noisy(records, seed, flipped):
    """Right against wrong; a share `flipped` of the labels is turned round."""
    rng = random.Random(seed)
    pairs = []
    for record in records:
        answers = record["chosen"], wrong(record["chosen"], rng)
        chosen, rejected = reversed(answers) if rng.random() < flipped else answers
        pairs.append({"prompt": record["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


FILLER = "===="


def padded(records, seed, longer):
    """Right against wrong; one has a filler at its end, the right one in a share `longer`."""
    rng = random.Random(seed)
    pairs = []
    for record in records:
        right_is_longer = rng.random() < longer
        chosen, rejected = record["chosen"], wrong(record["chosen"], rng)
        pairs.append(
            {
                "prompt": record["prompt"],
                "chosen": chosen + FILLER * right_is_longer,
                "rejected": rejected + FILLER * (not right_is_longer),
            }
        )
    return pairs


def tied(records, seed, ties):
    """Right against wrong; in a share `ties` both are wrong, and chance chose."""
    rng = random.Random(seed)
    pairs = []
    for record in records:
        other = wrong(record["chosen"], rng)
        chosen = record["chosen"]
        is_tie = rng.random() < ties
        while is_tie and chosen in (record["chosen"], other):
            chosen = wrong(record["chosen"], rng)
        pairs.append({"prompt": record["prompt"], "chosen": chosen, "rejected": other})
    return pairs


def is_tie(pair):
    return not is_correct(pair["prompt"], pair["chosen"])


examples = [
    ("labels flipped", noisy(TRAIN[:4], 0, 0.5)),
    ("longer is chosen", padded(TRAIN[:4], 0, 0.8)),
    ("ties", tied(TRAIN[:4], 0, 0.75)),
]
rows = ["| data | prompt | chosen | rejected |", "| --- " * 4 + "|"]
for name, pairs in examples:
    rows += [f"| {name} | `{p['prompt']}` | `{p['chosen']}` | `{p['rejected']}` |" for p in pairs]
Markdown("\n".join(rows))

# %% [markdown]
# ## Label noise

# %%
#| label: data-noise
from nemo_rl_ref.custom.pairwise import ConservativeDPOLossFn, IPOLossFn, RobustDPOLossFn

STEPS, EPOCH = 40, 256  # optimizer steps of a run, pairs in the training data
FLIPPED = 0.2
plain = DPOLossFn(config())  # its metrics are log-ratios, whatever the policy was trained with


def pair_metrics(policy, held_out):
    return run_batch(policy, plain, held_out, accelerator, micro_rows=512, backward=False)


def last(run):
    """The policy after the last step."""
    for policy, _ in run:
        pass
    return policy


noise_test = held_out_batch(noisy(HELD_OUT, 99, 0.0))
noise_contenders = {
    "DPO, clean labels": (DPOLossFn(config()), 0.0),
    "DPO": (DPOLossFn(config()), FLIPPED),
    "conservative DPO": (ConservativeDPOLossFn(config(label_smoothing=FLIPPED)), FLIPPED),
    "robust DPO": (RobustDPOLossFn(config(label_smoothing=FLIPPED)), FLIPPED),
    "IPO": (IPOLossFn(config()), FLIPPED),
}
noise_runs = {name: [] for name in noise_contenders}
for seed in SEEDS:
    data = {
        share: batches_of(noisy(TRAIN[:EPOCH], seed, share), STEPS, seed)
        for share in (0.0, FLIPPED)
    }
    for name, (loss_fn, share) in noise_contenders.items():
        policy = last(fit(loss_fn, data[share]))
        pairs = pair_metrics(policy, noise_test)
        samples = sample_responses(policy, tokenizer, prompts, max_new_tokens=5, seed=5)
        noise_runs[name].append(
            {
                "accuracy": pairs["accuracy"],
                "margin (nats)": pairs["rewards_chosen_mean"] - pairs["rewards_rejected_mean"],
                "KL (nats)": response_kl(policy, reference, samples),
            }
        )
table(noise_runs, ["accuracy", "margin (nats)", "KL (nats)"])

# %%
#| label: fig-data-noise
#| alt: Accuracy on clean held-out pairs for DPO with clean labels, about 0.7, and for DPO,
#|   conservative DPO, robust DPO and IPO with a fifth of the labels flipped, all about 0.6.
#| caption: Accuracy on clean held-out pairs; the gray line is chance. Small marks are seeds; large
#|   marks and bars are their mean and standard deviation.


def dots(axis, runs, quantity, line=0, label=None):
    """One row for each contender: its seeds, their mean and standard deviation."""
    style = {"color": LINES[line]["color"], "marker": LINES[line]["marker"]}
    for row, results in enumerate(runs.values()):
        found = [result[quantity] for result in results]
        height = row + 0.2 * line
        axis.scatter(found, [height] * len(found), s=10, alpha=0.6, **style)
        axis.errorbar(
            mean(results, quantity),
            height,
            xerr=statistics.stdev(found),
            capsize=3,
            linestyle="none",
            markersize=7,
            label=label if row == 0 else None,
            **style,
        )
    axis.set_yticks(range(len(runs)), runs)
    axis.set_ylim(len(runs) - 0.4, -0.6)


figure, (axis,) = panels(1, height=2.4)
dots(axis, noise_runs, "accuracy")
axis.axvline(0.5, color="#777777", linewidth=1)
axis.set_title("Clean pairs in the right order")

# %%
#| label: data-noise-numbers
#| num: data-steps = {STEPS}
#| num: data-batch = {PAIRS}
#| num: data-rate = {LEARNING_RATE:g}
#| num: data-beta = {BETA:g}
#| num: data-seeds = {len(SEEDS)}
#| num: data-held-out = {len(HELD_OUT)}
#| num: data-error = {100 * sample_error:.0f}
#| num: flips-share = {FLIPPED:.0%}
#| num: flips-pairs = {EPOCH}
#| num: flips-epochs = {STEPS * PAIRS / EPOCH:g}
#| num: flips-cost = {100 * (clean - noisy_dpo):.0f}
#| num: flips-cost-low = {100 * cost_interval.low:.0f}
#| num: flips-cost-high = {100 * cost_interval.high:.0f}
#| num: flips-best = {best}
#| num: flips-gain = {100 * (aware[best] - noisy_dpo):+.0f}
#| num: flips-gain-low = {100 * gain_interval.low:+.0f}
#| num: flips-gain-high = {100 * gain_interval.high:+.0f}
#| num: flips-kl-ipo = {kl['IPO']:.2f}
#| num: flips-kl-dpo = {kl['DPO']:.2f}
# What the page says of these runs. If it stops being true, the build stops.
from scipy.stats import ttest_rel


def difference(runs, one, other):
    """95 % interval of a mean difference in accuracy; a seed's runs share the order of the pairs."""
    pairs = ([run["accuracy"] for run in runs[name]] for name in (one, other))
    return ttest_rel(*pairs).confidence_interval()


accuracy = {name: mean(results, "accuracy") for name, results in noise_runs.items()}
clean, noisy_dpo = accuracy["DPO, clean labels"], accuracy["DPO"]
aware = {n: accuracy[n] for n in ("conservative DPO", "robust DPO", "IPO")}
best = max(aware, key=aware.get)
sample_error = 0.5 / len(HELD_OUT) ** 0.5
cost_interval = difference(noise_runs, "DPO, clean labels", "DPO")
gain_interval = difference(noise_runs, best, "DPO")
assert cost_interval.low < 0 < cost_interval.high  # not even the fault is settled
assert gain_interval.low < 0 < gain_interval.high
kl = {name: mean(results, "KL (nats)") for name, results in noise_runs.items()}
assert kl["IPO"] < kl["DPO"]

# %% [markdown]
# ## Length bias
#
# First a reference that ends half of its answers with the filler.

# %%
#| label: data-length
from nemo_rl_ref.custom.pairwise import LengthNormalizedDPOLossFn
from nemo_rl_ref.custom.reference_free import SimPOLossFn

LENGTH_STEPS = 32
LONGER = 0.8  # of the chosen answers
SAME_BETA, LARGE_BETA = 0.5, 2.0  # for means over tokens; 0.5 is BETA times the mean length
rng = random.Random(7)
both_forms = [
    {
        "prompt": prompt(problem),
        "chosen": answer(problem) + rng.choice(["", FILLER]),
        "rejected": "0" if answer(problem) != "0" else "1",
    }
    for problem in rng.sample(train_problems, 64 * PAIRS)
]
imitate = DPOLossFn(config(preference_loss_weight=0.0, sft_loss_weight=1.0))
fifty_fifty = last(fit(imitate, batches_of(both_forms, 64, 0), learning_rate=1e-3)).eval()

length_tests = {
    "right is longer": held_out_batch(padded(HELD_OUT, 99, 1.0), fifty_fifty),
    "right is shorter": held_out_batch(padded(HELD_OUT, 99, 0.0), fifty_fifty),
}


def share_with_filler(policy):
    samples = sample_responses(policy, tokenizer, prompts, max_new_tokens=8, seed=5)
    texts = samples.texts(tokenizer)
    return sum("=" in text for text in texts) / len(texts)


length_contenders = {
    "DPO": (DPOLossFn(config()), LONGER),
    **{
        f"normalized DPO, β={beta:g}": (
            LengthNormalizedDPOLossFn(config(reference_policy_kl_penalty=beta)),
            LONGER,
        )
        for beta in (SAME_BETA, LARGE_BETA)
    },
    f"SimPO, β={LARGE_BETA:g}": (
        SimPOLossFn(config(reference_policy_kl_penalty=LARGE_BETA)),
        LONGER,
    ),
    "DPO, balanced pairs": (DPOLossFn(config()), 0.5),
}
length_runs = {name: [] for name in length_contenders}
for seed in SEEDS:
    data = {
        share: batches_of(
            padded(TRAIN[: LENGTH_STEPS * PAIRS], seed, share), LENGTH_STEPS, seed, fifty_fifty
        )
        for share in (0.5, LONGER)
    }
    for name, (loss_fn, share) in length_contenders.items():
        policy = last(fit(loss_fn, data[share], start=fifty_fifty))
        result = {
            f"accuracy, {which}": pair_metrics(policy, test)["accuracy"]
            for which, test in length_tests.items()
        }
        length_runs[name].append({**result, "answers with filler": share_with_filler(policy)})
filler_before = share_with_filler(fifty_fifty)
table(length_runs, [*result, "answers with filler"])

# %%
#| label: fig-data-length
#| alt: For each of five contenders, accuracy on held-out pairs whose right answer is longer and on
#|   those whose right answer is shorter. DPO and length-normalized DPO have nearly all of the first
#|   and few of the second. SimPO has most of the second and fewer of the first. DPO on balanced
#|   pairs has most of both.
#| caption: Two tests that separate the correct answer from the longer one.
figure, (axis,) = panels(1, height=2.6)
dots(axis, length_runs, "accuracy, right is longer", 0, "right answer is longer")
dots(axis, length_runs, "accuracy, right is shorter", 1, "right answer is shorter")
axis.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.08))
axis.set_title("Held-out pairs in the right order")
axis.set_xlim(-0.05, 1.05)

# %%
#| label: data-length-numbers
#| num: length-before = {filler_before:.0%}
#| num: length-steps = {LENGTH_STEPS}
#| num: length-share = {LONGER:.0%}
#| num: length-beta-same = {SAME_BETA:g}
#| num: length-beta-large = {LARGE_BETA:g}
#| num: length-dpo-shorter = {shorter[dpo]:.0%}
#| num: length-dpo-longer = {longer[dpo]:.0%}
#| num: length-dpo-filler = {filler[dpo]:.0%}
#| num: length-mean-shorter = {shorter[normalized]:.0%}
#| num: length-mean-filler = {filler[normalized]:.0%}
#| num: length-large-shorter = {shorter[larger_beta]:.0%}
#| num: length-large-filler = {filler[larger_beta]:.0%}
#| num: length-simpo-shorter = {shorter[simpo]:.0%}
#| num: length-simpo-longer = {longer[simpo]:.0%}
#| num: length-simpo-filler = {filler[simpo]:.0%}
#| num: length-balanced-shorter = {shorter[balanced]:.0%}
#| num: length-balanced-longer = {longer[balanced]:.0%}
shorter, longer, filler = (
    {name: mean(results, quantity) for name, results in length_runs.items()}
    for quantity in (
        "accuracy, right is shorter",
        "accuracy, right is longer",
        "answers with filler",
    )
)
dpo, normalized, larger_beta, simpo, balanced = length_runs
for biased in (dpo, normalized, larger_beta):
    assert longer[biased] > 0.8 and shorter[biased] < shorter[balanced] - 0.15
for biased in (dpo, normalized):
    assert shorter[biased] < 0.4 and filler[biased] > filler_before + 0.2
assert shorter[simpo] > shorter[dpo] + 0.25 and longer[simpo] < longer[dpo] - 0.1
assert abs(filler[simpo] - filler_before) < 0.1  # about as before training
for unbiased in (simpo, balanced):
    assert filler[unbiased] < filler[dpo] - 0.15

# %% [markdown]
# ## Ties

# %%
#| label: data-ties
from nemo_rl_ref.custom.reward_aware import RPOLossFn

TIES, TIED_PAIRS, REWARD_SCALE = 0.75, 512, 3.0


def add_rewards(batches):
    """What RPO needs: the known reward of every row, here 1 for the sum and 0 for the rest."""
    for batch in batches:
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        rewards = [float(is_correct(*_split(text))) for text in texts]
        batch["gt_rewards"] = torch.tensor(rewards, device=batch["input_ids"].device)
    return batches


def _split(text):
    question, given = text.split("=", maxsplit=1)
    return question + "=", given


ties_contenders = {
    "DPO": (DPOLossFn(config()), "all"),
    "IPO": (IPOLossFn(config()), "all"),
    "RPO, rewards known": (RPOLossFn(config(gt_reward_scale=REWARD_SCALE)), "all"),
    "DPO, ties dropped": (DPOLossFn(config()), "clear"),
}
ties_runs = {name: [] for name in ties_contenders}
for seed in SEEDS:
    pairs = tied(TRAIN[:TIED_PAIRS], seed, TIES)
    tie_pairs = [pair for pair in pairs if is_tie(pair)]
    clear_pairs = [pair for pair in pairs if not is_tie(pair)]
    data = {
        "all": add_rewards(batches_of(pairs, STEPS, seed)),
        "clear": batches_of(clear_pairs, STEPS, seed),
    }
    tie_test = held_out_batch(tie_pairs)
    for name, (loss_fn, which) in ties_contenders.items():
        policy = last(fit(loss_fn, data[which]))
        on_ties = pair_metrics(policy, tie_test)
        ties_runs[name].append(
            {
                "accuracy": pair_metrics(policy, noise_test)["accuracy"],
                "margin on ties (nats)": on_ties["rewards_chosen_mean"]
                - on_ties["rewards_rejected_mean"],
            }
        )
table(ties_runs, ["accuracy", "margin on ties (nats)"])

# %%
#| label: fig-data-ties
#| alt: Above, accuracy on clean held-out pairs. DPO and IPO trained on all pairs are at or below
#|   0.5, RPO and DPO without the ties well above. Below, the margin on the ties that were trained
#|   on, largest for DPO, smaller for IPO, near zero for the other two.
#| caption: Above, accuracy on clean held-out pairs; the gray line is chance. Below, how much the
#|   policy learned of labels that mean nothing.
figure, (above, below) = panels(2, height=2.1)
dots(above, ties_runs, "accuracy")
above.axvline(0.5, color="#777777", linewidth=1)
above.set_title("Clean pairs in the right order")
dots(below, ties_runs, "margin on ties (nats)", 1)
below.axvline(0.0, color="#777777", linewidth=1)
below.set_title("Margin on trained ties (nats)")

# %%
#| label: data-ties-numbers
#| num: ties-share = {TIES:.0%}
#| num: ties-target = {REWARD_SCALE / BETA:g}
#| num: ties-bound = {1 / (2 * BETA):g}
#| num: ties-dpo = {accuracy[dpo]:.1%}
#| num: ties-dpo-margin = {on_ties[dpo]:.2f}
#| num: ties-ipo = {accuracy[ipo]:.1%}
#| num: ties-ipo-margin = {on_ties[ipo]:.2f}
#| num: ties-rpo = {accuracy[rpo]:.1%}
#| num: ties-rpo-margin = {on_ties[rpo]:.2f}
#| num: ties-rpo-low = {100 * gains[rpo].low:.0f}
#| num: ties-rpo-high = {100 * gains[rpo].high:.0f}
#| num: ties-dropped = {accuracy[dropped]:.1%}
#| num: ties-dropped-low = {100 * gains[dropped].low:.0f}
#| num: ties-dropped-high = {100 * gains[dropped].high:.0f}
accuracy, on_ties = (
    {name: mean(results, quantity) for name, results in ties_runs.items()}
    for quantity in ("accuracy", "margin on ties (nats)")
)
dpo, ipo, rpo, dropped = ties_runs
assert max(accuracy[dpo], accuracy[ipo]) < 0.55
gains = {name: difference(ties_runs, name, dpo) for name in (ipo, rpo, dropped)}
assert gains[ipo].low < 0 < gains[ipo].high and gains[rpo].low > 0 and gains[dropped].low > 0
assert on_ties[dpo] > on_ties[ipo] > on_ties[rpo] and abs(on_ties[rpo]) < on_ties[dpo] / 2
assert on_ties[ipo] < 0.5 / (2 * BETA)  # far from its bound

# %% [markdown]
# ## Three symptoms

# %%
SICK_STEPS, KL_EVERY, EASY_PAIRS = 36, 12, 32
hard = TRAIN[: SICK_STEPS * PAIRS]  # right against the model's own mistake
easy = noisy(TRAIN[:EASY_PAIRS], 0, 0.0)  # right against random, seen many times
RATES = {"easy": 1e-3, "hard": LEARNING_RATE, "too large": 3e-3}
symptoms = {  # name: data, then keys and learning rate of the run before and after the cure
    "chosen log-probability falls": (
        "hard",
        ({}, RATES["hard"]),
        ({"sft_loss_weight": 0.1}, RATES["hard"]),
    ),
    "margin explodes": (
        "easy",
        ({"reference_policy_kl_penalty": 0.01}, RATES["easy"]),
        ({"reference_policy_kl_penalty": 1.0}, RATES["easy"]),
    ),
    "KL drifts": (
        "hard",
        ({"sft_loss_weight": 0.1}, RATES["too large"]),
        ({"sft_loss_weight": 0.1}, RATES["hard"]),
    ),
}


def record(batches, keys, rate):
    """NeMo RL's metrics of every step, and the KL divergence at some."""
    history, drift = [], [0.0]
    run = fit(DPOLossFn(config(**keys)), batches, learning_rate=rate)
    for step, (policy, metrics) in enumerate(run, start=1):
        history.append(metrics)
        if step % KL_EVERY == 0:
            samples = sample_responses(policy, tokenizer, prompts, max_new_tokens=5, seed=5)
            drift.append(response_kl(policy, reference, samples))
    return {**{name: [step[name] for step in history] for name in history[0]}, "KL": drift}


symptom_runs = {(name, state): [] for name in symptoms for state in ("before", "after")}
for seed in SEEDS:
    data = {
        "hard": batches_of(hard, SICK_STEPS, seed),
        "easy": batches_of(easy, SICK_STEPS, seed),
    }
    done = {}  # one run is the cure of two symptoms
    for name, (which, *settings) in symptoms.items():
        for state, (keys, rate) in zip(("before", "after"), settings, strict=True):
            what = (which, tuple(keys.items()), rate)
            if what not in done:
                done[what] = record(data[which], keys, rate)
            symptom_runs[name, state].append(done[what])


# %%
#| label: fig-symptoms
#| alt: Three panels over training steps, each with a run before the cure and one after it. Chosen
#|   log-ratio falls well below zero before and stays near zero after. The margin climbs steadily
#|   before and stays low after. KL rises before and stays low after.
#| caption: One wrong key, and the same run with that key set right. Lines are means over the
#|   seeds, bands reach from the lowest to the highest.
def margins(run):
    pairs = zip(run["rewards_chosen_mean"], run["rewards_rejected_mean"], strict=True)
    return [chosen - rejected for chosen, rejected in pairs]


shown = {
    "chosen log-probability falls": (
        "train/rewards_chosen_mean (nats)",
        lambda run: run["rewards_chosen_mean"],
        ("sft_loss_weight=0", "sft_loss_weight=0.1"),
    ),
    "margin explodes": (
        "train/rewards_chosen_mean − rewards_rejected_mean (nats)",
        margins,
        ("reference_policy_kl_penalty=0.01", "reference_policy_kl_penalty=1"),
    ),
    "KL drifts": (
        "KL of sampled answers (nats; NeMo RL logs none)",
        lambda run: run["KL"],
        ("lr=3e-3", "lr=3e-4"),
    ),
}

figure, axes = panels(3)
for axis, (name, (title, quantity, labels)) in zip(axes, shown.items(), strict=True):
    for line, (state, label) in enumerate(zip(("before", "after"), labels, strict=True)):
        lines = [quantity(run) for run in symptom_runs[name, state]]
        first, every = (0, KL_EVERY) if name == "KL drifts" else (1, 1)
        steps = list(range(first, SICK_STEPS + 1, every))
        band(axis, steps, lines, f"{state}: {label}", 1 - line)
    axis.set_title(title)
    axis.legend(fontsize=9)
axes[-1].set_xlabel("optimizer steps")

# %%
#| label: symptoms-numbers
#| num: symptom-first-loss = {statistics.mean(first_losses):.4f}
#| num: symptom-first-reward = {f"{first_reward:.0e}" if first_reward else "0"}
#| num: symptom-sft =
#|   {symptoms['chosen log-probability falls'][2][0]['sft_loss_weight']:g}
#| num: symptom-easy = {EASY_PAIRS}
#| num: symptom-epochs = {SICK_STEPS * PAIRS // EASY_PAIRS}
#| num: symptom-beta-before =
#|   {symptoms['margin explodes'][1][0]['reference_policy_kl_penalty']:g}
#| num: symptom-beta-after =
#|   {symptoms['margin explodes'][2][0]['reference_policy_kl_penalty']:g}
#| num: symptom-rate-before = {RATES['too large']:g}
#| num: symptom-rate-after = {RATES['hard']:g}
#| num: symptom-chosen-before = {sick['chosen']:+.2f}
#| num: symptom-margin-before = {sick['margin']:.1f}
#| num: symptom-accuracy-before = {sick['accuracy']:.0%}
#| num: symptom-rewards-before = {sick['rewards']:+.2f}
#| num: symptom-drift-accuracy-before = {sick['drift_accuracy']:.0%}
#| num: symptom-kl-before = {sick['kl']:.2f}
#| num: symptom-chosen-after = {cured['chosen']:+.2f}
#| num: symptom-margin-after = {cured['margin']:.1f}
#| num: symptom-accuracy-after = {cured['accuracy']:.0%}
#| num: symptom-rewards-after = {cured['rewards']:+.2f}
#| num: symptom-drift-accuracy-after = {cured['drift_accuracy']:.0%}
#| num: symptom-kl-after = {cured['kl']:.2f}
TAIL = 5  # steps at the end that are averaged


def at_end(name, state, quantity):
    runs = symptom_runs[name, state]
    return statistics.mean(statistics.mean(quantity(run)[-TAIL:]) for run in runs)


def metric(name):
    return lambda run: run[name]


def rewards(run):
    both = zip(run["rewards_chosen_mean"], run["rewards_rejected_mean"], strict=True)
    return [(chosen + rejected) / 2 for chosen, rejected in both]


found = {
    state: {
        "chosen": at_end("chosen log-probability falls", state, metric("rewards_chosen_mean")),
        "margin": at_end("margin explodes", state, margins),
        "accuracy": at_end("margin explodes", state, metric("accuracy")),
        "rewards": at_end("KL drifts", state, rewards),
        "drift_accuracy": at_end("KL drifts", state, metric("accuracy")),
        "kl": statistics.mean(run["KL"][-1] for run in symptom_runs["KL drifts", state]),
    }
    for state in ("before", "after")
}
sick, cured = found["before"], found["after"]
assert sick["chosen"] < cured["chosen"] - 0.3 and sick["chosen"] < -0.7
assert sick["margin"] > 1.3 * cured["margin"]
halfway = statistics.mean(
    margins(run)[SICK_STEPS // 2] for run in symptom_runs["margin explodes", "before"]
)
assert sick["margin"] > halfway + 1  # it still climbs
assert min(sick["accuracy"], cured["accuracy"]) > 0.85
assert sick["kl"] > 3 * cured["kl"]
assert sick["rewards"] < 2 * cured["rewards"] < 0
assert sick["drift_accuracy"] < cured["drift_accuracy"] + 0.05  # nothing gained

first = [run for runs in symptom_runs.values() for run in runs]
first_losses = [run["preference_loss"][0] for run in first]
first_reward = max(abs(run["rewards_chosen_mean"][0]) for run in first)
assert all(abs(loss - math.log(2)) < 1e-3 for loss in first_losses) and first_reward < 1e-3
