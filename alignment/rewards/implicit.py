"""The implicit reward of a policy that was trained on preferences or labels, whole or step by step.

    reward:
      name: implicit
      policy: runs/quickstart-dpo/final                # a name, a folder, an adapter folder
      reference: HuggingFaceTB/SmolLM2-135M-Instruct   # what the policy was trained against; null drops it

Free process rewards (Yuan et al. 2024, arXiv:2412.01981): r(y) = beta * sum of log policy - log reference over the
response's tokens, its end token included as in training; a step's reward is the part of that sum over its tokens. The
policy may come from any objective whose reward is a log-ratio (dpo and its kin). Not here: training such a policy, and
the losses of the paper's unpaired variants (CE, KTO, NCA).

Texts become tokens as rows do in training (`alignment.data.tokens`), and masks come from lengths, never from
`token != pad`. A response that cannot be scored is NaN: the chat template refuses it, or leaves nothing of it, or the
prompt fills `max_length`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from alignment.errors import UserError
from alignment.rewards.base import Prompt, Reward, check_lengths, prompt_text

if TYPE_CHECKING:
    import torch

HOW = ("sum", "min")
_TOKENISED_AT_ONCE = 1000
_NOT_BLANK = re.compile(r"\S")


def prefix_values(log_ratio: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """q_t = beta * sum_{i<=t} rho_i, in float64; the last one is the response's reward (section 3.1).

    Where the reference is a distribution over the tokens, q_t is beta * log of the mean of exp(r / beta) over the
    reference's continuations of the prefix: a soft value, between the mean and the largest r of those.

    Args:
        log_ratio: [B, T], rho_t = log policy - log reference of each token, nats.
        mask: [B, T], 1 on the response's tokens; what stands elsewhere is not read.
        beta: the reward's unit per nat.

    Returns:
        [B, T].
    """
    return beta * log_ratio.double().masked_fill(mask == 0, 0.0).cumsum(-1)


def implicit_step_rewards(
    log_ratio: torch.Tensor, mask: torch.Tensor, step_end: torch.Tensor, beta: float
) -> torch.Tensor:
    """r_j = q_{b_j} - q_{b_{j-1}} with q_0 = 0: the rewards of steps that span the tokens b_{j-1} .. b_j - 1.

    Args:
        log_ratio, mask, beta: as in `prefix_values`.
        step_end: [B, S] integers in 0..T, not decreasing: b_j, the columns up to the end of step j. A row with fewer
            steps repeats its last one.

    Returns:
        [B, S], float64; NaN for a step that holds no token of the response, such as the repeated ones.
    """
    import torch

    zero = torch.zeros_like(log_ratio[:, :1], dtype=torch.float64)
    q = torch.cat([zero, prefix_values(log_ratio, mask, beta)], dim=1)  # q_0 = 0
    tokens = torch.cat([zero, (mask != 0).double().cumsum(-1)], dim=1)

    def per_step(at_end: torch.Tensor) -> torch.Tensor:
        return torch.diff(at_end.gather(1, step_end), dim=1, prepend=zero)

    return per_step(q).masked_fill(per_step(tokens) == 0, math.nan)


@dataclass(frozen=True)
class ImplicitReward(Reward):
    """beta * log(policy / reference) of a response; the weights are loaded at the first score.

    Attributes:
        policy: the trained model: name, folder (`RUN/final`), or LoRA adapter folder.
        reference: what it was trained against, with the same vocabulary; None leaves it out, and a reward is then
            beta * log policy (the paper: little is lost; no longer a reward that is 0 at the reference).
        beta: reward per nat; the paper's .05. Best-of-n and `min` do not depend on it.
        how: `sum` over the response, or `min` over its steps (the paper's headline; depends on how many there are).
        step_marker: regular expression; a step begins with the token of the first character that is not blank, at or
            behind a match's beginning. What stands before the first one is a step, too; a marker with nothing behind
            it begins none (an end token alone is no step).
            The default is ours, after the paper's "Step 1: …".
        chat: None: prompts of messages go through the chat template, texts stand as they are; True: texts, too, are
            asked as a user's message; False: messages are joined to a text.
        max_length: tokens of prompt and response; what lies behind is not scored, as in training. None: no limit.
        batch_size: responses per forward pass; changes nothing but speed and memory.
        dtype: of the weights.

    Raises:
        UserError: a key's value is refused.
    """

    policy: str
    reference: str | None
    beta: float = 0.05
    how: str = "sum"
    step_marker: str = r"\bStep \d+:"
    chat: bool | None = None
    max_length: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    name: ClassVar[str] = "implicit"

    def __post_init__(self) -> None:
        from alignment.models.loading import DTYPES

        if not (isinstance(self.policy, str) and self.policy):
            _refuse("policy", self.policy, "a model's name or folder")
        if self.reference is not None and not (isinstance(self.reference, str) and self.reference):
            _refuse("reference", self.reference, "a model's name or folder, or null")
        if not _number(self.beta) or not 0 < self.beta < math.inf:
            _refuse("beta", self.beta, "a number above 0")
        if self.how not in HOW:
            _refuse("how", self.how, " or ".join(HOW))
        if not isinstance(self.step_marker, str):
            _refuse("step_marker", self.step_marker, "a regular expression in quotes")
        try:
            re.compile(self.step_marker)
        except re.error as error:
            _refuse("step_marker", self.step_marker, f"a valid regular expression ({error})")
        if self.chat not in (None, True, False):
            _refuse("chat", self.chat, "true, false or null")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 2):
            _refuse("max_length", self.max_length, "a whole number of at least 2, or null")
        if type(self.batch_size) is not int or self.batch_size < 1:
            _refuse("batch_size", self.batch_size, "a whole number of at least 1")
        if self.dtype not in DTYPES:
            _refuse("dtype", self.dtype, " or ".join(DTYPES))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """beta * log-ratio of each response, or of its worst step (`how`); NaN where it cannot be scored."""
        if self.how == "sum":
            return [steps[0] for steps in self._scored(prompts, responses, stepwise=False)]
        return [min(steps) for steps in self.step_scores(prompts, responses)]

    def step_scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[float]]:
        """The reward of every step of each response, in order; they add up to the response's.

        Steps without a token are left out. A response that cannot be scored has one step, NaN.

        Raises:
            ValueError: the two lists differ in length.
            UserError: a model cannot be loaded, or the two have different vocabularies.
        """
        return self._scored(prompts, responses, stepwise=True)

    def _scored(self, prompts: Sequence[Prompt], responses: Sequence[str], *, stepwise: bool) -> list[list[float]]:
        """`step_scores`, or with the whole response as the one step."""
        import torch

        check_lengths(prompts, responses)
        encoded = self._encoded(prompts, responses)
        found: list[list[float]] = [[math.nan] for _ in encoded]
        # Like lengths together: little padding.
        order = sorted((i for i, ids in enumerate(encoded) if ids[1]), key=lambda i: sum(map(len, encoded[i])))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = [encoded[i] for i in chosen]
            ratio, mask = self._log_ratios(batch)
            ends = [self._step_ends(response) if stepwise else [len(response)] for _, response in batch]
            longest = max(map(len, ends))
            step_end = torch.tensor([end + end[-1:] * (longest - len(end)) for end in ends])
            rewards = implicit_step_rewards(ratio, mask, step_end, self.beta).tolist()
            for i, row, end in zip(chosen, rewards, ends, strict=True):
                found[i] = row[: len(end)]
        return found

    def describe(self) -> str:
        """Loads the weights: their fingerprints say which version judges."""
        from alignment.models.loading import fingerprint

        policy, reference = (None if m is None else fingerprint(m) for m in self._models[1:])
        against = f" / {self.reference} ({reference})" if self.reference else ", no reference"
        over = "" if self.how == "sum" else f", least step, steps begin at {self.step_marker!r}"
        asked = "" if self.chat is None else f", chat {self.chat}"
        return (
            f"implicit reward {self.beta:g} * log {self.policy} ({policy}){against}{over}{asked}, "
            f"{'all' if self.max_length is None else self.max_length} tokens, {self.dtype}"
        )

    @cached_property
    def _models(self) -> tuple[Any, Any, Any]:
        """Tokenizer, policy, reference (None where there is none), on the accelerator if there is one."""
        import torch

        from alignment.models import load_model, load_tokenizer

        loaded: list[Any] = []
        vocabularies: list[dict[str, int]] = []
        tokenizer = None
        for key, name in (("policy", self.policy), ("reference", self.reference)):
            if name is None:
                loaded.append(None)
                continue
            try:
                own = load_tokenizer(name)
                model: Any = load_model(name, dtype=self.dtype)
            except UserError as error:
                raise UserError(f"reward implicit: {key}: {str(error).removeprefix('model.name_or_path: ')}") from None
            tokenizer = tokenizer or own
            vocabularies.append(own.get_vocab())
            loaded.append(model.cuda() if torch.cuda.is_available() else model)
        if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
            raise UserError(
                f"reward implicit: reference {self.reference!r} has another vocabulary than policy {self.policy!r}; "
                "name the model that the policy was trained against"
            )
        return tokenizer, loaded[0], loaded[1]

    def _encoded(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, response ids) as training has them; no response ids where it cannot be scored."""
        from alignment.data.preferences import BadRow
        from alignment.data.tokens import encode

        tokenizer = self._models[0]
        rows: list[dict[str, Any]] = []
        for prompt, response in zip(prompts, responses, strict=True):
            chat = not isinstance(prompt, str) if self.chat is None else self.chat
            if not chat:
                rows.append({"prompt": prompt_text(prompt), "chosen": response})
                continue
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            rows.append({"prompt": asked, "chosen": [{"role": "assistant", "content": response}]})
        found: list[tuple[list[int], list[int]]] = [([], []) for _ in rows]
        for text in (True, False):
            of_kind = [i for i, row in enumerate(rows) if isinstance(row["prompt"], str) is text]
            if of_kind:
                self._check_tokenizer(tokenizer, text)
            for start in range(0, len(of_kind), _TOKENISED_AT_ONCE):
                some = of_kind[start : start + _TOKENISED_AT_ONCE]
                for i, ids in zip(some, encode([rows[i] for i in some], tokenizer, ["chosen"]), strict=True):
                    if not isinstance(ids, BadRow):
                        asked_ids, given_ids = ids[0]["prompt_ids"], ids[0]["chosen_ids"]
                        room = None if self.max_length is None else max(self.max_length - len(asked_ids), 0)
                        found[i] = asked_ids, given_ids[:room]
        return found

    def _check_tokenizer(self, tokenizer: Any, text: bool) -> None:
        if text and tokenizer.eos_token is None:
            raise UserError(f"reward implicit: policy {self.policy!r} has no EOS token, and responses end with one")
        if not text and not tokenizer.chat_template:
            raise UserError(
                f"reward implicit: policy {self.policy!r} has no chat template, and prompts are chat messages; "
                "set chat: false"
            )

    def _step_ends(self, response: list[int]) -> list[int]:
        """b_1 .. b_S of a response: the tokens up to the end of each step; the last one is all of them."""
        tokenizer = self._models[0]

        def text(n: int) -> str:
            kept = response[:n]
            return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        whole, upto = text(len(response)), range(1, len(response) + 1)
        ends = set()
        for match in re.finditer(self.step_marker, whole):
            if first := _NOT_BLANK.search(whole, match.start()):
                # The tokens that end at or before the step's first character.
                ends.add(bisect_right(upto, first.start(), key=lambda n: len(text(n))))
        return [*sorted(ends - {0, len(response)}), len(response)]

    def _log_ratios(self, batch: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """rho [B, T] and its mask [B, T] for (prompt ids, response ids) with T the longest response's tokens."""
        import torch

        _, policy, reference = self._models
        ratio = token_logps(policy, batch)
        if reference is not None:
            ratio = ratio - token_logps(reference, batch)
        lengths = torch.tensor([len(response) for _, response in batch])
        return ratio, (torch.arange(ratio.size(1)) < lengths[:, None]).long()


def token_logps(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """log pi(y_t | x, y_<t) of every response token, float32, nats.

    Rows are padded on the right, where a causal model cannot look, whatever its kind of positions. Without a prompt
    nothing precedes a response's first token, which counts 0 then, as in training.

    Args:
        model: a causal language model in eval mode.
        batch: B pairs of prompt ids and response ids; no response is empty.

    Returns:
        [B, T] on the CPU, T the longest response; 0 behind a response's end.
    """
    import torch
    import torch.nn.functional as F

    rows = [[*prompt, *response] for prompt, response in batch]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    seen = (torch.arange(width) < lengths[:, None]).long().to(model.device)
    first = min(max(len(prompt) - 1, 0) for prompt, _ in batch)  # the first column whose logits are read
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=width - first).logits
    logps = -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, first + 1 :], reduction="none").cpu()
    found = torch.zeros(len(batch), max(len(response) for _, response in batch))
    for row, (prompt, response) in enumerate(batch):
        skipped = 0 if prompt else 1
        start = len(prompt) + skipped - 1 - first  # column of the first scored token
        scored = len(response) - skipped
        found[row, skipped : len(response)] = logps[row, start : start + scored]
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise UserError(f"reward implicit: {key} must be {wanted}, not {value!r}")
