"""The memory that the heads of shipped recipes promise is what the doctor computes for the public architectures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Gemma2Config, GemmaConfig, GPTJConfig, LlamaConfig, MistralConfig

from alignment.doctor import plan
from alignment.doctor.setting import from_recipe
from alignment.recipes import IterateRecipe, Recipe, load_any, load_recipe
from alignment.recipes.iterate import iteration_sections
from alignment.recipes.launch import read_launch

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = {  # of config.json, the first that fits; the defaults of MistralConfig and GPTJConfig are the 7B's and 6B's
    "llama3.2-3b": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "gemma-2-2b": Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, attn_implementation="eager",
    ),
    "gpt-j": GPTJConfig(),
    "llama": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "gemma": GemmaConfig(
        vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, head_dim=256,
    ),
    "mistral": MistralConfig(),
}  # fmt: skip
SAID = re.compile(r"Memory: (\d+) GiB per GPU on (\d+) with (\w+\.yaml)")
FILES = [file for file in sorted(RECIPES.glob("*/*.yaml")) if SAID.search(file.read_text())]


def of_one_run(file: Path) -> Recipe:
    """The recipe, or the one that an iteration of it trains by."""
    recipe = load_any(file)
    if isinstance(recipe, IterateRecipe):
        return Recipe.model_validate(iteration_sections(recipe, recipe.training.output_dir, 1))
    return load_recipe(file)


def planned(file: Path, launch: str, world: int):
    name = next((name for name in MODELS if name in file.stem), "mistral")
    return plan(MODELS[name], from_recipe(of_one_run(file), read_launch(RECIPES / "accelerate" / launch), world))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipes_head(file):
    gib, world, launch = SAID.search(file.read_text()).groups()
    assert round(planned(file, launch, int(world)).memory.peak / 2**30) == int(gib)


def test_the_offload_files_head():
    """16 bytes per parameter; over all eight GPUs, and on each of them, with and without offload."""
    text = " ".join((RECIPES / "accelerate/zero3_offload.yaml").read_text().replace("\n#", "").split())
    said = r"holds (\d+) bytes per parameter.* (\d+) GiB for 7B over all GPUs.* takes (\d+) GiB instead of (\d+)"
    found = planned(RECIPES / "dpo/zephyr-7b.yaml", "zero3_offload.yaml", 8)
    plain = planned(RECIPES / "dpo/zephyr-7b.yaml", "zero3.yaml", 8)
    numbers = (8 * found.memory.host / found.shape.parameters, 8 * found.memory.host / 2**30)
    numbers += (found.memory.peak / 2**30, plain.memory.peak / 2**30)
    assert tuple(map(int, re.search(said, text).groups())) == tuple(map(round, numbers))
