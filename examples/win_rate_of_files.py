"""Win rate between two files of responses: rows of `prompt` and `response` in JSON lines.

python examples/win_rate_of_files.py OURS.jsonl THEIRS.jsonl

The same on the command line: python evaluation/win_rate.py --a OURS.jsonl --b THEIRS.jsonl --reward vader
"""

from __future__ import annotations

import sys
from pathlib import Path

from alignment.rewards import get_reward
from evaluation.win_rate import win_rate_of_files


def main(ours: str, theirs: str) -> dict[str, float]:
    """Judge by VADER's sentiment; return the rate with its interval over prompts."""
    result = win_rate_of_files(Path(ours), Path(theirs), judge=get_reward("vader")).result
    return {"win rate": result["win_rate"], "low": result["interval"][0], "high": result["interval"][1]}


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
