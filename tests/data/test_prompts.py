"""Prompts of a hub data set (here a data file in its place): named columns, chats, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.data.prompts import prepare_prompts
from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.recipes import RecipeError, load_recipe
from alignment.recipes.inspection import check, explain
from alignment.recipes.rows import HubPromptsSection

ROWS = [{"question": f"my dog is {i}", "result": f"{i}"} for i in range(4)]


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    return str(path)


def prepared(tiny: Path, source: HubPromptsSection, limit: int | None = None, answers: bool = True):
    tokenizer = load_tokenizer(str(tiny))
    return tokenizer, prepare_prompts(source, limit, tokenizer, longest=64, answers=answers, max_rejected_share=0.1)


def test_named_columns_of_a_split(tiny, file):
    source = HubPromptsSection(hub=file, prompt="question", answer="result")
    _, found = prepared(tiny, source, limit=3)
    assert found.dataset["prompt"] == [row["question"] for row in ROWS[:3]]
    assert found.dataset["answer"] == ["0", "1", "2"]
    assert found.sources[0]["source"] == f"{file}:train"
    _, other = prepared(tiny, source.model_copy(update={"split": "test"}), answers=False)
    assert len(other.dataset) == 1 and "answer" not in other.dataset.column_names


def test_texts_become_chats_where_the_recipe_says_so(tiny, file):
    source = HubPromptsSection(hub=file, prompt="question", answer="result", system="Be short.")
    tokenizer, found = prepared(tiny, source)
    asked = {"role": "user", "content": ROWS[0]["question"]}
    assert found.dataset["prompt"][0] == [{"role": "system", "content": "Be short."}, asked]
    _, plain = prepared(tiny, HubPromptsSection(hub=file, prompt="question", answer="result", chat=True))
    assert plain.dataset["prompt"][0] == [asked]
    shown = tokenizer.decode(plain.dataset["prompt_ids"][0])
    assert shown == tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)


def test_a_column_that_is_not_there_is_one_line(tiny, file):
    with pytest.raises(UserError, match=r"has no column 'prompt'.*; name it: prompt: COLUMN"):
        prepared(tiny, HubPromptsSection(hub=file))
    with pytest.raises(UserError, match="has no column 'resalt'; did you mean 'result'"):
        prepared(tiny, HubPromptsSection(hub=file, prompt="question", answer="resalt"))


RECIPE = """\
objective: {name: dpo}
model: {name_or_path: org/model}
reward: {name: vader}
data:
  prompts:
    name: {hub: org/prompts, split: train, prompt: question}
    limit: 8
training: {global_batch_size: 4}
generation: {max_new_tokens: 64}
"""


def test_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    recipe = load_recipe("r.yaml")
    assert recipe.data.prompts is not None and str(recipe.data.prompts.name) == "org/prompts:train"
    assert check("r.yaml") == []  # nothing is looked for on the hub
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in explain(recipe).splitlines()}
    assert rows["data.prompts.name.prompt"] == ["question", "r.yaml:6"]
    Path("again.yaml").write_text(json.dumps(recipe.resolved()))
    assert load_recipe("again.yaml").resolved() == recipe.resolved()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{hub: a/b, splitt: x}", "data.prompts.name.splitt: unknown key; did you mean 'split'?"),
        ("{split: x}", "data.prompts.name.hub: required key is missing"),
        ("5", "data.prompts.name: expected a file, or a section with hub: NAME, got 5"),
        ("nowhere.txt", "data.prompts: nowhere.txt: no such file"),
    ],
)
def test_mistakes_are_one_line_at_their_key(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("{hub: org/prompts, split: train, prompt: question}", name))
    (found,) = [str(problem) for problem in check("r.yaml")]
    assert message in found and "\n" not in found
    if "no such" not in message:
        with pytest.raises(RecipeError):
            load_recipe("r.yaml")
