"""A run on given data: several sources and forms, rows that cannot be used, overlap, and what the run says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.runs.program import main
from tests import tiny_lm
from tests.data.building import reply, said, user, write
from tests.e2e.conftest import Grammar


def rows(openings: list[str]) -> list[dict]:
    return [{"prompt": user(o), "chosen": reply(f"{o} kind ."), "rejected": reply(f"{o} cold .")} for o in openings]


@pytest.fixture
def train(root: Path, grammar: Grammar, tmp_path, monkeypatch, capsys):
    """Train with `overrides` in this process; the run, its manifest and what was printed."""

    def attempt(*overrides: str) -> tuple[Path, dict, str]:
        run = tmp_path / "run"
        more = ["data.sample=null", "evaluation=null", *overrides]
        monkeypatch.chdir(root)
        given = grammar.overrides(run, *more)
        monkeypatch.setattr(sys, "argv", ["train.py", "recipes/quickstart/dpo.yaml", *given])
        main()
        return run, json.loads((run / "manifest.json").read_text()), capsys.readouterr().out

    return attempt


def test_a_run_says_what_became_of_every_row(train, tmp_path):
    """A Parquet file of messages, transcripts, one bad row in each; two prompts are held out as well."""
    openings = tiny_lm.openings()[:40]
    chat = rows(openings[:20])
    chat[4]["chosen"] = reply(" ")
    transcripts = [
        {key: f"\n\nHuman: {o}\n\nAssistant: {o} {word} ." for key, word in (("chosen", "warm"), ("rejected", "bad"))}
        for o in openings[20:40]
    ]
    transcripts[9]["rejected"] = "\n\nHuman: other\n\nAssistant: words"
    held_out = rows([openings[0], openings[21], "no training prompt"])
    held_out[2]["prompt"] = [said("system", "be brief"), *held_out[2]["prompt"]]
    names = [write(tmp_path / "chat.parquet", chat), write(tmp_path / "hh.jsonl.gz", transcripts)]
    run, manifest, printed = train(
        "training.max_steps=2",
        f"data.train=[{', '.join(names)}]",
        f"data.eval={write(tmp_path / 'eval.json', held_out)}",
        "data.overlap=drop",
    )
    rejected = [json.loads(line) for line in (run / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(r["set"], r["source"], r["row"], r["reason"]) for r in rejected] == [
        ("train", names[0], 5, "empty"),
        ("train", names[1], 10, "different_prompts"),
    ]
    assert manifest["rows"]["train"] == {
        "read": 40,
        "used": 36,
        "rejected": {"empty": 1, "different_prompts": 1},
        "overlap": 2,
        "left_out": 0,
    }
    assert manifest["rows"]["eval"] == {"read": 3, "used": 3, "rejected": {}, "overlap": 0, "left_out": 0}
    assert [(s["set"], s["form"], s["read"], s["used"]) for s in manifest["sources"]] == [
        ("train", "preference", 20, 19),
        ("train", "hh", 20, 19),
        ("eval", "preference", 3, 3),
    ]
    assert manifest["pairs"] == 36 and manifest["chat"] is True
    for said_of in ("train: 36 of 40 rows; rejected: 1 empty, 1 different_prompts", "2 rows of train dropped"):
        assert said_of in printed


def test_text_is_not_judged_on_chat(train, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", rows(["no training prompt"]))
    text = write(tmp_path / "train.jsonl", [{"prompt": "say", "chosen": " kind .", "rejected": " cold ."}])
    with pytest.raises(UserError, match=r"data\.eval: .*eval\.jsonl has chat messages, and .*train\.jsonl of data"):
        train(f"data.train={text}", f"data.eval={held_out}")
    assert not (tmp_path / "run").exists()


def test_soft_labels_reach_the_loss(train, tmp_path):
    """Where all pairs are ties ipo pulls both ways alike, and there is nothing to learn; with winners there is."""
    pair = [(f"{o} kind .", f"{o} cold .") for o in tiny_lm.openings()[:16]]
    rows = [{"prompt": "say", "response1": kind, "response2": cold} for kind, cold in pair]
    given = ["objective.name=ipo", "training.max_steps=2", "training.learning_rate=1e-3"]
    ties = write(tmp_path / "ties.csv", [row | {"label": 0} for row in rows])
    with pytest.raises(UserError, match="no gradient on any pair"):
        train(f"data.train={{name: {ties}, ties: soft, zero: tie}}", *given)
    votes = write(tmp_path / "votes.csv", [row | {"one": 1, "two": 0} for row in rows])
    columns = "columns: {label: [one, two]}"
    run, manifest, _ = train(f"data.train={{name: {votes}, ties: soft, zero: tie, {columns}}}", *given)
    assert manifest["pairs"] == 16 and not (run / "rejected_rows.jsonl").exists()
    # ipo at margin 0 costs 1 / (4 tau^2) whatever the label
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] == pytest.approx(1 / (4 * manifest["objective"]["tau"] ** 2), rel=1e-4)
