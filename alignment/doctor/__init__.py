"""`alignment doctor`: will this recipe run here, on the right numbers, and how much memory and work is it?

`plan` works from a bare model configuration: no weights, no hub, no accelerator.

    from transformers import AutoConfig
    from alignment.doctor import Setting, plan
    print(plan(AutoConfig.from_pretrained(FOLDER), Setting(world=8, sharding="zero3", dtype="bfloat16")).text())

Not a profiler and not a benchmark: formulas (docs/memory.md), no clock.
"""

from alignment.doctor.plan import Plan, plan
from alignment.doctor.setting import Lora, Setting

__all__ = ["Lora", "Plan", "Setting", "plan"]
