"""Reward models from a recipe, end to end on the tiny model: TRL's series, members, constants, export, mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from alignment.errors import UserError
from alignment.files import write_json_lines
from alignment.models import load_tokenizer
from alignment.models.export import export
from alignment.models.reward_model import load_reward_model, settle_padding
from alignment.recipes import RecipeError, load_recipe, load_reward_model_recipe
from alignment.recipes.reward_model import REWARD_REFUSED, RewardTrainingSection
from alignment.recipes.trl_keys import PASSED_THROUGH
from alignment.rewards import get_oracle, get_reward
from alignment.rewards.losses import general_score, unit
from alignment.rewards.scored import _loaded
from alignment.runs.reward_model import train
from alignment.trainers.reward_model import init_head
from evaluation.held_out import write_held_out
from tests.e2e.test_modes import pairs, training_lines

RECIPE = "recipes/quickstart/reward_model.yaml"
ONE = ("reward_model.members=1", "reward_model.mode=independent", "reward_model.bootstrap=false")
WHOLE = (*ONE, "reward_model.freeze_trunk=false")


@pytest.fixture
def given(tiny: Path, tmp_path: Path):
    """`given(folder, *overrides)`: a recipe that trains on 24 rows, 16 held out."""
    write_json_lines(tmp_path / "rows.jsonl", pairs(0, 24))
    write_json_lines(tmp_path / "held_out.jsonl", pairs(24, 40))

    def make(folder: str, *more: str):
        settings = [
            f"model.name_or_path={tiny}",
            f"data.train={tmp_path / 'rows.jsonl'}",
            f"data.eval={tmp_path / 'held_out.jsonl'}",
            "training.use_cpu=true",
            "training.eval_strategy=no",
            "training.global_batch_size=4",
            "training.learning_rate=1e-3",
            "training.num_train_epochs=2",
            "training.logging_steps=1",
            f"training.output_dir={tmp_path / folder}",
        ]
        keys = [word.partition("=")[0] for word in more]
        last = {word.partition("=")[0]: word for word in more}.values()
        return load_reward_model_recipe(RECIPE, [s for s in settings if s.partition("=")[0] not in keys] + [*last])

    return make


def without_pad_token(model: Path, copy: Path) -> Path:
    """A copy whose tokenizer has no padding besides EOS; token 0 is an unused <|other|>."""
    shutil.copytree(model, copy)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (copy / name).write_text((copy / name).read_text().replace("<|pad|>", "<|other|>"))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    return copy


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "final" / "reward_model.json").read_text())


def test_the_series_is_trls_own(given, tiny, tmp_path):
    """The same rows, order, head and optimiser through TRL's RewardTrainer as it is, and its centring."""
    recipe = given("run", *WHOLE, "reward_model.center=0.01", "training.max_steps=5", "training.group_by_length=false")
    ours = [row["loss"] for row in training_lines(train(recipe))]
    tokenizer, model = load_tokenizer(tiny), load_reward_model(tiny, outputs=1, fresh_head=True)
    settle_padding(model, tokenizer)
    init_head(model, recipe.training.seed, 1)
    order = list(torch.randperm(24, generator=torch.Generator().manual_seed(42 * 1_000_003)).tolist())
    rows = [pairs(0, 24)[i] for i in order]
    data = Dataset.from_list(
        [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows]
    )
    args = RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        center_rewards_coefficient=0.01,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert ours == pytest.approx(theirs, abs=1e-4) and len(set(ours)) == 5


def test_it_learns_and_loads_as_a_plain_model(given, tmp_path):
    """Held-out accuracy far above chance, and scores that plain transformers gives to 1e-5."""
    run = train(given("run", *WHOLE, "training.num_train_epochs=6"))
    said = write_held_out(run)
    result = json.loads((run / "held_out.json").read_text())
    (one,) = result["members"]
    assert one["interval"][0] > 0.6 and result["pairs"] == 16 and "accuracy" in said[1]
    prompts = [row["prompt"] for row in pairs(24, 40)]
    texts = [row["chosen"] for row in pairs(24, 40)]
    reward = get_reward("model", path=str(run))
    scores = reward.score(prompts, texts)
    model = AutoModelForSequenceClassification.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        ids = tokenizer(prompt + text + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            assert float(model(ids).logits[0, 0]) == pytest.approx(score, abs=1e-5)
    standardised = get_reward("model", path=str(run), standardise=True).score(prompts, texts)
    mean, std = facts(run)["mean"][0], facts(run)["std"][0]
    assert standardised == pytest.approx([(s - mean) / std for s in scores], rel=1e-6)


def test_constants_are_mean_and_population_std_of_the_calibration_responses(given):
    run = train(given("run", *WHOLE, "reward_model.calibration=8"))
    rows = pairs(24, 40)[:4]
    reward = get_reward("model", path=str(run))
    scores = [reward.score([r["prompt"]], [r[side]])[0] for r in rows for side in ("chosen", "rejected")]
    found = facts(run)
    assert found["mean"] == pytest.approx([float(np.mean(scores))], abs=1e-5)
    assert found["std"] == pytest.approx([float(np.std(scores))], rel=1e-4)
    assert found["calibration"] == "8 responses of data.eval"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch(given, batch_size):
    run = train(given("run", *WHOLE, "training.max_steps=2"))
    prompts, texts = [r["prompt"] for r in pairs(0, 12)], [r["chosen"] for r in pairs(0, 12)]
    alone = [
        get_reward("model", path=str(run), batch_size=1).score([p], [t])[0]
        for p, t in zip(prompts, texts, strict=True)
    ]
    together = get_reward("model", path=str(run), batch_size=batch_size).score(prompts, texts)
    assert together == pytest.approx(alone, abs=1e-5) and len(set(alone)) > 6


def test_frozen_heads_on_cached_features_are_heads_on_the_model(given):
    """The trunk is saved as it came, and the saved model scores texts as training scored their features."""
    run = train(given("frozen", "reward_model.members=3", "reward_model.bootstrap=false"))
    model = load_reward_model(run / "final")
    start = load_reward_model(given("frozen").model.name_or_path, outputs=3, fresh_head=True)
    trunk, other = (dict(m.model.named_parameters()) for m in (model, start))
    assert all(torch.equal(trunk[name], other[name]) for name in trunk)
    tables = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    reward = get_reward("ensemble", path=str(run), normalise="none")
    rows = pairs(24, 40)
    scores = reward.member_scores([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    assert scores.shape == (3, 16)
    np.testing.assert_allclose(scores.T, [t["chosen"] for t in tables], atol=1e-5)
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_head_i_of_a_trunk_is_member_i_of_an_ensemble(given, tiny):
    """One batch a step on a frozen trunk, plain SGD, no clipping: k heads at once are k runs of one head."""
    settings = (
        "training.optim=sgd",
        "training.max_grad_norm=0",
        "training.global_batch_size=24",
        "training.max_steps=3",
    )
    heads = train(
        given(
            "heads", "reward_model.members=2", "reward_model.bootstrap=false", *settings, "training.learning_rate=0.2"
        )
    )
    second = int(hashlib.sha256(b"42 head 1").hexdigest()[8:16], 16)  # of the first 8 bytes the lower 4
    alone = train(given("alone", *ONE, f"training.seed={second}", *settings, "training.learning_rate=0.1"))
    both = load_reward_model(heads / "final").score.weight
    # The loss is the mean over heads: at twice the learning rate each head moves as one alone.
    torch.testing.assert_close(both[1:2], load_reward_model(alone / "final").score.weight, atol=1e-6, rtol=1e-5)


def test_heads_on_one_trunk_cost_one_model(tiny):
    """At most 1.3 times the operations of one head, counted on the tiny model, where heads weigh most."""
    work = []
    for outputs in (1, 5):
        model = load_reward_model(tiny, outputs=outputs, fresh_head=True)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(64).reshape(2, 32) + 5)
        work.append(counter.get_total_flops())
    assert work[0] < work[1] < 1.3 * work[0]


def test_members_are_resumed_one_by_one(given, tmp_path):
    """Members differ by their seed; a finished one is left as it is, one that is missing is trained, alike."""
    settings = (*WHOLE, "reward_model.members=3", "training.max_steps=3")
    run = train(given("run", *settings))
    scores = get_reward("ensemble", path=str(run), how="mean", normalise="member")
    prompts, texts = [r["prompt"] for r in pairs(24, 30)], [r["chosen"] for r in pairs(24, 30)]
    table = scores.member_scores(prompts, texts)
    assert table.shape == (3, 6) and len({tuple(row) for row in table.round(6)}) == 3
    mean, std = (np.array(c)[:, None] for c in scores.constants())
    np.testing.assert_allclose(scores.score(prompts, texts), ((table - mean) / std).mean(0), rtol=1e-6)
    worst = get_reward("ensemble", path=str(run), how="wco", normalise="none").score(prompts, texts)
    np.testing.assert_allclose(worst, table.min(0), rtol=1e-6)
    seeds = [json.loads((run / f"member-{i}" / "manifest.json").read_text())["seed"] for i in range(3)]
    sums = [hashlib.sha256(f"42 member {i}".encode()).hexdigest() for i in range(3)]
    assert seeds == [int(digest[8:16], 16) for digest in sums]  # of the first 8 bytes the lower 4
    before = (run / "member-1" / "final" / "model.safetensors").read_bytes()
    written = (run / "member-0" / "final" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(run / "member-1")
    train(given("run", *settings), resume=True)
    assert (run / "member-1" / "final" / "model.safetensors").read_bytes() == before
    assert (run / "member-0" / "final" / "model.safetensors").stat().st_mtime_ns == written
    assert len(write_held_out(run)) == 1 + 3 + 4
    named = get_reward("ensemble", members=[str(run / f"member-{i}") for i in (2, 0)], normalise="none")
    np.testing.assert_allclose(named.member_scores(prompts, texts), table[[2, 0]], atol=1e-6)


def test_a_finished_member_of_another_recipe_or_other_rows_is_not_counted_as_done(given, tmp_path):
    settings = (*WHOLE, "reward_model.members=2", "training.max_steps=1")
    run = train(given("run", *settings))
    shutil.rmtree(run / "member-1")
    with pytest.raises(UserError, match="training.learning_rate is 0.5 but .*member-0 began with 0.001"):
        train(given("run", *settings, "training.learning_rate=0.5"), resume=True)
    write_json_lines(tmp_path / "rows.jsonl", pairs(0, 20))
    with pytest.raises(UserError, match="the rows are not those .*member-0 began with"):
        train(given("run", *settings), resume=True)
    assert not (run / "member-1").exists()


def test_a_member_that_stopped_before_its_first_checkpoint_starts_afresh(given):
    settings = (*WHOLE, "reward_model.members=2", "training.max_steps=2")
    run = train(given("run", *settings))
    before = (run / "member-1" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "member-1" / "final")
    train(given("run", *settings), resume=True)
    assert sorted(path.name for path in run.glob("member-*")) == ["member-0", "member-1"]
    assert (run / "member-1" / "final" / "model.safetensors").read_bytes() == before


def test_frozen_heads_do_not_go_on_over_another_trunk(given, tiny, tmp_path):
    """The same name, rows and recipe, other weights."""
    shutil.copytree(tiny, tmp_path / "base")
    settings = (f"model.name_or_path={tmp_path / 'base'}", "training.save_strategy=steps", "training.save_steps=1")
    run = train(given("run", *settings, "training.max_steps=2"))
    shutil.rmtree(run / "final")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights of the trunk model are not those"):
        train(given("run", *settings, "training.max_steps=2"), resume=True)


def test_a_general_model_is_an_oracle(given):
    run = train(
        given("run", *WHOLE, "reward_model.loss=general", "reward_model.planes=2", "training.num_train_epochs=6")
    )
    oracle = get_oracle("general", path=str(run))
    rows = pairs(24, 40)
    prompts = [r["prompt"] for r in rows]
    first, second = [r["chosen"] for r in rows], [r["rejected"] for r in rows]
    p, q = oracle.probability(prompts, first, second), oracle.probability(prompts, second, first)
    assert all(a + b == 1 for a, b in zip(p, q, strict=True)) and np.mean(np.array(p) > 0.5) > 0.8
    assert oracle.probability(prompts[:1], first[:1], first[:1]) == [0.5]
    # From plain transformers: embedding of both, gate from the prompt alone.
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run / "final"), load_tokenizer(run / "final")
    texts = [prompts[0] + t + tokenizer.eos_token for t in (first[0], second[0])]
    with torch.no_grad():
        v, w, x = (model(tokenizer(t, return_tensors="pt").input_ids).logits[0] for t in (*texts, prompts[0]))
    s = float(general_score(unit(v[:4]), unit(w[:4]), x[4:].softmax(0)))
    assert p[0] == pytest.approx(1 / (1 + np.exp(-s / 0.1)), abs=1e-4)
    table = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert table[0]["chosen"][0] == pytest.approx(s, abs=1e-5) and table[0]["rejected"] == [0.0]


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
def test_export(given, tmp_path, lora):
    run = train(given("run", *WHOLE, *lora))
    prompts, texts = [r["prompt"] for r in pairs(0, 6)], [r["chosen"] for r in pairs(0, 6)]
    before = get_reward("model", path=str(run)).score(prompts, texts)
    said = export(run, tmp_path / "out")
    assert ("adapter merged" in said[0]) == bool(lora)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, text, score in zip(prompts, texts, before, strict=True):
        ids = tokenizer(prompt + text + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            assert float(model(ids).logits[0, 0]) == pytest.approx(score, abs=1e-5)
    assert get_reward("model", path=str(tmp_path / "out"), standardise=True).score(prompts, texts)
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()


def test_noise_margins_and_bootstrap_reach_the_loss(given):
    """Flipping every label teaches the opposite; a margin raises the first loss; bootstrap heads part ways."""
    flipped = train(given("flipped", *WHOLE, "data.label_noise=1", "training.num_train_epochs=6"))
    (one,) = (json.loads((flipped / "held_out.json").read_text()) if write_held_out(flipped) else {})["members"]
    assert one["interval"][1] < 0.4
    plain = training_lines(train(given("plain", *WHOLE, "training.max_steps=1")))[0]["loss"]
    margin = training_lines(train(given("margin", *WHOLE, "training.max_steps=1", "reward_model.margin=rewards")))
    assert margin[0]["loss"] > plain + 0.5
    runs = [
        train(given(f"b{b}", "reward_model.members=2", f"reward_model.bootstrap={b}", "training.learning_rate=0.05"))
        for b in ("false", "true")
    ]
    gaps = []
    for run in runs:
        weight = load_reward_model(run / "final").score.weight
        gaps.append(float((weight[0] - weight[1]).norm()))
    assert gaps[1] != pytest.approx(gaps[0], rel=1e-3)


def test_trl_takes_a_reward_as_it_is(given):
    run = train(given("run", *WHOLE, "training.max_steps=1"))
    reward = get_reward("model", path=str(run))
    texts = [r["chosen"] for r in pairs(0, 3)]
    prompts = [r["prompt"] for r in pairs(0, 3)]
    assert reward(prompts=prompts, completions=texts, trainer_state=None) == reward.score(prompts, texts)
    assert reward.__name__ == "model"


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_a_language_model_is_no_reward_model(tiny):
    with pytest.raises(UserError, match="not a reward model: it has no score.weight"):
        get_reward("model", path=str(tiny)).score(["a"], ["b"])
    for kind, name, keys, where in (
        ("reward", "model", {"path": "/no/such/folder"}, "reward.path"),
        ("reward", "ensemble", {"path": "/no/such/folder"}, "reward.path"),
        ("reward", "ensemble", {"members": ["/no/such/folder"]}, "reward.members"),
        ("oracle", "general", {"path": "/no/such/folder"}, "oracle.path"),
    ):
        with pytest.raises(UserError, match=f"^{where}: cannot load '/no/such/folder'"):
            if kind == "reward":
                get_reward(name, **keys).score(["a"], ["b"])
            else:
                get_oracle(name, **keys).probability(["a"], ["b"], ["c"])


def test_a_prompt_that_leaves_no_room_has_no_score(given):
    """All its responses would be the same tokens: NaN, not one score for all. One token of room is enough."""
    run = train(given("run", *WHOLE, "training.max_steps=1"))
    general = train(given("general", *WHOLE, "reward_model.loss=general", "training.max_steps=1"))
    prompt, texts = pairs(0, 1)[0]["prompt"], [" kind .", " cold .", " bright and nice ."]
    tokens = len(load_tokenizer(run / "final")(prompt).input_ids)
    for limit, scored in ((tokens, False), (tokens + 1, True)):
        for folder in (run, general):
            file = folder / "final" / "reward_model.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"max_length": limit}))
        _loaded.cache_clear()
        judges = [get_reward("model", path=str(run)), get_reward("ensemble", members=[str(run)], normalise="none")]
        found = [judge.score([prompt] * 3, texts) for judge in judges]
        found.append(get_oracle("general", path=str(general)).probability([prompt] * 2, texts[:2], texts[1:]))
        assert [all(map(math.isfinite, values)) for values in found] == [scored] * 3
        if scored:
            assert len(set(found[0])) == 3
        else:
            assert all(math.isnan(v) for values in found for v in values)


def test_a_classifier_is_no_ensemble(given, tiny, tmp_path):
    """Two labels of which nothing says that they are members' scores."""
    run = train(given("heads", "reward_model.members=2", "training.max_steps=1"))
    shutil.copytree(run / "final", tmp_path / "classifier")
    assert get_reward("ensemble", path=str(tmp_path / "classifier")).score(["a"], [" b"])
    (tmp_path / "classifier" / "reward_model.json").unlink()
    _loaded.cache_clear()
    for normalise in ("none", "member"):
        with pytest.raises(UserError, match="has 2 labels and no reward_model.json"):
            get_reward("ensemble", path=str(tmp_path / "classifier"), normalise=normalise).score(["a"], [" b"])


def test_wrong_number_of_labels_is_one_line(given):
    run = train(given("heads", "reward_model.members=2"))
    with pytest.raises(UserError, match="has 2 labels, and a reward has one"):
        get_reward("model", path=str(run)).score(["a"], ["b"])
    with pytest.raises(UserError, match="the head has 2 labels, and 3 are needed"):
        load_reward_model(run / "final", outputs=3)
    general = train(given("general", *WHOLE, "reward_model.loss=general", "training.max_steps=1"))
    with pytest.raises(UserError, match="oracle general"):
        get_reward("model", path=str(general)).score(["a"], ["b"])
    with pytest.raises(UserError, match="is a reward model"):
        get_oracle("general", path=str(run)).probability(["a"], ["b"], ["c"])


def test_padding_that_is_eos_is_not_taken(given, tiny, tmp_path):
    """No pad token besides EOS: one line; an unused one by name: taken, and kept with the model."""
    place = f"model.name_or_path={without_pad_token(tiny, tmp_path / 'padless')}"
    with pytest.raises(UserError, match="a pad token besides EOS is needed.*reward_model.pad_token"):
        train(given("run", *WHOLE, place))
    run = train(given("run", *WHOLE, place, "reward_model.pad_token='<|other|>'", "training.max_steps=1"))
    assert AutoTokenizer.from_pretrained(run / "final").pad_token == "<|other|>"
    assert load_reward_model(run / "final").config.pad_token_id == 0


def test_a_judge_without_pad_token_is_mended_in_its_own_folder(given, tiny, tmp_path):
    """Somebody else's reward model: the remedy that the message names is one."""
    run = train(given("run", *WHOLE, "training.max_steps=1"))
    theirs = without_pad_token(run / "final", tmp_path / "theirs")
    expected = get_reward("model", path=str(run)).score(["my dog is"], [" kind ."])
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    with pytest.raises(UserError, match="reward.path: a pad token besides EOS .*set pad_token_id in config.json of"):
        get_reward("model", path=str(theirs)).score(["my dog is"], [" kind ."])
    (theirs / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    assert get_reward("model", path=str(theirs)).score(["my dog is"], [" kind ."]) == pytest.approx(expected)


@pytest.mark.parametrize("value", [None, "nan"])
def test_constants_that_are_no_numbers_are_one_line(given, value):
    run = train(given("run", *WHOLE, "training.max_steps=1"))
    file = run / "final" / "reward_model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mean": [float(value) if value else None]}))
    _loaded.cache_clear()
    with pytest.raises(UserError, match="mean and std must be finite numbers"):
        get_reward("model", path=str(run), standardise=True).score(["a"], ["b"])


def test_missing_constants_are_one_line(given, tiny, tmp_path):
    run = train(given("run", *WHOLE, "training.max_steps=1"))
    (run / "final" / "reward_model.json").unlink()
    with pytest.raises(UserError, match="has no stored mean and std"):
        get_reward("model", path=str(run), standardise=True).score(["a"], ["b"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward_model.planes=4", "belongs to loss general"),
        ("reward_model.tie_margin=1", "belongs to loss win_tie"),
        ("reward_model.loss=hinge", "expected one of"),
        ("reward_model.mode=independent", "bootstrap: belongs to mode shared_trunk"),
        ("lora.r=4", "excludes lora"),
        ("data.sample.prompts=x.txt", "draws preferences"),
        ("training.beta=0.1", "belongs to preference training"),
        ("training.center_rewards_coefficient=0.1", "write reward_model.center"),
        ("objective.name=dpo", "unknown key"),
    ],
)
def test_recipe_mistakes(override, message):
    with pytest.raises(RecipeError, match=message):
        load_reward_model_recipe(RECIPE, [override])


def test_each_kind_of_recipe_names_its_program():
    with pytest.raises(RecipeError, match="is a reward model: run python scripts/train_reward_model.py"):
        load_recipe(RECIPE)
    with pytest.raises(RecipeError, match="is preference training: run python scripts/train.py"):
        load_reward_model_recipe("recipes/quickstart/dpo.yaml")


def test_missing_margin_column_is_one_line(given, tmp_path):
    with pytest.raises(UserError, match="reward_model.margin: 'margin' needs column 'margin'"):
        train(given("run", *WHOLE, "reward_model.margin=margin"))
    assert not (tmp_path / "run").exists()


def test_every_field_of_trls_reward_config_is_listed_once():
    names = {field.name for field in dataclasses.fields(RewardConfig)}
    own = set(RewardTrainingSection.model_fields) - set(RewardTrainingSection.ours)
    assert not own & set(PASSED_THROUGH) and not (own | set(PASSED_THROUGH)) & set(REWARD_REFUSED)
    assert own | set(PASSED_THROUGH) <= names
    assert names <= own | set(PASSED_THROUGH) | set(REWARD_REFUSED)
