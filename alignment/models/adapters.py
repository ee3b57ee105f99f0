"""What PEFT's kinds of adapters cannot do here, known from an adapter's configuration alone. Imports nothing heavy.

Every kind was trained and exported once on a small model, tied and untied; the others merge exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# PEFT's kinds that learn tokens before the prompt instead of weights.
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")


def kind_of(config: Mapping[str, Any]) -> str:
    """PEFT's name of an adapter's kind, such as LORA."""
    found = config.get("peft_type") or "LORA"
    return str(getattr(found, "value", found))


def why_not_trained(config: Mapping[str, Any]) -> str | None:
    """Why the objectives cannot train such an adapter; None if they can.

    Args:
        config: PEFT's configuration, as in adapter_config.json.
    """
    if kind_of(config) in PROMPTS:
        return (
            "puts virtual tokens before the prompt, where PEFT ignores position ids: log-probs would depend on padding"
        )
    return None


def why_not_merged(config: Mapping[str, Any]) -> str | None:
    """Why `alignment export` cannot add such an adapter to the weights of its base; None if nothing is known.

    Args:
        config: as of `why_not_trained`.
    """
    if kind_of(config) in (*PROMPTS, "ADAPTION_PROMPT"):
        return "it learns tokens before the prompt, not weights"
    if config.get("layer_replication"):
        return "its layers share the weights of the base's (layer_replication)"
    return None
