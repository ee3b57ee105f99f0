"""What the trainer tests share: rows of the grammar, arguments, a trainer on the tiny model, its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.objectives.base import Objective
from alignment.trainers.offline import PreferenceTrainer
from tests import tiny_lm

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def preferences(n: int = 32, chat: bool = False) -> Dataset:
    """Rows of the grammar: a kind continuation chosen, a harsh one rejected, lengths mixed."""
    rows = []
    for i, opening in enumerate(tiny_lm.openings()[:n]):
        kind = " and ".join(tiny_lm.KIND[(i + j) % 5] for j in range(1 + i % 4))
        harsh = " and ".join(tiny_lm.HARSH[(i + j) % 5] for j in range(1 + (i // 2) % 4))
        if chat:
            chosen, rejected = ([{"role": "assistant", "content": f"{opening} {w} ."}] for w in (kind, harsh))
            rows.append({"prompt": [{"role": "user", "content": opening}], "chosen": chosen, "rejected": rejected})
        else:
            rows.append({"prompt": opening, "chosen": f" {kind} .", "rejected": f" {harsh} ."})
    return Dataset.from_list(rows)


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Of any of TRL's configurations, for a few steps on the CPU."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | more


def config(folder: Path, **more: Any) -> DPOConfig:
    return DPOConfig(**arguments(folder, **more))


def trainer_for(tiny: Path, folder: Path, objective: str | Objective = "dpo", **more) -> PreferenceTrainer:
    args = more.pop("args", None) or config(folder)
    if isinstance(objective, str):
        objective = get_objective(objective)
    data = more.pop("train_dataset", None) or preferences()
    model = more.pop("model", None) or load_model(str(tiny))
    tokenizer = more.pop("tokenizer", None) or load_tokenizer(str(tiny))
    return PreferenceTrainer(model, objective, args, data, tokenizer, **more)


def logged(trainer: DPOTrainer, key: str = "loss") -> list[float]:
    return [float(row[key]) for row in trainer.state.log_history if key in row]
