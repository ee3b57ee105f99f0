"""report.html: self-contained, escaped, with the numbers of the run's files, and patient with missing parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.rewards import get_reward
from evaluation import curves
from evaluation.comparison import Side, compare
from evaluation.report import VERDICTS, choose_samples, starting_loss, training_brief, write_report
from evaluation.report_kinds import win_rate_command
from evaluation.win_rate import write_comparison

REPOSITORY = Path(__file__).parents[2]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def recipe() -> dict:
    return {
        "objective": {"name": "dpo", "file": None, "beta": 0.25, "label_smoothing": 0.0},
        "model": {"name_or_path": "models/<start>", "dtype": "float32"},
        "lora": None,
        "training": {"displacement_alarm": 10.0, "learning_rate": 2e-5},
    }


def metric_rows(steps: int, fall: float) -> list[dict]:
    return [
        {
            "step": s, "loss": 0.6931 - 0.01 * (s - 1), "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s,
            "rewards/margins": 0.2 * s, "rewards/accuracies": 0.5, "displacement/chosen": -fall * s / steps,
            "displacement/rejected": -s, "kl": 0.01 * s, "saturated": 0.0, "tokens_per_second": 500 + s,
            "padding": 0.1,
        }
        for s in range(1, steps + 1)
    ]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """A finished and evaluated run of 9 prompts, judged by length; the trained model's outputs hold HTML."""
    run = tmp_path / "my run"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"recipe": recipe(), "seed": 42, "versions": {"torch": "9.8.7"}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metric_rows(20, 12.0)))
    prompts = [f"prompt {i} <img src=x onerror=alert(1)>" for i in range(9)]
    longer = "<script>alert('x')</script>"
    model = Side("final", [[longer + "y" * i] for i in range(8)] + [["z"]], [[False]] * 9)
    baseline = Side("start", [["zz"]] * 9, [[True]] * 9)
    comparison = compare(prompts, model, baseline, get_reward("length"), resamples=500, seed=3)
    comparison.result["judge_is_training_reward"] = True
    write_comparison(run, comparison)
    return run


def test_page_is_self_contained_and_escaped(run_dir):
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "<script>alert('x')</script>" in page.text  # shown as text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_numbers_are_those_of_the_files(run_dir):
    page = Page(write_report(run_dir).read_text())
    result = json.loads((run_dir / "win_rate.json").read_text())
    low, high = result["wilson_interval"]  # nine prompts
    assert result["win_rate"] == pytest.approx(8 / 9)
    assert f"{100 * result['win_rate']:.1f} %" in page.text
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f} %" in page.text
    assert "8, 0, 1" in page.text
    assert "Too few prompts to tell: 9, and a claim needs 20." in page.text
    assert "better than" not in page.text.lower()
    assert "IS the reward that the model was trained on" in page.text
    left = next(value for name, value in page.attributes if name == "style" and value.startswith("left: 88"))
    assert left == f"left: {round(100 * 8 / 9, 2)}%"
    for shown in (
        "Direct Preference Optimization",
        "0.25",
        "torch",
        "9.8.7",
        "models/<start>",
        "2e-05",
        "before the first update: 0.6931",
    ):
        assert shown in page.text
    assert "fallen by 12.0 nats since step 0 (alarm: 10)" in page.text
    curves = ("Loss", "Implicit rewards", "Accuracy", "Log-probability since step 0", "Drift from the reference")
    for curve in (*curves, "Throughput"):
        assert curve in page.text
    assert "KL(reference ‖ policy) only if they are plain samples of the reference" in page.text


def test_diagnostics_have_curves_and_words(run_dir):
    """A probe at steps 0 and 20, held-out calibration at 20: the last ones are said."""
    assert "Gradient entanglement" not in Page(write_report(run_dir).read_text()).text
    probes = [
        {"step": 0, "entanglement/cosine": 0.9, "entanglement/ratio": 1.4, "entanglement/both_fall": 4.0},
        {"step": 20, "entanglement/cosine": 0.4375, "entanglement/ratio": 0.7, "entanglement/both_fall": 1.0,
         "entanglement/both_rise": 0.0, "entanglement/parted": 2.0, "entanglement/pulled_back": 1.0,
         "entanglement/unmoved": 0.0, "entanglement/moved_chosen": -1.5, "entanglement/moved_rejected": -2.5},
        {"step": 20, "calibration/ece": 0.5, "calibration/noise": 0.4, "calibration/overconfidence": 0.5},
        {"step": 20, "eval_calibration/ece": 0.125, "eval_calibration/noise": 0.03, "eval_calibration/overconfidence":
         -0.1},
    ]  # fmt: skip
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in probes)
    text = Page(write_report(run_dir).read_text()).text
    for curve in ("probe pairs", "size"):
        assert f"Gradient entanglement: {curve}" in text
    for curve in ("Probe pairs since the last probe", "Calibration error of the implicit reward"):
        assert curve in text
    assert "2 parted, 1 both fall, 1 pulled back; mean cosine 0.4375" in text
    assert "Calibration error on held-out pairs 0.125, where chance alone gives 0.03: under-confident" in text
    assert "training pairs 0.5" not in text
    training = dict(training_brief(probes[:3]))
    assert training["Calibration error on training pairs"].endswith(
        "gives 0.4: above that, but chance can reach 0.984: too little to tell"
    )
    (sure,) = training_brief([{"step": 1, **{f"calibration/{k}": 0.2 for k in ("ece", "overconfidence")},
                               "calibration/noise": 0.08}])[1:]  # fmt: skip
    assert sure[1].endswith("over-confident")


def test_verdicts_are_those_of_the_probe():
    from alignment.trainers import entanglement

    assert set(VERDICTS) == set(entanglement.VERDICTS)
    shown = {key for curve in curves.CURVES for _, key in curve.lines}
    assert {f"entanglement/{word.replace(' ', '_')}" for word in VERDICTS} <= shown


def test_length_control_and_orders_are_shown_where_they_were_computed(run_dir):
    html = Page(write_report(run_dir).read_text()).text
    assert "At equal lengths" not in html and "Both orders agree" not in html and "detectable: " in html
    result = json.loads((run_dir / "win_rate.json").read_text())
    control = {"win_rate": 0.617, "interval": [0.5, 0.7], "variant": "plain, without difficulty", "note": None}
    orders = {"pairs": 9, "consistency": 0.889, "first_preference": 0.55, "invalid_answers": 0}
    (run_dir / "win_rate.json").write_text(json.dumps(result | {"length_controlled": control, "orders": orders}))
    text = Page(write_report(run_dir).read_text()).text
    assert "At equal lengths 61.7 % 50.0 to 70.0 %; plain, without difficulty" in text
    assert "Both orders agree 88.9 % the first place is preferred with 55.0 %" in text


def test_a_model_saved_after_its_evaluation_is_said(run_dir):
    (run_dir / "final").mkdir()
    weights = run_dir / "final" / "model.safetensors"
    weights.touch()
    evaluated = (run_dir / "win_rate.json").stat().st_mtime
    notice = "Evaluated before the model was last saved"
    for age, said in ((-60, False), (60, True)):
        os.utime(weights, (evaluated + age, evaluated + age))
        assert (notice in Page(write_report(run_dir).read_text()).text) == said


def test_a_drawn_line_has_the_metrics_values(run_dir):
    """The loss falls by equal steps, so its drawn points are equally spaced and go down the page."""
    html = write_report(run_dir).read_text()
    loss = html[html.index("<h3>Loss</h3>") : html.index("<h3>Implicit rewards</h3>")]
    path = max(re.findall(r'<path d="([^"]*)"', loss), key=lambda d: d.count("L") if "var" not in d else 0)
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    assert len(points) == 20
    for axis in (0, 1):
        gaps = [b[axis] - a[axis] for a, b in zip(points, points[1:], strict=False)]
        assert min(gaps) > 0
        assert max(gaps) == pytest.approx(min(gaps), abs=1e-3)


def test_missing_parts_are_said(tmp_path):
    with pytest.raises(UserError, match="neither manifest.json nor metrics.jsonl"):
        write_report(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipe() | {"objective": {"name": "mine"}}}))
    page = Page(write_report(tmp_path).read_text())
    assert f"python -m evaluation.win_rate {tmp_path}" in page.text
    assert "Not evaluated yet" in page.text
    assert "No metrics yet" in page.text
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')  # still being written
    page = Page(write_report(tmp_path).read_text())
    assert "No manifest.json yet" in page.text
    assert "Last logged step 1 " in page.text
    assert "Implicit rewards" not in page.text


def test_starting_loss_is_one_from_before_the_first_update():
    rows = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    assert starting_loss(rows) == 5.0
    assert starting_loss(rows[2:]) is None


def test_samples_are_chosen_by_rule():
    rows = [{"score_change": c} for c in (0.2, None, -0.5, 0.9, 0.1, 0.0)]
    chosen = [(row["place"], row["score_change"]) for row in choose_samples(rows)]
    assert chosen == [("largest gain", 0.9), ("median", 0.1), ("largest loss", -0.5)]
    assert [row["place"] for row in choose_samples([{"score_change": c} for c in (3, 2, 1)])][-1] == "smallest gain"
    assert [row["place"] for row in choose_samples([{"score_change": c} for c in (-3, -2, -1)])][0] == "smallest loss"
    assert [row["place"] for row in choose_samples([{"score_change": 1}])] == ["largest gain"]
    assert choose_samples([{"score_change": None}]) == []
    assert [row["place"] for row in choose_samples([{"score_change": 0}] * 3)] == ["no change", "median", "no change"]
    judged = [{"score_change": None, "win_rate": share} for share in (0.25, 1.0, 0.5)]  # by an oracle
    shown = [(row["place"], row["change"]) for row in choose_samples(judged)]
    assert shown == [("largest gain", "share won 1"), ("median", "share won 0.5"), ("largest loss", "share won 0.25")]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"prompts": "p.txt"}, "reward": {"name": "vader"}}, ""),
        ({"evaluation": {"prompts": "p.txt"}}, " --reward NAME"),
        ({"oracle": {"name": "llm_judge"}}, " --prompts FILE"),
        ({}, " --prompts FILE --reward NAME"),
    ],
)
def test_the_command_that_a_report_offers_names_what_the_recipe_does_not(tmp_path, sections, words):
    assert win_rate_command(tmp_path, sections) == f"python -m evaluation.win_rate {tmp_path}{words}"


def test_program(run_dir):
    command = [sys.executable, str(REPOSITORY / "evaluation" / "report.py")]
    done = subprocess.run([*command, str(run_dir)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{run_dir / 'report.html'}\n")
    done = subprocess.run([*command, str(run_dir / "no")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
