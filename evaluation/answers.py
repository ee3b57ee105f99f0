"""How well a model answers questions that have a reference answer: accuracy, and how likely that answer is.

    python evaluation/answers.py runs/likelihood --prompts recipes/quickstart/sums_heldout.jsonl
    python evaluation/answers.py runs/tiny/model --prompts runs/tiny/held_out.jsonl --samples 32 --json

Of chains of thought z drawn at temperature 1: accuracy of the sampled answers, length of z, and the probability of the
reference answer behind z. Perplexity is exp(-mean of log pi(a*|z)/|a*|) (one chain: MC-1), and with the N chains of a
prompt averaged first (MC-N, an underestimate of log sum_z). Greedy accuracy beside it. A chain without the marker is a
format failure: wrong, without an answer's log-probability, and counted; in MC-N its probability is 0. A prompt without
a single valid chain is in neither perplexity, and counted (`unscored`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # started as `python evaluation/answers.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from alignment.errors import UserError, run_or_exit
from alignment.files import read_json_object


@dataclass(frozen=True)
class Answers:
    """What a model does with questions. Intervals are 95 %, by bootstrap over prompts.

    Attributes:
        prompts, samples: how many, and chains per prompt.
        greedy, sampled: accuracy of the greedy answer, and of answers at temperature 1.
        sampled_interval: of the latter.
        perplexity, perplexity_n: of the reference answer, MC-1 and MC-N.
        perplexity_interval: of the former.
        log_prob, log_prob_per_token: log pi(a*|z), mean over valid samples: sums, and sums over |a*|.
        chain_length: tokens of z.
        valid: share of samples with the marker.
        unscored: prompts without a valid sample, which are in no log-probability and no perplexity.
    """

    prompts: int
    samples: int
    greedy: float
    sampled: float
    sampled_interval: tuple[float, float]
    perplexity: float
    perplexity_interval: tuple[float, float]
    perplexity_n: float
    log_prob: float
    log_prob_per_token: float
    chain_length: float
    valid: float
    unscored: int


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    samples: int = 16,
    max_new_tokens: int = 64,
    marker: str = "Answer:",
    separator: str = " ",
    seed: int = 1,
    batch_size: int = 128,
    resamples: int = 2000,
) -> Answers:
    """Draw, verify and score.

    Args:
        model, tokenizer: a causal language model.
        rows: with `prompt` and `answer`.
        samples: chains per prompt.
        max_new_tokens: of a chain and its answer.
        marker, separator: as `rollout.answer`.
        seed: of the draws and of the bootstrap.
        batch_size: rows at once.
        resamples: of the bootstrap.

    Raises:
        UserError: no sample of any prompt has the marker.
    """
    from alignment.models.sampling import sample

    prompts = [row["prompt"] for row in rows]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    best = sample(model, tokenizer, prompts, 1, temperature=0, **settings)
    drawn = sample(model, tokenizer, prompts, samples, progress="answering", **settings)
    right = [[_right(one.text, row, marker) for one in group] for group, row in zip(drawn, rows, strict=True)]
    scored = _scored(model, tokenizer, rows, drawn, marker, separator, batch_size)
    valid = [[x for x in group if x is not None] for group in scored]
    flat = [x for group in valid for x in group]
    if not flat:
        raise UserError(f"none of {len(rows) * samples} samples has the marker {marker!r}; nothing can be scored")
    per_token = [_mean([logp / tokens for logp, tokens, _ in group]) for group in valid]
    kept = [value for value in per_token if not math.isnan(value)]
    mixed = [(_log_mean_exp([logp for logp, _, _ in group], samples)) / group[0][1] for group in valid if group]
    accuracy = [_mean(group) for group in right]
    low, high = _interval(kept, seed, resamples)
    return Answers(
        len(rows),
        samples,
        _mean([_right(group[0].text, row, marker) for group, row in zip(best, rows, strict=True)]),
        _mean(accuracy),
        _interval(accuracy, seed, resamples),
        math.exp(-_mean(kept)),
        (math.exp(-high), math.exp(-low)),
        math.exp(-_mean(mixed)),
        _mean([logp for logp, _, _ in flat]),
        _mean(kept),
        _mean([float(length) for _, _, length in flat]),
        len(flat) / (len(rows) * samples),
        sum(not group for group in valid),
    )


def _right(text: str, row: dict[str, Any], marker: str) -> float:
    from alignment.trainers.chains import sampled_answer

    return float(sampled_answer(text, marker) == str(row["answer"]).strip())


def _scored(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], drawn: Any, marker: str, separator: str, batch: int
) -> list[list[tuple[float, int, int] | None]]:
    """Of every sample (log pi(a*|z), tokens of a*, tokens of z); None for a format failure."""
    import torch

    from alignment.models.sampling import prompt_ids
    from alignment.trainers.chains import cut_chain, forced_answer
    from alignment.trainers.scoring import branch_tokens, build_rows, forward_rows

    found: list[list[tuple[float, int, int] | None]] = [[None] * len(group) for group in drawn]
    jobs: list[tuple[int, int, list[int], list[int], list[int], int]] = []
    for i, (row, group) in enumerate(zip(rows, drawn, strict=True)):
        for j, one in enumerate(group):
            chain = cut_chain(one.ids, marker, tokenizer)
            if chain is not None and chain[0]:
                tail, before = forced_answer(tokenizer, chain[1], separator, str(row["answer"]))
                jobs.append((i, j, prompt_ids(tokenizer, row["prompt"]), chain[0], tail, before))
    jobs.sort(key=lambda job: len(job[2]) + len(job[3]) + len(job[4]))  # like lengths together: little padding
    pad = int(tokenizer.pad_token_id or 0)
    with torch.no_grad():
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            inputs = build_rows([job[2] for job in part], [[job[3] + job[4]] for job in part], pad, "shared_prefix")
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            logps = branch_tokens(forward_rows(model, model.config, model.dtype, inputs).logits, inputs, 1)[:, 0]
            for (i, j, _, z, tail, before), tokens in zip(part, logps.double(), strict=True):
                first, last = len(z) + before, len(z) + len(tail)
                found[i][j] = (float(tokens[first:last].sum()), last - first, len(z))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _log_mean_exp(values: Sequence[float], n: int) -> float:
    """log of the mean of n probabilities, of which those that are not given are 0."""
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values) / n)


def _interval(values: Sequence[float], seed: int, resamples: int) -> tuple[float, float]:
    """95 % percentile interval of the mean, prompts resampled."""
    import numpy as np

    array = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def main(
    model: Annotated[Path, typer.Argument(help="A run directory, or a model's folder.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with prompt and answer; not those of training.")],
    samples: Annotated[int, typer.Option(min=1, help="Chains per prompt.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of chain and answer; of a run: its own.")] = 64,
    marker: Annotated[str, typer.Option(help="Ends a chain; of a run: its own.")] = "Answer:",
    separator: Annotated[str, typer.Option(help="Between marker and answer; of a run: its own.")] = " ",
    seed: Annotated[int, typer.Option(help="Of draws and bootstrap.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Accuracy, and perplexity of the reference answer, of a model that answers questions."""
    from alignment.data.preferences import read_rows
    from alignment.models import load_model, load_tokenizer

    rows = read_rows(prompts)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("answer"), str) or not row.get("prompt"):
            raise UserError(f"{prompts}: row {number}: prompt and answer are needed, both texts")
    folder, recipe = model, {}
    if (model / "manifest.json").is_file():
        folder, recipe = model / "final", read_json_object(model / "manifest.json")["recipe"]
        max_new_tokens = recipe["generation"]["max_new_tokens"]
        marker, separator = (recipe["rollout"]["answer"][key] for key in ("marker", "separator"))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; finish the training run first, or give a model's folder")
    found = measure(
        load_model(folder),
        load_tokenizer(folder),
        rows,
        samples=samples,
        max_new_tokens=max_new_tokens,
        marker=marker,
        separator=separator,
        seed=seed,
    )
    if as_json:
        print(json.dumps(asdict(found)))
        return
    low, high = found.sampled_interval
    print(f"{found.prompts} prompts, {found.samples} chains each; {found.valid:.1%} of them have the marker")
    print(f"accuracy     greedy {found.greedy:.1%}, at temperature 1 {found.sampled:.1%} [{low:.1%}, {high:.1%}]")
    low, high = found.perplexity_interval
    print(
        f"perplexity   {found.perplexity:.3f} [{low:.3f}, {high:.3f}] (MC-1), {found.perplexity_n:.3f} (MC-{samples})"
    )
    print(f"chain        {found.chain_length:.1f} tokens")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_or_exit(lambda: app(standalone_mode=False))
