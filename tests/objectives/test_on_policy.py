"""What all on-policy objectives share: their batches, what is refused, cards, and a user's own."""

import math

import pytest
import torch

from alignment.objectives import (
    GroupLogps,
    PairLogps,
    SamplePairs,
    get_objective,
    list_objectives,
    load_plugin,
)
from alignment.objectives.conformance import run_checks
from alignment.objectives.samples import NEEDS_OF

CARDS = {card.name: card for card in list_objectives() if card.batch != "pairs"}
ZEROS = torch.zeros(3)
PLUGIN = """
from alignment.objectives import Card, SampleObjective, hyper, register

@register
class Plain(SampleObjective):
    card = Card(name="plain_pg", title="Plain policy gradient", paper="nobody", equation="none",
                formula="-(r1 - r2)(s1 - s2)/2", needs=("reward",), judge="reward")
    scale: float = hyper("factor", default=1.0, gt=0)

    def sample_loss(self, batch):
        return -self.scale * (batch.reward_first - batch.reward_second) * (batch.first - batch.second) / 2
"""


def full_pairs(**more):
    names = NEEDS_OF["samples"]
    values = {name: torch.full((3,), -1.0) for name in ("first", "second", *names["behaviour"], *names["reference"])}
    values |= {name: torch.ones(3) for name in (*names["length"], *names["reward"])}
    values |= {name: torch.full((3,), 0.5) for name in (*names["preference"], *names["duel"])}
    return SamplePairs(**(values | more))


def test_the_issue_s_objectives_exist_and_say_what_judges_them() -> None:
    found = {name: (card.batch, card.judge) for name, card in CARDS.items()}
    oracle = dict.fromkeys(("egpo", "online_ipo1", "online_ipo2", "nash_md", "nash_md_pg"), ("samples", "oracle"))
    assert found == oracle | {"p3o": ("samples", "reward"), "likelihood": ("groups", "none")}
    assert {get_objective(card.name).judge for card in list_objectives() if card.batch == "pairs"} == {"none"}


@pytest.mark.parametrize(
    ("name", "keywords", "needs"),
    [
        ("p3o", {}, ("behaviour", "reference", "reward")),
        ("egpo", {}, ("reference", "preference")),
        ("online_ipo1", {"normalization": "mean"}, ("reference", "preference", "length")),
        ("online_ipo2", {}, ("reference", "duel")),
        ("nash_md", {}, ("reference", "preference")),
        ("nash_md_pg", {"normalization": "mean"}, ("reference", "preference", "length")),
    ],
)
def test_needs_are_exact_and_a_missing_column_is_named(name, keywords, needs) -> None:
    objective, full = get_objective(name, **keywords), full_pairs()
    assert objective.needs == needs
    read = ["first", "second", *(column for need in needs for column in NEEDS_OF["samples"][need])]
    kept = {column: full.column(column) for column in read}
    torch.testing.assert_close(objective.loss(SamplePairs(**kept)), objective.loss(full))
    for column in read[2:]:
        rest = {name: value for name, value in kept.items() if name != column}
        for function in (objective.loss, objective.statistics):
            with pytest.raises(ValueError, match=f"objective '{name}' needs .*: the batch lacks '{column}' "):
                function(SamplePairs(**rest))


@pytest.mark.parametrize("name", sorted(CARDS))
def test_another_kind_of_batch_and_labelled_pairs_are_refused(name) -> None:
    objective = get_objective(name)
    pairs = PairLogps(ZEROS, ZEROS, ZEROS, ZEROS)
    wanted = {"samples": "SamplePairs", "groups": "GroupLogps"}[objective.card.batch]
    with pytest.raises(ValueError, match=f"{name}: learns from {wanted}, got PairLogps"):
        objective.loss(pairs)
    for function in (objective.rewards, objective.saturated):
        with pytest.raises(ValueError, match=f"{name}: learns from samples"):
            function(pairs)
    assert objective.capped(pairs) is None
    with pytest.raises(ValueError, match=f"spo: base must be another objective, got '{name}'"):
        get_objective("spo", base=name)


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.batch == "samples"])
def test_rows_do_not_mix_and_half_precision_is_computed_in_single(name) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = {name: torch.rand(7, generator=generator, dtype=torch.float64) for name in full_pairs().columns()}
    lengths = {name: 1 + 9 * drawn[name] for name in ("first_length", "second_length")}
    pairs = SamplePairs(**(drawn | lengths))
    for keywords in ({}, *CARDS[name].settings):
        objective = get_objective(name, **keywords)
        rows = [objective.loss(pairs.map(lambda column, row=row: column[[row]])) for row in range(7)]
        torch.testing.assert_close(torch.cat(rows), objective.loss(pairs), rtol=1e-14, atol=1e-14)
        half = pairs.map(lambda column: column.bfloat16())
        assert objective.loss(half).dtype == torch.float32
        for value in objective.statistics(pairs).values():
            assert value.shape == (7,)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"first": torch.zeros(3, 1)}, r"first has shape \[3, 1\], expected \[B\]"),
        ({"second": torch.zeros(2)}, r"second has shape \[2\], expected \[3\]"),
        ({"first": torch.zeros(3).long()}, "first must be floating point, got torch.int64"),
        ({"ref_second": [0.0]}, "ref_second must be a tensor, got list"),
        ({"preference": torch.tensor([0.5, 1.5, 0.5])}, r"preference must be in \[0, 1\], got 1.5 in row 1"),
        ({"preference_first": torch.tensor([0.5, 0.5, math.nan])}, r"preference_first must be in .* got nan in row 2"),
        ({"second_length": torch.tensor([0, 3, 4])}, "second_length must be at least 1, got 0 in row 0"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(columns, message) -> None:
    with pytest.raises(ValueError, match=f"SamplePairs: {message}"):
        full_pairs(**columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"cot": torch.zeros(6)}, r"cot has shape \[6\], expected \[B, G\]"),
        ({"answer": torch.zeros(2, 4, 5)}, r"answer has shape \[2, 4, 5\], expected \[2, 3, 5\]"),
        ({"answer_mask": torch.ones(2, 5)}, r"answer_mask has shape \[2, 5\], expected \[2, 1, 5\] or \[2, 3, 5\]"),
        ({"answer_mask": torch.ones(1, 1, 5)}, r"answer_mask has shape \[1, 1, 5\], expected \[2, 1, 5\] or"),
        ({"verified": torch.ones(2)}, r"verified has shape \[2\], expected \[2, 3\]"),
        ({"valid": torch.ones(2, 3, 1)}, r"valid has shape \[2, 3, 1\], expected \[2, 3\]"),
        ({"answer": torch.zeros(2, 3, 5).long()}, "answer must be floating point"),
    ],
)
def test_groups_that_do_not_fit_are_refused(columns, message) -> None:
    given = {"cot": torch.zeros(2, 3), "answer": torch.zeros(2, 3, 5), "answer_mask": torch.ones(2, 1, 5)}
    with pytest.raises(ValueError, match=f"GroupLogps: {message}"):
        GroupLogps(**(given | columns))


def test_swapping_twice_is_the_same_batch() -> None:
    columns = [name for name in full_pairs().columns() if not name.endswith("_length")]
    values = {name: torch.tensor([0.05 * at]) for at, name in enumerate(columns)}
    values |= {"first_length": torch.tensor([3]), "second_length": torch.tensor([4])}
    pairs = SamplePairs(**values)
    swapped = pairs.swapped()
    assert (swapped.first.item(), swapped.ref_second.item()) == (pairs.second.item(), pairs.ref_first.item())
    assert swapped.first_length.item() == 4
    assert swapped.preference.item() == pytest.approx(1 - pairs.preference.item())
    again = swapped.swapped()
    assert all(torch.equal(again.column(name), value) for name, value in pairs.columns().items())


def test_a_user_s_on_policy_objective_joins(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    assert load_plugin(file) == ["plain_pg"]
    objective = get_objective("plain_pg", scale=2)
    assert (objective.card.batch, objective.judge, objective.needs) == ("samples", "reward", ("reward",))
    assert objective.loss(full_pairs()).tolist() == [0, 0, 0]
    assert objective.statistics(full_pairs()) == {}
    assert [result for result in run_checks(["plain_pg"]) if not result.ok] == []
    file.write_text(PLUGIN.replace("batch.reward_second", "batch.behaviour_second"))
    load_plugin(file)
    failed = {result.check: result.detail for result in run_checks(["plain_pg"]) if not result.ok}
    assert set(failed) == {"columns"}
    file.write_text(PLUGIN.replace('needs=("reward",)', 'needs=("calibration",)'))
    with pytest.raises(ValueError, match="needs: unknown .'calibration'.; valid: behaviour, reference"):
        load_plugin(file)
