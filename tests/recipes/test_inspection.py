"""`check`, `explain`, `diff`, and that a resolved recipe is itself a recipe."""

import json
import re
from pathlib import Path

import pytest

from alignment.objectives import objective_class
from alignment.recipes import Recipe, inspection, load_any, load_recipe
from alignment.recipes.inspection import check, diff, explain, flatten
from alignment.recipes.trl_keys import REPORTERS
from tests.recipes.conftest import ROOT

SHIPPED = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name not in ("accelerate", "compare", "games", "replications")  # experiments
    and path.stem != "smollm2"
)


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_recipes_check(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [str(problem) for problem in check(path)] == []


@pytest.mark.parametrize("path", SHIPPED)
def test_a_resolved_recipe_is_an_equal_recipe(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    resolved = load_any(path).resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(resolved))  # as manifest.json holds it; JSON is YAML
    assert load_any(again).resolved() == resolved


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=inpo"],
        ["objective.name=f_dpo", "objective.divergence=alpha", "objective.alpha=0.3"],
        ["lora={r: 8, target_modules: [q_proj, v_proj]}", "training.optim_args=null"],
        [
            "training.learning_rate=1e-12",
            "training.save_strategy=no",
            "model.revision='1e5'",
            "training.run_name='on'",
        ],
        ["reward={name: regex, pattern: 'a: b # c'}", "training.gradient_checkpointing_kwargs={use_reentrant: false}"],
    ],
)
def test_resolving_is_stable_under_overrides(small, overrides):
    recipe = load_recipe(small(), overrides)
    Path("again.yaml").write_text(json.dumps(recipe.resolved()))
    assert load_recipe("again.yaml").resolved() == recipe.resolved()


def test_every_objective_has_a_quick_start_recipe_and_each_recipe_its_own_run_folder():
    from alignment.objectives import list_objectives

    names = {card.name for card in list_objectives()}
    built_in = {name for name in names if objective_class(name).__module__.startswith("alignment.objectives.")}
    recipes = {path: load_any(ROOT / path) for path in SHIPPED}
    quickstart = {
        Path(path).stem: recipe
        for path, recipe in recipes.items()
        if "quickstart" in path and isinstance(recipe, Recipe)  # sft.yaml has no objective
    }
    assert set(quickstart) == built_in | {"vpo_online"}
    assert all(recipe.objective.name == stem.removesuffix("_online") for stem, recipe in quickstart.items())
    assert len({recipe.training.output_dir for recipe in recipes.values()}) == len(recipes)


RUN_BY = r"(scripts/(train|sft|train_reward_model)\.py|alignment iterate)"


def test_derived_recipes_stay_short_and_say_how_they_are_run():
    for path in SHIPPED:
        text = (ROOT / path).read_text()
        joined = re.sub(r" \\\n# +", " ", text)  # a command over several lines
        assert text.startswith("# ") and re.search(rf"{RUN_BY} {path}", joined), path
        if "extends:" in text:
            said = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            assert len(said) <= 20, path  # sources of values, in comments, may take what they need


def test_quick_start_layout_is_block_style():
    text = (ROOT / "recipes/quickstart/dpo.yaml").read_text()
    assert "\nobjective:\n  name: dpo\n" in text
    assert all((len(line) - len(line.lstrip())) % 2 == 0 for line in text.splitlines())


def test_accelerate_configs_hold_keys_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((ROOT / "recipes/accelerate").glob("*.yaml")):
        config = load_config_from_file(str(path))
        assert config.use_cpu is path.stem.startswith("cpu")
        assert (config.mixed_precision == "bf16") is path.stem.startswith(("zero", "fsdp"))


def test_explain_shows_every_value_once_with_its_origin(small):
    Path("base.yaml").write_text(Path(small()).read_text())
    Path("child.yaml").write_text("extends: base.yaml\ntraining:\n  seed: 7\n")
    recipe = load_recipe("child.yaml", ["training.learning_rate=1e-6"])
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in explain(recipe).splitlines()}
    assert set(rows) == {key for key, _ in flatten(recipe.resolved())}
    assert rows["training.seed"] == ["7", "child.yaml:3"]
    assert rows["training.global_batch_size"] == ["16", "base.yaml:9"]
    assert rows["training.learning_rate"] == ["1e-06", "command line"]
    assert rows["training.warmup_steps"] == ["0.0", "default: TRL 1.16"]
    assert rows["training.output_dir"] == ["runs/child", "default: runs/ and the recipe's file name"]
    assert rows["objective.label_smoothing"][1].startswith("default: ")
    drawn = ["data={train: null, prompts: p.txt}", "generation.max_new_tokens=8", "reward.name=vader"]
    short = load_recipe("child.yaml", drawn)
    (shown,) = [line for line in explain(short).splitlines() if line.startswith("data.prompts.name ")]
    assert shown.split()[1:] == ["p.txt", "command", "line"]  # where its section was written
    assert all(len(rest) == 2 and rest[1].removeprefix("default: ") for rest in rows.values())


def test_explain_and_diff_know_a_base_s_hyperparameters(small):
    on_ipo = load_recipe(small("name: dpo\n  beta: 0.2", "name: spo\n  base: ipo", name="ipo.yaml"))
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in explain(on_ipo).splitlines()}
    assert rows["objective.base"] == ["ipo", "ipo.yaml:3"]
    ipo = next(row for row in objective_class("ipo").card.hyperparameters if row.name == "tau")
    assert rows["objective.tau"] == [str(ipo.default), f"default: {ipo.source}"]
    assert rows["objective.gamma"] == ["0.1", "default: CHOICE: the paper's was not seen"]
    on_simpo = load_recipe(small("name: dpo\n  beta: 0.2", "name: spo\n  base: simpo", name="simpo.yaml"))
    differences = diff(on_ipo, on_simpo).splitlines()
    assert "objective.base: ipo (ipo.yaml:3) -> simpo (simpo.yaml:3)" in differences
    assert "objective.base_gamma: absent -> 1.0 (default)" in differences
    assert f"objective.tau: {ipo.default} (default) -> absent" in differences


def test_diff_shows_what_differs_and_nothing_else(small):
    first = load_recipe(small())
    assert diff(first, load_recipe("r.yaml")) == ""
    second = load_recipe("r.yaml", ["training.seed=7", "lora={r: 4}"])
    lines = diff(first, second).splitlines()
    assert "training.seed: 42 (default) -> 7 (command line)" in lines
    assert "lora.r: absent -> 4 (command line)" in lines
    assert all(line.startswith(("lora", "training.seed")) for line in lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["r.yaml:7: data.train: pairs.jsonl: no such file"]),
        (["data.train=org/name"], []),
        (["data.train=org/name", "data.eval=e.json"], ["command line: data.eval: e.json: no such file"]),
        (
            ["data.train=[org/name, e.csv, e.parquet]"],
            [f"command line: data.train: e.{kind}: no such file" for kind in ("csv", "parquet")],
        ),
        (["data.train=./folder:train"], ["command line: data.train: ./folder: no such file"]),
        (["data.train=org/name", "model.adapter=a"], ["command line: model.adapter: a: no such folder"]),
        (["data.train=org/name", "model.name_or_path=./m"], ["command line: model.name_or_path: ./m: no such folder"]),
        (["data.train=org/name", "model.name_or_path=m.gguf"], ["command line: model.name_or_path: m.gguf: no such"]),
        (
            ["data.train=org/name", "model.name_or_path=package://yaml/m.gguf"],
            ["command line: model.name_or_path: package://yaml/m.gguf: the package 'yaml' has no file 'm.gguf'"],
        ),
        (["data.train=org/name", "model.name_or_path=package://yaml/__init__.py"], []),
        (
            ["data.train=org/name", "model.name_or_path=an_adapter", "lora.r=4"],
            ["command line: lora: trains a fresh adapter, and an_adapter is an adapter already: give one of them"],
        ),
        (
            ["data.train=org/name", "model.name_or_path=org/base", "model.adapter=prompt_tuning"],
            ["command line: model.adapter: prompt_tuning: PROMPT_TUNING puts virtual tokens before the prompt"],
        ),
    ],
)
def test_check_looks_for_the_files_that_a_recipe_names(small, overrides, expected):
    Path("an_adapter").mkdir()
    Path("an_adapter/adapter_config.json").write_text("{}")
    Path("prompt_tuning").mkdir()
    Path("prompt_tuning/adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    found = [str(problem) for problem in check(small(), overrides)]
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("override", "installed", "expected"),
    [
        ("training.report_to=none", [], None),
        ("training.report_to=all", [], None),
        ("training.report_to=kubeflow", [], None),  # known by an environment variable, not by a package
        ("training.report_to=wandb", ["wandb"], None),
        ("training.report_to=wandb", ["tensorboard"], "training.report_to: wandb needs the Python package wandb"),
        (
            "training.report_to=[wandb, mlflow]",
            ["wandb"],
            "training.report_to: mlflow needs the Python package mlflow",
        ),
        ("training.report_to=tensorboard", ["tensorboardX"], None),
        ("training.report_to=tensorboard", [], "training.report_to: tensorboard needs the Python package tensorboard"),
        ("model.attn_implementation=sdpa", [], None),
        ("model.attn_implementation=flash_attention_2", ["flash_attn"], None),
        ("model.attn_implementation=flash_attention_2", ["kernels"], None),
        (
            "model.attn_implementation=flash_attention_2",
            [],
            "model.attn_implementation: flash_attention_2 needs the Python package flash_attn",
        ),
    ],
)
def test_check_looks_for_the_packages_that_a_recipe_needs(small, monkeypatch, override, installed, expected):
    monkeypatch.setattr(inspection.importlib.util, "find_spec", lambda name: name if name in installed else None)
    found = [str(problem) for problem in check(small(), ["data.train=org/name", override])]
    if expected is None:
        assert found == []
    else:
        assert found == [f"command line: {expected}, which is not installed"]


def test_reporters_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)


TEXT_OF_ROWS = ":1: a row of JSON in a file of text; name the file .jsonl"


@pytest.mark.parametrize(
    ("recipe", "key", "name", "content", "message"),
    [
        ("dpo", "evaluation.prompts", "p.txt", '{"prompt": "a"}', TEXT_OF_ROWS),
        ("dpo", "evaluation.prompts", "p.dat", '{"prompt": "a"}', TEXT_OF_ROWS),
        ("dpo", "evaluation.prompts", "p.jsonl", '{"chosen": "a"}', ":1: no prompt in this row (it has chosen)"),
        ("dpo", "evaluation.prompts", "p.jsonl", '{"prompt": "a"}\n{"messages": []}', ":2: prompt is empty"),
        ("dpo", "evaluation.prompts", "p.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', None),
        ("dpo", "data.sample.prompts", "p.txt", '{"prompt": "a"}', TEXT_OF_ROWS),
        ("p3o", "data.prompts", "p.txt", '{"prompt": "a"}', TEXT_OF_ROWS),
        ("p3o", "data.prompts", "p.jsonl", '{"text": "a"}\n{"text": "b"}', ":1: no prompt in this row (it has text)"),
        ("p3o", "data.prompts", "p.jsonl", '{"text": "a"}\n{"prompt": "b"}', None),  # training counts it
    ],
)
def test_files_of_prompts_are_read_by_check(recipe, key, name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / name
    file.write_text(content)
    limit = [f"{key.rpartition('.')[0]}.limit=null"] if key != "data.prompts" else []
    given = f"{{name: {file}}}" if key == "data.prompts" else str(file)
    problems = check(f"recipes/quickstart/{recipe}.yaml", [f"{key}={given}", *limit])
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.path == tuple(key.split(".")) and problem.message.startswith(f"{file}{message}")
