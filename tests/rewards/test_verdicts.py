"""Verdicts in judges' answers, each expected one read by a person; and log-probs, where the verdict stands."""

from __future__ import annotations

import re

import mpmath
import pytest

from alignment.rewards.verdicts import first_from_logprobs, read_verdict
from tests.rewards.judging import token

A, B, TIE, NONE = 1.0, 0.0, 0.5, None

# fmt: off
ANSWERS = [
    # one letter, as our own template asks for
    *((A, text) for text in ("A", " A.\n", "**A**", "(A)", "[A]", "A)", '"A"', "`A`", "# Verdict\n\nA",
        "A<|im_end|>",)),
    *((B, text) for text in ("B", "(b)", "**B**.", "B\n\nIt is clear.", "B: it is shorter.", "B</s>",)),
    # FastChat, RewardBench, Arena-Hard
    *((A, text) for text in ("Long story. [[A]]", "[[ A ]]", "[[A>B]]", "My final verdict is: [[A>>B]].",
        "[[B<A]]", "[[**A**]]", "Final: [[Assistant A]]", "[[A>B]] … so [[A>>B]]",)),
    *((B, text) for text in ("A is better in style. Verdict: [[B]]", "[[B>A]]", "[[A<<B]]",
        "Response A is bad: [[B]]",)),
    *((TIE, text) for text in ("[[C]]", "They are close. [[A=B]]", "[[Tie]]",)),
    *((NONE, text) for text in ("[[A]] or [[B]]", "[[A]] was my guess, but [[B]]", "[[A>B]] and [[B>A]]",
        "[[C]] [[A]]", "[[7]]", "Rating: [[2]]", "[[D]]", "[[A", "[[A>A]]",)),
    # AlpacaEval: identifiers, and rankings with Python's quotes
    *((A, text) for text in ("m", "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]",)),
    *((B, text) for text in ("M", "M.", '[{"model": "model_1", "rank": 2}, {"model": "model_2", "rank": 1}]',
        '{"explanation": "short", "ordered_models": [{"model": "M", "rank": 1}, {"model": "m", "rank": 2}]}',)),
    *((NONE, text) for text in ("[{'model': 'model_1', 'rank': 3}, {'model': 'model_2', 'rank': 1}]",)),
    # Prometheus, LLMBar, Auto-J, PandaLM, JudgeLM, the DPO paper's, reward reasoning models
    *((A, text) for text in ("Feedback: B lacks detail. [RESULT] A", "Output (a)", "1",
        "1\n\n### Reason: it is longer",)),
    *((B, text) for text in ("[RESULT] B", "Output (b)", "2", "So, the final decision is Response 2.",
        "8 9\nIt is new.", "7, 8.5", "6/10 8/10", 'Comparison: B says more.\nPreferred: "B"', "More helpful: B",
        r"\boxed{B}", r"So \boxed{\text{Assistant 2}}", "<answer>[[B]]</answer>", "<answer> B </answer>",)),
    *((TIE, text) for text in ("Tie", "tie\n### Reason: alike", "So, the final decision is Tie.", "8 8\nalike",
        "Draw.",)),
    *((NONE, text) for text in (r"\boxed{2}", "<answer>1</answer>", "8", "8 7 6", "3\n",)),
    # JSON
    *((A, text) for text in ('{"winner": "A"}', '```json\n{"reason": "B is bad", "winner": "Response A"}\n```',
        '{"ranking": ["A", "B"]}', '{"verdict": "A>B"}', '{"choice": 1}', '{"scores": {"A": 9, "B": 4}}',)),
    *((B, text) for text in ('{"better_response": "model_2"}', '{"A": 3, "B": 8}', '{"preference": "B"}',)),
    *((TIE, text) for text in ('{"winner": "tie"}',)),
    *((NONE, text) for text in ('{"winner": "A", "verdict": "B"}', '{"winner": "C"}', '{"preference": 1}',
        '{"winner": null}', '{"quality": "A"}', '{"winner": "A"', '{"reason": "A is better."}',)),
    # lines and sentences
    *((A, text) for text in ("Response A", "answer: A", "Answer: Response 1", "Assistant A",
        "The winner is response 1.", "The better response is: **A**", "**Final verdict:** A",
        "A is better than B.", "Response A is better.", "Overall, Assistant A's response is better.",
        "Model 1 is the clear winner.", "I would choose A over B.", "I prefer response A, because it is true.",
        "The first response is better than the second.", "B is worse than A.", "A wins.", "A > B", "A ≻ B",)),
    *((B, text) for text in ("B is better than A, since A is wrong.", "Verdict: B",
        "**Verdict:** Response B is better.", "Verdict:\nB", "My choice is **B**.",
        "The better response is (b)", "The answer is B.", "Therefore, the second one is better.",
        "Both have merit.\n\nThus, I think that Response B is slightly better overall.", "B is superior to A",
        "**Response A**\nIt is wrong.\n\n**Response B**\nIt is right.\n\nFinal answer: B",)),
    *((TIE, text) for text in ("Both responses are equally good.", "It's a tie.",
        "A and B are equally helpful.", "Neither is better.", "Neither response is better than the other.",
        "Verdict: tie",)),
    # scores of each
    *((A, text) for text in ("Response A score: 8.5\nResponse B score: 8", "A: 9, B: 7",)),
    *((B, text) for text in ("A: 7, B: 9", "Response A: 7/10\nResponse B: 9/10",
        "Assistant 1: 3\nAssistant 2: 4",)),
    *((NONE, text) for text in ("Rank. A: 1, B: 2", "A: 7", "A: 7, B: 9. Verdict: A", "Errors. A: 3, B: 1",
        "A: 3 words, B: 9 words",)),
    # no verdict, or two: never guessed
    *((NONE, text) for text in ("", "C", "A or B", "AB", "a", "b", "Absolutely", "I like A", "A, surely",
        "A good question.", "A is not better than B.", "A isn't better than B.", "I don't think A is better.",
        "Neither", "Is A better than B?", "If A is better, say A.", "A is better or B is better", "A and B",
        "A is better in style, but B is better in substance.", "A is better. B is better.", "A: bad. B: good.",
        "A is better than A.", "A\nB", "Both are good.", "A is better written.", "A\n\nActually, B is better.",
        "Response A\nIt is short.\nResponse B\nIt is long.", "not A",
        "1. Response B is long.\n2. Response A is short.", "The answer is not A.", "It is hard to say.",
        "A better response would be longer.", "A: not the better one.", "Neither A nor B is good.",)),
]
# fmt: on


@pytest.mark.parametrize(("verdict", "text"), ANSWERS)
def test_an_answer_is_read_as_a_person_would(verdict, text):
    found = read_verdict(text)
    assert (found and found.first) == verdict
    if found is not None and found.place is not None:
        assert text[found.place] in ("Aa1m" if verdict == A else "Bb2M")


LETTERS = [text for _, text in ANSWERS if set(text) & set("AB") and not set(text) & set("0123456789[{()Mm")]


@pytest.mark.parametrize("text", LETTERS)
def test_the_letters_are_treated_alike(text):
    """A and B change places in the answer: so does the verdict. No letter is favoured."""
    found, turned = read_verdict(text), read_verdict(re.sub(r"\b[AB]\b", lambda m: "BA"["AB".index(m[0])], text))
    assert (found and found.first) == (None if turned is None else 1 - turned.first)


THOUGHTS = [
    "<think>B? No, [[B]] is wrong.</think>\n\n{}",
    "Okay, B is short. [[B]]\n</think>\n\n{}",  # the template wrote the opening tag into the prompt
    "<thinking>\nB\n</thinking>{}",
    "<thought>B</thought>\n{}",
    "<reasoning>B is better.</reasoning>\n{}",
    "<seed:think>B</seed:think>{}",
    "[THINK]B is better.[/THINK]{}",
    "B.[/THINK]{}",
    "◁think▷B◁/think▷{}",
    "<|begin_of_thought|>B<|end_of_thought|>\n{}",
    "<|START_THINKING|>B<|END_THINKING|>{}",
    "<|channel|>analysis<|message|>B is better.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "analysisWe compare. B is better.assistantfinal{}",
    "<|channel>thought\nB<channel|>{}",
    "<think>B</think><think>B</think>{}",
]


@pytest.mark.parametrize("form", THOUGHTS)
def test_thoughts_are_no_verdict(form):
    assert read_verdict(form.format("A")).first == A
    assert read_verdict(form.format("")) is None
    assert read_verdict(form.format("It is hard to say.")) is None


@pytest.mark.parametrize(
    "text",
    [
        *("<think>A", "<think>[[A]]", "[THINK]A", "◁think▷A", "<|channel|>analysis<|message|>A", "A\n<think>but"),
        *("analysisWe say A\nA", "<reasoning>\nA\n", "<thought>\nA is better."),
    ],
)
def test_a_thought_that_does_not_end_has_no_verdict(text):
    assert read_verdict(text) is None


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        *[(A, "A"), (A, "A\n\nResponse A is more"), (B, "[[B]] since"), (B, "The answer is B"), (A, "Response A")],
        *[(NONE, text) for text in ("**Response A**\n- It is", "A is better", "A: it is clear", "A is better than B")],
    ],
)
def test_of_a_cut_answer_nothing_is_read_that_may_go_on(verdict, text):
    """`Response A` may be the first of two headings, `A is better` may go on with `in style, but`."""
    found = read_verdict(text, cut=True)
    assert (found and found.first) == verdict


def read(tokens, text):
    verdict = read_verdict(text)
    return None if verdict is None or verdict.place is None else first_from_logprobs(tokens, text, verdict.place)


def test_logprobs_are_normalised_over_the_two_labels():
    """By mpmath with 30 digits: exp(a) / (exp(a) + exp(b)), spellings with white space added up."""
    e = mpmath.exp
    with mpmath.workdps(30):
        both = e(mpmath.mpf(-1.3)) / (e(mpmath.mpf(-1.3)) + e(mpmath.mpf(-0.7)))
        spelt = (e(mpmath.mpf(-2)) + e(mpmath.mpf(-3))) / (e(mpmath.mpf(-2)) + e(mpmath.mpf(-3)) + e(mpmath.mpf(-1)))
        tiny = e(mpmath.mpf(-900)) / (e(mpmath.mpf(-900)) + e(mpmath.mpf(-901)))  # both underflow in a float
    assert read([token("B", B=-0.7, A=-1.3, The=-4.0)], "B") == pytest.approx(float(both), abs=1e-15)
    assert read([token("B", B=-1, A=-2, A_=-3)], "B") == pytest.approx(float(spelt), abs=1e-15)
    assert read([token("A", A=-900, B=-901, x=0)], "A") == pytest.approx(float(tiny), abs=1e-15)
    assert read([token("A", A=-0.1, C=-3)], "A") == 1.0  # B is missing: minus infinity
    assert read([token("B", B=-0.1, A=None)], "B") == 0.0
    assert read([{"token": "B", "logprob": -0.1}], "B") == 0.0  # no alternatives given
    blank = token("\n\n", A=-0.1, B=-9)
    assert read([blank, token("B", B=-0.7, A=-1.3)], "\n\nB") == pytest.approx(float(both), abs=1e-15)
    for first, second in ("mM", "12"):
        found = read([token(second, **{second: -0.7, first: -1.3})], second)
        assert found == pytest.approx(float(both), abs=1e-15)


def test_logprobs_count_where_the_verdict_stands_and_nowhere_else():
    """P(A) is 0.8 at the verdict's token; at every other one the letters say something else."""
    wrong, right = {"A": -9.0, "B": -0.1}, {"A": float(mpmath.log(0.8)), "B": float(mpmath.log(0.2))}
    spelt = [
        ["A"],
        ["Okay", ",", " B", " is", " short", ".\n", "</think>", "\n\n", "A"],
        ["The", " better", " response", " is", " A", "."],
        ["[[", "A", "]]"],
        ["[[", "A", "]]", "<|im_end|>"],
        ["Both", " try", ".\n", "Verdict", ":", " **", "A", "**"],
        ["Feedback", ":", " B", " lacks", " [", "RESULT", "]", " A"],
    ]
    for pieces in spelt:
        place = max(i for i, piece in enumerate(pieces) if piece.strip() == "A")
        tokens = [token(piece, **(right if i == place else wrong)) for i, piece in enumerate(pieces)]
        if pieces[place] == " A":
            tokens[place] = token(" A", A_=right["A"], B_=right["B"])
        assert read(tokens, "".join(pieces)) == pytest.approx(0.8, abs=1e-12), pieces
    thought = ["I", " say", " A", "</think>", "\n\n", "A"]  # a server that gives thoughts elsewhere, but their tokens
    tokens = [token(piece, **(right if i == 5 else wrong)) for i, piece in enumerate(thought)]
    assert read(tokens, "A") == pytest.approx(0.8, abs=1e-12)


def test_where_the_verdict_has_no_token_of_its_own_log_probs_say_nothing():
    loud = {"A": -0.01, "B": -9.0}
    assert read([token("Okay", **loud)], "Okay, so A is short.\n</think>\n\nB") is None  # of the thoughts alone
    assert read([token("Both", **loud)], "Both") is None
    assert read([token("B", **loud), token(" is", **loud), token(" better.")], "B is better.") is None
    assert read([token("[[B>A]]", **loud)], "[[B>A]]") is None
    assert read([token("[[C", **loud), token("]]")], "[[C]]") is None
    assert read([token("Response B", **loud)], "Response B") is None
    assert read([], "B") is None
