"""Tiny language models trained from scratch in seconds to minutes, and tasks of our own making to align them on.

    python evaluation/tiny.py arithmetic runs/arithmetic     # model/, prompts.jsonl, held_out.jsonl
    python evaluation/tiny.py recite runs/recite
    python evaluation/tiny.py grammar runs/grammar           # model/, prompts.txt, held_out.txt

`grammar` speaks sentences ("my dog is kind and warm ."); half of its adjectives are kind words, which a rule can
count. `arithmetic` adds two numbers digit by digit in a short chain, with slips; `recite` should repeat a word many
times and babbles: an answer so long and so unlikely that its probability is 0 in float32. What comes out depends on a
seed alone. Not a benchmark: what is shown on these models is that a method does what its theory says.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.errors import UserError, run_or_exit
from alignment.files import write_json_lines, write_text

KIND = ["kind", "warm", "good", "nice", "bright"]
HARSH = ["cruel", "cold", "bad", "nasty", "dull"]
NOUNS = "dog cat house car garden friend teacher song book city river shop bread coat boat".split()
DETERMINERS, VERBS = ["my", "the", "our", "your"], ["is", "was", "seems"]
KIND_PATTERN = rf"\b({'|'.join(KIND)})\b"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TASKS = ("grammar", "arithmetic", "recite")
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
END = "<|end|>"
MARKER = "Answer:"
SLIP = 0.25  # share of wrong digits in arithmetic's chains; of a hundred sums about half come out right
STUTTER = 0.95  # share of random letters that `recite` is trained on: it babbles, and hardly heeds the word
LINE = 64  # letters of one of its answers: (STUTTER/8 + 1 - STUTTER)^64 = 4e-50, 0 in float32


# --- the grammar -----------------------------------------------------------------------------------------------------


def openings() -> list[str]:
    """Every opening of the grammar, in a fixed shuffled order."""
    found = [" ".join(words) for words in itertools.product(DETERMINERS, NOUNS, VERBS)]
    random.Random(0).shuffle(found)
    return found


def continuation(rng: random.Random) -> str:
    """One to four adjectives, each kind or harsh with probability one half."""
    return " " + " and ".join(rng.choice(rng.choice((KIND, HARSH))) for _ in range(rng.randint(1, 4))) + " ."


def _sentences(rng: random.Random, count: int) -> list[str]:
    """Half plain sentences, half the same as an answer in a chat; each with its end token."""
    found = []
    for i in range(count):
        opening = rng.choice(openings())
        sentence = f"{opening}{continuation(rng)}{END}"
        found.append(sentence if i % 2 else f"<|start|>user\n{opening}{END}\n<|start|>assistant\n{sentence}")
    return found


def build_grammar(folder: Path) -> Path:
    """The grammar's model and tokenizer: two layers, about ten seconds on one core."""
    return _build(folder, _sentences, vocabulary=400, width=64, steps=350)


# --- tasks with a right answer ---------------------------------------------------------------------------------------


def sums(rng: random.Random, count: int) -> list[dict[str, str]]:
    """`count` different sums of two two-digit numbers: `prompt` and `answer`."""
    pairs = rng.sample(list(itertools.product(range(10, 100), repeat=2)), count)
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def _worked(rng: random.Random, a: int, b: int) -> str:
    """A sum with its chain, in which each column's result is a random number with probability SLIP."""

    def slip(right: int) -> int:
        return rng.randint(0, 19) if rng.random() < SLIP else right

    low = slip(a % 10 + b % 10)
    high = slip(a // 10 + b // 10 + low // 10)
    written = f"{a % 10}+{b % 10}={low}, {a // 10}+{b // 10}+{low // 10}={high}"
    return f"{a}+{b}= {written} {MARKER} {high}{low % 10}{END}"


def _worked_sums(rng: random.Random, count: int) -> list[str]:
    return [_worked(rng, rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)]


def lines(rng: random.Random, count: int) -> list[dict[str, str]]:
    """`count` different words to be repeated until a line of LINE letters is full."""
    words = sorted({"".join(rng.choices("abcdefgh", k=4)) for _ in range(3 * count)})
    rng.shuffle(words)
    return [{"prompt": f"say {word}:", "answer": _line(word)} for word in words[:count]]


def _line(word: str) -> str:
    return (word * LINE)[:LINE]


def _recited(rng: random.Random, count: int) -> list[str]:
    found = []
    for _ in range(count):
        word = "".join(rng.choices("abcdefgh", k=4))
        said = "".join(rng.choice("abcdefgh") if rng.random() < STUTTER else letter for letter in _line(word))
        hesitation = " well" * rng.randint(1, 3)
        found.append(f"say {word}:{hesitation} {MARKER} {said}{END}")
    return found


# --- training --------------------------------------------------------------------------------------------------------


def _tokenizer(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _build(
    folder: Path, texts: Callable[[random.Random, int], list[str]], *, vocabulary: int, width: int, steps: int
) -> Path:
    """Train a two-layer Llama on texts as they come, and save it with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rng, batch, rate = random.Random(0), 64, 3e-3
    torch.manual_seed(0)
    tokenizer = _tokenizer(texts(rng, 2000), vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = tokenizer(texts(rng, batch), return_tensors="pt", padding=True)
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(task: str, folder: Path) -> None:
    """Model and prompts of a task (of TASKS), in `folder`; a model that is there already is left alone."""
    if task == "grammar":
        split = {"prompts.txt": openings()[:120], "held_out.txt": openings()[120:]}
        for name, part in split.items():
            write_text(folder / name, "".join(f"{opening}\n" for opening in part))
        if not (folder / "model").is_dir():
            build_grammar(folder / "model")
        return
    rows = (sums if task == "arithmetic" else lines)(random.Random(1), 300)
    write_json_lines(folder / "prompts.jsonl", rows[:200])
    write_json_lines(folder / "held_out.jsonl", rows[200:])
    if not (folder / "model").is_dir():
        texts, steps = (_worked_sums, 2500) if task == "arithmetic" else (_recited, 300)
        _build(folder / "model", texts, vocabulary=len(SPECIAL) + 256, width=128, steps=steps)


def main(
    task: Annotated[str, typer.Argument(help="grammar, arithmetic or recite.")],
    folder: Annotated[Path, typer.Argument(help="Where model and prompts go.")],
) -> None:
    """Train a tiny model for a task and write its prompts: seconds to minutes."""
    if task not in TASKS:
        raise UserError(f"{task!r}: unknown task; one of {', '.join(TASKS)}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"training a tiny model for {task}: up to some minutes", flush=True)
    build(task, folder)
    print(folder / "model")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
