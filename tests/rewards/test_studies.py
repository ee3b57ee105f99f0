"""Judges for studying objectives: a shift that no comparison within a prompt sees, preferences that go round."""

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.rewards import get_oracle, get_reward

PROMPTS = [f"prompt {i}" for i in range(400)]


def test_a_shift_depends_on_the_prompt_alone():
    plain, shifted = get_reward("length"), get_reward("shifted", reward="length", scale=3.0, seed=1)
    one, other = ["abc"] * 400, ["defghij"] * 400
    gaps = np.array(shifted.score(PROMPTS, other)) - np.array(shifted.score(PROMPTS, one))
    assert gaps == pytest.approx(np.full(400, 4.0))
    moved = np.array(shifted.score(PROMPTS, one)) - np.array(plain.score(PROMPTS, one))
    assert abs(moved.mean()) < 4 * 3.0 / 20 and 2.5 < moved.std() < 3.5  # 400 draws of N(0, 9)
    assert shifted.score(PROMPTS[:3], one[:3]) == shifted.score(PROMPTS, one)[:3]
    again = get_reward("shifted", reward="length", scale=3.0, seed=2).score(PROMPTS, one)
    assert not np.allclose(again, shifted.score(PROMPTS, one))


def test_preferences_go_round():
    oracle = get_oracle("cyclic", pattern=r"x", strength=0.8)
    texts = ["x", "xx", "xxx"]
    won = oracle.probability(["p"] * 3, texts[1:] + texts[:1], texts)  # each beats the one before it, and 1 beats 3
    assert won == pytest.approx([0.8, 0.8, 0.8])
    assert oracle.probability(["p"] * 3, texts, texts[1:] + texts[:1]) == pytest.approx([0.2, 0.2, 0.2])
    assert oracle.probability(["p"], ["ax"], ["bx"]) == [0.5]
    assert oracle.probability(["p"], ["xxxx"], ["x"]) == [0.5]  # modulo 3


@pytest.mark.parametrize(
    ("kind", "name", "keys", "word"),
    [
        ("reward", "shifted", {"reward": "length", "scale": -1}, "scale"),
        ("reward", "shifted", {"reward": "length", "seed": 0.5}, "seed"),
        ("reward", "shifted", {"reward": 3}, "reward"),
        ("reward", "shifted", {"reward": {"name": "nope"}}, "nope"),
        ("oracle", "cyclic", {"pattern": "("}, "pattern"),
        ("oracle", "cyclic", {"pattern": "x", "strength": 0.4}, "strength"),
    ],
)
def test_mistakes(kind, name, keys, word):
    with pytest.raises(UserError, match=word):
        (get_reward if kind == "reward" else get_oracle)(name, **keys)
