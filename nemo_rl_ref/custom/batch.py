# SPDX-License-Identifier: Apache-2.0
"""Losses that look at the whole batch: KTO and BCO take a mean over it, AOT sorts it.

NeMo RL calls a loss once for each micro-batch on each rank, so "the batch" is the micro-batch
here: the losses, gradients and metrics of micro-batches do not sum to those of the batch. Make
micro-batches as large as memory allows. What is summed is still divided by the global count.

h_w, h_l, β, σ and the metrics are those of `pairwise`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossDataDict, DPOLossFn
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def response_sums(logprobs: Tensor, data: Mapping[str, Any], average: bool) -> Tensor:
    """Sums log-probabilities (B, S-1) over each response, or averages them: (B,), nats.

    Masked rows give 0, whatever they hold.

    Example:
        >>> data = {"token_mask": torch.tensor([[0, 1, 1, 0]]), "sample_mask": torch.ones(1)}
        >>> response_sums(torch.tensor([[-1.0, -3.0, -9.0]]), data, average=False)
        tensor([-4.])
        >>> response_sums(torch.tensor([[-1.0, -3.0, -9.0]]), data, average=True)
        tensor([-2.])
    """
    mask = data["token_mask"][:, 1:]
    sums = (logprobs * mask).sum(-1)
    if average:
        sums = sums / mask.sum(-1).clamp(min=1)
    return sums.masked_fill(data["sample_mask"] == 0, 0.0)


def response_log_ratios(logprobs: Tensor, data: Mapping[str, Any], average: bool) -> Tensor:
    """Return h of each response from the policy's log-probabilities (B, S-1): (B,), nats.

    Example:
        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> response_log_ratios(torch.tensor([[-1.0], [-3.0]]), data, average=False)
        tensor([ 1., -1.])
    """
    return response_sums(logprobs - data["reference_policy_logprobs"][:, :-1], data, average)


class BCOPairLossFn(DPOLossFn):
    r"""Binary classifier optimization: chosen above a threshold δ, rejected below it.

    .. math:: L = -\log σ(β h_w - δ) - \log σ(δ - β h_l), \quad
              δ = \tfrac12 \big(\mathrm{mean}\, β h_w + \mathrm{mean}\, β h_l\big)

    No gradient flows through δ. The config key ``bco_delta`` chooses it: "batch" (if not given) is
    the mean over the valid rows of the micro-batch; "zero" is δ = 0, as TRL's "bco_pair" has it.
    The paper's δ is a moving average over steps. With "zero", micro-batches sum to the batch.

    Source: Jung et al. (2024), https://arxiv.org/abs/2404.04656, the loss "BCO".

    Attributes:
        needs_whole_batch: true with "batch".

    Raises:
        ValueError: if ``bco_delta`` is neither "batch" nor "zero".

    Example:
        One pair with log-ratios 1 and -1, whose threshold is 0: the loss is -2 log σ(1):

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> loss_fn = BCOPairLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss, _ = loss_fn(torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), None)
        >>> loss
        tensor(0.6265)
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.delta = getattr(cfg, "bco_delta", "batch")
        if self.delta not in ("batch", "zero"):
            raise ValueError(f"bco_delta: got {self.delta!r}, expected 'batch' or 'zero'")
        self.needs_whole_batch = self.delta == "batch"

    def _preference_loss(
        self, rewards: Tensor, sample_mask: Tensor, global_valid_seqs: Tensor, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rewards = rewards.masked_fill(sample_mask == 0, 0.0)
        metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)[1:]
        scores = beta * rewards
        if self.delta == "batch":
            scores = scores - masked_mean(scores.detach(), sample_mask)
        chosen, rejected = self.split_output_tensor(scores)
        loss = masked_mean(
            -logsigmoid(chosen) - logsigmoid(-rejected),
            sample_mask[::2],
            global_normalization_factor=global_valid_seqs / 2,
        )
        return loss, *metrics


class AOTUnpairedLossFn(DPOLossFn):
    r"""Alignment via optimal transport, unpaired: sorts chosen and rejected log-ratios.

    .. math:: L = \frac1P \sum_i -(1-ε) \log σ(β Δ_{(i)}) - ε \log σ(-β Δ_{(i)}), \quad
              Δ_{(i)} = h_w^{(i)} - h_l^{(i)}

    with h^(i) the i-th smallest over the micro-batch: which response was paired with which does not
    matter. ε is the config key ``label_smoothing``, 0 if not given, as in the paper.

    Source: Melnyk et al. (2024), https://arxiv.org/abs/2406.05882; unpaired, logistic loss.

    Raises:
        ValueError: if ``label_smoothing`` is not in [0, 0.5].

    Example:
        With a single pair it is DPO, -log σ(2) here:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> loss_fn = AOTUnpairedLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss, _ = loss_fn(torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), None)
        >>> loss
        tensor(0.1269)
    """

    needs_whole_batch = True

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.label_smoothing = getattr(cfg, "label_smoothing", 0.0)
        if not (isinstance(self.label_smoothing, float | int) and 0 <= self.label_smoothing <= 0.5):
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing!r}, expected a number in [0, 0.5]"
            )

    def sorted_quantities(
        self, next_token_logprobs: Tensor, data: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Returns the two quantities (P,) that are sorted: chosen and rejected log-ratios."""
        average = self.preference_average_log_probs
        return self.split_output_tensor(response_log_ratios(next_token_logprobs, data, average))

    def _dpo_loss(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample_mask, average = data["sample_mask"], self.preference_average_log_probs
        log_ratios = response_log_ratios(next_token_logprobs, data, average)
        metrics = self._preference_loss(log_ratios, sample_mask, global_valid_seqs)[1:]

        upper, lower = self.sorted_quantities(next_token_logprobs, data)
        valid = sample_mask[::2] != 0
        delta = upper[valid].sort().values - lower[valid].sort().values
        margin = self.reference_policy_kl_penalty * delta
        losses = -(1 - self.label_smoothing) * logsigmoid(margin)
        losses = losses - self.label_smoothing * logsigmoid(-margin)
        loss = masked_mean(
            losses, torch.ones_like(losses), global_normalization_factor=global_valid_seqs / 2
        )
        return loss, *metrics


class AOTLossFn(AOTUnpairedLossFn):
    r"""Alignment via optimal transport, paired: sorts the margins of policy and reference.

    .. math:: Δ_{(i)} = \Big(\log \frac{π_θ(y_w|x)}{π_θ(y_l|x)}\Big)^{(i)}
              - \Big(\log \frac{π_{ref}(y_w|x)}{π_{ref}(y_l|x)}\Big)^{(i)}

    in the loss of `AOTUnpairedLossFn`. With a single pair in the micro-batch it is conservative
    DPO, and DPO with ε = 0.

    Source: Melnyk et al. (2024), https://arxiv.org/abs/2406.05882; paired, logistic loss.

    Example:
        With a single pair it is DPO, -log σ(2) here:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> loss_fn = AOTLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss, _ = loss_fn(torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), None)
        >>> loss
        tensor(0.1269)
    """

    def sorted_quantities(
        self, next_token_logprobs: Tensor, data: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Returns the two quantities (P,) that are sorted: margins of policy and reference."""
        average = self.preference_average_log_probs
        policy = response_sums(next_token_logprobs, data, average)
        reference = response_sums(data["reference_policy_logprobs"][:, :-1], data, average)
        return policy[::2] - policy[1::2], reference[::2] - reference[1::2]


class KTOLossFn(DPOLossFn):
    r"""Kahneman-Tversky optimization: each response by itself, against a reference point z.

    .. math:: L = \tfrac12 \big(λ_D\, σ(β (z - h_w)) + λ_U\, σ(β (h_l - z))\big), \quad
              z = \max\Big(0, \mathrm{mean}_i \log \frac{π_θ(y'_i|x_i)}{π_{ref}(y'_i|x_i)}\Big)

    Chosen responses count as desirable and rejected ones as undesirable; the half makes the loss a
    mean over responses. y' is a response to another prompt, so that z estimates a KL divergence. No
    gradient flows through z, the mean over the valid rows of the micro-batch. Whoever fills every
    row of the data with the mean over the global batch gets micro-batches that sum to it.

    Needs in ``data``, besides DPO's: ``mismatched_logprobs`` and ``mismatched_reference_logprobs``,
    (2P,) floating, nats: log-probabilities of whole mismatched responses y'_i, summed over tokens,
    under the policy as it is now and under the reference.

    λ_D and λ_U are the config keys ``kto_desirable_weight`` and ``kto_undesirable_weight``, 1 if
    not given.

    Source: Ethayarajh et al. (2024), https://arxiv.org/abs/2402.01306, Eqs. 7 and 8.

    Raises:
        ValueError: if a weight is negative.

    Example:
        The reference point is 0.5, log-ratios are 1 and -1:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> data |= {"mismatched_logprobs": torch.full((2,), -1.5)}
        >>> data |= {"mismatched_reference_logprobs": torch.full((2,), -2.0)}
        >>> loss_fn = KTOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss, _ = loss_fn(torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), None)
        >>> loss
        tensor(0.2800)
    """

    needs_data = ("mismatched_logprobs", "mismatched_reference_logprobs")
    needs_whole_batch = True

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.desirable_weight = getattr(cfg, "kto_desirable_weight", 1.0)
        self.undesirable_weight = getattr(cfg, "kto_undesirable_weight", 1.0)
        for key in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, key)
            if not (isinstance(weight, float | int) and weight >= 0):
                raise ValueError(f"kto_{key}: got {weight!r}, expected a number, 0 or more")

    def reference_point(self, data: Mapping[str, Any]) -> Tensor:
        """Returns z, a scalar in nats, 0 or more, without gradient."""
        sample_mask = data["sample_mask"]
        for key in self.needs_data:
            if key not in data:
                raise KeyError(f"data has no {key!r}, which KTOLossFn needs; it has {sorted(data)}")
            if data[key].shape != sample_mask.shape:
                raise ValueError(
                    f"data[{key!r}] has shape {tuple(data[key].shape)}, "
                    f"expected (B,) = {tuple(sample_mask.shape)}"
                )
        log_ratios = data["mismatched_logprobs"] - data["mismatched_reference_logprobs"]
        log_ratios = log_ratios.detach().masked_fill(sample_mask == 0, 0.0)
        return masked_mean(log_ratios, sample_mask).clamp(min=0)

    def _dpo_loss(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample_mask, average = data["sample_mask"], self.preference_average_log_probs
        log_ratios = response_log_ratios(next_token_logprobs, data, average)
        metrics = self._preference_loss(log_ratios, sample_mask, global_valid_seqs)[1:]

        chosen, rejected = self.split_output_tensor(log_ratios)
        beta, z = self.reference_policy_kl_penalty, self.reference_point(data)
        desirable = self.desirable_weight * torch.sigmoid(beta * (z - chosen))
        undesirable = self.undesirable_weight * torch.sigmoid(beta * (rejected - z))
        loss = masked_mean(
            (desirable + undesirable) / 2,
            sample_mask[::2],
            global_normalization_factor=global_valid_seqs / 2,
        )
        return loss, *metrics
