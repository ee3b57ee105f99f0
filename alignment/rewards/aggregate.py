"""Several reward models' scores as one: mean, worst case, uncertainty-weighted (Coste et al. 2024, arXiv:2310.02743).

A pure function; the models are `alignment.rewards.scored.EnsembleReward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

How = Literal["mean", "wco", "uwo"]
STD_FLOOR = 1e-6


def aggregate(
    scores: torch.Tensor | np.ndarray,
    how: str = "uwo",
    lam: float = 0.5,
    normalise: str = "none",
    mean: Any = None,
    std: Any = None,
    ddof: int = 0,
) -> Any:
    """`[k, B]` scores of k members → `[B]`, of the same kind (tensor with its gradient, or array).

    A member that could not score a response (NaN) has no part in that response's aggregate; where no member could, it
    is NaN. That is our choice: the paper's members always score. Fewer members make wco and uwo less wary, so count
    them.

    Args:
        scores: higher is better.
        how: mean (eq. 3); wco, the minimum (eq. 4); uwo, mean - lam * variance (eq. 5).
        lam: lambda of uwo; 0 is the mean. The paper: 0.5 for best-of-n, 0.1 in PPO.
        normalise: "member" standardises every member by `mean` and `std` first: Bradley–Terry leaves its offset free.
        mean, std: `[k]`, measured once on a calibration set; never this batch's.
        ddof: of the variance; 0 is eq. 5's population variance. With 1, fewer than two scores have no variance, hence
            no penalty.

    Raises:
        ValueError: an unknown `how` or `normalise`, lam < 0, constants missing or of another length, no members.
    """
    import numpy as np
    import torch

    # Contiguous: torch takes no view with negative strides. A list becomes float64, not torch's float32.
    tensor = scores if isinstance(scores, torch.Tensor) else torch.as_tensor(np.ascontiguousarray(scores))
    if tensor.dim() != 2 or tensor.size(0) < 1:
        raise ValueError(f"scores: expected [members, responses], got shape {tuple(tensor.shape)}")
    if how not in ("mean", "wco", "uwo"):
        raise ValueError(f"how must be mean, wco or uwo, got {how!r}")
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam!r}")
    if normalise not in ("none", "member"):
        raise ValueError(f"normalise must be none or member, got {normalise!r}")
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if normalise == "member":
        tensor = (tensor - _constant(mean, "mean", tensor)) / _constant(std, "std", tensor).clamp_min(STD_FLOOR)
    found = _reduced(tensor, how, lam, ddof)
    return found if isinstance(scores, torch.Tensor) else found.numpy()


def _constant(values: Any, name: str, scores: torch.Tensor) -> torch.Tensor:
    """`[k, 1]` stored constants."""
    import torch

    if values is None:
        raise ValueError(f"normalise='member' needs {name}: one stored constant per member, never the batch's own")
    found = torch.as_tensor(values, dtype=scores.dtype, device=scores.device).reshape(-1)
    if len(found) != scores.size(0) or not bool(found.isfinite().all()):
        raise ValueError(f"{name}: expected {scores.size(0)} finite numbers, one per member, got {found.tolist()}")
    return found[:, None]


def _reduced(scores: torch.Tensor, how: str, lam: float, ddof: int) -> torch.Tensor:
    import torch

    there = ~scores.isnan()
    count = there.sum(0)
    kept = torch.where(there, scores, torch.zeros_like(scores))  # no NaN in a gradient either
    mean = kept.sum(0) / count.clamp_min(1)  # eq. 3
    if how == "wco":
        found = torch.where(there, scores, torch.full_like(scores, torch.inf)).amin(0)  # eq. 4
    elif how == "uwo":
        squares = torch.where(there, (kept - mean) ** 2, torch.zeros_like(scores)).sum(0)
        variance = squares / (count - ddof).clamp_min(1)
        found = mean - lam * torch.where(count > ddof, variance, torch.zeros_like(mean))  # eq. 5
    else:
        found = mean
    return torch.where(count > 0, found, torch.full_like(found, torch.nan))
