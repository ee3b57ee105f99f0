"""Best-of-n from a pool of N samples per prompt: gold and proxy against KL (Coste et al. 2024, arXiv:2310.02743).

    python evaluation/best_of_n.py sample MODEL --prompts prompts.txt --n 512 --pool pools/sft
    python evaluation/best_of_n.py curves --pool pools/sft --gold regex --gold-key pattern=good --proxy runs/ensemble

The first half is the estimator, pure functions on arrays; the second is the program. Samples on disk are
`alignment.models.pools`, their scores `evaluation.pools`, tables and plots `evaluation.best_of_n_page`, the ensemble's
aggregate `alignment.rewards.aggregate`. docs/best_of_n.md explains the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from alignment.errors import UserError, run_or_exit
from alignment.files import jsonable
from evaluation.estimates import bootstrap_means
from evaluation.intervals import percentile_interval
from evaluation.options import BatchSize, Chat, Dtype, Limit, MaxNewTokens, Seed, Temperature, TopK, TopP, parse_keys

Array = NDArray[np.float64]
Curve = list[dict[str, Any]]

RESAMPLES = 10_000
METHODS = ("single", "mean", "wco", "uwo")
_CHUNK = 1 << 22  # scores sorted at once: 32 MiB, and about five times that while sorting


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n policy || policy) in nats: ln n - (n-1)/n (eq. 1).

    Exact for a continuous score without ties; an upper bound for a discrete policy.
    """
    return math.log(n) - (n - 1) / n


def rank_weights(pool: int, ns: Sequence[int]) -> Array:
    """`[len(ns), pool]`: P(the best of n distinct samples of the pool is its i-th worst), i = 1 … pool (appendix B).

    C(i-1, n-1) / C(N, n), in logarithms: the binomials themselves overflow. What underflows is below 1e-300.
    """
    log_factorial = gammaln(np.arange(pool + 1, dtype=np.float64) + 1)
    weights = np.zeros((len(ns), pool))
    for row, n in zip(weights, ns, strict=True):
        i = np.arange(n, pool + 1)
        log_choose = log_factorial[i - 1] - log_factorial[n - 1] - log_factorial[i - n]  # ln C(i-1, n-1)
        log_all = log_factorial[pool] - log_factorial[n] - log_factorial[pool - n]  # ln C(N, n)
        row[n - 1 :] = np.exp(log_choose - log_all)
    return weights


def _sorted_together(proxy: Array, gold: Array) -> tuple[Array, Array]:
    """Both `[Q, N]` in the order of the proxy, ascending, NaN last; gold averaged over samples of equal proxy.

    The average is the exact expectation over random tie-breaks. Any order within a tie that looks at gold would leak
    it, and the order of drawing is one tie-break out of many.
    """
    order = np.argsort(proxy, axis=1, kind="stable")  # one permutation for both
    proxy, gold = np.take_along_axis(proxy, order, axis=1), np.take_along_axis(gold, order, axis=1)
    first = np.ones(proxy.shape, dtype=bool)  # of its tie; NaN is equal to nothing, and every row starts anew
    first[:, 1:] = proxy[:, 1:] != proxy[:, :-1]
    if first.all():
        return proxy, gold
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, proxy.size))
    means = np.add.reduceat(gold.ravel(), starts) / sizes
    return proxy, np.repeat(means, sizes).reshape(gold.shape)


def _expected_best(proxy: Array, gold: Array, ns: Sequence[int]) -> Array:
    """`[Q, 2, len(ns)]`: proxy and gold of the best of n by proxy, per prompt; NaN rows for prompts without a score.

    Raises:
        ValueError: a prompt has scores, but fewer than the largest n.
    """
    missing = np.isnan(proxy) | np.isnan(gold)
    sizes = proxy.shape[1] - missing.sum(axis=1)
    short = np.flatnonzero((sizes > 0) & (sizes < max(ns)))
    if len(short):
        raise ValueError(
            f"n = {max(ns)} is more than the {sizes[short[0]]} samples with both scores of prompt {short[0]} "
            f"(of {proxy.shape[1]} drawn; {len(short)} such prompt{'' if len(short) == 1 else 's'}): use smaller n"
        )
    found = np.full((len(proxy), 2, len(ns)), np.nan)
    for size in np.unique(sizes[sizes > 0]):
        weights = rank_weights(int(size), ns)
        numbers = np.flatnonzero(sizes == size)
        step = max(1, _CHUNK // proxy.shape[1])
        for chunk in (numbers[start : start + step] for start in range(0, len(numbers), step)):
            ordered = _sorted_together(np.where(missing[chunk], np.nan, proxy[chunk]), gold[chunk])
            for side, values in enumerate(ordered):
                found[chunk, side] = values[:, :size] @ weights.T
    return found


def _check(proxy: Array, gold: Array, ns: Sequence[int]) -> None:
    if proxy.ndim != 2 or proxy.shape != gold.shape or not proxy.size:
        raise ValueError(f"proxy and gold: expected one shape [prompts, samples], got {proxy.shape} and {gold.shape}")
    if np.isinf(proxy).any() or np.isinf(gold).any():
        raise ValueError("proxy and gold: infinite scores have no mean; use NaN for what could not be scored")
    if not len(ns):
        raise ValueError("ns: at least one n is needed")
    for n in ns:
        if isinstance(n, bool) or int(n) != n or n < 1:
            raise ValueError(f"ns: whole numbers from 1 on are needed, got {n!r}")
        if n > proxy.shape[1]:
            raise ValueError(f"n = {n} is more than the pool's {proxy.shape[1]} samples per prompt: use smaller n")


def _rows(per_prompt: Array, ns: Sequence[int], left_out: int, resamples: int, seed: int) -> Curve:
    """The curve of per-prompt expectations `[Q, 2, len(ns)]`."""
    kept = per_prompt[~np.isnan(per_prompt).any(axis=(1, 2))]
    if not len(kept):
        raise ValueError("no prompt has a sample with both scores")
    means = kept.mean(axis=0)  # [2, len(ns)]
    best = int(means[1].argmax())
    columns = np.concatenate([kept[:, 0], kept[:, 1], kept[:, 1] - kept[:, 1, best : best + 1]], axis=1)
    estimates = columns.mean(axis=0)
    draws = bootstrap_means(columns, resamples, np.random.default_rng(seed)) if len(kept) > 1 else None
    rows = []
    for place, n in enumerate(ns):
        row: dict[str, Any] = {"n": int(n), "kl": best_of_n_kl(int(n))}
        for number, name in enumerate(("proxy", "gold", "gold_from_best")):
            column = number * len(ns) + place
            row[name] = float(estimates[column])
            row[f"{name}_low"] = row[f"{name}_high"] = None
            if draws is not None:
                interval = percentile_interval(row[name], draws[:, column])
                row[f"{name}_low"], row[f"{name}_high"] = interval.low, interval.high
        counts = {"prompts": len(kept), "prompts_left_out": len(per_prompt) - len(kept), "samples_left_out": left_out}
        rows.append(row | counts)
    return rows


def best_of_n_curve(
    proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """Expected proxy and gold score of the best of n samples by proxy, unbiased, for each n (appendix B).

    Every subset of n of the pool's N samples counts alike: R_n = sum_i C(i-1, n-1) / C(N, n) * gold of the i-th worst
    by proxy, and the mean over prompts. Equal proxies: see `_sorted_together`. A sample without a proxy (NaN) cannot
    be chosen and one without a gold score cannot be counted: both are left out, which leaves that prompt a smaller
    pool. A prompt with none left is left out whole.

    Args:
        proxy, gold: `[Q, N]` scores, higher is better; `gold[q, i]` is of the same response as `proxy[q, i]`.
        ns: each from 1 to N.
        resamples: bootstrap resamples of prompts; the same for every n.
        seed: of the bootstrap.

    Returns:
        A row for each n, in order: `n`; `kl` in nats; `proxy`, `gold` and `gold_from_best` (gold minus the gold at the
        n where this curve's gold is highest, prompt by prompt), each with its 95 % interval over prompts `…_low` and
        `…_high` (None for a single prompt); `prompts`, `prompts_left_out` and `samples_left_out`, counts.

    Raises:
        ValueError: shapes, infinite scores, an n that is not within 1 to N, or within 1 to what a prompt has left.
    """
    proxy, gold = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    _check(proxy, gold, ns)
    left_out = int((np.isnan(proxy) | np.isnan(gold)).sum())
    return _rows(_expected_best(proxy, gold, ns), ns, left_out, resamples, seed)


def overoptimization_curves(
    members: ArrayLike,
    gold: ArrayLike,
    ns: Sequence[int],
    *,
    lam: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalise: str = "member",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Curve]:
    """Curves of the single reward model and of the ensemble's mean, worst case and uncertainty-weighted score.

    All four choose from the same pool: a sample that one member could not score is left out of all. The bootstrap
    resamples of prompts are the same, too.

    Args:
        members: `[k, Q, N]` scores of k members.
        gold: `[Q, N]`.
        ns, resamples, seed: as of `best_of_n_curve`.
        lam, normalise: as of `alignment.rewards.aggregate`; the paper has lam 0.5 here.
        mean, std: `[k]` stored constants, needed with normalise="member".

    Returns:
        `single` (mean over members of each member's own curve, prompt by prompt; intervals are over prompts, not over
        members), `mean`, `wco`, `uwo`: rows of `best_of_n_curve`.

    Raises:
        ValueError: as of `best_of_n_curve` and `aggregate`.
    """
    from alignment.rewards.aggregate import aggregate

    scores, gold = np.array(members, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if scores.ndim != 3 or scores.shape[1:] != gold.shape:
        raise ValueError(f"members: expected [k, prompts, samples] over gold's {gold.shape}, got {scores.shape}")
    missing = np.isnan(scores).any(axis=0) | np.isnan(gold)
    scores[:, missing] = np.nan
    flat, left_out = scores.reshape(len(scores), -1), int(missing.sum())

    def combined(how: str, chosen: slice) -> Array:
        """Proxy and gold per prompt, `[Q, 2, len(ns)]`, where the chosen members' aggregate picks."""
        means, stds = (None if given is None else given[chosen] for given in (mean, std))
        found = aggregate(flat[chosen], how=how, lam=lam, normalise=normalise, mean=means, std=stds)
        proxy = found.reshape(gold.shape)
        _check(proxy, gold, ns)
        return _expected_best(proxy, gold, ns)

    whole = slice(None)
    # The first call sees all constants, so that a wrong number of them is refused before members are taken apart.
    per_prompt = {how: combined(how, whole) for how in ("mean", "wco", "uwo")}
    per_prompt["single"] = np.mean([combined("mean", slice(i, i + 1)) for i in range(len(flat))], axis=0)
    return {name: _rows(per_prompt[name], ns, left_out, resamples, seed) for name in METHODS}


# The program.


def default_ns(pool: int) -> list[int]:
    """Powers of two up to half the pool: above, the subsets overlap so much that a prompt counts about once."""
    return [1, *(2**power for power in range(1, pool.bit_length()) if 2**power <= pool // 2)]


def parse_ns(text: str) -> list[int]:
    """`"1,2,64"` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--ns {text!r}: write whole numbers with commas between them, such as 1,2,4,8") from None


def evaluate(
    pool_folder: Path,
    gold: Any,
    proxy: str,
    *,
    ns: Sequence[int] | None = None,
    lam: float = 0.5,
    normalise: str = "member",
    resamples: int = RESAMPLES,
    seed: int = 1,
) -> dict[str, Any]:
    """Score a pool with gold and with every member of a proxy ensemble, and estimate the four curves.

    Args:
        pool_folder: a complete pool.
        gold: a reward.
        proxy: path of an ensemble's run or of a reward model.
        ns: None: `default_ns`.
        lam, normalise, resamples, seed: as of `overoptimization_curves`.

    Returns:
        What best_of_n.json holds: settings, descriptions, `curves`.

    Raises:
        UserError: pool, reward model, constants or n that do not fit.
    """
    from alignment.rewards.scored import EnsembleReward
    from evaluation.pools import identity_of, open_pool, stored_scores

    pool = open_pool(pool_folder)
    ensemble = EnsembleReward(path=proxy, how="mean", normalise="none")  # how it is aggregated comes later
    mean, std = ensemble.constants() if normalise == "member" else (None, None)  # before hours of scoring
    gold_identity, proxy_identity = identity_of(gold), identity_of(ensemble)
    gold_scores = stored_scores(pool, gold_identity, gold.score, "gold")[0]
    members = stored_scores(pool, proxy_identity, ensemble.member_scores, "proxy")
    settings: dict[str, Any] = {"lam": lam, "normalise": normalise, "resamples": resamples, "seed": seed}
    try:
        curves = overoptimization_curves(
            members, gold_scores, ns or default_ns(pool.n), mean=mean, std=std, **settings
        )
    except ValueError as error:
        raise UserError(f"{pool_folder}: {error}") from None
    return {
        "pool": {"folder": str(pool_folder), **pool.manifest},
        "gold": gold_identity,
        "proxy": {"path": proxy, "members": len(members), "mean": mean, "std": std},
        **settings,
        "unscored": {"gold": int(np.isnan(gold_scores).sum()), "members": np.isnan(members).sum(axis=(1, 2)).tolist()},
        "curves": curves,
    }


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Best-of-n sampling from a pool: does a proxy reward over-optimise? docs/best_of_n.md",
    no_args_is_help=True,
)
PoolFolder = Annotated[Path, typer.Option(help="Folder of the pool.")]


@app.command("sample")
def sample_command(
    model: Annotated[str, typer.Argument(help="Policy: hub id, folder or adapter.")],
    prompts: Annotated[Path, typer.Option(help="Text, one prompt a line; or rows: .jsonl, .json, .parquet, .csv.")],
    pool: PoolFolder,
    n: Annotated[int, typer.Option(min=1, help="Samples per prompt; twice the largest n of interest or more.")] = 512,
    limit: Limit = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    batch_size: BatchSize = 64,
    seed: Seed = 1,
    dtype: Dtype = "float32",
    shard: Annotated[
        int | None, typer.Option(min=1, help="Prompts per file: what is lost when killed. [4,096 samples' worth]")
    ] = None,
) -> None:
    """Draw n samples of every prompt into a folder. Run it again to go on after an interruption."""
    from alignment.data.prompt_files import read_prompts
    from alignment.models.sampling import Generation
    from evaluation.plans import ModelSource
    from evaluation.pools import sample_source

    made = sample_source(
        ModelSource(model, {"name_or_path": model, "dtype": dtype}),
        read_prompts(prompts, limit),
        pool,
        n,
        generation=Generation(max_new_tokens, temperature, top_p, top_k, batch_size),
        seed=seed,
        chat=chat,
        prompts_per_shard=shard,
    )
    print(f"{pool}: {made.prompts} prompts, {made.n} samples each, in {len(made.shards)} shards")


@app.command("curves")
def curves_command(
    pool: PoolFolder,
    gold: Annotated[str, typer.Option(help="What is really wanted: a reward of docs/rewards.md.")],
    proxy: Annotated[str, typer.Option(help="An ensemble's run folder, or a reward model's.")],
    gold_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of the gold reward, such as path=gold-model.")
    ] = None,
    ns: Annotated[str | None, typer.Option(help="Such as 1,2,4,8. [powers of two up to half the pool]")] = None,
    lam: Annotated[float, typer.Option(min=0, help="Weight of the variance in uwo; 0 is the mean.")] = 0.5,
    normalise: Annotated[
        str, typer.Option(help="member: standardise members by their stored constants; none: as they are.")
    ] = "member",
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of prompts.")] = RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder of best_of_n.json, .md, .html. [POOL/curves]")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print best_of_n.json's content instead of the text.")
    ] = False,
) -> None:
    """Gold and proxy score of the best of n against KL: single reward model, mean, worst case, uncertainty-weighted.

    Scores are kept in the pool's folder, so that another look costs no scoring.
    """
    from alignment.rewards import get_reward
    from evaluation.best_of_n_page import describe, write_result
    from evaluation.plans import say

    if normalise not in ("member", "none"):
        raise UserError(f"--normalise {normalise!r}: member or none")
    reward = get_reward(gold, **parse_keys("reward", gold, gold_key or []))
    wanted = None if ns is None else parse_ns(ns)
    result = evaluate(pool, reward, proxy, ns=wanted, lam=lam, normalise=normalise, resamples=bootstrap, seed=seed)
    written = write_result(output or pool / "curves", result)
    print(json.dumps(jsonable(result), allow_nan=False) if as_json else describe(result))
    say("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run_or_exit(app)
