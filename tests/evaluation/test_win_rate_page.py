"""win_rate.html: what it says, that nothing in a text becomes markup, and that it fetches nothing."""

from __future__ import annotations

import base64
import math
import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from evaluation.annotations import parse_annotations
from evaluation.head_to_head import annotation_result, write_annotation_result
from evaluation.win_rate_page import Entry, around, claim, draw, examples
from tests.evaluation.test_annotations import row, write

NASTY = "<script>alert('x')</script> & $\\frac{1}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("page"), []
    for name, wins in ((NASTY, 36), ("plain", 12)):
        rows = [
            row(2 if k < wins else 1, f"i{k} {NASTY}", "a" * (1 + k % 7), "b" * (1 + k % 5)) | {"generator_2": name}
            for k in range(40)
        ]
        files.append(write(folder / f"{len(files)}.json", rows))
    result, text, systems = annotation_result(files, resamples=500)
    write_annotation_result(folder / "out", result, text, systems)
    return (folder / "out" / "win_rate.html").read_text(), result


def test_claims_are_the_intervals(page):
    """36 of 40 and 12 of 40: the intervals leave 50 out, on either side."""
    html, result = page
    assert ": better by this judge" in html and ": worse by this judge" in html
    for found in result["systems"].values():
        assert f"{found['win_rate']:.1f} % ({found['interval'][0]:.1f} to {found['interval'][1]:.1f} %)" in html
    assert f"{result['comparisons'][0]['difference']:+.2f} points" in html and "<td>different</td>" in html
    for limits, prompts, p, said in (
        ((40.0, 55.0, 60.0), 40, 0.01, "no significant difference"),
        ((40.0, 45.0, 49.9), 40, 0.01, "worse"),
        ((50.1, 51.0, 60.0), 40, 0.01, "better"),
        ((50.1, 51.0, 60.0), 40, 0.06, "no significant difference"),
        ((50.1, 51.0, 60.0), 19, 0.01, "too few prompts to tell"),
    ):
        assert claim(Entry("m", "b", limits, prompts, p, None, [], [])).endswith(f" %) over b: {said} by this judge")


def test_texts_stay_texts_and_nothing_is_fetched(page):
    html, _ = page
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "default-src 'none'" in html


def test_the_figure_has_every_system_and_difference(page):
    html, _ = page
    (data,) = re.findall(r"base64,([^\"]+)", html)
    words = " ".join(ElementTree.fromstring(base64.b64decode(data)).itertext())
    assert "length-controlled" in words and "paired difference, points" in words and "'x')</script>" in words


@pytest.mark.parametrize("length", [1, 19, 60])
def test_no_text_of_the_figure_is_cut_off(length):
    entries = [Entry(name * length, "b" * length, (40, 50, 60), 40, 0.5, (45, 50, 55), [], []) for name in "mn"]
    apart = {
        "first": "m" * length,
        "second": "n" * length,
        "interval": [-1, 1],
        "difference": 0,
        "verdict": "different",
    }
    figure = Figure(layout="constrained")
    draw(figure, entries, [apart])
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and re.search("[a-z]", text.get_text())]
    assert len(texts) == 8  # two systems, a difference, two labels, two legends of the upper panel, a title
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 > -1 and box.x1 < figure.bbox.x1 + 1, text.get_text()


def test_examples_are_chosen_by_rule():
    """Shares .2, 1, nan, .5, 1, .2: the first of the highest and of the lowest; of five, the third."""
    rows = parse_annotations([row(v, str(k)) for k, v in enumerate((1.2, 2, math.nan, 1.5, 2, 1.2))])
    found = [(place, example.instruction) for place, example in examples(rows)]
    assert found == [("most preferred", "1"), ("median", "3"), ("least preferred", "0")]
    assert [place for place, _ in examples(rows[:1])] == ["most preferred"]


def test_limits_of_what_is_missing():
    assert around(0.5, None) is None and around(None, [0, 1]) is None
    assert around(0.5, [0.25, 0.75], 100) == (25, 50, 75)
