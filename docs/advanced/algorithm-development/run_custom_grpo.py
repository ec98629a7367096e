# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's GRPO with a reward, an advantage estimator and a loss of one's own.

Goes into the examples/ folder of a NeMo RL checkout, custom_grpo.py and custom_environment.py
beside it:

    uv run examples/run_custom_grpo.py --config examples/configs/grpo_math_1B.yaml \
        ++data.train.env_name=partial_credit ++env.partial_credit.num_workers=1 \
        data.train.split_validation_size=0 "data.validation={dataset_name: AIME2024}" \
        grpo.use_leave_one_out_baseline=false \
        ++loss_fn.max_response_length=512 checkpointing.checkpoint_dir=results/custom_grpo
"""

import argparse

import custom_environment
import custom_grpo
from nemo_rl.algorithms import grpo
from nemo_rl.algorithms.grpo import MasterConfig, grpo_train, setup, shutdown_environments
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_response_data
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, init_ray
from nemo_rl.environments.utils import register_env
from nemo_rl.models.generation import configure_generation_config
from nemo_rl.utils.config import (
    load_config,
    parse_hydra_overrides,
    register_omegaconf_resolvers,
)
from nemo_rl.utils.logger import get_next_experiment_dir
from omegaconf import OmegaConf
from ray.cloudpickle import register_pickle_by_value

ENVIRONMENT = "custom_environment.CustomEnvironment"


def main() -> None:
    """Load the configuration, put the three pieces in place, set up, train."""
    register_omegaconf_resolvers()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    arguments, overrides = parser.parse_known_args()
    loaded = parse_hydra_overrides(load_config(arguments.config), overrides)
    config = MasterConfig(**OmegaConf.to_container(loaded, resolve=True))
    if config.grpo.async_grpo.enabled or (config.data_plane or {}).get("enabled"):
        raise ValueError("grpo.async_grpo and data_plane have trainers of their own, not this one")
    config.logger["log_dir"] = get_next_experiment_dir(config.logger["log_dir"])

    # The reward: a name for data.train.env_name, and the Python that the actor runs in.
    register_env("partial_credit", ENVIRONMENT)
    ACTOR_ENVIRONMENT_REGISTRY[ENVIRONMENT] = PY_EXECUTABLES.SYSTEM
    # The advantages: computed in this process, by what the trainer asks this function for.
    if not hasattr(grpo, "_create_advantage_estimator"):
        raise RuntimeError("grpo_train of this NeMo RL makes its estimator elsewhere: look there")
    grpo._create_advantage_estimator = lambda config: custom_grpo.BatchStdEstimator(
        config.grpo.adv_estimator, config.loss_fn
    )
    # A node without this folder cannot import the modules: send the classes, not their names.
    register_pickle_by_value(custom_grpo)
    register_pickle_by_value(custom_environment)
    init_ray()

    tokenizer = get_tokenizer(config.policy["tokenizer"])
    config.policy["generation"] = configure_generation_config(
        config.policy["generation"],
        tokenizer,
        has_refit_draft_weights=bool(config.policy["draft"]["enabled"]),
        trains_mtp=bool((config.policy.get("megatron_cfg") or {}).get("mtp_num_layers")),
    )
    dataset, val_dataset, task_to_env, val_task_to_env = setup_response_data(
        tokenizer, config.data, config.env
    )
    (
        policy,
        policy_generation,
        _nemo_gym,
        _cluster,
        dataloader,
        val_dataloader,
        grpo_loss_fn,
        logger,
        checkpointer,
        grpo_state,
        master_config,
        _teacher_worker_groups,
        _alias_to_group_alias,
    ) = setup(config, tokenizer, dataset, val_dataset)

    # The loss: made here, computed in the workers.
    loss_fn = custom_grpo.ConstantLengthLossFn(
        master_config.loss_fn, use_fused_linear_logprobs=grpo_loss_fn.use_fused_linear_logprobs
    )
    try:
        with checkpointer:
            grpo_train(
                policy,
                policy_generation,
                dataloader,
                val_dataloader,
                tokenizer,
                loss_fn,
                task_to_env,
                val_task_to_env,
                logger,
                checkpointer,
                grpo_state,
                master_config,
            )
    finally:
        shutdown_environments(task_to_env, val_task_to_env)
        policy_generation.shutdown()


if __name__ == "__main__":
    main()
