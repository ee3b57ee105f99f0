"""`extends` and the command line's overrides: what wins, and that every value knows where it came from."""

from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.recipes import RecipeError, load_recipe


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def test_sections_merge_key_by_key_and_the_objective_is_replaced_whole(small):
    small(name="base.yaml")
    child = write(
        "sub/child.yaml",
        "extends: ../base.yaml\nobjective:\n  name: ipo\ntraining:\n  learning_rate: 1e-5\n  seed: 3\n",
    )
    recipe = load_recipe(child)
    assert recipe.objective.name == "ipo"
    assert "beta" not in recipe.objective.hyperparameters
    assert recipe.training.global_batch_size == 16
    assert recipe.training.learning_rate == 1e-5
    assert str(recipe.origin("training.learning_rate")) == "sub/child.yaml:5"
    assert str(recipe.origin("training.global_batch_size")) == "base.yaml:9"
    assert recipe.origin("objective.beta") is None
    assert recipe.training.output_dir == "runs/child"
    assert str(recipe.path) == "sub/child.yaml"


def test_a_chain_of_three_and_lists_are_replaced(small):
    small("5e-7", "5e-7\n  report_to: [wandb, mlflow, trackio]", name="a.yaml")
    write("b.yaml", "extends: a.yaml\ntraining:\n  report_to: [clearml]\n  seed: 1\n")
    recipe = load_recipe(write("c.yaml", "extends: b.yaml\ntraining:\n  seed: 2\nlora:\n  r: 4\n"))
    assert (recipe.training.report_to, recipe.training.seed) == (["clearml"], 2)
    assert recipe.lora is not None and recipe.lora.r == 4


def test_errors_in_a_base_name_the_base(small):
    small("learning_rate", "learning_rat", name="base.yaml")
    with pytest.raises(RecipeError, match=r"^base\.yaml:10: training\.learning_rat: unknown key"):
        load_recipe(write("child.yaml", "extends: base.yaml\ntraining:\n  seed: 1\n"))


def test_null_removes_an_inherited_section(small):
    small("data:", "lora:\n  r: 4\ndata:", name="base.yaml")
    assert load_recipe(write("child.yaml", "extends: base.yaml\nlora: null\n")).lora is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.yaml": "extends: a.yaml\n"}, "a.yaml:1: extends: goes in a circle: a.yaml -> a.yaml"),
        (
            {"a.yaml": "x: 1\nextends: b.yaml\n", "b.yaml": "extends: ./a.yaml\n"},
            "b.yaml:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml",
        ),
        (
            {"a.yaml": "extends: bass.yaml\n", "base.yaml": "x: 1\n"},
            "a.yaml:1: extends: bass.yaml: no such recipe file; did you mean 'base'?",
        ),
        ({"a.yaml": "extends: [b.yaml]\n"}, "a.yaml:1: extends: expected the name of one recipe file, got ['b.yaml']"),
    ],
)
def test_bad_extends(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        write(name, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.yaml")
    assert str(caught.value) == message


def test_overrides_are_yaml_and_win(small):
    recipe = load_recipe(
        small(),
        [
            "training.learning_rate=1e-6",
            "lora={r: 8}",
            "training.report_to=[wandb, mlflow]",
            "model.revision='1.0'",
            "data.eval=e",
        ],
    )
    assert recipe.training.learning_rate == 1e-6
    assert recipe.lora is not None and recipe.lora.r == 8
    assert recipe.training.report_to == ["wandb", "mlflow"]
    assert recipe.model.revision == "1.0"
    assert str(recipe.origin("training.learning_rate")) == "command line"
    assert str(recipe.origin("training.global_batch_size")) == "r.yaml:9"


def test_overrides_open_sections_and_dig_deep(small):
    overrides = ["data.train=null", "data.sample.prompts=p.txt", "data.sample.limit=3", "reward.name=length"]
    recipe = load_recipe(small(), overrides)
    assert recipe.data.sample is not None and recipe.data.sample.limit == 3


def test_another_objective_drops_the_old_ones_hyperparameters(small):
    path = small("beta: 0.2", "beta: 0.2\n  label_smoothing: 0.1")
    recipe = load_recipe(path, ["objective.name=ipo", "objective.tau=0.3"])
    assert recipe.objective.hyperparameters["tau"] == 0.3
    assert "beta" not in recipe.objective.hyperparameters
    same = load_recipe(path, ["objective.name=dpo"])
    assert same.objective.hyperparameters == {"beta": 0.2, "label_smoothing": 0.1}


def test_another_reward_drops_the_old_ones_keys(small):
    path = small("data:", "reward:\n  name: regex\n  pattern: x\ndata:")
    recipe = load_recipe(path, ["reward.name=length"])
    assert recipe.reward is not None and recipe.reward.options == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "command line: training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("trainin.seed=1", "command line: trainin: unknown key; did you mean 'training'?"),
        ("training.learning_rate=fast", "command line: training.learning_rate: expected a number, got 'fast'"),
        ("training.learning_rate=", "command line: training.learning_rate: expected a number, got nothing (null)"),
        ("training=3", "command line: training: expected a section with keys of its own, got 3"),
        ("objective.beta.x=1", "command line: objective.beta.x: cannot be set: objective.beta is 0.2, not a section"),
        ("objective.beta=[1", "command line: objective.beta: not valid YAML: "),
        ("lora={r: 1, r: 2}", "command line: lora.r: given twice"),
        ("training.seed", "command line: 'training.seed' is not an override; write SECTION.KEY=VALUE"),
        ("training..seed=1", "command line: 'training..seed=1' is not an override; write SECTION.KEY=VALUE"),
        ("extends=x.yaml", "command line: extends: belongs in a recipe file"),
    ],
)
def test_bad_overrides(small, override, message):
    with pytest.raises(UserError) as caught:
        load_recipe(small(), [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_override_given_twice_is_refused(small):
    with pytest.raises(UserError, match="training.seed: given twice"):
        load_recipe(small(), ["training.seed=1", "training.seed=2"])


PLUGIN = """\
from torch import Tensor
from alignment.objectives import Card, Objective, PairLogps, hyper, register

@register
class Straight(Objective):
    card = Card(name="straight", title="A line", paper="none", equation="none", formula="-m")
    beta: float = hyper("scale", default=1.0, gt=0)

    def pair_loss(self, batch: PairLogps) -> Tensor:
        return -self.beta * batch.margin
"""


def test_an_objective_from_a_file_beside_the_recipe(small):
    small("name: dpo\n  beta: 0.2", "name: straight\n  file: mine.py\n  beta: 3", name="sub.yaml")
    Path("deep").mkdir()
    Path("deep/r.yaml").write_text(Path("sub.yaml").read_text())
    Path("deep/mine.py").write_text(PLUGIN)
    recipe = load_recipe("deep/r.yaml")
    assert recipe.objective.hyperparameters == {"beta": 3}
    assert recipe.objective.file == str(Path("deep/mine.py").resolve())
    with pytest.raises(RecipeError, match=r"^command line: objective\.beta: must be a number > 0, got 0"):
        load_recipe("deep/r.yaml", ["objective.beta=0"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("def (", "SyntaxError"),
        ("import nothing_like_it", "ModuleNotFoundError"),
        ("x = 1", "registers"),
    ],
)
def test_a_bad_plug_in_is_one_line_at_the_recipes_line(small, text, words):
    path = small("beta: 0.2", "beta: 0.2\n  file: mine.py")
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith("r.yaml:4: objective.file: ")
    assert words in str(caught.value) and "\n" not in str(caught.value)
