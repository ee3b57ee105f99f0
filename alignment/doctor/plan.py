"""`plan`: memory per device and work per step of a model under a setting, as numbers and as a few lines of text."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from alignment.doctor.flops import Flops, flops
from alignment.doctor.memory import OPTIMIZERS, Memory, memory
from alignment.doctor.setting import Setting
from alignment.doctor.shape import Shape, read_shape
from alignment.models.scoring import why_not_shared

GIB = 2**30
SHARDING = {
    "none": "one process",
    "ddp": "data parallel: everything on every device",
    "zero1": "ZeRO-1: optimizer state split",
    "zero2": "ZeRO-2: gradients and optimizer state split",
    "zero3": "ZeRO-3: weights, gradients and optimizer state split",
    "fsdp": "FSDP: weights, gradients and optimizer state split",
}
REFERENCE = {
    "none": "no reference is needed",
    "copy": "the reference is a model of its own",
    "adapter_off": "the reference is the policy with its adapter off",
    "adapter_copy": "the reference is a frozen copy of the adapter",
    "precomputed": "the reference's log-probs come from the cache",
}
MEANING = {
    "weights": "the policy's weights",
    "gradients": "of the trained weights",
    "optimizer": "the optimizer's state",
    "master": "float32 copies of the trained weights (DeepSpeed)",
    "reference": "",
    "buffers": "communication buckets, gathered layers, 16-bit copies",
    "activations": "kept for the backward pass",
    "logits": "log-softmax on the responses, and gradients of it",
}


@dataclass(frozen=True)
class Plan:
    """What was planned for what: `memory` in bytes per device, `flops` in operations."""

    shape: Shape
    setting: Setting
    memory: Memory
    flops: Flops

    def text(self) -> str:
        """The plan in lines: what it assumes, memory part by part, operations per step."""
        return "\n".join([*self.assumptions(), "", *self.memory_lines(), "", *self.flop_lines()])

    def assumptions(self) -> list[str]:
        """What is planned for, and which numbers are guesses."""
        s, m = self.setting, self.shape
        trained = f"{count(m.adapter)} trained (rank {s.lora.r} adapter)" if s.lora else "all trained"
        precision = "" if s.mixed_precision == "no" else f", computed in {s.mixed_precision}"
        quantised = f", linear layers in {s.quantization}" if s.quantization else ""
        frozen = {"copy": "a second model", "adapter_off": "the adapter off", "adapter_copy": "a copy of the adapter"}
        lines = [
            f"{m.name}: {count(m.parameters)} parameters, {trained}; weights {s.dtype}{precision}{quantised}",
            f"{_devices(s.world)}, {SHARDING[s.sharding]}{_offload(s)}; {REFERENCE[s.reference]}",
            f"pairs a pass: {s.pairs}, passes a step: {s.accumulation}, layout {s.layout}"
            f"{', gradient checkpointing' * s.gradient_checkpointing}, {s.optimizer}",
            f"each pair: prompt {s.prompt} tokens, responses {_responses(s.responses)}",
        ]
        if s.copies:
            lines.append(f"each pair besides: {len(s.copies)} degraded copies, counted as long as their responses")
        if s.previous in frozen:
            lines.append(f"the previous iterate, besides the reference: {frozen[s.previous]}")
        if s.optimizer not in OPTIMIZERS:
            lines.append(f"optimizer {s.optimizer!r} is not known to the plan: counted as AdamW")
        if m.active != m.linear:
            lines.append(
                "experts: activations are those of the experts that a token visits, without routing's buffers"
            )
        return lines

    def memory_lines(self) -> list[str]:
        """One line per part, the peak and the host's share."""
        meaning = MEANING | {"reference": REFERENCE[self.setting.reference]}
        lines = ["memory per device"]
        lines += [f"  {n:<16}{size(v):>11}  {meaning[n]}" for n, v in self.memory.parts.items() if v]
        lines.append(f"  {'peak':<16}{size(self.memory.peak):>11}  of what is alive at once; CUDA's runtime and the")
        lines.append(f"  {'':<27}  allocator's fragmentation come on top, 1 GiB or more (docs/memory.md)")
        if self.memory.host:
            lines.append(f"  {'in host memory':<16}{size(self.memory.host):>11}  for each device: what is offloaded")
        return lines

    def flop_lines(self) -> list[str]:
        """Operations by pass, and of the whole step."""
        found = self.flops
        parts = {
            "policy forward": found.policy_forward,
            "policy backward": found.policy_backward,
            "recomputed": found.recomputed,
            "reference": found.reference,
        }
        lines = ["operations of one pass on one device"]
        lines += [f"  {name:<16}{operations(value):>11}" for name, value in parts.items() if value]
        shares = f"attention {found.attention_share:.0%}, head {found.head_share:.0%} of a forward pass"
        lines.append(f"  {'a step':<16}{operations(found.per_step):>11}  over all passes and devices; {shares}")
        return lines


def plan(config: Any, setting: Setting | None = None, *, trust_remote_code: bool = False) -> Plan:
    """Memory per device and work per step, from a model's configuration alone.

    Args:
        config: transformers' configuration of a causal language model; no weights are read.
        setting: by default one float32 process with a pair of 512 + 512 tokens.
        trust_remote_code: run the model's own Python code.

    Raises:
        UserError: no plan is known for this model or setting.
    """
    setting = setting or Setting()
    shape = read_shape(config, setting.lora, trust_remote_code=trust_remote_code)
    resolved = copy.deepcopy(config)
    resolved._attn_implementation = shape.attention
    if why_not_shared(resolved) is not None:  # the trainer falls back, too
        setting = replace(setting, layout="paired")
    return Plan(shape, setting, memory(shape, setting), flops(shape, setting))


def count(number: float) -> str:
    """7.24e9 → `7.24 B`."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes as `3.21 GiB` or `3.21 MiB`."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 4 else f"{number / 2**20:.2f} MiB"


def operations(number: float) -> str:
    """Operations as `3.21 TFLOP`, or in the unit that fits."""
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number / 1e6:.3g} MFLOP"


def _devices(world: int) -> str:
    return "one device" if world == 1 else f"{world} devices"


def _responses(lengths: tuple[int, ...]) -> str:
    """`512 and 512`; of a group of samples `32 x 512`."""
    return f"{len(lengths)} x {lengths[0]}" if len(lengths) > 3 else " and ".join(map(str, lengths))


def _offload(setting: Setting) -> str:
    named = ["optimizer"] * setting.offload_optimizer + ["weights"] * setting.offload_parameters
    return f", {' and '.join(named)} in host memory" if named else ""
