"""Fresh prompts in every iteration, none lost, none asked twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alignment.data.preferences import read_rows
from alignment.errors import UserError
from alignment.files import read_json_object, write_json_lines
from alignment.pipeline.prompts import seed_of, shares, write_prompts
from alignment.recipes import load_iterate_recipe
from tests.pipeline.conftest import QUICKSTART


@pytest.fixture
def written(small, tmp_path):
    """`written(*overrides)`: the rows of prompts.jsonl."""

    def rows(*more):
        write_prompts(load_iterate_recipe(QUICKSTART, small(tmp_path / "run", *more)), tmp_path / "out")
        return read_rows(tmp_path / "out" / "prompts.jsonl")

    return rows


def by_iteration(rows):
    return SimpleNamespace(**{f"of{t}": [r["prompt"] for r in rows if r["iteration"] == t] for t in (1, 2, 3)})


@pytest.mark.parametrize(("total", "iterations"), [(41, 3), (7, 7), (100, 9), (60_000, 3)])
def test_shares_add_up_and_differ_by_one_at_most(total, iterations):
    found = shares(total, iterations)
    assert sum(found) == total and max(found) - min(found) <= 1


def test_every_prompt_is_asked_in_one_iteration(written, prompts):
    rows = by_iteration(written("iterate.iterations=3"))
    assert [len(rows.of1), len(rows.of2), len(rows.of3)] == [14, 14, 13]
    asked = prompts.read_text().split("\n")[:-1]
    assert sorted(rows.of1 + rows.of2 + rows.of3) == sorted(asked)
    assert rows.of1 != asked[:14]  # not in the order of the file


def test_so_many_in_each_iteration_where_that_is_said(written):
    rows = by_iteration(written("iterate.prompts_per_iteration=20"))
    assert len(rows.of1) == len(rows.of2) == 20 and not set(rows.of1) & set(rows.of2)


def test_too_few_prompts_are_said_with_numbers(written, prompts):
    with pytest.raises(UserError, match="41 prompts for 2 iterations of 30 are 19 too few; lower iterate.prompts_per"):
        written("iterate.prompts_per_iteration=30")
    with pytest.raises(UserError, match="41 prompts, but 100 are asked for"):
        written(f"data.prompts={{name: {prompts}, limit: 100}}")


def test_a_source_for_each_iteration_and_no_prompt_in_two(written, tmp_path, capsys):
    write_json_lines(tmp_path / "one.jsonl", [{"prompt": f"my {n}"} for n in ("dog", "cat", "coat")])
    write_json_lines(tmp_path / "two.jsonl", [{"prompt": f"my {n}"} for n in ("boat", "cat", "river")])
    rows = by_iteration(written(f"data.prompts=[{tmp_path / 'one.jsonl'}, {tmp_path / 'two.jsonl'}]"))
    assert sorted(rows.of1) == ["my cat", "my coat", "my dog"] and sorted(rows.of2) == ["my boat", "my river"]
    assert "1 prompts repeated" in capsys.readouterr().out
    counts = read_json_object(tmp_path / "out" / "counts.json")
    assert counts["usable"] == 6 and counts["repeated"] == 1 and counts["iterations"] == {"1": 3, "2": 2}
    sources = f"data.prompts=[{tmp_path / 'one.jsonl'}, {tmp_path / 'two.jsonl'}]"
    with pytest.raises(UserError, match="2 prompts for 1 iterations of 3 are 1 too few"):
        written(sources, "iterate.prompts_per_iteration=3")
    assert len(written(sources, "iterate.prompts_per_iteration=1")) == 2
    assert read_json_object(tmp_path / "out" / "counts.json")["not_asked"] == 3


def test_prompts_that_the_evaluation_asks_are_refused_or_dropped(written, prompts, tmp_path):
    asked = prompts.read_text().split("\n")[:3]
    (tmp_path / "held_out.txt").write_text("\n".join(asked))
    judged = f"evaluation={{prompts: {tmp_path / 'held_out.txt'}, limit: null}}"
    with pytest.raises(UserError, match="3 of 41 prompts of .*openings.txt are also judged on"):
        written(judged)
    assert not {row["prompt"] for row in written(judged, "data.overlap=drop")} & set(asked)


def test_seeds_of_different_purposes_differ():
    seeds = {seed_of(s, t, role) for s in (0, 1) for t in (1, 2) for role in ("samples", "labels", "calibration")}
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)
