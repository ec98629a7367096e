# SPDX-License-Identifier: Apache-2.0
"""The loss of PPO's value model."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from pydantic import BaseModel
from torch import Tensor

from nemo_rl_ref.algorithms.loss._checks import check_floating, check_sample_mask, get_tensor
from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class MseValueLossConfig(BaseModel, extra="forbid"):
    """What `MseValueLossFn` reads: ``value_loss_fn`` in NeMo RL's PPO configuration.

    Attributes:
        scale: factor of the loss.
        cliprange: how far a value may move from the old one before it stops to count; None or 0
            for no clipping.
    """

    scale: float = 1.0
    cliprange: Optional[float] = None


class MseValueLossFn(LossFunction):
    r"""Half the squared distance of values to returns, clipped as PPO's.

    .. math::

        L(φ) = \frac{c}{2N} \sum_{b,t} m_{b,t} \max\Big( (V_{b,t} - R_{b,t})^2, \;
               \big(\mathrm{clip}(V_{b,t}, V^{old}_{b,t} - ε, V^{old}_{b,t} + ε) - R_{b,t}\big)^2
               \Big)

    with V the value, R the return, c ``scale``, ε ``cliprange``, and N the number of unmasked
    tokens in the global batch. Without ``cliprange`` the maximum is its first argument. A value
    that has moved more than ε towards its return gets no gradient.

    Unlike in the losses over next tokens, entry t of everything belongs to token t: nothing is
    shifted.

    Source: Schulman et al. (2017), https://arxiv.org/abs/1707.06347, Eq. 9, for the squared error;
    the clipping comes from the implementation that was published with it.

    Args:
        cfg: the weights.

    Raises:
        TypeError: if `cfg` is a mapping.
        ValueError: if ``cliprange`` is negative.

    Example:
        Values of two tokens whose return is 1:

        >>> mask, sample_mask = torch.ones(1, 2), torch.ones(1)
        >>> data = {"token_mask": mask, "sample_mask": sample_mask, "returns": torch.ones(1, 2)}
        >>> values = torch.tensor([[1.0, 3.0]])
        >>> loss, _ = MseValueLossFn(MseValueLossConfig())(values, data, None, torch.tensor(2))
        >>> loss
        tensor(1.)
    """

    input_type = LossInputType.LOGIT

    def __init__(self, cfg: MseValueLossConfig):
        if isinstance(cfg, Mapping):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}, expected a MseValueLossConfig: "
                "MseValueLossConfig(**cfg)"
            )
        if cfg.cliprange is not None and cfg.cliprange < 0:
            raise ValueError(f"cliprange is {cfg.cliprange}, expected 0 or more, or None")
        self.scale = cfg.scale
        self.cliprange = cfg.cliprange
        self.loss_type = LossType.TOKEN_LEVEL

    def __call__(
        self,
        logits: Tensor,
        data: BatchedDataDict[Any] | dict[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch.

        Args:
            logits: the values, (B, S) or (B, S, 1), floating, in units of reward.
            data: ``token_mask`` (B, S), ``sample_mask`` (B,), ``returns`` (B, S) and, where
                values are clipped, ``values`` (B, S), the old ones.
            global_valid_seqs: not used.
            global_valid_toks: number of unmasked tokens in the global batch, scalar.

        Returns:
            The scalar loss and the metrics ``loss``; ``vf_clipfrac``, the share of tokens whose
            loss is the clipped one; ``returns_mean``, ``values_mean``, ``returns_sq_mean`` and
            ``residual_sq_mean``, shares of global means, from which a trainer computes the
            explained variance; ``values_min`` and ``values_max`` of this micro-batch, 0 if all
            is masked; ``num_valid_samples``, which is B whatever the mask, as in NeMo RL.

        Raises:
            KeyError: if a key is missing in `data`.
            TypeError: if `logits` is not floating.
            ValueError: if a shape does not fit or `global_valid_toks` is None.
        """
        check_floating("logits", logits)
        values = logits.squeeze(-1) if logits.ndim == 3 and logits.shape[-1] == 1 else logits
        self._check_batch(values, data, global_valid_toks)
        returns = data["returns"]
        mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)

        def mean(per_token: Tensor) -> Tensor:
            return masked_mean(per_token, mask, global_normalization_factor=global_valid_toks)

        errors = (values - returns).square()
        losses, clip_share = errors, torch.tensor(0.0)
        if self.cliprange:
            old = data["values"]
            clipped = values.clamp(old - self.cliprange, old + self.cliprange)
            clipped_errors = (clipped - returns).square()
            losses = torch.maximum(errors, clipped_errors)
            clip_share = mean(clipped_errors > errors)
        loss = 0.5 * self.scale * mean(losses)

        with torch.no_grad():
            valid = values[mask.bool()]
            metrics = {
                "loss": loss.item(),
                "vf_clipfrac": clip_share.item(),
                "returns_mean": mean(returns).item(),
                "values_mean": mean(values).item(),
                "values_min": valid.min().item() if valid.numel() else 0.0,
                "values_max": valid.max().item() if valid.numel() else 0.0,
                "returns_sq_mean": mean(returns.square()).item(),
                "residual_sq_mean": mean(errors).item(),
                "num_valid_samples": len(values),
            }
        return loss, metrics

    def _check_batch(self, values: Tensor, data: Mapping[str, Any], global_valid_toks: Any) -> None:
        if values.ndim != 2:
            raise ValueError(
                f"logits has shape {tuple(values.shape)}, expected (B, S) or (B, S, 1)"
            )
        keys = ("token_mask", "returns", "values") if self.cliprange else ("token_mask", "returns")
        for key in keys:
            shape = get_tensor("MseValueLossFn", data, key).shape
            if shape != values.shape:
                raise ValueError(
                    f"data[{key!r}] has shape {tuple(shape)}, expected that of the values, "
                    f"(B, S) = {tuple(values.shape)}"
                )
        check_sample_mask("MseValueLossFn", data, len(values))
        if global_valid_toks is None:
            raise ValueError(
                "global_valid_toks is None, expected the number of unmasked tokens "
                "in the global batch"
            )
