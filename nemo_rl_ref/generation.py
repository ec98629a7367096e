# SPDX-License-Identifier: Apache-2.0
"""Sampling answers and measuring how far a policy has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Samples:
    """Sampled answers as tokens.

    Attributes:
        input_ids: Prompts, padded on the left, then answers, int64 ``(B, S)``.
        attention_mask: 1 on tokens of the prompt and of the answer, its end token included;
            0 on padding, int64 ``(B, S)``.
        start: The column at which the answers start.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    start: int

    def texts(self, tokenizer: Any) -> list[str]:
        """The answers without special tokens."""
        return tokenizer.batch_decode(self.input_ids[:, self.start :], skip_special_tokens=True)


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Samples:
    """Sample one answer to each prompt.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        prompts: User messages.
        max_new_tokens: Longest answer, in tokens.
        temperature: Divides the logits; 0 takes the most likely token every time.
        seed: Seeds the sampling. PyTorch's global generators are put back afterwards.

    Returns:
        The samples, in the order of the prompts.

    Raises:
        ValueError: If ``prompts`` is empty or ``temperature`` is negative.
    """
    if not prompts:
        raise ValueError("prompts: got none, expected at least one")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 or more")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in prompts
    ]
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        input_ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(how if temperature > 0 else {"do_sample": False}),
        )
    model.train(was_training)
    start = inputs["input_ids"].shape[1]
    # An answer ends with its first end token; what generate() appends after it is padding.
    is_end = input_ids[:, start:] == tokenizer.eos_token_id
    in_answer = (is_end.cumsum(1) - is_end.long() == 0).long()
    return Samples(input_ids, torch.cat([inputs["attention_mask"], in_answer], 1), start)


@torch.no_grad()
def answer_kl(policy: Any, reference: Any, samples: Samples) -> float:
    r"""Estimate the policy's divergence from its reference, in nats an answer.

    At every position of a sampled answer the divergence of the two next-token distributions is
    exact, a sum over the vocabulary; only the prefixes are sampled. For prefixes drawn from the
    policy this is an unbiased estimate of the divergence between the distributions over answers,
    :math:`\mathrm{KL}(\pi_\theta \,\|\, \pi_{\mathrm{ref}})`, by its chain rule.

    Args:
        policy: A Hugging Face causal language model.
        reference: Another one with the same vocabulary.
        samples: Answers sampled from ``policy`` at temperature 1.

    Returns:
        The mean over answers, in nats.
    """
    position_ids = (samples.attention_mask.cumsum(1) - 1).clamp(min=0)

    def next_token_log_softmax(model: Any) -> torch.Tensor:
        logits = model(
            input_ids=samples.input_ids,
            attention_mask=samples.attention_mask,
            position_ids=position_ids,
        ).logits
        return torch.log_softmax(logits[:, samples.start - 1 : -1].float(), dim=-1)

    log_p, log_q = next_token_log_softmax(policy), next_token_log_softmax(reference)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    in_answer = samples.attention_mask[:, samples.start :]
    return ((divergence * in_answer).sum() / len(in_answer)).item()
