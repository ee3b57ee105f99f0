"""Floating-point operations of one training step: formulas, no clock and no claim about speed.

A multiplication and an addition count as two. Matrix products only: norms, softmax, rotations and the optimizer are
a few per cent at most. Tests hold the counts against `torch.utils.flop_counter`.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.doctor.setting import Setting
from alignment.doctor.shape import Shape


@dataclass(frozen=True)
class Flops:
    """Operations of one process in one pass (`pairs` pairs); `per_step` adds up passes and processes."""

    policy_forward: float
    policy_backward: float
    recomputed: float
    reference: float
    attention_share: float
    head_share: float
    passes: int

    @property
    def per_pass(self) -> float:
        """Of one pass on one device."""
        return self.policy_forward + self.policy_backward + self.recomputed + self.reference

    @property
    def per_step(self) -> float:
        """Of one optimizer step, all processes and passes together."""
        return self.per_pass * self.passes


def flops(shape: Shape, setting: Setting) -> Flops:
    """Work of one step.

    A forward pass through a weight matrix costs 2 operations per weight and token (Kaplan et al. 2020, 2001.08361,
    section 2.1); backward costs the same for the input's gradient, and once more for the weights' where they are
    trained. Attention costs 4 per layer, query width and pair of positions, masked or not: with a mask the kernels
    compute every score. The head runs on the response's columns only. Frozen models never see degraded copies.
    """
    body, attention, head, adapter = _forward(shape, setting)
    forward = body + attention + head + adapter
    weights = 2 if setting.lora is None else 1
    backward = weights * (body + head) + 2 * (attention + adapter)
    *bare, extra = _forward(shape, setting.plain)
    passes = {"copy": sum(bare), "adapter_off": sum(bare), "adapter_copy": sum(bare) + extra}
    reference = passes.get(setting.reference, 0.0) + passes.get(setting.previous, 0.0)
    return Flops(
        policy_forward=forward,
        policy_backward=backward,
        recomputed=forward - head if setting.gradient_checkpointing else 0.0,
        reference=reference,
        attention_share=attention / forward,
        head_share=head / forward,
        passes=setting.accumulation * setting.world,
    )


def _forward(shape: Shape, setting: Setting) -> tuple[float, float, float, float]:
    """Operations of a forward pass: the layers' matrices, attention, the LM head, the adapter."""
    tokens = setting.rows * setting.width
    return (
        2.0 * shape.active * tokens,
        4.0 * shape.layers * shape.query * setting.width * tokens,
        2.0 * shape.hidden * shape.vocabulary * setting.rows * setting.kept,
        2.0 * shape.adapter * tokens,
    )
