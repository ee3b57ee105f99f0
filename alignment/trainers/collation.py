"""From tokenised pairs to a batch of rows, and the order in which pairs are visited.

Truncation happens here: prompt + response are cut at `max_length` from the end (TRL's `keep_start`). Padding, masks
and layouts are `scoring.build_rows`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

from alignment.data.preferences import NUMBER_COLUMNS
from alignment.models.scoring import Layout, build_rows
from alignment.trainers.degree import degree_columns

BRANCHES = ("chosen", "rejected", "calibration")
FROZEN_COLUMNS = tuple(f"{p}_{b}" for p in ("ref", "prev") for b in BRANCHES)  # log-probs computed before training
MEGABATCH = 50  # global batches that are length-sorted together, transformers' own choice


@dataclass
class PairCollator:
    """Examples → `{chosen_length, …, row_ids, row_positions, row_segments, row_labels, number columns}`.

    Attributes:
        pad_token_id: its value changes nothing.
        max_length: tokens of prompt + one response; longer responses are cut. None: no limit.
        layout: of the rows; `scoring` says what each is.
        calibration: add the calibration response as a third branch.
        copied: branches that have degraded copies (`degree.degree_columns`), where the examples bring them.
    """

    pad_token_id: int
    max_length: int | None
    layout: Layout
    calibration: bool = False
    copied: tuple[int, ...] = ()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        branches = BRANCHES if self.calibration else BRANCHES[:2]
        prompts = [example["prompt_ids"] for example in examples]
        responses = [[truncated(example, branch, self.max_length) for branch in branches] for example in examples]
        # An empty prompt leaves a response's first token unscored: see `build_rows`.
        lengths = [[len(r) - (not p) for r in group] for p, group in zip(prompts, responses, strict=True)]
        # A [B] tensor comes first: transformers reads the batch size off the first tensor.
        batch = {f"{b}_length": torch.tensor([n[j] for n in lengths]) for j, b in enumerate(branches)}
        for column in dict.fromkeys((*NUMBER_COLUMNS, *FROZEN_COLUMNS, "counted")):
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        if self.copied and "degree_ids" in examples[0]:
            batch |= degree_columns(examples, responses, self.copied, self.max_length, self.pad_token_id, self.layout)
        return batch | build_rows(prompts, responses, self.pad_token_id, self.layout)


def truncated(example: dict[str, Any], branch: str, max_length: int | None) -> list[int]:
    """A response's ids, cut at its end so that prompt and response take `max_length` tokens at most."""
    ids: list[int] = example[f"{branch}_ids"]
    return ids if max_length is None else ids[: max_length - len(example["prompt_ids"])]


def prompt_fits(example: dict[str, Any], max_length: int | None) -> bool:
    """Whether a prompt leaves room for a response."""
    return max_length is None or len(example["prompt_ids"]) < max_length


class LengthGroupedSampler(Sampler[int]):
    """A seeded order in which every *global* batch holds pairs of like length; the longest batch comes early.

    Unlike transformers' own, the order depends on the global batch size alone, so one process and many see the same
    batches. Pairs are shuffled, sorted by length within stretches of 50 batches, cut into batches, and the batches
    shuffled. The longest one first: memory runs out at once or never. Under warm-up it is the second, since the first
    update has rate 0: the longest pairs of every run would be those that nothing is learned from. Where the pairs do
    not fill the last batch, the first ones of the shuffle are visited twice: an incomplete batch would weigh its pairs
    by how it is split up.

    Args:
        lengths: tokens of each pair.
        batch_size: pairs of one optimizer step over all processes.
        seed: of the order; each epoch has its own (`set_epoch`).
        group: False gives the plain shuffle.
        warm_up: the learning rate of the first update is 0.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, group: bool = True, warm_up: bool = False):
        self.lengths, self.batch_size, self.seed, self.group, self.epoch = lengths, batch_size, seed, group, 0
        self.warm_up = warm_up
        self.repeated = -len(lengths) % batch_size  # pairs visited twice in an epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.repeated

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's data loader calls this; resuming in epoch e gives epoch e's order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        order += (order * self.batch_size)[: self.repeated]
        if not self.group:
            return iter(order)
        stretch = MEGABATCH * self.batch_size
        batches = []
        for start in range(0, len(order), stretch):
            part = sorted(order[start : start + stretch], key=lambda i: -self.lengths[i])
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        longest = max(range(len(batches)), key=lambda b: max(self.lengths[i] for i in batches[b]))
        batches.insert(int(self.warm_up), batches.pop(longest))
        return iter([i for batch in batches for i in batch])


def train_sampler(args: TrainingArguments, lengths: list[int], group: bool) -> LengthGroupedSampler:
    """The order of training rows of these lengths, as the arguments of a trainer have it."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return LengthGroupedSampler(lengths, batch, order_seed(args), group, args.warmup_steps > 0)


def order_seed(args: TrainingArguments) -> int:
    """The seed of the rows' order: `data_seed`, or else `seed`."""
    return int(args.seed if args.data_seed is None else args.data_seed)
