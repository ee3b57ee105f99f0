"""`evaluation/answers.py`: accuracy and likelihood of reference answers against a plain forward pass over the text."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.files import write_json_lines
from alignment.models import load_model, load_tokenizer
from alignment.models.sampling import sample
from evaluation import answers, tiny

MARKER = " and"  # of the grammar: "my dog is kind and warm ." has the chain " kind and" and the answer "warm ."
ROWS = [{"prompt": opening, "answer": ("warm .", "cold .")[i % 2]} for i, opening in enumerate(tiny.openings()[:8])]


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny), load_tokenizer(tiny)


def test_numbers_are_those_of_a_plain_forward_pass(model):
    lm, tokenizer = model
    found = answers.measure(lm, tokenizer, ROWS, samples=24, max_new_tokens=16, marker=MARKER, seed=3, batch_size=7)
    drawn = sample(lm, tokenizer, [r["prompt"] for r in ROWS], 24, max_new_tokens=16, seed=3, batch_size=7)
    right, per_prompt, mixed, sums, valid = [], [], [], [], 0
    for row, group in zip(ROWS, drawn, strict=True):
        values = []
        for one in group:
            head, marker, tail = one.text.partition(MARKER)
            right.append(bool(marker) and tail.strip() == row["answer"])
            if not marker:
                continue
            prefix = tokenizer(row["prompt"] + head + marker).input_ids
            whole = tokenizer(row["prompt"] + head + marker + " " + row["answer"] + tiny.END).input_ids
            if whole[: len(prefix)] != prefix:
                pytest.skip("the grammar's words are whole tokens; another tokenizer would need another example")
            with torch.no_grad():
                logps = lm(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            values.append(sum(float(logps[t - 1, whole[t]]) for t in range(len(prefix), len(whole))))
            tokens = len(whole) - len(prefix)
        valid += len(values)
        if values:
            sums += values
            per_prompt.append(np.mean(values) / tokens)
            mixed.append((np.logaddexp.reduce(values) - math.log(24)) / tokens)
    assert 0 < valid < 192 and any(right)
    assert found.valid == pytest.approx(valid / 192)
    assert found.sampled == pytest.approx(np.mean(right))
    assert found.log_prob == pytest.approx(np.mean(sums), abs=1e-3)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(per_prompt)), rel=1e-4)
    assert found.perplexity_n == pytest.approx(math.exp(-np.mean(mixed)), rel=1e-4)
    assert found.perplexity_interval[0] < found.perplexity < found.perplexity_interval[1]
    assert found.sampled_interval[0] <= found.sampled <= found.sampled_interval[1]


def test_the_program_prints_one_json_object_and_refuses_what_it_cannot_score(tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_json_lines(file, ROWS[:2])
    given = [str(tiny), "--prompts", str(file), "--samples", "4", "--marker", MARKER, "--json"]
    result = CliRunner().invoke(answers.app, given)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["prompts"] == 2
    refused = CliRunner().invoke(answers.app, [*given[:6], "no such words", "--json"])
    assert isinstance(refused.exception, UserError) and "marker" in str(refused.exception)
    write_json_lines(file, [{"prompt": "x"}])
    refused = CliRunner().invoke(answers.app, given)
    assert isinstance(refused.exception, UserError) and "rows.jsonl:1: " in str(refused.exception)


def test_tasks_have_the_answers_that_they_should():
    import random

    for row in tiny.sums(random.Random(0), 50):
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(row["answer"])
    lines = tiny.lines(random.Random(0), 50)
    assert len({row["prompt"] for row in lines}) == 50
    for row in lines:
        word = row["prompt"].removeprefix("say ").rstrip(":")
        assert row["answer"] == word * (tiny.LINE // 4) and len(word) == 4
    worked = tiny._worked_sums(random.Random(0), 400)
    right = [
        t.partition("Answer: ")[2] == f"{sum(map(int, t.partition('=')[0].split('+')))}{tiny.END}" for t in worked
    ]
    assert 0.45 < np.mean(right) < 0.65  # (1 - SLIP * 19/20)^2 = 0.58, less what carries spoil, plus luck
