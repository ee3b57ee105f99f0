"""The sizes of a causal language model that memory and work depend on, read off its configuration.

The model is built on torch's meta device: every parameter has its shape and none has memory, so a 70B model takes a
second. Not the weights, and nothing is downloaded here.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from alignment.doctor.setting import Lora
from alignment.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of the adapter on it.

    Attributes:
        name: architecture.
        attention: transformers' attention implementation.
        layers, hidden, heads: of the decoder.
        query: width of all query heads together.
        mlp: width of the inner layer (of all experts that one token visits).
        gated: whether the inner layer multiplies two projections (SwiGLU, GeGLU).
        vocabulary: rows of the head.
        parameters: distinct parameters (a tied head counts once), without the adapter.
        linear: weights of the linear layers in the decoder; `active` are those that one token meets (experts).
        inputs_attention, inputs_mlp: linear layers that read the normalised input, per decoder layer.
        rms: widths of the norms that keep their input in float32 and what it is normalised to, summed per layer.
        layer_norm: widths of torch's own LayerNorms, per layer.
        layer: parameters of the largest decoder layer.
        adapter: parameters of the adapter; 0 without one.
        adapter_inputs: input widths of the adapted linear layers, summed over the model.
        adapter_rank: their ranks, summed over the model.
    """

    name: str
    attention: str
    layers: int
    hidden: int
    heads: int
    query: int
    mlp: int
    gated: bool
    vocabulary: int
    parameters: int
    linear: int
    active: int
    inputs_attention: int
    inputs_mlp: int
    rms: int
    layer_norm: int
    layer: int
    adapter: int = 0
    adapter_inputs: int = 0
    adapter_rank: int = 0


def read_shape(config: Any, lora: Lora | None = None, *, trust_remote_code: bool = False) -> Shape:
    """Sizes of the model that `config` describes, with an adapter if one is given.

    Args:
        config: transformers' configuration of a causal language model.
        lora: the adapter to put on it.
        trust_remote_code: run the model's own Python code to build it.

    Raises:
        UserError: it is no decoder of this kind, or the adapter names no module of it.
    """
    from torch import nn
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    text, attention = config.get_text_config(), config._attn_implementation
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if getattr(text, key, None) in (None, 0):
            raise UserError(f"plan: {type(text).__name__} has no {key}: there is a plan for attention layers only")
    if getattr(text, "is_decoder", True) is False and text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"plan: {type(text).__name__} describes an encoder; a causal language model is needed")
    model = _on_meta(config, trust_remote_code)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    decoder = next((s for s in stacks if len(s) == text.num_hidden_layers), None)
    if decoder is None:
        raise UserError(f"plan: {type(model).__name__} has no stack of {text.num_hidden_layers} decoder layers")
    first, head_width = decoder[0], _head_width(text)
    share = _share_of_experts(text)
    sizes = [p.numel() for p in model.parameters()]
    linear, active = _matrices(decoder, share)
    blocks = _inputs(first)
    rms, layer_norm = _norms(first, text, head_width)
    inner = getattr(text, "moe_intermediate_size", None) if share < 1 else None
    mlp = inner or getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", 1) if share < 1 else 1
    return Shape(
        name=type(model).__name__,
        attention=str(attention or model.config.get_text_config()._attn_implementation),
        layers=len(decoder),
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        query=text.num_attention_heads * head_width,
        mlp=int(mlp) * int(experts),
        gated=_is_gated(first, int(mlp)),
        vocabulary=model.get_output_embeddings().weight.size(0),
        parameters=sum(sizes),
        linear=linear,
        active=active,
        inputs_attention=blocks[0],
        inputs_mlp=blocks[1],
        rms=rms,
        layer_norm=layer_norm,
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder),
        **_adapter(model, lora),
    )


def _on_meta(config: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if str(config._attn_implementation).startswith("flash_attention"):  # its package may be missing: shapes are alike
        plain._attn_implementation = "eager"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
        except (ValueError, TypeError, LookupError, ImportError, ArithmeticError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"plan: no causal language model from {type(config).__name__}: {reason}") from error


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _share_of_experts(text: Any) -> float:
    """The share of the experts' weights that one token meets; 1 for dense models."""
    per_token = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(text, name, None))), None)
    return per_token / total if per_token and total else 1.0


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _matrices(decoder: Any, share: float) -> tuple[int, int]:
    """(weights of linear layers, those that one token meets). Experts may be one tensor with three dimensions."""
    linear, active = 0, 0.0
    for name, module in decoder.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 or (_is_linear(module) and key == "weight"):
                expert = parameter.dim() == 3 or "experts." in name
                linear += parameter.numel()
                active += parameter.numel() * (share if expert and "shared" not in name else 1.0)
    return linear, round(active)


def _inputs(layer: Any) -> tuple[int, int]:
    """Linear layers of the attention block and of the other one, without the one that writes back in each."""
    blocks: dict[str, int] = {}
    for name, module in layer.named_modules():
        if _is_linear(module) and "experts" not in name:
            block = name.partition(".")[0]
            blocks[block] = blocks.get(block, 0) + 1
    counts = [max(n - 1, 1) for n in blocks.values()] or [1]
    return counts[0], sum(counts[1:]) or 1


def _norms(layer: Any, text: Any, head_width: int) -> tuple[int, int]:
    """(widths of RMS norms, widths of torch's LayerNorms) per token; a norm per head counts for every head."""
    from torch import nn

    rms = native = 0
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("Norm") or weight is None or weight.dim() != 1:
            continue
        width = weight.numel()
        if width == head_width and width != text.hidden_size:
            keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            width *= keys if name.rpartition(".")[2].startswith("k") else text.num_attention_heads
        if isinstance(module, nn.LayerNorm):
            native += width
        else:
            rms += width
    return rms, native


def _is_gated(layer: Any, inner: int) -> bool:
    """Two projections to the inner width, as two linear layers, as one of twice the width, or in the experts."""
    shapes = [tuple(p.shape) for p in layer.parameters() if p.dim() > 1]
    return sum(1 for s in shapes if s[-2] == inner) >= 2 or any(2 * inner in s[-2:] for s in shapes)


def _adapter(model: Any, lora: Lora | None) -> dict[str, int]:
    if lora is None:
        return {}
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    chosen = LoraConfig(r=lora.r, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, chosen, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"lora: {' '.join(str(error).split())[:300]}") from error
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    return {
        "adapter": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "adapter_inputs": sum(int(module.in_features or 0) for module in layers),
        "adapter_rank": sum(module.r["default"] for module in layers),
    }
