# SPDX-License-Identifier: Apache-2.0
"""Losses that pull a student's next-token distribution to a teacher's."""

from collections.abc import Mapping
from typing import Any, NotRequired, Optional, TypedDict

import torch
from pydantic import BaseModel
from torch import Tensor

from nemo_rl_ref.algorithms.loss._checks import check_floating, check_sample_mask, get_tensor
from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class DistillationLossConfig(BaseModel, extra="allow"):
    """What `DistillationLossFn` reads: ``loss_fn`` in NeMo RL's distillation configuration.

    Attributes:
        kl_type: "forward", "reverse" or "mixed".
        mixed_kl_weight: w, weight of the forward KL in the mixed one, in [0, 1].
        zero_outside_topk: take the teacher's probability outside its top k to be e^-100; False to
            leave these tokens out. The loss adds a term to the reverse and the mixed KL; NeMo RL's
            trainer then also takes the student's log-probabilities from its whole softmax, for
            every kind, so that the forward KL changes as well.
    """

    kl_type: str = "mixed"
    mixed_kl_weight: float = 0.5
    zero_outside_topk: bool = False


class DistillationLossDataDict(TypedDict):
    """Keys of a distillation batch. The loss itself reads the masks and, for its rows, the ids."""

    input_ids: torch.Tensor
    input_lengths: torch.Tensor
    token_mask: torch.Tensor
    sample_mask: torch.Tensor
    teacher_topk_logits: torch.Tensor
    teacher_topk_indices: torch.Tensor


class DistillationLossFn(LossFunction):
    r"""KL divergence between teacher and student over the teacher's k most probable tokens.

    .. math::

        L(θ) &= \frac{1}{N} \sum_{b,t} m_{b,t} \big( w \, F_{b,t} + (1 - w) \, R_{b,t} \big) \\
        F &= \sum_{v \in K} p_v (\log p_v - \log q_v) \qquad
        R = \sum_{v \in K} q_v (\log q_v - \log p_v) + C

    with p the teacher's and q the student's distribution, K the teacher's top k, w = 1 for
    ``forward``, 0 for ``reverse``, ``mixed_kl_weight`` for ``mixed``. F is part of KL(p‖q), which
    covers all that the teacher does; R is part of KL(q‖p), which punishes what the teacher does
    not do. C is 0, or with ``zero_outside_topk`` what the other tokens add to R if the teacher
    gives each the log-probability -100:

    .. math:: C = \sum_{v \notin K} q_v (\log q_v + 100)

    Source: Hinton et al. (2015), https://arxiv.org/abs/1503.02531, for distillation; Gu et al.
    (2024), https://arxiv.org/abs/2306.08543, for the reverse KL.

    Args:
        cfg: kind and weight.

    Raises:
        TypeError: if `cfg` is a mapping.
        ValueError: if ``kl_type`` is unknown or ``mixed_kl_weight`` is outside [0, 1].

    Example:
        One position; the teacher's two tokens are equally likely, the student prefers one:

        >>> teacher, student = (
        ...     torch.tensor([[[0.5, 0.5]]]).log(),
        ...     torch.tensor([[[0.8, 0.2]]]).log(),
        ... )
        >>> ids = torch.ones(1, 2)
        >>> data = {"input_ids": ids, "token_mask": ids, "sample_mask": torch.ones(1)}
        >>> loss_fn = DistillationLossFn(DistillationLossConfig(kl_type="forward"))
        >>> loss, _ = loss_fn(student, teacher, None, data, None, torch.tensor(1))
        >>> loss
        tensor(0.2231)
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.DISTILLATION

    def __init__(self, cfg: DistillationLossConfig):
        if isinstance(cfg, Mapping):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}, expected a DistillationLossConfig: "
                "DistillationLossConfig(**cfg)"
            )
        if cfg.kl_type not in ("forward", "reverse", "mixed"):
            raise ValueError(
                f"kl_type is {cfg.kl_type!r}, expected 'forward', 'reverse' or 'mixed'"
            )
        if not 0 <= cfg.mixed_kl_weight <= 1:
            raise ValueError(f"mixed_kl_weight is {cfg.mixed_kl_weight}, expected 0 to 1")
        self.kl_type = cfg.kl_type
        self.mixed_kl_weight = cfg.mixed_kl_weight
        self.zero_outside_topk = cfg.zero_outside_topk
        self.log_infinitesimal = -100

    def __call__(
        self,
        student_topk_logprobs: Tensor,
        teacher_topk_logprobs: Tensor,
        H_all: Tensor | None,
        data: BatchedDataDict[DistillationLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch.

        Args:
            student_topk_logprobs: log q of the teacher's top k tokens, (B, T, k) floating, nats;
                T is at most S-1, entry t belongs to token t+1.
            teacher_topk_logprobs: log p of the same tokens, same shape.
            H_all: (B, T), nats, the sum of q log q over the whole vocabulary: the student's
                entropy with a minus sign. Read with ``zero_outside_topk`` only, and not for
                the forward KL.
            data: ``token_mask`` (B, S), of which column 0 is not used; ``sample_mask`` (B,);
                ``input_ids``, for the number of rows. Without one of the masks the loss is the
                plain mean over (B, T), as in NeMo RL.
            global_valid_seqs: not used.
            global_valid_toks: number of unmasked tokens in the global batch, scalar.

        Returns:
            The scalar loss and the metrics ``loss`` and ``num_valid_samples``, which is the
            number of rows whatever the mask, as in NeMo RL.

        Raises:
            KeyError: if ``input_ids`` is missing in `data`.
            TypeError: if log-probabilities are not floating.
            ValueError: if a shape does not fit, or something is None that is needed.
        """
        student, teacher = student_topk_logprobs, teacher_topk_logprobs
        _check_pair("student_topk_logprobs", student, "teacher_topk_logprobs", teacher)
        input_ids = get_tensor("DistillationLossFn", data, "input_ids")

        kl = torch.zeros_like(student[..., 0])
        weight = {"forward": 1.0, "reverse": 0.0, "mixed": self.mixed_kl_weight}[self.kl_type]
        if self.kl_type != "reverse":
            kl = kl + weight * (teacher.exp() * (teacher - student)).sum(-1)
        if self.kl_type != "forward":
            reverse = (student.exp() * (student - teacher)).sum(-1)
            if self.zero_outside_topk:
                reverse = reverse + self._outside_topk(student, H_all)
            kl = kl + (1 - weight) * reverse

        if "token_mask" in data and "sample_mask" in data:
            mask = self._mask(data, student)
            if global_valid_toks is None:
                raise ValueError(
                    "global_valid_toks is None, expected the number of unmasked tokens "
                    "in the global batch"
                )
            loss = masked_mean(kl, mask, global_normalization_factor=global_valid_toks)
        else:
            loss = kl.mean()
        return loss, {"loss": loss.item(), "num_valid_samples": input_ids.shape[0]}

    def _outside_topk(self, student_logprobs: Tensor, negative_entropy: Tensor | None) -> Tensor:
        """What tokens outside the top k add to the reverse KL, (B, T): all minus the top k."""
        if negative_entropy is None:
            raise ValueError(
                f"H_all is None, expected (B, T): zero_outside_topk=True with kl_type="
                f"{self.kl_type!r} needs the sum of q log q over the whole vocabulary"
            )
        if negative_entropy.shape != student_logprobs.shape[:2]:
            raise ValueError(
                f"H_all has shape {tuple(negative_entropy.shape)}, expected (B, T) = "
                f"{tuple(student_logprobs.shape[:2])}"
            )
        probs = student_logprobs.exp()
        q_log_q = negative_entropy - (probs * student_logprobs).sum(-1)
        return q_log_q - self.log_infinitesimal * (1 - probs.sum(-1))

    def _mask(self, data: Mapping[str, Any], student_logprobs: Tensor) -> Tensor:
        """The mask of the predicted tokens, (B, T)."""
        rows, steps = student_logprobs.shape[:2]
        token_mask = get_tensor("DistillationLossFn", data, "token_mask")
        if token_mask.ndim != 2 or token_mask.shape[0] != rows or token_mask.shape[1] <= steps:
            raise ValueError(
                f"data['token_mask'] has shape {tuple(token_mask.shape)}, expected (B, S) with "
                f"B = {rows} and S at least {steps + 1}, because student_topk_logprobs is "
                f"{tuple(student_logprobs.shape)}"
            )
        check_sample_mask("DistillationLossFn", data, rows)
        return token_mask[:, 1 : steps + 1] * data["sample_mask"].unsqueeze(-1)


class DraftCrossEntropyLossConfig(TypedDict):
    """How NeMo RL's configuration builds a `DraftCrossEntropyLossFn`."""

    vocab_parallel_group: Optional[torch.distributed.ProcessGroup]


class DraftCrossEntropyLossDataDict(TypedDict):
    """Keys of a draft-model batch. The loss itself reads ``sample_mask`` from it."""

    teacher_logits: Tensor
    student_logits: Tensor
    token_mask: Tensor
    sample_mask: Tensor
    student_vocab_indices: NotRequired[Tensor]


class DraftCrossEntropyLossFn(LossFunction):
    r"""Cross-entropy of a draft model's distribution under the policy's own.

    .. math:: L(φ) = -\frac{1}{N} \sum_{b,t} m_{b,t} \sum_v p_v(b,t) \log q_v(b,t)

    with p the softmax of the teacher's (the policy's) logits, q that of the student's (the draft
    model's, which speculative decoding samples from), N the number of unmasked tokens in the
    global batch. It is KL(p‖q) plus the entropy of p, and has the gradient of that KL: q - p at
    each logit.

    It returns the loss alone, without metrics: NeMo RL adds it to the policy's loss and logs it
    there.

    Source: Leviathan et al. (2023), https://arxiv.org/abs/2211.17192, for speculative decoding.

    Args:
        vocab_parallel_group: the ranks that hold the vocabulary's slices, in float32; None if
            the logits are whole.

    Example:
        With the same distribution in both, what is left is its entropy, log 2:

        >>> logits, data = torch.zeros(1, 1, 2), {"sample_mask": torch.ones(1)}
        >>> DraftCrossEntropyLossFn()(logits, logits, torch.ones(1, 1), data, None, torch.tensor(1))
        tensor(0.6931)
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.DRAFT

    def __init__(self, vocab_parallel_group: Optional[torch.distributed.ProcessGroup] = None):
        self.vocab_parallel_group = vocab_parallel_group

    def __call__(
        self,
        teacher_logits: Tensor,
        student_logits: Tensor,
        token_mask: Tensor,
        data: BatchedDataDict[DraftCrossEntropyLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor,
    ) -> torch.Tensor:
        """Computes the loss of a micro-batch.

        Args:
            teacher_logits: (B, T, V) floating, V the vocabulary or this rank's slice of it. NeMo
                RL detaches it; without a process group a gradient would flow into it.
            student_logits: same shape.
            token_mask: (B, T), entry t belonging to the logits at t: already shifted.
            data: ``sample_mask`` (B,).
            global_valid_seqs: not used.
            global_valid_toks: number of unmasked tokens in the global batch, scalar.

        Returns:
            The scalar loss, in nats.

        Raises:
            KeyError: if ``sample_mask`` is missing in `data`.
            TypeError: if logits are not floating.
            ValueError: if a shape does not fit or `global_valid_toks` is None.
        """
        _check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
        if token_mask.shape != student_logits.shape[:2]:
            raise ValueError(
                f"token_mask has shape {tuple(token_mask.shape)}, expected (B, T) = "
                f"{tuple(student_logits.shape[:2])}"
            )
        check_sample_mask("DraftCrossEntropyLossFn", data, len(token_mask))
        if global_valid_toks is None:
            raise ValueError(
                "global_valid_toks is None, expected the number of unmasked tokens "
                "in the global batch"
            )
        if self.vocab_parallel_group is None:
            p = teacher_logits.softmax(-1)
            cross_entropy = -(p * student_logits.log_softmax(-1)).sum(-1)
        else:
            cross_entropy = _VocabParallelCrossEntropy.apply(
                student_logits, teacher_logits, self.vocab_parallel_group
            )
        mask = token_mask * data["sample_mask"].unsqueeze(-1)
        return masked_mean(cross_entropy, mask, global_normalization_factor=global_valid_toks)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The cross-entropy at each position, (B, T), from logits of which each rank has a slice."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        log_q = _log_softmax_over_ranks(student_logits, group)
        p = _log_softmax_over_ranks(teacher_logits, group).exp()
        cross_entropy = -(p * log_q).sum(-1)
        torch.distributed.all_reduce(cross_entropy, group=group)
        ctx.save_for_backward(p, log_q.exp())
        ctx.dtype = student_logits.dtype
        return cross_entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        p, q = ctx.saved_tensors
        return (grad_outputs[0].unsqueeze(-1) * (q - p)).to(ctx.dtype), None, None


def _log_softmax_over_ranks(logits: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """This rank's slice of the log-softmax, float32 or wider."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(-1, keepdim=True)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    total = (logits - largest).exp().sum(-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - largest - total.log()


def _check_pair(student_name: str, student: Any, teacher_name: str, teacher: Any) -> None:
    """Checks that both are floating tensors of the same shape, (B, T, n)."""
    check_floating(student_name, student)
    check_floating(teacher_name, teacher)
    if student.ndim != 3:
        raise ValueError(
            f"{student_name} has shape {tuple(student.shape)}, expected three dimensions, "
            "(batch, position, token)"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"{teacher_name} has shape {tuple(teacher.shape)}, expected that of {student_name}, "
            f"{tuple(student.shape)}"
        )
