"""QLoRA on a CPU: four-bit frozen weights, adapters trained on them, from model loading to a recipe's run."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.models import load_model
from alignment.recipes import RecipeError, load_recipe
from alignment.runs.preferences import train
from tests.trainers.building import LORA, config, logged, preferences, trainer_for

# The 16 levels of NF4, Dettmers et al. 2023, appendix E.
NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


def test_linear_weights_are_on_the_papers_sixteen_levels(tiny):
    """Blocks of 64 values share a scale: divided by it, every value is one of the levels (the scale itself is stored
    in 8 bits: double quantisation, hence the tolerance)."""
    quantised, plain = load_model(str(tiny), quantization="nf4"), load_model(str(tiny))
    layer = quantised.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit) and layer.weight.quant_state.nested
    assert not isinstance(quantised.lm_head, Linear4bit)
    eye = torch.eye(layer.in_features)
    with torch.no_grad():
        found = layer(eye).T.reshape(-1, 64)  # the weights as the layer computes with them
    original = plain.model.layers[0].mlp.up_proj.weight.detach().reshape(-1, 64)
    levels = torch.tensor([float(level) for level in NF4.split()])
    scale = original.abs().amax(1, keepdim=True)
    nearest = levels[((original / scale)[..., None] - levels).abs().argmin(-1)]
    assert float((found / scale - nearest).abs().max()) < 0.06


def test_adapters_are_trained_and_the_frozen_weights_stay(tiny, tmp_path):
    model = load_model(str(tiny), quantization="nf4")
    args = config(tmp_path, learning_rate=2e-2, max_steps=24)
    trainer = trainer_for(tiny, tmp_path, model=model, peft_config=LORA, args=args)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == logged(trainer, "rewards/rejected")[0] == 0.0  # base = reference
    assert logged(trainer, "rewards/margins")[-1] > 0.1
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    assert len(before) > 10 and any(p.dtype == torch.uint8 for p in before.values())


def test_a_recipes_run_leaves_an_adapter_for_the_plain_base(root, tiny, tmp_path):
    preferences(16).to_json(tmp_path / "pairs.jsonl")
    given = [
        f"model.name_or_path={tiny}",
        "model.quantization=nf4",
        "lora.r=4",
        "reference.precompute=true",
        "data.sample=null",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        "evaluation=null",
        f"training.output_dir={tmp_path / 'run'}",
        "training.use_cpu=true",
    ]
    run = train(load_recipe(root / "recipes/quickstart/dpo.yaml", given))
    assert [row["loss"] for row in read_rows(run / "metrics.jsonl")][0] == pytest.approx(0.6931472, abs=1e-6)
    assert (run / "final" / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.load_adapter(run / "final")
    ids = torch.arange(12)[None]
    assert torch.isfinite(model(ids).logits).all()


def test_quantised_weights_cannot_be_trained_themselves(root):
    with pytest.raises(RecipeError, match="model.quantization: quantised weights cannot be trained"):
        load_recipe(root / "recipes/quickstart/dpo.yaml", ["model.quantization=nf4"])
    with pytest.raises(UserError, match="model.quantization: 'nf5' is not nf4"):
        load_model("anything", quantization="nf5")
