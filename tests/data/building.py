"""Tokenizers built letter by letter, so that every id of an expected row can be written down by hand; small files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import csv, parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignment.data.pipeline import Prepared, prepare
from alignment.recipes.rows import SourceSection

SPECIAL = ("<pad>", "<s>", "</s>", "<|im|>", "<|turn|>")
# Chat markup in the way of Llama 3: BOS once, every message closed by EOS and a line end.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)


def letters(
    *,
    bos: bool = False,
    template: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
    pad: str = "<pad>",
    ends_itself: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes, plus `merges`.

    Args:
        bos: it puts <s> before plain text.
        template: chat template.
        merges: pairs of letters that become one token.
        pad: the padding token; "</s>" for tokenizers that pad with EOS.
        ends_itself: it puts </s> after plain text (Llama's add_eos_token).
    """
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos or ends_itself:
        around = f"{'<s> ' if bos else ''}$A{' </s>' if ends_itself else ''}"
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad)
    found.chat_template = template
    return found


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def user(text: str) -> list[dict[str, str]]:
    return [said("user", text)]


def reply(text: str) -> list[dict[str, str]]:
    return [said("assistant", text)]


def write(path: Path, rows: list[dict[str, Any]] | dict[str, Any]) -> str:
    """Rows as a file of the kind that the name says."""
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith(".csv"):
        csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def prepared(source: Any, tokenizer: Any = None, *, role: str = "train", max_length: int = 10_000, **more) -> Prepared:
    """`prepare` of one source (a name or the keys of its section), or of a list of them."""
    sources = [source] if isinstance(source, str | dict) else source
    sections = [SourceSection(**({"name": s} if isinstance(s, str) else s)) for s in sources]
    return prepare(sections, tokenizer or letters(), max_length=max_length, role=role, **more)


def texts(found: Prepared) -> list[tuple[Any, Any, Any]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in found.dataset]


def refused(found: Prepared) -> list[tuple[int, str]]:
    return [(bad.row, bad.reason) for bad in found.rejected]
