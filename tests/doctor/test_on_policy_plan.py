"""`alignment doctor` on recipes whose policy draws its own responses: prompts are shown, lengths are those drawn."""

from __future__ import annotations

import json

import pytest

from alignment.doctor.setting import from_recipe
from alignment.errors import UserError
from alignment.recipes import load_recipe
from tests.doctor.conftest import made_up_rows
from tests.doctor.test_doctor import examined


@pytest.fixture
def on_policy(recipe_file, tmp_path):
    asked = tmp_path / "prompts.jsonl"
    rows = [{"prompt": row["prompt"], "answer": "kind"} for row in made_up_rows()]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data.train=null", "generation.max_new_tokens=8"]
    return lambda *more, name=asked: load_recipe(recipe_file, [*given, f"data.prompts={{name: {name}}}", *more])


@pytest.mark.parametrize(
    ("more", "responses", "reference"),
    [
        (("objective.name=p3o", "reward.name=vader"), (8, 8), "copy"),
        (("objective={name: vpo, mode: online}", "reward.name=vader"), (8, 8, 8), "copy"),
        (("objective.name=likelihood", "rollout.samples=5"), (8,) * 5, "none"),
    ],
)
def test_it_plans_what_is_drawn(on_policy, more, responses, reference):
    recipe = on_policy(*more)
    setting = from_recipe(recipe)
    assert (setting.prompt, setting.responses, setting.reference) == (56, responses, reference)
    ok, told = examined(recipe)
    assert ok and "prompts: 12 of 12 rows" in told and "the first one: " in told
    assert "Step 0, really run" not in told and "memory per device" in told
    assert ("5 x 8" in told) == (len(responses) == 5)
    assert "drawing, judging and scoring its samples is not planned" in told


def test_prompts_that_cannot_be_had_are_one_line(on_policy, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="none of 1 prompts can be used: row 1: no prompt"):
        examined(on_policy("objective.name=p3o", "reward.name=vader"))


def test_hub_prompts_that_cannot_be_had_leave_the_plan(on_policy):
    recipe = on_policy("objective.name=p3o", "reward.name=vader", name="{hub: nobody/no-such-prompts}")
    ok, told = examined(recipe)
    assert ok and "not looked at, for want of the prompts" in told and "memory per device" in told
