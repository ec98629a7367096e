# SPDX-License-Identifier: Apache-2.0
"""Sampling responses, their log-probabilities, and how far they show that a policy has moved.

A group of responses has one prompt. Its keys and values are computed once and copied to the rows of
the group, in sampling and in training alike: with G responses of n tokens to a prompt of m, the
model sees m + G n tokens instead of G (m + n). In training the copies are differentiable, so the
gradient is that of the whole rows, up to rounding.

NeMo RL leaves both to its backends; what these functions take and return is as it has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.logits_sampling_utils import (
    TrainingSamplingParams,
    apply_top_k_top_p,
    need_top_k_or_top_p_filtering,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.logprobs import token_logprobs

GREEDY = 0.0  # the temperature that takes the most likely token


def left_pad(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Move the first tokens of each row to the right end.

    Args:
        ids: (B, S) int64, whose rows begin at column 0.
        lengths: (B,) int64, how many tokens of each row to take.

    Returns:
        Tokens (B, L) with L the largest length, 0 on padding, and the mask (B, L), 1 on tokens.
    """
    width = int(lengths.max())
    columns = torch.arange(width, device=ids.device) - (width - lengths).unsqueeze(1)
    mask = (columns >= 0).long()
    return ids.gather(1, columns.clamp(min=0)) * mask, mask


def _prefill(model: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Run the prompts of all rows, equal neighbors once.

    Returns:
        Logits of the first response token (B, V), the cache and the prompt mask (B, L), of all
        rows.
    """
    ids, mask = left_pad(ids, lengths)
    new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    new[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(1)
    first = new.nonzero().squeeze(1)
    out = model(
        input_ids=ids[first],
        attention_mask=mask[first],
        position_ids=(mask[first].cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    logits, cache = out.logits[:, -1], out.past_key_values
    if len(first) < len(ids):
        of_row = new.cumsum(0) - 1
        copies = len(ids) // len(first)
        if torch.equal(first, torch.arange(0, len(ids), copies, device=ids.device)):
            cache.batch_repeat_interleave(copies)  # its gradient is a sum, which is fast
        else:
            cache.batch_select_indices(of_row)
        logits = logits[of_row]
    return logits, cache, mask


def response_logprobs(
    model: Any,
    data: BatchedDataDict[Any],
    sampling: TrainingSamplingParams,
    *,
    filtered: bool = True,
) -> Tensor:
    """Log-probability of every response token given those before it.

    Args:
        model: A Hugging Face causal language model, or what ``accelerate`` wrapped around it.
        data: ``input_ids`` int64 (B, S), padded on the right, ``input_lengths`` and
            ``prompt_lengths`` (B,), in tokens.
        sampling: The temperature divides the logits, as in sampling.
        filtered: Whether tokens outside top-k and top-p have log-probability -inf.

    Returns:
        Float32 (B, S-1), in nats; column t belongs to token t + 1. 0 on prompt and padding.
    """
    ids, starts = data["input_ids"], data["prompt_lengths"]
    rows, width = ids.shape
    sizes = data["input_lengths"] - starts
    # At least 2: where processes share the weights, each must run the model as often as the others.
    longest = max(int(sizes.max()), 2)
    logits, cache, prompt_mask = _prefill(model, ids, starts)

    steps = torch.arange(longest, device=ids.device)
    columns = starts.unsqueeze(1) + steps
    valid = steps < sizes.unsqueeze(1)
    padded = torch.nn.functional.pad(ids, (0, longest))
    tokens = padded.gather(1, columns)
    logprobs = [_score(logits.unsqueeze(1), tokens[:, :1], sampling, filtered)]
    # The last token of a response predicts nothing, so it is not run.
    out = model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([prompt_mask, valid[:, :-1].long()], 1),
        position_ids=columns[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    logprobs.append(_score(out.logits, tokens[:, 1:], sampling, filtered))
    scores = torch.where(valid, torch.cat(logprobs, 1), 0.0)
    whole = scores.new_zeros(rows, width + longest).scatter(1, columns, scores)
    return whole[:, 1:width]


def _score(
    logits: Tensor, targets: Tensor, sampling: TrainingSamplingParams, filtered: bool
) -> Tensor:
    temperature = sampling.temperature or 1.0
    if filtered and need_top_k_or_top_p_filtering(sampling):
        logits, _ = apply_top_k_top_p(logits / temperature, sampling.top_k, sampling.top_p)
        temperature = 1.0
    return cast(torch.Tensor, token_logprobs(logits, targets, temperature=temperature))


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    data: BatchedDataDict[Any],
    sampling: TrainingSamplingParams,
    uniforms: Tensor,
    *,
    max_total_sequence_length: int,
    stop_token_ids: list[int] | None = None,
    stop_strings: list[str] | None = None,
    batch_size: int | None = None,
) -> BatchedDataDict[Any]:
    """Sample one response to each row.

    A response ends with the first stop token, which belongs to it, or with the token that completes
    a stop string. Rows that have ended leave the batch.

    A token is drawn with one uniform number of its row and position, by inverting the distribution
    function. So a row's response depends on nothing but its prompt and its numbers: not on
    the batch, nor on the number of processes, except where rounding tips a draw.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a pad token.
        data: ``input_ids`` int64 (B, S), padded on the right, and ``input_lengths`` (B,). Equal
            rows next to each other share the work on their prompt.
        sampling: Temperature (`GREEDY` takes the most likely token), top-k and top-p.
        uniforms: (B, T) float64 in [0, 1), with T the longest response, in tokens.
        max_total_sequence_length: Longest prompt plus response, in tokens.
        stop_token_ids: The end token of the tokenizer if not given.
        stop_strings: Further ends, looked for in the text of the response.
        batch_size: Rows sampled at once; all if not given.

    Returns:
        ``output_ids`` (B, S'), prompt and response, padded on the right; ``logprobs`` (B, S')
        float32, in nats, of the response tokens under the distribution they were drawn from, 0
        elsewhere; ``generation_lengths`` and ``unpadded_sequence_lengths`` (B,); ``truncated``
        (B,), whether the response was cut off before it ended.

    Raises:
        ValueError: If a prompt leaves no room for a response.
    """
    room = max_total_sequence_length - int(data["input_lengths"].max())
    if room < 1:
        raise ValueError(
            f"max_total_sequence_length is {max_total_sequence_length}, expected more than the "
            f"longest prompt, {int(data['input_lengths'].max())} tokens"
        )
    stops = torch.tensor(
        [tokenizer.eos_token_id] if stop_token_ids is None else stop_token_ids,
        device=data["input_ids"].device,
    )
    was_training, size = model.training, batch_size or len(uniforms)
    model.eval()
    parts = []
    for low in range(0, len(uniforms), size):
        rows = slice(low, low + size)
        ids, lengths = data["input_ids"][rows], data["input_lengths"][rows]
        limits = (max_total_sequence_length - lengths).clamp(max=uniforms.shape[1])
        drawn = _decode(
            model, tokenizer, ids, lengths, limits, sampling, uniforms[rows], stops,
            stop_strings or [],
        )  # fmt: skip
        parts.append(_join(ids, lengths, *drawn, tokenizer.pad_token_id))
    model.train(was_training)
    return BatchedDataDict.from_batches(parts, {"output_ids": tokenizer.pad_token_id})


def _decode(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    lengths: Tensor,
    limits: Tensor,
    sampling: TrainingSamplingParams,
    uniforms: Tensor,
    stops: Tensor,
    stop_strings: list[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (B, T), their log-probabilities (B, T), lengths (B,), and whether it ended (B,)."""
    rows = torch.arange(len(ids), device=ids.device)  # those still going on
    tokens = ids.new_zeros(uniforms.shape)
    logprobs = torch.zeros(uniforms.shape, device=ids.device)
    sizes, ended = limits.clone(), torch.zeros_like(rows, dtype=torch.bool)
    logits, cache, mask = _prefill(model, ids, lengths)
    for step in range(int(limits.max())):
        token, logprob = _draw(logits, sampling, uniforms[rows, step])
        tokens[rows, step], logprobs[rows, step] = token, logprob
        stopped = torch.isin(token, stops)
        if stop_strings:
            stopped |= _has_stop_string(tokenizer, tokens[rows, : step + 1], stop_strings)
        sizes[rows[stopped]] = step + 1
        ended[rows[stopped]] = True
        going = ~stopped & (step + 1 < limits[rows])
        if not going.any():
            break
        if not going.all():
            keep = going.nonzero().squeeze(1)
            rows, mask, token = rows[keep], mask[keep], token[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            input_ids=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=(lengths[rows] + step).unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    return tokens, logprobs, sizes, ended


def _draw(
    logits: Tensor, sampling: TrainingSamplingParams, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row, (B,), and its log-probability, (B,)."""
    logits = logits.float() / (sampling.temperature or 1.0)
    logits, _ = apply_top_k_top_p(logits, sampling.top_k, sampling.top_p)
    logp = torch.log_softmax(logits, -1)
    if sampling.temperature == GREEDY:
        token = logp.argmax(-1)
    else:
        below = logp.double().exp().cumsum(-1)
        # Scaled by the last entry, which rounding keeps from being 1; `right` skips tokens of
        # probability 0.
        wanted = uniform.unsqueeze(1) * below[:, -1:]
        token = torch.searchsorted(below, wanted, right=True).squeeze(1)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


def _has_stop_string(tokenizer: Any, tokens: Tensor, stop_strings: list[str]) -> Tensor:
    """Whether the text contains a stop string, (B,). Only its end is new, so only that is read."""
    # A token can be a single byte of a character.
    recent = max(len(stop.encode("utf-8")) for stop in stop_strings) + 8
    texts = tokenizer.batch_decode(tokens[:, -recent:], skip_special_tokens=True)
    found = [any(stop in text for stop in stop_strings) for text in texts]
    return torch.tensor(found, device=tokens.device)


def _join(
    ids: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    sizes: Tensor,
    ended: Tensor,
    pad: int,
) -> BatchedDataDict[Any]:
    """Prompts and responses in one row each, as NeMo RL's ``GenerationOutputSpec``."""
    total = lengths + sizes
    width, steps = int(total.max()), torch.arange(tokens.shape[1], device=ids.device)
    # What is no response goes to a last column that is then cut off.
    place = torch.where(steps < sizes.unsqueeze(1), lengths.unsqueeze(1) + steps, width)
    prompts = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    output = torch.nn.functional.pad(ids.masked_fill(~prompts, pad), (0, tokens.shape[1] + 1))
    output[:, ids.shape[1] :] = pad
    scores = torch.zeros(len(ids), width + 1, device=ids.device).scatter(1, place, logprobs)
    output = output[:, : width + 1].scatter(1, place, tokens)
    return BatchedDataDict(
        {
            "output_ids": output[:, :width],
            "logprobs": scores[:, :width],
            "generation_lengths": sizes,
            "unpadded_sequence_lengths": total,
            "truncated": ~ended,
        }
    )


@dataclass(frozen=True)
class SampledResponses:
    """Sampled responses as tokens.

    Attributes:
        input_ids: Prompts, padded on the left, then responses, int64 ``(B, S)``.
        attention_mask: 1 on tokens of the prompt and of the response, its end token included;
            0 on padding, int64 ``(B, S)``.
        start: The column at which the responses start.
    """

    input_ids: Tensor
    attention_mask: Tensor
    start: int

    def texts(self, tokenizer: Any) -> list[str]:
        """Decode the responses, without special tokens."""
        return tokenizer.batch_decode(self.input_ids[:, self.start :], skip_special_tokens=True)


@torch.no_grad()
def sample_responses(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> SampledResponses:
    """Sample one response to each prompt, with the model's own ``generate``.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        prompts: User messages.
        max_new_tokens: Longest response, in tokens.
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
    # A response ends with its first end token; what generate() appends after it is padding.
    is_end = input_ids[:, start:] == tokenizer.eos_token_id
    in_response = (is_end.cumsum(1) - is_end.long() == 0).long()
    return SampledResponses(input_ids, torch.cat([inputs["attention_mask"], in_response], 1), start)


@torch.no_grad()
def response_kl(policy: Any, reference: Any, samples: SampledResponses) -> float:
    r"""Estimate the policy's divergence from its reference, in nats a response.

    At every position of a sampled response the divergence of the two next-token distributions is
    exact, a sum over the vocabulary; only the prefixes are sampled. For prefixes drawn from the
    policy this is an unbiased estimate of the divergence between the distributions over responses,
    :math:`\mathrm{KL}(\pi_\theta \,\|\, \pi_{\mathrm{ref}})`, by its chain rule.

    Args:
        policy: A Hugging Face causal language model.
        reference: Another one with the same vocabulary.
        samples: Responses sampled from ``policy`` at temperature 1.

    Returns:
        The mean over responses, in nats.
    """
    position_ids = (samples.attention_mask.cumsum(1) - 1).clamp(min=0)

    def next_token_log_softmax(model: Any) -> Tensor:
        logits = model(
            input_ids=samples.input_ids,
            attention_mask=samples.attention_mask,
            position_ids=position_ids,
        ).logits
        return torch.log_softmax(logits[:, samples.start - 1 : -1].float(), dim=-1)

    log_p, log_q = next_token_log_softmax(policy), next_token_log_softmax(reference)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    in_response = samples.attention_mask[:, samples.start :]
    return ((divergence * in_response).sum() / len(in_response)).item()
