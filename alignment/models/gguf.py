"""GGUF file → plain transformers folder, once per file, in the cache (`$ALIGNMENT_CACHE`, else ~/.cache/alignment).

transformers' own reader does the work. This mends what it leaves behind (transformers 5.23): the tokenizer loses the
digit splitting that the file's `tokenizer.ggml.pre` asks for, the model carries a quantiser's marker that
`save_pretrained` refuses although its weights are plain tensors, and `_name_or_path` is the file's title, which reads
like a hub id. The quantised values themselves are what the file holds: nothing is restored.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError
from alignment.files import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Pre-tokenizer names for which llama.cpp splits every digit off before GPT-2's pattern. `smollm` was compared with the
# original tokenizer; the others are from llama.cpp's table and were not tried here.
SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
FORMAT = "1"  # part of the cache key: raise it when the conversion changes


def cache_root() -> Path:
    """Where this project keeps what can be rebuilt."""
    return Path(os.environ.get("ALIGNMENT_CACHE", "~/.cache/alignment")).expanduser()


def converted_folder(file: Path) -> Path:
    """The cached conversion of `file`, built where there is none; appears whole, by rename.

    Raises:
        UserError: the file is not a GGUF file that transformers can read.
    """
    folder = cache_root() / "gguf" / f"{file.stem}-{file_digest(file)[:16]}-{FORMAT}"
    if (folder / "config.json").is_file():
        return folder
    print(f"Converting {file.name} (once; kept in the cache) …", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        model, tokenizer = _read(file)
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        try:
            building.rename(folder)
        except OSError:  # another process finished first; its folder is the same
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _metadata(file: Path, key: str) -> Any:
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field(key)
    return None if field is None else field.contents()


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32) and tokenizer of a GGUF file, savable."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignment.models.loading import refuse_missing_weights

    try:
        pre = _metadata(file, "tokenizer.ggml.pre")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.name_or_path: {file}: not a GGUF file that transformers can read ({reason})"
        ) from error
    model, info = loaded
    refuse_missing_weights(f"model.name_or_path: {file}", {*info["missing_keys"]})
    if pre in SPLITS_DIGITS:
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    # The tensors are dequantised, plain float32: the marker only stops `save_pretrained`.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.config._name_or_path = str(file)
    return model, tokenizer
