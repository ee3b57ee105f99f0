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
    compute every score. The head runs on the response's columns only.
    """
    tokens = setting.rows * setting.width
    body = 2.0 * shape.active * tokens
    attention = 4.0 * shape.layers * shape.query * setting.width * tokens
    head = 2.0 * shape.hidden * shape.vocabulary * setting.rows * setting.kept
    adapter = 2.0 * shape.adapter * tokens
    forward = body + attention + head + adapter
    weights = 2 if setting.lora is None else 1
    backward = weights * (body + head) + 2 * (attention + adapter)
    reference = {
        "copy": forward - adapter,
        "adapter_off": forward - adapter,
        "adapter_copy": forward,
    }.get(setting.reference, 0.0)
    return Flops(
        policy_forward=forward,
        policy_backward=backward,
        recomputed=forward - head if setting.gradient_checkpointing else 0.0,
        reference=reference,
        attention_share=attention / forward,
        head_share=head / forward,
        passes=setting.accumulation * setting.world,
    )
