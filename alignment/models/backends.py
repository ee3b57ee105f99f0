"""What draws a pool's samples: transformers on this process's device, or vLLM; `endpoint` has the one behind HTTP.

A backend is asked by `pools.sample_pool`, block by block. It says what decides its samples, which goes into the pool's
manifest; files, seeds of blocks and processes are the pool's business.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from alignment.errors import UserError
from alignment.models.ends import ends_of, read_generation_config
from alignment.models.sampling import Generation, Prompt, Sample, sample


class Backend(Protocol):
    """Draws samples. Every process of a launch has one of its own."""

    def describe(self) -> dict[str, Any]:
        """What decides the samples and is known before anything is loaded: entries of the pool's manifest."""

    def open(self, device: Any, main: bool) -> dict[str, Any]:
        """Load what is needed, onto `device` where that means something.

        Returns:
            On the `main` process, what decides the samples and is known only now; further entries of the manifest.
        """

    def draw(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], n: int, generation: Generation, seed: int
    ) -> list[list[Sample]]:
        """n samples of each prompt, in order, decided by the arguments alone.

        Args:
            prompts: texts or chat messages.
            ids: the same as token ids; a backend reads one of the two.
            n: samples of each prompt.
            generation: how they are drawn.
            seed: 0 to 2**63 - 1.
        """


@contextlib.contextmanager
def _whole_model() -> Iterator[None]:
    """A launch for FSDP may ask that only the first process of a machine read the weights; here all must."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@dataclass
class TransformersBackend:
    """The model in this process, whole, by transformers' `generate`.

    Attributes:
        load: arguments of `alignment.models.load_model`.
        tokenizer: of the model.
    """

    load: Mapping[str, Any]
    tokenizer: Any
    _model: Any = field(default=None, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        """How the model is loaded; its name is the caller's to give."""
        return {"backend": "transformers", **{k: v for k, v in self.load.items() if k != "name_or_path"}}

    def open(self, device: Any, main: bool) -> dict[str, Any]:
        """Load the model; the main process says which weights they are: a name alone does not."""
        from alignment.models.digest import model_digest
        from alignment.models.loading import load_model

        with _whole_model():
            model: Any = load_model(**self.load)
        if model.device != device:
            model.to(device)
        self._model = model
        ends = ends_of(self.tokenizer, model.generation_config).ids
        return {"device": device.type, "ends": ends, **({"model_sha256": model_digest(model)} if main else {})}

    def draw(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], n: int, generation: Generation, seed: int
    ) -> list[list[Sample]]:
        return sample(self._model, self.tokenizer, ids, n, **asdict(generation), seed=seed)


@dataclass
class VllmBackend:
    """The model in vLLM's engine, inside this process.

    Written after vLLM's documentation and not run by this project, whose tests have no vLLM: draw a few samples and
    look at them first. Under `accelerate launch` each process has an engine of its own; how they share GPUs is
    yours to arrange (one plain process is the simple way).

    Attributes:
        load: arguments of `alignment.models.load_model`: name, dtype, revision, trust_remote_code; no adapter and no
            quantisation.
        tokenizer: of the model.

    Raises:
        UserError: vLLM is not installed, or `load` has what is not passed on to it.
    """

    load: Mapping[str, Any]
    tokenizer: Any
    _engine: Any = field(default=None, init=False, repr=False)
    _ends: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed: `pip install vllm` where it runs, or sample without it")
        passed = ("name_or_path", "dtype", "revision", "trust_remote_code")
        if others := sorted(key for key, value in self.load.items() if value is not None and key not in passed):
            raise UserError(f"vLLM: model.{others[0]} is not passed on to it; `alignment export` merges adapters")

    def describe(self) -> dict[str, Any]:
        """How the model is loaded."""
        return {"backend": "vllm", **{k: v for k, v in self.load.items() if k != "name_or_path"}}

    def open(self, device: Any, main: bool) -> dict[str, Any]:
        """Start the engine. The weights are its own: the manifest has their name and vLLM's version, no SHA-256."""
        import vllm

        from alignment.models.loading import resolve_path

        given = {key: value for key, value in self.load.items() if key != "name_or_path" and value is not None}
        path = resolve_path(self.load["name_or_path"])
        self._engine = vllm.LLM(model=path, **given)
        options = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
        self._ends = ends_of(self.tokenizer, read_generation_config(path, **options)).ids
        return {"vllm": vllm.__version__, "ends": self._ends}

    def draw(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], n: int, generation: Generation, seed: int
    ) -> list[list[Sample]]:
        """Token ids in and out; vLLM keeps the end token in the ids that it gives. Of the ends it knows EOS alone."""
        import vllm

        settings: dict[str, Any] = {"n": n, "temperature": generation.temperature, "top_p": generation.top_p}
        settings |= {"top_k": generation.top_k or -1, "max_tokens": generation.max_new_tokens}
        settings["stop_token_ids"] = self._ends
        seeds = np.random.SeedSequence(seed).generate_state(len(ids))  # equal prompts are drawn independently
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in ids],
            [vllm.SamplingParams(**settings, seed=int(each)) for each in seeds],
            use_tqdm=False,
        )
        return [[self._sample(each) for each in output.outputs] for output in outputs]

    def _sample(self, output: Any) -> Sample:
        ids = list(output.token_ids)
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Sample(ids, text, output.finish_reason == "stop")
