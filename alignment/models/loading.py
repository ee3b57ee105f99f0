"""From a model's name to a model: hub ids, folders, LoRA adapter folders, GGUF files, files inside Python packages.

Not a registry and not a cache of hub files (transformers has one). Errors that a user can mend are one line.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError
from alignment.files import PACKAGE_SCHEME, package_file, read_json_object
from alignment.models.ends import name_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def resolve_path(name_or_path: str | Path) -> str:
    """The local path that a name stands for, or the name itself where it is a hub id.

    `package://PKG/FILE` is a file that an installed Python package ships; a path ending in `.gguf` becomes the cached
    folder of its conversion.

    Raises:
        UserError: the package or file does not exist.
    """
    name = str(name_or_path)
    if name.startswith(PACKAGE_SCHEME):
        name = str(package_file(name))
    elif name.startswith("~"):
        name = str(Path(name).expanduser())
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"model.name_or_path: {str(name_or_path)!r}: no such file {name!r}")
        from alignment.models.gguf import converted_folder

        return str(converted_folder(Path(name)))
    return name


def settle_accelerator() -> None:
    """Where there is only a CPU, tell DeepSpeed so (transformers imports it on the way, and it would warn on stdout),
    and let it communicate through gloo: its own shared-memory kernel would be compiled at the first launch, for a
    minute, or stop the launch where there is no compiler. The numbers are the same. Call it before any `PartialState`.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.accelerator.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):  # as `accelerate launch` says it
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adapter_base(folder: str) -> str | None:
    """The base model's name where `folder` holds a LoRA adapter, else None."""
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        return None
    base = read_json_object(config).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{config}: does not name its base model (base_model_name_or_path)")
    return str(base)


def _from_pretrained(auto_class: Any, name_or_path: str | Path, path: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(path)`, with what goes wrong said in one line."""
    from safetensors import SafetensorError

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"model.name_or_path: {str(name_or_path)!r} is a folder without config.json: not a saved model"
        )
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.name_or_path: cannot load {str(name_or_path)!r}: neither a readable folder nor a model that the "
            f"hub gives ({reason})"
        ) from error


def load_tokenizer(
    name_or_path: str | Path,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    end_of_turn: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template, saved with a model; for an adapter folder without one, its base model's.

    `adapter` (a folder put on top of the model) counts first: what it was trained on may have had its own template.
    `end_of_turn` is the token that ends a reply where the template writes none (`models.ends`).

    Raises:
        UserError: there is no such model, it has no tokenizer, or `end_of_turn` is not what ends its turns.
    """
    from transformers import AutoTokenizer

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        name_or_path, revision = adapter, None
    path = resolve_path(name_or_path)
    base = adapter_base(path)
    if base is not None and not (Path(path) / "tokenizer_config.json").is_file():
        path = resolve_path(base)
    tokenizer = _from_pretrained(
        AutoTokenizer, name_or_path, path, revision=revision, trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, never from `token != pad`
    name_end(tokenizer, end_of_turn, path, revision=revision, trust_remote_code=trust_remote_code)
    return tokenizer


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    adapter: str | None = None,
    trainable_adapter: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: Any = None,
    num_labels: int | None = None,
    refuse_missing: str | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode.

    Args:
        name_or_path: hub id, folder (a full model, or a LoRA adapter whose base is then loaded too), `FILE.gguf`, or
            `package://PKG/FILE.gguf`.
        dtype: of the weights: float32, bfloat16 or float16.
        quantization: "nf4" keeps the linear layers' weights in 4 bits, doubly quantised, by bitsandbytes; they
            compute in `dtype`.
        attn_implementation: sdpa (transformers' default), eager, flash_attention_2 …
        adapter: folder of an existing LoRA adapter put on top.
        trainable_adapter: leave the adapter's weights trainable.
        revision: git revision on the hub.
        trust_remote_code: run Python code that the model's repository ships; off unless asked.
        kind: transformers' auto class instead of AutoModelForCausalLM (`reward_model.load_reward_model`).
        num_labels: of a classification head.
        refuse_missing: what to call the model where weights that are not in the file are an error.

    Raises:
        UserError: there is no such model, adapter, dtype or quantisation, or bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settle_accelerator()
    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve_path(name_or_path)
    base = adapter_base(path)
    if base is not None:
        if adapter is not None:
            raise UserError(
                f"model.adapter: {str(name_or_path)!r} is an adapter already; put its base in name_or_path"
            )
        path, adapter = resolve_path(base), path
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model, loaded = _from_pretrained(
        kind or AutoModelForCausalLM,
        name_or_path,
        path,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `_refuse_drawn` says which, in one line
        dtype=getattr(torch, dtype),
        quantization_config=_quantization(quantization, dtype),
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **labels,
    )
    _refuse_drawn(model, path, loaded, refuse_missing, new_head=num_labels is not None and refuse_missing is None)
    if quantization is not None:
        _compute_as_asked(model)
    if adapter is not None:
        model = with_adapter(model, adapter, trainable_adapter)
    return model.eval()


def _refuse_drawn(model: Any, path: str, loaded: dict[str, Any], reward: str | None, new_head: bool) -> None:
    """Refuse weights that transformers drew at random, because the file lacks them or has another shape.

    Tied weights are not among them. `new_head` allows what lies outside the backbone: a new reward head takes the
    place of the language model's. Weights that the model has no place for are a warning.
    """
    drawn = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    if new_head:
        drawn = {key for key in drawn if _in_backbone(model, key)}
    if drawn and reward is not None:
        raise UserError(
            f"{reward}: not a reward model: it has no {min(drawn)}, and scores from random weights mean nothing; "
            "train one with scripts/train_reward_model.py"
        )
    refuse_missing_weights(f"model.name_or_path: {path!r}", drawn)
    unexpected = {key for key in loaded["unexpected_keys"] if not new_head or _in_backbone(model, key)}
    if unexpected:
        warnings.warn(
            f"{path}: the model ignores {len(unexpected)} saved weights, first {min(unexpected)}", stacklevel=3
        )


def _in_backbone(model: Any, key: str) -> bool:
    return key.startswith(f"{model.base_model_prefix}.")


def refuse_missing_weights(what: str, keys: set[str]) -> None:
    """UserError if there are `keys`: weights that a file lacks, or has in another shape, would be drawn at random."""
    if keys:
        raise UserError(
            f"{what}: {len(keys)} weights are missing or have another shape, first {min(keys)}; save or download the "
            "model again"
        )


def _quantization(kind: str | None, dtype: str) -> Any:
    """bitsandbytes' settings: nf4 as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""
    if kind is None:
        return None
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if kind != "nf4":
        raise UserError(f"model.quantization: {kind!r} is not nf4")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: needs the Python package bitsandbytes: in the checkout, pip install -e '.[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _compute_as_asked(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes' layers repack their weights at the first pass without gradients, and
    compute in bfloat16 from then on whatever the compute dtype: policy and reference would not be the same model."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(model: PreTrainedModel, adapter: str, trainable: bool = False) -> Any:
    """The model under a saved adapter, all weights of which are there.

    Raises:
        UserError: it is no adapter, or not one of this model, or lacks weights (peft only warns).
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    if adapter_base(adapter) is None:
        raise UserError(f"model.adapter: {adapter!r} is not a folder with adapter_config.json")
    try:
        saved = load_peft_weights(adapter, device="cpu")
        wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except KeyError as error:  # of a module that the adapter saves whole; peft warns of others
        refuse_missing_weights(f"model.adapter: {adapter!r}", {str(error.args[0])})
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes of another base
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.adapter: cannot load {adapter!r} on this model ({reason})") from error
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    refuse_missing_weights(f"model.adapter: {adapter!r}", set(expected) - set(saved))
    return wrapped


def fingerprint(model: Any) -> str:
    """The first 12 digits of SHA-256 over a model's weights, names and dtypes (not sharded)."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
