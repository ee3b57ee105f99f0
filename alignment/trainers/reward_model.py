"""`RewardModelTrainer`: TRL's RewardTrainer with our rows, losses, k heads, batches and sums in the logs.

Overrides: data (token ids as they are), collation, sampler, loss, evaluation, logging. Kept from TRL: PEFT,
checkpoints, DeepSpeed, callbacks. Tested with TRL 1.16 only. Not here: recipes and members (`alignment.runs`), the
formulas (`alignment.rewards.losses`), the head's forward pass (transformers).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import RewardTrainer

from alignment.errors import UserError
from alignment.models.digest import gathered_parameter
from alignment.models.reward_model import Facts, head_of, padded
from alignment.rewards.losses import RewardLoss, general_score, unit
from alignment.trainers.card import CardTrainer
from alignment.trainers.collation import LengthGroupedSampler, train_sampler, truncated
from alignment.trainers.finite import LOGIT_RANGE, FiniteTrainer
from alignment.trainers.metrics import EpochOrder, Totals, agreement

BRANCHES = ("chosen", "rejected")
FEATURES = "features"  # column of a frozen trunk: [2, width], chosen and rejected


@dataclass
class RewardCollator:
    """Examples → `input_ids` and `attention_mask` of B chosen rows, B rejected rows and, where `gated`, B prompts.

    With a column `features`, `inputs_embeds` `[2B, 1, width]` in their place. `label` `[B]` is 1 where the examples
    bring none; `margin` `[B]` and `weights` `[B, k]` go along where they do.

    Attributes:
        pad_token_id: not EOS (`alignment.models.reward_model.settle_padding`).
        max_length: tokens of prompt and response; longer responses are cut at their end.
        gated: add the prompts.
    """

    pad_token_id: int
    max_length: int | None
    gated: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # A [B] tensor comes first: transformers reads the batch size off the first tensor.
        batch = {"label": torch.tensor([float(example.get("label", 1.0)) for example in examples])}
        if FEATURES in examples[0]:
            features = torch.tensor([example[FEATURES] for example in examples])  # [B, 2, width]
            batch["inputs_embeds"] = features.transpose(0, 1).reshape(-1, 1, features.size(-1))
        else:
            rows = [e["prompt_ids"] + truncated(e, branch, self.max_length) for branch in BRANCHES for e in examples]
            rows += [e["prompt_ids"] for e in examples] if self.gated else []
            batch |= padded(rows, self.pad_token_id)
        for column in ("margin", "weights"):
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return batch


class Passthrough(nn.Module):
    """Stands where a frozen trunk was: its features come in, and go to the head as they are."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


@contextlib.contextmanager
def without_trunk(model: Any, remove: bool) -> Iterator[None]:
    """The model with its head alone, as long as the block lasts."""
    if not remove:
        yield
        return
    head_of(model)
    name = model.base_model_prefix
    trunk = getattr(model, name)
    setattr(model, name, Passthrough())
    try:
        yield
    finally:
        setattr(model, name, trunk)


def member_seed(seed: int, kind: Literal["member", "head"], number: int) -> int:
    """The seed of one member or head of an ensemble: the first 8 bytes of SHA-256 of "SEED KIND NUMBER", modulo 2^32
    (numpy takes no more). With seed + number, ensembles of neighbouring seeds would share all members but one."""
    digest = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**32


def init_head(model: Any, seed: int, outputs: int) -> None:
    """Fresh head weights, normal with standard deviation 1/sqrt(width + 1) (Stiennon et al. 2020, appendix B), from a
    generator of their own: the same on every process and sharding. One head has `seed`, head i of several
    `member_seed(seed, "head", i)`."""
    if not isinstance(model, GenericForSequenceClassification):
        return  # a head of another form keeps what transformers drew for it
    parameter: Any = model.score.weight
    width: int = model.score.in_features
    seeds = [seed] if outputs == 1 else [member_seed(seed, "head", i) for i in range(outputs)]
    rows = [torch.randn(width, generator=torch.Generator().manual_seed(s)) / (width + 1) ** 0.5 for s in seeds]
    with torch.no_grad(), gathered_parameter(parameter if "ds_id" in vars(parameter) else None, writing=True):
        parameter.copy_(torch.stack(rows))


class RewardModelTrainer(FiniteTrainer, CardTrainer, RewardTrainer):
    """Fit scores to preferences: k heads at once, hard or soft labels, any loss of `alignment.rewards.losses`.

    Args:
        model: sequence classification with as many labels as `facts.outputs`.
        facts: what the outputs are.
        loss: the loss.
        train_dataset, eval_dataset: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, instead of which `features`
            are read where they are; optional `label`, `margin`, `weights` (of heads).
        group_by_length: global batches of like length (`LengthGroupedSampler`).
        more: as in TRL; `on_nan` of `FiniteTrainer`.

    Logged, over pairs of all processes: `loss` (mean over heads), `accuracy` (share of pairs whose chosen one scores
    higher, ties half; against the label where labels are soft), `margin`, `score/mean`, `score/std`;
    `accuracy/member_i` with several heads. Of loss general the margin is s(chosen > rejected), and there are no
    scores.
    """

    model: Any
    trains = "reward_model"
    _tag_names = ["alignment", "trl", "reward-model"]
    _name = "alignment"

    def __init__(self, model: Any, facts: Facts, loss: RewardLoss, *, group_by_length: bool = True, **more: Any):
        self.facts, self.loss, self.group_by_length = facts, loss, group_by_length
        self._totals = {"train": Totals(), "eval": Totals()}
        self._scores: list[torch.Tensor] | None = None
        pad = int(model.config.get_text_config().pad_token_id)
        collator = RewardCollator(pad, more["args"].max_length, facts.gated)
        model.config.num_labels = 1  # TRL refuses another number; the loss that needs one is replaced
        super().__init__(model=model, data_collator=collator, **more)
        self.model.config.num_labels = facts.outputs
        self.model.config.get_text_config().pad_token_id = pad
        self.add_callback(EpochOrder(self))

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """Rows are tokens already, checked and counted when they were read."""
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", FEATURES, "label", "margin", "weights"]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = [sum(len(row[c]) for c in columns) for row in rows.select_columns(columns)]
        self.sampler = train_sampler(self.args, lengths, self.group_by_length)
        return self.sampler

    # --- scores and loss ----------------------------------------------------------------------------------------

    def pair_scores(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected), `[B, k]` each; of a general preference model s(chosen > rejected) `[B, 1]` and 0."""
        names = ("inputs_embeds",) if "inputs_embeds" in inputs else ("input_ids", "attention_mask")
        logits = model(**{name: inputs[name] for name in names}, use_cache=False).logits.float()
        if self.facts.kind == "scalar":
            chosen, rejected = logits.chunk(2)
            return chosen, rejected
        score = general_pair(logits, self.facts)
        return score[:, None], torch.zeros_like(score)[:, None]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the pairs of this micro-batch and over heads."""
        chosen, rejected = self.pair_scores(model, inputs)
        losses = self.loss(chosen, rejected, inputs["label"], inputs.get("margin"))
        if "weights" in inputs and self.model.training:
            losses = losses * inputs["weights"]
        self._record(chosen.detach(), rejected.detach(), losses.mean(1), inputs)
        loss = losses.mean()
        if self.model.training:
            learned = inputs["weights"] > 0 if "weights" in inputs else torch.ones_like(losses, dtype=torch.bool)
            beyond = ((chosen - rejected).abs() / self._scale() > LOGIT_RANGE) & learned
            loss = self.watch(loss, [losses, chosen, rejected], inputs, [chosen, rejected], beyond.any())
        return (loss, None) if return_outputs else loss

    def _scale(self) -> float:
        """By what a margin is divided before the loss's sigmoid."""
        return self.loss.temperature if self.facts.kind == "general" else 1.0

    def _out_of_range(self) -> str:
        return f"margins between scores lie beyond {LOGIT_RANGE:g}"

    def _record(
        self, chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            rows = torch.stack([chosen, rejected], dim=1)  # [B, 2, k]
            gathered_rows = self.accelerator.gather_for_metrics(torch.cat([rows.flatten(1), losses[:, None]], dim=1))
            if self._scores is not None:
                self._scores.append(gathered_rows.cpu())
            return
        right = agreement(chosen, rejected, inputs["label"])
        values = {"accuracy": right, "margin": chosen - rejected, "objective": losses}
        if right.size(1) > 1:
            values |= {f"accuracy/member_{i}": right[:, i] for i in range(right.size(1))}
        if self.facts.kind == "scalar":
            scores = torch.cat([chosen, rejected])
            values |= {"score/mean": scores, "score/square": scores**2}
        ids = inputs.get("attention_mask", inputs.get("inputs_embeds"))
        assert ids is not None
        mask = ids if ids.dim() == 2 else torch.ones(ids.shape[:2])
        values |= {"real_tokens": mask.sum().reshape(1), "padded_tokens": mask.new_tensor([mask.numel()])}
        self._totals[mode].add(values)

    def log(self, logs, start_time=None):
        """As transformers', with our sums."""
        found = self._totals["train"].reduce(lambda total: self.accelerator.reduce(total, reduction="sum"))
        if found and "loss" in logs:
            found.pop("objective")
            if "score/square" in found:
                found["score/std"] = max(found.pop("score/square") - found["score/mean"] ** 2, 0.0) ** 0.5
            logs |= found
        self.add_skipped(logs)
        super(RewardTrainer, self).log(logs, start_time)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses and scores of every row of every process, and no predictions."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """As transformers', with loss and accuracy as means over pairs."""
        self._scores = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows, self._scores = torch.cat(self._scores).double(), None
        if bad := (~rows.isfinite().all(1)).nonzero().flatten().tolist():
            raise UserError(not_finite(self.state.global_step, len(bad), bad[0] + 1))
        chosen, rejected = rows[:, :-1].reshape(len(rows), 2, -1).unbind(1)
        data: Any = dataloader.dataset
        label = torch.tensor(data["label"]) if "label" in data.column_names else None
        found = {"loss": rows[:, -1], "accuracy": agreement(chosen, rejected, label), "margin": chosen - rejected}
        output.metrics.update({f"{metric_key_prefix}_{name}": float(value.mean()) for name, value in found.items()})
        self.last_scores = torch.stack([chosen, rejected], dim=1)
        return output

    def scores_of(self, dataset: Dataset) -> torch.Tensor:
        """`[n, 2, k]` scores of chosen and rejected of every row in its order; all processes call it together."""
        self.evaluation_loop(self.get_eval_dataloader(dataset), "scores", prediction_loss_only=True)
        return self.last_scores


def not_finite(step: int, count: int, first: int) -> str:
    """What to tell the user when scores of so many pairs are no numbers after so many optimiser steps."""
    cause = (
        "the model of model.name_or_path gives none before it is trained: its weights are damaged, or model.dtype is "
        "too coarse for it (try float32)"
        if step == 0
        else "training has diverged: lower training.learning_rate, or training.max_grad_norm"
    )
    return f"after {step} training steps the scores of {count} pairs, first pair {first}, are not finite; {cause}"


def general_pair(logits: torch.Tensor, facts: Facts) -> torch.Tensor:
    """s(chosen > rejected) `[B]` from the outputs of B chosen rows, B rejected rows and, where gated, B prompts."""
    if not facts.gated:
        first, second = logits.chunk(2)
        return general_score(unit(first), unit(second))
    planes = facts.outputs // 3
    first, second, prompt = logits.chunk(3)
    gate = prompt[:, 2 * planes :].softmax(-1)  # lambda(x) = softmax(W h_prompt)
    return general_score(unit(first[:, : 2 * planes]), unit(second[:, : 2 * planes]), gate)
