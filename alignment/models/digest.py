"""SHA-256 of what a model is: its weights and settings as they are in memory, not its name, path or date.

Two models of one digest have the same log-probs and draw the same samples. Not the digest of a file (`gguf`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import torch
from accelerate.utils import is_peft_model

# Names and versions (the installed ones are in the key), and what concerns training or generation alone.
CONFIG_IRRELEVANT = (
    "_name_or_path transformers_version use_cache pad_token_id architectures "
    "base_model_name_or_path revision inference_mode peft_version init_lora_weights lora_dropout"
).split()


def weights_digest(model: torch.nn.Module, only_frozen: bool = False) -> str:
    """SHA-256 of a model's parameters and buffers as they are in memory; the same on every process.

    Args:
        model: may be sharded by ZeRO-3, whose parameters are gathered one by one.
        only_frozen: leave trainable parameters out: with an adapter in training, what remains is its frozen start.
    """
    digest = hashlib.sha256()
    trained = {id(p) for p in model.parameters() if p.requires_grad} if only_frozen else set()
    sharded = {name: p for name, p in model.named_parameters() if "ds_id" in vars(p)}
    everything = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in trained}
    for name, value in sorted(everything.items()):
        if not isinstance(value, torch.Tensor):  # bitsandbytes keeps text beside its tensors
            digest.update(f"{name} {value}".encode())
            continue
        with gathered_parameter(sharded.get(name)):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gathered_parameter(parameter: Any, writing: bool = False) -> contextlib.AbstractContextManager[Any]:
    """The whole of a parameter (or of several) that ZeRO-3 has split over the processes; all of them must come here
    together.

    With `writing`, what the main process has written is what all have afterwards.
    """
    if parameter is None:
        return contextlib.nullcontext()
    import deepspeed

    rank = 0 if writing else None
    several = parameter if isinstance(parameter, list) else [parameter]
    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(several, rank)
    return gathered


def model_digest(model: Any, start: bool = False) -> str:
    """SHA-256 of everything in a model that decides its log-probs: weights, configuration, settings of adapters.

    Args:
        model: plain, or a PeftModel.
        start: the policy, as the model that training starts from: without what is trained. The adapter "ref" is the
            frozen copy of an adapter that training goes on with; a fresh adapter is switched off and does not count.
    """
    adapters = dict(model.peft_config) if is_peft_model(model) else {}
    if start:
        adapters = {name: adapter for name, adapter in adapters.items() if name == "ref"}
    settings = {"model": model.config, **adapters}
    relevant = {
        part: {key: value for key, value in config.to_dict().items() if key not in CONFIG_IRRELEVANT}
        for part, config in settings.items()
    }
    text = json.dumps(relevant, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    weights = weights_digest(model, only_frozen=start and is_peft_model(model))
    return hashlib.sha256(f"{weights} {text}".encode()).hexdigest()
