# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's own configuration files, from a checkout or as the manifest has them."""

import os
import shlex
from pathlib import Path

from omegaconf import OmegaConf

from nemo_rl_ref.config.read import apply_overrides
from nemo_rl_ref.tune.outcome.best import NEMO_RL_CONFIGS, resolved_config
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils.config import register_omegaconf_resolvers


def check_with_nemo_rl(line, algorithm, checkout=None):
    """NeMo RL's configuration of an algorithm with an override line, as its script reads both.

    The line is split as a shell does, parsed by Hydra's own parser and applied as NeMo RL's
    ``parse_hydra_overrides`` does. The file is that of a checkout, also that of
    ``NEMO_RL_CHECKOUT``, or made of the keys and values in the manifest.
    """
    checkout, name = checkout or os.environ.get("NEMO_RL_CHECKOUT"), NEMO_RL_CONFIGS[algorithm]
    if checkout:
        return resolved_config(Path(checkout, "examples/configs", name), shlex.split(line))
    register_omegaconf_resolvers()
    config = OmegaConf.create({})
    for key, value in load_manifest()["configs"][name].items():
        OmegaConf.update(config, key, value, force_add=True)
    return OmegaConf.to_container(apply_overrides(config, shlex.split(line)), resolve=True)
