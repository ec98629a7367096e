# SPDX-License-Identifier: Apache-2.0
"""Make every file in ``assets/`` again: tokenizer, weights, preference pairs, problems.

.. code-block:: sh

    python -m nemo_rl_ref.tiny.make            # about half a minute on two cores
    python -m nemo_rl_ref.tiny.make --out DIR  # somewhere else

The weights come from a short supervised run on the training problems, stopped early. The rejected
answer of a pair is a wrong answer the model itself gave; the chosen one is the sum. Everything is
seeded. Another machine or PyTorch version rounds differently, so the weights may differ in the
last digits, and then some of the sampled answers too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.rl.generate import sample_responses
from nemo_rl_ref.tiny import ASSETS
from nemo_rl_ref.tiny.addition import answer, is_correct, problems, prompt

CHARACTERS = "0123456789+="
SFT_STEPS = 330
SFT_BATCH = 128
TRAIN_PAIRS = 2048
VALIDATION_PAIRS = 256
MAX_NEW_TOKENS = 5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer() -> Any:
    """A tokenizer with one token a character, and a chat template of question then answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any) -> Any:
    """A Qwen3 with two layers of width 96, weights drawn with seed 0."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def supervise(model: Any, tokenizer: Any, train: list[tuple[int, int]]) -> None:
    """Train on right answers, for ``SFT_STEPS`` steps of ``SFT_BATCH`` problems."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / SFT_STEPS)
    )
    draw = random.Random(1)
    for _ in track(range(SFT_STEPS), description="supervised"):
        rows = draw.sample(train, SFT_BATCH)
        texts = [
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": prompt(row)},
                    {"role": "assistant", "content": answer(row)},
                ],
                tokenize=False,
            )
            for row in rows
        ]
        batch = tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = batch["input_ids"].clone()
        equals = tokenizer.convert_tokens_to_ids("=")
        answered = (labels == equals).cumsum(1) - (labels == equals).long() > 0
        labels[~answered | (batch["attention_mask"] == 0)] = -100
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def make_pairs(
    model: Any, tokenizer: Any, candidates: list[tuple[int, int]], count: int, seed: int
) -> list[dict[str, str]]:
    """Pairs of the sum and a wrong answer that the model gave, one a problem.

    Raises:
        RuntimeError: If the model is wrong on fewer than ``count`` of the candidates.
    """
    prompts = [prompt(problem) for problem in candidates]
    texts = sample_responses(
        model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=seed
    ).texts(tokenizer)
    pairs = [
        {"prompt": question, "chosen": answer(problem), "rejected": text}
        for problem, question, text in zip(candidates, prompts, texts, strict=True)
        if text and not is_correct(question, text)
    ]
    if len(pairs) < count:
        raise RuntimeError(f"only {len(pairs)} wrong answers, {count} wanted")
    return pairs[:count]


def ranked(pair: dict[str, str]) -> dict[str, Any]:
    """A pair in the form of NeMo RL's ``PreferenceDataset``."""
    return {
        "context": [{"role": "user", "content": pair["prompt"]}],
        "completions": [
            {"rank": rank, "completion": [{"role": "assistant", "content": pair[side]}]}
            for rank, side in enumerate(("chosen", "rejected"))
        ],
    }


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    """Write tokenizer, weights, pairs and problems to ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = problems()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    supervise(model, tokenizer, train)
    train_pairs = make_pairs(model, tokenizer, train, TRAIN_PAIRS, seed=2)
    validation_pairs = make_pairs(model, tokenizer, held_out, VALIDATION_PAIRS, seed=3)

    staging = Path(tempfile.mkdtemp(dir=out))
    model.save_pretrained(staging / "addition-qwen3")
    tokenizer.save_pretrained(staging / "addition-qwen3")
    target = out / "addition-qwen3"
    if target.exists():
        shutil.rmtree(target)
    os.replace(staging / "addition-qwen3", target)
    staging.rmdir()
    write_jsonl(out / "addition-preferences.train.jsonl", train_pairs)
    write_jsonl(out / "addition-preferences.validation.jsonl", validation_pairs)
    write_jsonl(
        out / "addition-preferences.validation.ranked.jsonl",
        [ranked(pair) for pair in validation_pairs],
    )
    prompts = [prompt(problem) for problem in held_out]
    texts = sample_responses(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, seed=4)
    right = sum(map(is_correct, prompts, texts.texts(tokenizer)))
    for name, rows in (("train", train), ("validation", held_out)):
        records = [{"input": prompt(row), "output": answer(row)} for row in rows]
        write_jsonl(out / f"addition-problems.{name}.jsonl", records)
    print(f"{out}: {right} of {len(prompts)} held-out problems right, sampled at temperature 1")


if __name__ == "__main__":
    main()
