"""ZeRO-2 and ZeRO-3 on two CPU processes, from the shipped accelerate files: the same losses as one plain process.

Slow: `make test-all`. What differs from the use on GPUs: `--mixed_precision no`, gloo, and no compiled kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from alignment.recipes import load_recipe
from alignment.trainers.run import train
from tests.e2e.conftest import Grammar, finished, launched, series

pytestmark = pytest.mark.slow
RECIPE = "recipes/quickstart/dpo.yaml"
NUMBERS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl")
SETTINGS = ["training.learning_rate=1e-3", "training.max_steps=12", "training.use_cpu=true"]


@pytest.fixture(scope="module")
def plain(root: Path, grammar: Grammar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(load_recipe(root / RECIPE, grammar.overrides(tmp_path_factory.mktemp("plain") / "run", *SETTINGS)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_training_is_the_same_training(root, grammar, plain, tmp_path, stage, lora):
    adapters = ["lora.r=4", "training.per_device_train_batch_size=2"] if lora else []
    given = grammar.overrides(tmp_path / "run", *SETTINGS, *adapters)
    options = ["--config_file", f"recipes/accelerate/zero{stage}.yaml", "--num_processes", "2"]
    process = launched(root, [*options, "--mixed_precision", "no"], RECIPE, given, program="tests/e2e/sharded.py")
    finished(process)
    if lora:  # another model than `plain`, so compared with its own
        alone = grammar.overrides(tmp_path / "alone", *SETTINGS, *adapters)
        plain = train(load_recipe(root / RECIPE, alone))
        assert (tmp_path / "run" / "final" / "adapter_config.json").is_file()
    found, expected = series(tmp_path / "run", *NUMBERS), series(plain, *NUMBERS)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    if not lora:  # gathered into one ordinary folder
        weights = [
            AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (tmp_path / "run", plain)
        ]
        assert weights[0].keys() == weights[1].keys()
        assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-4
