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
# # From data to batch, token by token
#
# You will follow a conversation, a preference pair and a rollout from text to the tensors that a
# loss reads, and make the usual mistakes on purpose to see what each does to a number. The text
# that explains the steps is on the page
# [From Data to Batch](../docs/advanced/algorithm-development/data-to-batch.md).

# %%
#| label: batch-setup
import copy
import json
import math
import tempfile
from pathlib import Path

import torch

from nemo_rl_ref import tiny
from nemo_rl_ref.show.tokens import TokenTable, after_first
from nemo_rl_ref.training.step import next_token_logprobs, valid_counts

tokenizer = tiny.load_tokenizer()
policy = tiny.load_policy().eval()
print(f"{len(tokenizer)} tokens:", *tokenizer.convert_ids_to_tokens(range(len(tokenizer))))


def tokens(ids):
    return tokenizer.convert_ids_to_tokens(ids)


# %% [markdown]
# ## A supervised example

# %%
#| label: batch-record
from nemo_rl_ref.data.datasets.response_datasets import ResponseDataset
from nemo_rl_ref.data.processors import sft_processor

lines = [{"input": "25+99=", "output": "124"}, {"input": "3+4=", "output": "7"}]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "sums.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = ResponseDataset(str(path))

samples = [sft_processor(dataset[i], None, tokenizer, 32, i) for i in range(2)]
for message in samples[1]["message_log"]:
    print(f"{message['role']:10} {message['content']!r:12} {message['token_ids'].tolist()}")

# %%
#| label: batch-sft-collate
from nemo_rl_ref.data.llm_message_utils import (
    add_loss_mask_to_message_log,
    batched_message_log_to_flat_message,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def sft_batch(samples, multiple=1, **mask_options):
    """The steps of NeMo RL's SFT loop between the data loader and the policy."""
    logs = [sample["message_log"] for sample in samples]
    add_loss_mask_to_message_log(logs, **mask_options)
    flat, lengths = batched_message_log_to_flat_message(
        logs, {"token_ids": tokenizer.pad_token_id}, make_sequence_length_divisible_by=multiple
    )
    return BatchedDataDict(
        input_ids=flat["token_ids"],  # (B, S)
        input_lengths=lengths,  # (B,)
        token_mask=flat["token_loss_mask"],  # (B, S)
        sample_mask=torch.tensor([sample["loss_multiplier"] for sample in samples]),  # (B,)
    )


sft = sft_batch(samples, multiple=4)
for name, tensor in sft.items():
    print(f"{name:14} {tensor.dtype!s:14} {tuple(tensor.shape)}")
assert sft["input_ids"].shape == (2, 12)  # the longer row has 11 tokens

# %%
#| label: batch-sft-table
with torch.no_grad():
    logprobs = next_token_logprobs(policy, sft)  # (B, S-1)

row = 1
length = int(sft["input_lengths"][row])
roles = [m["role"] for m in samples[row]["message_log"] for _ in m["token_ids"]]
columns = torch.arange(sft["input_ids"].shape[1] - 1)
sft_table = TokenTable(
    "SFT, row 1: 3+4= answered by 7",
    {
        "position t": range(sft["input_ids"].shape[1]),
        "token": tokens(sft["input_ids"][row]),
        "input_ids": sft["input_ids"][row],
        "role": roles + ["padding"] * (sft["input_ids"].shape[1] - length),
        "token_mask": sft["token_mask"][row],
        "column of next_token_logprobs": after_first(columns),
        "next_token_logprobs (nats)": after_first(logprobs[row]),
    },
    marked=sft["token_mask"][row],
)
sft_table

# %%
#| label: batch-sft-loss
#| num: batch-sft-tokens = {int(counted)}
#| num: batch-sft-loss = {loss:.3f}
from nemo_rl_ref.algorithms.loss import NLLLossFn

loss, _ = NLLLossFn()(logprobs, sft, *valid_counts(sft))
trained = [  # every token of both answers, picked by hand
    logprobs[row, t - 1].item()
    for row, positions in ((0, range(7, 11)), (1, range(5, 7)))
    for t in positions
]
assert math.isclose(loss.item(), -sum(trained) / 6, abs_tol=1e-6)
_, counted = valid_counts(sft)
assert counted == 6

# %% [markdown]
# ### Several turns

# %%
#| label: batch-turns
turns = {
    "messages": [
        {"role": "user", "content": "12+34="},
        {"role": "assistant", "content": "46"},
        {"role": "user", "content": "5+6="},
        {"role": "assistant", "content": "11"},
    ]
}
talk = [sft_processor(turns, None, tokenizer, 32, 0)]
masks = {
    name: sft_batch(talk, only_unmask_final=final)["token_mask"][0]
    for name, final in (("false", False), ("true", True))
}
ids = sft_batch(talk)["input_ids"][0]
assert masks["false"].sum() == 6 and masks["true"].sum() == 3
TokenTable(
    "Two turns, and sft.only_unmask_final",
    {
        "token": tokens(ids),
        "role": [m["role"] for m in talk[0]["message_log"] for _ in m["token_ids"]],
        "token_mask, false": masks["false"],
        "token_mask, true": masks["true"],
    },
    marked=masks["false"],
)

# %% [markdown]
# ### What the template puts before an answer

# %%
#| label: batch-header
HEADER = (  # here "=" is written by the template, as other templates write <|assistant|>
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}={% endif %}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
with_header = copy.deepcopy(tokenizer)
with_header.chat_template = HEADER
record = {
    "messages": [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}]
}
batches = {
    flag: sft_batch([sft_processor(record, None, with_header, 32, 0, add_generation_prompt=flag)])
    for flag in (False, True)
}
assert torch.equal(batches[False]["input_ids"], batches[True]["input_ids"])
assert torch.equal(batches[True]["input_ids"][0], sft["input_ids"][1, :7])
assert (batches[False]["token_mask"] - batches[True]["token_mask"]).sum() == 1
TokenTable(
    "The same tokens, and data.add_generation_prompt",
    {
        "token": tokens(batches[True]["input_ids"][0]),
        "token_mask, false": batches[False]["token_mask"][0],
        "token_mask, true": batches[True]["token_mask"][0],
    },
    marked=batches[True]["token_mask"][0],
)

# %% [markdown]
# ## Mistakes with masks
#
# Three models from the same random weights, trained on the same rows in the same order. Only the
# mask differs.

# %%
#| label: batch-masks
#| num: batch-steps = {STEPS}
#| num: batch-rows = {ROWS}
#| num: batch-stop-right = {stops['right']:.0%}
#| num: batch-stop-without = {stops['without_end']:.2%}
#| num: batch-nats-right = {runs['right'][0][-1][2]:.2f}
#| num: batch-nats-whole = {runs['whole_row'][0][-1][2]:.2f}
#| num: batch-loss-right = {runs['right'][1]:.2f}
#| num: batch-loss-whole = {runs['whole_row'][1]:.2f}
from nemo_rl_ref.tiny.addition import answer, problems, prompt
from nemo_rl_ref.tiny.make import make_model

STEPS, ROWS = 32, 40


def tokenize(problem):
    question = {"role": "user", "content": prompt(problem)}
    reply = {"role": "assistant", "content": answer(problem)}
    return sft_processor({"messages": [question, reply]}, None, tokenizer, 32, 0)


train_problems, held_out_problems = problems()
train_samples = [tokenize(problem) for problem in train_problems[: STEPS * ROWS]]
held_out = sft_batch([tokenize(problem) for problem in held_out_problems[:256]])
is_end = held_out["input_ids"] == tokenizer.eos_token_id


def right(batch):
    return batch["token_mask"]


def without_end(batch):
    return batch["token_mask"] * (batch["input_ids"] != tokenizer.eos_token_id)


def whole_row(batch):
    return (batch["input_ids"] != tokenizer.pad_token_id).long()


@torch.no_grad()
def measure(model):
    """Mean probability of the end token after a right answer; nats a digit of the answer."""
    scores = next_token_logprobs(model, held_out)
    digits = held_out["token_mask"].bool() & ~is_end
    return scores[is_end[:, 1:]].exp().mean().item(), -scores[digits[:, 1:]].mean().item()


def fit(mask):
    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = [(0, *measure(model))]
    for step in range(STEPS):
        batch = sft_batch(train_samples[step * ROWS : (step + 1) * ROWS])
        batch["token_mask"] = mask(batch)
        loss, _ = NLLLossFn()(next_token_logprobs(model, batch), batch, *valid_counts(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 8 == 0:
            history.append((step + 1, *measure(model)))
    return history, loss.item()


runs = {mask.__name__: fit(mask) for mask in (right, without_end, whole_row)}
stops = {name: history[-1][1] for name, (history, _) in runs.items()}
assert stops["right"] > 0.9 and stops["without_end"] < 0.01

# %%
#| label: batch-whole-row
#| num: batch-added = {added:.0%}
# Column 0 is never predicted. What else `whole_row` adds is the prompt.
added = 1 - held_out["token_mask"].sum().item() / whole_row(held_out)[:, 1:].sum().item()

# %%
#| label: fig-batch-end
#| alt: Probability of the end token over optimizer steps. With the right mask, and with the whole
#|   row trained on, it rises to nearly one. With the end token left out it falls to nearly zero.
#| caption: Mean probability of the end token after a right answer, on problems held out.
from nemo_rl_ref.show.figures import LINES, panels

figure, (axis,) = panels(1)
labels = {"right": "right mask", "without_end": "end token left out", "whole_row": "whole row"}
for (name, (history, _)), style in zip(runs.items(), LINES, strict=False):
    axis.plot([h[0] for h in history], [h[1] for h in history], label=labels[name], **style)
axis.set(xlabel="optimizer step", ylabel="probability of the end token", ylim=(-0.03, 1.03))
axis.legend();

# %%
#| label: batch-stop
#| num: batch-ended = {ended_in_time:.0%}
from nemo_rl_ref.rl.generate import sample_responses

prompts = [prompt(problem) for problem in held_out_problems[:64]]
shipped = sample_responses(policy, tokenizer, prompts, max_new_tokens=8)
ended = (shipped.input_ids[:, shipped.start :] == tokenizer.eos_token_id).any(1)
ended_in_time = ended.double().mean().item()
assert ended_in_time > 0.95

# %%
#| label: batch-pad-is-end
#| num: batch-lost-ends = {lost}
# A padding token that is the end token, and a mask made from the ids instead of the messages.
same = copy.deepcopy(tokenizer)
same.pad_token = same.eos_token
ids = torch.nn.utils.rnn.pad_sequence(
    [torch.cat([m["token_ids"] for m in s["message_log"]]) for s in samples],
    batch_first=True,
    padding_value=same.pad_token_id,
)
from_ids = (ids != same.pad_token_id).long() * torch.nn.functional.pad(sft["token_mask"], (0, -1))
lost = (sft["token_mask"].sum() - from_ids.sum()).item()
assert lost == 2  # the end token of both rows

# %% [markdown]
# ## A second begin token

# %%
#| label: batch-double-begin
#| num: batch-begin-one = {one:.2f}
#| num: batch-begin-two = {two:.2f}
from tokenizers.processors import TemplateProcessing

# Many tokenizers put the begin token before every text. This one does not; make one that does.
adding = copy.deepcopy(tokenizer)
adding.backend_tokenizer.post_processor = TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
)
question = [{"role": "user", "content": "25+99="}]
text = adding.apply_chat_template(question, tokenize=False)
wrong = adding(text)["input_ids"]  # add_special_tokens is true if not given
once = adding(text, add_special_tokens=False)["input_ids"]
print(*tokens(wrong))
print(*tokens(once))
assert wrong.count(tokenizer.bos_token_id) == 2 and once.count(tokenizer.bos_token_id) == 1


@torch.no_grad()
def answer_nats(batch):
    return NLLLossFn()(next_token_logprobs(policy, batch), batch, *valid_counts(batch))[0].item()


doubled = BatchedDataDict(
    input_ids=torch.nn.functional.pad(held_out["input_ids"], (1, 0), value=tokenizer.bos_token_id),
    token_mask=torch.nn.functional.pad(held_out["token_mask"], (1, 0)),
    sample_mask=held_out["sample_mask"],
)
one, two = answer_nats(held_out), answer_nats(doubled)
assert two > one

# %% [markdown]
# ## Truncation

# %%
#| label: batch-truncation
#| num: batch-limit = {LIMIT}
#| num: batch-lost-end = {lost_end:.0%}
LIMIT = 9
whole = sft_batch(train_samples)
naive = copy.deepcopy(whole)
naive.truncate_tensors(1, LIMIT)  # what a tokenizer's truncation=True would leave
has_end = (naive["input_ids"] == tokenizer.eos_token_id).any(1)
lost_end = 1 - has_end.double().mean().item()

limited = [sft_processor(turns, None, tokenizer, 16, 0), *samples]
weighted = sft_batch(limited)
for sample in limited:
    print(f"{sample['length']:2} tokens, weight {sample['loss_multiplier']}")
with torch.no_grad():
    with_stub = NLLLossFn()(
        next_token_logprobs(policy, weighted), weighted, *valid_counts(weighted)
    )[0]
assert valid_counts(weighted)[1] == counted
assert math.isclose(with_stub.item(), loss.item(), abs_tol=1e-6)

# %%
#| label: batch-limit
# A conversation of exactly the limit: SFT drops it, preference data keeps it.
from nemo_rl_ref.data.processors import preference_preprocessor

exact = sft_processor(dataset[1], None, tokenizer, 7, 0)
pair = {
    "context": [{"role": "user", "content": "3+4="}],
    "completions": [
        {"rank": 0, "completion": [{"role": "assistant", "content": "7"}]},
        {"rank": 1, "completion": [{"role": "assistant", "content": "8"}]},
    ],
}
kept = preference_preprocessor(pair, None, tokenizer, 7, 0)
assert exact["length"] == kept["length_chosen"] == 7
assert exact["loss_multiplier"] == 0.0 and kept["loss_multiplier"] == 1.0

# %% [markdown]
# ## A preference pair

# %%
#| label: batch-pair
from accelerate import Accelerator

from nemo_rl_ref.data.datasets.preference_datasets import BinaryPreferenceDataset
from nemo_rl_ref.training.reference import add_reference_logprobs
from nemo_rl_ref.training.samples import preference_pairs

pairs = preference_pairs(
    BinaryPreferenceDataset(str(tiny.VALIDATION_PAIRS)), tokenizer, max_seq_length=16
)
add_reference_logprobs(policy, [pairs], Accelerator(cpu=True))
dpo = pairs.batch([0, 1])
for name, tensor in dpo.items():
    print(f"{name:26} {tensor.dtype!s:14} {tuple(tensor.shape)}")


# %%
def pair_table(row):
    width = dpo["input_ids"].shape[1]
    return TokenTable(
        f"DPO, row {row}: {('chosen', 'rejected')[row % 2]} answer of pair {row // 2}",
        {
            "position t": range(width),
            "token": tokens(dpo["input_ids"][row]),
            "token_mask": dpo["token_mask"][row],
            "column of next_token_logprobs": after_first(torch.arange(width - 1)),
            "column of reference_policy_logprobs": after_first(torch.arange(width - 1)),
            "reference_policy_logprobs (nats)": after_first(
                dpo["reference_policy_logprobs"][row, :-1]
            ),
        },
        marked=dpo["token_mask"][row],
    )


# %%
#| label: batch-chosen
pair_table(0)

# %%
#| label: batch-rejected
pair_table(1)

# %%
#| label: batch-dpo-shift
#| num: batch-dpo-good = {good['loss']:.4f}
#| num: batch-dpo-unrolled = {unrolled['loss']:.4f}
#| num: batch-dpo-accuracy = {unrolled['accuracy']:.0%}
#| num: batch-dpo-reward = {unrolled['rewards_chosen_mean']:.1f}
#| num: batch-dpo-pairs = {len(pairs)}
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn

dpo_loss = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1))


@torch.no_grad()
def first_step(batch):
    """DPO's loss before any update, when policy and reference are the same."""
    return dpo_loss(next_token_logprobs(policy, batch), batch, *valid_counts(batch))[1]


many = pairs.batch(range(len(pairs)))
good = first_step(many)
assert math.isclose(good["loss"], math.log(2), abs_tol=1e-6)
assert max(abs(good["rewards_chosen_mean"]), abs(good["rewards_rejected_mean"])) < 1e-6

shifted = copy.copy(many)  # not rolled: column t belongs to token t
shifted["reference_policy_logprobs"] = many["reference_policy_logprobs"].roll(1, dims=-1)
unrolled = first_step(shifted)
for name in ("loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean"):
    print(f"{name:22}{good[name]:8.4f}, not rolled {unrolled[name]:8.4f}")
assert abs(unrolled["loss"] - math.log(2)) < 0.01 and abs(unrolled["rewards_chosen_mean"]) > 1

swapped = many.select_indices([i for p in range(256) for i in (2 * p + 1, 2 * p)])
assert math.isclose(first_step(swapped)["loss"], math.log(2), abs_tol=1e-6)  # which this cannot see

# %%
#| label: batch-dpo-tie
#| num: batch-ties = {ties.double().mean():.0%}
#| num: batch-tie-limit = {LIMIT - 1}
cut = copy.deepcopy(many)
cut.truncate_tensors(1, LIMIT - 1)  # the prompt and the first digit of most answers
ties = (cut["input_ids"][0::2] == cut["input_ids"][1::2]).all(1)
tied = cut.select_indices(ties.repeat_interleave(2).nonzero().flatten())
policy.zero_grad()
tie_loss, _ = dpo_loss(next_token_logprobs(policy, tied), tied, *valid_counts(tied))
tie_loss.backward()
steepest = max(p.grad.abs().max().item() for p in policy.parameters())
policy.zero_grad()
assert math.isclose(tie_loss.item(), math.log(2), abs_tol=1e-6) and steepest < 1e-6

# %% [markdown]
# ## A rollout

# %%
#| label: batch-generate
rollout_prompts = ["3+4=", "25+99="]
texts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    for text in rollout_prompts
]
left = tokenizer(
    texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
)


@torch.no_grad()
def generate(ids, mask, steps, seed=0):
    """Sample token by token. A real engine would keep the keys and values of earlier tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores, going = [], torch.ones(len(ids), dtype=torch.bool)
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0 for the first real token of each row
        logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        logp = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(logp.exp(), 1, generator=generator)
        scores.append(torch.where(going, logp.gather(1, drawn)[:, 0], 0.0))
        ids = torch.cat([ids, torch.where(going[:, None], drawn, tokenizer.pad_token_id)], 1)
        mask = torch.cat([mask, going[:, None].long()], 1)
        going &= drawn[:, 0] != tokenizer.eos_token_id
    return ids, mask, torch.stack(scores, 1)


ids, mask, scores = generate(left["input_ids"], left["attention_mask"], steps=4)
start = left["input_ids"].shape[1]


# %%
#| label: batch-generated-0
def generated_table(row):
    width = ids.shape[1]
    return TokenTable(
        f"Generation, row {row}: padded on the left, answers from column {start} on",
        {
            "column": range(width),
            "token": tokens(ids[row]),
            "attention_mask": mask[row],
            "position_ids": (mask[row].cumsum(0) - 1).clamp(min=0),
            "log-probability when drawn (nats)": [None] * start + scores[row].tolist(),
        },
        marked=[column >= start and mask[row, column] for column in range(width)],
    )


generated_table(0)

# %%
#| label: batch-generated-1
generated_table(1)

# %%
#| label: batch-rollout
#| num: batch-engine-error = {engine_error:.0e}
logs = []
for row, text in enumerate(texts):
    prompt_ids = left["input_ids"][row][left["attention_mask"][row].bool()]
    size = int(mask[row, start:].sum())
    answer_ids = ids[row, start : start + size]
    logs.append(
        [
            {
                "role": "user",
                "content": text,
                "token_ids": prompt_ids,
                "token_loss_mask": torch.zeros_like(prompt_ids),
                "generation_logprobs": torch.zeros(len(prompt_ids)),
            },
            {
                "role": "assistant",
                "content": tokenizer.decode(answer_ids),
                "token_ids": answer_ids,
                "token_loss_mask": torch.ones_like(answer_ids),
                "generation_logprobs": scores[row, :size],
            },
        ]
    )
flat, lengths = batched_message_log_to_flat_message(logs, {"token_ids": tokenizer.pad_token_id})
rollout = BatchedDataDict(
    input_ids=flat["token_ids"],
    input_lengths=lengths,
    token_mask=flat["token_loss_mask"],
    generation_logprobs=flat["generation_logprobs"],
    sample_mask=torch.ones(len(logs)),
)
with torch.no_grad():
    scored = next_token_logprobs(policy, rollout)  # (B, S-1)
# policy.get_logprobs has (B, S): 0 first, then entry t belongs to token t
rollout["prev_logprobs"] = torch.nn.functional.pad(scored, (1, 0))
apart = (rollout["prev_logprobs"] - rollout["generation_logprobs"])[flat["token_loss_mask"].bool()]
engine_error = apart.abs().max().item()
assert engine_error < 1e-4


# %%
#| label: batch-rollout-0
def rollout_table(row):
    width = rollout["input_ids"].shape[1]
    answered = rollout["token_mask"][row].bool().tolist()
    prev = rollout["prev_logprobs"][row].tolist()
    return TokenTable(
        f"Policy gradient, row {row}: padded on the right",
        {
            "position t": range(width),
            "token": tokens(rollout["input_ids"][row]),
            "token_mask": rollout["token_mask"][row],
            "column of next_token_logprobs": after_first(torch.arange(width - 1)),
            "column of prev_logprobs": range(width),
            "prev_logprobs (nats)": [p if a else None for p, a in zip(prev, answered, strict=True)],
            "generation_logprobs (nats)": rollout["generation_logprobs"][row],
        },
        marked=rollout["token_mask"][row],
    )


rollout_table(0)

# %%
#| label: batch-rollout-1
rollout_table(1)

# %%
#| label: batch-pg-shift
#| num: batch-ratio = {aligned['probs_ratio']:.4f}
#| num: batch-ratio-late = {misread['probs_ratio']:,.0f}
#| num: batch-error = {aligned['token_mult_prob_error']:.4f}
#| num: batch-error-late = {misread['token_mult_prob_error']:,.0f}
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

policy_gradient = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
rollout["advantages"] = torch.tensor([[1.0], [-1.0]]).expand_as(rollout["input_ids"])


def metrics(batch):
    return policy_gradient(scored, batch, *valid_counts(batch))[1]


aligned = metrics(rollout)
assert math.isclose(aligned["probs_ratio"], 1.0, abs_tol=1e-6)
assert math.isclose(aligned["token_mult_prob_error"], 1.0, abs_tol=1e-4)

late = copy.copy(rollout)  # DPO's layout where the policy gradient's is read
late["prev_logprobs"] = rollout["prev_logprobs"].roll(-1, dims=-1)
misread = metrics(late)
assert abs(misread["probs_ratio"] - 1) > 0.1 and misread["token_mult_prob_error"] > 1.1

# %% [markdown]
# ## Shifts in the supervised loss

# %%
#| label: batch-sft-shift
#| num: batch-shift-right = {shifts['right']:.2f}
#| num: batch-shift-none = {shifts['no shift: predicts the token it reads']:.2f}
from nemo_rl_ref.logprobs import token_logprobs

with torch.no_grad():
    logits = policy(input_ids=held_out["input_ids"]).logits
ids_held, mask_held = held_out["input_ids"], held_out["token_mask"]


def mean_nll(logits, targets, mask):
    return -(token_logprobs(logits, targets) * mask).sum().item() / mask.sum().item()


shifts = {
    "right": mean_nll(logits[:, :-1], ids_held[:, 1:], mask_held[:, 1:]),
    "no shift: predicts the token it reads": mean_nll(logits, ids_held, mask_held),
    "shift by two": mean_nll(logits[:, :-2], ids_held[:, 2:], mask_held[:, 2:]),
    "mask not shifted": mean_nll(logits[:, :-1], ids_held[:, 1:], mask_held[:, :-1]),
}
for name, value in shifts.items():
    print(f"{name:40}{value:7.2f} nats a token")
assert math.isclose(shifts["right"], one, abs_tol=1e-5)
assert min(v for name, v in shifts.items() if name != "right") > 2 * shifts["right"]

# %%
#| label: batch-copy
#| num: batch-copy-steps = {COPY_STEPS}
#| num: batch-copy-loss = {copying:.2f}
model = make_model(tokenizer).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
COPY_STEPS = 20
for step in range(COPY_STEPS):
    batch = sft_batch(train_samples[step * ROWS : (step + 1) * ROWS])
    scores_read = token_logprobs(model(input_ids=batch["input_ids"]).logits, batch["input_ids"])
    copying = -(scores_read * batch["token_mask"]).sum() / batch["token_mask"].sum()
    copying.backward()
    optimizer.step()
    optimizer.zero_grad()
assert copying.item() < 0.1

# %% [markdown]
# ## Padding and positions

# %%
#| label: batch-left
#| num: batch-left-rotary = {table['rotary']['mask, positions from column 0']:.0e}
#| num: batch-left-learned = {table['learned']['mask, positions from column 0']:.1f}
#| num: batch-left-no-mask = {table['rotary']['no mask']:.1f}
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
absolute = GPT2LMHeadModel(  # random weights: adds a learned vector for each position
    GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
).eval()
alone = tokenizer(texts[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
padding = (left["attention_mask"][0] == 0).sum().item()
mask_left = left["attention_mask"][:1]
from_mask = (mask_left.cumsum(1) - 1).clamp(min=0)
counted_from_0 = torch.arange(mask_left.shape[1])[None]


@torch.no_grad()
def moved(model, **inputs):
    """How far the next token's log-probabilities are from those of the prompt alone, in nats."""
    expected = torch.log_softmax(model(input_ids=alone).logits[0, -1], -1)
    got = torch.log_softmax(model(input_ids=left["input_ids"][:1], **inputs).logits[0, -1], -1)
    return (got - expected).abs().max().item()


table = {}
for name, model in (("rotary", policy), ("learned", absolute)):
    table[name] = {
        "mask, positions from the mask": moved(
            model, attention_mask=mask_left, position_ids=from_mask
        ),
        "mask, positions from column 0": moved(
            model, attention_mask=mask_left, position_ids=counted_from_0
        ),
        "no mask": moved(model, position_ids=counted_from_0),
    }
    for case, value in table[name].items():
        print(f"{name:9}{case:32}{value:10.2g} nats")
assert padding == 2
assert max(case["mask, positions from the mask"] for case in table.values()) < 1e-4
assert table["rotary"]["mask, positions from column 0"] < 1e-4
assert table["learned"]["mask, positions from column 0"] > 0.1
assert min(case["no mask"] for case in table.values()) > 0.1

# %%
#| label: batch-right
#| num: batch-behind = {distance:.2f}
#| num: batch-right-error = {right_error:.0e}
# Padded on the right, the last column of a shorter prompt is padding: its next token is nothing.
behind = tokenizer(
    texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
)
with torch.no_grad():
    last = policy(input_ids=behind["input_ids"]).logits[0, -1].softmax(-1)
    true = policy(input_ids=alone).logits[0, -1].softmax(-1)
distance = 0.5 * (last - true).abs().sum().item()  # total variation, from 0 to 1
assert distance > 0.2

# Training rows are padded on the right, and a causal model does not look there.
with torch.no_grad():
    padded = next_token_logprobs(policy, sft)[1, : length - 1]
    short = BatchedDataDict(input_ids=sft["input_ids"][1:, :length])
    unpadded = next_token_logprobs(policy, short)[0]
right_error = (padded - unpadded).abs().max().item()
assert right_error < 1e-5
