"""Before a run's folder is begun: its template's date, and whether its models can take its rows."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from datasets import Dataset
from transformers import GPT2Config, LlamaConfig

from alignment.errors import UserError
from alignment.models.chat import pinned_date
from alignment.recipes.sections import ModelSection
from alignment.runs.opening import dated, open_tokenizer, refuse_unfit
from tests.data.building import TEMPLATE, letters

DATED = TEMPLATE + "{{ strftime_now('%Y') }}"
TODAY = datetime.date.today().isoformat()


def recipe_of(model, run, **more) -> SimpleNamespace:
    section = ModelSection(name_or_path=str(model))
    training, data = SimpleNamespace(output_dir=str(run)), SimpleNamespace(max_length=64)
    return SimpleNamespace(model=section, training=training, data=data, **more)


def test_a_run_keeps_the_date_that_it_began_on(tmp_path, capsys):
    letters(template=DATED).save_pretrained(tmp_path / "model")
    run = tmp_path / "iterative" / "iteration-1" / "train"
    run.mkdir(parents=True)
    recipe, state = recipe_of(tmp_path / "model", run), PartialState()
    (run / "manifest.json").write_text(json.dumps({"template_date": "2020-02-03"}))
    assert pinned_date(open_tokenizer(recipe, state, resume=True)) == "2020-02-03"
    assert "the chat template writes a date: 2020-02-03" in capsys.readouterr().out
    fresh = open_tokenizer(recipe, state, resume=False)
    assert dated(fresh) == {"template_date": TODAY}
    (tmp_path / "iterative" / "prompts").mkdir()  # a stage of an iterative run takes that one's date
    (tmp_path / "iterative" / "prompts" / "counts.json").write_text(json.dumps({"template_date": "2019-01-01"}))
    assert pinned_date(open_tokenizer(recipe, state, resume=False)) == "2019-01-01"
    fresh.init_kwargs["template_date"] = "2018-01-01"  # a model that was trained on a date goes on with it
    fresh.save_pretrained(tmp_path / "trained")
    later = open_tokenizer(recipe_of(tmp_path / "trained", tmp_path / "next"), state, resume=False)
    assert pinned_date(later) == "2018-01-01"


def test_rows_that_the_model_cannot_take(tmp_path, capsys):
    tokenizer = letters()
    ids = len(tokenizer)
    GPT2Config(vocab_size=ids, n_positions=8, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path / "short")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=ids, max_position_embeddings=8, **small).save_pretrained(tmp_path / "rotary")
    LlamaConfig(vocab_size=ids - 1, max_position_embeddings=8, **small).save_pretrained(tmp_path / "narrow")

    def check(model, prompt, chosen, rejected, **more) -> None:
        table = Dataset.from_dict({"prompt_ids": [prompt], "chosen_ids": [chosen], "rejected_ids": [rejected]})
        refuse_unfit(recipe_of(tmp_path / model, tmp_path / "run", **more), tokenizer, [table, None], PartialState())

    check("short", [5] * 4, [6] * 3, [6] * 4)
    with pytest.raises(UserError, match="rows have up to 9 tokens, and the model has 8 positions: data.max_length 8"):
        check("short", [5] * 4, [6] * 3, [6] * 5)
    assert not capsys.readouterr().out
    check("rotary", [5] * 4, [6] * 3, [6] * 5)
    assert "warning: model.name_or_path" in capsys.readouterr().out
    check("narrow", [5], [6], [ids - 2])
    with pytest.raises(UserError, match=f"ids up to {ids - 1}, and the embedding has {ids - 1} rows"):
        check("narrow", [5], [6], [ids - 1])
    reference = SimpleNamespace(name_or_path=str(tmp_path / "narrow"), revision=None)
    with pytest.raises(UserError, match=r"reference\.name_or_path"):
        check("rotary", [5], [6], [ids - 1], reference=reference)
    prompts = Dataset.from_dict({"prompt_ids": [[5] * 4]})
    with pytest.raises(UserError, match=r"9 tokens \(4 of the prompt and generation.max_new_tokens 5\)"):
        refuse_unfit(recipe_of(tmp_path / "short", tmp_path), tokenizer, [prompts], new_tokens=5)
