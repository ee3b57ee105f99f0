"""From which distribution responses are drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from alignment.models import load_model
from alignment.trainers import drawing
from alignment.trainers.drawing import GeometricMixture, Sampler
from alignment.trainers.online import OnlinePreferenceTrainer
from tests import tiny_lm
from tests.trainers.building import LORA, logged
from tests.trainers.building_online import (
    OPENINGS,
    VPO,
    Kindness,
    Length,
    Preference,
    online,
    samples,
    scrambled,
    token_logps,
)
from tests.trainers.test_scoring import make


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("share", "absolute"), [(0.0, False), (0.3, False), (1.0, False), (0.3, True)])
def test_the_mixture_is_the_normalised_geometric_mean(tiny, tokenizer, share, cached, absolute):
    """At every token of left-padded prompts, against plain forward passes of both models without padding or cache;
    also where positions are counted from the left (gpt2), which padding would shift."""
    policy, reference = scrambled(tiny, 0.05), load_model(str(tiny))
    prompts = [tokenizer(p).input_ids for p in ("my dog", "the garden seems kind and", "book")]
    if absolute:
        policy, reference, prompts = make("gpt2"), make("gpt2"), [[5, 9], [4, 8, 15, 16, 23, 42], [7]]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter *= 0.7
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    torch.manual_seed(0)
    drawn = policy.generate(
        input_ids=torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        logits_processor=[GeometricMixture(reference, [len(p) for p in prompts], share)],
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        use_cache=cached,
        output_scores=True,
        return_dict_in_generate=True,
    )
    compared = 0
    for row, prompt in enumerate(prompts):
        for t, scores in enumerate(drawn.scores):
            before = drawn.sequences[row, width : width + t].tolist()
            if tokenizer.eos_token_id in before:
                break
            with torch.no_grad():
                both = [
                    m(input_ids=torch.tensor([prompt + before])).logits[0, -1].double() for m in (policy, reference)
                ]
            p, q = (logits.softmax(-1) for logits in both)
            mixed = p ** (1 - share) * q**share
            gap = (scores[row].double().softmax(-1) - mixed / mixed.sum()).abs().max()
            assert float(gap) < 1e-5
            assert 0 < share < 1 or float((p - q).abs().max()) > 1e-2
            compared += 1
    assert compared > 8


def per_token(model, trainer: OnlinePreferenceTrainer, drawn: list[list[list[int]]]) -> float:
    """Mean log-probability of a token of the responses."""
    ids = trainer.columns["prompt_ids"]
    with torch.no_grad():
        found = [token_logps(model, ids[i], r) for i, group in enumerate(drawn) for r in group]
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("adapter", [False, True])
def test_each_source_is_drawn_from_itself(tiny, tmp_path, adapter):
    """Where the policy babbles and the reference speaks the grammar, one sees who spoke. After each draw the trainer
    generates from the policy again."""
    grammar = load_model(str(tiny))
    if adapter:  # the policy is the base with an adapter that makes it babble; the reference the base
        trainer = online(tiny, tmp_path, "vpo", {"calibration": True}, VPO, reward=Kindness(), peft_config=LORA)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora" in name:
                    parameter.copy_(0.7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    else:
        given = {"reward": Kindness(), "ref_model": grammar, "start_is_reference": False}
        trainer = online(tiny, tmp_path, "vpo", {"calibration": True}, VPO, model=scrambled(tiny), **given)
    trainer.model.train()
    prompts, found = trainer.columns["prompt_ids"], {}
    with drawing._seeded(trainer.accelerator.device, 3):
        for name, how in {
            "policy": {},
            "reference": {"source": "reference"},
            "no share": {"source": "mixture", "share": 0.0},
            "mixture": {"source": "mixture", "share": 1.0},
            "policy again": {},
        }.items():
            found[name] = per_token(load_model(str(tiny)), trainer, trainer._draw(prompts, 4, Sampler(), **how))
    assert min(found["reference"], found["mixture"]) > -1.5 and abs(found["reference"] - found["mixture"]) < 0.4
    assert max(found["policy"], found["no share"], found["policy again"]) < -3


def test_calibration_responses_are_the_references(tiny, tokenizer, tmp_path):
    """Those that training uses, and what is recorded of them: ref_calibration, by a plain forward."""
    grammar = load_model(str(tiny))
    how = {"calibration": True}
    given = {"reward": Length(), "ref_model": grammar, "start_is_reference": False}
    trainer = online(tiny, tmp_path, "vpo", how, VPO, model=scrambled(tiny), args={"max_steps": 2}, **given)
    trainer.train()
    found = samples(tmp_path)
    said = [r["opponent_text"] for r in found]
    grammatical = {*tiny_lm.KIND, *tiny_lm.HARSH, "and", "."}
    assert sum(set(t.split()) <= grammatical for t in said) > 0.7 * len(said)
    assert not any(set(t.split()) <= grammatical for r in found for t in r["texts"] if len(t.split()) > 2)
    for row in found:
        prompt = tokenizer(OPENINGS[row["row"]]).input_ids
        plainly = float(token_logps(grammar, prompt, row["opponent"]).sum())
        assert row["numbers"]["ref_calibration"] == pytest.approx(plainly, abs=1e-3)


def next_token(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """Probabilities by the definition of temperature, the k likeliest, and the smallest set that holds top_p."""
    found = (logits / sampler.temperature).softmax(-1)
    ordered, total, kept = found.argsort(descending=True).tolist(), 0.0, set()
    for place, token in enumerate(ordered):
        if total >= sampler.top_p or (sampler.top_k and place >= sampler.top_k):
            break
        kept.add(token)
        total += float(found[token])
    found = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(found.tolist())])
    return found / found.sum()


def test_samplers_change_the_distribution_of_y_and_leave_the_opponent_alone(tiny, tokenizer, tmp_path):
    greedy = []
    for prompt in (tokenizer(o).input_ids for o in OPENINGS[:4]):
        ids: list[int] = []
        while len(ids) < 8 and tokenizer.eos_token_id not in ids:
            with torch.no_grad():
                ids.append(int(load_model(str(tiny))(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        greedy.append(ids)
    trainer = online(tiny, tmp_path, "egpo", {"opponent": 0.0}, oracle=Preference())
    trainer.model.train()
    prompts = trainer.columns["prompt_ids"][:4]

    before = trainer.generation_config, trainer.generation_kwargs, trainer.num_generations

    def drawn(sampler: Sampler, *seed: int, n: int = 16) -> list[list[list[int]]]:
        with trainer._seeded(*seed):
            return trainer._draw(prompts, n, sampler)

    assert [group == [ids] * 16 for group, ids in zip(drawn(Sampler(top_k=1), 0, 0), greedy, strict=True)] == [
        True
    ] * 4
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double()
    for sampler in (Sampler(), Sampler(3.0, top_k=20), Sampler(0.2), Sampler(top_p=0.4), Sampler(top_k=3)):
        expected, n = next_token(logits, sampler), 2000
        with trainer._seeded(0, 0):
            counts = Counter(ids[0] for ids in trainer._draw(prompts[:1], n, sampler)[0])
        assert set(counts) <= set(expected.nonzero().flatten().tolist())
        found = torch.tensor([counts[token] / n for token in range(len(expected))])
        off = float((found - expected).abs().sum()) / 2
        assert off < 0.06
        if not sampler.plain:  # nearer to its own distribution than to the policy's
            assert 2 * off < float((found - next_token(logits, Sampler())).abs().sum()) / 2
    assert (trainer.generation_config, trainer.generation_kwargs, trainer.num_generations) == before
    # What a stage draws depends on (rollout, phase) and is repeated; nothing else's random numbers move.
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = drawn(Sampler(), 4, 0)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    assert drawn(Sampler(), 4, 0) == one
    assert drawn(Sampler(), 4, 1) != one and drawn(Sampler(), 5, 0) != one
    # In small batches, too, every prompt gets its own responses, up to its first end token.
    trainer.draw_batch = 3
    parts = drawn(Sampler(top_k=1), 0, 0, n=2)
    assert parts == [[ids] * 2 for ids in greedy]


def test_y_is_explored_and_y2_is_not(tiny, tmp_path):
    """Greedy y and y' are one text; the opponent's are as many as the policy has."""
    how = {"opponent": 0.0, "sampler": Sampler(top_k=1), "per_rollout": 8}
    args = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer = online(tiny, tmp_path, "online_ipo1", how, oracle=Preference(), args=args)
    trainer.train()
    found = samples(tmp_path)
    assert all(row["responses"][0] == row["responses"][1] for row in found)
    assert sum(row["opponent"] != row["responses"][0] for row in found) >= 5
    assert logged(trainer, "samples/identical") == [1.0]


def test_processes_draw_by_seeds_of_their_own():
    def numbers(*seed: int) -> list[float]:
        with drawing._seeded(torch.device("cpu"), *seed):
            return torch.rand(4).tolist()

    seeds = [(s, r, phase, p) for s in (0, 42) for r in range(5) for phase in (0, 1) for p in range(4)]
    assert len({tuple(numbers(*seed)) for seed in seeds}) == len(seeds)
    assert numbers(42, 3, 1, 2) == numbers(42, 3, 1, 2)


@pytest.mark.parametrize(
    "shipped", [{"no_repeat_ngram_size": 1}, {"min_p": 0.9}, {"num_beams": 3}, {"min_new_tokens": 8}], ids=str
)
def test_generation_settings_that_come_with_the_model_are_not_sampled_with(tiny, tmp_path, shipped):
    """`generate` fills what TRL leaves open from the model's file."""

    def drawn(name: str, **file: Any) -> list[list[list[int]]]:
        model = load_model(str(tiny))
        model.generation_config.update(**file)
        trainer = online(tiny, tmp_path / name, "p3o", reward=Kindness(), model=model)
        trainer.train()
        assert {k: getattr(trainer.model.generation_config, k) for k in file} == file
        return [row["responses"] for row in samples(tmp_path / name)]

    assert drawn("settings", **shipped) == drawn("plain")
