"""Equivalences that the pipeline keeps, and not the loss alone: whole runs against each other.

INPO's target is a mixture of reference and previous iterate, ref^(tau/eta) pi_t^(1 - tau/eta). Each run here samples,
judges, pairs and trains for itself; nothing is shared but seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.data.preferences import read_rows
from tests.pipeline.conftest import content, losses

SAME = {"rtol": 1e-4, "atol": 1e-5}  # of losses: the two losses round differently, and steps carry it on


def weights(run: Path, iteration: int) -> torch.Tensor:
    tensors = load_file(run / f"iteration-{iteration}" / "train" / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def close(one: Path, other: Path, iteration: int) -> bool:
    a, b = torch.tensor(losses(one, iteration)), torch.tensor(losses(other, iteration))
    return a.shape == b.shape and torch.allclose(a, b, **SAME)


def pairs(run: Path, iteration: int) -> list[dict[str, Any]]:
    """What the iteration was trained on."""
    return read_rows(run / f"iteration-{iteration}" / "pairs" / "pairs.jsonl")


@pytest.fixture
def inpo(iterate):
    return iterate("inpo")


def test_the_first_iteration_of_inpo_is_ipo_whatever_tau(iterate, inpo):
    """pi_1 is the reference, so the mixture is the reference. From the second on they part."""
    ipo = iterate("ipo", "objective={name: ipo, tau: 0.25}")
    assert pairs(inpo, 1) == pairs(ipo, 1) and len(losses(inpo, 1)) >= 2
    assert close(inpo, ipo, 1)
    assert torch.allclose(weights(inpo, 1), weights(ipo, 1), rtol=0, atol=2e-5)
    assert not close(inpo, ipo, 2)


def test_tau_equal_to_eta_ignores_the_previous_iterate(iterate):
    """INPO with tau = eta is IPO against the fixed reference in every iteration."""
    whole = iterate("inpo", "objective={name: inpo, eta: 0.25, tau: 0.25}")
    ipo = iterate("ipo", "objective={name: ipo, tau: 0.25}", "reference=fixed")
    assert pairs(whole, 2) == pairs(ipo, 2)
    assert close(whole, ipo, 1) and close(whole, ipo, 2)
    prev = [row["prev_chosen"] for row in read_rows(whole / "iteration-2" / "logps" / "logps.jsonl")]
    ref = [row["ref_chosen"] for row in read_rows(whole / "iteration-2" / "logps" / "logps.jsonl")]
    assert max(abs(p - r) for p, r in zip(prev, ref, strict=True)) > 0.1  # there was something to ignore


@pytest.mark.slow
def test_tau_zero_is_ipo_against_the_previous_iterate(iterate):
    """And so `reference: previous` is what it says."""
    self_play = iterate("inpo", "objective={name: inpo, eta: 0.25, tau: 0.0}")
    ipo = iterate("ipo", "objective={name: ipo, tau: 0.25}", "reference=previous")
    assert pairs(self_play, 2) == pairs(ipo, 2)
    assert close(self_play, ipo, 1) and close(self_play, ipo, 2)


@pytest.mark.slow
def test_a_checkpoint_as_reference_is_a_setting(iterate, tiny, inpo):
    """Naming the base as the checkpoint is `fixed`; naming an iterate is not."""
    named = iterate("named", f"reference={{checkpoint: {tiny}}}")
    assert content(named).keys() == content(inpo).keys()
    assert close(named, inpo, 1) and close(named, inpo, 2)
    other = iterate("other", f"reference={{checkpoint: {inpo / 'final'}}}")
    assert pairs(other, 1) == pairs(inpo, 1) and not close(other, inpo, 1)


def test_log_probs_are_those_of_the_models_that_are_named(inpo, tiny):
    """Under pi_2 and the base, scored here by themselves, token by token."""
    from alignment.models import load_model
    from alignment.rewards.implicit import token_logps

    kept = read_rows(inpo / "iteration-2" / "logps" / "logps.jsonl")
    for column, place in (("ref", tiny), ("prev", inpo / "iteration-1" / "train" / "final")):
        model = load_model(place)
        for response in ("chosen", "rejected"):
            rows = [(pair["prompt_ids"], pair[f"{response}_ids"]) for pair in pairs(inpo, 2)]
            own = token_logps(model, rows).sum(1)
            stored = torch.tensor([row[f"{column}_{response}"] for row in kept])
            assert torch.allclose(own, stored, rtol=1e-4, atol=1e-3)
