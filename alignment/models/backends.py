"""What draws a pool's samples: transformers on this process's device.

A backend is asked by `pools.sample_pool`, block by block. It says what decides its samples, which goes into the pool's
manifest; files, seeds of blocks and processes are the pool's business.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

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
        return {"device": device.type, **({"model_sha256": model_digest(model)} if main else {})}

    def draw(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], n: int, generation: Generation, seed: int
    ) -> list[list[Sample]]:
        return sample(self._model, self.tokenizer, ids, n, **asdict(generation), seed=seed)
