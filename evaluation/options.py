"""Options of the command line that mean the same in several programs. Defaults are each program's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignment.errors import UserError
from alignment.recipes.document import RecipeError, parse_value
from alignment.rewards.registry import Kind, judge_fields

Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts. [all]")]
Chat = Annotated[bool, typer.Option(help="Texts go through the chat template as what a user says.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest response; what is cut is unfinished.")]
Temperature = Annotated[float, typer.Option(help="1 samples the model as trained; above 0.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0 is off.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Responses drawn at once; part of what a seed means.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all samples.")]
Dtype = Annotated[str, typer.Option(help="Weights: float32, bfloat16, float16.")]


def parse_keys(kind: Kind, name: str, pairs: list[str]) -> dict[str, Any]:
    """`["pattern=a+b"]` as a dictionary: values of keys that hold text as they are, the others read as YAML."""
    known, keys = judge_fields(kind, name), {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--{kind}-key {pair!r}: write KEY=VALUE, such as pattern='(?i)good'")
        if key in known and known[key].type == "str":  # annotations are texts there
            keys[key] = value
            continue
        keys[key], found = parse_value(value, (key,), f"--{kind}-key")
        if found.problems:
            raise RecipeError(found.problems)
    return keys
