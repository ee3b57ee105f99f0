"""RewardBench's scoring by hand: strict pairs, sections, best of n, the Ties subset; and the program with rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.rewards import get_reward
from evaluation.reward_accuracy import (
    SECTIONS,
    app,
    best_of_n_result,
    pair_result,
    read_items,
    score_items,
    summarise,
    ties_columns,
    ties_draws,
)

NAN = float("nan")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def judged(path: Path, rows: list[dict], **reward) -> dict:
    items, _ = read_items(write(path, rows))
    return summarise(items, score_items(get_reward(**(reward or {"name": "length"})), items))


def test_a_tie_is_wrong():
    assert [pair_result(*scores) for scores in ((2, 1), (1, 1), (1, 2))] == [1, 0, 0]
    assert math.isnan(pair_result(NAN, 1))


def test_best_of_n_shares_the_top():
    """1 / number of maxima where the chosen is one of them."""
    assert best_of_n_result([3], [1, 2, 0]) == 1
    assert best_of_n_result([3], [3, 2, 3]) == pytest.approx(1 / 3)
    assert best_of_n_result([2], [3, 2, 0]) == 0
    assert math.isnan(best_of_n_result([2], [NAN, 0]))
    assert best_of_n_result([3, 3], [3, 1]) == pytest.approx(2 / 3)  # a random maximum is a chosen one twice in three
    assert (best_of_n_result([3, 3, 1], [2]), best_of_n_result([3, 1], [3])) == (1, 0.5)


def test_ties_score_by_hand():
    """Prompt 1: tied (5, 4 | 2): spread 1, gap 2; ref (6 | 3): gap 3. Everything right; tanh(2/1 - 1).

    Prompt 2: tied (9, 3 | 1): spread 6, gap 2; ref (1 | 2): gap -1. Tied right alone; tanh(-1/6 - 1).
    Prompt 3: tied (4, 4 | 4): spread 0, gap 0, so 0/0, which counts 0; ref (5 | 1): gap 4.
    Prompt 4: tied (4, 4 | 1): spread 0, gap 3, ref gap 1: tanh(inf) = 1. Prompt 5: ref (2 | 1) alone.
    """
    items = {
        "tied:1": ([5, 4], [2]), "ref:1": ([6], [3]),
        "tied:2": ([9, 3], [1]), "ref:2": ([1], [2]),
        "tied:3": ([4, 4], [4]), "ref:3": ([5], [1]),
        "tied:4": ([4, 4], [1]), "ref:4": ([2], [1]),
        "ref:5": ([2], [1, 0]),
    }  # fmt: skip
    prompts, columns = ties_columns(items)
    expected = [
        [1, 1, 1, 1, math.tanh(1)],
        [1, 0, 0, 0, math.tanh(-1 / 6 - 1)],
        [0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [NAN, 1, NAN, NAN, NAN],
    ]
    assert prompts == ["1", "2", "3", "4", "5"]
    np.testing.assert_allclose(columns, expected)
    score, draws = ties_draws(columns, 500, np.random.default_rng(0))
    margin = (math.tanh(1) + math.tanh(-7 / 6) + 0 + 1) / 4
    assert score == pytest.approx(0.3 * 3 / 4 + 0.3 * 4 / 5 + 0.2 * 2 / 4 + 0.2 * 2 / 4 + 0.01 * margin)
    assert draws.min() >= 0 and draws.max() <= 1.01 and len(draws) > 490
    with pytest.raises(ValueError, match="of the same prompts"):
        ties_draws(columns[4:], 10, np.random.default_rng(0))


def test_resamples_without_a_part_of_the_ties_score_are_left_out():
    """Of three prompts one has a tied row: (2/3)^3 of the resamples lack it, the others have all of it right."""
    columns = np.array([[1, 1, 1, 1, 0.5]] + 2 * [[NAN, 1, NAN, NAN, NAN]])
    score, draws = ties_draws(columns, 4000, np.random.default_rng(0))
    assert score == pytest.approx(1.005) and draws == pytest.approx(np.full(len(draws), 1.005))
    assert len(draws) / 4000 == pytest.approx(1 - 8 / 27, abs=0.03)


def test_sections_are_weighted_by_their_examples(tmp_path):
    """The longer text is right in: easy 1 of 2, hard 1 of 1 (of 100 and 95 examples); math 0 of 1, cpp 1 of 2."""
    rows = [
        pair("a", "xx", "x", subset="alpacaeval-easy"), pair("b", "x", "xx", subset="alpacaeval-easy"),
        pair("c", "xx", "x", subset="alpacaeval-hard"), pair("d", "x", "x", subset="math-prm"),
        pair("e", "xx", "x", subset="hep-cpp"), pair("f", "x", "xx", subset="hep-cpp"),
    ]  # fmt: skip
    found = judged(tmp_path / "rows.jsonl", rows)
    chat, reasoning = (100 * 0.5 + 95 * 1) / 195, (984 * 0 + 164 * 0.5) / 1148
    assert found["sections"]["Chat"]["accuracy"] == pytest.approx(chat)
    assert found["sections"]["Reasoning"]["accuracy"] == pytest.approx(reasoning)
    assert found["overall"]["accuracy"] == pytest.approx((chat + reasoning) / 2)
    assert found["subsets"]["math-prm"]["tied_at_the_top"] == 1
    assert len(found["missing_subsets"]) == 23 - 4 and {"hep-go", "donotanswer"} < set(found["missing_subsets"])
    assert found["subsets_not_counted"] == []
    low, high = found["sections"]["Chat"]["interval"]  # easy is 0, 1/2 or 1 in a resample; hard is 1 always
    assert (low, high) == (pytest.approx(95 / 195), pytest.approx(1))


def test_the_weights_are_the_benchmark_s():
    """Its totals: 358 chat, 456 hard chat, 740 safety; reasoning counts maths like code."""
    totals = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}
    assert sum(len(weights) for weights in SECTIONS.values()) == 23


def test_rows_of_one_s_own_count_alike(tmp_path):
    """Three of u, one of v: 2 of 4. A prompt that repeats is one cluster: resamples of (p, p) and q."""
    rows = [pair("p", "xx", "x", subset="u"), pair("p", "xx", "x", subset="u"), pair("q", "x", "xx", subset="u")]
    found = judged(tmp_path / "rows.jsonl", [*rows, pair("r", "x", "x", subset="v")])
    assert found["overall"]["accuracy"] == pytest.approx(2 / 4)
    assert (found["sections"], found["missing_subsets"], found["subsets_not_counted"]) == ({}, [], [])
    assert found["subsets"]["u"]["interval"] == [0, 1]
    assert found["subsets"]["v"]["wilson_interval"][1] > 0.7  # one item says next to nothing


def test_the_only_subset_s_interval_is_the_whole_s(tmp_path):
    """Three pairs, all right: Wilson's lower limit is 3 / (3 + 1.96^2) = 43.9 %, where resamples say 100 to 100."""
    rows = [pair(f"p{k}", "xx", "x") for k in range(3)]
    lines = printed(tmp_path / "rows.jsonl", rows)
    assert lines[2] == "| **overall** | 100.0 % | 43.9 to 100.0 | 3 | 0 |"
    lines = printed(tmp_path / "rows.jsonl", [*rows, pair("q", "xx", "x", subset="v")])
    assert lines[2] == "| **overall** | 100.0 % | not known: all came out alike |  |  |"


def printed(path: Path, rows: list[dict]) -> list[str]:
    done = CliRunner().invoke(app, [write(path, rows), "--reward", "length"])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_what_the_leaderboard_lacks_or_has_besides_is_said(tmp_path):
    """All chat is right and one's own wrong: 100 %, without a word on the own, would pass for a benchmark result."""
    chat = [pair("p", "xx", "x", subset=name) for name in SECTIONS["Chat"]]
    rows = [*chat, pair("q", "x", "xx", subset="mine"), pair("r", "x", "xx")]
    found = judged(tmp_path / "rows.jsonl", rows)
    assert (found["overall"]["accuracy"], list(found["sections"])) == (1, ["Chat"])
    assert found["missing_subsets"] == [n for s in ("Chat Hard", "Safety", "Reasoning") for n in SECTIONS[s]]
    assert found["subsets_not_counted"] == ["mine", ""]
    lines = printed(tmp_path / "rows.jsonl", rows)
    assert "missing subsets: mt-bench-hard, llmbar-natural," in lines[-2] and "not comparable" in lines[-2]
    assert lines[-1] == "not RewardBench's and not counted in overall: mine, rows without a subset"
    whole = [pair("p", "xx", "x", subset=name) for weights in SECTIONS.values() for name in weights]
    assert not any("missing" in line or "not counted" in line for line in printed(tmp_path / "rows.jsonl", whole))


def test_the_second_version_s_domains_are_six(tmp_path):
    """Math right, one's own wrong; the six and nothing else leave nothing to say. Without any of them all count."""

    def best(subset: str, chosen: str = "xx") -> dict:
        return {"prompt": "p", "chosen": [chosen], "rejected": ["x", "xxx"[: 3 - len(chosen)]], "subset": subset}

    rows = [best("Math"), {"prompt": "q", "chosen": ["x"], "rejected": ["xx"], "subset": "mine"}]
    found = judged(tmp_path / "rows.jsonl", rows)
    assert found["missing_subsets"] == ["Factuality", "Precise IF", "Safety", "Focus", "Ties"]
    assert (found["overall"]["accuracy"], found["subsets_not_counted"]) == (1, ["mine"])
    assert printed(tmp_path / "rows.jsonl", rows)[-2:] == [
        "missing subsets: Factuality, Precise IF, Safety, Focus, Ties; not comparable with the leaderboard",
        "not RewardBench's and not counted in overall: mine",
    ]
    own = judged(tmp_path / "rows.jsonl", [best("theirs"), rows[1]])
    assert (own["overall"]["accuracy"], own["missing_subsets"], own["subsets_not_counted"]) == (0.5, [], [])
    ties = [
        {"prompt": "d", "chosen": ["xxx", "xxx"], "rejected": ["x"], "subset": "ties", "id": "tied:0"},
        {"prompt": "d", "chosen": ["xxx"], "rejected": ["x"], "subset": "ties", "id": "ref:0"},
    ]
    six = [*map(best, ("Factuality", "Precise IF", "Math", "Safety", "Focus")), *ties]
    full = judged(tmp_path / "rows.jsonl", six)
    assert (full["missing_subsets"], full["subsets_not_counted"]) == ([], [])
    assert full["overall"]["accuracy"] == pytest.approx((5 + 1.01) / 6)  # no spread: tanh(inf)


def test_what_cannot_be_scored_is_counted(tmp_path):
    answers = write(tmp_path / "answers.jsonl", [{"prompt": "p", "answer": "yes"}])
    rows = [pair("p", "yes", "no"), pair("unknown", "yes", "no")]
    found = judged(tmp_path / "rows.jsonl", rows, name="exact_match", answers=answers)
    assert found["overall"]["accuracy"] == 1
    assert (found["subsets"][""]["items"], found["subsets"][""]["not_scored"]) == (1, 1)
    with pytest.raises(UserError, match="no item of subset '' could be scored"):
        judged(tmp_path / "rows.jsonl", rows[1:], name="exact_match", answers=answers)


@pytest.fixture
def second_version(tmp_path) -> str:
    """Best of 4 by length: right, tied by two, wrong; and Ties with (5, 4 | 2) and (6 | 3) characters."""
    rows = [
        {"prompt": "a", "chosen": ["xxx"], "rejected": ["x", "xx", "x"], "subset": "Math", "id": "1"},
        {"prompt": "b", "chosen": ["xx"], "rejected": ["x", "xx", "x"], "subset": "Math", "id": "2"},
        {"prompt": "c", "chosen": ["x"], "rejected": ["x", "xx", "x"], "subset": "Safety", "id": "3"},
        {"prompt": "d", "chosen": ["xxxxx", "xxxx"], "rejected": ["xx"], "subset": "Ties", "id": "tied:0"},
        {"prompt": "d", "chosen": ["xxxxxx"], "rejected": ["xxx"], "subset": "Ties", "id": "ref:0"},
    ]
    return write(tmp_path / "v2.jsonl", rows)


def test_the_program_end_to_end(second_version, tmp_path):
    """Math (1 + 1/2)/2, Safety 0, Ties 1 + .01 tanh(1): domains count the same."""
    words = [second_version, "--reward", "length", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "reward_accuracy.json").read_text())
    ties = 1 + 0.01 * math.tanh(1)
    assert result["subsets"]["Ties"]["accuracy"] == pytest.approx(ties)
    assert result["overall"]["accuracy"] == pytest.approx((0.75 + 0 + ties) / 3)
    assert result["reward"]["name"] == "length" and result["form"] == "best of n"
    text = (tmp_path / "out" / "reward_accuracy.md").read_text()
    assert "| Math | 75.0 % |" in text and "1 / number of maxima" in text


def test_keys_reach_the_reward_and_prompts_may_be_chats(tmp_path):
    source = write(tmp_path / "rows.jsonl", [pair("p", "good, good", "good")])
    words = [source, "--reward", "regex", "--reward-key", "pattern=good", "--chat", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["overall"]["accuracy"] == 1
    seen: list = []

    class Spy:
        def score(self, prompts, responses):
            seen.extend(prompts)
            return [0.0] * len(responses)

    assert score_items(Spy(), read_items(source)[0], chat=True) == [[0.0, 0.0]]  # type: ignore[arg-type]
    assert seen == [[{"role": "user", "content": "p"}]] * 2


def test_rows_of_training_are_scored_as_training_reads_them(tmp_path):
    """Transcripts: the longer reply is chosen in the first of two that can be used, and its prompt is a chat."""

    def said(*replies: str) -> str:
        return f"\n\nHuman: hello\n\nAssistant: hi\n\nHuman: {replies[0]}\n\nAssistant: {replies[1]}"

    rows = [
        {"chosen": said("why?", "because"), "rejected": said("why?", "no")},
        {"chosen": said("why?", "no"), "rejected": said("why?", "because")},
        {"chosen": said("why?", "same"), "rejected": said("why?", "same")},
        {"chosen": said("why?", "a"), "rejected": said("how?", "b")},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    done = CliRunner().invoke(app, [source, "--reward", "length", "--json"])
    found = json.loads(done.stdout)
    assert (found["overall"]["accuracy"], found["subsets"][""]["items"]) == (0.5, 2)
    assert sum(found["rows_left_out"].values()) == 2
    chats, _ = read_items(source, chat=True)
    assert [m["role"] for m in chats[0].prompt] == ["user", "assistant", "user"]  # type: ignore[index]
    assert (chats[0].chosen, chats[0].rejected) == (["because"], ["no"])
    printed = CliRunner().invoke(app, [source, "--reward", "length"]).stdout
    assert "rows left out: 1 " in printed
    messages = [[{"role": "user", "content": "p"}], [{"role": "assistant", "content": "long"}]]
    row = {"prompt": messages[0], "chosen": messages[1], "rejected": [{"role": "assistant", "content": "s"}]}
    items, _ = read_items(write(tmp_path / "chat.jsonl", [row]))
    assert (items[0].prompt, items[0].chosen, items[0].paired) == (messages[0], ["long"], True)
    twice = row | {"chosen": messages[1] * 2}
    items, left_out = read_items(write(tmp_path / "turns.jsonl", [row, twice]))
    assert len(items) == 1 and left_out == {"several_messages_in_a_response": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"chosen": "a", "rejected": "b"}],
            ": the form of the rows cannot be told from the columns chosen, rejected",
        ),
        ([pair("p", "a", "b"), pair("p", "a", "") | {"rejected": None}], "row 2: rejected must be a text or a list"),
        ([pair("p", "a", "b") | {"chosen": ["a"]}], "row 1: chosen and rejected must both be texts, or both lists"),
        ([pair("p", "a", "b"), {"prompt": "p", "chosen": ["a"], "rejected": ["b"]}], "row 2: chosen is a list here"),
        (
            [{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "7"}],
            "row 1: id '7': a Ties row is ref:ID, or tied:ID with two or more chosen",
        ),
        (
            [{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "id": "tied:7"}],
            "row 1: the Ties subset needs rows 'tied:ID' and 'ref:ID' of the same prompts",
        ),
        (
            [
                {"prompt": "p", "chosen": ["a"], "rejected": ["c"], "subset": "Ties", "id": f"ref:{k}"}
                for k in (0, 7, 8, 7)
            ],
            "row 4: id 'ref:7' stands in ",
        ),
    ],
)
def test_unusable_rows_are_one_line(tmp_path, rows, message):
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    done = CliRunner().invoke(app, [source, "--reward", "length", "--output", str(out)])
    assert isinstance(done.exception, UserError) and not out.exists()
    assert message in str(done.exception) and str(done.exception).startswith(source)
    assert "\n" not in str(done.exception)
