"""What the row layouts add to a trainer: one scoring call, and the comparison of the layouts with unpadded rows.

Not the forward pass itself (`scoring.py`), not what rounding explains (`unpadded.py`), and not a trainer by itself
(`offline.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from alignment.errors import UserError
from alignment.models.adapters import kind_of, why_not_merged, why_not_trained
from alignment.models.scoring import (
    ROW_KEYS,
    Layout,
    build_rows,
    frequencies_switch_at,
    relative_gap,
    repaired,
    sequence_logps,
    why_not_shared,
)
from alignment.objectives.base import Objective
from alignment.trainers.card import CardTrainer
from alignment.trainers.unpadded import Group, allowed, rounding_noise, unpadded_logps, width

# What models raise at arguments that they do not take.
_NOT_TAKEN = (TypeError, ValueError, AttributeError, RuntimeError, AssertionError)


class LayoutTrainer(CardTrainer):
    """Scores batches in the collator's layout; the attributes are set by the trainers that build on it.

    Attributes:
        tolerance: relative difference of log-probs that rounding explains, measured by the last comparison.
        compared: (tokens of the widest row, of the longest prompt and response) that layouts were compared on.
    """

    model: Any
    objective: Objective
    collator: Any
    _branches: int
    tolerance: float = allowed(0.0)
    compared: tuple[int, int] = (0, 0)

    def card_section(self) -> dict[str, Any]:  # noqa: D102 - CardTrainer's
        return {"name": self.objective.card.name, **self.objective.hyperparameters}

    def card_method(self) -> dict[str, str]:  # noqa: D102 - CardTrainer's
        return {"title": self.objective.card.title, "paper": self.objective.card.paper}

    @property
    def _compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, dtype)

    def _score(self, model: Any, inputs: dict[str, torch.Tensor], config: Any = None) -> torch.Tensor:
        """`[B, k]` log-probs, in nats; shared rows are taken apart where the model turned out not to take them."""
        rows = {key: inputs[key] for key in ROW_KEYS}
        if self.collator.layout == "paired" and int(rows["row_segments"].max()) > 1:
            rows = self._paired(rows)  # collated ahead, or in a worker, before the layout was settled
        return sequence_logps(model, config or self.model.config, self.model.dtype, rows, self._branches)

    def _paired(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {key: inputs[key] for key in ROW_KEYS}
        if int(rows["row_segments"].max()) <= 1:
            return rows
        return repaired(rows, self._branches, self.collator.pad_token_id)

    def _compare(self, model: Any, groups: Sequence[Group], config: Any = None) -> None:
        """Compare the layouts with unpadded rows rather than trust a list of architectures.

        Every process must come here with the same groups: they make the same forward passes, and settle on one layout.

        Args:
            model: that scores, wrapped or not.
            groups: token ids, the widest and the longest of what is to be scored among them.
            config: of the model, where it is not the policy's.

        Raises:
            UserError: not even `paired` rows score as unpadded ones do.
        """
        widths = [width(group) for group in groups]
        wide, long = (max(new) for new in zip(self.compared, *widths, strict=True))
        self.compared = wide, long
        config = config or self.model.config
        self._refuse_switching(config, self.compared[1])
        size = max(1, self.args.per_device_train_batch_size)  # a batch of them needs no more memory than training's
        training = model.training
        model.eval()
        reason = ""
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(groups), size):
                reason = self._compare_batch(model, config, groups[start : start + size]) or reason
        model.train(training)
        if self._any_process(bool(reason)) and self.collator.layout != "paired":
            self.collator.layout = "paired"
            reason = reason or "fails on another process"
            warnings.warn(f"layout shared_prefix {reason} on this model; using paired", stacklevel=2)

    def _compare_batch(self, model: Any, config: Any, groups: Sequence[Group]) -> str:
        """What is wrong with the shared layout of these groups; "" where nothing is, or it is not used."""
        prompts, responses = [prompt for prompt, _ in groups], [group for _, group in groups]
        device, dtype, branches = self.accelerator.device, self.model.dtype, len(responses[0])

        def scored(layout: Layout) -> torch.Tensor:
            rows = build_rows(prompts, responses, self.collator.pad_token_id, layout)
            return sequence_logps(model, config, dtype, {k: v.to(device) for k, v in rows.items()}, branches)

        embeddings = self.accelerator.unwrap_model(model).get_input_embeddings()
        try:
            truth = unpadded_logps(model, prompts, responses, device)
            sound = truth.isfinite().all(1).tolist()
            if not all(sound):  # those stop training, or are skipped, by their numbers: `FiniteTrainer`
                rest = [group for group, whole in zip(groups, sound, strict=True) if whole]
                return self._compare_batch(model, config, rest) if rest else ""
            noise = rounding_noise(model, embeddings, self._compute_dtype, prompts, responses, truth)
            self.tolerance = max(self.tolerance, allowed(noise))
            gap = relative_gap(scored("paired"), truth)
            problem = f"differ by a relative {gap:.2g} from those of unpadded rows (rounding explains "
            problem += f"{allowed(noise):.1g})"
            wrong = gap > allowed(noise)
        except _NOT_TAKEN as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            problem, wrong = f"cannot be had ({' '.join(str(error).split())[:120]})", True
        if self._any_process(wrong):
            raise UserError(
                f"model.name_or_path: {config._name_or_path or 'the model'!r} ({config.model_type}): log-probs of "
                f"padded rows {problem}; train a decoder-only model"
            )
        if self.collator.layout == "paired":
            return ""
        try:
            gap = relative_gap(scored("shared_prefix"), truth)
        except _NOT_TAKEN as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"fails ({' '.join(str(error).split())[:120]})"
        return f"gives log-probs that are off by a relative {gap:.2g}" if gap > allowed(noise) else ""

    def _refuse_switching(self, config: Any, longest: int) -> None:
        """Models whose position encoding of every row depends on whether one row of the batch is long."""
        switch = frequencies_switch_at(config)
        if switch is not None and longest > switch[1]:
            kind, tokens = switch
            raise UserError(
                f"data.max_length: rows of up to {longest} tokens: {config._name_or_path or 'the model'!r} has "
                f"rope_type {kind}, which changes every row of a batch that holds one of more than {tokens} tokens; "
                f"keep prompt and response within {tokens}"
            )

    def _any_process(self, flag: bool) -> bool:
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)

    def _refuse_other_precision(self) -> None:
        asked = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no"
        if self.accelerator.mixed_precision != asked:
            raise UserError(
                f"training: the launcher's mixed precision is {self.accelerator.mixed_precision!r}, the recipe's is "
                f"{asked!r}: set training.bf16 or training.fp16, or launch with --mixed_precision {asked}"
            )


def possible_layout(layout: Layout, model: PreTrainedModel, peft_config: Any) -> Layout:
    """`layout`, or `paired`, with a warning, where this model is known not to take shared rows.

    Raises:
        UserError: adapters of this kind cannot be trained.
    """
    given: Any = model
    configs = list(given.peft_config.values()) if is_peft_model(given) else []
    for config in (one.to_dict() for one in (*configs, peft_config) if one is not None):
        if (why := why_not_trained(config)) is not None:
            raise UserError(f"adapter: {kind_of(config)} {why}; train a LoRA adapter")
        if (why := why_not_merged(config)) is not None:
            warnings.warn(
                f"the trained model stays an adapter on its base: `alignment export` cannot merge {kind_of(config)}, "
                f"since {why}",
                stacklevel=3,
            )
    reason = None if layout == "paired" else why_not_shared(model.config)
    if reason is None:
        return layout
    warnings.warn(f"layout shared_prefix is not possible ({reason}); using paired", stacklevel=3)
    return "paired"
