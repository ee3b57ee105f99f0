"""Small runs of every kind that trains on given rows, from the quick starts' recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.files import write_json_lines
from alignment.recipes import Recipe, RewardModelRecipe, SftRecipe, load_any
from alignment.runs import preferences as run
from alignment.runs import reward_model as reward_run
from alignment.runs import supervised as sft
from tests.trainers.building import preferences

GIVEN = {
    "dpo": ["data.sample=null", "reward=null", "evaluation=null"],
    "sft": [],
    "reward_model": [
        *("reward_model.members=1", "reward_model.mode=independent", "reward_model.bootstrap=false"),
        "reward_model.freeze_trunk=false",
    ],
}


def rows(odd: int | None = None, word: str = "") -> list[dict[str, Any]]:
    """16 pairs; the chosen response of row `odd` is `word`."""
    found = preferences(16).to_list()
    if odd is not None:
        found[odd]["chosen"] = f" {word} ."
    return found


def recipe(kind: str, model: Path, folder: Path, *more: str, given: list[dict[str, Any]] | None = None):
    """A recipe of a quick start (dpo, sft, reward_model) on `given` rows, by default 16; the run is `folder`/run."""
    data = rows() if given is None else given
    if kind == "sft":
        data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in data]
    write_json_lines(folder / "rows.jsonl", data)
    settings = [
        f"model.name_or_path={model}",
        f"data.train={folder / 'rows.jsonl'}",
        f"training.output_dir={folder / 'run'}",
        "data.eval=null",
        "training.use_cpu=true",
        "training.global_batch_size=2",
        "training.per_device_train_batch_size=1",
        "training.num_train_epochs=1",
        "training.learning_rate=1e-3",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.save_strategy=steps",
        "training.save_steps=1",
        "training.save_total_limit=2",
        "training.logging_steps=1",
        "training.eval_strategy=no",
        *GIVEN[kind],
    ]
    keys = [override.partition("=")[0] for override in more]
    settings = [setting for setting in settings if setting.partition("=")[0] not in keys]
    return load_any(f"recipes/quickstart/{kind}.yaml", [*settings, *more])


def train(made: Any, resume: bool = False) -> Path:
    """Train it in this process."""
    kinds: dict[type, Any] = {Recipe: run.train, SftRecipe: sft.train, RewardModelRecipe: reward_run.train}
    return kinds[type(made)](made, resume)
