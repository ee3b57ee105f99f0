"""The sections that only a recipe for a reward model has: `reward_model`, its `data`, its `training`.

A recipe is one exactly if it has a `reward_model` section. Everything else (strictness, origins, overrides) is as in
the other recipes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.recipes.rows import PreferenceRows, Sources
from alignment.recipes.schema import Section, Text, option, refused_at
from alignment.recipes.training import BaseTrainingSection
from alignment.recipes.trl_keys import PASSED_THROUGH, REFUSED

_POLICY = "belongs to preference training of a policy (objective, scripts/train.py)"

# Fields of `DPOConfig` that `RewardConfig` lacks.
_DPO_ONLY = (
    "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha use_weighting "
    "discopop_tau precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha "
    "ref_model_sync_steps layout displacement_alarm normalized_gradient diagnostics padding_free "
    "truncation_mode"
).split()
_OURS = "write it in the reward_model section"

REWARD_REFUSED: dict[str, str] = {
    **REFUSED,
    **dict.fromkeys(_DPO_ONLY, _POLICY),
    "label_smoothing": "write reward_model.label_smoothing",
    "label_smoothing_factor": "write reward_model.label_smoothing",
    "center_rewards_coefficient": "write reward_model.center",
    "pad_token": "write reward_model.pad_token",
    "pad_to_multiple_of": "rows are padded to the longest of their batch",
    "disable_dropout": "dropout is off: scores are compared with each other",
    "neftune_noise_alpha": "noise is off: scores are compared with each other",
    "router_aux_loss_coef": "only the reward loss is trained",
    "chat_template_path": "the template is the tokenizer's own: what a model is trained with is what it is used with",
    "eos_token": "rows, and their ends, are made before TRL sees them",
}


class RewardModelSection(Section):
    """What is fitted to the preferences, and how many times."""

    loss: Literal["bradley_terry", "win_tie", "general"] = option(
        "bradley_terry",
        "bradley_terry; win_tie pulls the scores of ties (label 0.5) together; general is GPM, a skew-symmetric score "
        "that may be intransitive.",
        "Coste et al. 2310.02743, eq. 2",
    )
    margin: Literal["margin", "rewards"] | None = option(
        None, "How far chosen should win: the rows' `margin`, or reward_chosen - reward_rejected.", "none"
    )
    label_smoothing: float = option(0.0, "Assumed share of flipped labels.", "none", ge=0, lt=0.5)
    score_l2: float = option(
        0.0, "Coefficient of (r_w^2 + r_l^2) / 2.", "none; 0.001 in the ensembles paper's released configuration", ge=0
    )
    center: float = option(0.0, "Coefficient of (r_w + r_l)^2.", "none; TRL advises 0.01 (2312.09244, eq. 2)", ge=0)
    tie_weight: float = option(0.5, "(win_tie) Weight of a tie's two terms.", "SoliReward's paper; its code: 1", gt=0)
    tie_margin: float = option(0.0, "(win_tie) Margin of a tie's two terms.", "SoliReward's paper", ge=0)
    planes: int = option(3, "(general) k: the embedding has 2k coordinates.", "GPM: 2k = 6 for its 2B model", ge=1)
    gate: bool = option(True, "(general) Weigh the planes by the prompt.", "GPM 2410.02197, section 4")
    temperature: float = option(0.1, "(general) tau of P = sigmoid(s / tau).", "GPM 2410.02197", gt=0)
    members: int = option(1, "Ensemble: so many members that differ only in seed.", "one; Coste et al. train 5", ge=1)
    mode: Literal["independent", "shared_trunk"] = option(
        "independent",
        "independent: each member is a fine-tune of its own; shared_trunk: one trunk with a head per member, one "
        "forward pass for all.",
        "Coste et al. 2310.02743",
    )
    freeze_trunk: bool = option(
        False, "Train the heads only; the trunk's features are computed once and cached.", "alignment: off"
    )
    bootstrap: bool = option(
        False,
        "(shared_trunk) Each head weighs each pair by a Poisson(1) draw of its own: heads on one trunk are alike "
        "otherwise.",
        "off: the paper's members see the same data",
    )
    calibration: int = option(
        512,
        "Responses over which mean and std of the scores are measured, in the order of the rows.",
        "alignment",
        ge=2,
    )
    pad_token: Text | None = option(None, "Padding, not EOS.", "the tokenizer's, or its unk token where that is EOS")

    @model_validator(mode="after")
    def _fits(self) -> RewardModelSection:
        general = ("planes", "gate", "temperature")
        ties = ("tie_weight", "tie_margin")
        for key, loss in [*((k, "general") for k in general), *((k, "win_tie") for k in ties)]:
            if getattr(self, key) != type(self).model_fields[key].default and self.loss != loss:
                raise refused_at(f"belongs to loss {loss}, and loss is {self.loss}", key)
        if self.loss == "general":
            for key in ("margin", "score_l2", "center"):
                if getattr(self, key):
                    raise refused_at("needs scores, and loss general has none (its outputs embed the response)", key)
            if self.members > 1 and self.mode == "shared_trunk":
                raise refused_at("needs scalar scores; train members of loss general with mode independent", "mode")
            if self.gate and self.freeze_trunk:
                raise refused_at(
                    "needs the prompt's features, which freeze_trunk does not keep; set gate: false", "gate"
                )
        if self.bootstrap and self.mode != "shared_trunk":
            raise refused_at("belongs to mode shared_trunk", "bootstrap")
        return self


class RewardDataSection(PreferenceRows):
    """Preferences as in preference training; they are given, not drawn."""

    refused: ClassVar[dict[str, str]] = {
        "sample": "draws preferences while a policy is trained; sample them first (scripts/train.py keeps "
        "preferences.jsonl)"
    }

    train: Sources = Field(
        description="FILE, hub NAME or NAME:SPLIT, a mapping (see SourceSection), or a list of these."
    )
    label_noise: float = option(0.0, "Flip the label of a training row with this probability.", "none", ge=0, le=1)
    noise_seed: int = option(0, "Seed of the flips: the same for all members.", "alignment", ge=0)


class RewardTrainingSection(BaseTrainingSection):
    """How the optimiser runs; TRL's names, except for the batch, which is declared for all processes together."""

    ours: ClassVar[tuple[str, ...]] = ("global_batch_size", "on_nan", "group_by_length", "cpu_threads")
    passed_through: ClassVar[dict[str, Any]] = PASSED_THROUGH
    not_accepted: ClassVar[dict[str, str]] = REWARD_REFUSED

    learning_rate: float = option(1e-5, "Peak learning rate.", "Coste et al. 2310.02743", gt=0, le=1)
