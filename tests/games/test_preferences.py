"""Every kind of matrix is what its name says."""

import pytest
import torch

from alignment.games import preferences
from tests.games.playing import DOUBLE, draw


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", preferences.KINDS)
def test_both_orders_sum_to_one(kind):
    arms = 3 if kind == "rock_paper_scissors" else 6
    matrices = preferences.make(kind, arms, 4, seeded())
    assert matrices.shape == (4, arms, arms) and matrices.dtype == DOUBLE
    assert torch.equal(preferences.check(matrices), matrices)
    torch.testing.assert_close(matrices + matrices.mT, torch.ones_like(matrices), rtol=0, atol=1e-15)
    assert (matrices.diagonal(dim1=1, dim2=2) == 0.5).all()
    assert torch.equal(matrices, preferences.make(kind, arms, 4, seeded()))


def test_random_is_uniform_below_the_diagonal_and_every_game_is_another():
    matrices = preferences.random(10, games=200, generator=seeded(1))
    below = matrices[:, *torch.tril_indices(10, 10, -1)].flatten().sort().values
    assert (below - torch.linspace(0, 1, len(below), dtype=DOUBLE)).abs().max() < 1.63 / len(below) ** 0.5  # 1 % level
    assert len({tuple(m.flatten().tolist()) for m in matrices}) == 200


def test_cyclic_and_rock_paper_scissors():
    rock = [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]
    assert preferences.rock_paper_scissors().tolist() == rock
    five = preferences.cyclic(5, 0.4)
    assert five[0].tolist() == [0.5, 0.7, 0.7, 0.3, 0.3]
    assert five[3].tolist() == [0.7, 0.3, 0.3, 0.5, 0.7]
    assert preferences.cyclic(4)[1].tolist() == [0.0, 0.5, 1.0, 0.5]  # the arm across is a tie
    for arms in (3, 4, 7):
        assert preferences.cyclic(arms).sum(1).tolist() == [arms / 2] * arms


def test_the_others():
    rewards = draw(2, 4, seed=1)
    odds = preferences.bradley_terry(rewards).logit()
    torch.testing.assert_close(odds, rewards[:, :, None] - rewards[:, None, :], rtol=0, atol=1e-13)
    assert preferences.deterministic(3).tolist() == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert preferences.ties(2).tolist() == [[0.5, 0.5]] * 2


def test_what_cannot_be_made_is_refused():
    for kind, arms, strength, words in (
        ("randon", 3, 1.0, "unknown kind of game 'randon'"),
        ("ties", 1, 1.0, "at least two arms, got 1"),
        ("rock_paper_scissors", 4, 1.0, "has three arms, got 4"),
        ("cyclic", 4, 1.5, "strength must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            preferences.make(kind, arms, 1, seeded(), strength)
