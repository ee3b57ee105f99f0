"""Probes of gradients in real launches: two processes share the pairs out, ZeRO-2 is as one, ZeRO-3 is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.data.preferences import read_rows
from alignment.files import write_json_lines
from tests.e2e.conftest import finished, launched, series
from tests.e2e.test_modes import LAUNCHES, SETTINGS, pairs

PROBE = ("training.diagnostics.every=3", "training.diagnostics.pairs=3", "training.diagnostics.parameters=all")
DPO = "recipes/quickstart/dpo.yaml"


def given(tiny: Path, run: Path, *more: str) -> list[str]:
    rows = run.parent / "rows.jsonl"
    write_json_lines(rows, pairs())
    paths = [f"model.name_or_path={tiny}", f"data.train={rows}", f"training.output_dir={run}"]
    return [*(key for key in SETTINGS if "cpu_threads" not in key), *paths, *more]  # `launched` says that


def probes(run: Path) -> list[list[float]]:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "entanglement/inner" in row]
    return [[row["step"], *(row[f"entanglement/{key}"] for key in ("inner", "cosine", "norm_chosen"))] for row in rows]


@pytest.mark.slow
def test_launches_give_the_same_probes_and_the_same_training(root, tiny, tmp_path):
    found = {}
    for mode, options in {"one": ("--num_processes", "1", "--cpu"), **LAUNCHES}.items():
        run = tmp_path / mode
        if mode == "zero3":
            printed, _ = launched(root, [*options], DPO, given(tiny, run, *PROBE)).communicate(timeout=300)
            assert "error: training.diagnostics: ZeRO-3 and FSDP split every weight" in printed
            continue
        finished(launched(root, [*options], DPO, given(tiny, run, *PROBE)))
        found[mode] = probes(run)
        assert [row[0] for row in found[mode]] == [0, 3, 6]
    for mode in ("two", "zero2"):
        for row, expected in zip(found[mode], found["one"], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-3), mode
    plain = tmp_path / "plain"
    finished(launched(root, [*LAUNCHES["zero2"]], DPO, given(tiny, plain)))
    assert series(plain, "loss") == series(tmp_path / "zero2", "loss")
