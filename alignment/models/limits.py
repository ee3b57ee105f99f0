"""What a model can take, before its weights are loaded: the ids that its embedding has rows for, and its positions."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from alignment.models.loading import adapter_base, resolve_path

_POSITIONS = re.compile(r"(^|\.)(wpe|[^.]*position[^.]*)$")


@dataclass(frozen=True)
class Limits:
    """Of one model.

    Attributes:
        embedding: rows of the input embedding; ids from there on break the forward pass.
        positions: tokens that the model was made for; None where its configuration says nothing.
        learned: each position has a row of its own, and a longer row breaks the forward pass.
    """

    embedding: int
    positions: int | None
    learned: bool


def limits_of(model: Any) -> Limits:
    """Limits of a model, with weights or on the meta device."""
    from torch import nn

    configured = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind padding
            tables.append(module.num_embeddings - skipped)
    learned = [rows for rows in tables if configured is None or rows + 8 >= configured]  # OPT has two more
    positions = min([*learned, *([] if configured is None else [configured])], default=None)
    return Limits(model.get_input_embeddings().num_embeddings, positions, bool(learned))


@lru_cache(maxsize=8)
def named_limits(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Limits | None:
    """Limits of a model by its name, from its configuration alone; None where they cannot be told."""
    import torch
    from transformers import AutoConfig, AutoModel

    path = resolve_path(name_or_path)
    path = resolve_path(adapter_base(path) or path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config: Any = AutoConfig.from_pretrained(path, **options)
        config._attn_implementation = "eager"  # another one's package may be missing
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return limits_of(AutoModel.from_config(config, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, TypeError, LookupError, ImportError, ArithmeticError, RuntimeError, AttributeError):
        return None  # loading says it better
