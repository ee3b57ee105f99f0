"""Reward models: a trunk with a linear head of k scores on the last token, as transformers' sequence classification.

`load_reward_model` loads one, `score_rows` is its forward pass, `Facts` is the file `reward_model.json` beside the
weights: what the scores are (one model, an ensemble's members, an embedding of preferences), how texts become tokens,
and the constants that standardise them. Not training (`alignment.trainers.reward_model`) and not the rewards of a
recipe (`alignment.rewards.scored`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import UserError
from alignment.files import read_json_object, write_json
from alignment.models.ends import ends_of
from alignment.models.loading import adapter_base, load_model, resolve_path

if TYPE_CHECKING:
    import torch

FACTS = "reward_model.json"


@dataclass(frozen=True)
class Facts:
    """What a reward model's outputs mean.

    Attributes:
        kind: scalar: every output is a score; general: outputs embed the response (GPM).
        outputs: of the head: members of a shared trunk (scalar); 2k coordinates, and k gate logits where `gated`.
        chat: prompts are what a user says in the chat template; None: as the prompt comes, text or messages.
        max_length: tokens of prompt and response; longer responses are cut at their end.
        gated: (general) the last third of the outputs, read at the prompt's end, weighs the planes.
        temperature: (general) tau.
        mean, std: of each output over the calibration responses (population std); None where not measured.
        calibration: how many responses, of which set.
    """

    kind: Literal["scalar", "general"] = "scalar"
    outputs: int = 1
    chat: bool | None = None
    max_length: int | None = None
    gated: bool = False
    temperature: float = 0.1
    mean: list[float] | None = None
    std: list[float] | None = None
    calibration: str | None = None

    def write(self, folder: Path) -> None:
        """Beside the weights in `folder`."""
        write_json(folder / FACTS, dataclasses.asdict(self))


def read_facts(folder: Path) -> Facts | None:
    """What training wrote into a model's folder; None for a model that is not ours.

    Raises:
        UserError: the file is there and not one of ours.
    """
    file = folder / FACTS
    if not file.is_file():
        return None
    try:
        return Facts(**read_json_object(file))
    except TypeError as error:
        raise UserError(f"{file}: not written by this version of alignment ({error}); train or export again") from None


def load_reward_model(
    name_or_path: str | Path, *, outputs: int | None = None, fresh_head: bool = False, **options: Any
) -> Any:
    """A sequence-classification model in eval mode.

    Args:
        name_or_path: as of `load_model`; a LoRA adapter of a reward model is put on its base.
        outputs: scores that the head must have; None: as many as it has.
        fresh_head: a causal language model (or another head) is what training starts from; without it a folder that
            holds no trained head is refused, since its scores would be random numbers.
        options: of `load_model`.

    Raises:
        UserError: as `load_model`, no trained head, another number of outputs, or a fresh head on an adapter.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    where = resolve_path(name_or_path)
    facts = read_facts(Path(where))
    wanted = outputs if outputs is not None else facts.outputs if facts is not None else None
    on_adapter = adapter_base(where) is not None
    if fresh_head and (on_adapter or options.get("adapter") is not None):
        raise UserError(
            f"model.{'name_or_path' if on_adapter else 'adapter'}: a reward model starts from full weights: export "
            "the adapter first, `alignment export ADAPTER DIR`"
        )
    if on_adapter:
        saved = read_json_object(Path(where) / "adapter_config.json").get("modules_to_save")
        if not saved:
            raise UserError(
                f"{name_or_path}: not a reward model: the adapter has no head (modules_to_save), and scores from "
                "random weights mean nothing; train one with scripts/train_reward_model.py"
            )
        wanted = wanted or 1
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # a fresh head, and a language model's own that is not used, are as they should be
    model = load_model(
        name_or_path,
        kind=AutoModelForSequenceClassification,
        num_labels=wanted if fresh_head or on_adapter else None,
        refuse_missing=None if fresh_head or on_adapter else str(name_or_path),
        **options,
    )
    logging.set_verbosity(said)
    found = int(model.config.num_labels or 0)
    if wanted is not None and found != wanted:
        raise UserError(
            f"{name_or_path}: the head has {found} label{'s' if found != 1 else ''}, and {wanted} "
            f"{'are' if wanted != 1 else 'is'} needed: a reward model has one (a shared-trunk ensemble one per member)"
        )
    return model


def settle_padding(
    model: Any,
    tokenizer: Any,
    wanted: str | None = None,
    remedy: str = "name an unused one in reward_model.pad_token",
) -> int:
    """A pad id that cannot be a response's last token, in the model's configuration and the tokenizer.

    transformers reads the score at the last token that is not padding: padding with EOS would read it one token early,
    without a word. The tokenizer's own pad token is taken, or its unk token where padding is EOS. `remedy` is what the
    user can do where there is none.

    Raises:
        UserError: there is none besides EOS, or `wanted` is not in the vocabulary.
    """
    ends = {tokenizer.convert_ids_to_tokens(end) for end in ends_of(tokenizer).ids}
    candidates = [wanted] if wanted is not None else [tokenizer.pad_token, tokenizer.unk_token]
    token = next((t for t in candidates if t is not None and t not in ends), None)
    if token is None or token not in tokenizer.get_vocab():
        what = f"{wanted!r} is EOS or not in the vocabulary" if wanted is not None else "the tokenizer has none"
        raise UserError(
            f"model: a pad token besides EOS is needed, since the score is read at the last token that is not "
            f"padding: {what}; {remedy}"
        )
    tokenizer.pad_token = token
    pad = int(tokenizer.pad_token_id)
    model.config.get_text_config().pad_token_id = pad
    return pad


def padded(rows: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[n, T]`, padded on the right; the mask is made of lengths."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def score_rows(model: Any, rows: Sequence[list[int]], pad: int, batch_size: int, progress: str | None = None) -> Any:
    """`[n, outputs]` float32 on the CPU: the head's outputs at each row's last token.

    Rows of like length are scored together, longest first; the numbers do not depend on it (float32: to rounding).
    """
    import torch
    from tqdm import tqdm

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: list[torch.Tensor] = []
    starts = range(0, len(order), batch_size)
    with torch.no_grad():
        for start in tqdm(starts, desc=progress, disable=progress is None):
            batch = padded([rows[i] for i in order[start : start + batch_size]], pad)
            inputs = {key: value.to(model.device) for key, value in batch.items()}
            found.append(model(**inputs, use_cache=False).logits.float().cpu())
    table = torch.empty(len(rows), found[0].size(1)) if found else torch.empty(0, int(model.config.num_labels))
    if found:
        table[order] = torch.cat(found)
    return table


def trunk_features(
    model: Any, rows: Sequence[list[int]], pad: int, batch_size: int, progress: str | None = None
) -> Any:
    """`[n, width]`: what the head is given at each row's last token.

    Raises:
        UserError: the architecture's head is not one linear layer called `score`.
    """
    import torch

    head = head_of(model)
    model.score = torch.nn.Identity()
    try:
        return score_rows(model, rows, pad, batch_size, progress)
    finally:
        model.score = head


def head_of(model: Any) -> Any:
    """The linear layer that makes the scores."""
    from transformers.modeling_layers import GenericForSequenceClassification

    if not isinstance(model, GenericForSequenceClassification):
        raise UserError(
            f"reward_model.freeze_trunk: {type(model).__name__} has no separate linear head: train it whole or with "
            "lora"
        )
    return model.score


def digest_of(facts: Facts) -> str:
    """The facts as one line of text, for descriptions and keys."""
    return json.dumps(dataclasses.asdict(facts), sort_keys=True)
