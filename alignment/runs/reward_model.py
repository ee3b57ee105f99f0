"""One run of reward-model training from a recipe: a single model, an ensemble of independent ones, or of heads.

`scripts/train_reward_model.py` reads argv and calls `train`. A single model and a shared trunk are one run directory
as preference training's; independent members are one each, `member-0` …, in the recipe's folder, so that each is
resumed, or skipped when it is done, by itself. `final/` holds weights, tokenizer and `reward_model.json`.
Not here: the trainer (`reward_model`), what runs have in common (`launching`), reading scores (`alignment.rewards`).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig

from alignment.data import overlap
from alignment.data.messages import TextRules
from alignment.data.pipeline import Prepared, prepare, write_rejected
from alignment.data.tables import fingerprint
from alignment.errors import UserError
from alignment.files import write_json, write_json_lines
from alignment.locks import sole_user
from alignment.models.card import refresh
from alignment.models.digest import model_digest
from alignment.models.reward_model import Facts, load_reward_model, settle_padding, trunk_features
from alignment.recipes import RewardModelRecipe
from alignment.rewards.losses import RewardLoss
from alignment.rewards.oracles import flip_labels
from alignment.runs import directory
from alignment.trainers import callbacks
from alignment.trainers.collation import truncated
from alignment.trainers.frozen import cache_file, frozen_logps, rows_digest
from alignment.runs.lifecycle import (
    adapter_config,
    begin,
    carry_out,
    compact,
    conclude,
    known,
    manifest_of_batches,
    model_arguments,
    run_directory,
    say,
    setting_up,
    trl_config,
)
from alignment.runs.opening import dated, open_tokenizer, refuse_unfit
from alignment.trainers.reward_model import (
    BRANCHES,
    FEATURES,
    RewardModelTrainer,
    init_head,
    member_seed,
    without_trunk,
)

HELD_OUT = "held_out.jsonl"


def train(recipe: RewardModelRecipe, resume: bool = False) -> Path:
    """Train what a recipe says; returns the run directory.

    Raises:
        UserError: anything that the user can mend; before the first step it leaves everything as it was.
    """
    state = begin(recipe)
    tokenizer = open_tokenizer(recipe, state, resume)
    given, held_out = (_rows(recipe, role, tokenizer) for role in ("train", "eval"))
    assert given is not None  # the schema says so
    given = _without_judged(recipe, given, held_out)
    refuse_unfit(recipe, tokenizer, [found.dataset for found in (given, held_out) if found], state)
    run, members = Path(recipe.training.output_dir), recipe.reward_model.members
    if members == 1 or recipe.reward_model.mode == "shared_trunk":
        _train_one(recipe, state, tokenizer, given, held_out, resume)
        return run
    with sole_user(run) if state.is_main_process else contextlib.nullcontext():
        _train_members(run, recipe, state, tokenizer, given, held_out, resume)
    return run


def _train_members(
    run: Path,
    recipe: RewardModelRecipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    given: Prepared,
    held_out: Prepared | None,
    resume: bool,
) -> None:
    """Independent members one after the other, each a run of its own in the folder `run`."""
    members = recipe.reward_model.members
    if state.is_main_process and not resume and (aside := _move_members_aside(run)):
        print(f"{run} held an earlier run; it is now {aside}", flush=True)
    state.wait_for_everyone()
    for i in range(members):
        place = {"output_dir": str(run / f"member-{i}"), "seed": member_seed(recipe.training.seed, "member", i)}
        member = recipe.model_copy(update={"training": recipe.training.model_copy(update=place)})
        say(state, f"member {i + 1} of {members}, seed {place['seed']}")
        began = (run / f"member-{i}" / "manifest.json").is_file()
        if began and resume:  # also where it is done: members of two recipes are no ensemble
            directory.refuse_other_recipe(run / f"member-{i}", member)
        if (run / f"member-{i}" / "final").is_dir() and resume:
            directory.refuse_other_data(run / f"member-{i}", _digest_of_rows(member, given))
            say(state, "  is there already")
            continue
        has_checkpoint = any((run / f"member-{i}").glob("checkpoint-*"))
        state.wait_for_everyone()
        if began and resume and not has_checkpoint and state.is_main_process:
            print("  stopped before its first checkpoint: starts afresh", flush=True)
            shutil.rmtree(run / f"member-{i}")  # moved aside, it would be counted as a member
        _train_one(member, state, tokenizer, given, held_out, resume and began and has_checkpoint)
    if state.is_main_process:
        write_json(run / "manifest.json", known(recipe, state.num_processes) | {"members": members})
        refresh(run)
    state.wait_for_everyone()


def _move_members_aside(run: Path) -> Path | None:
    """Make room for a fresh ensemble: its manifest is written last, and its members say whether it is one."""
    if any(run.glob("member-*/manifest.json")) and not (run / "manifest.json").is_file():
        write_json(run / "manifest.json", {"members": len(list(run.glob("member-*")))})
    return directory.move_aside(run)


def _digest_of_rows(recipe: RewardModelRecipe, given: Prepared) -> str:
    """What a member's manifest says of the rows that it is trained on."""
    return fingerprint(_with_columns(recipe, given.dataset, training=True))


# The number columns that a value of reward_model.margin reads.
MARGIN_COLUMNS: dict[str | None, tuple[str, ...]] = {
    None: ("label",),
    "margin": ("label", "margin"),
    "rewards": ("label", "reward_chosen", "reward_rejected"),
}


# --- rows ---------------------------------------------------------------------------------------------------------


def _rows(recipe: RewardModelRecipe, role: str, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    sources = recipe.data.train if role == "train" else recipe.data.eval
    if sources is None:
        return None
    return prepare(
        sources,
        tokenizer,
        role=role,
        seed=recipe.training.seed,
        max_length=recipe.data.max_length,
        max_rejected_share=recipe.data.max_rejected_share,
        rules=TextRules.of(recipe.data),
        reads=MARGIN_COLUMNS[recipe.reward_model.margin],
    )


def _without_judged(recipe: RewardModelRecipe, given: Prepared, held_out: Prepared | None) -> Prepared:
    """Rows whose prompts are held out: refused, dropped or kept, as `data.overlap` says."""
    if held_out is None:
        return given
    overlap.refuse_two_kinds(given, held_out)
    judged = overlap.judged_on(held_out.dataset)
    if recipe.data.overlap == "refuse":
        overlap.refuse(given.dataset["prompt"], judged)
    return overlap.without(given, judged) if recipe.data.overlap == "drop" else given


def _with_columns(recipe: RewardModelRecipe, data: Dataset, training: bool) -> Dataset:
    """The margin that the recipe asks for, flipped labels, and the heads' bootstrap weights.

    What is drawn depends on the first member's seed and the row's place alone: members see the same data.
    """
    section = recipe.reward_model
    if section.margin == "rewards":
        _need(data, ("reward_chosen", "reward_rejected"), "rewards")
        gap = np.array(data["reward_chosen"]) - np.array(data["reward_rejected"])
        data = data.remove_columns([c for c in ("margin",) if c in data.column_names]).add_column("margin", gap)
    elif section.margin == "margin":
        _need(data, ("margin",), "margin")
    elif "margin" in data.column_names:
        data = data.remove_columns("margin")
    if training and recipe.data.label_noise:
        label = np.array(data["label"]) if "label" in data.column_names else np.ones(len(data))
        flipped = flip_labels(range(len(data)), recipe.data.label_noise, recipe.data.noise_seed)
        data = data.remove_columns([c for c in ("label",) if c in data.column_names])
        data = data.add_column("label", np.where(flipped, 1 - label, label))
    if training and section.bootstrap:
        drawn = np.random.default_rng(recipe.training.seed).poisson(1.0, (len(data), section.members))
        data = data.add_column("weights", drawn.astype("float32").tolist())
    return data


def _need(data: Dataset, columns: tuple[str, ...], value: str) -> None:
    missing = [c for c in columns if c not in data.column_names]
    if missing:
        raise UserError(f"reward_model.margin: {value!r} needs column {missing[0]!r}, which the rows do not have")


# --- one model ----------------------------------------------------------------------------------------------------


def facts_of(recipe: RewardModelRecipe, chat: bool) -> Facts:
    """What the outputs of the recipe's model are; constants come after training."""
    section = recipe.reward_model
    limit, temperature = recipe.data.max_length, section.temperature
    if section.loss == "general":
        outputs = section.planes * (3 if section.gate else 2)
        return Facts("general", outputs, chat, limit, gated=section.gate, temperature=temperature)
    return Facts("scalar", section.members if section.mode == "shared_trunk" else 1, chat, limit)


def loss_of(recipe: RewardModelRecipe) -> RewardLoss:
    """The recipe's loss."""
    section = recipe.reward_model
    names = ("label_smoothing", "score_l2", "center", "tie_weight", "tie_margin", "temperature")
    return RewardLoss(kind=section.loss, **{name: getattr(section, name) for name in names})


def _train_one(
    recipe: RewardModelRecipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    given: Prepared,
    held_out: Prepared | None,
    resume: bool,
) -> None:
    started = time.perf_counter()
    manifest = known(recipe, state.num_processes) | dated(tokenizer)
    with run_directory(recipe, state, resume, manifest) as checkpoint:
        _train_in(Path(recipe.training.output_dir), recipe, state, tokenizer, given, held_out, checkpoint, started)


def _train_in(
    run: Path,
    recipe: RewardModelRecipe,
    state: PartialState,
    tokenizer: PreTrainedTokenizerBase,
    given: Prepared,
    held_out: Prepared | None,
    checkpoint: Path | None,
    started: float,
) -> None:
    """The stages, in a run directory that is ready."""
    both = [given] if held_out is None else [given, held_out]
    say(state, f"[1/3] preferences: {', '.join(source.name for source in recipe.data.train or ())}")
    if state.is_main_process:
        for line in (line for prepared in both for line in prepared.summary()):
            print(f"  {line}", flush=True)
        write_rejected(run, *both)
    state.wait_for_everyone()
    say(state, f"[2/3] model: {recipe.model.name_or_path}")
    args = trl_config(RewardConfig, recipe, run, state.num_processes)
    args.eval_on_start = args.eval_on_start and checkpoint is None
    facts = facts_of(recipe, chat=not isinstance(given.dataset[0]["prompt"], str))
    data = _with_columns(recipe, given.dataset, training=True)
    judged = None if held_out is None else _with_columns(recipe, held_out.dataset, training=False)
    model = _model(recipe, args, tokenizer, facts)
    frozen = recipe.reward_model.freeze_trunk
    digest = fingerprint(data)  # of the rows alone
    weights = {}
    if frozen:
        weights["trunk"] = model_digest(getattr(model, model.base_model_prefix))
        tables = [_with_features(recipe, state, model, rows) for rows in (data, judged) if rows is not None]
        data, judged = tables[0], tables[1] if held_out is not None else None
        model.requires_grad_(False).score.requires_grad_(True)
    with without_trunk(model, frozen):
        trainer = build_trainer(recipe, args, model, facts, data, judged, tokenizer)
        trainer.row_name = given.name_of
        manifest = known(recipe, state.num_processes) | manifest_of_batches(args, state, tokenizer) | dated(tokenizer)
        manifest |= {
            "pairs": len(data),
            "repeated_pairs": -len(data) % recipe.training.global_batch_size,
            "chat": not isinstance(data[0]["prompt"], str),
            "rows": {prepared.role: prepared.manifest() for prepared in both},
            "sources": [source for prepared in both for source in prepared.sources],
            "data_fingerprint": digest,
            "frozen_weights": weights,
        }
        what = f"{len(data)} pairs, {facts.kind}, {facts.outputs} outputs"
        carry_out(trainer, recipe, run, state, checkpoint, manifest, what)
        facts = _measured(recipe, trainer, facts, data, judged)
        if judged is not None:
            scores = trainer.scores_of(judged)
            if state.is_main_process:
                write_json_lines(run / HELD_OUT, held_out_rows(judged, scores))
    model.config.num_labels = facts.outputs
    conclude(trainer, recipe, run, state, manifest, {"total": started}, extra=facts.write)


def _model(recipe: RewardModelRecipe, args: RewardConfig, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> Any:
    """The trunk with a fresh head. `args` must exist first: with ZeRO-3 it makes loading shard."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if zero3 and recipe.reward_model.freeze_trunk:
        raise UserError(
            "reward_model.freeze_trunk: trains heads alone, of which ZeRO-3 has nothing to shard: launch "
            "one process, or several with recipes/accelerate/ddp.yaml"
        )
    model: Any = load_reward_model(outputs=facts.outputs, fresh_head=True, **model_arguments(recipe))
    settle_padding(model, tokenizer, recipe.reward_model.pad_token)
    init_head(model, recipe.training.seed, facts.outputs)
    return model


def build_trainer(
    recipe: RewardModelRecipe,
    args: RewardConfig,
    model: Any,
    facts: Facts,
    data: Dataset,
    held_out: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
) -> RewardModelTrainer:
    """The trainer of one model."""
    peft = adapter_config(recipe)
    if peft is not None:
        peft.task_type, peft.modules_to_save = "SEQ_CLS", ["score"]
    with setting_up():
        trainer = RewardModelTrainer(
            model,
            facts,
            loss_of(recipe),
            args=args,
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=peft,
            group_by_length=recipe.training.group_by_length,
            on_nan=recipe.training.on_nan,
            callbacks=[callbacks.MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
        )
    return compact(trainer)


def _with_features(recipe: RewardModelRecipe, state: PartialState, model: Any, data: Dataset) -> Dataset:
    """A column `features`: the frozen trunk's output at the last token of chosen and rejected; kept in the cache under
    the weights and token ids, computed by all processes together."""
    limit, pad = recipe.data.max_length, int(model.config.get_text_config().pad_token_id)
    rows = [
        [row["prompt_ids"] + truncated(row, branch, limit) for branch in BRANCHES]
        for row in data.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    ]
    if torch.cuda.is_available():
        model.to(state.device)

    def score(numbers: list[int]) -> torch.Tensor:
        both = [ids for i in numbers for ids in rows[i]]
        return trunk_features(model, both, pad, len(both)).reshape(len(numbers), -1).to(state.device)

    trunk = getattr(model, model.base_model_prefix)
    parts = {"what": "trunk features", "rows": rows_digest(rows), "model": model_digest(trunk), "pad": pad}
    lengths = [sum(map(len, row)) for row in rows]
    size = recipe.training.per_device_eval_batch_size
    table, kept = frozen_logps(state, score, lengths, size, parts, lambda: 1e-3, "features")
    if kept:
        say(state, f"  the same features are in the cache: {cache_file(parts)}")
    bad = (~table.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"model.name_or_path: {recipe.model.name_or_path}: features of {len(bad)} of {len(rows)} pairs are not "
            f"finite numbers, first those of prompt {str(data[bad[0]]['prompt'])[:60]!r}; its weights are damaged, or "
            "model.dtype is too coarse for it (try float32)"
        )
    return data.add_column(FEATURES, table.reshape(len(rows), 2, -1).numpy().tolist())


def _measured(
    recipe: RewardModelRecipe, trainer: RewardModelTrainer, facts: Facts, data: Dataset, held_out: Dataset | None
) -> Facts:
    """The facts with mean and std of every output over the calibration responses: held-out ones where there are."""
    source, name = (data, "data.train") if held_out is None else (held_out, "data.eval")
    rows = source.select(range(min(len(source), -(-recipe.reward_model.calibration // 2))))
    scores = trainer.scores_of(rows).flatten(0, 1)  # [2n, k], float64; refuses weights that the last step has spoilt
    if facts.kind != "scalar":
        return facts
    mean, std = scores.mean(0).tolist(), scores.std(0, correction=0).tolist()
    return Facts(**{**vars(facts), "mean": mean, "std": std, "calibration": f"{len(scores)} responses of {name}"})


def held_out_rows(data: Dataset, scores: torch.Tensor) -> list[dict[str, Any]]:
    """What `held_out.jsonl` says of every pair: its prompt's hash, label, and the scores, one per member."""
    labels = data["label"] if "label" in data.column_names else [1.0] * len(data)
    prompts = [hashlib.sha256(str(prompt).encode()).hexdigest()[:16] for prompt in data["prompt"]]
    return [
        {"prompt": prompt, "label": label, "chosen": pair[0].tolist(), "rejected": pair[1].tolist()}
        for prompt, label, pair in zip(prompts, labels, scores, strict=True)
    ]
