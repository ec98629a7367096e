# SPDX-License-Identifier: Apache-2.0
r"""How much memory a training step takes, before it is run: weights to logits, byte by byte.

.. code-block:: sh

    python -m nemo_rl_ref.memory --model DIR --config dpo.yaml policy.train_micro_batch_size=4

`estimate` adds up what is alive at the moments of a step at which memory peaks. It is derived
from the operations of the dense decoders of Transformers (Llama, Mistral, Qwen2, Qwen3) with
``sdpa`` attention, and from what PyTorch's autograd keeps of each. The tests compare it with the
peak of real training steps.

Letters: `T` tokens of a micro-batch, `V` vocabulary, `H` hidden size, `F` intermediate size, `L`
layers, `A` and `K` query and key heads, `D` their size, `b` bytes of a number in ``precision``.

**Always there**, in float32: weights 4 `P`, Adam's two moments 8 `P`, and, from the first
micro-batch of a step on, gradients 4 `P`. They are divided by the number of GPUs that share them.
What NeMo RL runs on is FSDP2, which also keeps the embedding, the last norm and the LM head in
``precision`` from their use in forward to the end of backward.

**Activations of a layer**, what backward needs of it:

=====================  ==========================================================================
norm over width `w`    its input in float32, one float32 a row, its result before the weight in
                       `b`, its result, which the next matrix product keeps: `4w + 4 + 2bw`. The
                       norms of queries and keys (Qwen3) keep no result: `4w + 4 + bw` a head
attention              queries and output `2bAD`, keys and values `2bKD`, a float32 a head `4A`
MLP                    gate, its SiLU, up and their product: `4bF`
=====================  ==========================================================================

each times `T`. After the layers comes one more norm. With activation checkpointing NeMo RL wraps
both norms, the attention and the MLP one by one and keeps the inputs of the four, `4bTH`, and
backward builds the parts of one of them again.

**Log-probabilities.** `log_softmax` and `gather` hold three float32 numbers for every logit,
`12TV`: in forward the logits, their contiguous copy without the last column and the result; in
backward the result and the gradients of ``gather`` and of ``log_softmax``. `token_logprobs` holds
the logits and their gradient, `8TV`. `linear_token_logprobs` never holds the logits: at most
``max_extra_bytes``.

Not counted: what the allocator loses to fragmentation, the context of CUDA (about half a gigabyte),
communication buffers, and the generation engine where it shares the GPU. Mixtures of experts,
tensor, context and pipeline parallelism, LoRA and other attention kernels are not modeled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from nemo_rl_ref.config.sections import Count, Length
from nemo_rl_ref.config.settings import Section, read_settings

if TYPE_CHECKING:
    import torch

#: How the log-probabilities are made of the hidden states.
LOGPROBS = ("log_softmax", "token_logprobs", "linear_token_logprobs")

#: Float32 numbers that an optimizer keeps for each parameter.
OPTIMIZER_NUMBERS = {
    "torch.optim.AdamW": 2, "torch.optim.Adam": 2, "torch.optim.NAdam": 2, "torch.optim.RAdam": 2,
    "torch.optim.Adamax": 2, "torch.optim.RMSprop": 1, "torch.optim.Adagrad": 1,
    "torch.optim.SGD": 0,
}  # fmt: skip

#: What is modeled, by ``model_type``: whether queries and keys have norms, and projections biases.
MODELS = {"llama": (), "mistral": (), "qwen2": ("qkv_bias",), "qwen3": ("qk_norm",)}


class _Parallel(Section):
    """``policy.dtensor_cfg``."""

    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    activation_checkpointing: bool = False


class _Switch(Section):
    """``policy.megatron_cfg``, ``sequence_packing`` and ``dynamic_batching``."""

    enabled: bool = False
    train_mb_tokens: Length | None = None


class _Optimizer(Section):
    """``policy.optimizer``."""

    name: str


class _Policy(Section):
    """``policy``, as far as memory depends on it."""

    model_name: str | None = None
    train_global_batch_size: Count
    train_micro_batch_size: Count
    max_total_sequence_length: Length
    precision: Literal["float32", "bfloat16"]
    optimizer: _Optimizer | None = None
    dtensor_cfg: _Parallel = _Parallel()
    megatron_cfg: _Switch = _Switch()
    sequence_packing: _Switch = _Switch()
    dynamic_batching: _Switch = _Switch()


class _Cluster(Section):
    """``cluster``."""

    gpus_per_node: Count = 1
    num_nodes: Count = 1


class MemorySettings(Section):
    """What `Step.from_config` reads of a configuration."""

    policy: _Policy
    cluster: _Cluster = _Cluster()


_PIECE = 1 << 20  # bytes of a piece of token_logprobs on one CPU thread, nemo_rl_ref.logprobs


@dataclass(frozen=True)
class Model:
    """The few numbers of a dense decoder that decide about memory.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        intermediate_size: F.
        num_hidden_layers: L.
        num_attention_heads: A.
        num_key_value_heads: K.
        head_dim: D.
        tie_word_embeddings: Whether the LM head is the embedding.
        qk_norm: Whether queries and keys are normalized, as in Qwen3.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        o_bias: Whether the projection out of the attention has one.
        mlp_bias: Whether the three of the MLP have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")

    @classmethod
    def from_config(cls, config: Any) -> Model:
        """Read a Hugging Face configuration.

        Args:
            config: A ``PreTrainedConfig``, a mapping, or the path of a ``config.json`` or of the
                folder that holds one. Nothing is downloaded.

        Raises:
            FileNotFoundError: If the path holds no ``config.json``.
            ValueError: If the model type is not modeled or a size is missing.
        """
        if isinstance(config, (str, Path)):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, expected a model's config.json")
            config = json.loads(path.read_text(encoding="utf-8"))
        read = config if isinstance(config, Mapping) else config.to_dict()
        kind = read.get("model_type")
        if kind not in MODELS:
            raise ValueError(f"model_type: got {kind!r}, expected one of {', '.join(MODELS)}")
        sizes: dict[str, Any] = {name: read.get(name) for name in _SIZES}
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        if missing := [name for name, size in sizes.items() if size is None and name != "head_dim"]:
            raise ValueError(f"config of a {kind}: no {', '.join(missing)}")
        sizes["head_dim"] = (
            sizes["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"]
        )
        bias = bool(read.get("attention_bias", False)) and kind in ("llama", "qwen3")
        return cls(
            **sizes,
            tie_word_embeddings=bool(read.get("tie_word_embeddings", False)),
            qk_norm="qk_norm" in MODELS[kind],
            qkv_bias="qkv_bias" in MODELS[kind] or bias,
            o_bias=bias,
            mlp_bias=bool(read.get("mlp_bias", False)) and kind == "llama",
        )

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head, and of the embedding: V H."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, MLP, norms."""
        H, F = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = H * (q + 2 * kv) + q * H + self.qkv_bias * (q + 2 * kv) + self.o_bias * H
        mlp = 3 * H * F + self.mlp_bias * (2 * F + H)
        return attention + mlp + 2 * H + self.qk_norm * 2 * self.head_dim

    @property
    def root_parameters(self) -> int:
        """Parameters outside of the layers: embedding, last norm, LM head."""
        return (2 - self.tie_word_embeddings) * self.head_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; a shared one counts once."""
        return self.num_hidden_layers * self.layer_parameters + self.root_parameters

    def layer_activations(self, tokens: int, b: int) -> int:
        """Bytes that autograd keeps of a layer for `tokens` tokens: the table of the module."""
        H = self.hidden_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norms = 2 * (4 * H + 4 + 2 * b * H)
        heads = self.num_attention_heads + self.num_key_value_heads
        qk_norms = self.qk_norm * ((4 + b) * (q + kv) + 4 * heads)
        attention = 2 * b * (q + kv) + 4 * self.num_attention_heads
        return tokens * (norms + qk_norms + attention + 4 * b * self.intermediate_size)


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a training step does, as far as memory depends on it.

    Attributes:
        rows: Rows of a micro-batch, B; two a pair for preference losses.
        sequence_length: Length of each, S.
        precision: ``float32`` or ``bfloat16``, of matrix products and of what they keep. The
            weights, their gradients and the optimizer's numbers are float32, as in NeMo RL.
        fsdp: Whether weights are FSDP2's, as on NeMo RL's GPUs. ``bfloat16`` needs it.
        shards: GPUs that share weights, gradients and optimizer state.
        optimizer: One of `OPTIMIZER_NUMBERS`.
        accumulates: Whether a step has several micro-batches, so that gradients of earlier ones
            are there while the next one runs.
        activation_checkpointing: As NeMo RL's ``policy.dtensor_cfg.activation_checkpointing``.
        logprobs: One of `LOGPROBS`.
        max_extra_bytes: What ``linear_token_logprobs`` may use beside its inputs and gradients.
        reference: Where the reference policy's weights are: ``none``, ``host`` as in NeMo RL,
            which swaps them in, or ``device``, a second model in float32.
    """

    rows: int
    sequence_length: int
    precision: str = "bfloat16"
    fsdp: bool = True
    shards: int = 1
    optimizer: str = "torch.optim.AdamW"
    accumulates: bool = True
    activation_checkpointing: bool = False
    logprobs: str = "log_softmax"
    max_extra_bytes: int = 512 << 20
    reference: str = "none"

    def __post_init__(self) -> None:
        for name in ("rows", "sequence_length", "shards", "max_extra_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        for name, legal in (
            ("precision", ("float32", "bfloat16")),
            ("optimizer", OPTIMIZER_NUMBERS),
            ("logprobs", LOGPROBS),
            ("reference", ("none", "host", "device")),
        ):
            if getattr(self, name) not in legal:
                expected = ", ".join(legal)
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {expected}")
        if not self.fsdp and (self.precision == "bfloat16" or self.shards > 1):
            raise ValueError("fsdp: got False, expected True for bfloat16 and for several shards")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Step:
        """Read the keys of a NeMo RL configuration that decide about memory.

        Rows are those of ``policy.train_micro_batch_size``, doubled where the configuration has a
        section ``dpo`` or ``rm``, of ``policy.max_total_sequence_length`` tokens: the longest batch
        that can come. With sequence packing or dynamic batching it is one row of
        ``train_mb_tokens``. The weights are shared by all GPUs of ``cluster``.

        Args:
            config: The configuration, a plain mapping without interpolations.
            **changes: Attributes to set otherwise.

        Raises:
            ValueError: If a key that is needed is missing, a value is of a wrong type or not
                modeled, or tensor or context parallelism or the Megatron backend is on.
        """
        settings = read_settings(config, MemorySettings)
        policy, pairs = settings.policy, bool({"dpo", "rm"} & config.keys())
        if policy.megatron_cfg.enabled:
            raise ValueError("policy.megatron_cfg.enabled: got true, only DTensor is modeled")
        for name in ("tensor_parallel_size", "context_parallel_size"):
            if (size := getattr(policy.dtensor_cfg, name)) != 1:
                raise ValueError(f"policy.dtensor_cfg.{name}: got {size}, only 1 is modeled")
        rows = policy.train_micro_batch_size * (2 if pairs else 1)
        length = policy.max_total_sequence_length
        shards = settings.cluster.gpus_per_node * settings.cluster.num_nodes
        share = policy.train_global_batch_size * (2 if pairs else 1) // shards
        accumulates = share > rows
        for name in ("sequence_packing", "dynamic_batching"):
            packing = getattr(policy, name)
            if packing.enabled:
                if packing.train_mb_tokens is None:
                    raise ValueError(f"policy.{name}.train_mb_tokens: not set, expected an integer")
                accumulates = share * length > packing.train_mb_tokens
                rows, length = 1, packing.train_mb_tokens
        read = {
            "rows": rows,
            "sequence_length": length,
            "precision": policy.precision,
            "shards": shards,
            "optimizer": policy.optimizer.name if policy.optimizer else "torch.optim.AdamW",
            "accumulates": accumulates,
            "activation_checkpointing": policy.dtensor_cfg.activation_checkpointing,
            "reference": "host" if {"dpo", "grpo"} & config.keys() else "none",
        }
        return cls(**read | changes)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, and when they are needed.

    Attributes:
        weights: Weights in float32, this GPU's share, and a reference policy beside them.
        gradients: Gradients in float32, this GPU's share.
        optimizer: The optimizer's numbers.
        activations: What autograd keeps of the layers, without the logits.
        moments: By moment of the step, the bytes that are alive then.
        logprobs: By moment, those of them for logits and log-probabilities.
        host: Bytes on the host for the reference policy.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    moments: dict[str, int]
    logprobs: dict[str, int] = field(default_factory=dict)
    host: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return max(self.moments.values())

    @property
    def when(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def logits(self) -> int:
        """The most bytes that logits and log-probabilities take at once."""
        return max(self.logprobs.values())


def estimate(model: Model, step: Step) -> Estimate:
    """Estimate the memory of a training step in its steady state.

    The moments, each with what is alive beside weights and optimizer state; "earlier gradients" are
    those of the micro-batches before, or, in a step of one micro-batch, of the layers above:

    - forward, log-probabilities: all activations, and what forward holds of the logits;
    - backward, log-probabilities: the same with what backward holds;
    - backward, LM head: activations, the logits' gradient `b T V` or what ``linear_token_logprobs``
      uses, the new gradients of the head `V H` and of the hidden states `T H`;
    - backward, last layer: activations of the layers; with checkpointing what is built again; the
      gradients of gate, up and their product less the product itself, `2 b T F`, of the layer's
      output and of one weight. FSDP2 holds the layer's weights in ``precision``;
    - backward, a layer below: the same with one layer less, and, under FSDP2, the float32 gradient
      of the layer above on its way to the other GPUs;
    - backward, a layer is done: under FSDP2 its gradients in both precisions and the next weights;
    - backward, first layer: the activations of one layer;
    - backward, embedding: the new gradients of embedding and head; where they are one parameter,
      both and their sum. Under FSDP2 in ``precision``, and in float32 to be summed over GPUs;
    - optimizer: two temporaries of the largest parameter, or those and the last one's.

    Args:
        model: The model's numbers.
        step: What is done.

    Returns:
        Bytes, by kind and by moment.
    """
    b = 4 if step.precision == "float32" else 2
    H, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    tokens, head = step.rows * step.sequence_length, model.head_parameters
    own = -(-model.parameters // step.shards)  # parameters whose numbers this GPU keeps
    weights = 4 * own + (4 * model.parameters if step.reference == "device" else 0)
    optimizer = 4 * own * OPTIMIZER_NUMBERS[step.optimizer]
    always = weights + optimizer

    kept, again = model.layer_activations(tokens, b), 0
    if step.activation_checkpointing:
        kept, again = 4 * b * tokens * H, _largest_part(model, tokens, b)
    # Under FSDP2 a layer's output is float32, and so is all of the last norm but the head's input.
    last_norm = tokens * (4 * H + 4 + 4 * H + b * H)
    rope = 2 * b * step.sequence_length * model.head_dim
    activations = L * kept + rope + last_norm

    c = b if step.fsdp else 4  # bytes of a new gradient's number
    root = b * model.root_parameters if step.fsdp else 0
    layer = b * model.layer_parameters if step.fsdp else 0
    reduced = 4 * model.layer_parameters if step.fsdp else 0
    new_head = c * head if step.fsdp or not step.accumulates else 0
    inside = again + 2 * b * tokens * F + 4 * tokens * H + c * F * H  # inside a layer's backward
    forward, backward, grad = _logit_bytes(step, tokens, model.vocab_size, b)
    start = always + (4 * own if step.accumulates else 0) + activations + root
    below = always + rope + root + (new_head if step.fsdp else 0)
    earlier = partial(_gradients, model, step, own)
    at_root = _root_gradients(model, step, b, own)
    moments = {
        "forward, log-probabilities": start + forward,
        "backward, log-probabilities": start + backward,
        "backward, LM head": start + grad + c * head + b * tokens * H,
        "backward, last layer": start - last_norm + layer + new_head + inside,
        "backward, first layer": below + earlier(L - 1) + kept + layer + reduced + inside,
        "backward, embedding": always + root + 4 * tokens * H + at_root,
        "optimizer": always + 4 * own + 4 * max(2 * head, 3 * F * H) // step.shards,
    }
    if L > 1:
        moments["backward, a layer below"] = (
            below + earlier(1) + (L - 1) * kept + layer + reduced + inside
        )
    if step.fsdp:
        moments["backward, a layer is done"] = (
            below + earlier(0) + (L - 1) * kept + 2 * layer + reduced
        )
    return Estimate(
        weights=weights,
        gradients=4 * own,
        optimizer=optimizer,
        activations=activations,
        moments=moments,
        logprobs={
            "forward, log-probabilities": forward,
            "backward, log-probabilities": backward,
            "backward, LM head": grad,
        },
        host=4 * own if step.reference == "host" else 0,
    )


def _gradients(model: Model, step: Step, own: int, layers: int) -> int:
    """Bytes of the gradients of earlier micro-batches, or else of what backward has passed."""
    if step.accumulates:
        return 4 * own
    head = 0 if step.fsdp else model.head_parameters
    return 4 * (layers * model.layer_parameters + head) // step.shards


def _root_gradients(model: Model, step: Step, b: int, own: int) -> int:
    """Bytes of all gradients while those of embedding and head are made, at the end of backward."""
    head, root = model.head_parameters, model.root_parameters
    if step.fsdp:
        before = 4 * own if step.accumulates else 4 * (model.parameters - root) // step.shards
        return before + (b + 4) * root
    before = 4 * own if step.accumulates else 4 * (own - head)
    return before + (3 if model.tie_word_embeddings else 1) * 4 * head


def _largest_part(model: Model, tokens: int, b: int) -> int:
    """Bytes of what backward builds again at once: the MLP's or the attention's activations."""
    q = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    heads = model.num_attention_heads + model.num_key_value_heads
    qk_norms = model.qk_norm * ((4 + b) * (q + kv) + 4 * heads)
    attention = qk_norms + 2 * b * (q + kv) + 4 * model.num_attention_heads
    return tokens * max(4 * b * model.intermediate_size, attention)


def _logit_bytes(step: Step, tokens: int, V: int, b: int) -> tuple[int, int, int]:
    """Bytes for logits at three moments: forward, backward, and the matrix product's backward.

    The model's output is float32, also of a bfloat16 product: FSDP2 converts it, as NeMo RL asks.
    """
    predicted = step.rows * (step.sequence_length - 1)
    all_logits, logits = 4 * tokens * V, 4 * predicted * V
    product = b * tokens * V  # the gradient in the precision of the product
    convert = all_logits + product if b < 4 else 0
    cut = logits + all_logits  # backward of logits[:, :-1]
    if step.logprobs == "log_softmax":
        copy = logits if step.rows > 1 else 0
        return max(convert, all_logits + copy + logits), max(3 * logits, cut, convert), product
    if step.logprobs == "token_logprobs":
        row = logits // step.rows
        fit = min(_PIECE // row, step.rows) if row else 0  # rows in a piece
        # The softmax of a piece and, where it has several rows, a contiguous copy of it.
        pieces = 2 * fit * row if fit > 1 else min(_PIECE, row)
        forward = max(convert, all_logits + pieces)
        return forward, max(all_logits + logits + pieces, cut, convert), product
    extra = min(step.max_extra_bytes, 3 * logits)
    return extra, 0, extra  # backward makes the gradients of hidden states and head beside it


def measure_peak(run: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Measure how much more memory a call needs than there was in use before it.

    On CUDA the allocator knows. On a CPU the profiler lists every allocation and release of
    PyTorch's; their largest running sum is the peak. What other libraries allocate is not seen.

    Args:
        run: What to call. What it leaves behind counts.
        device: Where its tensors are.

    Returns:
        Bytes.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in found.profiler.kineto_results.events()  # pyright: ignore
        if event.name() == "[memory]"
    ]
    total = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        total += size
        most = max(most, total)
    return most


def compare(model: Model, step: Step) -> dict[str, Estimate]:
    """Estimate a step with each way to make log-probabilities, by its name in `LOGPROBS`."""
    return {name: estimate(model, replace(step, logprobs=name)) for name in LOGPROBS}


def table(estimates: Mapping[str, Estimate]) -> str:
    """Lay out estimates as a Markdown table, one column an estimate.

    Args:
        estimates: By the heading of their column.

    Returns:
        The table, in GiB, or in MiB where all peaks are below one GiB.
    """
    unit, size = ("GiB", 2**30)
    if max(found.peak for found in estimates.values()) < 2**30:
        unit, size = ("MiB", 2**20)
    rows: list[tuple[str, list[str]]] = [
        (label, [f"{getattr(found, name) / size:.2f}" for found in estimates.values()])
        for label, name in (
            ("weights", "weights"),
            ("gradients", "gradients"),
            ("optimizer state", "optimizer"),
            ("activations", "activations"),
            ("logits and log-probabilities", "logits"),
            ("**peak**", "peak"),
            ("reference policy, on the host", "host"),
        )
    ]
    rows.append(("when", [found.when for found in estimates.values()]))
    lines = [[unit, *(f"`{name}`" for name in estimates)], ["---", *["--:"] * len(estimates)]]
    lines += [[label, *cells] for label, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table for a model and a configuration; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.memory",
        allow_abbrev=False,
        description="Memory of a training step on one GPU, before it is run.",
        epilog="All other arguments are overrides in Hydra's grammar, as NeMo RL takes them.",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a Hugging Face model or its config.json; policy.model_name if not given",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of NeMo RL's")
    parser.add_argument(
        "--max-extra-bytes",
        type=int,
        default=512 << 20,
        metavar="N",
        help="of linear_token_logprobs; 512 MiB if not given",
    )
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("--")]:
        parser.error(f"{misspelt[0]}: no such option")
    from omegaconf import OmegaConf

    from nemo_rl_ref.config.read import apply_overrides
    from nemo_rl_ref.utils.config import OverridesError, load_config, register_omegaconf_resolvers

    try:
        register_omegaconf_resolvers()
        config = apply_overrides(load_config(options.config), overrides)
        config = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
        step = Step.from_config(config, max_extra_bytes=options.max_extra_bytes)
        name = options.model or read_settings(config, MemorySettings).policy.model_name
        if not name:
            raise ValueError("policy.model_name: missing; give --model PATH")
        if not options.model and not Path(name).exists():
            raise ValueError(
                f"policy.model_name: {name} is no local folder; give --model PATH, a folder with "
                "a config.json"
            )
        model = Model.from_config(name)
    except (OverridesError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{model.parameters:,} parameters, {step.rows} rows of {step.sequence_length} tokens in "
        f"{step.precision}, {step.shards} GPU{'s' * (step.shards > 1)}, "
        f"{'with' if step.activation_checkpointing else 'without'} activation checkpointing\n"
    )
    print(table(compare(model, step)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
