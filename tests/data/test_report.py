"""`alignment data report`: numbers counted by hand on a few made-up rows, and no row's text anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.data.pipeline import prepare_rows
from alignment.data.report import as_text, bars, data_report, histogram, set_report, wilson
from alignment.data.report_page import write_page
from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.recipes import load_recipe

SECRET = "teacher"  # a word that every row has: it must appear nowhere


def pair(prompt: str, chosen: int, rejected: int, **more) -> dict:
    """Responses of so many kind or harsh words."""
    return {"prompt": f"my {SECRET} {prompt}", "chosen": " kind" * chosen, "rejected": " cold" * rejected, **more}


ROWS = [
    pair("is", 3, 1),
    pair("was", 4, 1),
    pair("seems", 2, 3),
    pair("is", 3, 1),  # the first again
    pair("was", 1, 5),  # the second's prompt
    pair("is", 2, 2, label=0.5),
    {"prompt": f"my {SECRET}", "chosen": " kind"},  # no rejected
    pair("is", 1, 1) | {"rejected": " kind"},  # the same responses
    pair("is", 1, 1) | {"rejected": 7},
    pair("is", 1, 1) | {"chosen": "  "},
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path):
    return load_tokenizer(str(tiny))


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    for name, rows in (("train", ROWS), ("eval", [pair("is", 1, 3), pair("is", 1, 3, label=1), *ROWS[1:2]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"objective: {{name: dpo}}\nmodel: {{name_or_path: {tiny}}}\n"
        f"data: {{train: {{name: {tmp_path / 'train.jsonl'}, ties: soft}}, eval: {tmp_path / 'eval.jsonl'},\n"
        "  max_length: 64, max_rejected_share: 0.5, overlap: allow}\n"
        "training: {global_batch_size: 2}\n"
    )
    return file


def counted(tokenizer, rows=ROWS, max_length: int = 64):
    prepared = prepare_rows(rows, "made up", tokenizer, max_length=max_length, role="train", max_rejected_share=0.5)
    return prepared, set_report(prepared, max_length, tokenizer)


def test_rows_reasons_and_where(tokenizer):
    _, found = counted(tokenizer)
    assert (found.read, found.used, found.too_many) == (10, 6, False)
    where = {bad.reason: (bad.rows, bad.where) for bad in found.unusable}
    assert where == {"missing_field": (1, ["7"]), "same_responses": (1, ["8"]), "not_text": (1, ["9"]),
                     "empty": (1, ["10"])}  # fmt: skip
    _, strict = counted(tokenizer, ROWS[6:] + ROWS[:1])
    assert strict.too_many  # four of five, and half are allowed


def test_each_cause_of_a_reason_has_a_row(tokenizer):
    """The fields that lack differ from row to row; a row must not be given another one's cause."""
    whole = pair("is", 1, 2)
    rows = [{name: whole[name] for name in whole if name != lacking} for lacking in ("rejected", "chosen", "rejected")]
    prepared, found = counted(tokenizer, [*rows, *ROWS[:4]])
    causes = {bad.row: bad.detail for bad in prepared.rejected}
    assert causes[1] != causes[2] and causes[1] == causes[3]
    (missing,) = found.unusable
    assert (missing.where, missing.detail) == (["1", "2", "3"], f"row 1: {causes[1]}; row 2: {causes[2]}")


def test_length_bias_by_hand(tokenizer):
    """Chosen longer in rows 1, 2, 4; shorter in 3 and 5; row 6 is even. Wilson (3 of 5, z = 1.959964): centre
    (0.6 + z²/10) / (1 + z²/5) = 0.55655, half-width z sqrt(0.6*0.4/5 + z²/100) / (1 + z²/5) = 0.32585."""
    _, found = counted(tokenizer)
    assert (found.longer, found.shorter, found.longer_share) == (3, 2, 0.6)
    assert found.longer_interval == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert wilson(50, 50)[0] > 0.9


def test_lengths_are_those_of_the_ids(tokenizer):
    """One token a word, and EOS at the end of each response."""
    prepared, found = counted(tokenizer)
    chosen = [len(ids) for ids in prepared.dataset["chosen_ids"]]
    assert sum(found.lengths[1].counts) == 6 and found.lengths[1].edges[0] == min(chosen)
    assert found.difference is not None and found.difference.edges[0] == min(
        len(c) - len(r) for c, r in zip(prepared.dataset["chosen_ids"], prepared.dataset["rejected_ids"], strict=True)
    )


def test_what_is_cut(tokenizer):
    """Limits just below the longest chosen and the longest rejected response."""
    prepared, _ = counted(tokenizer)
    rows = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in prepared.dataset]
    limit = max(p + max(c, r) for p, c, r in rows) - 1
    found = set_report(prepared, limit, tokenizer)
    cut_chosen, cut_rejected = (sum(row[0] + row[i] > limit for row in rows) for i in (1, 2))
    assert found.cut[:2] == (cut_chosen, cut_rejected) and found.cut[2] >= 1
    assert set_report(prepared, limit + 1, tokenizer).cut == (0, 0, 0)


def test_duplicates_by_hand(tokenizer):
    """Row 4 is row 1; prompts: "is" three times, "was" twice, "seems" once: three repeat an earlier one."""
    _, found = counted(tokenizer)
    assert (found.repeated_rows, found.repeated_prompts) == (1, 3)


def test_labels_and_end_tokens(tokenizer):
    _, found = counted(tokenizer)
    assert found.labels == ["1 of 6 are soft: 1 ties, 0 for the other response; mean 0.917"]
    assert "EOS in chosen: once in 6 of 6, never in 0, more often in 0" in found.markers
    plain, _ = counted(tokenizer, ROWS[:3])
    assert set_report(plain, 64, tokenizer).labels == []


def test_a_histogram_covers_its_values():
    """0 … 99 in ten bins of ten; 3 … 25 in bins of three, the last one short."""
    even = histogram("x", list(range(100)))
    assert even.counts == [10] * 10 and even.edges == [10.0 * i for i in range(11)]
    odd = histogram("x", [3, 25, 25, 5])
    assert odd.edges[:2] == [3, 6] and odd.counts == [2, 0, 0, 0, 0, 0, 0, 2]
    assert odd.brief == "mean 14.5, median 15, 95 % up to 25, from 3 to 25"
    lines = list(bars(odd))
    assert lines[0].split() == ["3", "to", "5", "█" * 40, "2"] and lines[1].endswith(" 0")
    assert histogram("x", [7, 7]).counts == [2]


def test_both_sets_and_what_they_share(recipe_file):
    """Prompts of eval: "is" and "was": five rows of train (1, 2, 4, 5, 6); one is a whole row of eval (2)."""
    found = data_report(load_recipe(recipe_file))
    assert [s.role for s in found.sets] == ["train", "eval"]
    assert (found.shared_prompts, found.shared_rows) == (5, 1)
    assert found.ok
    refused = data_report(load_recipe(recipe_file, ["data.overlap=refuse"]))
    assert not refused.ok and "training would refuse this data" in as_text(refused)


def test_no_row_is_quoted_and_the_page_needs_nothing(recipe_file, tmp_path):
    found = data_report(load_recipe(recipe_file))
    page = tmp_path / "page.html"
    write_page(found, page)
    for text in (as_text(found), page.read_text()):
        assert SECRET not in text.replace(str(tmp_path), "") and "kind" not in text
        assert "missing_field" in text and "length bias" in text
    assert page.read_text().count("<svg") == 8
    assert "<script" not in page.read_text() and "<link" not in page.read_text() and 'src="' not in page.read_text()


def test_the_command(recipe_file, tmp_path):
    runner = CliRunner()
    fine = runner.invoke(app, ["data", "report", str(recipe_file), "--html", str(tmp_path / "p.html")])
    assert fine.exit_code == 0 and "train: 6 of 10 rows can be used" in fine.stdout
    assert (tmp_path / "p.html").is_file()
    refused = runner.invoke(app, ["data", "report", str(recipe_file), "data.max_rejected_share=0.1"])
    assert refused.exit_code == 1 and "more than data.max_rejected_share" in refused.stdout


def test_sampled_rows_are_not_there_yet(recipe_file, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("my cat\n")
    overrides = ["data.train=null", f"data.sample.prompts={prompts}", "reward.name=length"]
    with pytest.raises(UserError, match="data.sample: these rows are drawn from the model"):
        data_report(load_recipe(recipe_file, overrides))
