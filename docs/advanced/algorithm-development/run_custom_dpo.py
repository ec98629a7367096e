# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's DPO with a loss of one's own.

Goes into the examples/ folder of a NeMo RL checkout, dpop_loss.py beside it:

    uv run examples/run_custom_dpo.py --config examples/configs/dpo.yaml ++dpo.dpop_penalty=5.0 \
        checkpointing.checkpoint_dir=results/dpop
"""

import argparse

import dpop_loss
from nemo_rl.algorithms.dpo import MasterConfig, dpo_train, setup
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_preference_data
from nemo_rl.distributed.virtual_cluster import init_ray
from nemo_rl.utils.config import load_config, parse_hydra_overrides
from nemo_rl.utils.logger import get_next_experiment_dir
from omegaconf import OmegaConf
from ray.cloudpickle import register_pickle_by_value


def main() -> None:
    """Load the configuration, set up, put the loss in place, train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    arguments, overrides = parser.parse_known_args()
    config = parse_hydra_overrides(load_config(arguments.config), overrides)
    master_config = MasterConfig(**OmegaConf.to_container(config, resolve=True))
    master_config.logger["log_dir"] = get_next_experiment_dir(master_config.logger["log_dir"])

    # A node without this folder cannot import dpop_loss: send the class itself, not its name.
    register_pickle_by_value(dpop_loss)
    init_ray()
    tokenizer = get_tokenizer(master_config.policy["tokenizer"])
    train_dataset, val_dataset = setup_preference_data(tokenizer, master_config.data)
    (
        policy,
        _cluster,
        train_dataloader,
        val_dataloader,
        dpo_loss_fn,
        logger,
        checkpointer,
        dpo_save_state,
        master_config,
    ) = setup(master_config, tokenizer, train_dataset, val_dataset)

    loss_fn = dpop_loss.DPOPLossFn(
        master_config.dpo, use_fused_linear_logprobs=dpo_loss_fn.use_fused_linear_logprobs
    )
    with checkpointer:
        dpo_train(
            policy,
            train_dataloader,
            val_dataloader,
            tokenizer,
            loss_fn,
            master_config,
            logger,
            checkpointer,
            dpo_save_state,
        )


if __name__ == "__main__":
    main()
