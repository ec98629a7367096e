# SPDX-License-Identifier: Apache-2.0
"""What is run on both sides: a file of ``configs/`` and the overrides that make it small or special.

The YAML is NeMo RL's, so each side reads the same file and the same overrides.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/advanced/algorithm-development"

SUPERVISED = (
    "{a}.max_num_steps=4", "{a}.val_period=2", "{a}.val_batches=2", "{a}.val_global_batch_size=24",
    "{a}.val_micro_batch_size=8", "policy.train_global_batch_size=16",
    "policy.train_micro_batch_size=8", "checkpointing.save_period=2",
)  # fmt: skip
SAMPLED = (
    "{a}.max_num_steps=4", "{a}.val_period=2", "{a}.num_prompts_per_step=4",
    "{a}.num_generations_per_prompt=8", "{a}.val_batch_size=32", "{a}.max_val_samples=64",
    "policy.train_global_batch_size=32", "policy.train_micro_batch_size=8",
    "policy.logprob_batch_size=16", "policy.max_total_sequence_length=64",
    "policy.optimizer.kwargs.lr=1e-3", "checkpointing.save_period=2",
)  # fmt: skip

#: Name of the variant, its algorithm first, to its own overrides.
VARIANTS = {
    "sft": (),
    "sft: partial last validation batch": ("sft.val_batches=-1", "sft.val_global_batch_size=96"),
    "sft: truncated, length divisible by 8": (
        "policy.max_total_sequence_length=10", "policy.make_sequence_length_divisible_by=8",
    ),
    "sft: micro-batches of 1, gradient clipped at 0.1": (
        "policy.train_micro_batch_size=1", "policy.max_grad_norm=0.1",
    ),
    "sft: cosine schedule, not shuffled": (
        "policy.scheduler=[{{name:torch.optim.lr_scheduler.CosineAnnealingLR,"
        "kwargs:{{T_max:4,eta_min:1e-5}}}},{{milestones:[]}}]",
        "data.shuffle=false",
    ),
    "sft: two epochs": (
        "policy.train_global_batch_size=1024", "policy.train_micro_batch_size=512",
        "sft.max_num_epochs=2", "sft.max_num_steps=100", "sft.val_period=0", "sft.val_at_end=true",
        "checkpointing.save_period=1",
    ),
    "sft: one checkpoint kept, ranked by the training loss": (
        "checkpointing.keep_top_k=1", "checkpointing.metric_name=train:loss",
        "checkpointing.save_period=1",
    ),
    "sft: all checkpoints ranked by age": (
        "checkpointing.metric_name=null", "checkpointing.save_period=1", "sft.val_at_end=false",
    ),
    "dpo": (),
    "dpo: SFT weight 0.5, averaged log-probabilities": (
        "dpo.sft_loss_weight=0.5", "dpo.preference_average_log_probs=true",
    ),
    "dpo: truncated to 10 tokens, divisible by 4": (
        "policy.max_total_sequence_length=10", "policy.make_sequence_length_divisible_by=4",
    ),
    "dpo: two epochs, beta 0.5": (
        "policy.train_global_batch_size=512", "policy.train_micro_batch_size=256",
        "dpo.max_num_epochs=2", "dpo.max_num_steps=100", "dpo.val_period=3",
        "dpo.reference_policy_kl_penalty=0.5", "checkpointing.save_period=3",
    ),
    "dpo: micro-batches of 2, no clipping": (
        "policy.train_micro_batch_size=2", "policy.max_grad_norm=1e9",
    ),
    "dpo: the page's launcher and loss": ("++dpo.dpop_penalty=5.0",),
    "rm": (),
    "rm: truncated to 10 tokens": ("policy.max_total_sequence_length=10",),
    "rm: two epochs, micro-batches of 64": (
        "policy.train_global_batch_size=512", "policy.train_micro_batch_size=64",
        "rm.max_num_epochs=2", "rm.max_num_steps=100", "rm.val_period=3",
        "checkpointing.save_period=3",
    ),
    "grpo": (),
    "grpo: two updates a step": ("policy.train_global_batch_size=16",),
    "grpo: dynamic sampling": (
        "grpo.use_dynamic_sampling=true", "grpo.batch_multiplier=2",
        "grpo.dynamic_sampling_max_gen_batches=10",
    ),
    "grpo: reward shaping": (
        "grpo.reward_shaping.enabled=true", "grpo.reward_shaping.overlong_buffer_length=3",
        "grpo.reward_shaping.max_response_length=5",
    ),
    "grpo: overlong filtering": ("grpo.overlong_filtering=true", "policy.generation.max_new_tokens=3"),
    "grpo: reward scaling, token mean of each response": (
        "grpo.reward_scaling.enabled=true", "grpo.reward_scaling.target_max=5.0",
        "loss_fn.token_level_loss=false",
    ),
    "grpo: no leave-one-out, not normalized": (
        "grpo.use_leave_one_out_baseline=false", "grpo.normalize_rewards=false",
    ),
    "grpo: Reinforce++ with the KL in the reward": (
        "grpo.adv_estimator.name=reinforce_plus_plus", "loss_fn.use_kl_in_reward=true",
        "loss_fn.reference_policy_kl_penalty=0.1",
    ),
    "grpo: ratios of sequences, two updates a step": (
        "loss_fn.sequence_level_importance_ratios=true", "loss_fn.token_level_loss=false",
        "policy.train_global_batch_size=16",
    ),
    "grpo: dual clip, importance sampling correction, two updates a step": (
        "loss_fn.ratio_clip_c=3", "loss_fn.ratio_clip_max=0.28",
        "loss_fn.use_importance_sampling_correction=true",
        "policy.train_global_batch_size=16",
    ),
    "grpo: ratio forced to 1, no reference": (
        "loss_fn.force_on_policy_ratio=true", "loss_fn.reference_policy_kl_penalty=0",
    ),
    "grpo: temperature 0.7": ("policy.generation.temperature=0.7",),
    "grpo: the environment's message does not fit": ("policy.max_total_sequence_length=16",),
    "grpo: the page's launcher, reward, estimator and loss": (
        "++data.train.env_name=partial_credit", "++data.validation.env_name=partial_credit",
        "++env.partial_credit.num_workers=1", "++loss_fn.max_response_length=5",
    ),
    "ppo": (),
    "ppo: two times over the batch, two updates each": (
        "ppo.ppo_epochs=2", "policy.train_global_batch_size=16",
        "policy.optimizer.kwargs.lr=1e-4",  # at 1e-3 ratios reach 8, and rounding 1e-4
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """What a page has a reader write: a launcher for NeMo RL and the cell with the pieces."""

    launcher: str
    label: str  # of the cell, in the notebook of the launcher's name
    module: str  # that the cell is copied to
    loss: str
    reward: str = ""
    estimator: str = ""

    @property
    def notebook(self):
        """The notebook with the cell."""
        return ROOT / f"notebooks/{self.launcher.removeprefix('run_')}.py"


#: Variants that are run by the launcher of a page, with its own pieces.
PIECES = {
    "dpo: the page's launcher and loss": Pieces(
        "run_custom_dpo", "dpop-loss", "dpop_loss", "DPOPLossFn"
    ),
    "grpo: the page's launcher, reward, estimator and loss": Pieces(
        "run_custom_grpo", "grpo-custom", "custom_grpo", "ConstantLengthLossFn",
        "partial_credit", "BatchStdEstimator",
    ),
}  # fmt: skip


def write_pieces(pieces, folder, prefix):
    """Do what the page says: copy the cell, with this prefix, and the launcher beside it."""
    pattern = rf"# %%\n#\| label: {pieces.label}\n(.*?)\n\n*(?=# %%)"
    (cell,) = re.findall(pattern, pieces.notebook.read_text(), re.DOTALL)
    Path(folder, f"{pieces.module}.py").write_text(cell.replace("nemo_rl_ref", prefix))
    for name in (pieces.launcher, "custom_environment"):
        shutil.copy(PAGES / f"{name}.py", folder)


def algorithm(name):
    """The algorithm of a variant."""
    return name.partition(":")[0]


def overrides(name, folder):
    """All overrides of a variant, with its logs and checkpoints in a folder."""
    kind = algorithm(name)
    common = SAMPLED if kind in ("grpo", "ppo") else SUPERVISED
    texts = [text.format(a=kind) for text in (*common, *VARIANTS[name])]
    folders = [
        f"checkpointing.checkpoint_dir={folder}/checkpoints",
        f"logger.log_dir={folder}/logs",
    ]
    return [*texts, *folders]
