# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration that the runners use: NeMo RL's classes, as far as used here.

Fields, types, nulls and defaults are those of NeMo RL's class of the same name; the bounds are
ours, where NeMo RL fails later or trains nothing. A field without a default must be in the
configuration, as there. ``grpo``, ``ppo`` and ``loss_fn`` have their classes in
`nemo_rl_ref.algorithms`; `nemo_rl_ref.rl.settings` puts them together with these.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from nemo_rl_ref.config.settings import OpenSection, Section
from nemo_rl_ref.utils.timer import convert_to_seconds

Count = Annotated[int, Field(ge=1, lt=2**63)]
Length = Annotated[int, Field(ge=1, lt=2**63)]  # in tokens
Width = Annotated[int, Field(ge=1, le=2**20)]  # in tokens; tensors are as wide as that
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's generator takes
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=1)] | Literal[-1] | None


class OptimizerConfig(Section):
    """``policy.optimizer``; what it can be: `nemo_rl_ref.training.optimizers`.

    Attributes:
        name: ``torch.optim.AdamW``, for example.
        kwargs: Its arguments.
    """

    name: str
    kwargs: dict[str, Any]


class SchedulerConfig(OptimizerConfig):
    """``policy.scheduler``, or an entry of that list.

    Attributes:
        name: ``torch.optim.lr_scheduler.LinearLR``, for example.
        kwargs: Its arguments.
    """


class MilestonesConfig(Section):
    """The last entry of a list of schedulers.

    Attributes:
        milestones: The steps at which each scheduler gives way to the next.
    """

    milestones: list[int]


def _entry_kind(entry: Any) -> str:
    """Which of the two an entry is, before it is read and after."""
    is_last = isinstance(entry, MilestonesConfig)
    is_last |= isinstance(entry, dict) and "milestones" in entry
    return "milestones" if is_last else "scheduler"


#: A scheduler, or several in turn.
Scheduler = Annotated[
    Annotated[SchedulerConfig, Tag("one")]
    | Annotated[
        list[
            Annotated[
                Annotated[SchedulerConfig, Tag("scheduler")]
                | Annotated[MilestonesConfig, Tag("milestones")],
                Discriminator(_entry_kind),
                "a mapping with name and kwargs, or with milestones",
            ]
        ],
        Field(min_length=1),
        Tag("several"),
    ],
    Discriminator(lambda value: "several" if isinstance(value, (list, tuple)) else "one"),
    "a mapping with name and kwargs, or a list of them",
]


class TokenizerConfig(Section):
    """``policy.tokenizer``; see `nemo_rl_ref.algorithms.utils.get_tokenizer`."""

    name: str
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TrainedConfig(Section):
    """What ``policy`` and ``value`` have in common: a model, and what moves it.

    Attributes:
        model_name: Name or path of a Hugging Face model.
        train_global_batch_size: Samples of an update.
        train_micro_batch_size: Samples that go through the model at once.
        max_grad_norm: The gradient is scaled down to this norm; None for no limit.
        optimizer: See `nemo_rl_ref.training.optimizers.make_optimizer`.
        scheduler: See `nemo_rl_ref.training.optimizers.make_scheduler`.
    """

    model_name: str
    train_global_batch_size: Count
    train_micro_batch_size: Count
    max_grad_norm: float | None = Field(default=None, gt=0)
    optimizer: Annotated[
        OptimizerConfig, "a mapping with name, kwargs; one below megatron_cfg is not read here"
    ]
    scheduler: Scheduler | None = None


class PolicyConfig(TrainedConfig):
    """``policy``.

    Attributes:
        tokenizer: See `TokenizerConfig`.
        precision: Of matrix products; weights are float32.
        max_total_sequence_length: Tokens of a prompt with its response.
        make_sequence_length_divisible_by: Batches are padded to a multiple of this, in tokens.
    """

    tokenizer: TokenizerConfig
    precision: Literal["float32", "bfloat16"]
    max_total_sequence_length: Length
    make_sequence_length_divisible_by: Width


class GenerationConfig(Section):
    """``policy.generation``: how responses are sampled; with ``val_``, in validation.

    Attributes:
        max_new_tokens: Longest response.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample from the fewest tokens with this probability together.
        top_k: Sample from this many tokens; None or -1 for all.
        stop_token_ids: Tokens that end a response; None for the tokenizer's.
        stop_strings: Texts that end it, too.
    """

    max_new_tokens: Width
    temperature: Temperature
    top_p: TopP
    top_k: TopK
    val_temperature: Temperature
    val_top_p: TopP
    val_top_k: TopK
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None
    stop_strings: list[Annotated[str, Field(min_length=1), "text that is not empty"]] | None


class SampledPolicyConfig(PolicyConfig):
    """``policy`` of GRPO and PPO.

    Attributes:
        generation: See `GenerationConfig`.
        generation_batch_size: Responses sampled at once; None for all.
        logprob_batch_size: Responses whose log-probabilities are computed at once; None for all.
    """

    generation: GenerationConfig
    generation_batch_size: Count | None = None
    logprob_batch_size: Count | None = None


class ValueConfig(TrainedConfig):
    """``value`` of PPO."""


class OnPolicyDistillationConfig(Section):
    """``on_policy_distillation``; here with one teacher.

    Attributes:
        enabled: Whether there is one.
        teacher_model_by_agent_name: The teacher of each agent.
    """

    enabled: bool = False
    teacher_model_by_agent_name: dict[str, str] = {}


class RewardModelConfig(Section):
    """``policy.reward_model_cfg``: the only kind of reward model is Bradley and Terry's."""

    enabled: bool
    reward_model_type: Literal["bradley_terry"]


class RewardPolicyConfig(PolicyConfig):
    """``policy`` of a reward model."""

    reward_model_cfg: RewardModelConfig


class DatasetConfig(OpenSection):
    """A dataset; a key that is not here goes to its class, see `nemo_rl_ref.data.datasets`.

    Attributes:
        dataset_name: The name of its class.
        data_path: A file, or the name of a Hugging Face dataset.
        split: Of a Hugging Face dataset.
        subset: Likewise.
        split_validation_size: Records to hold out for validation: their number, or below 1 their
            share.
        seed: Draws them.
        env_name: The environment that scores responses.
        processor: What makes a prompt of a record.
        prompt_file: A file with a template of the prompt.
        system_prompt_file: A file with the system's message.
    """

    dataset_name: str | None = None
    data_path: str | None = None
    split: str | None = None
    subset: str | None = None
    split_validation_size: float = Field(default=0.0, ge=0)
    seed: int = Field(default=42, ge=0)
    env_name: str | None = None
    processor: str | None = None
    prompt_file: str | None = None
    system_prompt_file: str | None = None
    input_key: str | None = None
    output_key: str | None = None
    prompt_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


#: One dataset or a list of them, read as a list.
Datasets = Annotated[list[DatasetConfig], BeforeValidator(_listed), "a dataset or a list of them"]


class DataConfig(Section):
    """``data``.

    Attributes:
        max_input_seq_length: Longer samples have no weight, in tokens; None for no limit.
        shuffle: Whether the samples of an epoch are shuffled.
        num_workers: Of NeMo RL's data loader. None is started here; whether there are any decides
            from which of PyTorch's random numbers the order is drawn.
        train: What to train on.
        validation: What to validate on.
        default: What an entry of the two leaves out.
    """

    max_input_seq_length: Length | None
    shuffle: bool
    num_workers: int = Field(default=1, ge=0)
    train: Datasets = Field(min_length=1)
    validation: Datasets | None = None
    default: DatasetConfig | None = None

    @property
    def longest(self) -> int:
        """``max_input_seq_length``, a number also where there is no limit."""
        return self.max_input_seq_length or sys.maxsize


class ConversationsConfig(DataConfig):
    """``data`` of SFT.

    Attributes:
        add_bos: Begin every conversation with the tokenizer's first token.
        add_eos: End it with the tokenizer's last token.
        add_generation_prompt: Put the start of an answer before each message of the assistant.
    """

    add_bos: bool = True
    add_eos: bool = True
    add_generation_prompt: bool = False


class PreferencesConfig(DataConfig):
    """``data`` of DPO and reward models: one dataset to train on.

    Attributes:
        val_data_paths: Files to validate on, by name.
    """

    train: Annotated[DatasetConfig, "one dataset"]
    validation: Annotated[DatasetConfig | None, "null or one dataset"] = None
    val_data_paths: dict[str, str] | None = None


def _metric_name(value: str | None) -> str | None:
    if value is not None and not re.match(r"(train|val):.", value):
        raise ValueError(
            f"got {value!r}, expected null, or 'val:' or 'train:' followed by the name of a "
            "metric, such as 'val:val_loss'"
        )
    return value


def _time(value: str | None) -> str | None:
    if value is not None:
        convert_to_seconds(value)
    return value


class CheckpointingConfig(Section):
    """``checkpointing``; see `nemo_rl_ref.utils.checkpoint.CheckpointManager`.

    Attributes:
        enabled: Whether checkpoints are written.
        checkpoint_dir: Their folder.
        metric_name: Ranks them: ``val:`` or ``train:`` and a metric; None for their age.
        higher_is_better: Whether the largest value of that metric is the best.
        save_period: Steps between two.
        keep_top_k: How many of them are kept; None for all.
        ft_save_period: Steps between two more, to go on from.
        ft_keep_latest_k: How many of the latest are kept besides.
        checkpoint_must_save_by: Save and stop after this time, ``DD:HH:MM:SS``.
        save_optimizer: Whether a run can go on from them exactly.
    """

    enabled: bool
    checkpoint_dir: Path
    metric_name: Annotated[str | None, AfterValidator(_metric_name)]
    higher_is_better: bool
    save_period: Count
    keep_top_k: int | None = Field(default=None, ge=0)
    ft_save_period: Count | None = None
    ft_keep_latest_k: int | None = Field(default=None, ge=0)
    checkpoint_must_save_by: Annotated[str | None, AfterValidator(_time)] = None
    save_optimizer: bool = True


class LoggerConfig(Section):
    """``logger``; see `nemo_rl_ref.utils.logger.Logger`."""

    log_dir: Annotated[str, Field(min_length=1), "a folder"]
    tensorboard_enabled: bool
    tensorboard: dict[str, Any] = {}


class TrainingConfig(Section):
    """What ``sft``, ``dpo`` and ``rm`` have in common.

    Attributes:
        max_num_epochs: Passes over the data, at most.
        max_num_steps: Steps, at most.
        val_period: Steps between validations; 0 for none.
        val_batches: Batches of a validation; -1 for all.
        val_global_batch_size: Samples of one.
        val_micro_batch_size: Samples of it that go through the model at once.
        val_at_start: Validate before the first step.
        val_at_end: Validate after the last step.
        seed: Seeds the order of the data, dropout and new weights.
    """

    max_num_epochs: Count = 1
    max_num_steps: Count
    val_period: int = Field(ge=-1)
    val_batches: int = Field(ge=-1)
    val_global_batch_size: Count
    val_micro_batch_size: Count = 1
    val_at_start: bool
    val_at_end: bool = False
    seed: Seed = 42


class SFTConfig(TrainingConfig):
    """``sft``.

    Attributes:
        only_unmask_final: Train on the last message only.
    """

    max_num_steps: Count = 60
    val_period: int = Field(default=10, ge=-1)
    val_batches: int = Field(default=8, ge=-1)
    val_global_batch_size: Count = 32
    val_at_start: bool = True
    only_unmask_final: bool = False


class DPOConfig(TrainingConfig):
    """``dpo``; the weights are `nemo_rl_ref.algorithms.loss.DPOLossConfig`'s."""

    max_num_steps: Count = 150
    val_period: int = Field(default=25, ge=-1)
    val_batches: int = Field(default=8, ge=-1)
    val_global_batch_size: Count = 8
    val_at_start: bool = True
    reference_policy_kl_penalty: float = 0.05
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False


class RMConfig(TrainingConfig):
    """``rm``; ``max_num_steps`` -1 is for no limit."""

    max_num_steps: int = Field(default=-1, ge=-1, lt=2**63)
    val_period: int = Field(default=16, ge=-1)
    val_batches: int = Field(default=-1, ge=-1)
    val_global_batch_size: Count = 32
    val_at_start: bool = False


class RunSettings(Section):
    """What every run has: NeMo RL's ``MasterConfig`` without the section of the algorithm.

    Attributes:
        algorithm: The name of that section.
    """

    algorithm: ClassVar[str]

    policy: PolicyConfig
    data: DataConfig
    checkpointing: CheckpointingConfig
    logger: LoggerConfig

    @property
    def section(self) -> Any:
        """The section of the algorithm."""
        return getattr(self, self.algorithm)


class SFTSettings(RunSettings):
    """The settings of supervised fine-tuning."""

    algorithm = "sft"

    data: ConversationsConfig
    sft: SFTConfig


class DPOSettings(RunSettings):
    """The settings of DPO."""

    algorithm = "dpo"

    data: PreferencesConfig
    dpo: DPOConfig


class RMSettings(RunSettings):
    """The settings of a reward model's training."""

    algorithm = "rm"

    policy: RewardPolicyConfig
    data: PreferencesConfig
    rm: RMConfig
