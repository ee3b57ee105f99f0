"""Several machines: two launches of `recipes/accelerate/zero3_multinode.yaml` on one host, as machine 0 and machine 1.

Slow: `make test-all`. Real as far as one host goes: two launchers, one rendezvous, ZeRO-3 over both; not real are the
network between them and NCCL. What else differs from the use on GPUs: `--mixed_precision no`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.recipes import load_recipe
from alignment.runs.preferences import train
from tests.e2e.conftest import Grammar, finished, free_port, launched, series

pytestmark = pytest.mark.slow
RECIPE = "recipes/quickstart/dpo.yaml"
NUMBERS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl")
SETTINGS = ["training.learning_rate=1e-3", "training.max_steps=6", "training.use_cpu=true"]


def test_two_machines_train_as_one_process(root: Path, grammar: Grammar, tmp_path: Path):
    plain = train(load_recipe(root / RECIPE, grammar.overrides(tmp_path / "plain", *SETTINGS)))
    given = grammar.overrides(tmp_path / "run", *SETTINGS)
    port = free_port()
    both = [
        launched(
            root,
            [
                *("--config_file", "recipes/accelerate/zero3_multinode.yaml", "--mixed_precision", "no"),
                *("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port),
                *("--machine_rank", str(rank)),
            ],
            RECIPE,
            given,
        )
        for rank in (0, 1)
    ]
    printed = [finished(process) for process in both]
    assert [text.count("report: ") for text in printed] == [1, 0]  # only the first process of all writes
    expected = series(plain, *NUMBERS)
    assert len(expected) == 6
    for found, other in zip(series(tmp_path / "run", *NUMBERS), expected, strict=True):
        assert found == pytest.approx(other, rel=1e-4, abs=1e-4)
