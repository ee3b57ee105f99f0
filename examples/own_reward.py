"""A reward of one's own as the judge of a win rate: any object with `name`, `score` and `describe`.

python examples/own_reward.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignment.rewards.base import Prompt
from evaluation.comparison import Comparison, Side, compare

PROMPTS = [f"Name {count} colours." for count in ("two", "three", "four", "five", "six")]
OURS = [["red, blue"], ["red, blue, green"], ["red, blue, green, pink"], ["red, red, red"], ["blue"]]
THEIRS = [["red"], ["red, blue"], ["red and blue"], ["red"], ["blue"]]


class DistinctWords:
    """Counts different words; higher is better."""

    name = "distinct_words"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(len(set(re.findall(r"\w+", response.lower())))) for response in responses]

    def describe(self) -> str:
        return "distinct_words: different words in the response"


def main() -> Comparison:
    """Judge our answers against theirs."""
    return compare(PROMPTS, Side("ours", OURS), Side("theirs", THEIRS), judge=DistinctWords(), resamples=2000, seed=0)


if __name__ == "__main__":
    result = main().result
    low, high = result["wilson_interval"]
    print(f"win rate {result['win_rate']:.3f}, 95 % interval {low:.3f} to {high:.3f} (Wilson, 5 prompts)")
