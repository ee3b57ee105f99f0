"""Win rates that an oracle decides: numbers worked out by hand, end to end, from files and from a run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.rewards import get_oracle, get_reward
from evaluation.comparison import Side, compare, describe
from evaluation.plans import plan_of_run
from evaluation.win_rate import app, choose_form, parse_keys, run_program, win_rate_of_files
from tests.evaluation.test_win_rate import make_run, responses, run, write_rows
from tests.rewards.http_server import endpoint, says

TABLE = {
    "responses": ["rock", "paper", "scissors"],
    "matrix": [[0.5, 0.1, 0.8], [0.9, 0.5, 0.3], [0.2, 0.7, 0.5]],
}


@pytest.fixture
def files(tmp_path):
    """one: rock .8 and paper .3 against scissors; two: rock .5 against rock, .1 against paper; three: nobody knows."""
    a = [*responses("one", "rock", "paper"), *responses("two", "rock"), *responses("three", "well")]
    b = [*responses("one", "scissors"), *responses("two", "rock", "paper"), *responses("three", "rock")]
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    return write_rows(tmp_path / "a.jsonl", a), write_rows(tmp_path / "b.jsonl", b), tmp_path / "table.json"


def test_files_end_to_end_with_a_table(files, tmp_path):
    """Scores .55 and .3, rate .425. Won .8, tied .5, lost .3 and .1; without ties (1/2) / (1/2 + 1/2 + 1/2) = 1/3."""
    a, b, table = files
    out = tmp_path / "out"
    asked = ("--oracle", "tabular", "--oracle-key", f"table={table}")
    done = run("--a", a, "--b", b, *asked, "--json", "--output", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "win_rate.json").read_text())
    assert result["win_rate"] == pytest.approx(0.425)
    assert result["win_rate_ties_dropped"] == pytest.approx(1 / 3)
    assert result["pair_outcomes"] == {"wins": 1, "ties": 1, "losses": 2}
    assert result["prompt_outcomes"] == {"wins": 1, "ties": 0, "losses": 1}
    assert (result["pairs"], result["pairs_excluded"], result["prompts"], result["prompts_excluded"]) == (4, 1, 2, 1)
    assert set(result["mean_score"].values()) == {None}
    assert (result["judge"]["name"], result["judge"]["table"]) == ("tabular", str(table))
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    assert [row["win_rate"] for row in rows] == [pytest.approx(0.55), pytest.approx(0.3), None]
    assert {row["score_change"] for row in rows} == {None}
    assert rows[0]["model"] == [{"response": r, "score": None, "finished": None} for r in ("rock", "paper")]
    text = run("--a", a, "--b", b, *asked).stdout
    assert text.startswith("Win rate  42.5 %") and "mean score" not in text
    assert "not scored  1 sample pairs and 1 whole prompts left out" in text


def test_the_two_sides_win_rates_sum_to_one(files):
    a, b, table = files
    oracle = get_oracle("tabular", table=str(table))
    forth, back = (win_rate_of_files(x, y, oracle=oracle).result for x, y in ((a, b), (b, a)))
    assert forth["win_rate"] + back["win_rate"] == pytest.approx(1, abs=1e-12)
    assert win_rate_of_files(a, a, oracle=oracle).result["win_rate"] == pytest.approx(0.5, abs=1e-12)


def test_three_systems_beat_each_other_in_a_circle():
    oracle = get_oracle("tabular", table=TABLE)
    sides = {name: Side(name, [[name]]) for name in TABLE["responses"]}
    for loser, winner in (("rock", "paper"), ("paper", "scissors"), ("scissors", "rock")):
        result = compare(["p"], sides[winner], sides[loser], oracle=oracle, resamples=100, seed=0).result
        assert result["win_rate"] > 0.5


def test_hard_bradley_terry_of_a_reward_gives_the_reward_s_own_win_rate(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [*responses("one", "xxx", "x"), *responses("two", "xx")])
    b = write_rows(tmp_path / "b.jsonl", [*responses("one", "xx"), *responses("two", "xx", "xxxx")])
    hard = win_rate_of_files(a, b, oracle=get_oracle("bradley_terry", reward="length", hard=True)).result
    own = win_rate_of_files(a, b, get_reward("length")).result
    different = {key for key in own if own[key] != hard[key]}
    assert different == {"mean_score", "judge"}


def test_nothing_that_could_be_judged_is_one_line():
    oracle = get_oracle("tabular", table=TABLE)
    with pytest.raises(UserError, match="judge tabular: could not score a single pair"):
        compare(["p"], Side("m", [["well"]]), Side("b", [["rock"]]), oracle=oracle, resamples=100, seed=0)


@pytest.mark.parametrize("given", [{}, {"judge": get_reward("length"), "oracle": get_oracle("tabular", table=TABLE)}])
def test_one_judge_decides(given):
    with pytest.raises(ValueError, match="either judge or oracle"):
        compare(["p"], Side("m", [["a"]]), Side("b", [["b"]]), **given, resamples=100, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a", "b"}, "--reward, --oracle or --judge-from missing: needed with --a, --b"),
        (
            {"model", "baseline", "prompts"},
            "--reward, --oracle or --judge-from missing: needed with --baseline, --model",
        ),
        ({"a", "b", "reward", "oracle"}, "--oracle, --reward: one judge decides; keep one of them"),
        ({"RUN_DIR", "reward", "oracle"}, "--oracle, --reward: one judge decides; keep one of them"),
    ],
)
def test_a_judge_is_named_once(given, message):
    with pytest.raises(UserError) as caught:
        choose_form(given)
    assert str(caught.value) == message
    assert choose_form({"RUN_DIR"}) == choose_form({"RUN_DIR", "oracle"}) == "run"


def test_keys_on_the_command_line_have_their_types():
    """What holds text stays as it is (`5`, `[ab]`), everything else is YAML."""
    assert parse_keys("reward", "regex", ["pattern=[ab]=5"]) == {"pattern": "[ab]=5"}
    assert parse_keys("reward", "exact_match", ["answers=5", "strip=false"]) == {"answers": "5", "strip": False}
    given = ["reward={name: regex, pattern: good}", "temperature=1e-1", "hard=false"]
    assert parse_keys("oracle", "bradley_terry", given) == {
        "reward": {"name": "regex", "pattern": "good"},
        "temperature": 0.1,
        "hard": False,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--oracle-key", "table=t"], "--oracle-key without --oracle: name the oracle that the key belongs to"),
        (["--oracle", "tabluar"], "unknown oracle 'tabluar'; did you mean 'tabular'?"),
        (["--oracle", "tabular", "--oracle-key", "table"], "--oracle-key 'table': write KEY=VALUE"),
        (["--oracle", "bradley_terry", "--oracle-key", "reward={"], "--oracle-key: reward: "),
        (["--oracle", "tabular"], "oracle tabular: key 'table' is missing; add it"),
        (["--oracle", "tabular", "--oracle-key", "table=nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(files, words, message):
    a, b, _ = files
    asked = words if "--oracle" in words else ["--reward", "length", *words]
    done = run("--a", a, "--b", b, *asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_run_s_oracle_judges_it(tiny, tmp_path, capsys):
    """Hard Bradley–Terry on length, from the recipe; the same again by hand from the samples."""
    section = {"name": "bradley_terry", "reward": {"name": "length"}, "hard": True}
    run_dir = make_run(tmp_path / "run", tiny, ["my dog", "the river"], reward=None, oracle=section)
    (run_dir / "final").symlink_to(tiny)
    out = tmp_path / "out"
    run_program({"RUN_DIR": run_dir, "output": out})
    result = json.loads((out / "win_rate.json").read_text())
    assert result["judge"]["name"] == "bradley_terry" and result["judge_is_training_reward"] is True
    assert "judge IS the oracle that the model was trained on" in capsys.readouterr().out
    shares = []
    for line in (out / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        ours, theirs = ([len(sample["response"]) for sample in row[side]] for side in ("model", "baseline"))
        shares.append(sum((a > b) + (a == b) / 2 for a in ours for b in theirs) / (len(ours) * len(theirs)))
    assert result["win_rate"] == pytest.approx(sum(shares) / 2)


def test_the_judge_that_is_named_comes_before_the_recipe_s(tmp_path):
    section = {"name": "bradley_terry", "reward": {"name": "length"}}
    own = make_run(tmp_path / "own", tmp_path / "start", ["new"], reward=None, oracle=section)
    given = make_run(
        tmp_path / "given", tmp_path / "start", ["new"], oracle=section, data={"train": "x", "sample": None}
    )
    for folder in (own, given):
        (folder / "final").mkdir()
    plan = plan_of_run(own)
    assert (plan.judge, plan.oracle) == (None, get_oracle(**section))
    plan = plan_of_run(own, oracle=get_oracle("bradley_terry", reward={"name": "length"}, temperature=2))
    assert plan.notes["judge_is_training_reward"] is None  # the same reward, another oracle
    plan = plan_of_run(own, judge=get_reward("length"))
    assert plan.oracle is None and plan.notes["judge_is_training_reward"] is None
    assert plan_of_run(own, judge=get_reward("vader")).notes["judge_is_training_reward"] is False
    with pytest.raises(UserError, match="has reward: and oracle: sections; name one with --reward or --oracle"):
        plan_of_run(given)
    assert plan_of_run(given, oracle=get_oracle(**section)).notes["judge_is_training_reward"] is None


def test_options_reach_the_program(tmp_path, monkeypatch):
    seen: dict = {}
    monkeypatch.setattr("evaluation.win_rate.run_program", seen.update)
    words = [str(tmp_path), "--oracle", "tabular", "--oracle-key", "table=t.json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert seen == {"RUN_DIR": tmp_path, "oracle": "tabular", "oracle_key": ["table=t.json"]}


def test_the_readable_block_says_who_judged(files):
    a, b, table = files
    text = describe(win_rate_of_files(a, b, oracle=get_oracle("tabular", table=str(table))).result)
    assert f"judge       table of preferences among 3 responses in {table}, SHA-256 " in text


def test_a_recipe_s_section_judges(tmp_path):
    """--judge-from: the reward section's keys reach the judge; a recipe without a judge is one line."""
    files = []
    for name, text in (("a", "good good"), ("b", "good")):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps({"prompt": "p", "response": text}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    shared = "model: {name_or_path: m}\ndata: {train: rows.jsonl}\nobjective: {name: dpo}\n"
    shared += "training: {output_dir: out, global_batch_size: 2, learning_rate: 1.0e-5}\n"
    recipe.write_text(shared + "reward: {name: regex, pattern: good}\n")
    words = ["--a", files[0], "--b", files[1], "--judge-from", recipe]
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["win_rate"] == 1 and json.loads(done.stdout)["judge"]["pattern"] == "good"
    recipe.write_text(shared)
    done = run(*words)
    assert done.returncode == 2 and "has neither a reward nor an oracle section" in done.stderr
    done = run(*words, "--reward", "length")
    assert done.returncode == 2 and "--judge-from, --reward: one judge decides" in done.stderr


def test_answers_without_a_verdict_stand_in_the_headline_and_too_many_are_an_error(tmp_path, monkeypatch):
    """Four prompts are eight answers. One invalid is 12.5 %; five are most of them, and no win rate."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    a = write_rows(tmp_path / "a.jsonl", [row for i in range(4) for row in responses(f"p{i}", "good")])
    b = write_rows(tmp_path / "b.jsonl", [row for i in range(4) for row in responses(f"p{i}", "bad")])

    def answering(invalid):
        def answer(body, number):
            content = body["messages"][0]["content"]
            return says("Hm." if number < invalid else "A" if content.index("good") < content.index("bad") else "B")

        return answer

    def judged(invalid, folder):
        with endpoint(answering(invalid)) as server:
            keys = {"base_url": server.url, "model": "m", "cache": str(tmp_path / folder), "concurrency": 1}
            template = tmp_path / "t.txt"
            template.write_text("{prompt}|{first}|{second}")
            oracle = get_oracle("llm_judge", retries=0, template=str(template), **keys)
            return win_rate_of_files(a, b, oracle=oracle).result

    clean, one = judged(0, "clean"), judged(1, "one")
    assert clean["invalid_answers"] == {"answers": 8, "invalid": 0, "share": 0.0}
    assert clean["win_rate"] == 1.0 and "no verdict" not in describe(clean)
    assert one["invalid_answers"] == {"answers": 8, "invalid": 1, "share": 0.125}
    assert one["win_rate"] == pytest.approx((3 + 0.75) / 4)
    assert "no verdict: 12.5 % of the judge's answers, counted as ties" in describe(one).splitlines()[0]
    with pytest.raises(UserError, match="5 of 8 answers have no verdict, such as 'Hm.'"):
        judged(5, "five")
    scored = compare(["p", "q"], Side("m", [["rock"], ["well"]]), Side("b", [["paper"], ["rock"]]),
                     oracle=get_oracle("tabular", table=TABLE), resamples=100, seed=0).result  # fmt: skip
    assert scored["invalid_answers"] is None
    assert "not scored: 50.0 % of the pairs, left out" in describe(scored).splitlines()[0]
