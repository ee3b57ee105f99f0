"""Fixtures of tests of rewards and judges."""

from __future__ import annotations

import pytest

from alignment.rewards import get_oracle


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def make(tmp_path):
    """A judge of a server, with a cache of the test's own and a template that the server can take apart."""
    template = tmp_path / "template.txt"
    template.write_text("{prompt}|{first}|{second}")

    def made(url, **keys):
        defaults = {"model": "m", "template": str(template), "cache": str(tmp_path / "cache"), "retries": 0}
        return get_oracle("llm_judge", base_url=url, **{**defaults, **keys})

    return made
