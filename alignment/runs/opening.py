"""What a run settles before its folder is begun: the date that its chat template writes, and whether its models can
take its rows. All kinds of runs have this in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment.errors import UserError
from alignment.files import read_json_object
from alignment.models import load_tokenizer
from alignment.models.chat import DATE, pin_date, pinned_date
from alignment.models.limits import Limits, named_limits
from alignment.recipes import EveryRecipe
from alignment.runs.lifecycle import say, tokenizer_arguments


def open_tokenizer(recipe: EveryRecipe, state: PartialState, resume: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with its date: the one that the run began with, or today's, on all processes."""
    tokenizer = load_tokenizer(recipe.model.name_or_path, **tokenizer_arguments(recipe))
    run = Path(recipe.training.output_dir)
    dates: list[str | None] = [pin_date(tokenizer, _date_before(run, resume))]
    if state.num_processes > 1:  # midnight may pass between two of them
        broadcast_object_list(dates, from_process=0)
        pin_date(tokenizer, dates[0])
    if dates[0] is not None:
        say(state, f"  the chat template writes a date: {dates[0]}, for the whole run and for its model")
    return tokenizer


def dated(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """For a manifest: the date that the chat template writes, if it does."""
    date = pinned_date(tokenizer)
    return {} if date is None else {DATE: date}


def _date_before(run: Path, resume: bool) -> str | None:
    """The date of the run that goes on, or of the iterative run that this one is a part of."""
    places = [run / "manifest.json", *sorted(run.glob("member-*/manifest.json"))] if resume else []
    places += [folder / "prompts" / "counts.json" for folder in list(run.parents)[:3]]
    found = (read_json_object(place).get(DATE) for place in places if place.is_file())
    return next((str(date) for date in found if date), None)


def refuse_unfit(
    recipe: Any,
    tokenizer: PreTrainedTokenizerBase,
    tables: Iterable[Dataset | None],
    state: PartialState | None = None,
    new_tokens: int = 0,
) -> None:
    """Stop if a model of the recipe cannot take its rows; a line where they are longer than it was made for.

    Args:
        recipe: its model and, of preference training, its reference.
        tokenizer: whose padding and end count as well.
        tables: rows with token ids (`…_ids`), or prompts.
        state: of the processes; None: nothing is printed.
        new_tokens: that are drawn behind a prompt.

    Raises:
        UserError: an id without a row in the embedding, or a row longer than the learned positions.
    """
    kept = [table for table in tables if table is not None and len(table)]
    special = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    largest = max([*special, *(_largest(table) for table in kept)], default=0)
    rows = max((_longest(table) for table in kept), default=0)
    longest = rows + new_tokens if new_tokens else min(rows, recipe.data.max_length)
    sections = {"model.name_or_path": recipe.model}
    reference = getattr(recipe, "reference", None)
    if getattr(reference, "name_or_path", None) is not None:
        sections["reference.name_or_path"] = reference
    for key, section in sections.items():
        limits = named_limits(section.name_or_path, section.revision, recipe.model.trust_remote_code)
        if limits is not None:
            line = _against(limits, f"{key}: {section.name_or_path}", largest, longest, new_tokens)
            if line and state is not None:
                say(state, f"warning: {line}")


def _against(limits: Limits, name: str, largest: int, longest: int, new_tokens: int) -> str | None:
    """What is worth a warning; what would break the forward pass is raised."""
    if largest >= limits.embedding:
        raise UserError(
            f"{name}: the tokenizer writes ids up to {largest}, and the embedding has {limits.embedding} rows: resize "
            "it (resize_token_embeddings) and save model and tokenizer together"
        )
    if limits.positions is None or longest <= limits.positions:
        return None
    parts = f" ({longest - new_tokens} of the prompt and generation.max_new_tokens {new_tokens})" if new_tokens else ""
    told = f"rows have up to {longest} tokens{parts}, and the model has {limits.positions} positions"
    if limits.learned:
        raise UserError(f"{name}: {told}: data.max_length {limits.positions} at most")
    return f"{name}: {told}; it was not made for longer ones"


def _ids(table: Dataset) -> Any:
    """The columns of token ids as Arrow lists, in the order of the rows."""
    names = [name for name in table.column_names if name.endswith("_ids")]
    rows: Any = table.select_columns(names).with_format("arrow")[:]
    return {name: rows.column(name) for name in names}


def _largest(table: Dataset) -> int:
    import pyarrow.compute as pc

    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in _ids(table).values()), default=0)


def _longest(table: Dataset) -> int:
    """Tokens of the longest row: its prompt with its longest response, or all of it."""
    import numpy as np
    import pyarrow.compute as pc

    sizes = {name: np.asarray(pc.list_value_length(column)) for name, column in _ids(table).items()}
    prompt = sizes.pop("prompt_ids", 0)
    longest = np.max([*sizes.values()], axis=0) if sizes else 0
    return int(np.max(prompt + longest))
