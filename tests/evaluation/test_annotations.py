"""AlpacaEval's files and numbers: values by hand, by pandas, and through the program."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.rewards import get_reward
from alignment.rewards.judge import Tally
from evaluation.annotations import (
    LEADERBOARD_COLUMNS,
    describe_head2head,
    difficulty_of,
    parse_annotations,
    read_annotations,
    read_difficulty,
    read_model_outputs,
    write_leaderboard,
)
from evaluation.comparison import Side, compare, describe
from evaluation.equal_lengths import caution
from evaluation.head_to_head import (
    annotation_result,
    compare_systems,
    orders,
    summarise,
    write_annotation_result,
)
from evaluation.head_to_head import describe as describe_one
from evaluation.length_control import identical
from evaluation.outputs import leaderboard_row, markdown, with_length_control, write_output
from evaluation.win_rate import app, choose_form, compare_as_asked, run_program, win_rate_of_files
from tests.evaluation.test_win_rate import run

NAN = float("nan")
ALPACA_KEYS = ["win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate"]


def row(preference, instruction="i", one="base", two="model", **more) -> dict:
    return {"instruction": instruction, "output_1": one, "generator_1": "b", "output_2": two, "generator_2": "m"} | {
        "preference": preference,
        **more,
    }


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))  # NaN stands there as NaN, as AlpacaEval's own files have it
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    """2, 1, 1.5, 0 (an old draw), 1.25, and three that are dropped; texts of 3 and 4 characters by turns."""
    values = [2, 1.0, 1.5, 0, 1.25, None, 3.2, NAN]
    return write(
        tmp_path / "annotations.json", [row(v, f"i{k}", "bas", "m" * (3 + k % 2)) for k, v in enumerate(values)]
    )


def test_the_promised_command(small):
    """x = 1, 0, .5, .5, .25: mean .45, squares about it .3025 + .2025 + 2 * .0025 + .04 = .55, error sqrt(.55/4/5).

    Rounded: 2, 1, draw, draw, 1: (1 + .5 + .5) / 5 = .4; 3.2 rounds to 3 and is dropped there, too. Mean length 3.5.
    """
    done = run("--annotations", small, "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["win_rate"] == pytest.approx(45)
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(0.55 / 4 / 5))
    assert [result[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_total")] == [1, 2, 2, 5]
    assert result["discrete_win_rate"] == pytest.approx(40)
    assert result["avg_length"] == 3 and isinstance(result["avg_length"], int)
    low, high = result["interval"]
    assert 0 <= low < 45 < high <= 100
    assert (result["n_dropped"], result["n_instructions"]) == (3, 5)
    assert result["win_rate_ties_dropped"] == pytest.approx(100 / 3)
    assert result["length_controlled_winrate"] is None and "needs 10" in result["length_control"]["note"]


def test_random_preferences_against_pandas():
    rng = np.random.default_rng(0)
    values = [*rng.uniform(1, 2, 40).tolist(), *rng.choice([0.0, 1.0, 1.5, 2.0], 30).tolist(), NAN, NAN, -1.0, 2.7]
    given = pd.Series(values).replace({0.0: 1.5})
    x = given[(given >= 1) & (given <= 2)] - 1
    got = describe_head2head(values)
    assert list(got) == ALPACA_KEYS
    assert got["win_rate"] == pytest.approx(100 * x.mean(), abs=1e-10)
    assert got["standard_error"] == pytest.approx(100 * x.sem(), abs=1e-10)
    assert got["n_wins"] + got["n_wins_base"] + got["n_draws"] == got["n_total"] == 70


def test_rounding_comes_before_dropping_as_in_alpaca_eval():
    """Its ZeroOneScoringRule rounds, then drops: 2.4 is a 2 there, .3 a 0 and so a draw; neither is a preference."""
    got = describe_head2head([1, 1, 2.4, 0.3])
    assert (got["win_rate"], got["n_total"], got["n_draws"]) == (0.0, 2, 0)
    assert got["discrete_win_rate"] == pytest.approx(100 * (0 + 0 + 1 + 0.5) / 4)


def test_the_discrete_rate_is_alpaca_eval_s_to_the_last_bit():
    """It subtracts 1 before it averages: the mean of 1, 0, .5, .5, 0 is .4; 1.4 - 1 is less."""
    assert describe_head2head([2, 1, 1.5, 0, 1.25])["discrete_win_rate"] == 40.0
    rng = np.random.default_rng(1)
    for size in range(2, 40):
        values = rng.choice([0.0, 1.0, 1.2, 1.5, 1.7, 2.0], size)
        expected = (pd.Series(values).replace({1.5: 0}).round().replace({0.0: 1.5}) - 1).to_numpy().mean() * 100
        assert describe_head2head(values.tolist())["discrete_win_rate"] == expected


def test_the_order_shown_may_be_a_number(tmp_path):
    given = [True, False, 1, 0, 1.0, None, NAN]
    rows = read_annotations(write(tmp_path / "a.json", [row(1, is_switched_outputs=value) for value in given]))
    assert [one.switched for one in rows] == [True, False, True, False, True, None, None]
    assert parse_annotations([row(1)])[0].switched is None


def test_one_row_has_no_standard_error_and_none_is_an_error(small):
    assert math.isnan(describe_head2head([2])["standard_error"])
    with pytest.raises(ValueError, match="no preference"):
        describe_head2head([NAN, 3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"instruction": "i", "output_1": "a", "preference": 1}], "row 1: no text under 'output_2' in this row"),
        ([row(1), row("2")], "row 2: preference must be a number from 1 to 2, 0 or null, not '2'"),
        ([row(True)], "row 1: preference must be a number"),
        ([row(1), row(10**400)], "row 2: preference must be a number from 1 to 2, 0 or null, not 1000000000"),
        ([row(1), row(1, is_switched_outputs="yes")], "row 2: is_switched_outputs must be true (output_2 was shown"),
        ([row(1, is_switched_outputs=2)], "false or null, not 2"),
        ([{k: v for k, v in row(1).items() if k != "preference"}], "row 1: no preference in this row (it has instr"),
        ([row(None), row(NAN)], "no preference between 1 and 2 in 2 rows"),
        ([row(None), row(NAN), row(2)], "2 of 3 rows have no preference between 1 and 2; annotate again"),
        ([row(1), row(2, generator_2="other")], "compares 2 pairs of systems (b and m; b and other)"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, rows, message):
    path, out = write(tmp_path / "a.json", rows), tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run_program({"annotations": [path], "output": out})
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value) and not out.exists()


def test_options_of_other_forms_are_refused():
    assert choose_form({"annotations", "json", "gamed", "difficulty", "output"}) == "annotations"
    with pytest.raises(UserError, match="--reward does not apply with --annotations"):
        choose_form({"annotations", "reward"})
    with pytest.raises(UserError, match="give exactly one of"):
        choose_form({"annotations", "RUN_DIR"})


def test_options_reach_the_program(monkeypatch):
    seen: dict = {}
    monkeypatch.setattr("evaluation.win_rate.run_program", seen.update)
    words = ["--annotations", "a.json", "--annotations", "b.json", "--gamed", "g.json", "--difficulty", "d.csv"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert seen == {
        "annotations": [Path("a.json"), Path("b.json")],
        "gamed": [Path("g.json")],
        "difficulty": Path("d.csv"),
    }


def test_repeated_instructions_are_one_cluster():
    """Two instructions, each with rows (1, 1) or (0, 0): a resample of instructions gives 0, 1/2 or 1 only.

    Residual sums +-1: clustered error sqrt(2/1 * 2) / 4 = 1/2; by rows sqrt(1/3) / 2 is less.
    """
    rows = parse_annotations([row(2, "p"), row(2, "p", two="other"), row(1, "q"), row(1, "q", two="other")])
    got = summarise(rows, resamples=500)
    assert got["interval"] == pytest.approx([0, 100])
    assert got["clustered_standard_error"] == pytest.approx(50)
    assert got["standard_error"] == pytest.approx(100 * math.sqrt(1 / 3 / 4))
    assert (got["n_total"], got["n_instructions"], got["p_value"]) == (4, 2, 1.0)


def test_swapping_the_systems_mirrors_everything():
    random.seed(1)
    values = [random.choice([1, 1.5, 2, 1.2, 1.9]) for _ in range(30)]
    texts = [("x" * random.randint(1, 50), "x" * random.randint(1, 50)) for _ in values]
    forth = [row(v, f"i{k}", *texts[k]) for k, v in enumerate(values)]
    back = [row(3 - v, f"i{k}", *reversed(texts[k])) for k, v in enumerate(values)]
    one, two = (summarise(parse_annotations(rows), resamples=200) for rows in (forth, back))
    for key in ("win_rate", "discrete_win_rate", "length_controlled_winrate", "win_rate_ties_dropped"):
        assert one[key] + two[key] == pytest.approx(100, abs=1e-3)
    assert one["interval"] == pytest.approx([100 - two["interval"][1], 100 - two["interval"][0]])
    assert one["n_wins"] == two["n_wins_base"]


def test_repeated_judgements_of_an_order_are_averaged():
    """Output_2 gets .9 shown first; shown second 1 and .2, by mean .6: the orders agree, whichever comes last."""
    one, two, three = row(1.9, is_switched_outputs=True), row(2, is_switched_outputs=False), row(1.2)
    three["is_switched_outputs"] = False
    for rows in itertools.permutations((one, two, three)):
        got = orders(parse_annotations(list(rows)))
        assert got is not None and (got["consistency"], got["win_rate_disagreement_tied"]) == (100, 100)


def test_position_bias_by_hand():
    """Not switched, output_1 is shown first and gets 2 - preference; switched, output_2, with preference - 1."""
    rows = [
        row(1.2, "p", is_switched_outputs=False),  # output_1 first and gets .8
        row(1.6, "p", is_switched_outputs=True),  # output_2 first and gets .6: the orders disagree
        row(1.9, "q", is_switched_outputs=True),  # .9
        row(1.8, "q", is_switched_outputs=False),  # .2: the orders agree on output_2
        row(1.7, "r", is_switched_outputs=False),  # .3
        row(2, "s"),
    ]
    got = orders(parse_annotations(rows))
    assert got is not None
    assert got["first_preference"] == pytest.approx(100 * (0.8 + 0.6 + 0.9 + 0.2 + 0.3) / 5)
    assert (got["pairs_in_both_orders"], got["consistency"]) == (2, 50)
    assert got["win_rate_disagreement_tied"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert orders(parse_annotations([row(2)])) is None
    assert "first place gets" in annotation_text(rows)


def annotation_text(rows: list[dict]) -> str:
    return describe_one(summarise(parse_annotations(rows), resamples=100))


def test_several_systems_are_compared_in_pairs(tmp_path):
    """Shares on i0..i2: a 1, 1, 1; b 0, 1, .5; c answers i1 and i2 alone. a - b = 1, 0, .5: mean 50 points, p 2/4.

    Zero differences flip to themselves: patterns of (1, .5): |+-1.5| in 2 of 4 -> p = 1/2. Holm over three pairs.
    """
    files = []
    for name, values in (("a", {0: 2, 1: 2, 2: 2}), ("b", {2: 1.5, 1: 2, 0: 1}), ("c", {1: 2, 2: 2})):
        rows = [row(v, f"i{k}") | {"generator_2": name} for k, v in values.items()]
        files.append(write(tmp_path / f"{name}.json", rows))
    result, text, systems = annotation_result(files, resamples=200)
    assert list(result["systems"]) == list(systems) == ["a", "b", "c"]
    ab, ac, bc = result["comparisons"]
    assert (ab["difference"], ab["p_value"], ab["instructions"]) == (pytest.approx(50), 0.5, 3)
    assert (ac["difference"], ac["instructions"]) == (0, 2)
    assert (bc["difference"], bc["instructions"]) == (pytest.approx(-25), 2)
    assert [r["p_holm"] for r in (ab, ac, bc)] == [1, 1, 1]
    assert {r["verdict"] for r in (ab, ac, bc)} == {"too few prompts to tell"} and "no significant" not in text
    with pytest.raises(UserError, match="no instruction that both answered"):
        compare_systems({n: parse_annotations([row(2, n)]) for n in ("x", "y")})
    other = write(tmp_path / "other.json", [row(2) | {"generator_1": "another"}])
    with pytest.raises(UserError, match="one baseline makes systems comparable"):
        annotation_result([files[0], other])


def test_an_output_folder_has_a_leaderboard(small, tmp_path, capsys):
    run_program({"annotations": [small], "output": tmp_path / "out", "bootstrap": 200})
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "leaderboard.csv",
        *(f"win_rate.{end}" for end in ("html", "json", "md")),
    ]
    text = (tmp_path / "out" / "leaderboard.csv").read_text()
    columns = "win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,avg_length"
    assert text.splitlines()[0] == f",{columns},length_controlled_winrate,lc_standard_error"  # AlpacaEval's own
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv", index_col=0)
    assert list(table.columns) == list(LEADERBOARD_COLUMNS)
    assert table.loc["m", "win_rate"] == pytest.approx(45) and math.isnan(table.loc["m", "lc_standard_error"])
    assert capsys.readouterr().out.startswith("# m against b")


def test_a_comparison_is_written_in_alpaca_eval_s_format(tmp_path):
    """Lengths 4, 2 against 3 of p: win, loss; 2 against 2 of q: tie. Over pairs 1/2; over prompts (1/2 + 1/2) / 2."""
    model, baseline = Side("new", [["xxxx", "xx"], ["xx"]]), Side("old", [["xxx"], ["yy"]])
    found = with_length_control(compare(["p", "q"], model, baseline, get_reward("length"), resamples=100, seed=0))
    write_output(tmp_path, found)
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [r["index"] for r in rows] == [0, 0, 1]  # AlpacaEval's row number is the prompt's
    assert rows[0] == {
        "index": 0, "instruction": "p", "output_1": "xxx", "generator_1": "old", "output_2": "xxxx",
        "generator_2": "new", "annotator": "length", "preference": 2.0,
    }  # fmt: skip
    assert [r["preference"] for r in rows] == [2, 1, 1.5]
    assert summarise(read_annotations(tmp_path / "annotations.json"), resamples=100)["win_rate"] == pytest.approx(50)
    (line,) = csv.DictReader((tmp_path / "leaderboard.csv").open())
    assert (line[""], line["n_wins"], line["n_draws"], line["avg_length"]) == ("new", "1", "1", "2")
    assert leaderboard_row(found)["discrete_win_rate"] == pytest.approx(100 * found.result["discrete_win_rate"])
    assert found.result["length_controlled"]["win_rate"] is None
    page = markdown(found.result)
    assert page.startswith("# Win rate 50.0 % (95 % interval") and "| model | new |" in page
    assert "| prompts won | 0, tied 2, lost 0; sample pairs won 1, tied 1, lost 1 |" in page
    assert all(line.count("|") == 3 for line in page.splitlines()[2:])


def test_model_outputs_are_sides(tmp_path):
    ours = [{"dataset": "d", "instruction": i, "output": o, "generator": "new"} for i, o in (("p", "xxx"), ("q", "x"))]
    theirs = [{"instruction": i, "output": "xx", "generator": "old"} for i in ("q", "p")]
    a, b = write(tmp_path / "a.json", ours), write(tmp_path / "b.json", theirs)
    result = win_rate_of_files(a, b, get_reward("length"), resamples=100).result
    assert (result["model"], result["baseline"], result["win_rate"]) == ("new", "old", 0.5)
    assert read_model_outputs(write(tmp_path / "f.json", [one | {"generator": "G\n 4"} for one in ours]))[0] == "G 4"
    name, outputs = read_model_outputs(a)
    assert name == "new" and outputs["q"] == (f"{a}: row 2", ["x"])
    with pytest.raises(UserError, match=r"a.json: row 1: prompt 'p' is not in .*c.json; 1 such prompt"):
        win_rate_of_files(a, write(tmp_path / "c.json", theirs[:1]), get_reward("length"))
    with pytest.raises(UserError, match="no text under 'output'"):
        read_model_outputs(write(tmp_path / "d.json", [{"instruction": "p"}]))
    with pytest.raises(UserError, match="outputs of 2 generators"):
        read_model_outputs(write(tmp_path / "e.json", ours + theirs))


def test_difficulty_by_text_or_by_row(tmp_path):
    (tmp_path / "d.json").write_text('{"p": 0.5}')
    (tmp_path / "d.csv").write_text(",instruction_difficulty\n0,1.5\n1,-2\n")
    assert read_difficulty(tmp_path / "d.json") == {"p": 0.5}
    assert read_difficulty(tmp_path / "d.csv") == {0: 1.5, 1: -2.0}
    (tmp_path / "bad.csv").write_text(",instruction_difficulty\n0,hard\n")
    with pytest.raises(UserError, match="bad.csv: line 2: the difficulty must be a finite number, not 'hard'"):
        read_difficulty(tmp_path / "bad.csv")
    rows = parse_annotations([row(1 + k % 2, f"i{k}", "x" * k, "x") for k in range(12)])
    with pytest.raises(UserError, match="no difficulty for instruction 'i2' or index 2"):
        summarise(rows, difficulty={0: 1.5, 1: -2.0}, resamples=100)
    found = summarise(rows, difficulty={k: k / 5 - 1 for k in range(12)}, resamples=100)
    assert found["length_control"]["variant"] == "plain, with difficulty"


def test_a_difficulty_file_is_read_to_its_last_cell(tmp_path):
    """Without a header the first row counts; an instruction may have commas, quotes and several lines."""
    (tmp_path / "d.csv").write_text('0,1.5\n\n"two, or\n""three"" lines",-2\n7,3\n')
    assert read_difficulty(tmp_path / "d.csv") == {0: 1.5, 'two, or\n"three" lines': -2.0, 7: 3.0}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "0,nan\n", "line 1: the difficulty must be a finite number, not 'nan'"),
        ("d.csv", ",d\n0,1\n\n1,inf\n", "line 4: the difficulty must be a finite number, not 'inf'"),
        ("d.csv", ",d\n0,1\n1\n", "line 3: a row number or instruction and a number are needed, not ['1']"),
        ("d.csv", "index,d\n", "holds no difficulties"),
        ("d.csv", "9" * 5000 + ",1\n", "line 1: not a readable CSV file"),
        ("d.json", '{"p": true}', "'p': the difficulty must be a finite number, not True"),
        ("d.json", '{"p": 1, "q": 1' + "0" * 400 + "}", "'q': the difficulty must be a finite number, not 1000"),
    ],
)
def test_an_unusable_difficulty_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_difficulty(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}") and "\n" not in str(caught.value)


def test_row_numbers_that_mean_other_instructions_are_refused(tmp_path):
    """The second file lacks i0: its row 0 is i1, and so is every number shifted. By text nothing is."""
    files = []
    for name, start in (("m", 0), ("n", 1)):
        rows = [row(1 + (k % 3 > 0), f"i{k}", "x" * k, "x" * 9) | {"generator_2": name} for k in range(start, 40)]
        files.append(write(tmp_path / f"{name}.json", rows))
    table = tmp_path / "d.csv"
    table.write_text("".join(f"{k},{k / 40}\n" for k in range(40)))
    said = r"n.json: row 1: instruction 'i1' is of difficulty 0 by its row number, and of 0.025 in .*m.json: row 2"
    with pytest.raises(UserError, match=said):
        annotation_result(files, difficulty=table, resamples=100)
    with pytest.raises(UserError, match=r"n.json: row 1: instruction 'i1'"):
        annotation_result(files[:1], gamed=files[1:], difficulty=table, resamples=100)
    table = write(tmp_path / "d.json", {f"i{k}": k / 40 for k in range(40)})
    (pair,) = annotation_result(files, difficulty=table, resamples=100)[0]["comparisons"]
    (back,) = annotation_result(files[::-1], difficulty=table, resamples=100)[0]["comparisons"]
    assert pair["length_controlled_winrate"] == pytest.approx(100 - back["length_controlled_winrate"], abs=1e-9)


def test_rows_that_repeat_an_instruction_at_another_difficulty_are_warned_of():
    """Two rows a prompt, by their places; with the prompt's index, or the same difficulty, nothing is wrong."""
    rows = [row(1 + (k % 3 > 0), f"i{k // 2}", "x" * k, "x" * 9) for k in range(40)]
    table = {k: k / 40 for k in range(40)}
    note = summarise(parse_annotations(rows), difficulty=table, resamples=100)["length_control"]["note"]
    assert note.startswith("20 rows repeat an instruction at another difficulty")
    draws = [one | {"preference": 1.5} for one in rows]  # nothing is known of these, whatever their difficulty
    found = summarise(parse_annotations(draws), difficulty=table, resamples=100)
    assert found["length_controlled_winrate"] is None
    assert found["length_control"]["note"].startswith("cross-validation chose the strongest penalty")
    for fine in ([one | {"index": k // 2} for k, one in enumerate(rows)], rows[::2]):
        note = summarise(parse_annotations(fine), difficulty=table, resamples=100)["length_control"]["note"]
        assert not (note or "").startswith(("10", "20"))


class _Counting:
    """A judge that counts what it is asked."""

    name, asked = "counting", 0

    def score(self, prompts, responses):
        self.asked += len(prompts)
        return [float(len(response)) for response in responses]

    def describe(self):
        return "counts"


def test_difficulties_of_samples_are_their_prompts(tmp_path):
    """Two samples a side, four rows a prompt: by row number of the prompt and by text are the same table."""
    rng, names = np.random.default_rng(3), ("a", "b")
    for name in names:
        lines = [{"prompt": f"p{k}", "response": "x" * int(rng.integers(5, 50))} for k in range(30) for _ in "ab"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sides = [tmp_path / f"{name}.jsonl" for name in names]
    values = [float(v) for v in rng.normal(size=30)]
    by_row, by_text = dict(enumerate(values)), {f"p{k}": v for k, v in enumerate(values)}
    found = [
        with_length_control(
            win_rate_of_files(*sides, get_reward("regex", pattern="x{20}"), resamples=100, difficulty=table), (), table
        ).result["length_controlled"]
        for table in (by_row, by_text)
    ]
    assert found[0] == found[1] and found[0]["coefficients"]["difficulty"] != 0
    judge = _Counting()
    del by_row[29]
    with pytest.raises(UserError, match=r"a.jsonl:59: no difficulty for instruction 'p29' or index 29"):
        win_rate_of_files(*sides, judge, difficulty=by_row)
    assert judge.asked == 0
    (tmp_path / "prompts.txt").write_text("p0\np1\n")
    models = {"model": "no/such", "baseline": "nor/this", "prompts": tmp_path / "prompts.txt", "reward": "length"}
    with pytest.raises(UserError, match=r"prompts.txt:2: no difficulty for instruction 'p1' or index 1"):
        compare_as_asked("models", models, {0: 1.0})  # before a model is looked for


def test_difficulty_is_found_by_text_and_else_by_the_row_s_own_index():
    rows = parse_annotations([row(1, "p", index=7), row(1, "q", index=0), row(1, "r")])
    assert difficulty_of(rows, {"p": 1.5, 7: -1.0, 0: 2.0, 2: 3.0}).tolist() == [1.5, 2.0, 3.0]
    with pytest.raises(UserError, match="row 1: no difficulty for instruction 'p' or index 7 in the file of --diff"):
        difficulty_of(rows, {0: 1.0, 2: 1.0})


def test_a_leaderboard_has_the_best_first_and_a_mode(tmp_path):
    write_leaderboard(tmp_path / "l.csv", {"x": {"win_rate": 9.0}, "y": {"win_rate": 80.0}, "z": {"win_rate": 30.0}})
    table = pd.read_csv(tmp_path / "l.csv", index_col=0)
    assert list(table.index) == ["y", "z", "x"] and list(table["win_rate"]) == [80, 30, 9]
    assert list(table["mode"]) == ["community"] * 3 and table["n_total"].isna().all()
    write_leaderboard(tmp_path / "l.csv", {"x": {"win_rate": 9.0, "mode": "minimal"}})
    assert pd.read_csv(tmp_path / "l.csv")["mode"].tolist() == ["minimal"]


def test_extreme_changes_are_warned_of():
    """20 %: a quarter of the way down is 15, ten points 10; of the way up 40. 50 %: below 37.5 or above 62.5."""

    def at(raw: float, controlled: float) -> str | None:
        return caution(raw, replace(identical(3), rate=controlled / 100))

    assert at(20, 10.1) is None and at(20, 9.9) is not None
    assert at(20, 39.9) is None and at(20, 40.1) is not None
    assert at(50, 37.6) is None and at(50, 37.4) is not None


def test_numbers_count_instructions_and_not_rows():
    """Four instructions with six equal rows each, shares 1, 1, 0, .5: errors and Wilson's interval are those of four.

    Means of four draws with replacement: the sd of (1, 1, 0, .5) over 2, against over sqrt(24) of rows.
    """
    rows = parse_annotations([row(1 + v, f"i{k}") for k, v in enumerate((1.0, 1.0, 0.0, 0.5)) for _ in range(6)])
    found = summarise(rows, resamples=4000)
    sd = np.std([1, 1, 0, 0.5], ddof=1)
    assert found["clustered_standard_error"] == pytest.approx(100 * sd / 2)
    assert found["minimal_detectable_difference"] == pytest.approx(100 * (1.959964 + 0.841621) * sd / 2, rel=1e-5)
    z2, mean = 1.959964**2, 0.625
    half = math.sqrt(z2) * math.sqrt(mean * (1 - mean) / 4 + z2 / 64) / (1 + z2 / 4)
    assert found["wilson_interval"] == pytest.approx(
        [100 * ((mean + z2 / 8) / (1 + z2 / 4) + side * half) for side in (-1, 1)], rel=1e-5
    )
    means = np.sort([np.mean([(1, 1, 0, 0.5)[i] for i in draw]) for draw in itertools.product(range(4), repeat=4)])
    exact = 100 * np.quantile(means, [0.025, 0.975])
    assert found["interval"] == pytest.approx(exact, abs=7)
    same = summarise(parse_annotations([row(1.5, f"i{k}") for k in range(12)]), resamples=100)
    assert same["minimal_detectable_difference"] is None and "detectable at 80 %: unknown" in describe_one(same)


def test_length_control_resamples_instructions():
    """Sixteen copies of every row make the interval no narrower."""
    rng = np.random.default_rng(3)
    plain = [row(1 + float(rng.random() < 0.7), f"i{k}", "x" * int(rng.integers(1, 60)), "y" * 30) for k in range(80)]
    widths = []
    for copies in (1, 16):
        found = summarise(parse_annotations([one for one in plain for _ in range(copies)]), resamples=200)
        low, high = found["length_controlled_interval"]
        widths.append(high - low)
        assert found["length_control"]["resamples"] == 200
    assert 0.6 < widths[1] / widths[0] < 1.6  # of rows it would be a quarter


def test_paired_systems_are_aligned_by_instruction_and_judged_after_holm(tmp_path):
    """a, and in the other order b (5 points above and below by turns) and c (5 below on twenty, 4 above on ten).

    a - c is the only difference: its interval leaves 0 out and p is under 5 %, but three times p is not.
    """
    moved = {"a": [0.0] * 30, "b": [0.05, -0.05] * 15, "c": [-0.05] * 20 + [0.04] * 10}
    files = []
    for name, by in moved.items():
        rows = [row(1.06 + 0.029 * k + by[k], f"i{k}", generator_2=name) for k in range(30)]
        files.append(write(tmp_path / f"{name}.json", rows if name == "a" else rows[::-1]))
    result, text, _ = annotation_result(files, resamples=500)
    ab, ac, _ = result["comparisons"]
    assert ab["difference"] == pytest.approx(0) and ab["p_value"] == 1
    values = -np.array(moved["c"])
    p = sum(
        math.comb(20, i) * math.comb(10, j)
        for i in range(21) for j in range(11) if abs(5 * (2 * i - 20) + 4 * (2 * j - 10)) >= 60
    ) / 2**30  # fmt: skip
    assert ac["p_value"] == pytest.approx(p) and ac["p_holm"] == pytest.approx(3 * p) and p < 0.05 < 3 * p
    assert ac["minimal_detectable_difference"] == pytest.approx(
        100 * (1.959964 + 0.841621) * values.std(ddof=1) / math.sqrt(30), rel=1e-5
    )
    assert ac["interval"][0] > 0
    line = next(line for line in text.splitlines() if line.startswith("| a - c"))
    assert line.endswith("no significant difference |")


def test_gamed_annotations_are_of_the_same_baseline(small, tmp_path, capsys):
    other = write(tmp_path / "gamed.json", [row(1.5) | {"generator_1": "OTHER"}])
    with pytest.raises(UserError, match=r"--gamed .*gamed.json: is against OTHER, and .*annotations.json against b"):
        annotation_result([small], gamed=[other], resamples=100)
    sides = [
        write(tmp_path / f"{n}.json", [{"instruction": "i", "output": n, "generator": n}]) for n in ("ours", "theirs")
    ]
    options = {"a": sides[0], "b": sides[1], "reward": "length", "bootstrap": 100, "gamed": [other]}
    with pytest.raises(UserError, match=r"gamed.json: is against OTHER, and .*theirs.json against theirs"):
        run_program(options)
    nameless = write(tmp_path / "nobody  says.json", [{"instruction": "i", "output": "xx"}])
    run_program(options | {"b": nameless})  # nobody says whose outputs these are
    assert "gamed.json: its answers were judged against OTHER" in capsys.readouterr().err
    lines = [tmp_path / f"{n}.jsonl" for n in ("ours", "theirs")]
    for line in lines:
        line.write_text('{"prompt": "i", "response": "x"}\n')
    run_program(options | {"a": lines[0], "b": lines[1]})
    assert "gamed.json: its answers were judged against OTHER; that must be this baseline" in capsys.readouterr().err
    two = write(tmp_path / "two.json", [row(1.5), row(1.5) | {"generator_2": "n"}])
    with pytest.raises(UserError, match="two.json: compares 2 pairs of systems"):
        annotation_result([small], gamed=[two], resamples=100)


def test_names_that_no_terminal_or_table_takes(tmp_path):
    """Half a surrogate pair, a new line, what ASCII lacks: nothing of it ends a program or a line."""
    odd = "\ud800模\n型|"
    rows = [row(2, f"i{k}", "\ud800") | {"generator_2": odd} for k in range(3)]
    path = write(tmp_path / "odd.json", rows)
    given = {"PYTHONIOENCODING": "ascii"}
    for options in (["--json"], ["--output", tmp_path / "out"]):
        done = run("--annotations", path, *options, env=given)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "win_rate.json").read_text())
    assert found["generator_2"] == r"\ud800模 型|" and found["n_wins"] == 3
    text = (tmp_path / "out" / "win_rate.md").read_text()
    assert text.splitlines()[0] == r"# \ud800模 型| against b"
    other = write(tmp_path / "other.json", [row(2), row(1) | {"generator_2": "a\nb"}])
    done = run("--annotations", other)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_file_given_twice_is_one_system(small):
    with pytest.raises(UserError, match=r"--annotations .*annotations.json: given twice"):
        annotation_result([small, small])


def test_the_baseline_under_two_names_is_even_with_itself(tmp_path):
    rows = [row(1.5, f"i{k}") | {"generator_2": "b"} for k in range(12)]
    files = [write(tmp_path / name, rows) for name in ("one.json", "two.json")]
    (pair,) = annotation_result(files, resamples=100)[0]["comparisons"]
    assert (pair["length_controlled_winrate"], pair["length_controlled_interval"]) == (50, [50, 50])


def test_an_output_that_is_a_file_is_refused_before_any_work(small, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for place in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        done = run("--annotations", small, "--output", place)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "taken is a file" in done.stderr, done.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_fit_without_coefficients_has_no_interval(tmp_path):
    """Nothing but draws: of both coefficients the penalty leaves none, and 50 % is no estimate of anything."""
    rows = parse_annotations([row(1.5, f"i{k}", "x" * (k % 5), "y") for k in range(20)])
    found = summarise(rows, resamples=100)
    assert (found["length_controlled_winrate"], found["length_controlled_interval"]) == (None, None)
    assert found["length_control"]["note"].startswith("cross-validation chose the strongest penalty")
    write_annotation_result(tmp_path, found, "", {"m": rows})
    assert "no estimate: cross-validation chose the strongest penalty" in (tmp_path / "win_rate.html").read_text()
    (line,) = csv.DictReader((tmp_path / "leaderboard.csv").open())
    assert (line["win_rate"], line["length_controlled_winrate"], line["lc_standard_error"]) == ("50.0", "", "")
    sides = Side("n", [["x" * (k % 5)] for k in range(20)]), Side("o", [["y"]] * 20)
    judge = get_reward("regex", pattern="nothing")
    alike = with_length_control(compare([f"i{k}" for k in range(20)], *sides, judge, resamples=100, seed=0))
    assert alike.result["length_controlled"]["win_rate"] is None
    assert "no estimate: cross-validation chose the strongest penalty" in " ".join(describe(alike.result).split())


class _TwoOrders:
    """Stands for the judge that asks in both orders and keeps a tally: the longer text wins."""

    name = "llm_judge"
    tally = Tally(pairs=3, called=6, valid_pairs=2, consistent=1, first=2.5, invalid=1)

    def probability(self, prompts, first, second):
        return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    def describe(self):
        return "a stand-in"


def test_a_judge_s_position_bias_is_kept():
    """Two valid pairs, four answers: first place 2.5 / 4."""
    sides = Side("new", [["xx"], ["x"], ["x"]]), Side("old", [["x"], ["xx"], ["x"]])
    found = compare(["p", "q", "r"], *sides, oracle=_TwoOrders(), resamples=100, seed=0)
    assert found.result["orders"] == {
        "pairs": 2, "consistency": 0.5, "first_preference": 0.625, "invalid_answers": 1
    }  # fmt: skip
    assert "orders      agree on 50.0 % of 2 pairs; the first place is preferred with 62.5 %" in describe(found.result)
    assert (
        compare(["p"], Side("n", [["x"]]), Side("o", [["y"]]), get_reward("length"), resamples=100, seed=0).result[
            "orders"
        ]
        is None
    )


def test_length_control_of_sampled_models(tmp_path):
    """A judge of length: with 40 prompts and lengths about equal the rate at equal lengths is near one half."""
    rng = np.random.default_rng(0)
    sides = [Side(n, [["x" * int(k)] for k in rng.integers(5, 50, 40)]) for n in ("new", "old")]
    found = with_length_control(
        compare([f"p{k}" for k in range(40)], *sides, get_reward("length"), resamples=100, seed=0)
    )
    control = found.result["length_controlled"]
    assert control["variant"] == "plain, without difficulty" and control["coefficients"]["length"] < -1
    assert control["interval"][0] <= control["win_rate"] <= control["interval"][1]
    assert "controlled  " in describe(found.result) and "at equal lengths, plain" in describe(found.result)
    assert leaderboard_row(found)["length_controlled_winrate"] == pytest.approx(100 * control["win_rate"])
    gamed = parse_annotations(found.annotations)
    assert with_length_control(found, [gamed]).result["length_controlled"]["variant"].startswith("regularised")
