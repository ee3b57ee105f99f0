"""The conformance suite over the registry: one test per objective and check, and the suite's own completeness."""

import pytest
import torch

from alignment.objectives import list_objectives, objective_class
from alignment.objectives.conformance import checks_of, golden, laws, run_check, run_checks
from alignment.objectives.conformance.relations import RELATIONS

NAMES = [card.name for card in list_objectives()]
OFFLINE = [card.name for card in list_objectives() if card.batch == "pairs"]
CHECKS = [(name, check) for name in NAMES for check in checks_of(objective_class(name))]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=[f"{name}-{check}" for name, check in CHECKS])
def test_conformance(name: str, check: str) -> None:
    result = run_check(objective_class(name), check)
    assert result.ok, result.detail


@pytest.mark.parametrize("name", OFFLINE)
def test_every_objective_of_the_package_has_data(name: str) -> None:
    cls = objective_class(name)
    for present in (golden.has_golden, golden.has_paper, laws.has_start_law, laws.has_bounds):
        assert present(cls), f"{name}: {present.__name__} is false; add its data"
    assert RELATIONS.get(name), f"{name}: no relation to another objective or form"
    assert cls.card.bounds != "not analysed"
    assert cls.card.verified != "not stated"


def test_the_issue_s_objectives_exist() -> None:
    plain = {"dpo", "robust", "ipo", "hinge", "rpo", "reward_aware_rpo", "f_dpo", "vpo", "inpo"}
    assert plain | {"simpo", "orpo", "cpo", "dpop"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


def test_run_checks_names_an_unknown_objective_before_running() -> None:
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        run_checks(["hing"])
