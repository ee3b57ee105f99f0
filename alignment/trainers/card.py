"""Every folder that a trainer saves gets our model card; TRL's and PEFT's name another method, or base "None"."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import Trainer

from alignment.files import write_text
from alignment.models.card import CARD, Card
from alignment.models.public_names import run_name

SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "seed", "data_seed"),
)


class CardTrainer(Trainer):
    """Writes the card into the run's folder and beside every saved model: checkpoints, `final/`, uploads.

    Attributes:
        manifest: of the run, where a recipe began one; else the trainer's own settings stand in the card.
    """

    manifest: dict[str, Any] | None = None
    trains: str = "objective"  # the section that a recipe of this trainer has

    def create_model_card(  # type: ignore[override]  # TRL's signature, which its trainers and pushes call
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder.

        Args:
            model_name: the title; by default the folder's name.
            dataset_name: a data set to name beside those of the manifest.
            tags: further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        named = [tags] if isinstance(tags, str) else list(tags or ())
        card = self._card(model_name or folder.resolve().name)
        card = dataclasses.replace(card, tags=named, datasets=[dataset_name] if dataset_name else [])
        write_text(folder / CARD, card.text())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers', with the card; PEFT, which writes one of its own, is overruled."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        name = Path(str(self.args.output_dir)).resolve().name
        step = f", step {self.state.global_step}" if folder.name.startswith("checkpoint-") else ""
        write_text(folder / CARD, self._card(f"{name}{step}").text())

    def _card(self, name: str) -> Card:
        if self.manifest is not None:
            folder = Path(str(self.args.output_dir))
            name = name.replace(folder.resolve().name, run_name(folder), 1)
        steps = {"steps": self.state.global_step}
        model: Any = self.model
        adapted = is_peft_model(model)
        adapter = model.peft_config[model.active_adapter].to_dict() if adapted else None
        return Card(
            name,
            (self.manifest or self._known()) | steps,
            adapter=adapter,
            scores=self.trains == "reward_model",
            place=self.hub_model_id or "FOLDER",
        )

    def _known(self) -> dict[str, Any]:
        """What a manifest would say, of a trainer that was built in Python."""
        from alignment.environment import hardware, versions

        model: Any = self.model
        base = model.get_base_model() if is_peft_model(model) else model
        training = {key: getattr(self.args, key) for key in SETTINGS}
        training["global_batch_size"] = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        training["lr_scheduler_type"] = str(getattr(training["lr_scheduler_type"], "value", "")) or None
        training["optim"] = str(getattr(training["optim"], "value", training["optim"]))
        rows: Any = self.train_dataset
        return {
            "from_python": True,
            "recipe": {
                "model": {"name_or_path": base.config._name_or_path or None, "dtype": str(base.dtype)[6:]},
                self.trains: self.card_section(),
                "training": training,
            },
            "method": self.card_method(),
            "rows": {} if rows is None else {"train": {"used": len(rows)}},
            "versions": versions(),
            "hardware": hardware(self.args.world_size),
        }

    def card_section(self) -> dict[str, Any]:
        """The recipe's section on what is trained."""
        return {}

    def card_method(self) -> dict[str, str]:
        """Title and paper of the objective."""
        return {}
