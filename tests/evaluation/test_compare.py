"""`alignment compare`, end to end on the tiny model, reduced: runs, tuning, report; then half of it is deleted.

The whole of it at full size is recipes/compare/tiny.yaml. Without training: `test_compare_rules` and `…_results`.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import UserError
from evaluation.compare.command import compare

TINY = Path(__file__).resolve().parents[2] / "recipes" / "compare" / "tiny.yaml"
SMALL = [
    "compare.tune=2",
    "compare.tuning_factor=9",
    "compare.tuning_seeds=1",
    "compare.seeds=2",
    "compare.validation_limit=6",
    "data.sample.limit=16",
    "data.sample.samples_per_prompt=4",
    "generation.max_new_tokens=8",
    "training.num_train_epochs=1",
    "evaluation.limit=10",
    "evaluation.samples_per_prompt=3",
    "evaluation.bootstrap=500",
]
TWO = "compare.objectives=[dpo, {name: f_dpo, divergence: reverse_kl}]"


def prepared(tiny: Path, folder: Path) -> list[str]:
    """The overrides of a reduced comparison in `folder`, where the model is built already."""
    shutil.copytree(tiny, folder / "grammar" / "model")
    return [*SMALL, f"training.output_dir={folder}"]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "cost"}


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("compare")
    overrides = [*prepared(tiny, folder), TWO]
    shown = CliRunner().invoke(app, ["compare", str(TINY), *overrides])
    assert shown.exit_code == 0, shown.output
    assert "| f_dpo-reverse_kl |" in shown.output and "report.html" in shown.output
    return folder, overrides


def test_every_run_is_a_run_directory_and_only_the_chosen_point_has_all_seeds(done):
    folder, _ = done
    result = read(folder)
    for row in result["objectives"]:
        assert [point["value"] for point in row["tuned"]] == pytest.approx([0.1 / 3, 0.3], rel=1e-3)
        best = max(row["tuned"], key=lambda point: point["win_rate"])
        assert row["value"] == best["value"]
        points = [path.parent for path in folder.glob(f"runs/{row['label']}/*/seed-0")]
        seeds = {point.name: len(list(point.iterdir())) for point in points}
        assert sorted(seeds.values()) == [1, 2] and seeds[row["point"]] == 2
    for run in folder.glob("runs/*/*/seed-*"):
        assert (run / "final" / "model.safetensors").is_file() and (run / "metrics.jsonl").is_file()
        assert (folder / "recipes" / f"{run.parent.parent.name}-{run.parent.name}-{run.name}.yaml").is_file()


def test_all_get_the_same_pairs_updates_and_start(done):
    folder, _ = done
    for seed in (0, 1):
        runs = list(folder.glob(f"runs/*/*/seed-{seed}"))
        assert len({(run / "preferences.jsonl").read_bytes() for run in runs}) == 1
        manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
        assert {manifest["steps"] for manifest in manifests} == {2}
        assert len({manifest["frozen_weights"]["start"] for manifest in manifests}) == 1
        assert all(manifest["recipe"]["reference"]["precompute"] for manifest in manifests)
    first, second = (next(iter(folder.glob(f"runs/dpo/*/seed-{seed}/preferences.jsonl"))) for seed in (0, 1))
    assert first.read_bytes() != second.read_bytes()


def test_two_names_of_one_loss_are_one_policy_at_each_point_and_are_marked(done):
    from safetensors.torch import load_file

    folder, _ = done
    dpo, other = read(folder)["objectives"]
    assert (dpo["label"], other["label"]) == ("dpo", "f_dpo-reverse_kl") and dpo["versus_baseline"] is None
    for point in folder.glob("runs/dpo/*"):
        twin = folder / "runs" / "f_dpo-reverse_kl" / point.name
        one, two = (load_file(place / "seed-0" / "final" / "model.safetensors") for place in (point, twin))
        assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)
        first, second = (json.loads((p / "seed-0" / "measured-validation.json").read_text()) for p in (point, twin))
        assert first["responses"] != second["responses"]  # random numbers of their own
    assert other["equals"] == f"= dpo (beta={other['value']:g})"
    said = other["versus_baseline"]["verdict"]  # never a test: which beta each got is luck of the tuning
    assert said == ("the same loss" if other["value"] == dpo["value"] else "the same loss, another value")
    assert other["versus_baseline"]["p_adjusted"] is None and read(folder)["claims_about"] == "settings"


def test_measurements_of_a_policy_are_those_of_its_texts(done):
    """KL, distinct-n and displacement from the models' own logits and the texts, one response at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = done
    run = next(path.parent for path in folder.glob("runs/dpo/*/seed-0/measured-test.json"))
    found = json.loads((run / "measured-test.json").read_text())
    assert found["displacement"] is not None
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    policy, start = (AutoModelForCausalLM.from_pretrained(p) for p in (run / "final", folder / "grammar" / "model"))

    def gain(prompt: list[int], response: list[int]) -> float:
        """log policy - log start of a response, by the chain rule."""
        total, ids = 0.0, torch.tensor([prompt + response])
        for model, sign in ((policy, 1), (start, -1)):
            with torch.no_grad():
                logits = model(ids).logits[0].double()
            for place, token in enumerate(response, start=len(prompt) - 1):
                total += sign * float(logits[place, token] - logits[place].exp().sum().log())
        return total

    prompts = (folder / "grammar" / "held_out.txt").read_text().splitlines()[:10]
    drawn, checked = [], 0
    for prompt, texts, lengths, ratios in zip(
        prompts, found["responses"], found["tokens"], found["log_ratio"], strict=True
    ):
        for text, length, ratio in zip(texts, lengths, ratios, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] if len(ids) == length - 1 else []
            drawn.append(ids)
            if len(ids) == length:  # else the letters were drawn in other pieces than the tokenizer cuts
                assert gain(tokenizer(prompt)["input_ids"], ids) == pytest.approx(ratio, abs=1e-3)
                checked += 1
    assert checked > len(drawn) / 2
    for n in (1, 2):
        grams = [tuple(ids[i : i + n]) for ids in drawn for i in range(len(ids) - n + 1)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams), rel=0.2)
    pairs = [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()][:64]
    for side, moved in zip(("chosen", "rejected"), found["displacement"], strict=True):
        gains = [gain(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        assert sum(gains) / len(gains) == pytest.approx(moved, abs=1e-3)


def test_the_matrix_is_two_sides_of_one_table_and_the_report_shows_it(done):
    folder, _ = done
    result = read(folder)
    names, cells = result["matrix"]["names"], result["matrix"]["cells"]
    assert names == ["dpo", "f_dpo-reverse_kl", "start"] and result["triples"] == 1
    for i in range(3):
        assert cells[i][i] is None
        for j in range(3):
            if i != j:
                one, other = cells[i][j], cells[j][i]
                assert one["rate"] + other["rate"] == pytest.approx(1)
                assert one["low"] + other["high"] == pytest.approx(1)
                assert one["low"] <= one["rate"] <= one["high"] and len(one["by_seed"]) == 2
                assert sum(one["by_seed"]) / 2 == pytest.approx(one["rate"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4 and "http" not in re.sub(r"http-equiv", "", page)
    assert {file.name for file in (folder / "figures").iterdir()} == {
        "win_rates.png", "matrix.png", "frontier.png", "displacement.png"
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert {row["label"] for row in rows} == {"dpo", "f_dpo-reverse_kl"}
    assert all(0 <= float(row["over_start_low"]) <= float(row["over_start_high"]) <= 1 for row in rows)
    assert all(0 < float(row["training_seconds"]) < float(row["seconds"]) for row in rows)
    assert all(float(row["peak_memory"]) > 1e8 for row in rows)


def test_what_was_killed_or_deleted_is_done_again_with_the_same_results(done, capsys):
    folder, overrides = done
    before = read(folder)
    point, its = (row["point"] for row in before["objectives"])
    other = next(path for path in folder.glob("runs/dpo/*") if path.name != point)
    shutil.rmtree(other / "seed-0")  # deleted
    killed = folder / "runs" / "dpo" / point / "seed-1"
    shutil.rmtree(killed / "final")  # as if killed while it trained
    manifest = json.loads((killed / "manifest.json").read_text())
    (killed / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "steps"}))
    (folder / "runs" / "f_dpo-reverse_kl" / its / "seed-0" / "measured-test.json").unlink()
    for name in ("results.json", "report.html"):
        (folder / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/f_dpo*/*/*/final/model.safetensors")}
    capsys.readouterr()
    compare(TINY, overrides)
    assert without_times(read(folder)) == without_times(before)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert capsys.readouterr().out.count(": complete") == 6 - 2 + 2  # chosen runs of seed 0 are asked for twice


def test_another_recipe_is_refused_with_the_difference(done):
    folder, overrides = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*") if path.is_file()}
    assert len(before) > 50
    with pytest.raises(UserError, match=r"runs/dpo.*training.learning_rate was 0.0001, is 0.001"):
        compare(TINY, [*overrides, "training.learning_rate=1e-3"])
    with pytest.raises(UserError, match=r"reward.pattern was .*, is 'cold'"):
        compare(TINY, [*overrides, "reward.pattern=cold"])
    (folder / "grammar" / "model" / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match=r"^model.name_or_path: chat_template.jinja is not what the runs in"):
        compare(TINY, overrides)
    (folder / "grammar" / "model" / "chat_template.jinja").unlink()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_given_pairs_are_prepared_once_and_every_run_trains_on_them(tiny, tmp_path, capsys):
    """A soft label, a tie, an unusable row, and one with a prompt that judges, which is dropped where asked to."""
    rows = [
        {"prompt": f"my dog {i} is", "chosen": " kind and warm .", "rejected": " cold ."} for i in range(12)
    ] + [{"prompt": "my cat is", "chosen": " kind .", "rejected": " bad .", "label": 0.8},
         {"prompt": "my car is", "chosen": " kind .", "rejected": " kind ."}]  # fmt: skip
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("your song seems\nour bread was\n")
    rows.append({"prompt": "our bread  was", "chosen": " kind .", "rejected": " dull ."})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "out"
    overrides = [
        "compare.task=null", "compare.objectives=[dpo, ipo]", "compare.tune=1", "compare.seeds=1",
        "compare.validation=null", f"model.name_or_path={tiny}", f"training.output_dir={folder}",
        "data.sample=null", f"data.train={data}", f"evaluation.prompts={held_out}", "evaluation.samples_per_prompt=2",
        "evaluation.bootstrap=200", "generation.max_new_tokens=4", "training.num_train_epochs=1",
        "training.global_batch_size=4",
    ]  # fmt: skip
    scored = [one.replace("[dpo, ipo]", "[dpo, reward_aware_rpo]") for one in overrides]
    with pytest.raises(UserError, match="data.train: reward_aware_rpo reads reward_chosen and reward_rejected"):
        compare(TINY, [*scored, "data.overlap=drop"])
    with pytest.raises(UserError, match="1 of 14 prompts of data.train are also judged on.*evaluation.prompts"):
        compare(TINY, overrides)
    assert not (folder / "runs").exists()
    compare(TINY, [*overrides, "data.overlap=drop"])
    kept = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(kept) == 13 and {row["prompt"] for row in kept} == {row["prompt"] for row in rows[:13]}
    assert next(row["label"] for row in kept if row["prompt"] == "my cat is") == 0.8
    assert (folder / "rejected_rows.jsonl").read_text().count("\n") == 1
    result = read(folder)
    assert [(row["steps"], row["pairs"]) for row in result["objectives"]] == [(3, [13])] * 2
    for row in result["objectives"]:
        manifest = json.loads((folder / "runs" / row["label"] / row["point"] / "seed-0/manifest.json").read_text())
        assert manifest["recipe"]["data"]["train"][0]["name"] == str(folder / "pairs.jsonl")
        assert manifest["rows"]["train"]["used"] == 13 and row["chosen"]["mean"] is not None
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    with pytest.raises(UserError, match=r"pairs.jsonl: data.train now gives other pairs"):
        compare(TINY, [*overrides, "data.overlap=drop"])


@pytest.mark.slow
def test_inpo_vpo_simpo_and_spo_within_the_same_budget(tiny, tmp_path):
    overrides = [one for one in prepared(tiny, tmp_path) if "tun" not in one] + ["compare.tune=1"]
    others = "{name: inpo, eta: 0.1}, {name: vpo, alpha: 0.05}, simpo, {name: spo, over: beta}"
    objectives = f"compare.objectives=[dpo, {others}]"
    folder = compare(TINY, [*overrides, objectives])
    result = read(folder)
    rows = {row["label"]: row for row in result["objectives"]}
    assert {(row["steps"], row["batch"]) for row in rows.values()} == {(2, 8)}
    inpo = folder / "runs" / "inpo" / "eta-0.1" / "seed-0"
    prompts = [json.loads(line) for line in (inpo / "prompts" / "prompts.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in prompts].count(1) == 8 == len(prompts) / 2
    pairs = [json.loads(line) for line in (folder / "runs/dpo/beta-0.1/seed-0/preferences.jsonl").open()]
    assert {row["prompt"] for row in prompts} >= {row["prompt"] for row in pairs}
    assert rows["inpo"]["equals"] == "first iteration = ipo (tau=0.1)" and rows["inpo"]["chosen"]["mean"] is not None
    assert rows["vpo"]["equals"] is None and rows["vpo"]["hyperparameters"]["calibration"] == "given"
    again = compare(TINY, [*overrides, objectives])
    assert without_times(read(again)) == without_times(result)
