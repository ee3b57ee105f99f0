"""A run that was stopped in an evaluation and resumed has the evaluation of the undisturbed one."""

from __future__ import annotations

import shutil

import pytest

from alignment.files import write_json_lines
from tests.e2e.test_modes import lines
from tests.runs.building_runs import recipe, rows, train


@pytest.mark.parametrize(("kind", "epoch"), [("dpo", 1), ("dpo", 2), ("sft", 2), ("reward_model", 2)])
def test_an_evaluation_that_a_run_was_stopped_in_is_made_up_for(tiny, tmp_path, kind, epoch):
    """Checkpoints of steps come before an epoch's evaluation: a run that was killed there has no line of it."""
    held_out = [row for row in rows() if row["prompt"] not in {given["prompt"] for given in rows()[:8]}]
    if kind == "sft":
        held_out = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in held_out]
    write_json_lines(tmp_path / "held_out.jsonl", held_out)
    made = recipe(
        kind,
        tiny,
        tmp_path,
        f"data.eval={tmp_path / 'held_out.jsonl'}",
        "training.eval_strategy=epoch",
        "training.num_train_epochs=2",
        "training.save_steps=4",
        given=rows()[:8],
    )
    run = train(made)
    undisturbed = lines(run)
    assert [row["step"] for row in undisturbed if "eval_loss" in row] == [4, 8]

    stopped = [row for row in undisturbed if row["step"] < 4 * epoch or (row["step"] == 4 * epoch and "loss" in row)]
    write_json_lines(run / "metrics.jsonl", stopped)
    shutil.rmtree(run / "final")
    if epoch == 1:
        shutil.rmtree(run / "checkpoint-8")
    assert lines(train(made, resume=True)) == undisturbed
