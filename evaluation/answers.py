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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from alignment.errors import UserError, run_or_exit
from alignment.files import read_json_object
from evaluation.estimates import bootstrap_means
from evaluation.intervals import percentile_interval, share_interval


@dataclass(frozen=True)
class Answers:
    """What a model does with questions. Intervals are 95 %, by bootstrap over prompts.

    Attributes:
        prompts, samples: how many, and chains per prompt.
        greedy, sampled: accuracy of the greedy answer, and of answers at temperature 1.
        sampled_interval: of the latter.
        perplexity, perplexity_n: of the reference answer, MC-1 and MC-N.
        perplexity_interval: of the former; None of one prompt, or of prompts that are all alike.
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
    perplexity_interval: tuple[float, float] | None
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
    from scipy.special import logsumexp

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
    scored_prompts = [group for group in valid if group]
    per_token = [_mean([logp / tokens for logp, tokens, _ in group]) for group in scored_prompts]
    # log of the mean of all chains' probabilities, of which the invalid ones' are 0
    mixed = [(logsumexp([x[0] for x in group]) - math.log(samples)) / group[0][1] for group in scored_prompts]
    accuracy = [_mean(group) for group in right]
    draws = (_resampled(values, seed, resamples) for values in (accuracy, per_token))
    accuracies = share_interval(_mean(accuracy), next(draws), np.ones(len(accuracy)))
    logs = percentile_interval(_mean(per_token), next(draws))
    return Answers(
        prompts=len(rows),
        samples=samples,
        greedy=_mean([_right(group[0].text, row, marker) for group, row in zip(best, rows, strict=True)]),
        sampled=accuracies.estimate,
        sampled_interval=(accuracies.low, accuracies.high),
        perplexity=math.exp(-logs.estimate),
        perplexity_interval=(math.exp(-logs.high), math.exp(-logs.low)) if logs.low < logs.high else None,
        perplexity_n=math.exp(-_mean(mixed)),
        log_prob=_mean([logp for logp, _, _ in flat]),
        log_prob_per_token=logs.estimate,
        chain_length=_mean([float(length) for _, _, length in flat]),
        valid=len(flat) / (len(rows) * samples),
        unscored=len(rows) - len(scored_prompts),
    )


def _right(text: str, row: dict[str, Any], marker: str) -> float:
    from alignment.models.chains import sampled_answer

    return float(sampled_answer(text, marker) == str(row["answer"]).strip())


def _scored(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], drawn: Any, marker: str, separator: str, batch: int
) -> list[list[tuple[float, int, int] | None]]:
    """Of every sample (log pi(a*|z), tokens of a*, tokens of z); None for a format failure."""
    from alignment.models.chains import cut_chain, forced_answer
    from alignment.models.sampling import prompt_ids
    from alignment.rewards.implicit import token_logps

    found: list[list[tuple[float, int, int] | None]] = [[None] * len(group) for group in drawn]
    jobs = []  # where it stands; prompt; chain and answer; tokens of either
    for i, (row, group) in enumerate(zip(rows, drawn, strict=True)):
        prompt = prompt_ids(tokenizer, row["prompt"])
        for j, one in enumerate(group):
            chain = cut_chain(one.ids, marker, tokenizer)
            if chain is not None and chain[0]:
                chat = not isinstance(row["prompt"], str)
                tail, before = forced_answer(tokenizer, chain[1], separator, str(row["answer"]), chat)
                jobs.append((i, j, prompt, chain[0] + tail, len(chain[0]), len(tail) - before))
    jobs.sort(key=lambda job: len(job[2]) + len(job[3]))  # like lengths together: little padding
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        logps = token_logps(model, [(prompt, text) for _, _, prompt, text, _, _ in part]).double()
        for (i, j, _, text, length, answer), tokens in zip(part, logps, strict=True):
            found[i][j] = (float(tokens[len(text) - answer : len(text)].sum()), answer, length)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _resampled(values: Sequence[float], seed: int, resamples: int) -> np.ndarray:
    """Means of resampled prompts, [R]."""
    return bootstrap_means(np.array(values)[:, None], resamples, np.random.default_rng(seed))[:, 0]


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
    from alignment.data.preferences import BadRow
    from alignment.data.prompt_files import prompt_of, prompt_rows, refuse_unrendered
    from alignment.models import load_model, load_tokenizer

    rows, places = [], []
    for where, row in prompt_rows(prompts):
        if not isinstance(row.get("answer"), str):
            raise UserError(f"{where}: prompt and answer are needed, the answer a text")
        try:
            rows.append({"prompt": prompt_of(row), "answer": row["answer"]})
        except BadRow as bad:
            raise UserError(f"{where}: {bad.detail}") from None
        places.append(where)
    folder, recipe = model, {}
    if (model / "manifest.json").is_file():
        folder, recipe = model / "final", read_json_object(model / "manifest.json")["recipe"]
        max_new_tokens = recipe["generation"]["max_new_tokens"]
        marker, separator = (recipe["rollout"]["answer"][key] for key in ("marker", "separator"))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; finish the training run first, or give a model's folder")
    tokenizer = load_tokenizer(folder)
    refuse_unrendered(zip([row["prompt"] for row in rows], places, strict=True), tokenizer)
    found = measure(
        load_model(folder),
        tokenizer,
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
    limits = "" if found.perplexity_interval is None else " [{:.3f}, {:.3f}]".format(*found.perplexity_interval)
    print(f"perplexity   {found.perplexity:.3f}{limits} (MC-1), {found.perplexity_n:.3f} (MC-{samples})")
    print(f"chain        {found.chain_length:.1f} tokens")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
