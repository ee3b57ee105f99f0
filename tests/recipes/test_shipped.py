"""What is shipped can be used: every recipe passes its check, accelerate reads every launch file, shown commands fit.

That is: the files that they name exist, and their overrides are keys of the recipe. Nothing is downloaded or trained.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignment.models.sampling import Generation
from alignment.objectives import list_objectives
from alignment.recipes import Recipe, RecipeError, load_any, load_recipe, load_reward_model_recipe
from alignment.recipes.inspection import check
from tests.pages import commands, read, shell_lines
from tests.recipes.conftest import ROOT

OBJECTIVES = {card.name for card in list_objectives()}
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*/*.yaml"))
FILES.remove("recipes/overoptimization/smollm2.yaml")  # an experiment: tests/evaluation/test_overoptimization.py
OTHER_FOLDERS = ("recipes/compare/", "recipes/games/", "recipes/replications/")
FILES = [name for name in FILES if not name.startswith(OTHER_FOLDERS)]
LAUNCH = [name for name in FILES if name.startswith("recipes/accelerate/")]
# Supervised fine-tuning has a schema and tests of its own.
OTHER_KINDS = ("sft", "reward_model")  # no objective
REWARD = [name for name in FILES if name.startswith("recipes/reward_model/")]
RECIPES = [name for name in FILES if name not in (*LAUNCH, *REWARD) and Path(name).stem not in OTHER_KINDS]
REAL = [name for name in RECIPES if not name.startswith("recipes/quickstart/")]
PAGES = ["docs/launching.md", "docs/on_policy.md"]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def header(name: str) -> list[str]:
    """The comment at the top of a file, without its marks."""
    lines = (ROOT / name).read_text().splitlines()
    end = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[1:].removeprefix(" ") for line in lines[:end]]


def shown(name: str) -> list[str]:
    """The shell lines that a file shows: indented in a YAML file's header, in the fenced blocks of a page."""
    if name.endswith(".md"):
        return shell_lines(read(name))
    text = "\n".join(line for line in header(name) if line.startswith("  "))
    return [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines()]


@pytest.mark.parametrize("name", [*RECIPES, *REWARD])
def test_recipe_passes_its_check(name):
    assert [str(problem) for problem in check(name)] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_draws_says_how_long_a_response_may_be(name):
    """The quick starts' 24 tokens are theirs alone; what no recipe says has the general default."""
    recipe = load_any(name)
    limit, data = recipe.generation.max_new_tokens, recipe.data.model_dump()
    if data.get("sample") or data.get("prompts"):
        assert "max_new_tokens" in recipe.generation.model_fields_set
    else:
        assert limit == Generation().max_new_tokens == 1024
    assert (limit == 24) == (name not in REAL)


def test_every_objective_has_a_quick_start_and_a_recipe_for_a_real_model():
    """Of one run, or of the iterations that the method is."""
    quick = {load_any(name).objective.name for name in RECIPES if name not in REAL}
    assert quick == OBJECTIVES
    real = {load_any(name).objective.name for name in REAL}
    assert real == OBJECTIVES
    for name in REAL:
        assert load_any(name).objective.name == Path(name).parent.name


def test_objectives_that_learn_from_samples_have_prompts_and_vpo_both_ways():
    sampled = {card.name for card in list_objectives() if card.batch != "pairs"}
    assert sampled == {"egpo", "likelihood", "nash_md", "nash_md_pg", "online_ipo1", "online_ipo2", "p3o"}
    runs = [name for name in RECIPES if isinstance(load_any(name), Recipe)]
    recipes = [load_recipe(name) for name in runs]
    assert all(r.data.prompts is not None for r in recipes if r.objective.name in sampled)
    for real in (True, False):
        vpo = [load_recipe(name) for name in runs if (name in REAL) == real]
        vpo = [r for r in vpo if r.objective.name == "vpo"]
        assert {(r.data.prompts is not None, r.objective.hyperparameters["mode"]) for r in vpo} == {
            (False, "offline"),
            (True, "online"),
        }


def test_no_two_recipes_write_to_the_same_place():
    places = [load_any(name).training.output_dir for name in [*RECIPES, *REWARD]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", REAL)
def test_header_of_a_recipe_that_was_not_run_says_so_and_computes_its_memory(name):
    text = " ".join(header(name))
    assert "NOT run by this project" in text
    assert re.search(r"Memory: \d+ GiB per GPU on \d+ with (zero3|ddp)\.yaml.*\(computed .*not measured\)", text)
    assert not re.search(r"\b\d+(\.\d+)? ?(hours?|minutes?|h|min)\b", text)  # no untimed cost


@pytest.mark.parametrize("name", REWARD)
def test_reward_models_of_real_bases_say_what_was_not_run_and_are_on_their_page(name):
    text = " ".join(header(name))
    assert "NOT run by this project" in text and "Hardware: " in text and "Values: " in text
    assert not re.search(r"\b\d+(\.\d+)? ?(hours?|minutes?|h|min)\b", text)
    assert f"`{name}`" in (ROOT / "docs/reward_models.md").read_text()


def test_there_is_a_reward_model_of_every_kind():
    found = {(r.reward_model.loss, r.reward_model.members > 1) for r in map(load_reward_model_recipe, REWARD)}
    assert found == {("bradley_terry", False), ("bradley_terry", True), ("general", False)}


@pytest.mark.parametrize("name", [*RECIPES, *REWARD, *LAUNCH])
def test_shown_commands_name_real_files_and_keys(name):
    found = commands(shown(name))
    assert found
    for words in found:
        for word in words:
            if re.fullmatch(r"(recipes|scripts|evaluation|tests|docs)/\S+", word):
                assert (ROOT / word).is_file(), word
        if "scripts/train_reward_model.py" in words:
            given = words[words.index("scripts/train_reward_model.py") + 1 :]
            load_reward_model_recipe(given[0], [word for word in given[1:] if not word.startswith("--")])
        if "scripts/train.py" in words:
            given = words[words.index("scripts/train.py") + 1 :]
            if given[0] != "RECIPE":
                load_recipe(given[0], [word for word in given[1:] if not word.startswith("--")])


@pytest.mark.parametrize("name", [*RECIPES, *PAGES])
def test_shown_launches_agree_with_the_recipe_on_precision(name):
    """A launcher in bfloat16 and a recipe in float32 are refused at the start of training (docs/launching.md)."""
    from accelerate.commands.config.config_args import load_config_from_file

    for words in commands(shown(name)):
        if "--config_file" not in words or "scripts/train.py" not in words:
            continue
        at = words.index("scripts/train.py")
        launcher = load_config_from_file(words[words.index("--config_file") + 1])
        training = load_recipe(words[at + 1], [word for word in words[at + 2 :] if "=" in word]).training
        if launcher.mixed_precision == "bf16":
            assert training.bf16, words


def test_other_files_among_the_recipes_are_named_by_one():
    """Prompts and rows that a recipe reads, and what a header's command copies, such as ORPO's chat template."""
    text = "\n".join((ROOT / name).read_text() for name in FILES)
    others = [str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*/*.*") if path.suffix != ".yaml"]
    others = [name for name in others if not name.startswith("recipes/replications/")]
    assert others and [name for name in others if name not in text] == []


@pytest.mark.parametrize("name", LAUNCH)
def test_launch_file_is_read_by_accelerate_and_has_options_of_the_launcher_only(name):
    """accelerate refuses unknown keys at the top level, and ignores those of a nested section without a word."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(ROOT / name))
    assert config.num_processes >= 1 and config.num_machines >= 1
    assert config.num_processes % config.num_machines == 0
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.deepspeed_config) | set(config.fsdp_config) <= options
    assert bool(config.deepspeed_config) == (config.distributed_type == "DEEPSPEED")
    assert bool(config.fsdp_config) == (config.distributed_type == "FSDP")
    # accelerate's DeepSpeed launcher is switched off by use_cpu, which would train unsharded.
    assert not (config.deepspeed_config and config.use_cpu)


def test_every_launch_file_has_its_line_on_the_page():
    page = (ROOT / "docs/launching.md").read_text()
    assert [name for name in LAUNCH if f"| `{Path(name).name}` |" not in page] == []


def test_orpos_chat_template_is_the_form_of_its_family():
    """Zephyr's: a role mark and the end token around every message; what is generated begins after a newline."""
    from jinja2 import Template

    template = Template((ROOT / "recipes/orpo/chat_template.jinja").read_text())
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    prompt = template.render(messages=chat[:1], eos_token="</s>", add_generation_prompt=True)
    assert prompt == "<|user|>\nHi?</s>\n<|assistant|>\n"
    whole = template.render(messages=chat, eos_token="</s>", add_generation_prompt=False)
    assert whole == prompt + "Ho.</s>"  # nothing after the end token


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "compare/tiny.yaml",
            r"compare: is a comparison, not a recipe of a run: alignment compare \S+tiny.yaml reads it",
        ),
        ("games/egpo.yaml", r"games: is of the tabular lab, .*: alignment games run \S+egpo.yaml reads it"),
        (
            "replications/p3o.yaml",
            r"arms: is a replication, .*: python evaluation/replication.py \S+p3o.yaml reads it",
        ),
        (
            "overoptimization/smollm2.yaml",
            r"pool: is an experiment, .*: python evaluation/overoptimization.py \S+ reads it",
        ),
        (
            "accelerate/ddp.yaml",
            r"compute_environment: is accelerate's launch file, .* --accelerate-config \S+ reads it",
        ),
    ],
)
def test_files_of_other_kinds_are_sent_to_what_reads_them(file, said):
    with pytest.raises(RecipeError, match=rf"{file}:\d+: {said}$") as failed:
        load_any(ROOT / "recipes" / file)
    assert len(failed.value.problems) == 1
