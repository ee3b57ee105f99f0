"""The YAML subset: positions, duplicates, and the places where YAML 1.1 guesses.

Expected types are those of YAML 1.2's core schema, written out by hand.
"""

import pytest

from alignment.recipes.document import MAX_VALUES, Origin, RecipeError, parse_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),  # YAML 1.1 (PyYAML): the text '5e-7'
        ("2.0e-5", 2e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+4", 4),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),  # YAML 1.1: True
        ("no", "no"),  # YAML 1.1: False; save_strategy: no must mean "no"
        ("on", "on"),
        ("010", "010"),  # YAML 1.1: 8
        ("0x10", "0x10"),  # YAML 1.1: 16
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("2026-01-01", "2026-01-01"),  # YAML 1.1: a date
        ("'5e-7'", "5e-7"),
        ('"true"', "true"),
        ("nan", "nan"),
        ("inf", "inf"),
    ],
)
def test_scalars_have_the_type_that_they_look_like(text, value):
    read = parse_document(f"key: {text}\n", "r.yaml").values["key"]
    assert read == value
    assert type(read) is type(value)


def test_positions_are_those_of_the_keys():
    document = parse_document("a:\n  b: 1\n\n  # comment\n  c:\n    - x\n    - y\nd: {e: 2}\n", "r.yaml")
    assert document.origins == {
        ("a",): Origin("r.yaml", 1),
        ("a", "b"): Origin("r.yaml", 2),
        ("a", "c"): Origin("r.yaml", 5),
        ("a", "c", 0): Origin("r.yaml", 6),
        ("a", "c", 1): Origin("r.yaml", 7),
        ("d",): Origin("r.yaml", 8),
        ("d", "e"): Origin("r.yaml", 8),
    }
    assert str(document.origin(("a", "b", "unwritten"))) == "r.yaml:2"
    assert str(document.origin(("z",))) == "r.yaml"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: given twice; the first one is on line 1"),
        ("s:\n  a:\n    k: 1\n    j: 2\n    k: 1\n", "r.yaml:5: s.a.k: given twice; the first one is on line 3"),
        ("s:\n  - {k: 1,\n     k: 2}\n", "r.yaml:3: s.0.k: given twice; the first one is on line 2"),
        ("a: .nan\n", "r.yaml:1: a: expected a finite number, got .nan"),
        ("a: -.inf\n", "r.yaml:1: a: expected a finite number, got -.inf"),
        ("a: 1e999\n", "r.yaml:1: a: expected a finite number, got 1e999"),
        ("x: 1\n2: y\n", "r.yaml:2: a key must be text, got 2; put it in quotes"),
        ("a: &x\n  b: *x\n", "r.yaml:1: a.b: an alias refers to the value that contains it"),
    ],
)
def test_problems_name_the_line(text, problem):
    assert [str(found) for found in parse_document(text, "r.yaml").problems] == [problem]


def test_python_objects_are_refused_and_not_made(tmp_path):
    marker = tmp_path / "made"
    document = parse_document(f'a: !!python/object/apply:os.mkdir ["{marker}"]\n', "r.yaml")
    assert "is not allowed in a recipe" in str(document.problems[0])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the file is empty"),
        ("# only a comment\n", "r.yaml: the file is empty"),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("a: 1\nb: [1\n", "r.yaml:3: not valid YAML"),
        ("a:\n\tb: 1\n", "r.yaml:2: not valid YAML: a tab begins this line"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML: a second document begins here"),
        ("a: *nothing\n", "r.yaml:1: not valid YAML: found undefined alias"),
        ("a: \x01\n", "r.yaml: not valid YAML: unacceptable character"),
        ("a: " + "[" * 5000, "r.yaml: nested too deeply"),
    ],
)
def test_unreadable_text_is_one_line(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "r.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys_work_and_own_keys_win():
    document = parse_document("a: &a {k: 1, j: 2}\nb:\n  <<: *a\n  k: 3\nc: *a\n", "r.yaml")
    assert document.values == {"a": {"k": 1, "j": 2}, "b": {"k": 3, "j": 2}, "c": {"k": 1, "j": 2}}
    assert not document.problems


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]  # 10^8 values if expanded
    with pytest.raises(RecipeError, match=f"more than {MAX_VALUES} values"):
        parse_document("\n".join(lines), "r.yaml")
