"""Token ids: TRL's, written out by hand, and BOS and EOS exactly once whatever text and template do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from alignment.data.messages import TextRules
from alignment.data.pipeline import prepare_rows
from alignment.errors import UserError
from tests.data.building import TEMPLATE, letters, refused, reply, said, user

BOS, EOS, OPEN = 1, 2, 3


def rows_of(rows, tokenizer, *, max_length: int | None = 1000, **more):
    return prepare_rows(rows, "here", tokenizer, max_length=max_length, role="train", **more)


def ids_of(rows, tokenizer, **more) -> list[list[list[int]]]:
    found = rows_of(rows, tokenizer, **more)
    assert found.rejected == []
    return [[row[f"{c}_ids"] for c in ("prompt", "chosen", "rejected")] for row in found.dataset]


def spell(tokenizer, text: str) -> list[int]:
    """One id per letter, looked up in the vocabulary."""
    return [tokenizer.convert_tokens_to_ids({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_text_by_hand(bos, pad):
    """BOS before the prompt only where the tokenizer puts it; EOS after each response, also where EOS pads."""
    tokenizer = letters(bos=bos, pad=pad)
    row = {"prompt": "ab", "chosen": " c", "rejected": " d</s>"}  # one brings its end: it is not doubled
    before = [BOS] if bos else []
    wanted = [before + spell(tokenizer, "ab"), [*spell(tokenizer, " c"), EOS], [*spell(tokenizer, " d"), EOS]]
    assert ids_of([row], tokenizer) == [wanted]


def test_chat_by_hand():
    tokenizer = letters(bos=True, template=TEMPLATE)
    row = {"prompt": user("ab"), "chosen": reply("c"), "rejected": reply("d")}
    prompt = [
        BOS,
        OPEN,
        *spell(tokenizer, "user\nab"),
        EOS,
        *spell(tokenizer, "\n"),
        OPEN,
        *spell(tokenizer, "assistant\n"),
    ]
    ends = [[*spell(tokenizer, letter), EOS] for letter in "cd"]  # the line end behind EOS is never sampled
    assert ids_of([row], tokenizer) == [[prompt, *ends]]


def trl_ids(rows, tokenizer) -> list[list[list[int]]]:
    """TRL's own data preparation, the method of its trainer, on a trainer that has nothing but a tokenizer; of
    responses what stands behind their last EOS is left out."""

    def up_to_end(ids: list[int]) -> list[int]:
        return ids[: len(ids) - ids[::-1].index(EOS)]

    args = DPOConfig(output_dir="unused", max_length=10_000, report_to="none", use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    found = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    return [[row["prompt_ids"], *(up_to_end(row[f"{c}_ids"]) for c in ("chosen", "rejected"))] for row in found]


TEXT = [
    {"prompt": "abc", "chosen": " yes", "rejected": " no"},
    {"prompt": "ab", "chosen": "ab", "rejected": "ba"},  # tokens merge over the boundary where "ba" is one
    {"prompt": "x é", "chosen": " ü</s>", "rejected": "\n\n"+"z"},
]  # fmt: skip
TALK = [
    {"prompt": user("ab"), "chosen": reply("yes"), "rejected": reply("no")},
    {
        "prompt": [said("system", "s"), *user("ab"), *reply("b"), *user("a")],
        "chosen": reply("a"),
        "rejected": reply("b b"),
    },
]
THOUGHTFUL = TEMPLATE.replace("<|im|>assistant\n{% endif %}", "<|im|>assistant\n(thinks){% endif %}")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("merges", [(), (("b", "a"),)])
def test_same_ids_as_trl(bos, merges):
    for template, rows in ((None, TEXT), (TEMPLATE, TALK), (THOUGHTFUL, TALK)):
        tokenizer = letters(bos=bos, template=template, merges=merges)
        assert ids_of(rows, tokenizer) == trl_ids(rows, tokenizer)


def test_prompts_that_are_no_prefix_are_split_where_they_part_and_counted():
    tokenizer = letters(merges=[("b", "a")])
    row = {"prompt": "ab", "chosen": "ab", "rejected": "c"}
    found = rows_of([row, row | {"prompt": "cc"}], tokenizer)
    (ba,) = tokenizer.encode("ba")
    assert found.dataset[0]["prompt_ids"] == spell(tokenizer, "a")  # "ab" + "ab" is a, ba, b
    assert found.dataset[0]["chosen_ids"] == [ba, *spell(tokenizer, "b"), EOS]
    assert found.dataset[0]["rejected_ids"] == [*spell(tokenizer, "bc"), EOS]
    assert ["in 1 of 2 train rows the prompt's last tokens merge" in note for note in found.notes] == [True]
    assert rows_of([row | {"prompt": "cc"}], tokenizer).notes == ()


def test_calibration_is_split_with_the_other_two():
    tokenizer = letters(merges=[("b", "a")])
    row = {"prompt": "ab", "chosen": "c", "rejected": "d", "calibration": "a"}
    found = rows_of([row], tokenizer, calibration=True).dataset[0]
    assert found["prompt_ids"] == spell(tokenizer, "a")
    assert found["calibration_ids"] == [tokenizer.convert_tokens_to_ids("ba"), EOS]
    assert found["chosen_ids"] == [*spell(tokenizer, "bc"), EOS]
    assert "calibration_ids" not in rows_of([row], tokenizer).dataset.column_names


TWICE = "{{ bos_token }}" + TEMPLATE
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[' + m['content'] + ']' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = TEMPLATE.replace("</s>", "")
GEMMA = TEMPLATE.replace("</s>", "<|turn|>")  # a reply ends with a token of its own, and EOS never stands there
ASK = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALKS = {"prompt": user("p"), "chosen": reply("a"), "rejected": reply("b")}
LONGER = TALKS | {"prompt": [*user("p"), *reply("q"), *user("r")]}


@pytest.mark.parametrize(
    ("tokenizer", "row", "detail"),
    [
        # text
        (letters(bos=True), ASK, None),
        (letters(bos=True), ASK | {"prompt": "<s>p"}, "the prompt begins with BOS twice"),
        (letters(bos=True), ASK | {"prompt": "p<s>"}, "BOS stands 2 times in the prompt"),
        (letters(), ASK | {"prompt": "<s>p"}, None),  # written by hand, once
        (letters(), ASK | {"prompt": "<s><s>p"}, "the prompt begins with BOS twice"),
        (letters(bos=True), ASK | {"rejected": "<s>b"}, "BOS stands inside rejected"),
        (letters(), ASK | {"chosen": "a<s>"}, "BOS stands inside chosen"),
        (letters(), ASK | {"chosen": "a</s>b"}, "EOS stands 2 times in chosen"),
        (letters(), ASK | {"rejected": "b</s></s>"}, "EOS stands 2 times in rejected"),
        (letters(pad="</s>"), ASK, None),
        (letters(ends_itself=True), ASK, "EOS stands 2 times in chosen"),
        # chat
        (letters(bos=True, template=TEMPLATE), LONGER, None),
        (letters(bos=True, template=TWICE), TALKS, "the prompt begins with BOS twice"),
        (letters(template=TWICE), TALKS, "the prompt begins with BOS twice"),
        (letters(bos=True, template=LLAMA2), LONGER, None),  # BOS before every question is this template's way
        (letters(bos=True, template=LLAMA2), LONGER | {"prompt": user("p<s>")}, "BOS stands 2 times in the prompt"),
        (letters(bos=True, template=TEMPLATE), TALKS | {"prompt": user("a<s>b")}, "BOS stands 2 times in the prompt"),
        (letters(bos=True, template=TEMPLATE), TALKS | {"chosen": reply("<s>a")}, "BOS stands inside chosen"),
        (letters(bos=True, template=TEMPLATE), TALKS | {"chosen": reply("a</s>b")}, "EOS stands 2 times in chosen"),
        (letters(bos=True, template=GEMMA), LONGER, None),
        (letters(template=GEMMA), TALKS | {"chosen": reply("a<|turn|>b")}, "EOS stands 2 times in chosen"),
    ],
)
def test_bos_and_eos_exactly_once(tokenizer, row, detail):
    found = rows_of([row], tokenizer, rules=TextRules(control_tokens="keep"))
    assert [(bad.reason, bad.detail) for bad in found.rejected] == ([] if detail is None else [("bos_eos", detail)])


def test_given_ids_are_used_as_they_are():
    """A sample that ran out of tokens has no EOS, and a tokenizer would spell the text otherwise."""
    tokenizer = letters(bos=True, merges=[("g", "o")])
    ids = {"prompt_ids": [BOS, 9], "chosen_ids": [30, 31], "rejected_ids": [32, EOS]}
    row = {"prompt": "p", "chosen": "go", "rejected": "x"} | ids
    found = rows_of([row], tokenizer).dataset[0]
    assert {column: found[column] for column in ids} == ids
    doubled = rows_of([row | {"prompt_ids": [BOS, BOS, 9]}, row | {"chosen_ids": [30, BOS]}], tokenizer)
    assert refused(doubled) == [(1, "bos_eos"), (2, "bos_eos")]


def test_what_does_not_fit():
    """Prompt of 4 ids; at max_length 7 three ids of each response are left."""
    tokenizer = letters()
    row = {"prompt": "abcd", "chosen": "xyz1", "rejected": "xyz2"}
    found = rows_of([row | {"chosen": "xy1"}, row, row | {"prompt": "abcdefg"}], tokenizer, max_length=7)
    assert refused(found) == [(2, "same_after_truncation"), (3, "prompt_too_long")]
    assert len(found.dataset[0]["rejected_ids"]) == 5  # nothing is cut here: the collator cuts
    assert rows_of([row], tokenizer, max_length=8).rejected == []  # the fourth letters differ
    assert rows_of([row], tokenizer, max_length=None).rejected == []
    room = rows_of([row | {"prompt": "abcdef"}], tokenizer, max_length=7)  # one id is left, and it is the same
    assert refused(room) == [(1, "same_after_truncation")]


def test_different_texts_with_the_same_tokens_are_the_same():
    ids = {"prompt_ids": [9], "chosen_ids": [30], "rejected_ids": [30]}
    assert refused(rows_of([ASK | ids], letters())) == [(1, "same_responses")]
    stripping = letters(template=TEMPLATE.replace("m['content']", "m['content'] | trim"))
    assert refused(rows_of([TALKS | {"rejected": reply("a ")}], stripping)) == [(1, "same_responses")]


def test_rows_that_the_template_refuses():
    """Only those rows, found among the others of their batch."""
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    rows = [TALKS | {"prompt": user(str(i))} for i in range(5)]
    rows[3] = TALKS | {"prompt": [said("system", "s"), *user("p")]}
    found = rows_of(rows, letters(template=strict))
    assert refused(found) == [(4, "unknown_form")] and "no system role" in found.rejected[0].detail
    assert [row["prompt"][0]["content"] for row in found.dataset] == ["0", "1", "2", "4"]


def test_tokenizers_that_cannot_do():
    with pytest.raises(UserError, match="has no chat template"):
        rows_of([TALKS], letters())
    with pytest.raises(UserError, match="the chat template fails on a plain question"):
        rows_of([TALKS], letters(template="{{ raise_exception('never') }}"))
    endless = letters()
    endless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        rows_of([ASK], endless)
    with pytest.raises(UserError, match=r"writes no token that ends a reply, the next turn's '<\|im\|>' does"):
        rows_of([TALKS], letters(template=NO_END))
    with pytest.raises(UserError, match="ends a reply with '<end>', which is no token of this tokenizer"):
        rows_of([TALKS], letters(template=TEMPLATE.replace("</s>", "<end>")))
    given = {"prompt_ids": [9], "chosen_ids": [30], "rejected_ids": [31]}  # samples end where sampling stops
    assert len(rows_of([TALKS | given], letters(template=NO_END)).dataset) == 1
