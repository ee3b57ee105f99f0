"""README.md of a trained model: base, adapter, objective with its paper, data, settings, seeds, measurements.

One text for every folder that holds a model: run folders, `final/`, checkpoints, exports, uploads. It is made of a
run's manifest alone (of the trainer's settings where there is no run), says nothing that is not recorded, and shows
no folder and no secret of this machine. The front matter is what the Hugging Face hub reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import read_json_object, read_text, write_text
from alignment.models.public_names import (
    hub_base,
    is_hub_id,
    license_of,
    public,
    public_name,
    public_text,
    run_name,
    start_parts,
)

CARD = "README.md"
MARK = "<!-- written by alignment -->"  # a README.md with it is ours, and may be replaced
RESULTS = ("win_rate.json", "held_out.json")  # measurements of a run; `summary` is what a card quotes
SHOWN = ("objective", "sft", "reward_model", "iterate", "model", "reference", "lora", "data", "training", "generation")
SCRIPTS = {"sft": "scripts/sft.py", "reward_model": "scripts/train_reward_model.py", "iterate": "scripts/iterate.py"}
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


# --- the card ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        name: the title.
        manifest: of the run; where there is none, the same keys as far as they are known.
        adapter: PEFT's configuration of the adapter that the folder holds, or that was merged; None: full weights.
        merged: the adapter is in the weights.
        scores: outputs are scores: a reward model.
        measured: sentences of an evaluation of these weights.
        dtype: of the saved weights, where it is known.
        place: what `from_pretrained` takes.
        origin: what wrote the folder, where training did not.
        tags: further tags.
        datasets: names of data sets that the manifest does not have.
    """

    name: str
    manifest: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    merged: bool = False
    scores: bool = False
    measured: Sequence[str] = ()
    dtype: str | None = None
    place: str = "FOLDER"
    origin: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = field(default=())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe."""
        return self.manifest.get("recipe") or {}

    @property
    def model(self) -> Mapping[str, Any]:
        """The recipe's `model`; without one, the base that the adapter names."""
        named = (self.adapter or {}).get("base_model_name_or_path")
        return self.recipe.get("model") or ({"name_or_path": named} if named else {})

    @property
    def kind(self) -> str | None:
        """The section that says what was trained."""
        kinds = ("sft", "reward_model", "objective")
        return next((kind for kind in kinds if self.recipe.get(kind) is not None), None)

    def text(self) -> str:
        """The whole README.md."""
        import yaml

        head = yaml.safe_dump(self.head(), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{head}---\n\n{MARK}\n",
            f"# {self.name}\n",
            f"{self.what()}\n",
            *([f"{self.origin}\n"] if self.origin else []),
            _table(self.facts()),
            "## Evaluation\n",
            _list(public_text(line) for line in self.measured) or "Not evaluated.\n",
            *(["## Data\n", _list(self.data())] if self.data() else []),
            *(["## Training\n", _table(self.training())] if self.training() else []),
            self._use(),
            self._recipe(),
        ]
        return "\n".join(part for part in parts if part)

    def head(self) -> dict[str, Any]:
        """The front matter, in the hub's own keys."""
        adapted = self.adapter is not None and not self.merged
        base, used = hub_base(self.model.get("name_or_path")), self._hub_data()
        licence = license_of(self.model.get("name_or_path"))
        objective = self.recipe.get("objective") or {}
        first = str((self.manifest.get("method") or {}).get("paper", "")).partition(";")[0]
        tags = ["alignment", *(kind.replace("_", "-") for kind in ("sft", "reward_model") if self.kind == kind)]
        tags += [*([str(objective["name"])] if objective.get("name") else []), *self.tags]
        tags += [f"arxiv:{number}" for number in _ARXIV.findall(first)]
        return {
            **({"base_model": base, "base_model_relation": "adapter" if adapted else "finetune"} if base else {}),
            "library_name": "peft" if adapted else "transformers",
            "pipeline_tag": "text-classification" if self.scores else "text-generation",
            **({"datasets": used} if used else {}),
            **({"license": licence} if licence else {}),
            "tags": list(dict.fromkeys(tags)),
        }

    def _hub_data(self) -> list[str]:
        data = self.recipe.get("data") or {}
        named = [source.get("name") for role in ("train", "eval") for source in data.get(role) or ()]
        found = [name for name in (*named, *self.datasets) if isinstance(name, str) and is_hub_id(name)]
        return list(dict.fromkeys(found))

    def what(self) -> str:
        """One sentence: what the folder holds, of what, trained how."""
        parts = [public_name(part) for part in start_parts(self.model)]
        if self.adapter is not None:
            base = parts[0] if parts else "a base model"
            kind = str(self.adapter.get("peft_type") or "LoRA").replace("PeftType.", "").replace("LORA", "LoRA")
            article = "An" if kind[0] in "AEIO" else "A"
            what = (
                f"{article} {kind} adapter merged into {base}"
                if self.merged
                else f"{article} {kind} adapter of {base}"
            )
        else:
            what = "A reward model" if self.scores else "A full model"
        what += self._method()
        if parts and (self.adapter is None or len(parts) > 1):
            what += f"; training started from {' + '.join(parts)}"
        return f"{what}." + (f" {self.dtype} weights." if self.dtype else "")

    def _method(self) -> str:
        if self.kind == "objective":
            return f", trained with the objective `{self.recipe['objective'].get('name')}`"
        return {"sft": ", trained by supervised fine-tuning", "reward_model": ", trained as a reward model"}.get(
            self.kind or "", ""
        )

    def facts(self) -> list[tuple[str, str]]:
        """Base, adapter, objective and paper."""
        model, method = self.model, self.manifest.get("method") or {}
        parts = [public_name(part) for part in start_parts(model)]
        objective = dict(self.recipe.get("objective") or {})
        name, _ = objective.pop("name", None), objective.pop("file", None)
        found: list[tuple[str, str | None]] = [
            ("Base model", parts[0] if parts else "not recorded"),
            ("Revision", model.get("revision")),
            ("Adapter at the start", " + ".join(parts[1:])),
            *((f"SHA-256 of {name}", digest) for name, digest in (self.manifest.get("start_sha256") or {}).items()),
            *((f"SHA-256 of the {name} in memory", digest) for name, digest in self._frozen()),
            ("Quantisation in training", model.get("quantization")),
            ("Adapter", None if self.adapter is None else _adapter_words(self.adapter)),
            ("Objective", f"{name} ({_settings(objective)})" if name and objective else name),
            ("Method", method.get("title")),
            ("Paper", _linked(method["paper"]) if method.get("paper") else None),
            ("Paper", "none: supervised fine-tuning on the responses' tokens" if self.kind == "sft" else None),
            ("Judge of samples", self._judge()),
        ]
        return [(key, str(value)) for key, value in found if value]

    def _frozen(self) -> list[tuple[str, str]]:
        return list((self.manifest.get("frozen_weights") or {}).items())

    def _judge(self) -> str | None:
        """By name only: an endpoint's keys may be secret."""
        drawn = (self.recipe.get("data") or {}).get("train") is None and self.kind == "objective"
        named = [self.recipe[kind].get("name") for kind in ("reward", "oracle") if self.recipe.get(kind)]
        return ", ".join(map(str, named)) or None if drawn else None

    def data(self) -> list[str]:
        """A line for every source: rows used, and why others were not."""
        lines = []
        for source in self.manifest.get("sources") or ():
            lines.append(_rows_line(f"{public_name(str(source['source']))} ({source['set']})", source))
        if not lines:
            for role, counts in (self.manifest.get("rows") or {}).items():
                named = (self.recipe.get("data") or {}).get("prompts") or {}
                name = public_name(str(named["name"])) if isinstance(named, dict) and named.get("name") else None
                lines.append(_rows_line(f"{name} ({role})" if name else str(role), counts))
        return [*lines, *(f"data set {public_name(name)}" for name in self.datasets)]

    def training(self) -> list[tuple[str, str]]:
        """Settings that decide the result."""
        keys = (
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
            *("global_batch_size", "num_train_epochs", "max_steps", "seed", "data_seed"),
        )
        section, data = self.recipe.get("training") or {}, self.recipe.get("data") or {}
        hardware = self.manifest.get("hardware") or {}
        found = [
            ("steps", self.manifest.get("steps")),
            *((key, section.get(key)) for key in keys if section.get(key) is not None),
            ("max_length", data.get("max_length")),
            ("weights in training", self.model.get("dtype")),
            ("processes", hardware.get("processes")),
            ("sharding", self.manifest.get("sharding")),
            ("versions", _settings(self.manifest.get("versions") or {})),
        ]
        return [(key, public_text(str(value))) for key, value in found if value not in (None, "")]

    def _use(self) -> str:
        adapted = self.adapter is not None and not self.merged
        if adapted and self.scores:  # its base has no head of the right size until the adapter brings it
            return "## Use\n\n`alignment export` merges it into a folder that transformers alone can load.\n"
        if adapted:
            auto = "AutoPeftModelForCausalLM"
            lines: tuple[str, ...] = (f"from peft import {auto}", "from transformers import AutoTokenizer")
        else:
            auto = "AutoModelForSequenceClassification" if self.scores else "AutoModelForCausalLM"
            lines = (f"from transformers import {auto}, AutoTokenizer",)
        body = [*lines, "", f'model = {auto}.from_pretrained("{self.place}")']
        body.append(f'tokenizer = AutoTokenizer.from_pretrained("{self.place}")')
        return "## Use\n\n```python\n" + "\n".join(body) + "\n```\n"

    def _recipe(self) -> str:
        import yaml

        if not self.recipe or self.manifest.get("from_python"):
            return ""
        recipe = public({section: self.recipe[section] for section in SHOWN if self.recipe.get(section)})
        recipe.get("training", {}).pop("output_dir", None)
        for kind in ("reward", "oracle"):
            if self.recipe.get(kind):
                recipe[kind] = {"name": self.recipe[kind].get("name")}
        dumped = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        script = next((script for kind, script in SCRIPTS.items() if self.recipe.get(kind)), "scripts/train.py")
        processes = int((self.manifest.get("hardware") or {}).get("processes") or 1)
        launch = "accelerate launch" + (f" --num_processes {processes}" if processes > 1 else "")
        return (
            "## Recipe\n\nResolved; paths are shortened to their last part, and judges to their names.\n\n"
            f"```yaml\n{dumped}```\n\nCommand: `{launch} {script} recipe.yaml`\n"
        )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (tuple(" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows)
    return "".join(["| | |\n|---|---|\n", *(f"| {key} | {value} |\n" for key, value in cells)]) if rows else ""


def _list(lines: Any) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {public(value)}" for key, value in values.items() if value is not None)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _rows_line(name: str, counts: Mapping[str, Any]) -> str:
    """`pairs.jsonl (train): 90 of 100 rows used; rejected: 10 too_long`."""
    read, why = counts.get("read"), counts.get("rejected") or {}
    text = f"{name}: {counts.get('used')} " + (f"of {read} rows used" if read is not None else "rows")
    parts = [f"{count} {reason}" for reason, count in why.items()]
    text += f"; rejected: {', '.join(parts)}" if parts else "; none rejected" if read is not None else ""
    return text + (f"; {counts['left_out']} left out by the weights" if counts.get("left_out") else "")


def _adapter_words(adapter: Mapping[str, Any]) -> str:
    kind = str(adapter.get("peft_type") or "LoRA").replace("PeftType.", "").replace("LORA", "LoRA")
    names = ("r", "lora_alpha", "use_dora", "use_rslora", "num_virtual_tokens", "target_modules")
    named = {key: adapter.get(key) for key in names if adapter.get(key)}
    words = {"r": "rank", "lora_alpha": "alpha"}
    texts = [f"{words.get(k, k)} {', '.join(sorted(v)) if isinstance(v, set | list) else v}" for k, v in named.items()]
    return ", ".join([kind, *texts])


# --- folders -------------------------------------------------------------------------------------------------------


def is_outdated(run: Path, result: Path) -> bool:
    """Whether weights in `final` were saved after the result was written: a finished run was resumed."""
    saved = [file.stat().st_mtime for file in (run / "final").glob("*") if file.name != CARD]
    return bool(saved) and result.stat().st_mtime < max(saved)


def measured(run: Path) -> list[str]:
    """Sentences of a run's results, those of its present weights; a member's are in the folder of its ensemble."""
    places = [run, run.parent] if re.fullmatch(r"member-\d+", run.name) else [run]
    files = [place / name for place in places for name in RESULTS if (place / name).is_file()]
    return [
        str(line)
        for file in files
        if not is_outdated(run, file)
        for line in read_json_object(file).get("summary") or [f"See {file.name}."]
    ]


def adapter_of(folder: Path) -> dict[str, Any] | None:
    """PEFT's configuration of the adapter in a folder; None where there is none."""
    file = folder / "adapter_config.json"
    return read_json_object(file) if file.is_file() else None


def refresh(run: Path) -> list[Path]:
    """Write the cards of a finished run, and of its `final`, anew: after something was measured."""
    return [*write_card(run, run), *write_card(run / "final", run)]


def write_card(folder: Path, run: Path) -> list[Path]:
    """Write README.md of a run's folder or of its `final`; nothing where there is no manifest, or a card of a user.

    Args:
        folder: `run` or `run`/final, which for iterative training is that of the last iteration.
        run: whose results are quoted.
    """
    manifest = (folder if folder == run else folder.resolve().parent) / "manifest.json"
    if not manifest.is_file() or not folder.is_dir() or not may_write(folder):
        return []
    weights, content = run / "final", read_json_object(manifest)
    scores = (weights / "reward_model.json").is_file() or bool(list(run.glob("member-*/final/reward_model.json")))
    card = Card(run_name(manifest.parent), content, adapter_of(weights), scores=scores, measured=measured(run))
    write_text(folder / CARD, card.text())
    return [folder / CARD]


def may_write(folder: Path) -> bool:
    """Whether there is no card yet, or one of ours: what a user has written by hand stays."""
    file = folder / CARD
    try:
        return not file.is_file() or MARK in read_text(file)
    except UserError:
        return False
