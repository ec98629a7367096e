# SPDX-License-Identifier: Apache-2.0
"""Clipped policy gradient: PPO, GRPO and their relatives.

What is computed, in plain PyTorch or by CUDA kernels: ``_clipped_pg_terms``.
"""

from collections.abc import Mapping
from typing import Any, Optional, TypedDict

import torch
from pydantic import BaseModel
from torch import Tensor

from nemo_rl_ref.algorithms.loss._checks import check_floating, check_token_batch
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import (
    TERMS,
    Parts,
    Settings,
    clipped_pg_terms,
    named_terms,
)
from nemo_rl_ref.algorithms.loss.interfaces import (
    LossFunction,
    LossInputType,
    LossType,
    MetricNormalizer,
)
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.logprobs.arguments import Refused


class ClippedPGLossConfig(BaseModel, extra="allow"):
    """What `ClippedPGLossFn` reads: ``loss_fn`` in NeMo RL's GRPO and PPO configurations.

    Attributes:
        disable_ppo_ratio: log π_θ in the place of the ratio, without clipping: REINFORCE, RLOO.
        token_level_loss: mean over all tokens of the batch; False for the mean over responses of
            the mean over their tokens.
        sequence_level_importance_ratios: one ratio a response, the geometric mean of its token
            ratios, and one importance weight, the product of its token weights: GSPO.
        ratio_clip_min: ε_low; ratios are clipped to [1 - ε_low, 1 + ε_high].
        ratio_clip_max: ε_high.
        ratio_clip_c: dual clip: for a negative advantage A the loss of a token is at most -c A.
            Greater than 1; None for none.
        reference_policy_kl_penalty: β, weight of the KL term; with 0 no reference is needed.
        reference_policy_kl_type: "k1", "k2" or "k3", see `calculate_kl`.
        kl_input_clamp_value: clamp of log(π_ref/π_θ), nats; None for none.
        kl_output_clamp_value: clamp of the KL estimate, nats; None for none.
        use_kl_in_reward: leave the KL out of the loss; the advantage estimator puts it into the
            reward.
        use_importance_sampling_correction: weigh each token with π_old/π_gen.
        truncated_importance_sampling_type: what happens to weights outside
            [ratio_min, ratio]: "tis" clamps them; "icepop" makes them 0; "seq-mask-tis" makes all
            weights of a response 0 if their geometric mean is outside. None for nothing.
        truncated_importance_sampling_ratio: upper bound of the weights.
        truncated_importance_sampling_ratio_min: lower bound; None is 0, for "tis" only.
        use_on_policy_kl_approximation: weigh the KL term with π_θ/π_gen instead of a weight whose
            value is 1.
        force_on_policy_ratio: take π_old to be π_θ: ratio 1 with the gradient of log π_θ. Right
            only with one update for each batch of rollouts.
        use_cispo: clip the weight of log π_θ instead of the objective: CISPO.
        positive_example_nll_weight: μ, weight of the negative log-likelihood of the responses
            with a positive reward: VAPO. 0 for none.
    """

    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: Optional[float] = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: Optional[float] = 20.0
    kl_output_clamp_value: Optional[float] = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: Optional[str] = None
    truncated_importance_sampling_ratio: Optional[float] = None
    truncated_importance_sampling_ratio_min: Optional[float] = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0


class ClippedPGLossDataDict(TypedDict):
    """Keys of a policy-gradient batch, see `ClippedPGLossFn`."""

    input_ids: torch.Tensor
    advantages: torch.Tensor
    prev_logprobs: torch.Tensor
    generation_logprobs: torch.Tensor
    reference_policy_logprobs: torch.Tensor
    token_mask: torch.Tensor
    sample_mask: torch.Tensor
    __extra__: Any


class ClippedPGLossFn(LossFunction):
    r"""Clipped policy gradient with a KL penalty: PPO, GRPO, DAPO, RLOO, GSPO, CISPO, VAPO.

    .. math::

        L(θ) &= \underset{b,t}{\mathrm{mean}} \; w_{b,t} \, ℓ_{b,t}
                + β \, \underset{b,t}{\mathrm{mean}} \; k_{b,t} + μ \, L_{NLL} \\
        ℓ_{b,t} &= -\min\big(ρ_{b,t} A_{b,t}, \;
                   \mathrm{clip}(ρ_{b,t}, 1 - ε_{low}, 1 + ε_{high}) A_{b,t}\big) \\
        ρ_{b,t} &= π_θ(x_{b,t} \mid x_{b,<t}) \,/\, π_{old}(x_{b,t} \mid x_{b,<t})

    with A the advantage, k an estimate of KL(π_θ‖π_ref), and w = π_old/π_gen or 1 the correction
    for tokens that another engine sampled. Both means are over tokens or over responses
    (``token_level_loss``), divided by the counts of the global batch. Which flag makes what:

    ==================  ====================================================  ==================
    algorithm           flags                                                 source
    ==================  ====================================================  ==================
    PPO                 none; advantages from GAE                             arXiv:1707.06347
    GRPO                ``token_level_loss=False``                            arXiv:2402.03300
    DAPO                ``ratio_clip_max=0.28``, no KL                        arXiv:2503.14476
    dual clip           ``ratio_clip_c=3``                                    arXiv:1912.09729
    REINFORCE, RLOO     ``disable_ppo_ratio``                                 arXiv:2402.14740
    GSPO                ``sequence_level_importance_ratios``,                 arXiv:2507.18071
                        ``token_level_loss=False``
    CISPO               ``use_cispo``                                         arXiv:2506.13585
    VAPO                ``positive_example_nll_weight=0.1``; GAE              arXiv:2504.05118
    ==================  ====================================================  ==================

    Not everything sums over micro-batches. The positive NLL (μ > 0) is a mean over the
    micro-batch's own tokens. The ``_min`` and ``_max`` metrics are of the micro-batch. With
    ``sequence_level_importance_ratios`` the metric ``sampling_importance_ratio`` is, as in NeMo
    RL, no mean: it is the sum of the weights of all rows of the micro-batch, masked ones
    included, times its valid rows over those of the global batch.

    On CUDA, loss and metrics are one kernel and the gradient another; the host waits once, for the
    metrics. Plain PyTorch runs where the kernels would compute something else or nothing: without
    tokens, where another tensor than the log-probabilities of the policy requires a gradient, and
    for a subclass that replaces a part of the computation.

    Args:
        cfg: the flags.
        use_fused_linear_logprobs: kept on the instance, see `NLLLossFn`; changes no number.

    Attributes:
        loss_type: TOKEN_LEVEL or SEQUENCE_LEVEL, by ``token_level_loss``.
        metric_normalizations: what each metric has been divided by.

    Raises:
        TypeError: if `cfg` is a mapping.
        ValueError: if flags contradict each other or have an unknown value.

    Example:
        Two tokens with advantage 1, the second of which has become twice as likely:

        >>> old = torch.tensor([[0.0, -1.0, -1.0]])
        >>> data = {"token_mask": torch.ones(1, 3), "sample_mask": torch.ones(1)}
        >>> data |= {
        ...     "advantages": torch.ones(1, 3),
        ...     "prev_logprobs": old,
        ...     "generation_logprobs": old,
        ... }
        >>> loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
        >>> new = old[:, 1:] + torch.tensor([[1.0, 2.0]]).log()
        >>> loss, metrics = loss_fn(new, data, torch.tensor(1), torch.tensor(2))
        >>> loss, round(metrics["probs_ratio"], 4), round(metrics["probs_ratio_clamped"], 4)
        (tensor(-1.1000), 1.5, 1.1)
    """

    input_type = LossInputType.LOGPROB

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        if isinstance(cfg, Mapping):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}, expected a ClippedPGLossConfig: "
                "ClippedPGLossConfig(**cfg)"
            )
        _check_values(cfg)
        _check_combinations(cfg)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.disable_ppo_ratio = cfg.disable_ppo_ratio
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        self.sequence_level_importance_ratios = cfg.sequence_level_importance_ratios
        self.use_cispo = cfg.use_cispo
        self.ratio_clip_min = cfg.ratio_clip_min
        self.ratio_clip_max = cfg.ratio_clip_max
        self.ratio_clip_c = cfg.ratio_clip_c
        # A trainer reads this to learn whether it has to run the reference policy for the loss.
        self.reference_policy_kl_penalty = (
            0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        )
        self.reference_policy_kl_type = cfg.reference_policy_kl_type
        self.kl_input_clamp_value = cfg.kl_input_clamp_value
        self.kl_output_clamp_value = cfg.kl_output_clamp_value
        self.use_on_policy_kl_approximation = cfg.use_on_policy_kl_approximation
        self.use_importance_sampling_correction = cfg.use_importance_sampling_correction
        self.truncated_importance_sampling_type = cfg.truncated_importance_sampling_type
        self.truncated_importance_sampling_ratio = cfg.truncated_importance_sampling_ratio
        self.truncated_importance_sampling_ratio_min = cfg.truncated_importance_sampling_ratio_min
        self.positive_example_nll_weight = cfg.positive_example_nll_weight
        self.metric_normalizations = self._normalizations()

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[ClippedPGLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch.

        A NaN or infinite log-probability makes the loss NaN even where a mask is 0: fill the
        log-probabilities of padding with finite numbers.

        Args:
            next_token_logprobs: log π_θ, (B, S-1) floating, nats; entry t belongs to token t+1.
            data: the tensors below, (B, S) with entry t belonging to token t, so that column 0 is
                not used, unless said otherwise:

                - ``token_mask``: 1 on response tokens; ``sample_mask`` (B,), 1 for responses that
                  count;
                - ``advantages``;
                - ``prev_logprobs``: log π_old, nats; not read with ``force_on_policy_ratio``;
                - ``generation_logprobs``: log π_gen, nats;
                - ``reference_policy_logprobs``: log π_ref, nats; only with a KL penalty;
                - ``curr_logprobs_unfiltered``, optional: (B, S-1), log π_θ for the KL term, where
                  `next_token_logprobs` are those after top-k or top-p filtering;
                - ``rewards``, optional: (B,); the positive NLL is left out without them.
            global_valid_seqs: number of valid responses in the global batch, scalar. Used by
                everything that is a mean over responses.
            global_valid_toks: number of unmasked tokens in the global batch, scalar.

        Returns:
            The scalar loss and the metrics ``loss``; ``kl_penalty`` (mean KL estimate, without
            β); ``probs_ratio`` and ``probs_ratio_clamped`` (means) with ``_min`` and ``_max``;
            ``token_mult_prob_error``, ``gen_kl_error``, ``policy_kl_error``,
            ``js_divergence_error``, ``sampling_importance_ratio`` and, with a truncation,
            ``is_oob_ratio`` (π_old against π_gen); ``approx_entropy``; ``positive_nll_loss``;
            ``num_valid_samples``. With ``disable_ppo_ratio`` the ratio metrics are of log π_θ,
            as in NeMo RL.

        Raises:
            KeyError: if a key is missing in `data`.
            TypeError: if log-probabilities are not floating.
            ValueError: if a shape does not fit or a count is None.
        """
        self._check_batch(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
        with_kl = self.reference_policy_kl_penalty != 0
        terms = clipped_pg_terms(
            next_token_logprobs,
            None if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:],
            data["generation_logprobs"][:, 1:],
            data["reference_policy_logprobs"][:, 1:] if with_kl else None,
            data["advantages"][:, 1:],
            data["token_mask"][:, 1:],
            Settings.of(self),  # each time, so that an attribute that was changed counts
            sample_mask=data["sample_mask"],
            rewards=data["rewards"]
            if self.positive_example_nll_weight > 0 and "rewards" in data
            else None,
            unfiltered_logprobs=data.get("curr_logprobs_unfiltered") if with_kl else None,
            global_valid_seqs=global_valid_seqs,
            global_valid_toks=global_valid_toks,
            plain=self._terms if self._has_own_parts() else None,
        )
        # The only wait for the device.
        metrics: dict[str, Any] = dict(zip(TERMS, terms.tolist(), strict=True))
        if self.truncated_importance_sampling_type is None:
            del metrics["is_oob_ratio"]
        if not data["sample_mask"].is_floating_point():
            metrics["num_valid_samples"] = int(metrics["num_valid_samples"])
        # NeMo RL's is the integer 0 where there is no penalty.
        metrics["kl_penalty"] = metrics["kl_penalty"] or 0
        return terms[0], metrics

    # The parts of the computation. A class that replaces one runs plain PyTorch with its own.

    def _terms(self, *tensors: Any) -> dict[str, Tensor]:
        """The loss and its metrics as scalar tensors; arguments: `named_terms`."""
        own = (self._ratios, self._surrogate, self._importance_weights)
        own = Parts(*own, self._kl_estimate, self._importance_metrics)
        return named_terms(Settings.of(self), own, *tensors)

    def _ratios(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        return Parts.of(Settings.of(self)).ratios(*tensors)

    def _surrogate(self, *tensors: Any) -> Tensor:
        return Parts.of(Settings.of(self)).surrogate(*tensors)

    def _importance_weights(self, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        return Parts.of(Settings.of(self)).importance_weights(*tensors)

    def _kl_estimate(self, *tensors: Any) -> Tensor:
        return Parts.of(Settings.of(self)).kl_estimate(*tensors)

    def _importance_metrics(self, *tensors: Any) -> dict[str, Tensor]:
        return Parts.of(Settings.of(self)).importance_metrics(*tensors)

    def _has_own_parts(self) -> bool:
        names = ("_terms", *(f"_{name}" for name in Parts._fields))
        return any(getattr(type(self), n) is not getattr(ClippedPGLossFn, n) for n in names)

    def _normalizations(self) -> dict[str, MetricNormalizer]:
        tokens, sequences = MetricNormalizer.TOKENS, MetricNormalizer.SEQUENCES
        as_the_loss = tokens if self.loss_type is LossType.TOKEN_LEVEL else sequences
        table = {
            "loss": as_the_loss,
            "kl_penalty": as_the_loss,
            "probs_ratio": tokens,
            "probs_ratio_clamped": tokens,
            "token_mult_prob_error": tokens,
            "gen_kl_error": tokens,
            "policy_kl_error": tokens,
            "js_divergence_error": tokens,
            "approx_entropy": tokens,
            "sampling_importance_ratio": (
                sequences if self.sequence_level_importance_ratios else tokens
            ),
            "num_valid_samples": MetricNormalizer.NONE,
            "positive_nll_loss": MetricNormalizer.NONE,
            "probs_ratio_min": MetricNormalizer.NONE,
            "probs_ratio_max": MetricNormalizer.NONE,
            "probs_ratio_clamped_min": MetricNormalizer.NONE,
            "probs_ratio_clamped_max": MetricNormalizer.NONE,
        }
        if self.truncated_importance_sampling_type is not None:
            of_responses = self.truncated_importance_sampling_type == "seq-mask-tis"
            table["is_oob_ratio"] = sequences if of_responses else tokens
        return table

    def _check_batch(
        self, logprobs: Any, data: Mapping[str, Any], global_valid_seqs: Any, global_valid_toks: Any
    ) -> None:
        stored = ["generation_logprobs"]
        if not self.force_on_policy_ratio:
            stored.append("prev_logprobs")
        if self.reference_policy_kl_penalty != 0:
            stored.append("reference_policy_logprobs")
        check_token_batch("ClippedPGLossFn", logprobs, data, ("token_mask", "advantages", *stored))
        for key in stored:
            check_floating(f"data[{key!r}]", data[key])
        if global_valid_toks is None:
            raise ValueError(
                "global_valid_toks is None, expected the number of unmasked tokens "
                "in the global batch"
            )
        by_response = (
            self.loss_type is LossType.SEQUENCE_LEVEL
            or self.truncated_importance_sampling_type == "seq-mask-tis"
        )
        if by_response and global_valid_seqs is None:
            raise ValueError(
                "global_valid_seqs is None, expected the number of valid responses "
                "in the global batch"
            )
        if "curr_logprobs_unfiltered" in data and self.reference_policy_kl_penalty != 0:
            shape = data["curr_logprobs_unfiltered"].shape
            if shape != logprobs.shape:
                raise ValueError(
                    f"data['curr_logprobs_unfiltered'] has shape {tuple(shape)}, expected "
                    f"(B, S-1) = {tuple(logprobs.shape)}"
                )
        if "rewards" in data and self.positive_example_nll_weight > 0:
            shape = data["rewards"].shape
            if shape != logprobs.shape[:1]:
                raise ValueError(
                    f"data['rewards'] has shape {tuple(shape)}, expected (B,) = "
                    f"{tuple(logprobs.shape[:1])}"
                )


def _check_values(cfg: ClippedPGLossConfig) -> None:
    """Checks the flags that are wrong by themselves."""
    if cfg.reference_policy_kl_type not in ("k1", "k2", "k3"):
        raise ValueError(
            f"reference_policy_kl_type is {cfg.reference_policy_kl_type!r}, "
            "expected 'k1', 'k2' or 'k3'"
        )
    if cfg.ratio_clip_c is not None and cfg.ratio_clip_c <= 1:
        raise ValueError(
            f"ratio_clip_c is {cfg.ratio_clip_c}, expected more than 1: it bounds the loss of "
            "ratios above 1 where the advantage is negative"
        )
    kind = cfg.truncated_importance_sampling_type
    if kind not in (None, "tis", "icepop", "seq-mask-tis"):
        raise ValueError(
            f"truncated_importance_sampling_type is {kind!r}, "
            "expected 'tis', 'icepop', 'seq-mask-tis' or None"
        )
    high = cfg.truncated_importance_sampling_ratio
    if kind is not None and high is not None and high <= 0:
        raise ValueError(
            f"truncated_importance_sampling_ratio is {high}, expected more than 0: "
            "it is the upper bound of importance weights"
        )


def _check_combinations(cfg: ClippedPGLossConfig) -> None:
    """Checks the flags that contradict each other."""
    if cfg.sequence_level_importance_ratios and cfg.token_level_loss:
        raise _clash(
            "sequence_level_importance_ratios=True",
            "token_level_loss=True",
            "with one ratio a response, the loss is a mean over responses",
        )
    if cfg.use_cispo:
        _check_cispo(cfg)
    kind = cfg.truncated_importance_sampling_type
    high = cfg.truncated_importance_sampling_ratio
    low = cfg.truncated_importance_sampling_ratio_min
    if kind is None:
        if high is not None:
            raise _clash(
                f"truncated_importance_sampling_ratio={high}",
                "truncated_importance_sampling_type=None",
                "a bound needs a type that says what happens to weights above it",
            )
        return
    this = f"truncated_importance_sampling_type={kind!r}"
    if not cfg.use_importance_sampling_correction:
        raise _clash(
            this,
            "use_importance_sampling_correction=False",
            "there are no importance weights to truncate",
        )
    if high is None:
        raise _clash(
            this, "truncated_importance_sampling_ratio=None", "the weights need an upper bound"
        )
    if low is None and kind != "tis":
        raise _clash(
            this,
            "truncated_importance_sampling_ratio_min=None",
            "it drops what lies outside two bounds; only 'tis' has a default for the lower one",
        )
    if low is not None and low > high:
        raise _clash(
            f"truncated_importance_sampling_ratio_min={low}",
            f"truncated_importance_sampling_ratio={high}",
            "truncated_importance_sampling_ratio_min must be <= "
            "truncated_importance_sampling_ratio",
        )
    if kind == "seq-mask-tis" and cfg.sequence_level_importance_ratios:
        raise _clash(
            this,
            "sequence_level_importance_ratios=True",
            "it keeps the weights of single tokens, and with the other flag there is one weight "
            "a response",
        )


def _check_cispo(cfg: ClippedPGLossConfig) -> None:
    reasons = [
        (cfg.disable_ppo_ratio, "disable_ppo_ratio=True", "it clips the ratio π_θ/π_old"),
        (
            cfg.force_on_policy_ratio,
            "force_on_policy_ratio=True",
            "it clips the ratio π_θ/π_old, which would always be 1",
        ),
        (
            cfg.sequence_level_importance_ratios,
            "sequence_level_importance_ratios=True",
            "it has one ratio a token",
        ),
        (
            cfg.ratio_clip_c is not None,
            f"ratio_clip_c={cfg.ratio_clip_c}",
            "the dual clip bounds PPO's objective, which it does not have",
        ),
        (not cfg.token_level_loss, "token_level_loss=False", "it is a mean over tokens"),
    ]
    for wrong, flag, why in reasons:
        if wrong:
            raise _clash("use_cispo=True", flag, why)


def _clash(first: str, second: str, why: str) -> Refused:
    return Refused(f"{first} and {second} exclude each other: {why}")
