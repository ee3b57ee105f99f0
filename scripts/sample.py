"""Samples of a model, several per prompt, into a folder of JSONL shards: docs/sampling.md. Run again to go on.

    python scripts/sample.py --model M --prompts prompts.txt --output pools/m --samples 8
    accelerate launch --num_processes 8 scripts/sample.py --model M --prompts prompts.txt --output pools/m --samples 8
    python scripts/sample.py --model M --prompts prompts.jsonl --output pools/m --endpoint http://127.0.0.1:8000/v1

Only the command line: `alignment.models.pools` draws and writes, `evaluation` judges.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.errors import UserError, run_or_exit
from alignment.recipes.rows import DATA_ENDINGS
from evaluation.options import BatchSize, Chat, Dtype, Limit, MaxNewTokens, Seed, Temperature, TopK, TopP


def read_prompts(path: Path, limit: int | None, chat: bool) -> list[tuple[Any, str]]:
    """The prompts of a file and where they stand, which may repeat; with `chat`, texts are what the user says."""
    from alignment.data.prompt_files import locate_prompts

    found = locate_prompts(path, limit, strict=not path.name.endswith(DATA_ENDINGS))
    return [([{"role": "user", "content": p}] if chat and isinstance(p, str) else p, where) for p, where in found]


def choose_backend(load: dict[str, Any], tokenizer: Any, vllm: bool, url: str | None, settings: dict[str, Any]) -> Any:
    """What draws; None is transformers. `settings` are `EndpointBackend`'s, None where not given."""
    from alignment.models.backends import VllmBackend
    from alignment.models.endpoint import EndpointBackend

    given = {key: value for key, value in settings.items() if value is not None}
    if url is None and given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} without --endpoint: name the endpoint, or remove it")
    if url is not None and vllm:
        raise UserError("--vllm and --endpoint: one of them draws; remove the other")
    if url is not None:
        return EndpointBackend(url, given.pop("endpoint_model", load["name_or_path"]), tokenizer, **given)
    return VllmBackend(load, tokenizer) if vllm else None


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, adapter or GGUF file; with --endpoint, the tokenizer.")],
    prompts: Annotated[
        Path,
        typer.Option(help="Text, one prompt a line; or rows: .jsonl, .json, .parquet, .csv."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the samples.")],
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 1,
    limit: Limit = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    batch_size: BatchSize = 64,
    seed: Seed = 1,
    dtype: Dtype = "float32",
    prompts_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Per file: what a kill loses, and what processes share. [4,096 samples]")
    ] = None,
    cpu_threads: Annotated[int | None, typer.Option(min=1, help="Of each process. [its share of the cores]")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Draw with vLLM, where it is installed.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Draw from an OpenAI-compatible server: URL to /v1.")] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="The server's name of the model. [--model]")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="NAME of the variable with the server's key. [none]")] = None,
    server_ids: Annotated[
        bool | None, typer.Option("--server-ids", help="Ask the server for token ids. [texts are tokenised]")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time. [8]")] = None,
    retries: Annotated[int | None, typer.Option(min=0, help="Further tries of a request. [5]")] = None,
) -> None:
    """Draw samples of every prompt into a folder, with one process or all of an `accelerate launch`."""
    given = read_prompts(prompts, limit, chat)
    from alignment.data.prompt_files import refuse_unrendered
    from alignment.models import load_tokenizer
    from alignment.models.pools import sample_pool
    from alignment.models.sampling import Generation
    from alignment.processes import connect

    tokenizer, load = load_tokenizer(model), {"name_or_path": model, "dtype": dtype}
    if chat and not tokenizer.chat_template:
        raise UserError(f"{model}: its tokenizer has no chat template; give prompts as texts, without --chat")
    refuse_unrendered(given, tokenizer)
    asked: dict[str, Any] = {"endpoint_model": endpoint_model, "api_key_env": api_key_env, "server_ids": server_ids}
    asked |= {"concurrency": concurrency, "retries": retries}
    backend = choose_backend(load, tokenizer, vllm, endpoint, asked)
    generation = Generation(max_new_tokens, temperature, top_p, top_k, batch_size)
    state = connect(cpu_threads)
    keys: dict[str, Any] = {"generation": generation, "seed": seed, "prompts_per_shard": prompts_per_shard}
    pool = sample_pool(load, tokenizer, [prompt for prompt, _ in given], output, samples, backend=backend, **keys)
    state.destroy_process_group()  # left to the interpreter's end, gloo's threads now and then abort the process
    if state.is_main_process:
        total = pool.prompts * pool.n
        print(f"{output}: {pool.prompts} prompts, {total} samples, {pool.unfinished()} unfinished")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    run_or_exit(app)
