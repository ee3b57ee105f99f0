"""What report.html says of runs that have no pairs or no win rate: supervised fine-tuning and reward models."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.files import read_json_object
from evaluation.curves import CURVES, Curve

HELD_OUT = "held_out.json"
LOSS = CURVES[0]


@dataclass(frozen=True)
class Kind:
    """A kind of run, as its page describes it.

    Attributes:
        title: what was trained.
        heading: of the first card.
        lines: sentences below it.
        commands: what to run next; capital words stand for the reader's own files.
        loss: the loss's curve.
        samples: whether the page has a place for outputs.
    """

    title: str | None
    heading: str
    lines: tuple[str, ...]
    commands: tuple[str, ...]
    loss: Curve = LOSS
    samples: bool = True


def kind_of(run: Path, recipe: Mapping[str, Any]) -> Kind:
    """The kind of the run in `run`, by the sections of its recipe."""
    if "sft" in recipe:
        return _supervised(run, recipe.get("model") or {})
    if "reward_model" in recipe:
        return _reward_model(run)
    line = "Whether training helped is not known until the trained model is compared with its starting point:"
    return Kind(None, "Not evaluated yet", (line,), (win_rate_command(run, recipe),))


def win_rate_command(run: Path, recipe: Mapping[str, Any]) -> str:
    """What measures the run's win rate; capitals stand for what its recipe does not name."""
    words = ["python -m evaluation.win_rate", _quoted(run)]
    if not (recipe.get("evaluation") or {}).get("prompts"):
        words.append("--prompts FILE")
    if not recipe.get("reward") and not recipe.get("oracle"):
        words.append("--reward NAME")
    return " ".join(words)


def _supervised(run: Path, model: Mapping[str, Any]) -> Kind:
    start = model.get("adapter") or model.get("name_or_path") or "START"
    final = _quoted(run / "final")
    return Kind(
        "Supervised fine-tuning",
        "The step before preference training",
        (
            "The loss says how well the rows' own text is predicted, not how well the model answers. Train on "
            "preferences next, or compare the model with its start on prompts of yours, by a judge of yours "
            "(PROMPTS is a file; length is the simplest judge):",
        ),
        (
            f"alignment train recipes/quickstart/dpo.yaml model.name_or_path={final}",
            f"python -m evaluation.win_rate --model {final} --baseline {shlex.quote(str(start))} --prompts PROMPTS "
            "--reward length",
        ),
        replace(
            LOSS,
            unit="nats per token",
            reading="Mean negative log-likelihood of the learned tokens. It should fall below its value before "
            "training (dashed). Where the held-out line turns up, the rows are being memorised.",
        ),
        samples=False,
    )


def _reward_model(run: Path) -> Kind:
    files = [file for file in (run / HELD_OUT, run.parent / HELD_OUT) if file.is_file()]
    lines = read_json_object(files[0]).get("summary", ()) if files else ("No pairs were held out (data.eval).",)
    return Kind(
        "Reward model",
        "Accuracy on held-out pairs",
        (*map(str, lines), "On further pairs (PAIRS is a file of prompt, chosen and rejected):"),
        (f"python -m evaluation.reward_accuracy PAIRS --reward model --reward-key path={_quoted(run / 'final')}",),
        replace(
            LOSS,
            reading="Mean loss of the scores over pairs and heads. It should fall below its value before training "
            "(dashed). Where the held-out line turns up, the pairs are being memorised.",
        ),
        samples=False,
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
