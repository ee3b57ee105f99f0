"""Graded pairs (HelpSteer3, HelpSteer2): the sign says which response is better, the size by how much."""

from __future__ import annotations

import pytest

from tests.data.building import TEMPLATE, letters, prepared, refused, reply, texts, user, write

CHAT = letters(template=TEMPLATE)


def steer3(grade) -> dict:
    """A row in the layout of HelpSteer3."""
    graded = {"overall_preference": grade, "individual_preference": [{"score": grade}]}
    return {"domain": "general", "context": user("Plan"), "response1": "Bus.", "response2": "Train."} | graded


@pytest.mark.parametrize(
    "columns", [None, {"prompt": "context", "label": "overall_preference"}, {"label": "overall_preference"}]
)
def test_helpsteer3(tmp_path, columns):
    name = write(tmp_path / "a.jsonl", [steer3(-3), steer3(2), steer3(0), steer3("much")])
    found = prepared({"name": name, "columns": columns}, CHAT)
    assert texts(found) == [
        (user("Plan"), reply("Bus."), reply("Train.")),
        (user("Plan"), reply("Train."), reply("Bus.")),
    ]
    assert found.dataset["margin"][:] == [3.0, 2.0] and found.sources[0]["form"] == "graded"
    assert refused(found) == [(3, "tie"), (4, "bad_number")]
    soft = prepared({"name": name, "columns": columns, "ties": "soft"}, CHAT)
    assert soft.dataset["label"][:] == [1.0, 1.0, 0.5] and soft.dataset["margin"][:] == [3.0, 2.0, 0.0]


def test_helpsteer2_texts(tmp_path):
    row = {"split": "train", "prompt": "Plan", "response_1": "Bus.", "response_2": "Train.", "preference_strength": 1}
    name = write(tmp_path / "a.jsonl", [row])
    assert texts(prepared(name)) == [("Plan", "Train.", "Bus.")]
    assert texts(prepared(name, CHAT)) == [(user("Plan"), reply("Train."), reply("Bus."))]


def test_columns_that_nobody_reads_decide_nothing(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [pair | {"margin": "significantly better", "reward_chosen": "n/a", "label": "safe"}] * 2
    name = write(tmp_path / "a.jsonl", rows)
    found = prepared(name, reads=("label",))
    assert len(found.dataset) == 2 and not {"margin", "reward_chosen", "label"} & {*found.dataset.column_names}
    assert any("column label has no number in it" in note for note in found.notes)
    numbers = write(tmp_path / "b.jsonl", [pair | {"label": 0.7}, pair | {"label": "safe"}])
    assert refused(prepared(numbers, reads=("label",))) == [(2, "bad_number")]
    assert len(prepared(numbers, reads=()).dataset) == 2
