"""Style of a text (length, headers, lists, bold) and differences of it between two: for style-controlled ratings.

Features are Arena-Hard's (lmarena/arena-hard-auto 196f6b826, utils/add_markdown_info.py and show_result.py), with two
differences. Tokens are words and punctuation marks, not those of a commercial tokenizer. And features are divided by
their standard deviation but not centred, so that 0 means "the same style" and swapping two systems changes nothing but
signs; centred ones compare at the data's mean difference. Which features are used is chosen by name; there, choosing
only length or only markdown cuts columns of the systems instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GROUPS = {"length": ("length",), "markdown": ("headers", "lists", "bold")}
FEATURES = tuple(name for group in GROUPS.values() for name in group)

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_COUNTS = {
    "headers": re.compile(r"^#{1,6}\s", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:[-*+]|\d+[.)])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}


def tokens(text: str) -> int:
    """Words and punctuation marks."""
    return len(_TOKEN.findall(text))


def markdown_counts(text: str) -> dict[str, int]:
    """Headers, list items and bold passages outside of ``` blocks."""
    plain = _CODE.sub("", text)
    return {name: len(pattern.findall(plain)) for name, pattern in _COUNTS.items()}


def style_differences(first: Sequence[str], second: Sequence[str], features: Sequence[str] = FEATURES) -> Array:
    """Of each pair, second relative to first: by length (t2 - t1) / (t2 + t1); else (d2 - d1) / (d2 + d1 + 1).

    t are tokens, d = count / (t + 1) densities. Columns have standard deviation 1 (about 0), or are all 0 where a
    feature never differs.

    Args:
        first, second: n texts each.
        features: of `FEATURES`.

    Returns:
        [n, len(features)].
    """
    sides = []
    for texts in (first, second):
        lengths = [tokens(text) for text in texts]
        counts = [markdown_counts(text) for text in texts]
        rows = [
            {"length": float(t)} | {k: n / (t + 1) for k, n in c.items()} for t, c in zip(lengths, counts, strict=True)
        ]
        sides.append(np.array([[row[name] for name in features] for row in rows]).reshape(len(texts), len(features)))
    one, two = sides
    by_length = np.array([name == "length" for name in features], dtype=bool)
    scale = np.where(by_length, np.maximum(one + two, 1.0), one + two + 1.0)  # two empty texts do not differ
    found = (two - one) / scale
    spread = np.sqrt((found**2).mean(axis=0)) if len(found) else np.ones(len(features))
    return np.asarray(found / np.where(spread > 0, spread, 1.0))
