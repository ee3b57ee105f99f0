"""The only forward pass of the project: token ids of a prompt and its responses → one log-probability per response.

    rows = build_rows(prompts, responses, pad_token_id, layout)      # in the collator, plain lists to tensors
    sums = sequence_logps(model, config, dtype, rows)                # [n, k], log π(y_j | x_i) in nats, fp32

Both layouts are the same rows, `[left pad | prompt[:-1] | prompt[-1] y_1[:-1] | prompt[-1] y_2[:-1] | …]`:
`shared_prefix` puts a prompt's k responses into one row, `paired` puts each response into a row of its own (k = 1).
Position ids restart at the prompt's last token in every branch; in `shared_prefix` a 4-D mask keeps the branches blind
to each other. Rows are right-aligned, so every scored position lies in the last K columns and transformers' own
`logits_to_keep=K` runs the LM head on those only. Labels are already shifted. Masks come from lengths (segment
numbers), never from `token != pad`. The wrapped model's `forward` is called: DDP, ZeRO-3 and FSDP hook there.

Not here: truncation (the collator), references and adapters (the trainer), objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

Layout = Literal["shared_prefix", "paired"]
ROW_KEYS = ("row_ids", "row_positions", "row_segments", "row_labels")  # not "labels": Trainer counts those
PAD, PROMPT = -1, 0  # segment numbers; response j (from 0) is segment j + 1
IGNORED = -100  # label of a position that is not scored


def build_rows(
    prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], pad_token_id: int, layout: Layout
) -> dict[str, torch.Tensor]:
    """Rows of token ids for `sequence_logps`.

    An empty prompt leaves the first token of each response unscored (nothing precedes it), as TRL does.

    Args:
        prompts: n lists of token ids.
        responses: n lists of k lists of token ids, none empty.
        pad_token_id: fills the left; its value changes nothing.
        layout: n rows (`shared_prefix`), or k·n rows, all first responses first (`paired`).

    Returns:
        `row_ids`, `row_positions`, `row_segments`, each [rows, T]; `row_labels` [rows, K].
    """
    if layout == "paired":
        width = len(responses[0])
        prompts, responses = (
            [p for _ in range(width) for p in prompts],
            [[group[j]] for j in range(width) for group in responses],
        )
    return _aligned([_row(prompt, group) for prompt, group in zip(prompts, responses, strict=True)], pad_token_id)


def _aligned(rows: Sequence[tuple[list[int], ...]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of unequal length as tensors, padded on the left."""
    fills = (pad_token_id, 0, PAD, IGNORED)
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    columns = [[[fills[c]] * (widths[c] - len(row[c])) + row[c] for row in rows] for c in range(4)]
    return dict(zip(ROW_KEYS, map(torch.tensor, columns), strict=True))


def _row(prompt: list[int], group: Sequence[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    start = max(len(prompt) - 1, 0)
    ids, positions, segments, labels = list(prompt[:-1]), list(range(start)), [PROMPT] * start, []
    for j, response in enumerate(group, start=1):
        text = [*prompt[-1:], *response]
        n = len(text) - 1
        ids += text[:-1]
        positions += range(start, start + n)
        segments += [j] * n
        labels += text[1:]
    return ids, positions, segments, labels


def branch_mask(segments: torch.Tensor, positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Who may attend to whom, [rows, 1, T, T] bool, True = may: causal, and only the prompt and the own branch.

    A sliding window counts positions, not columns. Pad queries see themselves: softmax over nothing would be NaN.
    """
    t = torch.arange(segments.size(1), device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = (t[:, None] >= t) & ((key == PROMPT) | ((key == query) & (key != PAD)))
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return (allowed | (t[:, None] == t))[:, None]


def why_not_shared(config: Any) -> str | None:
    """Why this model cannot take shared-prefix rows, or None where nothing is known against it.

    Attention must accept a 4-D mask (sdpa or eager), positions must come from `position_ids` (not ALiBi), every layer
    must be full or sliding attention. Rows are compared all the same (`LayoutTrainer`).
    """
    text = config.get_text_config()
    if "local" in (getattr(text, "attention_layers", None) or ()):
        return f"{text.model_type} counts its local window in columns"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{text.model_type} has layers of kind {', '.join(sorted(kinds))}"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation={text._attn_implementation!r} takes no 4-D mask"
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return f"{text.model_type} uses ALiBi"
    if text.model_type in ("mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "zamba", "zamba2", "recurrent_gemma"):
        return f"{text.model_type} is recurrent"
    return None


def frequencies_switch_at(config: Any) -> tuple[str, int] | None:
    """(rope_type, tokens) where a row longer than that changes the position encoding of every row in its batch.

    transformers picks the frequencies of dynamic NTK and longrope by the largest position of the batch.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") if kind == "longrope" else None
            return kind, int(original or text.max_position_embeddings)
    return None


def attention_mask(config: Any, segments: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> Any:
    """The mask in the form that this architecture and attention implementation take.

    One branch a row is ordinary left padding: a 2-D mask, which every model takes. Several branches: 4-D, as bool for
    sdpa, additive in the model's dtype for eager (which would add a bool as 0/1), and one mask per kind of layer in a
    dict for hybrids such as Gemma-3. transformers uses a 4-D mask as it is, so a sliding window must be inside it.
    """
    if int(segments.max()) <= 1:
        return (segments != PAD).long()
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None

    def form(window: int | None) -> torch.Tensor:
        allowed = branch_mask(segments, positions, window)
        if text._attn_implementation == "sdpa":
            return allowed
        additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return additive.masked_fill_(~allowed, torch.finfo(dtype).min)

    if len(kinds) > 1:
        return {"full_attention": form(None), "sliding_attention": form(window)}
    return form(None if kinds == {"full_attention"} else window)


def sequence_logps(
    model: Callable[..., Any], config: Any, dtype: torch.dtype, rows: dict[str, torch.Tensor], branches: int
) -> torch.Tensor:
    """Log-probability of every response, summed over its tokens in fp32.

    Args:
        model: the (wrapped) causal language model; called once.
        config: its configuration (architecture, attention implementation).
        dtype: of its weights.
        rows: from `build_rows`.
        branches: k, responses per prompt.

    Returns:
        [n, k] in nats, float32, differentiable.
    """
    return branch_sums(forward_rows(model, config, dtype, rows).logits, rows, branches)


def forward_rows(
    model: Callable[..., Any], config: Any, dtype: torch.dtype, rows: dict[str, torch.Tensor], **more: Any
) -> Any:
    """The model's output for rows; `more` are further arguments of its forward."""
    return model(
        input_ids=rows["row_ids"],
        position_ids=rows["row_positions"],
        attention_mask=attention_mask(config, rows["row_segments"], rows["row_positions"], dtype),
        logits_to_keep=rows["row_labels"].size(1),
        use_cache=False,
        **more,
    )


def branch_sums(logits: torch.Tensor, rows: dict[str, torch.Tensor], branches: int) -> torch.Tensor:
    """`[n, k]` log-probs of the responses from the logits of (at least) the scored columns."""
    logps, branch = _token_logps(logits, rows)
    return unfold(torch.stack([(logps * (branch == j)).sum(1) for j in range(1, int(branch.max()) + 1)], 1), branches)


def branch_tokens(logits: torch.Tensor, rows: dict[str, torch.Tensor], branches: int) -> torch.Tensor:
    """`[n, k, L]` log-probs of the responses' tokens, in their order; 0 beyond a response's end.

    A response's tokens are consecutive columns of its row. With an empty prompt the first token is missing.
    """
    logps, branch = _token_logps(logits, rows)
    counts = [(branch == j).sum(1) for j in range(1, int(branch.max()) + 1)]
    steps = torch.arange(max(int(n.max()) for n in counts), device=branch.device)
    found = []
    for j, count in enumerate(counts, start=1):
        first = (branch == j).int().argmax(1)
        columns = (first[:, None] + steps).clamp(max=branch.size(1) - 1)
        found.append(logps.gather(1, columns) * (steps < count[:, None]))
    return unfold(torch.stack(found, 1), branches)


def _token_logps(logits: torch.Tensor, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, K]` log-probs of the labels in fp32 (0 where there is none), and whose branch each column is."""
    labels, keep = rows["row_labels"], rows["row_labels"].size(1)
    logps = -F.cross_entropy(
        logits[:, -keep:].flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(labels)
    return logps, rows["row_segments"][:, -keep:]


def last_positions(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[rows, branches in a row]`: the column that predicts each branch's last token."""
    segments = rows["row_segments"]
    columns = torch.arange(segments.size(1), device=segments.device)
    return torch.stack([((segments == j) * columns).amax(1) for j in range(1, int(segments.max()) + 1)], 1)


def unfold(per_row: torch.Tensor, branches: int) -> torch.Tensor:
    """[rows, branches in a row, …] → [n, k, …] whatever the layout: `paired` rows hold all first responses first."""
    if per_row.size(1) == branches:
        return per_row
    return per_row.view(branches, -1, *per_row.shape[2:]).transpose(0, 1)


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of log-probs, relative to their size (at least 1 nat); infinite where anything
    is not a number, which would pass every comparison."""
    gap = float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())
    return gap if math.isfinite(gap) else math.inf


def scored_tokens(segments: torch.Tensor) -> torch.Tensor:
    """1 where a row holds a real token, 0 where it is padding; [rows, T]."""
    return (segments != PAD).long()


def repaired(rows: dict[str, torch.Tensor], branches: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Shared rows taken apart into `paired` rows of the same tokens, on the same device.

    For comparisons, and for batches that were collated before the layout was settled.
    """
    ids, positions, segments, labels = (rows[key].tolist() for key in ROW_KEYS)
    apart = []
    for j in range(1, branches + 1):
        for row, (row_ids, row_positions, row_segments) in enumerate(zip(ids, positions, segments, strict=True)):
            kept = [t for t, segment in enumerate(row_segments) if segment in (PROMPT, j)]
            tail = row_segments[len(row_segments) - len(labels[row]) :]
            targets = [label for label, segment in zip(labels[row], tail, strict=True) if segment == j]
            marks = [min(row_segments[t], 1) for t in kept]
            apart.append(([row_ids[t] for t in kept], [row_positions[t] for t in kept], marks, targets))
    return {key: value.to(rows[key].device) for key, value in _aligned(apart, pad_token_id).items()}
