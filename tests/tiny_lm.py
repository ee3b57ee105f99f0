"""The language model that the tests train from scratch in seconds: the grammar of `evaluation.tiny`.

Not a fixture by itself: `conftest.py` caches one per session.
"""

from evaluation.tiny import HARSH, KIND, KIND_PATTERN, build_grammar, openings

__all__ = ["HARSH", "KIND", "KIND_PATTERN", "build", "openings"]

build = build_grammar
