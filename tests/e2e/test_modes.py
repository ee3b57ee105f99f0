"""One recipe, four ways to launch it: one process, two, ZeRO-2 and ZeRO-3 are the same training, and each resumes
exactly.

Every mode is one launch that trains everything (`modes.py`), where neither a compiler nor ninja can be found. Six
steps of seven pairs in batches of four: a run resumed at step 3 continues in the middle of its second epoch. That is
float32; one more launch takes zero3.yaml as it is, in bfloat16, and holds it against float32 loosely. Not covered,
because nothing here has a GPU: NCCL, FSDP, half precision's kernels on one.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alignment.data.preferences import read_rows
from alignment.files import write_json_lines
from alignment.models import load_model
from alignment.objectives import list_objectives
from tests import tiny_lm
from tests.e2e.conftest import finished, launched
from tests.e2e.modes import carry_out

QUICKSTART = Path("recipes/quickstart")
# One objective a family: with a reference, without one, with a degree head, with a calibration response, with a
# previous iterate.
FAMILIES: dict[str, tuple[str, ...]] = {
    "dpo": (),
    "simpo": (),
    "spo": (),
    "vpo": ("objective.calibration=given",),
    "inpo": (),
}
OFFLINE = {card.name for card in list_objectives() if card.batch == "pairs"}
OTHERS = sorted(OFFLINE & {path.stem for path in QUICKSTART.glob("*.yaml")})
OTHERS = [name for name in OTHERS if name not in FAMILIES]
ADAPTERS = {"full": (), "lora": ("lora.r=4",)}
STEPS, KILLED_AT = 6, 3
SHORT = (  # what every mode's runs share, of whatever kind they are
    "training.cpu_threads=1",
    "training.use_cpu=true",
    "training.global_batch_size=4",
    f"training.max_steps={STEPS}",
    "training.save_strategy=steps",
    f"training.save_steps={KILLED_AT}",
    "training.learning_rate=1e-3",
)
SETTINGS = ("data.sample=null", "reward=null", "evaluation=null", *SHORT, "training.warmup_steps=2")
SHARDED = ("--num_processes", "2", "--mixed_precision", "no")
LAUNCHES = {
    "two": ("--config_file", "recipes/accelerate/cpu2.yaml"),
    "zero2": ("--config_file", "recipes/accelerate/zero2.yaml", *SHARDED),
    "zero3": ("--config_file", "recipes/accelerate/zero3.yaml", *SHARDED),
}
AS_SHIPPED = "zero3-bfloat16"
OPTIONS = LAUNCHES | {AS_SHIPPED: ("--config_file", "recipes/accelerate/zero3.yaml", "--num_processes", "2")}
# What no two runs share. displacement without a reference is that of the main process's first pairs.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")
OF_THE_MACHINE = {"tokens_per_second", *(f"eval_{speed}" for speed in SPEEDS)}
OF_THE_SPLIT = {"padding", "eval_padding"}


@dataclass(frozen=True)
class Files:
    """What every run needs, and where all of them go."""

    root: Path
    tiny: Path
    rows: Path
    held_out: Path
    adapter: Path
    runs: Path

    def job(self, mode: str, case: str, objective: str, *overrides: str, **more: Any) -> dict[str, Any]:
        """One entry of a plan (`modes.py`)."""
        given = [
            *SETTINGS,
            f"model.name_or_path={self.tiny}",
            f"data.train={self.rows}",
            f"training.output_dir={self.runs / mode / case}",
            *(override.format(held_out=self.held_out) for override in overrides),
        ]
        return {"recipe": str(QUICKSTART / f"{objective}.yaml"), "overrides": given, **more}


def pairs(start: int = 0, stop: int = 7) -> list[dict[str, Any]]:
    """Rows of the grammar of mixed lengths, with a calibration response and scores; other numbers, other prompts."""

    def words(of: list[str], count: int, first: int) -> str:
        return " " + " and ".join(of[(first + j) % 5] for j in range(count)) + " ."

    return [
        {
            "prompt": opening,
            "chosen": words(tiny_lm.KIND, 1 + i % 4, i),
            "rejected": words(tiny_lm.HARSH, 1 + (i // 2) % 4, i),
            "calibration": words(tiny_lm.KIND, 1 + (i // 3) % 4, i + 2),
            "reward_chosen": 1.0 + i % 4,
            "reward_rejected": -1.0,
            "preference_chosen": 0.6 + 0.1 * (i % 4),
            "preference_rejected": 0.3,
            "log_odds_chosen": 0.5 + i % 4,
            "log_odds_rejected": -1.0,
        }
        for i, opening in enumerate(tiny_lm.openings()[start:stop])
    ]


@pytest.fixture(scope="module")
def files(root: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Rows, and an adapter that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("modes")
    write_json_lines(folder / "rows.jsonl", pairs())
    write_json_lines(folder / "held_out.jsonl", pairs(7, 12))
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(tiny), wanted).save_pretrained(str(folder / "adapter"))
    return Files(root, tiny, folder / "rows.jsonl", folder / "held_out.jsonl", folder / "adapter", folder / "runs")


@dataclass(frozen=True)
class Cases:
    """Which runs a plan holds: case → (objective, overrides)."""

    runs: dict[str, tuple[str, tuple[str, ...]]]

    def plan(self, files: Files, mode: str) -> list[dict[str, Any]]:
        """Every case straight to the end, then again from the checkpoint in its middle."""
        found = []
        for case, (objective, overrides) in self.runs.items():
            found.append(files.job(mode, case, objective, *overrides))
            found.append(files.job(mode, case, objective, *overrides, resume=KILLED_AT))
        return found


EVERY = {f"{o}-{k}": (o, (*more, *adapter)) for o, more in FAMILIES.items() for k, adapter in ADAPTERS.items()}
LATER_NAMES = ("simpo-lora", "vpo-lora", "inpo-lora")  # for the ten minutes' sake
LATER = {name: case for name, case in EVERY.items() if name in LATER_NAMES}
PRECOMPUTED, EVALUATED = "dpo-precomputed", "dpo-evaluated"
EXTRA: dict[str, tuple[str, tuple[str, ...]]] = {
    PRECOMPUTED: ("dpo", ("reference.precompute=true",)),
    # Five rows do not fill two processes' batches of two.
    EVALUATED: (
        "dpo",
        (
            "data.eval={held_out}",
            "training.eval_strategy=steps",
            f"training.eval_steps={KILLED_AT}",
            "training.per_device_eval_batch_size=2",
        ),
    ),
}
FAST = Cases({name: case for name, case in EVERY.items() if name not in LATER} | EXTRA)
# Weights that are loaded in float32, and in bfloat16: ZeRO-3 makes both bfloat16, and keeps float32 masters.
HALF: dict[str, tuple[str, ...]] = {"dpo-full": (), "spo-full": (), "spo-lora": ("lora.r=4", "model.dtype=bfloat16")}
SLOW = Cases(LATER | {f"{o}-{k}": (o, adapter) for o in OTHERS for k, adapter in ADAPTERS.items()})
ADAPTER, REGROUPED = "dpo-adapter", "dpo-regrouped"


def fast_plan(files: Files, mode: str) -> list[dict[str, Any]]:
    adapter = ("dpo", f"model.adapter={files.adapter}")
    every_second = ("dpo", "training.logging_steps=2", f"model.adapter={files.adapter}")
    one_by_one = ("training.per_device_train_batch_size=1", "training.layout=paired")
    return [
        *FAST.plan(files, mode),
        files.job(mode, ADAPTER, *adapter),
        files.job(mode, ADAPTER, *adapter, resume=KILLED_AT),
        files.job(mode, REGROUPED, *every_second),
        files.job(mode, REGROUPED, *every_second, *one_by_one, resume=KILLED_AT),
    ]


def half_plan(files: Files) -> list[dict[str, Any]]:
    return [
        files.job(AS_SHIPPED, case, case.partition("-")[0], "training.bf16=true", *overrides)
        for case, overrides in HALF.items()
    ]


def no_compiler(folder: Path) -> dict[str, str]:
    """An environment in which nothing can be compiled and nothing compiled is found."""
    (folder / "empty").mkdir(parents=True, exist_ok=True)
    path = str(folder / "empty")
    assert not any(shutil.which(tool, path=path) for tool in ("g++", "c++", "cc", "gcc", "clang", "ninja"))
    nowhere = str(folder / "nowhere")
    return {"PATH": path, "CXX": f"{nowhere}/g++", "CC": f"{nowhere}/gcc", "TORCH_EXTENSIONS_DIR": f"{nowhere}/built"}


def launch(files: Files, mode: str, plan: list[dict[str, Any]]) -> None:
    """Carry out `plan` in `mode`: in this process, or in one launch."""
    if mode == "one":
        return carry_out(plan)
    folder = files.runs / mode
    given = no_compiler(folder) | {"ALIGNMENT_CACHE": str(folder / "cache")}  # what one mode kept is none of another's
    (folder / "plan.json").write_text(json.dumps(plan))
    options = list(OPTIONS[mode])
    process = launched(files.root, options, str(folder / "plan.json"), [], program="tests/e2e/modes.py", **given)
    finished(process, timeout=60 + 15 * len(plan))
    assert not Path(given["TORCH_EXTENSIONS_DIR"]).exists()
    return None


@pytest.fixture(scope="module")
def trained(files: Files):
    """`trained(mode, slow=False)`: the folder of that mode's runs; each plan is carried out once."""
    done: dict[tuple[str, bool], Path] = {}

    def get(mode: str, slow: bool = False) -> Path:
        if (mode, slow) not in done:
            plan = half_plan(files) if mode == AS_SHIPPED else fast_plan(files, mode)
            launch(files, mode, SLOW.plan(files, mode) if slow else plan)
            done[mode, slow] = files.runs / mode
        return done[mode, slow]

    return get


def lines(run: Path, *left_out: str) -> list[dict[str, float]]:
    """Every line of metrics.jsonl without what depends on the machine."""
    gone = {*OF_THE_MACHINE, *left_out}
    return [{key: value for key, value in row.items() if key not in gone} for row in read_rows(run / "metrics.jsonl")]


def training_lines(run: Path, *left_out: str) -> list[dict[str, float]]:
    """`lines` without those of evaluations."""
    return [row for row in lines(run, *left_out) if "loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of `final/`: an adapter's, or a model's, and those of a degree head."""
    final = run / "final"
    adapter = final / "adapter_model.safetensors"
    found = load_file(adapter if adapter.is_file() else final / "model.safetensors")
    assert not any("degree" in name for name in found)
    if "degree/pairs" in lines(run)[0]:
        found |= {f"degree_head.{name}": value for name, value in load_file(final / "degree_head.safetensors").items()}
    return found


def same_weights(run: Path, other: Path) -> bool:
    one, two = weights(run), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def straight(folder: Path, case: str) -> Path:
    return folder / f"{case}-straight"


def assert_resumed_exactly(run: Path, uninterrupted: Path) -> None:
    """The same lines, none twice, and the same bits."""
    assert [row["step"] for row in training_lines(uninterrupted)] == list(range(1, STEPS + 1))
    assert lines(run) == lines(uninterrupted)
    assert same_weights(run, uninterrupted)


def assert_same_training(run: Path, plain: Path) -> None:
    """Every number of every step to 1e-4 of one plain process's, and the weights that come out."""
    frozen = "displacement/chosen" in lines(plain)[0] and "kl" in lines(plain)[0]
    split = OF_THE_SPLIT if frozen else OF_THE_SPLIT | {"displacement/chosen", "displacement/rejected"}
    found, expected = lines(run, *split), lines(plain, *split)
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        if abs(other.get("rewards/margins", 1.0)) < 1e-4:  # before anything has moved, rounding decides who is ahead
            one.pop("rewards/accuracies"), other.pop("rewards/accuracies")
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    assert len({row["loss"] for row in training_lines(plain)}) > STEPS // 2  # it did train
    trained, wanted = weights(run), weights(plain)
    assert trained.keys() == wanted.keys()
    assert max(float((trained[name] - wanted[name]).abs().max()) for name in trained) < 1e-4


# ZeRO-3 is two processes as well, and shards most: the other launches are in `make test-all`, for the minutes' sake.
MODES = [pytest.param(m, marks=[pytest.mark.slow] if m in ("two", "zero2") else []) for m in ("one", *LAUNCHES)]


@pytest.mark.parametrize("case", [*FAST.runs, ADAPTER])
@pytest.mark.parametrize("mode", MODES)
def test_half_and_half_is_the_whole(trained, mode, case):
    folder = trained(mode)
    middle = json.loads((folder / case / f"checkpoint-{KILLED_AT}" / "trainer_state.json").read_text())
    assert middle["global_step"] == KILLED_AT and 1 < middle["epoch"] < 2
    assert_resumed_exactly(folder / case, straight(folder, case))


@pytest.mark.parametrize("case", [*FAST.runs, ADAPTER])
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_launch_is_the_same_training(trained, mode, case):
    assert_same_training(straight(trained(mode), case), straight(trained("one"), case))


@pytest.mark.parametrize("mode", MODES)
def test_a_precomputed_reference_is_the_reference(trained, mode):
    """The same series as with the reference in memory; and each mode has computed it, for itself."""
    folder = trained(mode)
    assert_same_training(straight(folder, PRECOMPUTED), straight(folder, "dpo-full"))
    frozen = json.loads((straight(folder, PRECOMPUTED) / "manifest.json").read_text())["frozen_weights"]
    assert set(frozen) == {"start"}
    if mode != "one":
        assert len(list((folder / "cache" / "logps").iterdir())) == 1


@pytest.mark.parametrize("mode", MODES)
def test_evaluations_are_of_every_held_out_row_once(trained, mode):
    """Between training lines, with the loss of one process, and without a trace in training."""
    found = lines(straight(trained(mode), EVALUATED))
    assert [(row["step"], "eval_loss" in row) for row in found] == [
        (step, evaluated) for step in range(1, STEPS + 1) for evaluated in (False, True)[: 1 + (step % KILLED_AT == 0)]
    ]
    split = {*OF_THE_SPLIT}
    plain = lines(straight(trained(mode), "dpo-full"), *split)
    assert training_lines(straight(trained(mode), EVALUATED), *split) == plain


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_zero3_as_it_is_trains_in_bfloat16(trained, case):
    """Two places after the point: the series is float32's, and is not float32's."""
    run = trained(AS_SHIPPED) / case
    found, expected = (training_lines(r) for r in (run, straight(trained("one"), case)))
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    losses, plain = ([row["loss"] for row in series] for series in (found, expected))
    assert losses == pytest.approx(plain, abs=0.03) and losses != plain
    if case == "dpo-full":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-2)
    kept = weights(run)
    assert all(bool(value.isfinite().all()) for value in kept.values())
    if case.startswith("spo"):
        assert float(kept["degree_head.weight"].abs().max()) > 0


@pytest.mark.parametrize("mode", MODES)
def test_an_existing_adapter_is_the_reference(trained, mode):
    """Not its base: implicit rewards are 0 at the start, and the log-probs are not those of the base."""
    first, base = (lines(straight(trained(mode), case))[0] for case in (ADAPTER, "dpo-full"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert abs(first["logps/chosen"] - base["logps/chosen"]) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_be_resumed_in_smaller_batches(trained, mode):
    """Pair by pair in the other layout: the same sums. Lines are every second step and at the checkpoint."""
    folder = trained(mode)
    batches = [json.loads((run / "manifest.json").read_text())["batch"] for run in runs_of(folder, REGROUPED)]
    assert batches[0]["per_device"] == 1 < batches[1]["per_device"]
    found, expected = (lines(run, *OF_THE_SPLIT) for run in runs_of(folder, REGROUPED))
    assert [row["step"] for row in expected] == [2, 3, 4, 6]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def runs_of(folder: Path, case: str) -> tuple[Path, Path]:
    return folder / case, straight(folder, case)


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_first_batch_is_kept_as_the_starting_model_scores_it(trained, mode):
    """start.json of a sharded run: the main process's pairs, which are the first of the one process's."""
    kept, plain = (
        json.loads((straight(trained(m), "dpo-full") / "start.json").read_text())["logps"] for m in (mode, "one")
    )
    assert len(kept) == 2 and len(plain) == 4
    for own, expected in zip(kept, plain[:2], strict=True):
        assert own == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_killed_under_zero3_and_resumed_by_another_launch(files, trained):
    """kill -9 to the launcher and both workers after a checkpoint, then what a user does: the command and --resume."""
    uninterrupted = straight(trained("zero3"), "dpo-lora")
    run = files.runs / "killed"
    job = files.job("zero3", "dpo-lora", "dpo", "lora.r=4")
    given = [f"training.output_dir={run}" if w.startswith("training.output_dir=") else w for w in job["overrides"]]
    given.remove("training.cpu_threads=1")  # `launched` says so
    options, where = list(LAUNCHES["zero3"]), no_compiler(files.runs / "zero3")
    process = launched(files.root, options, job["recipe"], given, **where)
    deadline = time.monotonic() + 240
    while not (run / f"checkpoint-{KILLED_AT}" / "files.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    for each in (psutil.Process(process.pid), *workers):
        each.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(workers) >= 2 and not (run / "final").exists()
    printed = finished(launched(files.root, options, job["recipe"], [*given, "--resume"], **where))
    assert printed.count("report: ") == 1
    assert_resumed_exactly(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.runs)
@pytest.mark.parametrize("mode", MODES)
def test_every_other_objective_resumes_exactly(trained, mode, case):
    folder = trained(mode, slow=True)
    assert_resumed_exactly(folder / case, straight(folder, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.runs)
@pytest.mark.parametrize("mode", LAUNCHES)
def test_every_other_objective_trains_the_same(trained, mode, case):
    assert_same_training(straight(trained(mode, slow=True), case), straight(trained("one", slow=True), case))
