"""The protocol that every scalar reward follows. No implementation here."""

from __future__ import annotations

from typing import Protocol


class RewardFunction(Protocol):
    """Scores responses; higher is better. The unit is the reward's own and is stated by `describe`."""

    @property
    def name(self) -> str:
        """The name in the recipe's `reward:` section."""

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
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
