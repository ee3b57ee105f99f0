"""What training makes of the launcher's settings, where the launch modes cannot show it."""

from __future__ import annotations

from accelerate import PartialState

from alignment.trainers.launching import sharding
from tests.trainers.building import config


def test_fsdp_that_accelerate_leaves_out_is_said(tmp_path, monkeypatch, capsys):
    """On CPUs accelerate reads fsdp2.yaml and shards nothing."""
    args, state = config(tmp_path), PartialState(cpu=True)
    assert sharding(args, state) == "none" and capsys.readouterr().out == ""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding(args, state) == "none"
    assert capsys.readouterr().out.startswith("warning: the launcher asks for FSDP")
