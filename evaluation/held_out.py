"""Accuracy and calibration of a reward model on the pairs that were held out while it was trained.

    python evaluation/held_out.py runs/quickstart-reward-model

Reads `held_out.jsonl` of a run (of every member of an ensemble), which training wrote; writes `held_out.json` beside.
No model is loaded. scripts/train_reward_model.py calls it at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer

from alignment.errors import UserError, run_or_exit
from alignment.files import iterate_json_lines, read_json_object, write_json
from alignment.models.card import refresh
from alignment.rewards.aggregate import aggregate
from alignment.rewards.diagnostics import agreement_matrix, disagreement, expected_calibration_error
from evaluation.estimates import bootstrap_means
from evaluation.intervals import share_interval

RESAMPLES, SEED, LEVEL = 10_000, 1, 0.95
LAM = 0.5  # uwo's, the ensembles paper's for best-of-n
HELD_OUT, RESULT = "held_out.jsonl", "held_out.json"


def write_held_out(run: Path) -> list[str]:
    """Write held_out.json; returns lines that say what is in it, none where nothing was held out."""
    members = sorted(run.glob("member-*"), key=lambda p: int(p.name.rpartition("-")[2])) or [run]
    files = [member / HELD_OUT for member in members]
    if not all(file.is_file() for file in files):
        return []
    result = summarise([[row for _, row in iterate_json_lines(file)] for file in files], _facts(members))
    lines = describe(result)
    write_json(run / RESULT, {**result, "summary": lines})
    for folder in dict.fromkeys([run, *members]):
        refresh(folder)
    return lines


def _facts(members: list[Path]) -> list[dict[str, Any]]:
    return [read_json_object(member / "final" / "reward_model.json") for member in members]


def summarise(tables: list[list[dict[str, Any]]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with its interval over prompts, and ECE, of every member and of the ensemble.

    Args:
        tables: per model, the rows of held_out.jsonl: `chosen` and `rejected` are lists of one score per head.
        facts: per model, its reward_model.json.

    Raises:
        UserError: the models were not judged on the same pairs.
    """
    keys = [[(row["prompt"], row["label"]) for row in rows] for rows in tables]
    if any(other != keys[0] for other in keys):
        raise UserError(f"{HELD_OUT}: members were held out on different pairs; train them from one recipe")
    sides = [
        np.concatenate([np.array([row[s] for row in rows], dtype=np.float64).T for rows in tables])  # null: NaN
        for s in ("chosen", "rejected")
    ]
    if not np.isfinite(sides).all():
        raise UserError(f"{HELD_OUT}: holds scores that are not finite numbers; train the model again")
    prompts, label = [prompt for prompt, _ in keys[0]], np.array([label for _, label in keys[0]])
    general = facts[0]["kind"] == "general"
    scale = facts[0]["temperature"] if general else 1.0
    margins = (sides[0] - sides[1]) / scale  # [k, n], logits of "chosen is better"
    found: dict[str, Any] = {
        "pairs": len(label),
        "prompts": len(set(prompts)),
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "unit": "prompt", "level": LEVEL},
        "members": [_one(margin, label, prompts) for margin in margins],
    }
    if len(margins) > 1:
        found["ensemble"] = {"mean margin": _one(margins.mean(0), label, prompts)}
        constants = [
            np.array([value for f in facts for value in f[name] or [np.nan]], dtype=np.float64)
            for name in ("mean", "std")
        ]
        if not general and np.isfinite(np.concatenate(constants)).all():
            for how in ("mean", "wco", "uwo"):
                chosen, rejected = (
                    aggregate(s, how=how, lam=LAM, normalise="member", mean=constants[0], std=constants[1])
                    for s in sides
                )
                # Standardised scores are not log-odds: there is nothing to calibrate.
                found["ensemble"][how] = _one(chosen - rejected, label, prompts, logits=False)
            found["disagreement"] = float(
                np.mean(disagreement((sides[0] - constants[0][:, None]) / constants[1][:, None]))
            )
        found["agreement"] = np.asarray(agreement_matrix(margins)).tolist()
    return found


def _one(margin: np.ndarray, label: np.ndarray, prompts: list[str], logits: bool = True) -> dict[str, Any]:
    """Accuracy over decided pairs (ties of the score one half), its interval over prompts, and ECE."""
    decided = label != 0.5
    margin, sign = margin[decided], np.sign(label[decided] - 0.5)
    right = 0.5 + 0.5 * np.sign(margin) * sign
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(np.array(prompts)[decided], right, strict=True):
        groups.setdefault(str(prompt), []).append(float(value))
    sums = np.array([[sum(values), len(values)] for values in groups.values()])
    draws = bootstrap_means(sums, RESAMPLES, np.random.default_rng(SEED))
    interval = share_interval(float(right.mean()), draws[:, 0] / draws[:, 1], sums[:, 1], LEVEL)
    result: dict[str, Any] = {"accuracy": interval.estimate, "interval": [interval.low, interval.high]}
    if logits:
        probability = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
        result["ece"] = float(expected_calibration_error(probability, (sign + 1) / 2))
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """What is printed."""
    lines = [f"held out: {result['pairs']} pairs of {result['prompts']} prompts; 95 % intervals over prompts"]
    named = [(f"member {i}" if len(result["members"]) > 1 else "accuracy", m) for i, m in enumerate(result["members"])]
    named += list(result.get("ensemble", {}).items())
    for name, one in named:
        low, high = one["interval"]
        ece = f", ECE {one['ece']:.3f}" if "ece" in one else ""
        lines.append(f"  {name:<12} {100 * one['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]{ece}")
    return lines


def main(run: Path) -> None:
    """Accuracy with its interval, and calibration, of a reward model's run on what it held out."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    lines = write_held_out(run)
    if not lines:
        raise UserError(f"{run}: has no {HELD_OUT}: its recipe had no data.eval, or training has not ended")
    print("\n".join(lines))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
