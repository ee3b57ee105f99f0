"""A comparison of two models, planned and carried out: which models, prompts, judge and sampling; then the samples.

Not the command line (`evaluation.win_rate`) and not the statistics. Planning checks everything that can be checked
without loading a model, so that a mistake costs a second and not a training run's worth of sampling.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.data.overlap import trained_among
from alignment.data.prompt_files import refuse_unrendered
from alignment.errors import UserError
from alignment.files import read_json_object
from alignment.models.public_names import start_parts
from alignment.models.sampling import Generation
from alignment.rewards import PreferenceOracle, RewardFunction, get_oracle, get_reward
from alignment.rewards.oracles import RewardOracle, as_reward_section
from evaluation.comparison import Comparison, Side, compare
from evaluation.files import Prompt, locate_prompts, refuse_training_prompts, shorten
from evaluation.policies import stamps_of_files

RESAMPLES = 10_000
BATCHES_PER_SHARD = 4  # what a kill loses, and what processes share
SAMPLES = "win_rate_samples"  # folder of the pools in a run's or an output folder
BASELINE_SEED_OFFSET = 1_000_000  # the two sides must not share random numbers: their samples are independent draws


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what reports call it.
        load: arguments of `alignment.models.load_model`.
        seed_offset: added to the plan's seed to give the seed of this model's samples.
        end_of_turn: `model.end_of_turn` of a recipe; a run's own model has it in its tokenizer.
    """

    name: str
    load: dict[str, Any]
    seed_offset: int = 0
    end_of_turn: str | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison of two models, checked and complete; nothing has been loaded.

    Attributes:
        model: the model whose win rate is reported.
        baseline: what it is compared with.
        prompts: prompts that both answer.
        judge: the reward that decides every pair of samples; either this or `oracle`.
        generation: how samples are drawn.
        samples_per_prompt: of each model.
        resamples: bootstrap resamples over prompts.
        seed: of the bootstrap and, with each model's offset, of its samples.
        chat: a prompt of text is what the user says in the models' chat template; else it is a text to continue.
        notes: further fields of win_rate.json.
        oracle: says how probably one sample is preferred to another.
        samples: folder for the pools of both models' samples, which a comparison that was killed goes on from and a
            second judge reads; None: they are not kept.
        vllm: vLLM draws the samples, where it is installed.
    """

    model: ModelSource
    baseline: ModelSource
    prompts: list[Prompt]
    judge: RewardFunction | None
    generation: Generation = Generation()
    samples_per_prompt: int = 2
    resamples: int = RESAMPLES
    seed: int = 1
    chat: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    oracle: PreferenceOracle | None = None
    samples: Path | None = None
    vllm: bool = False

    @property
    def chats(self) -> bool:
        """Whether a prompt goes through the chat template."""
        return self.chat or any(prompt.messages for prompt in self.prompts)


def say(text: str) -> None:
    """Progress goes to standard error, so that standard output holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def load_source_tokenizer(source: ModelSource, plan: Plan) -> Any:
    """The tokenizer of a model, with whose chat template the plan's chat prompts are whole."""
    tokenizer = load_tokenizer_of(source, plan.chat)
    refuse_unrendered([(prompt.given(plan.chat), prompt.where) for prompt in plan.prompts], tokenizer)
    return tokenizer


def load_tokenizer_of(source: ModelSource, chat: bool) -> Any:
    """The tokenizer of a model; with `chat` it must have a chat template."""
    from alignment.models import load_tokenizer

    keys = {key: value for key, value in source.load.items() if key in ("revision", "trust_remote_code")}
    tokenizer = load_tokenizer(source.load["name_or_path"], end_of_turn=source.end_of_turn, **keys)
    if chat and not tokenizer.chat_template:
        raise UserError(f"{source.name}: its tokenizer has no chat template; use --no-chat for prompts as plain text")
    return tokenizer


def given_prompts(plan: Plan) -> list[Any]:
    """The prompts as the models get them: texts, or with `chat` messages."""
    return [prompt.given(plan.chat) for prompt in plan.prompts]


def sample_side(source: ModelSource, plan: Plan) -> Side:
    """A model's samples: drawn into a pool, by all processes of a launch, or read back where they are there already.

    A seed means the same wherever the pool is, also in a folder that is thrown away. A greedy response is drawn once
    and stands for all samples.

    Raises:
        UserError: as of `alignment.models.pools.sample_pool`; or several processes without a folder to share.
    """
    if plan.samples is not None:
        return _pool_side(source, plan, plan.samples)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--samples-dir missing: several processes need a folder to share their samples in")
    with tempfile.TemporaryDirectory(prefix="win-rate-") as folder:
        return _pool_side(source, plan, Path(folder))


def _pool_side(source: ModelSource, plan: Plan, root: Path) -> Side:
    from alignment.models.backends import VllmBackend
    from alignment.models.chat import pin_date, pinned_date
    from alignment.models.pools import sample_pool

    tokenizer = load_source_tokenizer(source, plan)
    if plan.chats:  # a run's model has its run's date, and is compared on the same prompts
        both = (load_tokenizer_of(one, plan.chat) for one in (plan.model, plan.baseline))
        pin_date(tokenizer, next(filter(None, map(pinned_date, both)), None))
    n = 1 if plan.generation.greedy else plan.samples_per_prompt
    pool = sample_pool(
        source.load,
        tokenizer,
        given_prompts(plan),
        pool_folder(root, source, plan),
        n,
        generation=plan.generation,
        seed=plan.seed + source.seed_offset,
        name=source.name,
        prompts_per_shard=max(1, BATCHES_PER_SHARD * plan.generation.batch_size // n),
        backend=VllmBackend(source.load, tokenizer) if plan.vllm else None,
        progress=f"sampling {source.name}",
    )
    rows = [row for shard in range(len(pool.shards)) for row in pool.rows(shard)]
    times = plan.samples_per_prompt // n
    return Side(source.name, [row["responses"] * times for row in rows], [row["finished"] * times for row in rows])


def pool_folder(root: Path, source: ModelSource, plan: Plan) -> Path:
    """Where a model's samples are in `root`: a folder of their own for every setting that decides them.

    Files of a local model count with size and time, so that one that was trained on is sampled anew. (The pool itself
    has the weights' SHA-256, and refuses others.)
    """
    from alignment.files import json_digest

    deciding = {
        "load": source.load,
        "seed": plan.seed + source.seed_offset,
        "n": plan.samples_per_prompt,
        "generation": asdict(plan.generation),
        "prompts": given_prompts(plan),
        "vllm": plan.vllm,
        "end_of_turn": source.end_of_turn,  # (other ends than this key's are in the files)
        "files": stamps_of_files(source.load),
    }
    return root / f"{Path(source.load['name_or_path']).name}-{json_digest(deciding)[:12]}"


def leave_to_main() -> None:
    """Under `accelerate launch` the other processes end here, after their share of the samples: one judges."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from alignment.processes import connect

        state = connect()
        state.wait_for_everyone()
        state.destroy_process_group()
        if not state.is_main_process:
            raise SystemExit(0)


def run_plan(plan: Plan) -> Comparison:
    """Sample both models and compare them.

    Each model is sampled in a pass of its own from a seed of its own, so that every sample is independent of every
    other: a model compared with itself comes out near one half, not at it.
    """
    for source in (plan.model, plan.baseline) if plan.chats else ():
        load_source_tokenizer(source, plan)  # what is wrong with the second is said before the first is sampled
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from alignment.processes import connect

        connect()
    model, baseline = sample_side(plan.model, plan), sample_side(plan.baseline, plan)
    leave_to_main()
    texts = [prompt.text for prompt in plan.prompts]
    settings: dict[str, Any] = {"oracle": plan.oracle, "resamples": plan.resamples, "seed": plan.seed}
    comparison = compare(texts, model, baseline, plan.judge, **settings)
    extra = {"sampling": sampling_facts(plan), "sampling_note": sampling_note(plan), **plan.notes}
    return replace(comparison, result={**comparison.result, **extra})


def sampling_facts(plan: Plan) -> dict[str, Any]:
    """How a plan's samples are drawn, as it stands in win_rate.json."""
    seeds = {"seed": plan.seed + plan.model.seed_offset, "baseline_seed": plan.seed + plan.baseline.seed_offset}
    return {"chat": plan.chats, **asdict(plan.generation), **seeds}


def sampling_note(plan: Plan) -> str:
    """The same in words."""
    facts = sampling_facts(plan)
    form = "through the chat template" if facts["chat"] else "as plain text"
    if facts["temperature"] == 0:
        how = "greedy: one response per prompt and model, repeated"
    else:
        how = (
            f"temperature {facts['temperature']:g}, top-p {facts['top_p']:g}, top-k {facts['top_k']}; independent "
            f"draws, the model's from seed {facts['seed']}, the baseline's from seed {facts['baseline_seed']}"
        )
    return f"prompts {form}; at most {facts['max_new_tokens']} new tokens; {how}"


def section(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of the resolved recipe in a manifest; empty where the recipe has none."""
    return (manifest.get("recipe") or {}).get(name) or {}


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """manifest.json of a run directory that training wrote."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; give the folder that scripts/train.py wrote")
    path = run_dir / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; {run_dir} is not a run directory that scripts/train.py wrote")
    manifest = read_json_object(path)
    if not section(manifest, "model").get("name_or_path"):
        raise UserError(f"{path}: recipe.model.name_or_path is missing, so the starting model is unknown")
    return manifest


def plan_of_run(
    run_dir: Path,
    *,
    judge: RewardFunction | None = None,
    oracle: PreferenceOracle | None = None,
    prompts: Path | None = None,
    limit: int | None = None,
    samples_per_prompt: int | None = None,
    resamples: int | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    generation: Mapping[str, Any] | None = None,
    samples: Path | None = None,
    vllm: bool = False,
) -> Plan:
    """The trained model of a run against the model that training started from.

    Settings that are not given come from the recipe in the run's manifest; prompts take the form (chat or plain text)
    that the training rows had.

    Raises:
        UserError: no finished model, no judge, no prompts, prompts that were trained on, or the seed that drew the
            training data.
    """
    manifest = read_manifest(run_dir)
    if not (run_dir / "final").is_dir():
        raise UserError(f"{run_dir / 'final'}: no trained model there; finish the training run first")
    evaluation, settings = section(manifest, "evaluation"), section(manifest, "generation")
    judge, oracle, is_training_reward = _judge_of_run(run_dir, manifest, judge, oracle)
    if seed is None:
        seed = int(evaluation.get("seed", 1))
    data_seed = settings.get("seed", 0) if section(manifest, "data").get("sample") else None
    if data_seed in (seed, seed + BASELINE_SEED_OFFSET):
        raise UserError(
            f"{run_dir}: evaluation seed {seed} draws with generation.seed {data_seed}, which drew the training data; "
            "change it"
        )
    if prompts is None:
        if not evaluation.get("prompts"):
            raise UserError(f"{run_dir}: its recipe has no evaluation.prompts; give a file with --prompts")
        prompts, limit = Path(evaluation["prompts"]), limit or evaluation.get("limit")
    found = locate_prompts(prompts, limit)
    recipe_draws = {key: settings[key] for key in asdict(Generation()) if key in settings}
    model, baseline = _models_of_run(run_dir, section(manifest, "model"))
    return Plan(
        model=model,
        baseline=baseline,
        prompts=found,
        judge=judge,
        oracle=oracle,
        generation=Generation(**{**recipe_draws, **(generation or {})}),
        samples_per_prompt=samples_per_prompt or evaluation.get("samples_per_prompt", 2),
        resamples=resamples or evaluation.get("bootstrap", RESAMPLES),
        seed=seed,
        chat=bool(manifest.get("chat", False)) if chat is None else chat,
        notes={"judge_is_training_reward": is_training_reward, **overlap_notes(run_dir, manifest, found)},
        samples=samples,
        vllm=vllm,
    )


def _judge_of_run(
    run_dir: Path, manifest: Mapping[str, Any], reward: RewardFunction | None, oracle: PreferenceOracle | None
) -> tuple[RewardFunction | None, PreferenceOracle | None, bool | None]:
    """The judge, a reward or an oracle, and whether it made the training data: None where that was given, since who
    judged it is not recorded, and of the training's reward in another form.

    The recipe's judge is used unless one is given.
    """
    rewards, oracles = section(manifest, "reward"), section(manifest, "oracle")
    own_reward, own_oracle = get_reward(**rewards) if rewards else None, get_oracle(**oracles) if oracles else None
    if reward is None and oracle is None:
        reward, oracle = own_reward, own_oracle
    if reward is None and oracle is None:
        raise UserError(
            f"{run_dir}: its recipe has no oracle: and no reward: section; name a judge with --reward or --oracle"
        )
    if reward is not None and oracle is not None:
        raise UserError(f"{run_dir}: its recipe has reward: and oracle: sections; name one with --reward or --oracle")
    drawn = not section(manifest, "data").get("train")
    if (reward, oracle) == (own_reward, own_oracle):
        return reward, oracle, True if drawn else None
    one_reward = _reward_of(reward, oracle) == _reward_of(own_reward, own_oracle)
    return reward, oracle, None if one_reward or not drawn else False


def _reward_of(reward: RewardFunction | None, oracle: PreferenceOracle | None) -> Any:
    """What decides: of an oracle that compares scores, the reward that gives them."""
    if not isinstance(oracle, RewardOracle):
        return reward or oracle
    return get_reward(**as_reward_section(oracle.reward))


def _models_of_run(run_dir: Path, model: Mapping[str, Any]) -> tuple[ModelSource, ModelSource]:
    """(trained model, starting model), loaded the same way."""
    shared = ("dtype", "attn_implementation", "revision", "trust_remote_code")
    loading = {str(key): model[key] for key in shared if key in model}
    start = {"name_or_path": model["name_or_path"], "adapter": model.get("adapter")}
    final = str(run_dir / "final")
    name = " + ".join(start_parts(start))
    trained = ModelSource(final, {"name_or_path": final, **loading})
    return trained, ModelSource(name, {**start, **loading}, BASELINE_SEED_OFFSET, model.get("end_of_turn"))


def overlap_notes(run_dir: Path, manifest: Mapping[str, Any], prompts: list[Prompt]) -> dict[str, Any]:
    """What is known of prompts that are both trained and judged on, of what the run itself was trained on.

    A run keeps its prompts' hashes; an iterative run has its prompts, and older runs the pairs that they sampled.
    """
    if (kept := trained_among(run_dir, [prompt.given(chat=False) for prompt in prompts])) is not None:
        trained, shared = kept
        if shared and section(manifest, "data").get("overlap") != "allow":
            first = prompts[shared[0]]
            raise UserError(
                f"{first.where}: prompt {shorten(first.text)} was trained on; {len(shared)} of {len(prompts)} "
                "evaluation prompts were; evaluate on prompts absent from training"
            )
        if shared:
            note = f"{len(shared)} of these {len(prompts)} prompts were trained on (data.overlap: allow)"
            return {"training_prompts": trained, "overlap_note": note}
    else:
        files = [run_dir / "preferences.jsonl", run_dir / "prompts" / "prompts.jsonl"]
        trained_on = next((file for file in files if file.is_file()), None)
        if trained_on is None:
            note = "not checked: the run keeps no list of the prompts that it was trained on"
            return {"training_prompts": None, "overlap_note": note}
        trained = refuse_training_prompts(prompts, trained_on)
    note = f"none of these prompts is among the {trained} that this run was trained on"
    return {"training_prompts": trained, "overlap_note": note}
