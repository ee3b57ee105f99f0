"""Reading preference files and prompts: what is accepted is kept exactly, what is not is named by its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.data.preferences import load_preferences, preference_dataset, read_prompts, read_rows
from alignment.errors import UserError

GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}
IDS = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text} for text in texts]


CHAT = {"prompt": [{"role": "user", "content": "p"}], "chosen": chat("good"), "rejected": chat("bad")}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_both_file_forms_give_the_same_rows(tmp_path):
    rows = [GOOD | {"prompt": f"line\u2028separator {i}"} for i in range(3)]  # U+2028 ends no row
    lines = write(tmp_path, "a.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in rows))
    one = write(tmp_path, "a.json", json.dumps(rows, indent=1))
    assert read_rows(lines) == read_rows(one) == rows
    assert load_preferences(str(lines)).to_list() == load_preferences(str(one)).to_list() == rows


def test_known_columns_travel_and_others_stay_behind():
    row = GOOD | IDS | {"reward_chosen": 1, "reward_rejected": -0.5, "calibration": "c", "source": "somewhere"}
    found = preference_dataset([row], "here")
    assert set(found.column_names) == set(row) - {"source"}
    assert found[0]["chosen_ids"] == [2, 3] and found[0]["reward_chosen"] == 1.0
    assert preference_dataset([CHAT], "here")[0] == CHAT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ('{"a": 1}\n\n7\n', r"a\.jsonl:3: a JSON object is needed"),
        ("\n\n", "no rows"),
    ],
)
def test_lines_that_cannot_be_read_are_named_as_an_editor_counts_them(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path, "a.jsonl", text))


def test_files_that_cannot_be_read(tmp_path):
    for content in ('{"prompt": 1}', "[1, 2]"):
        with pytest.raises(UserError, match=r"list of objects; for one object a line name it \.jsonl"):
            read_rows(write(tmp_path, "a.json", content))
    with pytest.raises(UserError, match=r"a\.json:2: not valid JSON"):
        read_rows(write(tmp_path, "a.json", "[\n{,}]"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl: .*UTF-8"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        load_preferences(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="neither a local file nor a data set that the hub gives"):
        load_preferences("nobody/no-such-data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "rejected": "bad"}, "column 'chosen' is missing"),
        (GOOD | {"chosen": 3}, "column 'chosen': expected text or a list of messages, got int"),
        (GOOD | {"rejected": " \n"}, "column 'rejected' is empty"),
        (CHAT | {"chosen": chat("good", "")}, "column 'chosen' is empty"),
        (CHAT | {"chosen": []}, "column 'chosen': expected text or a list of messages"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "column 'chosen': expected text or a list of messages"),
        (CHAT | {"rejected": "bad"}, "mix text and chat messages"),
        (CHAT, "text rows and chat rows are mixed in one file"),
        (GOOD | {"chosen": "bad"}, "chosen and rejected are the same"),
        (GOOD | {"reward_chosen": True}, "column 'reward_chosen': expected a number, got True"),
        (GOOD | {"reward_chosen": float("nan")}, "column 'reward_chosen': nan is not a finite number"),
        (GOOD | {"reward_chosen": None}, "column 'reward_chosen': expected a number, got None"),
        (GOOD | IDS | {"chosen_ids": [1.5]}, "column 'chosen_ids': expected a list of token ids"),
        (GOOD | IDS | {"chosen_ids": []}, "column 'chosen_ids' is empty"),
        (GOOD | {"calibration": chat("c")}, "prompt, chosen, rejected and calibration mix text and chat messages"),
        (GOOD | {"calibration": ""}, "column 'calibration' is empty"),
        (GOOD | {"calibration": 7}, "column 'calibration': expected text or a list of messages, got int"),
        (GOOD | IDS | {"a_note": 1}, "column 'chosen_ids' is in some rows only"),
    ],
)
def test_unusable_rows_are_named(row, message):
    """Row 1 is fine, row 2 is not."""
    with pytest.raises(UserError, match=r"^here: row 2: ") as refused:
        preference_dataset([GOOD, row], "here")
    assert message in str(refused.value)


def test_token_ids_come_together():
    """Ids for some of the three texts would be ignored, or worse."""
    with pytest.raises(UserError, match="row 1: column 'prompt_ids' needs rejected_ids beside it"):
        preference_dataset([GOOD | {"prompt_ids": [1], "chosen_ids": [2]}], "here")
    with pytest.raises(UserError, match="row 1: column 'calibration_ids' needs calibration beside it"):
        preference_dataset([GOOD | IDS | {"calibration_ids": [1]}], "here")


def test_equal_texts_with_different_tokens_are_a_pair():
    assert preference_dataset([GOOD | IDS | {"chosen": "bad"}], "here").num_rows == 1


def test_prompts(tmp_path):
    file = write(tmp_path, "p.txt", "# a comment\n one \n\ntwo # not a comment\n  # comment\nthree")
    assert read_prompts(file) == ["one", "two # not a comment", "three"]
    assert read_prompts(file, 2) == ["one", "two # not a comment"]
    with pytest.raises(UserError, match="3 prompts, but 4 are asked for"):
        read_prompts(file, 4)
    with pytest.raises(UserError, match="line 3: repeats the prompt of line 1"):
        read_prompts(write(tmp_path, "twice.txt", "one\ntwo\n one\n"))
    with pytest.raises(UserError, match="no prompts in it"):
        read_prompts(write(tmp_path, "none.txt", "# only this\n"))
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        read_prompts(tmp_path / "gone.txt")


USER, KIND, COLD = (
    {"role": "user", "content": "my dog is"},
    {"role": "assistant", "content": "kind ."},
    {"role": "assistant", "content": "cold ."},
)
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # UltraFeedback's binarised form: the prompt as text, and again at the head of both lists
        ({"prompt": "my dog is", "chosen": [USER, KIND], "rejected": [USER, COLD]}, [USER]),
        ({"prompt": "my dog is", "chosen": [SYSTEM, USER, KIND], "rejected": [SYSTEM, USER, COLD]}, [SYSTEM, USER]),
        # TRL's implicit prompt
        ({"chosen": [USER, KIND], "rejected": [USER, COLD]}, [USER]),
        # the prompt's messages repeated in both lists: they must not be trained on
        ({"prompt": [USER], "chosen": [USER, KIND], "rejected": [USER, COLD]}, [USER]),
        ({"prompt": [USER], "chosen": [KIND], "rejected": [COLD]}, [USER]),
        ({"prompt": "my dog is", "chosen": [KIND], "rejected": [COLD]}, [USER]),
    ],
)
def test_conversations_are_taken_apart_into_prompt_and_responses(row, prompt):
    data = preference_dataset([row], "made up")[0]
    assert (data["prompt"], data["chosen"], data["rejected"]) == (prompt, [KIND], [COLD])


def test_calibration_loses_the_prompt_too():
    row = {"prompt": "my dog is", "chosen": [USER, KIND], "rejected": [USER, COLD], "calibration": [USER, COLD]}
    assert preference_dataset([row], "made up")[0]["calibration"] == [COLD]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "my dog is", "chosen": [USER | {"content": "my dog is "}, KIND], "rejected": [USER, COLD]},
        {"prompt": [USER], "chosen": [USER, KIND], "rejected": [COLD]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, KIND], "rejected": [USER, COLD]},
        {"prompt": [USER], "chosen": [KIND], "rejected": [COLD], "calibration": [USER, COLD]},
    ],
)
def test_a_response_that_begins_with_what_the_user_says_is_refused(row):
    """Otherwise the prompt would be trained on as part of the response."""
    with pytest.raises(UserError, match="row 1: column '.*' begins with a user message"):
        preference_dataset([row], "made up")


def test_a_text_prompt_that_is_not_what_the_conversations_begin_with_is_refused():
    row = {"prompt": "your cat is", "chosen": [USER, KIND], "rejected": [USER, COLD]}
    with pytest.raises(UserError, match="row 1: column 'chosen' begins with a user message"):
        preference_dataset([row], "made up")
