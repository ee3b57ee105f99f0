"""A finished run → a plain transformers folder: adapters merged, verified, whole or not at all.

What comes out needs neither this project nor PEFT. Merging is done in float32 on the CPU (four bytes a parameter),
then the weights are rounded to the run's dtype. Not a converter to other formats, and no upload.

    alignment export runs/quickstart-dpo exported/quickstart-dpo
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError
from alignment.files import read_json_object, write_text
from alignment.models.adapters import kind_of, why_not_merged
from alignment.models.card import Card, adapter_of, measured
from alignment.models.ends import settle_ends
from alignment.models.loading import DTYPES, load_model, load_tokenizer, resolve_path, with_adapter
from alignment.models.reward_model import FACTS, load_reward_model, read_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Largest difference of logits, relative to the largest logit. Merging and saving are held to the first whatever the
# dtype; rounding merged weights to 8 or 11 bits of mantissa is what the others allow.
EXACT = 1e-4
ROUNDED = {"float32": EXACT, "bfloat16": 1e-1, "float16": 2e-2}
PROMPTS = ("The", "Once upon a time there was", "def add(a, b):\n    return", "1 2 3 4 5 6 7 8 9 10 11 12")


@dataclass(frozen=True)
class Source:
    """What is exported: a folder with weights, and the manifest of its run where there is one."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty where there is no run."""
        return self.manifest.get("recipe") or {}

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter's."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def is_reward_model(self) -> bool:
        """Whether its outputs are scores: a model of scripts/train_reward_model.py."""
        return (self.folder / FACTS).is_file()

    @property
    def model_section(self) -> dict[str, Any]:
        """The recipe's `model`; empty where there is no recipe."""
        section: dict[str, Any] = self.recipe.get("model") or {}
        return section

    @property
    def base(self) -> str:
        """The base under the adapter: the recipe's word where there is one.

        PEFT's own is the folder that was loaded, which for a GGUF file lies in a cache and may be gone.
        """
        name = self.model_section.get("name_or_path")
        if name is None or (Path(resolve_path(name)) / "adapter_config.json").is_file():
            return _named_base(self.folder)
        return str(name)

    @property
    def options(self) -> dict[str, Any]:
        """What `load_model` needs besides name and dtype."""
        return {"trust_remote_code": bool(self.model_section.get("trust_remote_code"))}


def find_source(run: Path) -> Source:
    """The trained model that `run` names.

    That is its `final/`, or `run` itself where it is a model's, a checkpoint's or an adapter's folder; the recipe of
    the run around such a folder counts.

    Raises:
        UserError: there is none.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run's folder, or a model's or adapter's")
    folder = run / "final" if (run / "manifest.json").is_file() else run
    if not folder.is_dir():
        raise UserError(f"{run}: has no final/: training has not ended; go on with --resume, or name a checkpoint")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder}: neither a run (manifest.json) nor a model (config.json) nor an adapter")
    manifest = folder.resolve().parent / "manifest.json"
    return Source(folder, read_json_object(manifest) if manifest.is_file() else {})


def export(run: Path, target: Path, dtype: str | None = None) -> list[str]:
    """Write the trained model of `run` into `target`; returns what there is to say of it, in lines.

    Args:
        run: a run's folder, or a model's or adapter's.
        target: must not exist, or be empty.
        dtype: of the saved weights; by default that of the run.

    Raises:
        UserError: there is no trained model, `target` is taken, or the result's logits are not the trained model's.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder; give another")
    source = find_source(run)
    config = adapter_of(source.folder) or {}
    if (why := why_not_merged(config)) is not None:
        raise UserError(
            f"{source.folder}: an adapter of kind {kind_of(config)} cannot be merged: {why}; {_stays(source.base)}"
        )
    trained_dtype = _trained_dtype(source)
    beside = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        said = _write(source, beside, trained_dtype, dtype or trained_dtype)
        write_text(beside / "README.md", model_card(source, target.name, dtype or trained_dtype))
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return said


def _trained_dtype(source: Source) -> str:
    """The dtype that the model was trained in: the recipe's word, else what its (or its base's) config says."""
    if found := source.model_section.get("dtype"):
        return str(found)
    from transformers import AutoConfig

    folder = str(source.folder)
    while (Path(folder) / "adapter_config.json").is_file():
        folder = resolve_path(_named_base(Path(folder)))
    try:
        config: Any = AutoConfig.from_pretrained(folder, **source.options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.folder}: cannot load its base {folder!r} ({' '.join(str(error).split())[:200]})"
        ) from error
    name = str(config.dtype or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _write(source: Source, folder: Path, trained: str, saved: str) -> list[str]:
    """Merge, save and verify; lines that say what was done and how far the logits are apart."""
    import torch

    said = []
    tokenizer = load_tokenizer(_tokenizer_folder(source), **source.options)
    prompts = _prompts(tokenizer)
    model: Any = _trained_model(source, trained)
    before = _logits(model, prompts)
    if source.is_adapter:
        if source.model_section.get("quantization"):
            # What the adapter has learned fits the weights as they were rounded, not those before.
            model = _on_base(source.folder, source.base, trained, source.model_section, written_out=True)
            said.append("the base's quantised weights are written out in full")
        model, gap = _merged(model, prompts, source.base)
        _refuse_beyond(gap, EXACT, "merging the adapter", _stays(source.base))
        said.append(f"adapter merged into {source.base} in float32 (relative difference of logits {gap:.1g})")
    _cast(model, getattr(torch, saved))
    in_memory = _logits(model, prompts)
    step, remedy = f"rounding to {saved}", "try --dtype float32"
    if saved == "float32" and source.is_adapter:  # nothing is rounded: the base under the adapter is another one
        step, remedy = "writing the base's weights out in full", _stays(source.base)
    _refuse_beyond(_gap(in_memory, before), max(ROUNDED[saved], ROUNDED[trained]), step, remedy)
    if not source.is_reward_model:
        settle_ends(model, tokenizer)
    _save(model, tokenizer, folder)
    del model
    if source.is_reward_model:
        shutil.copy(source.folder / FACTS, folder / FACTS)
    reloaded = (load_reward_model if source.is_reward_model else load_model)(folder, dtype=saved, **source.options)
    after = _logits(reloaded, prompts)
    _refuse_beyond(_gap(after, in_memory), EXACT, "saving and loading again", f"{source.folder} is whole: use that")
    largest = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    scale = max(float(b.abs().max()) for b in before)
    said.append(
        f"verified on {len(prompts)} prompts: largest difference from the trained model's logits {largest:.2g} "
        f"({saved}; the largest logit is {scale:.3g})"
    )
    return said


def _refuse_beyond(gap: float, limit: float, step: str, remedy: str) -> None:
    if not gap <= limit:
        raise UserError(
            f"export: {step} changes the logits by {gap:.2g} of the largest one, more than {limit:g}: nothing was "
            f"written; {remedy}"
        )


def _stays(base: str) -> str:
    """What becomes of an adapter that cannot be merged."""
    return f"use it as it is: PEFT loads the folder as an adapter on {base}"


def _trained_model(source: Source, dtype: str) -> Any:
    """The model as it was trained: full weights, or the adapter beside its base."""
    if not source.is_adapter:
        load = load_reward_model if source.is_reward_model else load_model
        return load(source.folder, dtype=dtype, **source.options)
    return _on_base(source.folder, source.base, dtype, source.model_section)


def _on_base(adapter: Path, base: str, dtype: str, section: dict[str, Any], *, written_out: bool = False) -> Any:
    """`adapter` on its base; where the base is an adapter itself, on the merge of that one.

    A quantised base stays so, or has the same weights written out in `dtype`.
    """
    import torch

    path = resolve_path(base)
    if not (Path(path) / "adapter_config.json").is_file():
        options: dict[str, Any] = {key: section[key] for key in ("revision", "trust_remote_code") if section.get(key)}
        options["quantization"] = section.get("quantization")
        if (facts := read_facts(adapter)) is not None:
            return _scores_on_base(path, adapter, facts.outputs, dtype, written_out, options)
        if not (written_out and options["quantization"]):
            return load_model(path, dtype=dtype, adapter=str(adapter), **options)
        whole: Any = load_model(path, dtype=dtype, **options)
        return with_adapter(_written_out(whole, dtype), str(adapter)).eval()
    below = _on_base(Path(path), _named_base(Path(path)), dtype, section, written_out=True)
    below, gap = _merged(below, [[1, 2, 3, 4]], path)
    _refuse_beyond(gap, EXACT, f"merging {path}", _stays(_named_base(Path(path))))
    _cast(below, getattr(torch, dtype))
    return with_adapter(below, str(adapter)).eval()


def _scores_on_base(
    path: str, adapter: Path, outputs: int, dtype: str, written_out: bool, options: dict[str, Any]
) -> Any:
    """A reward model's adapter, which brings the head, on its trunk."""

    trunk = load_reward_model(path, outputs=outputs, fresh_head=True, dtype=dtype, **options)
    if written_out and options["quantization"]:
        trunk = _written_out(trunk, dtype)
    return with_adapter(trunk, str(adapter)).eval()


def _named_base(adapter: Path) -> str:
    base = read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter / 'adapter_config.json'}: does not name its base model (base_model_name_or_path)")
    return str(base)


def _tokenizer_folder(source: Source) -> str:
    """Where the tokenizer lies: beside the weights, else beside the nearest base that has one."""
    folder = str(source.folder)
    while not (Path(folder) / "tokenizer_config.json").is_file() and (Path(folder) / "adapter_config.json").is_file():
        folder = resolve_path(source.base if folder == str(source.folder) else _named_base(Path(folder)))
    return folder


def _written_out(model: Any, dtype: str) -> Any:
    """A quantised model with the same weights in `dtype`; some kinds of adapters merge only where no flag is left."""
    import torch

    plain = model.dequantize(getattr(torch, dtype))
    plain.is_loaded_in_4bit = plain.is_loaded_in_8bit = False
    return plain


def _untie(model: Any) -> None:
    """Give the head weights of its own where an adapter sits on the input embedding alone: merged into tied weights,
    it would change the head, which it has not been trained for."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if not isinstance(embedding, BaseTunerLayer) or head is None or isinstance(head, BaseTunerLayer):
        return
    matrix: Any = embedding.get_base_layer()
    if head.weight is matrix.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False


def _merged(model: Any, prompts: list[list[int]], base: str) -> tuple[Any, float]:
    """(the base with the adapter added to its weights in float32, how far that moved the logits).

    Raises:
        UserError: PEFT cannot merge this adapter.
    """
    import torch

    _untie(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    beside = _logits(model, prompts)
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"export: PEFT cannot merge this adapter ({reason}); {_stays(base)}") from error
    return merged, _gap(_logits(merged, prompts), beside)


def _cast(model: Any, wanted: torch.dtype) -> None:
    """Round the weights. Buffers stay as they are: a rounded rotary frequency would be another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wanted)
    model.config.dtype = wanted


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few fixed texts, and of one chat where there is a template."""
    from alignment.models.sampling import prompt_ids

    found = [prompt_ids(tokenizer, text) for text in PROMPTS]
    if tokenizer.chat_template:
        found.append(prompt_ids(tokenizer, [{"role": "user", "content": PROMPTS[1]}]))
    return [ids for ids in found if ids]


def _logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits.float() for ids in prompts]


def _gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest logit; NaN (which passes no limit) where anything is not finite."""
    import torch

    scale = max(float(e.abs().max()) for e in expected)
    worst = torch.stack([(f - e).abs().max() for f, e in zip(found, expected, strict=True)]).max()
    return float(worst) / max(scale, 1e-12)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except ValueError as error:  # a generation config that transformers loads and does not save
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"export: transformers does not save this model: {reason}") from error


def model_card(source: Source, name: str, dtype: str) -> str:
    """README.md of the exported folder: that of the trained model, whose adapter is in the weights now."""
    from alignment import __version__

    run = source.folder.resolve().parent
    card = Card(
        name,
        source.manifest,
        adapter=adapter_of(source.folder),
        merged=source.is_adapter,
        scores=source.is_reward_model,
        measured=measured(run) if source.folder.name == "final" else (),
        dtype=dtype,
        place=name,
        origin=f"Written by `alignment export` (alignment {__version__}), which compared its logits with the trained "
        "model's. It needs transformers and nothing else.",
    )
    return card.text()
