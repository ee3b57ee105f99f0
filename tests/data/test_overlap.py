"""Prompts on both sides: which count as the same, what is refused, and what dropping leaves."""

from __future__ import annotations

import pytest

from alignment.data.overlap import judged_on, prompt_hash, refuse, refuse_two_kinds, row_hash, without
from alignment.errors import UserError
from tests.data.building import TEMPLATE, letters, prepared, reply, said, user, write

# Stanford Alpaca's frame, as its train.py has it
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:"
)
PAIRED = ", paired with an input that provides further context"


def row(prompt, chosen="a", rejected="b"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("my dog", " my  dog\n", True),
        ("my dog", "My dog", False),
        ("my dog", "mydog", False),
        ("my dog", user("my dog"), True),
        ("my dog", [said("system", "be brief"), *user("my dog ")], True),
        ([*user("a"), *reply("b"), *user("c")], user("c"), False),
        ([*user("a"), *reply("b"), *user("c")], [*user("a "), *reply("b"), *user("c")], True),
        ([*user("a"), *reply("b"), *user("c")], [*user("a"), *user("b"), *user("c")], False),
        ([*user("a"), *reply("b"), *user("c")], [*user("a"), *reply("d"), *user("c")], True),
        ("\n\nHuman: my  dog\n\nAssistant:", "my dog", True),
        ("Human: my dog\n\nAssistant:", user("my dog"), True),
        (user("\n\nHuman: my dog\n\nAssistant:"), "my dog", True),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [*user("a"), *reply("b"), *user("c")], True),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "c", False),
        (ALPACA.format("", "my dog", ""), "my dog", True),
        (ALPACA.format("", "my dog", ""), "my cat", False),
        (reply("a"), reply("b"), False),
        (ALPACA.format(PAIRED, "Add.", "### Input:\n1 1\n\n"), user("Add.\n\n1 1"), True),
        (ALPACA.format(PAIRED, "Add.", "### Input:\n1 1\n\n"), "Add.", False),
    ],
)
def test_same_prompts(one, other, same):
    assert (prompt_hash(one) == prompt_hash(other)) == same


def test_the_prompts_that_forms_make_of_one_question_are_one(tmp_path):
    answers = {"response1": "a", "response2": "b", "label": 1}
    transcript = "\n\nHuman: Add.\n\n1 1\n\nAssistant:"
    of_each = [
        {"instruction": "Add.", "input": "1 1"} | answers,
        {"chosen": f"{transcript} a", "rejected": f"{transcript} b"},
        row("Add. 1 1"),
    ]
    for each in of_each:
        for tokenizer in (letters(), letters(template=TEMPLATE)):
            (found,) = prepared(write(tmp_path / "a.jsonl", [each]), tokenizer).dataset
            assert prompt_hash(found["prompt"]) == prompt_hash("Add. 1 1")
            assert row_hash(found) == row_hash(row("Add. 1 1"))


def test_same_rows():
    assert row_hash(row("p")) == row_hash(row("p ", "b", "a")) != row_hash(row("p", "a", "c"))
    assert row_hash(row("p")) == row_hash(row(user("p"), reply("a"), reply("b")))


def test_overlap_is_refused_with_its_first_prompt(tmp_path):
    train = prepared(write(tmp_path / "train.jsonl", [row(p) for p in ("one", "two", "three")])).dataset
    held_out = prepared(write(tmp_path / "test.jsonl", [row("four"), row(" two ", "c", "d")]), role="eval").dataset
    refuse(train["prompt"], judged_on(None, ["five"]))
    refuse(train["prompt"], judged_on(held_out.select([0]), ["five"]))
    with pytest.raises(
        UserError, match=r"1 of 3 prompts of data\.train are also judged on, such as 'two' of data\.eval"
    ):
        refuse(train["prompt"], judged_on(held_out, ["five"]))
    with pytest.raises(UserError, match=r"2 of 3 prompts of a\.txt .* such as 'one' of b\.txt: judge on prompts that"):
        refuse(["one", "x", "three"], judged_on(held_out, ["three", "one"], "b.txt"), "a.txt")


def test_text_is_not_judged_on_chat(tmp_path):
    tokenizer = letters(template=TEMPLATE)
    chat = write(tmp_path / "chat.jsonl", [row(user("p"), reply("a"), reply("b"))])
    text = write(tmp_path / "text.jsonl", [row("p")])
    for train, held_out, message in (
        (chat, text, "data.eval: .*text.jsonl has text, and .*chat.jsonl of data.train chat messages: .* chat: true"),
        (text, chat, "data.eval: .*chat.jsonl has chat messages, and .*text.jsonl of data.train text: "),
    ):
        refuse_two_kinds(prepared(train, tokenizer), prepared(train, tokenizer, role="eval"))
        refuse_two_kinds(prepared(train, tokenizer), None)
        with pytest.raises(UserError, match=message):
            refuse_two_kinds(prepared(train, tokenizer), prepared(held_out, tokenizer, role="eval"))


def test_dropping_takes_the_training_rows_and_counts_them(tmp_path):
    rows = [row("one"), row("two", "a", "c"), row("three"), row("two")]
    train = prepared(write(tmp_path / "train.jsonl", rows))
    held_out = prepared(write(tmp_path / "test.jsonl", [row("two", "b", "a"), row("six")]), letters(), role="eval")
    left = without(train, judged_on(held_out.dataset, ["three"]))
    assert left.dataset["prompt"][:] == ["one"]
    assert left.overlap == 3 and left.manifest()["used"] == 1 and left.rows == 4
    assert left.notes == (
        "3 rows of train dropped: their prompts are judged on (1 are whole rows of data.eval)",
    )  # "two" with a and b, the other way round
    assert without(train, judged_on(None, ["six"])) is train
    with pytest.raises(UserError, match="all 4 training rows have prompts that are judged on; none is left"):
        without(train, judged_on(train.dataset))
