"""`PreferenceTrainer`: TRL's DPOTrainer with the objective, the rows and the reference replaced.

Overrides: data preparation (token ids taken as they are), collation, sampler, loss, reference, logging. Kept from TRL:
PEFT, evaluation, checkpoints, DeepSpeed/FSDP, model card. Tested with TRL 1.16 only; the
contract test names what moved. Not here: recipes and argv (`alignment.runs`), maths (`alignment.objectives`), forward
passes (`scoring.py`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from alignment.data.pipeline import prepare_rows
from alignment.data.preferences import ID_COLUMNS, NUMBER_COLUMNS
from alignment.errors import UserError
from alignment.models.ends import settle_ends
from alignment.models.scoring import Layout, scored_tokens
from alignment.objectives import PairLogps
from alignment.objectives.base import Objective, reads_reference, row_columns
from alignment.objectives.batch import NEEDS
from alignment.trainers.calibration import Calibration
from alignment.trainers.checks import losses_and_slopes, step_zero_problem
from alignment.trainers.collation import (
    BRANCHES,
    FROZEN_COLUMNS,
    PairCollator,
    prompt_fits,
    train_sampler,
    truncated,
)
from alignment.trainers.degree import COLUMNS, DegreeTrainer, cut_copies
from alignment.trainers.finite import NATS_PER_TOKEN, FiniteTrainer
from alignment.trainers.frozen_check import FrozenCheck
from alignment.trainers.layout import possible_layout
from alignment.trainers.metrics import DisplacementAlarm, EpochOrder, Totals, agreement
from alignment.trainers.normalized import NormalizedGradient
from alignment.trainers.reference import ReferenceTrainer
from alignment.trainers.unpadded import Group, column_widths, extremes

JUDGED = ("reward", "preference", "log_odds")  # what a judge has written into the rows
HINTS = {"log_odds": "; gpo needs log-odds, and an oracle that answers 0 or 1 has none: use sppo or a soft oracle"}


class PreferenceTrainer(FiniteTrainer, ReferenceTrainer, DegreeTrainer):
    """Train a language model on preference pairs with any offline objective of the registry.

    The reference is the model that training starts from: a frozen copy of `model` as it is in memory (not what lies on
    disk under its name), the base model where a fresh LoRA adapter is trained, a frozen copy of the adapter where an
    existing one is trained on, or `ref_model` where one is given. Objectives that need no reference load none. The
    previous iterate (inpo) is the reference, or, where `ref_model` is another model than the start, the start.

    Args:
        model: a causal language model or a PeftModel.
        objective: from `alignment.objectives.get_objective`.
        args: TRL's `DPOConfig`; its loss options are not read.
        train_dataset, eval_dataset: columns of `alignment.data.preferences`.
        processing_class: the tokenizer.
        ref_model: an explicit reference; under ZeRO-3 full fine-tuning it must be given (parameters are sharded).
        start_is_reference: whether `ref_model` holds the weights that training starts from; the step-0 check then
            demands implicit rewards of 0. By default so exactly if no `ref_model` is given.
        start_model: frozen weights that training starts from; ZeRO-3 full fine-tuning needs them beside another
            `ref_model` for an objective that reads the previous iterate.
        precompute: score all pairs under the frozen models once, before training, and keep the numbers in the cache
            (`alignment.trainers.frozen`); no frozen model then stays in memory, and none needs to be given for
            ZeRO-3.
        peft_config: train a fresh adapter.
        layout: `shared_prefix` computes a prompt once for all its responses; falls back to `paired`, with one warning.
        group_by_length: global batches of like length (`LengthGroupedSampler`).
        displacement_alarm: nats that chosen may fall below the start before the warning in words.
        normalized_gradient: both responses of a pair push equally (`NormalizedGradient`).
        more: `callbacks`, `optimizers`, `compute_metrics` … as in TRL; `on_nan` of `FiniteTrainer`.

    Raises:
        UserError: the data lack a column that the objective needs, a prompt fills `max_length` in every row, or the
            step-0 check fails.
    """

    model: Any  # transformers says `Module | None`
    _tag_names = ["alignment", "trl", "preference"]
    _name = "alignment"

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        start_is_reference: bool | None = None,
        start_model: PreTrainedModel | None = None,
        precompute: bool = False,
        peft_config: Any = None,
        layout: Layout = "shared_prefix",
        group_by_length: bool = True,
        displacement_alarm: float = 10.0,
        normalized_gradient: bool = False,
        **more: Any,
    ):
        self.objective: Objective = objective
        self.group_by_length = group_by_length
        self.start_is_reference = ref_model is None if start_is_reference is None else start_is_reference
        self._needs_reference = reads_reference(objective)
        self._precompute = precompute and self._needs_reference
        self._calibrated = "calibration" in objective.needs
        self._branches = 3 if self._calibrated else 2
        self._totals = {"train": Totals(), "eval": Totals()}
        self._calibration = {"train": Calibration(objective), "eval": Calibration(objective)}
        self._layout_settled = self._begun = self._gradient_seen = False
        self._check = FrozenCheck(self)
        data = [train_dataset] if eval_dataset is None else [train_dataset, eval_dataset]
        settle_ends(model, processing_class)
        layout = possible_layout(layout, model, peft_config)
        ref_model = self._plan_frozen(model, ref_model, start_model, peft_config, data, processing_class)
        self.collator = PairCollator(
            processing_class.pad_token_id, args.max_length, layout, self._calibrated, self.copied
        )
        # TRL builds a reference from disk unless it is given, there is an adapter, or log-probs are precomputed: the
        # latter, with an empty `_precompute_ref_logps`, is its way to have none.
        args.precompute_ref_log_probs = ref_model is None and peft_config is None and not is_peft_model(model)
        super().__init__(
            model=model,
            ref_model=ref_model if self._needs_reference else None,
            args=args,
            data_collator=self.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **more,
        )
        self._refuse_other_precision()
        self._extremes = self._extreme_groups()
        if self.start_model is not None:
            self.start_model = self._prepared(self.start_model)
        if self._precompute:
            self._add_frozen_columns()
        if self.eval_dataset is not None:
            self.eval_dataset = self._filled(self.eval_dataset)
        self.attach_degree_head(args.max_length)
        self._normalize = NormalizedGradient(self) if normalized_gradient else None
        self.add_callback(DisplacementAlarm(displacement_alarm))
        self.add_callback(EpochOrder(self))
        self.add_callback(self._check)
        if self.aux_loss_enabled:
            warnings.warn("the router's auxiliary loss is not added: only the objective is trained", stacklevel=2)

    # --- data ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Token ids given with the data are used as they are; text is tokenised as TRL does. Lost rows are counted."""
        name = self.objective.card.name
        for need in (need for need in (*JUDGED, "calibration") if need in self.objective.needs):
            missing = [
                c for c in NEEDS[need] if c not in dataset.column_names and f"{c}_ids" not in dataset.column_names
            ]
            if missing:
                raise UserError(
                    f"{dataset_name} data: objective {name!r} needs column {missing[0]!r}, and the rows have only "
                    f"{', '.join(dataset.column_names)}{HINTS.get(need, '')}"
                )
        before = len(dataset)
        if set(ID_COLUMNS) <= set(dataset.column_names):
            if self._calibrated and "calibration_ids" not in dataset.column_names:
                raise UserError(f"{dataset_name} data: the rows bring token ids, but no calibration_ids")
            dataset = dataset.filter(prompt_fits, fn_kwargs={"max_length": args.max_length})
            reasons = f"their prompts have max_length {args.max_length} tokens or more"
        else:
            settings: dict[str, Any] = {"max_length": args.max_length, "calibration": self._calibrated}
            settings["reads"] = row_columns(self.objective)
            prepared = prepare_rows(
                dataset.to_list(), f"{dataset_name} data", processing_class, role=dataset_name, **settings
            )
            dataset = prepared.dataset
            reasons = ", ".join(f"{count} {reason}" for reason, count in prepared.counts.items())
        if not len(dataset):
            raise UserError(f"{dataset_name} data: none of {before} rows is usable ({reasons}); raise data.max_length")
        if len(dataset) < before:
            warnings.warn(
                f"{dataset_name} data: {before - len(dataset)} of {before} rows are left out: {reasons}", stacklevel=2
            )
        return self.with_copies(dataset, processing_class, args.seed, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        extra = ["calibration_ids", "counted", *COLUMNS, *NUMBER_COLUMNS, *FROZEN_COLUMNS]
        self._signature_columns += [c for c in extra if c not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """Nothing: either there is no reference, or `_add_frozen_columns` does it (see `__init__`)."""
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        columns = [f"{c}_ids" for c in ("prompt", *BRANCHES[: self._branches])]
        lengths = [sum(len(row[c]) for c in columns) for row in dataset.select_columns(columns)]
        self.sampler = train_sampler(self.args, lengths, self.group_by_length)
        return self.sampler

    # --- log-probs ----------------------------------------------------------------------------------------------

    def _extreme_groups(self) -> list[Group]:
        """Token ids of the widest, the longest, the narrowest and a middling row of all that will be scored.

        Raises:
            UserError: a row is longer than the model's position encoding stands.
        """
        branches, limit = BRANCHES[: self._branches], self.collator.max_length
        rows: list[Any] = []
        both: tuple[Any, Any] = self.train_dataset, self.eval_dataset
        for data in both:
            if data is None:
                continue
            widths = column_widths(data, branches, limit)
            if self.copied:
                copies = [sum(map(len, ids)) for ids in data["degree_ids"]]
                widths = [(wide + more, longest) for (wide, longest), more in zip(widths, copies, strict=True)]
            rows += [(widths[i], data[i]) for i in extremes(widths)]
        rows = [rows[i] for i in extremes([w for w, _ in rows])]
        self._refuse_switching(self._ref_config or self.model.config, max(w[1] for w, _ in rows))
        self._refuse_switching(self.model.config, max(w[1] for w, _ in rows))
        return [
            (
                row["prompt_ids"],
                [
                    *(cut_copies(row, limit, len(self.copied))[0] if self.copied else []),
                    *(truncated(row, branch, limit) for branch in branches),
                ],
            )
            for _, row in rows
        ]

    def _settle_layout(self, model: Any, config: Any = None) -> None:
        """Before the first row is scored: compare the layouts on the extremes of all rows, so that none is wider."""
        self._layout_settled = config is None
        self._compare(model, self._extremes, config)
        if self._layout_settled and self._ref_config is not None and self.ref_model is not None:
            self._compare(self.ref_model, self._extremes, self._ref_config)  # a model of its own

    def pair_logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> PairLogps:
        """Every column that the objective may read, from one policy pass and at most one reference pass."""
        degrees: dict[str, torch.Tensor] = {}
        if self.copied:
            policy, degrees = self.score_with_degrees(model, inputs, self._branches)
        else:
            policy = self._score(model, inputs)
        columns: dict[str, torch.Tensor] = {b: policy[:, j] for j, b in enumerate(BRANCHES[: self._branches])}
        if self._needs_reference:
            columns |= self._frozen_columns("ref", model, inputs)
        if self._scores_start:
            columns |= self._frozen_columns("prev", model, inputs)
        elif "previous" in self.objective.needs:
            # Iteration 1 of an iterative method: the previous iterate is the reference, unless the data bring it.
            columns |= {f"prev_{b}": inputs.get(f"prev_{b}", columns[f"ref_{b}"]) for b in BRANCHES[:2]}
        lengths = [f"{b}_length" for b in BRANCHES[: self._branches]]
        for name in (*lengths, *(column for need in JUDGED for column in NEEDS[need]), "label"):
            if name in inputs:
                columns[name] = inputs[name].to(policy.dtype)
        return PairLogps(**columns, **degrees)

    def push(self, inputs: dict[str, torch.Tensor]) -> tuple[PairLogps, torch.Tensor]:
        """The columns of `pair_logps`, and `[B, branches]`: -dL/dlog π of each response in its own pair's loss.

        These are the weights of the responses' gradients in a step, the rescaling by `normalized_gradient` included.

        Args:
            inputs: from the collator, `paired`, on the device.
        """
        with torch.no_grad(), self.accelerator.autocast():
            batch = self.pair_logps(self.model, inputs)
        columns = batch.columns()
        leaves = {b: columns[b].detach().clone().requires_grad_(True) for b in BRANCHES[: self._branches]}
        with torch.enable_grad():
            moving = replace(batch, **leaves)
            if self._normalize is not None:
                moving = self._normalize(moving, inputs)
            total = self.objective.loss(moving).sum()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return batch, torch.stack([torch.zeros_like(batch.chosen) if g is None else -g for g in found], dim=1)

    # --- loss and logging ---------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean of the objective over the pairs of this micro-batch."""
        if return_outputs:
            raise UserError("training: `compute_metrics` needs logits, which are not kept; leave it out")
        if not self._layout_settled:
            self._settle_layout(model)
        if self.model.training and not self._begun:
            self._check.show(model, self._paired(inputs))
        batch = self.pair_logps(model, inputs)
        if self.model.training and not self._begun and not self._any_process(not _finite(batch)):
            self._begin(model, inputs, batch)
        if self.model.training and not self._gradient_seen:
            self._look_for_gradient(batch)
        if self._normalize is not None and self.model.training:
            batch = self._normalize(batch, self._paired(inputs))
        losses = self.objective.loss(batch)
        self._record(inputs, batch, losses)
        return self._watched(losses, batch, inputs)

    def _watched(self, losses: torch.Tensor, batch: PairLogps, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss, with what `FiniteTrainer` wants to know of its rows."""
        columns, branches = batch.columns(), BRANCHES[: self._branches]
        policy = [columns[b] for b in branches]
        rows = [losses, *policy, *(value for name, value in columns.items() if name.startswith(("ref_", "prev_")))]
        if not self.model.training:
            self.watch_held_out(rows)
            return losses.mean()
        each = [policy[j].detach().abs() / inputs[f"{b}_length"].clamp(min=1) for j, b in enumerate(branches)]
        beyond = (torch.stack(each) > NATS_PER_TOKEN).any()
        return self.watch(losses.mean(), rows, inputs, policy, beyond)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation has a loss and no logits."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluate(self, *args, **kwargs):
        """As TRL's; throughput counts from here, and training's from its end."""
        self._totals["eval"].restart()
        metrics = super().evaluate(*args, **kwargs)
        self._totals["train"].restart()
        return metrics

    def _begin(self, model: Any, inputs: dict[str, torch.Tensor], batch: PairLogps) -> None:
        """Before the first update: the step-0 check of a fresh run; of a resumed one, that its reference is the same.

        `start.json` keeps the first batch of the main process with its log-probs under the starting model.
        """
        self._begun = True
        starts_at_reference = self.start_is_reference and self._needs_reference
        if self.state.global_step > self.skipped_here:
            self._gradient_seen = True  # looked for at the start; the end of a run may well have none left
            # Precomputed: there is no model to ask; the run directory compares `frozen_digests` instead.
            self._check.resume(model, starts_at_reference)
        else:
            paired = self._paired(inputs)
            model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                start = self._score(model, paired)
            model.train()
            problem = step_zero_problem(
                self.objective, batch, start, self.tolerance, starts_at_reference, not self._precompute
            )
            if self._any_process(problem is not None):
                raise UserError(f"step-0 check: {problem or 'another process stopped'}")
            self._check.begin(model, paired, start)
        self._totals["train"].restart()

    def _look_for_gradient(self, batch: PairLogps) -> None:
        """Stop where the objective pushes no pair of any process in the first three steps: nothing would be learned.

        A single batch may well have no gradient: pairs whose scores tie, under an objective that reads them.
        """
        self._gradient_seen = self._any_process(bool((losses_and_slopes(self.objective, batch)[1] > 0).any()))
        if not self._gradient_seen and self.state.global_step >= 3:
            self._refuse_no_gradient()

    def _refuse_no_gradient(self) -> None:
        raise UserError(
            f"objective {self.objective.card.name!r} has had no gradient on any pair in {self.state.global_step} steps"
        )

    def train(self, *args, **kwargs):
        """As TRL's; a run too short for the look-out is judged at its end."""
        result = super().train(*args, **kwargs)
        if self._begun and not self._gradient_seen:
            self._refuse_no_gradient()
        return result

    def _filled(self, dataset: Dataset) -> Dataset:
        """The held-out rows, on several processes with repeats that are not counted: every process must score equally
        often, and accelerate's own repeats would be counted."""
        whole = self.args.eval_batch_size * self.args.world_size
        repeats = -len(dataset) % whole if self.args.world_size > 1 else 0
        if not repeats:
            return dataset
        rows = list(range(len(dataset)))
        filled = dataset.select(rows + (rows * whole)[:repeats])
        return filled.add_column("counted", [1.0] * len(dataset) + [0.0] * repeats)

    def _record(self, inputs: dict[str, torch.Tensor], batch: PairLogps, losses: torch.Tensor) -> None:
        if "counted" in inputs and not bool((kept := inputs["counted"] > 0).all()):
            if not bool(kept.any()):
                return
            # The two token counts below keep the repeats: they are work that was done.
            batch, losses = batch.map(lambda column: column[kept]), losses[kept]
            inputs = inputs | {k: v[kept] for k, v in inputs.items() if k == "degree_lengths"}
        segments = inputs.get("degree_row_segments", inputs["row_segments"])
        chosen, rejected = (r.detach() for r in self.objective.rewards(batch))
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": agreement(chosen, rejected, batch.label),
            "logps/chosen": batch.chosen,
            "logps/rejected": batch.rejected,
            "saturated": self.objective.saturated(batch).double(),
            "real_tokens": scored_tokens(segments),
            "padded_tokens": torch.ones_like(segments),
        } | self.degree_metrics(batch, inputs)
        if (capped := self.objective.capped(batch)) is not None:
            values["capped"] = capped.double()
        if self._needs_reference:
            # E_ref[log ref/π] = KL(ref ‖ π) if the responses are samples of the reference; on other data it is only
            # the mean drift of these responses.
            values["kl"] = -torch.cat([batch.log_ratio_chosen, batch.log_ratio_rejected])
            if self.start_is_reference:
                values["displacement/chosen"] = batch.log_ratio_chosen
                values["displacement/rejected"] = batch.log_ratio_rejected
        if not self.model.training:
            values["loss"] = losses
        mode = "train" if self.model.training else "eval"
        self._totals[mode].add(values)
        if self.objective.card.bradley_terry:
            self._calibration[mode].add(chosen - rejected, batch.label)

    def log(self, logs, start_time=None):
        """Adds the metrics since the last line, over all processes, to what transformers logs."""
        mode = "train" if self.model.training else "eval"
        reduce = partial(self.accelerator.reduce, reduction="sum")
        found = self._totals[mode].reduce(reduce)
        if self.objective.card.bradley_terry:
            found |= self._calibration[mode].reduce(reduce, self.accelerator.device)
        if found and mode == "train" and "displacement/chosen" not in found and self._check.start is not None:
            rows, start = self._check.start  # no reference tells where this step's pairs began: the first batch does
            with torch.no_grad(), self.accelerator.autocast():
                moved = (self._score(self.model_wrapped, rows) - start).mean(0)
            found |= {"displacement/chosen": float(moved[0]), "displacement/rejected": float(moved[1])}
        if "loss" in found:  # transformers' is a mean of means, with repeats: it depends on batches and processes
            logs["eval_loss"] = found.pop("loss")
        self._metrics[mode].update({name: [value] for name, value in found.items()})
        super().log(logs, start_time)


def _finite(batch: PairLogps) -> bool:
    """Whether every column is; `FiniteTrainer` names the rows where one is not."""
    return all(bool(value.isfinite().all()) for value in batch.columns().values())
