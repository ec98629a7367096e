# SPDX-License-Identifier: Apache-2.0
"""Why promises are broken: one entry a cause, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl_ref.contract._report import Entry, Failure

_LOSSES = "docs/core-design/design-principles/loss-functions.md"
_PARTS = ("micro batches", "sequence packing", "counts of one", "unequal ranks")


@dataclass(frozen=True)
class _Kind:
    """Failures of these probes have this cause, and those of ``also`` with them.

    Attributes:
        probes: beginnings of their names.
        what: what is wrong, in a sentence.
        instead: what to write.
        page: the page that explains it.
        metrics: whether it is for failures that are about a metric alone.
        also: probes that fail for the same reason.
        raises: whether it is for all probes in which a call raised.
    """

    probes: tuple[str, ...]
    what: str
    instead: str
    page: str = f"{_LOSSES}#contract"
    metrics: bool = False
    also: tuple[str, ...] = ()
    raises: bool = False


#: In the order in which they are looked for.
KINDS = (
    _Kind(
        (),
        "a call raises an error",
        "take every batch that a trainer makes: of any size, masked as a whole, in bfloat16",
        raises=True,
    ),
    _Kind(
        ("protocol",),
        "it is not called, or does not answer, as NeMo RL's losses do",
        "set loss_type and input_type, return (loss, metrics): a scalar with a gradient, and floats",
    ),
    _Kind(
        _PARTS,
        "the losses of the parts of a batch do not add up to that of the whole: it divides by what it "
        "has counted itself, as a mean does, or couples the samples",
        "sum over what the masks leave, and divide by global_valid_seqs (or global_valid_toks, if "
        "loss_type is TOKEN_LEVEL), not by .mean(); set needs_whole_batch = True on a loss that must "
        "see all samples at once",
        page=f"{_LOSSES}#mean-of-means",
        also=("nothing valid", "masked gradient", "huge in masked samples"),  # a mean takes all
    ),
    _Kind(
        _PARTS,
        "a metric of the parts does not add up to that of the whole batch",
        "divide it by global_valid_seqs or global_valid_toks, end its name in _min or _max if it is "
        "one, or say in metric_normalizations what it is divided by",
        page=f"{_LOSSES}#mean-of-means",
        metrics=True,
    ),
    _Kind(
        ("NaN in", "inf in"),
        "an infinity or NaN in a masked place changes the result: it is multiplied by the mask, and "
        "0 times NaN is NaN",
        "torch.where(mask, value, 0.0), before anything is computed from the value",
    ),
    _Kind(
        ("huge in", "masked gradient"),
        "masked tokens or samples have a part in the result",
        "torch.where(mask, value, 0.0), with token_mask[:, 1:] and sample_mask",
    ),
    _Kind(
        ("extra padding",),
        "columns of padding change the result",
        "count and average over token_mask, never over the columns",
    ),
    _Kind(
        ("sample order",),
        "the order of the samples changes the result",
        "treat each sample (or pair) alike, wherever it stands in the batch",
    ),
    _Kind(
        ("finite differences",),
        "the gradient is not that of the loss",
        "leave out .data and .item() in what is differentiated; use .detach() or torch.no_grad() for "
        "what is held; look at a backward of your own",
    ),
    _Kind(
        ("far log ratios",),
        "far from the reference the result is not finite",
        "logsigmoid(x) for log(sigmoid(x)); clamp a log-ratio before exp",
        page=f"{_LOSSES}#numerical-rules",
    ),
    _Kind(
        ("empty responses",),
        "a response without tokens is divided by its length, 0",
        "divide by the count with .clamp(min=1), and keep its loss at 0",
        page=f"{_LOSSES}#numerical-rules",
    ),
    _Kind(
        ("nothing valid",),
        "samples that are masked out still have a loss",
        "multiply what each sample adds by sample_mask, or torch.where(sample_mask > 0, …, 0.0)",
    ),
    _Kind(
        ("inputs kept",),
        "a call changes what it is given",
        "no operation in place (…_(), +=) on inputs or data; make a new tensor",
    ),
    _Kind(
        ("same bits",),
        "the same call gives another result the second time",
        "no random numbers, and no state that a call changes",
    ),
    _Kind(
        ("float32", "bfloat16"),
        "in lower precision it raises, overflows or loses its digits",
        "compute in float32: .float() on what comes in",
        page=f"{_LOSSES}#numerical-rules",
    ),
    _Kind(
        ("pickling",),
        "it does not travel to another process",
        "define the class in a file that the workers can import, and keep open files, locks and "
        "generators out of it",
        page="docs/advanced/algorithm-development/custom-dpo.md#how-the-class-reaches-the-workers",
    ),
)


@dataclass(frozen=True)
class Cause:
    """One reason for which promises are broken.

    Attributes:
        what: what is wrong, in a sentence.
        instead: what to write instead.
        page: the page that explains it.
        promises: the promises that are broken for it.
        failures: how it shows.
        base: NeMo RL's loss that has it too, or empty if it is the author's own.
    """

    what: str
    instead: str
    page: str
    promises: tuple[str, ...]
    failures: tuple[Failure, ...]
    base: str = ""

    def __str__(self) -> str:
        """The cause in a few lines."""
        head = f"{self.what[0].upper()}{self.what[1:]}."
        if self.base:
            return f"As in NeMo RL's {self.base}: {self.what} ({', '.join(self.promises)})."
        return "\n".join(
            [
                f"{head} Broken: {', '.join(self.promises)}.",
                f"  Seen: {self.failures[0].problem}",
                f"  Write instead: {self.instead}",
                f"  Explained in {self.page}",
            ]
        )


def causes_of(entries: Iterable[Entry]) -> list[Cause]:
    """Group the failures of a report by their cause, the author's own causes first."""
    every = [(entry.name, failure) for entry in entries for failure in entry.failures]
    found = []
    for base in sorted({failure.base for _, failure in every}):
        left = [(name, failure) for name, failure in every if failure.base == base]
        for kind in KINDS:
            mine = [pair for pair in left if _fits(kind, kind.probes, pair[1])]
            if mine:
                mine += [pair for pair in left if kind.also and _fits(kind, kind.also, pair[1])]
                names = tuple(dict.fromkeys(name for name, _ in mine))
                failures = tuple(failure for _, failure in mine)
                found.append(Cause(kind.what, kind.instead, kind.page, names, failures, base))
            left = [(name, f) for name, f in left if not any(f is one for _, one in mine)]
    return found


def _fits(kind: _Kind, probes: tuple[str, ...], failure: Failure) -> bool:
    if kind.raises or ": raises " in failure.problem:
        return kind.raises and ": raises " in failure.problem
    is_metric = ": metric " in failure.problem
    return failure.probe.startswith(probes) and (is_metric == kind.metrics or probes != _PARTS)
