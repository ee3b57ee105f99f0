"""The two protocols of everything that judges text: scores of responses, and preferences between two. No judge here.

`score` and `probability` take prompts as they were given to the policy: a text, or a list of chat messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

Prompt = str | list[dict[str, str]]


class RewardFunction(Protocol):
    """Scores responses; higher is better. The unit is the reward's own and is stated by `describe`."""

    @property
    def name(self) -> str:
        """The name in the recipe's `reward:` section."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score per (prompt, response) pair, in order.

        Args:
            prompts: n prompts.
            responses: n responses, `responses[i]` to `prompts[i]`.

        Returns:
            n floats. NaN means "could not be scored"; readers count it and leave it out, never take it as 0.

        Raises:
            ValueError: the two lists differ in length.
        """

    def describe(self) -> str:
        """One line for reports: what is measured, its range, and which version measured it."""


class PreferenceOracle(Protocol):
    """Says how probably one response is preferred to another; it may be intransitive."""

    @property
    def name(self) -> str:
        """The name in the recipe's `oracle:` section."""

    def probability(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """P(first > second | prompt) of each triple, in order.

        P(a, b) + P(b, a) = 1 holds exactly, whatever order a back-end was asked in, and P(y, y) is one half without
        asking it.

        Args:
            prompts: n prompts.
            first, second: n responses each.

        Returns:
            n floats in [0, 1]; NaN means "could not be judged".

        Raises:
            ValueError: the lists differ in length.
        """

    def describe(self) -> str:
        """One line for reports: who judges, and which version."""


class Reward:
    """Base of our rewards: a `RewardFunction` that TRL takes as it is, as one of its `reward_funcs`."""

    name: ClassVar[str]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See `RewardFunction.score`."""
        raise NotImplementedError

    @property
    def __name__(self) -> str:
        """What TRL logs the reward under."""
        return self.name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's call: completions are texts or lists of messages; None (TRL's "no score") stands for NaN."""
        texts = [c if isinstance(c, str) else "\n".join(m["content"] for m in c) for c in completions]
        return [None if value != value else value for value in self.score(prompts, texts)]


def check_lengths(prompts: Sequence[Prompt], *responses: Sequence[str]) -> None:
    """ValueError unless there is one response per prompt."""
    for given in responses:
        if len(prompts) != len(given):
            raise ValueError(f"{len(prompts)} prompts but {len(given)} responses")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a text: of a chat, its only message's content, or one `role: content` line each."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
