"""Log-probs of responses one at a time, without padding, masks or position ids: what every row layout must equal.

    truth = unpadded_logps(model, prompts, responses)                  # [n, k], nats
    noise = rounding_noise(model, embeddings, dtype, prompts, responses, truth)

How far two right computations may lie apart is measured on the same rows, not assumed: the truth is computed again
with every input embedding off by half a unit in the last place, and `allowed` is a multiple of what that changes. In
float32 it is about 1e-7, and the floor decides; in bfloat16 it depends on the model: 7e-5 to 9e-3 was measured.

Not here: how rows are laid out (`scoring.py`), who compares (`layout.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from datasets import Dataset

from alignment.models.scoring import relative_gap

MULTIPLE = 5  # of the measured noise: rounding errors arise in every layer, and not in the embeddings alone
FLOOR = 1e-4  # of what is allowed, relative

Group = tuple[list[int], list[list[int]]]  # token ids of a prompt and of its k responses


def unpadded_logps(
    model: Callable[..., Any], prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], device: Any
) -> torch.Tensor:
    """`[n, k]` log-probs in nats, float32: each response in a forward pass of its own."""
    return torch.stack(
        [
            torch.stack([_alone(model, prompt, response, device) for response in group])
            for prompt, group in zip(prompts, responses, strict=True)
        ]
    )


def _alone(model: Callable[..., Any], prompt: list[int], response: list[int], device: Any) -> torch.Tensor:
    ids = torch.tensor([prompt + response], device=device)
    scored = len(response) - (not prompt)  # nothing precedes the first token of an empty prompt's response
    if not scored:
        return torch.zeros((), device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=scored + 1).logits[0, -scored - 1 : -1]
    return -F.cross_entropy(logits.float(), ids[0, -scored:], reduction="sum")


def rounding_noise(
    model: Callable[..., Any],
    embeddings: torch.nn.Module,
    dtype: torch.dtype,
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    truth: torch.Tensor,
) -> float:
    """Largest relative change of `truth` where every input embedding is off by half a unit in the last place.

    Args:
        model: the (wrapped) model.
        embeddings: its module of input embeddings.
        dtype: in which it computes.
        prompts, responses: token ids.
        truth: their `unpadded_logps`.
    """
    with _rounded(embeddings, torch.finfo(dtype).eps / 2):
        return relative_gap(unpadded_logps(model, prompts, responses, truth.device), truth)


@contextlib.contextmanager
def _rounded(embeddings: torch.nn.Module, share: float) -> Iterator[None]:
    """The module's outputs with each number a `share` larger or smaller; signs from a generator of their own."""
    generator = torch.Generator().manual_seed(0)

    def change(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8).to(output.device)
        return (output.float() * (1 + share * (2.0 * signs - 1))).to(output.dtype)

    handle = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def allowed(noise: float) -> float:
    """The relative difference of log-probs that rounding explains."""
    return MULTIPLE * noise + FLOOR


def width(group: Group) -> tuple[int, int]:
    """(tokens of a prompt and all its responses, tokens of the prompt and the longest response)."""
    prompt, responses = group
    lengths = [len(response) for response in responses]
    return len(prompt) + sum(lengths), len(prompt) + max(lengths)


def extremes(widths: Sequence[tuple[int, int]]) -> list[int]:
    """Which groups have the most tokens, the longest response, the fewest tokens, and a middling number."""
    order = sorted(range(len(widths)), key=lambda i: widths[i])
    longest = max(order, key=lambda i: widths[i][1])
    return list(dict.fromkeys([order[-1], longest, order[0], order[len(order) // 2]]))


def column_widths(dataset: Dataset, branches: Sequence[str], max_length: int | None) -> list[tuple[int, int]]:
    """`width` of every row of a dataset of token ids, responses cut at `max_length`; reads no token."""
    table: Any = dataset.select_columns(["prompt_ids", *(f"{b}_ids" for b in branches)]).with_format("arrow")[:]
    prompt, *lengths = (pc.list_value_length(table[name]).to_numpy() for name in table.column_names)
    if max_length is not None:
        lengths = [np.minimum(length, max_length - prompt) for length in lengths]
    total, longest = prompt + np.sum(lengths, axis=0), prompt + np.max(lengths, axis=0)
    return list(zip(total.tolist(), longest.tolist(), strict=True))
