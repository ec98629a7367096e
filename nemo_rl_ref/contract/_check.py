# SPDX-License-Identifier: Apache-2.0
"""`check_loss`: the nine promises, probe by probe."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl_ref.contract._batches import Batch, build_batch, make_batch
from nemo_rl_ref.contract._calls import start
from nemo_rl_ref.contract._extremes import empty_responses, far_log_ratios, nothing_valid
from nemo_rl_ref.contract._gradient import finite_differences
from nemo_rl_ref.contract._invariance import (
    counts_of_one,
    extra_padding,
    micro_batches,
    sample_order,
    sequence_packing,
    unequal_ranks,
)
from nemo_rl_ref.contract._masking import garbage, masked_gradient
from nemo_rl_ref.contract._pickling import FreshInterpreter, pickles
from nemo_rl_ref.contract._probes import Finding, NotApplicable, Probe, Subject, probe_name
from nemo_rl_ref.contract._protocol import attribute_problems, enum_value, protocol, recording
from nemo_rl_ref.contract._purity import inputs_kept, same_bits, takes
from nemo_rl_ref.contract._report import Entry, Failure, Report
from nemo_rl_ref.contract._shrink import shrink
from nemo_rl_ref.contract.limits import Overtime, file_of, raised_at, time_limit

BatchMaker = Callable[[int, torch.dtype], tuple[Mapping[str, Any], Mapping[str, Any]]]

_SEEDS = (0, 1)
#: Where the losses are that are NeMo RL's own.
_NEMO_RL = ("nemo_rl_ref.algorithms.loss.", "nemo_rl.algorithms.")

#: The promises in their order: name, what is promised, and the probes that look at it.
PROMISES: dict[str, tuple[str, tuple[Probe, ...]]] = {
    "protocol": (
        "loss_type and input_type, a scalar differentiable loss, metrics that are floats",
        (protocol,),
    ),
    "micro-batches": (
        "the sum over any split, and over single packed sequences, equals the whole batch in "
        "value, gradient and metrics",
        (micro_batches, sequence_packing, counts_of_one),
    ),
    "ranks": (
        "data-parallel ranks with unequal shares give the result of the whole batch",
        (unequal_ranks,),
    ),
    "masks": (
        "masked tokens and samples get no gradient, and garbage there changes nothing",
        (
            masked_gradient,
            *(
                garbage(kind, rows)
                for rows in ("masked tokens", "masked samples")
                for kind in ("huge", "inf", "NaN")
            ),
        ),
    ),
    "padding and order": (
        "more padding and another order of the samples change nothing",
        (extra_padding, sample_order),
    ),
    "gradient": (
        "the gradient agrees with finite differences, detached values held",
        (finite_differences,),
    ),
    "extremes": (
        "log-ratios of ±1e4, empty responses and batches with nothing valid give finite numbers, "
        "and zero where it should be zero",
        (far_log_ratios, empty_responses, nothing_valid),
    ),
    "purity": (
        "inputs are not modified, same inputs give the same bits, float32 and bfloat16 work",
        (inputs_kept, same_bits, takes(torch.float32), takes(torch.bfloat16)),
    ),
    "pickling": (
        "unpickled in a fresh interpreter, the loss behaves the same",
        (),
    ),
}


def check_loss(
    loss_fn: Callable[..., Any],
    batch_maker: BatchMaker | None = None,
    *,
    pairs: bool | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Finds out which promises of a NeMo RL loss a loss keeps.

    Trainers split a global batch into micro-batches, packs and ranks, fill it with padding and
    masked samples, and ship the loss to other processes. A loss that gives the result of the
    global batch whatever they do keeps these promises:

    ===================  ====================================================================
    protocol             ``loss_type`` and ``input_type``, a scalar differentiable loss,
                         metrics that are floats
    micro-batches        the sum over any split equals the whole batch, in value, gradient and
                         metrics; the same for one call a sequence (packing), and for counts
                         of 1 that are divided later by ``metric_normalizations``
    ranks                the same for ranks with unequal shares, gradients averaged by DDP
    masks                masked tokens and samples get no gradient; huge numbers, infinities
                         and NaN there change nothing
    padding and order    more padding and reordered samples change nothing
    gradient             agrees with finite differences in float64, detached values held
    extremes             log-ratios of ±1e4, empty responses, nothing valid: finite, and zero
                         where it should be zero
    purity               inputs stay as they are, same inputs same bits, float32 and bfloat16
    pickling             cloudpickle carries it to a fresh interpreter, where it is the same
    ===================  ====================================================================

    Metrics combine as trainers combine them: names that end in ``_min`` or ``_max`` as extrema,
    others as sums. Metrics marked `MetricNormalizer.NONE` whose name does not start with ``num_``
    or end with ``_count`` are shown and not compared. Two results agree if they differ by less
    than 1e-5 of their size. Detached values are what ``detach`` returned and what was computed
    under ``torch.no_grad``; a value that leaves the graph through ``.item()`` or ``.data`` is not
    held, and fails.

    A check takes a second or two, and the start of the fresh interpreter on top.

    Args:
        loss_fn: the loss, an object that is called as trainers call it.
        batch_maker: ``batch_maker(seed, dtype)`` returns ``(inputs, data)``: the model's output by
            argument name, floating tensors (B, ...) of that dtype, and the data with
            ``token_mask`` (B, S) and ``sample_mask`` (B,). The loss is differentiated by the
            inputs that require grad, or if none does by all floating ones whose names do not
            begin with ``teacher_``. None for batches made for the loss's ``input_type`` with the
            fields that NeMo RL's losses read. Give one if the loss reads other fields.
        pairs: whether rows are chosen and rejected in turn and stay together; None for yes if the
            loss is a ``PreferenceLossFn``.
        only: names of the promises to check, out of `PROMISES`; None for all. Without
            ``"pickling"`` no interpreter is started.

    Returns:
        One entry a promise. A broken promise has the smallest batch that shows it. What a loss
        has from NeMo RL's class that it derives from says so.

    Raises:
        ImportError: if cloudpickle is not installed.
        KeyError: if the data of `batch_maker` has no masks.
        TypeError: if `loss_fn` is a class or cannot be called, or `batch_maker` returns something
            else than two mappings.
        ValueError: if there are no batches for the input type, a batch's shapes or dtypes do not
            fit, `only` has an unknown name, or the loss does not answer within two minutes.

    Example:
        A loss that divides by its own tokens instead of those of the global batch:

        >>> from nemo_rl_ref.algorithms.loss import NLLLossFn
        >>> class Own(NLLLossFn):
        ...     def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        ...         own = data["token_mask"][:, 1:].sum()
        ...         return super().__call__(next_token_logprobs, data, global_valid_seqs, own)
        ...
        >>> check_loss(NLLLossFn(), only=["micro-batches"])
        <Report on NLLLossFn: ok>
        >>> check_loss(Own(), only=["micro-batches"]).failed
        ('micro-batches',)
    """
    if isinstance(loss_fn, type) or not callable(loss_fn):
        kind = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else repr(loss_fn)
        raise TypeError(f"loss_fn is {kind}, expected a loss: an object that can be called")
    names = tuple(PROMISES) if only is None else tuple(n for n in PROMISES if n in only)
    if only is not None and set(only) != set(names):
        unknown = sorted(set(only) - set(names))
        raise ValueError(f"only has {unknown}, expected names out of {list(PROMISES)}")
    if "pickling" in names and find_spec("cloudpickle") is None:
        raise ImportError("the promise 'pickling' needs cloudpickle, which is not installed")
    try:
        with time_limit():
            report = _check(loss_fn, batch_maker, pairs, names)
            return _tell_apart(report, loss_fn, batch_maker, pairs)
    except Overtime as error:
        at = raised_at(error, file_of(loss_fn)) or raised_at(error, file_of(batch_maker))
        raise ValueError(f"the check of {report_title(loss_fn)} {error}{at}") from None


def report_title(loss_fn: Callable[..., Any]) -> str:
    """The name of a loss."""
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def _tell_apart(
    report: Report,
    loss_fn: Callable[..., Any],
    batch_maker: BatchMaker | None,
    pairs: bool | None,
) -> Report:
    """Note which failures NeMo RL's loss has too that a loss is, or derives from."""
    bases = [kind for kind in type(loss_fn).__mro__ if kind.__module__.startswith(_NEMO_RL)]
    bases = [kind for kind in bases if not kind.__module__.endswith(".interfaces")]
    here = [name for name in report.failed if name != "pickling"]
    if not here or not bases:
        return report
    base, theirs = bases[0], report
    if base is not type(loss_fn):
        try:
            plain = copy.copy(loss_fn)
            plain.__class__ = base  # with the settings of this one
            theirs = _check(plain, batch_maker, pairs, tuple(here))
        except Exception:  # a class that cannot be replaced has nothing to be compared with
            return report
    found = [(f.probe, _about(f)) for entry in theirs.entries for f in entry.failures]

    def mark(failure: Failure) -> Failure:
        about = _about(failure)
        same = any(probe == failure.probe and about <= more for probe, more in found)
        return replace(failure, base=base.__name__) if same else failure

    entries = [replace(e, failures=tuple(map(mark, e.failures))) for e in report.entries]
    return Report(report.loss, tuple(entries))


def _about(failure: Failure) -> set[str]:
    """What a failure is about, in names: the tensors with garbage, the metric, or the result."""
    if found := re.search(r" in masked \w+ of (.*?): ", failure.problem):
        return set(found[1].split(", "))
    return set(re.findall(r": (metric \S+) ", failure.problem)[:1]) or {"result"}


def _check(
    loss_fn: Callable[..., Any],
    batch_maker: BatchMaker | None,
    pairs: bool | None,
    names: tuple[str, ...],
) -> Report:
    """Check these promises, see `check_loss`."""
    title = report_title(loss_fn)
    if batch_maker is None and _enum(loss_fn, "input_type", LossInputType) is None:
        entry = _entry("protocol", [Finding("", 1, "; ".join(attribute_problems(loss_fn)))])
        return Report(title, _without_calls(entry, names, "no known input_type"))

    subject, usable = _subject(loss_fn, batch_maker, pairs)
    batches = [subject.make(seed, subject.dtype) for seed in _SEEDS]
    if not usable:
        entry = _run("protocol", subject, batches)
        return Report(title, _without_calls(entry, names, "calls do not work"))
    with FreshInterpreter() if "pickling" in names else nullcontext() as fresh:
        entries = [_run(name, subject, batches) for name in names if name != "pickling"]
        if fresh is not None:
            entries += _run_elsewhere([subject], fresh)
    return Report(title, tuple(entries))


def check_losses(losses: Mapping[str, Callable[..., Any]]) -> dict[str, Report]:
    """Checks many losses as `check_loss` does, with one fresh interpreter for all.

    Args:
        losses: the losses by the names that their reports are to have.

    Returns:
        A report for each name, in the order of `losses`.

    Raises:
        ImportError: if cloudpickle is not installed.
        TypeError: if a loss is a class or cannot be called.
        ValueError: if there are no batches for a loss's input type.

    Example:
        Both multiply by masks, so that a NaN under a mask makes them NaN, as in NeMo RL:

        >>> from nemo_rl_ref.algorithms.loss import NLLLossFn, PreferenceLossFn
        >>> losses = {"SFT": NLLLossFn(), "reward model": PreferenceLossFn()}
        >>> {name: report.failed for name, report in check_losses(losses).items()}
        {'SFT': ('masks',), 'reward model': ('masks',)}
    """
    if find_spec("cloudpickle") is None:
        raise ImportError("check_losses needs cloudpickle, which is not installed")
    here = set(PROMISES) - {"pickling"}
    reports = {name: check_loss(loss_fn, only=here) for name, loss_fn in losses.items()}
    subjects = {name: _subject(loss_fn, None, None) for name, loss_fn in losses.items()}
    usable = {name: subject for name, (subject, works) in subjects.items() if works}
    with FreshInterpreter() as fresh:
        elsewhere = dict(zip(usable, _run_elsewhere(list(usable.values()), fresh), strict=True))
    absent = _entry("pickling", [], ["calls do not work, see protocol"])
    return {
        name: Report(name, (*report.entries, elsewhere.get(name, absent)))
        for name, report in reports.items()
    }


def _subject(
    loss_fn: Callable[..., Any], batch_maker: BatchMaker | None, pairs: bool | None
) -> tuple[Subject, bool]:
    """Describes the loss, and tells whether a call of it works at all."""
    loss_type = _enum(loss_fn, "loss_type", LossType)
    input_type = _enum(loss_fn, "input_type", LossInputType)
    if pairs is None:  # by name, so that NeMo RL's own class counts too
        pairs = any(kind.__name__ == "PreferenceLossFn" for kind in type(loss_fn).__mro__)
    # NeMo RL gives H_all only to the losses that want it.
    entropy = bool(getattr(loss_fn, "zero_outside_topk", True)) and (
        getattr(loss_fn, "kl_type", "") != "forward"
    )

    def make(seed: int, dtype: torch.dtype) -> Batch:
        source = f"batch_maker(seed={seed}, dtype={dtype})"
        if batch_maker is None:
            made = make_batch(input_type or "", loss_type, pairs, entropy, seed, dtype)
        else:
            try:
                made = batch_maker(seed, dtype)
            except (Exception, SystemExit) as error:  # it is the user's
                at = raised_at(error, file_of(batch_maker))
                raise ValueError(f"{source}: raises {type(error).__name__}: {error}{at}") from error
            if not isinstance(made, tuple) or len(made) != 2:
                kind = type(made).__name__
                raise TypeError(f"{source}: returned a {kind}, expected a tuple (inputs, data)")
        batch = build_batch(*made, dtype, source)
        if pairs and batch.rows % 2:
            raise ValueError(f"{source}: {batch.rows} rows, expected an even number, as pairs")
        return batch

    group = 2 if pairs else 1
    for dtype in (torch.float64, torch.float32):
        batch, read = make(_SEEDS[0], dtype), set()
        try:
            start(loss_fn, batch, make_data=lambda data, read=read: recording(data, read)).finish()
        except Exception:  # what it raises is what the protocol probe reports
            continue
        return Subject(loss_fn, loss_type, input_type, group, make, dtype, frozenset(read)), True
    subject = Subject(loss_fn, loss_type, input_type, group, make, torch.float64, frozenset(read))
    return subject, False


def _run(name: str, subject: Subject, batches: list[Batch]) -> Entry:
    """Runs the probes of a promise on all batches; what fails is made small."""
    began = time.perf_counter()
    findings, absent = [], []
    for probe in PROMISES[name][1]:
        try:
            found = [(_examine(probe, subject, batch), batch) for batch in batches]
        except NotApplicable as reason:
            absent.append(str(reason))
            continue
        worst, batch = max(found, key=lambda item: (bool(item[0].problem), item[0].size))
        if worst.problem:
            worst = _smallest(probe, subject, batch, worst, exact=name == "protocol")
        findings.append(replace(worst, probe=probe_name(probe)))
    return _entry(name, findings, absent, subject.read, began)


def _run_elsewhere(subjects: list[Subject], fresh: FreshInterpreter) -> list[Entry]:
    """Checks the promise that needs another process."""
    began = time.perf_counter()
    batches = []
    for subject in subjects:
        made = [subject.make(seed, subject.dtype) for seed in _SEEDS]
        batches.append([made[0].take(range(subject.group)), *made])
    findings = pickles([subject.loss_fn for subject in subjects], batches, fresh)
    return [
        _entry("pickling", [finding], (), subject.read, began)
        for subject, finding in zip(subjects, findings, strict=True)
    ]


def _examine(probe: Probe, subject: Subject, batch: Batch) -> Finding:
    """Runs a probe. What the loss raises in it is a problem like any other."""
    try:
        return probe(subject, batch)
    except NotApplicable:
        raise
    except Exception as error:
        what, text = probe_name(probe), str(error).strip().split("\n")[0]
        at = raised_at(error, file_of(subject.loss_fn))
        problem = f"{what}: raises {type(error).__name__}: {text}{at}"
        return Finding(f"{what}: raises", float("inf"), problem, raised=type(error).__name__)


def _smallest(probe: Probe, subject: Subject, batch: Batch, first: Finding, exact: bool) -> Finding:
    """Returns the finding on the smallest batch that shows the same problem."""
    latest, smallest = first, batch

    def shows(smaller: Batch) -> bool:
        nonlocal latest, smallest
        try:
            found = _examine(probe, subject, smaller)
        except NotApplicable:
            return False
        same = found.problem == first.problem if exact else found.raised == first.raised
        if not (found.problem and same):
            return False
        latest, smallest = found, smaller
        return True

    shrink(batch, subject.group, shows)
    return Finding(first.measured, first.size, latest.problem, latest.batch or smallest)


def _entry(
    name: str,
    findings: Iterable[Finding],
    absent: Iterable[str] = (),
    read: Iterable[str] = (),
    began: float | None = None,
) -> Entry:
    """Turns findings into an entry; `absent` says why probes were not applicable."""
    findings = list(findings)
    failures = tuple(
        Failure(
            found.problem,
            found.batch,
            found.batch.describe(read) if found.batch else "",
            found.probe or name,
        )
        for found in findings
        if found.problem
    )
    status = "failed" if failures else "ok" if findings else "not applicable"
    notes = [f"not applicable: {reason}" for reason in absent]
    measured = "; ".join([*(found.measured for found in findings if found.measured), *notes])
    seconds = 0.0 if began is None else time.perf_counter() - began
    return Entry(name, PROMISES[name][0], status, measured, failures, seconds)


def _without_calls(entry: Entry, names: Iterable[str], reason: str) -> tuple[Entry, ...]:
    """The entries of a loss that cannot be called: all but the protocol are not applicable.

    The protocol is there even if it was not asked for, because it says why.
    """
    rest = [_entry(name, [], [f"{reason}, see protocol"]) for name in names if name != "protocol"]
    return (entry, *rest)


def _enum(loss_fn: Any, name: str, kind: Any) -> str | None:
    return enum_value(getattr(loss_fn, name, None), kind)
