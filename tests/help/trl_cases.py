# SPDX-License-Identifier: Apache-2.0
"""Losses beside TRL's own code: which losses, with which settings, on which batches.

TRL's losses are methods of its trainers. They are called here on stand-ins for the trainers, with
log-probabilities (or, for CPO and ORPO, logits) instead of a model.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import torch
from preference_checks import BETA
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from nemo_rl_ref.custom import batch, f_divergence, pairwise, reference_free

PAIRS, LENGTH, VOCABULARY = 5, 9, 30

CHOSEN_FIRST = torch.cat([torch.arange(0, 2 * PAIRS, 2), torch.arange(1, 2 * PAIRS, 2)])

ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def make_pairs(seed, dtype=torch.float64, prompt=None, length=None):
    """Log-probabilities (2P, S-1) and data; responses without holes, as TRL has them."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * PAIRS
    policy, reference = -3 * torch.rand(2, rows, LENGTH - 1, generator=generator, dtype=dtype)
    start = torch.randint(1, 5, (rows, 1), generator=generator)
    lengths = torch.randint(1, 5, (rows, 1), generator=generator)
    if prompt is not None:
        start.fill_(prompt)
    if length is not None:
        lengths.fill_(length)
    position = torch.arange(LENGTH)
    mask = (position >= start) & (position < start + lengths)
    return policy, {
        "token_mask": mask.to(dtype),
        "sample_mask": torch.ones(rows, dtype=dtype),
        "reference_policy_logprobs": torch.nn.functional.pad(reference, (0, 1)),
        "mismatched_logprobs": -9 * torch.rand(rows, generator=generator, dtype=dtype),
        "mismatched_reference_logprobs": -9 - torch.rand(rows, generator=generator, dtype=dtype),
    }


def model_output(policy, mask):
    """What TRL's models return, as far as the losses read it."""
    logprobs = policy * mask[:, 1:]
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def batch_for_trl(data, order):
    """Token mask, and sums of the reference's log-probabilities, with the rows in `order`."""
    mask = data["token_mask"][order]
    sums = (data["reference_policy_logprobs"][order][:, :-1] * mask[:, 1:]).sum(1)
    shared = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "attention_mask": torch.ones(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
    }
    return mask, sums, shared


def trainer(**settings):
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo_trainer_loss(policy, data, loss_type, **settings):
    mask, sums, inputs = batch_for_trl(data, CHOSEN_FIRST)
    stub = trainer(
        ld_alpha=None,
        use_weighting=False,
        loss_types=[loss_type],
        loss_weights=[1.0],
        **{
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "args": SimpleNamespace(discopop_tau=0.05),
            **settings,
        },
    )
    inputs |= {"ref_chosen_logps": sums[:PAIRS], "ref_rejected_logps": sums[PAIRS:]}
    output = model_output(policy[CHOSEN_FIRST], mask)
    return DPOTrainer._compute_loss(stub, lambda **_: output, inputs, False)


def kto_trainer_loss(policy, data, **settings):
    mask, sums, inputs = batch_for_trl(data, torch.arange(2 * PAIRS))
    stub = trainer(
        calculate_KL=True,
        loss_type="kto",
        _compute_kl_logps=lambda model, inputs: data["mismatched_logprobs"],
        **settings,
    )
    inputs |= {
        "label": torch.tensor([True, False] * PAIRS),
        "ref_logps": sums,
        "ref_KL_logps": data["mismatched_reference_logprobs"],
    }
    return KTOTrainer._compute_loss(stub, lambda **_: model_output(policy, mask), inputs, False)


def cpo_of_log_ratios(policy, data, label_smoothing):
    """CPO's loss given log-ratios for log-probabilities: DPO's with label smoothing."""
    mask = data["token_mask"][:, 1:]
    h = ((policy - data["reference_policy_logprobs"][:, :-1]) * mask).sum(1)
    stub = SimpleNamespace(
        accelerator=ACCELERATOR,
        alpha=0.0,
        beta=BETA,
        loss_type="sigmoid",
        label_smoothing=label_smoothing,
    )
    return CPOTrainer.cpo_loss(stub, h[::2], h[1::2])[0].mean()


SAME = {
    "ipo": (
        pairwise.IPOLossFn,
        {"preference_average_log_probs": True},
        partial(dpo_trainer_loss, loss_type="ipo"),
    ),
    "hinge": (pairwise.HingeLossFn, {}, partial(dpo_trainer_loss, loss_type="hinge")),
    "robust": (
        pairwise.RobustDPOLossFn,
        {"label_smoothing": 0.2},
        partial(dpo_trainer_loss, loss_type="robust", label_smoothing=0.2),
    ),
    "conservative": (
        pairwise.ConservativeDPOLossFn,
        {"label_smoothing": 0.2},
        partial(cpo_of_log_ratios, label_smoothing=0.2),
    ),
    "exo_pair": (
        pairwise.EXOPairLossFn,
        {},
        partial(dpo_trainer_loss, loss_type="exo_pair", label_smoothing=0.001),
    ),
    "nca_pair": (pairwise.NCAPairLossFn, {}, partial(dpo_trainer_loss, loss_type="nca_pair")),
    "sppo_hard": (pairwise.SPPOHardLossFn, {}, partial(dpo_trainer_loss, loss_type="sppo_hard")),
    "apo_zero": (pairwise.APOZeroLossFn, {}, partial(dpo_trainer_loss, loss_type="apo_zero")),
    "apo_down": (pairwise.APODownLossFn, {}, partial(dpo_trainer_loss, loss_type="apo_down")),
    "discopop": (pairwise.DiscoPOPLossFn, {}, partial(dpo_trainer_loss, loss_type="discopop")),
    "sigmoid_norm": (
        pairwise.LengthNormalizedDPOLossFn,
        {},
        partial(dpo_trainer_loss, loss_type="sigmoid_norm"),
    ),
    "bco_pair": (
        batch.BCOPairLossFn,
        {"bco_delta": "zero"},
        partial(dpo_trainer_loss, loss_type="bco_pair"),
    ),
    "aot": (
        batch.AOTLossFn,
        {"label_smoothing": 0.1},
        partial(dpo_trainer_loss, loss_type="aot", label_smoothing=0.1),
    ),
    "aot_unpaired": (
        batch.AOTUnpairedLossFn,
        {"label_smoothing": 0.1},
        partial(dpo_trainer_loss, loss_type="aot_unpaired", label_smoothing=0.1),
    ),
    "kto": (
        batch.KTOLossFn,
        {"kto_desirable_weight": 1.3, "kto_undesirable_weight": 0.6},
        partial(kto_trainer_loss, desirable_weight=1.3, undesirable_weight=0.6),
    ),
    "forward_kl": (
        f_divergence.FDivergenceDPOLossFn,
        {"f_divergence_type": "forward_kl"},
        partial(dpo_trainer_loss, loss_type="sigmoid", f_divergence_type="forward_kl"),
    ),
    "js_divergence": (
        f_divergence.FDivergenceDPOLossFn,
        {"f_divergence_type": "js_divergence"},
        partial(dpo_trainer_loss, loss_type="sigmoid", f_divergence_type="js_divergence"),
    ),
}


def logits_and_labels(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * PAIRS, LENGTH)
    logits = 2 * torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits, torch.randint(VOCABULARY, shape, generator=generator)


def logits_trainer_loss(trainer_class, logits, ids, data, **settings):
    """CPO's and ORPO's losses, from logits, with the trainers' own log-probabilities and NLL."""
    mask = data["token_mask"][CHOSEN_FIRST]
    stub = SimpleNamespace(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        beta=BETA,
        get_batch_logps=trainer_class.get_batch_logps,
        concatenated_inputs=lambda batch, **_: {
            "concatenated_input_ids": ids[CHOSEN_FIRST],
            # Nothing after the response; TRL's ORPO takes its NLL from what is attended to.
            "concatenated_attention_mask": mask.flip(1).cummax(1).values.flip(1).long(),
            "concatenated_labels": ids[CHOSEN_FIRST].masked_fill(mask == 0, -100),
        },
        **settings,
    )
    stub.concatenated_forward = partial(trainer_class.concatenated_forward, stub)
    for method in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, method):
            setattr(stub, method, partial(getattr(trainer_class, method), stub))
    inputs = {"chosen_labels": torch.zeros(PAIRS, LENGTH)}
    output = SimpleNamespace(logits=logits[CHOSEN_FIRST])
    return trainer_class.get_batch_loss_metrics(stub, lambda *_, **__: output, inputs)[0]


CPO = {"label_smoothing": 0.0, "alpha": 0.0}

# The SFT terms agree only if the chosen responses are of one length: then a mean over tokens is a
# mean over pairs of means over tokens. ORPO's is over the prompt too: one token, not predicted.
FROM_LOGITS = {
    "cpo": (
        reference_free.CPOLossFn,
        {"sft_loss_weight": 0.8, "sft_average_log_probs": True},
        partial(logits_trainer_loss, CPOTrainer, loss_type="sigmoid", cpo_alpha=0.8, **CPO),
        {"length": 3},
    ),
    "cpo without nll": (
        reference_free.CPOLossFn,
        {},
        partial(logits_trainer_loss, CPOTrainer, loss_type="sigmoid", cpo_alpha=0.0, **CPO),
        {},
    ),
    "simpo": (
        reference_free.SimPOLossFn,
        {"simpo_gamma": 0.7},
        partial(
            logits_trainer_loss,
            CPOTrainer,
            loss_type="simpo",
            simpo_gamma=0.7,
            cpo_alpha=0.0,
            **CPO,
        ),
        {},
    ),
    "slic": (
        reference_free.SLiCLossFn,
        {"slic_delta": 1.0},
        partial(logits_trainer_loss, CPOTrainer, loss_type="hinge", cpo_alpha=0.0, **CPO),
        {},
    ),
    "orpo": (
        reference_free.ORPOLossFn,
        {
            "sft_loss_weight": 1.0,
            "sft_average_log_probs": True,
            "preference_loss_weight": BETA,
        },
        partial(logits_trainer_loss, ORPOTrainer),
        {"prompt": 1, "length": 4},
    ),
}
