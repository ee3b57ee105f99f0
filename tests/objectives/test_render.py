"""What is generated in docs/ is up to date and says what the cards say; every objective has a whole page."""

import re
import shutil

import pytest

from alignment.objectives import list_objectives
from alignment.objectives.render import SECTIONS, blocks, letters_markdown, own_cards, show, with_block, write_docs
from tests.pages import ROOT, anchors, read

REMEDY = "is stale: run `python -m alignment.objectives.render`"
CARDS = own_cards()


@pytest.mark.parametrize("name", blocks())
def test_what_is_generated_is_current(name) -> None:
    text = read(name)
    for marker, content in blocks()[name].items():
        assert with_block(text, marker, content, name) == text, f"{name} {REMEDY}"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_an_objective_s_page_is_whole(card) -> None:
    """Title, idea and all sections in order; nothing is left to do; its measured row stands in the table of all."""
    text = read(f"docs/objectives/{card.name}.md")
    assert text.startswith(f"# {card.name}: ")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [*SECTIONS, "Card"]
    parts = re.split(r"^## .*$", text.split("<!-- card:begin -->")[0], flags=re.MULTILINE)
    assert all(len(part) > 100 for part in parts) and "TODO" not in text
    measured = parts[-1]
    assert "python evaluation/replication.py recipes/replications/" in measured
    rows = re.findall(r"^\| `.*$", measured, flags=re.MULTILINE)
    if card.name != "likelihood":  # has an experiment of its own
        assert {f"| `{card.name}` |", "| `start` |"} <= {row[: row.index("|", 1) + 1] for row in rows}
        assert set(rows) <= set(read("docs/objectives.md").splitlines())


def test_write_docs_changes_only_the_marked_blocks_and_begins_missing_pages(tmp_path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    assert write_docs(tmp_path) == []
    page, new = tmp_path / "docs" / "objectives" / "dpo.md", tmp_path / "docs" / "objectives" / "ipo.md"
    whole = page.read_text()
    page.write_text(whole.replace("| paper |", "| pamphlet |"))
    new.unlink()
    assert write_docs(tmp_path) == [page, new]
    assert page.read_text() == whole
    assert anchors(new.read_text()) >= {"formula", "when-to-use-it", "card"} and "TODO" in new.read_text()


def test_the_table_of_letters_has_what_two_objectives_call_alike() -> None:
    """spo counts with its own hyper-parameters, not with those that it takes on from its base."""
    rows = re.findall(r"^\| `(\w+)` \| \[(\w+)\]", letters_markdown(), flags=re.MULTILINE)
    assert [objective for name, objective in rows if name == "gamma"] == ["simpo", "spo"]
    assert [name for name, objective in rows if objective == "spo"] == ["gamma"]
    names = [name for name, _ in rows]
    assert len(set(rows)) == len(rows) and min(map(names.count, names)) >= 2


def test_losses_stand_where_their_letters_are_defined() -> None:
    """In docs/objectives.md, which has the notation."""
    rows = blocks()["docs/objectives.md"]["objectives"].splitlines()
    assert len(rows) == len(CARDS) + 2 and "loss" in rows[0]


def test_a_file_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="objectives.md: needs one <!-- objectives:begin -->"):
        with_block("# Title\n", "objectives", "", "objectives.md")


def test_every_table_row_has_as_many_cells_as_the_header() -> None:
    for contents in blocks().values():
        for line in "\n".join(contents.values()).splitlines():
            if line.startswith("|"):
                cells = line.replace(r"\|", "").count("|") - 1
                assert cells in (2, 3, 4, 5), line


@pytest.mark.parametrize("card", list_objectives(), ids=lambda card: card.name)
def test_show_prints_formula_defaults_and_pitfalls(card) -> None:
    text = show(card.name)
    for wanted in (card.title, card.formula, *card.pitfalls, *(row.name + " = " for row in card.hyperparameters)):
        assert wanted in text


def test_show_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'simpo'"):
        show("simp")
