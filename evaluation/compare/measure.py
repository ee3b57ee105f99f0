"""What is measured of a policy: fresh samples on validation or test prompts, their KL to the start, the judge's word.

Samples are drawn once and kept with the run (measured-validation.json, measured-test.json); every policy, and every
seed of it, has a seed of its own, so that no two share random numbers. No statistics here (`matrix`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.data.prompt_files import refuse_unrendered
from alignment.files import iterate_json_lines, json_digest, read_json_object, write_json
from alignment.rewards.base import Prompt
from evaluation.compare.plan import Run
from evaluation.compare.recipe import CompareRecipe
from evaluation.estimates import preferences
from evaluation.policies import log_probs, means_of, stamps_of_files, tables_won

Array = NDArray[np.float64]

PAIRS = 64  # of the shared preferences, on which displacement is measured


@dataclass(frozen=True)
class Measured:
    """Samples of one policy on Q prompts, S each.

    Attributes:
        responses: [Q][S] texts.
        log_ratio: [Q, S] log pi - log start of each, in nats; its mean estimates KL(pi || start) without bias, as
            samples are the policy's own: temperature and the like are refused.
        tokens: [Q, S] lengths.
        finished: share that ended before the token limit.
        distinct_1, distinct_2: different n-grams of token ids as a share of all.
        displacement: (chosen, rejected): mean log pi - log start of the first PAIRS shared pairs; None: not measured.
    """

    responses: list[list[str]]
    log_ratio: Array
    tokens: Array
    finished: float
    distinct_1: float
    distinct_2: float
    displacement: tuple[float, float] | None

    @property
    def kl(self) -> float:
        """Nats per response."""
        return float(self.log_ratio.mean())


class Measurer:
    """Samples policies; holds the start, which every policy is compared with.

    Args:
        recipe: the whole.
        prompts: set name -> Q prompts.
    """

    def __init__(self, recipe: CompareRecipe, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        self.recipe, self.prompts = recipe, prompts
        self._start: Any = None

    def policy(self, run: Run, which: str, pairs: Path | None = None) -> Measured:
        """The trained policy of a complete run on the prompts `which`; kept in the run's folder.

        Args:
            run: the run.
            which: validation or test.
            pairs: preferences of the run's seed, for displacement.
        """
        file = run.folder / f"measured-{which}.json"
        seed = f"{run.arm.label} {run.value} {run.seed} {which}"
        return self._kept(file, str(run.folder / "final"), seed, which, pairs)

    def start(self, seed: int, which: str) -> Measured:
        """The start on the prompts `which`: samples of its own for every seed."""
        file = self.recipe.folder / "start" / f"{which}-seed-{seed}.json"
        return self._kept(file, None, f"start {seed} {which}", which, None)

    def _kept(self, file: Path, final: str | None, seed: str, which: str, pairs: Path | None) -> Measured:
        asked = {
            "prompts": json_digest(list(self.prompts[which])),
            "samples": self.recipe.evaluation.samples_per_prompt,
            "generation": self.recipe.generation.model_dump(exclude={"seed", "replay"}),
            "seed": f"{seed} {self.recipe.evaluation.seed}",
            "displacement": pairs is not None,
        }
        stored = read_json_object(file) if file.is_file() else {}
        if final is None:
            load, end = self.recipe.model.loading, self.recipe.model.end_of_turn
            asked["model"] = json_digest([load, stamps_of_files(load), *([] if end is None else [end])])
        if stored.get("of") != asked:
            print(f"   sampling {seed}", flush=True)
            stored = {"of": asked, **self._measure(final, str(asked["seed"]), which, pairs)}
            write_json(file, stored)
        pair = stored["displacement"]
        return Measured(
            responses=stored["responses"],
            log_ratio=np.array(stored["log_ratio"], dtype=np.float64),
            tokens=np.array(stored["tokens"], dtype=np.float64),
            finished=stored["finished"],
            distinct_1=stored["distinct_1"],
            distinct_2=stored["distinct_2"],
            displacement=None if pair is None else (pair[0], pair[1]),
        )

    def _measure(self, final: str | None, seed: str, which: str, pairs: Path | None) -> dict[str, Any]:
        from alignment.models.sampling import prompt_ids, sample
        from alignment.trainers.rollout import distinct

        if self._start is None:
            self._start = self._loaded(None)
        start, tokenizer = self._start
        model, _ = self._start if final is None else self._loaded(final)
        prompts, settings = list(self.prompts[which]), self.recipe.generation.drawing
        refuse_unrendered([(prompt, f"{which} prompts") for prompt in prompts], tokenizer)
        settings["seed"] = int(json_digest(seed)[:12], 16)
        drawn = sample(model, tokenizer, prompts, self.recipe.evaluation.samples_per_prompt, **settings)
        flat = [(prompt_ids(tokenizer, p), one.ids) for p, group in zip(prompts, drawn, strict=True) for one in group]
        ratio = np.zeros(len(flat)) if final is None else log_probs(model, flat) - log_probs(start, flat)
        shape = (len(prompts), -1)
        ids = [one for _, one in flat]
        return {
            "responses": [[one.text for one in group] for group in drawn],
            "log_ratio": ratio.reshape(shape).tolist(),
            "tokens": np.array([len(one) for one in ids]).reshape(shape).tolist(),
            "finished": float(np.mean([one.finished for group in drawn for one in group])),
            "distinct_1": distinct(ids, 1),
            "distinct_2": distinct(ids, 2),
            "displacement": None if pairs is None else self._displacement(model, start, pairs),
        }

    def _loaded(self, final: str | None) -> tuple[Any, Any]:
        """(model, tokenizer) of a run's `final`, or of the start."""
        import torch

        from alignment.models import load_model, load_tokenizer

        section, named = self.recipe.model.loading, self.recipe.model.tokenizing
        if final is not None:
            keys = ("dtype", "attn_implementation", "trust_remote_code")
            section = {"name_or_path": final, **{key: section[key] for key in keys}}
            named = {"trust_remote_code": section["trust_remote_code"]}
        model: Any = load_model(**section)
        if torch.cuda.is_available() and not self.recipe.training.use_cpu:
            model.cuda()
        return model, load_tokenizer(section["name_or_path"], **named)

    def _displacement(self, model: Any, start: Any, pairs: Path) -> list[float]:
        rows = [row for _, row in iterate_json_lines(pairs)][:PAIRS]
        found = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = [(row["prompt_ids"], row[side]) for row in rows]
            found.append(float(np.mean(log_probs(model, ids) - log_probs(start, ids))))
        return found


class Judge:
    """The recipe's reward or oracle."""

    def __init__(self, recipe: CompareRecipe) -> None:
        from alignment.rewards import get_oracle, get_reward

        reward, oracle = recipe.reward, recipe.oracle
        self.reward: Any = None if reward is None else get_reward(reward.name, **reward.options)
        self.oracle: Any = None if oracle is None else get_oracle(oracle.name, **oracle.options)
        # By identity of the policies, which are kept with their numbers so that none is taken for another.
        self._scores: dict[int, tuple[Measured, Array]] = {}
        self._tables: dict[tuple[int, int], tuple[Measured, Measured, list[Array]]] = {}

    def describe(self) -> str:
        """Its name and settings."""
        return str((self.reward or self.oracle).describe())

    def scores(self, prompts: Sequence[Prompt], one: Measured) -> Array:
        """[Q, S] of a reward; each policy's samples are scored once."""
        if id(one) not in self._scores:
            flat = [(p, text) for p, group in zip(prompts, one.responses, strict=True) for text in group]
            values = self.reward.score([p for p, _ in flat], [text for _, text in flat])
            self._scores[id(one)] = one, np.array(values, dtype=np.float64).reshape(len(prompts), -1)
        return self._scores[id(one)][1]

    def tables(self, prompts: Sequence[Prompt], ours: Measured, theirs: Measured) -> list[Array]:
        """Q tables [S, S]: what each sample of ours wins against each of theirs, ties one half; NaN: not judged. An
        oracle is asked once about each pair of policies."""
        if self.oracle is None:
            both = zip(self.scores(prompts, ours), self.scores(prompts, theirs), strict=True)
            return [preferences(a, b) for a, b in both]
        key = id(ours), id(theirs)
        if key not in self._tables:
            answers = tables_won(self.oracle, prompts, ours.responses, theirs.responses)
            self._tables[key] = ours, theirs, answers
        return self._tables[key][2]

    def shares(self, prompts: Sequence[Prompt], ours: Measured, theirs: Measured) -> Array:
        """[Q] share of all pairs of samples of a prompt that ours wins; NaN: none could be judged."""
        return means_of(self.tables(prompts, ours, theirs))

    def one_to_one(self, prompts: Sequence[Prompt], ours: Measured, theirs: Measured) -> Array:
        """[Q, S] what each sample of ours wins against the sample of theirs with the same number."""
        return np.array([table.diagonal() for table in self.tables(prompts, ours, theirs)])
