"""Bytes of one training step on one device: formulas, each with its source, and no model.

docs/memory.md derives them and holds them against measured runs. Not counted: what the accelerator's runtime and
libraries take (about a gigabyte on CUDA), and the allocator's fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.doctor.setting import Setting
from alignment.doctor.shape import Shape

BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size, allocated whole
LIVE = 1_000_000_000  # elements: DeepSpeed's default stage3_max_live_parameters
PREFETCH = 50_000_000  # elements: DeepSpeed's default stage3_prefetch_bucket_size
# Optimizer state per trained weight: (tensors in the weight's own dtype, bytes besides). bitsandbytes keeps 8-bit
# states with one float32 scale per block of 256.
_BLOCKWISE = 1 + 4 / 256
OPTIMIZERS: dict[str, tuple[int, float]] = {
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "paged_adamw_32bit": (0, 8),
    "adamw_bnb_8bit": (0, 2 * _BLOCKWISE),
    "adamw_8bit": (0, 2 * _BLOCKWISE),
    "paged_adamw_8bit": (0, 2 * _BLOCKWISE),
    "lion_32bit": (0, 4),
    "paged_lion_32bit": (0, 4),
    "lion_8bit": (0, _BLOCKWISE),
    "paged_lion_8bit": (0, _BLOCKWISE),
    "rmsprop": (1, 0),
    "adagrad": (1, 0),
    "sgd": (0, 0),
}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # QLoRA (2305.14314), section 3: blocks of 64, their scales in 8 bits by 256


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and what is kept in the host's memory for it instead.

    `peak` is the larger of two moments: the end of the forward pass (activations and logits alive) and the end of
    the backward pass (gradients alive); where gradients are accumulated they are alive throughout.
    """

    weights: float
    gradients: float
    optimizer: float
    master: float
    reference: float
    buffers: float
    activations: float
    logits: float
    peak: float
    host: float

    @property
    def parts(self) -> dict[str, float]:
        """Each part under its name, in the order of docs/memory.md."""
        names = "weights gradients optimizer master reference buffers activations logits".split()
        return {name: getattr(self, name) for name in names}


def memory(shape: Shape, setting: Setting) -> Memory:
    """Memory of one process at the setting's batch and lengths."""
    world = setting.world
    shards = {"zero3": world, "fsdp": world}.get(setting.sharding, 1)
    trained = shape.parameters if setting.lora is None else shape.adapter
    base = _base(shape, setting) if setting.lora is not None else 0.0
    weights = (base + trained * setting.trained_bytes) / shards
    gradients = trained * setting.trained_bytes / (world if setting.sharding in ("zero2", "zero3", "fsdp") else 1)
    split = world if setting.sharding not in ("none", "ddp") else 1
    same, other = OPTIMIZERS.get(setting.optimizer, OPTIMIZERS["adamw_torch"])
    master = trained * 4 / split if setting.deepspeed else 0.0
    optimizer = trained * (same * (4 if setting.deepspeed else setting.trained_bytes) + other) / split
    frozen = {
        "copy": shape.parameters * setting.weight_bytes / shards,
        "adapter_copy": shape.adapter * setting.trained_bytes / shards,
    }
    reference = frozen.get(setting.reference, 0.0) + frozen.get(setting.previous, 0.0)
    host = 0.0
    if setting.offload_optimizer:
        host, master, optimizer = master + optimizer, 0.0, 0.0
    if setting.offload_parameters:  # TRL leaves it in the reference's configuration, too
        host, weights, reference = host + weights + reference, 0.0, 0.0
    kept = layer_activations(shape, setting)
    activations, logits = _activations(shape, setting, kept), _logits(shape, setting)
    buffers = _buffers(shape, setting, trained)
    # Without accumulation the gradients are freed after each step and only grow as the activations go.
    accumulated = gradients if setting.accumulation > 1 or setting.deepspeed else 0.0
    last = kept if setting.gradient_checkpointing else kept / max(shape.layers, 1)
    forward_end = accumulated + activations + max(logits, kept if setting.gradient_checkpointing else 0.0)
    peak = weights + optimizer + master + reference + buffers + max(forward_end, gradients + last)
    return Memory(weights, gradients, optimizer, master, reference, buffers, activations, logits, peak, host)


def _base(shape: Shape, setting: Setting) -> float:
    """Bytes of the frozen weights under an adapter."""
    linear = {"nf4": NF4, "int8": 1.0}.get(setting.quantization or "", float(setting.weight_bytes))
    return shape.linear * linear + (shape.parameters - shape.linear) * setting.weight_bytes


def _buffers(shape: Shape, setting: Setting, trained: int) -> float:
    """What sharding and autocast hold besides: gradient buckets, gathered layers, 16-bit copies of the weights."""
    found = 0.0
    if setting.sharding == "ddp":  # torch's reducer: buckets as large as all gradients (gradient_as_bucket_view off)
        found += trained * setting.trained_bytes
    elif setting.deepspeed:
        found += BUCKET * setting.trained_bytes
    if setting.sharding == "zero3":
        found += min(shape.parameters, LIVE + PREFETCH) * setting.weight_bytes
    if setting.sharding == "fsdp":  # the layer at work, the next one, and the embeddings and head around them
        outside = shape.parameters - shape.layers * shape.layer
        found += (2 * shape.layer + max(outside, 0)) * setting.compute_bytes
    if setting.casts:
        found += 2 * (shape.linear + shape.hidden * shape.vocabulary)
    if setting.lora is not None and setting.mixed_precision != "no" and setting.trained_bytes == 4:
        found += 2 * shape.adapter
    return found


def layer_activations(shape: Shape, setting: Setting) -> float:
    """Bytes that autograd keeps of one decoder layer, for all rows of a pass.

    Korthikanti et al. 2022 (2205.05198), section 4, counts them for GPT with dropout; this is the same count for
    today's layers (RMS norm, rotary positions, grouped keys, gated inner layer, no dropout) as transformers 5.23
    computes them. The tests hold it against autograd's own list, tensor by tensor.
    """
    weight, compute = setting.weight_bytes, setting.compute_bytes
    full = setting.lora is None
    # RMS norm: its input in float32 and, for the gradient of its scale, what it was normalised to.
    per_token = shape.rms * (4 + (weight if full else 0)) + shape.layer_norm * weight + 8.0
    if full:
        copies = shape.inputs_attention + shape.inputs_mlp if setting.casts else 2
        per_token += compute * (copies * shape.hidden + shape.mlp)
    else:
        per_token += _adapter_inputs(shape, setting)
    # Query, key, value (keys and values repeated for every query head: a mask forbids grouped kernels) and output.
    per_token += 4 * compute * shape.query
    if shape.attention == "eager":  # all scores: probabilities in float32, and again in the type of the values
        per_token += (4 + (compute if compute < 4 else 0)) * shape.heads * setting.width
    else:  # one additive mask for all heads, and the log-sum-exp of each row
        per_token += compute * setting.width + 4 * shape.heads
    per_token += compute * shape.mlp * (3 if shape.gated else 1)
    return per_token * setting.rows * setting.width


def _adapter_inputs(shape: Shape, setting: Setting) -> float:
    """What an adapter keeps of one layer, per token: the inputs of its first matrix and of its second."""
    kind = setting.compute_bytes if setting.mixed_precision != "no" else setting.trained_bytes
    # Where nothing is cast, adapters read the tensors that their neighbours keep as well; a cast makes each its own.
    cast = setting.casts or setting.trained_bytes != setting.weight_bytes
    own = shape.adapter_inputs / shape.layers
    shared = min(own, 2 * shape.hidden + shape.mlp)
    return kind * (own if cast else shared) + kind * shape.adapter_rank / shape.layers


def _activations(shape: Shape, setting: Setting, kept: float) -> float:
    """All layers (or, with checkpointing, the input of each), the last norm and the head's input."""
    tokens = setting.rows * setting.width
    stream = setting.weight_bytes
    inside = shape.layers * (stream * shape.hidden * tokens if setting.gradient_checkpointing else kept)
    last = tokens * shape.hidden * (4 + (stream if setting.lora is None else 0))
    return inside + last + setting.rows * setting.kept * shape.hidden * setting.compute_bytes


def _logits(shape: Shape, setting: Setting) -> float:
    """Log-softmax in float32, its gradient and the gradient of the logits, 4 bytes each; or, earlier, the policy's
    log-softmax beside the reference's logits and log-softmax."""
    numbers, plain = (s.rows * s.kept * shape.vocabulary for s in (setting, setting.plain))
    forward = 8 + (setting.compute_bytes if setting.compute_bytes < 4 else 0)
    scored_twice = {setting.reference, setting.previous} & {"copy", "adapter_off", "adapter_copy"}
    return max(numbers * max(12, forward), 4 * numbers + forward * plain if scored_twice else 0)
