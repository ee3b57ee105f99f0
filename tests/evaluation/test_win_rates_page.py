"""docs/win_rates.md: its commands run on small files, its keys are those of the results; README leads there."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from evaluation.annotations import parse_annotations
from evaluation.head_to_head import summarise

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "win_rates.md").read_text()


def annotations(system: str, places: int) -> list[dict]:
    """Twelve judged pairs, the longer text wins but for every fourth; the judge was shown output_2 first by turns."""
    return [
        {
            "instruction": f"i{k}", "output_1": "o" * (3 + k % 5), "generator_1": "baseline",
            "output_2": "o" * (2 + k * places % 7), "generator_2": system, "is_switched_outputs": bool(k % 2),
            "preference": 1 + float((k % 4 > 0) == (k * places % 7 > 1 + k % 5)),
        }
        for k in range(12)
    ]  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "evaluation").symlink_to(ROOT / "evaluation")
    for number, name in enumerate(("ours", "theirs", "verbose", "concise"), start=2):
        (tmp_path / f"{name}.json").write_text(json.dumps(annotations(name, number)))
    for name, output in (("model", "xx"), ("baseline", "x")):
        rows = [{"instruction": f"i{k}", "output": output, "generator": name} for k in range(3)]
        (tmp_path / f"{name}_outputs.json").write_text(json.dumps(rows))
    labels = [row | {"annotator1": 1 + k % 2, "annotator2": 1} for k, row in enumerate(annotations("ours", 2))]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "difficulty.csv").write_text(
        ",instruction_difficulty\n" + "".join(f"{k},{k / 7}\n" for k in range(12))
    )
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "lovely", "rejected": "awful"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_commands_run(workplace, monkeypatch, capsys):
    (script,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    printed = {}
    for line in script.splitlines():
        words = shlex.split(line)[1:]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(words[0], run_name="__main__")
        assert not stopped.value.code, line
        printed[line] = capsys.readouterr().out
        assert printed[line].strip()
    assert json.loads(next(iter(printed.values())))["orders"]["first_preference"] >= 0
    assert "regularised, with difficulty" in list(printed.values())[1]
    for folder in ("compared", "judged"):
        assert {"win_rate.json", "win_rate.md", "win_rate.html", "leaderboard.csv"} <= {
            f.name for f in (workplace / folder).iterdir()
        }


def test_every_key_is_explained():
    result = summarise(parse_annotations(annotations("ours", 2)), resamples=100)
    missing = [key for key in result if f"`{key}`" not in PAGE]
    assert not missing


def test_the_page_is_linked():
    assert "(docs/win_rates.md)" in (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
