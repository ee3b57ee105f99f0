"""On-policy objectives, launched four ways: on recorded samples one process, two, ZeRO-2 and ZeRO-3 are the same
training, and each resumes exactly while it samples. As test_modes.py, whose files and launches it uses.

What is sampled may differ with the number of processes; which prompts make up a step may not. p3o stops inside a
rollout, between two passes over it; egpo takes a look-ahead step before every step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preferences import read_rows
from alignment.files import write_json_lines
from tests import tiny_lm
from tests.e2e.conftest import finished, launched
from tests.e2e.modes import carry_out
from tests.e2e.test_modes import (
    KILLED_AT,
    LAUNCHES,
    OF_THE_SPLIT,
    SHORT,
    STEPS,
    no_compiler,
    same_weights,
    straight,
    training_lines,
    weights,
)

REWARD = f"{{name: regex, pattern: '{tiny_lm.KIND_PATTERN}'}}"
JUDGED = f"reward={REWARD}"
ORACLE = ("reward=null", f"oracle={{name: bradley_terry, temperature: 0.25, reward: {REWARD}}}")
CASES: dict[str, tuple[str, ...]] = {
    "p3o": (JUDGED, "rollout.prompts_per_rollout=8", "rollout.inner_epochs=2"),
    "egpo": ORACLE,
    "egpo-lora": (*ORACLE, "lora.r=4"),
    "online_ipo2": ORACLE,
    "nash_md": (*ORACLE, "rollout.explore={temperature: 1.5, top_k: 20}", "rollout.mixture=0.5"),
    "nash_md_pg": (*ORACLE, "rollout.mixture=0.5"),
    "vpo_online": (JUDGED, "rollout.label_noise=0.2"),
    # The chain is what comes before the first " and"; the reference answer is put behind it.
    "likelihood": (
        "oracle=null",
        "objective={name: likelihood, reward: logprob}",
        "rollout={samples: 3, answer: {marker: ' and', separator: ' '}}",
    ),
}
OBJECTIVES = {"likelihood": "egpo"}  # whose quick start is taken where a case has none of its name
EVERYWHERE = ("p3o", "egpo")  # the others are in `make test-all`, as are all launches of several processes
REPLAYED_IN_ONE = (*EVERYWHERE, "vpo_online", "likelihood")  # for the ten minutes' sake
QUICK = ("one",)
POSSIBLE = [
    pytest.param(mode, case, marks=[] if mode in QUICK and case in EVERYWHERE else pytest.mark.slow)
    for mode in ("one", *LAUNCHES)
    for case in CASES
]
REPLAYED = [p for p in POSSIBLE if p.values[0] != "one" or p.values[1] in REPLAYED_IN_ONE]
PROMPTS = 10  # not a multiple of a rollout
# Sharded weights are padded, which changes the number of those that a look-ahead step can change.
COUNTED = {"look_ahead/changed"}


def job(tiny: Path, folder: Path, mode: str, case: str, run: str, *extra: str, **more: Any) -> dict[str, Any]:
    given = [
        f"model.name_or_path={tiny}",
        f"data.prompts={{name: {folder / 'prompts.jsonl'}}}",
        "evaluation=null",
        "generation.max_new_tokens=10",
        *SHORT,
        "training.warmup_steps=0",
        "training.logging_steps=1",
        f"training.output_dir={folder / mode / run}",
        *CASES[case],
        *extra,
    ]
    quick = OBJECTIVES.get(case, case.partition("-")[0])
    return {"recipe": f"recipes/quickstart/{quick}.yaml", "overrides": given, **more}


def plan(tiny: Path, folder: Path, mode: str, cases: list[str]) -> list[dict[str, Any]]:
    """Every case sampled to its end, again from the checkpoint in its middle, and on what one process has sampled."""
    found = []
    for case in cases:
        recorded = f"generation.replay={straight(folder / 'one', case) / 'rollouts.jsonl'}"
        found += [job(tiny, folder, mode, case, case), job(tiny, folder, mode, case, case, resume=KILLED_AT)]
        if mode != "one" or case in REPLAYED_IN_ONE:
            found.append(job(tiny, folder, mode, case, f"{case}-replayed", recorded))
    return found


@pytest.fixture(scope="module")
def trained(root: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """`trained(mode, case)`: the folder of that mode's runs; each plan is carried out once, "one" first."""
    folder = tmp_path_factory.mktemp("online-modes")
    openings = tiny_lm.openings()[:PROMPTS]
    rows = [{"prompt": opening, "answer": f"{tiny_lm.KIND[i % 5]} ."} for i, opening in enumerate(openings)]
    write_json_lines(folder / "prompts.jsonl", rows)  # only likelihood reads the answers
    done: set[tuple[str, bool]] = set()

    def carry(mode: str, everywhere: bool) -> None:
        if (mode, everywhere) in done:
            return
        done.add((mode, everywhere))
        jobs = plan(tiny, folder, mode, [case for case in CASES if (case in EVERYWHERE) == everywhere])
        if mode == "one":
            return carry_out(jobs)
        carry("one", everywhere)
        if everywhere:  # online_ipo1 on the samples that egpo's steps, not its look-aheads, were taken on
            rows = read_rows(straight(folder / "one", "egpo") / "rollouts.jsonl")
            write_json_lines(folder / "half.jsonl", [row | {"phase": 0} for row in rows if row["phase"] == 1])
            replay, recipe = f"generation.replay={folder / 'half.jsonl'}", "recipes/quickstart/online_ipo1.yaml"
            jobs.append(job(tiny, folder, mode, "egpo", "online_ipo1", replay, recipe=recipe))
        where = no_compiler(folder / mode) | {"ALIGNMENT_CACHE": str(folder / mode / "cache")}
        file = folder / mode / f"plan-{everywhere}.json"
        file.write_text(json.dumps(jobs))
        process = launched(root, list(LAUNCHES[mode]), str(file), [], program="tests/e2e/modes.py", **where)
        finished(process, timeout=60 + 20 * len(jobs))
        return None

    def get(mode: str, case: str) -> Path:
        carry(mode, case in EVERYWHERE)
        return folder / mode

    return get


def lines(run: Path, *left_out: str) -> list[dict[str, float]]:
    """Training lines without timings."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("seconds/", "tokens_per_second/"))}
        for row in training_lines(run, "step_time", *left_out)
    ]


@pytest.mark.parametrize(("mode", "case"), POSSIBLE)
def test_a_resumed_run_is_one_that_never_stopped(trained, mode, case):
    """Metrics, samples with all their numbers, and weights, to the last bit."""
    folder = trained(mode, case)
    run, uninterrupted = folder / case, straight(folder, case)
    assert [row["step"] for row in training_lines(uninterrupted)] == list(range(1, STEPS + 1))
    assert lines(run) == lines(uninterrupted)
    assert same_weights(run, uninterrupted)
    assert (run / "rollouts.jsonl").read_text() == (uninterrupted / "rollouts.jsonl").read_text()


@pytest.mark.parametrize(("mode", "case"), REPLAYED)
def test_every_launch_is_the_same_training_on_recorded_samples(trained, mode, case):
    run, recorded = trained(mode, case) / f"{case}-replayed", straight(trained("one", case), case)
    found, expected = (lines(r, *OF_THE_SPLIT | COUNTED) for r in (run, recorded))
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    assert len({row["loss"] for row in expected}) > STEPS // 2  # it did train
    trained_, wanted = weights(run), weights(recorded)
    assert trained_.keys() == wanted.keys()
    assert max(float((trained_[name] - wanted[name]).abs().max()) for name in trained_) < 1e-4
    if mode == "one":
        assert found == expected and same_weights(run, recorded)
    if case.startswith("egpo"):
        assert min(row["look_ahead/changed"] for row in training_lines(run)) > 0.4  # B of LoRA is 0 at first


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in LAUNCHES])
def test_the_look_ahead_leaves_nothing_behind(trained, mode):
    """Without its extra steps egpo is online_ipo1, to the last bit: what the shards held was put back."""
    folder = trained(mode, "egpo")
    ours, plain = folder / "egpo-replayed", folder / "online_ipo1"
    names = ("loss", "grad_norm", "learning_rate", "objective/margin")
    found, expected = ([[row[name] for name in names] for row in training_lines(run)] for run in (ours, plain))
    assert found == expected and len(found) == STEPS
    assert same_weights(ours, plain)


def samples(folder: Path, case: str) -> list[dict[str, Any]]:
    return read_rows(straight(folder, case) / "rollouts.jsonl")


@pytest.mark.parametrize(("mode", "case"), POSSIBLE)
def test_every_launch_asks_the_same_prompts_and_each_process_draws_for_itself(trained, mode, case):
    ours, one = samples(trained(mode, case), case), samples(trained("one", case), case)
    places = [(row["rollout"], row["phase"], row["row"]) for row in ours]
    assert places == [(row["rollout"], row["phase"], row["row"]) for row in one]
    per_rollout, rollouts = (8, 2) if case == "p3o" else (4, STEPS)
    assert len(places) == per_rollout * rollouts * (2 if case.startswith("egpo") else 1)
    whole = PROMPTS // per_rollout  # rollouts of the first epoch that repeat nothing
    rows = [row for rollout, phase, row in places if phase == 0 and rollout < whole]
    assert len(set(rows)) == len(rows) == whole * per_rollout
    if mode != "one":  # the first process draws what one process would, the second by another seed
        share = per_rollout // 2
        assert [r["responses"] for r in ours[share:per_rollout]] != [r["responses"] for r in one[share:per_rollout]]
