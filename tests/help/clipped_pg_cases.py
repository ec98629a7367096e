# SPDX-License-Identifier: Apache-2.0
"""Cases for the kernels of ``clipped_pg.cu``: run on threads of the CPU, and on a GPU.

Each is a function of a device that raises AssertionError where a kernel is wrong. They call the
public function with ``backend="cuda"`` and compare it with plain PyTorch, whose definition
``test_clipped_pg.py`` checks token by token.
"""

import math
import random

import torch

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import TERMS, Settings, clipped_pg_terms

LENGTHS = [1, 31, 32, 33, 1000, 8193]
DIFFERENTIABLE = ("loss", "kl_penalty", "positive_nll_loss")
EVERYTHING = {"reference_policy_kl_penalty": 0.3, "positive_example_nll_weight": 0.1}
GSPO = {"token_level_loss": False, "sequence_level_importance_ratios": True}

MODES = {
    "token": {},
    "response": {"token_level_loss": False},
    "gspo": GSPO,
    "gspo dual": GSPO | {"ratio_clip_c": 1.1},
    "gspo reinforce": GSPO | {"disable_ppo_ratio": True},
    "gspo on policy": GSPO | {"force_on_policy_ratio": True},
    "reinforce": {"disable_ppo_ratio": True},
    "reinforce dual": {"disable_ppo_ratio": True, "ratio_clip_c": 1.5},
    "cispo": {"use_cispo": True},
    "dual": {"ratio_clip_c": 1.3},
    "dual by response": {"ratio_clip_c": 1.3, "token_level_loss": False},
    "on policy": {"force_on_policy_ratio": True},
}
TRUNCATIONS = {
    "no correction": {},
    "untruncated": {"use_importance_sampling_correction": True},
    "tis": {"truncated_importance_sampling_type": "tis"},
    "tis low": {
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio_min": 0.7,
    },
    "icepop": {
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio_min": 0.7,
    },
    "seq-mask-tis": {
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio_min": 0.9,
    },
}
for _flags in TRUNCATIONS.values():
    if "truncated_importance_sampling_type" in _flags:
        _flags["truncated_importance_sampling_ratio"] = 1.3
        _flags["use_importance_sampling_correction"] = True


def combinations(seed=0):
    """Every mode with every truncation it allows; the other flags drawn."""
    draw = random.Random(seed).choice
    for mode, flags in MODES.items():
        for kind, truncation in TRUNCATIONS.items():
            if kind == "seq-mask-tis" and "gspo" in mode:
                continue
            yield (
                f"{mode}, {kind}",
                flags
                | truncation
                | {
                    "ratio_clip_max": draw((0.2, 0.28)),
                    "reference_policy_kl_penalty": draw((0.0, 0.3, 0.3)),
                    "reference_policy_kl_type": draw(("k1", "k2", "k3")),
                    "kl_input_clamp_value": draw((None, 0.3)),
                    "kl_output_clamp_value": draw((None, 0.05)),
                    "use_on_policy_kl_approximation": draw((False, True)),
                    "positive_example_nll_weight": draw((0.0, 0.1)),
                },
            )


def settings(**flags):
    """What `clipped_pg_terms` takes, of the flags of a configuration."""
    return Settings.of(ClippedPGLossFn(ClippedPGLossConfig(**flags)))


def batch(rows, steps, *, seed=0, dtype=torch.float64, mask_dtype=torch.float64, spread=0.5):
    """The arguments of `clipped_pg_terms` as a dict, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -0.01 - 4 * rand(rows, steps)
    near = [(logprobs + spread * randn(rows, steps)).clamp(max=-1e-3) for _ in range(4)]
    mask, sample_mask = rand(rows, steps) < 0.7, rand(rows) < 0.8
    sample_mask[:1] = True
    if rows > 2:
        mask[1] = False
        sample_mask[:3] = torch.tensor([True, True, False])
    given = {
        "logprobs": logprobs,
        "prev_logprobs": near[0],
        "generation_logprobs": near[1],
        "reference_logprobs": near[2],
        "unfiltered_logprobs": near[3] if seed % 2 else None,
        "advantages": randn(rows, steps),
        "rewards": randn(rows),
    }
    given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
    tokens = (mask * sample_mask[:, None]).sum()
    return given | {
        "mask": mask.to(mask_dtype),
        "sample_mask": sample_mask.to(mask_dtype),
        "global_valid_seqs": 1.5 * sample_mask.sum().double(),
        "global_valid_toks": 1.5 * tokens.double(),
    }


def run(given, flags, backend, device="cpu", dtype=None):
    """The terms and the gradients of a mixture of those that have one."""
    tensors = {
        name: x.to(device, dtype) if isinstance(x, torch.Tensor) else x for name, x in given.items()
    }
    leaves = [tensors["logprobs"]]
    if flags.get("reference_policy_kl_penalty") and tensors["unfiltered_logprobs"] is not None:
        leaves.append(tensors["unfiltered_logprobs"])
    leaves = [x.detach().requires_grad_() for x in leaves]
    tensors["logprobs"] = leaves[0]
    if len(leaves) == 2:
        tensors["unfiltered_logprobs"] = leaves[1]
    terms = clipped_pg_terms(**tensors, settings=settings(**flags), backend=backend)
    weights = {"loss": 1.0, "kl_penalty": 0.4, "positive_nll_loss": -0.3}
    mixture = sum(terms[TERMS.index(name)] * weight for name, weight in weights.items())
    return terms.detach().cpu(), [g.cpu() for g in torch.autograd.grad(mixture, leaves)]


def check(given, flags, device, tolerance=None, what="", finite=False, **options):
    """Kernels against plain PyTorch on the same device, whose exponentials have the same bits.

    A ratio at a clip is a tie with one exponential and none with another. With `finite`, an
    infinity counts as a NaN.
    """
    double = given["logprobs"].dtype == torch.float64
    tolerance = tolerance or (1e-10 if double else 3e-5)
    terms, grads = run(given, flags, "cuda", device)
    expected, slopes = run(given, flags, "torch", device, **options)
    if finite:
        terms, expected, *all_grads = (
            x.masked_fill(x.isinf(), math.nan) for x in (terms, expected, *grads, *slopes)
        )
        grads, slopes = all_grads[: len(grads)], all_grads[len(grads) :]
    both = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    for name, a, b in zip(TERMS, terms.double(), expected.double(), strict=True):
        torch.testing.assert_close(a, b, **both, msg=lambda m, n=name: f"{what}: {n}: {m}")
    for a, b in zip(grads, slopes, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **both, msg=lambda m: f"{what}: {m}")


def sizes(device, steps):
    """Any number of tokens and rows, masked rows among them; float32 against float64."""
    for rows in (1, 5) if steps < 2000 else (1,):
        given = batch(rows, steps, seed=rows, dtype=torch.float32)
        check(given, EVERYTHING, device, dtype=torch.float64)
        if rows > 1:
            check(given, EVERYTHING | GSPO, device, dtype=torch.float64)


def flags(device):
    """Every mode with every truncation."""
    for seed, (name, chosen) in enumerate(combinations()):
        check(batch(2, 8, seed=seed), chosen, device, what=name)


def empty(device):
    for shape in ((0, 7), (3, 0)):
        check(batch(*shape), EVERYTHING, device)


def no_counts(device):
    """Without counts of the global batch the means are sums, and without a mask all rows count."""
    given = batch(3, 20)
    for name in ("sample_mask", "global_valid_seqs", "global_valid_toks"):
        given[name] = None
    for chosen in (EVERYTHING, EVERYTHING | {"token_level_loss": False}):
        check(given, chosen, device)


def counts_and_masks_of_any_dtype(device):
    for dtype in (torch.float32, torch.int64, torch.int32, torch.bool, torch.uint8):
        given = batch(3, 20, mask_dtype=dtype)
        if dtype != torch.bool:
            for name in ("global_valid_seqs", "global_valid_toks"):
                given[name] = (given[name] + 5).to(dtype)
        check(given, EVERYTHING | {"token_level_loss": False}, device, tolerance=1e-7)
    check(batch(3, 20) | {"global_valid_toks": 7.0, "global_valid_seqs": 3}, EVERYTHING, device)


def weights_as_masks(device):
    given = batch(3, 20)
    generator = torch.Generator().manual_seed(1)
    for name in ("mask", "sample_mask"):
        given[name] = given[name] * torch.rand(given[name].shape, generator=generator)
    check(given, EVERYTHING, device)


def dtypes(device):
    """Half precision is computed in float32; dtypes may differ, and the widest counts."""
    for dtype in (torch.bfloat16, torch.float16):
        given = batch(3, 20, dtype=dtype)
        terms, grads = run(given, EVERYTHING, "cuda", device)
        wide = {n: x.float() if x is not None else None for n, x in given.items()}
        expected, slopes = run(wide, EVERYTHING, "torch")
        assert terms.dtype == torch.float32 and grads[0].dtype == dtype
        torch.testing.assert_close(terms, expected, rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(grads[0], slopes[0].to(dtype))
    given = batch(3, 20)
    given["logprobs"] = given["logprobs"].float()
    check(given, EVERYTHING, device, tolerance=1e-6)


def any_strides(device):
    given = batch(4, 41, seed=1)
    for cut in (lambda x: x[:, 1:], lambda x: x[:, ::2], lambda x: x.t().contiguous().t()):
        check(
            {n: cut(x) if x is not None and x.ndim == 2 else x for n, x in given.items()},
            EVERYTHING,
            device,
        )
    given["advantages"] = given["advantages"][:, :1].expand(4, 41)
    given["mask"] = given["mask"][:1].expand(4, 41)
    check(given, EVERYTHING, device)


def extremes(device):
    """Log-ratios of hundreds of nats and -inf, in every tensor; NaN where plain PyTorch has it.

    A response's ratio that overflows makes plain PyTorch multiply an infinity with every masked
    token's 0. The kernel multiplies sums: it may have the infinity where PyTorch has NaN.
    """
    for key in ("logprobs", "prev_logprobs", "generation_logprobs", "reference_logprobs"):
        for value in (-200.0, -math.inf):
            for masked in (False, True):
                given = batch(2, 10, dtype=torch.float32, mask_dtype=torch.float32)
                given[key][0, 3:5] = value
                given["mask"][0, 3:5] = 0.0 if masked else 1.0
                for chosen in (
                    {"use_importance_sampling_correction": True},
                    GSPO | {"use_importance_sampling_correction": True},
                    {"reference_policy_kl_type": "k2", "kl_input_clamp_value": 20.0},
                ):
                    what = f"{key} {value} {masked} {chosen}"
                    chosen = {"reference_policy_kl_penalty": 0.3} | chosen
                    loose = "sequence_level_importance_ratios" in chosen
                    check(given, chosen, device, what=what, finite=loose)


def policies_that_filter_the_same_token(device):
    """-inf under the policy that sampled and under that which is trained: a weight of 0."""
    given = batch(3, 20, dtype=torch.float32, mask_dtype=torch.float32)
    given["generation_logprobs"][0, 3] = given["prev_logprobs"][0, 3] = -math.inf
    for kind in TRUNCATIONS.values():
        check(given, {"disable_ppo_ratio": True} | kind, device, what=str(kind))


def ties(device):
    """Ratios of exactly 1, at the clips, and losses at the dual clip's limit."""
    given = batch(2, 30)
    given["prev_logprobs"] = given["logprobs"].clone()
    check(given, EVERYTHING, device)
    given["logprobs"][:] = 0.0
    given["prev_logprobs"][:] = -torch.tensor([0.8, 1.2, 1.5]).double().log().repeat(10)
    for chosen in ({"ratio_clip_c": 1.5}, {"ratio_clip_c": 1.2}, {"ratio_clip_max": 0.5}):
        check(given, {"reference_policy_kl_penalty": 0.0} | chosen, device, what=str(chosen))
    given["advantages"][:] = 0.0
    check(given, EVERYTHING, device)


def all_masked(device):
    for name in ("mask", "sample_mask"):
        given = batch(3, 20)
        given[name] = torch.zeros_like(given[name])
        given["global_valid_toks"] = given["global_valid_seqs"] = torch.tensor(0.0).double()
        for chosen in (EVERYTHING, EVERYTHING | GSPO):
            check(given, chosen, device, what=name)
            terms, grads = run(given, chosen, "cuda", device)
            assert terms[TERMS.index("probs_ratio_min")] == math.inf
            assert terms[TERMS.index("probs_ratio_max")] == -math.inf
            assert terms[0] == 0 and not grads[0].any()


def many_rows(device):
    """More rows than the last block has threads."""
    check(batch(70, 2, seed=1), EVERYTHING, device)


def same_bits(device):
    """Again and again: the last block leaves its counter as it was."""
    given = batch(2, 700, dtype=torch.float32)
    first = run(given, EVERYTHING, "cuda", device)
    for _ in range(2):
        again = run(given, EVERYTHING, "cuda", device)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], first[1], strict=True))


def finite_differences(device):
    """Where the loss holds nothing fixed, the gradient is what differences of it are."""
    free = EVERYTHING | {"use_on_policy_kl_approximation": True, "kl_input_clamp_value": None}
    weights = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
    for name, weight in (("loss", 1.0), ("kl_penalty", 0.5), ("positive_nll_loss", -0.5)):
        weights[TERMS.index(name)] = weight
    for fast, chosen in (
        (False, free),
        (True, free | GSPO),
        (True, free | {"ratio_clip_c": 1.2, "ratio_clip_max": 0.05}),
    ):
        given = {n: None if x is None else x.to(device) for n, x in batch(2, 5).items()}

        def mixture(logprobs, given=given, chosen=chosen):
            changed = given | {"logprobs": logprobs}
            terms = clipped_pg_terms(**changed, settings=settings(**chosen), backend="cuda")
            return (terms * weights).sum()

        given["logprobs"].requires_grad_()
        assert torch.autograd.gradcheck(mixture, given["logprobs"], fast_mode=fast)


def the_loss_itself(device):
    """`ClippedPGLossFn` has the kernels' numbers, or plain PyTorch's where a part is replaced."""

    class Doubled(ClippedPGLossFn):
        def _surrogate(self, *tensors):
            return 2 * super()._surrogate(*tensors)

    given = {name: None if x is None else x.to(device) for name, x in batch(3, 20).items()}
    column = torch.zeros(3, 1, dtype=torch.float64, device=device)
    data = {
        "token_mask": torch.cat([column, given["mask"]], 1),
        "sample_mask": given["sample_mask"],
        "advantages": torch.cat([column, given["advantages"]], 1),
    }
    for key in ("prev", "generation", "reference"):
        name = {"reference": "reference_policy_logprobs"}.get(key, f"{key}_logprobs")
        data[name] = torch.cat([column, given[f"{key}_logprobs"]], 1)
    counts = [given["global_valid_seqs"], given["global_valid_toks"]]
    config = ClippedPGLossConfig(reference_policy_kl_penalty=0.0)
    loss, metrics = ClippedPGLossFn(config)(given["logprobs"], data, *counts)
    twice, _ = Doubled(config)(given["logprobs"], data, *counts)
    assert metrics["loss"] == loss.item() != 0
    torch.testing.assert_close(twice, 2 * loss)
    assert "is_oob_ratio" not in metrics and metrics["kl_penalty"] == 0


CASES = [
    empty,
    no_counts,
    counts_and_masks_of_any_dtype,
    weights_as_masks,
    dtypes,
    any_strides,
    extremes,
    policies_that_filter_the_same_token,
    ties,
    all_masked,
    many_rows,
    same_bits,
    finite_differences,
    the_loss_itself,
]
