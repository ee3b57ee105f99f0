"""Reward models, launched four ways: one process, two, ZeRO-2 and ZeRO-3 are the same training, and each resumes
exactly; an ensemble member by member, in one and two processes. As test_modes.py, whose files and launches it uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.files import write_json_lines
from tests.e2e.conftest import finished, launched
from tests.e2e.modes import carry_out
from tests.e2e.test_modes import (
    KILLED_AT,
    LAUNCHES,
    OF_THE_SPLIT,
    SHORT,
    STEPS,
    no_compiler,
    pairs,
    straight,
    training_lines,
)

QUICK = "recipes/quickstart/reward_model.yaml"
# Of real bases, with data, model and sizes of the tests.
SHIPPED = {"full": "recipes/reward_model/bradley_terry.yaml", "members": "recipes/reward_model/ensemble.yaml"}
SMALL = (
    "reward_model.pad_token=null",
    "model.dtype=float32",
    "data.max_length=128",
    "training.bf16=false",
    "training.save_total_limit=null",
)
FULL = ("reward_model.members=1", "reward_model.mode=independent", "reward_model.bootstrap=false")
TRAINED = ("reward_model.freeze_trunk=false",)
CASES: dict[str, tuple[str, ...]] = {
    "full": (*SMALL, "reward_model.center=0.01", "reward_model.label_smoothing=0.1"),
    "lora": (*FULL, *TRAINED, "lora.r=4"),
    "heads": ("reward_model.members=3", *TRAINED),
    "general": (*FULL, *TRAINED, "reward_model.loss=general", "reward_model.planes=2"),
    "frozen": ("reward_model.members=3",),
    "members": (*SMALL, "reward_model.members=2", "lora.r=4"),  # the second one is killed
}
MODES = ["one", *LAUNCHES]
IMPOSSIBLE = {("zero3", "frozen")}
LEFT_OUT = {("zero2", "members"), ("zero3", "members")}  # each member is what "lora" is
POSSIBLE = [(mode, case) for mode in MODES for case in CASES if (mode, case) not in IMPOSSIBLE | LEFT_OUT]
# Launches of several processes are in `make test-all`: preference training's stand for them in `make test`.
MARKED = [pytest.param(m, c, marks=[pytest.mark.slow] if m != "one" else []) for m, c in POSSIBLE]


def job(tiny: Path, folder: Path, mode: str, case: str, **more: Any) -> dict[str, Any]:
    given = [
        f"model.name_or_path={tiny}",
        f"data.train={folder / 'rows.jsonl'}",
        f"data.eval={folder / 'held_out.jsonl'}",
        "training.eval_strategy=no",
        *SHORT,
        "training.warmup_steps=2",
        "training.logging_steps=1",
        f"training.output_dir={folder / mode / case}",
        *CASES[case],
    ]
    return {"recipe": SHIPPED.get(case, QUICK), "overrides": given, **more}


@pytest.fixture(scope="module")
def trained(root: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """`trained(mode)`: the folder of that mode's runs; each plan is carried out once."""
    folder = tmp_path_factory.mktemp("reward-modes")
    write_json_lines(folder / "rows.jsonl", pairs())
    write_json_lines(folder / "held_out.jsonl", pairs(7, 12))
    done: set[str] = set()

    def get(mode: str) -> Path:
        if mode in done:
            return folder / mode
        done.add(mode)
        plan = []
        for case in (case for m, case in POSSIBLE if m == mode):
            plan += [job(tiny, folder, mode, case), job(tiny, folder, mode, case, resume=KILLED_AT)]
        if mode == "one":
            carry_out(plan)
            return folder / mode
        where = no_compiler(folder / mode) | {"ALIGNMENT_CACHE": str(folder / mode / "cache")}
        (folder / mode / "plan.json").write_text(json.dumps(plan))
        process = launched(
            root, list(LAUNCHES[mode]), str(folder / mode / "plan.json"), [], program="tests/e2e/modes.py", **where
        )
        finished(process, timeout=60 + 15 * len(plan))
        return folder / mode

    return get


def runs(folder: Path, case: str) -> tuple[Path, Path]:
    """(resumed, uninterrupted); of the ensemble, the member that was killed."""
    part = "member-1" if case == "members" else "."
    return folder / case / part, straight(folder, case) / part


def weights(run: Path) -> dict[str, torch.Tensor]:
    final = run / "final"
    adapter = final / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else final / "model.safetensors")


@pytest.mark.parametrize(("mode", "case"), MARKED)
def test_a_resumed_run_is_one_that_never_stopped(trained, mode, case):
    run, uninterrupted = runs(trained(mode), case)
    assert [row["step"] for row in training_lines(uninterrupted)] == list(range(1, STEPS + 1))
    assert training_lines(run) == training_lines(uninterrupted)
    one, two = weights(run), weights(uninterrupted)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any("score" in name for name in one)
    assert (run / "held_out.jsonl").read_text() == (uninterrupted / "held_out.jsonl").read_text()


@pytest.mark.parametrize(("mode", "case"), [param for param in MARKED if param.values[0] != "one"])
def test_every_launch_is_the_same_training(trained, mode, case):
    found, expected = (training_lines(runs(trained(m), case)[1], *OF_THE_SPLIT) for m in (mode, "one"))
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    assert len({row["loss"] for row in expected}) > STEPS // 2  # it did train


@pytest.mark.parametrize(("mode", "case"), [param for param in MARKED if param.values[0] != "one"])
def test_held_out_scores_and_constants_are_those_of_one_process(trained, mode, case):
    """Five rows do not fill two processes' batches: none is left out, none counted twice."""
    tables, facts = [], []
    for m in (mode, "one"):
        run = runs(trained(m), case)[1]
        tables.append([json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()])
        facts.append(json.loads((run / "final" / "reward_model.json").read_text()))
    assert len(tables[0]) == 5 and [r["prompt"] for r in tables[0]] == [r["prompt"] for r in tables[1]]
    for one, other in zip(*tables, strict=True):
        for side in ("chosen", "rejected"):
            assert one[side] == pytest.approx(other[side], rel=1e-3, abs=1e-3)
    for name in () if case == "general" else ("mean", "std"):
        assert facts[0][name] == pytest.approx(facts[1][name], rel=1e-3, abs=1e-3)
    assert (facts[0]["mean"] is None) == (case == "general")


@pytest.mark.parametrize("mode", [pytest.param(*p.values[:1], marks=p.marks) for p in MARKED if "members" in p.values])
def test_members_differ_and_a_finished_one_is_left_as_it_is(trained, mode):
    """The resumed launch trained nothing of member 0 again; that the ensemble is whole is said at its end."""
    folder = trained(mode)
    run, uninterrupted = folder / "members", straight(folder, "members")
    one, two = (weights(run / f"member-{i}") for i in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    file = Path("member-0/final/adapter_model.safetensors")
    assert (run / file).stat().st_mtime_ns == (uninterrupted / file).stat().st_mtime_ns  # copied with its time
    assert json.loads((run / "manifest.json").read_text())["members"] == 2
