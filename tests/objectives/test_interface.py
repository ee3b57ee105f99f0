"""Names, errors, the batch, the saturated share and user plug-ins: what the rest of the project relies on."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alignment
from alignment.objectives import PairLogps, get_objective, list_objectives, load_plugin, objective_signature
from alignment.objectives.conformance import run_checks


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def margins(*values: float) -> PairLogps:
    """Pairs with z_w = m/2 and z_l = -m/2 around references at -50."""
    half = column(*values) / 2
    base = torch.full_like(half, -50.0)
    return PairLogps(base + half, base - half, base, base)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("dop", {}, "unknown objective 'dop'; did you mean 'dpop'"),
        ("zzz", {}, "unknown objective 'zzz'; valid: cpo, dpo"),
        ("rpo", {"bta": 0.1}, "objective 'rpo' has no hyper-parameter 'bta'; did you mean 'beta'"),
        ("dpo", {"beta": 0}, "dpo: beta must be a number > 0, got 0"),
        ("dpo", {"beta": "0.1"}, "dpo: beta must be a number > 0, got '0.1'"),
        ("dpo", {"beta": math.nan}, "dpo: beta must be a number > 0, got nan"),
        ("dpo", {"label_smoothing": 0.5}, r"dpo: label_smoothing must be a number in \[0, 0.5\), got 0.5"),
        ("ipo", {"normalization": "avg"}, "ipo: normalization must be one of 'sum' | 'mean', got 'avg'"),
        ("f_dpo", {"divergence": "alpha"}, r"divergence='alpha' needs alpha in \(0, 1\)"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, r"f_dpo: alpha must be a number in \(0, 1\), got 1.0"),
        ("f_dpo", {"divergence": "jsd", "alpha": 0.5}, "divergence='jsd' does not read alpha"),
        ("inpo", {"eta": 0.1, "tau": 0.2}, r"tau must be in \[0, eta\] = \[0, 0.1\], got 0.2"),
    ],
)
def test_bad_names_and_values_are_named(name, keywords, message) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        get_objective(name, **keywords)


def test_derived_defaults() -> None:
    assert get_objective("inpo").hyperparameters == {"eta": 0.005, "tau": pytest.approx(0.005 / 3)}
    assert get_objective("vpo").hyperparameters["calibration"] == "chosen"
    assert get_objective("vpo", mode="online").hyperparameters["calibration"] == "given"
    assert get_objective("vpo", mode="online").needs == ("reference", "calibration", "ref_calibration")
    assert get_objective("rpo", baseline="given", form="mean").needs == (
        "reference", "calibration", "calibration_length",
    )  # fmt: skip
    assert isinstance(get_objective("dpo", beta=1).hyperparameters["beta"], float)


def test_objectives_are_immutable() -> None:
    objective = get_objective("dpo")
    with pytest.raises(AttributeError):
        objective.beta = 3.0


def test_a_missing_column_is_named_with_its_reason() -> None:
    with pytest.raises(ValueError, match="objective 'dpo' needs reference: the batch lacks 'ref_chosen'.*frozen ref"):
        get_objective("dpo").loss(PairLogps(column(-1.0), column(-2.0)))
    with pytest.raises(ValueError, match="'simpo' needs length: the batch lacks 'chosen_length'"):
        get_objective("simpo").rewards(PairLogps(column(-1.0), column(-2.0)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (torch.zeros(3), torch.zeros(2), r"rejected has shape \[2\], expected \[3\]"),
        (torch.zeros(3, 1), torch.zeros(3, 1), r"chosen has shape \[3, 1\], expected \[B\]"),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3), "chosen must be floating point"),
        ([0.0], torch.zeros(1), "chosen must be a tensor, got list"),
    ],
)
def test_a_batch_of_the_wrong_shape_or_type_is_refused(chosen, rejected, message) -> None:
    with pytest.raises(ValueError, match=message):
        PairLogps(chosen, rejected)


def test_gradients_flow_through_half_precision_columns() -> None:
    chosen = torch.tensor([-200.0], dtype=torch.bfloat16, requires_grad=True)
    batch = PairLogps(chosen, *[torch.tensor([-200.0], dtype=torch.bfloat16)] * 3)
    get_objective("dpo", beta=0.1).loss(batch).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.05, rel=1e-2)


def test_saturated_dpo_has_its_closed_form() -> None:
    """2 beta sigmoid(-beta m) is below 1 % of beta where sigmoid(-beta m) < 0.005: m > log(199)/beta."""
    edge = math.log(199) / 0.1
    batch = margins(-40.0, 0.0, edge - 1e-6, edge + 1e-6, 400.0)
    assert get_objective("dpo", beta=0.1).saturated(batch).tolist() == [False, False, False, True, True]
    assert get_objective("hinge", beta=0.1).saturated(margins(9.9, 10.1)).tolist() == [False, True]


def test_f_dpo_counts_capped_pairs_and_does_not_call_them_saturated() -> None:
    """forward_kl leaves e^(-z) at z = -10, alpha = 0.5 at z = -20: here z_w = m/2."""
    batch = margins(-19.9, -20.1, -39.9, -40.1)
    assert get_objective("f_dpo", divergence="forward_kl").capped(batch).tolist() == [False, True, True, True]
    alpha = get_objective("f_dpo", divergence="alpha", alpha=0.5)
    assert alpha.capped(batch).tolist() == [False, False, False, True]
    # A chosen response far below the reference is pushed e^z harder than at the start, not less.
    assert not alpha.saturated(margins(-40.1)).item()
    assert get_objective("dpo").capped(batch) is None


def test_signature_carries_types_and_defaults_for_the_recipe_schema() -> None:
    signature = objective_signature("rpo")
    assert list(signature) == ["beta", "eta", "form", "baseline"]
    assert signature["eta"].default == 0.005
    assert signature["beta"].annotation is float
    card = next(card for card in list_objectives() if card.name == "rpo")
    assert [row.name for row in card.hyperparameters] == list(signature)
    assert card.hyperparameters[0].range == "> 0"


PLUGIN = '''"""Squared hinge: a user's objective in one file."""

import torch.nn.functional as F

from alignment.objectives import Card, Objective, hyper, register


@register
class SquaredHinge(Objective):
    card = Card("squared_hinge", "Squared hinge", "none", "none", "max(0, 1 - beta m)^2")
    beta: float = hyper("inverse of the margin at which a pair is done", default=0.1, gt=0)

    def pair_loss(self, batch):
        return F.relu(1 - self.beta * batch.margin) ** 2
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The plug-in's file, with the registry restored afterwards."""
    from alignment.objectives import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    path = tmp_path / "squared_hinge.py"
    path.write_text(PLUGIN)
    return path


def test_a_plugin_of_at_most_15_lines_loads_and_passes_every_generic_check(plugin) -> None:
    assert len(PLUGIN.splitlines()) <= 15
    assert load_plugin(plugin) == ["squared_hinge"]
    assert load_plugin(plugin) == ["squared_hinge"]  # again, as each process of a launch does
    loss = get_objective("squared_hinge", beta=0.1).loss(margins(0.0, 5.0, 20.0))
    torch.testing.assert_close(loss, column(1.0, 0.25, 0.0))
    results = list(run_checks(["squared_hinge"]))
    assert len(results) >= 11
    assert [result for result in results if not result.ok] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1\n", "registers no objective"),
        ("def f(:\n", "SyntaxError"),
        (PLUGIN.replace('"squared_hinge"', '"dpo"'), "objective name 'dpo' is taken"),
        (PLUGIN.replace('max(0, 1 - beta m)^2")', 'x", needs=("refrence",))'), "unknown .'refrence'"),
        (
            PLUGIN.replace('= hyper("inverse of the margin at which a pair is done", default=0.1, gt=0)', "= 0.1"),
            "hyper",
        ),
    ],
)
def test_a_bad_plugin_is_one_line_that_names_the_file(plugin, text, message) -> None:
    before = list_objectives()
    plugin.unlink() if text is None else plugin.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_plugin(plugin)
    assert str(plugin) in str(caught.value)
    assert list_objectives() == before


def test_reloading_an_edited_plugin_forgets_what_it_no_longer_defines(plugin) -> None:
    load_plugin(plugin)
    plugin.write_text(PLUGIN.replace('"squared_hinge"', '"renamed_hinge"'))
    assert load_plugin(plugin) == ["renamed_hinge"]
    names = [card.name for card in list_objectives()]
    assert "renamed_hinge" in names
    assert "squared_hinge" not in names


def test_a_plugin_that_fails_half_way_registers_nothing(plugin) -> None:
    before = list_objectives()
    plugin.write_text(PLUGIN + "raise RuntimeError('too late')\n")
    with pytest.raises(ValueError, match="too late"):
        load_plugin(plugin)
    assert list_objectives() == before


def test_a_file_dropped_into_the_package_is_found(tmp_path) -> None:
    """Discovery walks the package's folder: a new file needs no other line, and the import stays at torch."""
    source = Path(alignment.__file__).parent
    shutil.copytree(source / "objectives", tmp_path / "alignment" / "objectives")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, tmp_path / "alignment" / name)
    (tmp_path / "alignment" / "objectives" / "squared_hinge.py").write_text(PLUGIN)
    program = """
import sys, torch
before = set(sys.modules)
import alignment.objectives
alignment.objectives.get_objective("squared_hinge")
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"mpmath", "scipy", "pydantic", "trl"}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
