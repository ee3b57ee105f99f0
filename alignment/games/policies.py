"""Policies over the arms of B games at once: a table of logits, or a small network. No learning rule.

A policy's parameters are a list of tensors with the leading dimension B (games share none), and `logits` is a function
of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Parameters = list[Tensor]
WIDTH = 10  # of the network's input and of both hidden layers


class Policy(Protocol):
    """What the lab needs of a policy."""

    def start(self, ref_logits: Tensor, generator: torch.Generator) -> Parameters:
        """Parameters before training, for references `[B, n]`."""

    def logits(self, parameters: Parameters) -> Tensor:
        """`[B, n]`."""


class Tabular:
    """One logit per arm; starts at the reference."""

    def start(self, ref_logits: Tensor, generator: torch.Generator) -> Parameters:
        return [ref_logits.clone()]

    def logits(self, parameters: Parameters) -> Tensor:
        return parameters[0]


class Neural:
    """Softmax of a network with two hidden layers of width 10 (tanh) on a constant input.

    Three layers of width 10 are the EGPO simulation's; input, activation and initial scale are our choice. It can
    express every policy, starts where its random weights put it, and a step moves logits through the Jacobian.
    """

    def start(self, ref_logits: Tensor, generator: torch.Generator) -> Parameters:
        games, arms = ref_logits.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(games, *shape, generator=generator, dtype=ref_logits.dtype)

        weights = [normal(WIDTH, columns) / WIDTH**0.5 for columns in (WIDTH, WIDTH, arms)]
        return [*weights, normal(1, WIDTH), normal(1, WIDTH)]

    def logits(self, parameters: Parameters) -> Tensor:
        w1, w2, w3, b1, b2 = parameters
        constant = torch.ones(len(w1), 1, WIDTH, dtype=w1.dtype)
        hidden = torch.baddbmm(b1, constant, w1).tanh()
        hidden = torch.baddbmm(b2, hidden, w2).tanh()
        return torch.bmm(hidden, w3).squeeze(1)


POLICIES: dict[str, type[Tabular] | type[Neural]] = {"tabular": Tabular, "neural": Neural}
