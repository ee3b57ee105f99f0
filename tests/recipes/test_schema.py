# ruff: noqa: E501  (a table of complete messages)
"""Strictness of the schema: each mistake is one line with file, line, key and remedy."""

import dataclasses
import types
import typing
import warnings

import pytest

from alignment.recipes import RecipeError, load_recipe
from alignment.recipes.training import OURS, TrainingSection
from alignment.recipes.trl_keys import ELSEWHERE, PASSED_THROUGH, REFUSED, SCHEDULER_NEEDS, LrScheduler


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_values_and_defaults(small):
    recipe = load_recipe(small())
    assert recipe.objective.name == "dpo"
    assert recipe.objective.hyperparameters == {"beta": 0.2, "label_smoothing": 0.0}
    assert recipe.training.learning_rate == 5e-7
    assert recipe.training.output_dir == "runs/r"
    assert recipe.model.dtype == "float32"
    assert recipe.lora is None and recipe.reward is None and recipe.evaluation is None and recipe.data.sample is None
    assert recipe.data.max_length == 1024
    assert str(recipe.path) == "r.yaml"
    assert str(recipe.origin("training.learning_rate")) == "r.yaml:10"


def test_derived_hyperparameters_are_filled_in(small):
    recipe = load_recipe(small("name: dpo\n  beta: 0.2", "name: inpo\n  eta: 0.3"))
    assert recipe.objective.hyperparameters == {"eta": 0.3, "tau": pytest.approx(0.1)}


ON_IPO = "name: spo\n  base: ipo\n  tau: 0.3"


def test_spo_has_its_base_s_hyperparameters(small):
    recipe = load_recipe(small("name: dpo\n  beta: 0.2", ON_IPO))
    own = {"base": "ipo", "gamma": 0.1, "degrees": 3, "responses": "both", "removal": "rake"}
    rest = {"head_learning_rate": 1e-3, "tau": 0.3, "normalization": "sum"}
    assert recipe.objective.hyperparameters == own | rest
    assert str(recipe.origin("objective.tau")) == "r.yaml:4"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("base=ip", ["objective.base: must be another objective, got 'ip'; did you mean 'ipo'?"]),
        ("base=spo", ["objective.base: must be another objective, got 'spo'"]),
        ("tau=-1", ["objective.tau: must be a number > 0, got -1"]),
        (
            "beta=0.1",
            ["objective.beta: objective 'spo' with base='ipo' has no hyper-parameter 'beta'; did you mean 'tau'?"],
        ),
    ],
)
def test_spo_s_problems_are_at_their_key(small, override, expected):
    found = problems(small("name: dpo\n  beta: 0.2", ON_IPO), f"objective.{override}")
    assert found == [f"command line: {line}" for line in expected]


LM_HEAD = (
    "r.yaml:7: lora.target_modules: lm_head cannot have an adapter: TRL takes log-probabilities from the head's own "
    "weight and refuses one there; name other modules"
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # unknown keys, one per section
        ("beta: 0.2", "betta: 0.2", "r.yaml:3: objective.betta: objective 'dpo' has no hyper-parameter 'betta'; did you mean 'beta'?"),
        ("name_or_path", "name_or_paht", None),
        ("train: pairs.jsonl", "train: pairs.jsonl\n  evall: x", "r.yaml:8: data.evall: unknown key; did you mean 'eval'?"),
        ("learning_rate", "learning_rat", "r.yaml:10: training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("data:", "generation:\n  topp: 1.0\ndata:", "r.yaml:7: generation.topp: unknown key; did you mean 'top_p'?"),
        ("data:", "lora:\n  rank: 8\ndata:", "r.yaml:7: lora.rank: unknown key; valid: alpha, r, target_modules"),
        ("data:", "lora:\n  dropout: 0.05\ndata:", "r.yaml:7: lora.dropout: not accepted: dropout is off in training: policy and reference must agree at step 0"),
        ("data:", "reward:\n  name: vader\n  patern: x\ndata:", "r.yaml:8: reward.patern: reward 'vader' has no key 'patern'; it takes none"),
        ("data:", "modle:\n  dtype: float32\ndata:", "r.yaml:6: modle: unknown key; did you mean 'model'?"),
        ("train: pairs.jsonl", "sample:\n    prompts: p.txt\n    limits: 3", "r.yaml:9: data.sample.limits: unknown key; did you mean 'limit'?"),
        # types
        ("5e-7", "fast", "r.yaml:10: training.learning_rate: expected a number, got 'fast'"),
        ("5e-7", "true", "r.yaml:10: training.learning_rate: expected a number, got true"),
        ("16", "true", "r.yaml:9: training.global_batch_size: expected a whole number, got true"),
        ("16", "16.0", "r.yaml:9: training.global_batch_size: expected a whole number, got 16.0"),
        ("16", "[16]", "r.yaml:9: training.global_batch_size: expected a whole number, got [16]"),
        ("some/model", "7", "r.yaml:5: model.name_or_path: expected text, got 7; put it in quotes"),
        ("5e-7", "5e-7\n  bf16: yes", "r.yaml:11: training.bf16: expected true or false, got 'yes'; write true"),
        ("5e-7", "5e-7\n  adam_beta1: x", "r.yaml:11: training.adam_beta1: expected a number, got 'x'"),
        ("5e-7", "5e-7\n  adam_beta1: 7", "r.yaml:11: training.adam_beta1: expected a number < 1, got 7"),
        ("5e-7", "5e-7\n  adam_beta2: -0.1", "r.yaml:11: training.adam_beta2: expected a number >= 0, got -0.1"),
        ("5e-7", "5e-7\n  adam_epsilon: -1", "r.yaml:11: training.adam_epsilon: expected a number >= 0, got -1"),
        ("5e-7", "5e-7\n  optim_args: foo", "r.yaml:11: training.optim_args: expected KEY=VALUE, KEY=VALUE …, got 'foo'"),
        ("5e-7", "5e-7\n  optim_args: a=1,", "r.yaml:11: training.optim_args: expected KEY=VALUE, KEY=VALUE …, got 'a=1,'"),
        ("5e-7", "5e-7\n  dataloader_num_workers: true", "r.yaml:11: training.dataloader_num_workers: expected a whole number, got True"),
        ("0.2", "soft", "r.yaml:3: objective.beta: must be a number > 0, got 'soft'"),
        ("model:\n  name_or_path: some/model", "model: gpt2", "r.yaml:4: model: expected a section with keys of its own, got 'gpt2'"),
        # ranges and choices
        ("0.2", "-1", "r.yaml:3: objective.beta: must be a number > 0, got -1"),
        ("5e-7", "0", "r.yaml:10: training.learning_rate: must be > 0, got 0"),
        ("5e-7", "5e-7\n  report_to: wanbd", "r.yaml:11: training.report_to: unknown reporter 'wanbd'; did you mean 'wandb'?"),
        ("5e-7", "5e-7\n  report_to: [wandb, none]", "r.yaml:11: training.report_to: 'none' stands alone, not in a list with others"),
        ("name: dpo", "name: dpoo", "r.yaml:2: objective.name: unknown objective 'dpoo'; did you mean 'dpo'?"),
        ("some/model", "some/model\n  dtype: bf16", "r.yaml:6: model.dtype: expected one of 'float32', 'bfloat16', 'float16'; got 'bf16'; did you mean 'bfloat16'?"),
        ("data:", "reward:\n  name: vadr\ndata:", "r.yaml:7: reward.name: unknown reward 'vadr'; did you mean 'vader'?"),
        ("data:", "reward:\n  name: regex\ndata:", "r.yaml:6: reward: key 'pattern' is missing; add it"),
        # rules that tie keys together
        ("train: pairs.jsonl", "max_length: 9", "r.yaml:6: data: nothing to train on: give train (preferences: a file or hub name), sample (draw them from the starting model) or prompts (on-policy)"),
        ("train: pairs.jsonl", "train: x\n  sample:\n    prompts: p.txt", "r.yaml:7: data.train: excludes data.sample; set the one that you do not want to null"),
        ("train: pairs.jsonl", "sample:\n    prompts: p.txt", "r.yaml:7: data.sample: needs a reward or oracle section: something has to choose between samples"),
        ("data:", "evaluation:\n  prompts: p.txt\ndata:", "r.yaml:6: evaluation: needs a reward or oracle section: something has to judge the responses"),
        ("5e-7", "5e-7\n  eval_strategy: steps", "r.yaml:11: training.eval_strategy: 'steps' needs data.eval"),
        ("5e-7", "5e-7\n  eval_on_start: true", "r.yaml:11: training.eval_on_start: true needs data.eval"),
        ("5e-7", "5e-7\n  load_best_model_at_end: true", "r.yaml:11: training.load_best_model_at_end: true needs data.eval"),
        ("5e-7", "5e-7\n  lr_scheduler_type: greedy", "r.yaml:11: training.lr_scheduler_type: 'greedy' needs data.eval"),
        ("5e-7", "5e-7\n  save_strategy: best", "r.yaml:11: training.save_strategy: 'best' needs metric_for_best_model, such as loss"),
        ("5e-7", "5e-7\n  save_strategy: best\n  metric_for_best_model: loss", "r.yaml:11: training.save_strategy: 'best' needs data.eval"),
        ("5e-7", "5e-7\n  lr_scheduler_type: warmup_stable_decay", "r.yaml:11: training.lr_scheduler_type: 'warmup_stable_decay' needs num_decay_steps in lr_scheduler_kwargs"),
        ("5e-7", "5e-7\n  lr_scheduler_type: cosine_with_min_lr\n  lr_scheduler_kwargs: {num_cycles: 1}", "r.yaml:11: training.lr_scheduler_type: 'cosine_with_min_lr' needs min_lr or min_lr_rate in lr_scheduler_kwargs"),
        ("some/model", "some/model\n  adapter: a\nlora:\n  r: 4", "r.yaml:7: lora: trains a fresh adapter, and model.adapter is trained on as it is: give one of them"),
        ("data:", "lora:\n  target_modules: lm_head\ndata:", LM_HEAD),
        ("data:", "lora:\n  target_modules: [q_proj, model.lm_head]\ndata:", LM_HEAD),
        ("data:", "lora:\n  target_modules: .*\ndata:", LM_HEAD),
        ("data:", "lora:\n  target_modules: .*(\ndata:", "r.yaml:7: lora.target_modules: '.*(' is not a valid expression: missing ), unterminated subpattern at position 2"),
        ("5e-7", "5e-7\n  bf16: true\n  fp16: true", "r.yaml:11: training.bf16: excludes fp16; set one of them to false"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(small, old, new, expected):
    found = problems(small(old, new))
    assert found[-1].count("\n") == 0
    if expected is None:  # the required key is missing as well
        assert found == [
            "r.yaml:4: model.name_or_path: required key is missing: Hub id, folder, FILE.gguf, or "
            "package://PACKAGE/FILE.gguf (a file in an installed package)",
            "r.yaml:5: model.name_or_paht: unknown key; did you mean 'name_or_path'?",
        ]
    else:
        assert found == [expected]


def test_sources_of_data_are_a_list_however_they_are_written(small):
    train = load_recipe(small()).data.train
    assert [(s.name, s.split, s.weight, s.limit, s.format, s.columns, s.ties) for s in train] == [
        ("pairs.jsonl", None, None, None, "auto", None, "drop")
    ]
    written = {
        "org/name": [("org/name", None)],
        "org/name:test[:10%]": [("org/name", "test[:10%]")],
        "hf://org/name": [("hf://org/name", None)],
        "{name: pairs.csv, split: train}": [("pairs.csv", "train")],
        "[pairs.csv, {name: b.json, split: x}, 'org/name:y']": [
            ("pairs.csv", None),
            ("b.json", "x"),
            ("org/name", "y"),
        ],
    }
    for text, wanted in written.items():
        for recipe in (load_recipe(small("pairs.jsonl", text)), load_recipe(small(), [f"data.train={text}"])):
            assert [(s.name, s.split) for s in recipe.data.train] == wanted
    recipe = load_recipe(small(), ["data.train={name: pairs.csv, ties: soft}", "data.eval=held_out.parquet"])
    assert recipe.data.train[0].ties == "soft" and recipe.data.eval[0].name == "held_out.parquet"
    assert recipe.data.overlap == "refuse" and recipe.data.max_rejected_share == 0.1


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{name: a.csv, splti: x}", "r.yaml:7: data.train.splti: unknown key; did you mean 'split'?"),
        ("\n    - b.csv\n    - name: a.csv\n      splti: x", "r.yaml:10: data.train.1.splti: unknown key; did you mean 'split'?"),
        ("{split: x}", "r.yaml:7: data.train.name: required key is missing: File (.json, .jsonl, both also .gz; .parquet, .csv), folder with one file per split, or hub name"),
        ("{name: a.csv, weight: 0}", "r.yaml:7: data.train.weight: must be > 0, got 0"),
        ("{name: a.csv, ties: sfot}", "r.yaml:7: data.train.ties: expected one of 'drop', 'soft'; got 'sfot'; did you mean 'soft'?"),
        ("{name: a.csv, columns: {chosn: a}}", "r.yaml:7: data.train.columns: 'chosn' is not one of our columns; did you mean 'chosen'?"),
        ("{name: a.csv, columns: {chosen: [a, b]}}", "r.yaml:7: data.train.columns: 'chosen' takes one column; only label may name several"),
        ("[{name: a.csv, weight: 1}, b.csv]", "r.yaml:7: data.train: give every source a weight, or none"),
        ("[]", "r.yaml:7: data.train: no source: give a file, a hub name, or a list of them"),
        ("7", "r.yaml:7: data.train: expected a list, got 7"),
    ],
)  # fmt: skip
def test_mistakes_in_a_source_are_at_their_key(small, written, expected):
    assert problems(small("pairs.jsonl", written)) == [expected]


def test_another_source_drops_the_old_ones_settings(small):
    path = small("pairs.jsonl", "{name: a.csv, ties: soft, columns: {chosen: good}}")
    same, other = (load_recipe(path, [f"data.train={text}"]).data.train[0] for text in ("{limit: 3}", "{name: b.csv}"))
    assert (same.name, same.ties, same.limit, same.columns) == ("a.csv", "soft", 3, {"chosen": "good"})
    assert (other.name, other.ties, other.limit, other.columns) == ("b.csv", "drop", None, None)
    assert load_recipe(path, ["data.train.ties=drop"]).data.train[0].ties == "drop"


def test_missing_section_and_key_name_the_place(small):
    assert problems(small("data:\n  train: pairs.jsonl\n", "")) == [
        "r.yaml: data: required section is missing: The preferences"
    ]
    assert problems(small("  global_batch_size: 16\n", ""))[0].startswith(
        "r.yaml:8: training.global_batch_size: required key is missing"
    )


def test_an_integer_does_for_a_number_and_keeps_its_meaning(small):
    recipe = load_recipe(small("5e-7", "1\n  num_train_epochs: 2\n  adam_epsilon: 1"))
    assert recipe.training.learning_rate == 1.0
    assert isinstance(recipe.training.num_train_epochs, float)


def test_all_problems_are_collected_in_the_order_of_lines_and_the_message_shows_the_first(small):
    path = small("beta: 0.2", "betta: 0.2\n  label_smoothing: 2\n  label_smoothing: 0")
    with open(path, "a") as file:
        file.write("  logging_step: 1\n  seed: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    keys = [problem.path[-1] for problem in caught.value.problems]
    assert keys == ["betta", "label_smoothing", "logging_step", "seed"]
    assert str(caught.value).startswith("r.yaml:3: objective.betta: ")
    assert str(caught.value).endswith(" (+3 more problems)")


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),  # PEFT would take the string for a pattern of the whole dotted name and find nothing
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (r".*self_attn\.(q|v)_proj", r".*self_attn\.(q|v)_proj"),
    ],
)
def test_names_and_patterns_of_adapted_modules(small, written, taken):
    recipe = load_recipe(small("data:", f"lora:\n  target_modules: {written}\ndata:"))
    assert recipe.lora is not None and recipe.lora.target_modules == taken


def test_held_out_pairs_are_evaluated_unless_that_is_declined(small):
    assert load_recipe(small()).training.eval_strategy == "no"
    given = ["data.eval=held.jsonl"]
    assert load_recipe("r.yaml", given).training.eval_strategy == "epoch"
    assert load_recipe("r.yaml", [*given, "training.eval_strategy=steps"]).training.eval_strategy == "steps"
    declined = [*given, "training.eval_strategy=no"]
    assert load_recipe("r.yaml", declined).training.eval_strategy == "no"
    assert problems("r.yaml", *declined, "training.lr_scheduler_type=greedy") == [
        "command line: training.lr_scheduler_type: 'greedy' needs training.eval_strategy steps or epoch"
    ]


def test_a_batch_need_not_be_a_multiple_of_what_fits_on_a_device(small):
    training = load_recipe(small("16", "12\n  per_device_train_batch_size: 8")).training
    assert (training.global_batch_size, training.per_device_train_batch_size) == (12, 8)


def test_what_changes_no_result_is_a_key_and_none_of_those_that_do():
    keys = TrainingSection.NO_EFFECT_ON_RESULT
    assert {key.partition(".")[0] for key in keys} <= {*TrainingSection.model_fields, *PASSED_THROUGH}
    decisive = {"learning_rate", "global_batch_size", "num_train_epochs", "max_steps", "seed", "data_seed", "optim"}
    decisive |= {"group_by_length", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16"}
    decisive |= {"eval_strategy", "eval_steps", "load_best_model_at_end", "save_only_model", "adam_beta1"}
    assert not keys & decisive


def test_no_and_strategies_mean_what_they_say(small):
    assert load_recipe(small("5e-7", "5e-7\n  save_strategy: no")).training.save_strategy == "no"


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_keys_give_their_reason(small, key):
    assert problems(small("5e-7", f"5e-7\n  {key}: 1")) == [f"r.yaml:11: training.{key}: not accepted: {REFUSED[key]}"]


def test_a_slip_in_a_refused_key_gives_the_reason_at_once(small):
    (found,) = problems(small("5e-7", "5e-7\n  gradient_acumulation_steps: 4"))
    assert "did you mean 'gradient_accumulation_steps'?" in found and "derived" in found


def test_reward_options_and_a_pattern_that_is_none(small):
    recipe = load_recipe(small("data:", "reward:\n  name: regex\n  pattern: good\ndata:"))
    assert recipe.reward is not None and recipe.reward.options == {"pattern": "good"}
    (found,) = problems(small("data:", "reward:\n  name: regex\n  pattern: '('\ndata:"))
    assert found.startswith("r.yaml:8: reward.pattern: '(' is not a valid expression")


def test_trl_arguments_are_accepted_by_dpo_config_and_hold_none_of_ours(small):
    arguments = load_recipe(small("5e-7", "5e-7\n  adam_beta2: 0.95\n  use_cpu: true")).training.trl_arguments()
    assert not set(arguments) & set(OURS)
    assert arguments["adam_beta2"] == 0.95
    from trl import DPOConfig

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # no name that the pinned version calls deprecated
        config = DPOConfig(**arguments)
    assert config.activation_checkpointing is config.gradient_checkpointing is False  # TRL's own default is True
    assert (config.learning_rate, config.bf16, config.logging_steps) == (5e-7, False, 5)
    assert config.gradient_accumulation_steps == 1


def test_every_field_of_trl_is_listed_once_with_its_type():
    """Goes red when TRL or transformers adds, drops or retypes an argument: sort it into one of the three places."""
    from trl import DPOConfig

    hints = typing.get_type_hints(DPOConfig)
    names = {field.name for field in dataclasses.fields(DPOConfig)}
    own = set(TrainingSection.model_fields) - set(OURS)
    assert not own & set(PASSED_THROUGH) and not own & set(REFUSED) and not set(PASSED_THROUGH) & set(REFUSED)
    assert names == own | set(PASSED_THROUGH) | (set(REFUSED) - set(ELSEWHERE))
    for name, kind in PASSED_THROUGH.items():
        if typing.get_origin(kind) is typing.Literal:
            continue  # narrower than TRL's `str` or enum; the values are checked below
        plain = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind  # narrower, too
        assert members(plain) <= members(hints[name]), name


def members(kind):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return set().union(*(members(part) for part in typing.get_args(kind)))
    return {dict if (typing.get_origin(kind) or kind) is dict else kind}


def test_choices_are_those_of_transformers():
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import trainer_log_levels

    def values(enum):
        return {member.value for member in enum}

    def choices(kind):
        return set(typing.get_args(kind))

    fields = TrainingSection.model_fields
    assert choices(LrScheduler) == values(SchedulerType)
    assert choices(fields["eval_strategy"].annotation) == values(IntervalStrategy)
    assert choices(fields["save_strategy"].annotation) == values(SaveStrategy)
    assert choices(PASSED_THROUGH["logging_strategy"]) == values(IntervalStrategy)
    assert choices(PASSED_THROUGH["log_level"]) == set(trainer_log_levels)


@pytest.mark.parametrize("name", typing.get_args(LrScheduler))
def test_schedules_are_built_exactly_with_the_settings_that_are_asked_for(name):
    import torch
    from transformers import get_scheduler

    def build(settings):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=settings)

    needed = SCHEDULER_NEEDS.get(name, ())
    if not needed:
        return build({})
    with pytest.raises((TypeError, ValueError)):
        build({})
    for key in needed:
        build({key: 0.5})


def test_defaults_said_to_be_trls_are_trls():
    from trl import DPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    for name, field in TrainingSection.model_fields.items():
        if "Default: TRL 1.16" in (field.description or ""):
            assert field.default == defaults[name], name
