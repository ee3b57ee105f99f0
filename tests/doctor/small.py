"""A small Llama, a step of training on it, and what that step really held and computed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from alignment.doctor import Setting
from alignment.models.scoring import build_rows, sequence_logps
from alignment.objectives import PairLogps, get_objective
from alignment.trainers.degree import DegreeTrainer, attach_head, degree_columns

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config(layers: int = 2, attention: str = "sdpa", **more: int) -> LlamaConfig:
    return LlamaConfig(**(SIZES | more), num_hidden_layers=layers, attn_implementation=attention)


def build(described: LlamaConfig, setting: Setting) -> Any:
    """The model as the trainer has it: dtype, adapter, checkpointing; in training mode."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(described).to(DTYPES[setting.dtype])
    if setting.lora is not None:
        chosen = LoraConfig(r=setting.lora.r, target_modules=setting.lora.target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, chosen)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if setting.lora is not None:
            model.enable_input_require_grads()
    if setting.copies:
        attach_head(model, setting.degrees)
    return model.train()


def rows_of(setting: Setting, vocabulary: int = 512) -> dict[str, torch.Tensor]:
    """A batch with the setting's lengths."""
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    prompts = [text(setting.prompt) for _ in range(setting.pairs)]
    responses = [[text(length) for length in setting.responses] for _ in prompts]
    rows = build_rows(prompts, responses, 0, setting.layout)
    if not setting.copies:
        return rows
    examples = [
        {
            "prompt_ids": prompt,
            "degree_ids": [
                text(setting.responses[branch]) for branch in setting.copied for _ in range(setting.degrees)
            ],
            "degree_labels": [*range(setting.degrees)] * len(setting.copied),
        }
        for prompt in prompts
    ]
    return rows | degree_columns(examples, responses, setting.copied, None, 0, setting.layout)


def step(model: Any, reference: Any, setting: Setting, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """DPO's loss on the batch; the reference is scored after the policy, as the trainer does."""
    dtype = DTYPES[setting.dtype]
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.mixed_precision == "bf16" else contextlib.nullcontext()
    with autocast:
        policy, degrees = _policy(model, setting, rows)
        start = policy.detach()
        if reference is not None:
            with torch.no_grad():
                start = sequence_logps(reference, model.config, dtype, rows, 2)
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.T, start.T
    batch = PairLogps(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, **degrees)
    return get_objective("spo" if degrees else "dpo").loss(batch).mean()


def _policy(model: Any, setting: Setting, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Log-probs of the responses; with copies, by the trainer's own method, and the degree columns."""
    if not setting.copies:
        return sequence_logps(model, model.config, DTYPES[setting.dtype], rows, 2), {}
    trainer: Any = SimpleNamespace(
        objective=get_objective("spo", degrees=setting.degrees),
        copied=setting.copied,
        collator=SimpleNamespace(layout=setting.layout, pad_token_id=0),
        model=model,
    )
    return DegreeTrainer.score_with_degrees(trainer, model, rows, 2)


def kept_for_backward(described: LlamaConfig, setting: Setting) -> int:
    """Bytes of every distinct tensor that autograd saves in a policy forward pass, parameters left out."""
    model = build(described, setting)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # an address may be used again only once its tensor is gone
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, None, setting, rows_of(setting, described.vocab_size))
    return sum(storages.values())


def peak_bytes(described: LlamaConfig, setting: Setting) -> float:
    """Most bytes at once in the second of two whole steps: what was there before, plus the profiler's allocations."""
    model = build(described, setting)
    reference = build(described, setting).requires_grad_(False).eval() if setting.reference == "copy" else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    rows = rows_of(setting, described.vocab_size)

    def whole_step() -> None:
        step(model, reference, setting, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    whole_step()
    static = sum(p.nbytes for m in (model, reference) if m is not None for p in m.parameters())
    static += sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        whole_step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return static + highest
