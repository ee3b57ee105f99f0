"""One pair in tokens: what is scored, what is cut, and the counts of BOS and EOS."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.doctor.pair import painted, pair_view
from alignment.models import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny: Path):
    return load_tokenizer(str(tiny))


def row_of(tokenizer, prompt: str, chosen: str, rejected: str) -> dict:
    ids = {name: tokenizer(text)["input_ids"] for name, text in
           (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))}  # fmt: skip
    return {"prompt": prompt, **{f"{name}_ids": found for name, found in ids.items()}}


def test_what_is_scored_and_what_is_cut_off(tokenizer):
    row = row_of(tokenizer, "my dog is", " kind and warm .<|end|>", " cold .<|end|>")
    prompt, chosen = row["prompt_ids"], row["chosen_ids"]
    room = len(chosen) - 2
    view = pair_view(row, tokenizer, len(prompt) + room)
    assert (view.branches[0].scored, view.branches[0].cut) == (chosen[:-2], chosen[-2:])
    assert (view.branches[1].scored, view.branches[1].cut) == (row["rejected_ids"], [])
    told = "\n".join(view.lines)
    assert f"chosen: {room} tokens scored, 2 cut off at max_length {len(prompt) + room}" in told
    assert "EOS (<|end|>): 0 in the response, which does not end with it" in told
    assert "EOS (<|end|>): 1 in the response, which ends with it" in told


def test_colours_are_those_of_the_parts_and_special_tokens_stand_out(tokenizer):
    row = row_of(tokenizer, "my dog is", " kind .<|end|>", " cold .<|end|>")
    texts = list(painted(pair_view(row, tokenizer, 64), tokenizer))
    assert [t.plain.partition(":")[0] for t in texts] == [
        "prompt (read, not scored)", "chosen (scored)", "rejected (scored)"]  # fmt: skip
    ends = [span for span in texts[1].spans if texts[1].plain[span.start : span.end] == "<|end|>"]
    assert [str(span.style) for span in ends] == ["green reverse"]
    assert all("reverse" not in str(span.style) for span in texts[0].spans)
    assert "│" in texts[0].plain  # a bar between tokens, for readers without colours


def test_an_empty_prompt_leaves_the_first_token_unscored(tokenizer):
    row = row_of(tokenizer, "", " kind .<|end|>", " cold .<|end|>")
    told = "\n".join(pair_view(row, tokenizer, 64).lines)
    assert f"chosen: {len(row['chosen_ids']) - 1} tokens scored (the first has nothing before it" in told


def test_two_bos_are_a_problem(tokenizer):
    tokenizer.bos_token = "<|start|>"
    try:
        bos = tokenizer.bos_token_id
        row = row_of(tokenizer, "my dog is", " kind .<|end|>", " cold .<|end|>")
        once = row | {"prompt_ids": [bos, *row["prompt_ids"]]}
        twice = row | {"prompt_ids": [bos, bos, *row["prompt_ids"]]}
        assert pair_view(once, tokenizer, 64).problems == []
        assert pair_view(twice, tokenizer, 64).problems == [
            "chosen: two BOS at the start", "rejected: two BOS at the start"]  # fmt: skip
    finally:
        tokenizer.bos_token = None
