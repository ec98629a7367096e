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
# # Custom GRPO, step by step
#
# You will take one GRPO step apart, compare GRPO with its variants, give it a reward, an advantage
# estimator and a loss of your own, watch a reward being gamed, and lay a run beside TRL's trainer.
# The text that explains the steps is on the page
# [Custom GRPO Implementation](../docs/advanced/algorithm-development/custom-grpo.md).
#
# The notebook runs on a CPU. Where PyTorch sees a CUDA device it uses that, and longer runs.

# %%
#| label: grpo-setup
import itertools
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf

from nemo_rl_ref import tiny
from nemo_rl_ref.files.shipped import shipped
from nemo_rl_ref.rl.rewards import exact_match
from nemo_rl_ref.rl.trainer import RLTrainer
from nemo_rl_ref.training.samples import Batches
from nemo_rl_ref.utils.config import load_config, parse_hydra_overrides

warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, not ours
transformers.utils.logging.disable_progress_bar()

on_gpu = torch.cuda.is_available()
STEPS = 96 if on_gpu else 24  # a run; each step samples once and updates twice
SEEDS = range(5 if on_gpu else 3)  # a seed decides the order of the prompts and what is sampled
PROBLEMS = 32  # sums to train on

CONFIG = shipped("configs/grpo_tiny.yaml")
problems = Path(tempfile.mkdtemp()) / "problems.jsonl"
lines = tiny.TRAIN_PROBLEMS.read_text().splitlines(keepends=True)
problems.write_text("".join(lines[:PROBLEMS]))

SIZES = [
    f"policy.model_name={tiny.MODEL}",
    f"data.train.data_path={problems}",
    f"data.validation.data_path={problems}",
    "grpo.num_prompts_per_step=16",
    "grpo.num_generations_per_prompt=8",
    "policy.train_global_batch_size=64",
    "policy.train_micro_batch_size=64",
    "policy.scheduler.0.kwargs.total_iters=5",
]


def settings(*overrides):
    """NeMo RL's configuration as a plain dict, overridden as on its command line."""
    config = parse_hydra_overrides(load_config(CONFIG), [*SIZES, *overrides])
    return OmegaConf.to_container(config, resolve=True)


# %% [markdown]
# ## One step, in pieces

# %%
#| label: grpo-prompts
GROUP = 6
SMALL = [
    "grpo.num_prompts_per_step=4",
    f"grpo.num_generations_per_prompt={GROUP}",
    "policy.train_global_batch_size=12",
    "policy.train_micro_batch_size=12",
    "policy.scheduler.0.kwargs.start_factor=1.0",
    "policy.optimizer.kwargs.lr=5e-5",
]
trainer = RLTrainer(settings(*SMALL), environment=exact_match)
prompts = [trainer.train_prompts[number] for number in Batches(PROBLEMS, 4, seed=0)[0]]
for prompt in prompts:
    print(f"{prompt.text!r:16} truth {prompt.truth:4} ids {prompt.ids.tolist()}")

# %%
#| label: grpo-group
from nemo_rl_ref.rl.rollouts import roll_out

batch, rollout_metrics = roll_out(
    trainer.policy.model,
    trainer.tokenizer,
    prompts,
    trainer.policy_config,
    trainer.sampling,
    copies=GROUP,
    seed=4,
    accelerator=trainer.accelerator,
)
for name in ("input_ids", "generation_logprobs", "length", "input_lengths", "total_reward"):
    print(f"{name:20} {batch[name].dtype!s:14} {tuple(batch[name].shape)}")
rewards = batch["total_reward"]
assert rewards.tolist() == [
    float(text == prompt.truth)
    for text, prompt in zip(
        batch["content"], [p for p in prompts for _ in range(GROUP)], strict=True
    )
]


# %%
#| label: grpo-group-table
from IPython.display import Markdown


def grouped(*columns):
    """A table with a row for each group and the columns' values of its answers."""
    head = ["prompt", *(name for name, _ in columns)]
    rows = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for group, prompt in enumerate(prompts):
        span = slice(group * GROUP, (group + 1) * GROUP)
        cells = [" ".join(f"`{cell}`" for cell in column[span]) for _, column in columns]
        rows.append(f"| `{prompt.text}` | " + " | ".join(cells) + " |")
    return Markdown("\n".join(rows))


grouped(("answers", batch["content"]), ("rewards", [f"{r:.0f}" for r in rewards]))

# %%
#| label: grpo-advantages
#| num: grpo-groups = {len(prompts)}
#| num: grpo-group-size = {GROUP}
#| num: grpo-silent = {(spread == 0).sum().item()}
data, _ = trainer.add_logprobs(batch)
trainer.add_advantages(batch, data)
groups = rewards.view(-1, GROUP)
deviation = groups - groups.mean(1, keepdim=True)
spread = groups.std(1, keepdim=True)
by_hand = torch.where(spread > 0, deviation / (spread + 1e-6), deviation).flatten()
torch.testing.assert_close(data["advantages"], by_hand[:, None].expand_as(data["advantages"]))
print("advantages", tuple(data["advantages"].shape))

# %%
#| label: grpo-advantages-table
grouped(("rewards", [f"{r:.0f}" for r in rewards]), ("advantages", [f"{a:.2f}" for a in by_hand]))

# %%
#| label: grpo-batch
READ = (
    "input_ids",
    "token_mask",
    "sample_mask",
    "prev_logprobs",
    "generation_logprobs",
    "advantages",
)
for name in READ:
    print(f"{name:20} {data[name].dtype!s:14} {tuple(data[name].shape)}")

# %%
#| label: grpo-batch-table
right = int(rewards.argmax())  # an answer with a reward, if there is one
rows = ["| token | `token_mask` | `prev_logprobs` | `advantages` |", "| --- " * 4 + "|"]
for column, token in enumerate(trainer.tokenizer.convert_ids_to_tokens(data["input_ids"][right])):
    mask, old, advantage = (
        data[name][right, column].item() for name in ("token_mask", "prev_logprobs", "advantages")
    )
    rows.append(f"| `{token}` | {mask} | {old:.3f} | {advantage:.2f} |")
Markdown("\n".join(rows))

# %%
#| label: grpo-loss
#| num: grpo-loss-error = {f"to {loss_error:.0e}" if loss_error else "exactly"}
#| num: grpo-gradient-error = {gradient_error:.0e}
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.rl.generate import response_logprobs
from nemo_rl_ref.training.step import valid_counts

loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
seqs, toks = valid_counts(data)
logprobs = response_logprobs(trainer.policy.model, data, trainer.sampling)  # with a gradient
loss, metrics = loss_fn(logprobs, data, seqs, toks)
(gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)

# On policy every ratio is 1: minus the mean advantage, and a gradient of -advantage / tokens.
mask, advantages = data["token_mask"][:, 1:], data["advantages"][:, 1:]
loss_error = (loss + (advantages * mask).sum() / mask.sum()).abs().item()
gradient_error = (gradient + advantages * mask / mask.sum()).abs().max().item()
assert loss_error < 1e-5 and gradient_error < 1e-5

# CISPO clips another thing, and ratios of 1 are not clipped: the same gradient.
cispo = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, use_cispo=True))
(same,) = torch.autograd.grad(cispo(logprobs, data, seqs, toks)[0], logprobs, retain_graph=True)
assert (same - gradient).abs().max() < 1e-6
print(f"next_token_logprobs {tuple(logprobs.shape)}, {seqs:.0f} answers, {toks:.0f} tokens")
print(f"loss {loss:.4f}, mean ratio {metrics['probs_ratio']:.4f}")

# %%
#| label: grpo-update
#| num: grpo-up = {up:+.2f}
#| num: grpo-down = {down:+.2f}
#| num: grpo-ratio-max = {metrics['probs_ratio_max']:.2f}
before = logprobs.detach().sum(1)
metrics = trainer.update_policy(data)
with torch.no_grad():
    after = response_logprobs(trainer.policy.model, data, trainer.sampling).sum(1)
change, better = after - before, by_hand > 0
for name in ("loss", "grad_norm", "probs_ratio_min", "probs_ratio_max", "lr"):
    print(f"{name:16} {metrics[name]:.4g}")
assert (change * by_hand).sum() > 0  # along the advantages
up, down = change[better].mean().item(), change[by_hand < 0].mean().item()
assert up > down

# %%
#| label: grpo-update-table
grouped(
    ("rewards", [f"{r:.0f}" for r in rewards]),
    ("change of log-probability", [f"{c:+.2f}" for c in change]),
)

# %% [markdown]
# ## GRPO against its variants

# %%
#| label: grpo-run
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.rl.generate import response_logprobs


def right_answers(prompts, tokenizer):
    """Every prompt with its right answer and the end token, as rows."""
    ends = [
        tokenizer(prompt.truth, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for prompt in prompts
    ]
    rows = [torch.cat([p.ids, torch.tensor(end)]) for p, end in zip(prompts, ends, strict=True)]
    return BatchedDataDict(
        {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "input_lengths": torch.tensor([len(row) for row in rows]),
            "prompt_lengths": torch.tensor([len(prompt.ids) for prompt in prompts]),
        }
    )


@torch.no_grad()
def accuracy(model, prompts, trainer):
    """The probability of sampling exactly the right answer, mean over the prompts: no sampling."""
    rows = right_answers(prompts, trainer.tokenizer).to(model.device)
    return response_logprobs(model, rows, trainer.sampling).sum(1).exp().mean().item()


def run(seed, *overrides, environment=exact_match, loss_fn=None, estimator=None):
    """Train a fresh copy of the policy. Return reward, length and accuracy, by step."""
    trainer = RLTrainer(
        settings(f"grpo.seed={seed}", *overrides), environment=environment, loss_fn=loss_fn
    )
    if estimator is not None:
        trainer.estimator = estimator
    size, model = trainer.cfg.num_prompts_per_step, trainer.policy.model
    order = Batches(PROBLEMS, size, seed, max_epochs=STEPS)
    prompts = ([trainer.train_prompts[number] for number in numbers] for numbers in order)
    found = {name: {} for name in ("reward", "length", "mixed")}
    found["accuracy"] = {0: accuracy(model, trainer.train_prompts, trainer)}
    for step in range(1, STEPS + 1):
        metrics = trainer.step(prompts, step - 1)
        found["reward"][step] = metrics["reward"]
        found["length"][step] = metrics["mean_gen_tokens_per_sample"]
        found["mixed"][step] = metrics["baseline_reward/pct_mixed"]
        if step % (STEPS // 8) == 0:
            found["accuracy"][step] = accuracy(model, trainer.train_prompts, trainer)
    return found


# %%
#| label: grpo-compare
from nemo_rl_ref.custom.policy_gradient import DrGRPOLossFn

dr_grpo = DrGRPOLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, max_response_length=5))
variants = {
    "GRPO": ([], None),
    "leave one out, undivided": (
        ["grpo.use_leave_one_out_baseline=true", "grpo.normalize_rewards=false"],
        None,
    ),
    "Dr. GRPO": (["grpo.normalize_rewards=false"], dr_grpo),
    "mean over answers": (["loss_fn.token_level_loss=false"], None),
    "GSPO": (
        [
            "loss_fn.sequence_level_importance_ratios=true",
            "loss_fn.token_level_loss=false",
            "loss_fn.ratio_clip_min=3e-4",
            "loss_fn.ratio_clip_max=4e-4",
        ],
        None,
    ),
    "CISPO": (
        ["++loss_fn.use_cispo=true", "loss_fn.ratio_clip_min=1.0", "loss_fn.ratio_clip_max=5.0"],
        None,
    ),
}
runs = {
    name: [run(seed, *overrides, loss_fn=loss) for seed in SEEDS]
    for name, (overrides, loss) in variants.items()
}


# %%
#| label: grpo-compare-table
def at_end(of_seeds, quantity="accuracy"):
    """Mean and standard deviation over the seeds, at the last step."""
    finals = [list(found[quantity].values())[-1] for found in of_seeds]
    return statistics.mean(finals), statistics.stdev(finals)


start = runs["GRPO"][0]["accuracy"][0]
table = ["| | keys | accuracy |", "| --- " * 3 + "|", f"| before | | {start:.3f} |"]
for name, (overrides, loss) in variants.items():
    keys = [f"`{key}`" for key in overrides] + [f"`{type(loss).__name__}`"] * (loss is not None)
    mean, deviation = at_end(runs[name])
    table.append(f"| {name} | {'<br>'.join(keys)} | {mean:.3f}\u00a0±\u00a0{deviation:.3f} |")
Markdown("\n".join(table))

# %%
#| label: grpo-numbers
#| num: grpo-steps = {STEPS}
#| num: grpo-seeds = {len(SEEDS)}
#| num: grpo-problems = {PROBLEMS}
#| num: grpo-start = {start:.1%}
#| num: grpo-best = {max(means):.1%}
#| num: grpo-worst = {min(means):.1%}
#| num: grpo-noise = {100 * noise:.1f}
#| num: grpo-difference-error = {100 * error:.1f}
#| num: grpo-range = {100 * (max(means) - min(means)):.1f}
#| num: grpo-range-by-chance = {100 * by_chance:.1f}
# What the page says of these runs. If it stops being true, the build stops.
finals = {name: at_end(of_seeds) for name, of_seeds in runs.items()}
means = [mean for mean, _ in finals.values()]
assert min(means) > 1.3 * start  # all of them learn
noise = statistics.mean(deviation**2 for _, deviation in finals.values()) ** 0.5
error = noise * (2 / len(SEEDS)) ** 0.5  # of a difference of two means
# Mean range of as many equal means: 2.53 standard errors for six, from simulated normal numbers.
torch.manual_seed(0)
draws = torch.randn(100_000, len(means))
by_chance = (draws.amax(1) - draws.amin(1)).mean().item() * noise / len(SEEDS) ** 0.5

# %%
#| label: grpo-figure
#| alt: Above, the probability of the right answer over training steps for GRPO, leave-one-out
#|   without division, and Dr. GRPO, all rising. Below, the same at the last step for all six
#|   variants, a dot a seed and a bar of one standard deviation.
#| caption: The share of right answers on the problems trained on. Bands reach from the lowest seed
#|   to the highest; bars are one standard deviation over the seeds.
from nemo_rl_ref.show.figures import LINES, band, panels

figure, (above, below) = panels(2, height=2.9)
for line, name in enumerate(("GRPO", "leave one out, undivided", "Dr. GRPO")):
    curves = [found["accuracy"] for found in runs[name]]
    band(above, list(curves[0]), [list(curve.values()) for curve in curves], name, line)
above.set_title("Probability of the right answer")
above.set_xlabel("steps")
above.legend(fontsize=9)
for row, (name, (mean, deviation)) in enumerate(finals.items()):
    dots = [list(found["accuracy"].values())[-1] for found in runs[name]]
    below.plot(dots, [row] * len(dots), "o", color=LINES[0]["color"], alpha=0.4)
    below.errorbar(mean, row, xerr=deviation, fmt="|", color="black", capsize=4)
below.axvline(start, color="gray", linestyle=":", label="before")
below.set_yticks(range(len(finals)), list(finals))
below.invert_yaxis()
below.set_title("The same after the last step")
below.legend(fontsize=9, loc="upper right");

# %% [markdown]
# ## A reward, an estimator and a loss of one's own

# %%
#| label: grpo-custom
import torch

from nemo_rl_ref.algorithms.advantage_estimator import AdvEstimatorConfig
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.utils import calculate_baseline_and_std_per_prompt


def partial_credit(prompt: str, response: str, ground_truth: str) -> float:
    """1 for the right answer; half the share of right characters for others of its length.

    The answer is what the last box holds, or all of the response if it has none.
    """
    answer = response.rpartition(r"\boxed{")[2].partition("}")[0]
    if answer == ground_truth:
        return 1.0
    if len(answer) != len(ground_truth):
        return 0.0
    same = sum(a == b for a, b in zip(answer, ground_truth, strict=True))
    return 0.5 * same / len(ground_truth)


class BatchStdEstimator:
    """The reward less its group's mean, divided by the standard deviation of the whole batch.

    One divisor for all prompts: rewards may be on any scale, and no prompt weighs more than
    another for being easy or hard.
    """

    def __init__(self, estimator_config: AdvEstimatorConfig, loss_config: ClippedPGLossConfig):
        pass

    def compute_advantage(self, prompt_ids, rewards, mask, **kwargs):
        baseline, _ = calculate_baseline_and_std_per_prompt(
            prompt_ids, rewards, torch.ones_like(rewards), leave_one_out_baseline=False
        )
        deviation = rewards - baseline
        size = deviation.square().mean().sqrt()
        advantages = deviation / size if size > 0 else deviation
        return advantages.unsqueeze(-1).expand(mask.shape)


class ConstantLengthLossFn(ClippedPGLossFn):
    """GRPO's loss divided by a constant number of tokens an answer, as in Dr. GRPO.

    The constant is the config key `loss_fn.max_response_length`.
    """

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.length = getattr(cfg, "max_response_length", 0)
        if not (self.length > 0 and cfg.token_level_loss):
            raise ValueError(
                f"max_response_length: got {self.length}, token_level_loss: got "
                f"{cfg.token_level_loss}; expected a positive number and true"
            )

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks, **kwargs):
        loss, metrics = super().__call__(
            next_token_logprobs, data, global_valid_seqs, global_valid_toks, **kwargs
        )
        # A mean over tokens times their number, divided by a number that was not sampled.
        scale = (global_valid_toks + 1e-8) / (global_valid_seqs * self.length)
        loss = loss * scale
        return loss, {**metrics, "loss": loss.item()}


# %%
#| label: grpo-custom-checks
#| num: grpo-scale-error = {f"by {scale_error:.0e}" if scale_error else "not at all"}
#| num: grpo-custom-error = {custom_error:.0e}
# The reward: right answers first, then those that are nearly right.
assert partial_credit("", "123", "123") == 1.0 > partial_credit("", "124", "123") > 0.3
assert partial_credit("", r"So it is \boxed{123}.", "123") == 1.0
assert partial_credit("", "1234", "123") == partial_credit("", "", "123") == 0.0

# The estimator: no mean within a group, one size for the batch, blind to the rewards' scale.
estimator = BatchStdEstimator(AdvEstimatorConfig(), ClippedPGLossConfig())
torch.manual_seed(0)
prompt_ids = torch.arange(5).repeat_interleave(8)[:, None]
scores, every = torch.rand(40, dtype=torch.float64), torch.ones(40, 6)
estimates = estimator.compute_advantage(prompt_ids, scores, every)
assert estimates.shape == every.shape
sums = estimates[:, 0].view(5, 8).sum(1).abs().max().item()
scaled = estimator.compute_advantage(prompt_ids, 100 * scores - 7, every)
scale_error = (scaled - estimates).abs().max().item()
assert sums < 1e-12 and scale_error < 1e-12
assert abs(estimates[:, 0].square().mean().item() - 1) < 1e-12
assert estimator.compute_advantage(prompt_ids, torch.ones(40), every).abs().max() == 0

# The loss: Dr. GRPO's, and micro-batches add up.
wide = {
    name: data[name].double() if data[name].is_floating_point() else data[name]
    for name in ("input_ids", "token_mask", "sample_mask", "prev_logprobs", "generation_logprobs")
}
wide["advantages"] = torch.randn(data.size, 1, dtype=torch.float64).expand(data["advantages"].shape)
here_logprobs = wide["prev_logprobs"][:, 1:] + 0.3 * torch.randn_like(wide["prev_logprobs"][:, 1:])
counts = wide["sample_mask"].sum(), wide["token_mask"][:, 1:].sum().double()
config = ClippedPGLossConfig(reference_policy_kl_penalty=0.0, max_response_length=8)
constant = ConstantLengthLossFn(config)
whole, _ = constant(here_logprobs, wide, *counts)
theirs, _ = DrGRPOLossFn(config)(here_logprobs, wide, *counts)
parts = sum(
    constant(here_logprobs[part], {k: v[part] for k, v in wide.items()}, *counts)[0]
    for part in (slice(0, 5), slice(5, None))
)
custom_error, split_error = (whole - theirs).abs().item(), (whole - parts).abs().item()
assert custom_error < 1e-7 and split_error < 1e-12

# %%
#| label: grpo-custom-run
#| num: grpo-plain-end = {at_end(plain)[0]:.1%}
#| num: grpo-plain-deviation = {100 * at_end(plain)[1]:.1f}
#| num: grpo-custom-end = {at_end(custom)[0]:.1%}
#| num: grpo-custom-deviation = {100 * at_end(custom)[1]:.1f}
#| num: grpo-mixed-exact = {mixed_exact:.0f}%
#| num: grpo-mixed-partial = {mixed_partial:.0f}%
LONGER = [  # room for eight tokens; one update a step
    "policy.generation.max_new_tokens=8",
    "policy.train_global_batch_size=128",
    "policy.train_micro_batch_size=128",
]
plain = [run(seed, *LONGER) for seed in SEEDS]
custom = [
    run(seed, *LONGER, environment=partial_credit, estimator=estimator, loss_fn=constant)
    for seed in SEEDS
]
mixed_exact, mixed_partial = (
    statistics.mean(itertools.chain.from_iterable(found["mixed"].values() for found in of_seeds))
    for of_seeds in (plain, custom)
)
assert at_end(custom)[0] > 1.2 * start and mixed_partial > mixed_exact + 10

# %% [markdown]
# ## A reward that is gamed

# %%
#| label: grpo-hacking


def digits_anywhere(prompt, response, ground_truth):
    """The share of the answer's digits that the response contains, wherever they stand."""
    return sum(digit in response for digit in set(ground_truth)) / len(set(ground_truth))


def longer_is_better(prompt, response, ground_truth):
    """The exact verifier, and a bonus for every character."""
    return float(response == ground_truth) + 0.4 * len(response)


KL = "loss_fn.reference_policy_kl_penalty=0.2"
gamed = {
    "exact": plain,
    "digits anywhere": [run(seed, *LONGER, environment=digits_anywhere) for seed in SEEDS],
    "length bonus": [run(seed, *LONGER, environment=longer_is_better) for seed in SEEDS],
    "length bonus, KL": [run(seed, *LONGER, KL, environment=longer_is_better) for seed in SEEDS],
}


# %%
#| label: grpo-hacking-table
#| num: gamed-right-exact = {right['exact']:.1%}
#| num: gamed-first-digits = {first['digits anywhere']:.2f}
#| num: gamed-reward-digits = {reward['digits anywhere']:.2f}
#| num: gamed-right-digits = {right['digits anywhere']:.1%}
#| num: gamed-first-length = {first['length bonus']:.2f}
#| num: gamed-reward-length = {reward['length bonus']:.2f}
#| num: gamed-right-length = {right['length bonus']:.1%}
#| num: gamed-tokens-length = {tokens['length bonus']:.1f}
#| num: gamed-right-kl = {right['length bonus, KL']:.1%}
#| num: gamed-tokens-kl = {tokens['length bonus, KL']:.1f}
#| num: gamed-beta = {KL.split("=")[1]}
rows = ["| | reward | accuracy | tokens an answer |", "| --- " * 4 + "|"]
for name, of_seeds in gamed.items():
    cells = [
        "{:.2f}\u00a0±\u00a0{:.2f}".format(*at_end(of_seeds, quantity))
        for quantity in ("reward", "accuracy", "length")
    ]
    rows.append(f"| {name} | {' | '.join(cells)} |")

reward, right, tokens = (
    {name: at_end(of_seeds, quantity)[0] for name, of_seeds in gamed.items()}
    for quantity in ("reward", "accuracy", "length")
)
first = {
    name: statistics.mean((found["reward"][1] + found["reward"][2]) / 2 for found in of_seeds)
    for name, of_seeds in gamed.items()
}
# What the page says of these runs.
assert min(right["exact"], right["length bonus, KL"]) > 1.3 * start
for name, least, most in (("digits anywhere", 0.03, 0.8), ("length bonus", 0.3, 0.4)):
    assert reward[name] > first[name] + least  # the reward rises
    assert right[name] < most * right["exact"]  # what it was to measure does not keep up
assert right["length bonus"] < start
assert tokens["length bonus"] > tokens["length bonus, KL"] + 1
Markdown("\n".join(rows))

# %%
#| label: grpo-hacking-figure
#| alt: Above, the mean reward over training steps, rising in all four runs, most for the
#|   length bonus. Below, the probability of the right answer in the same runs, which rises with the
#|   exact verifier and with the KL penalty, and does not with the other two.
#| caption: The reward that is optimized, and what it was meant to measure.
figure, (above, below) = panels(2)
for line, (name, of_seeds) in enumerate(gamed.items()):
    for axis, quantity in ((above, "reward"), (below, "accuracy")):
        steps = list(of_seeds[0]["accuracy"])[1 if quantity == "reward" else 0 :]
        band(axis, steps, [[found[quantity][s] for s in steps] for found in of_seeds], name, line)
above.set_title("Mean reward of a batch")
below.set_title("Probability of the right answer")
below.set_xlabel("steps")
above.legend(fontsize=9);

# %% [markdown]
# ## The same run in TRL
#
# Same weights, problems, group size, answer length, optimizer and warm-up. The prompts come in
# another order and the random numbers are others, so the runs agree in distribution only.

# %%
#| label: grpo-trl
import logging

import datasets
from trl import GRPOConfig, GRPOTrainer

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
logging.getLogger("trl").setLevel(logging.ERROR)


def exactly_right(completions, truth, **rest):
    """TRL's reward function: texts in, one number each out."""
    pairs = zip(completions, truth, strict=True)
    return [float(messages[0]["content"] == wanted) for messages, wanted in pairs]


class Measure(transformers.TrainerCallback):
    """Notes the accuracy of the policy, at the steps at which the other runs are measured."""

    def __init__(self):
        self.found = {"accuracy": {0: start}, "reward": {}}

    def on_step_end(self, args, state, control, model=None, **rest):
        if state.global_step % (STEPS // 8) == 0:
            found = accuracy(model, trainer.train_prompts, trainer)
            self.found["accuracy"][state.global_step] = found

    def on_log(self, args, state, control, logs=None, **rest):
        if "reward" in logs:
            self.found["reward"][state.global_step] = logs["reward"]


def run_trl(seed):
    """Train a fresh copy of the policy with TRL."""
    measure = Measure()
    questions = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt.text.removeprefix("<s>")}],
                "truth": prompt.truth,
            }
            for prompt in trainer.train_prompts
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs = GRPOTrainer(
            model=tiny.load_policy(),
            reward_funcs=exactly_right,
            args=GRPOConfig(
                output_dir=folder,
                seed=seed,
                per_device_train_batch_size=128,
                num_generations=8,
                max_completion_length=8,
                max_steps=STEPS,
                learning_rate=3e-4,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                max_grad_norm=1.0,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not on_gpu,
            ),
            train_dataset=questions,
            processing_class=trainer.tokenizer,
            callbacks=[measure],
        )
        theirs.remove_callback(transformers.PrinterCallback)
        theirs.train()
    return measure.found


trl = [run_trl(seed) for seed in SEEDS]

# %%
#| label: grpo-trl-curve
#| alt: Mean reward and probability of the right answer over training steps, for this trainer and
#|   TRL's; both rise alike.
#| caption: The same GRPO in two trainers, over the seeds.
#| num: grpo-trl-end = {theirs:.1%}
#| num: grpo-trl-deviation = {100 * their_deviation:.1f}
#| num: grpo-trl-apart = {100 * abs(ours - theirs):.1f}
both = {"this trainer": plain, "TRL": trl}
figure, (above, below) = panels(2)
for line, (name, of_seeds) in enumerate(both.items()):
    for axis, quantity in ((above, "reward"), (below, "accuracy")):
        steps = list(of_seeds[0]["accuracy"])[1 if quantity == "reward" else 0 :]
        band(axis, steps, [[found[quantity][s] for s in steps] for found in of_seeds], name, line)
above.set_title("Mean reward of a batch")
below.set_title("Probability of the right answer")
below.set_xlabel("steps")
above.legend(fontsize=9)

(ours, our_deviation), (theirs, their_deviation) = at_end(plain), at_end(trl)
assert min(ours, theirs) > 1.3 * start
