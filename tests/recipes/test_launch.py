"""accelerate's configuration file: a mistake in it is one line and exit code 2, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment import cli
from alignment.errors import UserError
from alignment.recipes.launch import DISTRIBUTED, read_launch
from tests.recipes.conftest import ROOT

GPUS = "distributed_type: MULTI_GPU\n"
MISTAKES = [
    ("{", "not valid YAML"),
    ("- 1", "the keys of an accelerate configuration are needed"),
    ("num_processes: 2", "distributed_type: Field required"),
    (GPUS, "num_processes: Field required"),
    (f"{GPUS}num_processes: eight", "num_processes: .*valid integer, not 'eight'"),
    (f"{GPUS}num_processes: auto", "num_processes: .*not 'auto'"),
    (f"{GPUS}num_processes: [2]", r"num_processes: .*not \[2\]"),
    (f"{GPUS}num_processes: true", "num_processes: .*not True"),
    (f"{GPUS}num_processes: 0", "num_processes: "),
    ("distributed_type: DEEPSPED\nnum_processes: 2", "distributed_type: .*did you mean 'DEEPSPEED'"),
    (f"{GPUS}num_processes: 2\nmixed_precision: half", "mixed_precision: .*not 'half'"),
    (f"{GPUS}num_processes: 2\ndeepspeed_config: {{zero_stage: three}}", "deepspeed_config.zero_stage: .*'three'"),
    (f"{GPUS}num_processes: 2\ndeepspeed_config: {{zero_stage: null}}", "deepspeed_config.zero_stage: .*None"),
    (f"{GPUS}num_processes: 2\ndeepspeed_config: foo", "deepspeed_config: .*not 'foo'"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[text.replace("\n", "; ") for text, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path, text, said):
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"launch.yaml: {said}") as refused:
        read_launch(file)
    assert "\n" not in str(refused.value)


def test_training_looks_into_the_file_before_it_launches(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.os, "execv", lambda *arguments: pytest.fail("launched"))
    file = tmp_path / "launch.yaml"
    for text, said in [*MISTAKES[:4], (None, "no such file")]:
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match=said):
            cli.train(Path("recipes/quickstart/dpo.yaml"), [], file)


def test_what_accelerate_takes_is_taken():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    assert set(DISTRIBUTED) == {kind.value for kind in DistributedType}
    for file in sorted((ROOT / "recipes/accelerate").glob("*.yaml")):
        ours, theirs = read_launch(file), load_config_from_file(str(file))
        assert (ours.distributed_type, ours.num_processes) == (theirs.distributed_type.value, theirs.num_processes)
        assert ours.mixed_precision == (theirs.mixed_precision or "no")


def test_no_without_quotes_is_no(tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: no\ndeepspeed_config:\n")
    assert read_launch(file).mixed_precision == "no" and read_launch(file).deepspeed_config.zero_stage == 2
