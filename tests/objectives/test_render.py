"""The generated table and docs page are up to date and say what the cards say."""

from pathlib import Path

import pytest

from alignment.objectives import list_objectives
from alignment.objectives.render import BEGIN, END, docs_markdown, readme_with_table, show, table_markdown, write_docs

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "is stale: run `python -m alignment.objectives.render`"


def test_the_docs_page_is_current() -> None:
    assert (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8") == docs_markdown(), f"docs page {REMEDY}"


def test_the_readme_s_table_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_with_table(text) == text, f"README table {REMEDY}"


def test_write_docs_changes_only_the_marked_block(tmp_path) -> None:
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nstale row\n{END}\n\nrest\n")
    assert sorted(path.name for path in write_docs(tmp_path)) == ["README.md", "objectives.md"]
    assert write_docs(tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nrest\n")
    assert table_markdown() in text and "stale row" not in text


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="objectives:begin"):
        readme_with_table("# Title\n")


def test_every_table_row_has_as_many_cells_as_the_header() -> None:
    for table in (table_markdown(), docs_markdown()):
        for line in table.splitlines():
            if line.startswith("|"):
                cells = line.replace(r"\|", "").count("|") - 1
                assert cells in (2, 4, 5), line


@pytest.mark.parametrize("card", list_objectives(), ids=lambda card: card.name)
def test_show_prints_formula_defaults_and_pitfalls(card) -> None:
    text = show(card.name)
    for wanted in (card.title, card.formula, *card.pitfalls, *(row.name + " = " for row in card.hyperparameters)):
        assert wanted in text


def test_show_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'simpo'"):
        show("simp")
