# SPDX-License-Identifier: Apache-2.0
"""Batches to call a loss with: made from a seed, cut, padded, reordered and printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Tokens of a batch made here, and rows of one without pairs.
TOKENS, ROWS, PAIRS = 9, 6, 5

#: Data of which entry t belongs to token t. Of other data it is not known whether entry t belongs
#: to token t or to token t+1: NeMo RL's losses read ``reference_policy_logprobs`` either way.
_OWN_TOKEN = {"advantages", "generation_logprobs", "prev_logprobs", "returns", "values"}
_MASKS = ("token_mask", "mask")


@dataclass(frozen=True)
class Batch:
    """What a loss is called with.

    Attributes:
        inputs: the model's output by argument name: tensors (B, ...), or None.
        data: what else the loss reads: tensors (B, ...), lists of length B, or anything.
        shifts: for ``("inputs" or "data", name)`` of each tensor with a token dimension, 0 if that
            is (B, S, ...) and 1 if it is (B, S-1, ...), where entry t belongs to token t+1.
        free: names of the inputs that the loss is differentiated by.
    """

    inputs: dict[str, Any]
    data: dict[str, Any]
    shifts: dict[tuple[str, str], int]
    free: tuple[str, ...]

    @property
    def rows(self) -> int:
        """B."""
        return self.data["token_mask"].shape[0]

    @property
    def tokens(self) -> int:
        """S."""
        return self.data["token_mask"].shape[1]

    @property
    def sample_mask(self) -> Tensor:
        """(B,), boolean."""
        return self.data["sample_mask"] != 0

    @property
    def token_mask(self) -> Tensor:
        """(B, S), boolean, without the sample mask."""
        return self.data["token_mask"] != 0

    def counts(self) -> tuple[Tensor, Tensor]:
        """Valid sequences and tokens, as NeMo RL's trainers count them: float32 scalars."""
        sample_mask = self.data["sample_mask"].float()
        tokens = self.data["token_mask"][:, 1:].float() * sample_mask.unsqueeze(-1)
        return sample_mask.sum(), tokens.sum()

    def map(self, change: Callable[[str, str, Tensor], Tensor]) -> Batch:
        """Returns a copy with ``change(part, name, tensor)`` for every tensor (B, ...)."""
        parts = {}
        for part, values in (("inputs", self.inputs), ("data", self.data)):
            parts[part] = {
                name: change(part, name, value) if _has_rows(value, self.rows) else value
                for name, value in values.items()
            }
        return replace(self, **parts)

    def take(self, rows: Iterable[int]) -> Batch:
        """Returns the rows named, in that order."""
        rows = list(rows)
        batch = self.map(lambda part, name, tensor: tensor[rows])
        for name, value in self.data.items():
            if isinstance(value, list) and len(value) == self.rows:
                batch.data[name] = [value[row] for row in rows]
        return batch

    def columns(self, kept: Iterable[int]) -> Batch:
        """Returns the token columns named. Column 0 must be among them, in first place."""
        columns = torch.tensor(list(kept))

        def cut(part: str, name: str, tensor: Tensor) -> Tensor:
            if name == "input_lengths" and part == "data":
                return (columns < tensor.unsqueeze(-1)).sum(-1).to(tensor.dtype)
            shift = self.shifts.get((part, name))
            if shift is None:
                return tensor
            return tensor[:, columns if shift == 0 else columns[1:] - 1]

        return self.map(cut)

    def padded(self, columns: int) -> Batch:
        """Returns the batch with more padding on the right.

        Masks and data get zeros, the model's output gets -1: it is arbitrary there, and -1 is a
        log-probability.
        """

        def widen(part: str, name: str, tensor: Tensor) -> Tensor:
            if (part, name) not in self.shifts:
                return tensor
            is_output = part == "inputs" and tensor.is_floating_point() and name not in _MASKS
            widths = (0, 0) * (tensor.ndim - 2) + (0, columns)
            return pad(tensor, widths, value=-1.0 if is_output else 0.0)

        return self.map(widen)

    def with_samples(self, mask: Tensor) -> Batch:
        """Returns the batch with another sample mask (B,)."""
        old = self.data["sample_mask"]
        return replace(self, data={**self.data, "sample_mask": mask.to(old.dtype)})

    def with_tokens(self, mask: Tensor) -> Batch:
        """Returns the batch with another token mask (B, S). A mask among the inputs follows."""
        data = {**self.data, "token_mask": mask.to(self.data["token_mask"].dtype)}
        inputs = dict(self.inputs)
        for name in _MASKS:
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = next_token_mask(mask).to(inputs[name].dtype)
        return replace(self, inputs=inputs, data=data)

    def valid(self, part: str, name: str) -> Tensor:
        """Returns where the entries of a tensor count, in the shape of the tensor; boolean.

        Of data whose position is not known, entries count if they would in either reading.
        """
        tensor = getattr(self, part)[name]
        shift = self.shifts.get((part, name))
        where = self.sample_mask
        if shift is not None:
            mask = self.token_mask
            if shift == 1:
                mask = mask[:, 1:]
            elif part == "inputs":
                given = [self.inputs[m] for m in _MASKS if isinstance(self.inputs.get(m), Tensor)]
                mask = given[0].bool() if given else mask
            elif name not in _OWN_TOKEN:
                mask = mask | next_token_mask(mask)
            where = where.unsqueeze(-1) & mask
        return where.reshape(where.shape + (1,) * (tensor.ndim - where.ndim)).expand_as(tensor)

    def floating(self) -> list[tuple[str, str]]:
        """Names ``(part, name)`` of the floating tensors (B, ...) that are not masks."""
        return [
            (part, name)
            for part, values in (("inputs", self.inputs), ("data", self.data))
            for name, value in values.items()
            if _has_rows(value, self.rows)
            and value.is_floating_point()
            and name not in (*_MASKS, "sample_mask")
            and not (part == "data" and name in self.inputs)
        ]

    def describe(self, read: Iterable[str] = ()) -> str:
        """Prints the inputs, the masks and the data named in `read`, one tensor a line."""
        names = ["token_mask", "sample_mask", *sorted(set(read) - {"token_mask", "sample_mask"})]
        values = {**self.inputs, **{n: self.data[n] for n in names if n in self.data}}
        lines = [f"{_count(self.rows, 'row')}, {_count(self.tokens, 'token')}"]
        for name, value in values.items():
            shown = _plain(value.tolist()) if isinstance(value, Tensor) else str(value)
            lines.append(f"{name} = {shown}")
        return "\n".join(lines)


def build_batch(inputs: Any, data: Any, dtype: torch.dtype, source: str) -> Batch:
    """Checks what a batch maker returned and finds the token dimensions.

    Args:
        inputs: the model's output by argument name.
        data: the rest.
        dtype: what the floating inputs should be.
        source: the call to name in messages.

    Raises:
        KeyError: if `data` has no ``token_mask`` or ``sample_mask``.
        TypeError: if `inputs` or `data` is no mapping, or no input is floating.
        ValueError: if a shape or a dtype does not fit.
    """
    for name, value in (("inputs", inputs), ("data", data)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{source}: {name} is a {type(value).__name__}, expected a mapping")
    for name in ("token_mask", "sample_mask"):
        if not isinstance(data.get(name), Tensor):
            raise KeyError(f"{source}: data has no tensor {name!r}; it has {sorted(data)}")
    if data["token_mask"].ndim != 2 or data["token_mask"].shape[1] < 3:
        shape = tuple(data["token_mask"].shape)
        raise ValueError(f"{source}: token_mask has shape {shape}, expected (B, S), S at least 3")
    rows, tokens = data["token_mask"].shape
    if data["sample_mask"].shape != (rows,):
        shape = tuple(data["sample_mask"].shape)
        raise ValueError(f"{source}: sample_mask has shape {shape}, expected {(rows,)}")
    floating = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for name, value in floating.items():
        if value.dtype != dtype:
            raise ValueError(f"{source}: {name} has dtype {value.dtype}, expected {dtype}")
        if not _has_rows(value, rows):
            shape = tuple(value.shape)
            raise ValueError(f"{source}: {name} has shape {shape}, expected {rows} rows")
    marked = tuple(name for name, value in floating.items() if value.requires_grad)
    free = marked or tuple(
        name for name in floating if name not in _MASKS and not name.startswith("teacher_")
    )
    if not free:
        raise TypeError(f"{source}: inputs has no floating tensor to differentiate by")

    shifts = {}
    for part, values in (("inputs", inputs), ("data", data)):
        for name, value in values.items():
            if _has_rows(value, rows) and value.ndim > 1 and value.shape[1] in (tokens, tokens - 1):
                shifts[part, name] = tokens - value.shape[1]
    copies = [
        {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        for values in (inputs, data)
    ]
    return Batch(copies[0], copies[1], shifts, free)


def make_batch(
    input_type: str,
    loss_type: str | None,
    pairs: bool,
    entropy: bool,
    seed: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the inputs and the data for a type of input.

    Rows differ in length, have holes in their token mask, and one row (or pair) is masked out as a
    whole. Column 0 is never a response token. Stored log-probabilities differ from those of the
    policy: by a few tenths of a nat with an even seed, so that some ratios are clipped and some are
    not; with an odd seed they are independent, so that they rank the responses in another order.

    Args:
        input_type: value of a `LossInputType`.
        loss_type: value of a `LossType`, or None. With LOGIT, a token-level loss gets one number a
            token, any other loss one a row.
        pairs: whether rows are chosen and rejected in turn.
        entropy: whether a DISTILLATION loss gets ``H_all`` or None there.
        seed: of the random numbers.
        dtype: of all floating tensors but ``sample_mask``, which is float32 as in NeMo RL.

    Raises:
        ValueError: if there is no batch for `input_type`.
    """
    rows = 2 * PAIRS if pairs else ROWS
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def near(logprobs: Tensor, left: int) -> Tensor:
        """(B, S) from (B, S-1), `left` columns before: near those given, or any if seed is odd."""
        noise = normal(rows, TOKENS)
        if seed % 2:
            return -noise.abs() - 0.5
        return -(0.25 * noise - pad(logprobs, (left, 1 - left), value=-1.0)).abs() - 0.01

    data = _masks(rows, pairs, generator)
    logprobs = -normal(rows, TOKENS - 1).abs() - 0.5
    # All positive: a minimum that is 0 for an empty micro-batch shows.
    values = 2 + normal(rows, TOKENS).tanh()
    previous = near(logprobs, left=1)
    data |= {
        # A pair loss reads these with the last column dropped, other losses with the first.
        "reference_policy_logprobs": near(logprobs, left=0 if pairs else 1),
        "prev_logprobs": previous,
        "generation_logprobs": previous + 0.1 * normal(rows, TOKENS),
        "advantages": normal(rows, TOKENS),
        "returns": 2 + normal(rows, TOKENS),
        "values": values + 0.3 * normal(rows, TOKENS),
        "rewards": normal(rows),
        # What losses of `nemo_rl_ref.custom` read besides.
        "gt_rewards": normal(rows),
        "mismatched_logprobs": -5 - normal(rows).abs(),
        "mismatched_reference_logprobs": -5 - normal(rows).abs(),
    }
    if input_type == "logprob":
        inputs = {"next_token_logprobs": logprobs}
    elif input_type == "logit" and loss_type == "token_level" and not pairs:
        inputs = {"logits": values}
    elif input_type == "logit":
        inputs = {"logits": normal(rows, 1)}
    else:
        inputs = _inputs_of_two_models(input_type, data, normal, entropy)
    for part in (inputs, data):
        for name, value in part.items():
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                part[name] = value.to(dtype)
    return inputs, data


def _inputs_of_two_models(
    input_type: str, data: dict[str, Any], normal: Callable[..., Tensor], entropy: bool
) -> dict[str, Any]:
    """Inputs of a loss that compares a student with a teacher; adds what it reads to `data`."""
    rows = len(data["token_mask"])
    if input_type == "distillation":
        student, teacher = normal(2, rows, TOKENS, 8).log_softmax(-1)
        top, indices = teacher.topk(3)
        data |= {"teacher_topk_logits": top, "teacher_topk_indices": indices}
        return {
            "student_topk_logprobs": student.gather(-1, indices)[:, :-1],
            "teacher_topk_logprobs": top[:, :-1],
            "H_all": (student.exp() * student).sum(-1)[:, :-1] if entropy else None,
        }
    if input_type == "draft":
        data["student_logits"] = normal(rows, TOKENS, 6)
        return {
            "teacher_logits": normal(rows, TOKENS, 6),
            "student_logits": data["student_logits"],
            "token_mask": next_token_mask(data["token_mask"]),
        }
    raise ValueError(
        f"batch_maker is None and input_type is {input_type!r}: there are batches for "
        "'logprob', 'logit', 'distillation' and 'draft'; give a batch_maker"
    )


def next_token_mask(mask: Tensor) -> Tensor:
    """Returns (B, S) shifted so that entry t belongs to token t+1; the last entry is 0."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def _masks(rows: int, pairs: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids, lengths and masks, in NeMo RL's dtypes."""
    lengths = torch.randint(6, TOKENS + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = TOKENS, 5
    starts = torch.randint(2, 4, (rows,), generator=generator)
    columns = torch.arange(TOKENS)
    in_row = columns < lengths.unsqueeze(-1)
    token_mask = in_row & (columns >= starts.unsqueeze(-1))
    for row in range(0, rows, 2):  # a hole in every other response
        token_mask[row, starts[row] + 1] = False
    input_ids = torch.randint(1, 50, (rows, TOKENS), generator=generator) * in_row
    sample_mask = torch.ones(rows)
    # The masked rows are neither the first nor the last, which have unequal numbers of tokens.
    group = 2 if pairs else 1
    masked = 1 + int(torch.randint(0, rows // group - 2, (), generator=generator))
    sample_mask[group * masked : group * (masked + 1)] = 0
    return {
        "input_ids": input_ids,
        "input_lengths": lengths,
        "token_mask": token_mask.long(),
        "sample_mask": sample_mask,
    }


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plain(value: Any) -> str:
    """A nested list as text, numbers with four digits."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
