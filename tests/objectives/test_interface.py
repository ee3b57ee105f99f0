"""Names, errors, the batch, the saturated share and user plug-ins: what the rest of the project relies on."""

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alignment
from alignment.objectives import (
    PairLogps,
    get_objective,
    list_objectives,
    load_plugin,
    objective_class,
    objective_signature,
)
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
        ("spo", {"base": "dop"}, "^spo: base must be another objective, got 'dop'; did you mean 'dpop'"),
        ("spo", {"base": "spo"}, "^spo: base must be another objective, got 'spo'$"),
        ("spo", {"base": 3}, "^spo: base must be another objective, got 3; valid: cpo, dpo"),
        ("spo", {"bta": 0.1}, "objective 'spo' with base='dpo' has no hyper-parameter 'bta'; did you mean 'beta'"),
        ("spo", {"base": "ipo", "beta": 0.1}, "objective 'spo' with base='ipo' has no hyper-parameter 'beta'"),
        ("spo", {"base": "dpo", "base_gamma": 1.0}, "base='dpo' has no hyper-parameter 'base_gamma'"),
        ("spo", {"base": "dpo", "beta": 0}, "^spo: beta must be a number > 0, got 0"),
        ("spo", {"base": "inpo", "eta": 0.1, "tau": 0.2}, r"^spo: tau must be in \[0, eta\] = \[0, 0.1\], got 0.2"),
        ("spo", {"gamma": -0.1}, "^spo: gamma must be a number >= 0, got -0.1"),
        ("spo", {"degrees": 2.5}, "^spo: degrees must be a number >= 2, got 2.5"),
        ("spo", {"removal": "stop"}, "^spo: removal must be one of 'rake' | 'random' | 'length', got 'stop'"),
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
    assert get_objective("spo", base="inpo", eta=0.3).hyperparameters["tau"] == pytest.approx(0.1)


def test_spo_takes_on_its_base_s_hyperparameters() -> None:
    own = ["base", "gamma", "degrees", "responses", "removal", "head_learning_rate"]
    assert list(objective_signature("spo")) == [*own, "beta", "label_smoothing"]
    on_simpo = objective_signature("spo", {"base": "simpo", "gamma": 0.5})
    assert list(on_simpo) == [*own, "beta", "base_gamma"]
    assert (on_simpo["base"].default, on_simpo["gamma"].default, on_simpo["base_gamma"].default) == ("simpo", 0.1, 1.0)
    objective = get_objective("spo", base="f_dpo", divergence="jsd", gamma=0.5, beta=1)
    assert objective == get_objective("spo", base="f_dpo", divergence="jsd", gamma=0.5, beta=1.0)
    assert objective.hyperparameters["divergence"] == "jsd"
    assert get_objective("spo", **objective.hyperparameters) == objective  # as a manifest's numbers are read back
    assert get_objective("spo", base="simpo").needs == ("length", "degree")
    assert get_objective("spo", base="simpo").card.start == "none"
    with pytest.raises(ValueError, match=r"spo: base 'dpo' is not this class's: use get_objective\('spo', base=...\)"):
        objective_class("spo")()


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


@pytest.mark.parametrize("label", [-0.01, 1.01, math.nan])
def test_labels_are_probabilities(label) -> None:
    columns = margins(0.0, 1.0).columns()
    with pytest.raises(ValueError, match=rf"label must be in \[0, 1\], got {label:g} in row 1"):
        PairLogps(**columns, label=column(1.0, label))


def test_swapping_twice_is_the_same_batch_and_leaves_no_column_behind() -> None:
    """Once: what belonged to chosen belongs to rejected; calibration and degrees belong to neither."""
    values = {
        "chosen": 1.0, "rejected": 2.0, "ref_chosen": 3.0, "ref_rejected": 4.0, "prev_chosen": 5.0,
        "prev_rejected": 6.0, "chosen_length": 7.0, "rejected_length": 8.0, "reward_chosen": 9.0,
        "reward_rejected": 10.0, "preference_chosen": 11.0, "preference_rejected": 12.0, "log_odds_chosen": 16.0,
        "log_odds_rejected": 17.0, "calibration": 13.0, "ref_calibration": 14.0, "calibration_length": 15.0,
        "label": 0.75,
    }  # fmt: skip
    degrees = {"degree_logits": torch.zeros(1, 2, 3), "degree_labels": torch.tensor([[0, 2]])}
    batch = PairLogps(**{name: column(value) for name, value in values.items()}, **degrees)
    assert set(batch.columns()) == {field.name for field in dataclasses.fields(PairLogps)}
    swapped = batch.swapped()
    got = {name: value.item() for name, value in swapped.columns().items() if name not in degrees}
    assert list(got.values()) == [2, 1, 4, 3, 8, 7, 6, 5, 13, 14, 15, 10, 9, 12, 11, 17, 16, 0.25]
    assert all(torch.equal(swapped.column(name), value) for name, value in degrees.items())
    assert all(torch.equal(swapped.swapped().column(name), value) for name, value in batch.columns().items())


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 1).long(),
            r"degree_logits must be floating point of shape \[2, copies, deg",
        ),
        (
            torch.zeros(1, 2, 3),
            torch.zeros(1, 2).long(),
            r"degree_logits must .* got torch.float32 of shape \[1, 2, 3\]",
        ),
        (torch.zeros(2, 2, 3), torch.zeros(2, 3).long(), r"degree_labels must be integers of shape \[2, 2\], got"),
        (
            torch.zeros(2, 2, 3),
            torch.zeros(2, 2),
            r"degree_labels must be integers of shape \[2, 2\], got torch.float32",
        ),
        (torch.zeros(2, 1, 3), torch.tensor([[0], [3]]), r"must be -1 \(no such copy\) or 0 to 2, got 3 in row 1"),
        (torch.zeros(2, 1, 3), torch.tensor([[-2], [0]]), r"must be -1 \(no such copy\) or 0 to 2, got -2 in row 0"),
        (torch.zeros(2, 1, 2), torch.tensor([[0], [1]]), r"spo: degree_logits have 2 degrees, and degrees is 3"),
    ],
)
def test_degree_columns_that_do_not_fit_are_refused(logits, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_objective("spo").loss(PairLogps(**margins(0.0, 1.0).columns(), degree_logits=logits, degree_labels=labels))


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


VARIANTS = """
import torch.nn.functional as F

from alignment.objectives import Card, Objective, hyper, register
from alignment.objectives.registry import prepare


@register
class Kinds(Objective):
    card = Card("kinds", "Kinds", "none", "none", "softplus(-sharp m)", settings=({"kind": "steep", "sharp": 2.0},))
    kind: str = hyper("plain or steep", default="plain")

    @classmethod
    def variant(cls, hyperparameters):
        return Steep if hyperparameters.get("kind") == "steep" else cls

    def pair_loss(self, batch):
        return F.softplus(-self.hyperparameters.get("sharp", 1.0) * batch.margin)


@prepare
class Steep(Kinds):
    sharp: float = hyper("slope", default=3.0, gt=0)
"""


@pytest.fixture
def plugin(tmp_path):
    """The plug-in's file."""
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


def test_spo_on_a_user_s_own_objective(plugin) -> None:
    """margins 0 and 5 with beta 0.1: (1 - 0)^2 and (1 - 0.5)^2, plus 0.5 log 3 from a zero head."""
    load_plugin(plugin)
    objective = get_objective("spo", base="squared_hinge", beta=0.1, gamma=0.5)
    degrees = {"degree_logits": torch.zeros(2, 1, 3), "degree_labels": torch.tensor([[1], [-1]])}
    loss = objective.loss(PairLogps(**margins(0.0, 5.0).columns(), **degrees))
    torch.testing.assert_close(loss, column(1.0 + 0.5 * math.log(3), 0.25))
    plugin.write_text(PLUGIN.replace("beta: float", "slack: float").replace("self.beta", "self.slack"))
    load_plugin(plugin)
    assert "slack" in objective_signature("spo", {"base": "squared_hinge"})


def test_a_user_s_objective_may_have_variants_of_its_own(plugin) -> None:
    """One that takes `sharp` only with kind=steep, and spo on top of it."""
    plugin.write_text(VARIANTS)
    load_plugin(plugin)
    assert list(objective_signature("kinds")) == ["kind"]
    assert get_objective("kinds", kind="steep", sharp=2).hyperparameters == {"kind": "steep", "sharp": 2.0}
    with pytest.raises(ValueError, match="objective 'kinds' has no hyper-parameter 'sharp'"):
        get_objective("kinds", sharp=2)
    assert get_objective("spo", base="kinds", kind="steep", sharp=2).hyperparameters["sharp"] == 2.0
    assert [result for result in run_checks(["kinds"]) if not result.ok] == []


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
