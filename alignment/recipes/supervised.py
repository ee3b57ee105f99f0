"""The sections that only a recipe for supervised fine-tuning has: `sft`, its `data`, its `training`.

A recipe is one exactly if it has an `sft` section. Everything else (strictness, origins, overrides) is as in the
other recipes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from alignment.recipes.rows import Sources, TextSection
from alignment.recipes.schema import Section, option
from alignment.recipes.training import BaseTrainingSection
from alignment.recipes.trl_keys import PASSED_THROUGH, REFUSED

_PREFERENCES = "belongs to preference training (objective, scripts/train.py)"
_ROWS = "rows, masks and their ends are made before TRL sees them; see the data and sft sections"
_PACKING = "every row stands alone: group_by_length puts rows of like length together, which saves the padding"

# Fields of `DPOConfig` that `SFTConfig` lacks.
_DPO_ONLY = (
    "beta loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha use_weighting discopop_tau "
    "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps "
    "disable_dropout layout displacement_alarm normalized_gradient diagnostics"
).split()

SFT_REFUSED: dict[str, str] = {
    **REFUSED,
    **dict.fromkeys(_DPO_ONLY, _PREFERENCES),
    "loss_type": "the loss is the mean negative log-likelihood of the learned tokens",
    "label_smoothing_factor": "the loss is the mean negative log-likelihood of the learned tokens",
    "average_tokens_across_devices": "on: the loss is a mean over the tokens of the whole global batch",
    "pad_to_multiple_of": "rows are padded to the longest of their batch",
    "padding_free": _PACKING,
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "sample_packing", "neat_packing"), _PACKING),
    "shuffle_dataset": "rows are shuffled every epoch; see group_by_length",
    "dataset_text_field": _ROWS,
    "dataset_kwargs": _ROWS,
    "eos_token": _ROWS,
    "completion_only_loss": "on: prompts are not learned",
    "assistant_only_loss": "write sft.turns",
    "chat_template_path": "the template is the tokenizer's own: what a model is trained with is what it is used with",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
}
SFT_REFUSED.pop("neftune_noise_alpha")
SFT_PASSED_THROUGH: dict[str, Any] = PASSED_THROUGH | {"neftune_noise_alpha": float | None}


class SftSection(Section):
    """What is learned of a row."""

    turns: Literal["all", "last"] = option(
        "all",
        "Of a chat: every assistant turn where the template marks them (else the last, which is said), or the last.",
        "alignment",
    )


class SftDataSection(TextSection):
    """Texts to learn: prompt and completion, chat `messages`, plain `text`, or preferences (chosen is learned)."""

    refused: ClassVar[dict[str, str]] = {
        "sample": "draws preferences; supervised fine-tuning needs rows that are there",
        "overlap": "a row of data.eval that is also in data.train is always refused",
    }

    train: Sources = Field(
        description="FILE, hub NAME or NAME:SPLIT, a mapping (see SourceSection), or a list of these."
    )
    eval: Sources | None = option(None, "Held-out rows, like train.", "none")
    max_length: int = option(1024, "Prompt and completion together, in tokens; longer is cut.", "TRL 1.16", ge=2)
    max_rejected_share: float = option(
        0.1, "Stop if more than this share of the rows is unusable.", "alignment: a tenth is rarely an accident", ge=0
    )


class SftTrainingSection(BaseTrainingSection):
    """How the optimiser runs; TRL's names, except for the batch, which is declared for all processes together."""

    ours: ClassVar[tuple[str, ...]] = ("global_batch_size", "on_nan", "group_by_length", "cpu_threads")
    passed_through: ClassVar[dict[str, Any]] = SFT_PASSED_THROUGH
    not_accepted: ClassVar[dict[str, str]] = SFT_REFUSED

    global_batch_size: int = Field(
        ge=1, description="Rows per optimiser step over all processes; accumulation is derived from it."
    )
    learning_rate: float = option(2e-5, "Peak learning rate.", "TRL 1.16 (SFTConfig)", gt=0, le=1)
