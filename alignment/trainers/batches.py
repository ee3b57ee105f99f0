"""From a rollout's records to tensors, and from log-probs to what an on-policy objective reads.

One row format for all (`scoring.build_rows`): a prompt with its two samples (and a calibration response), or with
its G chains of thought, each followed by the reference answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from alignment.models.scoring import Layout, build_rows
from alignment.objectives import GroupLogps, PairLogps, SamplePairs
from alignment.trainers.rollout import Record

Kind = Literal["pairs", "samples", "groups"]
NEUTRAL = 0.5  # stands in a column of a record that is left out: a number that every objective takes


@dataclass
class RolloutCollator:
    """Records → tensors.

    Attributes:
        prompt_ids: token ids of every prompt of the run, none empty.
        pad_token_id: its value changes nothing.
        layout: of the rows.
        kind: of the objective's batch.
        calibrated: score the record's `opponent` (the calibration response) as a third response.
    """

    prompt_ids: list[list[int]]
    pad_token_id: int
    layout: Layout
    kind: Kind
    calibrated: bool = False

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        """`learned` `[B]` (0 for records that are left out), rows, lengths `[B, k]`, and the records' numbers."""
        responses = [self.responses(r) for r in records]
        batch = {
            "learned": torch.tensor([0.0 if r.skipped else 1.0 for r in records]),
            "lengths": torch.tensor([[len(ids) for ids in group] for group in responses], dtype=torch.float32),
        }
        for name in sorted({name for record in records for name in record.numbers}):
            values = [NEUTRAL if r.skipped else r.numbers[name] for r in records]
            batch[name] = torch.tensor(values, dtype=torch.float32)
        if self.kind == "groups":
            batch["spans"] = torch.tensor([r.spans for r in records])
            batch["valid"] = torch.tensor([r.valid for r in records])
            batch["verified"] = torch.tensor([r.verified for r in records])
        prompts = [self.prompt_ids[r.row] for r in records]
        return batch | build_rows(prompts, responses, self.pad_token_id, self.layout)

    def responses(self, record: Record) -> list[list[int]]:
        """Token ids of all that is scored of a record."""
        return [*(record.scored or record.responses), *([record.opponent or []] if self.calibrated else [])]


def sample_pairs(inputs: dict[str, torch.Tensor], policy: torch.Tensor) -> SamplePairs:
    """Columns of two samples; `policy` is `[B, 2]`."""
    names = {field for field in SamplePairs.__dataclass_fields__ if field in inputs}
    columns: dict[str, Any] = {name: inputs[name] for name in names}
    lengths = {"first_length": inputs["lengths"][:, 0], "second_length": inputs["lengths"][:, 1]}
    return SamplePairs(first=policy[:, 0], second=policy[:, 1], **lengths, **columns)


_PAIR_NAMES = {"ref_first": "ref_chosen", "ref_second": "ref_rejected", "ref_calibration": "ref_calibration"}
_REWARDS = {"reward_first": "reward_chosen", "reward_second": "reward_rejected"}


def labelled_pairs(inputs: dict[str, torch.Tensor], policy: torch.Tensor) -> PairLogps:
    """The first sample as chosen, with `label` the probability that it is; `policy` is `[B, 2 or 3]`."""
    columns: dict[str, Any] = {"chosen": policy[:, 0], "rejected": policy[:, 1], "label": inputs["label"]}
    columns |= {ours: inputs[name] for name, ours in (_PAIR_NAMES | _REWARDS).items() if name in inputs}
    names = ["chosen_length", "rejected_length", "calibration_length"][: policy.size(1)]
    columns |= {name: inputs["lengths"][:, j] for j, name in enumerate(names)}
    if policy.size(1) == 3:
        columns["calibration"] = policy[:, 2]
    return PairLogps(**columns)


def group_logps(inputs: dict[str, torch.Tensor], tokens: torch.Tensor, forced: bool) -> GroupLogps:
    """Chains and answers out of `tokens` `[B, G, L]`; `spans` says where each ends and begins.

    Without `forced` there are no answers: a verifier reads the samples. With it they are there even where no sample of
    the batch has the format of one: the objective is to find none of them valid, not to miss a column.
    """
    chain, first, last = inputs["spans"].unbind(-1)
    steps = torch.arange(tokens.size(-1), device=tokens.device)
    cot = (tokens * (steps < chain[..., None])).sum(-1)
    width = max(int((last - first).max()), 1)
    places = first[..., None] + steps[:width]
    mask = places < last[..., None]
    answer = tokens.gather(-1, places.clamp(max=tokens.size(-1) - 1))
    columns: dict[str, Any] = {"valid": inputs["valid"], "verified": inputs["verified"]}
    if forced:
        columns |= {"answer": answer, "answer_mask": mask}
    return GroupLogps(cot=cot, **columns)
