"""SPO's head and copies in the trainer: what is read where, what is trained, what is saved, and what gamma = 0 is."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.data.preferences import NUMBER_COLUMNS
from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.objectives import get_objective
from alignment.trainers.degree import FILE, DegreeHead, cut_copies, length_limits
from tests import tiny_lm
from tests.trainers.building import LORA, config, logged, preferences, trainer_for

NUMBERS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")


def rows(tiny, n: int = 24, seed: int = 0, words: tuple[int, int] = (2, 4)) -> Dataset:
    """Pairs of token ids, with end tokens: kind adjectives chosen, harsh ones rejected."""
    tokenizer, rng = load_tokenizer(tiny), random.Random(seed)

    def ids(vocabulary: list[str]) -> list[int]:
        text = " " + " and ".join(rng.sample(vocabulary, k=rng.randint(*words))) + " ."
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    found = []
    for opening in rng.sample(tiny_lm.openings(), n):
        row = {"prompt": opening, "prompt_ids": tokenizer(opening)["input_ids"]}
        for name, vocabulary in (("chosen", tiny_lm.KIND), ("rejected", tiny_lm.HARSH)):
            row |= {f"{name}_ids": ids(vocabulary)}
            row[name] = tokenizer.decode(row[f"{name}_ids"])
        found.append(row)
    return Dataset.from_list(found)


def built(tiny, folder, objective=None, **more):
    objective = objective or get_objective("spo")
    return trainer_for(tiny, folder, objective, train_dataset=more.pop("train_dataset", None) or rows(tiny), **more)


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", ["both", "rejected"])
@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
def test_logits_are_those_of_one_plain_pass_per_copy(tiny, tmp_path, layout, responses):
    """The hidden state behind the last norm, at the token before the copy's last one."""
    data = Dataset.from_list([*rows(tiny, 3), *rows(tiny, 1, words=(1, 1))])  # the last one has no copies
    objective = get_objective("spo", degrees=3, responses=responses)
    trainer = built(tiny, tmp_path, objective, train_dataset=data, layout=layout)
    with torch.no_grad():
        for parameter in trainer.head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    batch = trainer.collator(list(trainer.train_dataset))
    with torch.no_grad():
        found = trainer.pair_logps(trainer.model, batch)
        plain = trainer._score(trainer.model, batch)
    torch.testing.assert_close(torch.stack([found.chosen, found.rejected], 1), plain, rtol=1e-5, atol=1e-5)
    k = 6 if responses == "both" else 3
    assert found.degree_labels.tolist() == [[0, 1, 2] * (k // 3)] * 3 + [[-1] * k]
    model = load_model(tiny)
    for i, row in enumerate(trainer.train_dataset.select(range(3))):
        assert row["degree_ids"][-3] == row["rejected_ids"]
        for j, copy in enumerate(row["degree_ids"]):
            states = model(input_ids=torch.tensor([[*row["prompt_ids"], *copy[:-1]]]), output_hidden_states=True)
            expected = states.hidden_states[-1][0, -1] @ trainer.head.weight.T + trainer.head.bias
            torch.testing.assert_close(found.degree_logits[i, j], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_computes_in_float32_under_autocast(dtype):
    """Whatever its weights and what it reads are kept in: bfloat16 logits would be off by up to 1 in 256."""
    head = DegreeHead(64, 3, torch.device("cpu"), dtype)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=made)
    hidden = torch.randn(5, 2, 64, generator=made).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    expected = hidden.double() @ head.weight.detach().double().T + head.bias.detach().double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_neither_lm_head_nor_reference_is_run_on_copies(tiny, tmp_path):
    trainer = built(tiny, tmp_path)
    batch = trainer.collator([trainer.train_dataset[i] for i in range(4)])
    seen = {"head": [], "policy": [], "reference": []}
    trainer.model.lm_head.register_forward_hook(lambda m, args, out: seen["head"].append(args[0].shape[1]))
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.model.embed_tokens.register_forward_hook(
            lambda m, args, out, name=name: seen[name].append(args[0].shape[1])
        )
    trainer.pair_logps(trainer.model, batch)
    examples = [trainer.train_dataset[i] for i in range(4)]
    responses = max(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    plain = max(len(e["prompt_ids"]) - 1 + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    everything = max(len(e["prompt_ids"]) - 1 + sum(map(len, e["degree_ids"])) for e in examples)
    assert seen == {"head": [responses], "policy": [everything], "reference": [plain]}


def test_degree_loss_starts_at_log_n_and_reaches_head_then_model(tiny, tmp_path):
    """Zero weights: log 3 on top of the base's log 2, and no gradient to the model. Classes are balanced: the bias's
    gradient, 1/3 - 1/3, is 0 too; the weights' is not."""
    trainer = built(tiny, tmp_path, get_objective("spo", gamma=2.0))
    batch = trainer.collator([trainer.train_dataset[i] for i in range(4)])
    found = trainer.pair_logps(trainer.model, batch)
    losses = trainer.objective.loss(found)
    assert losses.tolist() == pytest.approx([math.log(2) + 2 * math.log(3)] * 4, abs=1e-5)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    degree = (losses - get_objective("dpo").loss(found)).mean()
    inner, bias, outer = torch.autograd.grad(degree, [weight, trainer.head.bias, trainer.head.weight])
    assert float(inner.abs().max()) == 0 and float(bias.abs().max()) < 1e-6 and float(outer.abs().max()) > 1e-3
    with torch.no_grad():
        trainer.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = trainer.pair_logps(trainer.model, batch)
    degree = (trainer.objective.loss(found) - get_objective("dpo").loss(found)).mean()
    assert float(torch.autograd.grad(degree, [weight])[0].abs().max()) > 1e-5


def example(prompt: list[int], *blocks: list[list[int]]) -> dict:
    copies = [ids for block in blocks for ids in block]
    return {"prompt_ids": prompt, "degree_ids": copies, "degree_labels": [0, 1, 2] * len(blocks)}


def test_copies_are_cut_as_responses_are_and_only_alike():
    whole, long = [[1, 2, 3, 9], [1, 3, 9], [3, 9]], [[1, 2, 3, 4, 5, 9], [1, 3, 4, 5, 9], [1, 3, 9]]
    assert cut_copies(example([7, 7], whole, long), None, 2)[1] == [0, 1, 2, 0, 1, 2]
    # Four tokens are left: of `long` two copies are cut and one is not, so they end differently.
    cut, labels = cut_copies(example([7, 7], whole, long), 6, 2)
    assert labels == [0, 1, 2, -1, -1, -1] and cut[3] == [1, 2, 3, 4]
    # Two are left: everything is cut, but `1 3` comes twice.
    assert cut_copies(example([7, 7], long), 4, 1) == ([[1, 2], [1, 3], [1, 3]], [-1, -1, -1])
    # Without a prompt a single token has nothing in front of it that could predict it.
    assert cut_copies(example([], [[1, 2, 9], [1, 9], [9]]), None, 1)[1] == [-1, -1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_length_baseline_is_the_best_of_all_limits(seed):
    rng = random.Random(seed)
    labels = [rng.randrange(3) for _ in range(30)]
    lengths = [rng.randint(4, 9) - 2 * label + 2 for label in labels]

    def right(limits) -> int:
        return sum(sum(limit >= n for limit in limits) == label for n, label in zip(lengths, labels, strict=True))

    found = length_limits(lengths, labels, 3)
    assert found == sorted(found, reverse=True) and len(found) == 2
    every = itertools.product(range(0, 14), repeat=2)
    assert right(found) == max(right(pair) for pair in every if pair[0] >= pair[1])
    assert length_limits([], [], 3) == [0, 0]


@pytest.fixture
def warnings_of_transformers(caplog):
    """What transformers logs, which it keeps from pytest by default."""
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"layout": "paired"}, {"peft_config": LORA}], ids=["full", "paired", "lora"])
def test_gamma_zero_is_the_base(tiny, tmp_path, more):
    def run(objective):
        args = config(tmp_path, learning_rate=1e-3)
        torch.manual_seed(0)  # the adapter's start
        trainer = built(tiny, tmp_path, objective, args=args, **more)
        trainer.train()
        weights = {k: v.detach().clone() for k, v in trainer.model.named_parameters() if "degree_head" not in k}
        return [logged(trainer, name) for name in NUMBERS], weights

    series, weights = run(get_objective("spo", gamma=0.0, beta=0.3))
    expected, plain = run(get_objective("dpo", beta=0.3))
    assert series == [pytest.approx(values, rel=1e-6, abs=2e-5) for values in expected]
    assert max(float((weights[k] - plain[k]).abs().max()) for k in plain) < 1e-5
    assert len(expected[0]) == 5 and expected[0][-1] < math.log(2)


def test_layouts_accumulation_and_checkpointing_change_nothing(tiny, tmp_path):
    def run(**more):
        settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 8} | more.pop("args", {})
        trainer = built(tiny, tmp_path, get_objective("spo", gamma=1.0), args=config(tmp_path, **settings), **more)
        trainer.train()
        return [logged(trainer, name) for name in (*NUMBERS, "degree/loss")]

    plain = run()
    assert plain[4][0] == pytest.approx(math.log(3), abs=1e-6) and plain[4][-1] < 1.09
    for other in (
        {"layout": "paired"},
        {"args": {"gradient_checkpointing": True}},
        {"args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}},
    ):
        assert run(**other) == [pytest.approx(values, rel=1e-4, abs=1e-4) for values in plain]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_head_has_its_own_learning_rate_and_schedule_scale(tiny, tmp_path, lora):
    args = config(tmp_path, weight_decay=0.1, lr_scheduler_type="linear", max_steps=4, learning_rate=1e-5)
    objective = get_objective("spo", head_learning_rate=0.02)
    trainer = built(tiny, tmp_path, objective, args=args, peft_config=LORA if lora else None)
    trainer.create_optimizer_and_scheduler(4)
    *others, group = trainer.optimizer.param_groups
    assert group["lr"] == 0.02 and group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.head.parameters()]
    assert all(g["lr"] == 1e-5 for g in others)
    ours = {id(p) for p in trainer.head.parameters()}
    grouped = [id(p) for g in others for p in g["params"]]
    assert not ours & set(grouped)
    assert sorted(grouped) == sorted(
        id(p) for p in trainer.model.parameters() if p.requires_grad and id(p) not in ours
    )
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert group["lr"] == pytest.approx(0.015) and others[0]["lr"] == pytest.approx(0.75e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_head_is_saved_beside_the_model_and_resuming_is_exact(tiny, tmp_path, lora, warnings_of_transformers):
    def run(folder: str, checkpoint=None):
        args = config(tmp_path / folder, max_steps=6, learning_rate=1e-3, save_strategy="steps", save_steps=3)
        torch.manual_seed(0)
        objective = get_objective("spo", gamma=1.0)
        trainer = built(tiny, tmp_path, objective, args=args, peft_config=LORA if lora else None)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}

    through, weights = run("through")
    checkpoint = tmp_path / "through" / "checkpoint-3"
    said = warnings_of_transformers
    said.clear()
    resumed, same = run("again", str(checkpoint))
    assert "missing keys" not in said.text and "unexpected keys" not in said.text
    for name in ("loss", "degree/loss", "degree/accuracy"):
        assert logged(resumed, name) == logged(through, name)
    assert weights.keys() == same.keys() and all(torch.equal(weights[k], same[k]) for k in weights)
    assert float(weights["degree_head.weight"].abs().max()) > 0

    through.save_model(str(tmp_path / "final"))
    kept = load_file(tmp_path / "final" / FILE)
    assert torch.equal(kept["weight"], weights["degree_head.weight"]) and set(kept) == {"weight", "bias"}
    assert not torch.equal(kept["weight"], load_file(checkpoint / FILE)["weight"])
    for folder in (checkpoint, tmp_path / "final"):
        tensors = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        assert not [name for name in tensors if "degree" in name]
    if lora:
        base = load_model(tiny)
        said.clear()
        PeftModel.from_pretrained(base, tmp_path / "final")
        assert not said.records
    else:
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_resuming_without_the_heads_file_is_refused(tiny, tmp_path):
    args = config(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    built(tiny, tmp_path, args=args).train()
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(UserError, match=f"{FILE}: no such file"):
        built(tiny, tmp_path, args=config(tmp_path, max_steps=4)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_best_model_at_the_end_brings_its_head(tiny, tmp_path):
    args = config(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,  # so that the first of the two is the best
        learning_rate=1e-3,
    )
    trainer = built(tiny, tmp_path, args=args, eval_dataset=rows(tiny, 8, seed=1))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert torch.equal(trainer.head.weight, load_file(tmp_path / "checkpoint-2" / FILE)["weight"])


def test_other_objectives_have_no_head_and_no_copies(tiny, tmp_path):
    trainer = built(tiny, tmp_path, get_objective("dpo"))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert trainer.head is None and not (tmp_path / "final" / FILE).exists()
    assert "degree_ids" not in trainer.train_dataset.column_names
    assert not [name for name in trainer.state.log_history[0] if name.startswith("degree")]


def test_batches_without_a_copy_train_on(tiny, tmp_path):
    """One adjective has no phrases to grade: those steps have the base's loss and no degree metrics."""
    data = Dataset.from_list([*rows(tiny, 2), *rows(tiny, 14, words=(1, 1))])
    args = config(tmp_path, per_device_train_batch_size=2, max_steps=8, num_train_epochs=1)
    trainer = built(tiny, tmp_path, args=args, train_dataset=data)
    trainer.train()
    assert len(logged(trainer)) == 8 and 1 <= len(logged(trainer, "degree/loss")) <= 2
    assert logged(trainer, "degree/pairs").count(0.0) >= 6
    assert trainer.copy_facts["responses"] == 32 and trainer.copy_facts["with_copies"] == 4
    with pytest.raises(UserError, match="no response has the 2 key phrases"):
        built(tiny, tmp_path, train_dataset=rows(tiny, 4, words=(1, 1)))


def test_text_and_chat_rows_get_copies_too(tiny, tmp_path):
    for chat in (False, True):
        trainer = built(tiny, tmp_path, train_dataset=preferences(16, chat=chat))
        labels = [label for row in trainer.train_dataset for label in row["degree_labels"]]
        assert labels.count(0) == labels.count(1) == labels.count(2) > 8
        for row in trainer.train_dataset:
            own = [row["chosen_ids"]] * 3 + [row["rejected_ids"]] * 3
            for copy, response, label in zip(row["degree_ids"], own, row["degree_labels"], strict=True):
                assert label < 0 or copy[-1] == response[-1]
                assert label != 0 or copy == response
    assert not set(NUMBER_COLUMNS) & set(trainer.train_dataset.column_names)


# --- what the head learns -----------------------------------------------------------------------------------------


def averaging(model):
    """A trunk that adds up what it reads: every position attends to all before it alike, and nothing else is added."""
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            if i:
                layer.self_attn.o_proj.weight.zero_()
    return model


def test_frozen_model_and_head_count_marker_tokens(tiny, tmp_path):
    """Degree k has 6 - 3k markers among fillers, lengths alike: linear in the mean of what was read."""
    tokenizer, rng = load_tokenizer(tiny), random.Random(0)
    marker, *fillers = (tokenizer(f" {w}")["input_ids"][-1] for w in ["cruel", "kind", "warm", "good", "nice"])
    end = [*tokenizer(" .")["input_ids"], tokenizer.eos_token_id]

    def marked(k: int) -> list[int]:
        body = [marker] * (6 - 3 * k) + rng.choices(fillers, k=3 * k)
        rng.shuffle(body)
        return [*body, *end]

    def pairs(n: int) -> Dataset:
        found = []
        for _ in range(n):
            copies = [[marked(k) for k in range(3)] for _ in range(2)]
            ids = {"chosen_ids": copies[0][0], "rejected_ids": copies[1][0], "degree_ids": [*copies[0], *copies[1]]}
            texts = {"prompt": "a", "chosen": "b", "rejected": "c", "degree_labels": [0, 1, 2] * 2}
            found.append(texts | {"prompt_ids": tokenizer("my dog is")["input_ids"]} | ids)
        return Dataset.from_list(found)

    args = config(tmp_path, max_steps=40, learning_rate=0.0, per_device_train_batch_size=16, logging_strategy="no")
    trainer = built(
        tiny,
        tmp_path,
        get_objective("spo", head_learning_rate=0.3),
        model=averaging(load_model(tiny)),
        args=args,
        train_dataset=pairs(128),
        eval_dataset=pairs(64),
    )
    trainer.train()
    frozen = averaging(load_model(tiny)).state_dict()
    assert all(torch.equal(value, frozen[k]) for k, value in trainer.model.state_dict().items() if k in frozen)
    found = trainer.evaluate()
    assert found["eval_degree/accuracy"] > 0.99, found
    assert found["eval_degree/length_baseline"] == pytest.approx(1 / 3)
