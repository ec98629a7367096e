# SPDX-License-Identifier: Apache-2.0
"""The memory calculator against the peak of real steps, and against models that are only shapes.

The peak is the largest sum of PyTorch's own allocations and releases, from the profiler. FSDP2 and
autocast run on the CPU with one process, as NeMo RL uses them on a GPU.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from nemo_rl_ref import memory
from nemo_rl_ref.config.keys import key_exists
from nemo_rl_ref.logprobs import linear_token_logprobs, token_logprobs
from nemo_rl_ref.memory import Model, Step, estimate, measure_peak

TOLERANCE = 0.02  # of what is alive beside weights, optimizer state and earlier gradients


def config_of(kind, V, H, F, L, A, K, D=None, tie=False):
    heads = {"num_attention_heads": A, "num_key_value_heads": K}
    heads |= {} if D is None else {"head_dim": D}
    return kind(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=L,
        tie_word_embeddings=tie,
        **heads,
    )


#: Shapes in which logits, activations, weights or the embedding weigh most.
LOGITS = config_of(Qwen3Config, 3000, 64, 192, 2, 4, 2, 32)
LAYERS = config_of(Qwen3Config, 100, 64, 256, 3, 4, 2, 16, tie=True)
HEAD = config_of(LlamaConfig, 8000, 64, 192, 2, 4, 4, tie=True)
WIDE = config_of(LlamaConfig, 300, 128, 384, 4, 4, 1)
BIASES = config_of(Qwen2Config, 700, 96, 256, 3, 4, 2)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "file"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pieces of token_logprobs grow with it
    yield init_device_mesh("cpu", (1,))
    torch.set_num_threads(threads)
    dist.destroy_process_group()


def build(config, step, mesh):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    if step.activation_checkpointing:  # the four modules that NeMo RL wraps
        for layer in model.model.layers:
            for name in ("mlp", "self_attn", "input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, checkpoint_wrapper(getattr(layer, name)))
    if step.fsdp:
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, step.precision),
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
        )
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def measure(config, step, mesh):
    """Bytes of a micro-batch and of an update, beside weights, optimizer state and gradients."""
    model = build(config, step, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(0, config.vocab_size, (step.rows, step.sequence_length))

    def from_hidden_states():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        found = linear_token_logprobs(
            hidden, model.lm_head.weight, targets, max_extra_bytes=step.max_extra_bytes
        )
        found.sum().backward()

    def from_logits():
        with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        if step.logprobs == "log_softmax":
            found = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])
        else:
            found = token_logprobs(logits, ids[:, 1:])
        del logits
        found.sum().backward()

    fused = step.logprobs == "linear_token_logprobs"
    micro_batch = from_hidden_states if fused else from_logits
    micro_batch()
    optimizer.step()
    optimizer.zero_grad()
    if step.accumulates:
        micro_batch()
    return measure_peak(micro_batch), measure_peak(optimizer.step)


F32 = Step(rows=4, sequence_length=64, precision="float32", fsdp=False)
BF16 = Step(rows=4, sequence_length=64)
CASES = {
    "logits": (LOGITS, F32),
    "logits, our function": (LOGITS, replace(F32, logprobs="token_logprobs")),
    "logits, bfloat16": (LOGITS, BF16),
    "logits, bfloat16, our function": (HEAD, replace(BF16, logprobs="token_logprobs")),
    "logits of one row": (LOGITS, replace(F32, rows=1, sequence_length=256)),
    # On one CPU thread its tiles have 1 MiB, and 128 bytes a row are allowed beside them.
    "no logits": (
        LOGITS,
        replace(F32, logprobs="linear_token_logprobs", max_extra_bytes=(1 << 20) + 128 * 256),
    ),
    "layers": (LAYERS, F32),
    "layers, one micro-batch": (LAYERS, replace(F32, accumulates=False)),
    "layers, bfloat16": (LAYERS, BF16),
    "checkpointing": (LAYERS, replace(F32, activation_checkpointing=True, rows=16)),
    "checkpointing, bfloat16": (LAYERS, replace(BF16, activation_checkpointing=True, rows=16)),
    "checkpointing, wide, bfloat16": (WIDE, replace(BF16, activation_checkpointing=True)),
    "checkpointing, wide, one micro-batch": (
        WIDE, replace(BF16, activation_checkpointing=True, accumulates=False)
    ),
    "LM head": (LOGITS, replace(F32, rows=1, sequence_length=16)),
    "embedding": (HEAD, replace(F32, rows=1, sequence_length=16)),
    "embedding, one micro-batch": (
        LOGITS, replace(F32, rows=1, sequence_length=16, accumulates=False)
    ),
    "embedding, bfloat16": (LOGITS, replace(BF16, rows=1, sequence_length=16)),
    "weights on their way": (WIDE, replace(BF16, rows=1, sequence_length=16)),
    "biases": (BIASES, F32),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step(name, mesh):
    config, step = CASES[name]
    measured, _ = measure(config, step, mesh)
    found = estimate(Model.from_config(config), step)
    there = found.weights + found.optimizer + (found.gradients if step.accumulates else 0)
    expected = max(size for when, size in found.moments.items() if when != "optimizer") - there
    assert expected == pytest.approx(measured, rel=TOLERANCE)


def test_what_a_call_allocates_at_most():
    def run():
        first = torch.zeros(1000)
        del first
        return torch.ones(500) + torch.ones(500)

    assert measure_peak(run) == 6000


def test_every_moment_of_a_micro_batch_is_the_peak_of_one_of_the_cases():
    met = set()
    for config, step in CASES.values():
        moments = estimate(Model.from_config(config), step).moments
        del moments["optimizer"]
        met.add(max(moments, key=moments.__getitem__))
    assert met | {"optimizer"} == set(moments_of_all())


def moments_of_all():
    return {
        when
        for config, step in CASES.values()
        for when in estimate(Model.from_config(config), step).moments
    }


@pytest.mark.parametrize("config", [HEAD, WIDE], ids=["embedding", "layers"])
def test_the_peak_of_an_update(config, mesh):
    _, measured = measure(config, F32, mesh)
    found = estimate(Model.from_config(config), F32)
    beside = found.weights + found.gradients + found.optimizer
    assert found.moments["optimizer"] - beside == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("kind", "numbers"), memory.OPTIMIZER_NUMBERS.items())
def test_numbers_of_an_optimizer(kind, numbers):
    weight = torch.nn.Parameter(torch.ones(10, 10))
    optimizer = getattr(torch.optim, kind.removeprefix("torch.optim."))([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    assert sum(value.numel() for value in kept if value.numel() > 1) == 100 * numbers


REAL = {
    "Qwen3-0.6B": (
        config_of(Qwen3Config, 151936, 1024, 3072, 28, 16, 8, 128, tie=True),
        596_049_920,
    ),
    "Qwen3-8B": (config_of(Qwen3Config, 151936, 4096, 12288, 36, 32, 8, 128), 8_190_735_360),
    "Llama-3.2-1B": (
        config_of(LlamaConfig, 128256, 2048, 8192, 16, 32, 8, 64, tie=True),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (config_of(LlamaConfig, 128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama-3.1-70B": (config_of(LlamaConfig, 128256, 8192, 28672, 80, 64, 8), 70_553_706_496),
    "Qwen2.5-7B": (config_of(Qwen2Config, 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Mistral-7B": (config_of(MistralConfig, 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_parameters_of_real_models(name):
    config, published = REAL[name]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config).num_parameters()
    assert Model.from_config(config).parameters == built == published


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_parameters_with_biases(kind):
    config = config_of(kind, 100, 64, 96, 2, 4, 2, 16)
    config.attention_bias = True
    if kind is LlamaConfig:
        config.mlp_bias = True
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config).num_parameters()
    assert Model.from_config(config).parameters == built


def test_a_model_from_a_folder_a_file_and_a_mapping(tmp_path):
    LAYERS.save_pretrained(tmp_path)
    expected = Model.from_config(LAYERS)
    assert Model.from_config(tmp_path) == expected
    assert Model.from_config(tmp_path / "config.json") == expected
    assert Model.from_config(LAYERS.to_dict()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', expected one of llama, mistral"),
        ({"hidden_size": None}, "config of a qwen3: no hidden_size"),
        ({"vocab_size": 0}, "vocab_size: got 0, expected a positive integer"),
    ],
)
def test_a_model_that_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Model.from_config(LAYERS.to_dict() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected a positive integer"),
        ({"precision": "float16"}, "precision: got 'float16', expected one of float32, bfloat16"),
        ({"logprobs": "fused"}, "logprobs: got 'fused', expected one of log_softmax"),
        ({"optimizer": "torch.optim.Adamw"}, "optimizer: got 'torch.optim.Adamw'"),
        ({"fsdp": False}, "fsdp: got False, expected True for bfloat16"),
    ],
)
def test_a_step_that_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BF16, **change)


def nemo_rl_config(**policy):
    return {
        "dpo": {},
        "policy": {
            "train_global_batch_size": 128,
            "train_micro_batch_size": 2,
            "max_total_sequence_length": 1024,
            "precision": "bfloat16",
            "dtensor_cfg": {"enabled": True, "activation_checkpointing": True},
            "optimizer": {"name": "torch.optim.AdamW"},
            **policy,
        },
        "cluster": {"gpus_per_node": 8, "num_nodes": 2},
    }


def test_a_step_from_a_configuration():
    assert Step.from_config(nemo_rl_config()) == Step(
        rows=4, sequence_length=1024, shards=16, activation_checkpointing=True, reference="host"
    )
    packed = nemo_rl_config(sequence_packing={"enabled": True, "train_mb_tokens": 8192})
    assert replace(BF16, rows=1, sequence_length=8192) == replace(
        Step.from_config(packed), shards=1, activation_checkpointing=False, reference="none"
    )
    one = nemo_rl_config(train_global_batch_size=32)
    assert not Step.from_config(one).accumulates
    assert Step.from_config(one, logprobs="token_logprobs").logprobs == "token_logprobs"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"precision": None}, "policy.precision: got None, expected float32 or bfloat16"),
        ({"dtensor_cfg": {"tensor_parallel_size": 2}}, "tensor_parallel_size: got 2, only 1"),
        ({"megatron_cfg": {"enabled": True}}, "megatron_cfg.enabled: got true, only DTensor"),
    ],
)
def test_a_configuration_that_is_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        Step.from_config(nemo_rl_config(**policy))


def test_the_keys_that_are_read_are_nemo_rls():
    for key in (
        "policy.train_global_batch_size", "policy.train_micro_batch_size", "policy.precision",
        "policy.max_total_sequence_length", "policy.optimizer.name", "cluster.gpus_per_node",
        "policy.dtensor_cfg.activation_checkpointing", "policy.sequence_packing.train_mb_tokens",
        "policy.dtensor_cfg.tensor_parallel_size", "policy.dynamic_batching.train_mb_tokens",
        "policy.dtensor_cfg.context_parallel_size", "cluster.num_nodes",
        "policy.megatron_cfg.enabled",
    ):  # fmt: skip
        assert key_exists(key), key


def test_sharing_and_the_reference():
    model = Model.from_config(REAL["Qwen3-8B"][0])
    alone, shared = (estimate(model, replace(BF16, shards=n)) for n in (1, 8))
    assert alone.weights == 8 * shared.weights == 4 * model.parameters
    assert alone.activations == shared.activations
    assert estimate(model, replace(BF16, reference="device")).weights == 2 * alone.weights
    assert estimate(model, replace(BF16, reference="host")).host == 4 * model.parameters


def test_the_table_and_the_command(capsys):
    assert memory.main(["--config", "configs/dpo.yaml", "policy.train_micro_batch_size=16"]) == 0
    output = capsys.readouterr().out
    assert "32 rows of 16 tokens in float32, 1 GPU, without activation checkpointing" in output
    assert "| MiB | `log_softmax` | `token_logprobs` | `linear_token_logprobs` |" in output
    found = estimate(Model.from_config(REAL["Qwen3-0.6B"][0]), BF16)
    assert f"| **peak** | {found.peak / 2**30:.2f} |" in memory.table({"a": found})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy.model_name=Qwen/Qwen3-8B"], "Qwen/Qwen3-8B is no local folder; give --model"),
        (["policy.nonsense=1"], "policy.nonsense"),
        (["--model", "no/such"], "no/such: no such file, expected a model's config.json"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, capsys):
    assert memory.main(["--config", "configs/dpo.yaml", *arguments]) == 1
    assert message in capsys.readouterr().err
