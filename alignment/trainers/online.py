"""`OnlinePreferenceTrainer`: TRL's RLOOTrainer with prompts, rollouts, judgement and loss replaced.

Kept from TRL: generation (transformers or vLLM), PEFT, checkpoints, DeepSpeed, logging of completions. One rollout is
sampled by all processes, scored under the frozen models, judged, and then known to every process, so that which
prompts make up a step depends on no number of processes. Tested with TRL 1.16 only. Not here: how responses are drawn
(`drawing`), judged (`judging`), collated (`batches`) and logged (`rollout_log`); EGPO's look-ahead (`lookahead`);
recipes (`alignment.runs.on_policy`).
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import RLOOConfig

from alignment.errors import UserError
from alignment.models import chains
from alignment.models.ends import settle_ends
from alignment.models.scoring import Layout, branch_tokens, forward_rows, scored_tokens
from alignment.objectives.base import Objective
from alignment.rewards.base import PreferenceOracle, RewardFunction
from alignment.trainers import judging
from alignment.trainers.batches import RolloutCollator, group_logps, labelled_pairs, sample_pairs
from alignment.trainers.collation import order_seed
from alignment.trainers.drawing import Sampler
from alignment.trainers.finite_rollout import FiniteRolloutTrainer
from alignment.trainers.frozen_check import FrozenCheck
from alignment.trainers.layout import possible_layout
from alignment.trainers.metrics import Totals
from alignment.trainers.rollout import (
    CHECKPOINT,
    ROLLOUTS,
    PromptOrder,
    Record,
    Replay,
    Rollouts,
    append_rollout,
    read_records,
)
from alignment.trainers.rollout_log import STAGES, RolloutLogTrainer


class OnlinePreferenceTrainer(FiniteRolloutTrainer, RolloutLogTrainer):
    """Train a language model on responses that it samples itself, with any on-policy objective of the registry.

    The objective's `card.batch` says what is sampled: two responses a prompt ("samples"; "pairs" are labelled first),
    or G chains of thought with a reference answer ("groups"). One optimizer step trains on `global_batch` prompts; a
    prompt whose samples cannot be judged is left out of the mean and counted.

    Args:
        model: a causal language model or a PeftModel.
        objective: from `alignment.objectives.get_objective`.
        args: TRL's `RLOOConfig`; its loss and generation options are not read, except for max_completion_length and
            vLLM's.
        prompts: columns `prompt`, `prompt_ids`, and `answer` for "groups".
        processing_class: the tokenizer.
        rollouts: how samples are drawn.
        reward, oracle: what judges; which one the objective's card says.
        ref_model: an explicit reference; under ZeRO-3 full fine-tuning it must be given.
        start_is_reference: whether the reference holds the weights that training starts from.
        peft_config: train a fresh adapter.
        layout: as in `PreferenceTrainer`.
        more: as in TRL; `on_nan` of `FiniteTrainer`.

    Raises:
        UserError: settings that do not fit each other, or a step-0 check that fails.
    """

    _tag_names = ["alignment", "trl", "preference", "on-policy"]
    _name = "alignment"

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        args: RLOOConfig,
        prompts: Dataset,
        processing_class: PreTrainedTokenizerBase,
        rollouts: Rollouts,
        *,
        reward: RewardFunction | None = None,
        oracle: PreferenceOracle | None = None,
        ref_model: PreTrainedModel | None = None,
        start_is_reference: bool | None = None,
        peft_config: Any = None,
        layout: Layout = "shared_prefix",
        **more: Any,
    ):
        self.objective, self.rollouts, self.reward, self.oracle = objective, rollouts, reward, oracle
        self.kind: Any = objective.card.batch
        self.start_is_reference = ref_model is None if start_is_reference is None else start_is_reference
        self._forces = "answer" in objective.needs  # a reference answer is put behind each chain of thought
        self._needs_reference = bool({"reference", "ref_calibration"} & set(objective.needs))
        self._needs_reference |= rollouts.calibration or bool(rollouts.opponent)
        self._precompute = False
        self._branches = 3 if rollouts.calibration else rollouts.samples
        self.draw_batch = rollouts.batch
        self.undrawable: set[int] = set()
        self._checked = self._begun = self._said_lost = self._said_unmarked = False
        self._totals = {"train": Totals(), "eval": Totals()}
        self._seconds, self._tokens = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)
        self._check = FrozenCheck(self)
        self._current: tuple[int, int] | None = None
        self._records: list[Record] = []
        self.prompts, self.columns = prompts, prompts.to_dict()
        self.order = PromptOrder(
            len(prompts), _global_batch(args), rollouts.per_rollout, rollouts.inner_epochs, order_seed(args)
        )
        self.replay = None if rollouts.replay is None else Replay(rollouts.replay)
        reference = self._plan_frozen(model, ref_model, None, peft_config, [prompts], processing_class)
        self.collator = RolloutCollator(
            self.columns["prompt_ids"],
            int(processing_class.pad_token_id or 0),
            possible_layout(layout, model, peft_config),
            self.kind,
            rollouts.calibration,
        )
        settle_ends(model, processing_class)  # TRL's `generate` stops where the model's configuration says
        args.beta = 0.0  # TRL would read a reference of its own from disk
        args.disable_dropout = True  # TRL's on-policy default is off: samples and log-probs would not be one policy's
        super().__init__(
            model=model,
            reward_funcs=[_not_asked],
            args=args,
            train_dataset=prompts,
            processing_class=processing_class,
            peft_config=peft_config,
            **more,
        )
        self._refuse_other_precision()
        if reference is not None:
            self.ref_model = self._prepared(reference.requires_grad_(False))
        self._refuse_unfit()
        self.add_callback(_StepBegin(self))
        self.add_callback(self._check)

    def _refuse_unfit(self) -> None:
        settings: Any = self.args
        longest = max(map(len, self.columns["prompt_ids"])) + settings.max_completion_length
        self._refuse_switching(self.model.config, longest)
        if self.rollouts.look_ahead:
            if self.args.fp16:
                raise UserError("training.fp16: the look-ahead of egpo has no loss scaling; use bf16 or neither")
            if self.is_fsdp_enabled:
                raise UserError("objective egpo: its look-ahead is not built for FSDP; launch with DeepSpeed or DDP")
        if self.kind == "groups":
            for answer in self.columns["answer"]:
                chains.check_marker(self.processing_class, self.rollouts.marker, self.rollouts.separator, answer)

    # --- data: tickets instead of rows --------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One empty item per forward pass: `_prepare_inputs` knows from the step what it trains on."""
        accumulation = self.args.gradient_accumulation_steps
        passes: Any = [{"pass": i} for i in range(self.order.steps_per_epoch * accumulation)]
        return DataLoader(passes, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
        """The next forward pass's share of this process of the step's prompts."""
        inputs = self._micro_batches[self._micro]
        self._micro += 1
        return self._on_device(inputs)

    # --- a step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the first forward pass of an optimizer step: sample where a new rollout begins; EGPO's look-ahead."""
        self.model.train()
        rollout, places = self.order.step(self.state.global_step)
        if self._current is None:
            self._load_kept(rollout)
            self._refuse_short_replay(rollout)
        if self._current != (rollout, 0):
            self._roll_out(rollout, 0)
        if not self._begun:
            self._begin()
        if self.rollouts.look_ahead:
            self._look_ahead(rollout, places)
        self._share_out(places)

    def _share_out(self, places: list[int]) -> None:
        """This process's forward passes of a step, and how much each prompt weighs."""
        records = [self._records[i] for i in places]
        share = len(records) // self.accelerator.num_processes
        start = share * self.accelerator.process_index
        size = self.args.per_device_train_batch_size
        own = records[start : start + share]
        self._micro, self._micro_batches = 0, [own[i : i + size] for i in range(0, share, size)]
        self._learned = sum(not r.skipped for r in records) / len(records)  # of all processes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean of the objective over the step's prompts that can be learned from.

        Each forward pass has the same number of prompts, so that the mean over passes and processes, which
        transformers takes, is the mean over all prompts; dividing by the learned share makes it the wanted one.
        """
        if return_outputs:
            raise UserError("training: `compute_metrics` needs logits, which are not kept; leave it out")
        began = time.perf_counter()
        batch, policy = self._batch(model, inputs)
        losses = self.objective.loss(batch)
        learned = inputs["learned"]
        loss = (losses * learned).sum() / len(learned) / max(self._learned, 1e-12)
        self._record(inputs, batch, losses, policy)
        self._spent("train", began, int(scored_tokens(inputs["row_segments"]).sum()))
        return self.watch_prompts(loss, batch, losses, policy, inputs)

    def _batch(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """(what the objective reads, the policy's log-probs `[B, k]`)."""
        if self.kind == "groups":
            tokens = self._tokens_of(model, inputs)
            return group_logps(inputs, tokens, self._forces), tokens.sum(-1)
        policy = self._score(model, inputs)
        return (labelled_pairs if self.kind == "pairs" else sample_pairs)(inputs, policy), policy

    def _tokens_of(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, k, L]` log-probs of the responses' tokens."""
        rows = self._paired(inputs) if self.collator.layout == "paired" else inputs
        logits = forward_rows(model, self.model.config, self.model.dtype, rows).logits
        return branch_tokens(logits, rows, self._branches)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As TRL's; the backward pass counts as training time."""
        began, before = time.perf_counter(), self._seconds["train"]
        result = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["train"] = before + time.perf_counter() - began
        return result

    # --- rollouts ------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int, phase: int) -> None:
        """Sample, judge and score one rollout; every process then holds all of it."""
        rows = self.order.rows(rollout)
        share = len(rows) // self.accelerator.num_processes
        mine = slice(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))
        began = time.perf_counter()
        if self.replay is not None:
            records = self._recorded(self.replay, rollout, phase)[mine]
            self._refuse_foreign(records)
        else:
            with self._seeded(rollout, phase):
                records = self._sampled(rows[mine])
        self._spent("sample", began, sum(len(ids) for r in records for ids in r.responses))
        began = time.perf_counter()
        self._judge(records, [rollout * len(rows) + i for i in range(len(rows))][mine])
        self._compare_if_wider(records)
        self._score_frozen_columns(records)
        self._records = gather_object(records)
        self._current = (rollout, phase)
        self._spent("score", began, 0)
        self._describe(self._records, "look_ahead/" * phase)  # the half-step policy's numbers are its own
        if self.accelerator.is_main_process:
            append_rollout(Path(str(self.args.output_dir)) / ROLLOUTS, rollout, phase, self._records)
        # A policy that has learned may tie everywhere once; one that ties from the start has the wrong judge.
        reasons = {r.skipped for r in self._records}
        if "" not in reasons and (rollout == 0 or judging.UNSCORED in reasons):
            raise UserError(
                f"rollout {rollout}: none of {len(self._records)} prompts can be learned from "
                f"({self._records[0].skipped}); look at {ROLLOUTS}"
            )
        if self.kind == "groups":
            self._say_if_unmarked(rollout)

    def _say_if_unmarked(self, rollout: int) -> None:
        """Samples without the marker teach nothing, not even to write it: a run of those goes nowhere, silently."""
        if any(any(r.valid) for r in self._records) or self._said_unmarked:
            return
        said = f"rollout {rollout}: no sample has the marker {self.rollouts.marker!r} (rollout.answer.marker)"
        if rollout == 0:
            raise UserError(
                f"{said}, and nothing can be learned; look at {ROLLOUTS}, let samples be longer "
                "(generation.max_new_tokens), or start from a model that writes it"
            )
        self._said_unmarked = True
        if self.accelerator.is_main_process:
            warnings.warn(f"{said}: nothing is learned from it; watch samples/valid", stacklevel=2)

    def _sampled(self, rows: list[int]) -> list[Record]:
        """Samples of these prompts, from the policy as it is now."""
        prompts, settings = [self.columns["prompt_ids"][row] for row in rows], self.rollouts
        self.undrawable.clear()
        drawn = self._draw(prompts, settings.samples, settings.sampler)
        others: list[list[list[int]]] | None = None
        if settings.opponent is not None:
            source = "mixture" if settings.opponent else "policy"
            others = self._draw(prompts, 1, Sampler(), source=source, share=settings.opponent)
        elif settings.calibration:
            others = self._draw(prompts, 1, Sampler(), source="reference")
        records = []
        for i, (row, group) in enumerate(zip(rows, drawn, strict=True)):
            texts, ended = [self._text(ids) for ids in group], [self._ended(ids) for ids in group]
            record = Record(row, group, texts, ended, self._prompt_text(row))
            if others is not None:
                record.opponent, record.opponent_text = others[i][0], self._text(others[i][0])
            for ids in (*group, *([] if record.opponent is None else [record.opponent])):
                if not ids:
                    raise UserError(f"prompt {row + 1}: the model gave an empty response; it has no log-probability")
            records.append(record)
        self.refuse_undrawable(records)
        return records

    def _recorded(self, replay: Replay, rollout: int, phase: int) -> list[Record]:
        opponent = self.rollouts.opponent is not None or self.rollouts.calibration
        return replay.records(rollout, phase, self.order.rows(rollout), self.rollouts.samples, opponent)

    def _refuse_short_replay(self, first: int) -> None:
        """Before the first step: what a run cannot have to its end, it shall not begin on."""
        if self.replay is None:
            return
        last, _ = self.order.step(self.state.max_steps - 1)
        for rollout in range(first, last + 1):
            for phase in range(1 + self.rollouts.look_ahead):
                self._recorded(self.replay, rollout, phase)

    def _refuse_foreign(self, records: list[Record]) -> None:
        """Recorded samples of other prompts, or of a model with another tokenizer."""
        for r in records:
            drawn = list(zip(r.texts, r.responses, strict=True))
            drawn += [] if r.opponent is None else [(r.opponent_text, r.opponent)]
            if r.prompt != self._prompt_text(r.row) or any(self._text(ids) != text for text, ids in drawn):
                raise UserError(
                    f"generation.replay: {self.rollouts.replay}: prompt {r.row + 1} or its samples read otherwise "
                    "here: the file is of other prompts or another tokenizer"
                )

    def _prompt_text(self, row: int) -> str:
        tokenizer: Any = self.processing_class
        return str(tokenizer.decode(self.columns["prompt_ids"][row], skip_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        tokenizer: Any = self.processing_class
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.eos_token_ids

    def _judge(self, records: list[Record], places: list[int]) -> None:
        prompts = [self.columns["prompt"][r.row] for r in records]
        if self.kind == "groups":
            for record in records:
                self._verify(record)
        elif self.kind == "pairs":
            noise = self.rollouts.label_noise
            ties = "reward" in self.objective.needs  # it regresses on the gap: 0 is a target like any other
            judging.label_pairs(records, prompts, self.reward, self.oracle, noise, places, self.args.seed, ties)
        else:
            judging.judge_samples(records, prompts, self.objective.needs, self.reward, self.oracle)

    def _verify(self, record: Record) -> None:
        """Chains cut at the marker, the reference answer behind them; a verifier's samples stay as they are."""
        answer, settings = str(self.columns["answer"][record.row]), self.rollouts
        record.valid, record.verified, record.spans, record.scored = [], [], [], []
        for i, ids in enumerate(record.responses):
            said = chains.sampled_answer(record.texts[i], settings.marker)
            record.verified.append(float(said == answer.strip()))
            chain = chains.cut_chain(ids, settings.marker, self.processing_class) if self._forces else None
            if chain is None or not chain[0]:
                # Without a marker nothing can be forced behind it; a verifier reads the whole sample.
                record.valid.append(float(said is not None and not self._forces))
                record.spans.append((len(ids), len(ids), len(ids)))
                record.scored.append(ids)
                continue
            chat = not isinstance(self.columns["prompt"][record.row], str)
            tail, before = chains.forced_answer(self.processing_class, chain[1], settings.separator, answer, chat)
            record.valid.append(1.0)
            record.spans.append((len(chain[0]), len(chain[0]) + before, len(chain[0]) + len(tail)))
            record.scored.append(chain[0] + tail)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """As TRL's, with the rollout in use: a resumed run goes on with the same samples."""
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process and self._current is not None:
            beside = folder / f".{CHECKPOINT}"
            beside.unlink(missing_ok=True)
            append_rollout(beside, *self._current, self._records)
            shutil.move(beside, folder / CHECKPOINT)

    def train(self, resume_from_checkpoint=None, **more):
        """As TRL's."""
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    def _load_kept(self, rollout: int) -> None:
        """The checkpoint's rollout, if the next step is in it; lines of later rollouts are repeated, and removed."""
        file = Path(str(self.args.output_dir)) / ROLLOUTS
        if self.accelerator.is_main_process and file.is_file():
            begins_it = self.order.step(self.state.global_step - 1)[0] != rollout if self.state.global_step else True
            first = rollout if begins_it or self.rollouts.look_ahead else rollout + 1
            kept = [entry for entry in read_records(file, skip_unfinished=True) if entry[0] < first]
            beside = file.with_name(f".{ROLLOUTS}")
            beside.write_text("")
            for number, phase, record in kept:
                append_rollout(beside, number, phase, [record])
            os.replace(beside, file)
        if self._resumed is None or self.order.step(self.state.global_step - 1)[0] != rollout:
            return
        kept_file = self._resumed / CHECKPOINT
        entries = list(read_records(kept_file)) if kept_file.is_file() else []
        if not entries or entries[0][:2] != (rollout, 0):
            raise UserError(f"--resume: {self._resumed} falls inside rollout {rollout} and does not hold it")
        self._records, self._current = [record for _, _, record in entries], (rollout, 0)


class _StepBegin(TrainerCallback):
    """Calls the trainer before the first forward pass of each optimizer step."""

    def __init__(self, trainer: OnlinePreferenceTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: D102 - transformers' hook
        self.trainer.begin_step()


def _global_batch(args: RLOOConfig) -> int:
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _not_asked(prompts: list[Any], **columns: Any) -> list[None]:
    """TRL wants a reward; ours are asked elsewhere."""
    return [None for _ in prompts]
