"""The sections of a recipe as pydantic models: what each key means, its type, range and default's source.

Strict at every depth: no unknown keys, no text for numbers, no booleans for integers (an integer does for a number).
`data` is in `alignment.recipes.rows`, `training` in `alignment.recipes.training`; the keys of `objective`, `reward`
and `oracle` beyond `name` come from the registries, which are imported only when such a section is checked.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import InitErrorDetails

from alignment.recipes.schema import Names, OpenSection, Section, Text, option, refused_at


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
    end_of_turn: Text | None = option(
        None,
        "Token that ends a reply where the chat template writes none, such as GLM's <|user|>: it is trained, and "
        "sampling stops at it.",
        "what the chat template writes; else the next turn's token where the model's generation config stops there",
    )

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `models.load_model`."""
        return self.model_dump(exclude={"end_of_turn"})

    @property
    def tokenizing(self) -> dict[str, Any]:
        """Arguments of `models.load_tokenizer` besides the name."""
        return self.model_dump(include={"adapter", "revision", "trust_remote_code", "end_of_turn"})


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


class GenerationSection(Section):
    """How responses are drawn, for `data.sample` and for `evaluation`."""

    max_new_tokens: int = option(
        1024,
        "Longest response in tokens; longer ones are cut.",
        "between FastChat's MT-Bench (512, later 1024) and AlpacaEval's configurations (2048)",
        ge=1,
    )
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

    prompts: Text = Field(description="File of prompts that training does not see; format as data.sample.prompts.")
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
