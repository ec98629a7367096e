# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's own script, set-up and training loop on a CPU, in this process, without Ray.

Its source is not changed. What is put in the place of something of its is: Ray (actors are objects
and calls are calls), the group of workers (one worker, in this process), the cluster, FSDP and NCCL
(one process with gloo, a plain Hugging Face model), the writing of weights, and vLLM (this project's
sampler). All else runs as it is: reading the configuration, data, collation, the `Policy`, the worker's
``train`` and ``get_logprobs``, losses, advantages, the environment, validation and checkpoints.
"""

import importlib
import os
import sys
from types import SimpleNamespace

import record
import stand_ins
import torch
from torch.distributed.device_mesh import init_device_mesh

# -- Ray -------------------------------------------------------------------------------------------


class _Future:
    """What a call has returned."""

    def __init__(self, value):
        self.value = value


def _get(found, **options):
    """What ``ray.get`` returns for a future or a list of them."""
    if isinstance(found, list):
        return [_get(one) for one in found]
    return found.value if isinstance(found, _Future) else found


class _Actor:
    """An object whose methods have ``remote``, which calls them."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        method = getattr(self.value, name)
        return SimpleNamespace(remote=lambda *args, **kwargs: _Future(method(*args, **kwargs)))


class _ActorClass:
    """A class whose ``remote`` makes an `_Actor`."""

    def __init__(self, kind):
        self.kind = kind

    def options(self, **options):
        return self

    def remote(self, *args, **kwargs):
        return _Actor(self.kind(*args, **kwargs))


def replace_ray():
    """Make Ray's calls direct. To be called before NeMo RL is imported."""
    import ray
    import ray.util.queue

    def remote(*args, **options):
        return _ActorClass(args[0]) if args else _ActorClass

    ray.remote, ray.get, ray.kill = remote, _get, lambda actor, **options: None
    ray.get_gpu_ids = lambda: [0]
    ray.util.queue.Queue = lambda *args, **options: None


# -- one worker ------------------------------------------------------------------------------------


class _Cluster:
    """One machine with one device."""

    _sorted_bundle_indices = None
    num_gpus_per_node = 1

    def __init__(self, **options):
        pass

    def world_size(self):
        return 1

    def shutdown(self):
        pass

    def get_placement_groups(self):
        return []


class _WorkerGroup:
    """One worker in this process, for NeMo RL's ``Policy`` and ``Value``."""

    def __init__(self, cluster, builder, **options):
        module, _, name = builder.ray_actor_class_fqn.rpartition(".")
        kind = getattr(importlib.import_module(module), name + "Impl")
        kwargs = dict(builder.kwargs)
        for unused in ("worker_sharding_annotations", "pre_init_communication_queue"):
            kwargs.pop(unused, None)
        self.cluster, self.worker = cluster, _on_cpu(kind)(*builder.args, **kwargs)
        self.of = "value" if "Value" in name else "policy"
        if self.of == "policy":
            _Sampler.worker = self.worker

    def run_all_workers_single_data(self, method, *args, **kwargs):
        return [getattr(self.worker, method)(*args, **kwargs)]

    def run_all_workers_sharded_data(self, method, *, data, common_kwargs=None, **how):
        (shard,), options = data, dict(common_kwargs or {})
        while isinstance(shard, list):
            (shard,) = shard
        if method == "train":
            record.batch(shard, options["gbs"], training=not options["eval_mode"], of=self.of)
            PLACE.trained |= not options["eval_mode"]
        return [getattr(self.worker, method)(data=shard, **options)]

    def get_all_worker_results(self, futures):
        return futures

    def shutdown(self, **how):
        return True


class _Builder:
    """Keeps what a worker is made of."""

    def __init__(self, ray_actor_class_fqn, *args, **kwargs):
        self.ray_actor_class_fqn, self.args, self.kwargs = ray_actor_class_fqn, args, kwargs


class _Weights:
    """Writes and reads a model with its optimizer and scheduler, as the worker's manager does."""

    FILES = (("weights_path", "model"), ("optimizer_path", "optimizer"))

    def save_checkpoint(self, *, model, weights_path, optimizer, scheduler, **how):
        os.makedirs(weights_path)
        torch.save(model.state_dict(), os.path.join(weights_path, "model.pt"))
        if how["optimizer_path"]:
            os.makedirs(how["optimizer_path"])
            states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(states, os.path.join(how["optimizer_path"], "optimizer.pt"))

    def load_checkpoint(self, *, model, weights_path, optimizer, optimizer_path, scheduler):
        model.load_state_dict(torch.load(os.path.join(weights_path, "model.pt")))
        if optimizer_path:
            states = torch.load(os.path.join(optimizer_path, "optimizer.pt"))
            optimizer.load_state_dict(states["optimizer"])
            scheduler.load_state_dict(states["scheduler"])


class _PlainModel:
    """``from_pretrained`` of a Hugging Face class, with none of FSDP's arguments."""

    def __init__(self, kind):
        self.kind = kind

    def from_pretrained(self, name, **options):
        from transformers import AutoConfig

        known = {key: options[key] for key in ("num_labels",) if key in options}
        config = AutoConfig.from_pretrained(name, **known)
        config.classifier_dropout = 0.0  # as here; 0.1 is what Transformers takes otherwise
        # A worker has random numbers of its own. A new head is drawn from the run's seed, as here.
        state = torch.get_rng_state()
        torch.manual_seed(PLACE.seed)
        model = self.kind.from_pretrained(name, dtype=torch.float32, config=config)
        torch.set_rng_state(state)
        return model


def _setup_distributed(config, runtime_config):
    from nemo_rl.models.automodel.config import DistributedContext

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "cp", "tp"))
    mesh["dp", "cp"]._flatten("dp_cp")
    # Autocast to float32 changes nothing, but looks for a GPU.
    return DistributedContext(mesh, None, SimpleNamespace(sequence_parallel=False), None, 1, 1, 1)


def _setup_model(setup):
    """NeMo RL's ``setup_model_and_optimizer`` around a plain model."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    kinds = {"bradley_terry": AutoModelForSequenceClassification}
    kinds["regression"] = AutoModelForTokenClassification

    def setup_model_and_optimizer(config, runtime_config, **more):
        kind = AutoModelForCausalLM
        if runtime_config.is_reward_model:
            kind = kinds[config["reward_model_cfg"]["reward_model_type"]]
        runtime_config = runtime_config._replace(model_class=_PlainModel(kind))
        found = setup(config=config, runtime_config=runtime_config, **more)
        return found._replace(autocast_enabled=False)

    return setup_model_and_optimizer


def _on_cpu(kind):
    """A class of NeMo RL's workers that reads and writes plain models and streams no weights."""

    class OnCPU(kind):
        def _init_checkpoint_manager(self, **options):
            self.checkpoint_manager = _Weights()

        def report_node_ip_and_gpu_id(self):
            return ("localhost", 0)

        def get_free_memory_bytes(self):
            return 1 << 30

        def stream_weights_via_ipc_zmq(self, *args, **options):
            return None

        def get_gpu_info(self):
            return {}

    return OnCPU


def replace_workers():
    """Put one worker on the CPU in the place of those on GPUs."""
    import nemo_automodel
    from nemo_automodel.components.distributed import mesh_utils
    from nemo_automodel.components.moe import config as moe_config
    from nemo_rl.distributed import virtual_cluster, worker_groups

    virtual_cluster.RayVirtualCluster = _Cluster
    virtual_cluster.init_ray = lambda *args, **options: None
    virtual_cluster.prepare_segment_topology = lambda *args, **options: (None, [], {})
    worker_groups.RayWorkerGroup, worker_groups.RayWorkerBuilder = _WorkerGroup, _Builder

    # NeMo RL's set-up insists on a nemo_automodel that does not have this name yet.
    lookup = nemo_automodel.__getattr__

    def without(name):
        if name == "NeMoAutoModelForTokenClassification":
            raise AttributeError(name)
        return lookup(name)

    nemo_automodel.__getattr__ = without
    # Names that the set-up imports, newer than the last release; neither is called.
    mesh_utils.create_device_mesh = moe_config.MoEParallelizerConfig = None
    from nemo_rl.models.automodel import setup

    setup.setup_distributed = _setup_distributed
    setup.setup_model_and_optimizer = _setup_model(setup.setup_model_and_optimizer)
    from nemo_rl.distributed import numa_utils
    from nemo_rl.utils import memory_tracker

    memory_tracker.memory_summary = lambda **options: ""
    from nemo_rl.models.policy.workers import dtensor_policy_worker_v2

    numa_utils.bind_to_gpu_numa = lambda gpu: None
    dtensor_policy_worker_v2.apply_transformer_engine_patch = lambda: None


# -- generation ------------------------------------------------------------------------------------


class _Sampler:
    """This project's sampler in the place of vLLM: the same uniform numbers as in its own run."""

    requires_kv_scale_sync = False
    worker = None  # the policy's; set when it is made

    def __init__(self, cluster=None, config=None, **options):
        self.config = config

    def prepare_for_generation(self, *args, **options):
        return True

    finish_generation = prepare_for_generation

    def update_weights_via_ipc_zmq(self):
        return [True]

    def prepare_refit_info(self, info):
        pass

    def clear_logger_metrics(self):
        pass

    def get_logger_metrics(self):
        return {}

    def shutdown(self):
        return True

    def generate(self, data, greedy=False):
        """Sample as `nemo_rl_ref.rl.rollouts.roll_out` does at the same place in the run."""
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict as Theirs

        from nemo_rl_ref.algorithms.logits_sampling_utils import TrainingSamplingParams
        from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
        from nemo_rl_ref.rl.generate import generate

        config, policy = self.config, self.worker.cfg
        longest, seed = policy["max_total_sequence_length"], PLACE.seed
        for part in PLACE.generating():
            seed = (seed * 1_000_003 + part) % (1 << 62)
        names = ("top_k", "top_p", "temperature")
        out = generate(
            self.worker.model,
            self.worker.tokenizer,
            BatchedDataDict({name: data[name] for name in ("input_ids", "input_lengths")}),
            TrainingSamplingParams(**{name: config[name] for name in names}),
            torch.rand(
                len(data["input_ids"]),
                min(config["max_new_tokens"], longest),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            ),
            max_total_sequence_length=longest,
            stop_token_ids=config["stop_token_ids"],
            stop_strings=config["stop_strings"],
            batch_size=policy["generation_batch_size"],
        )
        return Theirs(dict(out))


class _Place:
    """Where in the run the loop is: this project draws its random numbers by step and batch."""

    seed, step, tried, trained = 0, 0, 0, False
    validation: list | None = None  # step, and number of samples validated on

    def generating(self):
        """Step and batch in it, of the batch that is sampled now."""
        if self.validation is not None:
            step, low, size = self.validation
            self.validation[1] += size
            return step, -1 - low
        if self.trained:
            self.step, self.tried, self.trained = self.step + 1, 0, False
        self.tried += 1
        return self.step, self.tried

    def noting(self, set_seed):
        """NeMo RL's ``set_seed``, with a note of the seed."""

        def noted(seed):
            self.seed = seed
            set_seed(seed)

        return noted

    def around(self, validate):
        """NeMo RL's ``validate``, with a note of when it runs."""

        def noted(*args, **kwargs):
            section = kwargs["master_config"]
            section = getattr(section, "grpo", None) or section.ppo
            self.validation = [kwargs["step"], 0, section.val_batch_size]
            try:
                return validate(*args, **kwargs)
            finally:
                self.validation = None

        return noted


PLACE = _Place()


# -- the run ---------------------------------------------------------------------------------------


def run(checkout, algorithm, words, pieces=None):
    """Run NeMo RL's script of an algorithm, or a page's launcher.

    Args:
        checkout: The folder of NeMo RL.
        algorithm: ``sft``, ``dpo``, ``rm``, ``grpo`` or ``ppo``.
        words: The command line.
        pieces: The page's, see `variants.PIECES`.
    """
    replace_ray()
    stand_ins.install(checkout)
    replace_workers()
    from nemo_rl.algorithms import utils

    utils.set_seed = PLACE.noting(utils.set_seed)
    loop = importlib.import_module(f"nemo_rl.algorithms.{algorithm}")
    if hasattr(loop, "VllmGeneration"):
        loop.VllmGeneration = _Sampler
        loop.validate = PLACE.around(loop.validate)
    from nemo_rl.utils import checkpoint, logger

    record.metrics_of(logger.Logger)
    record.checkpoints_of(checkpoint.CheckpointManager)
    name = pieces.launcher if pieces else f"run_{algorithm}"
    sys.argv = [name, *words]
    importlib.import_module(name).main()
