"""What training makes of the launcher's settings, where the launch modes cannot show it."""

from __future__ import annotations

import pytest
from accelerate import PartialState
from trl import DPOConfig

from alignment.errors import UserError
from alignment.recipes import load_recipe
from alignment.runs.lifecycle import sharding, trl_config
from tests.trainers.building import config


def test_fsdp_that_accelerate_leaves_out_is_said(tmp_path, monkeypatch, capsys):
    """On CPUs accelerate reads fsdp2.yaml and shards nothing."""
    args, state = config(tmp_path), PartialState(cpu=True)
    assert sharding(args, state) == "none" and capsys.readouterr().out == ""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding(args, state) == "none"
    assert capsys.readouterr().out.startswith("warning: the launcher asks for FSDP")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr_scheduler_kwargs={foo: 1}"], "lr_scheduler_kwargs: {'foo': 1}: .*unexpected keyword argument 'foo'"),
        (["lr_scheduler_type=cosine", "lr_scheduler_kwargs={num_cycles: x}"], "lr_scheduler_kwargs: .*float: 'x'"),
        (
            ["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={lr_end: 1}"],
            "lr_scheduler_kwargs: .*must be smaller",
        ),
        (["optim=sgd", "optim_args=momentum=fast"], "optim_args: momentum=fast: could not convert string to float"),
        (["optim=sgd", "optim_args=momentum=-1"], "optim_args: momentum=-1: Invalid momentum value"),
    ],
)
def test_settings_that_optimiser_or_schedule_refuse_are_one_line(root, tmp_path, given, message):
    recipe = load_recipe(root / "recipes/quickstart/dpo.yaml", [f"training.{key}" for key in given])
    with pytest.raises(UserError, match=f"^training.{message}") as said:
        trl_config(DPOConfig, recipe, tmp_path, 1)
    assert "\n" not in str(said.value)


def test_settings_that_optimiser_and_schedule_take(root, tmp_path):
    schedule = ["training.lr_scheduler_type=polynomial", "training.lr_scheduler_kwargs={power: 2}"]
    given = ["training.optim=sgd", "training.optim_args=momentum=0.9, nesterov=true", *schedule]
    args = trl_config(DPOConfig, load_recipe(root / "recipes/quickstart/dpo.yaml", given), tmp_path, 1)
    assert args.lr_scheduler_kwargs == {"power": 2} and args.optim_args == "momentum=0.9, nesterov=true"
