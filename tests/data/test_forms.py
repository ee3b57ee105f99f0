"""Every published form of preference rows, from small files, with and without a chat template; votes and ties."""

from __future__ import annotations

import pytest

from alignment.errors import UserError
from tests.data.building import TEMPLATE, letters, prepared, refused, reply, said, texts, user, write

CHAT = letters(bos=True, template=TEMPLATE)
EVERY_FILE = ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz", "rows.parquet")


def form_of(found) -> str:
    return found.sources[0]["form"]


@pytest.mark.parametrize("file", [*EVERY_FILE, "rows.csv"])
def test_prompt_chosen_rejected_as_texts(tmp_path, file):
    name = write(tmp_path / file, [{"prompt": "p", "chosen": " good", "rejected": " bad", "more": "x"}] * 2)
    for tokenizer in (letters(), CHAT):  # text stays text, whatever the tokenizer has
        found = prepared(name, tokenizer)
        assert texts(found) == [("p", " good", " bad")] * 2 and form_of(found) == "preference"
    found = prepared({"name": name, "chat": True}, CHAT)
    assert texts(found) == [(user("p"), reply(" good"), reply(" bad"))] * 2


@pytest.mark.parametrize("file", EVERY_FILE)
def test_chat_messages_and_whole_conversations(tmp_path, file):
    ask = said("user", "p")
    explicit = {"prompt": [ask], "chosen": reply("good"), "rejected": reply("bad")}
    ultrafeedback = {"prompt": "p", "chosen": [ask, *reply("good")], "rejected": [ask, *reply("bad")], "score": 9.0}
    implicit = {key: value for key, value in ultrafeedback.items() if key != "prompt"}
    for row in (explicit, ultrafeedback, implicit):
        found = prepared(write(tmp_path / file, [row] * 2), CHAT)
        assert texts(found) == [(user("p"), reply("good"), reply("bad"))] * 2 and form_of(found) == "preference"


HH = {
    "chosen": "\n\nHuman: Hi  there\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: A friend.",
    "rejected": "\n\nHuman: Hi  there\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: A foe.",
}
TURNS = [said("user", "Hi  there"), said("assistant", "Hello."), said("user", "Who?")]
CUT = HH["chosen"].rindex(" A friend.")


@pytest.mark.parametrize("file", [*EVERY_FILE, "rows.csv"])
def test_human_assistant_transcripts(tmp_path, file):
    name = write(tmp_path / file, [HH])
    # "A f" is shared by the replies, but the cut is after the marker.
    assert texts(prepared(name)) == [(HH["chosen"][:CUT], " A friend.", " A foe.")]
    assert texts(prepared(name, CHAT)) == [(TURNS, reply("A friend."), reply("A foe."))]
    assert texts(prepared({"name": name, "chat": False}, CHAT)) == texts(prepared(name))
    assert form_of(prepared(name)) == "hh"


def test_transcripts_with_the_prompt_apart(tmp_path):
    """Either the responses alone, or the prompt repeated at the head of both."""
    prompt = HH["chosen"][:CUT]
    alone = {"prompt": prompt, "chosen": " A friend.", "rejected": " A foe."}
    for row in (alone, HH | {"prompt": prompt}):
        found = prepared(write(tmp_path / "a.jsonl", [row]), CHAT)
        assert texts(found) == [(TURNS, reply("A friend."), reply("A foe."))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": HH["chosen"]}, "missing_field"),
        (HH | {"rejected": 3}, "not_text"),
        (HH | {"rejected": " "}, "empty"),
        (HH | {"rejected": HH["chosen"][:CUT] + " "}, "empty"),
        (HH | {"rejected": HH["chosen"]}, "same_responses"),
        (HH | {"rejected": "\n\nHuman: Bye\n\nAssistant: A foe."}, "different_prompts"),
        (HH | {"rejected": HH["rejected"].replace("Hello.", "Go.")}, "different_prompts"),
        (HH | {"rejected": HH["rejected"] + "\n\nHuman: Oh"}, "different_prompts"),
        (HH | {"rejected": "no turns"}, "unknown_form"),
        (HH | {"rejected": [said("user", "p")]}, "not_text"),
    ],
)  # fmt: skip
def test_transcripts_that_are_none(tmp_path, row, reason):
    name = write(tmp_path / "a.jsonl", [HH, HH, row])
    for tokenizer in (letters(), CHAT):
        assert refused(prepared(name, tokenizer)) == [(3, reason)]


def test_an_empty_turn_is_found_where_turns_are_told_apart(tmp_path):
    empty = {key: text.replace(" Who?", "") for key, text in HH.items()}
    assert refused(prepared(write(tmp_path / "a.jsonl", [HH, empty]), CHAT)) == [(2, "empty")]


@pytest.mark.parametrize("file", EVERY_FILE)
def test_sharegpt_pairs(tmp_path, file):
    turns = [
        {"from": "human", "value": "Hi  there"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Who?"},
    ]
    good, bad = ({"from": "gpt", "value": value} for value in ("A friend.", "A foe."))
    row = {"conversations": turns, "chosen": good, "rejected": bad}
    wanted = (TURNS, reply("A friend."), reply("A foe."))
    assert texts(prepared(write(tmp_path / file, [row]), CHAT)) == [wanted]
    listed = row | {"chosen": [good], "rejected": [bad], "system": "Be brief."}
    found = prepared(write(tmp_path / file, [listed]), CHAT)
    assert texts(found) == [([said("system", "Be brief."), *TURNS], *wanted[1:])] and form_of(found) == "sharegpt"
    whole = {"chosen": [*turns, good], "rejected": [*turns, bad]}
    assert texts(prepared(write(tmp_path / file, [whole]), CHAT)) == [wanted]


def test_sharegpt_rows_that_are_not(tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}
    rows = [
        *[row] * 4,
        row | {"conversations": [{"from": "narrator", "value": "a"}]},
        row | {"conversations": [{"from": "human", "value": 7}]},
        row | {"chosen": {"from": "human", "value": "b"}},
        row | {"conversations": None},
        row | {"system": 3},
        row | {"conversations": [{"from": ["human"], "value": "a"}]},
        row | {"chosen": {"from": {"role": "gpt"}, "value": "b"}},
    ]
    found = refused(prepared(write(tmp_path / "a.jsonl", rows), CHAT))
    assert found == [
        (5, "unknown_form"),
        (6, "not_text"),
        (7, "different_prompts"),
        (8, "missing_field"),
        (9, "not_text"),
        (10, "unknown_form"),
        (11, "unknown_form"),
    ]
    with pytest.raises(UserError, match="the rows are chat messages, and the model's tokenizer has no chat template"):
        prepared(write(tmp_path / "a.jsonl", [row]))


ALPACA = {"instruction": "Add.", "input": "1 1", "response1": "two", "response2": "three"}
ASKED = user("Add.\n\n1 1")


@pytest.mark.parametrize("file", [*EVERY_FILE, "rows.csv"])
def test_alpaca_with_two_responses_and_a_label(tmp_path, file):
    rows = [ALPACA | {"label": label} for label in (1, 2, 0)]
    name = write(tmp_path / file, rows)
    found = prepared(name, CHAT)
    assert texts(found) == [(ASKED, reply("two"), reply("three")), (ASKED, reply("three"), reply("two"))]
    assert refused(found) == [(3, "tie")] and form_of(found) == "alpaca"
    assert "label" not in found.dataset.column_names
    soft = prepared({"name": name, "ties": "soft"}, CHAT)
    assert soft.dataset["label"][:] == [1.0, 1.0, 0.5] and soft.rejected == []


def test_alpaca_as_text_is_alpacas_own_prompt(tmp_path):
    rows = [ALPACA | {"label": "A"}, ALPACA | {"label": "B", "input": ""}]
    (first, *pair), (second, *other) = texts(prepared(write(tmp_path / "a.jsonl", rows)))
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n"
        "### Response:"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert (pair, other) == (["two", "three"], ["three", "two"])


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 1", "output": ["two", "three"]},  # better first
        {"instruction": "Add.", "input": "1 1", "output": ["three", "two"], "preference": 2},
        {"instruction": "Add.", "input": "1 1", "output_1": "three", "output_2": "two", "preference": 2.0},
        {"instruction": "Add.\n\n1 1", "response_1": "two", "response_2": "three", "label": "a"},
        {"prompt": "Add.\n\n1 1", "response1": "two", "response2": "three", "label": "1"},
        {"instruction": "Add.", "input": "1 1", "chosen": "two", "rejected": "three"},  # LLaMA-Factory
    ],
)
def test_other_spellings_of_alpaca(tmp_path, row):
    found = prepared(write(tmp_path / "a.jsonl", [row]), CHAT)
    assert texts(found) == [(ASKED, reply("two"), reply("three"))] and form_of(found) == "alpaca"


@pytest.mark.parametrize(
    ("votes", "label"),  # label: share of the votes for the winner, counting a tie as half for each
    [((1, 1, 1), 1.0), ((2, 2, 2), 1.0), ((1, 1, 2), 2 / 3), ((0, 1, 2), 0.5), ((0, 0, 1), 2 / 3), ((0, 2, 2), 5 / 6)],
)
def test_several_annotators_vote(tmp_path, votes, label):
    names = ["annotator1", "annotator2", "annotator3"]
    name = write(tmp_path / "a.jsonl", [ALPACA | dict(zip(names, votes, strict=True))])
    second_wins = sum(v == 2 for v in votes) > sum(v == 1 for v in votes)
    wanted = (ASKED, reply("three"), reply("two")) if second_wins else (ASKED, reply("two"), reply("three"))
    for columns in (None, {"label": names}):
        soft = prepared({"name": name, "ties": "soft", "columns": columns, "zero": "tie"}, CHAT)
        assert texts(soft) == [wanted]
        assert soft.dataset.to_dict().get("label", [1.0]) == pytest.approx([label])
        hard = prepared({"name": name, "columns": columns, "zero": "tie"}, CHAT)
        assert texts(hard) == ([] if label == 0.5 else [wanted])
        assert "label" not in hard.dataset.column_names  # a majority counts as certain


@pytest.mark.parametrize("late", [0, 60])
def test_what_a_label_0_means_is_not_guessed(tmp_path, late):
    """0 and 1 are tie and first for some, the two responses for others; also where the zeros come late."""
    rows = [ALPACA | {"label": 1}] * late + [ALPACA | {"label": label} for label in (0, 1.0, "0")]
    name = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl: a label is 0, .* say with zero: .* first or second .*, or tie"):
        prepared(name, CHAT)
    for zero, better in (("first", ["two", "three", "two"]), ("second", ["three", "two", "three"])):
        found = prepared({"name": name, "zero": zero}, CHAT)
        assert [row["chosen"][0]["content"] for row in found.dataset][late:] == better
    tie = prepared({"name": name, "zero": "tie"}, CHAT)
    assert [reason for _, reason in refused(tie)] == ["tie"] * 2
    two = write(tmp_path / "two.jsonl", [ALPACA | {"label": label} for label in (0, 2)])
    assert refused(prepared({"name": two, "zero": "second"}, CHAT)) == [(2, "bad_number")]


def test_alpaca_rows_that_are_not(tmp_path):
    row = ALPACA | {"label": 1}
    rows = [
        *[row] * 9,
        row | {"response1": None},
        row | {"response2": True},
        row | {"label": "first"},
        row | {"label": True},
        row | {"label": None},
        row | {"instruction": " "},
        row | {"input": 4},
        row | {"history": [["a", "b"]]},
        row | {"response1": ""},
    ]
    reasons = ["missing_field", "not_text", "bad_number", "bad_number", "missing_field", "empty", "not_text"]
    found = prepared(write(tmp_path / "a.jsonl", rows), CHAT)
    assert refused(found) == list(enumerate([*reasons, "unknown_form", "empty"], start=10))


def test_columns_by_name(tmp_path):
    row = {"question": "p", "good": "a", "bad": "b", "prompt": "not this", "chosen": "nor this", "rejected": "or this"}
    source = {"name": write(tmp_path / "a.csv", [row])}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert texts(prepared(source | {"columns": names})) == [("p", "a", "b")]
    with pytest.raises(UserError, match=r"a\.csv: columns\.chosen: no column 'goood'; did you mean 'good'"):
        prepared(source | {"columns": names | {"chosen": "goood"}})


def test_a_form_that_cannot_be_told(tmp_path):
    name = write(tmp_path / "a.jsonl", [{"question": "q", "better": "a", "worse": "b"}])
    with pytest.raises(UserError) as refusal:
        prepared(name)
    for word in ("a.jsonl", "question, better, worse", "prompt/chosen/rejected", "ShareGPT", "columns:"):
        assert word in str(refusal.value)
    for columns in ({"chosen", "rejected"}, {"prompt", "chosen"}, {"instruction", "output"}):
        with pytest.raises(UserError, match="cannot be told"):
            prepared(write(tmp_path / "a.jsonl", [dict.fromkeys(columns, "text")]))


def test_a_named_form_is_not_told_again(tmp_path):
    """Transcripts read as they stand, where the recipe says that they are texts."""
    row = HH | {"prompt": "p"}
    found = prepared({"name": write(tmp_path / "a.jsonl", [row]), "format": "preference"}, CHAT)
    assert texts(found) == [("p", HH["chosen"], HH["rejected"])]


def test_rows_of_the_other_kind_than_their_source(tmp_path):
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    chat = {"prompt": user("p"), "chosen": reply("a"), "rejected": reply("b")}
    for rows in ([text, text, chat], [chat, chat, text]):
        assert refused(prepared(write(tmp_path / "a.jsonl", rows), CHAT)) == [(3, "unknown_form")]
    no_text = prepared({"name": write(tmp_path / "a.jsonl", [chat]), "chat": False}, CHAT)
    assert refused(no_text) == [(1, "unknown_form")]
