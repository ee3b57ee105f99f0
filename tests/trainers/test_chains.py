"""Chains of thought, the answer behind them, and log-probs of either."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.errors import UserError
from alignment.models import chains
from alignment.models.scoring import branch_sums, branch_tokens, build_rows, forward_rows, repaired
from alignment.trainers.rollout import PromptOrder, append_rollout
from tests import tiny_lm
from tests.trainers.building import logged
from tests.trainers.building_online import OPENINGS, online, samples, says, scrambled, token_logps
from tests.trainers.test_scoring import make, pairs, plain


@pytest.mark.parametrize("marker", [" and", "and", " ki", " kind", "nd", "d an", " .", "k"])
@pytest.mark.parametrize(
    "said", [" kind and warm .", " cold and kind and nice .", " bright and nasty and kind .", " ."]
)
@pytest.mark.parametrize("separator", ["", " ", ": "])
def test_chains_end_at_the_first_marker_and_the_answer_stands_behind_it(tokenizer, said, marker, separator):
    """Whatever tokens span marker, separator and answer: the text is chain + separator + answer, and its chain is what
    was drawn."""
    ids = [*tokenizer(said).input_ids, tokenizer.eos_token_id]
    cut = chains.cut_chain(ids, marker, tokenizer)
    if marker not in said:
        assert cut is None
        return
    chain, between = cut
    assert ids[: len(chain)] == chain
    upto = said[: said.index(marker) + len(marker)]
    assert tokenizer.decode(chain) + between == upto
    # All of the chain that was drawn is kept: one token more would pass the marker's end.
    longer = tokenizer.decode(ids[: len(chain) + 1])
    assert len(longer) > len(upto)
    tail, before = chains.forced_answer(tokenizer, between, separator, "warm .")
    assert tail[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in tail[:-1]
    assert tokenizer.decode(chain + tail[:-1]) == upto + separator + "warm ."
    scored = tokenizer.decode(tail[before:-1])
    assert scored.endswith("warm .")  # all of the answer
    assert not tokenizer.decode(tail[before + 1 : -1]).endswith("warm .")  # and nothing more than a token's share


def test_a_token_across_marker_and_answer_is_seen(tokenizer):
    assert tokenizer.tokenize(" kind") == ["Ġkind"]
    with pytest.raises(UserError, match="rollout.answer: the tokenizer joins"):
        chains.check_marker(tokenizer, " ki", "", "nd .")
    for marker, separator, answer in ((" and", " ", "kind ."), ("Answer:", " ", "46"), (" ki", " ", "nd")):
        chains.check_marker(tokenizer, marker, separator, answer)


def test_sampled_answers():
    assert chains.sampled_answer("2+2=4 Answer: 4 ", "Answer:") == "4"
    assert chains.sampled_answer("Answer: 4 Answer: 5", "Answer:") == "4 Answer: 5"
    assert chains.sampled_answer("2+2=4", "Answer:") is None


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_token_log_probs_in_both_layouts(name, layout):
    model, (prompts, responses) = make(name), pairs(4, 3)
    rows = build_rows(prompts, responses, 0, layout)
    with torch.no_grad():
        logits = forward_rows(model, model.config, model.dtype, rows).logits
        tokens = branch_tokens(logits, rows, 3)
        assert torch.allclose(tokens.sum(-1), branch_sums(logits, rows, 3), atol=1e-4)
        apart = repaired(build_rows(prompts, responses, 0, "shared_prefix"), 3, 0)
        again = branch_tokens(forward_rows(model, model.config, model.dtype, apart).logits, apart, 3)
        assert torch.allclose(again, tokens, atol=1e-4)
        for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            for j, response in enumerate(group):
                n = len(response)
                single = [float(plain(model, prompt + response[:t], response[t : t + 1])) for t in range(n)]
                assert tokens[i, j, :n].tolist() == pytest.approx(single, abs=1e-4)
                assert not tokens[i, j, n:].any()


ANSWERS = [{"prompt": o, "answer": f"{tiny_lm.KIND[i % 5]} ."} for i, o in enumerate(OPENINGS)]
CHAINS = {"samples": 3, "marker": " and", "separator": " "}
# What the three samples of each prompt say. Of the second's only one has the format, of the third's none.
TOLD = [
    [" cold and warm .", " kind and good and nice .", " dull and kind ."],
    [" kind .", " cold and warm .", " warm ."],
    [" kind .", " cold .", " warm ."],
    [" bad and bad and bad .", " nice .", " good and good ."],
]


def expected_loss(model, tokenizer, row: int, texts: list[str]) -> float:
    """Of `logprob`: -(1/n) sum over samples with a marker of (R_i - mean of the others' R) lz_i + R_i."""
    prompt, answer = tokenizer(OPENINGS[row]).input_ids, ANSWERS[row]["answer"]
    values = []
    for said in texts:
        if " and" not in said:
            continue
        chain = tokenizer(said[: said.index(" and") + 4]).input_ids
        forced = [*tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]
        logps = token_logps(model, prompt, chain + forced)
        values.append((float(logps[: len(chain)].sum()), float(logps[len(chain) :].sum())))
    if len(values) < 2:
        return 0.0
    total, n = 0.0, len(values)
    for i, (cot, reward) in enumerate(values):
        others = [r for j, (_, r) in enumerate(values) if j != i]
        total += (reward - sum(others) / len(others)) * cot + reward
    return -total / n


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("per_device", [4, 1])
def test_likelihood_scores_the_reference_answer_behind_each_chain(tiny, tokenizer, tmp_path, per_device, layout):
    """The loss of recorded samples by plain forward passes; samples and whole passes without a marker are left out."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    file = tmp_path / "told.jsonl"
    append_rollout(file, 0, 0, [says(tokenizer, row, texts) for row, texts in zip(rows, TOLD, strict=True)])
    args = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 4 // per_device}
    how = CHAINS | {"replay": file}

    def start():
        return scrambled(tiny, 0.1)  # after whose chains the answers differ by nats

    trainer = online(tiny, tmp_path / "run", "likelihood", how, args=args, rows=ANSWERS, layout=layout, model=start())
    trainer.train()
    model = start()
    losses = [expected_loss(model, tokenizer, row, texts) for row, texts in zip(rows, TOLD, strict=True)]
    assert losses[1] == losses[2] == 0 and losses[0] * losses[3]
    assert logged(trainer) == pytest.approx([sum(losses) / 4], rel=1e-5)
    assert logged(trainer, "samples/valid") == [6 / 12]
    assert logged(trainer, "objective/valid") == [6 / 12] and logged(trainer, "objective/skipped") == [2 / 4]
    found = samples(tmp_path / "run")
    assert [row["responses"] for row in found] == [says(tokenizer, 0, texts).responses for texts in TOLD]  # as drawn
    right = [
        float(" and" in t and t.partition(" and")[2].strip() == ANSWERS[row]["answer"])
        for row, texts in zip(rows, TOLD, strict=True)
        for t in texts
    ]
    assert [v for row in found for v in row["verified"]] == right
    # A rollouts.jsonl of this run, replayed, is the same run: forced answers are not taken for samples.
    again = online(
        tiny, tmp_path / "again", "likelihood", how | {"replay": tmp_path / "run" / "rollouts.jsonl"}, args=args,
        rows=ANSWERS, layout=layout, model=start(),
    )  # fmt: skip
    again.train()
    assert logged(again) == logged(trainer)
    assert (tmp_path / "again" / "rollouts.jsonl").read_text() == (tmp_path / "run" / "rollouts.jsonl").read_text()


def test_a_marker_that_no_sample_has_is_said(tiny, tokenizer, tmp_path):
    """In the first rollout an error, since nothing would ever be learned; later a warning, once."""
    with pytest.raises(UserError, match="rollout 0: no sample has the marker '####'"):
        online(tiny, tmp_path / "never", "likelihood", CHAINS | {"marker": "####"}, rows=ANSWERS).train()
    file, order = tmp_path / "told.jsonl", PromptOrder(len(OPENINGS), 4, 4, 1, 42)
    for rollout, texts in enumerate([TOLD[0], TOLD[2], TOLD[2]]):
        append_rollout(file, rollout, 0, [says(tokenizer, row, texts) for row in order.rows(rollout)])
    args = {"max_steps": 3, "optim": "sgd"}
    trainer = online(tiny, tmp_path / "run", "likelihood", CHAINS | {"replay": file}, args=args, rows=ANSWERS)
    with pytest.warns(UserWarning, match="rollout 1: no sample has the marker ' and'") as said:
        trainer.train()
    assert len([w for w in said if "no sample has the marker" in str(w.message)]) == 1
    assert logged(trainer)[0] > 0 and logged(trainer)[1:] == [0.0, 0.0]


def test_a_verifier_reads_the_sample_and_nothing_is_forced(tiny, tokenizer, tmp_path):
    """`base`: R is 1 where the sampled answer is the reference answer, else 0, with or without the marker."""
    rows = PromptOrder(len(OPENINGS), 4, 4, 1, 42).rows(0)
    told = [[f" kind and {ANSWERS[row]['answer']}", " kind and bad .", " cold ."] for row in rows]
    file = tmp_path / "told.jsonl"
    append_rollout(file, 0, 0, [says(tokenizer, row, texts) for row, texts in zip(rows, told, strict=True)])
    trainer = online(tiny, tmp_path / "run", "likelihood", CHAINS | {"replay": file}, {"reward": "base"}, rows=ANSWERS)
    trainer.train()
    model, losses = AutoModelForCausalLM.from_pretrained(tiny), []
    for row, texts in zip(rows, told, strict=True):
        prompt = tokenizer(OPENINGS[row]).input_ids
        whole = [token_logps(model, prompt, [*tokenizer(t).input_ids, tokenizer.eos_token_id]).sum() for t in texts]
        losses.append(-float(whole[0] - (whole[1] + whole[2]) / 2) / 3)  # advantages 1, -1/2, -1/2
    assert logged(trainer) == pytest.approx([sum(losses) / 4], rel=1e-3, abs=1e-4)
    assert logged(trainer, "samples/accuracy") == pytest.approx([1 / 3])
    assert logged(trainer, "samples/valid") == pytest.approx([2 / 3])  # the share with the marker, whatever counts


def test_chains_that_are_drawn_are_scored_where_they_end(tiny, tokenizer, tmp_path):
    """Real samples: the recorded spans cut each row into a chain up to the marker and the reference answer."""
    trainer = online(tiny, tmp_path, "likelihood", CHAINS | {"per_rollout": 4}, args={"max_steps": 2}, rows=ANSWERS)
    trainer.train()
    seen = 0
    for row in samples(tmp_path):
        for ids, said, scored, (end, first, last), valid in zip(
            row["responses"], row["texts"], row["scored"], row["spans"], row["valid"], strict=True
        ):
            assert valid == float(" and" in said)
            if not valid:
                assert scored == ids and (end, first, last) == (len(ids),) * 3
                continue
            seen += 1
            assert tokenizer.decode(scored[:end]) == said[: said.index(" and") + 4]
            assert scored[:end] == ids[:end] and last == len(scored)
            answer = tokenizer.decode(scored[first:last], skip_special_tokens=True)
            assert answer.strip() == ANSWERS[row["row"]]["answer"] and scored[-1] == tokenizer.eos_token_id
    assert seen >= 6


def test_a_marker_that_merges_with_the_answer_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match="rollout.answer: the tokenizer joins"):
        online(
            tiny, tmp_path, "likelihood", CHAINS | {"marker": " ki", "separator": ""},
            rows=[{"prompt": OPENINGS[0], "answer": "nd ."}] * 4,
        )  # fmt: skip
