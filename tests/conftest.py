"""Shared by all tests: offline, one thread, a cache of its own, and the tiny language model trained once a session."""

from __future__ import annotations

import os

# Before torch is imported: tiny models are fastest on one thread, and nothing may reach for a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ALIGNMENT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plug-in registers must not reach the next test of the process: order would decide what is listed."""
    from alignment.objectives import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny language model (`tiny_lm`)."""
    from tests import tiny_lm

    return tiny_lm.build(tmp_path_factory.mktemp("tiny"))
