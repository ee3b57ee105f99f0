"""Versions against the tested ranges."""

from __future__ import annotations

from dataclasses import replace

from packaging.requirements import Requirement

from alignment.doctor import Lora, Setting
from alignment.doctor import environment as looked_at
from alignment.doctor.environment import environment, judge
from alignment.recipes.launch import Launch


def test_a_version_beside_the_tested_range_warns_and_a_missing_package_fails():
    wanted = Requirement("trl>=1.16,<1.17")
    assert judge(wanted, "1.16.4", True).state == "ok"
    assert judge(wanted, "1.17.0", True).state == "warning"
    assert judge(wanted, "1.15.9", True).state == "warning"
    assert judge(wanted, None, True).state == "failed"
    assert judge(wanted, None, False).state == "note"


def test_every_requirement_of_setup_cfg_is_looked_at():
    names = {check.name for check in environment(Setting())}
    assert {"Python", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed"} <= names
    assert "pytest" not in names  # of the test extra: users do not need it


def test_bitsandbytes_is_needed_where_weights_are_quantised(monkeypatch):
    lines = ["torch>=2", "bitsandbytes>=0.50; extra == 'qlora'", "pytest>=8; extra == 'test'"]
    monkeypatch.setattr(looked_at, "requires", lambda name: lines)
    monkeypatch.setattr(looked_at, "_installed", lambda name: None if name == "bitsandbytes" else "2.0")
    plain = Setting()
    quantised = replace(plain, lora=Lora(), quantization="nf4")
    states = [{c.name: c.state for c in environment(s)}["bitsandbytes"] for s in (plain, quantised)]
    assert states == ["note", "failed"]


def test_a_compiler_is_needed_for_offload_alone(monkeypatch):
    monkeypatch.setenv("PATH", "")
    plain, offload = Setting(), Setting(sharding="zero3", offload_optimizer=True)
    states = [{c.name: c.state for c in environment(s)}["compiler"] for s in (plain, offload)]
    assert states == ["ok", "failed"]


def test_another_attention_needs_its_package_only_where_the_recipe_asks_for_it(monkeypatch):
    asked = {c.name: c for c in environment(Setting(), None, "flash_attention_2")}["flash_attn"]
    assert asked.state == "warning" and "model.attn_implementation=flash_attention_2 needs it" in asked.text
    assert not {"flash_attn", "vllm"} & {c.name for c in environment(Setting(), None, "sdpa")}


def test_what_training_refuses_under_a_launch_fails():
    """docs/launching.md: the table on mixed precision, and quantised weights."""
    half, none = (
        Launch.model_validate({"distributed_type": "NO", "mixed_precision": precision}) for precision in ("bf16", "no")
    )
    plain, bf16 = Setting(), Setting(mixed_precision="bf16")
    cases = [(plain, half), (plain, none), (bf16, half), (bf16, none), (plain, None)]
    failed = [[c.name for c in environment(s, launch) if c.state == "failed"] for s, launch in cases]
    assert failed == [["mixed precision"], [], [], [], []]
    quantised = Setting(lora=Lora(), quantization="nf4")
    for sharding, names in (("zero3", True), ("fsdp", True), ("zero2", False), ("ddp", False)):
        found = {c.name for c in environment(replace(quantised, sharding=sharding)) if c.state == "failed"}
        assert ("quantization" in found) is names
