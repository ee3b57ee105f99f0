"""What an on-policy run samples: which prompts when, what one rollout holds, and the file that keeps it.

    rollouts.jsonl     one line per prompt and rollout: token ids, texts, judgements, log-probs; `generation.replay`
                       reads its token ids back, so that runs on any number of processes train on the same samples

Not a trainer (`online.py`), not how samples are drawn (`drawing.py`) or judged (`judging.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from alignment.errors import UserError
from alignment.files import iterate_json_lines, jsonable
from alignment.trainers.drawing import Sampler

ROLLOUTS = "rollouts.jsonl"
CHECKPOINT = "rollout.jsonl"  # in a checkpoint that falls inside a rollout: the one in use


@dataclass
class Record:
    """One prompt of one rollout.

    Attributes:
        row: of the prompt file, from 0.
        responses: token ids of each sample, as drawn (with the end token where the model gave it).
        texts: their texts.
        finished: whether each ended by itself.
        prompt: text of the prompt's token ids.
        numbers: named judgements and frozen log-probs, in nats; NaN for "could not be judged".
        opponent: token ids of y'' (EGPO, Nash-MD) or of the calibration response (VPO); None where none is drawn.
        opponent_text: its text.
        scored: token ids that are learned from where they are not those drawn: each chain of thought with the
            reference answer behind it; empty unless the objective's batch is groups.
        spans: of each of those: (tokens of the chain of thought, first and end position of the answer).
        valid, verified: of each response of such a batch: 1 where it has the answer's format, 1 where the sampled
            answer is the reference answer.
        skipped: why nothing is learned from this prompt; "" where something is.
    """

    row: int
    responses: list[list[int]]
    texts: list[str]
    finished: list[bool]
    prompt: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    opponent: list[int] | None = None
    opponent_text: str = ""
    scored: list[list[int]] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    verified: list[float] = field(default_factory=list)
    skipped: str = ""


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts are in which rollout, and which of a rollout's prompts make up an optimizer step.

    An epoch visits every prompt once, in a seeded order; where the prompts do not fill its last rollout, the first
    ones of the order are visited twice. Depends on no number of processes. A rollout is trained on `inner_epochs`
    times: in its order first, then shuffled.

    Attributes:
        prompts: number of prompts.
        batch: prompts of one optimizer step over all processes.
        per_rollout: prompts of one rollout; a multiple of `batch`.
        inner_epochs: passes over a rollout.
        seed: of the orders.
    """

    prompts: int
    batch: int
    per_rollout: int
    inner_epochs: int
    seed: int

    @property
    def repeated(self) -> int:
        """Prompts that an epoch visits twice."""
        return -self.prompts % self.per_rollout

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts of an epoch."""
        return math.ceil(self.prompts / self.per_rollout)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self.inner_epochs * self.per_rollout // self.batch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.rollouts_per_epoch * self.steps_per_rollout

    def rows(self, rollout: int) -> list[int]:
        """The prompts (rows of the file) of a rollout, counted over all epochs."""
        epoch, place = divmod(rollout, self.rollouts_per_epoch)
        order = self._permutation(self.prompts, epoch)
        order += (order * math.ceil(self.per_rollout / self.prompts))[: self.repeated]
        return order[place * self.per_rollout : (place + 1) * self.per_rollout]

    def step(self, step: int) -> tuple[int, list[int]]:
        """(rollout, places in it that the step trains on) of an optimizer step, counted from 0 over the run."""
        rollout, inside = divmod(step, self.steps_per_rollout)
        inner, batch = divmod(inside, self.per_rollout // self.batch)
        places = self._permutation(self.per_rollout, rollout, inner) if inner else list(range(self.per_rollout))
        return rollout, places[batch * self.batch : (batch + 1) * self.batch]

    def _permutation(self, n: int, *which: int) -> list[int]:
        seed = self.seed
        for number in which:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Rollouts:
    """How an on-policy run samples.

    Attributes:
        per_rollout: prompts of one rollout.
        inner_epochs: passes over a rollout.
        samples: responses per prompt: 2, or G chains of thought.
        sampler: of the responses that are learned from.
        opponent: share of the reference in the mixture that y'' is drawn from; 0 is the policy; None draws none.
        calibration: draw the calibration response from the reference.
        look_ahead: EGPO's extra step before each step.
        label_noise: probability that a label is turned round.
        marker, separator: what ends a chain of thought, and what stands between it and the answer.
        drift: nats by which the calibration response may fall below the reference before training stops.
        batch: responses drawn at once.
        replay: a file of recorded samples.
    """

    per_rollout: int
    inner_epochs: int = 1
    samples: int = 2
    sampler: Sampler = field(default_factory=Sampler)
    opponent: float | None = None
    calibration: bool = False
    look_ahead: bool = False
    label_noise: float = 0.0
    marker: str = ""
    separator: str = ""
    drift: float | None = None
    batch: int = 64
    replay: Path | None = None


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of token ids as a share of all; NaN where there are none."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


# --- files ----------------------------------------------------------------------------------------------------------


def append_rollout(file: Path, rollout: int, phase: int, records: Sequence[Record]) -> None:
    """Add a rollout's records to the file, whole lines only."""
    lines = [
        json.dumps(jsonable({"rollout": rollout, "phase": phase, **asdict(record)}), ensure_ascii=False)
        for record in records
    ]
    with file.open("a", encoding="utf-8") as handle:
        handle.write("".join(f"{line}\n" for line in lines))


def read_records(file: Path, skip_unfinished: bool = False) -> Iterator[tuple[int, int, Record]]:
    """(rollout, phase, record) of every line; numbers that JSON cannot hold come back as NaN.

    Raises:
        UserError: a line is not such a record, or holds an empty response.
    """
    for where, row in iterate_json_lines(file, skip_unfinished=skip_unfinished):
        try:
            rollout, phase = int(row.pop("rollout")), int(row.pop("phase"))
            numbers = {k: math.nan if v is None else float(v) for k, v in row.pop("numbers").items()}
            record = Record(numbers=numbers, **row)
            record.spans = [(a, b, c) for a, b, c in record.spans]
            drawn = [*record.responses, *([] if record.opponent is None else [record.opponent])]
            if not all(isinstance(i, int) for ids in drawn for i in ids):
                raise ValueError("token ids must be whole numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: is no line of a {ROLLOUTS} ({error})") from None
        if not record.responses or not all(drawn):
            raise UserError(f"{where}: a response is empty; nothing can be learned from it")
        yield rollout, phase, record


class Replay:
    """Samples of an earlier run, by rollout and phase.

    Raises:
        UserError: the file cannot be read, or lacks what is asked for.
    """

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[tuple[int, int], list[Record]] = {}
        for rollout, phase, record in read_records(file):
            self.found.setdefault((rollout, phase), []).append(record)

    def records(self, rollout: int, phase: int, rows: Sequence[int], per_prompt: int, opponent: bool) -> list[Record]:
        """The recorded samples of these prompts, without judgements."""
        kept = self.found.get((rollout, phase), [])
        if [record.row for record in kept] != list(rows):
            raise UserError(
                f"generation.replay: {self.file} has not the prompts of rollout {rollout}: it is of another seed, "
                "prompt file or batch, or of a shorter run"
            )
        for record in kept:
            if len(record.responses) != per_prompt or (record.opponent is not None) != opponent:
                raise UserError(
                    f"generation.replay: {self.file} has {len(record.responses)} responses a prompt of rollout "
                    f"{rollout}, and the objective needs {per_prompt}{' and an opponent' if opponent else ''}"
                )
        return [
            Record(r.row, r.responses, r.texts, r.finished, r.prompt, {}, r.opponent, r.opponent_text) for r in kept
        ]
