# SPDX-License-Identifier: Apache-2.0
"""`check_loss` on good losses, on NeMo RL's own, and on one broken loss for each way to fail."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softmax

from nemo_rl_ref.algorithms.loss import (
    DPOLossConfig,
    DPOLossFn,
    NLLLossFn,
    PreferenceLossFn,
)
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl_ref.contract import PROMISES, check_loss

# The promises that need no second interpreter; test_pickling.py has the other.
HERE = tuple(name for name in PROMISES if name != "pickling")


def check(loss_fn, batch_maker=None, **kwargs):
    return check_loss(loss_fn, batch_maker, only=HERE, **kwargs)


def valid(data: dict) -> Tensor:
    return (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).bool()


class Clean:
    """Negative log-likelihood that keeps every promise. The broken losses change one thing."""

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self):
        self.metric_normalizations = {
            "loss": MetricNormalizer.TOKENS,
            "num_tokens": MetricNormalizer.NONE,
            "logprob_min": MetricNormalizer.NONE,
        }

    def total(self, logprobs: Tensor, data: dict) -> Tensor:
        """The sum to minimize; `logprobs` are 0 where a mask is."""
        return -logprobs.sum()

    def metrics(self, loss: Tensor, logprobs: Tensor, mask: Tensor) -> dict:
        shown = logprobs[mask]
        return {
            "loss": loss.item(),
            "num_tokens": mask.sum().item(),
            "logprob_min": shown.min().item() if len(shown) else float("inf"),
        }

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = valid(data)
        logprobs = next_token_logprobs.masked_fill(~mask, 0)
        loss = self.total(logprobs, data) / (global_valid_toks + 1e-8)
        return loss, self.metrics(loss, logprobs, mask)


class CleanPairs(PreferenceLossFn):
    """DPO that keeps every promise."""

    input_type = LossInputType.LOGPROB

    def pair_losses(self, margins: Tensor) -> Tensor:
        return -logsigmoid(0.1 * margins)

    def log_ratios(self, log_ratios: Tensor, data: dict) -> Tensor:
        return log_ratios.sum(-1)

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        reference = data["reference_policy_logprobs"][:, :-1]
        log_ratios = (next_token_logprobs - reference).masked_fill(~valid(data), 0)
        chosen, rejected = self.split_output_tensor(self.log_ratios(log_ratios, data))
        pair_valid = data["sample_mask"][::2].bool()
        losses = self.pair_losses(chosen - rejected).masked_fill(~pair_valid, 0)
        loss = losses.sum() / (global_valid_seqs / 2 + 1e-8)
        return loss, {"loss": loss.item()}


class CleanPolicyGradient(Clean):
    """CISPO: the clipped ratio, held constant, weighs the log-probability."""

    def total(self, logprobs, data):
        previous = data["prev_logprobs"][:, 1:].masked_fill(~valid(data), 0)
        weight = (logprobs - previous).exp().clamp(0.8, 1.2).detach()
        with torch.no_grad():  # held as well
            confidence = logprobs.exp()
            confidence[confidence > 0.9] = 0.9
        advantages = data["advantages"][:, 1:].masked_fill(~valid(data), 0)
        return -(weight * (1 - confidence) * advantages * logprobs).sum()


class CleanValues(Clean):
    """Squared error of values, one a token: LOGIT input (B, S)."""

    input_type = LossInputType.LOGIT

    def __call__(self, logits, data, global_valid_seqs, global_valid_toks):
        assert logits.shape == data["token_mask"].shape
        mask = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)).bool()
        errors = (logits - data["returns"]).masked_fill(~mask, 0)
        loss = errors.square().sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class CleanRewards(Clean):
    """Squared error of rewards, one a sequence: LOGIT input (B, 1)."""

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self):
        self.metric_normalizations = {"loss": MetricNormalizer.SEQUENCES}

    def __call__(self, logits, data, global_valid_seqs, global_valid_toks):
        assert logits.shape == (len(data["rewards"]), 1)
        errors = (logits[:, 0] - data["rewards"]).masked_fill(data["sample_mask"] == 0, 0)
        loss = errors.square().sum() / (global_valid_seqs + 1e-8)
        return loss, {"loss": loss.item()}


class CleanDistillation(Clean):
    """Forward KL over the teacher's best tokens, and the entropy if there is one."""

    input_type = LossInputType.DISTILLATION
    zero_outside_topk, kl_type = True, "mixed"

    def __call__(
        self,
        student_topk_logprobs,
        teacher_topk_logprobs,
        H_all,
        data,
        global_valid_seqs,
        global_valid_toks,
    ):
        mask = ~valid(data)
        student = student_topk_logprobs.masked_fill(mask.unsqueeze(-1), 0)
        teacher = teacher_topk_logprobs.masked_fill(mask.unsqueeze(-1), 0)
        kl = (teacher.exp() * (teacher - student)).sum()
        if self.zero_outside_topk:
            kl = kl + 0.1 * H_all.masked_fill(mask, 0).sum()
        else:
            assert H_all is None
        loss = kl / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class DistillationWithoutEntropy(CleanDistillation):
    zero_outside_topk = False


class CleanDraft(Clean):
    """Cross-entropy to the next token's teacher."""

    input_type = LossInputType.DRAFT

    def __call__(
        self, teacher_logits, student_logits, token_mask, data, global_valid_seqs, global_valid_toks
    ):
        assert student_logits is data["student_logits"]
        mask = (token_mask * data["sample_mask"].unsqueeze(-1) == 0).unsqueeze(-1)
        teacher = softmax(teacher_logits.masked_fill(mask, 0), -1)
        student = log_softmax(student_logits.masked_fill(mask, 0), -1)
        loss = -(teacher * student).masked_fill(mask, 0).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


GOOD = [
    Clean,
    CleanPairs,
    CleanPolicyGradient,
    CleanValues,
    CleanRewards,
    CleanDistillation,
    DistillationWithoutEntropy,
    CleanDraft,
]


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_a_good_loss_keeps_all(kind):
    report = check(kind())
    assert report.ok, str(report)
    assert [entry.status for entry in report.entries] == ["ok"] * len(HERE)


class DPOPLossFn(DPOLossFn):
    """DPO with a penalty where the policy makes the chosen response less likely."""

    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        loss, *metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)
        chosen, _ = self.split_output_tensor(rewards)
        penalty = (-chosen).clamp(min=0) * sample_mask[::2]
        return loss + beta * penalty.sum() / (global_valid_seqs / 2 + 1e-8), *metrics


MIRRORED = {
    "NLL": NLLLossFn(),
    "Preference": PreferenceLossFn(),
    "DPO": DPOLossFn(DPOLossConfig()),
    "DPO+SFT": DPOLossFn(DPOLossConfig(sft_loss_weight=0.3, reference_policy_kl_penalty=0.5)),
    "DPO-averages": DPOLossFn(
        DPOLossConfig(
            sft_loss_weight=1.0, preference_average_log_probs=True, sft_average_log_probs=True
        )
    ),
    "DPOP": DPOPLossFn(DPOLossConfig(reference_policy_kl_penalty=0.1)),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_nemo_rl_multiplies_by_masks(name):
    """0 · NaN and 0 · inf are NaN; apart from that these losses keep what they promise."""
    report = check(MIRRORED[name])
    assert report.failed == ("masks",), str(report)
    problems = " ".join(failure.problem for failure in report["masks"].failures)
    assert "inf in masked" in problems and "nan in masked" in problems
    assert "gradient where masked: 0.0e+00" in report["masks"].measured
    assert report["masks"].measured.count("huge in masked") == 2
    for part in ("tokens", "samples"):
        assert f"huge in masked {part}: changes nothing" in report["masks"].measured


# One broken loss for each way to fail, with the promises that it breaks.


class MetricsAsTensors(Clean):
    def metrics(self, loss, logprobs, mask):
        return {"loss": loss.detach()}


class MetricIsNaN(Clean):
    def metrics(self, loss, logprobs, mask):
        return {"loss": float("nan")}


class MetricsAsList(Clean):
    def metrics(self, loss, logprobs, mask):
        return [loss.item()]


class NoLossType(Clean):
    loss_type = None


class BareTensor(Clean):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)[0]


class BadTable(Clean):
    def __init__(self):
        self.metric_normalizations = {"loss": "tokens", "num_tokens": MetricNormalizer.NONE}


class TableIsList(Clean):
    def __init__(self):
        self.metric_normalizations = ["loss"]


class NaNHere(Clean):
    """The root of a number that rounds to below 0."""

    def total(self, logprobs, data):
        return (logprobs + 1).sqrt().sum()


class NoDistillationFlags(CleanDistillation):
    def __getattribute__(self, name):
        if name == "kl_type":
            raise AttributeError(name)
        return super().__getattribute__(name)


class MeanOfMeans(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        own = valid(data).sum()
        return super().__call__(next_token_logprobs, data, global_valid_seqs, own)


class MetricIsLocalMean(Clean):
    def metrics(self, loss, logprobs, mask):
        return {"loss": loss.item(), "mean": logprobs.sum().item() / max(1, mask.sum().item())}


class WrongTable(Clean):
    def __init__(self):
        super().__init__()
        self.metric_normalizations["loss"] = MetricNormalizer.SEQUENCES


class WrongLossType(Clean):
    loss_type = LossType.SEQUENCE_LEVEL


class NeedsBatchedDataDict(Clean):
    def total(self, logprobs, data):
        assert data.size == len(logprobs)
        return super().total(logprobs, data)


class MinimumOfNothingIsZero(Clean):
    def metrics(self, loss, logprobs, mask):
        return {**super().metrics(loss, logprobs, mask), "prob_min": self.lowest(logprobs, mask)}

    def lowest(self, logprobs, mask):
        return logprobs[mask].exp().min().item() if mask.any() else 0.0


class MeanOverColumns(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs, data) / logprobs.shape[1]


class SortsBatch(CleanPairs):
    """Compares sorted margins with sorted reference margins, as AOT does."""

    def log_ratios(self, log_ratios, data):
        reference = data["reference_policy_logprobs"][:, :-1].masked_fill(~valid(data), 0).sum(-1)
        policy = log_ratios.sum(-1) + reference
        kept = data["sample_mask"][::2].bool()
        margins = [(x[::2] - x[1::2])[kept].sort().values for x in (policy, reference)]
        scores = torch.zeros_like(policy)
        scores[::2] = scores[::2].masked_scatter(kept, margins[0] - margins[1])
        return scores


class PerRankCounts(Clean):
    """Right on one process. With ranks, each divides by what it has itself."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        if dist.is_initialized():
            global_valid_toks = valid(data).sum() * dist.get_world_size()
        return super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)


class UndoesTheAverageTwice(Clean):
    """The trainer multiplies by the number of ranks already."""

    def total(self, logprobs, data):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return super().total(logprobs, data) * ranks


class FirstRankOnly(Clean):
    def total(self, logprobs, data):
        mine = not dist.is_initialized() or dist.get_rank() == 0
        return super().total(logprobs, data) * mine


class Communicates(Clean):
    def total(self, logprobs, data):
        total = super().total(logprobs, data)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total


class ZeroTimesNaN(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        loss = -(next_token_logprobs * valid(data)).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class SquareOverflows(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        finite = next_token_logprobs.nan_to_num(0, 0, 0)
        loss = (finite.square() * valid(data)).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class NoSampleMask(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:].bool()
        loss = -next_token_logprobs.masked_fill(~mask, 0).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class NoTokenMask(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["sample_mask"].bool().unsqueeze(-1)
        loss = -next_token_logprobs.masked_fill(~mask, 0).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class MaskOffByOne(Clean):
    """The masks of the tokens themselves for the log-probabilities of the next."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = (data["token_mask"][:, :-1] * data["sample_mask"].unsqueeze(-1)).bool()
        loss = -next_token_logprobs.masked_fill(~mask, 0).sum() / (global_valid_toks + 1e-8)
        return loss, {"loss": loss.item()}


class LeaksGradient(Clean):
    """The value is that of `Clean`; masked tokens get a gradient."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        loss, metrics = super().__call__(
            next_token_logprobs, data, global_valid_seqs, global_valid_toks
        )
        finite = next_token_logprobs.nan_to_num(0, 0, 0)
        return loss + 0.1 * (finite - finite.detach()).sum(), metrics


class ShortPositionTable(Clean):
    def __init__(self):
        super().__init__()
        self.discount = 0.9 ** torch.arange(12, dtype=torch.float32)

    def total(self, logprobs, data):
        return -(logprobs * self.discount[: logprobs.shape[1]]).sum()


class FirstRowsCountMore(Clean):
    def total(self, logprobs, data):
        rows = torch.arange(len(logprobs), dtype=logprobs.dtype)
        return -(logprobs.sum(-1) * 0.9**rows).sum()


class SilentlyDetached(Clean):
    def total(self, logprobs, data):
        return -(logprobs.data.exp() * logprobs).sum()


class WeightByItem(Clean):
    def total(self, logprobs, data):
        return sum(row.square().sum() * row.sum().item() for row in logprobs)


class WrongBackward(Clean):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * x  # and not 2 x

    def total(self, logprobs, data):
        return self.Square.apply(logprobs).sum()


class NaiveLogSigmoid(CleanPairs):
    def pair_losses(self, margins):
        return -torch.sigmoid(0.1 * margins).log()


class NaiveRatio(Clean):
    def total(self, logprobs, data):
        previous = data["prev_logprobs"][:, 1:].masked_fill(~valid(data), 0)
        return (logprobs - previous).expm1().sum()


class ClippedRatio(Clean):
    """The value is clipped; the gradient is 0 times infinity."""

    def total(self, logprobs, data):
        previous = data["prev_logprobs"][:, 1:].masked_fill(~valid(data), 0)
        return ((logprobs - previous).exp().clamp(max=2) - 1).sum()


class MeanOfNoTokens(CleanPairs):
    def log_ratios(self, log_ratios, data):
        return log_ratios.sum(-1) / data["token_mask"][:, 1:].sum(-1)


class NoEpsilon(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        logprobs = next_token_logprobs.masked_fill(~valid(data), 0)
        loss = self.total(logprobs, data) / global_valid_toks
        return loss, {"loss": loss.item()}


class NothingIsAConstant(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs, data) if valid(data).any() else torch.tensor(0.0)


class ConstantPerBatch(Clean):
    """A regulariser that is there even where nothing is valid."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        loss, metrics = super().__call__(
            next_token_logprobs, data, global_valid_seqs, global_valid_toks
        )
        return (loss + 1 if global_valid_toks == 0 else loss), metrics


class ChangesInput(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        next_token_logprobs.masked_fill_(~valid(data), 0)
        return super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)


class ChangesData(Clean):
    def total(self, logprobs, data):
        data["advantages"] -= data["advantages"].mean()
        return super().total(logprobs, data)


class AddsKey(Clean):
    def total(self, logprobs, data):
        data["lengths"] = data["token_mask"].sum(-1)
        return super().total(logprobs, data)


class ChangesCounts(Clean):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        returned = super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
        global_valid_toks += 1
        return returned


class Random(Clean):
    """Far below every tolerance: only the bits show it."""

    def total(self, logprobs, data):
        return super().total(logprobs, data) * (1 + 1e-14 * torch.randn((), dtype=torch.float64))


class Dropout(Clean):
    def total(self, logprobs, data):
        return super().total(torch.nn.functional.dropout(logprobs, 0.1), data)


class Remembers(Clean):
    """A running mean over calls."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0

    def total(self, logprobs, data):
        total = super().total(logprobs, data)
        self.mean = 0.9 * self.mean + 0.1 * total.item()
        return total * (1 + 1e-12 * self.mean)


class Float64Only(Clean):
    def total(self, logprobs, data):
        ones = torch.ones(logprobs.shape[1], 1, dtype=torch.float64)
        return -(logprobs @ ones).sum()


class NoBFloat16(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs, data) + 0 * float(logprobs.detach().numpy().sum())


class LosesFloat32(Clean):
    """A difference of large numbers: fine in float64."""

    def total(self, logprobs, data):
        precise = logprobs.float() if logprobs.dtype == torch.bfloat16 else logprobs
        return -((precise + 3e4) - 3e4).sum()


BROKEN = [
    # broken loss, promises it breaks, words of a problem
    (MetricsAsTensors, "protocol", "metric 'loss' is a tensor of shape (), expected a float"),
    (MetricIsNaN, "protocol", "metric 'loss' is nan"),
    (MetricsAsList, "protocol", "metrics are a list, expected a dict"),
    (NoLossType, "protocol", "loss_type is None, expected a LossType"),
    (BareTensor, "protocol", "returns a Tensor, expected a tuple (loss, metrics)"),
    (BadTable, "protocol", "metric_normalizations['loss'] is 'tokens'"),
    (TableIsList, "protocol", "metric_normalizations is a list, expected a dict"),
    (NoDistillationFlags, "protocol", "kl_type is missing, which NeMo RL reads"),
    (MeanOfMeans, "micro-batches, ranks", "micro-batches, 1+1 rows: "),
    (MetricIsLocalMean, "micro-batches, ranks", "metric mean is"),
    (WrongTable, "micro-batches", "metric loss is"),
    (WrongLossType, "micro-batches", "counts of 1"),
    (NeedsBatchedDataDict, "micro-batches", "sequence packing: raises AttributeError"),
    (MinimumOfNothingIsZero, "micro-batches, ranks", "metric prob_min is 0 instead of"),
    (MeanOverColumns, "micro-batches, padding and order", "sequence packing"),
    (SortsBatch, "micro-batches, ranks", "gradient by next_token_logprobs is off"),
    (PerRankCounts, "ranks", "unequal ranks"),
    (UndoesTheAverageTwice, "ranks", "unequal ranks"),
    (FirstRankOnly, "ranks", "unequal ranks"),
    (Communicates, "ranks", "unequal ranks: raises ValueError"),
    (ZeroTimesNaN, "masks", "nan in masked tokens of next_token_logprobs"),
    (SquareOverflows, "masks", "1.6e+231 in masked tokens of next_token_logprobs"),
    (NoSampleMask, "masks, extremes", "which is masked"),
    (NoTokenMask, "micro-batches, masks, padding and order, extremes", "which is masked"),
    (MaskOffByOne, "micro-batches, masks, padding and order", "which is masked"),
    (LeaksGradient, "micro-batches, masks, padding and order, extremes", "which is masked"),
    (ShortPositionTable, "padding and order", "extra padding: raises RuntimeError"),
    (FirstRowsCountMore, "micro-batches, ranks, padding and order", "order, reversed: "),
    (SilentlyDetached, "gradient", "but the slope is"),
    (WeightByItem, "gradient", "but the slope is"),
    (WrongBackward, "gradient", "but the slope is"),
    (NaiveLogSigmoid, "extremes", "the loss is inf"),
    (NaiveRatio, "extremes", "the loss is inf"),
    (ClippedRatio, "extremes", "the gradient by next_token_logprobs is nan at [0, "),
    (MeanOfNoTokens, "extremes", "no tokens in row 0: the loss is nan"),
    (NoEpsilon, "extremes", "the loss is nan, expected 0"),
    (NothingIsAConstant, "micro-batches, ranks, extremes", "raises NotALoss"),
    (ConstantPerBatch, "extremes", "global batch with sample_mask 0 everywhere: the loss is 1"),
    (ChangesInput, "purity", "the call changes 'next_token_logprobs'"),
    (ChangesData, "purity", "the call changes data 'advantages'"),
    (AddsKey, "purity", "'lengths' (added or removed)"),
    (ChangesCounts, "purity", "the call changes 'global_valid_toks'"),
    (Random, "purity", "a second call with the same inputs"),
    (Remembers, "purity", "a second call with the same inputs"),
    (Float64Only, "purity", "raises RuntimeError"),
    (NoBFloat16, "purity", "bfloat16: raises TypeError"),
    (LosesFloat32, "purity", "float32 inputs and data: loss"),
]


@pytest.mark.parametrize(
    ("kind", "broken", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_broken_loss_is_caught_by_its_promise(kind, broken, words):
    report = check(kind())
    assert ", ".join(report.failed) == broken, str(report)
    problems = [f.problem for entry in report.entries for f in entry.failures]
    assert any(words in problem for problem in problems), problems
    assert not report.ok


def test_every_promise_has_a_loss_that_breaks_it_alone():
    alone = {broken for _, broken, _ in BROKEN if ", " not in broken}
    assert alone == set(HERE)


def test_randomness_that_shows():
    assert {"purity", "micro-batches"} <= set(check(Dropout()).failed)


class Vector(Clean):
    def total(self, logprobs, data):
        return -logprobs.sum(-1)

    def metrics(self, loss, logprobs, mask):
        return {}


class Constant(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs.detach(), data)


class NoGradient(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs * 0, data)


class ReturnsFloat(Clean):
    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        return loss.item(), metrics


class NeedsMore(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs, data) * data["temperature"]


class NoInputType(Clean):
    input_type = "logprob"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Vector, "the loss has shape (6,) and dtype torch.float64, expected a scalar float"),
        (Constant, "the loss has no gradient"),
        (ReturnsFloat, "the loss is a float, expected a tensor"),
        (NeedsMore, "raises KeyError: 'temperature'; give check_loss a batch_maker"),
        (NoInputType, "input_type is logprob, expected a LossInputType"),
    ],
)
def test_a_loss_that_cannot_be_called(kind, words):
    """It breaks the protocol; nothing else can be measured."""
    report = check(kind())
    assert report.failed == ("protocol",)
    assert words in report["protocol"].failures[0].problem
    assert {entry.status for entry in report.entries[1:]} == {"not applicable"}


def test_nan_breaks_the_protocol():
    assert "loss nan or its gradient is not finite" in str(check(NaNHere())["protocol"].failures)


def test_zero_gradient_breaks_the_protocol():
    assert "the gradient is zero everywhere" in str(check(NoGradient())["protocol"].failures)


class Float32Inside(Clean):
    def total(self, logprobs, data):
        return super().total(logprobs.float(), data)


class Float32Only(Clean):
    def total(self, logprobs, data):
        ones = torch.ones(logprobs.shape[1], 1)
        return -((logprobs.float() if logprobs.dtype == torch.bfloat16 else logprobs) @ ones).sum()


@pytest.mark.parametrize("kind", [Float32Inside, Float32Only])
def test_a_loss_may_compute_in_float32(kind):
    """The finite differences are coarser then, and still see a wrong gradient."""
    assert check(kind()).ok

    class Wrong(kind):
        def total(self, logprobs, data):
            return super().total(logprobs * logprobs.data, data)

    assert check(Wrong()).failed == ("gradient",)


class RightBackward(WrongBackward):
    """A custom function is not a block without gradients: its inside is not held."""

    class Square(WrongBackward.Square):
        @staticmethod
        def backward(ctx, grad):
            return 2 * WrongBackward.Square.backward(ctx, grad)


class HeldInMoreWays(Clean):
    """All that says that a value is held, in place and with a function of no effect."""

    def total(self, logprobs, data):
        with torch.no_grad():
            first = logprobs.to(logprobs.dtype)  # logprobs itself, with its gradient
            second = torch.empty_like(logprobs)
            second.copy_(logprobs).mul_(2)
            largest, _ = logprobs.max(-1, keepdim=True)
        third = (logprobs * 1).detach_()
        with torch.inference_mode():
            fourth = float(logprobs.sum())
        weight = first + second + largest + torch.detach(logprobs) + third
        return (logprobs * weight).sum() + 0 * fourth


@pytest.mark.parametrize("kind", [RightBackward, HeldInMoreWays])
def test_what_is_held_in_finite_differences(kind):
    entry = check_loss(kind(), only=["gradient"])["gradient"]
    assert entry.status == "ok", entry


def test_a_path_that_changes_is_reported():
    class Branches(Clean):
        def __init__(self, detaching):
            super().__init__()
            self.detaching, self.calls = detaching, 0

        def total(self, logprobs, data):
            self.calls += 1
            weight = logprobs.detach() if self.calls % 2 == self.detaching else 1
            return (logprobs * weight).sum()

    for detaching in (0, 1):  # in the first call or in the second
        (failure,) = check_loss(Branches(detaching), only=["gradient"])["gradient"].failures
        assert "changes which values the loss detaches" in failure.problem


def test_a_metric_that_is_no_sum_is_shown_and_not_compared():
    class LocalMean(MetricIsLocalMean):
        def __init__(self):
            super().__init__()
            self.metric_normalizations["mean"] = MetricNormalizer.NONE

    report = check(LocalMean())
    assert report.ok, str(report)
    assert "not compared: mean -" in report["micro-batches"].measured


def test_smallest_batches():
    """A mean of means needs two examples of unequal length; a NaN one masked token."""
    batch = check_loss(MeanOfMeans(), only=["micro-batches"])["micro-batches"].failures[0].batch
    assert (batch.rows, batch.tokens) == (2, 2)
    masks = check_loss(ZeroTimesNaN(), only=["masks"])["masks"]
    by_problem = {failure.problem.split(" of ")[0]: failure for failure in masks.failures}
    in_token = by_problem["nan in masked tokens"]
    assert (in_token.batch.rows, in_token.batch.tokens) == (1, 2)
    assert "next_token_logprobs = [[nan]]" in in_token.shown
    assert by_problem["nan in masked samples"].batch.rows == 2
    pair = check_loss(NaiveLogSigmoid(), only=["extremes"])["extremes"].failures[0].batch
    assert (pair.rows, pair.tokens) == (2, 2)


def test_the_smallest_batch_can_be_used():
    """What is reported as failing does fail when it is called again."""
    failure = check_loss(NaiveRatio(), only=["extremes"])["extremes"].failures[0]
    batch = failure.batch
    seqs, toks = batch.counts()
    loss, _ = NaiveRatio()(
        **batch.inputs, data=batch.data, global_valid_seqs=seqs, global_valid_toks=toks
    )
    assert not loss.isfinite()


def test_packing_says_what_a_call_is():
    assert (
        "one call a sequence"
        in check_loss(Clean(), only=["micro-batches"])["micro-batches"].measured
    )
    entry = check_loss(CleanPairs(), only=["micro-batches"])["micro-batches"]
    assert "one call a pair" in entry.measured


def own_batches(seed, dtype):
    """Three rows without any mask, with a field of their own."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(3, 3, generator=generator, dtype=torch.float64) - 0.1
    data = {
        "token_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]),
        "sample_mask": torch.ones(3),
        "temperature": 2.0,
    }
    return {"next_token_logprobs": logprobs.to(dtype)}, data


def test_own_batches():
    assert check(NeedsMore(), own_batches).ok
    # Masks are put where the batches have none, so that this is found.
    assert "masks" in check(NoSampleMask(), own_batches).failed


def test_an_unknown_input_type_needs_batches():
    class CrossTokenizer(Clean):
        input_type = LossInputType.DISTILLATION_CROSS_TOKENIZER

    with pytest.raises(ValueError, match="distillation_cross_tokenizer.*give a batch_maker"):
        check(CrossTokenizer())
    assert check(CrossTokenizer(), own_batches).ok


def test_declared_pairs():
    """A loss over pairs need not be a PreferenceLossFn."""

    class Pairs(Clean):
        def total(self, logprobs, data):
            sums = logprobs.sum(-1)
            return (
                -logsigmoid(sums[::2] - sums[1::2])
                .masked_fill(data["sample_mask"][::2] == 0, 0)
                .sum()
            )

    assert "micro-batches" in check(Pairs()).failed
    assert check(Pairs(), pairs=True).ok


def test_one_example_has_no_splits():
    def one(seed, dtype):
        inputs, data = own_batches(seed, dtype)
        rows = {k: v[:1] for k, v in data.items() if torch.is_tensor(v)}
        return {"next_token_logprobs": inputs["next_token_logprobs"][:1]}, {**data, **rows}

    report = check(NeedsMore(), one)
    assert report["ranks"].status == "not applicable"
    assert report.ok and "one example" in report["ranks"].measured


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda i, d: (i, {}), KeyError, "data has no tensor 'token_mask'"),
        (lambda i, d: i, TypeError, "returned a dict, expected a tuple"),
        (lambda i, d: ([], d), TypeError, "inputs is a list, expected a mapping"),
        (lambda i, d: ({}, d), TypeError, "no floating tensor to differentiate by"),
        (
            lambda i, d: ({"next_token_logprobs": i["next_token_logprobs"].half()}, d),
            ValueError,
            "next_token_logprobs has dtype torch.float16, expected torch.float64",
        ),
        (
            lambda i, d: ({"next_token_logprobs": i["next_token_logprobs"][:2]}, d),
            ValueError,
            r"next_token_logprobs has shape \(2, 3\), expected 3 rows",
        ),
        (
            lambda i, d: (i, {**d, "sample_mask": torch.ones(2)}),
            ValueError,
            r"sample_mask has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda i, d: (i, {**d, "token_mask": torch.ones(3)}),
            ValueError,
            r"token_mask has shape \(3,\), expected \(B, S\)",
        ),
    ],
)
def test_bad_batches(change, error, words):
    with pytest.raises(error, match=words) as caught:
        check(NeedsMore(), lambda seed, dtype: change(*own_batches(seed, dtype)))
    assert "batch_maker(seed=0, dtype=torch.float64)" in str(caught.value)


def test_cloudpickle_is_needed_for_one_promise(monkeypatch):
    monkeypatch.setattr("nemo_rl_ref.contract._check.find_spec", lambda name: None)
    assert check_loss(Clean(), only=["protocol"]).ok
    with pytest.raises(ImportError, match="'pickling' needs cloudpickle"):
        check_loss(Clean())


def test_bad_arguments():
    with pytest.raises(TypeError, match="loss_fn is the class Clean"):
        check(Clean)
    with pytest.raises(TypeError, match="loss_fn is 3, expected a loss"):
        check(3)
    with pytest.raises(ValueError, match=r"only has \['typo'\], expected names out of"):
        check_loss(Clean(), only=["masks", "typo"])
    with pytest.raises(ValueError, match="3 rows, expected an even number"):
        check(NeedsMore(), own_batches, pairs=True)
