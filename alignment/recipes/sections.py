"""The sections of a recipe as pydantic models: what each key means, its type, range and default's source.

Strict at every depth: no unknown keys, no text for numbers, no booleans for integers (an integer does for a number).
`training` is in `alignment.recipes.training`; the keys of `objective`, `reward` and `oracle` beyond `name` come from
the registries, which are imported only when such a section is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignment.errors import nearest


def option(default: Any, meaning: str, source: str, **constraints: Any) -> Any:
    """A key with a default; the description says what the key means and where the default is from."""
    return Field(default, description=f"{meaning} Default: {source}.", **constraints)


def error(message: str, *loc: str, value: Any = None) -> InitErrorDetails:
    """One problem at `loc` in words of our own, for `ValidationError.from_exception_data`."""
    kind = PydanticCustomError("recipe", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=loc, input=value)


def refused_at(message: str, *loc: str) -> ValidationError:
    """The exception for a rule that ties several keys together, placed at the key that breaks it."""
    return ValidationError.from_exception_data("recipe", [error(message, *loc)])


def _names(value: Any) -> Any:
    """One name, or a list of names; said in one message instead of one per member of the union."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f"expected a name or a list of names, got {value!r}")


Names = Annotated[str | list[str], BeforeValidator(_names)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section whose keys are all listed here; `refused` has reasons for keys that people expect in vain."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[dict[str, str]] = {}


class OpenSection(BaseModel):
    """A section some of whose keys are known elsewhere (a registry, TRL): `open_key_errors` checks those."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """Defaults for open keys that are absent, and what is wrong with those that are present."""
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _check_open_keys(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, dict):
            return handler(data)
        defaults, problems = cls.open_keys(data)
        try:
            section = handler({**defaults, **data})
        except ValidationError as failed:
            kept = failed.errors(include_url=False)
            problems += [
                InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {})) for e in kept
            ]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return section


class ModelSection(Section):
    """The language model that training starts from; it is also the reference, unless `reference` names another."""

    name_or_path: Text = Field(
        description="Hub id, folder, FILE.gguf, or package://PACKAGE/FILE.gguf (a file in an installed package)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Type of the weights in memory.", "alignment: exact everywhere; bfloat16 halves memory"
    )
    attn_implementation: Text | None = option(
        None, "transformers' attention, such as sdpa or eager.", "transformers' own choice for the model"
    )
    quantization: Literal["nf4"] | None = option(
        None,
        "Keep the frozen weights in 4 bits (bitsandbytes) and train adapters: QLoRA.",
        "none; nf4 with double quantisation is QLoRA's (2305.14314)",
    )
    adapter: Text | None = option(None, "Folder of a LoRA adapter to start from.", "none")
    revision: Text | None = option(None, "Branch, tag or commit of a hub model.", "the hub's main branch")
    trust_remote_code: bool = option(False, "Run Python code that the hub model ships.", "transformers: off")


class ReferenceSection(Section):
    """The frozen model that the policy is compared with, and whether its log-probabilities are kept on disk.

    By default it is the model that training starts from. With another one, an objective that reads the previous
    iterate (inpo) takes the model that training starts from for that. It has the dtype and quantisation of `model`.
    """

    name_or_path: Text | None = option(
        None, "Another model, named as model.name_or_path.", "the model that training starts from"
    )
    adapter: Text | None = option(None, "Folder of a LoRA adapter on top of name_or_path.", "none")
    revision: Text | None = option(None, "Branch, tag or commit of a hub model.", "the hub's main branch")
    precompute: bool = option(
        False,
        "Score all pairs under the frozen models once, before training, and keep the numbers in the cache: no frozen "
        "model in memory, and one forward pass less per step.",
        "off; it pays from the second epoch or run on, or where memory is short",
    )

    @model_validator(mode="after")
    def _of_a_model(self) -> ReferenceSection:
        for key in ("adapter", "revision"):
            if getattr(self, key) is not None and self.name_or_path is None:
                raise refused_at("belongs to reference.name_or_path, which is not given", key)
        return self


class LoraSection(Section):
    """Train low-rank adapters instead of all weights; the reference is the model without them.

    There is no dropout: policy and reference must agree at step 0 (TRL, too, sets every dropout of the policy to 0).
    """

    refused: ClassVar[dict[str, str]] = {
        "dropout": "dropout is off in training: policy and reference must agree at step 0"
    }

    r: int = option(16, "Rank.", "PEFT users' common choice; alignment-handbook's QLoRA recipes use 16", ge=1)
    alpha: int = option(32, "Scale: the update counts alpha / r.", "twice the rank", ge=1)
    target_modules: Names = option(
        "all-linear",
        "Module names, one pattern for their full names, or all-linear.",
        "QLoRA (2305.14314): adapters on every linear layer",
    )

    @field_validator("target_modules")
    @classmethod
    def _modules(cls, value: str | list[str]) -> str | list[str]:
        """PEFT takes a string for a pattern of the whole dotted name: a plain name becomes a list of one."""
        if isinstance(value, str) and value != "all-linear" and re.fullmatch(r"[\w-]+", value):
            value = [value]
        try:
            on_head = (
                re.fullmatch(value, "lm_head") is not None
                if isinstance(value, str)
                else any(name.rpartition(".")[2] == "lm_head" for name in value)
            )
        except re.error as failed:
            raise ValueError(f"{value!r} is not a valid expression: {failed}") from None
        if on_head:
            raise ValueError(
                "lm_head cannot have an adapter: TRL takes log-probabilities from the head's own weight and refuses "
                "one there; name other modules"
            )
        return value


class SampleSection(Section):
    """Build preferences by sampling the starting model and letting the reward or oracle choose.

    How samples are drawn is in `generation`. A reward ranks a prompt's samples by score, an oracle by mean probability
    of winning against the prompt's other samples.
    """

    prompts: Text = Field(description="Text file, one prompt a line; lines that begin with # are skipped.")
    limit: int | None = option(None, "Use only the first so many prompts.", "all", ge=1)
    samples_per_prompt: int = option(4, "Responses drawn per prompt.", "alignment: cost against contrast", ge=2)
    pairs_per_prompt: int = option(1, "Pairs kept per prompt, best with worst first.", "best against worst", ge=1)
    min_gap: float = option(
        0.0, "Drop pairs whose gap is at most this: of rewards, or of win probabilities.", "drop ties only", ge=0
    )
    label_noise: float = option(
        0.0, "Flip chosen and rejected with this probability, seeded by generation.seed.", "none", ge=0, le=1
    )

    @model_validator(mode="after")
    def _enough_samples(self) -> SampleSection:
        if 2 * self.pairs_per_prompt > self.samples_per_prompt:
            needed = 2 * self.pairs_per_prompt
            raise refused_at(
                f"{self.pairs_per_prompt} pairs need samples_per_prompt of at least {needed}, "
                f"got {self.samples_per_prompt}",
                "pairs_per_prompt",
            )
        return self


DATA_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")
# What `columns` of a source may rename: the columns of all forms (`alignment.data.forms`).
SOURCE_COLUMNS = (
    *("prompt", "chosen", "rejected", "calibration", "label"),
    *("reward_chosen", "reward_rejected", "prev_chosen", "prev_rejected", "margin"),
    *("conversations", "system", "instruction", "input", "output", "response1", "response2"),
    *(SFT_COLUMNS := ("completion", "messages", "text")),
)


class SourceSection(Section):
    """One source of preferences; `data.train: pairs.jsonl` is short for `data.train: {name: pairs.jsonl}`."""

    name: Text = Field(
        description="File (.json, .jsonl, both also .gz; .parquet, .csv), folder with one file per split, or hub name."
    )
    split: Text | None = option(
        None, "Named split; slices as in datasets: train[:10%].", "train, for data.eval test; all rows of a plain file"
    )
    subset: Text | None = option(None, "Configuration of a hub data set.", "the hub's default one")
    data_dir: Text | None = option(None, "Folder in a hub data set, such as harmless-base.", "its root")
    weight: float | None = option(
        None, "Share of this source in the mixture; for all sources or none.", "all rows of every source", gt=0
    )
    limit: int | None = option(None, "Read only the first so many rows.", "all", ge=1)
    format: Literal["auto", "preference", "hh", "sharegpt", "alpaca"] = option(
        "auto", "Form of the rows.", "told from the columns and first rows"
    )
    columns: dict[str, Names] | None = option(
        None, "Our column names to the source's; label may name several.", "the form's own names"
    )
    ties: Literal["drop", "soft"] = option("drop", "Undecided pairs: drop, or keep with label 0.5.", "alignment")
    zero: Literal["tie", "first", "second"] | None = option(
        None, "What a label 0 says of two responses.", "tie where a label 2 is the second; else you are asked"
    )
    chat: bool | None = option(
        None,
        "Read the rows as chat messages (true) or text (false).",
        "text stays text; hh and alpaca become chat where the tokenizer has a chat template",
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str | list[str]] | None) -> dict[str, str | list[str]] | None:
        for ours, theirs in (value or {}).items():
            if ours not in SOURCE_COLUMNS:
                raise ValueError(f"{ours!r} is not one of our columns{nearest(ours, SOURCE_COLUMNS)}")
            if ours != "label" and not isinstance(theirs, str):
                raise ValueError(f"{ours!r} takes one column; only label may name several")
        return value

    @model_validator(mode="after")
    def _hub_keys(self) -> SourceSection:
        for key in ("subset", "data_dir"):
            if getattr(self, key) is not None and self.is_local:
                raise refused_at(f"belongs to a hub data set, and {self.name} is local", key)
        return self

    @property
    def is_local(self) -> bool:
        """A file or folder rather than a hub name: it is there, or its ending or beginning says so."""
        return self.name.endswith((*DATA_ENDINGS, "/")) or self.name.startswith((".", "/", "~")) or self.path.exists()

    @property
    def path(self) -> Path:
        """Where a local source lies."""
        return Path(self.name).expanduser()


def _sources(value: Any) -> Any:
    """A text, one mapping, or a list of either, as a list of mappings."""
    if not isinstance(value, str | dict | list):
        return value
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("no source: give a file, a hub name, or a list of them")
    return [_named_split(item) if isinstance(item, str) else item for item in items]


def _named_split(text: str) -> dict[str, str]:
    """`NAME` or `NAME:SPLIT`; the colon of a URL is not one of ours."""
    name, colon, split = text.partition(":")
    return {"name": text} if not colon or split.startswith("//") else {"name": name, "split": split}


Sources = Annotated[list[SourceSection], BeforeValidator(_sources)]


class PreferenceRows(Section):
    """Preferences that are given, and what is refused of them."""

    train: Sources | None = option(
        None, "Preferences: FILE, hub NAME or NAME:SPLIT, a mapping (see SourceSection), or a list of these.", "none"
    )
    eval: Sources | None = option(None, "Held-out preferences, like train.", "none")
    max_length: int = option(1024, "Prompt and response together, in tokens; longer is cut.", "TRL 1.16", ge=2)
    max_rejected_share: float = option(
        0.1,
        "Stop if more than this share of the rows is unusable.",
        "alignment: a tenth is rarely an accident",
        ge=0,
        le=1,
    )
    overlap: Literal["refuse", "drop", "allow"] = option(
        "refuse",
        "Prompts both trained and judged on (data.eval, evaluation): stop, drop the training rows, or allow.",
        "alignment",
    )

    @field_validator("train", "eval")
    @classmethod
    def _all_weights_or_none(cls, value: list[SourceSection] | None) -> list[SourceSection] | None:
        if len({source.weight is None for source in value or []}) > 1:
            raise ValueError("give every source a weight, or none")
        return value

    @field_validator("train", "eval")
    @classmethod
    def _of_preferences(cls, value: list[SourceSection] | None) -> list[SourceSection] | None:
        for column in (column for source in value or [] for column in source.columns or {}):
            if column in SFT_COLUMNS:
                raise ValueError(f"columns.{column} is for supervised fine-tuning (scripts/sft.py)")
        return value


class HubPromptsSection(Section):
    """A column of a hub data set, or of a data file or folder of `data.train`'s kinds, as prompts."""

    hub: Text = Field(description="Hub name; also FILE.parquet, FILE.csv or a folder.")
    split: Text | None = option(None, "Named split; slices as in datasets: train[:10%].", "train")
    subset: Text | None = option(None, "Configuration of a hub data set.", "the hub's default one")
    prompt: Text = option("prompt", "Column of the prompts, texts or messages.", "our name for it")
    answer: Text = option("answer", "(likelihood) Column of the reference answers.", "our name for it")
    chat: bool = option(False, "Make each text the user's message of a chat.", "text stays text")
    system: Text | None = option(None, "System message before each prompt, which makes it a chat.", "none")

    def __str__(self) -> str:
        return f"{self.hub}:{self.split or 'train'}"


def _file_or_hub(value: Any) -> Any:
    """A hub's section by itself, so that its mistakes stand at its keys and not at a union's."""
    if not isinstance(value, str | dict | HubPromptsSection):
        raise ValueError(f"expected a file, or a section with hub: NAME, got {value!r}")
    return HubPromptsSection.model_validate(value) if isinstance(value, dict) else value


class PromptsSection(Section):
    """Prompts of on-policy training; `data.prompts: FILE` is short for `data.prompts: {name: FILE}`."""

    name: Annotated[Text | HubPromptsSection, BeforeValidator(_file_or_hub)] = Field(
        description="Text file, one prompt a line; .jsonl with `prompt` (text or messages) and, for objective "
        "likelihood, `answer`; or {hub: NAME, split: …, prompt: COLUMN} of a hub data set."
    )
    limit: int | None = option(None, "Use only the first so many prompts.", "all", ge=1)


Prompts = Annotated[PromptsSection, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]


class DataSection(PreferenceRows):
    """Where preferences come from: `train` (given), `sample` (drawn from the starting model), or `prompts` (the policy
    itself answers them while it is trained)."""

    sample: SampleSection | None = option(None, "Draw the preferences from the starting model.", "none")
    prompts: Prompts | None = option(None, "Prompts that the policy answers while it is trained (on-policy).", "none")

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        given = [key for key in ("train", "sample", "prompts") if getattr(self, key) is not None]
        if not given:
            raise refused_at(
                "nothing to train on: give train (preferences: a file or hub name), sample (draw them from the "
                "starting model) or prompts (on-policy)"
            )
        if len(given) > 1:
            raise refused_at(f"excludes data.{given[1]}; set the one that you do not want to null", given[0])
        if self.prompts is not None and self.eval is not None:
            raise refused_at("on-policy training has no held-out preferences; see the evaluation section", "eval")
        return self


class GenerationSection(Section):
    """How responses are drawn, for `data.sample` and for `evaluation`."""

    max_new_tokens: int = option(24, "Longest response in tokens.", "alignment: sized for the CPU quick start", ge=1)
    temperature: float = option(1.0, "Below 1 sharpens, above 1 flattens.", "the model's own distribution", gt=0)
    top_p: float = option(1.0, "Nucleus of this probability.", "off: the model's own distribution", gt=0, le=1)
    top_k: int = option(0, "Only the k likeliest tokens.", "0: off, the model's own distribution", ge=0)
    batch_size: int = option(64, "Responses drawn at once; lower it if memory runs out.", "alignment", ge=1)
    seed: int = option(0, "Seed of the draws (on-policy training draws by training.seed).", "alignment", ge=0)
    replay: Text | None = option(
        None, "rollouts.jsonl of an earlier on-policy run: train on its samples instead of drawing.", "none"
    )

    @property
    def drawing(self) -> dict[str, Any]:
        """Arguments of `models.sampling.sample`."""
        return self.model_dump(exclude={"replay"})


class ExploreSection(Section):
    """The sampler of y and y' where it is not the policy itself."""

    temperature: float = option(2.0, "Above 1 flattens.", "EGPO's released code", gt=0)
    top_k: int = option(10, "Only the k likeliest tokens; 0: all.", "EGPO's released code", ge=0)
    top_p: float = option(1.0, "Nucleus of this probability.", "off", gt=0, le=1)


class AnswerSection(Section):
    """Where a chain of thought ends and the reference answer begins (objective likelihood)."""

    marker: Text = option("Answer:", "Text that ends a chain; the first one counts.", "alignment")
    separator: str = option(" ", "What stands between marker and answer.", "alignment")


class RolloutSection(Section):
    """How on-policy training samples; lengths and temperature are in `generation`."""

    prompts_per_rollout: int | None = option(
        None, "Prompts sampled at once; a multiple of training.global_batch_size.", "training.global_batch_size", ge=1
    )
    inner_epochs: int = option(1, "Passes over a rollout before the next one is drawn.", "strictly on-policy", ge=1)
    samples: int | None = option(
        None, "Responses per prompt.", "2; objective likelihood: 4, the paper's for long answers", ge=1
    )
    explore: ExploreSection | None = option(
        None, "(egpo, online_ipo1, nash_md) Another sampler for y and y'.", "the policy itself"
    )
    mixture: float = option(
        0.125, "(nash_md, nash_md_pg) Share of the reference in the opponent.", "EGPO's released code", ge=0, le=1
    )
    label_noise: float = option(0.0, "(dpo, vpo …) Turn a label round with this probability.", "none", ge=0, le=1)
    drift: float = option(
        20.0,
        "(vpo online) Stop once calibration responses are so many nats less likely than under the reference.",
        "alignment",
        gt=0,
    )
    answer: AnswerSection = Field(
        default_factory=AnswerSection, description="(likelihood) Marker and separator. Default: see its keys."
    )
    show: int = option(0, "Print so many responses with their judgements at each log line.", "none", ge=0)
    vllm: Literal["colocate", "server"] | None = option(
        None, "Draw with vLLM, as TRL does; not run by this project's tests.", "transformers' generate"
    )
    vllm_server: Text | None = option(None, "Base URL of `trl vllm-serve` or `vllm serve`.", "none")

    @model_validator(mode="after")
    def _server(self) -> RolloutSection:
        if (self.vllm_server is not None) != (self.vllm == "server"):
            raise refused_at("belongs to rollout.vllm: server, which needs it", "vllm_server")
        return self


class EvaluationSection(Section):
    """Win rate of the trained model against its starting point, judged by `reward` or `oracle`."""

    prompts: Text = Field(
        description="Text file of prompts that training does not see; format as data.sample.prompts."
    )
    limit: int | None = option(None, "Use only the first so many prompts.", "all", ge=1)
    samples_per_prompt: int = option(2, "Responses per prompt and model.", "alignment", ge=1)
    bootstrap: int = option(10000, "Resamplings of prompts for the interval.", "alignment", ge=100)
    seed: int = option(
        1,
        "Seed of the responses (the baseline's use it + 1,000,000) and the bootstrap.",
        "alignment: not generation.seed",
        ge=0,
    )


class RewardSection(OpenSection):
    """What scores responses: `name` and that reward's own keys (`.options`)."""

    name: Text = Field(description="A reward of docs/rewards.md, such as vader, length or regex.")

    @property
    def options(self) -> dict[str, Any]:
        """The reward's own keys, for `alignment.rewards.get_reward(name, **options)`."""
        return dict(self.model_extra or {})

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        from alignment.recipes.registries import judge_errors

        return {}, judge_errors("reward", data)


class OracleSection(OpenSection):
    """What compares two responses: `name` and that oracle's own keys (`.options`)."""

    name: Text = Field(description="An oracle of docs/rewards.md, such as bradley_terry or llm_judge.")

    @property
    def options(self) -> dict[str, Any]:
        """The oracle's own keys, for `alignment.rewards.get_oracle(name, **options)`."""
        return dict(self.model_extra or {})

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        from alignment.recipes.registries import judge_errors

        return {}, judge_errors("oracle", data)


class ObjectiveSection(OpenSection):
    """The loss: `name` and that objective's hyper-parameters (`.hyperparameters`, defaults filled in)."""

    fixed: ClassVar[tuple[str, ...]] = ("name", "file")

    name: Text = Field(description="An objective of `alignment objectives`, or of `file`.")
    file: Text | None = option(
        None, "Python file that registers the objective, relative to the recipe.", "none: a built-in objective"
    )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's hyper-parameters, for `alignment.objectives.get_objective(name, **hyperparameters)`."""
        return dict(self.model_extra or {})

    @classmethod
    def open_keys(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        from alignment.recipes.registries import objective_defaults_and_errors

        return objective_defaults_and_errors(data)
