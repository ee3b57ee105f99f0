"""Options of the command line that mean the same in every program which draws samples. Defaults are each program's."""

from __future__ import annotations

from typing import Annotated

import typer

Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts. [all]")]
Chat = Annotated[bool, typer.Option(help="Texts go through the chat template as what a user says.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest response; what is cut is unfinished.")]
Temperature = Annotated[float, typer.Option(help="1 samples the model as trained; above 0.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0 is off.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Responses drawn at once; part of what a seed means.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all samples.")]
Dtype = Annotated[str, typer.Option(help="Weights: float32, bfloat16, float16.")]
