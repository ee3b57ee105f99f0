"""Losses of reward models and of the general preference model: pure functions of scores, torch only.

Not a trainer (`alignment.trainers.reward_model`). Notation: r_w, r_l scores of chosen and rejected, D = r_w - r_l,
y the probability that the label is right (1 hard, 0.5 a tie), m a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["bradley_terry", "win_tie", "general"]


@dataclass(frozen=True)
class RewardLoss:
    """A reward model's loss and its settings; defaults add nothing to plain Bradley–Terry.

    Attributes:
        kind: bradley_terry; win_tie (SoliReward, Lian et al.: ties pull the scores together); general (GPM, Zhang et
            al. 2024, arXiv:2410.02197: `scores` are then `general_score`s, which may be intransitive).
        label_smoothing: a: assumed share of flipped labels; y becomes y(1 - a) + (1 - y)a (2401.06080, section 2.2.3).
        score_l2: beta of beta (r_w^2 + r_l^2) / 2 (Coste et al. 2310.02743, released configuration: 0.001).
        center: coefficient of (r_w + r_l)^2 (Eisenstein et al. 2312.09244, eq. 2; 0.01 is TRL's advice).
        tie_weight: of a tie's two terms: 0.5 is the paper's form (minimum ln 2), 1 the released code's (2 ln 2).
        tie_margin: m of a tie's terms -log sigmoid(D - m) - log sigmoid(-D - m); 0 in the paper.
        temperature: tau of `general`: P = sigmoid(s / tau); the paper's 0.1.
    """

    kind: Kind = "bradley_terry"
    label_smoothing: float = 0.0
    score_l2: float = 0.0
    center: float = 0.0
    tie_weight: float = 0.5
    tie_margin: float = 0.0
    temperature: float = 0.1

    def __call__(
        self, chosen: Tensor, rejected: Tensor, label: Tensor | None = None, margin: Tensor | None = None
    ) -> Tensor:
        """One value per pair and head, in the shape of `chosen`.

        Args:
            chosen, rejected: scores `[B]` or `[B, k]`, computed in float32. Of `general`: s(chosen > rejected) and 0.
            label: `[B]` in [0, 1]; None: all 1.
            margin: `[B]`, m >= 0 by which chosen should win; None: 0.
        """
        chosen, rejected = chosen.float(), rejected.float()
        y = torch.ones_like(chosen) if label is None else _beside(label, chosen)
        m = torch.zeros_like(chosen) if margin is None else _beside(margin, chosen)
        tie = (y == 0.5) & (self.kind == "win_tie")
        y = y * (1 - self.label_smoothing) + (1 - y) * self.label_smoothing
        difference = chosen - rejected
        if self.kind == "general":
            difference = difference / self.temperature  # P(w > l) = sigmoid(s / tau), section 4.2 of 2410.02197
        loss = -y * F.logsigmoid(difference - m) - (1 - y) * F.logsigmoid(-difference - m)  # Coste eq. 2, with labels
        both = -F.logsigmoid(difference - self.tie_margin) - F.logsigmoid(-difference - self.tie_margin)
        loss = torch.where(tie, self.tie_weight * both, loss)
        if self.score_l2:
            loss = loss + self.score_l2 * (chosen**2 + rejected**2) / 2
        if self.center:
            loss = loss + self.center * (chosen + rejected) ** 2
        return loss


def _beside(values: Tensor, scores: Tensor) -> Tensor:
    """`[B]` values in the shape of `[B]` or `[B, k]` scores."""
    return values.float().reshape(-1, *[1] * (scores.dim() - 1)).expand_as(scores)


# --- the general preference model -----------------------------------------------------------------------------------


def unit(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """`[..., 2k]` embeddings on the unit sphere, in float32; `eps` keeps a zero vector's gradient finite."""
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(eps)


def general_score(first: Tensor, second: Tensor, gate: Tensor | None = None) -> Tensor:
    """s(first > second) = sum_l lambda_l (v_i[2l-1] v_j[2l] - v_i[2l] v_j[2l-1]), GPM's eq. 4 with its gate.

    The determinant of each plane, <R v_i, v_j> with R = [[0, -1], [1, 0]]; the paper writes both signs, and this one
    makes 0, 120, 240 degrees a cycle in which each beats the next (section D, oracle 4). Antisymmetric to the last
    bit: swapping the arguments swaps two products of one subtraction.

    Args:
        first, second: `[..., 2k]` unit embeddings v_i, v_j.
        gate: `[..., k]` lambda >= 0 that sums to 1 (softmax of the prompt's gate logits); None: all 1.

    Returns:
        `[...]` scores; at most max(lambda) in size with a gate, at most 1 without.
    """
    a, b = first[..., 0::2], first[..., 1::2]
    c, d = second[..., 0::2], second[..., 1::2]
    planes = a * d - b * c
    return (planes if gate is None else gate * planes).sum(-1)


def general_matrix(vectors: Tensor, gate: Tensor | None = None) -> Tensor:
    """`[K, 2k]` embeddings of K responses to one prompt → `[K, K]` scores s(i > j), exactly antisymmetric."""
    return general_score(vectors[:, None, :], vectors[None, :, :], gate)
