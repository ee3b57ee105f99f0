"""`alignment doctor RECIPE`: environment, one pair in tokens, the first batch, the plan; in this order, on a console.

What could not be looked at (a hub model without a network, more weights than memory) is said in one line and the rest
is printed all the same. Only a check that fails makes the result false.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from alignment.data.pipeline import Prepared, prepare_rows
from alignment.doctor.environment import Check, environment
from alignment.doctor.flops import flops
from alignment.doctor.memory import memory
from alignment.doctor.pair import painted, pair_view
from alignment.doctor.plan import Plan, operations, plan, size
from alignment.doctor.setting import Setting, adapter_folder, from_recipe, read_adapter
from alignment.errors import UserError
from alignment.files import PACKAGE_SCHEME, read_json_object
from alignment.recipes import Recipe
from alignment.recipes.launch import read_launch

ROWS = 256  # of each source: enough for a look, and seconds instead of minutes
MARKS = {"ok": "[green]ok  [/]", "note": "[cyan]    [/]", "warning": "[yellow]warn[/]", "failed": "[bold red]FAIL[/]"}


@dataclass(frozen=True)
class Options:
    """What the command line may ask for."""

    accelerate_config: Path | None = None
    world: int | None = None
    config_json: Path | None = None
    row: int = 1
    with_model: bool = True


def examine(recipe: Recipe, options: Options, console: Console) -> bool:
    """Look at everything and print it; whether no check failed.

    Raises:
        UserError: a mistake in the recipe, its data or the options.
    """
    from alignment.models.loading import settle_accelerator

    settle_accelerator()
    launch = read_launch(options.accelerate_config) if options.accelerate_config is not None else None
    setting = from_recipe(recipe, launch, options.world)
    ok = _environment(environment(setting, launch, recipe.model.attn_implementation), console)
    tokenizer, rows = _rows(recipe, options, console)
    if tokenizer is not None and rows is not None:
        ok &= _pair(recipe, options, tokenizer, rows, console)
    found = _plan(recipe, options, setting, console)
    if found is not None and rows is not None and tokenizer is not None and options.with_model:
        ok &= _start(recipe, found, rows, tokenizer, console)
    if found is not None:
        _print_plan(found, rows, recipe, console)
        if recipe.data.prompts is not None:
            text = "a step's losses alone: drawing, judging and scoring its samples is not planned"
            _say(console, "note", f"{text} (docs/on_policy.md counts them)")
    return ok


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _say(console: Console, state: str, text: str) -> None:
    console.print(f"{MARKS[state]} {escape(text)}", highlight=False, soft_wrap=True)


def _environment(checks: list[Check], console: Console) -> bool:
    _heading(console, "Environment (warnings: not the versions that the tests have run with)")
    for check in checks:
        _say(console, check.state, f"{check.name}: {check.text}")
    return all(check.state != "failed" for check in checks)


def _is_local(name: str) -> bool:
    return name.startswith(PACKAGE_SCHEME) or name.endswith(".gguf") or Path(name).expanduser().exists()


def _rows(recipe: Recipe, options: Options, console: Console) -> tuple[Any, Prepared | None]:
    """The tokenizer, and the first rows of the recipe's data; None for what cannot be had here."""
    from alignment.models import load_tokenizer
    from alignment.models.chat import pin_date

    _heading(console, "Data, as the model sees it")
    name = recipe.model.name_or_path
    try:
        tokenizer: Any = load_tokenizer(name, **recipe.model.tokenizing)
    except UserError as error:
        if _is_local(name):
            raise
        _say(console, "warning", f"not looked at, for want of the tokenizer: {error}")
        return None, None
    date = pin_date(tokenizer)
    if date is not None:
        _say(console, "note", f"the chat template writes a date, here {date}: a run keeps the date that it begins on")
    _ends(recipe, tokenizer, console)
    if recipe.data.prompts is not None:
        _prompts(recipe, tokenizer, console)
        return tokenizer, None
    if recipe.data.train is None:
        return tokenizer, _sampled(recipe, options, tokenizer, console)
    try:
        return tokenizer, _given(recipe, tokenizer)
    except UserError as error:
        if all(source.is_local for source in recipe.data.train):
            raise
        _say(console, "warning", f"not looked at, for want of the rows: {error}")
        return tokenizer, None


def _ends(recipe: Recipe, tokenizer: Any, console: Console) -> None:
    """The tokens that end a response, and where each comes from."""
    from alignment.models.ends import ends_of, read_generation_config
    from alignment.models.loading import resolve_path

    section = recipe.model
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    ends = ends_of(tokenizer, read_generation_config(resolve_path(section.name_or_path), **options))
    _say(console, "note", f"sampling stops at: {'; '.join(ends.lines(tokenizer)) or 'no token'}")


def _prompts(recipe: Recipe, tokenizer: Any, console: Console) -> None:
    """What an on-policy recipe asks. There is no pair to look at: the policy draws its own while it trains."""
    from alignment.runs.on_policy import given_prompts

    try:
        found = given_prompts(recipe, tokenizer)
    except UserError as error:
        if recipe.data.prompts is not None and isinstance(recipe.data.prompts.name, str):
            raise
        _say(console, "warning", f"not looked at, for want of the prompts: {error}")
        return
    for line in found.summary():
        _say(console, "note", line)
    lengths = [len(ids) for ids in found.dataset["prompt_ids"]]
    first = tokenizer.decode(found.dataset[0]["prompt_ids"], skip_special_tokens=False)
    _say(console, "note", f"prompts have {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most")
    _say(console, "note", f"the first one: {first!r}")
    _say(console, "note", "the policy draws responses while it trains; the first rollout is checked against step 0")


def _first_rows(recipe: Recipe) -> Recipe:
    """The recipe with the first rows of each of its sources."""
    sources = [s.model_copy(update={"limit": min(s.limit or ROWS, ROWS)}) for s in recipe.data.train or []]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": sources})})


def _given(recipe: Recipe, tokenizer: Any) -> Prepared | None:
    from alignment.runs.opening import refuse_unfit
    from alignment.runs.preferences import given_rows

    found = given_rows(_first_rows(recipe), "train", tokenizer)
    refuse_unfit(recipe, tokenizer, [found.dataset] if found else [])
    return found


def _sampled(recipe: Recipe, options: Options, tokenizer: Any, console: Console) -> Prepared | None:
    """A first batch drawn from the model, as training would draw all of them."""
    from alignment.data.prompt_files import read_prompts
    from alignment.runs.preferences import sampled_preferences

    settings = recipe.data.sample
    if settings is None or not options.with_model:
        _say(console, "note", "rows are drawn from the starting model; --no-model leaves that out")
        return None
    prompts = read_prompts(settings.prompts, settings.limit)
    limit = min(len(prompts), 2 * recipe.training.per_device_train_batch_size)
    few = recipe.data.model_copy(update={"sample": settings.model_copy(update={"limit": limit})})
    rows = sampled_preferences(recipe.model_copy(update={"data": few}), tokenizer)
    return prepare_rows(rows, "samples", tokenizer, max_length=recipe.data.max_length, role="train")


def _pair(recipe: Recipe, options: Options, tokenizer: Any, rows: Prepared, console: Console) -> bool:
    given = f"the first {ROWS} rows of each source; `alignment data report` reads all"
    drawn = f"the first {rows.rows} pairs, drawn from the starting model just now"
    _say(console, "note", drawn if recipe.data.train is None else given)
    for line in rows.summary():
        _say(console, "note", line)
    if not 1 <= options.row <= len(rows.dataset):
        raise UserError(f"--row {options.row}: there are {len(rows.dataset)} usable rows among the first ones")
    view = pair_view(rows.dataset[options.row - 1], tokenizer, recipe.data.max_length)
    for text in painted(view, tokenizer):
        console.print(text, soft_wrap=True)
    for line in view.lines:
        _say(console, "note", line)
    for problem in view.problems:
        _say(console, "failed", problem)
    return not view.problems


def _config(recipe: Recipe, options: Options) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from alignment.models.loading import resolve_path

    model = recipe.model
    where = str(options.config_json or "model.name_or_path: no configuration")
    try:
        if options.config_json is not None:
            keys = read_json_object(options.config_json)
            return AutoConfig.for_model(keys.pop("model_type", None), **keys)
        name = model.name_or_path
        if model.adapter is None and (folder := adapter_folder(recipe)) is not None:
            name = read_adapter(folder)["base_model_name_or_path"]
        return AutoConfig.from_pretrained(
            resolve_path(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None


def _plan(recipe: Recipe, options: Options, setting: Setting, console: Console) -> Plan | None:
    try:
        config = _config(recipe, options)
    except UserError as error:
        if options.config_json is not None or _is_local(recipe.model.name_or_path):
            raise
        _heading(console, "Plan")
        _say(console, "warning", f"none: {error}; --config-json FILE gives the model's config.json")
        return None
    if recipe.model.attn_implementation is not None:
        config._attn_implementation = recipe.model.attn_implementation
    return plan(config, setting, trust_remote_code=recipe.model.trust_remote_code)


def _start(recipe: Recipe, found: Plan, rows: Prepared, tokenizer: Any, console: Console) -> bool:
    """The first batch, where the weights are at hand and fit."""
    import psutil
    import torch

    from alignment.doctor.start import step_zero

    _heading(console, "Step 0, really run: this machine, one process")
    alone = plan_alone(found)
    gpu = torch.cuda.is_available() and not recipe.training.use_cpu
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    if alone > free:
        text = f"not run: weights and one batch take about {size(alone)}, and {size(free)} are free"
        _say(console, "warning", f"{text} (training.per_device_train_batch_size=1 needs less)")
        return True
    try:
        facts = step_zero(recipe, rows.dataset, tokenizer)
    except UserError as error:
        if _is_local(recipe.model.name_or_path):
            _say(console, "failed", str(error))
            return False
        _say(console, "warning", f"not run: {error}")
        return True
    for line in facts.lines():
        _say(console, "note", line)
    if facts.problem is None:
        _say(console, "ok", "the trainer's step-0 check passes")
    else:
        _say(console, "failed", facts.problem)
    return facts.problem is None


def plan_alone(found: Plan) -> float:
    """Bytes of a first batch in one unsharded process without gradients and optimizer."""
    alone = dataclasses.replace(
        found.setting, world=1, sharding="none", offload_optimizer=False, offload_parameters=False
    )
    needed = memory(found.shape, alone)
    return needed.weights + needed.reference + needed.buffers + needed.activations + needed.logits


def _print_plan(found: Plan, rows: Prepared | None, recipe: Recipe, console: Console) -> None:
    _heading(console, "Plan (formulas: docs/memory.md; nothing here is measured)")
    for line in found.text().splitlines():
        console.print(escape(line), highlight=False, soft_wrap=True)
    if rows is None or not len(rows.dataset):
        return
    mean = mean_lengths(rows, recipe.data.max_length, len(found.setting.responses))
    usual = dataclasses.replace(found.setting, prompt=mean[0], responses=mean[1:])
    peak, work = memory(found.shape, usual).peak, flops(found.shape, usual).per_step
    lengths = f"prompt {mean[0]}, responses {' and '.join(map(str, mean[1:]))} tokens"
    text = f"at the mean lengths of the rows above ({lengths}): peak {size(peak)}, {operations(work)} a step"
    console.print(f"\n{text}", highlight=False, soft_wrap=True)


def mean_lengths(rows: Prepared, max_length: int, branches: int) -> tuple[int, ...]:
    """Mean tokens of prompt and responses after truncation, rounded up; calibration counts as chosen."""
    prompts = [len(ids) for ids in rows.dataset["prompt_ids"]]
    found = [prompts]
    for name in ("chosen", "rejected", "chosen")[:branches]:
        responses = rows.dataset[f"{name}_ids"]
        found.append([min(len(ids), max_length - p) for ids, p in zip(responses, prompts, strict=True)])
    return tuple(-(-sum(lengths) // len(lengths)) for lengths in found)
