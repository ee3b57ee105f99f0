"""The `data` section of a recipe: where rows, or prompts, come from, and what is refused of them.

Reading them is `alignment.data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alignment.errors import nearest
from alignment.recipes.schema import Names, Section, Text, option, refused_at


class SampleSection(Section):
    """Build preferences by sampling the starting model and letting the reward or oracle choose.

    How samples are drawn is in `generation`. A reward ranks a prompt's samples by score, an oracle by mean probability
    of winning against the prompt's other samples.
    """

    prompts: Text = Field(description="File of prompts: text, one a line (# begins a comment), or rows (.jsonl …).")
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
    *("reward_chosen", "reward_rejected", "preference_chosen", "preference_rejected", "log_odds_chosen"),
    *("log_odds_rejected", "prev_chosen", "prev_rejected", "margin"),
    *("conversations", "system", "tools", "instruction", "input", "output", "response1", "response2", "context"),
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
    format: Literal["auto", "preference", "hh", "sharegpt", "alpaca", "graded"] = option(
        "auto", "Form of the rows.", "told from the columns and first rows"
    )
    columns: dict[str, Names] | None = option(
        None, "Our column names to the source's; label may name several.", "the form's own names"
    )
    ignore: list[Text] = option(
        [], "Columns, and keys of messages, to leave out though they hold what no token would: [images].", "none"
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


class TextSection(Section):
    """What becomes of text that a chat template may drop or a tokenizer mistake for its own marks."""

    reasoning: Literal["keep", "remove"] | None = option(
        None, "Thoughts before an answer: keep, or remove them.", "rows that give them apart are refused"
    )
    control_tokens: Literal["refuse", "text", "keep"] = option(
        "refuse", "Rows whose text has special tokens: refuse, read them as text, or keep them as tokens.", "alignment"
    )


class PreferenceRows(TextSection):
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
