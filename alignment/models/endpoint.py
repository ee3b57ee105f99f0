"""Samples from an OpenAI-compatible HTTP endpoint, for `pools`: a local server (vLLM, llama.cpp …) or a hosted model.

Texts are asked for with `/completions`, chat messages with `/chat/completions` (where the server's own chat template
counts). Sending and retrying is `alignment.web`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.models.ends import end_of
from alignment.models.sampling import Generation, Prompt, Sample
from alignment.web import Connection, Dialect, Failed, JsonServer, is_endpoint, is_variable, parsed, refused_key


@dataclass
class EndpointBackend:
    """A `Backend` behind HTTP; every process of a launch asks for its own shards.

    Servers give texts. Unless they also give the ids that they drew, a text is tokenised again, without special tokens
    and with the end token where the model ended: the model may have spelled the same text with other tokens. The
    manifest says which it was (`ids`: "server" or "retokenised"). Whether a server heeds `seed` is
    unknown here.

    Attributes:
        base_url: http:// or https://, up to before `/completions`; usually ends in `/v1`.
        model: the endpoint's name of the model.
        tokenizer: of that model.
        server_ids: ask for token ids (`return_token_ids`, which vLLM's server knows).
        api_key_env: NAME of the environment variable that holds the key.
        timeout: seconds without a byte before a try counts as failed; a request draws up to `batch_size` samples.
        retries: further tries after the first.
        concurrency: requests at a time; each is for one prompt.

    Raises:
        UserError: an address that is none, or a name that is no variable's.
    """

    base_url: str
    model: str
    tokenizer: Any
    server_ids: bool = False
    api_key_env: str | None = None
    timeout: float = 600.0
    retries: int = 5
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not is_endpoint(self.base_url):  # not repeated: it may hold a secret
            raise UserError("endpoint: must be http://HOST… or https://HOST… without user, ? or #")
        if not is_variable(self.api_key_env):
            raise UserError(
                "api_key_env: must be the NAME, in capitals, of an environment variable, never the key itself"
            )
        manners = {key: getattr(self, key) for key in ("api_key_env", "timeout", "retries", "concurrency")}
        self._server = JsonServer(self.base_url.rstrip("/"), where="sampling", kept="Whole shards", **manners)
        # What changes no sample's distribution. At 1, temperature and top_p are left out where a server wants it so.
        note = "it is left out, and the same seed need not give the same samples"
        changes = {"max_tokens": ("max_completion_tokens", ""), "seed": (None, note)}
        self._dialect = Dialect(self._server.where, changes)
        self._neutral = Dialect(self._server.where, {**changes, "temperature": (None, ""), "top_p": (None, "")})

    def describe(self) -> dict[str, Any]:
        """Address, model, and where token ids come from."""
        return {
            "backend": "endpoint",
            "base_url": self._server.base_url,
            "endpoint_model": self.model,
            "ids": "server" if self.server_ids else "retokenised",
        }

    def open(self, device: Any, main: bool) -> dict[str, Any]:
        """Nothing to load; which weights the server has is unknown here."""
        return {}

    def draw(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], n: int, generation: Generation, seed: int
    ) -> list[list[Sample]]:
        """One request for n samples per prompt.

        Raises:
            UserError: the endpoint cannot be used, or gives another number of samples.
        """
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)) >> 1  # 31 bits: some servers take no more

        def one(connection: Connection, number: int) -> list[Sample]:
            body = {"model": self.model, "n": n, "max_tokens": generation.max_new_tokens, "seed": int(seeds[number])}
            body |= {"temperature": generation.temperature, "top_p": generation.top_p}
            if generation.top_k:  # not OpenAI's, but vLLM's and llama.cpp's
                body["top_k"] = generation.top_k
            if self.server_ids:
                body["return_token_ids"] = True
            return self._ask(connection, prompts[number], body)

        found = dict(self._server.ask(range(len(prompts)), one))
        return [found[number] for number in range(len(prompts))]

    def _ask(self, connection: Connection, prompt: Prompt, body: dict[str, Any]) -> list[Sample]:
        chat = not isinstance(prompt, str)
        path, key = ("/chat/completions", "messages") if chat else ("/completions", "prompt")
        dialect = self._neutral if body["temperature"] == body["top_p"] == 1 else self._dialect
        response = dialect.post(connection, path, {**body, key: prompt})
        refused = refused_key(response, ("temperature", "top_p", "top_k"))
        remedy = f"the server refuses this request to {path}: check model, prompt and lengths"
        if refused is not None:
            neutral = 0 if refused == "top_k" else 1
            remedy = f"without {refused}: {body.get(refused)} samples would be others; set {refused}: {neutral}"
        connection.refuse(response, self.model, remedy)
        answer = parsed(response)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        texts = [_text(choice, chat) for choice in choices] if isinstance(choices, list) else [None]
        if not isinstance(choices, list) or None in texts:
            raise Failed(f"no completion but {connection.one_line(response.text)!r}")
        if len(choices) != body["n"]:
            raise UserError(
                f"{self._server.where}: {len(choices)} samples instead of n={body['n']}: the server does not heed n; "
                "batch size 1 asks for one at a time"
            )
        return [self._sample(choice, str(text), chat) for choice, text in zip(choices, texts, strict=True)]

    def _sample(self, choice: Mapping[str, Any], text: str, chat: bool) -> Sample:
        finished = choice.get("finish_reason") == "stop"
        if self.server_ids:
            ids = choice.get("token_ids")
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                raise UserError(
                    f"{self._server.where}: the server gives no token_ids; without server_ids texts are tokenised"
                )
            return Sample(ids, text, finished)
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        end = end_of(self.tokenizer, chat and bool(self.tokenizer.chat_template)) if finished else None
        return Sample(ids if end is None else [*ids, end], text, finished)


def _text(choice: Any, chat: bool) -> str | None:
    """The text of a choice; None where it has none."""
    if chat and isinstance(choice, dict):
        choice = choice.get("message")
    text = choice.get("content" if chat else "text") if isinstance(choice, dict) else None
    return text if isinstance(text, str) else None
