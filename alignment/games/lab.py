"""Experiments in tabular games: methods run side by side on the same games, their duality gaps logged. No files.

    from alignment.games.lab import Experiment, Setting, run

Every method starts at the same policy, in the same games with the same reference. Exact runs have nothing random after
that; sampled ones draw from generators that the experiment's seed and the setting fix, the same for every method.
`report.py` makes tables and verdicts of the result, `figure.py` a picture; `alignment.games.recipe` reads YAML.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from alignment.games import preferences, rates
from alignment.games.gradients import Labels
from alignment.games.methods import Learner, Method, Sampling
from alignment.games.policies import POLICIES, Parameters
from alignment.games.solution import NotFound, duality_gap, nash_policy

CHECKPOINTS = 200  # of a curve, evenly spaced, besides the start


@dataclass(frozen=True)
class Games:
    """Which games: a `kind` of `preferences.KINDS`, or one `matrix`; `seed` draws matrices and references."""

    kind: str = "random"
    arms: int = 10
    count: int = 10
    strength: float = 1.0
    matrix: tuple[tuple[float, ...], ...] | None = None
    reference: Literal["normal", "uniform"] = "normal"
    seed: int = 0

    def make(self) -> tuple[Tensor, Tensor]:
        """Preferences `[count, n, n]` and reference logits `[count, n]`; ValueError for what is no game."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.matrix is not None:
            if len({len(self.matrix), *map(len, self.matrix)}) > 1:
                raise ValueError("the matrix is not square")
            one = preferences.check(torch.tensor(self.matrix, dtype=torch.float64))
            matrices = one.expand(self.count, *one.shape).clone()
        else:
            matrices = preferences.make(self.kind, self.arms, self.count, generator, self.strength)
        arms = matrices.shape[-1]
        if self.reference == "uniform":
            return matrices, torch.zeros(self.count, arms, dtype=torch.float64)
        return matrices, torch.randn(self.count, arms, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Setting:
    """One weight of the KL terms, and how long and fast to learn under it."""

    beta: float
    learning_rate: float
    iterations: int


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Attributes:
        games: the games.
        methods: the algorithms, with different names.
        settings: one panel each.
        policy: of `policies.POLICIES`.
        samples: draws per game and gradient; None for exact gradients.
        labels: with samples: comparisons are P as it is, or 0/1 draws.
        seeds: with samples or networks: independent repetitions in every game.
        seed: of draws and initial networks.
        offset: scale of normal noise on the logits that a table starts from, where the reference is the solution.
    """

    games: Games
    methods: tuple[Method, ...]
    settings: tuple[Setting, ...]
    policy: str = "tabular"
    samples: int | None = None
    labels: Labels = "probability"
    seeds: int = 1
    seed: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One method under one setting: gaps `[K, B]` after `iterations` `[K]`; B is games times seeds."""

    method: Method
    evaluations: int
    iterations: Tensor
    gaps: Tensor

    def at(self, iteration: int) -> Tensor:
        """Gaps `[B]` at the last checkpoint up to this iteration."""
        return self.gaps[int((self.iterations <= iteration).sum()) - 1]


@dataclass(frozen=True)
class Panel:
    """All methods under one setting.

    Attributes:
        setting: as asked for.
        eta: the mirror-descent step that the learning rate amounts to in a table, 4 lr/(n beta).
        step: how figures and tables name the step, "eta 0.4"; "lr 0.03" of networks.
        curves: by method's name.
        mirror, extra: rates `[B]` of the linearised updates at the Nash policies (`rates.contraction`).
    """

    setting: Setting
    eta: float
    step: str
    curves: dict[str, Curve]
    mirror: Tensor
    extra: Tensor


def run(experiment: Experiment) -> list[Panel]:
    """Run everything, with a progress bar; one panel per setting.

    Raises:
        ValueError: settings that an objective refuses, or that are no game.
        NotFound: an exact iteration has no minimiser (`probe` finds those of the first iteration before).
        NotEnumerable: an objective that reads what games do not have.
    """
    matrices, reference = experiment.games.make()
    methods = [method.resolved() for method in experiment.methods]
    total = sum(s.iterations * m.evaluations for s in experiment.settings for m in methods)
    panels = []
    with tqdm(total=total, unit="gradients", unit_scale=True, mininterval=0.5) as bar, _one_thread():
        for number, setting in enumerate(experiment.settings):
            nash = nash_policy(matrices, reference, setting.beta)
            eta = 4 * setting.learning_rate / (matrices.shape[-1] * setting.beta)
            sizes = {"beta": setting.beta, "eta": eta}
            curves = {}
            for method in methods:
                bar.set_description(f"beta {setting.beta:g}, {method.name}")
                start = _start(experiment, setting, method, matrices, reference, number)
                curves[method.name] = _learn(start, setting, bar)
            mirror, extra = (
                rates.contraction(nash, matrices, **sizes, look_ahead=ahead).repeat_interleave(experiment.seeds)
                for ahead in (False, True)
            )
            step = f"eta {eta:.2g}" if experiment.policy == "tabular" else f"lr {setting.learning_rate:g}"
            panels.append(Panel(setting, eta, step, curves, mirror, extra))
    return panels


@dataclass(frozen=True)
class _Start:
    """A method under a setting before its first iteration, in all games and seeds."""

    learner: Learner
    parameters: Parameters
    reference: Tensor

    def gaps(self, parameters: Parameters) -> Tensor:
        """Duality gaps `[B]`."""
        learner = self.learner
        return duality_gap(learner.policy.logits(parameters), self.reference, learner.preference, learner.beta)


def probe(experiment: Experiment) -> Iterator[tuple[int, str]]:
    """One iteration of every method under every setting: what goes wrong, as the method's place and a message.

    Cheap against a run; a method is named once, with the first setting in which it fails.
    """
    matrices, reference = experiment.games.make()
    with _one_thread():
        for place, method in enumerate(experiment.methods):
            for number, setting in enumerate(experiment.settings):
                where = f"under beta {setting.beta:g}, lr {setting.learning_rate:g}"
                try:
                    start = _start(experiment, setting, method.resolved(), matrices, reference, number)
                    gaps = start.gaps(start.learner.iterate(start.parameters))
                except NotFound as error:
                    yield place, f"{error}, {where}; write `exact: false` for steps of its gradient"
                    break
                if not bool(gaps.isfinite().all()):
                    lost = f"{int((~gaps.isfinite()).sum())} of {len(gaps)} runs"
                    yield place, f"its policy is not finite after one iteration in {lost}, {where}; lower the rate"
                    break


def _start(
    experiment: Experiment, setting: Setting, method: Method, matrices: Tensor, reference: Tensor, number: int
) -> _Start:
    """`number` is the setting's place: equal settings have random numbers of their own."""
    matrices = matrices.repeat_interleave(experiment.seeds, 0)
    reference = reference.repeat_interleave(experiment.seeds, 0)
    generator = torch.Generator().manual_seed(1_000_003 * experiment.seed + number)
    policy = POLICIES[experiment.policy]()
    parameters: Parameters = policy.start(reference, generator)
    if experiment.policy == "tabular" and experiment.offset:
        noise = torch.randn(reference.shape, generator=generator, dtype=reference.dtype)
        parameters = [parameters[0] + experiment.offset * noise]
    sampling = None if experiment.samples is None else Sampling(experiment.samples, generator, experiment.labels)
    learner = Learner(
        method, reference, matrices,
        beta=setting.beta, learning_rate=setting.learning_rate, policy=policy, sampling=sampling,
    )  # fmt: skip
    return _Start(learner, parameters, reference)


def _learn(start: _Start, setting: Setting, bar: tqdm) -> Curve:
    learner, parameters = start.learner, start.parameters
    evaluations = learner.method.evaluations
    wanted = sorted({round(setting.iterations * k / CHECKPOINTS) for k in range(CHECKPOINTS + 1)})
    gaps, done = [], 0
    for until in wanted:
        with torch.inference_mode(learner.fast is not None):
            for _ in range(until - done):
                parameters = learner.iterate(parameters)
        bar.update((until - done) * evaluations)
        done = until
        gaps.append(start.gaps(parameters))
    return Curve(learner.method, evaluations, torch.tensor(wanted), torch.stack(gaps))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Ten games of ten arms are far too small for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
