"""Dates that chat templates write stand still: in a run, in what it saves, in pools and in a comparison."""

from __future__ import annotations

import datetime
from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from alignment.models import chat
from alignment.models.chat import chat_ids, pin_date, pinned_date, render
from tests.data.building import TEMPLATE, letters, user

ASK = [user("Who?")]


def public(name: str):
    return letters(template=files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8"))


class Tomorrow(datetime.datetime):
    """transformers asks its clock for today."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2031, 5, 6)


@pytest.mark.parametrize(
    ("template", "written"),
    [("llama3_2", "Today Date: 03 Feb 2020"), ("gptoss", "Current date: 2020-02-03"), ("muse_glimmer", "2020-02-03.")],
)
def test_a_pinned_date_is_written_whatever_the_day(tmp_path, monkeypatch, template, written):
    tokenizer = public(template)
    own = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert pin_date(tokenizer) == datetime.date.today().isoformat()
    assert render(tokenizer, ASK, generation=True) == own  # but for the date's being fixed, the text is the template's
    assert pin_date(tokenizer, "2020-02-03") == "2020-02-03" and pin_date(tokenizer) == "2020-02-03"
    assert written in render(tokenizer, ASK, generation=True)[0]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert "2031" in str(tokenizer.apply_chat_template(ASK[0], tokenize=False))  # the calendar goes on
    assert written in render(tokenizer, ASK, generation=True)[0]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert pinned_date(again) == "2020-02-03" and again.chat_template == tokenizer.chat_template
    assert chat_ids(again, ASK, generation=True) == chat_ids(tokenizer, ASK, generation=True)


@pytest.mark.parametrize("head", ["", "\n", "  ", "\n  {% if true %}x{% endif %}\n"])
def test_a_pinned_template_begins_as_its_own(head):
    """Blanks at the beginning of a template are stripped or kept as if nothing stood before them."""
    dated = head + TEMPLATE + "{{ strftime_now('%Y') }}"
    tokenizer = letters(template=dated)
    plain = letters(template=head + TEMPLATE + "2020")
    pin_date(tokenizer, "2020-02-03")
    for generation in (True, False):
        assert render(tokenizer, ASK, generation=generation) == render(plain, ASK, generation=generation)


def test_templates_without_a_date_have_none():
    tokenizer = letters(template=TEMPLATE)
    assert pin_date(tokenizer) is None and chat.DATE not in tokenizer.init_kwargs
