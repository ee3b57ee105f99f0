"""What is installed and what there is to run on, against the versions that the suite has run with (setup.cfg)."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignment.doctor.setting import Setting
from alignment.recipes.inspection import ATTENTION_PACKAGES
from alignment.recipes.launch import Launch

State = Literal["ok", "warning", "failed", "note"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, and what to do where it does not stand well."""

    state: State
    name: str
    text: str


def environment(setting: Setting, launch: Launch | None = None, attention: str | None = None) -> list[Check]:
    """Python, installed distributions, the machine, and whether launch and recipe go together.

    A package outside the tested range is a warning: it may well work. One that is missing has failed, unless nothing
    of the setting needs it.

    Args:
        setting: what is to be run.
        launch: the accelerate configuration file that it is run with.
        attention: `model.attn_implementation`.
    """
    installed = [_python(), *_distributions(setting), *_attention(attention)]
    return [*installed, *_machine(), _compiler(setting), *_launch(setting, launch)]


def _python() -> Check:
    wanted = metadata("alignment")["Requires-Python"]
    found = platform.python_version()
    state: State = "ok" if wanted is None or found in SpecifierSet(wanted) else "failed"
    return Check(state, "Python", f"{found} (needs {wanted})")


def _distributions(setting: Setting) -> Iterator[Check]:
    for line in requires("alignment") or []:
        wanted = Requirement(line)
        extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if extra and not wanted.marker.evaluate({"extra": "qlora"}):  # type: ignore[union-attr]
            continue
        needed = not extra or setting.quantization is not None
        yield judge(wanted, _installed(wanted.name), needed)


def judge(wanted: Requirement, found: str | None, needed: bool) -> Check:
    """One distribution's version against the tested range."""
    tested = f"tested: {wanted.specifier}"
    if found is None:
        return Check("failed" if needed else "note", wanted.name, f"not installed ({tested})")
    if wanted.specifier.contains(found, prereleases=True):
        return Check("ok", wanted.name, f"{found} ({tested})")
    return Check("warning", wanted.name, f"{found} is not what the tests have run with ({tested})")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _attention(wanted: str | None) -> Iterator[Check]:
    packages = ATTENTION_PACKAGES.get(wanted or "", ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        yield Check("warning", packages[0], f"not installed here; model.attn_implementation={wanted} needs it")


def _launch(setting: Setting, launch: Launch | None) -> Iterator[Check]:
    """What training refuses, or cannot do, under this launch."""
    precision = "no" if launch is None else launch.mixed_precision
    if precision != "no" and setting.mixed_precision == "no":
        remedy = "set training.bf16 or training.fp16 to match, or launch with mixed_precision no"
        yield Check("failed", "mixed precision", f"the launcher's is {precision}, the recipe has none: {remedy}")
    if setting.quantization is not None and setting.sharding in ("zero3", "fsdp"):
        remedy = "launch with ddp.yaml or zero2.yaml, or set model.quantization=null"
        yield Check("failed", "quantization", f"quantised weights cannot be split by {setting.sharding}: {remedy}")


def _machine() -> Iterator[Check]:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = psutil.virtual_memory()
    total, free = memory.total / 2**30, memory.available / 2**30
    yield Check(
        "note",
        "machine",
        f"{cores} cores, {total:.1f} GiB of memory, {free:.1f} free",
    )
    if not torch.cuda.is_available():
        yield Check("note", "accelerator", "none that torch can use: everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else "; no bfloat16 in hardware"
        yield Check("note", "accelerator", f"{i}: {seen.name}, {seen.total_memory / 2**30:.1f} GiB{bf16}")


def _compiler(setting: Setting) -> Check:
    """DeepSpeed builds its CPU optimizer when it is first used; nothing else of ours is compiled."""
    if not setting.offload_optimizer:
        return Check("ok", "compiler", "not needed")
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        return Check("failed", "compiler", "DeepSpeed's CPU optimizer (offload) is built on first use: install g++")
    return Check("ok", "compiler", f"{found}: builds DeepSpeed's CPU optimizer (offload) on first use")
