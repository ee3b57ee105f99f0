"""Whole data sets: every bad row is written down with its number, too many stop the run, mixtures counted by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from alignment.data.pipeline import prepare_rows, write_rejected
from alignment.data.tables import fingerprint, mixture
from alignment.errors import UserError
from tests.data.building import TEMPLATE, letters, prepared, refused, reply, texts, user, write

GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}
BAD = {  # reason -> a row of that kind, with max_length 12 and a tokenizer that puts BOS (12 letters fit no prompt)
    "missing_field": {"prompt": "p", "chosen": "a"},
    "not_text": GOOD | {"rejected": False},
    "empty": GOOD | {"chosen": "\n"},
    "same_responses": GOOD | {"rejected": "good"},
    "different_prompts": {"prompt": user("p"), "chosen": [*user("q"), *reply("a")], "rejected": reply("b")},
    "same_after_truncation": GOOD | {"chosen": "0123456789a", "rejected": "0123456789b"},
    "prompt_too_long": GOOD | {"prompt": "elevenletters"},
    "tie": GOOD | {"label": 0.5},
    "bos_eos": GOOD | {"prompt": "<s>p"},
    "bad_number": GOOD | {"label": "high"},
    "unknown_form": {"prompt": user("p"), "chosen": reply("a"), "rejected": reply("b")},
}


def test_every_kind_of_bad_row_ends_in_the_file(tmp_path):
    rows = [GOOD | {"prompt": str(i)} for i in range(20)]
    for place, row in enumerate(BAD.values()):
        rows.insert(2 * place + 1, row)  # the rows 2, 4, … of the file
    name = write(tmp_path / "rows.jsonl", rows)
    found = prepared(name, letters(bos=True, template=TEMPLATE), max_length=12, max_rejected_share=0.5)
    assert found.rows == 31 and len(found.dataset) == 20
    assert found.counts == dict.fromkeys(BAD, 1)
    assert found.dataset["prompt"][:] == [str(i) for i in range(20)]
    file = write_rejected(tmp_path / "run", found)
    assert file == tmp_path / "run" / "rejected_rows.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in written] == list(zip(range(2, 24, 2), BAD, strict=True))
    assert {(row["set"], row["source"]) for row in written} == {("train", name)} and all(r["detail"] for r in written)
    assert found.summary()[0].startswith("train: 20 of 31 rows; rejected: ")
    assert found.manifest() == {"read": 31, "used": 20, "rejected": found.counts, "overlap": 0, "left_out": 0}


def test_no_bad_rows_no_file(tmp_path):
    found = prepared(write(tmp_path / "a.jsonl", [GOOD]))
    assert write_rejected(tmp_path / "run", found) is None and not (tmp_path / "run").exists()
    assert found.summary() == ["train: 1 of 1 rows"]


def test_too_many_bad_rows_stop_the_run(tmp_path):
    """2 of 10 are bad: a fifth. The two ties are counted, but are no mistake."""
    rows = [GOOD] * 6 + [GOOD | {"chosen": ""}, GOOD | {"chosen": 1}] + [GOOD | {"label": 0.5}] * 2
    name = write(tmp_path / "a.jsonl", rows)
    held_out = prepared(
        write(tmp_path / "fine.jsonl", [GOOD, GOOD | {"chosen": ""}]), role="eval", max_rejected_share=1
    )
    run = tmp_path / "runs" / "mine"
    write_rejected(run, prepared(name, max_rejected_share=0.2), held_out)
    written = [json.loads(line) for line in (run / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(row["set"], row["row"]) for row in written] == [("train", i) for i in (7, 8, 9, 10)] + [("eval", 2)]
    (run / "rejected_rows.jsonl").unlink()
    with pytest.raises(UserError) as stopped:
        write_rejected(run, prepared(name, max_rejected_share=0.19), held_out)
    beside = tmp_path / "runs" / "mine.rejected_rows.jsonl"  # a run that is stopped leaves no directory
    assert str(stopped.value) == (
        "data.train: 2 of 10 rows are unusable, more than data.max_rejected_share=0.19: mostly empty (1 rows, such as "
        f"{name}: row 7: chosen is empty); all are in {beside}"
    )
    assert len(beside.read_text().splitlines()) == 5 and not any(run.iterdir())


def test_every_source_has_to_be_usable(tmp_path):
    """Together 2 of 22 are bad, less than a tenth; the source that they are from is named."""
    fine = numbered(tmp_path, "fine", 20)
    bad = write(tmp_path / "bad.jsonl", [GOOD | {"chosen": 1}] * 2)
    half = write(tmp_path / "half.jsonl", [GOOD, GOOD | {"chosen": ""}])
    ties = write(tmp_path / "ties.jsonl", [GOOD | {"label": 0.5}] * 2)
    for name, message in (
        (bad, "none of 2 rows is usable: mostly not_text (2 rows, "),
        (ties, "none of 2 rows is usable: mostly tie (2 rows, "),
        (half, "1 of 2 rows are unusable, more than data.max_rejected_share=0.1: mostly empty (1 rows, "),
    ):
        weighted = [fine | {"weight": 1}, {"name": name, "weight": 1}]
        for sources in ([fine, name], weighted):
            with pytest.raises(UserError) as stopped:
                write_rejected(tmp_path / "run", prepared(sources, max_rejected_share=0.1))
            assert str(stopped.value).startswith(f"data.train: {name}: {message}such as {name}: row ")


def test_a_rejected_row_of_a_folder_is_found_in_its_file(tmp_path):
    (tmp_path / "data").mkdir()
    parts = [[GOOD, GOOD | {"chosen": 1}], [GOOD, GOOD, GOOD | {"chosen": "good</s></s>"}]]
    files = [write(tmp_path / f"data/train-0000{i}-of-00002.jsonl", rows) for i, rows in enumerate(parts)]
    found = prepared({"name": str(tmp_path), "split": "train[1:]"}, max_rejected_share=0.5)
    file = write_rejected(tmp_path / "run", found)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["source"], row["file"], row["row"]) for row in written] == [
        (f"{tmp_path}:train[1:]", files[0], 2),
        (f"{tmp_path}:train[1:]", files[1], 3),
    ]
    with pytest.raises(UserError, match=rf"such as {files[0]}: row 2: chosen"):
        write_rejected(tmp_path / "other", dataclasses.replace(found, max_rejected_share=0.1))


def test_no_row_left_stops_the_run_whatever_the_share(tmp_path):
    for row, reason in ((GOOD | {"chosen": 1}, "not_text"), (GOOD | {"label": 0.5}, "tie")):
        found = prepared(write(tmp_path / "a.jsonl", [row] * 2), max_rejected_share=1.0)
        with pytest.raises(UserError, match=f"data.train: none of 2 rows is usable: mostly {reason}"):
            write_rejected(tmp_path / "run", found)
    with pytest.raises(UserError, match="data.train: no rows"):
        write_rejected(tmp_path / "run", prepare_rows([], "here", letters(), max_length=9, role="train"))


def test_optional_columns_are_those_of_all_rows(tmp_path):
    scored = GOOD | {"reward_chosen": 1, "reward_rejected": 0}
    found = prepared(write(tmp_path / "a.jsonl", [scored, scored, GOOD]))
    assert refused(found) == [(3, "missing_field")] and found.dataset["reward_chosen"][:] == [1.0, 1.0]
    sources = [write(tmp_path / "scored.jsonl", [scored]), write(tmp_path / "plain.jsonl", [GOOD])]
    mixed = prepared(sources)
    assert len(mixed.dataset) == 2 and "reward_chosen" not in mixed.dataset.column_names
    assert [note for note in mixed.notes if "reward_chosen" in note] == [
        f"column reward_chosen is only in {sources[0]}: left out"
    ]


def test_soft_labels_of_one_source_are_filled_up_for_the_others(tmp_path):
    soft = write(tmp_path / "soft.jsonl", [GOOD | {"label": 0.75}])
    hard = write(tmp_path / "hard.jsonl", [GOOD])
    assert prepared([soft, hard]).dataset["label"][:] == [0.75, 1.0]
    assert "label" not in prepared(hard).dataset.column_names


def test_calibration_that_an_objective_needs(tmp_path):
    rows = [GOOD | {"calibration": "c"}] * 2
    sources = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [GOOD])]
    found = prepared(sources, calibration=True)
    assert [(bad.source, bad.row, bad.reason) for bad in found.rejected] == [(sources[1], 1, "missing_field")]
    assert len(found.dataset["calibration_ids"][0]) == 2  # c and EOS
    assert "calibration_ids" not in prepared(sources).dataset.column_names


def test_rows_in_memory():
    ids = {"prompt_ids": [9], "chosen_ids": [10, 2], "rejected_ids": [11]}
    rows = [GOOD | ids | {"label": 0.5}, GOOD | ids | {"label": 1}, GOOD | ids | {"chosen": None}]
    found = prepare_rows(rows, "samples", letters(), max_length=9, role="train")
    assert found.dataset["label"][:] == [0.5, 1.0]  # nobody asked to drop ties
    assert [(bad.source, bad.row) for bad in found.rejected] == [("samples", 3)]


def numbered(tmp_path, name: str, n: int, **keys):
    rows = [GOOD | {"prompt": f"{name}{i}"} for i in range(n)]
    return {"name": write(tmp_path / f"{name}.jsonl", rows), **keys}


def test_sources_without_weights_give_all_rows_in_order(tmp_path):
    sources = [numbered(tmp_path, "a", 3), numbered(tmp_path, "b", 5, limit=2)]
    found = prepared(sources)
    assert found.dataset["prompt"][:] == ["a0", "a1", "a2", "b0", "b1"] and found.rows == 5
    assert [(source["read"], source["used"]) for source in found.sources] == [(3, 3), (2, 2)]


def test_weights_are_shares_drawn_without_repetition_by_the_seed(tmp_path):
    """3 : 1 of 30 and 5 rows: 5 is a quarter of 20, so 15 of the 30."""
    sources = [numbered(tmp_path, "a", 30, weight=3), numbered(tmp_path, "b", 5, weight=1)]
    prompts = prepared(sources, seed=1).dataset["prompt"][:]
    assert [p[0] for p in prompts] == ["a"] * 15 + ["b"] * 5
    assert len(set(prompts)) == 20 and prompts != [f"a{i}" for i in range(15)] + [f"b{i}" for i in range(5)]
    found = prepared(sources, seed=1)
    assert found.summary() == ["train: 20 of 35 rows; 15 left out by the weights"]
    assert found.manifest()["left_out"] == 15 and [s["left_out"] for s in found.sources] == [15, 0]
    assert found.dataset["prompt"][:] == prompts
    assert prepared(sources, seed=2).dataset["prompt"][:] != prompts


@pytest.mark.parametrize(
    ("have", "weights", "take"),
    [
        ([7, 9], [None, None], [7, 9]),
        ([10, 10], [1, 1], [10, 10]),
        ([10, 100], [0.5, 0.5], [10, 10]),
        ([100, 30], [0.7, 0.3], [70, 30]),
        ([100, 10], [2, 1], [20, 10]),
        ([3, 3, 100], [1, 1, 1], [3, 3, 3]),
        ([5, 100], [1, 3], [5, 15]),
        ([4, 100], [3, 4], [4, 5]),  # total floor(4 * 7/3) = 9: 3.86 and 5.14
        ([0, 10], [1, 1], [0, 0]),
        ([9], [0.3], [9]),
    ],
)
def test_largest_mixture(have, weights, take):
    assert mixture(have, weights) == take


def test_mixtures_of_text_and_chat(tmp_path):
    text = numbered(tmp_path, "text", 1)
    chat = write(tmp_path / "chat.jsonl", [{"prompt": user("p"), "chosen": reply("a"), "rejected": reply("b")}])
    tokenizer = letters(template=TEMPLATE)
    with pytest.raises(UserError, match=r"data\.train: .*chat\.jsonl has chat messages and .*text\.jsonl text"):
        prepared([text, chat], tokenizer)
    assert texts(prepared([text | {"chat": True}, chat], tokenizer))[0][0] == user("text0")


def test_batches_do_not_show(tmp_path, monkeypatch):
    """Rows are tokenised some at a time; a bad one is found under its own number in every batch."""
    rows = [GOOD | {"prompt": "x" * (1 + i % 5)} for i in range(23)]
    rows[7] = rows[19] = GOOD | {"prompt": "<s><s>p"}
    name = write(tmp_path / "a.jsonl", rows)
    whole = prepared(name)
    monkeypatch.setattr("alignment.data.pipeline._TOKENISED_AT_ONCE", 4)
    apart = prepared(name)
    assert refused(apart) == refused(whole) == [(8, "control_token"), (20, "control_token")]
    assert apart.dataset.to_list() == whole.dataset.to_list()


def test_fingerprint_tells_every_value_and_the_order():
    first = prepare_rows([GOOD, GOOD | {"prompt": "q"}], "here", letters(), max_length=99, role="train").dataset
    again = prepare_rows([GOOD, GOOD | {"prompt": "q"}], "there", letters(), max_length=99, role="train").dataset
    other = prepare_rows([GOOD | {"prompt": "q"}, GOOD], "here", letters(), max_length=99, role="train").dataset
    bos = prepare_rows([GOOD, GOOD | {"prompt": "q"}], "here", letters(bos=True), max_length=99, role="train").dataset
    assert fingerprint(first) == fingerprint(again)
    assert len({fingerprint(data) for data in (first, other, bos)}) == 3
