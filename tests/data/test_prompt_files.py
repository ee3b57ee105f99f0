"""Files of prompts: every form that people have, read the same way, and what is no prompt named by file and row."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from pyarrow import csv, parquet

from alignment.data.overlap import judged_on, refuse
from alignment.data.prompt_files import locate_prompts, read_prompts, refuse_unrendered
from alignment.data.sampled import best_against_worst
from alignment.errors import UserError
from alignment.models.sampling import Sample
from tests.data.building import TEMPLATE, letters, said

ASK, REPLY, MORE = said("user", "why?"), said("assistant", "so."), said("user", "and then?")
SYSTEM = said("system", "be brief")


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_text_has_one_prompt_a_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("# a comment\n one \n\ntwo # not a comment\n  # comment\nthree\u2028four")
    assert read_prompts(file) == ["one", "two # not a comment", "three\u2028four"]  # a break in a line ends none
    assert read_prompts(file, 2) == ["one", "two # not a comment"]
    assert [one.where for one in locate_prompts(file)] == [f"{file}:{line}" for line in (2, 4, 6)]
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_prompts(file) == ["one", "two"]
    file.write_text("one\ntwo\nthree")
    with pytest.raises(UserError, match="3 prompts, but 4 are asked for"):
        read_prompts(file, 4)
    for text, message in (
        ("one\ntwo\n one\n", r"p\.txt:3: repeats the prompt of .*p\.txt:1"),
        ("# this\n", "no prompts in it"),
        ('one\n{"prompt": "two"}\n', r"p\.txt:2: a row of JSON in a file of text; name the file \.jsonl"),
        ('[{"role": "user", "content": "two"}]\n', r"p\.txt:1: a row of JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompts(file)
    file.write_text("{what} is it?\n[1, 2, 3]\n{1}\n")  # no rows
    assert len(read_prompts(file)) == 3
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        read_prompts(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "why?", "chosen": "so.", "rejected": "no."}, "why?"),  # of a pair nothing but the prompt
        ({"prompt": [ASK, REPLY, MORE], "chosen": [REPLY], "rejected": [REPLY]}, [ASK, REPLY, MORE]),
        ({"prompt": [ASK], "system": "be brief"}, [SYSTEM, ASK]),
        ({"prompt": "why?", "system": "be brief"}, [SYSTEM, ASK]),
        ({"prompt": [SYSTEM, ASK], "id": 7}, [SYSTEM, ASK]),
        ({"prompt": [{"from": "human", "value": "why?"}]}, [ASK]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]}, [ASK]),
        ({"messages": [ASK, REPLY]}, [ASK]),  # the answer is not asked
        ({"messages": [SYSTEM, ASK, REPLY, MORE, REPLY]}, [SYSTEM, ASK, REPLY, MORE]),
        ({"messages": [ASK], "system": "be brief"}, [SYSTEM, ASK]),
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]}, [ASK]),
        ({"instruction": "why?", "output": "so.", "generator": "m"}, "why?"),
        ({"instruction": "Translate.", "input": "Hund"}, "Translate.\n\nHund"),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, said("assistant", "no.")]}, [ASK]),
    ],
)
def test_rows_of_every_form(tmp_path, row, prompt):
    assert read_prompts(write(tmp_path / "p.jsonl", row)) == [prompt]


def test_every_kind_of_file(tmp_path):
    rows = [{"prompt": "one", "x": 1}, {"prompt": "two", "x": 2}]
    write(tmp_path / "p.jsonl", *rows)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "p.parquet")
    csv.write_csv(table, tmp_path / "p.csv")
    for name in ("p.jsonl", "p.jsonl.gz", "p.json", "p.parquet", "p.csv"):
        assert read_prompts(tmp_path / name) == ["one", "two"], name
    assert locate_prompts(tmp_path / "p.jsonl")[1].where == f"{tmp_path}/p.jsonl:2"
    assert locate_prompts(tmp_path / "p.csv")[1].where == f"{tmp_path}/p.csv: row 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "why?"}, r"p\.jsonl:2: no prompt in this row \(it has text\); accepted: prompt, messages, conv"),
        ({"prompt": None}, "no prompt in this row"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": 3}, "prompt is int, neither a text nor a list of chat messages"),
        ({"prompt": ["why?"]}, "expected messages, got str"),
        ({"prompt": [ASK, REPLY]}, "prompt ends with the assistant's message; end it with the user's"),
        ({"prompt": '[{"role": "user", "content": "why?"}]'}, "chat messages written as text"),
        ({"messages": "why?"}, "messages: expected a list of chat messages, got str"),
        ({"prompt": [ASK], "tools": [{"name": "f"}]}, "column 'tools' is filled"),
        ({"prompt": [ASK], "images": ["a.png"]}, "column 'images' is filled"),
        ({"prompt": [SYSTEM, ASK], "system": "be long"}, "column system and the conversation's own system message"),
        ({"prompt": "first"}, r"p\.jsonl:2: repeats the prompt of .*p\.jsonl:1"),
        ({"prompt": [ASK, REPLY, MORE]}, r"p\.jsonl:1: a text, and .*p\.jsonl:2 is a list of chat messages"),
    ],
)
def test_what_is_no_prompt_is_named_by_file_and_row(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "first"}, row))
    assert "\n" not in str(caught.value)


def test_beside_rows_with_a_system_text_the_others_are_chats(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "why?", "system": "be brief"}, {"prompt": "and then?", "system": ""})
    assert read_prompts(file) == [[SYSTEM, ASK], [MORE]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why not?", "chosen": "a", "rejected": "b"},
        {"prompt": [said("user", "why not?")]},
        {"messages": [said("user", "why  not?"), REPLY], "system": "other"},
        {"instruction": "and then?"},
        {"conversations": [{"from": "human", "value": "and then? "}]},
    ],
)
def test_a_prompt_is_the_same_as_text_and_as_messages(tmp_path, row):
    """The rows that are trained on are found among the prompts that judge, whatever file and form these stand in."""
    trained = [[SYSTEM, said("user", "why  not?")], "\n\nHuman: and then?\n\nAssistant:"]
    with pytest.raises(UserError, match="1 of 2 prompts of data.train are also judged on"):
        refuse(trained, judged_on(None, read_prompts(write(tmp_path / "p.jsonl", row))))


def test_a_chat_prompt_is_whole_in_the_template_or_refused():
    chat, plain = letters(template=TEMPLATE), letters()
    refuse_unrendered([("text", "p:1"), ([SYSTEM, ASK, REPLY, MORE], "p:2")], chat)
    refuse_unrendered([("text", "p:1")], plain)
    with pytest.raises(UserError, match=r"^p:2: a chat prompt, and the model's tokenizer has no chat template"):
        refuse_unrendered([("text", "p:1"), ([ASK], "p:2")], plain)
    with pytest.raises(UserError, match=r"^p:1: prompt: unknown role 'human'; did you mean 'user'"):
        refuse_unrendered([([said("human", "why?")], "p:1")], chat)
    mute = letters(
        template=TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    )
    with pytest.raises(UserError, match=r"^p:1: prompt: the chat template drops .*system"):
        refuse_unrendered([([SYSTEM, ASK], "p:1")], mute)
    strict = letters(template="{{ raise_exception('no system\nplease') }}")
    with pytest.raises(UserError, match=r"^p:1: the chat template refuses this prompt: no system please$"):
        refuse_unrendered([([SYSTEM, ASK], "p:1")], strict)


def test_pairs_drawn_for_chat_prompts_are_chats():
    drawn = [[Sample([1], "long answer", True), Sample([2], "short", True)]]
    rows, _ = best_against_worst([[ASK]], [[9]], drawn, lambda prompts, texts: [float(len(text)) for text in texts])
    assert rows[0]["prompt"] == [ASK] and rows[0]["chosen"] == [said("assistant", "long answer")]
    assert rows[0]["rejected"] == [said("assistant", "short")] and rows[0]["calibration"] == rows[0]["chosen"]
