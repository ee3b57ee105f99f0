"""The rules of a comparison without training: plans, budgets, equivalences, and refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from alignment.errors import UserError, run_or_exit
from alignment.files import write_json, write_json_lines, write_text
from alignment.objectives import get_objective, list_objectives
from alignment.objectives.batch import PairLogps
from alignment.recipes import IterateRecipe, Recipe, RecipeError
from evaluation.compare import runs
from evaluation.compare.equivalence import RULES, describe_equal, loss_of, same_up_to_tuning
from evaluation.compare.plan import arms_of, grid, left_out_of_all, read_all_prompts, run_of, tuning_runs, updates
from evaluation.compare.recipe import load_compare_recipe
from evaluation.compare.results import best_of
from evaluation.compare.runs import facts_of, refuse_other_start, refuse_unequal
from tests.evaluation.comparing import TINY, loaded

# --- the plan --------------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_plans(root, monkeypatch):
    monkeypatch.chdir(root)
    tiny = load_compare_recipe("recipes/compare/tiny.yaml")
    labels = [arm.label for arm in arms_of(tiny)]
    divergences = {f"f_dpo-{name}" for name in ("jsd", "forward_kl", "alpha")}
    assert {"dpo", "ipo", "rpo", "spo", "vpo", "inpo", "simpo"} | divergences <= set(labels)
    assert tiny.compare.seeds >= 3 and tiny.model.name_or_path == "runs/compare-tiny/grammar/model"
    small = load_compare_recipe("recipes/compare/smollm2.yaml")
    assert len(arms_of(small)) <= 3 and small.compare.seeds == 1
    assert len(read_all_prompts(small).test) == 128 and updates(small, False) == 24
    for recipe in (tiny, small):
        for arm in arms_of(recipe):
            for value in arm.points:
                run_of(recipe, arm, value, 0, 24)


def test_every_arm_has_as_many_points_inside_its_range(files):
    for tune in (1, 2, 3, 4):
        recipe = loaded(files, f"compare.tune={tune}", "compare.objectives=all")
        arms = arms_of(recipe)
        assert {len(set(arm.points)) for arm in arms} == {tune}
        assert len(list(tuning_runs(recipe, arms, 10))) == tune * len(arms) * recipe.compare.seeds
        for arm in arms:
            for value in arm.points:
                arm.objective(value)  # refuses a value outside its range


def test_grid_by_hand():
    assert grid(0.1, 3, 10, {}) == [0.01, 0.1, 1.0]
    assert grid(0.1, 2, 4, {}) == [0.05, 0.2]
    assert grid(0.1, 1, 4, {}) == [0.1]
    assert grid(0.5, 3, 4, {"le": 0.5}) == [0.125, 0.25, 0.5]  # clipped, with as many points
    assert grid(0.25, 3, 4, {"lt": 0.5})[-1] == pytest.approx(0.4995)


def test_all_means_what_the_judge_can_feed(files):
    under_reward = {arm.name for arm in arms_of(loaded(files, "compare.objectives=all"))}
    oracle = "oracle={name: bradley_terry, reward: {name: length}}"
    under_oracle = {arm.name for arm in arms_of(loaded(files, "compare.objectives=all", "reward=null", oracle))}
    offline = {card.name for card in list_objectives() if card.batch == "pairs" and card.name != "squared_hinge"}
    assert under_reward >= offline - {"sppo", "gpo"} and not under_reward & {"sppo", "gpo"}
    assert under_oracle >= {"sppo", "gpo", "inpo"} and "reward_aware_rpo" not in under_oracle


def test_all_leaves_out_what_would_not_have_the_same_budget_and_says_so(files):
    whole = loaded(files, "compare.objectives=all")
    cosine = loaded(files, "compare.objectives=all", "training.lr_scheduler_type=cosine")
    data = [one for one in files if not one.startswith("data.sample")] + ["data={train: a.jsonl, sample: null}"]
    given = loaded(data, "compare.objectives=all")
    names = {arm.label for arm in arms_of(whole)}
    assert left_out_of_all(whole) is None and {"inpo", "vpo"} <= names
    assert {arm.label for arm in arms_of(cosine)} == names - {"inpo"}
    assert {arm.label for arm in arms_of(given)} == names - {"inpo", "vpo", "reward_aware_rpo"}
    assert "inpo" in left_out_of_all(cosine) and "lr_scheduler_type" in left_out_of_all(cosine)
    said = left_out_of_all(given)  # sppo and gpo are not: no reward can feed them
    assert said.startswith("left out of all: inpo, reward_aware_rpo, vpo (data.train: given pairs are not")
    assert left_out_of_all(loaded(files, "training.lr_scheduler_type=cosine", "compare.objectives=[dpo]")) is None


def test_beta_is_tuned_where_there_is_one(files):
    arms = arms_of(loaded(files, "compare.objectives=[dpo, spo, simpo, ipo, {name: spo, over: gamma, label: other}]"))
    assert [arm.over for arm in arms] == ["beta", "beta", "beta", "tau", "gamma"]


def test_vpo_is_calibrated_on_samples_unless_it_says_otherwise(files):
    objectives = "compare.objectives=[dpo, vpo, {name: vpo, calibration: chosen, label: v2}]"
    given, chosen = arms_of(loaded(files, objectives))[1:]
    assert given.objective(0.1).calibration == "given" and "calibration" in given.objective(0.1).needs
    assert chosen.objective(0.1).calibration == "chosen"
    assert describe_equal(given.name, given.at(0.1)) is None
    assert describe_equal(chosen.name, chosen.at(0.1)) == "= rpo (beta=0.1)"


def test_budget_of_offline_and_iterative_runs_is_the_same(files):
    recipe = loaded(files, "training.num_train_epochs=2")
    arms = {arm.label: arm for arm in arms_of(recipe)}
    steps = updates(recipe, True)
    assert steps == 4 and updates(recipe, False) == 5  # 20 pairs, 2 epochs, batch 8: 5; a multiple of 2 iterations: 4
    offline = run_of(recipe, arms["dpo"], 0.1, 2, steps).recipe
    online = run_of(recipe, arms["inpo"], 0.1, 2, steps).recipe
    assert isinstance(offline, Recipe) and isinstance(online, IterateRecipe)
    assert online.iterate.iterations == 2 and online.training.max_steps * 2 == offline.training.max_steps == steps
    assert online.iterate.samples == offline.data.sample.samples_per_prompt
    (prompts,) = online.data.prompts
    assert (prompts.name, prompts.limit) == (offline.data.sample.prompts, offline.data.sample.limit)
    same = {"output_dir", "max_steps"}
    assert offline.training.model_dump(exclude=same) == online.training.model_dump(exclude=same)
    assert offline.generation == online.generation and offline.reward == online.reward
    assert offline.reference.precompute and online.reference == "fixed"
    other = run_of(recipe, arms["simpo"], 2.0, 2, steps).recipe
    assert not other.reference.precompute  # it reads none
    assert (other.data, other.generation, other.model) == (offline.data, offline.generation, offline.model)
    later = run_of(recipe, arms["dpo"], 0.1, 3, steps).recipe
    assert later.generation.seed == offline.generation.seed + 1 and later.training.seed == offline.training.seed + 1
    noisy = loaded(files, "data.sample.min_gap=0.5", "data.sample.label_noise=0.25")
    settings = run_of(noisy, arms["inpo"], 0.1, 0, steps).recipe.iterate
    assert (settings.min_gap, settings.label_noise, settings.unfinished) == (0.5, 0.25, "keep")


def test_sppo_learns_from_samples_of_the_latest_policy(files):
    judged = [
        "reward=null",
        "oracle={name: bradley_terry, reward: {name: length}}",
        "compare.objectives=[dpo, sppo, gpo]",
    ]
    recipe = loaded(files, *judged)
    for arm in arms_of(recipe)[1:]:
        run = run_of(recipe, arm, 1.0, 0, 10)
        assert isinstance(run.recipe, IterateRecipe) and run.recipe.reference == "previous"


def test_tau_follows_eta_where_it_is_not_given(files):
    arm = arms_of(loaded(files, "compare.objectives=[dpo, {name: inpo, eta: 0.3}]"))[1]
    assert [arm.objective(value).tau for value in arm.points] == pytest.approx([0.1 / 3, 0.1, 0.3], rel=1e-3)


def test_the_best_point_and_ties():
    rows = [{"value": v, "win_rate": w, "kl": 0.0} for v, w in ((1.0, 0.7), (2.0, 0.7), (3.0, 0.6))]
    assert best_of(rows) == 2.0  # of equals the one in the middle
    assert best_of(rows[::2]) == 1.0
    unjudged = [{"value": 0.5, "win_rate": float("nan"), "kl": 0.0}, {"value": 0.6, "win_rate": None, "kl": 0.0}]
    assert best_of([*unjudged, *rows[2:]]) == 3.0  # what could not be judged is never the best


# --- fairness after the runs -----------------------------------------------------------------------------------------


def test_runs_of_other_pairs_or_other_budgets_are_no_comparison(files, tmp_path):
    recipe = loaded(files)
    dpo, other = arms_of(recipe)[:2]
    found = []
    for arm, chosen in ((dpo, [5]), (other, [6])):
        run = run_of(recipe, arm, 0.1, 0, 4)
        write_json(run.folder / "manifest.json", {"steps": 4, "wall_seconds": {"training": 1.5}})
        write_json_lines(
            run.folder / "preferences.jsonl", [{"prompt_ids": [1, 2], "chosen_ids": chosen, "rejected_ids": [3, 4]}]
        )
        found.append((run, facts_of(run)))
    assert found[0][1]["training_seconds"] is None  # a run without cost.json was gone on with
    write_json(found[0][0].folder / "cost.json", {"seconds": 2.5, "peak_memory": 0})
    assert facts_of(found[0][0])["training_seconds"] == 1.5 and facts_of(found[0][0])["seconds"] == 2.5
    assert found[0][1]["trained_tokens"] == 4 * 8 * (2 + 1 + 2 + 2) and found[0][1]["seconds"] is None
    with pytest.raises(UserError, match="trained on different pairs"):
        refuse_unequal(found)
    refuse_unequal([found[0], found[0]])
    with pytest.raises(UserError, match="started from different weights"):
        refuse_unequal([(found[0][0], found[0][1] | {"start_sha256": digest}) for digest in ("a", "b")])
    with pytest.raises(UserError, match="differ in steps .*: 4, .*: 5"):
        refuse_unequal([found[0], (found[0][0], found[0][1] | {"steps": 5})])


# --- equivalences ----------------------------------------------------------------------------------------------------


def test_equivalence_map():
    assert describe_equal("robust", {"beta": 0.2, "label_smoothing": 0.0}) == "= dpo (beta=0.2)"
    assert describe_equal("f_dpo", {"beta": 0.1, "divergence": "reverse_kl"}) == "= dpo (beta=0.1)"
    assert describe_equal("rpo", {"eta": 0.0, "beta": 0.1}) == "= dpo (beta=0.1)"
    assert describe_equal("spo", {"gamma": 0.0, "beta": 0.3}) == "= dpo (beta=0.3)"
    assert describe_equal("inpo", {"eta": 0.1}) == "first iteration = ipo (tau=0.1)"
    assert describe_equal("vpo", {"alpha": 0.05, "beta": 0.1}) == "= rpo (beta=0.1, eta=0.05)"
    for name in ("dpo", "ipo", "simpo", "orpo"):
        assert describe_equal(name, {}) is None
    assert describe_equal("robust", {"label_smoothing": 0.1}) is None
    assert loss_of("dpo", {"label_smoothing": 0.1}) != loss_of("robust", {"label_smoothing": 0.0})


def test_one_method_that_is_tuned_twice():
    def losses(name, values, **fixed):
        return [loss_of(name, {**fixed, "beta": value}) for value in values]

    dpo = losses("dpo", (0.03, 0.1, 0.3))
    twin = losses("f_dpo", (0.1, 0.3, 0.9), divergence="reverse_kl")
    assert same_up_to_tuning(twin, dpo) and same_up_to_tuning(dpo, dpo)
    assert same_up_to_tuning(losses("robust", (1.0, 3.0), label_smoothing=0.0), dpo)
    assert not same_up_to_tuning(losses("f_dpo", (0.1, 0.3), divergence="jsd"), dpo)
    assert not same_up_to_tuning(losses("dpo", (0.03, 0.1, 0.3), label_smoothing=0.1), dpo)  # cDPO: another method
    # One point each: nothing was tuned, and two betas are two settings to be compared.
    assert not same_up_to_tuning(dpo[:1], dpo[1:2]) and same_up_to_tuning(dpo[:1], dpo[:1])
    tau = [loss_of("inpo", {"eta": value}) for value in (0.1, 0.3)]  # tau follows eta
    assert same_up_to_tuning(tau, tau[::-1]) and not same_up_to_tuning(tau, dpo)


def test_inpo_with_tau_at_eta_is_ipo_in_every_iteration():
    """The previous iterate has weight 1 - tau/eta: two of them give ipo's loss, and with a smaller tau they do not."""
    given = [torch.tensor([value, -value]) for value in (1.0, 2.0, 0.5, 0.25)]
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    columns = dict(zip(names, given, strict=True))

    def inpo(tau, previous):
        more = {"prev_chosen": torch.full((2,), previous), "prev_rejected": torch.zeros(2)}
        return get_objective("inpo", eta=0.1, tau=tau).loss(PairLogps(**columns, **more))

    ipo = get_objective("ipo", tau=0.1).loss(PairLogps(**columns))
    for previous in (-3.0, 7.0):
        torch.testing.assert_close(inpo(0.1, previous), ipo)
        assert not torch.allclose(inpo(0.05, previous), ipo)
    assert describe_equal("inpo", {"eta": 0.1, "tau": 0.1}) == "every iteration = ipo (tau=0.1)"
    assert describe_equal("inpo", {"eta": 0.1, "tau": 0.05}) == "first iteration = ipo (tau=0.1)"


def test_a_run_that_is_gone_on_with_has_no_cost(files, monkeypatch):
    """Its earlier time is not known. (That going on gives the same run is test_compare's and the trainers' matter.)"""
    recipe = loaded(files)
    first, second = (run_of(recipe, arm, 0.1, 0, 4) for arm in arms_of(recipe)[:2])
    write_json(second.folder / "checkpoint-2" / "files.json", {})
    asked: list[list[str]] = []

    class Done:
        exitcode = 0

        def __init__(self, target: object, args: tuple[list[str]]) -> None:
            asked.append(args[0][1:])

        def start(self) -> None: ...

        def join(self) -> None: ...

    context = SimpleNamespace(set_forkserver_preload=lambda names: None, Process=Done)
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: context)
    runs.carry_out([first, second], recipe.folder, "training")
    assert asked == [[], ["--resume"]]
    assert (first.folder / "cost.json").is_file() and not (second.folder / "cost.json").exists()


def test_every_rule_holds_for_the_losses_up_to_a_constant():
    generator = torch.Generator().manual_seed(0)
    columns = {
        name: -10 * torch.rand(16, generator=generator, dtype=torch.float64)
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    }
    before, after = PairLogps(**columns), PairLogps(**columns | {"chosen": columns["chosen"] - 1})
    later = PairLogps(**columns | {"rejected": columns["rejected"] + 2})
    for name, holding, other, keys, fixed in RULES:
        one = get_objective(name, **holding)
        two = get_objective(other, **{theirs: one.hyperparameters[key] for key, theirs in keys.items()}, **fixed)
        for moved in (after, later):
            change = one.loss(moved) - one.loss(before)
            assert torch.allclose(change, two.loss(moved) - two.loss(before)), name


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compare.objectives=[dpo, dpoo]", r"compare.objectives.1.name: unknown objective 'dpoo'; did you mean 'dpo'"),
        ("compare.objectives=[dpo, {name: ipo, beta: 1}]", r"compare.objectives.1.beta: .*no hyper-parameter 'beta'"),
        ("compare.objectives=[dpo, {name: ipo, tau: -1}]", r"compare.objectives.1.tau: .*must be a number > 0"),
        ("compare.objectives=[dpo, dpo]", r"compare.objectives.1: 'dpo' is there twice"),
        ("compare.objectives=[ipo, rpo]", r"compare.baseline: 'dpo' is none of ipo, rpo; name one of them$"),
        ("compare.objectives=[dpo, p3o]", r"'p3o' samples while it trains"),
        ("compare.objectives=[dpo, {name: ipo, over: beta}]", r"over: 'beta' is no number of ipo; it has tau"),
        ("compare.objectives=[dpo, {name: ipo, label: a/b}]", r"label 'a/b': letters, digits"),
        ("compare.objectives=[dpo, sppo]", r"compare.objectives.1: sppo: .*oracle"),
        ("compare.objectives=3", r"compare.objectives: expected all, or a list of objectives, got 3"),
        ("compare.sedes=3", r"compare.sedes: unknown key; did you mean 'seeds'"),
        ("compare.seeds=0", r"compare.seeds: must be >= 1, got 0"),
        ("compare.tuning_seeds=6", r"compare.tuning_seeds: 6, and compare.seeds is 5"),
        ("compare.tuning_seeds=0", r"compare.tuning_seeds: expected a whole number from 1 on, or seeds"),
        ("compare.tuning_seeds=all", r"compare.tuning_seeds: expected a whole number from 1 on, or seeds"),
        ("compare.validation=null", r"compare.tune: 3 values need compare.validation"),
        ("training.learnin_rate=1", r"training.learnin_rate: unknown key; did you mean 'learning_rate'"),
        ("objective={name: dpo}", r"objective: unknown key"),
        ("reward=null", r"compare: needs a reward or oracle section"),
        ("compare.baseline=dop", r"compare.baseline: 'dop' is none of dpo, .*; did you mean 'dpo'"),
        ("compare.tuning_factor=1e300", r"compare.tuning_factor: must be <= 100"),
        (
            "compare.objectives=[dpo, {name: inpo, eta: 0.1, tau: 0.1}]",
            r"1: inpo at the tuning point eta-0.03333: .*tau",
        ),
        ("data={train: a.jsonl, sample: null}", r"data.train: inpo samples again: given pairs are not its policy's"),
        ("data={prompts: a.txt, sample: null}", r"data.prompts: not in a comparison: give data.sample"),
        ("data.sample.pairs_per_prompt=4", r"data.sample.pairs_per_prompt: inpo samples again: it trains on one pair"),
        ("training.lr_scheduler_type=cosine", r"training.lr_scheduler_type: inpo samples again: the schedule would"),
        ("training.warmup_steps=0.1", r"training.warmup_steps: inpo samples again: the schedule would"),
        ("generation.temperature=0.5", r"generation.temperature: 0.5: samples have to be the policies' own"),
        ("generation.top_k=5", r"generation.top_k: 5: samples have to be the policies' own"),
    ],
)
def test_mistakes_are_one_line_with_their_place(files, override, said):
    key = override.partition("=")[0]
    kept = [one for one in files if not f"{one.partition('=')[0]}.".startswith(f"{key}.")]
    with pytest.raises(RecipeError, match=said) as failed:
        recipe = load_compare_recipe(TINY, [*kept, override])
        for arm in arms_of(recipe):
            run_of(recipe, arm, arm.points[0], 0, 4)
    assert "\n" not in str(failed.value)


def test_a_mistake_in_the_file_has_its_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TINY.read_text().replace("  tune: 3 ", "  tunes: 3"))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), start=1) if "tunes: 3" in text)
    with pytest.raises(RecipeError, match=rf"mine.yaml:{line}: compare.tunes: unknown key; did you mean 'tune'"):
        load_compare_recipe(file)


def test_an_objective_of_ones_own_lies_beside_the_recipe(files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from alignment.objectives import Card, Objective, hyper, register\n"
        "@register\nclass Mine(Objective):\n"
        "    card = Card('mine', 'Mine', 'none', 'none', '(1 - beta m)^2')\n"
        "    beta: float = hyper('scale', default=0.2, gt=0)\n"
        "    def pair_loss(self, batch):\n        return (1 - self.beta * batch.margin) ** 2\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {TINY}\ncompare: {{objectives: [dpo, {{name: mine, file: mine.py}}]}}\n")
    loaded = load_compare_recipe(recipe, files)
    arm = arms_of(loaded)[1]
    assert arm.file == str(tmp_path / "mine.py") and arm.points[1] == 0.2
    assert run_of(loaded, arm, 0.2, 0, 4).recipe.objective.file == arm.file


def test_prompts_that_stand_in_two_sets_are_refused(files, tmp_path):
    (tmp_path / "test.txt").write_text("fresh\nvalidation   prompt 3\n")
    with pytest.raises(RecipeError, match=r"compare.validation: 'validation prompt 3' stands in evaluation.prompts"):
        read_all_prompts(loaded(files))
    (tmp_path / "test.txt").write_text("train prompt 7\n")
    with pytest.raises(RecipeError, match=r"evaluation.prompts: 'train prompt 7' stands in data.sample.prompts, too"):
        read_all_prompts(loaded(files))
    assert len(read_all_prompts(loaded(files, "data.sample.limit=5")).test) == 1


def test_another_start_or_other_prompts_are_refused(files, tmp_path):
    """Runs that were kept began with them: new ones would be compared with runs of another start."""
    model, out = tmp_path / "model", tmp_path / "out"
    for name in ("model.safetensors", "tokenizer.json", "README.md"):
        write_text(model / name, name)
    recipe = loaded(files)
    refuse_other_start(recipe)
    write_text(model / "vocab.json", "forgotten at first")
    refuse_other_start(recipe)  # no run had begun
    (out / "runs").mkdir()
    began = (out / "begun.json").read_text()
    for free in ("README.md", ".DS_Store"):
        write_text(model / free, "other words")
    refuse_other_start(recipe)
    write_text(model / "model.safetensors", "trained on")
    with pytest.raises(UserError, match=r"^model.name_or_path: model.safetensors is not what the runs in .*out began"):
        refuse_other_start(recipe)
    write_text(model / "model.safetensors", "model.safetensors")
    write_text(model / "chat_template.jinja", "new")
    with pytest.raises(UserError, match=r"^model.name_or_path: chat_template.jinja is not what"):
        refuse_other_start(recipe)
    (model / "chat_template.jinja").unlink()
    write_text(tmp_path / "train.txt", "another prompt\n")
    with pytest.raises(UserError, match=r"^data.sample.prompts is not what the runs in"):
        refuse_other_start(recipe)
    assert (out / "begun.json").read_text() == began


def test_what_a_start_consists_of(files, tmp_path, monkeypatch):
    """An adapter brings its base; a file of weights is one; a home is looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text(tmp_path / "base" / "model.safetensors", "base")
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "~/base"})
    write_text(tmp_path / "weights.gguf", "weights")
    for name, found in (
        ("~/adapter", ["base of model.name_or_path: model.safetensors", "model.name_or_path: adapter_config.json"]),
        (str(tmp_path / "weights.gguf"), ["model.name_or_path: weights.gguf"]),
        ("org/of-the-hub", []),
    ):
        out = tmp_path / "out" / name.strip("/~")
        kept = [one for one in files if not one.startswith(("model.", "training."))]
        refuse_other_start(loaded(kept, f"model.name_or_path={name}", f"training.output_dir={out}"))
        assert sorted(json.loads((out / "begun.json").read_text())) == sorted(["data.sample.prompts", *found])
    write_json(tmp_path / "lora" / "base" / "adapter_config.json", {"base_model_name_or_path": "~/base"})
    write_text(tmp_path / "lora" / "base" / "model.safetensors", "the adapter's, in a folder of the base's name")
    out = tmp_path / "out" / "both"
    given = [f"model.name_or_path={tmp_path / 'base'}", f"model.adapter={tmp_path / 'lora' / 'base'}"]
    refuse_other_start(loaded(kept, *given, f"training.output_dir={out}"))
    digests = json.loads((out / "begun.json").read_text())
    assert digests["model.adapter: model.safetensors"] != digests["base of model.adapter: model.safetensors"]
    assert digests["base of model.adapter: model.safetensors"] == digests["model.name_or_path: model.safetensors"]


def test_steps_that_iterations_cannot_share(files):
    with pytest.raises(RecipeError, match="training.max_steps: makes 5 steps, to be shared out evenly over 2"):
        updates(loaded(files, "training.max_steps=5"), True)
    assert updates(loaded(files, "training.max_steps=6"), True) == 6
    with pytest.raises(RecipeError, match="num_train_epochs: makes 0 steps"):
        updates(loaded(files, "training.num_train_epochs=0.5"), True)


def test_the_command_ends_with_one_line_and_code_2(files, tmp_path, capsys):
    from alignment.cli import app

    def command(*words):
        with pytest.raises(SystemExit) as ended:
            named = {word.partition("=")[0] for word in words}
            kept = [one for one in files if one.partition("=")[0] not in named]
            run_or_exit(lambda: app(["compare", str(TINY), *kept, *words]))
        return ended.value.code, capsys.readouterr().err

    code, said = command("compare.seeds=0")
    assert code == 2 and said.count("\n") == 1 and said.startswith("error: command line: compare.seeds")
    write_json(tmp_path / "out" / "manifest.json", json.loads("{}"))
    code, said = command()
    assert code == 2 and said.count("\n") == 1 and "is a run; give another folder" in said
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = command(f"training.output_dir={place}")
        assert code == 2 and said.count("\n") == 1 and f"{place}: cannot be made" in said
    for mistake in ("evaluation.prompts=none.txt", "training.max_steps=5"):  # known before anything is written
        code, said = command(f"training.output_dir={tmp_path / 'new'}", mistake)
        assert code == 2 and said.count("\n") == 1 and not (tmp_path / "new").exists()
