"""The implicit reward: its identities by enumeration of a small tree, and a real model's scores token by token."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys

import pytest
import torch

from alignment.errors import UserError
from alignment.models import load_model, load_tokenizer
from alignment.rewards.implicit import ImplicitReward, implicit_step_rewards, prefix_values

BETA, DEPTH = 0.05, 4
# Batched and alone, float32: the same sums in another order (nats; the scores here are about 1 to 30 nats).
FLOAT32 = 2e-4


def tree(seed: int) -> dict[str, float]:
    """Probability of taking branch "1" behind every prefix of a binary tree."""
    generator = torch.Generator().manual_seed(seed)
    nodes = ["".join(bits) for depth in range(DEPTH) for bits in itertools.product("01", repeat=depth)]
    return dict(zip(nodes, torch.rand(len(nodes), generator=generator).clamp(0.05, 0.95).tolist(), strict=True))


def leaves() -> list[str]:
    """Every end of the tree: branch "00" ends at depth 2, the others at depth 4."""
    full = ["".join(bits) for bits in itertools.product("01", repeat=DEPTH)]
    return ["00", *[leaf for leaf in full if not leaf.startswith("00")]]


def probability(policy: dict[str, float], leaf: str, start: int = 0) -> float:
    """Of walking from leaf[:start] to `leaf`."""
    steps = [policy[leaf[:t]] if leaf[t] == "1" else 1 - policy[leaf[:t]] for t in range(start, len(leaf))]
    return math.prod(steps)


def log_ratios(policy: dict[str, float], reference: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """[13, DEPTH] and its mask; NaN where a leaf has ended, which nothing may read."""
    ratio = torch.full((len(leaves()), DEPTH), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(leaves()), DEPTH)
    for i, leaf in enumerate(leaves()):
        for t in range(len(leaf)):
            step = [p[leaf[:t]] if leaf[t] == "1" else 1 - p[leaf[:t]] for p in (policy, reference)]
            ratio[i, t] = math.log(step[0] / step[1])
            mask[i, t] = 1
    return ratio, mask


@pytest.fixture(scope="module")
def trees():
    policy, reference = tree(1), tree(2)
    q = prefix_values(*log_ratios(policy, reference), BETA)
    return policy, reference, q, dict(zip(leaves(), q[:, -1].tolist(), strict=True))


def test_exponentiated_reward_has_mean_one_under_the_reference(trees):
    policy, reference, _, reward = trees
    for leaf in leaves():
        whole = math.log(probability(policy, leaf) / probability(reference, leaf))
        assert reward[leaf] == pytest.approx(BETA * whole, abs=1e-12)
    assert sum(probability(reference, y) * math.exp(reward[y] / BETA) for y in leaves()) == pytest.approx(1, abs=1e-12)


def test_prefix_value_is_the_soft_value_between_mean_and_maximum(trees):
    _, reference, q, reward = trees
    strict = 0
    for i, leaf in enumerate(leaves()):
        for t in range(1, len(leaf) + 1):
            below = [y for y in leaves() if y.startswith(leaf[:t])]
            weights = [probability(reference, y, start=t) for y in below]
            assert sum(weights) == pytest.approx(1, abs=1e-12)
            soft = BETA * math.log(sum(w * math.exp(reward[y] / BETA) for w, y in zip(weights, below, strict=True)))
            assert float(q[i, t - 1]) == pytest.approx(soft, abs=1e-12)
            mean = sum(w * reward[y] for w, y in zip(weights, below, strict=True))
            highest = max(reward[y] for y in below)
            assert mean - 1e-12 <= float(q[i, t - 1]) <= highest + 1e-12
            strict += mean + 1e-4 < float(q[i, t - 1]) < highest - 1e-4
    assert strict >= 5  # the bounds are no accident of prefixes with one continuation


def test_steps_telescope_and_those_without_tokens_are_no_number(trees):
    policy, reference, q, reward = trees
    ratio, mask = log_ratios(policy, reference)
    for cuts in itertools.combinations(range(1, DEPTH + 1), 2):
        ends = torch.tensor([[*cuts, DEPTH, DEPTH]] * len(ratio))
        steps = implicit_step_rewards(ratio, mask, ends, BETA)
        for i, leaf in enumerate(leaves()):
            bounds = [0, *cuts, DEPTH, DEPTH]
            empty = [min(len(leaf), a) == min(len(leaf), b) for a, b in itertools.pairwise(bounds)]
            assert steps[i].isnan().tolist() == empty
            assert float(steps[i].nansum()) == pytest.approx(reward[leaf], abs=1e-12)
    single = implicit_step_rewards(ratio, mask, torch.full((len(ratio), 1), DEPTH), BETA)
    assert torch.equal(single[:, 0], q[:, -1])


def test_policy_equal_to_reference_earns_nothing():
    same = tree(3)
    ratio, mask = log_ratios(same, same)
    assert prefix_values(ratio, mask, BETA).abs().max() == 0
    assert implicit_step_rewards(ratio, mask, torch.tensor([[1, 2]] * len(ratio)), BETA).abs().max() == 0


def test_golden_numbers():
    ratio, mask = torch.tensor([[1.0, -2.0, 4.0]]), torch.ones(1, 3)
    assert prefix_values(ratio, mask, BETA)[0].tolist() == pytest.approx([0.05, -0.05, 0.15])
    steps = implicit_step_rewards(ratio, mask, torch.tensor([[1, 2, 3]]), BETA)[0].tolist()
    assert steps == pytest.approx([0.05, -0.10, 0.20])
    assert min(steps) == pytest.approx(-0.10)


# A real model

PROMPT = "my dog is"
RESPONSES = [" kind and warm .", " bad .", "", " cruel and cold and dull and good .", " nice"]


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """The tiny model, moved a little: a policy that is not its reference."""
    folder = tmp_path_factory.mktemp("policy") / "final"
    shutil.copytree(tiny, folder)
    model = load_model(tiny)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def by_hand(folder, prompt: str, response: str) -> list[float]:
    """Log-probability of each response token, one row without padding, in float64."""
    tokenizer, model = load_tokenizer(folder), load_model(folder).double()
    start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + response).input_ids
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logps[t - 1, ids[t]]) for t in range(start, len(ids))]


def test_score_is_beta_times_the_log_ratio_with_the_end_token(tiny, other):
    scores = ImplicitReward(str(other), str(tiny), beta=1.0).score([PROMPT] * 5, RESPONSES)
    bare = ImplicitReward(str(other), None, beta=0.5).score([PROMPT] * 5, RESPONSES)
    for response, score, alone in zip(RESPONSES, scores, bare, strict=True):
        policy = by_hand(other, PROMPT, response + "<|end|>")
        reference = by_hand(tiny, PROMPT, response + "<|end|>")
        assert score == pytest.approx(sum(policy) - sum(reference), abs=FLOAT32)
        assert alone == pytest.approx(0.5 * sum(policy), abs=FLOAT32)
    assert max(map(abs, scores)) > 0.5


def test_chat_prompts_are_asked_as_in_training(tiny, other):
    asked, reply = f"<|start|>user\n{PROMPT}<|end|>\n<|start|>assistant\n", f"{PROMPT} kind .<|end|>"
    expected = sum(by_hand(other, asked, reply)) - sum(by_hand(tiny, asked, reply))
    messages = [{"role": "user", "content": PROMPT}]
    reward = ImplicitReward(str(other), str(tiny), beta=1.0)
    assert reward.score([messages], [f"{PROMPT} kind ."]) == pytest.approx([expected], abs=FLOAT32)
    wrapped = ImplicitReward(str(other), str(tiny), beta=1.0, chat=True)
    assert wrapped.score([PROMPT], [f"{PROMPT} kind ."]) == pytest.approx([expected], abs=FLOAT32)
    text = ImplicitReward(str(other), str(tiny), beta=1.0, chat=False)
    assert text.score([messages], [" kind ."]) == pytest.approx(reward.score([PROMPT], [" kind ."]), abs=FLOAT32)
    # Text and messages in one call keep their places.
    mixed = reward.score([PROMPT, messages, PROMPT], [" kind .", f"{PROMPT} kind .", " bad ."])
    assert mixed[1] == pytest.approx(expected, abs=FLOAT32)
    assert mixed[::2] == pytest.approx(reward.score([PROMPT] * 2, [" kind .", " bad ."]), abs=FLOAT32)


def test_neither_batch_size_nor_padding_nor_order_changes_a_score(tiny, other):
    prompts = [PROMPT, "your old song and my cat and the bread was", PROMPT, "the river is", "our"]
    alone = [
        ImplicitReward(str(other), str(tiny), beta=1.0, batch_size=1).score([p], [r])[0]
        for p, r in zip(prompts, RESPONSES, strict=True)
    ]
    for size in (2, 3, 8):
        reward = ImplicitReward(str(other), str(tiny), beta=1.0, batch_size=size)
        assert reward.score(prompts, RESPONSES) == pytest.approx(alone, abs=FLOAT32)
        assert reward.score(prompts[::-1], RESPONSES[::-1]) == pytest.approx(alone[::-1], abs=FLOAT32)


def test_steps_of_text_begin_at_the_marker(tiny, other):
    response = " so\nStep 1: kind and warm\nStep 2: bad .\n"
    ids = load_tokenizer(tiny)(response).input_ids
    pieces = [load_tokenizer(tiny).decode([i]) for i in ids]
    token_ends = list(itertools.accumulate(map(len, pieces)))
    begins = [response.index("Step 1"), response.index("Step 2")]
    cuts = [0, *[sum(end <= begin for end in token_ends) for begin in begins], len(ids) + 1]
    policy, reference = (by_hand(folder, PROMPT, response + "<|end|>") for folder in (other, tiny))
    ratio = [a - b for a, b in zip(policy, reference, strict=True)]
    assert len(ratio) == cuts[-1]
    expected = [sum(ratio[a:b]) for a, b in itertools.pairwise(cuts)]
    reward = ImplicitReward(str(other), str(tiny), beta=1.0)
    prompts, responses = [PROMPT] * 3, [response, " kind .", "Step 1: bad ."]
    steps = reward.step_scores(prompts, responses)
    assert steps[0] == pytest.approx(expected, abs=FLOAT32)
    # No marker, and a marker that begins the response: one step, the empty one before it being left out.
    assert [len(found) for found in steps] == [3, 1, 1]
    assert [sum(found) for found in steps] == pytest.approx(reward.score(prompts, responses), abs=FLOAT32)
    least = ImplicitReward(str(other), str(tiny), beta=1.0, how="min").score(prompts, responses)
    assert least == pytest.approx([min(found) for found in steps], abs=FLOAT32)
    # A blank marker: the next step begins with what follows it. The last one is followed by nothing but the end token.
    lines = ImplicitReward(str(other), str(tiny), beta=1.0, step_marker=r"\n").step_scores([PROMPT], [response])[0]
    assert lines == pytest.approx(expected, abs=FLOAT32)


def test_characters_of_several_tokens_do_not_move_a_step(tiny, other):
    response = " 😀 kind\nStep 1: bad ."
    ids = load_tokenizer(tiny)(response).input_ids
    spans = load_tokenizer(tiny)(response, return_offsets_mapping=True).offset_mapping
    begin = response.index("Step")
    cut = next(t for t, (_, end) in enumerate(spans) if end > begin)
    assert len(ids) > cut > 4  # the emoji is several tokens
    policy, reference = (by_hand(folder, PROMPT, response + "<|end|>") for folder in (other, tiny))
    ratio = [a - b for a, b in zip(policy, reference, strict=True)]
    steps = ImplicitReward(str(other), str(tiny), beta=1.0).step_scores([PROMPT], [response])[0]
    assert steps == pytest.approx([sum(ratio[:cut]), sum(ratio[cut:])], abs=FLOAT32)


def test_policy_against_itself_is_zero(tiny):
    reward = ImplicitReward(str(tiny), str(tiny))
    assert reward.score([PROMPT] * 5, RESPONSES) == [0.0] * 5


def test_what_does_not_fit_is_cut_or_not_a_number(tiny, other):
    reward = ImplicitReward(str(other), None, beta=1.0, max_length=8)
    size = len(load_tokenizer(tiny)(PROMPT).input_ids)
    assert size < 8
    fits, full = reward.score([PROMPT, PROMPT * 4], [" kind and warm and bright and good .", " kind ."])
    whole = by_hand(other, PROMPT, " kind and warm and bright and good .<|end|>")
    assert len(whole) > 8 - size
    assert fits == pytest.approx(sum(whole[: 8 - size]), abs=FLOAT32)
    assert math.isnan(full)
    assert reward([PROMPT * 4], [" kind ."]) == [None]  # as TRL calls it
    assert all(math.isnan(step) for step in reward.step_scores([PROMPT * 4], [" kind ."])[0])
    # A prompt that is one token too long, and a response that is longer than that.
    over = ImplicitReward(str(other), None, max_length=size - 1)
    assert math.isnan(over.score([PROMPT], [" kind and warm and bright and good ."])[0])
    assert reward.score([], []) == []


def test_an_empty_prompt_leaves_the_first_token_unscored(tiny, other):
    ids = load_tokenizer(tiny)("my dog<|end|>").input_ids
    with torch.no_grad():
        logps = load_model(other).double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logps[t - 1, ids[t]]) for t in range(1, len(ids)))
    reward = ImplicitReward(str(other), None, beta=1.0)
    assert reward.score(["", PROMPT], ["my dog", " kind ."])[0] == pytest.approx(expected, abs=FLOAT32)


def test_an_adapter_is_a_policy(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(load_model(tiny), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        ids = load_tokenizer(tiny)(PROMPT + " kind .<|end|>", return_tensors="pt").input_ids
        logps = adapted.eval()(ids).logits[0].log_softmax(-1)
    start = len(load_tokenizer(tiny)(PROMPT).input_ids)
    expected = sum(float(logps[t - 1, ids[0, t]]) for t in range(start, ids.size(1)))
    expected -= sum(by_hand(tiny, PROMPT, " kind .<|end|>"))
    score = ImplicitReward(str(tmp_path / "adapter"), str(tiny), beta=1.0).score([PROMPT], [" kind ."])
    assert abs(expected) > 1e-3 and score == pytest.approx([expected], abs=FLOAT32)


def test_description_names_what_decides_the_score(tiny, other, tmp_path):
    one = ImplicitReward(str(other), str(tiny)).describe()
    assert "\n" not in one and str(other) in one and str(tiny) in one and "0.05" in one
    assert one == ImplicitReward(str(other), str(tiny)).describe()
    for changed in ({"beta": 0.1}, {"how": "min"}, {"chat": False}, {"max_length": 9}, {"dtype": "bfloat16"}):
        assert ImplicitReward(str(other), str(tiny), **changed).describe() != one
    # The same name with other weights is another judge.
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    before = ImplicitReward(str(moved), None).describe()
    load_model(other).save_pretrained(moved)
    assert ImplicitReward(str(moved), None).describe() != before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy": ""}, "reward implicit: policy must be a model's name or folder, not ''"),
        ({"reference": 3}, "reward implicit: reference must be a model's name or folder, or null, not 3"),
        ({"beta": 0}, "reward implicit: beta must be a number above 0, not 0"),
        ({"beta": math.nan}, "reward implicit: beta must be a number above 0, not nan"),
        ({"how": "mean"}, "reward implicit: how must be sum or min, not 'mean'"),
        ({"step_marker": "("}, "reward implicit: step_marker must be a valid regular expression"),
        ({"chat": "yes"}, "reward implicit: chat must be true, false or null, not 'yes'"),
        ({"max_length": 1}, "reward implicit: max_length must be a whole number of at least 2, or null, not 1"),
        ({"batch_size": 0}, "reward implicit: batch_size must be a whole number of at least 1, not 0"),
        ({"dtype": "int8"}, "reward implicit: dtype must be float32 or bfloat16 or float16, not 'int8'"),
    ],
)
def test_mistakes_are_named(keys, message):
    with pytest.raises(UserError) as caught:
        ImplicitReward(**{"policy": "p", "reference": None} | keys)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_missing_model_another_vocabulary_and_no_template_are_one_line(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="reward implicit: policy: '.*run' is a folder without config.json"):
        ImplicitReward(str(tmp_path / "run"), None).score([PROMPT], [" kind ."])
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        ImplicitReward(str(tiny), None).score([PROMPT] * 2, [" kind ."])
    grown, bare = tmp_path / "grown", tmp_path / "bare"
    shutil.copytree(tiny, grown)
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(grown)
    with pytest.raises(UserError, match="has another vocabulary than policy"):
        ImplicitReward(str(tiny), str(grown)).score([PROMPT], [" kind ."])
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template, and prompts are chat messages; set chat: false"):
        ImplicitReward(str(bare), None).score([[{"role": "user", "content": PROMPT}]], [" kind ."])


def test_importing_it_is_light():
    code = "import sys, alignment.rewards.implicit; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
