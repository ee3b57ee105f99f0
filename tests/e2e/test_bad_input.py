"""Mistakes that a user can make: one line that begins with `error:`, exit code 2, no traceback, nothing left behind.

Most run the program's `main` in this process, because starting Python with torch takes seconds; a few are real
processes, where libraries could print over the message.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file, save_file

from alignment.errors import run_or_exit
from alignment.models import load_tokenizer
from alignment.models.reward_model import load_reward_model
from alignment.models.sampling import Generation
from alignment.runs import lifecycle
from alignment.runs.program import main, main_reward_model
from evaluation import best_of_n, held_out, overoptimization, win_rate
from evaluation.plans import ModelSource
from evaluation.pools import sample_source
from tests.e2e.conftest import Grammar
from tests.trainers.test_reward_model import without_pad_token

RECIPE = "recipes/quickstart/dpo.yaml"
GOOD = {"prompt": "my dog is", "chosen": " kind .", "rejected": " cold ."}
CHAT = {
    "prompt": [{"role": "user", "content": "my dog is"}],
    "chosen": [{"role": "assistant", "content": "kind ."}],
    "rejected": [{"role": "assistant", "content": "cold ."}],
}


def said(error_output: str) -> str:
    """The one error line; whatever libraries printed stands before it."""
    lines = error_output.strip().splitlines()
    assert "Traceback" not in error_output
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    return lines[-1]


def left(folder: Path) -> list[str]:
    """Every file and folder under `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refused(root, grammar: Grammar, tmp_path, monkeypatch, capfd):
    """Run `scripts/train.py RECIPE OVERRIDES` in this process; it must be refused and leave nothing. Its last line."""

    def attempt(*overrides: str, recipe: str = RECIPE, flags: tuple[str, ...] = ()) -> str:
        run = tmp_path / "out" / "run"
        run.parent.mkdir(exist_ok=True)
        before = left(tmp_path)
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["train.py", recipe, *grammar.overrides(run, *overrides), *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_or_exit(main)
        assert stopped.value.code == 2
        rejected = run.with_name("run.rejected_rows.jsonl")  # the only thing that a refusal may leave: it names it
        named = [str(rejected.relative_to(tmp_path))] if rejected.exists() else []
        assert left(tmp_path) == sorted([*before, *named])
        return said(capfd.readouterr().err)

    return attempt


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1e-4"], "learning_rat: unknown key; did you mean 'learning_rate'?"),
        (["training.learning_rate=fast"], "learning_rate: expected a number, got 'fast'"),
        (["objective.name=dppo"], "did you mean 'dpo'?"),
        (["objective.beta=-1"], "objective.beta: "),
        (["training.bf16=true", "training.fp16=true"], "excludes fp16"),
        (["nonsense"], "'nonsense'"),
        (["data.sample.prompts=nowhere.txt"], "nowhere.txt"),
        (["evaluation.prompts=nowhere.txt"], "nowhere.txt"),
        (["data.sample.limit=1000"], "112 prompts, but 1000 are asked for"),
        (["data.eval=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.sample=null", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.sample=null", "data.train=nobody/no-such-data"], "nobody/no-such-data"),
        (["model.name_or_path=nobody/no-such-model"], "nobody/no-such-model"),
        (["model.name_or_path=./no-such-folder"], "no-such-folder"),
        (["model.name_or_path=no-such-file.gguf"], "no-such-file.gguf"),
        (["model.name_or_path=package://no_such_package/model.gguf"], "'no_such_package' is not installed"),
        (["model.name_or_path=package://yaml/no-such.gguf"], "no-such.gguf"),
        (["model.adapter=./no-such-adapter"], "no-such-adapter"),
        (["model.adapter=tests"], "adapter_config.json"),
        (["data.max_length=2"], "raise data.max_length"),
        (["data.sample.min_gap=99"], "no pair is left"),
        (["reward.pattern='('"], "pattern"),
        (["training.optim=no_such_optimiser"], "no_such_optimiser"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_nothing_written(refused, overrides, message):
    assert message in refused(*overrides)


def test_missing_and_broken_recipes(refused, tmp_path):
    assert "nowhere.yaml" in refused(recipe="nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("objective:\n  name: dpo\n beta: [\n")
    assert f"{broken}:3" in refused(recipe=str(broken))
    assert "--frobnicate" in refused(flags=("--frobnicate",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{not json"], ":2: not valid JSON"),
        ([GOOD, "[1, 2]"], ":2: a JSON object is needed"),
        ([], "no rows"),
        ([{"question": "a", "answer": " b"}], "cannot be told from the columns question, answer"),
    ],
)
def test_unreadable_files_are_named(refused, tmp_path, rows, message):
    file = pairs(tmp_path, rows)
    found = refused("data.sample=null", f"data.train={file}")
    assert f"error: {file}" in found and message in found
    assert not (tmp_path / "out" / "run.rejected_rows.jsonl").exists()


def pairs(tmp_path: Path, rows: list) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("rows", "reason"),  # the last row is the bad one
    [
        ([GOOD, {"prompt": "a", "chosen": " b"}], "missing_field"),
        ([GOOD, GOOD, GOOD | {"chosen": "  "}], "empty"),
        ([GOOD, GOOD | {"chosen": 5}], "not_text"),
        ([GOOD, GOOD | {"chosen": " cold ."}], "same_responses"),
        ([GOOD, CHAT], "unknown_form"),
        ([CHAT, CHAT | {"chosen": "kind ."}], "unknown_form"),
        ([CHAT, CHAT | {"images": ["a.png"]}], "lost_text"),
        ([GOOD | {"label": 0.7}, GOOD | {"label": "high"}], "bad_number"),
    ],
)
def test_too_many_unusable_rows_are_written_down_and_named(refused, tmp_path, rows, reason):
    file = pairs(tmp_path, rows)
    found = refused("data.sample=null", f"data.train={file}")
    assert f"{file}: row {len(rows)}: " in found and reason in found
    rejected = tmp_path / "out" / "run.rejected_rows.jsonl"
    assert str(rejected) in found
    (written,) = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert (written["source"], written["row"], written["reason"]) == (str(file), len(rows), reason)


def test_training_rows_that_are_held_out_as_well(refused, tmp_path):
    file = pairs(tmp_path, [GOOD])
    found = refused("data.sample=null", f"data.train={file}", f"data.eval={file}", "evaluation=null")
    assert "1 of 1 prompts of data.train are also judged on, such as 'my dog is' of data.eval" in found
    opening = tmp_path / "openings.txt"
    opening.write_text("my dog is\n")
    given = ["data.sample=null", f"data.train={file}", f"evaluation.prompts={opening}"]
    assert f"such as 'my dog is' of {opening}" in refused(*given)


def test_missing_columns_of_an_objective(refused, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD) + "\n")
    given = ["data.sample=null", f"data.train={tmp_path / 'pairs.jsonl'}", "objective.name=reward_aware_rpo"]
    given.append("evaluation=null")
    assert "needs column 'reward_chosen'" in refused(*given)


def test_files_that_are_not_models(refused, tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    assert "noise.gguf: not a GGUF file" in refused(f"model.name_or_path={tmp_path / 'noise.gguf'}")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "text.gguf: not a GGUF file" in refused(f"model.name_or_path={tmp_path / 'text.gguf'}")
    (tmp_path / "empty").mkdir()
    assert "not a saved model" in refused(f"model.name_or_path={tmp_path / 'empty'}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "llama"')
    assert "half" in refused(f"model.name_or_path={tmp_path / 'half'}")


def test_batch_that_cannot_be_split_over_the_processes(refused, monkeypatch):
    three = SimpleNamespace(num_processes=3, is_main_process=True)
    monkeypatch.setattr(lifecycle, "PartialState", lambda **settings: three)
    assert "8 pairs cannot be split evenly over 3 processes; declare 9" in refused()


def test_places_that_are_not_runs(refused, tmp_path):
    theirs = tmp_path / "out" / "run"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("precious")
    assert "is not a run" in refused()
    assert "is not a run" in refused(flags=("--resume",))
    assert (theirs / "thesis.tex").read_text() == "precious"


def test_an_earlier_run_is_put_back_when_the_next_is_refused(refused, tmp_path):
    """The mistake shows only after the earlier run was moved aside."""
    earlier = tmp_path / "out" / "run"
    earlier.mkdir(parents=True)
    (earlier / "manifest.json").write_text("{}")
    assert "raise data.max_length" in refused("data.max_length=2")
    assert (earlier / "manifest.json").read_text() == "{}"


def test_real_processes(root, grammar, tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("extends: " + str(root / RECIPE) + "\ntraining:\n  learning_rat: 1.0e-5\n")
    overrides = grammar.overrides(tmp_path / "run", f"model.name_or_path={tmp_path / 'noise.gguf'}")
    programs = Path(sys.executable).parent
    for command, message in [
        (["python", "scripts/train.py", str(wrong)], f"{wrong}:3: training.learning_rat"),
        (["python", "scripts/train.py", RECIPE, *overrides], "not a GGUF file"),
        (["alignment", "recipe", "check", str(wrong)], f"{wrong}:3: training.learning_rat"),
        (["alignment", "report", str(tmp_path / "run")], "no such run folder"),
        (["python", "evaluation/win_rate.py", str(tmp_path / "run")], "no such run directory"),
    ]:
        done = subprocess.run(
            [str(programs / command[0]), *command[1:]], cwd=root, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        assert message in said(done.stderr)
        assert not (tmp_path / "run").exists()


def test_prompts_that_would_be_trained_and_judged_on(refused, tmp_path):
    file = tmp_path / "openings.txt"
    file.write_text("my dog is\nour car was\n")
    found = refused(
        f"data.sample.prompts={file}", "data.sample.limit=null", f"evaluation.prompts={file}", "evaluation.limit=null"
    )
    assert "'my dog is'" in found and "judge on prompts that training does not see" in found


def test_what_peft_says_of_a_setting_is_one_line(refused):
    assert "no_such_layer" in refused("lora.target_modules=[no_such_layer]")


# Reward models and what judges with them


@pytest.fixture
def program(root, monkeypatch, capfd):
    """Run a program's `main` in this process with the words that follow; it must exit with 2. Its last line."""

    def attempt(start, *words: str) -> str:
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_or_exit(start)
        assert stopped.value.code == 2
        return said(capfd.readouterr().err)

    return attempt


@pytest.fixture
def refused_reward(program, tiny, tmp_path):
    """Train a small reward model into tmp_path/out/run; it must be refused. Its last line."""
    (tmp_path / "out").mkdir()
    file = pairs(tmp_path, [GOOD | {"prompt": f"my {noun} is"} for noun in ("dog", "cat", "house", "car")])
    given = {
        "model.name_or_path": tiny,
        "data.train": file,
        "data.eval": "null",
        "training.use_cpu": "true",
        "training.global_batch_size": "2",
        "training.output_dir": tmp_path / "out" / "run",
    }

    def attempt(*overrides: str) -> str:
        words = given | dict(word.format(here=tmp_path).split("=", 1) for word in overrides)
        return program(
            main_reward_model, "recipes/quickstart/reward_model.yaml", *(f"{k}={v}" for k, v in words.items())
        )

    return attempt


WHOLE = ("reward_model.freeze_trunk=false",)


def broken_model(tiny: Path, copy: Path, value: float) -> Path:
    """A copy whose last norm has this weight in one place."""
    shutil.copytree(tiny, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (WHOLE, "error: step 1: the loss of "),
        (("training.eval_on_start=true", "data.eval={here}/pairs.jsonl", "data.overlap=allow", *WHOLE),
         "after 0 training steps"),
        ((), "features of 4 of 4 pairs are not finite numbers, first those of prompt 'my dog is'"),
        (("reward_model.loss=general", "reward_model.members=1", "reward_model.mode=independent",
          "reward_model.bootstrap=false", *WHOLE), "error: step 1: the loss of "),
    ],
    ids=["whole", "evaluated first", "frozen", "general"],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_scores_are_no_numbers(refused_reward, tiny, tmp_path, overrides, message, value):
    base = broken_model(tiny, tmp_path / "broken", value)
    found = refused_reward(f"model.name_or_path={base}", *overrides)
    assert message in found and ("float32" in found or "There is no whole checkpoint" in found)
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("steps", ["4", "1"])
def test_training_that_diverges_ends_without_a_model(refused_reward, tmp_path, steps):
    wild = ("training.optim=sgd", "training.learning_rate=1", "training.max_grad_norm=0", "reward_model.center=1e30")
    given = (*WHOLE, *wild, "training.warmup_steps=0", f"training.max_steps={steps}")
    found = refused_reward(*given)
    assert "error: step 1: the gradient is not finite; training stopped before the optimizer's step" in found
    assert "lower training.learning_rate" in found
    assert not [name for name in left(tmp_path / "out") if "final" in name or "held_out" in name]


def test_held_out_scores_that_are_no_numbers(program, tmp_path):
    """Of a run that an earlier version has written."""
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    row = {"prompt": "0", "label": 1.0, "chosen": [None], "rejected": [0.0]}
    (run / "held_out.jsonl").write_text(json.dumps(row) + "\n")
    facts = {"kind": "scalar", "temperature": 0.1, "mean": [None], "std": [1.0]}
    (run / "final" / "reward_model.json").write_text(json.dumps(facts))
    assert "held_out.jsonl: holds scores that are not finite numbers" in program(held_out.app, run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name_or_path=./no-such-folder"], "./no-such-folder: no such folder"),
        (
            ["model.name_or_path={here}/padless"],
            "a pad token besides EOS is needed, since the score is read at the last",
        ),
        (["reward_model.pad_token='<|no|>'"], "'<|no|>' is EOS or not in the vocabulary"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data.eval={here}/pairs.jsonl"], "4 of 4 prompts of data.train are also judged on"),
        (["reward_model.margin=margin"], "needs column 'margin'"),
    ],
)
def test_reward_models(refused_reward, tiny, tmp_path, overrides, message):
    without_pad_token(tiny, tmp_path / "padless")
    assert message in refused_reward(*overrides)
    assert left(tmp_path / "out") == []


@pytest.fixture(scope="module")
def judges(root, tiny, tmp_path_factory) -> dict[str, object]:
    """A pool, a classifier with two labels, a model without pad token, a run whose held-out rows are not there."""
    folder = tmp_path_factory.mktemp("judges")
    source = ModelSource(str(tiny), {"name_or_path": str(tiny), "dtype": "float32"})
    sample_source(source, ["my dog is"], folder / "pool", 4, generation=Generation(max_new_tokens=4), seed=1)
    model = load_reward_model(tiny, outputs=2, fresh_head=True)
    for name in ("two", "padless"):
        load_tokenizer(tiny).save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    without_pad_token(folder / "padless", folder / "without")
    config = json.loads((folder / "without" / "config.json").read_text())
    (folder / "without" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    (folder / "unfinished").mkdir()
    rows = [{"prompt": "my dog is", "response": text} for text in (" kind .", " cold .")]
    for name, row in zip("ab", rows, strict=True):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    experiment = yaml.safe_load((root / "recipes/overoptimization/smollm2.yaml").read_text())
    experiment["policy"] = {"name_or_path": str(tiny)}
    for name, change in {
        "no_recipe": {"reward_model": "nowhere.yaml"},
        "no_ensemble": {"overrides": ["reward_model.members=1"]},
        "no_prompts": {"pairs": {"file": "nowhere.txt"}},
        "no_gold": {"gold": {"name": "goldd"}},
        "no_policy": {
            "policy": {"name_or_path": "./no-such-folder"},
            "pool": {"file": "recipes/quickstart/openings_heldout.txt"},
        },
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(experiment | change))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    return {"here": folder, "dead": dead}


CURVES = ("curves", "--pool", "{here}/pool", "--gold", "length", "--proxy")
LLM = ("--a", "{here}/a.jsonl", "--b", "{here}/b.jsonl", "--oracle", "llm_judge", "--oracle-key")


@pytest.mark.parametrize(
    ("start", "words", "message"),
    [
        (best_of_n.app, ("curves", "--pool", "{here}/none", *CURVES[3:], "{here}/two"), "{here}/none: no manifest"),
        (best_of_n.app, (*CURVES, "{here}/none"), "reward.path: cannot load '{here}/none'"),
        (best_of_n.app, (*CURVES, "{here}/two"), "reward ensemble: {here}/two has 2 labels and no reward_model.json"),
        (best_of_n.app, (*CURVES, "{here}/without"), "reward.path: a pad token besides EOS is needed"),
        (best_of_n.app, (*CURVES[:4], "model", "--gold-key", "path={here}/two", "--normalise", "none", "--proxy",
                         "{here}/two"), "has 2 labels"),
        (held_out.app, ("{here}/none",), "{here}/none: no such run folder"),
        (held_out.app, ("{here}/unfinished",), "has no held_out.jsonl"),
        (overoptimization.app, ("{here}/none.yaml", "--output", "{here}/oo"), "{here}/none.yaml"),
        (overoptimization.app, ("{here}/no_recipe.yaml", "--output", "{here}/oo"), "nowhere.yaml"),
        (overoptimization.app, ("{here}/no_ensemble.yaml", "--output", "{here}/oo"), "an ensemble needs two or more"),
        (overoptimization.app, ("{here}/no_prompts.yaml", "--output", "{here}/oo"), "nowhere.txt"),
        (overoptimization.app, ("{here}/no_gold.yaml", "--output", "{here}/oo"), "unknown reward 'goldd'"),
        (win_rate.app, (*LLM, "base_url={dead}", "--oracle-key", "model=m", "--oracle-key", "retries=0",
                        "--oracle-key", "cache={here}/cache"), "{dead}"),
    ],
)  # fmt: skip
def test_judges(program, judges, start, words, message):
    folder = judges["here"]
    before = left(folder)
    found = program(start, *(word.format(**judges) for word in words))
    assert message.format(**judges) in found
    assert [name for name in left(folder) if name not in before and not name.startswith("cache")] == []


def test_a_policy_that_is_not_there_leaves_what_the_experiment_was(program, judges, tmp_path):
    found = program(overoptimization.app, judges["here"] / "no_policy.yaml", "--output", tmp_path / "oo")
    assert "'./no-such-folder'" in found and "overoptimization.json" not in left(tmp_path)
