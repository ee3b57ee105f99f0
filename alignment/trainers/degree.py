"""SPO's degree head: how much of a response was removed, read off the language model's last hidden state.

    labels and copies of a batch        `degree_columns`, in the collator; copies are further branches of the row
    the head, inside the model's forward  `attach_head`: DDP and ZeRO-3 treat it as a part of the model
    optimizer, checkpoints, metrics     `DegreeTrainer`, the base class of `PreferenceTrainer`

The head is read at the position that predicts a branch's last token (the token before EOS, where there is one), so at
every degree it sees the same kind of token. The response itself is degree 0: its own branch is read, not computed
again. The head never enters model.safetensors or an adapter file; `degree_head.safetensors` lies beside them, in
checkpoints for resuming and in `final/` for inspection. Not here: what is removed (`alignment.data.degrade`), the loss
(`alignment.objectives.spo`). Without an objective that needs `degree` nothing of this happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from trl import DPOTrainer

from alignment.data.degrade import STOP_WORDS_SHA256, with_degree_copies
from alignment.errors import UserError
from alignment.models.scoring import (
    IGNORED,
    ROW_KEYS,
    Layout,
    branch_sums,
    build_rows,
    forward_rows,
    last_positions,
    repaired,
    unfold,
)
from alignment.objectives import PairLogps
from alignment.objectives.base import Objective
from alignment.objectives.spo import degree_loss

NAME = "degree_head"
FILE = f"{NAME}.safetensors"
COLUMNS = ("degree_ids", "degree_labels")
RESPONSES = {"both": (0, 1), "chosen": (0,), "rejected": (1,)}  # branches that have copies


# --- batches --------------------------------------------------------------------------------------------------------


def cut_copies(example: dict[str, Any], max_length: int | None, blocks: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of an example's K copies, cut as responses are, and their labels.

    A response's copies lose their labels (-1) where cutting leaves two of them alike, or cuts some and not others:
    some would then end with a full stop and an end token, and others in the middle of a sentence.

    Args:
        example: with `prompt_ids`, `degree_ids`, `degree_labels` (`with_degree_copies`).
        max_length: of prompt and response.
        blocks: responses that have copies.
    """
    prompt, ids, labels = example["prompt_ids"], example["degree_ids"], list(example["degree_labels"])
    cut = [i if max_length is None else i[: max_length - len(prompt)] for i in ids]
    degrees = len(ids) // blocks
    for start in range(0, len(ids), degrees):
        block = range(start, start + degrees)
        unlike = len({len(cut[i]) < len(ids[i]) for i in block}) > 1
        unscored = not prompt and min(len(cut[i]) for i in block) < 2
        if unlike or unscored or len({tuple(cut[i]) for i in block}) < degrees:
            labels[start : start + degrees] = [-1] * degrees
    return cut, labels


def degree_columns(
    examples: Sequence[dict[str, Any]],
    responses: Sequence[list[list[int]]],
    copied: Sequence[int],
    max_length: int | None,
    pad_token_id: int,
    layout: Layout,
) -> dict[str, torch.Tensor]:
    """`degree_labels` and `degree_lengths` (tokens), `[B, K]`; and `degree_row_*`: rows of the copies and responses.

    The policy is run on these rows; the reference on those without copies. Copies come first and have no labels: the
    LM head, whose logits are most of a step's memory, is run on the responses at the rows' end only.

    Args:
        examples: with the columns of `with_degree_copies`.
        responses: their cut responses, in the order of the branches.
        copied: branches that have copies, in the order of `degree_ids`.
        max_length, pad_token_id, layout: as `PairCollator`.
    """
    found = [cut_copies(example, max_length, len(copied)) for example in examples]
    degrees = len(found[0][0]) // len(copied)
    copies = [[c for k, c in enumerate(cut) if k % degrees] for cut, _ in found]
    prompts = [example["prompt_ids"] for example in examples]
    rows = build_rows(prompts, [[*c, *own] for c, own in zip(copies, responses, strict=True)], pad_token_id, layout)
    plain = build_rows(prompts, responses, pad_token_id, layout)["row_labels"]
    labels = torch.full((len(rows["row_ids"]), plain.size(1)), IGNORED)
    labels[-len(plain) :] = plain  # in `paired` the copies' rows come first; else these are all rows
    return {
        "degree_labels": torch.tensor([degree for _, degree in found]),
        "degree_lengths": torch.tensor([[len(c) for c in cut] for cut, _ in found]),
        **{f"degree_{key}": value for key, value in (rows | {"row_labels": labels}).items()},
    }


def copy_branches(copied: Sequence[int], degrees: int) -> list[int]:
    """The branches of `degree_columns`' rows in the order of `degree_labels`: each response, then its copies."""
    copies = len(copied) * (degrees - 1)
    order = []
    for block, branch in enumerate(copied):
        first = block * (degrees - 1)
        order += [copies + branch, *range(first, first + degrees - 1)]
    return order


# --- the length-only baseline ---------------------------------------------------------------------------------------


def length_limits(lengths: Sequence[int], labels: Sequence[int], degrees: int) -> list[int]:
    """The best that a classifier can do which knows only a copy's length and takes longer for less removed.

    Exact, by dynamic programming over the lengths. In-sample: with `degrees` - 1 numbers it cannot overfit by much.

    Returns:
        `degrees` - 1 falling limits: a copy of length n is given the degree "how many limits are >= n".
    """
    counts: dict[int, list[int]] = {}
    for length, label in zip(lengths, labels, strict=True):
        counts.setdefault(length, [0] * degrees)[label] += 1
    best: list[tuple[int, list[int]]] = [(0, [])]  # of each degree: copies right so far, where the degrees began
    for length in sorted(counts, reverse=True):
        ways = [
            [(right, limits + [length] * (k - j)) for j, (right, limits) in enumerate(best[: k + 1])]
            for k in range(degrees)
        ]
        chosen = [max(way, key=lambda found: found[0]) for way in ways]
        best = [(right + counts[length][k], limits) for k, (right, limits) in enumerate(chosen)]
    limits = max(best, key=lambda found: found[0])[1]
    return limits + [0] * (degrees - 1 - len(limits))


# --- the head -------------------------------------------------------------------------------------------------------


class DegreeHead(nn.Linear):
    """Hidden state → N logits, in fp32; starts at zero, so that the degree loss starts at log N.

    Attributes:
        hooks: that read it in its model's forward.
    """

    hooks: Sequence[Any] = ()

    def __init__(self, width: int, degrees: int, device: torch.device, dtype: torch.dtype):
        super().__init__(width, degrees, device=device, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[…, width]` → `[…, N]`, whatever autocast or the engine make of the weights."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())


def attach_head(model: Any, degrees: int, dtype: torch.dtype = torch.float32) -> DegreeHead:
    """Give `model`'s forward an argument `degree_positions`; where it is given, the output is a plain dictionary of
    `logits` and `degree_logits`.

    The argument, `[rows, k]`, names columns; the degree logits are `[rows, k, N]`. Hooks on the outermost module do
    it, so that DDP, ZeRO-3 and PEFT run them. What is read is the decoder's output, behind its last norm: what the LM
    head is given, so that no layer's hidden states are kept for it.

    Args:
        model: a causal language model or a PeftModel, not yet wrapped.
        degrees: N.
        dtype: of the head's weights; it computes in fp32 whatever they are.
    """
    plain = model.get_base_model() if is_peft_model(model) else model
    head = DegreeHead(plain.get_output_embeddings().in_features, degrees, model.device, dtype)
    model.add_module(NAME, head)
    passing: dict[str, torch.Tensor] = {}  # of the forward pass under way

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        passing.clear()
        if "degree_positions" in kwargs:
            passing["positions"] = kwargs.pop("degree_positions")
        return args, kwargs

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if passing:
            passing["hidden"] = output[0]

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if not passing:
            return output
        positions, hidden = passing["positions"], passing["hidden"]
        passing.clear()
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        # DDP takes outputs apart and together again: a dictionary stands that, transformers' class no further entry.
        return {"logits": output.logits, "degree_logits": head(hidden[rows, positions])}

    head.hooks = [
        model.register_forward_pre_hook(take, with_kwargs=True),
        plain.get_decoder().register_forward_hook(keep),
        model.register_forward_hook(add),
    ]
    return head


def detach_head(model: Any) -> None:
    """Take off the head that an earlier trainer has left on the model: the next one would read it, and save it."""
    head = model._modules.pop(NAME, None)
    for hook in () if head is None else head.hooks:
        hook.remove()


class DegreeTrainer(DPOTrainer):
    """What the degree loss adds to a trainer: copies in the data, the head in model, optimizer and checkpoints.

    Attributes:
        copy_facts: for the manifest: how many training responses there are, how many of them have copies after
            truncation, and which stop words graded them; empty without an objective that needs degrees.
    """

    model: Any
    objective: Objective
    collator: Any
    head: DegreeHead | None = None
    limits: torch.Tensor
    copy_facts: dict[str, Any] = {}

    @property
    def copied(self) -> tuple[int, ...]:
        """Branches that have degraded copies: none, unless the objective needs degrees."""
        settings: Any = self.objective
        return RESPONSES[settings.responses] if "degree" in self.objective.needs else ()

    def with_copies(self, dataset: Dataset, tokenizer: Any, seed: int, name: str) -> Dataset:
        """The rows with copies, which they may have brought."""
        if not self.copied:
            return dataset
        settings: Any = self.objective
        if not set(COLUMNS) <= set(dataset.column_names):
            dataset = with_degree_copies(dataset, tokenizer, self.objective, seed)
        wanted = settings.degrees * len(self.copied)
        if any(len(labels) != wanted for labels in dataset["degree_labels"]):
            raise UserError(f"{name} data: degree_labels must have {wanted} entries in every row")
        if name == "train" and not any(label > 0 for labels in dataset["degree_labels"] for label in labels):
            raise UserError(
                f"{name} data: no response has the {settings.degrees - 1} key phrases that objective.degrees="
                f"{settings.degrees} asks for (removal={settings.removal!r}): use longer responses, or fewer degrees"
            )
        return dataset

    def attach_degree_head(self, max_length: int | None) -> None:
        """After the model has its adapter, before the optimizer and any wrapper exist."""
        if not self.copied:
            return
        settings: Any = self.objective
        # One buffer holds all that an engine shards, in one dtype: ZeRO-3 under bf16 makes it that of the weights, and
        # keeps float32 masters of the head as of them.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        trained = next(p.dtype for p in self.model.parameters() if p.requires_grad)
        self.head = attach_head(self.model, settings.degrees, trained if sharded else torch.float32)
        data: Any = self.train_dataset
        lengths: list[int] = []
        labels: list[int] = []
        for example in data.select_columns(["prompt_ids", *COLUMNS]):
            cut, found = cut_copies(example, max_length, len(self.copied))
            lengths += [len(ids) for ids, label in zip(cut, found, strict=True) if label >= 0]
            labels += [label for label in found if label >= 0]
        self.limits = torch.tensor(length_limits(lengths, labels, settings.degrees))
        self.copy_facts = {
            "responses": len(data) * len(self.copied),
            "with_copies": labels.count(0),
            "stop_words_sha256": STOP_WORDS_SHA256,
        }

    def create_optimizer(self, model=None):
        """As transformers', and the head in a group of its own: its learning rate, no weight decay."""
        if self.head is None or self.optimizer is not None:
            return super().create_optimizer(model)
        settings: Any = self.objective
        self.head.requires_grad_(False)  # keeps it out of transformers' groups
        optimizer = super().create_optimizer(model)
        self.head.requires_grad_(True)
        group = {"params": list(self.head.parameters()), "lr": settings.head_learning_rate, "weight_decay": 0.0}
        optimizer.add_param_group(group)
        return optimizer

    def score_with_degrees(
        self, model: Any, inputs: dict[str, torch.Tensor], branches: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`[B, branches]` log-probs of the responses under the policy, and the batch's degree columns, in one pass."""
        settings: Any = self.objective
        rows = {key: inputs[f"degree_{key}"] for key in ROW_KEYS}
        copies = len(self.copied) * (settings.degrees - 1)
        if self.collator.layout == "paired" and int(rows["row_segments"].max()) > 1:
            rows = repaired(rows, copies + branches, self.collator.pad_token_id)
        positions = last_positions(rows)
        output = forward_rows(model, self.model.config, self.model.dtype, rows, degree_positions=positions)
        logits = unfold(output["degree_logits"], copies + branches)[:, copy_branches(self.copied, settings.degrees)]
        sums = branch_sums(output["logits"], rows, copies + branches)[:, copies:]
        return sums, {"degree_logits": logits, "degree_labels": inputs["degree_labels"]}

    def degree_metrics(self, batch: PairLogps, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss of pairs that have copies, accuracy over copies, and what length alone would reach on the same ones."""
        if batch.degree_logits is None or batch.degree_labels is None:
            return {}
        logits, labels = batch.degree_logits.detach(), batch.degree_labels
        real = labels >= 0
        guessed = (self.limits.to(labels.device) >= inputs["degree_lengths"][..., None]).sum(-1)
        return {
            "degree/loss": degree_loss(logits, labels)[real.any(1)],
            "degree/accuracy": (logits.argmax(-1) == labels)[real].double(),
            "degree/length_baseline": (guessed == labels)[real].double(),
            "degree/pairs": real.any(1).double(),
        }

    # --- checkpoints --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _headless(self) -> Iterator[None]:
        """The plain model: for what reads or writes files that others read."""
        if self.head is None:
            yield
            return
        delattr(self.model, NAME)
        try:
            yield
        finally:
            self.model.add_module(NAME, self.head)

    def _save(self, output_dir=None, state_dict=None):
        """As transformers', with the head in a file of its own; `state_dict` is given where the model is sharded."""
        if self.head is None:
            return super()._save(output_dir, state_dict)
        state = self.head.state_dict() if state_dict is None else _taken(state_dict)
        with self._headless():
            super()._save(output_dir, state_dict)
        if self.args.should_save and state:
            plain = {name: value.detach().float().cpu().contiguous() for name, value in state.items()}
            save_file(plain, Path(str(output_dir or self.args.output_dir)) / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with self._headless():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled:  # its own checkpoint holds the head
            return super()._load_best_model()
        with self._headless():
            super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, folder: str) -> None:
        if self.head is None:
            return
        file = Path(folder) / FILE
        if not file.is_file():
            raise UserError(f"{file}: no such file; {folder} is not a checkpoint of an objective with a degree head")
        self.head.load_state_dict(load_file(file))


def _taken(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the head's entries from a model's and returns them under their own names."""
    names = [name for name in state_dict if name.startswith(f"{NAME}.")]
    return {name.removeprefix(f"{NAME}."): state_dict.pop(name) for name in names}
