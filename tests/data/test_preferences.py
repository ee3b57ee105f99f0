"""One row in canonical form: what is accepted is kept exactly, what is not has its reason; prompts of text files."""

from __future__ import annotations

import json
import math

import pytest

from alignment.data.preferences import BadRow, canonical
from tests.data.building import reply, said, user

GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}
IDS = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
CHAT = {"prompt": user("p"), "chosen": reply("good"), "rejected": reply("bad")}


def test_known_columns_travel_and_others_stay_behind():
    row = GOOD | IDS | {"reward_chosen": 1, "reward_rejected": "-0.5", "label": 1, "calibration": "c"}
    found = canonical(row | {"source": "somewhere", "prev_chosen": None})
    assert found == row | {"reward_chosen": 1.0, "reward_rejected": -0.5, "label": 1.0}
    assert canonical(CHAT) == CHAT
    noted = [said("assistant", "good") | {"weight": 1}]
    assert canonical(CHAT | {"chosen": noted}) == CHAT


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "p", "rejected": "bad"}, "missing_field", "chosen is missing"),
        (GOOD | {"rejected": None}, "missing_field", "rejected is missing"),
        (GOOD | {"chosen_ids": [2]}, "missing_field", "token ids come together: prompt_ids, rejected_ids missing"),
        (GOOD | IDS | {"calibration_ids": [1]}, "missing_field", "calibration_ids needs calibration"),
        (GOOD | {"chosen": 3}, "not_text", "chosen: expected text or a list of messages, got int"),
        (GOOD | {"chosen": True}, "not_text", "got bool"),
        (GOOD | {"calibration": 7}, "not_text", "calibration"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "not_text", "chosen"),
        (GOOD | IDS | {"chosen_ids": [1.5]}, "not_text", "chosen_ids: expected a list of token ids"),
        (GOOD | IDS | {"chosen_ids": [True]}, "not_text", "chosen_ids"),
        (GOOD | {"prompt": ""}, "empty", "prompt is empty"),
        (GOOD | {"rejected": " \n"}, "empty", "rejected is empty"),
        (GOOD | {"calibration": ""}, "empty", "calibration is empty"),
        (CHAT | {"chosen": []}, "empty", "chosen is empty"),
        (CHAT | {"chosen": reply("")}, "empty", "chosen is empty"),
        (GOOD | IDS | {"chosen_ids": []}, "empty", "chosen_ids is empty"),
        (GOOD | {"chosen": "bad"}, "same_responses", ""),
        (CHAT | {"chosen": reply("bad")}, "same_responses", ""),
        (CHAT | {"rejected": "bad"}, "unknown_form", "mix text and chat messages"),
        (GOOD | {"calibration": reply("c")}, "unknown_form", "prompt, chosen, rejected and calibration mix"),
        (GOOD | {"reward_chosen": True}, "bad_number", "reward_chosen: expected a finite number, got True"),
        (GOOD | {"reward_chosen": "high"}, "bad_number", "got 'high'"),
        (GOOD | {"prev_rejected": math.nan}, "bad_number", "got nan"),
        (GOOD | {"reward_rejected": [1.0]}, "bad_number", "got [1.0]"),
        (GOOD | {"reward_chosen": 10**400}, "bad_number", "got 1000"),
        (GOOD | {"prev_chosen": 1}, "missing_field", "prev_rejected is missing, and prev_chosen is there"),
        (GOOD | {"reward_rejected": 1, "reward_chosen": None}, "missing_field", "reward_chosen is missing"),
        (GOOD | {"chosen": str(reply("good"))}, "unknown_form", "chosen: chat messages written as text; give them as"),
        (GOOD | {"prompt": json.dumps(user("p"), indent=1)}, "unknown_form", "prompt: chat messages written as text"),
        (CHAT | {"chosen": reply(str(reply("good")))}, "unknown_form", "chosen: chat messages written"),
        (GOOD | {"rejected": "{'from': 'gpt', 'value': 'bad'}"}, "unknown_form", "rejected: chat messages written"),
        (GOOD | {"label": 1.5}, "bad_number", "label: 1.5 is not a probability"),
        (GOOD | {"label": -0.1}, "bad_number", "label"),
    ],
)
def test_unusable_rows_have_a_reason(row, reason, detail):
    with pytest.raises(BadRow) as refused:
        canonical(row)
    assert refused.value.reason == reason and detail in refused.value.detail


def test_text_that_only_looks_like_messages_is_text():
    for text in ('{"value": 3}', '[{"role": "admin"}]', "[{'role': 'user', 'content': 'a'}] is a message", "[1]"):
        assert canonical(GOOD | {"chosen": text}) == GOOD | {"chosen": text}


def test_given_ids_count_more_than_their_texts():
    """A sample may decode to nothing, or to the same text as another one."""
    for texts in ({"chosen": "bad"}, {"prompt": ""}, {"rejected": ""}):
        assert canonical(GOOD | IDS | texts) == GOOD | IDS | texts


ASK, KIND, COLD = said("user", "my dog is"), said("assistant", "kind ."), said("assistant", "cold .")
SYSTEM = said("system", "be brief")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # UltraFeedback's binarised form: the prompt as text, and again at the head of both lists
        ({"prompt": "my dog is", "chosen": [ASK, KIND], "rejected": [ASK, COLD]}, [ASK]),
        ({"prompt": "my dog is", "chosen": [SYSTEM, ASK, KIND], "rejected": [SYSTEM, ASK, COLD]}, [SYSTEM, ASK]),
        # TRL's implicit prompt
        ({"chosen": [ASK, KIND], "rejected": [ASK, COLD]}, [ASK]),
        ({"chosen": [ASK, COLD, ASK, KIND], "rejected": [ASK, COLD, ASK, COLD]}, [ASK, COLD, ASK]),
        # the prompt's messages repeated in both lists: they must not be trained on
        ({"prompt": [ASK], "chosen": [ASK, KIND], "rejected": [ASK, COLD]}, [ASK]),
        ({"prompt": [ASK], "chosen": [KIND], "rejected": [COLD]}, [ASK]),
        ({"prompt": "my dog is", "chosen": [KIND], "rejected": [COLD]}, [ASK]),
    ],
)
def test_conversations_are_taken_apart_into_prompt_and_responses(row, prompt):
    assert canonical(row) == {"prompt": prompt, "chosen": [KIND], "rejected": [COLD]}


def test_calibration_loses_the_prompt_too():
    row = {"prompt": "my dog is", "chosen": [ASK, KIND], "rejected": [ASK, COLD], "calibration": [ASK, COLD]}
    assert canonical(row)["calibration"] == [COLD]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "my dog is", "chosen": [said("user", "my dog is "), KIND], "rejected": [ASK, COLD]},
        {"prompt": "your cat is", "chosen": [ASK, KIND], "rejected": [ASK, COLD]},
        {"prompt": [ASK], "chosen": [ASK, KIND], "rejected": [COLD]},
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, KIND], "rejected": [ASK, COLD]},
        {"prompt": [ASK], "chosen": [KIND], "rejected": [COLD], "calibration": [ASK, COLD]},
        # they part before the last question
        {"chosen": [ASK, KIND, ASK, KIND], "rejected": [ASK, COLD, ASK, COLD]},
    ],
)
def test_a_response_with_what_the_user_says_is_refused(row):
    """Otherwise a prompt would be trained on as part of the response."""
    with pytest.raises(BadRow, match="different_prompts: .* has a user message that is not the prompt's"):
        canonical(row)
