"""RAKE against hand-computed scores; copies of responses: nested, balanced, tidy, tokenised as the responses are."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from alignment.data.degrade import STOP_WORDS, STOP_WORDS_SHA256, degraded, rake, with_degree_copies

TEXT = (
    "The capital of France is Paris, a city of lights. It has two million people, many museums and old bridges over "
    "the Seine.\nVisit Paris!"
)


def is_deletion_of(short: str, long: str) -> bool:
    letters = iter(long)
    return all(letter in letters for letter in short)


def test_scores_by_hand():
    """degree(red) = 2 + 1 over 2 occurrences; degree(apple) = 2 + 3 over 2; green and pie: 3 over 1."""
    found = rake("The red apple, red, and a green apple pie.")
    assert [(phrase, score) for phrase, score, _ in found] == [
        ("green apple pie", 2.5 + 3 + 3),
        ("red apple", 1.5 + 2.5),
        ("red", 1.5),
    ]


def test_phrases_end_at_stop_words_punctuation_and_lines_and_keep_all_their_places():
    text = "Old bridges\nand old-fashioned boats; it's the Old Bridges."
    found = {phrase: [text[a:b] for a, b in spans] for phrase, _, spans in rake(text)}
    assert found == {"old bridges": ["Old bridges", "Old Bridges"], "old-fashioned boats": ["old-fashioned boats"]}
    assert rake("it is, and so on.") == rake("") == []


def test_ties_go_to_the_first():
    assert [phrase for phrase, _, _ in rake("zebra, apple, mango.")] == ["zebra", "apple", "mango"]


def test_stop_words_are_those_that_were_stated():
    assert STOP_WORDS_SHA256 == "5cb6c33036b554a41f16d1e0d92468e780ab2f1d7b2c764629eed124b1b19055"
    assert {"the", "and", "it's"} <= STOP_WORDS


def test_copies_by_hand():
    """Scores: `warm bread` 4, `kind` 1, `dull` 1; a third of the four words is two phrases."""
    assert degraded("It is kind, warm bread and dull.", 3) == [
        ("It is kind, warm bread and dull.", 0),
        ("It is kind, and dull.", 1),
        ("It is, and dull.", 2),
    ]
    # As many words, the last ones: two, then three. `bread and dull` leaves `warm`; the full stop stays.
    assert [text for text, _ in degraded("It is kind, warm bread and dull.", 3, "length")] == [
        "It is kind, warm bread and dull.",
        "It is kind, warm bread.",
        "It is kind, warm.",
    ]


@pytest.mark.parametrize("removal", ["rake", "random", "length"])
def test_copies_are_nested_and_start_with_the_text_itself(removal):
    rng = random.Random(0)
    vocabulary = [
        "the",
        "of",
        "and",
        "is",
        "river",
        "stone",
        "old",
        "light",
        "green",
        "it's",
        "-",
        ",",
        ".",
        "\n",
        "  ",
    ]
    texts = [TEXT] + [" ".join(rng.choices(vocabulary, k=rng.randint(1, 60))) for _ in range(200)]
    some = 0
    for text, degrees in itertools.product(texts, (2, 3, 5)):
        copies = degraded(text, degrees, removal, 7)
        assert copies == degraded(text, degrees, removal, 7)
        if not copies:
            continue
        some += 1
        assert [label for _, label in copies] == list(range(degrees))  # every class once: balanced
        assert copies[0][0] == text
        for (longer, _), (shorter, _) in itertools.pairwise(copies):
            assert len(shorter) < len(longer) and is_deletion_of(shorter, longer)
    assert some > 200


def words(text: str) -> list[str]:
    return text.replace(".", " ").replace(",", " ").replace("!", " ").split()


def test_controls_remove_as_many_words_and_random_spares_the_keys():
    removed = {}
    for removal in ("rake", "random", "length"):
        copies = [text for text, _ in degraded(TEXT, 3, removal, 1)]
        removed[removal] = [len(words(copies[0])) - len(words(copy)) for copy in copies]
    assert removed["rake"] == removed["random"] == removed["length"]
    gone = set(words(TEXT)) - set(words(degraded(TEXT, 3)[-1][0]))
    assert gone and gone <= set(words(degraded(TEXT, 3, "random", 1)[-1][0]))
    assert degraded(TEXT, 3, "random", 1) != degraded(TEXT, 3, "random", 2)
    assert degraded(TEXT, 3, "length")[-1][0].endswith("!")


def test_spaces_are_tidied_only_where_something_went():
    text = "it  is of stone bridge , and\nold river boats are green.  Moss is soft"
    # A third of eight words: three phrases go. Double spaces elsewhere, and the space before the comma, stay.
    assert degraded(text, 3)[-1][0] == "it  is of , and\nare.  Moss is soft"


@pytest.mark.parametrize("text", ["", "kind.", "It is.", "Paris, of course it is Paris."])
def test_too_few_phrases_give_no_copies_at_all(text):
    assert len(degraded(text, 3)) == (3 if len(rake(text)) >= 2 else 0)
    assert degraded(text, 4) == []


def test_random_removal_needs_enough_other_words():
    assert len(degraded("kind, warm.", 3)) == 3
    assert degraded("kind, warm.", 3, "random") == []


# --- token ids ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from alignment.models import load_tokenizer

    return load_tokenizer(tiny)


def spo(**more):
    return SimpleNamespace(**({"degrees": 3, "responses": "both", "removal": "rake"} | more))


def rows(tokenizer, *pairs: tuple[list[int], list[int]]) -> Dataset:
    return Dataset.from_list([{"prompt_ids": [5], "chosen_ids": c, "rejected_ids": r} for c, r in pairs])


def test_copies_end_as_the_response_does_and_the_first_is_the_response(tokenizer):
    plain, end = tokenizer(" kind and warm .")["input_ids"], tokenizer.eos_token_id
    chat = [*plain, end, *tokenizer("\n")["input_ids"]]
    data = with_degree_copies(rows(tokenizer, (plain, chat)), tokenizer, spo(), seed=0)
    copies = data[0]["degree_ids"]
    assert data[0]["degree_labels"] == [0, 1, 2, 0, 1, 2]
    assert [tokenizer.decode(ids) for ids in copies[:3]] == [" kind and warm .", " and warm .", " and ."]
    assert copies[0] == plain and copies[3] == chat
    for before, ids in zip(copies[:3], copies[3:], strict=True):
        assert ids == before + chat[len(plain) :]  # the same copy, then the end token and the template's line end
    assert copies[1] == tokenizer(" and warm .")["input_ids"]


def test_responses_that_cannot_be_copied_faithfully_have_no_labels(tokenizer):
    text = " kind and warm ."
    letters = [tokenizer.convert_tokens_to_ids(c) for c in text.replace(" ", "Ġ")]  # not what the text encodes to
    end = tokenizer.eos_token_id
    two = [*tokenizer(text)["input_ids"], end, *tokenizer(f"user\n{text}")["input_ids"], end]
    short = tokenizer(" kind .")["input_ids"]
    for ids in (letters, two, short, [end]):
        row = with_degree_copies(rows(tokenizer, (ids, ids)), tokenizer, spo(responses="rejected"), seed=0)[0]
        assert row["degree_labels"] == [-1, -1, -1]
        assert all(copy == ids[:2] for copy in row["degree_ids"])


def test_tokenizers_that_begin_a_text_with_a_space_are_asked_behind_a_line_end():
    """Llama-2's kind: a text's first word gets a space in front, a word in a chat after a line end does not."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["▁", "\n", "Kind", "▁Kind", "▁and", "▁warm", ".", "</s>"])}
    backend = Tokenizer(models.BPE({**vocabulary}, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(".", "isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    chat = [vocabulary[t] for t in ("Kind", "▁and", "▁warm", ".", "</s>")]
    assert tokenizer("Kind and warm.")["input_ids"] == [vocabulary["▁Kind"], *chat[1:-1]]  # the trap
    row = with_degree_copies(rows(tokenizer, (chat, chat)), tokenizer, spo(responses="chosen"), seed=0)[0]
    assert row["degree_labels"] == [0, 1, 2]
    assert row["degree_ids"][0] == chat
