"""Sampling from a model whose scores are no numbers: which rows, instead of an error from deep inside `generate`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor


class FiniteScores(LogitsProcessor):
    """Notes rows whose next-token scores hold NaN or infinity, and lets them draw uniformly to their end."""

    def __init__(self) -> None:
        self._bad: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[rows, vocabulary]`, zeros in rows that hold no numbers; -inf is a token that is ruled out."""
        bad = ~scores.amax(1).isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        return torch.where(bad[:, None], torch.zeros_like(scores), scores)

    def take(self) -> list[int]:
        """The rows noted since the last call."""
        bad, self._bad = self._bad, None
        return [] if bad is None else bad.nonzero().flatten().tolist()


@contextlib.contextmanager
def processing(model: Any, *processors: LogitsProcessor) -> Iterator[None]:
    """Have `model.generate` use these, as long as the block lasts."""
    model.generate = functools.partial(model.generate, logits_processor=list(processors))
    try:
        yield
    finally:
        del model.generate
