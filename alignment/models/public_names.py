"""Names of models, data and runs as strangers may read them, and the start behind a name. No card (`card`)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.files import PACKAGE_SCHEME, file_digest, package_file, read_json_object, read_text

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
FILES = (".gguf", ".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz")  # endings that no hub name has
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[a-z]-|AKIA)[\w-]{8,}")
_LOGIN = re.compile(r"://[^/\s@]+@")
_FOLDERS = re.compile(r"(?<![\w:/.)\]])(?:~[\w.-]*|[A-Za-z]:)?/(?:[^\s'\",;:()/]+/)+(?=[^\s'\",;:()/])")


def is_hub_id(name: str) -> bool:
    """Whether a model's or data set's name is one that the hub would know; a folder that is here is none."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(FILES) and not Path(name).exists()


def public_name(name: str) -> str:
    """A name without this machine's folders: hub ids and package:// stay, a path keeps its last part.

    The `final` of a run is called by the run's name.
    """
    if name.startswith(PACKAGE_SCHEME) or not (name.startswith((".", "~", os.sep)) or Path(name).exists()):
        return public_text(name)
    path = Path(name).expanduser()
    if path.name == "final" and (path.parent / "manifest.json").is_file():
        return f"{run_name(path.parent)} (final)"
    return public_text(path.resolve().name or path.name)


def run_name(run: Path) -> str:
    """What a card calls a run: its folder; of iterative training, which iteration of which run."""
    parts = run.resolve().parts
    if run.name == "train":  # RUN/iteration-2/train, and while it is trained RUN/iteration-2/unfinished/train
        for back in (2, 3):
            if len(parts) > back and re.fullmatch(r"iteration-\d+", parts[-back]):
                return f"{parts[-back - 1]}, {parts[-back].replace('-', ' ')}"
    return parts[-1]


def public_text(text: str) -> str:
    """A sentence whose absolute paths keep their last part; secrets and the users of URLs are hidden."""
    text = _LOGIN.sub("://", _SECRET.sub("[hidden]", text))
    return _FOLDERS.sub("", text)


def public(value: Any) -> Any:
    """A recipe's value without keys that are null, and with every path reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def start_parts(model: Mapping[str, Any]) -> list[str]:
    """Base and adapters that training started from, as a recipe's `model` and the adapters' folders name them."""
    parts = [str(model[key]) for key in ("name_or_path", "adapter") if model.get(key)]
    while parts and len(parts) < 20 and (below := _adapters_base(parts[0])):
        parts.insert(0, below)
    return parts


def _adapters_base(name: str) -> str | None:
    file = Path(name).expanduser() / "adapter_config.json"
    return read_json_object(file).get("base_model_name_or_path") if file.is_file() else None


def hub_base(name: str | None) -> str | None:
    """The hub model at the bottom of a start, through the runs and adapters that it names; None if unknown."""
    for _ in range(20):  # runs that start from runs
        if not name or is_hub_id(name):
            return name or None
        folder = Path(name).expanduser()
        manifest = folder.resolve().parent / "manifest.json"
        if folder.name == "final" and manifest.is_file():
            name = ((read_json_object(manifest).get("recipe") or {}).get("model") or {}).get("name_or_path")
        else:
            name = _adapters_base(name)
    return None


def digest_of_start(model: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the weight files of a local start, by what is shown of its name; empty for hub models."""
    found = {}
    for name in start_parts(model):
        path = package_file(name) if name.startswith(PACKAGE_SCHEME) else Path(name).expanduser()
        files = [path] if path.is_file() else sorted(file for kind in WEIGHTS for file in path.glob(kind))
        if len(files) == 1:
            found[public_name(name)] = file_digest(files[0])
        elif files:
            text = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
            found[public_name(name)] = hashlib.sha256(text.encode()).hexdigest()
    return found


def license_of(name: str | None) -> str | None:
    """The licence that a local start's own card names."""
    file = None if not name else Path(name).expanduser() / "README.md"
    if file is None or not file.is_file():
        return None
    import yaml

    head = re.match(r"---\n(.*?)\n---", read_text(file), flags=re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) else None
